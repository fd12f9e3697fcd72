"""A prefix tree of a catalogue's titles, which limits generation to these titles.

The tree is a few int32 arrays. Their size is that of the titles and independent of the vocabulary.
Nodes are numbered breadth first and siblings by their token. The children of a node are therefore
adjacent, and edge e leads to node e + 1. The tree is a pytree, so compiled functions take it as an
argument. Call `jax.device_put` once if it is used often.
"""

from collections.abc import Iterable, Sequence

import flax
import jax.numpy as jnp
import numpy as np

from tpad_jax.errors import InputError, refuse_if


@flax.struct.dataclass
class Trie:
    """Titles, each ended by the first stop token. N nodes, E = N - 1 edges.

    Node 0 is the root, before the first token. A wrong token leads to node N without children.

    Attributes:
      first: int32 [N + 2]. Index of a node's first edge. Its edges end where the next node's begin.
      token: int32 [E]. Token of an edge.
      first_item: int32 [N + 2]. Index of the first item of a complete title.
      item: int32 [I]. Item ids.
      fan: largest number of children.
      depth: tokens of the longest title with its stop token.
      vocab: V of the model.
      stop: tokens that end a text. The first one ends every title.
    """

    first: np.ndarray
    token: np.ndarray
    first_item: np.ndarray
    item: np.ndarray
    fan: int = flax.struct.field(pytree_node=False)
    depth: int = flax.struct.field(pytree_node=False)
    vocab: int = flax.struct.field(pytree_node=False)
    stop: tuple[int, ...] = flax.struct.field(pytree_node=False)

    def children(self, node):
        """Return the edges int32 [B, fan] of nodes int32 [B], and which exist, bool [B, fan]."""
        first = jnp.asarray(self.first)
        edge = first[node][:, None] + jnp.arange(self.fan)
        return jnp.minimum(edge, len(self.token) - 1), edge < first[node + 1][:, None]

    def allowed(self, node):
        """Return the tokens that may follow nodes int32 [B], bool [B, V]; none after a title."""
        edge, there = self.children(node)
        token = jnp.where(there, jnp.asarray(self.token)[edge], self.vocab)
        row = jnp.arange(len(node))[:, None]
        return jnp.zeros((len(node), self.vocab), bool).at[row, token].set(True, mode='drop')

    def advance(self, node, token):
        """Return the next nodes int32 [B] of nodes and tokens int32 [B]; N for a wrong token."""
        edge, there = self.children(node)
        hit = there & (jnp.asarray(self.token)[edge] == token[:, None])
        return jnp.where(hit, edge + 1, 0).sum(-1) + jnp.where(hit.any(-1), 0, len(self.first) - 2)

    def items(self, tokens) -> list[np.ndarray]:
        """Return the item ids int32 [..] of every text.

        This runs on the host. A row that is not a complete title of the catalogue has no items.

        Args:
          tokens: int [B, T]. A row ends at its stop token or at a -1.
        """
        first, item, tokens = map(np.asarray, (self.first_item, self.item, tokens))
        node, live = np.zeros(len(tokens), np.int32), np.ones(len(tokens), bool)
        for token in tokens.T:
            live = live & (token >= 0)
            node = np.where(live, self.advance(node, token), node)
        return [item[first[n]:first[n + 1]] for n in node]


def build(titles: Iterable[Sequence[int]], *, stop: Sequence[int], vocab: int, items=None) -> Trie:
    """Build the tree of all titles.

    Args:
      titles: token ids of each item's title, without special tokens. stop[0] is added to each.
        Several items may share a title.
      stop: the tokens that end a text, as in `generate`.
      vocab: V of the model.
      items: int [titles]. Item ids. None: 0, 1, ...

    Raises:
      InputError: there are no titles or no stop tokens, or a title is empty or has a stop token or
        an unknown id. The message names its item.
    """
    titles = [np.asarray(title, np.int64) for title in titles]
    items = np.arange(len(titles)) if items is None else np.asarray(items, np.int32)
    stop = tuple(int(t) for t in stop)
    refuse_if(not titles or len(items) != len(titles), f'titles: {len(titles)} titles for '
              f'{len(items)} items. Expected one title per item, at least one. Fix: give these')
    refuse_if(not stop or min(stop) < 0 or max(stop) >= vocab,
              f'stop={stop}: not tokens of the vocabulary. Expected at least one id of 0 to '
              f"{vocab - 1}. Fix: use the checkpoint's tokenizer")
    length, flat = np.array([len(title) for title in titles]), np.concatenate(titles)
    refuse_if(not length.all(), f'titles: item {items[length.argmin()]} has an empty title. '
              'Expected at least one token. Fix: give it a title or omit it')
    wrong = np.flatnonzero(np.isin(flat, stop) | (flat < 0) | (flat >= vocab))
    if len(wrong):
        item = items[np.searchsorted(np.cumsum(length), wrong[0], side='right')]
        raise InputError(f'titles: item {item} has token {flat[wrong[0]]}. Expected ids 0 to '
                         f'{vocab - 1} without the stop tokens {stop}. Fix: use the checkpoint\'s '
                         'tokenizer, without special tokens')
    depth = int(length.max()) + 1
    start = np.cumsum(length) - length
    node, nodes = np.zeros(len(titles), np.int64), 1  # where each title is, one level after another
    parents, tokens = [], []
    for level in range(depth):
        rows = np.flatnonzero(level <= length)  # the last token of a title is stop[0]
        token = np.where(level < length[rows], flat[np.minimum(start + level, len(flat) - 1)[rows]],
                         stop[0])
        edge, inverse = np.unique(node[rows] * vocab + token, return_inverse=True)
        parents.append(edge // vocab)
        tokens.append(edge % vocab)
        node[rows] = nodes + inverse
        nodes += len(edge)
    children, ended = (np.bincount(x, minlength=nodes + 1) for x in (np.concatenate(parents), node))
    first, first_item = (np.append(0, np.cumsum(x)).astype(np.int32) for x in (children, ended))
    return Trie(first, np.concatenate(tokens).astype(np.int32), first_item,
                items[np.argsort(node, kind='stable')].astype(np.int32), int(children.max()), depth,
                vocab, stop)
