"""One pure function per loss, and `combine`, which masks, averages, weighs and logs them all.

A loss takes `(out, batch, *, axis=None, **keywords)` and returns one value per row, `[B]`, or,
where its rows are positions or tokens or it keeps a state, `Loss(value, weight, state, metrics)`.
It never calls an encoder, never averages over rows, never weighs. Every keyword that is a string
(but for those in `PLAIN`) names one of `models.tpad.forward`'s outputs; a stage checks them when it
starts. Optional keywords a loss may take: `state` (its own, from the last step) and `key` (the
step's).
"""

import importlib
import inspect
import math

import jax
import jax.numpy as jnp

from tpad_jax import collectives, softmax
from tpad_jax.errors import InputError
from tpad_jax.models import alignment, repeats
from tpad_jax.table import take
from tpad_jax.types import Loss

PROVIDED = ('axis', 'state', 'key')  # what `combine` passes by itself
PLAIN = ('dtype',)  # keywords that are strings but no names of outputs


def next_item(out, batch, *, axis=None, h='h', z='z', warm='warm', repeat='repeat', temperature=1.0,
              smoothing=0.0, chunk=0, dtype='float32'):
    """Softmax cross entropy of the target over the warm catalogue, logits <h, z>. -> [B]

    Where `h` is h_each, [B, N, D], every position predicts the item that follows. -> Loss [B, N]
    Items no training session contains are never negatives: that would teach "never recommend
    these". [paper] trains its recommender on the next item; [ours] the exclusion of cold items.

    `repeat`: what is added to the logits of the prefix's own items, [B, N, N], or None.
    `smoothing`: share of the target's mass spread evenly over the warm catalogue (Szegedy et al.
    2016). `chunk`, `dtype`: of `softmax.log_partition`, for a large catalogue.
    """
    z, warm, repeat, every = out[z], out[warm], out[repeat], out[h] / temperature
    h, target, pick, back = _predictions(every, batch)
    z, theirs = take(z, target)
    h, own = _own(h, theirs, dtype)
    count = jnp.maximum(warm.sum(), 1)
    mean = h @ ((warm.astype(z.dtype) @ z) / count) if smoothing else 0.0
    if repeat is not None:
        z, rows = take(z, batch.items)
        scores = pick(jnp.einsum('b...d,bjd->b...j', _rounded(every, dtype), _rounded(rows, dtype)))
        shift = pick(repeats.last(repeat, batch.items) if every.ndim == 2 else repeat)
        items = pick(jnp.broadcast_to(
            batch.items if every.ndim == 2 else batch.items[:, None], repeat.shape[:every.ndim]))
        own += jnp.where(items == target[:, None], shift, 0).sum(axis=1)
        shift = jnp.where(warm[items], shift, 0)
        mean += shift.sum(axis=1) / count
    if smoothing:
        own = (1 - smoothing) * own + smoothing * mean
    whole = softmax.log_partition(h, z, warm, chunk=chunk, dtype=dtype)
    if repeat is not None:
        # of the whole the prefix's items have these shares, which grow by exp(shift)
        more = (jnp.exp(scores - whole[:, None]) * jnp.expm1(shift)).sum(axis=1)
        whole += jnp.log(jnp.maximum(1 + more, 1e-6))
    return back(whole - own)


def sampled_next_item(out, batch, *, axis=None, key=None, h='h', z='z', warm='warm',
                      popularity='popularity', samples=8192, power=0.75, temperature=1.0):
    """`next_item` with its partition estimated from `samples` drawn items. -> [B], or Loss [B, N]

    Bengio and Senecal 2008. The step's key draws them once for all rows and replicas, with
    replacement, in proportion to popularity ** power over the warm items (0: uniformly). Each is
    corrected by the log of how often it is expected (Yi et al. 2019); the target stands beside them
    with its own logit, and draws of it do not count. So the partition is unbiased, and the loss is
    too low by what the logarithm makes of its variance. It does not train `model.repeats`.
    """
    z, warm = out[z], out[warm]
    h, target, _, back = _predictions(out[h], batch)
    h, own = _own(h / temperature, z[target])
    weight = softmax.weights(warm, out[popularity], power)
    drawn = softmax.draw(key, weight, samples)
    expected = softmax.log_probability(weight, drawn) + math.log(samples)
    logits = h @ z[drawn].T - expected
    counts = (drawn[None] != target[:, None]) & (drawn[None] > 0)
    logits = jnp.where(counts, logits, -jnp.inf)
    beside = jnp.where(warm[target], own, -jnp.inf)  # a cold target is in no partition
    return back(jax.nn.logsumexp(jnp.concatenate([beside[:, None], logits], axis=1), axis=1) - own)


