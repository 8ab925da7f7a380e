"""Whisper's encoder and a Qwen2 decoder -> a Qwen2-Audio that is still to be pretrained.

What the parts have learned is copied. The projector is new, and so are the rows of the embedding
and of the head that the decoder has not: they are drawn as a new model draws them. Whisper's
encoder is Qwen2-Audio's but for the pooling, which has no parameters and stands between the last
block and the final norm.

Source: Qwen2-Audio (arXiv:2407.10759), section 2.
"""

import dataclasses
import functools
import pathlib
import shutil
import tempfile
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tokenizers
from flax import nnx

from qwen2audio_jax import prompt
from qwen2audio_jax.config import Config, DecoderConfig, EncoderConfig
from qwen2audio_jax.model import Qwen2Audio
from qwen2audio_jax.processor import COPIED, Processor
from qwen2audio_jax.prompt import Tokenizer
from qwen2audio_jax.weights import bar, folder, huggingface, settings, table

# The hub's Whisper has the same in float32 beside it, model.fp32-*.safetensors.
WHISPER_PATTERNS = ("config.json", huggingface.SINGLE, "model-*.safetensors", huggingface.INDEX)

# How names begin in a part's files, and in Qwen2-Audio's. What else Whisper has is its decoder.
WHISPER = {"model.encoder.": "audio_tower."}
QWEN = {"model.": "language_model.model.", "lm_head.": "language_model.lm_head."}
TIED_HEAD, TIED_TO = "lm_head.weight", "model.embed_tokens.weight"

# What transformers' WhisperConfig gives to the fields that a file lacks.
WHISPER_CONFIG = {
    "encoder_layers": 4,
    "d_model": 384,
    "encoder_attention_heads": 6,
    "encoder_ffn_dim": 1536,
    "num_mel_bins": 80,
}

TURNS = (prompt.PAD, prompt.IM_START, prompt.IM_END)  # Qwen2 has these

# In Qwen2-Audio's order, which gives them its ids if they come after Qwen2's own words. It has 280
# more, languages among them; those that are not published are not made up.
TIMES = tuple(f"<|{n / 100:.2f}|>" for n in range(3001))
WORDS = (prompt.AUDIO, prompt.AUDIO_BOS, prompt.AUDIO_EOS, "<|sil|>", *TIMES)

ROWS = 128  # of which the vocabulary is a multiple, so that devices can share it

# What does not come with a tokenizer: it tells of another encoder's mel bands.
FEATURES = ("preprocessor_config.json", "processor_config.json")


def join(
    whisper: pathlib.Path,
    qwen: pathlib.Path,
    target: pathlib.Path,
    *,
    tokenizer: pathlib.Path | None = None,
    seed: int = 0,
    dtype: Any = None,
    overwrite: bool = False,
    progress: bool = False,
) -> tuple[Config, range]:
    """Makes a folder in Hugging Face's format, a tensor at a time.

    Args:
      whisper: a `WhisperForConditionalGeneration`, of which the encoder is taken.
      qwen: a `Qwen2ForCausalLM`; rows that its vocabulary is padded with are kept as well.
      tokenizer: the folder of one that has Qwen2-Audio's special tokens, taken as it is; None:
        `qwen`'s own, with those of `WORDS` added that it lacks.
      seed: of what is drawn.
      dtype: to store parameters in; None: as they are, and what is drawn in the decoder's, while
        config.json names the type that holds them all.

    Returns:
      The sizes and token ids of the model, and those rows of its vocabulary that are new.

    Raises:
      ValueError: the parts are not what is wanted or do not fit together, or `target` cannot take
        the model.
      OSError: `target` cannot be written.
    """
    stored = _sizes(whisper, qwen)
    with tempfile.TemporaryDirectory() as made:
        if tokenizer is None:
            words = _extended(qwen, pathlib.Path(made))
        else:
            words = Tokenizer(tokenizer / "tokenizer.json")
            _check_words(words, tokenizer, qwen)
        config = _with_words(stored, words)
        found = _find(whisper, WHISPER, stored) | _find(qwen, QWEN, stored)
        weights = _Weights(config, found, _drawn(stored, config, seed), dtype)
        nbytes, sources = weights.nbytes(), (qwen, tokenizer or qwen)
        with folder.fresh(
            target, nbytes, source=whisper, others=sources, overwrite=overwrite
        ) as partial:
            settings.write(config, partial, weights.widest().name)
            _copy_tokenizer(tokenizer or pathlib.Path(made), partial)
            with bar("joining", nbytes, progress) as shown:
                huggingface.write(partial, weights.layout(), weights.read, shown.update)
    return config, range(stored.decoder.vocabulary, config.decoder.vocabulary)


