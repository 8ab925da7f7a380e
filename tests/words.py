"""Tokenizers for the tests: a small one made here, the real one, and transformers' processor."""

import json
import pathlib

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen2AudioProcessor, WhisperFeatureExtractor

SPECIAL = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|AUDIO|>",
    "<|audio_bos|>",
    "<|audio_eos|>",
]
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CORPUS = [
    "You are a helpful assistant. system user assistant Audio 1: Audio 2:",
    "What is that sound? It is the sound of glass shattering, and it's over.",
    "What can you hear? A dog barks; somebody laughs. The weather is nice today.",
    "yes\n\nno\n\nyes",
    "今天天气很好。那是什么声音？",
]


def made_tokenizer(folder: pathlib.Path, special: list[str] = SPECIAL) -> pathlib.Path:
    """Trains a byte-level BPE of Qwen2's make and saves it; most Chinese characters stay bytes."""
    core = tokenizers.Tokenizer(models.BPE())
    core.normalizer = normalizers.NFC()
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    core.train_from_iterator(CORPUS, trainer)
    core.add_special_tokens(special)
    folder.mkdir(parents=True, exist_ok=True)
    core.save(str(folder / "tokenizer.json"))
    return folder


def real_tokenizer(shared_data: pathlib.Path, folder: pathlib.Path) -> pathlib.Path:
    """Qwen2's tokenizer with the added tokens of Qwen2-Audio that are known, in a new folder."""
    core = tokenizers.Tokenizer.from_file(str(shared_data / "qwen2_tokenizer/tokenizer.json"))
    known = json.loads((shared_data / "qwen2_audio_configs/added_tokens_known.json").read_text())
    ids = known["tokens"]
    # Those behind the first unknown one would get wrong ids.
    core.add_special_tokens([word for word in ids if ids[word] < known["unknown_id_range"][0]])
    folder.mkdir(parents=True, exist_ok=True)
    core.save(str(folder / "tokenizer.json"))
    return folder


def reference_processor(folder: pathlib.Path, mels: int = 128) -> Qwen2AudioProcessor:
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"),
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
    )
    return Qwen2AudioProcessor(WhisperFeatureExtractor(feature_size=mels), tokenizer)
