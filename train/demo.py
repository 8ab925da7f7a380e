"""Trains a model that hears, in the reference's three stages, from nothing, while you watch.

    python -m train.demo                                # twelve minutes on two cores
    python -m train.demo --world full --manifest digits/manifest.jsonl --out runs/tiny

Pretraining teaches tasks, SFT conversations (written questions and spoken ones), DPO a behaviour
that SFT left out: to say "I hear no speech." rather than invent words. The full world begins with
voices, which are learned late among all else. What it is all about is synthesised, a new room and
microphone for every clip; the small world is sixteen words and some sounds, the full one (two and a
half hours) is described in data/world.py. Recordings of your own join pretraining with
`--manifest`. A demonstration that was stopped goes on where it was.

What comes out is a folder in Hugging Face's format, with the tiny preset's shape, a card and
pictures, each stage's own folder (see train.pretrain, train.sft, train.dpo) beside it:

    qwen2audio chat clip.wav --model runs/demo
"""

import dataclasses
import itertools
import json
import pathlib
import sys
from typing import Any, Literal

import jax
import soundfile
from flax import nnx

from qwen2audio_jax import Processor, Qwen2Audio, draw, mel, preset, weights
from qwen2audio_jax.audio import SAMPLE_RATE
from qwen2audio_jax.data import dialogue, sources, synth
from qwen2audio_jax.data.augment import Augmentation
from qwen2audio_jax.data.example import LONGEST, BadSample, hear
from qwen2audio_jax.data.pack import Bucket
from qwen2audio_jax.data.world import MODES, World
from qwen2audio_jax.evaluation import recognition
from qwen2audio_jax.evaluation import world as evaluation
from qwen2audio_jax.evaluation.world import Row
from qwen2audio_jax.processor import needed_frames
from qwen2audio_jax.training import log, run
from qwen2audio_jax.training.data_config import DataConfig
from qwen2audio_jax.training.optimizer import OptimizerConfig
from qwen2audio_jax.training.preference import PreferenceConfig
from qwen2audio_jax.training.settings import LoopConfig, PreferenceSettings, Settings
from qwen2audio_jax.weights import settings as model_settings
from train import command
from train.configs import laptop

STAGES = ("pretrain", "sft", "dpo")
FIRST, VOICES = "voices", 0.05  # what the full world's pretraining begins with, and its part of it
VOCABULARY = {"small": 576, "full": 1280}
STEPS = {"small": (640, 420, 60), "full": (16_000, 4500, 200)}
# Learning rates: a high one forgets what a longer pretraining has learned.
PEAKS = {"small": (1e-3, 7e-4, 2e-4), "full": (1e-3, 4e-4, 4e-5)}
SIZES = {"small": (100, 190, 340), "full": (100, 160, 220, 340, 600)}  # mel frames of a batch
LONGER = (1004, 3000)  # where recordings need them
# The part of pretraining's and SFT's clips that is augmented, and masked: who hears so few of them
# has yet to learn what they have in common.
CHANGED = {"small": (0.15, 0.1), "full": (0.4, 0.3)}
HOW = Augmentation(telephone=0.5)  # recorded digits are of 8 kHz
KEPT = {"small": 0.2, "full": 0.45}  # of pretraining's tasks in SFT, where a mode has 0.35
RECORDED = (
    "[AUDIO:audio,words=text] Detect the language and recognize the speech: -> <|en|>[TEXT:text]"
)
SCORES = "scores.json"
WINDOW = 2.0  # seconds of speech that are heard best: phrases are hardly longer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Demo:
    """What to train on, how long, and where to leave the model."""

    world: Literal["small", "full"] = "small"
    """What is heard and spoken of."""
    out: pathlib.Path = pathlib.Path("runs/demo")
    """The folder to write, or to go on with."""
    manifest: tuple[str, ...] = ()
    """JSONL files, or URLs of such, of recordings (audio, text) of at most 30 s: rows of split
    "train" are learned, those of split "test" are kept for the score; where no row has a split, all
    are learned."""
    steps: tuple[int, int, int] | None = None
    """Of pretraining, SFT and DPO; None: what the world takes."""
    seed: int = 0
    clips: int = 50
    """Held-out samples of each task to score; for recognition six times as many, for each mode of
    conversation and for preferences four times."""


