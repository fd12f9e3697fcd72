"""A catalogue's titles as a prefix tree, so that generation can say nothing else.

The tree is a few int32 arrays, whose size is that of the titles and does not know the vocabulary.
Nodes are numbered breadth first and siblings by their token, so the children of a node are
neighbours and edge e leads to node e + 1. Being a pytree, it goes into a compiled function as an
argument: `jax.device_put` it once when it is used often.
"""

from collections.abc import Iterable, Sequence

import flax
import jax.numpy as jnp
import numpy as np

from tpad_jax.errors import InputError


@flax.struct.dataclass
class Trie:
    """Titles, each ended by the first stop token. N nodes, E = N - 1 edges.

    Node 0 is the root, where no token has been read; node N is nowhere, where a wrong token leads.

    Attributes:
      fan: most children of a node. depth: tokens of the longest title with its stop token.
      vocab: V, of the model. stop: tokens that end a text; the first one ends every title.
    """

    first: np.ndarray  # int32 [N + 2], where a node's edges begin; they end where the next's begin
    token: np.ndarray  # int32 [E], of the edge
    first_item: np.ndarray  # int32 [N + 2], where the items of a finished title begin
    item: np.ndarray  # int32 [I], item ids
    fan: int = flax.struct.field(pytree_node=False)
    depth: int = flax.struct.field(pytree_node=False)
    vocab: int = flax.struct.field(pytree_node=False)
    stop: tuple[int, ...] = flax.struct.field(pytree_node=False)

    def children(self, node):
        """Node int32 [B] -> its edges int32 [B, fan], is there one bool [B, fan]."""
        first = jnp.asarray(self.first)
        edge = first[node][:, None] + jnp.arange(self.fan)
        return jnp.minimum(edge, len(self.token) - 1), edge < first[node + 1][:, None]

    def allowed(self, node):
        """Node int32 [B] -> which tokens may come next, bool [B, V]; none behind a whole title."""
        edge, there = self.children(node)
        token = jnp.where(there, jnp.asarray(self.token)[edge], self.vocab)
        row = jnp.arange(len(node))[:, None]
        return jnp.zeros((len(node), self.vocab), bool).at[row, token].set(True, mode='drop')

    def advance(self, node, token):
        """Node, token int32 [B] -> next node int32 [B], nowhere if the token was not allowed."""
        edge, there = self.children(node)
        hit = there & (jnp.asarray(self.token)[edge] == token[:, None])
        return jnp.where(hit, edge + 1, 0).sum(-1) + jnp.where(hit.any(-1), 0, len(self.first) - 2)

    def items(self, tokens) -> list[np.ndarray]:
        """Item ids int32 [..] of every row of int [B, T], which ends at its stop token or at a -1.

        Not for compiled functions. A row that is no whole title of the catalogue has no items.
        """
        first, token, first_item, item = map(np.asarray, (self.first, self.token, self.first_item,
                                                          self.item))
        out = []
        for row in np.asarray(tokens):
            node = 0
            for t in row[:len(row) if (row >= 0).all() else (row < 0).argmax()]:
                low, high = first[node:node + 2]
                edge = low + np.searchsorted(token[low:high], t)
                node = edge + 1 if edge < high and token[edge] == t else len(first) - 2
            out.append(item[slice(*first_item[node:node + 2])])
        return out


def build(titles: Iterable[Sequence[int]], *, stop: Sequence[int], vocab: int, items=None) -> Trie:
    """The tree of all titles.

    Args:
      titles: token ids of each item's title, without special tokens; stop[0] is added to each.
        Several items may share a title.
      stop: the tokens that end a text, as generation is given them. vocab: V of the model.
      items: int [titles], item ids; None: 0, 1, ...

    Raises:
      InputError: no titles; a title that is empty, holds a stop token or an id the model lacks,
        naming its item; or stop tokens that are none.
    """
    titles = [np.asarray(title, np.int64) for title in titles]
    items = np.arange(len(titles)) if items is None else np.asarray(items, np.int32)
    stop = tuple(int(t) for t in stop)
    if not titles or not stop or len(items) != len(titles):
        raise InputError(f'a tree of {len(titles)} titles for {len(items)} items, ended by '
                         f'{len(stop)} stop tokens: there must be a title for every item, at '
                         'least one item and at least one stop token')
    length = np.array([len(title) for title in titles])
    if not length.all():
        raise InputError(f'item {items[length.argmin()]} has an empty title, which no text can '
                         'stand for; give it a title or leave it out')
    owner, flat = np.repeat(np.arange(len(titles)), length), np.concatenate(titles)
    _refuse(np.isin(flat, stop), owner, flat, items,
            f'which ends a text (stop tokens {stop}); tokenise titles without special tokens')
    _refuse((flat < 0) | (flat >= vocab), owner, flat, items,
            f"which the model's vocabulary of {vocab} lacks; use the checkpoint's own tokenizer")
    if min(stop) < 0 or max(stop) >= vocab:
        raise InputError(f"stop tokens {stop}: the model's vocabulary has ids 0 to {vocab - 1}")
    return _grown(titles, length, items, stop, vocab)


def _refuse(bad, owner, flat, items, why):
    if bad.any():
        at = bad.argmax()
        raise InputError(f'item {items[owner[at]]} has token {flat[at]} in its title, {why}')


def _grown(titles, length, items, stop, vocab):
    depth = int(length.max()) + 1
    start = np.cumsum(length) - length
    flat = np.concatenate(titles)
    node, nodes = np.zeros(len(titles), np.int64), 1  # where each title is, one level after another
    parents, tokens = [], []
    for level in range(depth):
        here = np.flatnonzero(level <= length)  # a title's last token is stop[0]
        token = np.where(level < length[here], flat[np.minimum(start + level, len(flat) - 1)[here]],
                         stop[0])
        edge, which = np.unique(node[here] * vocab + token, return_inverse=True)
        parents.append(edge // vocab)
        tokens.append(edge % vocab)
        node[here] = nodes + which
        nodes += len(edge)
    count = np.bincount(np.concatenate(parents), minlength=nodes + 1)
    ended = np.bincount(node, minlength=nodes + 1)

    def offsets(sizes):
        return np.concatenate([[0], np.cumsum(sizes)]).astype(np.int32)

    return Trie(offsets(count), np.concatenate(tokens).astype(np.int32), offsets(ended),
                items[np.argsort(node, kind='stable')].astype(np.int32), int(count.max()), depth,
                vocab, stop)
