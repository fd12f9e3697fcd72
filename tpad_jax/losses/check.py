"""Whether a loss keeps its contract, tried on random outputs (`example.py`), in seconds."""

import inspect
from collections.abc import Iterator
from functools import partial

import jax
import numpy as np
from flax.traverse_util import unflatten_dict

from tpad_jax.core.findings import Finding, raised
from tpad_jax.distributed import collectives
from tpad_jax.errors import InputError, refuse_if
from tpad_jax.losses import example
from tpad_jax.losses.combine import bound, call, combine, first_parameters, first_states
from tpad_jax.losses.contract import LossSpec, label
from tpad_jax.models import output_table

NAME = 'it'  # what the loss is called here
WEIGHT = 0.7
AXIS = 'data'
PLAN = output_table.Plan('compressed', ('r',), True, frozenset())  # of the default config
CLOSE = 2e-5  # relative and absolute

# Programs of this size run in no time: compiling them is what takes it.
jit = partial(jax.jit, compiler_options={'xla_backend_optimization_level': 0})


def check(fn, keywords=(), module=None) -> Iterator[Finding]:
    """Check a loss against the contract; ends early after a breach that hides all others.

    Args:
      fn: the function.
      keywords: {name: value} as a config would set them.
      module: the flax module of its head, or None.
    """
    try:
        spec = LossSpec(NAME, fn, WEIGHT, keywords, module=module)
        yield Finding(True, 'signature', f'{label(fn)}{inspect.signature(fn)}')
        if spec.is_old_form:
            keyword, name = next(iter(spec.reads.items()))
            yield Finding(None, 'form', 'outputs are recognised by their names; mark them by type: '
                          f'{keyword}: Out = Out({name!r})')
        trial = Trial(spec)
        for look in trial.looks:
            ok, text = look()
            yield Finding(ok, look.__name__.replace('_', ' '), text)
            if ok is False and trial.result is None:
                return
    except InputError as error:
        text = str(error).replace(f'config.losses.{NAME}: ', '')
        yield Finding(False, 'contract', text.replace(f'config.losses.{NAME}', 'it'))
    except Exception as error:  # raised by the loss's function
        yield raised(error, fn)


