"""A larger MLLM beside a run's own: which is taken, and whole runs that distil, blend, cluster."""

import json
import shutil
from functools import partial

import jax
import numpy as np
import pytest

from tests.job import test_job
from tpad_jax import config as base
from tpad_jax.errors import InputError
from tpad_jax.features import bases, encoder, store
from tpad_jax.job import job
from tpad_jax.models.builtin import files
from tpad_jax.models.builtin.mllm import MLLM
from tpad_jax.models.mllms import KnowledgeMLLM

SIDE, WIDTH, changed = test_job.SIDE, test_job.WIDTH, test_job.changed
config = test_job.config  # its optimiser learns in few steps


def make_base(directory, tokenizer, side=SIDE, features=WIDTH, **sizes):
    """A base of random parameters, wider than the student's and with four times its cells."""
    directory.mkdir(exist_ok=True)
    for file in tokenizer.glob('tokenizer*.json'):
        shutil.copy(file, directory)
    sizes = dict(vocab=files.load_sizes()['vocab'], width=24, layers=2, heads=2, hidden=32,
                 channels=(8,), vision_layers=1) | sizes
    model = KnowledgeMLLM(MLLM(**sizes), features)
    shapes = dict(jax.eval_shape(
        partial(model.init, method='everything'), jax.random.key(0),
        np.zeros((1, side, side, 3), np.uint8), np.ones(1, bool),
        np.ones((1, 8), np.int32))['params'])
    rng = np.random.default_rng(1)
    params = jax.tree.map(lambda x: np.asarray(
        rng.normal(size=x.shape) * x.shape[-2] ** -0.5 if x.ndim > 1 else np.ones(x.shape)), shapes)
    files.save(directory, {**sizes, 'channels': list(sizes['channels']), 'image_size': side,
                                'features': features},
                    {'base': params.pop('base'), 'knowledge': params})
    return directory


def read(directory, **mllm):
    c = base.get_config()
    c.mllm.update(teacher=str(directory), **mllm)
    return bases.teacher(c, bases.read(c))


def test_which_teachers_are_taken(tmp_path):
    """Another base with the student's tokenizer and images; its sizes are its own."""
    assert read('') is None
    directory = make_base(tmp_path / 'one', files.DEFAULT, side=32, features=10, layers=1,
                          width=WIDTH)
    found = read(directory)
    assert found.reader.base.width == WIDTH
    params = found.load(None)
    assert jax.tree.map(np.shape, params) == jax.tree.map(np.shape, found.shapes)
    with pytest.raises(InputError, match=r"teacher_dtype='bfloat16': a small base is float32"):
        read(directory, teacher_dtype='bfloat16')
    with pytest.raises(InputError, match=r"teacher='/nowhere': no config\.json"):
        read('/nowhere')
    sizes = (directory / 'config.json').read_text()
    (directory / 'config.json').write_text(sizes.replace('"image_size": 32', '"image_size": 16'))
    with pytest.raises(InputError, match=r'reads images of 16 pixels\. Expected .* 32 pixels'):
        read(directory)
    (directory / 'config.json').write_text(sizes)
    file = directory / 'tokenizer.json'
    words = json.loads(file.read_text())
    words['model']['merges'] = words['model']['merges'][:-1]
    file.write_text(json.dumps(words))
    with pytest.raises(InputError, match=r'tokenizer differs from .* Fix: choose a teacher'):
        read(directory)


