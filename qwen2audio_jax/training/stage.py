"""A whole run, in one folder: what is given, trained, measured, saved, and told at the end.

run.json, config.json, tokenizer.json, ...   see run.py
.in-use                                      locked while a process trains here
checkpoints/                                 to go on from, the best one among them
log.jsonl, tensorboard/, profile/            while it runs
ref_log_probs/                               the reference's, where they are precomputed
pairs/                                       the pairs with them, as manifests
model/                                       what came out, in Hugging Face's format
model-best/                                  the best checkpoint, where that is not the last
adapter/, adapter-best/                      the same as adapters, in PEFT's
answers.jsonl, summary.md, summary.png       how good it is
"""

import contextlib
import dataclasses
import json
import pathlib
from functools import partial

import jax
from jax.sharding import Mesh

from qwen2audio_jax import flash, sharding
from qwen2audio_jax.config import Config
from qwen2audio_jax.data.batches import added, report
from qwen2audio_jax.data.feeds import Feeds
from qwen2audio_jax.data.mixture import Mixture, Part
from qwen2audio_jax.data.sources import on_disk
from qwen2audio_jax.model import Qwen2Audio
from qwen2audio_jax.processor import Processor
from qwen2audio_jax.prompt import AUDIO
from qwen2audio_jax.training import (
    export,
    held_out,
    hosts,
    inputs,
    loop,
    lora,
    peft,
    placement,
    run,
    summary,
)
from qwen2audio_jax.training.checkpoint import Checkpoints
from qwen2audio_jax.training.learner import Learner, fresh
from qwen2audio_jax.training.log import Log, check_packages
from qwen2audio_jax.training.objective import learner_of
from qwen2audio_jax.training.reference import precompute, settle
from qwen2audio_jax.training.settings import PreferenceSettings, Settings
from qwen2audio_jax.weights import huggingface
from qwen2audio_jax.weights import settings as model_settings
from qwen2audio_jax.weights.source import locate


def train(settings: Settings) -> int | None:
    """Begins a run, or goes on with it, to its end.

    Returns:
      The signal that ended it before its end; None: it is done.

    Raises:
      ValueError, OSError, ImportError: one line on what is wrong, with the data, the settings, the
        disk; what was saved is still there.
      FloatingPointError: as in `loop.train`.
    """
    on_disk(settings.out)
    check_packages(tensorboard=settings.tensorboard, wandb=settings.wandb)
    pairs = isinstance(settings, PreferenceSettings)
    mesh = settings.mesh.make()
    settings = _with_start(run.fed(settings, len(placement.groups(mesh))))
    placement.check((bucket.tokens for bucket in settings.data.buckets), mesh)
    parts = inputs.training(settings.data, pairs=pairs, words=settings.ctc > 0)
    kept = inputs.held_out(settings.data, settings.evaluation.samples, pairs=pairs)
    if kept:
        held_out.check_best(settings.loop.best, kept, pairs=pairs, ctc=settings.ctc > 0)
    start = _apart(settings)
    sizes, processor = model_settings.read(start), Processor.from_pretrained(start)
    _check_fit(sizes, processor, settings)
    if not jax.process_index():
        inputs.tell_tags(settings.data, processor.tokenizer)
        if settings.from_scratch and huggingface.is_in(start):
            print(
                f"random parameters: --model {settings.model} gives sizes and words only; "
                "--no-from-scratch goes on with its own",
                flush=True,
            )
    with run.alone(settings.out):
        return _train(settings, sizes, processor, mesh, start, parts, kept)


def _train(
    settings: Settings,
    sizes: Config,
    processor: Processor,
    mesh: Mesh,
    start: pathlib.Path,
    parts: tuple[Part, ...],
    kept: list[inputs.HeldOut],
) -> int | None:
    """Begins or goes on in a folder that is this job's alone."""
    pairs = isinstance(settings, PreferenceSettings)
    if run.begin(settings.out, settings, model=sizes, processor=processor):
        settings.optimizer.check_change(run.begun(settings.out).get("optimizer", {}))
        processor = Processor.from_pretrained(settings.out)
    settled = settle(settings, [*parts, *(each.part for each in kept)]) if pairs else settings
    learner = _learner(settled, sizes, mesh, start)
    mixture = Mixture(
        parts=parts,
        processor=str(processor.folder.absolute()),
        buckets=settings.data.buckets,
        seed=settings.seed,
        pack=settings.data.pack,
        words=settings.ctc > 0,
        accumulate=settings.gradient_accumulation_steps,
        hosts=settings.data.feeds,
        workers=settings.data.workers,
        fatal=settings.data.fatal,
    )
    _tell_rows(mixture, mesh)
    if pairs and settled.precompute_ref_log_probs:
        known = partial(precompute, learner, _shared(mixture, mesh), folder=settings.out)
        with flash.using(settings.attention):
            # by their rows, which a run may go on with otherwise
            kept_parts = known([dataclasses.replace(each.part, name=each.rows) for each in kept])
            kept = [
                dataclasses.replace(each, part=dataclasses.replace(part, name=each.part.name))
                for part, each in zip(kept_parts, kept, strict=True)
            ]
            mixture = dataclasses.replace(mixture, parts=known(parts), references=True)
    return _run(settings, learner, mixture, processor, kept)


