"""The plan of a stage's memory against the compiler's own."""

import re
from dataclasses import replace
from functools import cache, partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from configs import amazon
from tpad_jax import config as base
from tpad_jax.distributed import devices as devices_lib
from tpad_jax.job import activations, ahead, plan
from tpad_jax.models import tpad
from tpad_jax.models.hf import spec as specs
from tpad_jax.models.hf import vlm
from tpad_jax.models.hf.decoder import Decoder
from tpad_jax.models.hf.vlm import VLM
from tpad_jax.nn import linear
from tpad_jax.training import step as step_lib
from tpad_jax.types import Batch

D, ITEMS = 16, 50
HALF = (0.5,) * 3
FRAME = dict(before=(1, 2, 3), between=(4,), end=(5, 6, 7))
# the sizes of Qwen3-VL-2B and LLaVA-1.5-7B
QWEN = specs.Spec(
    'qwen3_vl', specs.Decoder(151936, 2048, 28, 16, 8, 128, 6144, 1e-6, 5e6, False, True,
                              (24, 20, 20), True, True),
    specs.Grid('qwen3', 1024, 24, 16, 4096, 16, 2, 2048, 'gelu_pytorch_tanh', 1e-6, 48, 0, (),
               (5, 11, 17)), '', True, False, 151655, (151652,), (151653,), HALF, HALF)
LLAVA = specs.Spec(
    'llava', specs.Decoder(32064, 4096, 32, 32, 32, 128, 11008, 1e-5, 1e4, False, False, (), False,
                           False),
    specs.Tower('clip', 1024, 23, 24, 16, 4096, 336, 14, 'quick_gelu', 1e-5, True, False, True),
    'gelu', True, False, 32000, (), (), HALF, HALF)
REAL = {'qwen3vl_2b': (QWEN, 256), 'llava_7b': (LLAVA, 336)}


def small(spec, width=96, layers=4, vocab=256):
    """The same family in sizes of which a program is compiled in seconds; and its images' side."""
    d = replace(spec.decoder, vocab=vocab, width=width, layers=layers, heads=4,
                kv_heads=2 if spec is QWEN else 4, head_dim=24, hidden=3 * width,
                sections=(4, 4, 4) if spec is QWEN else ())
    v = replace(spec.vision, width=48, layers=3, heads=4, hidden=192, patch=8)
    v = (replace(v, out=width, places=8, deep=(0, 1)) if spec is QWEN
         else replace(v, stored=4, image=64))
    return replace(spec, decoder=d, vision=v, image_id=vocab - 1,
                   start_ids=(vocab - 2,) if spec is QWEN else (),
                   end_ids=(vocab - 3,) if spec is QWEN else ()), 64


@cache
def shapes_of(spec, side, variant):
    """(config, all parameters, the catalogue's rows), which neither remat nor form changes."""
    c = amazon.get_config(variant) if variant else base.get_config()
    if not variant:
        c.model.update(features=D, width=D, lora_rank=4)
        c.mllm.text_length = 48
        for stage in ('knowledge', 'transfer', 'joint'):
            c.stage[stage].batch_size = 12
    rows, width = partial(jax.ShapeDtypeStruct, dtype=jnp.float32), c.model.features
    catalogue = {'k': rows((ITEMS + 1, 2, width)), 'r': rows((ITEMS + 1, 2 * width)),
                 'side': jax.ShapeDtypeStruct((ITEMS + 1, 3), jnp.int32),
                 'warm': jax.ShapeDtypeStruct((ITEMS + 1,), bool)}
    model = modules(c, VLM(spec, side, **FRAME))
    shapes = jax.eval_shape(
        lambda key, catalogue: tpad.init(
            key, model, catalogue, rank=c.model.lora_rank, targets=c.model.lora_targets,
            image_shape=(side, side, 3), text_length=c.mllm.text_length),
        jax.random.key(0), catalogue)
    return c, shapes, catalogue


def modules(c, module):
    return tpad.build(module, c.model, recommend=('r',), items=ITEMS, max_length=4,
                      side_sizes=(3, 3, 3), chunk=c.mllm.chunk)


def made(spec, side, remat='none', form='compressed', variant='', **more):
    """(config, the base, all parameters' shapes, TPAD, the catalogue's rows as shapes)."""
    c, shapes, catalogue = shapes_of(spec, side, variant)
    c = c.copy_and_resolve_references()
    if not variant:
        c.model.form = form
        c.mllm.update(remat=remat, **more)
    module = VLM(spec, side, 'xla', c.mllm.remat, c.mllm.dtype, **FRAME)
    return c, module, shapes, modules(c, module), catalogue


