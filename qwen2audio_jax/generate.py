"""logits -> tokens, until the end.

Shapes are rounded up to buckets, so that few programs serve all lengths; the numbers that remain
(how many tokens, a temperature, a seed) are traced.
"""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from qwen2audio_jax import cache as caches
from qwen2audio_jax import merge
from qwen2audio_jax.cache import Cache
from qwen2audio_jax.model import Qwen2Audio
from qwen2audio_jax.sampling import Rules, Sampling, choose, rules_for

GREEDY = Sampling(temperature=0.0)
NEW_TOKENS = 256  # the longest answer where none is asked for
CHUNK = 64  # tokens a row that one call of the decode loop makes at most
SHORTEST_PROMPT, SHORTEST_CACHE = 32, 256  # the smallest buckets, in tokens

Rows = list[Int[np.ndarray, " _"]]
Tokens = Int[np.ndarray, "rows new"]
Scores = Float[np.ndarray, "rows new"]


@flax.struct.dataclass
class State:
    """Answers in the making.

    Attributes:
      cache: the prompts and the answers but for their last tokens.
      last: the last token of every row.
      seen: the tokens that repetition counts; None where it is not penalised.
      ended: rows that are complete.
      step: how many tokens the answers have.
    """

    cache: Cache
    last: Int[Array, " B"]
    seen: Bool[Array, "B V"] | None
    ended: Bool[Array, " B"]
    step: Int[Array, ""]


def generate(
    model: Qwen2Audio,
    inputs: Mapping[str, Any],
    *,
    max_new_tokens: int | None = None,
    min_new_tokens: int = 0,
    sampling: Sampling = GREEDY,
    n: int = 1,
    end_tokens: Sequence[int] | None = None,
    logprobs: bool = False,
) -> (
    Int[np.ndarray, "rows new"] | tuple[Int[np.ndarray, "rows new"], Float[np.ndarray, "rows new"]]
):
    """Answers a batch of prompts.

    Args:
      inputs: what a `Processor` makes, padded on either side.
      max_new_tokens: the longest answer; None: 256, or what the context has room for.
      min_new_tokens: no answer ends before it has so many tokens.
      n: answers per prompt, one after the other: rows are B * n.
      end_tokens: an answer ends with any of these; None: the config's.
      logprobs: also return the tokens' log-probabilities.

    Returns:
      The answers; the pad token follows where one ended before the longest did. With `logprobs`
      also each token's log-probability in the model's own distribution, before temperature,
      penalty or any other rule; 0 for padding.

    Raises:
      ValueError: the prompt and `max_new_tokens` do not fit the model's context.
    """
    rows = unpad(inputs)
    limit = room(model, rows, max_new_tokens)
    rules = rules_for(
        sampling,
        min_new_tokens=min_new_tokens,
        end_tokens=model.config.end_tokens if end_tokens is None else tuple(end_tokens),
        pad_token=model.config.pad_token,
    )
    made = chunks(model, rows, listen(model, inputs), rules, limit, n)
    tokens, scores = (np.concatenate(parts, axis=1) for parts in zip(*made, strict=True))
    return (tokens, scores) if logprobs else tokens


def unpad(inputs: Mapping[str, Any]) -> Rows:
    """The prompts' tokens without padding."""
    ids = np.asarray(inputs["input_ids"])
    mask = np.asarray(inputs.get("attention_mask", np.ones_like(ids)))
    rows = [row[kept] for row, kept in zip(ids, mask.astype(bool), strict=True)]
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