class Trial:
    """A loss with what it is tried on; each of `looks` returns `ok` and `text` of a finding.

    Attributes:
      spec: of the loss.
      inputs: params, raw, batch and state, as `step` takes them; see example.py.
      result: what `step` returned for them, once it is known to be finite.
      looks: the methods in order. Those after `finite` need a result.
    """

    def __init__(self, spec: LossSpec):
        self.spec, self.result = spec, None
        params, (batch, raw) = example.make_params(2), example.make(0)
        raw = example.predicted(params, raw)
        self.outputs = jax.eval_shape(example.named, params, raw, batch).keys()
        if spec.module:
            drawn = first_parameters((spec,), lambda p, r, b: (self.named(p, r, b), b),
                                     (params, raw, batch), 0)
            params |= unflatten_dict(drawn, sep='/')
        self.inputs = {'params': params, 'raw': raw, 'batch': batch, 'state': first_states((spec,))}
        self.one = jit(partial(self.step, axis=None))
        self.looks = (self.names, self.shape, self.finite, self.slope, self.padding, self.rows,
                      self.no_rows, self.replicas, self.repeats)

    def named(self, params, raw, batch):
        """Compute the outputs a stage would have for this loss alone."""
        out = example.named(params, raw, batch)
        return {n: x for n, x in out.items() if n in self.spec.needs}

    def loss(self, params, raw, batch, state):
        """Call the function; returns a `Loss`."""
        return call(self.spec, self.named(params, raw, batch), batch, axis=None,
                    key=jax.random.key(0), state=state.get(self.spec.name),
                    head=bound((self.spec,), params).get(self.spec.name))

    def step(self, params, raw, batch, state, axis):
        """Compute a train step's part of one loss: ((value, (state, rows, metrics)), gradient)."""
        def objective(params):
            value, new, logged = combine(
                (self.spec,), self.named(params, raw, batch), batch, state, axis=axis,
                key=jax.random.key(3), heads=bound((self.spec,), params), rows=True)
            return value, (new, logged.pop('not_finite'), logged)

        result, grads = jax.value_and_grad(objective, has_aux=True)(params)
        return result, collectives.mean(grads, axis)

    def run(self, **changes):
        """Return the result of `step` with some of the inputs changed."""
        return self.one(**{**self.inputs, **changes})

    def names(self):
        """Every output it reads exists in some stage."""
        absent = sorted(self.spec.needs - self.outputs)
        if absent:
            return False, (f'reads {", ".join(absent)}, which no stage computes; expected '
                           f'{", ".join(sorted(self.outputs))}')
        output_table.required(self.spec.needs, PLAN)
        return True, f'reads {", ".join(sorted(self.spec.needs)) or "the batch alone"}'

    def shape(self):
        """One value per row, or a `Loss`; a state only if there is a first one."""
        result = jax.eval_shape(self.loss, **self.inputs)
        refuse_if((result.state is None) != (not self.inputs['state']),
                  'the state it returns and its initial_state belong together: '
                  f'{label(self.spec.fn)}.initial_state is a function that returns the first state')
        return True, f'{result.value.dtype} {list(result.value.shape)} for {example.B} rows'

    def finite(self):
        """Value, weight and gradient; a second step meets the first one's state."""
        batch, raw = example.make(5)
        (_, (self.inputs['state'], *_)), _ = self.run(batch=batch, raw=raw)
        result = self.run()
        (value, (_, rows, _)), grads = result
        if not np.isfinite(value):
            return False, (f'the value is {value} in rows {", ".join(map(str, rows[rows >= 0]))}; '
                           "a row weight below 0 counts as nan: the sign belongs to the entry's "
                           'weight in the config')
        if not _finite(grads):
            return False, ('the value is finite and its gradient is not: a root or a norm of zero '
                           'has none')
        if not _finite(result):
            return False, 'its state or a metric is not finite'
        self.result = result
        trained = ', '.join(sorted(n for n, g in grads.items() if _largest(g) > 0))
        return bool(trained), (f'{float(value) / WEIGHT:.4g}, the gradient reaches '
                               f'{trained or "no parameter"}')

    def slope(self):
        """Whether the gradient is the value's slope, along a random direction."""
        rng, params = np.random.default_rng(9), self.inputs['params']
        way = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), params)
        above, below = (float(self.run(params=jax.tree.map(
            lambda x, y, e=e: x + e * y, params, way))[0][0]) for e in (0.005, -0.005))
        products = jax.tree.map(lambda g, w: float((g * w).sum()), self.result[1], way)
        slope, rise = sum(jax.tree.leaves(products)), (above - below) / 0.01
        if abs(slope - rise) <= max(0.02 * abs(rise), 0.01):
            return True, 'the gradient is the slope of the value'
        return None, (f'the gradient is {slope:.4g} where the value rises by {rise:.4g}: correct '
                      'if a gradient is stopped or corrected, or if the value has a kink')

    def padding(self):
        """The content of padded rows, positions and tokens changes nothing."""
        batch, raw = example.garbled(self.inputs['batch'], self.inputs['raw'], 9)
        return self._same(self.run(batch=batch, raw=raw), 'padding changes nothing',
                          'other numbers in padded rows or positions change {}; weigh with '
                          'Loss(value, weight), the weight of a position being batch.mask')

    def rows(self):
        """The number of padded rows changes nothing."""
        raw, batch = jax.tree.map(lambda x: x[self.inputs['batch'].valid],
                                  (self.inputs['raw'], self.inputs['batch']))
        why = ('draw for each row by jax.random.fold_in(key, row), its row being of batch.row'
               if self.spec.takes('key') else 'the mean over rows is taken by combine')
        what = 'the number of padded rows changes'
        return self._same(self.run(batch=batch, raw=raw), f'{what} nothing', f'{what} {{}}; {why}')

    def no_rows(self):
        """A batch of padding alone: zero, no gradient, an unchanged state."""
        batch = self.inputs['batch'].replace(valid=np.zeros(example.B, bool))
        (value, (state, _, logged)), grads = self.run(batch=batch)
        parts = {'the value': float(value) != 0, 'a gradient': not _largest(grads) == 0,
                 'a metric': any(float(x) != 0 for x in logged.values()),
                 'the state': not _close(state, self.inputs['state'])}
        wrong = ', '.join(name for name, bad in parts.items() if bad)
        why = ('a state stays as it is if no row counts' if wrong == 'the state'
               else 'divide by jnp.maximum(count, 1)')
        return not wrong, (f'{wrong} changes, or is not zero, in a batch of padding alone; {why}'
                           if wrong else 'a batch of padding alone gives zero and no gradient')

    def replicas(self):
        """Replicas that see each other's rows compute the same as one device."""
        params, *rows, state = self.inputs.values()
        parts = jax.tree.map(lambda x: np.reshape(x, (example.REPLICAS, -1, *x.shape[1:])), rows)
        many = jit(jax.vmap(partial(self.step, axis=AXIS), in_axes=(None, 0, 0, None),
                            axis_name=AXIS))(params, *parts, state)
        return self._same(
            jax.tree.map(lambda x: x[0], many), f'{example.REPLICAS} replicas are one device',
            f'{example.REPLICAS} replicas and one differ in {{}}; take the keyword axis, and '
            'gather(x, axis) or total(x, axis) of tpad_jax.distributed.collectives')

    def repeats(self):
        """Two positions of one item are not a negative pair; nor are positions of padding."""
        params, raw, batch, state = self.inputs.values()
        alike = batch.replace(items=np.minimum(batch.items, 1), next=np.minimum(batch.next, 1),
                              target=np.minimum(batch.target, 1))
        if not _finite(self.run(batch=alike)):
            return False, 'not finite if every position holds the same item'
        needs = self.spec.needs
        scorers = sorted(n for n in needs if n == 'club' or n.startswith('critic.'))
        if not scorers:
            return True, 'finite if every position holds the same item'
        ids = batch.next if 'next' in needs and 'items' not in needs else batch.items
        ids = np.where(batch.mask, ids, 0).reshape(-1)
        rng, diagonal = np.random.default_rng(4), np.eye(len(ids), dtype=bool)
        scores = rng.normal(size=diagonal.shape).astype(np.float32)
        apart = (ids[:, None] != ids) & (ids[:, None] > 0) & (ids > 0)
        moved = np.where(apart | diagonal, scores, scores + rng.normal(size=diagonal.shape))

        def value(scores):
            out = self.named(params, raw, batch)
            out |= {n: x for n, x in example.numbered(raw).items() if n in needs}
            out |= dict.fromkeys(scorers, example.LookUp(scores))
            return combine((self.spec,), out, batch, state, key=jax.random.key(3),
                           heads=bound((self.spec,), params))[0]

        before, after = map(jit(value), (scores, moved.astype(np.float32)))
        if not np.isfinite(before):
            return None, 'not checked: it changes features before a critic sees them'
        if _close(before, after):
            return True, 'positions of the same item are not negatives'
        return False, (f'{float(before):.4g} becomes {float(after):.4g} by scores between '
                       'positions of the same item, or of padding: these are not negatives')

    def _same(self, other, good, bad):
        first, second = ((value, grads, state, logged) for (value, (state, _, logged)), grads
                         in (self.result, other))
        names = (f'the value ({float(first[0]):.4g} and {float(second[0]):.4g})', 'the gradient',
                 'the state', 'a metric')
        wrong = [name for name, a, b in zip(names, first, second, strict=True) if not _close(b, a)]
        return not wrong, bad.format(', '.join(wrong)) if wrong else good


def check_shape(spec: LossSpec) -> None:
    """Refuse a loss whose result has a wrong shape, if the example is enough to see it.

    Any other exception is left to the stage, whose outputs may be what the loss needs.

    Raises:
      InputError: with the loss's name, what it returned and what is expected.
    """
    try:
        trial = Trial(spec)
        if spec.needs <= trial.outputs:
            trial.shape()
    except InputError:
        raise
    except Exception:  # raised by the loss's function
        return


def _close(values, expected):
    return all(np.allclose(a, b, rtol=CLOSE, atol=CLOSE) for a, b in zip(
        jax.tree.leaves(values), jax.tree.leaves(expected), strict=True))


def _finite(tree):
    return all(np.isfinite(x).all() for x in jax.tree.leaves(tree))


def _largest(tree):
    return max((float(np.abs(x).max()) for x in jax.tree.leaves(jax.device_get(tree))), default=0.0)
