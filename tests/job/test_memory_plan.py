"""What a stage asks of memory: exact parts against arrays, the estimate against the compiler."""

import re
import subprocess
import sys
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from configs import amazon
from tests import tiny_hf
from tpad_jax import config as base
from tpad_jax.distributed import devices as devices_lib
from tpad_jax.errors import InputError
from tpad_jax.job import memory_plan
from tpad_jax.models import sessions, tpad
from tpad_jax.models.hf import spec as specs, vlm
from tpad_jax.models.hf.vlm import VLM
from tpad_jax.training.profiling import live_bytes

ROOT = Path(__file__).parents[2]
GIB, ITEMS, N = 2**30, 50, 4
HALF = (0.5,) * 3
# the sizes of Qwen3-VL-2B
QWEN = specs.Spec(
    'qwen3_vl', specs.Decoder(151936, 2048, 28, 16, 8, 128, 6144, 1e-6, 5e6, False, True,
                              (24, 20, 20), True, True),
    specs.Grid('qwen3', 1024, 24, 16, 4096, 16, 2, 2048, 'gelu_pytorch_tanh', 1e-6, 48, 0, (),
               (5, 11, 17)), '', True, False, 151655, (151652,), (151653,), HALF, HALF)


def small():
    """The same family in sizes of which a program is compiled in seconds."""
    d = replace(QWEN.decoder, vocab=256, width=96, layers=4, heads=4, kv_heads=2, head_dim=24,
                hidden=288, sections=(4, 4, 4))
    v = replace(QWEN.vision, width=48, layers=3, heads=4, hidden=192, patch=8, out=96, places=8,
                deep=(0, 1))
    return replace(QWEN, decoder=d, vision=v, image_id=255, start_ids=(254,), end_ids=(253,))


@cache
def subject_of(spec, variant='', side=64):
    """A run's shapes."""
    c = amazon.get_config(variant) if variant else base.get_config()
    if not variant:
        c.model.update(features=16, width=16, lora_rank=4)
        c.mllm.text_length = 48
        for stage in ('knowledge', 'transfer', 'joint'):
            c.stage[stage].batch_size = 12
    c.data.raw_dir = 'x'  # which has no true attributes

    def build(module, c):
        return tpad.build(module, c.model, recommend=('r',), items=ITEMS, max_length=N,
                          side_sizes=(3, 3, 3), chunk=c.mllm.chunk)

    module = VLM(spec, side, 'xla', c.mllm.remat, c.mllm.dtype, before=(1, 2, 3), between=(4,),
                 end=(5, 6, 7))
    catalogue = memory_plan.rows(c, ITEMS, 3)
    shapes = jax.eval_shape(
        partial(tpad.init, spec=build(module, c), rank=c.model.lora_rank,
                targets=c.model.lora_targets, image_shape=(side, side, 3),
                text_length=c.mllm.text_length), jax.random.key(0), catalogue=catalogue)
    return memory_plan.Subject(c, build, module, memory_plan.parameter_shapes(c, shapes), catalogue,
                               devices_lib.choose('jit', 1), N, side)


def size(tree):
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def planned(value='24gib-1', items=None, variant='tiny', **changes):
    c = amazon.get_config(variant)
    c.update_from_flattened_dict(changes)
    return memory_plan.lines(c, '/nowhere', value, items)


# --- the estimate ----------------------------------------------------------------------------


def counted(fn, *shapes):
    return live_bytes(jax.make_jaxpr(fn)(*(jnp.zeros(s) for s in shapes)).jaxpr)


def test_a_product_is_kept_until_it_is_read_and_a_chain_of_cheap_ones_takes_nothing():
    cube = 4 * 100 * 100
    assert counted(lambda x: ((x + 1) * 2 - x).sum(), (100, 100)) == 0
    assert counted(lambda x: (x @ x).sum(), (100, 100)) == cube
    assert counted(lambda x: (x @ x) @ (x @ x), (100, 100)) == 2 * cube  # the result is an output
    # the first product is gone once the second is made, but for a moment there are two
    assert counted(lambda x: (((x @ x) @ x) @ x).sum(), (100, 100)) == 2 * cube


def test_what_a_backward_pass_needs_is_kept():
    cube = 4 * 50 * 50

    def loss(remat):
        def body(x, w):
            return jnp.tanh(x @ w), None
        body = jax.checkpoint(body) if remat else body
        return lambda x, w: jax.lax.scan(body, x, w)[0].sum()

    whole, again = (counted(jax.grad(loss(remat)), (50, 50), (20, 50, 50))
                    for remat in (False, True))
    assert 20 * cube <= again <= whole
    assert whole >= 40 * cube or again < whole


def check_estimate(subject, stage):
    estimate, compiled = (memory_plan.stage_plan(subject, stage, way)['temporary']
                          for way in (False, True))
    assert 0.6 < estimate / compiled < 1.6, (estimate, compiled)


@pytest.mark.slow
def test_the_estimate_is_near_the_compilers_for_an_mllm():
    check_estimate(subject_of(small()), 'knowledge')