def bucket(n: int, smallest: int, *, per_octave: int) -> int:
    """Rounds up to one of few sizes: `per_octave` of them between a power of two and the next."""
    if n <= smallest:
        return smallest
    step = (1 << (n - 1).bit_length() - 1) // per_octave
    return -(-n // step) * step


def listen(model: Qwen2Audio, inputs: Mapping[str, Any]) -> tuple | None:
    """The clips' audio states and how many of each are valid; None without clips."""
    features, mask = inputs.get("input_features"), inputs.get("feature_attention_mask")
    model.check(inputs["input_ids"], mask)
    return None if features is None else _listen(model, features, mask)


def chunks(
    model: Qwen2Audio, rows: Rows, heard: tuple | None, rules: Rules, limit: int, n: int
) -> Iterator[tuple[Tokens, Scores]]:
    """Answers, some tokens at a time: the first one, then up to `CHUNK` a piece."""
    length = bucket(max(map(len, rows)), SHORTEST_PROMPT, per_octave=4)
    slots = bucket(length + limit, SHORTEST_CACHE, per_octave=2)
    ids = np.full((len(rows), length), model.config.pad_token, np.int32)
    mask = np.zeros(ids.shape, np.int32)
    for b, row in enumerate(rows):
        ids[b, length - len(row) :] = row
        mask[b, length - len(row) :] = 1
    logits, cache = _prefill(model, _embed(model, ids, heard), mask, slots)
    seen = None if rules.repetition_penalty is None else _seen(rows, logits.shape[1])
    logits, cache, seen = _widen(logits, cache, seen, n)
    draws = np.tile(np.arange(n, dtype=np.int32), len(rows))
    state, tokens, scores = _begin(logits, cache, seen, draws, rules)
    yield np.asarray(tokens), np.asarray(scores)
    made = 1
    while made < limit and not state.ended.all():
        state, tokens, scores = _decode(model, state, draws, rules, min(limit - made, CHUNK))
        new = int(state.step) - made
        yield np.asarray(tokens[:, :new]), np.asarray(scores[:, :new])
        made += new


def _seen(rows: Rows, vocabulary: int) -> Bool[np.ndarray, "B V"]:
    seen = np.zeros((len(rows), vocabulary), bool)
    for b, row in enumerate(rows):
        seen[b, row] = True
    return seen


def _widen(logits, cache, seen, n):
    """Repeats every row for its `n` answers."""
    if n == 1:
        return logits, cache, seen
    wide = lambda x: jnp.repeat(x, n, axis=0)
    return wide(logits), caches.repeat(cache, n), None if seen is None else wide(seen)


# Three programs rather than one for what precedes the first token: the two large ones then
# depend on the clips' shapes alone, or on the prompt's alone.
@jax.jit
def _listen(model, features, mask):
    return model.listen(features, mask)


@jax.jit
def _embed(model, ids, heard):
    x = model.decoder.embed(ids)
    if heard is None:
        return x
    return merge.merge(x, ids == model.config.audio_token, *heard)


@partial(jax.jit, static_argnames="slots")
def _prefill(model, x, mask, slots):
    """Reads the prompts: the scores of their next tokens, and a cache that holds them."""
    cache = caches.empty(
        model.config.decoder, len(x), slots, scan=model.scan_layers, dtype=model.dtype
    )
    positions = jnp.maximum(jnp.cumsum(mask, axis=1) - 1, 0)
    x, cache = model.decoder(x, positions, mask, cache)
    return model.decoder.logits(x[:, -1]), cache


@partial(jax.jit, donate_argnames="cache")
def _begin(logits, cache, seen, draws, rules):
    """Chooses the answers' first tokens."""
    state = State(
        cache=cache,
        last=jnp.zeros(len(logits), jnp.int32),
        seen=seen,
        ended=jnp.zeros(len(logits), bool),
        step=jnp.zeros((), jnp.int32),
    )
    state, tokens, scores = _extend(state, logits, draws, rules)
    return state, tokens[:, None], scores[:, None]


def _extend(state, logits, draws, rules):
    """Chooses the next token of every row that has not ended."""
    tokens, scores = choose(logits, state.seen, state.step, draws, rules)
    tokens = jnp.where(state.ended, rules.pad_token, tokens)
    scores = jnp.where(state.ended, 0.0, scores)
    seen = state.seen
    if seen is not None:
        seen = seen.at[jnp.arange(len(tokens)), tokens].set(True)
    state = state.replace(
        last=tokens,
        seen=seen,
        ended=state.ended | jnp.isin(tokens, rules.end_tokens),
        step=state.step + 1,
    )
    return state, tokens, scores


@partial(jax.jit, donate_argnames="state")
def _decode(model, state, draws, rules, count):
    """Extends answers by up to `count` tokens, fewer if every row ends before."""
    B, first = len(state.last), state.step

    def going(carry):
        state = carry[0]
        return (state.step - first < count) & ~state.ended.all()

    def step(carry):
        state, tokens, scores = carry
        at = state.step - first
        x, cache = model.hidden(state.last[:, None], jnp.ones((B, 1), jnp.int32), cache=state.cache)
        state = state.replace(cache=cache)
        state, token, score = _extend(state, model.decoder.logits(x[:, 0]), draws, rules)
        return state, tokens.at[:, at].set(token), scores.at[:, at].set(score)

    made = jnp.zeros((B, CHUNK), jnp.int32), jnp.zeros((B, CHUNK), jnp.float32)
    return jax.lax.while_loop(going, step, (state, *made))
