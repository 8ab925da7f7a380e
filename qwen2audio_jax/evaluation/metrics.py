"""How far what was heard is from what was said."""

import re
import unicodedata
from collections.abc import Hashable, Sequence

from qwen2audio_jax.prompt import TAG

# Chinese, Japanese, Thai, Lao, Burmese and Khmer have no spaces between words: each sign counts.
SIGN = re.compile(
    r"([\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003134f"
    r"\u0e01-\u0eff\u1000-\u109f\u1780-\u17ff])"
)


def normalise(text: str) -> list[str]:
    """Lower-case words without punctuation: "Don't, Twenty-One!" is `dont twenty one`.

    Letters, their marks (Hindi's vowels), and digits are kept, in Unicode's compatible form.
    """
    text = unicodedata.normalize("NFKC", TAG.sub(" ", text)).lower()
    text = SIGN.sub(r" \1 ", re.sub(r"['’]", "", text))
    return "".join(c if unicodedata.category(c)[0] in "LMN" else " " for c in text).split()


def edit_distance(reference: Sequence[Hashable], hypothesis: Sequence[Hashable]) -> int:
    """The fewest insertions, deletions and substitutions between two sequences (Levenshtein)."""
    row = list(range(len(hypothesis) + 1))
    for i, wanted in enumerate(reference, start=1):
        diagonal, row[0] = row[0], i
        for j, got in enumerate(hypothesis, start=1):
            substituted = diagonal + (wanted != got)
            diagonal = row[j]
            row[j] = min(row[j] + 1, row[j - 1] + 1, substituted)
    return row[-1]


def word_errors(reference: str, hypothesis: str) -> tuple[int, int]:
    """Edits between two texts, and the words of the reference."""
    words = normalise(reference)
    return edit_distance(words, normalise(hypothesis)), len(words)


def word_error_rate(references: Sequence[str], hypotheses: Sequence[str]) -> float:
    """All edits over all reference words; above 1 if much is invented.

    Raises:
      ValueError: the lists differ in length, or there is no word in the references.
    """
    if len(references) != len(hypotheses):
        raise ValueError(f"{len(references)} references, but {len(hypotheses)} hypotheses")
    pairs = [word_errors(r, h) for r, h in zip(references, hypotheses, strict=True)]
    words = sum(w for _, w in pairs)
    if not words:
        raise ValueError(f"no words in {len(references)} references: no error rate")
    return sum(edits for edits, _ in pairs) / words