def planned(parts, stage='knowledge', shards=1, model=1, positions=4, **changes):
    c, module, shapes, _, catalogue = parts
    c = c.copy_and_resolve_references()
    c.update_from_flattened_dict(changes)
    return plan.stage_plan(c, stage, module, flatten_dict(shapes, sep='/'), catalogue,
                           shards=shards, model=model, positions=positions, side=module.side)


def first_state(parts, stage):
    c, _, shapes, model, _ = parts
    spec = step_lib.make_spec(c, stage, model, 0)
    return spec, jax.eval_shape(partial(step_lib.start, spec, pattern=c.stage[stage].train),
                                flatten_dict(shapes, sep='/'))


def size(tree):
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


@pytest.mark.parametrize(('stage', 'optimiser'), [
    ('knowledge', 'adamw'), ('transfer', 'adam'), ('transfer', 'sgd'), ('joint', 'adamw')])
def test_parameters_gradients_and_moments_are_exact(stage, optimiser):
    parts = made(*small(QWEN))
    config = parts[0].copy_and_resolve_references()
    config.stage[stage].optimiser = optimiser
    found = planned((config, *parts[1:]), stage)
    _, state = first_state((config, *parts[1:]), stage)
    assert found.frozen == size(state.frozen)
    assert found.trained == size(state.params)
    counters = sum(x.size * 4 for x in jax.tree.leaves(state.opt_state) if x.dtype == jnp.int32)
    # a gradient is as large as its parameter
    assert found.moments == size(state.params) + size(state.opt_state) - counters


def kept_by_scan(spec, remat, dtype):
    """Bytes per token and layer that jax itself stores of a decoder for its backward pass."""
    rows, length = 3, 40
    decoder = Decoder(spec, 'xla', remat)
    given = (jax.ShapeDtypeStruct((rows, length, spec.width), dtype),
             jax.ShapeDtypeStruct((rows, length, 3), jnp.int32),
             jax.ShapeDtypeStruct((rows, 1, length, length), bool))
    params = jax.eval_shape(decoder.init, jax.random.key(0), *given)['params']
    adapter = jax.eval_shape(
        partial(linear.init, rank=2, targets=r'(attention/[qkvo]|gate|up|down)$'),
        jax.random.key(0), params)
    # held in the computation's dtype; any other's cast copies would be kept as well
    params, adapter = jax.tree.map(lambda x: x.update(dtype=dtype), (params, adapter))

    def total(adapter, params, *given):
        return decoder.apply({'params': params, 'lora': adapter}, *given)[0].sum()

    traced = jax.make_jaxpr(jax.grad(total))(adapter, params, *given)
    forward = next(e for e in traced.jaxpr.eqns if e.primitive.name == 'scan')
    stacked = forward.outvars[forward.params['num_carry']:]
    return sum(x.aval.size * x.aval.dtype.itemsize for x in stacked) / spec.layers / rows / length


@pytest.mark.parametrize(('family', 'remat', 'dtype'), [
    (QWEN, 'none', 'float32'), (QWEN, 'none', 'bfloat16'), (LLAVA, 'none', 'float32'),
    (LLAVA, 'none', 'bfloat16'), (QWEN, 'dots', 'float32'), (QWEN, 'full', 'bfloat16')],
    ids=lambda x: getattr(x, 'family', None))
def test_what_a_layer_keeps_is_what_jax_stores(family, remat, dtype):
    spec = small(family)[0].decoder
    said = activations.layer_bytes(
        width=spec.width, inner=2 * spec.hidden, queries=spec.heads * spec.head_dim,
        keys=spec.kv_heads * spec.head_dim, length=40, size=jnp.dtype(dtype).itemsize,
        heads=spec.heads, remat=remat)
    assert said == pytest.approx(kept_by_scan(spec, remat, dtype), rel=0.08)


def compiled_bytes(parts, stage='knowledge', positions=4):
    """What the compiler sets aside for a train step beside what goes in and comes out."""
    c, module, _, _, catalogue = parts
    spec, state = first_state(parts, stage)
    rows, text, side = c.stage[stage].batch_size, c.mllm.text_length, module.side
    n = 1 if stage == 'knowledge' else positions
    u = c.stage[stage].accumulate + rows * (1 if stage == 'knowledge' else n + 1)
    shapes = dict(items=(rows, n), next=(rows, n), target=(rows,), row=(rows,), slots=(rows, n),
                  next_slots=(rows, n), ids=(u,), tokens=(u, text))
    batch = Batch(valid=jax.ShapeDtypeStruct((rows,), bool),
                  has_image=jax.ShapeDtypeStruct((u,), bool),
                  image=jax.ShapeDtypeStruct((u, side, side, 3), jnp.uint8),
                  **{k: jax.ShapeDtypeStruct(s, jnp.int32) for k, s in shapes.items()})
    step = jax.jit(partial(step_lib.train_step, spec=spec, axis=None), donate_argnums=0)
    found = step.lower(state, batch, catalogue).compile().memory_analysis()
    return found.temp_size_in_bytes


