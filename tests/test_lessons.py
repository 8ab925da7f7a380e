"""Lessons ask about what was said, and only answers are learned."""

import numpy as np
import pytest

from qwen2audio_jax import Processor, preset, prompt
from qwen2audio_jax.data import lessons, synth
from qwen2audio_jax.processor import count_tokens

TEXT = "seven green bird"


@pytest.fixture(scope="module")
def processor(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    lessons.write_tokenizer(folder, ["marmalade"], vocabulary=512)
    return Processor.from_pretrained(folder)


def make(processor, wave, kind, seed):
    return lessons.make(processor, wave, TEXT, kind, np.random.default_rng(seed))


def parts(processor, lesson):
    """What is given and what is learned, as text."""
    ids = {True: [], False: []}
    for segment in lesson.prompt:
        ids[segment.learned] += segment.ids
    return [processor.tokenizer.decode(ids[learned], False) for learned in (False, True)]


def test_special_tokens_are_those_of_the_preset(processor):
    """The tokenizer and `preset("tiny")` mean the same by each id, and fit each other."""
    tokenizer, config = processor.tokenizer, preset("tiny")
    assert tokenizer.audio_id == config.audio_token
    assert tokenizer.pad_id == config.pad_token
    assert {tokenizer.pad_id, tokenizer.im_end_id} == set(config.end_tokens)
    assert tokenizer.core.get_vocab_size() <= config.decoder.vocabulary


def test_words_are_short_and_any_text_can_be_written(processor):
    """What is said is answered in few steps; what nobody says still has tokens, bytes at worst."""
    encode = processor.tokenizer.encode
    assert np.mean([len(encode(f" {word}")) for word in synth.WORDS]) < 2
    assert processor.tokenizer.decode(encode("Grüße, 世界!")) == "Grüße, 世界!"


def test_recognition_learns_the_language_and_the_words(processor, chirp):
    """The authors' prompt is given up to the language; what ends the answer is learned."""
    lesson = make(processor, chirp(0.8), "recognise", 0)
    given, learned = parts(processor, lesson)
    assert given.replace(prompt.AUDIO, "") == (
        "<|audio_bos|><|audio_eos|>Detect the language and recognize the speech: "
    )
    assert learned == f"<|en|>{TEXT}<|endoftext|>"
    assert processor.tokenizer.decode(lesson.words) == TEXT


def test_conversations_learn_answers_alone(processor, chirp):
    """Each question's answer is right and learned through its <|im_end|>; the question is given."""
    right = {question: answer(TEXT.split()) for question, answer in lessons.QUESTIONS.items()}
    assert right["How many words do you hear?"] == "three"
    asked = set()
    for seed in range(60):
        given, learned = parts(processor, make(processor, chirp(0.8), "converse", seed))
        questions = sorted((q for q in right if q in given), key=given.index)
        answers = [right[q] for q in questions] or [f"You said: {TEXT}."]
        assert learned == "".join(f"{answer}<|im_end|>" for answer in answers)
        asked.update(questions or [None])
    assert asked == {*right, None}


@pytest.mark.parametrize("kind", ["recognise", "converse"])
def test_a_clip_has_its_slots(processor, chirp, kind):
    """The prompt has as many audio tokens as the clip needs."""
    wave = chirp(1.3)
    lesson = make(processor, wave, kind, 0)
    slots = sum(len(segment.ids) for segment in lesson.prompt if segment.clip is not None)
    assert slots == count_tokens(wave) > 30


def test_the_generator_decides_what_is_asked(processor, chirp):
    """Equal seeds make equal lessons; others ask otherwise."""
    talk = [make(processor, chirp(0.5), "converse", seed).prompt for seed in (*range(9), *range(9))]
    assert talk[:9] == talk[9:] and len(set(talk)) > 3
