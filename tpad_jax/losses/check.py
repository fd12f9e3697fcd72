"""Whether a loss keeps its contract, tried on random outputs (see example.py), in seconds."""

import inspect
import traceback
from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import jax
import numpy as np
from flax.traverse_util import unflatten_dict

from tpad_jax.distributed import collectives
from tpad_jax.errors import InputError
from tpad_jax.losses import combine, contract, example

NAME = 'it'  # what the loss is called here
AXIS = 'data'
CLOSE = 2e-5  # relative and absolute
GIVEN = {'items', 'next', 'warm', 'popularity'}  # outputs that every stage has

# Programs of this size run in no time: compiling them is what takes it.
jit = partial(jax.jit, compiler_options={'xla_backend_optimization_level': 0})


class Finding(NamedTuple):
    """One line: ok is False for a breach of the contract, None for something to know."""

    ok: bool | None
    what: str
    told: str


def check(fn, keywords=(), module=None) -> Iterator[Finding]:
    """What the contract says of a loss, one finding after the other; it ends where none can follow.

    Args:
      fn: the function. keywords: {name: value} as a config would give them.
      module: the flax module of its head, or None.
    """
    keywords = dict(keywords)
    try:
        reads = contract.needs(NAME, fn, keywords)
        contract.check_call(NAME, fn, keywords, module is not None)
        yield Finding(True, 'signature', f'{contract.label(fn)}{inspect.signature(fn)}')
        trial = Trial(fn, keywords, module)
        absent = sorted(reads - trial.outputs)
        if absent:
            yield Finding(False, 'names', f'reads {", ".join(absent)}, which no stage computes; '
                          f'there are {", ".join(sorted(trial.outputs))}')
            return
        yield Finding(True, 'names', f'reads {", ".join(sorted(reads)) or "the batch alone"}')
        yield trial.shape()
        yield trial.finite()
        if trial.found is not None:
            for look in (trial.slope, trial.padding, trial.fewer, trial.nobody, trial.replicas,
                         trial.repeats):
                yield look()
    except InputError as error:
        told = str(error).replace(f'config.losses.{NAME}: ', '')
        yield Finding(False, 'contract', told.replace(f'config.losses.{NAME}', 'it'))
    except Exception as error:  # the loss's own
        at = traceback.extract_tb(error.__traceback__)
        own = [frame for frame in at if frame.filename == inspect.getsourcefile(fn)]
        line = f'{own[-1].filename}, line {own[-1].lineno}: ' if own else ''
        yield Finding(False, 'runs', f'{line}{type(error).__name__}: '
                      + (str(error).strip().splitlines() or [''])[0])