def check_estimate(parts, stage='knowledge'):
    found = planned(parts, stage)
    ratio = (found.activations + found.logits) / compiled_bytes(parts, stage)
    assert 0.7 < ratio < 1.5, ratio


@pytest.mark.parametrize('remat', ['none', 'full'])
def test_activations_and_logits_are_near_the_compilers(remat):
    check_estimate(made(*small(QWEN), remat))


@pytest.mark.slow
@pytest.mark.parametrize(('family', 'stage', 'remat', 'cut', 'more'), [
    (QWEN, 'knowledge', 'dots', 1, {}), (LLAVA, 'knowledge', 'full', 1, {'chunk': 4}),
    (QWEN, 'knowledge', 'none', 3, {})], ids=lambda x: getattr(x, 'family', None))
def test_activations_and_logits_are_near_the_compilers_elsewhere(family, stage, remat, cut, more):
    config, *rest = made(*small(family), remat, **more)
    config.stage[stage].accumulate = cut
    check_estimate((config, *rest), stage)


@pytest.mark.slow
@pytest.mark.parametrize('variant', REAL)
def test_activations_and_logits_are_near_the_compilers_in_real_sizes(variant):
    check_estimate(made(*REAL[variant], 'full', chunk=8))  # in float32, as a CPU computes anyway


@pytest.mark.slow
@pytest.mark.parametrize('chunk', [0, 2048])
def test_a_recommenders_step_is_near_the_compilers(chunk):
    c, items, n = base.get_config(), 20_000, 10
    c.data.raw_dir = 'X'
    c.losses.next_item.chunk = chunk
    catalogue = ahead.rows(c, items, 3)
    model = tpad.build(None, c.model, recommend=('r',), items=items, max_length=n,
                       side_sizes=(9, 13, 11))
    shapes = jax.eval_shape(partial(tpad.recommender_init, spec=model), jax.random.key(0),
                            catalogue=catalogue)
    flat = flatten_dict({'recommender': shapes}, sep='/')
    spec = step_lib.make_spec(c, 'recommend', model, 0)
    state = jax.eval_shape(partial(step_lib.start, spec, pattern=c.stage.recommend.train), flat)
    rows = c.stage.recommend.batch_size
    ints = {name: jax.ShapeDtypeStruct(shape, jnp.int32) for name, shape in dict(
        items=(rows, n), next=(rows, n), target=(rows,), row=(rows,)).items()}
    batch = Batch(valid=jax.ShapeDtypeStruct((rows,), bool), **ints)
    step = jax.jit(partial(step_lib.train_step, spec=spec, axis=None), donate_argnums=0)
    compiled = step.lower(state, batch, catalogue).compile().memory_analysis().temp_size_in_bytes
    found = plan.stage_plan(c, 'recommend', None, flat, catalogue, shards=1, model=1, positions=n)
    # gradients are temporary, too
    ratio = (found.activations + found.logits + found.trained) / compiled
    assert 0.7 < ratio < 1.5, ratio


def test_what_lowers_the_estimate():
    parts = made(*small(QWEN, vocab=4096))
    whole = planned(parts)
    chunked = planned(parts, **{'mllm.chunk': 3})
    assert chunked.activations < 0.5 * whole.activations
    assert (chunked.logits, chunked.frozen) == (whole.logits, whole.frozen)
    by_row = planned(parts, **{'losses.gen_knowledge.by_row': True})
    assert by_row.logits * 12 == whole.logits
    assert by_row.activations == whole.activations
    in_parts = planned(parts, **{'stage.knowledge.accumulate': 4})
    assert in_parts.activations < 0.4 * whole.activations
    half = planned(parts, shards=2)
    assert half.activations < 0.6 * whole.activations
    assert half.logits * 2 == whole.logits
    kept = [planned(made(*small(QWEN), remat)).activations for remat in ('none', 'dots', 'full')]
    assert kept == sorted(kept, reverse=True)
    assert kept[2] < 0.5 * kept[0]
    config, module, *rest = made(*small(QWEN))
    fused = planned((config, module.clone(how='cudnn'), *rest))
    assert fused.activations < kept[0]


def test_a_tower_that_trains_keeps_its_layers():
    parts = made(*small(QWEN))
    whole = planned(parts)
    more = planned(parts, **{'stage.knowledge.train': r'^(lora/knowledge|base/vision)/'})
    assert more.activations > 1.15 * whole.activations


def test_full_sessions_are_longer_than_compressed_ones():
    compressed, full = (planned(made(*small(QWEN), form=form), 'transfer', **{'mllm.chunk': 2})
                        for form in ('compressed', 'full'))
    assert full.activations > 2 * compressed.activations


