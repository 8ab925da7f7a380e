"""logits -> the likeliest answers, by beam search.

Source: transformers 5.23, `generation/utils.py`, `_beam_search`: which hypotheses are kept, how
lengths count and when a search is over are its decisions.
"""

from functools import partial
from typing import Literal

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from qwen2audio_jax import cache as caches
from qwen2audio_jax import spread
from qwen2audio_jax.cache import Cache
from qwen2audio_jax.model import Qwen2Audio
from qwen2audio_jax.sampling import Rules, adjust

NEVER = -1e9  # the reference's score of what must not be chosen
SHORTEST_ANSWER = 64  # the smallest bucket of answers, in tokens


@flax.struct.dataclass
class Answers:
    """Hypotheses of every prompt, best first.

    Attributes:
      score: log-probability; of complete ones divided by length ** length_penalty.
      ended: complete ones.
    """

    tokens: Int[Array, "B beams new"]
    logprobs: Float[Array, "B beams new"]
    lengths: Int[Array, "B beams"]
    score: Float[Array, "B beams"]
    ended: Bool[Array, "B beams"]

    def take(self, index: Int[Array, "B kept"]) -> "Answers":
        return jax.tree.map(lambda x: _take(x, index), self)


@flax.struct.dataclass
class State:
    """A search.

    Attributes:
      logits: what the open answers' next tokens might be, B * beams rows.
      seen: the tokens that repetition counts; None where it is not penalised.
      improvable: prompts whose complete answers may yet be outdone.
      going: whether there is anything left to do.
    """

    cache: Cache
    logits: Float[Array, "rows V"]
    seen: Bool[Array, "rows V"] | None
    open: Answers
    complete: Answers
    improvable: Bool[Array, "B 1"]
    step: Int[Array, ""]
    going: Bool[Array, ""]