class Trial:
    """A loss beside what it is tried on; each method is one finding, `finite` the first.

    Attributes:
      params, raw, batch, state: what `step` takes, see example.py.
      found: what `step` returned before any change, once it is known to be finite.
    """

    def __init__(self, fn, keywords, module=None):
        self.losses, self.found = ((NAME, fn, 0.7, keywords),), None
        self.fn, self.keywords = fn, keywords
        self.modules = () if module is None else ((NAME, module),)
        self.params = example.make_params(2)
        self.batch, raw = example.make(0)
        self.raw = example.foretold(self.params, raw)
        self.outputs = jax.eval_shape(example.named, self.params, self.raw, self.batch).keys()
        self.reads = contract.needs(NAME, fn, keywords) | GIVEN
        self.state = {NAME: fn.initial_state()} if hasattr(fn, 'initial_state') else {}
        if self.modules:
            drawn = combine.first_parameters(
                self.modules, self.losses, lambda p, r, b: (self.named(p, r, b), b),
                (self.params, self.raw, self.batch), 0)
            self.params |= unflatten_dict(drawn, sep='/')
        self.one = jit(partial(self.step, axis=None))

    def named(self, params, raw, batch):
        """The outputs a stage would have for this loss alone."""
        out = example.named(params, raw, batch)
        return {n: x for n, x in out.items() if n in self.reads}

    def result(self, params, raw, batch):
        """What the function returns, as a `Loss`."""
        return combine.called(
            NAME, self.fn, self.keywords, self.named(params, raw, batch), batch, None,
            self.state.get(NAME), jax.random.key(0),
            combine.bound(self.modules, params).get(NAME))

    def step(self, params, raw, batch, state, axis):
        """A train step's part of one loss: ((value, (state, metrics)), gradient)."""
        def objective(params):
            value, new, logged = combine.combine(
                self.losses, self.named(params, raw, batch), batch, state, axis=axis,
                key=jax.random.key(3), heads=combine.bound(self.modules, params))
            return value, (new, logged)

        result, grads = jax.value_and_grad(objective, has_aux=True)(params)
        return result, collectives.mean(grads, axis)

    def shape(self):
        """One value per row, or a `Loss`; a state only where there was one."""
        found = jax.eval_shape(self.result, self.params, self.raw, self.batch)
        if (found.state is None) != (not self.state):
            raise InputError('the state it returns and its initial_state belong together: '
                             f'{contract.label(self.fn)}.initial_state is a function without '
                             'arguments that returns the first state')
        return Finding(True, 'shape', f'{found.value.dtype} {list(found.value.shape)} for '
                       f'{example.B} rows')

    def finite(self):
        """Value and gradient; a second step meets the first one's state."""
        batch, raw = example.make(5)
        (_, (self.state, _)), _ = self.one(self.params, raw, batch, self.state)
        found = self.one(self.params, self.raw, self.batch, self.state)
        (value, _), grads = found
        if not np.isfinite(value):
            rows = self._rows()
            return Finding(False, 'finite', f'the value is {float(value)}{rows}')
        if not _finite(grads):
            return Finding(False, 'finite', 'the value is finite and its gradient is not: a root '
                           'or a norm of zero has none')
        if not _finite(found):
            return Finding(False, 'finite', 'its state or a metric is not finite')
        self.found = found
        trained = sorted(n for n, g in grads.items() if _largest(g) > 0)
        if not trained:
            return Finding(False, 'finite', 'the gradient is zero: it trains nothing')
        return Finding(True, 'finite', f'{float(value) / 0.7:.4g}, and the gradient reaches '
                       f'{", ".join(trained)}')

    def _rows(self):
        def value(params, raw, batch):
            found = self.result(params, raw, batch)
            return found.value, found.weight

        value, weight = jax.device_get(jit(value)(self.params, self.raw, self.batch))
        bad = ~np.isfinite(value) & (weight != 0)
        bad = bad.reshape(len(bad), -1).any(axis=1) & self.batch.valid
        return f' in rows {", ".join(map(str, np.flatnonzero(bad)))}' if bad.any() else ''

    def slope(self):
        """Whether the gradient is the value's slope, along a random direction."""
        rng = np.random.default_rng(9)
        way = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), self.params)
        above, below = (float(self.one(
            jax.tree.map(lambda x, y, e=e: x + e * y, self.params, way), self.raw, self.batch,
            self.state)[0][0]) for e in (0.005, -0.005))
        pairs = zip(*map(jax.tree.leaves, (self.found[1], way)), strict=True)
        slope, rise = sum(float((g * w).sum()) for g, w in pairs), (above - below) / 0.01
        if abs(slope - rise) <= max(0.02 * abs(rise), 0.01):
            return Finding(True, 'slope', 'the gradient is the slope of the value')
        return Finding(None, 'slope', f'the gradient says {slope:.4g} where the value rises by '
                       f'{rise:.4g}: right where a gradient is stopped or corrected, or where the '
                       'value has a kink')

    def padding(self):
        """What stands in padded rows, positions and tokens has no part in it."""
        batch, raw = example.garbled(self.batch, self.raw, 9)
        return self._same('padding', self.one(self.params, raw, batch, self.state),
                          'other numbers in padded rows or positions change {}; weigh with '
                          'Loss(value, weight), the weight of a position being batch.mask')

    def fewer(self):
        """Nor does it matter whether padded rows are there."""
        keep = self.batch.valid
        raw, batch = jax.tree.map(lambda x: x[keep], (self.raw, self.batch))
        why = 'the mean over rows is taken by combine'
        if 'key' in inspect.signature(self.fn).parameters:
            why = 'draw for each row by jax.random.fold_in(key, row), its row being of batch.row'
        return self._same('rows', self.one(self.params, raw, batch, self.state),
                          f'the number of padded rows changes {{}}; {why}')

    def nobody(self):
        """Nothing but padding: zero, no gradient, the state as it was."""
        nobody = self.batch.replace(valid=np.zeros(example.B, bool))
        (value, (kept, logged)), grads = self.one(self.params, self.raw, nobody, self.state)
        what = [word for word, bad in (
            ('the value', float(value) != 0), ('a gradient', not _largest(grads) == 0),
            ('a metric', any(float(x) != 0 for x in logged.values())),
            ('the state', not _close(kept, self.state))) if bad]
        if what:
            why = ('a state goes on as it was where no row counts' if what == ['the state']
                   else 'divide by jnp.maximum(count, 1)')
            return Finding(False, 'no rows', f'{", ".join(what)} is not as it was, or not zero, '
                           f'in a batch of padding alone; {why}')
        return Finding(True, 'no rows', 'a batch of padding alone gives zero and no gradient')

    def replicas(self):
        """The same in parts, as replicas compute it, from the rows of all of them."""
        parts = jax.tree.map(lambda x: np.reshape(x, (example.REPLICAS, -1, *x.shape[1:])),
                             (self.raw, self.batch))
        many = jit(jax.vmap(partial(self.step, axis=AXIS), in_axes=(None, 0, 0, None),
                            axis_name=AXIS))(self.params, *parts, self.state)
        first = jax.tree.map(lambda x: x[0], many)
        return self._same('replicas', first, f'{example.REPLICAS} replicas and one differ in {{}}; '
                          'rows are compared with those of every replica by '
                          'tpad_jax.distributed.collectives.gather(x, axis), and sums of them are '
                          'collectives.total(x, axis)')

    def repeats(self):
        """One item at two positions is no pair of different ones; nor is padding."""
        same = jax.tree.map(lambda x: np.where(x > 0, 1, 0).astype(np.int32),
                            (self.batch.items, self.batch.next))
        alike = self.batch.replace(items=same[0], next=same[1],
                                   target=np.ones_like(self.batch.target))
        if not _finite(self.one(self.params, self.raw, alike, self.state)):
            return Finding(False, 'repeats', 'value or gradient is not finite where every position '
                           'holds the same item')
        scorers = sorted(n for n in self.reads if n == 'club' or n.startswith('critic.'))
        if not scorers:
            return Finding(True, 'repeats', 'finite where every position holds the same item')
        asked = contract.needs(NAME, self.fn, self.keywords)
        ids = self.batch.next if 'next' in asked and 'items' not in asked else self.batch.items
        ids = np.where(self.batch.mask, ids, 0).reshape(-1)
        rng, own = np.random.default_rng(4), np.eye(len(ids), dtype=bool)
        scores = rng.normal(size=own.shape).astype(np.float32)
        apart = (ids[:, None] != ids) & (ids[:, None] > 0) & (ids > 0)
        moved = np.where(apart | own, scores, scores + rng.normal(size=own.shape))

        def value(scores):
            out = self.named(self.params, self.raw, self.batch)
            out |= {n: x for n, x in example.numbered(self.raw).items()
                    if n in example.POSITIONS and n in self.reads}
            out |= dict.fromkeys(scorers, example.LookUp(scores))
            return combine.combine(self.losses, out, self.batch, self.state,
                                     key=jax.random.key(3),
                                     heads=combine.bound(self.modules, self.params))[0]

        before, after = map(jit(value), (scores, moved.astype(np.float32)))
        if not np.isfinite(before):
            return Finding(None, 'repeats', 'it changes features before a critic sees them, so '
                           'whether repeats are negatives was not checked')
        if not _close(before, after):
            return Finding(False, 'repeats', f'{float(before):.4g} becomes {float(after):.4g} by '
                           'scores between positions of the same item, or of padding: they are no '
                           'negatives')
        return Finding(True, 'repeats', 'positions of the same item are no negatives of each other')

    def _same(self, what, found, told):
        ((value, (state, logged)), grads), ((value_, (state_, logged_)), grads_) = self.found, found
        parts = {f'the value ({float(value):.4g} and {float(value_):.4g})': (value, value_),
                 'the gradient': (grads, grads_), 'the state': (state, state_),
                 'a metric': (logged, logged_)}
        bad = [name for name, (a, b) in parts.items() if not _close(b, a)]
        if bad:
            return Finding(False, what, told.format(', '.join(bad)))
        return Finding(True, what, {'padding': 'what stands in padding has no part in it',
                                    'rows': 'nor has the number of padded rows',
                                    'replicas': f'{example.REPLICAS} replicas are one'}[what])


def shape(name, fn, keywords, module=None) -> None:
    """Refuse a loss whose result has a wrong form, where the example is enough to tell.

    What it raises otherwise is left to the stage, whose outputs may have what it needs.

    Raises:
      InputError: naming the loss, what came and what the contract says.
    """
    try:
        trial = Trial(fn, keywords, module)
        if contract.needs(NAME, fn, keywords) <= trial.outputs:
            trial.shape()
    except InputError as error:
        raise InputError(str(error).replace(f'config.losses.{NAME}:', f'config.losses.{name}:')
                         ) from error
    except Exception:  # of the loss's own
        return


def _close(got, expected):
    return all(np.allclose(a, b, rtol=CLOSE, atol=CLOSE) for a, b in zip(
        jax.tree.leaves(got), jax.tree.leaves(expected), strict=True))


def _finite(tree):
    return all(np.isfinite(x).all() for x in jax.tree.leaves(tree))


def _largest(tree):
    return max((float(np.abs(x).max()) for x in jax.tree.leaves(jax.device_get(tree))), default=0.0)
