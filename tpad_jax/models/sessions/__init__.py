"""Session encoders: item vectors of a prefix to one vector, h."""

import inspect
import pkgutil

from tpad_jax.errors import refuse_if, refusing
from tpad_jax.models.sessions.attention import SessionAttention
from tpad_jax.models.sessions.gce_gnn import GlobalGraphGNN
from tpad_jax.models.sessions.sr_gnn import SessionGNN

# Values of config.model.encoder: (config.model, fields that all encoders have) -> flax module. All
# else about an encoder is derived from the module. Another value is 'package.module:function'.
ENCODERS = {
    'attention': lambda model, **shared: SessionAttention(model.layers, model.heads, **shared),
    'sr_gnn': lambda model, **shared: SessionGNN(model.gnn_steps, positions=model.positions,
                                                 **shared),
    'gce_gnn': lambda model, **shared: GlobalGraphGNN(**shared)}


def build(model, max_length: int):
    """Build the session encoder that config.model.encoder names.

    Args:
      model: config.model.
      max_length: longest prefix.

    Raises:
      InputError: no encoder has this name, or it cannot be built.
    """
    option, make = f'config.model.encoder={model.encoder!r}', ENCODERS.get(model.encoder)
    # a run of an encoder that a launcher registered is loaded
    refuse_if(not make and ':' not in model.encoder, f'{option}: it is not registered. Expected '
              f'one of {", ".join(ENCODERS)} or package.module:function. Fix: import the module '
              'that adds it to tpad_jax.models.sessions.ENCODERS first.')
    with refusing(Exception, f'{option}: it cannot be built', 'Expected a function (model, '
                  '**shared) -> flax module, and the options that it reads in config.model. Fix: '
                  'correct one, or run in the directory of the module.'):
        make = make or pkgutil.resolve_name(model.encoder)
        return make(model, max_length=max_length, rate=model.dropout,
                    item_rate=model.item_dropout)


def reads_graph(encoder) -> bool:
    """Whether an encoder reads the global item graph: it takes the argument `near`."""
    return 'near' in inspect.signature(encoder.__call__).parameters


def reads_prefixes(encoder) -> bool:
    """Whether an encoder reads all prefixes of a session at once: it has a method `positions`.

    A field of that name, as `SessionGNN` has, is not a method.
    """
    return callable(getattr(encoder, 'positions', None))
