"""What a finished run is served from, made without a run: random parameters, few items."""

import io
import json
from types import SimpleNamespace

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import polars as pl
from flax.traverse_util import flatten_dict, unflatten_dict
from PIL import Image

from configs import amazon
from tests import tiny_base
from tpad_jax.baselines import content_lasso
from tpad_jax.config import names
from tpad_jax.data import images, text
from tpad_jax.data.catalogue import Content, Data
from tpad_jax.data.item_graphs import companions, neighbours
from tpad_jax.data.sessions import Sessions, counts
from tpad_jax.distributed.devices import Devices
from tpad_jax.evaluation import experts
from tpad_jax.evaluation.scorers import scorer
from tpad_jax.features import bases, encoder
from tpad_jax.models import tpad
from tpad_jax.models.fusion import blank
from tpad_jax.serving import artifact
from tpad_jax.training import handover

V, N, T = 30, 6, 8  # the last five items are in no session
GIVEN = np.random.default_rng(5).normal(size=(V + 1, 12)).astype(np.float32)  # rows 'given'
# of experts: every one counts
WEIGHTS = {name: mean + 0.1 for name, (mean, *_) in experts.WEIGHTS.items()}


class Decay(nn.Module):
    """An encoder from outside: a weighted sum of the prefix, with one parameter of shape ()."""

    max_length: int
    rate: float = 0.0
    item_rate: float = 0.0

    @nn.compact
    def __call__(self, z, items, keys=None):
        decay = self.param('decay', nn.initializers.constant(0.5), ())
        age = (items > 0).sum(1, keepdims=True) - 1 - jnp.arange(items.shape[1])
        weight = jnp.where(items > 0, jnp.exp(-decay * age), 0)
        return (weight[..., None] * z).sum(1)


class Other(Decay):
    """The same with another parameter, as after a change of its code."""

    @nn.compact
    def __call__(self, z, items, keys=None):
        return z.sum(1) * self.param('scale', nn.initializers.ones, ())


def decay(model, **shared):
    """The entry of `Decay`, as a config names it."""
    return Decay(**shared)


def picture(item):
    """A PNG of SIDE pixels, another one for every item."""
    pixels = np.random.default_rng(item).integers(0, 256, (tiny_base.SIDE,) * 2 + (3,))
    out = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(out, 'PNG')
    return out.getvalue()


def fields(item):
    """What one says of a new item that is as the catalogue's item."""
    return {'title': f'item {item}', 'brand': f'brand {item % 3}', 'category': 'things',
            'description': 'red and blue'[:item], 'price': float(item % 7),
            'image': b'' if item % 5 == 0 else picture(item)}


def write(workdir, base, *, mllm=True, reads=False, mixed=False, partner=None, **model):
    """Leave a run's `served` folder in workdir, and files that say it is finished.

    Args:
      base: of tiny_base.write. mllm: False: of item ids alone. partner: config.partner.
      reads: the catalogue's rows are read by the MLLM, and not random.
      mixed: with experts; 'lasso': with that one, too.
      model: changes of config.model.

    Returns:
      job (what `served.write` reads of it), and the scorer.
    """
    c = amazon.get_config('tiny')
    c.mllm.update(base=str(base), image_size=tiny_base.SIDE, text_length=T)
    c.model.update(features=tiny_base.WIDTH, width=tiny_base.WIDTH, lora_rank=2, **model)
    c.partner = partner or {}
    data, content = _data()
    job = SimpleNamespace(workdir=workdir, config=c, data=data, final=data, max_length=N,
                          content=content if mllm else None, base=bases.read(c))
    devices = Devices('jit', tuple(jax.devices()[:1]))
    rng, made = np.random.default_rng(1), []
    near = dict(zip(tpad.GRAPHS, (*neighbours(data.train, V, window=2, most=3),
                                                *companions(data.train, V, most=3)), strict=True))
    rows = {'warm': data.warm, 'side': data.side, **near,
            'k': rng.normal(size=(V + 1, 2, tiny_base.WIDTH)).astype(np.float32),
            'r': rng.normal(size=(V + 1, 2 * tiny_base.WIDTH)).astype(np.float32), 'given': GIVEN}
    rows = jax.tree.map(jnp.asarray, rows)
    for config in [c, handover.partnered(c)][:1 + bool(partner)]:
        spec = tpad.build(job.base.module, config.model, recommend=names(config.model.recommend),
                          items=V, max_length=N, side_sizes=data.side_sizes)
        params = made[0][1] if made else _params(spec, rows, c, rng)
        own = jax.eval_shape(lambda s=spec: tpad.recommender_init(jax.random.key(0), s, rows))
        own = _filled(own, rng)
        params = params | {'recommender': {**own, 'fusion': blank(own['fusion'], rows['warm'])}}
        made.append((spec, params))
    if reads:
        rows |= encoder.Encoder(made[0][0], content, ('k', 'r'))(made[0][1])
    specs, params = zip(*made, strict=True)
    several = len(specs) > 1
    mixture = None
    if mixed:
        table = experts.tables(data.train, V, GIVEN if model.get('recommend') == 'given' else
                               rows['k'] if mllm else None, ordered=True)
        if mixed == 'lasso':
            known = content_lasso.wanted(c, data)
            table |= content_lasso.factors(known, rng.normal(size=(2, *(len(known.names),) * 2)))
        mixture = experts.mixture(experts.Fit(WEIGHTS, 0.0, 1, 0.85), table)
    scores = scorer(specs if several else specs[0], devices)(
        params if several else params[0], (rows,) * len(specs) if several else rows, mixture)
    workdir.mkdir(parents=True, exist_ok=True)
    (workdir / 'config.json').write_text('{}')
    artifact.write(job, 'tpad_recommend', scores)
    (workdir / 'results.json').write_text(json.dumps({}))
    return job, scores


