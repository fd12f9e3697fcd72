"""One pure function per loss, and `combine`, which masks, averages, weighs and logs them all.

A loss takes `(out, batch, *, axis=None, **keywords)` and returns one value per row, `[B]`, or,
where its rows are positions or tokens or it keeps a state, `Loss(value, weight, state, metrics)`.
It never calls an encoder, never averages over rows, never weighs. Every keyword that is a string
(but for those in `contract.PLAIN`) names one of `models.tpad.forward`'s outputs; a stage checks
them when it starts. Optional keywords a loss may take: `state` (its own, from the last step) and
`key` (the step's).
"""

from tpad_jax.losses.contract import combine, needs, resolve
from tpad_jax.losses.discrepancy import alignment_uniformity, mmd
from tpad_jax.losses.information import club_fit, infonce, jsd, l1out, mine, nwj, smile, vclub
from tpad_jax.losses.language import generation
from tpad_jax.losses.recommendation import next_item, sampled_next_item

__all__ = ['alignment_uniformity', 'club_fit', 'combine', 'generation', 'infonce', 'jsd', 'l1out',
           'mine', 'mmd', 'needs', 'next_item', 'nwj', 'resolve', 'sampled_next_item', 'smile',
           'vclub']
