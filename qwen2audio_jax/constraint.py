"""Closed sets of answers -> which tokens may come next: a trie that compiled programs walk."""

from collections.abc import Sequence

import flax.struct
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from qwen2audio_jax.processor import Processor

Choices = Sequence[str] | Sequence[Sequence[str]]

ENDED = 0  # the node behind every answer's end
SMALLEST = (64, 16)  # nodes and branches: few sizes, so that new choices rarely compile anything
NOTHING = np.iinfo(np.int32).max  # fills a node's row; beyond any vocabulary


@flax.struct.dataclass
class Trie:
    """A tree of tokens; sets that several rows share are in it once.

    Attributes:
      tokens: what may follow each node.
      following: the node that each of them leads to.
    """

    tokens: Int[Array, "nodes branches"]
    following: Int[Array, "nodes branches"]

    def allow(self, scores: Float[Array, "B V"], nodes: Int[Array, " B"]) -> Float[Array, "B V"]:
        """Makes what no answer continues with impossible."""
        rows = jnp.arange(len(scores))[:, None]
        allowed = jnp.zeros(scores.shape, bool)
        allowed = allowed.at[rows, self.tokens[nodes]].set(True, mode="drop")
        return jnp.where(allowed, scores, -jnp.inf)

    def advance(self, nodes: Int[Array, " B"], tokens: Int[Array, " B"]) -> Int[Array, " B"]:
        """The nodes that `tokens`, which were allowed, lead to."""
        chosen = self.tokens[nodes] == tokens[:, None]
        return jnp.where(chosen, self.following[nodes], 0).sum(axis=1)


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
    nodes = _bucket(len(children), SMALLEST[0])
    branches = _bucket(max(map(len, children)), SMALLEST[1])
    tokens = np.full((nodes, branches), NOTHING, np.int32)
    following = np.zeros((nodes, branches), np.int32)
    for node, edges in enumerate(children):
        tokens[node, : len(edges)] = list(edges)
        following[node, : len(edges)] = list(edges.values())
    return Trie(jnp.asarray(tokens), jnp.asarray(following))


def _bucket(size: int, smallest: int) -> int:
    return max(smallest, 1 << (size - 1).bit_length())