def prefixes(count, seed=0):
    """Item numbers int32 [count, N], left aligned, of every length from 1 on, cold items too."""
    rng = np.random.default_rng(seed)
    found = rng.integers(1, V + 1, (count, N)).astype(np.int32)
    found[np.arange(N) >= rng.integers(1, N + 1, (count, 1))] = 0
    return found


def _data():
    rng, every = np.random.default_rng(0), range(1, V + 1)
    lengths = rng.integers(2, N, 60)
    items = rng.integers(1, V - 4, lengths.sum()).astype(np.int32)
    train = Sessions(items, np.append(0, np.cumsum(lengths)), np.arange(len(lengths)))
    warm = np.isin(np.arange(V + 1), items)
    said = {item: fields(item) for item in every}
    table = pl.DataFrame([{key: x for key, x in one.items() if key != 'image'}
                          for one in said.values()])
    side, sizes = text.side_features(table, warm)
    texts = text.item_texts(table)
    seen = np.array([False, *(bool(one['image']) for one in said.values())])
    pixels = np.zeros((V + 1, *(tiny_base.SIDE,) * 2, 3), np.uint8)
    for item in np.flatnonzero(seen):
        pixels[item] = images.read(said[item]['image'], tiny_base.SIDE)
    assert (counts(train, V) > 0).sum() > V // 2
    data = Data(asins=['', *(f'I{item}' for item in every)],
                titles=['', *table['title']], texts=texts, image_bytes=[], has_image=seen,
                side=side, side_sizes=sizes, train=train, valid=train, test=train, warm=warm,
                lines={}, audit={}, fingerprint='f', form='2018',
                vocabulary=text.side_vocabulary(table, warm),
                attributes={name: [None, *table[name]] for name in artifact.ATTRIBUTES})
    tokens = text.tokenize(texts, tiny_base.files.DEFAULT, T)
    return data, Content(image=pixels, has_image=seen, tokens=tokens, broken=0)


def _params(spec, rows, c, rng):
    shapes = jax.eval_shape(lambda: tpad.init(
        jax.random.key(0), spec, rows, rank=2, targets=c.model.lora_targets,
        image_shape=(tiny_base.SIDE, tiny_base.SIDE, 3), text_length=T))
    params = _filled(shapes, rng)
    held = bases.shapes_of(spec.knowledge, tiny_base.SIDE)
    return {**params, 'base': bases.read(c).load(held)['base']}


def _filled(shapes, rng):
    """Parameters of about the size that they begin with, all different, biases too."""
    flat = {path: (rng.normal(size=x.shape) * (x.shape[-2] ** -0.5 if x.ndim > 1 else 0.3)
                   ).astype(np.float32) for path, x in flatten_dict(shapes, sep='/').items()}
    return unflatten_dict(jax.tree.map(jnp.asarray, flat), sep='/')
