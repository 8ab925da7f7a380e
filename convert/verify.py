"""The same prompt through transformers and through us, stage by stage: a table of differences.

Example:

    python -m convert.verify ~/Qwen2-Audio-7B-Instruct --audio clip.wav

Both run in float32, one after the other. The exit status is 1 if a stage differs by more than
the tolerance times its largest value (or times 1, where all are smaller), or if the greedy tokens
differ.
"""

import argparse
import gc
import pathlib
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from convert import guard
from qwen2audio_jax import audio, encoder, layers, mel, merge, weights
from qwen2audio_jax.config import Config
from qwen2audio_jax.generate import generate
from qwen2audio_jax.model import Qwen2Audio
from qwen2audio_jax.processor import Processor
from qwen2audio_jax.weights import huggingface, settings

Inputs = dict[str, np.ndarray]
Trace = dict[str, np.ndarray]


@jax.jit
def _trace(model, input_ids, attention_mask, input_features, feature_attention_mask):
    frames = feature_attention_mask.sum(axis=1).astype(jnp.int32)
    stages = {}
    x = stages["conv stem"] = model.encoder.stem(input_features)
    valid = jnp.arange(x.shape[1]) < encoder.positions_of(frames)[:, None]
    step = lambda block, x, _: (block(x, valid),) * 2
    x, each = layers.run(model.encoder.blocks, step, x, None)
    stages |= {f"encoder layer {i}": each[i] for i in range(len(each))}
    x = stages["pooled states"] = model.encoder.pool(x)
    states = stages["projector"] = model.projector(x)
    slots, counts = input_ids == model.config.audio_token, encoder.states_of(frames)
    x = merge.merge(model.decoder.embed(input_ids), slots, states, counts)
    stages["merged embeddings"] = x
    mask = attention_mask.astype(jnp.int32)
    positions = jnp.maximum(jnp.cumsum(mask, axis=1) - 1, 0)
    step = lambda block, x, _: (block(x, positions, mask)[0],) * 2
    x, each = layers.run(model.decoder.blocks, step, x, None)
    stages |= {f"decoder layer {i}": each[i] for i in range(len(each))}
    stages["logits"] = model.decoder.logits(model.decoder.norm(x))
    return stages


def trace(model: Qwen2Audio, inputs: Inputs) -> Trace:
    """What each stage of our model makes of `inputs`, in float32."""
    stages = _trace(model, **inputs)
    # jit sorts a dict's keys
    order = sorted(stages, key=_rank)
    return {name: np.asarray(stages[name], np.float32) for name in order}


def trace_reference(model: Any, inputs: Inputs) -> Trace:
    """What each stage of transformers' model makes of `inputs`, in float32."""
    import torch

    stages: dict[str, Any] = {}

    def after(name):
        def hook(module, args, output):
            output = getattr(output, "last_hidden_state", output)
            stages[name] = output[0] if isinstance(output, tuple) else output

        return hook

    def before(name):
        def hook(module, args, kwargs):
            stages[name] = args[0] if args else kwargs["hidden_states"]

        return hook

    audio, text = model.model.audio_tower, model.model.language_model
    hooks = [
        audio.layers[0].register_forward_pre_hook(before("conv stem"), with_kwargs=True),
        audio.register_forward_hook(after("pooled states")),
        model.model.multi_modal_projector.register_forward_hook(after("projector")),
        text.layers[0].register_forward_pre_hook(before("merged embeddings"), with_kwargs=True),
        model.lm_head.register_forward_hook(after("logits")),
    ]
    for tower, blocks in (("encoder", audio.layers), ("decoder", text.layers)):
        for i, block in enumerate(blocks):
            hooks.append(block.register_forward_hook(after(f"{tower} layer {i}")))
    try:
        with torch.no_grad():
            model(**{name: torch.from_numpy(np.array(x)) for name, x in inputs.items()})
    finally:
        for hook in hooks:
            hook.remove()
    return {name: stages[name].float().numpy() for name in sorted(stages, key=_rank)}


STAGES = (
    "conv stem",
    "encoder layer",
    "pooled states",
    "projector",
    "merged embeddings",
    "decoder layer",
    "logits",
)


def _rank(name: str) -> tuple[int, int]:
    stage, _, number = name.rpartition(" ")
    return (STAGES.index(stage), int(number)) if number.isdigit() else (STAGES.index(name), 0)


def differences(ours: Trace, theirs: Trace, inputs: Inputs) -> dict[str, np.ndarray]:
    """Per stage, the absolute differences where the reference's values mean something.

    Padding tokens' states are arbitrary, and so are the audio states after a clip's last
    position; where our trace is of fewer frames, the reference's is cut.
    """
    frames = inputs["feature_attention_mask"].sum(axis=1)
    tokens = inputs["attention_mask"].astype(bool)
    result = {}
    for name, x in ours.items():
        y = theirs[name]
        if name.startswith(("merged", "decoder", "logits")):
            result[name] = np.abs(x - y)[tokens]
            continue
        wide = name in ("pooled states", "projector")
        counts = encoder.states_of(frames) if wide else encoder.positions_of(frames)
        valid = np.arange(x.shape[1]) < counts[:, None]
        result[name] = np.abs(x - y[:, : x.shape[1]])[valid]
    return result


