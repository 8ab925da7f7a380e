"""Turns that share a cache are answered as if each came alone."""

import pytest
import words
from test_stream import make_model

from qwen2audio_jax import Conversation, Processor, Sampling, stream
from qwen2audio_jax import conversation as module

PENALISED = Sampling(temperature=0.0, repetition_penalty=1.2)


@pytest.fixture(scope="module")
def processor(tmp_path_factory):
    return Processor(words.made_tokenizer(tmp_path_factory.mktemp("words")))


@pytest.fixture(scope="module")
def model(processor):
    return make_model(processor)


@pytest.fixture
def read(monkeypatch):
    """What every turn reads: [tokens, clips]."""
    turns = []
    extend, listen = module.extend, module.listen

    def noting_extend(model, ids, mask, heard, **options):
        turns[-1][0] = options["used"]
        return extend(model, ids, mask, heard, **options)

    def noting_listen(model, inputs):
        turns.append([0, len(inputs.get("input_features", ()))])
        return listen(model, inputs)

    monkeypatch.setattr(module, "extend", noting_extend)
    monkeypatch.setattr(module, "listen", noting_listen)
    return turns


def user(*parts):
    kind = lambda part: "text" if isinstance(part, str) else "audio"
    return {"role": "user", "content": [{"type": kind(part), kind(part): part} for part in parts]}


def assistant(text):
    return {"role": "assistant", "content": text}


def test_turns_are_answered_as_if_alone_and_read_only_what_is_new(model, processor, chirp, read):
    """Four turns with and without clips; the cache grows on the way."""
    talk, messages = Conversation(model, processor), []
    clip = lambda seed: (chirp(0.6, seed), 16_000)
    turns = [user(clip(0), "What is that?"), user("And now?"), user(clip(1)), user("yes" * 90)]
    options = {"sampling": PENALISED, "max_new_tokens": 40, "min_new_tokens": 30}
    lengths = []
    for turn in turns:
        messages.append(turn)
        inputs = processor(messages)
        lengths.append(inputs["input_ids"].shape[1])
        alone = "".join(stream(model, processor, inputs, **options))
        answer = "".join(talk.stream(messages, **options))
        assert answer == alone
        messages.append(assistant(answer))
    assert [clips for _, clips in read] == [1, 0, 1, 0]
    assert read[0][0] == lengths[0]
    for (tokens, _), before, now in zip(read[1:], lengths, lengths[1:], strict=False):
        assert tokens <= now - before  # the answer too is read anew only if it is spelled anew
    assert talk.cache.slots > 256


def test_what_was_changed_is_read_anew(model, processor, chirp, read):
    """Another clip, an edited turn, a conversation begun anew: none hears the old one."""
    talk = Conversation(model, processor)
    options = {"max_new_tokens": 8}
    for seed, text, clips in ((0, "What?", 1), (0, "No, what?", 0), (1, "No, what?", 1)):
        messages = [user((chirp(0.6, seed), 16_000), text)]
        inputs = processor(messages)
        alone = "".join(stream(model, processor, inputs, **options))
        assert "".join(talk.stream(messages, **options)) == alone
        assert read[-1][1] == clips
    list(talk.stream(messages, **options))
    assert read[-1] == [1, 0]  # the same again: only what says what comes next


def test_an_answer_left_early_costs_only_time(model, processor, read):
    """After an interrupted answer the next turn starts over, and is right."""
    talk = Conversation(model, processor)
    messages = [user("What is that?")]
    next(talk.stream(messages, sampling=Sampling(seed=2)))
    assert talk.cache is None
    answer = "".join(talk.stream(messages, max_new_tokens=8))
    alone = "".join(stream(model, processor, processor(messages), max_new_tokens=8))
    assert answer == alone


def test_a_conversation_that_does_not_fit_is_refused(processor):
    """Both numbers are given, and the conversation goes on with less."""
    talk = Conversation(make_model(processor, positions=128), processor)
    with pytest.raises(ValueError, match=r"a prompt of \d+ tokens .* the context of 128"):
        talk.stream([user("yes" * 200)])
    assert "".join(talk.stream([user("yes")], max_new_tokens=4, min_new_tokens=4))
