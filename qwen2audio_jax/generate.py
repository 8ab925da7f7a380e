"""logits -> tokens, until the end.

Shapes are rounded up to buckets, so that few programs serve all lengths; the numbers that remain
(how many tokens, a temperature, a seed) are traced.
"""

import time
import zlib
from collections.abc import Generator, Mapping, Sequence
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from qwen2audio_jax import beam, constraint, programs, spread
from qwen2audio_jax.cache import Cache
from qwen2audio_jax.model import Qwen2Audio, as_array
from qwen2audio_jax.processor import Processor
from qwen2audio_jax.sampling import Rules, Sampling, rules_for
from qwen2audio_jax.stop import StopStrings

GREEDY = Sampling(temperature=0.0)
NEW_TOKENS = 256  # the longest answer where none is asked for
STOP_CHUNK = 16  # the same where stop strings are looked for in between
PACE = 0.05  # seconds between the pieces of a stream, where tokens come faster
SHORTEST_PROMPT, SHORTEST_CACHE = 32, 256  # the smallest buckets, in tokens

Rows = list[Int[np.ndarray, " _"]]
Tokens = Int[np.ndarray, "rows new"]
Scores = Float[np.ndarray, "rows new"]


def generate(
    model: Qwen2Audio,
    inputs: Mapping[str, Any],
    *,
    max_new_tokens: int | None = None,
    min_new_tokens: int = 0,
    sampling: Sampling = GREEDY,
    n: int = 1,
    end_tokens: Sequence[int] | None = None,
    stop: Sequence[str] = (),
    choices: constraint.Choices | None = None,
    processor: Processor | None = None,
    num_beams: int = 1,
    length_penalty: float = 1.0,
    early_stopping: bool | Literal["never"] = False,
    logprobs: bool = False,
) -> Tokens | tuple[Tokens, Scores]:
    """Answers a batch of prompts.

    Args:
      inputs: what a `Processor` makes, padded on either side.
      max_new_tokens: the longest answer; None: 256, or what the context has room for.
      min_new_tokens: no answer ends with an end token before it has so many tokens.
      n: answers per prompt, one after the other: rows are B * n.
      end_tokens: an answer ends with any of these; None: the config's.
      stop: an answer ends with the token that completes any of these strings.
      choices: every answer is one of these texts; or a list of texts per prompt. An end token
        follows it. Special tokens count as such, and white space at its start belongs to it.
      processor: reads the tokens for `stop` and makes those of `choices`.
      num_beams: search with so many beams rather than sample; the best `n` come back.
      length_penalty: beams are ranked by log-probability / length ** length_penalty.
      early_stopping: when a search is over: True, once there are as many ended beams as
        `num_beams`; False, once the open ones are unlikely to do better; "never", once they
        cannot.
      logprobs: also return the tokens' log-probabilities.

    Returns:
      The answers; the pad token follows where one ended before the longest did. With `logprobs`
      also each token's log-probability in the model's own distribution, before temperature,
      penalty or any other rule; 0 for padding.

    Raises:
      ValueError: the prompt and `max_new_tokens` do not fit the model's context, or the options
        do not fit each other.
    """
    rows = unpad(inputs)
    limit = room(model, rows, max_new_tokens)
    if min(n, num_beams) < 1 or not 0 <= min_new_tokens <= limit:
        raise ValueError(
            f"wanted answers and beams from 1 and min_new_tokens from 0 to {limit}, got {n}, "
            f"{num_beams} and {min_new_tokens}"
        )
    rules = rules_for(model.config, sampling, min_new_tokens=min_new_tokens, end_tokens=end_tokens)
    if num_beams > 1 and (sampling.temperature > 0 or stop or n > num_beams):
        raise ValueError(
            f"{num_beams} beams want temperature 0, no stop strings and at most {num_beams} "
            f"answers, got {sampling.temperature}, {list(stop)} and {n}"
        )
    if num_beams > 1 and choices is not None:
        raise ValueError(f"choices are made without beams, got {num_beams} beams")
    rules, nodes = constrain(rules, choices, processor, len(rows), min_new_tokens, limit)
    heard = listen(model, inputs)
    if num_beams > 1:
        logits, cache = prefill(model, rows, heard, limit)
        with model.on_mesh():
            tokens, scores = beam.search(
                model, logits, cache, seen(rules, rows, logits), rules, limit, rows=len(rows),
                num_beams=num_beams, n=n, length_penalty=length_penalty,
                early_stopping=early_stopping,
            )  # fmt: skip
        return (tokens, scores) if logprobs else tokens
    if n > 1 and sampling.temperature == 0:
        raise ValueError(f"{n} answers at temperature 0 would be the same; wanted a temperature")
    stops = StopStrings(stop, processor, len(rows) * n) if stop else None
    logits, cache = prefill(model, rows, heard, limit)
    made = decode(model, rows, logits, cache, rules, limit, n=n, stops=stops, nodes=nodes)
    tokens, scores = (np.concatenate(parts, axis=1) for parts in zip(*made, strict=True))
    return (tokens, scores) if logprobs else tokens