def generation(out, batch, *, axis=None, x='describe', tokens='describe.tokens',
               table='vocabulary', by_row=False):
    """Next-token cross entropy of a text, per token. -> Loss [B, T]

    [paper] both MLLMs learn by a generation task; [ours] what they are given (see models/).
    by_row: one row's scores exist at a time, in both passes: B times less memory where the
    vocabulary is large.
    """
    hidden, tokens = out[x], out[tokens]
    words = out[table].astype(hidden.dtype)

    def surprise(hidden, tokens):
        # bfloat16 states stay so in the product, whose results are float32
        logits = jnp.matmul(hidden, words.T, preferred_element_type=jnp.float32)
        own = jnp.take_along_axis(logits, jnp.maximum(tokens, 0)[..., None], axis=-1)[..., 0]
        return jax.nn.logsumexp(logits, axis=-1) - own

    if by_row:
        again = jax.checkpoint(surprise)
        value = jax.lax.map(lambda row: again(*row), (hidden, tokens))
    else:
        value = surprise(hidden, tokens)
    weight = ((tokens >= 0) & batch.valid[:, None]).astype(jnp.float32)
    return Loss(value, weight)


def infonce(out, batch, *, axis=None, x='k', y='c', ids='items', critic='critic.align',
            temperature=1.0):
    """Minus the InfoNCE lower bound of I(x; y), negatives from every replica. -> Loss [B, N]

    van den Oord et al. 2018. Positions that hold the same item (by `ids`) are not negatives of each
    other in the loss; the estimate that is logged keeps them, or it were no bound. It cannot exceed
    the log of the candidates' number: the metric `room` is what is left.
    """
    scores, own, negative, other, weight = _pairs(out, batch, axis, x, y, ids, critic)
    bound = alignment.infonce(scores / temperature, own, negative)
    estimate = alignment.infonce(jax.lax.stop_gradient(scores) / temperature, own, other)
    room = jnp.log(other.sum(axis=1) + 1.0) - estimate
    shape = weight.shape
    return Loss(-bound.reshape(shape), weight,
                metrics={'mi': estimate.reshape(shape), 'room': room.reshape(shape)})


def mine(out, batch, *, axis=None, state=None, x='k', y='c', ids='items', critic='critic.align',
         decay=0.99):
    """Minus the Donsker-Varadhan bound of I(x; y) (MINE, Belghazi et al. 2018). -> Loss [B, N]

    The gradient of the log partition is corrected by a moving average of the partition, which is
    this loss's state: {'log_average': float32 []}.
    """
    scores, own, negative, other, weight = _pairs(out, batch, axis, x, y, ids, critic)
    partition = alignment.log_partition(scores, negative, axis)
    past = jnp.float32(-jnp.inf) if state is None else state['log_average']
    corrected, new = alignment.moving_partition(partition, past, decay)
    new = jnp.where(collectives.total(negative.sum(), axis) > 0, new, past)
    bound = alignment.donsker_varadhan(scores, own, corrected).reshape(weight.shape)
    fixed = jax.lax.stop_gradient(scores)
    estimate = alignment.donsker_varadhan(fixed, own, alignment.log_partition(fixed, other, axis))
    return Loss(-bound, weight, {'log_average': new}, {'mi': estimate.reshape(weight.shape)})


mine.initial_state = lambda: {'log_average': jnp.float32(-jnp.inf)}