def _sizes(whisper: pathlib.Path, qwen: pathlib.Path) -> Config:
    """Those of the parts as they are stored; token ids mean nothing yet.

    Raises:
      ValueError: a folder holds no such part, or one that Qwen2-Audio cannot have.
    """
    encoder = _parse(whisper, "whisper", "audio_config", WHISPER_CONFIG).encoder
    if encoder.positions != (wanted := EncoderConfig.positions):
        raise ValueError(
            f"{whisper}: wanted max_source_positions {wanted}, 30 s, got {encoder.positions}"
        )
    return dataclasses.replace(_parse(qwen, "qwen2", "text_config", {}), encoder=encoder)


def _parse(path: pathlib.Path, kind: str, section: str, defaults: Mapping[str, Any]) -> Config:
    if not (path / "config.json").is_file():
        raise ValueError(f"wanted a checkpoint in {path}, got a folder without config.json")
    told = prompt.read_json(path / "config.json")
    got = told.get("model_type") if isinstance(told, dict) else None
    if got != kind:
        raise ValueError(f"{path}: wanted model_type {kind!r} in config.json, got {got!r}")
    content = {"model_type": "qwen2_audio", "audio_token_index": 0, section: {**defaults, **told}}
    try:
        return settings.parse(content, {"eos_token_id": 0, "pad_token_id": 0})
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _with_words(stored: Config, words: Tokenizer) -> Config:
    """The sizes and ids of a model that has a row for each of these words."""
    rows, count = stored.decoder.vocabulary, max(words.core.get_vocab().values()) + 1
    if count > rows:
        rows = -(-count // ROWS) * ROWS
        if words.audio_id == Config.audio_token:  # room for all that Qwen2-Audio's tokenizer has
            rows = max(rows, DecoderConfig.vocabulary)
    return Config(
        encoder=stored.encoder,
        decoder=dataclasses.replace(stored.decoder, vocabulary=rows),
        audio_token=words.audio_id,
        pad_token=words.pad_id,
        end_tokens=(words.pad_id, words.im_end_id),
    )


@dataclasses.dataclass(frozen=True)
class _Weights:
    """Every tensor of the model.

    Attributes:
      found: what the parts have, by its name on disk.
      drawn: what is new, in float32: whole tensors, and rows that come after those found.
      stored_in: the type of all; None: of each its own.
    """

    config: Config
    found: Mapping[str, huggingface.Tensor]
    drawn: Mapping[str, np.ndarray]
    stored_in: Any

    @functools.cached_property
    def rows(self) -> dict[str, table.Entry]:
        """By names on disk; a tied head's is the embedding's."""
        rows = {row.name: row for row in table.entries(self.config)}
        # transformers 5 never ties this architecture's head, so it has to be there
        return rows | {table.HEAD: rows.get(table.HEAD, rows[table.EMBEDDING])}

    def dtype(self, name: str) -> np.dtype:
        if self.stored_in is not None:
            return np.dtype(self.stored_in)
        source = self.rows[name].name
        return self.found[source if source in self.found else table.EMBEDDING].dtype

    def widest(self) -> np.dtype:
        """The type that holds every number as it is."""
        return np.dtype(jnp.result_type(*{self.dtype(name) for name in self.rows}))

    def nbytes(self) -> int:
        return sum(row.count * self.dtype(name).itemsize for name, row in self.rows.items())

    def layout(self) -> huggingface.Layout:
        return huggingface.plan(
            (name, self.dtype(name), row.their_shape) for name, row in self.rows.items()
        )

    def read(self, name: str) -> np.ndarray:
        source = self.rows[name].name
        pieces = [self.found[source].read()] if source in self.found else []
        pieces += [self.drawn[source]] if source in self.drawn else []
        pieces = [piece.astype(self.dtype(name), copy=False) for piece in pieces]
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)