@pytest.mark.slow
def test_the_estimate_is_near_the_compilers_under_other_settings():
    check_estimate(subject_of(small()).changed(
        **{'mllm.remat': 'full', 'stage.knowledge.accumulate': 3}), 'knowledge')


@pytest.mark.slow
@pytest.mark.parametrize(('encoder', 'chunk'), [('sr_gnn', 0), ('gce_gnn', 2048)])
def test_the_estimate_is_near_the_compilers_for_a_recommender(encoder, chunk):
    c = base.get_config()
    c.model.update(encoder=encoder, recommend='')
    c.losses.next_item.chunk = chunk
    check_estimate(recommender(c, 20_000), 'recommend')


def recommender(c, items):
    c.data.raw_dir = 'x'

    def build(module, c):
        return tpad.build(module, c.model, recommend=(), items=items, max_length=10, side_sizes=())

    catalogue = memory_plan.rows(c, items, 0)
    shapes = {'recommender': jax.eval_shape(
        partial(tpad.recommender_init, spec=build(None, c)), jax.random.key(0),
        catalogue=catalogue)}
    return memory_plan.Subject(c, build, None, memory_plan.parameter_shapes(c, shapes), catalogue,
                               devices_lib.choose('jit', 1), 10)


# --- what made the plan fail -----------------------------------------------------------------


class Mean(nn.Module):
    """An encoder as docs/add_an_encoder.md describes them."""

    max_length: int

    @nn.compact
    def __call__(self, z, items, train=False, **more):
        return nn.Dense(z.shape[-1])(z.mean(axis=1))


def test_an_added_encoder_is_planned(monkeypatch):
    monkeypatch.setitem(sessions.ENCODERS, 'mean',
                        lambda model, *, max_length, **_: Mean(max_length))
    c = base.get_config()
    c.model.encoder = 'mean'
    assert memory_plan.stage_plan(
        recommender(c, 2000), 'recommend')['temporary'] > 4 * 512 * 2000


@pytest.mark.slow
def test_a_config_without_generation_losses_is_planned():
    c = subject_of(small()).config.copy_and_resolve_references()
    del c.losses.gen_transfer
    plan = memory_plan.stage_plan(replace(subject_of(small()), config=c), 'transfer')
    assert plan['temporary'] > 0


def test_a_stage_without_steps_holds_its_parameters_alone():
    subject = subject_of(small()).changed(**{'stage.knowledge.steps': 0})
    plan = memory_plan.stage_plan(subject, 'knowledge')
    assert plan['frozen'] == size(subject.params)
    assert sum(plan.values()) == plan['frozen'] + plan['catalogue']


def test_features_from_a_file_have_the_width_of_its_header(tmp_path):
    np.save(tmp_path / 'x.npy', np.zeros((7, 13), np.float32))
    c = amazon.get_config()
    c.data.features = str(tmp_path / 'x.npy')
    assert memory_plan.rows(c, 20, 3)['given'].shape == (21, 13)
    (tmp_path / 'x.npy').write_bytes(b'no header')
    with pytest.raises(InputError, match='its width cannot be read'):
        memory_plan.rows(c, 20, 3)


def test_a_cpu_has_the_memory_of_its_machine():
    import psutil
    assert memory_plan.limit() == psutil.virtual_memory().total


# --- exact parts -----------------------------------------------------------------------------


@pytest.mark.parametrize(('stage', 'optimiser', 'moments'), [
    ('knowledge', 'adamw', 2), ('transfer', 'adam', 2), ('transfer', 'sgd', 0)])
def test_parameters_and_the_optimisers_state_are_exact(stage, optimiser, moments):
    subject = subject_of(small()).changed(**{f'stage.{stage}.optimiser': optimiser})
    plan = memory_plan.stage_plan(subject, stage)
    trained = {path: x for path, x in subject.params.items()
               if re.search(subject.config.stage[stage].train, path)}
    assert plan['trained'] == size(trained) > 0
    assert plan['frozen'] == size(subject.params) - plan['trained']
    assert 0 <= plan['optimiser'] - moments * plan['trained'] < 64  # counters


def test_the_catalogues_rows_are_those_of_earlier_stages():
    subject = subject_of(small())
    k, r = (size(subject.catalogue[name]) for name in 'kr')
    rest = size(subject.catalogue) - k - r
    found = [memory_plan.stage_plan(subject, stage)['catalogue']
             for stage in ('knowledge', 'transfer', 'recommend')]
    assert found == [rest, rest + k, rest + k + r]


@pytest.mark.parametrize('model', [2, 4])
def test_a_device_holds_the_part_that_is_placed_there(model):
    flat = subject_of(small()).params
    placed = devices_lib.choose('shard_map', 8, model).shardings(flat)
    held = sum(np.prod(placed[path].shard_shape(x.shape)) * 4 for path, x in flat.items())
    assert memory_plan._bytes(flat, model) == held < 0.95 * size(flat)