def made_sound() -> tuple[np.ndarray, int]:
    """Three seconds of a rising tone in noise."""
    seconds, rate = 3, 16_000
    t = np.arange(seconds * rate) / rate
    noise = np.random.default_rng(0).standard_normal(len(t))
    return (0.4 * np.sin(2 * np.pi * (200 + 300 * t) * t) + 0.02 * noise).astype(np.float32), rate


def prompt(folder: pathlib.Path, config: Config, clip: Any, question: str) -> Inputs:
    """One conversation of one turn; random words where the folder has no tokenizer."""
    if (folder / "tokenizer.json").is_file():
        content = [{"type": "audio", "audio": clip}, {"type": "text", "text": question}]
        return Processor.from_pretrained(folder)(
            [{"role": "user", "content": content}], frames=3000
        )
    wave = audio.load(clip)
    valid = mel.frames(len(wave))
    words = np.random.default_rng(0).integers(0, config.decoder.vocabulary, 16)
    words = words[words != config.audio_token]
    ids = np.concatenate([words, [config.audio_token] * mel.audio_tokens(valid), words])[None]
    return {
        "input_ids": ids.astype(np.int32),
        "attention_mask": np.ones(ids.shape, np.int32),
        "input_features": mel.log_mel(wave, mels=config.encoder.mels, frames=3000)[None],
        "feature_attention_mask": (np.arange(3000) < valid).astype(np.int32)[None],
    }


def ask_reference(folder: pathlib.Path, inputs: Inputs, tokens: int) -> tuple[Trace, list[int]]:
    try:
        import torch
        import transformers
    except ImportError as error:
        raise ValueError(f"{error}; install it with: pip install -e '.[test]'") from error
    kind = transformers.Qwen2AudioForConditionalGeneration
    model = kind.from_pretrained(folder, dtype=torch.float32).eval()
    as_torch = {name: torch.from_numpy(np.array(x)) for name, x in inputs.items()}
    plain = transformers.GenerationConfig(
        max_new_tokens=tokens,
        do_sample=False,
        eos_token_id=model.generation_config.eos_token_id,
        pad_token_id=model.generation_config.pad_token_id,
    )
    model.generation_config = plain
    answer = model.generate(**as_torch)[0, inputs["input_ids"].shape[1] :]
    return trace_reference(model, inputs), answer.tolist()


def report(ours: Trace, theirs: Trace, inputs: Inputs, tolerance: float) -> tuple[str, bool]:
    """A table of every stage's differences, and whether all are within tolerance."""
    lines, good = [f"{'stage':<20} {'largest':>10} {'mean':>10} {'of values to':>13}"], True
    for name, difference in differences(ours, theirs, inputs).items():
        scale = float(np.abs(theirs[name]).max())
        within = bool(difference.max() <= tolerance * max(1.0, scale))
        good &= within
        row = f"{name:<20} {difference.max():10.2e} {difference.mean():10.2e} {scale:13.2f}"
        lines.append(row if within else f"{row}  OVER {tolerance:g}")
    return "\n".join(lines), good


def verify(options: argparse.Namespace) -> int:
    folder = weights.locate(options.source, huggingface.PATTERNS)
    if weights.is_ours(folder):
        raise ValueError(f"{folder} is a folder of ours: transformers needs convert.to_hf's")
    inputs = prompt(folder, settings.read(folder), options.audio or made_sound(), options.question)
    theirs, their_answer = ask_reference(folder, inputs, options.tokens)
    gc.collect()
    model = weights.load(folder, dtype=jnp.float32, progress=sys.stderr.isatty())
    table, good = report(trace(model, inputs), theirs, inputs, options.tolerance)
    answer = np.asarray(generate(model, inputs, max_new_tokens=options.tokens))[0].tolist()
    answer = answer[: len(their_answer)]
    print(table)
    print(f"greedy tokens: {'equal' if answer == their_answer else 'DIFFERENT'}")
    print(f"  transformers {their_answer}\n  ours         {answer}")
    return 0 if good and answer == their_answer else 1


def main(args: list[str] | None = None) -> int:
    first, _, rest = __doc__.partition("\n\n")
    parser = argparse.ArgumentParser(
        description=first, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", metavar="SRC", help="a folder that transformers loads")
    parser.add_argument("--audio", metavar="CLIP", help="what to listen to (default: a made sound)")
    parser.add_argument("--question", default="What is that sound?", help="what to ask about it")
    parser.add_argument("--tokens", type=int, default=16, help="how many to generate (default 16)")
    parser.add_argument("--tolerance", type=float, default=1e-4, help="default 1e-4")
    return guard(lambda: verify(parser.parse_args(args)))


if __name__ == "__main__":
    sys.exit(main())