def main(demo: Demo) -> int:
    """Trains, scores and shows; gives the exit status, which says what signal ended it, if any."""
    from qwen2audio_jax.training import stage  # Grain is an extra

    command.prepare()
    world = World.named(demo.world)
    begin(demo, world)
    told: dict[str, list[Row]] = {}
    for settings in [*before(demo), *plan(demo)]:
        name = settings.out.name
        print(f"\n{name}: {settings.optimizer.steps} steps", flush=True)
        if (signal := stage.train(settings)) is not None:
            return 128 + signal
        if name not in STAGES:
            continue
        told[name] = score(demo, settings.out)
        print(f"\n{evaluation.compare(told)}", flush=True)
    model, processor = load(demo.out / STAGES[-1])
    finish(demo, world, model, processor, told)
    converse(model, processor, world)
    print(f"\nThe model is in {demo.out}, with its card (README.md) and pictures. Now:")
    print(f"  qwen2audio transcribe --model {demo.out} CLIP")
    print(f"  qwen2audio chat CLIP --model {demo.out}")
    return 0


def begin(demo: Demo, world: World) -> None:
    """Writes what pretraining begins with: sizes and words."""
    sources.on_disk(demo.out)
    for path in demo.manifest:
        _rows(path)  # a mistake is told before anything is written
    folder = demo.out / "start"
    first, *_ = *before(demo), _pretraining(demo, ())
    if run.goes_on(first.out):  # it refuses what it did not begin with
        return
    vocabulary = VOCABULARY[world.name]
    world.write_tokenizer(folder, vocabulary=vocabulary)
    config = preset("tiny")
    decoder = dataclasses.replace(config.decoder, vocabulary=vocabulary)
    model_settings.write(dataclasses.replace(config, decoder=decoder), folder)


def plan(demo: Demo) -> list[Settings]:
    """The three stages, each of which begins where the one before it ended."""
    recorded = _recorded(demo)
    return [_pretraining(demo, recorded), _conversations(demo, recorded), _preferences(demo)]


def before(demo: Demo) -> list[Settings]:
    """What pretraining begins with in the full world: who speaks and how, beside English.

    It is learned in some hundred steps so, and stays. Among all tasks at once little of it is after
    eight thousand (benchmarks/results/full-world.md).
    """
    if demo.world == "small":
        return []
    shares = {"gender": 0.25, "pitch": 0.25, "emotion": 0.2, "recognise en": 0.3}
    whole = _pretraining(demo, ())
    steps = max(2, round(VOICES * whole.optimizer.steps))
    data = dataclasses.replace(
        whole.data,
        train=tuple(f"world:{demo.world}/{kind}" for kind in shares),
        tasks=("",) * len(shares),
        weights=tuple(shares.values()),
    )
    optimizer = dataclasses.replace(
        whole.optimizer, steps=steps, warmup_steps=steps // 8, schedule_type="constant"
    )
    start = {"model": str(demo.out / "start"), "from_scratch": True}
    return [
        dataclasses.replace(whole, out=demo.out / FIRST, data=data, optimizer=optimizer, **start)
    ]


def _pretraining(demo: Demo, recorded: tuple[str, ...]) -> Settings:
    made = f"world:{demo.world}"
    small = demo.world == "small"
    begins = demo.out / "start" if small else demo.out / FIRST / "model"
    return Settings(
        **_shared(demo, 0) | {"model": str(begins)},
        from_scratch=small,
        ctc=0.3,
        data=DataConfig(
            train=(f"{made}/tasks", f"{made}/recognise en", *recorded),
            tasks=("", "", *[RECORDED] * len(recorded)),
            weights=(0.7, 0.3, *(0.15 / len(recorded) for _ in recorded)),
            buckets=laptop(*_sizes(demo)),
            augmented=CHANGED[demo.world][0],
            masked=CHANGED[demo.world][0],
            augmentation=HOW,
        ),
    )


def _conversations(demo: Demo, recorded: tuple[str, ...]) -> Settings:
    made = f"world:{demo.world}"
    return Settings(
        **_shared(demo, 1),
        ctc=0.3,
        data=DataConfig(
            train=(
                *(f"{made}/{mode}" for mode in MODES),
                # some of what is known, or it is forgotten
                *(f"{made}/tasks", f"{made}/recognise en", *recorded),
            ),
            tasks=("", "", "", "", *[RECORDED] * len(recorded)),
            weights=(0.35, 0.35, KEPT[demo.world], 0.1, *(0.1 / len(recorded) for _ in recorded)),
            buckets=laptop(*_sizes(demo)[1:]),
            augmented=CHANGED[demo.world][1],
            masked=CHANGED[demo.world][1],
            augmentation=HOW,
        ),
    )