def _drawn(stored: Config, config: Config, seed: int) -> dict[str, np.ndarray]:
    """The projector, and the rows that `config` has more, out of a new model without blocks."""
    more = config.decoder.vocabulary - stored.decoder.vocabulary
    new = dataclasses.replace(
        stored,
        encoder=dataclasses.replace(stored.encoder, layers=0),
        decoder=dataclasses.replace(stored.decoder, layers=0, vocabulary=max(more, 1)),
    )
    with jax.default_device(jax.devices("cpu")[0]):
        state = nnx.state(Qwen2Audio(new, scan_layers=False, rngs=nnx.Rngs(seed)), nnx.Param)
    leaves = jax.tree_util.tree_flatten_with_path(state)[0]
    arrays = {table.split(path)[0]: np.asarray(x) for path, x in leaves}
    wanted = ("projector.", *(["decoder.embedding.", "decoder.head."] if more else []))
    return {
        row.name: row.to_theirs(arrays[row.path])
        for row in table.entries(new)
        if row.path.startswith(wanted)
    }


def _find(
    path: pathlib.Path, names: Mapping[str, str], stored: Config
) -> dict[str, huggingface.Tensor]:
    """A part's tensors, by their names in Qwen2-Audio's files.

    Args:
      names: how they begin in the part's files, and in Qwen2-Audio's.

    Raises:
      ValueError: a file is damaged, or tensors are unknown, missing or of the wrong shape; the
        message names them all.
    """
    kept = lambda name: name if name.startswith(tuple(names)) else None
    tensors, problems = huggingface.listed(path, kept)
    wanted = {
        theirs + row.name.removeprefix(ours): row
        for row in table.entries(stored)
        for theirs, ours in names.items()
        if row.name.startswith(ours)
    }
    tied = {TIED_HEAD} if stored.decoder.tied else set()
    shapes = {name: row.their_shape for name, row in wanted.items()}
    problems += huggingface.compare(tensors, shapes, tied)
    if problems:
        raise ValueError(f"{path} does not hold what its config.json says: {'; '.join(problems)}")
    if tied:
        huggingface.check_tied(tensors, TIED_HEAD, TIED_TO, path)
    return {row.name: tensors[name] for name, row in wanted.items()}


def _extended(path: pathlib.Path, target: pathlib.Path) -> Tokenizer:
    """Adds what a tokenizer lacks of `WORDS`, and writes it to another folder."""
    core = _core(path / "tokenizer.json")
    if missing := [word for word in TURNS if core.token_to_id(word) is None]:
        raise ValueError(f"{path / 'tokenizer.json'} lacks the special tokens {', '.join(missing)}")
    core.add_special_tokens([word for word in WORDS if core.token_to_id(word) is None])
    core.save(str(target / "tokenizer.json"))
    return Tokenizer(target / "tokenizer.json")


def _check_words(words: Tokenizer, path: pathlib.Path, qwen: pathlib.Path) -> None:
    """Refuses a tokenizer whose ids mean other words than the decoder has learned."""
    if not (qwen / "tokenizer.json").is_file():
        return
    learned = _core(qwen / "tokenizer.json")
    for word in (*learned.get_vocab(with_added_tokens=False), *TURNS):
        token = learned.token_to_id(word)
        if token is not None and (got := words.core.token_to_id(word)) != token:
            raise ValueError(
                f"{path}: wanted a tokenizer with {word!r} as {token}, as {qwen} has it, got {got}"
            )


def _core(path: pathlib.Path) -> tokenizers.Tokenizer:
    try:
        return tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the Rust library raises bare Exception
        raise ValueError(f"wanted a tokenizer at {path}: {error}") from error


def _copy_tokenizer(source: pathlib.Path, target: pathlib.Path) -> None:
    """Copies a tokenizer and its template, and writes what else a processor needs."""
    for name in COPIED:
        if name not in FEATURES and (source / name).is_file():
            shutil.copyfile(source / name, target / name)
    if not any((target / f"chat_template.{end}").is_file() for end in ("jinja", "json")):
        template = prompt.read_template(source).text
        (target / "chat_template.jinja").write_text(template, "utf-8", newline="")
    Processor(target).save_pretrained(target)