@pytest.mark.slow
def test_a_run_with_a_teacher_and_clusters(config, base_dir, tmp_path):
    """Every loss of distillation at once; what they teach is what they are given weight for."""
    teacher = make_base(tmp_path / 'teacher', base_dir)
    weights = {f'losses__{n}__weight': 1.0 for n in (
        'teach_text', 'teach_image', 'teach_relations', 'mdist_text', 'mdist_image', 'rdist',
        'clusters')} | {f'losses__{n}__weight': 0.0 for n in (
            'gen_knowledge', 'gen_transfer', 'align', 'disentangle', 'club_fit', 'discrepancy')}
    c = changed(config, save_every=100, stages='knowledge,transfer', mllm__teacher=str(teacher),
                skip_not_finite=0,
                stage__transfer__rates=(), model__clusters=4, model__clusters_of='z',
                stage__knowledge__steps=30,
                stage__knowledge__learning_rate=0.02, stage__transfer__learning_rate=0.02,
                diagnostics=0, baselines='pop', losses__mdist_text__kind='js',
                losses__teach_text__by_row=True, losses__teach_image__kind='skewed', **weights)
    with test_job.Recorded() as params:
        job.run(c, tmp_path / 'run')
    log = test_job.log_of(tmp_path / 'run')
    for name in ('teach_text', 'teach_image', 'teach_relations'):
        value = [log['knowledge', step, 'train'][name] for step in range(1, 31)]
        assert 0 < np.mean(value[-10:]) < 0.95 * np.mean(value[:5])
    begun, later = log['transfer', 1, 'train'], log['transfer', 5, 'train']
    for name in ('mdist_text', 'mdist_image', 'rdist'):
        # 'distil' begins as a copy of 'knowledge'
        assert abs(begun[name]) < 1e-6
        assert later[name] > 10 * abs(begun[name])
    assert 0 < later['clusters'] < 5
    assert np.abs(params['transfer']['transfer/to_clusters/bias']).max() > 1e-3  # it was 0
    assert not any(path.startswith('teacher') for run in params.values() for path in run)


@pytest.mark.slow
def test_a_run_that_blends_adapters(base_dir, tmp_path):
    """r has a feature per modality."""
    off = {f'losses__{n}__weight': 0.0 for n in (
        'distil', 'discrepancy', 'align', 'disentangle', 'club_fit')}
    c = changed(test_job.make_config(base_dir), save_every=100, stages='knowledge,transfer',
                model__blend__kind='ties', stage__transfer__eval_every=0, diagnostics=0,
                baselines='pop', **off)
    c.rivals, c.experts = {}, ''
    ranks = []
    leave = encoder.Encoder.leave

    def seen(self, params, *args, **more):
        if self.names == ('r',):
            ranks.append({x.shape[-1] for p, x in jax.tree_util.tree_leaves_with_path(
                params['lora']['distil']) if p[-1].key == 'a'})
        return leave(self, params, *args, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encoder.Encoder, 'leave', seen)
        job.run(c, tmp_path / 'run')
    assert ranks[0] >= {WIDTH}
    r, k = (np.asarray(store.read(tmp_path / 'run/features' / stage, name))
            for stage, name in (('transfer', 'r'), ('knowledge', 'k')))
    assert r.shape == k.shape == (41, 2, WIDTH)
    assert np.abs(r - k)[1:].max() > 1e-3


@pytest.mark.slow
def test_checkpoints_of_two_families_teach_each_other(tmp_path):
    """Qwen3-VL from Qwen2.5-VL; a decoder in bfloat16 with its own cells, frame and width."""
    pytest.importorskip('torch')
    from tests import tiny_hf
    from tests.job import test_job_checkpoint

    student, teacher = (tiny_hf.save(name, tmp_path / name) for name in ('qwen3_vl', 'qwen2_5_vl'))
    c = test_job_checkpoint.config(student, 48, 'knowledge', losses=())
    c.mllm.update(teacher=str(teacher), teacher_dtype='bfloat16')
    for name in ('teach_text', 'teach_image', 'teach_relations'):
        c.losses[name].weight = 1.0
    job.run(c, tmp_path / 'run')
    line = test_job.log_of(tmp_path / 'run')['knowledge', 3, 'train']
    assert all(0 < line[n] < 20 for n in ('teach_text', 'teach_image', 'teach_relations'))
