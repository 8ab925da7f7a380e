"""Learning from pairs of answers of which one was preferred: DPO and its kin, and ORPO.

Names and formulas are TRL's, except that nothing but answers is ever learned: where TRL's ORPO
also models the prompt, this one does not.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Literal

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from qwen2audio_jax.model import Qwen2Audio
from qwen2audio_jax.processor import IGNORED
from qwen2audio_jax.training.loss import Sums, next_labels, token_logps

SIDES = ("chosen", "rejected")
REFERENCE = tuple(f"ref_{side}_logps" for side in SIDES)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PreferenceConfig:
    """What is minimised over pairs."""

    loss_type: Literal["sigmoid", "ipo", "hinge", "robust", "orpo"] = "sigmoid"
    """sigmoid is DPO as published (arXiv:2305.18290), robust its form for labels that are wrong
    with chance `label_smoothing` (2403.00409), hinge SLiC's (2305.10425), ipo 2310.12036, orpo
    2403.07691, which has no reference and learns the chosen answers too."""
    beta: float = 0.1
    """How much leaving the reference costs; ORPO's weight of the odds ratio."""
    label_smoothing: float = 0.0
    """The chance that a pair's label is wrong; sigmoid and robust only."""
    reference_free: bool = False
    """As if the reference found all answers alike."""
    length_normalized: bool = False
    """Log-probabilities are means over tokens rather than sums; ipo's and orpo's always are."""
    rpo_alpha: float | None = None
    """The weight, beside the pairs, of the chosen answers' next-token loss (2404.19733)."""

    def __post_init__(self):
        if not 0 <= self.label_smoothing < 0.5:
            raise ValueError(
                f"wanted label_smoothing from 0 to below 0.5, got {self.label_smoothing}"
            )
        if self.label_smoothing and self.loss_type not in ("sigmoid", "robust"):
            raise ValueError(
                f"label_smoothing is for loss_type sigmoid and robust, got {self.loss_type}"
            )
        if self.loss_type == "orpo" and self.rpo_alpha is not None:
            raise ValueError("orpo learns the chosen answers already: wanted no rpo_alpha")
        if self.loss_type == "orpo" and self.reference_free:
            raise ValueError("orpo has no reference: wanted no reference_free")
        if self.loss_type in ("ipo", "orpo") and self.length_normalized:
            raise ValueError(f"{self.loss_type} takes means already: wanted no length_normalized")
        if self.rpo_alpha is not None and not 0 <= self.rpo_alpha < math.inf:
            raise ValueError(f"wanted rpo_alpha from 0, got {self.rpo_alpha}")
        if not 0 < self.beta < math.inf:
            raise ValueError(f"wanted beta above 0, got {self.beta}")

    @property
    def wants_reference(self) -> bool:
        """Whether log-probabilities of a reference enter."""
        return self.loss_type != "orpo" and not self.reference_free

    @property
    def averages(self) -> bool:
        """Whether answers' log-probabilities are means over their tokens."""
        return self.length_normalized or self.loss_type in ("ipo", "orpo")


@flax.struct.dataclass
class Pairs:
    """How likely a model finds both answers of each pair.

    Attributes:
      logps: summed over each answer's tokens; the chosen one's, then the rejected one's.
      tokens: learned, in each.
    """

    logps: Float[Array, "B 2"]
    tokens: Int[Array, "B 2"]


def preference(
    model: Qwen2Audio,
    batch: Mapping[str, Any],
    *,
    config: PreferenceConfig,
    reference: Qwen2Audio | None = None,
    remat: str = "none",
) -> Sums:
    """The loss over pairs of answers.

    Args:
      batch: `chosen_input_ids`, `chosen_attention_mask` and `chosen_labels`, the same for
        `rejected_`, all [B L] and one sample a row, both answering the same clips,
        `input_features` and `feature_attention_mask`, given once; `ref_chosen_logps` and
        `ref_rejected_logps` [B] if `reference_logps` has made them beforehand. A pair of which
        an answer has no learned token counts for nothing.
      reference: what `model` was: frozen parameters, or itself with its adapter switched off;
        not looked at where the batch has the reference's log-probabilities.
      remat: as in `next_token`.

    Returns:
      The sum over pairs, and over the chosen answers' tokens where those are learned too. To log:
      `pairs`, `tokens` of both answers, `accuracy` (how often the chosen answer's reward is the
      higher), `rewards/chosen`, `rewards/rejected`, `rewards/margins`, of means over tokens where
      the loss compares those (TRL's are of sums, but for ORPO), TRL's `logps/chosen` and
      `logps/rejected`; `nll` where chosen answers are learned.

    Raises:
      ValueError: a reference is wanted and there is none.
    """
    pairs = score(model, batch, remat=remat)
    counts = pairs.tokens.all(axis=1)
    ours, theirs = pairs.logps, _reference(batch, reference, config, remat)
    if config.averages:
        ours, theirs = (x / jnp.maximum(pairs.tokens, 1) for x in (ours, theirs))
    losses = pair_losses(*ours.T, *theirs.T, config=config)
    number, total = counts.sum(), lambda x: jnp.where(counts, x, 0).sum()
    rewards = config.beta * jax.lax.stop_gradient(ours - theirs)
    margins = rewards[:, 0] - rewards[:, 1]
    metrics = {
        "pairs": number,
        "tokens": pairs.tokens.sum(),
        "accuracy": (total(margins > 0), number),
        "rewards/margins": (total(margins), number),
        **{f"rewards/{s}": (total(rewards[:, i]), number) for i, s in enumerate(SIDES)},
        **{f"logps/{s}": (total(pairs.logps[:, i]), number) for i, s in enumerate(SIDES)},
    }
    alpha = 1.0 if config.loss_type == "orpo" else config.rpo_alpha
    if alpha is None:
        return Sums(total(losses), number, metrics)
    nll, tokens = -total(pairs.logps[:, 0]), total(pairs.tokens[:, 0])
    return Sums(
        jnp.stack([total(losses), alpha * nll]),
        jnp.stack([number, tokens]),
        {**metrics, "nll": (nll, tokens)},
    )


