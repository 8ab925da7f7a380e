"""Text comes as it is made, whole characters only, and stops where it should."""

import numpy as np
import pytest
import words
from flax import nnx

from qwen2audio_jax import (
    Config,
    DecoderConfig,
    EncoderConfig,
    Processor,
    Qwen2Audio,
    Sampling,
    generate,
    programs,
    stream,
)
from qwen2audio_jax.stop import split

HOT = Sampling(temperature=2.0, seed=3)


def make_model(processor, *, seed=0, **sizes):
    """A small random model that speaks `processor`'s words."""
    words = processor.tokenizer
    decoder = {"layers": 2, "width": 32, "heads": 2, "kv_heads": 1, "head_width": 16, "hidden": 64}
    config = Config(
        encoder=EncoderConfig(layers=1, width=16, heads=2, hidden=32),
        decoder=DecoderConfig(vocabulary=words.core.get_vocab_size(), **decoder, **sizes),
        audio_token=words.audio_id,
        pad_token=words.pad_id,
        end_tokens=(words.pad_id, words.im_end_id),
    )
    return Qwen2Audio(config, scan_layers=False, rngs=nnx.Rngs(seed))


@pytest.fixture(scope="module")
def processor(tmp_path_factory):
    return Processor(words.made_tokenizer(tmp_path_factory.mktemp("words")))


@pytest.fixture(scope="module")
def model(processor):
    return make_model(processor)


@pytest.fixture(scope="module")
def inputs(processor, chirp):
    part = {"type": "audio", "audio": (chirp(0.5), 16_000)}
    return processor([{"role": "user", "content": [part]}])


def test_pieces_together_are_the_answer(model, processor, inputs):
    """However the pieces fall, they are what `generate` and `decode` give: broken bytes too."""
    for sampling in (HOT, Sampling(temperature=0.0, repetition_penalty=1.3)):
        options = {"max_new_tokens": 100, "sampling": sampling, "min_new_tokens": 60}
        pieces = list(stream(model, processor, inputs, **options))
        tokens = generate(model, inputs, **options)
        assert "".join(pieces) == processor.decode(tokens)[0]
        assert len(pieces) > 3


def test_an_answer_says_whether_it_was_cut(model, processor, inputs):
    """By the tokens that were made, of which text shows fewer; not by what an end token ended."""
    pieces = stream(model, processor, inputs, max_new_tokens=7, end_tokens=())
    assert not pieces.cut
    assert list(pieces)
    made = generate(model, inputs, max_new_tokens=7, end_tokens=())[0].tolist()
    assert pieces.tokens == made and pieces.cut
    ended = stream(model, processor, inputs, max_new_tokens=7, end_tokens=[made[2]])
    list(ended)
    until = made.index(made[2]) + 1
    assert not ended.cut and ended.tokens[:until] == made[:until]


def test_the_first_piece_needs_no_decoding(model, processor, inputs, monkeypatch):
    """The first token is shown before the second is made."""
    pieces = stream(model, processor, inputs, sampling=HOT)
    monkeypatch.setattr(programs, "decode", None)
    assert next(pieces)


def test_stop_strings_end_answers(model, processor, inputs):
    """Tokens end with the one that completes the string, text ends before it."""
    options = {"max_new_tokens": 60, "sampling": HOT, "min_new_tokens": 60}
    whole = generate(model, inputs, **options)[0]
    text = processor.decode(whole)[0]
    at = 20
    for length in (1, 2, 7):  # within a token and over several
        stop = [text[at : at + length], "never said"]
        end = text.index(stop[0])
        tokens = generate(model, inputs, stop=stop, processor=processor, **options)[0]
        np.testing.assert_array_equal(tokens, whole[: len(tokens)])
        assert stop[0] in processor.decode(tokens)[0]
        assert stop[0] not in processor.decode(tokens[:-1])[0]
        assert "".join(stream(model, processor, inputs, stop=stop, **options)) == text[:end]


def test_rows_stop_apart(model, processor):
    """One row's stop string leaves the others alone."""
    ids = np.random.default_rng(0).integers(0, 300, (2, 9)).astype(np.int32)
    options = {"max_new_tokens": 40, "sampling": HOT, "min_new_tokens": 40}
    whole = generate(model, {"input_ids": ids}, **options)
    texts = processor.decode(whole)
    stop = next(c for c in texts[0] if c not in texts[1] and c.isascii())
    tokens = generate(model, {"input_ids": ids}, stop=[stop], processor=processor, **options)
    np.testing.assert_array_equal(tokens[1], whole[1])
    kept = int((np.cumprod(tokens[0] == whole[0])).sum())
    assert stop in processor.decode(tokens[0, :kept])[0]
    assert (tokens[0, kept:] == model.config.pad_token).all()


def test_a_stop_strings_beginning_is_held_back():
    assert split("to be or", ["or not"]) == ("to be ", "or", False)
    assert split("to be or n", ["or not", " now"]) == ("to be ", "or n", False)
    assert split("to be or not to", ["or not", "be"]) == ("to ", "", True)
    assert split("to be", ["x"]) == ("to be", "", False)


def test_streaming_shares_the_programs_of_generate(model, processor, inputs):
    """A piece of any size is made by one and the same program."""
    generate(model, inputs, max_new_tokens=40, sampling=HOT)
    known = programs.decode._cache_size()
    list(stream(model, processor, inputs, max_new_tokens=40, sampling=HOT))
    assert programs.decode._cache_size() == known


def test_what_cannot_be_streamed_is_refused_at_once(model, processor):
    two = {"input_ids": np.full((2, 4), 9, np.int32)}
    with pytest.raises(ValueError, match=r"wanted one prompt .* got 2"):
        stream(model, processor, two)
    one = {"input_ids": np.full((1, 4), 9, np.int32)}
    with pytest.raises(ValueError, match="none of them empty, got "):
        stream(model, processor, one, stop=[""])
