"""Closed sets of answers -> which tokens may come next: a trie that compiled programs walk."""

from collections.abc import Sequence

import flax.struct
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from qwen2audio_jax.processor import Processor

Choices = Sequence[str] | Sequence[Sequence[str]]

ENDED = 0  # the node behind every answer's end
# Nodes, edges and branches: few sizes, so that new choices rarely compile anything.
SMALLEST = (64, 128, 16)
NOTHING = np.iinfo(np.int32).max  # what stands for no token; beyond any vocabulary


@flax.struct.dataclass
class Trie:
    """A tree of tokens; sets that several rows share are in it once.

    Attributes:
      first: where each node's edges begin; they end where the next one's do.
      tokens: what may follow, edge by edge.
      following: the node that each of them leads to.
      branch: 0, 1, ... for as many edges as a node has at most. A row for each node would be as
        long as the widest one's, of thousands where these are names of places, say.
    """

    first: Int[Array, " nodes_and_end"]
    tokens: Int[Array, " edges"]
    following: Int[Array, " edges"]
    branch: Int[Array, " branches"]

    def allow(self, scores: Float[Array, "B V"], nodes: Int[Array, " B"]) -> Float[Array, "B V"]:
        """Makes what no answer continues with impossible."""
        rows = jnp.arange(len(scores))[:, None]
        allowed = jnp.zeros(scores.shape, bool)
        allowed = allowed.at[rows, self._edges(nodes)[0]].set(True, mode="drop")
        return jnp.where(allowed, scores, -jnp.inf)

    def advance(self, nodes: Int[Array, " B"], tokens: Int[Array, " B"]) -> Int[Array, " B"]:
        """The nodes that `tokens`, which were allowed, lead to."""
        follow, leads = self._edges(nodes)
        return jnp.where(follow == tokens[:, None], leads, 0).sum(axis=1)

    def _edges(
        self, nodes: Int[Array, " B"]
    ) -> tuple[Int[Array, "B branches"], Int[Array, "B branches"]]:
        """The nodes' tokens, NOTHING behind them, and where these lead to."""
        edges = self.first[nodes][:, None] + self.branch
        there = edges < self.first[nodes + 1][:, None]
        return jnp.where(there, self.tokens[edges], NOTHING), self.following[edges]


def build(
    choices: Choices,
    processor: Processor | None,
    rows: int,
    *,
    end_tokens: Sequence[int],
    shortest: int,
    longest: int,
) -> tuple[Trie, Int[np.ndarray, " rows"]]:
    """Makes the trie of all rows' answers, each ended by any of `end_tokens`.

    Args:
      choices: the answers of every row, or a list of them per row.
      shortest, longest: tokens that an answer must and may have; its end is one.

    Returns:
      The trie, and the node at which each row begins.

    Raises:
      ValueError: there is nothing to choose from, or an answer does not fit.
    """
    if processor is None:
        raise ValueError("choices want processor= to make tokens of them")
    if not end_tokens:
        raise ValueError("choices want end tokens, or no answer could end; got none")
    children: list[dict[int, int]] = [dict.fromkeys(end_tokens, ENDED)]
    roots: dict[tuple[str, ...], int] = {}
    begin = []
    for texts in _per_row(choices, rows):
        if texts not in roots:
            answers = [_encode(text, processor, end_tokens, shortest, longest) for text in texts]
            roots[texts] = _grow(children, answers, end_tokens)
        begin.append(roots[texts])
    return _arrays(children), np.array(begin, np.int32)


def _per_row(choices: Choices, rows: int) -> list[tuple[str, ...]]:
    if not isinstance(choices, str) and len(choices):
        if all(isinstance(text, str) for text in choices):
            return [tuple(choices)] * rows
        lists = [() if isinstance(texts, str) else tuple(texts) for texts in choices]
        if all(texts and all(isinstance(text, str) for text in texts) for texts in lists):
            if len(lists) != rows:
                raise ValueError(f"wanted choices for {rows} prompts, got {len(lists)} lists")
            return lists
    raise ValueError(f"wanted a list of texts to choose from, or one per prompt, got {choices!r}")


def _encode(
    text: str, processor: Processor, end_tokens: Sequence[int], shortest: int, longest: int
) -> list[int]:
    tokens = processor.tokenizer.encode(text)
    if set(tokens) & set(end_tokens):
        raise ValueError(f"wanted a choice without end tokens, got {text!r}")
    if not shortest <= len(tokens) <= longest - 1:
        raise ValueError(
            f"the choice {text!r} has {len(tokens)} tokens, wanted {shortest} to {longest - 1}:"
            " min_new_tokens, and max_new_tokens without the end"
        )
    return tokens


def _grow(
    children: list[dict[int, int]], answers: list[list[int]], end_tokens: Sequence[int]
) -> int:
    """Adds a set of answers, and gives the node at which it begins."""
    root = len(children)
    children.append({})
    for answer in answers:
        node = root
        for token in answer:
            if token not in children[node]:
                children[node][token] = len(children)
                children.append({})
            node = children[node][token]
        children[node] |= dict.fromkeys(end_tokens, ENDED)
    return root


def _arrays(children: list[dict[int, int]]) -> Trie:
    counts = [len(edges) for edges in children]
    sizes = len(children), sum(counts), max(counts)
    nodes, edges, branches = map(_bucket, sizes, SMALLEST)
    first = np.full(nodes + 1, sizes[1], np.int32)
    first[: sizes[0]] = np.cumsum([0, *counts[:-1]])
    tokens, following = np.full(edges, NOTHING, np.int32), np.zeros(edges, np.int32)
    tokens[: sizes[1]] = [token for each in children for token in each]
    following[: sizes[1]] = [node for each in children for node in each.values()]
    arrays = first, tokens, following, np.arange(branches, dtype=np.int32)
    return Trie(*map(jnp.asarray, arrays))


def _bucket(size: int, smallest: int) -> int:
    return max(smallest, 1 << (size - 1).bit_length())
