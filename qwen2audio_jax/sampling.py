"""logits -> the next token: the rules of choice, in the reference's order and meaning.

Source: transformers 5.23, `generation/logits_process.py`.
"""

import dataclasses
import math
import os
from collections.abc import Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt

from qwen2audio_jax.config import Config
from qwen2audio_jax.constraint import Trie

Scores = Float[Array, "B V"]
Seen = Bool[Array, "B V"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are chosen.

    Attributes:
      temperature: divides the scores; 0 takes the best token (greedy), whatever top_k and top_p.
      top_k: choose among the k best tokens, and those equal to the last of them; None: all.
      top_p: choose among the fewest best tokens whose probabilities exceed this; None: all.
      repetition_penalty: makes tokens of the prompt and of the answer so far less likely, if
        above 1; also when greedy. Padding is no part of the prompt.
      seed: where chance comes from, together with a prompt's tokens: a prompt gets the same
        answers alone or in any batch.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    repetition_penalty: float = 1.0
    seed: int = 0

    def __post_init__(self):
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature must be 0 or more, got {self.temperature}")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k must be 1 or more, got {self.top_k}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1, got {self.top_p}")
        if not 0 < self.repetition_penalty < math.inf:
            raise ValueError(f"repetition_penalty must be above 0, got {self.repetition_penalty}")

    @classmethod
    def from_pretrained(cls, source: str | os.PathLike, *, seed: int = 0) -> "Sampling":
        """What a checkpoint suggests in its generation_config.json, as transformers reads it.

        Args:
          source: as in `Qwen2Audio.from_pretrained`.

        Raises:
          ValueError: there is no checkpoint, or a value cannot be used.
        """
        from qwen2audio_jax.weights import locate, settings  # weights know the model

        folder = locate(os.fspath(source), settings.PATTERNS)
        return cls(seed=seed, **settings.sampling(folder))


@flax.struct.dataclass
class Rules:
    """A choice as compiled programs read it: new numbers compile nothing; a rule that is None
    is not computed."""

    temperature: Any
    top_p: Any
    repetition_penalty: Any
    min_new_tokens: Any
    end_tokens: Any  # Int " ends"
    seed: Any
    top_k: int | None = flax.struct.field(pytree_node=False)
    trie: Trie | None = None


def rules_for(
    config: Config,
    sampling: Sampling,
    *,
    min_new_tokens: int = 0,
    end_tokens: Sequence[int] | None = None,
) -> Rules:
    """`sampling` and an answer's bounds, as compiled programs read them."""
    sampled = sampling.temperature > 0
    ends = config.end_tokens if end_tokens is None else tuple(end_tokens)
    return Rules(
        temperature=sampling.temperature if sampled else None,
        top_k=sampling.top_k if sampled else None,
        top_p=sampling.top_p if sampled and sampling.top_p != 1 else None,
        repetition_penalty=(
            None if sampling.repetition_penalty == 1 else sampling.repetition_penalty
        ),
        min_new_tokens=min_new_tokens or None,
        end_tokens=jnp.asarray(ends, jnp.int32),
        seed=np.uint32(sampling.seed % 2**32),
    )


def choose(
    logits: Scores,
    seen: Seen | None,
    step: Int[Array, ""],
    draws: UInt[Array, " B"],
    rules: Rules,
    nodes: Int[Array, " B"] | None = None,
) -> tuple[Int[Array, " B"], Float[Array, " B"]]:
    """Chooses a token a row.

    Args:
      logits: the model's scores.
      seen: tokens that the prompt or the answer holds; None unless repetition is penalised.
      step: how many tokens the answer has.
      draws: a number for each row's own chance.
      nodes: where each row is in the rules' trie; None: all tokens are allowed.

    Returns:
      The tokens, and their log-probabilities in the model's own distribution, before any rule.
    """
    scores = adjust(logits, seen, step, rules)
    if nodes is not None:
        scores = rules.trie.allow(scores, nodes)
    if rules.temperature is None:
        tokens = jnp.argmax(scores, axis=-1)
    else:
        scores = warp(scores, rules)
        key = jax.random.fold_in(jax.random.key(rules.seed), step)
        draw = lambda draw, scores: jax.random.categorical(jax.random.fold_in(key, draw), scores)
        tokens = jax.vmap(draw)(draws, scores)
    tokens = tokens.astype(jnp.int32)
    own = jnp.take_along_axis(logits, tokens[:, None], axis=-1)[:, 0]
    return tokens, own - jax.nn.logsumexp(logits, axis=-1)


def adjust(
    scores: Scores,
    seen: Seen | None,
    step: Int[Array, ""],
    rules: Rules,
) -> Scores:
    """Applies the rules that hold for any way to choose."""
    scores = penalise(scores, seen, rules.repetition_penalty)
    if rules.min_new_tokens is None:
        return scores
    return forbid(scores, rules.end_tokens, step < rules.min_new_tokens)


def warp(scores: Scores, rules: Rules) -> Scores:
    """Applies the rules that hold for chance alone; softmax makes probabilities of the result."""
    return keep_top_p(keep_top_k(scores / rules.temperature, rules.top_k), rules.top_p)


def penalise(scores: Scores, seen: Seen | None, penalty: Any) -> Scores:
    """Divides positive and multiplies negative scores of tokens that were seen."""
    if penalty is None:
        return scores
    return jnp.where(seen, jnp.where(scores < 0, scores * penalty, scores / penalty), scores)


def forbid(scores: Scores, tokens: Int[Array, " ends"], now: Bool[Array, ""]) -> Scores:
    """Makes tokens impossible, if `now`."""
    return jnp.where(now, scores.at[:, tokens].set(-jnp.inf), scores)


def keep_top_k(scores: Scores, k: int | None) -> Scores:
    """Makes all but the k best tokens, and those equal to the last of them, impossible."""
    if k is None:
        return scores
    best, _ = jax.lax.top_k(scores, min(k, scores.shape[-1]))
    return jnp.where(scores < best[:, -1:], -jnp.inf, scores)


def keep_top_p(scores: Scores, p: Any) -> Scores:
    """Makes the least likely tokens impossible that together have a probability of 1 - p."""
    if p is None:
        return scores
    ranked = jnp.argsort(scores, axis=-1)
    ascending = jnp.take_along_axis(scores, ranked, axis=-1)
    cumulative = jnp.cumsum(jax.nn.softmax(ascending, axis=-1), axis=-1)
    kept = (cumulative > 1 - p).at[:, -1].set(True)
    rows = jnp.arange(scores.shape[0])[:, None]
    return jnp.where(jnp.zeros_like(kept).at[rows, ranked].set(kept), scores, -jnp.inf)
