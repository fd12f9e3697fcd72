"""Records that cross packages: a batch, a state, the result of a loss; and the glossary.

One word per concept, in code and pages:

    item        one product of the catalogue, numbered 1..V; number 0 is padding
    catalogue   all items; a row is one item's entry in a table of the catalogue
    session     one visitor's items in order; prefix: its first items; target: the item after them
    cold item   an item of no training session; warm: every other
    stage       part of a run: knowledge, teach, transfer, recommend, joint
    source      where items and sessions come from: raw files, prepared sessions, planted catalogue
    baseline    a rule that is tuned; trained baseline: a recommender of config.rivals
    adapter     LoRA factors that are added to the kernels of a frozen base
    K, T        Knowledge-MLLM, which reads items; Transfer-MLLM, which reads sessions
    k           features of an item, from K: one vector per modality
    t           features of a prefix, from T, one vector per position
    c, p        parts of t: what agrees with item knowledge, and the transitional pattern
    r           features of an item that also hold transitions, distilled from p
    z, h        vector of an item, vector of a session; a score is their product
    q           density of p given c, fitted for the bound vCLUB
    critic      scores pairs for a bound of mutual information

Dimensions in docstrings:

    B  rows of a batch: (prefix, target) pairs, or items in stage knowledge
    N  positions of a prefix, left aligned and padded at the end
    V  items of the catalogue; tables per item have V + 1 rows, and row 0 is padding
    U  different items of a batch, in one device's part of it; row 0 is padding
    M  modalities of an item: image, text
    P  image tokens; in `places` positions
    T  text tokens
    L  tokens of a sequence
    D  width of features
    S  side features
    R  rows of an evaluation
"""

import dataclasses
from typing import Any, NamedTuple

import jax
from flax import struct


@struct.dataclass
class Batch:
    """Rows of a stage, sharded over devices along the first axis of every field.

    Fields from `slots` on hold the content of items; they are None in stages that read stored
    features only. Each device lists the content of an item once, and `slots` index it.

    Attributes:
      items: int32 [B, N]. The prefix, 0 pads at the end.
      next: int32 [B, N]. The item after position j, 0 pads.
      target: int32 [B]. The item after the prefix.
      valid: bool [B]. False: the row only fills the batch.
      row: int32 [B]. The row's number in the data, from which its random draws are made.
      context: int32 [B, C]. Relative times, kinds and the visitor's earlier items, see
        data/events.py; None: not read.
      places: int32 [P]. b N + j of every position with an item, -1 pads.
      slots: int32 [B, N]. Content row of `items`.
      next_slots: int32 [B, N]. Content row of `next`.
      ids: int32 [U]. The item of a content row.
      image: uint8 [U, H, W, 3].
      has_image: bool [U].
      tokens: int32 [U, T]. Text of the items, -1 pads at the end.
    """

    items: jax.Array
    next: jax.Array
    target: jax.Array
    valid: jax.Array
    row: jax.Array
    context: jax.Array | None = None
    places: jax.Array | None = None
    slots: jax.Array | None = None
    next_slots: jax.Array | None = None
    ids: jax.Array | None = None
    image: jax.Array | None = None
    has_image: jax.Array | None = None
    tokens: jax.Array | None = None

    @classmethod
    def of(cls, batch: dict) -> 'Batch':
        """Make a batch of {field: array}; other names are ignored."""
        return cls(**{f.name: batch[f.name] for f in dataclasses.fields(cls) if f.name in batch})

    @property
    def mask(self) -> jax.Array:
        """Bool [B, N]: positions that hold an item of a valid row."""
        return (self.items > 0) & self.valid[:, None]

    @property
    def last(self) -> jax.Array:
        """int32 [B]: the prefix's last position, 0 for an empty row."""
        return jax.numpy.maximum((self.items > 0).sum(axis=1) - 1, 0)


@struct.dataclass
class State:
    """Everything that a step reads and writes, and that a checkpoint holds. A step donates it.

    Attributes:
      step: int32 scalar.
      params: {path: array} that the stage trains.
      frozen: {path: array} that it only reads, without gradient or optimiser state.
      opt_state: of optax.
      loss_state: {name of a loss: its state}, such as MINE's moving average.
    """

    step: jax.Array
    params: dict
    frozen: dict
    opt_state: Any
    loss_state: dict


class Loss(NamedTuple):
    """The result of a loss that is more than values [B].

    Attributes:
      value: float32, of any shape.
      weight: float32, of the same shape. The loss is the weighted mean of `value`.
      state: the new state of the loss.
      metrics: {name: scalar} to log.
    """

    value: jax.Array
    weight: jax.Array
    state: Any = None
    metrics: dict = {}  # noqa: RUF012 (never written to)