def totals(variant, shards, model):
    c, module, shapes, _, catalogue = made(*REAL[variant], variant=variant)
    found = plan.of_run(c, module, shapes, catalogue, SimpleNamespace(shards=shards, model=model),
                        stages=('knowledge', 'transfer', 'recommend'), positions=20,
                        side=module.side)
    assert [line.split()[2] for line in found] == ['knowledge,', 'transfer,', 'recommend,']
    return [float(re.search(r'per device: ([\d.]+) =', line)[1]) for line in found]


@pytest.mark.parametrize(('variant', 'shards', 'model', 'room'), [
    ('qwen3vl_2b', 1, 1, 16), ('qwen3vl_2b', 8, 1, 16), ('llava_7b', 1, 1, 24),
    ('llava_7b', 1, 8, 16)])
def test_the_variants_fit_where_they_are_said_to(variant, shards, model, room):
    found = totals(variant, shards, model)
    held = 2 * vlm.size(vlm.shapes(*REAL[variant])) / 2**30  # bfloat16
    assert max(found) < room
    assert min(found) > held if model == 1 else max(found) < held


def test_a_sum_and_a_warning_where_it_does_not_fit(monkeypatch):
    c, module, shapes, _, catalogue = made(*small(QWEN))
    found = planned(made(*small(QWEN)))
    assert plan.limit() is None  # of a CPU
    assert found.total == (found.frozen + found.trained + found.moments + found.batches
                           + found.rows + found.activations + found.logits)
    devices = SimpleNamespace(shards=1, model=1)

    def said(room):
        monkeypatch.setattr(plan, 'limit', lambda: room)
        return plan.of_run(c, module, shapes, catalogue, devices,
                           stages=('knowledge', 'transfer'), positions=4, side=module.side)

    assert len(said(None)) == len(said(2**40)) == 2
    *_, warning = said(found.total)  # the knowledge stage fits, the larger transfer does not
    assert warning.startswith('Warning: transfer may not fit into ')
    for remedy in ('batch_size', 'config.mllm.remat=full', 'config.model_shards',
                   'config.mllm.chunk', 'config.mllm.dtype=bfloat16'):
        assert remedy in warning
    *_, first, second = said(found.total - 1)
    assert first.startswith('Warning: knowledge may not fit into ')
    assert second == warning.replace(plan.gib(found.total), plan.gib(found.total - 1))


def test_the_knob_that_lowers_most_is_named_first():
    c, module, shapes, _, catalogue = made(*REAL['qwen3vl_2b'], variant='qwen3vl_2b')
    c.mllm.update(param_dtype='float32', chunk=1)
    devices = SimpleNamespace(shards=4, model=1)

    def said(available):
        return plan.of_run(c, module, shapes, catalogue, devices, stages=('knowledge',),
                           positions=20, side=module.side, available=available)

    line, warning = said(2**30)
    whole = float(re.search(r'per device: ([\d.]+) =', line)[1])
    frozen = float(re.search(r'frozen ([\d.]+)', line)[1])
    named = re.findall(r'config\.([\w.]+=\w+): (\d+\.\d+)', warning)
    assert [float(x) for _, x in named] == sorted(float(x) for _, x in named)
    assert named[0][0] == 'mllm.param_dtype=bfloat16'
    assert float(named[0][1]) == pytest.approx(whole - frozen / 2, abs=0.1)
    assert 'model_shards=4' in dict(named)
    together = re.search(r'all but model_shards it is (\d+\.\d+)', warning)[1]
    assert float(together) < float(named[0][1])
    assert len(said(round(whole * 2**30) + 2**24)) == 1


def test_the_catalogues_rows_are_exact():
    """Those that the stages before have made; whole on each device."""
    parts = made(*small(QWEN))
    own = size({name: parts[4][name] for name in ('side', 'warm')})
    k, r = (size(parts[4][name]) for name in 'kr')
    found = {stage: planned(parts, stage, shards=4, model=2).rows
             for stage in ('knowledge', 'transfer', 'recommend', 'joint')}
    assert found == {'knowledge': own, 'transfer': own + k, 'recommend': own + k + r,
                     'joint': own + k + r}


@pytest.mark.parametrize('model', [2, 4])
def test_a_device_holds_the_part_that_is_placed_there(model):
    parts = made(*small(QWEN))
    flat = flatten_dict(parts[2], sep='/')
    placed = devices_lib.choose('shard_map', 8, model).shardings(flat)
    held = sum(np.prod(placed[path].shard_shape(x.shape)) * 4 for path, x in flat.items())
    found = planned(parts, 'joint', model=model)
    assert found.frozen + found.trained == held
    assert held < 0.95 * size(flat)