@pytest.mark.slow
def test_the_variant_fits_where_it_is_said_to():
    subject = subject_of(QWEN, 'qwen3vl_2b', 256)
    for shards in (1, 8):
        subject = replace(subject, devices=SimpleNamespace(shards=shards, model=1), positions=20)
        total = sum(memory_plan.stage_plan(subject, 'transfer').values())
        assert size(vlm.shapes(QWEN)) / 2 < total < 16 * GIB


# --- in words --------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_warning_names_the_setting_that_lowers_most_first():
    subject = subject_of(small())
    total = sum(memory_plan.stage_plan(subject, 'knowledge').values())
    assert len(memory_plan.of_run(subject, ['knowledge'], total)) == 1
    line, warning = memory_plan.of_run(subject, ['knowledge'], total - 1)
    assert line.startswith(f'Memory of knowledge: {memory_plan.gib(total)} GiB per device = ')
    assert warning.startswith('Warning: knowledge may not fit into ')
    named = re.findall(r'config\.([\w.]+)=\w+: (\d+\.\d+)', warning)
    assert [float(x) for _, x in named] == sorted(float(x) for _, x in named)
    assert {'stage.knowledge.batch_size', 'mllm.remat', 'mllm.chunk'} <= dict(named).keys()


@pytest.mark.slow
def test_it_is_printed_and_nothing_else_happens(tmp_path):
    config = f'--config={ROOT / "configs" / "amazon.py"}:tiny'
    run = subprocess.run([sys.executable, ROOT / 'launch.py', config, '--plan=v5e-8',
                          '--config.model_shards=2', '--config.stages=knowledge,recommend',
                          '--config.model.recommend=k'], cwd=tmp_path, text=True, check=False,
                         capture_output=True)
    assert run.returncode == 0, run.stderr
    first, *stages = run.stdout.splitlines()
    assert re.match(r'Planned for: 80 items \(the planted catalogue.*\), prefixes of 7, '
                    r'8 device\(s\) of 15.75 GiB', first)
    assert [line.split()[2] for line in stages] == ['knowledge:', 'recommend:']
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(('value', 'devices'), [
    ('', (None, None)), ('true', (None, None)), ('v5e-8', (round(15.75 * GIB), 8)),
    ('V6E-16', (round(31.25 * GIB), 16)), ('24gib-1', (24 * GIB, 1)),
    ('79.5gib-8', (round(79.5 * GIB), 8))])
def test_devices_that_are_not_here(value, devices):
    assert memory_plan.target(value) == devices


@pytest.mark.parametrize('value', ['v5e', 'v9-8', '24-8', 'gib-8', '1.2.3gib-8', 'v5e-0', '8'])
def test_other_devices_are_refused(value):
    with pytest.raises(InputError, match=rf'--plan={re.escape(value)}: names no devices.*24gib-8'):
        memory_plan.target(value)


@pytest.fixture
def ids(tmp_path):
    """A file of ready-made sessions over seven items."""
    items, offsets = np.tile(np.arange(1, 8), 20), np.arange(0, 141, 7)
    np.savez(tmp_path / 'ids.npz', train_items=items, train_offsets=offsets, test_items=items,
             test_offsets=offsets)
    return str(tmp_path / 'ids.npz')


@pytest.mark.slow
def test_a_catalogue_that_is_too_large_names_remedies(ids):
    changes = {'data.npz': ids, 'stages': 'recommend', 'model.recommend': '', 'rivals': {},
               'stage.recommend.batch_size': 512}
    assert len(planned('4gib-1', 7, '', **changes)) == 2
    items = 2 * 10**6
    _, line, warning = planned('4gib-1', items, '', **changes)
    table = (items + 1) * 128 * 4 / GIB
    assert float(re.search(r'trained ([\d.]+)', line)[1]) == pytest.approx(table, abs=0.005)
    assert float(re.search(r'optimiser ([\d.]+)', line)[1]) == pytest.approx(2 * table, abs=0.01)
    assert warning.startswith('Warning: recommend may not fit into 4.00 GiB. With one change it '
                              'is config.losses.next_item.chunk=4096: ')
    assert 'config.stage.recommend.batch_size=256' in warning


@pytest.mark.slow
def test_a_checkpoints_weights_are_not_read(tmp_path):
    directory = tiny_hf.save('qwen3_vl', tmp_path)
    for file in Path(directory).glob('*.safetensors'):
        file.unlink()
    found = planned('24gib-2', 5000, 'qwen3vl_2b', **{
        'mllm.checkpoint': str(directory), 'mllm.image_size': 32, 'model_shards': 2})
    assert found[0].startswith('Planned for: 5000 items (--plan_items), prefixes of 20, ')
    assert [line.split()[2] for line in found[1:]] == ['knowledge:', 'transfer:', 'recommend:']


def test_facts_of_the_data(tmp_path, ids):
    c = amazon.get_config()
    c.data.raw_dir = 'x'
    with pytest.raises(InputError, match='--plan_items=N'):
        memory_plan.facts(c, tmp_path, None)
    c.data.update(raw_dir='', npz=ids)
    assert memory_plan.facts(c, tmp_path, None) == (7, (), 20, ids)
