"""Several adapters of one base as one: the training-free alternative to distilling.

An adapter's effect on a kernel is its delta a b. 'sum' and 'mean' merge models that were tuned from
one base, with a weight each (NaiveMC and DAMC, Chen et al. 2024, arXiv 2402.12750); 'ties' trims
each task's delta to its largest entries, elects a sign per entry, and averages those that agree
(TIES-merging, Yadav et al. 2023, arXiv 2306.01708). [ours] which adapters are blended, those of K
and T, and what is read with the result.
"""

import numpy as np

KINDS = ('sum', 'mean', 'ties')


def blend(adapters: list[dict], *, kind: str, weights: tuple[float, ...] = (), keep: float = 0.2,
          rank: int = 0) -> tuple[dict, float]:
    """One adapter from several with the same kernels.

    Sums and means are exact: their factors are the adapters' own, side by side, so ranks add up.
    What TIES makes of deltas has no small rank; it is kept exactly as well, with the identity as
    one of its factors, unless `rank` says otherwise.

    Args:
      adapters: {path: array}, path a tuple whose last part is 'a' [.., I, r] or 'b' [.., r, O],
        see lora.py.
      kind: of KINDS. weights: of the adapters' deltas; (): 1 each. 'mean' divides by their sum;
        equal weights are TIES' own scale, lambda.
      keep: share of an adapter's entries that TIES' trimming leaves, over all its kernels.
      rank: the nearest adapter of this rank instead (by SVD, for each kernel); 0: exactly.

    Returns:
      The adapter, likewise and float32, and the share of the deltas' norm that `rank` left out
      (0.0: nothing).

    Raises:
      ValueError: another kind, or adapters of different kernels.
    """
    if kind not in KINDS:
        raise ValueError(f'no blend {kind!r}: {", ".join(KINDS)}')
    flat = [{path: np.asarray(x, np.float64) for path, x in tree.items()} for tree in adapters]
    if any(tree.keys() != flat[0].keys() for tree in flat):
        raise ValueError('the adapters to be blended are of different kernels')
    weights = np.asarray(weights or (1.0,) * len(flat))
    if kind == 'mean':
        weights = weights / weights.sum()
    kernels = sorted({path[:-1] for path in flat[0]})
    if kind == 'ties':
        deltas = [{k: w * (tree[*k, 'a'] @ tree[*k, 'b']) for k in kernels}
                  for tree, w in zip(flat, weights, strict=True)]
        pairs = {k: _whole(delta) for k, delta in ties(deltas, keep).items()}
    else:
        pairs = {k: (np.concatenate([tree[*k, 'a'] for tree in flat], axis=-1),
                     np.concatenate([w * tree[*k, 'b'] for tree, w in
                                     zip(flat, weights, strict=True)], axis=-2)) for k in kernels}
    left = 0.0
    if rank:
        pairs, left = _nearest(pairs, rank)
    return {(*k, name): x.astype(np.float32) for k, pair in pairs.items()
            for name, x in zip('ab', pair, strict=True)}, left


def ties(deltas: list[dict], keep: float) -> dict:
    """Trim, elect, and merge deltas {kernel: array} (Yadav et al. 2023, algorithm 1).

    Trim: of each delta the share `keep` of its entries stays, the largest over all kernels at once.
    Elect: an entry's sign is that of the sum. Merge: the mean over the deltas that have this sign.
    """
    trimmed = []
    for delta in deltas:
        size = np.concatenate([np.abs(x).ravel() for x in delta.values()])
        stay = max(1, round(keep * len(size)))
        least = np.partition(size, len(size) - stay)[len(size) - stay]
        trimmed.append({k: np.where(np.abs(x) >= least, x, 0) for k, x in delta.items()})
    out = {}
    for k in deltas[0]:
        stack = np.stack([delta[k] for delta in trimmed])
        agree = (np.sign(stack) == np.sign(stack.sum(axis=0))) & (stack != 0)
        out[k] = np.where(agree, stack, 0).sum(axis=0) / np.maximum(agree.sum(axis=0), 1)
    return out


def _whole(delta):
    """A pair whose product is delta [.., I, O], to the bit: one factor is the identity."""
    *stack, rows, columns = delta.shape
    one = np.broadcast_to(np.eye(min(rows, columns)), (*stack, *(min(rows, columns),) * 2))
    return (one, delta) if rows <= columns else (delta, one)


def _nearest(pairs, rank):
    """The nearest pairs of a rank, and the share of the norm they leave out."""
    out, missed, whole = {}, 0.0, 0.0
    for k, (a, b) in pairs.items():
        u, s, v = np.linalg.svd(a @ b, full_matrices=False)
        missed, whole = missed + (s[..., rank:] ** 2).sum(), whole + (s**2).sum()
        root = np.sqrt(s[..., :rank])
        out[k] = u[..., :rank] * root[..., None, :], root[..., None] * v[..., :rank, :]
    return out, float(np.sqrt(missed / whole)) if whole else 0.0
