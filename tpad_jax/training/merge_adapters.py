"""Blend several adapters of one base into one, as a training-free alternative to distillation.

An adapter changes a kernel by its delta a b. 'sum' and 'mean' weigh and merge models that were
tuned from one base (NaiveMC, Chen et al. 2024, arXiv 2402.12750). 'damc', of the same paper, merges
so where adapters are by kind of token, but tokens of pictures keep the adapter of one model, which
learnt to see. 'ties' trims each delta to its largest entries, elects a sign per entry, and averages
the entries that agree (TIES-merging, Yadav et al. 2023, arXiv 2306.01708). [ours] the choice of
adapters, those of K and T, and the use of the result.
"""

import numpy as np

from tpad_jax.nn import linear

KINDS = ('sum', 'mean', 'ties', 'damc')


def blend(adapters: list[dict], *, kind: str, weights: tuple[float, ...] = (), keep: float = 0.2,
          rank: int = 0) -> dict:
    """Blend adapters of the same kernels into one.

    Sums and means are exact: the factors of all adapters are concatenated, so ranks add up. A TIES
    delta has no small rank. It is exact as well, with the identity as one factor, unless `rank` is
    given.

    Args:
      adapters: list of {path: array}. A path is a tuple that ends with 'a' [.., I, r] or
        'b' [.., r, O], see nn/linear.py.
      kind: of KINDS. 'mean' and 'damc' divide by the sum of the weights.
      weights: one for each adapter's delta; (): 1 each. Of 'damc', the first adapter with the
        largest weight is the one that pictures keep. Equal weights are the scale lambda of TIES.
      keep: share of an adapter's entries that remain after TIES trims it, over all its kernels.
      rank: 0 for an exact blend; otherwise the nearest adapter of this rank (SVD of each kernel).

    Returns:
      The adapter, float32.

    Raises:
      ValueError: an unknown kind, or adapters of different kernels.
    """
    if kind not in KINDS:
        raise ValueError(f'kind={kind!r}: expected one of {", ".join(KINDS)}')
    flat = [{path: np.asarray(x, np.float64) for path, x in tree.items()} for tree in adapters]
    if any(tree.keys() != flat[0].keys() for tree in flat):
        raise ValueError('the adapters to blend are of different kernels')
    weights = np.asarray(weights or (1.0,) * len(flat))
    if kind in ('mean', 'damc'):
        weights = weights / weights.sum()
    kernels = sorted({path[:-1] for path in flat[0]})
    if kind == 'ties':
        deltas = [{k: w * (tree[*k, 'a'] @ tree[*k, 'b']) for k in kernels}
                  for tree, w in zip(flat, weights, strict=True)]
        pairs = {k: _exact(delta) for k, delta in ties(deltas, keep).items()}
    else:
        pictures = (np.arange(len(linear.KINDS)) == linear.IMAGE)[:, None, None]
        factors = [np.where(pictures, float(number == np.argmax(weights)), w) if kind == 'damc'
                   else w for number, w in enumerate(weights)]
        pairs = {k: (np.concatenate([tree[*k, 'a'] for tree in flat], axis=-1),
                     np.concatenate([w * tree[*k, 'b'] for tree, w in
                                     zip(flat, factors, strict=True)], axis=-2)) for k in kernels}
    if rank:
        pairs = {k: _nearest(a @ b, rank) for k, (a, b) in pairs.items()}
    return {(*k, name): x.astype(np.float32) for k, pair in pairs.items()
            for name, x in zip('ab', pair, strict=True)}


def ties(deltas: list[dict], keep: float) -> dict:
    """Trim, elect and merge deltas (Yadav et al. 2023, algorithm 1).

    Args:
      deltas: list of {kernel: array}.
      keep: share of each delta's entries that remain, the largest over all its kernels.

    Returns:
      {kernel: array}. An entry's sign is that of the sum over deltas, and its value the mean over
      the deltas with that sign.
    """
    trimmed = []
    for delta in deltas:
        size = np.concatenate([np.abs(x).ravel() for x in delta.values()])
        count = max(1, round(keep * len(size)))
        smallest = np.partition(size, len(size) - count)[len(size) - count]
        trimmed.append({k: np.where(np.abs(x) >= smallest, x, 0) for k, x in delta.items()})
    out = {}
    for k in deltas[0]:
        stack = np.stack([delta[k] for delta in trimmed])
        agree = (np.sign(stack) == np.sign(stack.sum(axis=0))) & (stack != 0)
        out[k] = np.where(agree, stack, 0).sum(axis=0) / np.maximum(agree.sum(axis=0), 1)
    return out


def _exact(delta):
    """Two factors whose product is exactly delta [.., I, O]; one is the identity."""
    *stack, rows, columns = delta.shape
    identity = np.broadcast_to(np.eye(min(rows, columns)), (*stack, *(min(rows, columns),) * 2))
    return (identity, delta) if rows <= columns else (delta, identity)


def _nearest(delta, rank):
    """The nearest factors of a rank."""
    u, s, v = np.linalg.svd(delta, full_matrices=False)
    root = np.sqrt(s[..., :rank])
    return u[..., :rank] * root[..., None, :], root[..., None] * v[..., :rank, :]