def _apart(settings: Settings) -> pathlib.Path:
    """The model's folder.

    Raises:
      ValueError: the run would write over it, or over the adapter that it begins with.
    """
    fetch = partial(locate, settings.model, huggingface.PATTERNS)
    folder, names = hosts.by_first(lambda: _listed(fetch()))
    if not all((folder / name).exists() for name in names):  # it is on no disk that all see
        folder = fetch()
    out = settings.out
    given = [("--model", folder)]
    if settings.lora.start is not None:
        given.append(("--lora.start", pathlib.Path(settings.lora.start)))
    written = [out, *export.folders(out)]
    written = [each.resolve() for each in written]
    for flag, path in given:
        if path.resolve() in written:
            raise ValueError(f"wanted another --out than {out}, which would write over {flag}")
    return folder


def _check_fit(sizes: Config, processor: Processor, settings: Settings) -> None:
    """Refuses words and clips that a model of such sizes takes otherwise, or not at all.

    Raises:
      ValueError: its steps would give NaN, or it would hear nothing, without a word.
    """
    words, of_model = processor.tokenizer, f"--model {settings.model}: wanted"
    most, ids = sizes.decoder.vocabulary, words.core.get_vocab()
    last = max(ids, key=ids.get)
    if ids[last] >= most:
        got = f"{last!r} of number {ids[last]} in its tokenizer"
        raise ValueError(f"{of_model} tokens below its vocabulary of {most}, got {got}")
    if sizes.audio_token != words.audio_id:
        got = f"number {words.audio_id} in its tokenizer"
        raise ValueError(f"{of_model} {AUDIO} as its audio_token {sizes.audio_token}, got {got}")
    if sizes.encoder.mels != processor.mels:
        wanted = f"{sizes.encoder.mels} mel bands, which it hears"
        raise ValueError(f"{of_model} {wanted}, got {processor.mels} in its feature settings")
    most = 2 * sizes.encoder.positions
    for bucket in settings.data.buckets:
        if bucket.clips and bucket.frames > most:
            wanted = f"at most the {most} frames that --model {settings.model} hears"
            raise ValueError(f"--data.buckets {bucket}: wanted {wanted}, got {bucket.frames}")


def _listed(folder: pathlib.Path) -> tuple[pathlib.Path, list[str]]:
    return folder, [path.name for path in folder.iterdir()]


def _tell_rows(mixture: Mixture, mesh: Mesh) -> None:
    """Says on what, and how large a step is, where that is not what --data.buckets say, and what
    it wastes."""
    if jax.process_index():
        return
    if mesh.size > 1:
        axes = ", ".join(f"{name} {size}" for name, size in mesh.shape.items() if size > 1)
        print(f"{mesh.size} devices: {axes}", flush=True)
    times = mixture.hosts * mixture.accumulate
    if times > 1:
        each = dict.fromkeys(f"{bucket.rows * times}x{bucket.tokens}" for bucket in mixture.buckets)
        feeds = f"feeds {mixture.hosts}, batches of each {mixture.accumulate}"
        print(f"rows and tokens of a step: {', '.join(each)} ({feeds})", flush=True)
    for bucket in mixture.buckets:
        if empty := placement.empty_rows(bucket, mixture.hosts, mesh):
            rows = bucket.rows * mixture.hosts
            print(
                f"--data.buckets {bucket}: {rows} rows do not divide by the devices, which compute "
                f"{empty} empty ones beside them",
                flush=True,
            )


