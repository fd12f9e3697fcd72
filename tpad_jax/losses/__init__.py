"""One pure function per loss, and `combine`, which masks, averages, weighs and logs them all.

A loss takes `(out, batch, *, axis=None, **keywords)` and returns one value per row, `[B]`, or,
where its rows are positions or tokens or it keeps a state, `Loss(value, weight, state, metrics)`.
It never calls an encoder, never averages over rows, never weighs. Every keyword that is a string
(but for those in `contract.PLAIN`) names one of `models.tpad.forward`'s outputs; a stage checks
them when it starts. Optional keywords a loss may take: `state` (its own, from the last step) and
`key` (the step's).
"""

from tpad_jax.losses.contract import combine, needs, resolve
from tpad_jax.losses.distillation import mdist, rdist
from tpad_jax.losses.information import club_fit, infonce, mine, mmd, vclub
from tpad_jax.losses.language import generation
from tpad_jax.losses.recommendation import next_item, sampled_next_item
from tpad_jax.losses.sessions import clusters

__all__ = ['club_fit', 'clusters', 'combine', 'generation', 'infonce', 'mdist', 'mine', 'mmd',
           'needs', 'next_item', 'rdist', 'resolve', 'sampled_next_item', 'vclub']
