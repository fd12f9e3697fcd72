"""One pure function per loss, and `combine`, which masks, averages, weighs and logs them all.

A loss is called as `fn(out, batch, **keywords)`. It returns one value per row, `[B]`; or
`Loss(value, weight, state, metrics)` if its rows are positions or tokens, or if it has a state. It
never calls an encoder, never averages over rows, never weighs. A keyword of type `Out` names one of
the outputs in `models/outputs.py`; any other keyword is a setting of any type. A loss may also take
`axis` (if it looks at other rows), `state` (its own, from the last step), `key` (the step's, folded
by the loss's name) and `head` (its module, parameters bound, if the config names one).
"""

from tpad_jax.losses.combine import bound, combine, first_parameters, first_states
from tpad_jax.losses.contract import LossSpec, Out, from_entry, resolve
from tpad_jax.losses.discrepancy import alignment_uniformity, bottleneck, intents, mmd
from tpad_jax.losses.information import club_fit, infonce, jsd, l1out, mine, nwj, smile, vclub
from tpad_jax.losses.recommendation import clusters, next_item, sampled_next_item, soft_next_item
from tpad_jax.losses.tokens import bag_of_words, generation, mdist, rdist

__all__ = ['LossSpec', 'Out', 'alignment_uniformity', 'bag_of_words', 'bottleneck', 'bound',
           'club_fit', 'clusters', 'combine', 'first_parameters', 'first_states', 'from_entry',
           'generation', 'infonce', 'intents', 'jsd', 'l1out', 'mdist', 'mine', 'mmd', 'next_item',
           'nwj', 'rdist', 'resolve', 'sampled_next_item', 'smile', 'soft_next_item', 'vclub']
