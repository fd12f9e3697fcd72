"""Whether a session encoder keeps its contract, tried on random sessions, in seconds."""

from collections.abc import Iterator
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np

from tpad_jax.core.findings import Finding, raised
from tpad_jax.errors import InputError
from tpad_jax.models import sessions

V, D, S = 9, 8, 3  # items, width, neighbours of an item in the item graph
ITEMS = np.array([[3, 0, 0, 0, 0], [2, 5, 2, 0, 0], [1, 2, 3, 4, 5], [7, 7, 8, 7, 0],
                  [4, 1, 4, 1, 6], [0, 0, 0, 0, 0]], np.int32)  # the last row fills a batch
REAL, LONG = np.flatnonzero(ITEMS[:, 0]), 2  # rows of sessions; one that fills all positions
SHORT = np.flatnonzero((ITEMS[:, 0] > 0) & (ITEMS[:, 3] == 0))  # rows of three items at most
RATE = 0.3  # of both kinds of dropout

# Programs of this size run in no time: compiling them is what takes it.
jit = partial(jax.jit, compiler_options={'xla_backend_optimization_level': 0})


def check(name: str, **options) -> Iterator[Finding]:
    """Check an encoder; ends early after a breach that hides all others.

    Args:
      name: value of config.model.encoder.
      **options: other options of config.model that its entry reads.
    """
    model = SimpleNamespace(**{'encoder': name, 'width': D, 'dropout': RATE, 'item_dropout': RATE,
                               **options})
    try:
        encoder = sessions.build(model, ITEMS.shape[1])
    except InputError as error:
        yield Finding(False, 'entry', str(error))
        return
    try:
        trial = Trial(encoder)
        for look in trial.looks:
            ok, text = look()
            yield Finding(ok, look.__name__, text)
            if ok is False and look in trial.looks[:3]:
                return
    except Exception as error:  # raised by the encoder
        yield raised(error, type(encoder))


