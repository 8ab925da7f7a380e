"""What the tiny model is taught: utterances made into prompts with answers, and its vocabulary.

The first slice of training data: recognition as the base model is prompted for it, questions about
what was said, and voice chat, all about short phrases.
"""

import dataclasses
import pathlib
from typing import Literal

import numpy as np
import tokenizers
from jaxtyping import Float
from tokenizers import decoders, models, pre_tokenizers, trainers

from qwen2audio_jax import prompt
from qwen2audio_jax.data import synth
from qwen2audio_jax.processor import Processor, count_tokens

Kind = Literal["recognise", "converse"]
SPECIAL = (
    *(prompt.PAD, prompt.IM_START, prompt.IM_END),
    *(prompt.AUDIO, prompt.AUDIO_BOS, prompt.AUDIO_EOS),
    "<|en|>",
)
COUNTS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")

QUESTIONS = {
    "What does the person say?": lambda words: " ".join(words),
    "How many words do you hear?": lambda words: COUNTS[len(words)],
    "What is the first word?": lambda words: words[0],
    "What is the last word?": lambda words: words[-1],
}


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Lesson:
    """One clip, what is said in it, what is asked about it, and what should be answered."""

    wave: Float[np.ndarray, " S"]
    words: list[int]  # the tokens of what is said
    prompt: prompt.Prompt


def make(
    processor: Processor,
    wave: Float[np.ndarray, " S"],
    text: str,
    kind: Kind,
    rng: np.random.Generator,
) -> Lesson:
    """Teaches about a clip in which `text`, up to ten words, is said; `rng` picks what is asked."""
    counts, words = [count_tokens(wave)], text.split()
    if kind == "recognise":
        given, answer = prompt.transcription("en"), text + prompt.PAD
        start = given.rindex("<|en|>")  # the model says the language too
        full = given + answer
        compiled = processor.tokenizer.compile(full, counts, [(start, len(full))])
    else:
        messages = conversation(words, rng)
        rendered, spans = processor.template.learned(messages)
        compiled = processor.tokenizer.compile(rendered, counts, spans)
    return Lesson(wave=wave, words=processor.tokenizer.encode(text), prompt=compiled)


def conversation(words: list[str], rng: np.random.Generator) -> list[dict]:
    """Voice chat, or one or two questions about the clip, answered."""
    if rng.random() < 0.2:
        answer = f"You said: {' '.join(words)}."
        return [_user(prompt.CLIP), {"role": "assistant", "content": answer}]
    messages = []
    asked = rng.choice(list(QUESTIONS), size=rng.integers(1, 3), replace=False)
    for i, question in enumerate(asked):
        text = {"type": "text", "text": str(question)}
        messages.append(_user(prompt.CLIP, text) if i == 0 else _user(text))
        messages.append({"role": "assistant", "content": QUESTIONS[question](words)})
    return messages


def _user(*parts: dict) -> dict:
    return {"role": "user", "content": list(parts)}


def write_tokenizer(folder: pathlib.Path, texts: list[str], *, vocabulary: int) -> None:
    """Trains a byte-level BPE, of Qwen2's kind, on the lessons' words and writes it.

    Args:
      folder: gets a `tokenizer.json`, from which `Processor.from_pretrained` can start.
      texts: what else will be said, so that its words become tokens; any text can be encoded.
      vocabulary: the most tokens there may be.
    """
    core = tokenizers.Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    rng = np.random.default_rng(0)
    words = sorted({*synth.WORDS, *(word for text in texts for word in text.split())})
    chats = [
        str(message["content"] if message["role"] == "assistant" else message["content"][-1])
        for _ in range(200)
        for message in conversation(list(rng.choice(words, 3)), rng)
    ]
    scaffold = [prompt.transcription("en"), prompt.ChatTemplate().render([_user(prompt.CLIP)])]
    said = [*words, *(f" {word}" for word in words)]
    core.train_from_iterator([*said * 100, *chats, *scaffold * 50], trainer)
    folder.mkdir(parents=True, exist_ok=True)
    core.save(str(folder / "tokenizer.json"))
