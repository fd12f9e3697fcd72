"""Approximate first items by a graph over the catalogue (HNSW), for catalogues of millions.

Malkov and Yashunin 2018, by faiss (the extra `ann`). What is given up is measured, see `recall`;
the exact lists are topk.py's.
"""

from pathlib import Path

import numpy as np

from tpad_jax.errors import InputError

NEIGHBOURS, BUILD, SEARCH = 32, 200, 256  # of an item; looked at to build and to search


def build(z: np.ndarray, *, threads: int = 0):
    """The index of item vectors z float32 [V, D] by inner product; item n has number n + 1.

    Args:
      threads: 0: all cores.

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


def search(index, h: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Of sessions h float32 [S, D] items int32 [S, k], 0 where none was found, and scores."""
    scores, found = index.search(np.ascontiguousarray(h, np.float32), k)
    return found.astype(np.int32) + 1, scores


def recall(found: np.ndarray, exact: np.ndarray) -> float:
    """Share of the exact lists, int [S, K], that the found ones hold."""
    return float(np.mean([len(np.intersect1d(a, b)) / len(b)
                          for a, b in zip(found, exact, strict=True)]))


def write(index, file: Path) -> None:
    """Leave an index where `faiss.read_index` reads it, from Python or C++."""
    _faiss().write_index(index, str(file))


def _faiss():
    try:
        import faiss  # here: an extra
    except ImportError as error:
        raise InputError('faiss is not installed; pip install "tpad_jax[ann]"') from error
    return faiss