class Trial:
    """An encoder with what it is tried on; each of `looks` returns `ok` and `text` of a finding.

    Attributes:
      encoder: the flax module.
      table: float32 [V+1, D]. Item vectors.
      h: float32 [B, D]. Of ITEMS, once it is known to be finite.
      looks: the methods in order. Those after `finite` need `h`.
    """

    def __init__(self, encoder):
        self.encoder, self.rng = encoder, np.random.default_rng(0)
        self.table = self.rng.normal(size=(V + 1, D)).astype(np.float32)
        near = self.rng.integers(0, V + 1, (V + 1, S))
        self.near = near, np.where(near > 0, self.rng.uniform(0.1, 1, near.shape), 0)
        self.keys = jax.random.split(jax.random.key(3), len(ITEMS))
        self.run = jit(self.apply, static_argnames='method')
        self.looks = [self.parameters, self.shape, self.finite, self.padding, self.rows,
                      self.sessions, self.dropout]
        if sessions.reads_prefixes(encoder):
            self.looks.append(self.prefixes)

    def apply(self, params, z, items, keys=None, method=None):
        """Encode sessions by item vectors z [B, N, D]."""
        return self.encoder.apply({'params': params}, z, items, keys, method=method,
                                  **self.graph(items))

    def graph(self, items):
        """Compute the neighbours of items, for an encoder that reads them."""
        if not sessions.reads_graph(self.encoder):
            return {}
        near, weight = (jnp.asarray(x, kind)[items] for x, kind in zip(
            self.near, (jnp.int32, jnp.float32), strict=True))
        return {'near': (jnp.asarray(self.table)[near], weight)}

    def encode(self, items, keys=None, z=None, method=None):
        """Encode sessions by the item vectors of the table, or others."""
        return np.asarray(self.run(self.params, self.table[items] if z is None else z, items, keys,
                                   method=method))

    def parameters(self):
        """Drawn as a run draws them, and moved so that none is zero."""
        first = jax.eval_shape(lambda: self.encoder.init(
            jax.random.key(0), self.table[ITEMS], ITEMS, **self.graph(ITEMS)))
        other = sorted(first.keys() - {'params'})
        if other:
            return False, f'it has variables {", ".join(other)}; expected parameters alone'
        leaves = jax.tree_util.tree_leaves_with_path(first.get('params', {}))
        weak = [jax.tree_util.keystr(path, simple=True, separator='/') for path, x in leaves
                if x.weak_type]
        if weak:
            return False, (f'{", ".join(weak)} has a weak type, which an update changes: the step '
                           'is compiled twice; give it a dtype, as jnp.float32')
        drawn = jit(lambda: self.encoder.init(
            jax.random.key(0), self.table[ITEMS], ITEMS, **self.graph(ITEMS)))()
        self.params = jax.tree.map(lambda x: x + jnp.asarray(
            0.3 * self.rng.normal(size=x.shape), x.dtype), drawn.get('params', {}))
        return True, f'{sum(x.size for _, x in leaves)} numbers in {len(leaves)} parameters'

    def shape(self):
        """One vector per row."""
        h = jax.eval_shape(self.apply, self.params, self.table[ITEMS], ITEMS)
        came = f'{h.dtype} {list(h.shape)}' if hasattr(h, 'shape') else type(h).__name__
        expected = f'float32 {[len(ITEMS), D]}'
        return came == expected, f'{came} for z {[*ITEMS.shape, D]}' + (
            f'; expected {expected}' * (came != expected))

    def finite(self):
        """Values and gradients, also of a row without items."""
        self.h = self.encode(ITEMS)
        self.slopes = jit(jax.grad(lambda params, z: (self.apply(params, z, ITEMS) ** 2).sum(),
                                   argnums=(0, 1)))(self.params, self.table[ITEMS])
        ok = all(np.isfinite(x).all() for x in jax.tree.leaves((self.h, self.slopes)))
        return ok, ('values and gradients are finite' if ok else 'a value or a gradient is not '
                    'finite; a row without items must be too: divide by jnp.maximum(count, 1)')

    def padding(self):
        """The content of padded positions, and their number, change nothing."""
        z = np.where((ITEMS > 0)[..., None], self.table[ITEMS], 100)
        ok = _close(self.encode(ITEMS, z=z)[REAL], self.h[REAL]) and _close(
            self.encode(ITEMS[SHORT, :3]), self.h[SHORT])
        return ok, ('padding changes nothing' if ok else 'the vectors or the number of padded '
                    'positions change h; mask by items > 0')

    def rows(self):
        """A row has the same result alone, and in another order."""
        ok = _close(self.encode(ITEMS[::-1])[::-1], self.h) and all(
            _close(self.encode(ITEMS[[row]])[0], self.h[row]) for row in REAL)
        return ok, ('a row knows nothing of the others' if ok else
                    'the other rows of a batch change h of a row')

    def sessions(self):
        """Different sessions look different, and every item of one counts."""
        gaps = np.abs(self.h[REAL, None] - self.h[REAL]).max(axis=2) + np.eye(len(REAL))
        if gaps.min() < 1e-3:
            return False, 'two sessions of different items have the same h'
        unread = [str(n) for n in range(ITEMS.shape[1]) if not np.any(self.slopes[1][LONG, n])]
        return (None, f'the items at positions {", ".join(unread)} of {ITEMS.shape[1]} do not '
                'change h') if unread else (True, 'every item of a session counts')

    def dropout(self):
        """With keys alone, and drawn by row."""
        dropped = self.encode(ITEMS, self.keys)
        if not _close(self.encode(ITEMS[[LONG]], self.keys[LONG:LONG + 1])[0], dropped[LONG]):
            return False, 'other rows change the draws of a row; use tpad_jax.nn.attention.dropout'
        if (np.abs(dropped - self.h).max(axis=1)[REAL] < 1e-6).any():
            return None, 'keys change nothing: model.dropout and model.item_dropout have no effect'
        return True, 'drawn by the key of a row, and not without keys'

    def prefixes(self):
        """Its `positions` are the results of the prefixes."""
        each, places = self.encode(ITEMS, method='positions'), np.arange(ITEMS.shape[1])
        ok = each.shape == (*ITEMS.shape, D) and np.isfinite(each).all()
        for n in places[::-1] if ok else ():
            real = ITEMS[:, n] > 0
            ok &= _close(each[real, n], self.encode(np.where(places <= n, ITEMS, 0))[real])
        return bool(ok), ('positions has h of every prefix' if ok else 'positions differs from h '
                          'of the prefixes, or is not finite; a position must not read later ones')


def _close(values, expected):
    return np.allclose(values, expected, rtol=1e-5, atol=1e-5)
