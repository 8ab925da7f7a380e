"""Conversations, texts and clips -> a model's inputs, and tokens -> text: what a user calls."""

import json
import pathlib
import shutil
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
from jaxtyping import Array, Float, Int

from qwen2audio_jax import audio as sound
from qwen2audio_jax import mel
from qwen2audio_jax.prompt import (
    AUDIO,
    CLIP,
    IM_END,
    PAD,
    PIECE,
    Detokenizer,
    Prompt,
    Tokenizer,
    parse,
    read_json,
    read_template,
)
from qwen2audio_jax.weights.source import locate

Inputs = dict[str, np.ndarray]
Wave = Float[np.ndarray, " _"]

WINDOW = 30 * sound.SAMPLE_RATE  # samples that the encoder hears at once
SHORTEST_WINDOW = sound.SAMPLE_RATE // 10
# Few lengths, so that a new clip rarely compiles anew; 10 ms each. They are those of whole seconds,
# and the little that such a clip needs behind it.
FRAME_BUCKETS = (104, 204, 304, 404, 504, 604, 804, 1004, 1504, 2004, 2504, 3000)
IGNORED = -100  # a label that the loss leaves out, as in PyTorch

# A checkpoint's files that are no weights.
COPIED = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    "preprocessor_config.json",
    "processor_config.json",
    "chat_template.jinja",
    "chat_template.json",
)
# What log_mel does; a checkpoint that was trained on anything else would be misheard.
FEATURES = {"chunk_length": 30, "hop_length": 160, "n_fft": 400, "sampling_rate": 16_000}
PREPROCESSOR_CONFIG = {
    **FEATURES,
    "feature_extractor_type": "WhisperFeatureExtractor",
    "n_samples": WINDOW,
    "nb_max_frames": 3000,
    "padding_side": "right",
    "padding_value": 0.0,
    "processor_class": "Qwen2AudioProcessor",
    "return_attention_mask": True,
}
TOKENIZER_CONFIG = {
    # This class takes tokenizer.json as it is; Qwen2Tokenizer rebuilds parts of it by its own idea.
    "tokenizer_class": "PreTrainedTokenizerFast",
    "processor_class": "Qwen2AudioProcessor",
    "eos_token": IM_END,
    "pad_token": PAD,
    "model_max_length": 8192,
    "clean_up_tokenization_spaces": False,
}


# In the features' settings: how long the clips were that a checkpoint has learned from, if less
# than 30 s; what is longer is written down in windows of so many seconds.
WINDOW_SECONDS = "window_seconds"


class LongAudioWarning(UserWarning):
    """A clip over 30 s is heard as several windows."""


