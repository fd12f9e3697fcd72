"""Approximate lists by a graph over the catalogue (HNSW), for catalogues of millions.

Malkov and Yashunin 2018, with faiss (the extra `ann`). `recall` measures the loss against the exact
lists of topk.py.
"""

from pathlib import Path

import numpy as np

from tpad_jax.errors import refusing

NEIGHBOURS, BUILD, SEARCH = 32, 200, 256  # per item; candidates when building and searching


def build(z: np.ndarray, *, threads: int = 0):
    """Return an index by inner product; row n of z is item n + 1.

    Args:
      z: float32 [V, D]. Item vectors.
      threads: number of threads; 0 for all cores.

    Raises:
      InputError: faiss is not installed.
    """
    faiss = _faiss()
    if threads:
        faiss.omp_set_num_threads(threads)
    index = faiss.IndexHNSWFlat(z.shape[1], NEIGHBOURS, faiss.METRIC_INNER_PRODUCT)
    index.hnsw.efConstruction, index.hnsw.efSearch = BUILD, SEARCH
    index.add(np.ascontiguousarray(z, np.float32))
    return index


def search(index, h: np.ndarray, k: int, moved=None, allowed: np.ndarray | None = None
           ) -> tuple[np.ndarray, np.ndarray]:
    """Return items int32 [S, k], 0 where there are too few, and their scores.

    Args:
      index: from `build`.
      h: float32 [S, D]. Session vectors.
      k: length of a list.
      moved: (items int [S, M], float32 [S, M] shifts of their scores, 0 on padding and on all but
        one place of an item), or None. These items are candidates, too.
      allowed: bool [V + 1], [0] being False: the items that the lists may hold. All of them are
        scored, exactly, as a search of the graph would miss some. None: all items.
    """
    h = np.ascontiguousarray(h, np.float32)
    if moved is None and allowed is None:
        scores, rows = index.search(h, k)
        return rows.astype(np.int32) + 1, scores
    moved = np.zeros((2, len(h), 0), int) if moved is None else moved
    lists, values = np.zeros((len(h), k), np.int32), np.full((len(h), k), -np.inf, np.float32)
    if allowed is None:
        near = index.search(h, min(2 * k, index.ntotal))[1] + 1
    else:
        near = np.broadcast_to(np.flatnonzero(allowed), (len(h), allowed.sum()))
    for row, (some, items, shift) in enumerate(zip(near, *map(np.asarray, moved), strict=True)):
        use = (shift != 0) & (True if allowed is None else allowed[items])
        some = np.union1d(some[some > 0], items[use])
        scores = index.reconstruct_batch(some - 1) @ h[row]
        scores[np.searchsorted(some, items[use])] += shift[use]
        best = np.argsort(-scores, kind='stable')[:k]
        lists[row, :len(best)], values[row, :len(best)] = some[best], scores[best]
    return lists, values


def recall(found: np.ndarray, exact: np.ndarray) -> float:
    """Return the share of the exact items that the approximate lists contain.

    Args:
      found: int [S, K]. Approximate lists.
      exact: int [S, K]. Exact lists.
    """
    return float(np.mean([len(np.intersect1d(a, b)) / len(b)
                          for a, b in zip(found, exact, strict=True)]))


def write(index, file: Path) -> None:
    """Write an index for `faiss.read_index`, in Python or C++.

    Args:
      index: from `build`.
      file: path of the file.
    """
    _faiss().write_index(index, str(file))


def _faiss():
    with refusing(ImportError, 'a package is missing', 'Fix: pip install "tpad_jax[ann]"'):
        import faiss
        return faiss