def vclub(out, batch, *, axis=None, x='c', y='p', ids='items', club='club'):
    """vCLUB upper bound of I(x; y) (Cheng et al. 2020), q held fixed. -> Loss [B, N]

    An upper bound only while q(y|x) is good: see `club_fit`'s value beside it. Where the batch's
    estimate is negative, which no mutual information is, it stops pulling.
    """
    frozen = jax.lax.stop_gradient(out[club])
    scores, own, negative, other, weight = _pairs({**out, 'q': frozen}, batch, axis, x, y, ids, 'q')

    def bound(scores, against):
        count = jnp.maximum(against.sum(axis=1), 1)
        mean = jnp.where(against, scores, 0).sum(axis=1) / count
        return (scores[jnp.arange(len(own)), own] - mean).reshape(weight.shape)

    value = bound(scores, negative)
    mean = collectives.total((value * weight).sum(), axis)
    pulled = jnp.where(jax.lax.stop_gradient(mean) > 0, value, jax.lax.stop_gradient(value))
    return Loss(pulled, weight, metrics={'mi': bound(jax.lax.stop_gradient(scores), other)})


def club_fit(out, batch, *, axis=None, x='c', y='p', club='club'):
    """Minus the log-likelihood of q(y|x), on features that get no gradient. -> Loss [B, N]"""
    c, p = (jax.lax.stop_gradient(out[n]) for n in (x, y))
    shape = c.shape[:2]
    c, p = (a.reshape(-1, a.shape[-1]) for a in (c, p))
    q = jax.vmap(lambda a, b: out[club](a[None], b[None])[0, 0])
    value = -q(c, p).reshape(shape) / p.shape[-1]
    return Loss(value, batch.mask.astype(jnp.float32))


def mmd(out, batch, *, axis=None, x='r', y='t', widths=4):
    """Squared maximum mean discrepancy between two normalised clouds. -> Loss [B, N]

    Gretton et al. 2012, the biased estimate, with the mean of `widths` Gaussian kernels of
    deviation 2, 1, 1/2, ... One point of each cloud per position, so that the value does not
    depend on how a batch is divided.
    """
    weight = batch.mask.astype(jnp.float32)
    a, b = (alignment.unit(out[n]).reshape(-1, out[n].shape[-1]) for n in (x, y))
    all_a, all_b = collectives.gather(a, axis), collectives.gather(b, axis)
    everyone = collectives.gather(weight.reshape(-1), axis)
    share = everyone / jnp.maximum(everyone.sum(), 1)

    def kernel(u, v):
        square = jnp.maximum(2 - 2 * u @ v.T, 0)  # the points have length one
        parts = [jnp.exp(-square / 8)]
        for _ in range(widths - 1):
            parts.append(parts[-1] ** 4)  # half the deviation, without another exponential
        return sum(parts) / widths

    value = (kernel(a, all_a) - kernel(a, all_b) - kernel(b, all_a) + kernel(b, all_b)) @ share
    return Loss(value.reshape(weight.shape), weight)


def _predictions(h, batch):
    """What predicts what, without the padding where the batch says which places hold an item.

    Args:
      h: [B, D], or [B, N, D] for a prediction after every position.

    Returns:
      h [A, D], target int32 [A], a function that picks [A, ...] of what has a row or position for
      each h, and one that puts values [A] back as the loss returns them.
    """
    if h.ndim == 2:
        return h, batch.target, lambda x: x, lambda value: value
    shape = h.shape[:2]
    weight = batch.mask.astype(jnp.float32)
    count = math.prod(shape)
    at = batch.places
    if at is not None:
        at = jnp.where(at < 0, count, at)  # what fills up is read and thrown away

    def pick(x):
        x = x.reshape(count, *x.shape[2:])
        return x if at is None else x.at[at].get(mode='clip')

    def back(value):
        if at is not None:
            value = jnp.zeros(count).at[at].set(value, mode='drop')
        return Loss(value.reshape(shape), weight)

    return pick(h), pick(batch.next), pick, back


def _rounded(x, dtype):
    return x.astype(dtype).astype(x.dtype)


def _own(h, theirs, dtype='float32'):
    """h and the targets' logits [B], both from operands rounded as the partition's are.

    h: [B, D]. theirs: [B, D], the targets' vectors.
    """
    h = _rounded(h, dtype)
    return h, (h * _rounded(theirs, dtype)).sum(-1)