def unpad(inputs: Mapping[str, Any]) -> Rows:
    """The prompts' tokens without padding."""
    ids = np.asarray(inputs["input_ids"])
    if ids.ndim != 2:
        raise ValueError(f"wanted input_ids [B, L], got the shape {ids.shape}")
    mask = np.asarray(inputs.get("attention_mask", np.ones_like(ids)))
    rows = [row[kept].astype(np.int32) for row, kept in zip(ids, mask.astype(bool), strict=True)]
    if empty := [b for b, row in enumerate(rows) if not len(row)]:
        raise ValueError(f"wanted at least one token in every prompt, got none in rows {empty}")
    return rows


def room(model: Qwen2Audio, rows: Rows, max_new_tokens: int | None) -> int:
    """How many tokens an answer may have; refuses what the context has no room for."""
    longest, positions = max(map(len, rows)), model.config.decoder.positions
    wanted = 1 if max_new_tokens is None else max_new_tokens
    if wanted < 1:
        raise ValueError(f"max_new_tokens must be 1 or more, got {wanted}")
    if longest + wanted > positions:
        raise ValueError(
            f"a prompt of {longest} tokens and {wanted} new ones do not fit the context of "
            f"{positions}"
        )
    return min(NEW_TOKENS, positions - longest) if max_new_tokens is None else max_new_tokens


def constrain(
    rules: Rules,
    choices: constraint.Choices | None,
    processor: Processor | None,
    rows: int,
    shortest: int,
    longest: int,
) -> tuple[Rules, Int[np.ndarray, " rows"] | None]:
    """The rules with a trie of `choices`, and the node at which each row begins."""
    if choices is None:
        return rules, None
    ends = np.asarray(rules.end_tokens).tolist()
    trie, nodes = constraint.build(
        choices, processor, rows, end_tokens=ends, shortest=shortest, longest=longest
    )
    return rules.replace(trie=trie), nodes


