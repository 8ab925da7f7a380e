"""Trains a model that hears, from nothing, while you watch; then asks it what it heard.

    python -m train.demo                                # ten minutes on two cores
    python -m train.demo --manifest digits/manifest.jsonl --steps 12000 --out runs/tiny

The speech is synthesised, a new room and microphone for every clip; recordings of your own join
it with `--manifest`. The model that comes out is a folder in Hugging Face's format, with the tiny
preset's shape, a card and pictures:

    qwen2audio transcribe --model runs/demo clip.wav
"""

import dataclasses
import functools
import json
import pathlib
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from flax import nnx

from qwen2audio_jax import Processor, Qwen2Audio, audio, draw, generate, preset
from qwen2audio_jax.data import batch, lessons, manifest, synth
from qwen2audio_jax.evaluation import recognition
from qwen2audio_jax.training import loop, loss
from qwen2audio_jax.training.learner import Learner
from qwen2audio_jax.training.log import Log
from qwen2audio_jax.training.optimizer import OptimizerConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """What to train on, how long, and where to leave the model."""

    steps: int = 1800
    """Batches to learn from, each of 8 to 32 clips."""
    learning_rate: float = 1e-3
    """The peak, after a twentieth of the steps; then a cosine down to nothing."""
    augmented: float = 0.4
    """The part of the clips that is made harder: rooms, noises, microphones, speed."""
    manifest: tuple[pathlib.Path, ...] = ()
    """JSONL files of recordings (audio, text): rows of split "test" are kept for the score."""
    leave_out: tuple[str, ...] = ()
    """Speakers of the manifests who are not trained on and alone make up the recordings' score."""
    seed: int = 0
    out: pathlib.Path = pathlib.Path("runs/demo")
    """The folder to write; one that holds a model already is overwritten."""
    clips: int = 300
    """Held-out phrases to score."""


def main(settings: Settings) -> None:
    began = time.perf_counter()
    train, test = recordings(settings)
    folder = settings.out
    config = preset("tiny")
    texts = [sample.text for sample in train]
    lessons.write_tokenizer(folder, texts, vocabulary=config.decoder.vocabulary)
    processor = Processor.from_pretrained(folder)
    course = batch.Course(
        processor=str(folder),
        seed=settings.seed,
        warmup=min(
            settings.steps // 4, 500
        ),  # what a word is, is learned sooner from few, clean words
        augmented=settings.augmented,
        recordings=tuple((sample.audio, sample.text) for sample in train),
    )
    optimizer = OptimizerConfig(
        name="muon",  # a third of AdamW's errors after as many steps
        learning_rate=settings.learning_rate,
        steps=settings.steps,
        warmup_steps=settings.steps // 20,
        weight_decay=0.05,
    )
    model = Qwen2Audio(config, scan_layers=False, rngs=nnx.Rngs(settings.seed))
    model.encoder.look_nearby()
    batches = batch.ahead(functools.partial(batch.make, course), range(settings.steps))
    learner = Learner(model, optimizer, loss.next_token_and_words)
    log = Log(None)
    if loop.train(learner, batches, log=log) is not None:
        raise KeyboardInterrupt
    model, history = learner.model(), log.rows
    minutes = (time.perf_counter() - began) / 60
    (folder / "history.json").write_text(json.dumps(history))
    jax.tree.map(lambda x: x.astype(jnp.bfloat16), model).save_pretrained(folder)
    processor.save_pretrained(folder)

    # What is scored is what was written, read back.
    model = Qwen2Audio.from_pretrained(folder, dtype="float32")
    scores = evaluate(model, processor, settings, test)
    (folder / "README.md").write_text(card(settings, scores, history, train, minutes))
    report(scores)
    converse(model, processor)
    draw.history(history, folder / "loss.png")
    phrase = max(recognition.held_out(20), key=lambda each: len(each.text.split()))
    draw.heard(model, processor, phrase.wave, phrase.text, folder / "heard.png")
    print(f"\nThe model is in {folder}, its pictures loss.png and heard.png beside it. Now:")
    print(f"  qwen2audio transcribe --model {folder} CLIP")


def recordings(settings: Settings) -> tuple[list[manifest.Sample], list[manifest.Sample]]:
    """The manifests' samples: those to train on, and those to keep for the score."""
    samples = [sample for path in settings.manifest for sample in manifest.read(path)]
    speakers = {sample.fields.get("speaker") for sample in samples}
    if unknown := set(settings.leave_out) - speakers:
        raise ValueError(f"no speaker {', '.join(sorted(unknown))} in the manifests")
    out = lambda sample: sample.fields.get("speaker") in settings.leave_out
    test = lambda sample: sample.fields.get("split") == "test"
    candidates = [sample for sample in samples if not test(sample) and not out(sample)]
    train, left_out = batch.usable(candidates, batch.Course.shapes)
    if left_out:
        reasons = ", ".join(f"{count} {reason}" for reason, count in left_out.items())
        print(f"{len(train)} of {len(candidates)} recordings are used; left out: {reasons}")
    if candidates and not train:
        raise ValueError("none of the recordings can be used")
    kept = [sample for sample in samples if (out if settings.leave_out else test)(sample)]
    return train, kept