def _preferences(demo: Demo) -> Settings:
    longest = SIZES[demo.world][-1]
    return PreferenceSettings(
        **_shared(demo, 2),
        preference=PreferenceConfig(beta=0.1, rpo_alpha=1.0),
        data=DataConfig(
            train=(f"world:{demo.world}/preference",),
            # one shape: a second one takes as long to compile as it would save
            buckets=(Bucket(rows=12, tokens=50 + longest // 4, clips=12, frames=longest),),
        ),
    )


def _shared(demo: Demo, number: int) -> dict[str, Any]:
    """What a stage has in common with the others: its place, its start and its optimizer."""
    steps = (demo.steps or STEPS[demo.world])[number]
    return {
        "out": demo.out / STAGES[number],
        "model": str(demo.out / STAGES[number - 1] / "model"),
        "seed": demo.seed,
        "tensorboard": False,
        "loop": LoopConfig(save_every=500, keep=1, best="loss"),
        "optimizer": OptimizerConfig(
            name="muon",  # after as many steps, a third of AdamW's errors
            learning_rate=PEAKS[demo.world][number],
            steps=steps,
            warmup_steps=steps // 20,
            weight_decay=0.05,
        ),
    }


def _recorded(demo: Demo) -> tuple[str, ...]:
    """The manifests' rows that are learned, as sources."""
    return tuple(f"{path}:train" if _splits(_rows(path)) else str(path) for path in demo.manifest)


def _sizes(demo: Demo) -> tuple[int, ...]:
    """Mel frames of the batches: those of what is made, and more for recordings that need more."""
    sizes = SIZES[demo.world]
    seconds = [_seconds(row["audio"]) for row in recordings(demo, "train")]
    heard = [round(s * SAMPLE_RATE) for s in seconds if s <= LONGEST]
    needed = max((needed_frames(mel.frames(samples)) for samples in heard), default=0)
    for more in LONGER:
        sizes += (more,) * (needed > sizes[-1])
    return sizes


def _seconds(clip: Any) -> float:
    """How long a recording is; 0 of what cannot be heard, which is told when it is drawn."""
    try:
        return soundfile.info(clip).duration
    except (RuntimeError, TypeError):  # it is no file on this disk, or of a format that is decoded
        try:
            return len(hear(clip)) / SAMPLE_RATE
        except BadSample:
            return 0.0


def load(folder: pathlib.Path) -> tuple[Qwen2Audio, Processor]:
    """What a stage left."""
    model = Qwen2Audio.from_pretrained(folder / "model", dtype="float32")
    return model, Processor.from_pretrained(folder / "model")


def score(demo: Demo, folder: pathlib.Path) -> list[Row]:
    """Scores what a stage left on what no stage learns from, once."""
    path = folder / SCORES
    content = {"clips": demo.clips}
    content["manifests"] = [sources.Manifest(each).crc for each in demo.manifest]
    if path.exists():
        known = {"manifests": [], **json.loads(path.read_text("utf-8"))}
        if all(known[name] == value for name, value in content.items()):
            return [Row(**row) for row in known["rows"]]
    (model, processor), world = load(folder), World.named(demo.world)
    counts = dict.fromkeys((skill.name for skill in world.tasks), demo.clips)
    counts["recognise en"] *= 6
    counts |= dict.fromkeys((*MODES, "preference"), 4 * demo.clips)
    asked = [
        each
        for kind, count in counts.items()
        for each in evaluation.ask(processor, world, kind, count)
    ]
    rows = evaluation.rows(asked, evaluation.answer(model, processor, asked))
    waves, texts = [], []
    for sample in recordings(demo, "test"):
        try:
            waves.append(hear(sample["audio"]))
            texts.append(sample["text"])
        except BadSample as error:
            print(f"not scored: {error}", file=sys.stderr)
    if waves:
        rate = recognition.score(model, processor, waves, texts).word_error_rate
        rows.append(Row(task="recordings", metric="wer", value=rate, n=len(waves)))
    content["rows"] = [dataclasses.asdict(row) for row in rows]
    path.write_text(json.dumps(content, indent=1), "utf-8")
    return rows


def recordings(demo: Demo, split: str) -> list[dict[str, Any]]:
    """The manifests' rows that are to be learned, or to be scored."""
    found = []
    for path in demo.manifest:
        rows = _rows(path)
        usual = None if _splits(rows) else "train"
        found += [row for row in rows if (row.get("split") or usual) == split]
    return found


def _rows(path: str) -> list[dict[str, Any]]:
    """A manifest's rows, each of a clip and what is said in it."""
    source = sources.Manifest(path)
    rows = [source[i] for i in range(len(source))]
    for i, row in enumerate(rows):
        if not row.get("audio") or not isinstance(row.get("text"), str):
            got = ", ".join(row) or "no fields"
            raise ValueError(f"{source.where(i)}: wanted 'audio' and 'text', got {got}")
    return rows


def _splits(rows: list[dict[str, Any]]) -> set[str]:
    return {row["split"] for row in rows if row.get("split")}


def finish(
    demo: Demo,
    world: World,
    model: Qwen2Audio,
    processor: Processor,
    told: dict[str, list[Row]],
) -> None:
    """Writes the model, its card and its pictures."""
    weights.save(jax.tree.map(lambda x: x.astype("bfloat16"), model), demo.out)
    processor.save_pretrained(demo.out, window=WINDOW)
    histories = {
        stage: [row for row in log.read(demo.out / stage / log.LOG) if "loss" in row]
        for stage in STAGES
    }
    first = [row for each in before(demo) for row in log.read(each.out / log.LOG)]
    rows = itertools.chain(first, *histories.values())
    minutes = sum(row.get("seconds", 0) for row in rows) / 60
    (demo.out / "README.md").write_text(card(demo, world, model, told, minutes), "utf-8")
    draw.stages(histories, told, demo.out / "stages.png")
    said = [world["recognise en"].sample(number, "test") for number in range(20)]
    longest = max(said, key=lambda sample: len(sample["text"].split()))
    draw.heard(model, processor, longest["audio"][0], longest["text"], demo.out / "heard.png")


def converse(model: Qwen2Audio, processor: Processor, world: World) -> None:
    """Both modes and silence, then a dialogue; voices and sounds are new to the model."""
    asked = [
        each
        for kind, count in (*((mode, 4) for mode in MODES), ("preference", 6))
        for each in evaluation.ask(processor, world, kind, count)
    ]
    print("\nVoices and sounds that it does not know; what it is asked, and answers:")
    for each, told in zip(asked, evaluation.answer(model, processor, asked), strict=True):
        print(f"  {each.task:24} {each.question:34} {told:32} (right: {each.right})")
    records = world.source("analysis", "test", 1000)
    talks = (records[i]["messages"] for i in range(len(records)))
    print("\nA conversation: a clip, a question, and another one about the same clip:")
    for each, told in evaluation.converse(model, processor, next(m for m in talks if len(m) > 2)):
        print(f"  user:      {each.question}")
        print(f"  assistant: {told:60} (right: {each.right})")


def card(
    demo: Demo, world: World, model: Qwen2Audio, told: dict[str, list[Row]], minutes: float
) -> str:
    """The model card: how it was made, and how it scores."""
    train = recordings(demo, "train")
    licences = sorted({str(row["licence"]) for row in train if row.get("licence")})
    spoken = f" and {len(train)} recordings ({', '.join(licences) or 'no licence stated'})"
    knows_voices = any(skill.name == "voice" for skill in world.tasks)
    named = ", and on new phrases of the voices that are known by name" if knows_voices else ""
    count = sum(x.size for x in jax.tree.leaves(nnx.state(model)))
    steps = " + ".join(map(str, demo.steps or STEPS[demo.world]))
    return f"""---
license: apache-2.0
language: [{", ".join(world.words)}]
pipeline_tag: audio-text-to-text
---

# Qwen2-Audio, tiny

{count / 1e6:.1f} M parameters in Qwen2-Audio's architecture, trained from nothing with
qwen2audio_jax by pretraining, SFT and DPO ({steps}
steps, seed {demo.seed}, {minutes:.0f} minutes on a CPU) on a made world of synthesised speech
(espeak-ng, {len(synth.TRAIN_VOICES)} voices) and sounds{spoken if train else ""}. It shows how the
architecture works and tests what carries it; it is of no other use.

On held-out voices and sounds{named}, after each stage:

```
{evaluation.compare(told)}
```

`exact` is the part of answers that are right to the letter, `wer` the words that are wrong,
`times` the boundaries of words that are right within 0.1 s. To a clip without speech the right
answer is: {dialogue.NO_SPEECH}

Words: {"; ".join(f"{language}: {', '.join(words)}" for language, words in world.words.items())}.

Tasks: {", ".join(skill.name for skill in world.tasks)}.
"""


if __name__ == "__main__":
    command.run(main, Demo, "train.demo", __doc__, extra="demo")
