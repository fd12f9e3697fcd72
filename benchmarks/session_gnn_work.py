"""The rows both sides of `benchmarks.session_gnn` read, and the operations and bytes of a step."""

import time

from tpad_jax.data import sessions
from tpad_jax.data.sources import ids


def read(path, max_length):
    """V, and every prefix of the training and of the test sessions as rows."""
    train, test, *_ = ids.read(path)
    return (int(max(train.items.max(), test.items.max())),
            *(sessions.rows(part, max_length) for part in (train, test)))


def training_operations(items, width, batch, positions, again) -> float:
    """Multiplications and additions of the matrix products of a train step, per pair.

    Args:
      items: V+1. width: D. batch: B. positions: node vectors computed, over all rows.
      again: products of the nodes that the backward pass computes once more.

    The three products of the softmax (scores, and both gradients) are 2 B V D each; a node's
    (edges out and in, gates, readout) are 2 D (5 D + 6 D + D) forward and twice that backward, a
    row's 2 D (D + 2 D).
    """
    softmax = 6 * batch * items * width
    network = (3 + again) * (24 * positions + 6 * batch) * width**2
    return (softmax + network) / batch


def training_bytes(items, width, batch) -> float:
    """Bytes that a train step has to move through memory, per pair; caches hold less than these.

    The item table is read for each of three products, its gradient written and read, Adam reads
    table and both moments and writes them (11 tables in all); the scores [B, V] are written,
    read for the partition, read again and overwritten by their gradient, which is read twice
    (6 times). The rest is small.
    """
    return 4 * (11 * items * width + 6 * batch * items) / batch


def fastest(product, threads) -> float:
    """GF/s of the fastest of some runs of a product of two [2048, 2048].

    By processor time over `threads` cores: what other processes take does not count.
    """
    seconds = []
    for _ in range(12):
        begun = time.process_time()
        product()
        seconds.append((time.process_time() - begun) / threads)
    return 2 * 2048**3 / min(seconds) / 1e9
