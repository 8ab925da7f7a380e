"""What generation compiles: to hear, to read, to choose a first token, and the loop of others."""

from functools import partial
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from qwen2audio_jax import cache as caches
from qwen2audio_jax import spread
from qwen2audio_jax.cache import Cache
from qwen2audio_jax.sampling import choose

CHUNK = 256  # tokens a row that one call of the decode loop makes at most


@flax.struct.dataclass
class State:
    """Answers in the making.

    Attributes:
      cache: the prompts and the answers but for their last tokens.
      last: [B], the last token of every row.
      lengths: [B], tokens of every answer, that which ended it included.
      seen: [B V], the tokens that repetition counts; None where it is not penalised.
      nodes: [B], where in the trie of choices the answers are; None where all may be said.
      ended: [B], rows that are complete.
      step: tokens of an answer that has not ended.
    """

    cache: Cache
    last: Any  # arrays, or what stands for them: shapes
    lengths: Any
    seen: Any
    nodes: Any
    ended: Any
    step: Any


# Three programs rather than one for what precedes the first token: the two large ones then
# depend on the clips' shapes alone, or on the prompt's alone.
@jax.jit
def listen(model, features, mask):
    more = spread.filled(len(features)) - len(features)  # empty clips
    features, mask = (jnp.pad(x, [(0, more), *[(0, 0)] * (x.ndim - 1)]) for x in (features, mask))
    return model.listen(features, mask)


@jax.jit
def embed(model, ids, heard):
    return model.decoder.embed(ids) if heard is None else model.place(ids, *heard)


@partial(jax.jit, static_argnames="slots", donate_argnames="cache")
def prefill(model, x, mask, cache, slots, used):
    if cache is None:
        cache = caches.empty(
            model.config.decoder, len(x), slots, scan=model.scan_layers, dtype=model.dtype
        )
    start = cache.length
    positions = jnp.maximum(jnp.cumsum(mask, axis=1) - 1, 0)
    positions += cache.segments.sum(axis=1, keepdims=True)
    x, cache = model.decoder(x, positions, mask, cache)
    last = jax.lax.dynamic_index_in_dim(x, used - 1, axis=1, keepdims=False)
    return model.decoder.logits(last), caches.rewind(cache, start + used)


@partial(jax.jit, static_argnames=("n", "rows"))
def repeat(logits, cache, n, rows):
    """Rows for `n` answers to each of the first `rows` prompts, and empty ones that fill a mesh."""
    total = spread.filled(rows * n)
    logits = jnp.repeat(logits[:rows], n, axis=0)
    logits = jnp.pad(logits, ((0, total - rows * n), (0, 0)))
    return logits, caches.repeat(cache, n, rows=rows, total=total)


@partial(jax.jit, donate_argnames="cache")
def begin(logits, cache, seen, draws, nodes, ended, rules):
    """Chooses the answers' first tokens; rows that have `ended` already are not there to answer."""
    state = State(
        cache=cache,
        last=jnp.zeros(len(logits), jnp.int32),
        lengths=jnp.zeros(len(logits), jnp.int32),
        seen=seen,
        nodes=nodes,
        ended=ended,
        step=jnp.zeros((), jnp.int32),
    )
    state, tokens, scores = _choose(state, logits, draws, rules)
    return state, tokens[:, None], scores[:, None]


@partial(jax.jit, donate_argnames="state")
def decode(model, state, draws, rules, count):
    """Extends answers by up to `count` tokens, fewer if every row ends before."""
    rows, first = len(state.last), state.step

    def going(carry):
        state = carry[0]
        return (state.step - first < count) & ~state.ended.all()

    def step(carry):
        state, tokens, scores = carry
        at = state.step - first
        one = jnp.ones((rows, 1), jnp.int32)
        x, cache = model.hidden(state.last[:, None], one, cache=state.cache)
        logits = model.decoder.logits(x[:, 0])
        state, token, score = _choose(state.replace(cache=cache), logits, draws, rules)
        return state, tokens.at[:, at].set(token), scores.at[:, at].set(score)

    made = jnp.zeros((rows, CHUNK), jnp.int32), jnp.zeros((rows, CHUNK), jnp.float32)
    return jax.lax.while_loop(going, step, (state, *made))


def _choose(state, logits, draws, rules):
    """Chooses the next token of every row; rows that have ended get one that counts for nothing."""
    tokens, scores = choose(logits, state.seen, state.step, draws, rules, state.nodes)
    seen, nodes = state.seen, state.nodes
    if nodes is not None:
        nodes = rules.trie.advance(nodes, tokens)
    if seen is not None:
        seen = seen.at[jnp.arange(len(tokens)), tokens].set(True)
    state = state.replace(
        last=tokens,
        lengths=state.lengths + ~state.ended,
        seen=seen,
        nodes=nodes,
        ended=state.ended | jnp.isin(tokens, rules.end_tokens),
        step=state.step + 1,
    )
    return state, tokens, scores
