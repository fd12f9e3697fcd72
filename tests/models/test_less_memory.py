"""What lowers the memory of a step changes no value."""

from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from tpad_jax import config as base, losses
from tpad_jax.distributed import devices as devices_lib
from tpad_jax.models import readers
from tpad_jax.models.builtin.mllm import MLLM
from tpad_jax.models.hf import spec as specs, vlm
from tpad_jax.models.hf.vlm import VLM
from tpad_jax.models.mllms import KnowledgeMLLM
from tpad_jax.nn import linear

FRAME = dict(before=(1, 2, 3), between=(4,), end=(5, 6, 7))
QWEN = specs.Spec(  # Qwen3-VL in small
    'qwen3_vl', specs.Decoder(64, 32, 2, 4, 2, 24, 96, 1e-6, 5e6, False, True, (4, 4, 4), True,
                              True),
    specs.Grid('qwen3', 48, 3, 4, 192, 8, 2, 32, 'gelu_pytorch_tanh', 1e-6, 8, 0, (), (0, 1)),
    '', True, False, 63, (62,), (61,), (0.5,) * 3, (0.5,) * 3)
SIZES = dict(vocab=23, width=16, layers=1, heads=2, hidden=24, channels=(8,), vision_layers=1)
quick = partial(jax.jit, compiler_options={'xla_backend_optimization_level': 0})


def randomly(shapes, seed=0):
    rng = np.random.default_rng(seed)

    def fill(x):
        if x.ndim < 2:
            return 1 + 0.1 * rng.normal(size=x.shape)
        return rng.normal(size=x.shape) * x.shape[-2] ** -0.5

    return jax.tree.map(lambda x: jnp.asarray(fill(x), jnp.float32), shapes)


@pytest.mark.slow
def test_items_read_in_chunks_are_the_same_items():
    knowledge = KnowledgeMLLM(MLLM(**SIZES), 8)
    model = SimpleNamespace(knowledge=knowledge, lora_scale=2.0)
    params = randomly(jax.eval_shape(
        partial(knowledge.init, method='everything'), jax.random.key(0),
        jnp.zeros((1, 4, 4, 3), jnp.uint8), jnp.ones(1, bool), jnp.ones((1, 5), jnp.int32)))
    params = {'base': params['params'].pop('base'), 'knowledge': params['params']}
    params['lora'] = {'distil': randomly(linear.init(
        jax.random.key(0), params['base'], rank=2, targets=base.get_config().model.lora_targets))}
    rng = np.random.default_rng(1)
    tokens = rng.integers(0, 23, (8, 5))
    tokens[:, 3:][rng.random((8, 2)) < 0.5] = -1
    given = (rng.integers(0, 256, (8, 4, 4, 3)).astype(np.uint8), np.arange(8) % 3 > 0,
             tokens.astype(np.int32), rng.random((8, 5)) < 0.7)
    weight = rng.normal(size=(8, 2, 8)).astype(np.float32)

    def run(chunk):
        def total(trained):
            model.chunk = chunk
            k = readers.read_items(model, {**params, **trained}, 'distil', *given)
            return (k * weight).sum(), k

        (_, k), grads = quick(jax.value_and_grad(total, has_aux=True))(
            {name: params[name] for name in ('lora', 'knowledge')})
        return k, grads

    (whole, grads), (parts, again) = run(0), run(3)
    assert whole.shape == (8, 2, 8)
    assert np.abs(whole).max() > 0.1
    np.testing.assert_allclose(parts, whole, atol=1e-5)
    assert max(np.abs(x).max() for x in jax.tree.leaves(grads['lora']['distil'])) > 0.1
    most = max(np.abs(x).max() for x in jax.tree.leaves(grads))
    jax.tree.map(partial(np.testing.assert_allclose, atol=2e-5 * most), again, grads)


def test_generation_by_row_is_the_same_loss():
    rng = np.random.default_rng(2)
    hidden = jnp.asarray(rng.normal(size=(5, 4, 8)), jnp.float32)
    table = jnp.asarray(rng.normal(size=(19, 8)), jnp.float32)
    tokens = jnp.asarray(np.where(np.arange(4) < [[4], [2], [3], [4], [4]],
                                  rng.integers(0, 19, (5, 4)), -1), jnp.int32)
    batch = SimpleNamespace(valid=jnp.arange(5) < 4)

    def run(by_row):
        def total(hidden, table):
            out = {'describe': hidden, 'describe.tokens': tokens, 'vocabulary': table}
            loss = losses.generation(out, batch, by_row=by_row)
            return (loss.value * loss.weight).sum(), loss

        return quick(jax.value_and_grad(total, argnums=(0, 1), has_aux=True))(hidden, table)

    ((_, whole), grads), ((_, rows), again) = run(False), run(True)
    assert whole.value.shape == whole.weight.shape == (5, 4)
    assert whole.weight.sum() == 13
    np.testing.assert_allclose(rows.value, whole.value, rtol=1e-5)
    np.testing.assert_array_equal(rows.weight, whole.weight)
    assert all(np.abs(g).max() > 0.1 for g in grads)
    for one, other in zip(grads, again, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


def test_a_decoder_in_parts_reads_the_same():
    spec, side = QWEN, 64
    module = VLM(spec, side, **FRAME)
    params = {'base': randomly(vlm.shapes(spec))}
    devices = devices_lib.choose('shard_map', 8, 2)
    names = 'attention/q attention/k attention/v gate up attention/o down'
    cuts = {f'base/decoder/layers/{name}/kernel': axis  # of [layers, in, out]; the rest is whole
            for name, axis in zip(names.split(), [2] * 5 + [1] * 2, strict=True)}
    where = flatten_dict(devices.shardings(params), sep='/')
    assert cuts.keys() < where.keys()
    for path, sharding in where.items():
        found = [axis for axis, name in enumerate(sharding.spec) if name == 'model']
        assert found == ([cuts[path]] if path in cuts else []), path
    tokens = jnp.asarray(np.random.default_rng(3).integers(0, 60, (4, 6)))

    @quick
    def read(params):
        def text(model):
            return model.logits(model(model.say(tokens, tokens >= 0)))

        return module.apply({'params': params['base']}, method=text)

    placed = devices.share(params)
    kernel = placed['base']['decoder']['layers']['attention']['o']['kernel']
    assert kernel.addressable_shards[0].data.shape == (2, 48, 32)
    whole = read(params)
    assert np.abs(whole).max() > 0.1
    np.testing.assert_allclose(read(placed), whole, atol=1e-5)