class Processor:
    """Prepares what `Qwen2Audio` takes, and reads what it gives."""

    def __init__(self, folder: pathlib.Path):
        self.folder = folder
        self.tokenizer = Tokenizer(folder / "tokenizer.json")
        self.template = read_template(folder)
        # transformers 5 writes the first file, and reads it first.
        features = read_json(folder / "processor_config.json").get("feature_extractor")
        features = features or read_json(folder / "preprocessor_config.json")
        for key, ours in FEATURES.items():
            if features.get(key, ours) != ours:
                raise ValueError(f"{folder}: wanted {key} {ours}, got {features[key]}")
        encoder = read_json(folder / "config.json").get("audio_config") or {}
        self.mels: int = features.get("feature_size", encoder.get("num_mel_bins", 128))
        self.window: float = features.get(WINDOW_SECONDS, 30.0)
        self._lacks_features = not features

    @classmethod
    def from_pretrained(cls, source: str | pathlib.Path) -> "Processor":
        """Reads a checkpoint's tokenizer, chat template and feature settings.

        Args:
          source: "tiny", a folder in Hugging Face's format, or a hub id.
        """
        return cls(locate(source, (*COPIED, "config.json")))

    def save_pretrained(self, folder: str | pathlib.Path, *, window: float | None = None) -> None:
        """Writes a folder that transformers' `Qwen2AudioProcessor` loads.

        Files that the source folder has are copied byte for byte; only what it lacks is written.

        Args:
          window: seconds that clips of more than that are to be written down in; None: as before.
        """
        folder = pathlib.Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        present = [name for name in COPIED if (self.folder / name).is_file()]
        if folder.resolve() != self.folder.resolve():
            for name in present:
                shutil.copyfile(self.folder / name, folder / name)
        if "chat_template.jinja" not in present and "chat_template.json" not in present:
            (folder / "chat_template.jinja").write_text(self.template.text, "utf-8", newline="")
        if "tokenizer_config.json" not in present:
            _write_json(folder / "tokenizer_config.json", TOKENIZER_CONFIG)
        if self._lacks_features:
            settings = PREPROCESSOR_CONFIG | {"feature_size": self.mels}
            _write_json(folder / "preprocessor_config.json", settings)
        if window not in (None, self.window):
            path = folder / "processor_config.json"
            settings = read_json(path)
            if settings.get("feature_extractor"):  # where it will be looked for
                settings["feature_extractor"] |= {WINDOW_SECONDS: window}
            else:
                path = folder / "preprocessor_config.json"
                settings = read_json(path) | {WINDOW_SECONDS: window}
            _write_json(path, settings)

    def __call__(
        self,
        conversations: Sequence | None = None,
        *,
        text: str | Sequence[str] | None = None,
        audio: Any = None,
        padding_side: Literal["left", "right"] = "left",
        labels: bool = False,
        frames: int | None = None,
        length: int | None = None,
        long_audio: Literal["windows", "error"] = "windows",
    ) -> Inputs:
        """Makes one batch of inputs.

        Args:
          conversations: one conversation, or a list of them. The next turn is the assistant's,
            unless `labels`.
          text: instead of conversations, a prompt or a list of them with one `<|AUDIO|>` per
            clip (or as many as the clip has audio tokens, throughout).
          audio: the clips of `text`, one source or a list, in order over the batch.
          padding_side: "left" to generate, "right" to train.
          labels: whether to give labels: assistant turns are learned.
          frames: mel frames per clip, 10 ms each. By default as few as give the result that the
            reference's 3000 give, rounded up to FRAME_BUCKETS.
          length: tokens per row; by default the longest prompt's.
          long_audio: what to do with a clip over 30 s in a conversation: "windows" hears it as
            consecutive clips of at most 30 s, and warns; "error" refuses it.

        Returns:
          input_ids, attention_mask [B, L]; with clips also input_features [C, M, T] and
          feature_attention_mask [C, T]; with `labels` also labels [B, L].

        Raises:
          ValueError: a conversation, a prompt or a clip (`AudioError`) cannot be used.
        """
        if (conversations is None) == (text is None):
            raise ValueError("wanted either conversations or text=, not both and not neither")
        if text is not None:
            if labels:
                raise ValueError("labels=True wants conversations: a bare text has no turns")
            sources = [] if audio is None else audio if isinstance(audio, list) else [audio]
            texts = [text] if isinstance(text, str) else list(text)
            prompts, waves = self.texts(texts, sources)
        else:
            if audio is not None:
                raise ValueError("audio= goes with text=; a conversation holds its clips itself")
            if isinstance(conversations, Mapping):
                raise ValueError("wanted a conversation, a list of messages, got one message")
            if conversations and isinstance(conversations[0], Mapping):
                conversations = [conversations]
            pairs = [
                self.conversation(each, learn=labels, long_audio=long_audio)
                for each in conversations
            ]
            prompts = [prompt for prompt, _ in pairs]
            waves = [wave for _, waves in pairs for wave in waves]
        return self.batch(
            prompts, waves, padding_side=padding_side, labels=labels, frames=frames, length=length
        )

    def conversation(
        self,
        conversation: Sequence,
        *,
        learn: bool = False,
        long_audio: Literal["windows", "error"] = "windows",
    ) -> tuple[Prompt, list[Wave]]:
        """Compiles one conversation: to generate its next turn, or to `learn` its answers."""
        messages, waves = parse(conversation), []
        for message in messages:
            if isinstance(message["content"], str):
                continue
            parts = []
            for part in message["content"]:
                if part["type"] == "audio":
                    piece = {k: part[k] for k in PIECE if k in part}
                    windows = self._windows(part["audio"], long_audio, len(waves) + 1, **piece)
                    waves += windows
                    parts += [CLIP] * len(windows)
                else:
                    parts.append(part)
            message["content"] = parts
        counts = [count_tokens(wave) for wave in waves]
        if learn:
            rendered, spans = self.template.learned(messages)
            return self.tokenizer.compile(rendered, counts, spans), waves
        if messages[-1]["role"] == "assistant":
            raise ValueError(
                f"message {len(messages)}: wanted a user's turn to answer, got the assistant's"
            )
        rendered = self.template.render(messages, add_generation_prompt=True)
        return self.tokenizer.compile(rendered, counts), waves

    def texts(self, texts: list[str], sources: list) -> tuple[list[Prompt], list[Wave]]:
        """Compiles prompts that name their clips by `<|AUDIO|>`: a base model's, say."""
        waves = [self._windows(source, "error")[0] for source in sources]
        counts = [count_tokens(wave) for wave in waves]
        tags = [each.count(AUDIO) for each in texts]
        expanded = sum(tags) != len(counts)
        if expanded and sum(tags) != sum(counts):
            raise ValueError(
                f"the text has {sum(tags)} {AUDIO}, wanted {len(counts)} for {len(counts)} clips"
                f" (or {sum(counts)}, one per audio token)"
            )
        prompts, ends = [], np.cumsum([0, *counts])
        first = 0
        for each, n in zip(texts, tags, strict=True):
            last = int(np.searchsorted(ends, ends[first] + n)) if expanded else first + n
            prompts.append(self.tokenizer.compile(each, counts[first:last], expanded=expanded))
            first = last
        return prompts, waves

    def batch(
        self,
        prompts: Sequence[Prompt],
        waves: Sequence[Wave],
        *,
        padding_side: Literal["left", "right"] = "left",
        labels: bool = False,
        frames: int | None = None,
        length: int | None = None,
    ) -> Inputs:
        """Pads compiled prompts and their clips, in order over the batch, into arrays."""
        if padding_side not in ("left", "right"):
            raise ValueError(f"wanted a padding_side of left or right, got {padding_side!r}")
        rows = [[token for segment in prompt for token in segment.ids] for prompt in prompts]
        if not rows:
            raise ValueError("wanted at least one prompt, got none")
        longest = max(map(len, rows))
        length = longest if length is None else length
        if longest > length:
            raise ValueError(f"a prompt of {longest} tokens does not fit the length {length}")
        inputs = {
            "input_ids": np.full((len(rows), length), self.tokenizer.pad_id, np.int32),
            "attention_mask": np.zeros((len(rows), length), np.int32),
        }
        if labels:
            inputs["labels"] = np.full((len(rows), length), IGNORED, np.int32)
        for b, (prompt, row) in enumerate(zip(prompts, rows, strict=True)):
            start = length - len(row) if padding_side == "left" else 0
            place = b, slice(start, start + len(row))
            inputs["input_ids"][place] = row
            inputs["attention_mask"][place] = 1
            if labels:
                learned = [segment.learned for segment in prompt for _ in segment.ids]
                inputs["labels"][place] = np.where(learned, row, IGNORED)
        return inputs | (self.features(waves, frames) if waves else {})

    def features(self, waves: Sequence[Wave], frames: int | None = None) -> Inputs:
        """Draws clips as log-mel pictures of one length, `frames` or as few as are exact."""
        valid = [mel.frames(len(wave)) for wave in waves]
        needed = needed_frames(max(valid))
        if frames is None:
            frames = next(bucket for bucket in FRAME_BUCKETS if bucket >= needed)
        if not needed <= frames <= 3000:
            raise ValueError(f"wanted {needed} to 3000 frames for the longest clip, got {frames}")
        return {
            "input_features": np.stack(
                [mel.log_mel(wave, mels=self.mels, frames=frames) for wave in waves]
            ),
            "feature_attention_mask": (np.arange(frames) < np.array(valid)[:, None]).astype(
                np.int32
            ),
        }

    def decode(
        self,
        tokens: Int[Array, "*B L"] | Int[np.ndarray, "*B L"] | Sequence,
        skip_special_tokens: bool = True,
    ) -> list[str]:
        """Turns rows of tokens, [B, L] or one [L], into texts; white space is kept as it is.

        Negative ids are left out: a row of labels gives what is learned.
        """
        rows = tokens if len(tokens) and np.ndim(tokens[0]) else [tokens]
        rows = [np.asarray(row, int) for row in rows]
        return [self.tokenizer.decode(row[row >= 0].tolist(), skip_special_tokens) for row in rows]

    def detokenizer(self) -> Detokenizer:
        """A decoder to be fed tokens one by one, for streaming."""
        return Detokenizer(self.tokenizer)

    def _windows(self, source: Any, long_audio: str, number: int = 1, **piece: float) -> list[Wave]:
        """Loads a clip, or a piece of one; the prompt's `number`th, if it is cut into windows."""
        if long_audio not in ("windows", "error"):
            raise ValueError(f"wanted long_audio windows or error, got {long_audio!r}")
        wave = sound.load(source, **piece)
        if len(wave) <= WINDOW:
            return [wave]
        name, seconds = sound.name(source), len(wave) / sound.SAMPLE_RATE
        if long_audio == "error":
            raise sound.AudioError(f"{name}: wanted at most 30 s, got {seconds:.2f} s")
        cuts = np.arange(WINDOW, len(wave), WINDOW)
        # A sliver at the end would be too short to be heard.
        cuts[-1] = min(cuts[-1], len(wave) - SHORTEST_WINDOW)
        warnings.warn(
            f"{name}: {seconds:.2f} s are heard as {len(cuts) + 1} windows of at most 30 s,"
            f" Audio {number} to {number + len(cuts)}",
            LongAudioWarning,
            stacklevel=2,
        )
        return np.split(wave, cuts)


def count_tokens(wave: Wave) -> int:
    """How many audio tokens a clip of at most 30 s becomes."""
    if n := mel.audio_tokens(mel.frames(len(wave))):
        return n
    raise sound.AudioError(f"a clip of {len(wave)} samples is too short to be heard, wanted > 320")


def needed_frames(valid: int) -> int:
    """Mel frames that a clip's own `valid` ones need to give the states that 3000 would.

    Keys behind the clip are masked, so frames behind it reach its n1 encoder positions through
    the two convolutions alone, and those see frames up to 2 * n1.
    """
    n1 = (valid - 1) // 2 + 1
    return min(2 * n1 + 2, 3000)


def _write_json(path: pathlib.Path, settings: dict) -> None:
    path.write_text(json.dumps(settings, indent=2) + "\n", "utf-8")