def search(
    model: Qwen2Audio,
    logits: Float[Array, "B V"],
    cache: Cache,
    seen: Bool[np.ndarray, "B V"] | None,
    rules: Rules,
    limit: int,
    *,
    rows: int,
    num_beams: int,
    n: int,
    length_penalty: float,
    early_stopping: bool | Literal["never"],
) -> tuple[Int[np.ndarray, "rows new"], Float[np.ndarray, "rows new"]]:
    """Searches for the `n` best answers of up to `limit` tokens to each prompt.

    Args:
      logits: scores of the prompts' next tokens.
      cache: the prompts.
      seen: the prompts' tokens, where repetition is penalised.
      rows: prompts; what is behind them in the arrays is empty.
      others: as in `generate`.

    Returns:
      Tokens and their log-probabilities, the best answer to each prompt first.
    """
    capacity = -(-limit // SHORTEST_ANSWER) * SHORTEST_ANSWER
    found = _search(
        model, logits, caches.repeat(cache, num_beams), seen, np.arange(len(logits)) >= rows, rules,
        limit, length_penalty, num_beams=num_beams, early_stopping=early_stopping,
        capacity=capacity,
    )  # fmt: skip
    best = lambda x: spread.whole(x)[:rows, :n].reshape(-1, *x.shape[2:])
    lengths = best(found.lengths)
    kept = np.arange(lengths.max()) < lengths[:, None]
    return (
        np.where(kept, best(found.tokens)[:, : lengths.max()], np.int32(model.config.pad_token)),
        np.where(kept, best(found.logprobs)[:, : lengths.max()], np.float32(0)),
    )


@partial(jax.jit, static_argnames=("num_beams", "early_stopping", "capacity"))
def _search(
    model, logits, cache, seen, empty, rules, limit, length_penalty, *, num_beams, early_stopping,
    capacity,
):  # fmt: skip
    B, empty = len(logits), empty[:, None]
    wide = lambda x: jnp.repeat(x, num_beams, axis=0)
    nothing = Answers(
        tokens=jnp.zeros((B, num_beams, capacity), jnp.int32),
        logprobs=jnp.zeros((B, num_beams, capacity), jnp.float32),
        lengths=jnp.zeros((B, num_beams), jnp.int32),
        score=jnp.full((B, num_beams), NEVER),
        ended=jnp.zeros((B, num_beams), bool),
    )
    state = State(
        cache=cache,
        logits=wide(logits),
        seen=None if seen is None else wide(seen),
        # the beams are alike at first: only one may be extended
        open=nothing.replace(score=nothing.score.at[:, 0].set(0)),
        complete=nothing,
        improvable=~empty,
        step=jnp.zeros((), jnp.int32),
        going=jnp.array(True),
    )

    def step(state):
        best, parents = _candidates(state, rules, num_beams)
        best = best.replace(ended=best.ended | (state.step + 1 >= limit))
        running = best.score + best.ended * NEVER
        score, index = jax.lax.top_k(running, num_beams)
        following = best.take(index).replace(score=score)
        complete = _complete(state, best, length_penalty, early_stopping)
        length = limit if early_stopping == "never" else state.step + 1
        # a negative penalty favours short answers, so that waiting cannot help
        length = jnp.where(length_penalty > 0, length, state.step + 1)
        hoped = score[:, :1] / length.astype(jnp.float32) ** length_penalty
        worst = jnp.where(complete.ended, complete.score.min(axis=1, keepdims=True), NEVER)
        improvable = state.improvable & (hoped > worst).any(axis=1, keepdims=True)
        full = (early_stopping is True) & (complete.ended | empty).all()
        state = _advance(model, state, following.tokens[:, :, state.step], _take(parents, index))
        return state.replace(
            open=following,
            complete=complete,
            improvable=improvable,
            going=improvable.any() & ~full & ~(best.ended | empty).all(),
        )

    return jax.lax.while_loop(lambda state: state.going, step, state).complete


def _candidates(state, rules, num_beams):
    """The best extensions of the open answers by one token, and which answer each extends.

    They are so many that `num_beams` of them stay open even if every end token is among them.
    """
    B, V = state.open.score.shape[0], state.logits.shape[1]
    raw = jax.nn.log_softmax(state.logits, axis=-1)
    scores = adjust(raw, state.seen, state.step, rules).reshape(B, num_beams, V)
    scores = (scores + state.open.score[:, :, None]).reshape(B, -1)
    kept = min(max(2, 1 + len(rules.end_tokens)) * num_beams, scores.shape[1])
    score, index = jax.lax.top_k(scores, kept)
    parents, tokens = index // V, (index % V).astype(jnp.int32)
    logprobs = jnp.take_along_axis(raw.reshape(B, -1), index, axis=1)
    best = state.open.take(parents)
    return best.replace(
        tokens=best.tokens.at[:, :, state.step].set(tokens),
        logprobs=best.logprobs.at[:, :, state.step].set(logprobs),
        lengths=best.lengths + 1,
        score=score,
        ended=jnp.isin(tokens, rules.end_tokens),
    ), parents


def _complete(state, best, length_penalty, early_stopping):
    """The best complete answers, old ones and those among the candidates."""
    num_beams = state.open.score.shape[1]
    # further candidates are there to stay open, not to end
    ended = best.ended & (jnp.arange(best.ended.shape[1]) < num_beams)
    full = (early_stopping is True) & state.complete.ended.all(axis=1, keepdims=True)
    score = best.score / (state.step + 1).astype(jnp.float32) ** length_penalty
    score += NEVER * (full.astype(jnp.float32) + ~state.improvable + ~ended)
    new = best.replace(score=score, ended=ended)
    both = jax.tree.map(lambda *x: jnp.concatenate(x, axis=1), state.complete, new)
    return both.take(jax.lax.top_k(both.score, num_beams)[1])


def _advance(model, state, tokens, parents):
    """Reads the open answers' last tokens, each after the past of its parent."""
    B, num_beams = parents.shape
    rows = (jnp.arange(B)[:, None] * num_beams + parents).ravel()
    tokens = tokens.reshape(-1, 1)
    x, cache = model.hidden(
        tokens, jnp.ones_like(tokens), cache=caches.reorder(state.cache, parents)
    )
    seen = state.seen
    if seen is not None:
        seen = seen[rows].at[jnp.arange(len(rows)), tokens[:, 0]].set(True)
    return state.replace(
        cache=cache, logits=model.decoder.logits(x[:, 0]), seen=seen, step=state.step + 1
    )


def _take(x, index):
    return jax.vmap(lambda x, index: x[index])(x, index)