def evaluate(
    model: Qwen2Audio,
    processor: Processor,
    settings: Settings,
    test: list[manifest.Sample],
) -> dict[str, recognition.Score]:
    """Scores on voices never trained on, and on what the manifests keep for the score."""
    phrases = recognition.held_out(settings.clips)
    hear = functools.partial(recognition.score, model, processor)
    scores = {"held-out voices": hear([p.wave for p in phrases], [p.text for p in phrases])}
    if test:
        name = f"left out: {', '.join(settings.leave_out)}" if settings.leave_out else "recordings"
        waves = [audio.load(sample.audio) for sample in test]
        scores[name] = hear(waves, [sample.text for sample in test])
    return scores


def report(scores: dict[str, recognition.Score]) -> None:
    """Prints the word error rates, and some of what was heard."""
    print(f"\n{'':24} {'clips':>6} {'words wrong':>12}")
    for name, score in scores.items():
        print(f"{name:24} {score.clips:6} {score.word_error_rate:12.1%}")
    for name, score in scores.items():
        print(f"\n{name}: said, and heard")
        for said, heard in list(zip(score.references, score.heard, strict=True))[:6]:
            print(f"  {said:36} {heard}")


def converse(model: Qwen2Audio, processor: Processor) -> None:
    """Plays the model a phrase and asks about it."""
    words, voice = "seven green bird window", synth.HELD_OUT_VOICES[0]
    wave = synth.speak(words, voice=voice)
    print(f"\nA voice it does not know ({voice}) says: {words}")
    for question in (*lessons.QUESTIONS, None):
        text = [] if question is None else [{"type": "text", "text": question}]
        content = [{"type": "audio", "audio": (wave, audio.SAMPLE_RATE)}, *text]
        tokens = generate(
            model, processor([{"role": "user", "content": content}]), max_new_tokens=32
        )
        print(f"  {question or '(no question: voice chat)':32} {processor.decode(tokens)[0]}")


def card(
    settings: Settings,
    scores: dict[str, recognition.Score],
    history: list[dict[str, float]],
    train: list[manifest.Sample],
    minutes: float,
) -> str:
    """The model card: how it was made, and how it scores."""
    rows = "\n".join(
        f"| {name} | {score.clips} | {score.word_error_rate:.1%} |"
        for name, score in scores.items()
    )
    licences = sorted({str(s.fields["licence"]) for s in train if s.fields.get("licence")})
    spoken = f" and {len(train)} recordings ({', '.join(licences) or 'no licence stated'})"
    count = sum(x.size for x in jax.tree.leaves(nnx.eval_shape(lambda: _tiny())))
    return f"""---
license: apache-2.0
language: en
pipeline_tag: audio-text-to-text
---

# Qwen2-Audio, tiny

{count / 1e6:.1f} M parameters in Qwen2-Audio's architecture, trained from nothing with
[qwen2audio_jax](https://pypi.org/project/qwen2audio-jax/) on synthesised speech (espeak-ng,
{len(synth.TRAIN_VOICES)} voices){spoken if train else ""}. It knows {len(synth.WORDS)} English
words, says which of them it hears in phrases of up to five, and answers four questions about them.
It shows how the architecture works and tests what carries it; it is of no other use.

| test | clips | word error rate |
|---|---|---|
{rows}

Held-out voices are {len(synth.HELD_OUT_VOICES)} synthetic voices whose timbres no training saw.

Words: {", ".join(synth.WORDS)}.

Questions: {" ".join(lessons.QUESTIONS)}

Made with {settings.steps} steps of 8 to 32 clips (Muon, seed {settings.seed}, peak learning rate
{settings.learning_rate:g}) in {minutes:.0f} minutes on a CPU; the last loss was
{np.mean([row["loss"] for row in history[-20:]]):.3f}.
"""


def _tiny() -> Qwen2Audio:
    return Qwen2Audio(preset("tiny"), rngs=nnx.Rngs(0))


if __name__ == "__main__":
    try:
        main(tyro.cli(Settings, description=__doc__))
    except (ValueError, OSError, ImportError, FloatingPointError) as error:
        print(f"train.demo: error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