def _pairs(out, batch, axis, x, y, ids, critic):
    """Scores of this replica's positions against everyone's.

    Returns:
      scores [A, G], own int32 [A], weight [B, N], with A = B N; bool [A, G] negative (pairs of
      different items, for losses) and other (all pairs but a position with itself, for
      estimates).
    """
    weight = batch.mask
    x, y = (out[n].reshape(-1, out[n].shape[-1]) for n in (x, y))
    ids = jnp.where(weight, out[ids], 0).reshape(-1)
    everyone = collectives.gather(ids, axis)
    scores = out[critic](x, collectives.gather(y, axis))
    own = collectives.offset(x.shape[0], axis) + jnp.arange(x.shape[0])
    negative = (everyone[None] > 0) & (everyone[None] != ids[:, None]) & (ids[:, None] > 0)
    weight &= negative.any(axis=1).reshape(weight.shape)  # without one a bound says nothing
    other = (everyone[None] > 0) & (ids[:, None] > 0)
    other &= own[:, None] != jnp.arange(len(everyone))
    return scores, own, negative, other, weight.astype(jnp.float32)


def resolve(name, fn):
    """The function a config names: one of this module's, or 'package.module:function'.

    Raises:
      InputError: there is no such function.
    """
    module, _, function = fn.rpartition(':')
    try:
        found = getattr(importlib.import_module(module or __name__), function)
    except (ImportError, AttributeError) as error:
        raise InputError(f'config.losses.{name}.fn={fn!r} cannot be found ({error}); name a '
                         'function of tpad_jax/losses.py or package.module:function') from error
    if not callable(found):
        raise InputError(f'config.losses.{name}.fn={fn!r} is no function but a '
                         f'{type(found).__name__}; name a function')
    return found


def needs(name, fn, keywords):
    """Names of the outputs a loss reads: its string keywords (but `PLAIN`), by config or default.

    Raises:
      InputError: a keyword the function does not take.
    """
    signature = inspect.signature(fn).parameters
    known = [p for p in signature if p not in ('out', 'batch', *PROVIDED)]
    unknown = sorted(set(keywords) - set(known))
    if unknown:
        raise InputError(f'config.losses.{name}: {fn.__name__} takes no {", ".join(unknown)}; it '
                         'takes ' + ', '.join(known))
    merged = {**{n: p.default for n, p in signature.items()}, **keywords}
    return frozenset(v for n, v in merged.items() if isinstance(v, str) and n not in PLAIN)


def combine(losses, out, batch, state, *, axis=None, key=None):
    """Weighted sum of a stage's losses, each the mean of its values over all replicas.

    Args:
      losses: tuple of (name, function, weight, keywords).
      out, batch: what the functions read. state: {name: state} of the stateful ones.

    Returns:
      total (scalar), new state, metrics {name: scalar}: every loss unweighted, 'loss' the total,
      and each loss's own metrics as '<metric>/<name>', an estimate of mutual information as
      'mi_<name>'.

    Raises:
      InputError: a loss reads a name that `out` lacks.
    """
    total, new_state, logged = 0.0, dict(state), {}
    for i, (name, fn, weight, keywords) in enumerate(losses):
        signature = inspect.signature(fn).parameters
        absent = sorted(needs(name, fn, keywords) - out.keys())
        if absent:  # while tracing, before the first step
            raise InputError(f'config.losses.{name} reads {", ".join(absent)}, which this stage '
                             f'does not compute; it has {", ".join(sorted(out))}')
        extra = dict(keywords)
        if 'state' in signature:
            extra['state'] = state.get(name)
        if 'key' in signature:
            extra['key'] = None if key is None else jax.random.fold_in(key, i)
        result = fn(out, batch, axis=axis, **extra)
        if not isinstance(result, Loss):
            result = Loss(result, jnp.ones_like(result))
        rows = batch.valid.reshape(-1, *(1,) * (result.value.ndim - 1))
        w = jnp.where(rows, result.weight, 0)
        mass = jnp.maximum(collectives.total(w.sum(), axis), jnp.finfo(jnp.float32).tiny)

        def average(value, w=w, mass=mass):
            return collectives.total(jnp.where(w > 0, value * w, 0).sum(), axis) / mass

        logged[name] = average(jnp.where(w > 0, result.value, 0))
        total += weight * logged[name]
        for metric, value in result.metrics.items():
            label = f'mi_{name}' if metric == 'mi' else f'{metric}/{name}'
            logged[label] = average(jnp.where(w > 0, value, 0))
        if result.state is not None:
            new_state[name] = result.state
    logged['loss'] = total
    return total, new_state, jax.lax.stop_gradient(logged)
