"""Answers from closed sets: what a trie allows is what continues an answer, and nothing else."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import words
from test_stream import make_model

from qwen2audio_jax import Processor, Sampling, constraint, generate, programs, stream

# One answer begins another; one is the other's first token; Chinese in bytes; a space before.
SOUNDS = ["a dog", "a dog barks", "a", " a dog", "那是狗", "那是猫", "somebody laughs"]
CODES = ["yes", "no", "yes and no"]
LENGTH = 64


@pytest.fixture(scope="module")
def processor(tmp_path_factory):
    return Processor(words.made_tokenizer(tmp_path_factory.mktemp("words")))


@pytest.fixture(scope="module")
def model(processor):
    return make_model(processor)


@pytest.fixture(scope="module")
def inputs(processor, chirp):
    tag = "<|audio_bos|><|AUDIO|><|audio_eos|>"
    texts = [f"{tag}What is that sound:", "yes or no:", f"{tag} 今天"]
    return processor(text=texts, audio=[(chirp(0.3, seed=i), 16_000) for i in range(2)])


def build(choices, processor, rows=1, ends=(0, 2), shortest=0, longest=99):
    return constraint.build(
        choices, processor, rows, end_tokens=ends, shortest=shortest, longest=longest
    )


run = jax.jit(lambda model, inputs: jax.nn.log_softmax(model(**inputs)))


def continuations(answers, said, ends):
    """What may follow, read off the list of answers."""
    tokens = {a[len(said)] for a in answers if a[: len(said)] == said and len(a) > len(said)}
    return tokens | (set(ends) if said in answers else set())


def greedy(model, inputs, processor, choices):
    """The likeliest allowed token, one after another, by the whole model without a cache."""
    ends = model.config.end_tokens
    told = [[] for _ in choices]
    scores = [[] for _ in choices]
    rows = [row[kept == 1] for row, kept in zip(inputs["input_ids"], inputs["attention_mask"],
                                                strict=True)]  # fmt: skip
    while not all(each and each[-1] in ends for each in told):
        ids = np.full((len(rows), LENGTH), model.config.pad_token, np.int32)
        mask = np.zeros_like(ids)
        for b, row in enumerate(rows):
            whole = [*row, *told[b]]
            ids[b, : len(whole)], mask[b, : len(whole)] = whole, 1
        logprobs = np.asarray(run(model, inputs | {"input_ids": ids, "attention_mask": mask}))
        for b, texts in enumerate(choices):
            if told[b] and told[b][-1] in ends:
                continue
            answers = [processor.tokenizer.encode(text) for text in texts]
            here = logprobs[b, len(rows[b]) + len(told[b]) - 1]
            best = max(continuations(answers, told[b], ends), key=lambda token: here[token])
            told[b].append(best)
            scores[b].append(here[best])
    return told, scores


def test_a_trie_allows_what_continues_an_answer(processor):
    """At every beginning of every answer, also where one answer begins another."""
    tokenizer, ends = processor.tokenizer, (0, 2)
    vocabulary = tokenizer.core.get_vocab_size()
    trie, nodes = build([SOUNDS, CODES, SOUNDS], processor, rows=3)
    assert nodes[0] == nodes[2] != nodes[1]
    for begin, texts in zip(nodes, (SOUNDS, CODES), strict=False):
        answers = [tokenizer.encode(text) for text in texts]
        for answer in answers:
            node = jnp.array([begin])
            for i, token in enumerate([*answer, ends[0], ends[1], ends[0]]):
                allowed = np.isfinite(trie.allow(jnp.zeros((1, vocabulary)), node)[0])
                # an answer that has ended goes on ending
                wanted = continuations(answers, answer[:i], ends) if i <= len(answer) else set(ends)
                assert set(np.flatnonzero(allowed).tolist()) == wanted
                node = trie.advance(node, jnp.array([token]))
            assert int(node[0]) == constraint.ENDED


def test_a_trie_takes_the_room_of_its_answers(processor):
    """Not of as many rows as there are nodes, each as wide as the widest: of thousands of names."""
    letters = [chr(ord("a") + i) for i in range(26)] + [chr(ord("一") + i) for i in range(99)]
    names = [f"{a}{b}{c}" for a in letters for b in "ein" for c in letters[:20]]
    trie, nodes = build(names, processor)
    tokens = sum(len(processor.tokenizer.encode(name)) + 2 for name in names)
    assert sum(each.nbytes for each in jax.tree.leaves(trie)) < 8 * tokens
    node = jnp.array(nodes)
    for token in [*processor.tokenizer.encode(names[-1]), 2]:
        assert np.isfinite(trie.allow(jnp.zeros((1, 999)), node)[0, token])
        node = trie.advance(node, jnp.array([token]))
    assert int(node[0]) == constraint.ENDED


def test_greedy_answers_are_those_of_brute_force(model, processor, inputs):
    """Sets of their own per prompt, in a batch, through the cache and the compiled loop."""
    for choices in ([SOUNDS, CODES, SOUNDS[3:]], [["a", "a dog"]] * 3):
        expected, logprobs = greedy(model, inputs, processor, choices)
        tokens, scores = generate(
            model, inputs, choices=choices, processor=processor, logprobs=True
        )
        for b, (told, its) in enumerate(zip(expected, logprobs, strict=True)):
            assert tokens[b, : len(told)].tolist() == told
            assert (tokens[b, len(told) :] == model.config.pad_token).all()
            np.testing.assert_allclose(scores[b, : len(told)], its, atol=1e-4)
        assert all(t in c for t, c in zip(processor.decode(tokens), choices, strict=True))
        if choices[0] == choices[1]:
            shared = generate(model, inputs, choices=choices[0], processor=processor)
            np.testing.assert_array_equal(shared, tokens)


def test_chance_and_penalties_stay_within_the_set(model, processor, inputs):
    """Hot samples say every choice sooner or later, and nothing else; new ones compile nothing."""
    hot = Sampling(temperature=20.0, top_p=0.99, repetition_penalty=1.5)
    answer = lambda choices: processor.decode(
        generate(model, inputs, choices=choices, processor=processor, sampling=hot, n=20)
    )
    assert set(answer(SOUNDS)) == set(SOUNDS)
    known = programs.begin._cache_size(), programs.decode._cache_size()
    assert set(answer(CODES)) == set(CODES)
    assert (programs.begin._cache_size(), programs.decode._cache_size()) == known


def test_a_stream_keeps_to_the_set(model, processor, chirp):
    inputs = processor(text="今天<|audio_bos|><|AUDIO|><|audio_eos|>", audio=[(chirp(0.3), 16_000)])
    told = "".join(stream(model, processor, inputs, choices=SOUNDS))
    tokens = generate(model, inputs, choices=SOUNDS, processor=processor)
    assert [told] == processor.decode(tokens)
    assert told in SOUNDS


def test_sets_that_cannot_be_chosen_from_are_refused(model, processor, inputs):
    """With what was wanted, and what was got."""
    answer = lambda choices, **options: generate(
        model, inputs, choices=choices, **{"processor": processor, **options}
    )
    for nothing in ([], "yes", [[], ["a"], ["b"]], ["a", ["b"]]):
        with pytest.raises(ValueError, match=r"wanted a list of texts to choose from.*got"):
            answer(nothing)
    with pytest.raises(ValueError, match="choices for 3 prompts, got 2 lists"):
        answer([["a"], ["b"]])
    with pytest.raises(ValueError, match="want processor="):
        answer(["a"], processor=None)
    with pytest.raises(ValueError, match="want end tokens"):
        answer(["a"], end_tokens=())
    with pytest.raises(ValueError, match="without end tokens, got 'a<"):
        answer(["a<|im_end|>"])
    with pytest.raises(ValueError, match=r"'somebody laughs' has \d tokens, wanted 0 to 1"):
        answer(["a", "somebody laughs"], max_new_tokens=2)
    with pytest.raises(ValueError, match="'a' has 1 tokens, wanted 2 to"):
        answer(["a"], min_new_tokens=2)
    with pytest.raises(ValueError, match="without beams, got 2 beams"):
        answer(["a"], num_beams=2)
