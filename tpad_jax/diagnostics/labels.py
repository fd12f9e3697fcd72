"""The known attributes of items, which probes predict and plots are coloured by."""

import numpy as np

from tpad_jax.data.synthetic import wording

SIDE = ('brand', 'category', 'price')  # columns of the side features


def labels(job) -> dict[str, np.ndarray]:
    """List the known attributes of items 1..V: {attribute: int [V]}, below 0 where unknown."""
    if job.planted is not None:
        return dict(zip(wording.ATTRIBUTES, job.attributes.T, strict=True))
    data = job.data
    names = SIDE if len(data.side_sizes) == len(SIDE) and not job.config.data.ready else [
        f'side_{i}' for i in range(len(data.side_sizes))]
    # 0 is "unknown", but "no" for a field of two values
    return {name: ids if size == 2 and name not in SIDE else ids - 1
            for name, ids, size in zip(names, data.side[1:].T, data.side_sizes, strict=False)}


def category(job) -> np.ndarray:
    """Choose the label of items 1..V that colours a plot: int [V], below 0 for none.

    It is the category, if there is one; else the first value that an item has of a list of values;
    else the first side feature.
    """
    known = labels(job)
    if 'category' in known:
        return known['category']
    values = [ids for ids, size in zip(known.values(), job.data.side_sizes, strict=False)
              if size == 2]
    if len(values) > 1:
        return np.where(np.any(values, axis=0), np.argmax(values, axis=0), -1)
    return next(iter(known.values()), np.full(job.data.num_items, -1))