def pair_losses(
    chosen: Float[Array, " B"],
    rejected: Float[Array, " B"],
    ref_chosen: Float[Array, " B"],
    ref_rejected: Float[Array, " B"],
    *,
    config: PreferenceConfig,
) -> Float[Array, " B"]:
    """Each pair's loss, from the log-probabilities of its answers."""
    beta, smoothing = config.beta, config.label_smoothing
    likely = jax.nn.log_sigmoid
    if config.loss_type == "orpo":
        return -beta * likely(_log_odds(chosen) - _log_odds(rejected))
    margin = (chosen - rejected) - (ref_chosen - ref_rejected)
    match config.loss_type:
        case "sigmoid":
            right, wrong = likely(beta * margin), likely(-beta * margin)
            return -(1 - smoothing) * right - smoothing * wrong
        case "robust":
            right, wrong = likely(beta * margin), likely(-beta * margin)
            return (smoothing * wrong - (1 - smoothing) * right) / (1 - 2 * smoothing)
        case "hinge":
            return jax.nn.relu(1 - beta * margin)
        case "ipo":
            return (margin - 1 / (2 * beta)) ** 2


def _log_odds(logps):
    # certainty has infinite odds
    logps = jnp.minimum(logps, -jnp.finfo(logps.dtype).eps)
    return logps - jnp.log(-jnp.expm1(logps))


def _reference(batch, reference, config, remat):
    if not config.wants_reference:
        return jnp.zeros((len(batch["chosen_labels"]), 2))
    if REFERENCE[0] in batch:
        return jnp.stack([batch[name] for name in REFERENCE], axis=1)
    if reference is None:
        raise ValueError(
            f"{config.loss_type} wants a reference: a model, or {' and '.join(REFERENCE)} in the "
            f"batch, got {', '.join(sorted(batch))}"
        )
    return jax.lax.stop_gradient(score(reference, batch, remat=remat).logps)


def reference_logps(model: Qwen2Audio, batch: Mapping[str, Any]) -> dict[str, Float[Array, " B"]]:
    """What `preference` wants of a reference, to be computed once and kept beside the data."""
    return dict(zip(REFERENCE, score(model, batch).logps.T, strict=True))


def score(model: Qwen2Audio, batch: Mapping[str, Any], *, remat: str = "none") -> Pairs:
    """How likely a model finds both answers; clips are heard once, all tokens read in one pass."""
    both = {
        name: _interleaved(*(batch[f"{side}_{name}"] for side in SIDES))
        for name in ("attention_mask", "labels")
    }
    ids = [batch[f"{side}_input_ids"] for side in SIDES]
    if "input_features" in batch:
        heard = model.listen(batch["input_features"], batch["feature_attention_mask"], remat=remat)
        embedded = [model.place(each, *heard) for each in ids]
    else:
        embedded = [model.embed(each) for each in ids]
    x, _ = model.read(_interleaved(*embedded), both["attention_mask"], remat=remat)
    labels = next_labels(both)
    logps, _ = token_logps(model.decoder, x, labels)
    by_pair = lambda each: each.sum(axis=1).reshape(-1, 2)
    return Pairs(logps=by_pair(logps), tokens=by_pair(labels != IGNORED))


def _interleaved(chosen, rejected):
    """Both rows of a pair next to each other, so that a pair stays on its device."""
    if chosen.shape != rejected.shape:
        raise ValueError(
            f"wanted chosen and rejected answers of one shape, got {chosen.shape} and "
            f"{rejected.shape}"
        )
    return jnp.stack([chosen, rejected], axis=1).reshape(-1, *chosen.shape[1:])