def _shared(mixture: Mixture, mesh: Mesh) -> Mixture:
    """The mixture in shapes of batches that all hosts share."""
    return dataclasses.replace(mixture, buckets=placement.widened(mixture.buckets, mesh))


def _with_start(settings: Settings) -> Settings:
    """Settings of the adapters that they begin with, where they say nothing else."""
    if settings.lora.start is None:
        return settings
    theirs = peft.read_config(settings.lora.start)
    return dataclasses.replace(settings, lora=settings.lora.like(theirs))


def _learner(settings: Settings, sizes: Config, mesh: Mesh, start: pathlib.Path) -> Learner:
    how = {"dtype": settings.weight_dtype, "scan_layers": settings.scan_layers}
    sharding.check(sizes, mesh)
    if settings.from_scratch:
        model = fresh(sizes, mesh, seed=settings.seed, **how)
    else:
        model = Qwen2Audio.from_pretrained(
            start, mesh=mesh, progress=jax.process_index() == 0, **how
        )
    learner = learner_of(settings, model, mesh, start=_adapters(settings, model))
    if settings.mesh.show and jax.process_index() == 0:
        print(placement.table(learner.held()), flush=True)
        print(placement.activations(learner.mesh), flush=True)
    return learner


def _adapters(settings: Settings, model: Qwen2Audio) -> lora.Adapters | None:
    """Those that the settings begin with, if any.

    Raises:
      ValueError: they are of other adapters than the settings.
    """
    if settings.lora.start is None:
        return None
    theirs, adapters = peft.load(settings.lora.start, model)
    for name in ("r", "lora_alpha"):
        wanted, got = getattr(settings.lora, name), getattr(theirs, name)
        if wanted != got:
            raise ValueError(
                f"{settings.lora.start}: wanted adapters with {name} {wanted}, got {got}"
            )
    for name, entries in (("target_modules", lora.targets), ("modules_to_save", lora.saved)):
        wanted, got = ({e.name for e in entries(c, model)} for c in (settings.lora.config, theirs))
        if wanted != got:
            raise ValueError(f"{settings.lora.start}: wanted adapters of the same {name}")
    return adapters


def _run(
    settings: Settings,
    learner: Learner,
    mixture: Mixture,
    processor: Processor,
    kept: list[inputs.HeldOut],
) -> int | None:
    folder, config = settings.out, settings.loop
    log = Log(
        folder,
        tensorboard=settings.tensorboard,
        wandb=settings.wandb,
        settings=run.as_json(settings),
    )
    checkpoints = Checkpoints(folder, keep=config.keep, best=config.best, mode=config.mode)
    shared = _shared(mixture, learner.mesh)
    evaluate = partial(_evaluate, settings, learner, shared, processor, kept) if kept else None
    with (
        contextlib.closing(checkpoints),
        contextlib.closing(log),
        contextlib.closing(Feeds(mixture, *placement.share(learner.mesh))) as batches,
        hosts.together(),  # closing would wait for a save with the one that is lost
    ):
        signal = loop.train(
            learner,
            batches,
            config,
            log=log,
            checkpoints=checkpoints,
            evaluate=evaluate,
            resumed=partial(run.keep, folder, settings),
            dtype=settings.dtype,
        )
        if signal is None:
            counts = added(hosts.counted(batches.counts, placement.groups(learner.mesh)))
            heard = max(count["longest"] for count in counts.values())
            export.save(settings, learner, processor, heard)
            best = export.save_best(settings, learner, processor, heard, checkpoints)
            counts = report(counts, mixture.sizes)
            if jax.process_index() == 0:
                summary.write(folder, log.rows, counts, best, config.best)
    return signal


def _evaluate(
    settings: Settings,
    learner: Learner,
    mixture: Mixture,
    processor: Processor,
    kept: list[inputs.HeldOut],
) -> dict[str, float]:
    scores = held_out.losses(kept, mixture, learner.measure)
    how = settings.evaluation
    with learner.on_mesh(), flash.using(settings.attention):
        answers, bad = held_out.answers(
            learner.model(), processor, kept, rows=how.rows, max_new_tokens=how.max_new_tokens
        )
    if jax.process_index() == 0:
        lines = [json.dumps(dataclasses.asdict(each), ensure_ascii=False) for each in answers]
        (settings.out / "answers.jsonl").write_text("\n".join([*lines, ""]), "utf-8")
    if bad:
        scores["bad_samples"] = float(sum(bad.values()))
    return scores | held_out.scores(answers)
