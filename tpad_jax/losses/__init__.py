"""One pure function per loss, and `combine`, which masks, averages, weighs and logs them all.

A loss takes `(out, batch, *, axis=None, **keywords)` and returns one value per row, `[B]`, or,
where its rows are positions or tokens or it keeps a state, `Loss(value, weight, state, metrics)`.
It never calls an encoder, never averages over rows, never weighs. Every keyword that is a string
(but for those in `contract.PLAIN`) names one of `models.tpad.forward`'s outputs; a stage checks
them when it starts. Optional keywords a loss may take: `state` (its own, from the last step),
`key` (the step's) and `head` (its own module, parameters bound, where the config names one).
"""

from tpad_jax.losses.clusters import clusters
from tpad_jax.losses.combine import bound, combine, first_parameters
from tpad_jax.losses.contract import ENTRY, check_call, needs, own_module, resolve, weigh
from tpad_jax.losses.discrepancy import alignment_uniformity, mmd
from tpad_jax.losses.distillation import mdist, rdist
from tpad_jax.losses.generation import generation
from tpad_jax.losses.information import club_fit, infonce, jsd, l1out, mine, nwj, smile, vclub
from tpad_jax.losses.recommendation import next_item, sampled_next_item

__all__ = ['ENTRY', 'alignment_uniformity', 'bound', 'check_call', 'club_fit', 'clusters',
           'combine', 'first_parameters', 'generation', 'infonce', 'jsd', 'l1out', 'mdist', 'mine',
           'mmd', 'needs', 'next_item', 'nwj', 'own_module', 'rdist', 'resolve',
           'sampled_next_item', 'smile', 'vclub', 'weigh']
