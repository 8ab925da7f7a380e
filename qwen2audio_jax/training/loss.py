"""What training minimises, as sums: what is divided by what is settled once, for a global batch.

A mean of means depends on how samples were laid out. Sums do not: packed, padded, accumulated
and spread over hosts, the same samples add up to the same numbers.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from qwen2audio_jax import spread
from qwen2audio_jax.decoder import Decoder
from qwen2audio_jax.layers import look_up
from qwen2audio_jax.model import Qwen2Audio
from qwen2audio_jax.processor import IGNORED

INPUTS = (
    *("input_ids", "attention_mask", "segment_ids"),
    *("input_features", "feature_attention_mask"),
)
# Devices with rows of their own share the words' scores: moving the chunk's states to each other
# costs less than to gather the table of words, and its gradients, everywhere.
WORDS = ("tensor", "fsdp", "context")
_LEAST, _NEVER = (
    jnp.finfo(jnp.float32).eps,
    -1e5,
)  # a chance, and what stands for the logarithm of none
CHUNK = 1024  # tokens of a batch, per device of the mesh, whose logits exist at the same time
# In a compiled program, the scope of the loop over the clips' states: it goes round otherwise than
# the one over learned tokens.
SPELT = "spelt"


@flax.struct.dataclass
class Sums:
    """What a batch adds up to; those of several batches are added with `+`.

    Attributes:
      loss: summed; [parts] where parts of the loss are means over different things.
      weight: what each number of `loss` is to be divided by: learned tokens, or pairs.
      metrics: to log: a count, or a pair of a sum and what it is to be divided by.
    """

    loss: Any  # arrays, or what stands for them in `jax.eval_shape`
    weight: Any
    metrics: dict[str, Any]

    def __add__(self, other: "Sums") -> "Sums":
        return jax.tree.map(jnp.add, self, other)

    def mean(self, weight: Array | None = None) -> Float[Array, ""]:
        """The loss: the parts' means, added up; `weight` is the global batch's, if that is more."""
        return mean(self.loss, self.weight if weight is None else weight).sum()

    def means(self) -> dict[str, Array]:
        """What to log: the loss, the counts, and the means of the rest."""
        each = {k: mean(*x) if isinstance(x, tuple) else x for k, x in self.metrics.items()}
        return {**each, "loss": self.mean()}


def mean(total: Array, weight: Array) -> Array:
    """A mean that is 0 over nothing."""
    return total / jnp.maximum(weight, 1)


def next_token(model: Qwen2Audio, batch: Mapping[str, Any], *, remat: str = "none") -> Sums:
    """Cross entropy of every learned token given what comes before it, in float32.

    Args:
      batch: what a `Processor` makes with `labels=True`; with `segment_ids` [B L] if its rows are
        packed.
      remat: what blocks keep for the backward pass, as in `remat.POLICIES`.

    Returns:
      The sum over learned tokens; to log: `tokens` learned, `accuracy` of the likeliest.
    """
    inputs = {name: batch[name] for name in INPUTS if name in batch}
    x, _ = model.hidden(**inputs, remat=remat)
    return _over_learned(model, x, batch)


def next_token_and_words(
    model: Qwen2Audio, batch: Mapping[str, Any], *, weight: float = 0.3, remat: str = "none"
) -> Sums:
    """`next_token`, helped by CTC: the audio states alone should spell each clip's words.

    A decoder that starts from nothing first learns to guess without listening; until what is heard
    resembles words, listening does not pay. CTC through the decoder's own vocabulary makes the
    encoder's states resemble words from the start, with no parameter more.

    Args:
      batch: as in `next_token`, with `words` [C, N]: each clip's words, IGNORED behind them.
      weight: of CTC's mean over words, beside the mean over learned tokens.

    Returns:
      As `next_token`; its metrics have `ctc` too.

    Source: Graves et al. 2006, Connectionist Temporal Classification.
    """
    if "input_features" not in batch:  # text alone spells nothing
        sums = next_token(model, batch, remat=remat)
        nothing, none = jnp.zeros_like(sums.loss), jnp.zeros_like(sums.weight)
        return Sums(
            loss=jnp.stack([sums.loss, nothing]),
            weight=jnp.stack([sums.weight, none]),
            metrics={**sums.metrics, "ctc": (nothing, none)},
        )
    states, counts = model.listen(
        batch["input_features"], batch["feature_attention_mask"], remat=remat
    )
    x, _ = model.read(
        model.place(batch["input_ids"], states, counts),
        batch["attention_mask"],
        segment_ids=batch.get("segment_ids"),
        remat=remat,
    )
    sums = _over_learned(model, x, batch)
    ctc = words_loss(model.decoder, states, counts, batch["words"], blank=model.config.pad_token)
    said = (batch["words"] != IGNORED).sum()
    return Sums(
        loss=jnp.stack([sums.loss, weight * ctc]),
        weight=jnp.stack([sums.weight, said]),
        metrics={**sums.metrics, "ctc": (ctc, said)},
    )


def words_loss(
    decoder: Decoder,
    states: Float[Array, "C A D"],
    counts: Int[Array, " C"],
    words: Int[Array, "C N"],
    *,
    blank: int,
) -> Float[Array, ""]:
    """CTC's loss, summed over clips: what their valid states cost that should spell their words.

    Of a clip without words it is not known whether anybody speaks: it costs nothing.

    CTC asks for the blank and for a clip's own words. These are the classes, with one more for all
    others together, so that [C A V] is never held.
    """
    valid = jnp.arange(states.shape[1]) < counts[:, None]
    with jax.named_scope(SPELT):
        blanks, _ = token_logps(decoder, states, jnp.where(valid, blank, IGNORED))
    spelt = words != IGNORED
    named = look_up(decoder.table, jnp.where(spelt, words, blank))
    beside = named - look_up(decoder.table, jnp.asarray(blank))
    logps = jnp.einsum("CAD,CND->CAN", states, beside, preferred_element_type=jnp.float32)
    logps += blanks[..., None]
    # A word that recurs has the class of its first time.
    classes = jnp.argmax(words[:, :, None] == words[:, None, :], axis=2)
    first = spelt & (classes == jnp.arange(words.shape[1]))
    own = jnp.concatenate([blanks[..., None], jnp.where(first[:, None], logps, _NEVER)], axis=2)
    rest = jnp.log(jnp.maximum(1 - jnp.exp(own).sum(axis=2, keepdims=True), _LEAST))
    losses = optax.ctc_loss(
        jnp.concatenate([own, rest], axis=2),
        (~valid).astype(jnp.float32),
        jnp.where(spelt, classes + 1, 0),
        (~spelt).astype(jnp.float32),
    )
    return jnp.where(spelt.any(axis=1), losses, 0).sum()


def _over_learned(model, x, batch):
    labels = next_labels(batch)
    logps, hits = token_logps(model.decoder, x, labels)
    tokens = (labels != IGNORED).sum()
    return Sums(
        loss=-logps.sum(),
        weight=tokens,
        metrics={"tokens": tokens, "accuracy": (hits.sum(), tokens)},
    )


def next_labels(batch: Mapping[str, Any]) -> Int[Array, "B L"]:
    """What should be predicted at each token: the one behind it, if learned and of its sample."""
    segments = batch["attention_mask"] * batch.get("segment_ids", 1)
    learned = (segments[:, 1:] > 0) & (segments[:, 1:] == segments[:, :-1])
    labels = jnp.where(learned, batch["labels"][:, 1:], IGNORED)
    return jnp.pad(labels, ((0, 0), (0, 1)), constant_values=IGNORED)


def token_logps(
    decoder: Decoder, x: Float[Array, "B L D"], labels: Int[Array, "B L"]
) -> tuple[Float[Array, "B L"], Int[Array, "B L"]]:
    """Each label's log-probability, in float32, and whether it was the likeliest; 0 where ignored.

    Logits exist where a label is, and only for some `CHUNK` tokens at a time, forward and
    backward: [B L V] is never held.
    """
    size = chunk_size(*labels.shape, spread.devices())
    x = spread.constrain(x, "B tokens D")
    return _token_logps(size, x, decoder.table, labels)


def chunk_size(rows: int, length: int, devices: int) -> int:
    """Tokens of each row whose logits exist at the same time.

    An eighth of a row at most: where few tokens are learned, few logits are made.
    """
    return max(1, min(CHUNK * devices // rows, -(-length // 8)))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _token_logps(size, x, table, labels):
    return _forward(size, x, table, labels)[0]


def _forward(size, x, table, labels):
    order, chunks = _learned_first(labels, size)
    table = _shared(table, "V D")

    def one(i, out):
        at = jax.lax.dynamic_slice_in_dim(order, i * size, size, axis=1)
        wanted = _take(labels, at, IGNORED)
        logits = _logits(_shared(_take(x, at, 0), "B tokens D", table), table)
        said = jnp.where(_is(wanted, table), logits, 0).sum(axis=-1)
        norm = jax.nn.logsumexp(logits, axis=-1)
        found = said - norm, said >= logits.max(axis=-1), norm
        kept = wanted != IGNORED
        return tuple(
            _put(into, at, jnp.where(kept, new, 0)) for into, new in zip(out, found, strict=True)
        )

    zeros = lambda dtype: jnp.zeros(labels.shape, dtype)
    start = zeros(jnp.float32), zeros(jnp.int32), zeros(jnp.float32)
    logps, hits, norms = jax.lax.fori_loop(0, chunks, one, start)
    return (logps, hits), (x, table, labels, norms)


def _backward(size, saved, cotangents):
    """Makes the logits again, a chunk at a time: d logp / d logits = one_hot - softmax."""
    x, table, labels, norms = saved
    order, chunks = _learned_first(labels, size)
    table = _shared(table, "V D")

    def one(i, out):
        dx, dtable = out
        at = jax.lax.dynamic_slice_in_dim(order, i * size, size, axis=1)
        some, wanted = _shared(_take(x, at, 0), "B tokens D", table), _take(labels, at, IGNORED)
        kept = wanted != IGNORED
        # Where nothing is learned no norm is known, and whatever overflows there times 0 is NaN.
        norm = jnp.where(kept, _take(norms, at, 0), jnp.inf)
        probabilities = jnp.exp(_logits(some, table) - norm[..., None])
        gradients = jnp.where(kept, _take(cotangents[0], at, 0), 0)
        dlogits = ((_is(wanted, table) - probabilities) * gradients[..., None]).astype(table.dtype)
        product = partial(jnp.einsum, preferred_element_type=jnp.float32)
        slope = product("BLV,VD->BLD", dlogits, table).astype(x.dtype)
        dx = _put(dx, at, spread.constrain(slope, "B tokens D"))
        # [D V], so that of the two factors the small one is transposed
        return dx, dtable + _shared(product("BLD,BLV->DV", some, dlogits), "D V")

    start = jnp.zeros_like(x), _shared(jnp.zeros(table.shape[::-1], jnp.float32), "D V")
    dx, dtable = jax.lax.fori_loop(0, chunks, one, start)
    return dx, dtable.T.astype(table.dtype), None


_token_logps.defvjp(_forward, _backward)


def _learned_first(labels, size):
    """Each row's positions, the learned ones in front, and how many chunks hold any of those.

    Row by row, so that rows on different devices stay there.
    """
    kept = labels != IGNORED
    order = jnp.argsort(~kept, axis=1)
    pad = -labels.shape[1] % size
    order = jnp.pad(order, ((0, 0), (0, pad)), constant_values=labels.shape[1])  # outside
    return order, -(-kept.sum(axis=1).max() // size)


def _logits(x, table):
    logits = jnp.einsum("BLD,VD->BLV", x, table, preferred_element_type=jnp.float32)
    return _shared(logits, "B tokens V")


def _shared(x, letters, table=None):
    """Split over words, or, where `table` is given, wanted by all that share its words."""
    if table is None:
        return spread.constrain(x, letters, V=WORDS)
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    taken = spread.spec("V D", table.shape, mesh.shape, V=WORDS)[0] or ()
    rows = tuple(axis for axis in spread.ROWS if axis not in taken)
    return spread.constrain(x, letters, B=rows)


def _is(labels, table):
    # compared rather than gathered, so that a vocabulary may be split over devices
    return labels[..., None] == jnp.arange(len(table))


def _take(x, at, fill):
    return jax.vmap(lambda x, at: x.at[at].get(mode="fill", fill_value=fill))(x, at)


def _put(into, at, new):
    return jax.vmap(lambda into, at, new: into.at[at].set(new, mode="drop"))(
        into, at, new.astype(into.dtype)
    )
