"""Word error rate, as the field counts it."""

import numpy as np
import pytest

from qwen2audio_jax.evaluation import metrics


@pytest.mark.parametrize(
    ("reference", "hypothesis", "errors"),
    [
        ("one two three", "one two three", (0, 3)),
        ("one two three", "one three", (1, 3)),
        ("one three", "one two three", (1, 2)),
        ("one two three", "one too three", (1, 3)),
        ("one two", "two one", (2, 2)),
        ("one", "", (1, 1)),
        ("", "one two", (2, 0)),
        ("", "", (0, 0)),
        ("Stop! Go, now.", "stop go now", (0, 3)),
        ("don't", "dont", (0, 1)),
        ("twenty-one", "twenty one", (0, 2)),
        ("  spaced\tout\n", "spaced out", (0, 2)),
        ("über Äpfel", "über äpfel", (0, 2)),
        ("über", "u\u0308ber", (0, 1)),
        ("今天天气很好。", "今天天汽很好", (1, 6)),
        ("三 apples", "三apples", (0, 2)),
        ("हिन्दी में", "हिन्दी में", (0, 2)),
        ("हिन्दी", "हन्द", (1, 1)),
        ("สวัสดี", "สวัสดิ", (1, 6)),
        ("ខ្មែរ", "ខ្មែ", (1, 5)),
        ("<|en|>one <|0.10|>two", "one two", (0, 2)),
    ],
)
def test_known_cases(reference, hypothesis, errors):
    """Edits and reference words of cases that can be counted by hand."""
    assert metrics.word_errors(reference, hypothesis) == errors


def test_edit_distance_of_any_sequence():
    """The textbook's example, on letters."""
    assert metrics.edit_distance("kitten", "sitting") == 3


def test_the_rate_is_over_the_corpus():
    """A long sentence weighs more than a short one; inventions can exceed one."""
    assert metrics.word_error_rate(["one two three", "four"], ["one two three", "five"]) == 1 / 4
    assert metrics.word_error_rate(["one"], ["one two three"]) == 2


def test_no_words_and_unequal_lists_are_errors():
    """Where there is nothing to divide by, or nothing to compare, there is no number."""
    with pytest.raises(ValueError, match="no words in 2 references"):
        metrics.word_error_rate(["", "!"], ["a", "b"])
    with pytest.raises(ValueError, match="2 references, but 1 hypotheses"):
        metrics.word_error_rate(["a", "b"], ["a"])


def test_it_equals_jiwer():
    """Random texts score as jiwer scores them."""
    jiwer = pytest.importorskip("jiwer")
    rng = np.random.default_rng(0)
    words = np.array(["zero", "one", "two", "three", "four", "five"])
    texts = [
        [" ".join(rng.choice(words, rng.integers(1, 9))) for _ in range(100)] for _ in range(2)
    ]
    assert metrics.word_error_rate(*texts) == pytest.approx(jiwer.wer(*texts), abs=1e-12)
    for reference, hypothesis in zip(*texts, strict=True):
        edits, count = metrics.word_errors(reference, hypothesis)
        assert edits / count == pytest.approx(jiwer.wer(reference, hypothesis), abs=1e-12)