def bucket(n: int, smallest: int, *, per_octave: int) -> int:
    """Rounds up to one of few sizes: `per_octave` from a power of two to the next."""
    if n <= smallest:
        return smallest
    step = (1 << (n - 1).bit_length() - 1) // per_octave
    return -(-n // step) * step


def listen(model: Qwen2Audio, inputs: Mapping[str, Any]) -> tuple | None:
    """The clips' audio states and how many of each are valid; None without clips."""
    features = as_array(inputs.get("input_features"), np.float32)
    mask = as_array(inputs.get("feature_attention_mask"), np.int32)
    model.check(as_array(inputs["input_ids"], np.int32), mask)
    if features is None:
        return None
    with model.on_mesh():
        return programs.listen(model, features, mask)


def seen(rules: Rules, rows: Rows, logits: Float[Array, "B V"]) -> Bool[np.ndarray, "B V"] | None:
    """The tokens of every prompt, where repetition is penalised."""
    if rules.repetition_penalty is None:
        return None
    seen = np.zeros(logits.shape, bool)
    for row, tokens in zip(seen, rows, strict=False):  # which empty ones may follow
        row[tokens] = True
    return seen


def prefill(
    model: Qwen2Audio, rows: Rows, heard: tuple | None, limit: int
) -> tuple[Float[Array, "B V"], Cache]:
    """Reads the prompts: what comes next, and a cache with room for `limit` tokens more.

    Where a mesh does not divide the prompts, empty rows follow, so that each device holds its part
    of the cache rather than all of it.
    """
    length = bucket(max(map(len, rows)), SHORTEST_PROMPT, per_octave=4)
    slots = bucket(length + limit, SHORTEST_CACHE, per_octave=2)
    with model.on_mesh():
        filled = spread.filled(len(rows))
    ids = np.full((filled, length), model.config.pad_token, np.int32)
    mask = np.zeros(ids.shape, np.int32)
    for b, row in enumerate(rows):
        ids[b, length - len(row) :] = row
        mask[b, length - len(row) :] = 1
    return extend(model, ids, mask, heard, slots=slots)


def extend(
    model: Qwen2Audio,
    ids: Int[np.ndarray, "B L"],
    mask: Int[np.ndarray, "B L"],
    heard: tuple | None,
    *,
    cache: Cache | None = None,
    slots: int | None = None,
    used: int | None = None,
) -> tuple[Float[Array, "B V"], Cache]:
    """Reads tokens after what the cache holds.

    Args:
      heard: what `listen` gave for the clips among these tokens.
      cache: the past, given away; None: a new one with `slots`.
      used: columns before the padding on the right; None: all.

    Returns:
      Scores of what follows the last column used, and the cache.
    """
    used = ids.shape[1] if used is None else used
    with model.on_mesh():
        return programs.prefill(model, programs.embed(model, ids, heard), mask, cache, slots, used)


def decode(
    model: Qwen2Audio,
    rows: Rows,
    logits: Float[Array, "B V"],
    cache: Cache,
    rules: Rules,
    limit: int,
    *,
    n: int = 1,
    stops: StopStrings | None = None,
    nodes: Int[np.ndarray, " prompts"] | None = None,
    paced: bool = False,
) -> Generator[tuple[Tokens, Scores], None, Cache]:
    """Answers, some tokens at a time: the first, then as many as one call of the loop makes.

    Args:
      rows: the prompts, `n` answers to each.
      logits: scores of the prompts' next tokens; rows behind these are empty, and never answer.
      cache: the prompts, given away.
      nodes: where each row's choices begin in the rules' trie.
      paced: give pieces often enough to be watched, rather than as large as can be.

    Returns:
      The cache, with all but the last token in it.
    """
    if n > 1:
        with model.on_mesh():
            logits, cache = programs.repeat(logits, cache, n, len(rows))
        rows = [row for row in rows for _ in range(n)]
        nodes = None if nodes is None else np.repeat(nodes, n)
    # a row's chance depends on its prompt and on which of its answers it is, not on its place
    number = [
        zlib.crc32(np.int32(i % n).tobytes(), zlib.crc32(row.tobytes()))
        for i, row in enumerate(rows)
    ]
    filled = lambda x, rest: np.pad(x, (0, len(logits) - len(rows)), constant_values=rest)
    draws = filled(np.array(number, np.uint32), 0)
    nodes = None if nodes is None else filled(nodes, constraint.ENDED)
    ended = filled(np.zeros(len(rows), bool), True)
    with model.on_mesh():
        said = seen(rules, rows, logits)
        state, tokens, scores = programs.begin(logits, cache, said, draws, nodes, ended, rules)
    made, count = 0, 1
    while True:
        lengths, ended, tokens, scores = (
            spread.whole(x)[: len(rows)] for x in (state.lengths, state.ended, tokens, scores)
        )
        if stops is not None:
            lengths = stops(tokens, lengths)
            ended = ended | stops.stopped
            state = state.replace(ended=jnp.asarray(filled(ended, True)))
        new = int(lengths.max()) - made
        kept = np.arange(made, made + new) < lengths[:, None]
        yield (
            np.where(kept, tokens[:, :new], np.int32(model.config.pad_token)),
            np.where(kept, scores[:, :new], np.float32(0)),
        )
        made += new
        if made == limit or ended.all():
            return state.cache
        start = time.perf_counter()
        count = min(count, limit - made)
        with model.on_mesh():
            state, tokens, scores = programs.decode(model, state, draws, rules, count)
        if paced:
            state.step.block_until_ready()
            count = int(np.clip(count * PACE / (time.perf_counter() - start), 1, programs.CHUNK))
        else:
            count = STOP_CHUNK if stops else programs.CHUNK
