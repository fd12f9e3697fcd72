"""What flows between the floors: a batch, a state, named outputs, a loss; and the dimension legend.

    B  rows of a batch: one (prefix, next item) pair each, or one item in knowledge acquisition
    N  positions of a prefix, left aligned and padded at the end
    V  items of the catalogue; ids are 1..V, every per-item table has V+1 rows, row 0 is padding
    U  different items of a batch (of one device's part of it), row 0 being padding
    M  modalities of an item: image, text
    P  image tokens; places T  text tokens         L  tokens of a sequence
    D  feature width        S  side features       R  rows of an evaluation
"""

import dataclasses
from typing import Any, NamedTuple

import jax
from flax import struct


@struct.dataclass
class Batch:
    """Rows of a stage, sharded over devices along the first axis of every field.

    The fields from `slots` on carry item content; they are None in stages that read stored features
    only. Content is listed once per different item and device: `slots` point into it.
    """

    items: jax.Array  # int32 [B, N] the prefix, 0 pads at the end
    next: jax.Array  # int32 [B, N] the item that follows position j, 0 pads
    target: jax.Array  # int32 [B] the item that follows the prefix
    valid: jax.Array  # bool [B] False: a row that only fills the batch
    row: jax.Array  # int32 [B] the row's number in the data set: keys every draw made for it
    places: jax.Array | None = None  # int32 [P] b N + j of every position that holds an item, -1s
    slots: jax.Array | None = None  # int32 [B, N] content row of items
    next_slots: jax.Array | None = None  # int32 [B, N] content row of next
    ids: jax.Array | None = None  # int32 [U] item of a content row
    image: jax.Array | None = None  # uint8 [U, H, W, 3]
    has_image: jax.Array | None = None  # bool [U]
    tokens: jax.Array | None = None  # int32 [U, T], -1 pads at the end

    @classmethod
    def of(cls, batch: dict):
        """The batch of a host's {field: array}; what is no field of it is left out."""
        return cls(**{f.name: batch[f.name] for f in dataclasses.fields(cls) if f.name in batch})

    @property
    def mask(self):
        """Bool [B, N]: positions that hold an item of a valid row."""
        return (self.items > 0) & self.valid[:, None]

    @property
    def last(self):
        """int32 [B]: the prefix's last position (0 for an empty row)."""
        return jax.numpy.maximum((self.items > 0).sum(axis=1) - 1, 0)


@struct.dataclass
class State:
    """Everything a step reads and writes; donated to it, and what a checkpoint holds."""

    step: jax.Array  # int32 []
    params: dict  # what this stage trains: path -> array
    frozen: dict  # what it only reads: path -> array; neither gradient nor optimiser state
    opt_state: Any
    loss_state: dict  # per loss name: MINE's moving average, say


class Loss(NamedTuple):
    """What a loss returns where a plain [B] does not do: value and weight of one shape."""

    value: jax.Array
    weight: jax.Array
    state: Any = None
    metrics: dict = {}  # noqa: RUF012 (never written to)
