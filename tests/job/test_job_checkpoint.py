"""The whole job on tiny Hugging Face checkpoints; a kill while the catalogue is encoded."""

import shutil

import numpy as np
import pytest

from tests import tiny_bert, tiny_hf
from tests.job import test_job
from tpad_jax import merge
from tpad_jax.data import sources
from tpad_jax.features import store
from tpad_jax.job import job
from tpad_jax.models.hf import export, load, spec

STEPS = dict(knowledge=3, transfer=3, recommend=6, joint=2)
PARTS = {'mllm__encode_rows': 4, 'mllm__encode_part': 8, 'save_every': 100}


def config(directory, side, stages, losses=('gen_knowledge', 'distil', 'next_item')):
    """What another base does not change is tested with the small one: here few losses read it."""
    c = test_job.changed(test_job.make_config(''), stages=stages, mllm__base='',
                         mllm__checkpoint=str(directory), mllm__image_size=side, baselines='pop',
                         diagnostics=0, stage__transfer__eval_every=0, **PARTS)
    c.unlock()
    c.rivals, c.experts = {}, ''
    for name, steps in STEPS.items():
        c.stage[name].update(steps=steps, batch_size=8)
    c.stage.joint.update(eval_every=2, refresh_every=2)
    for name in {*c.losses} - {*losses}:
        c.losses[name].weight = 0.0
    return c


def small(directory):
    return test_job.changed(test_job.make_config(directory), stages='knowledge', baselines='pop',
                            diagnostics=0, stage__knowledge__steps=0, **PARTS)


@pytest.mark.slow
def test_all_stages(tmp_path):
    """Knowledge is trained below. Stage joint trains r, as the test of LLaVA does in transfer."""
    directory = tiny_hf.save('qwen3_vl', tmp_path / 'checkpoint')
    c = config(directory, 64, 'knowledge,transfer,joint', ('gen_transfer', 'distil', 'next_item'))
    c.stage.knowledge.steps, c.model.features, c.mllm.pooling = 0, 48, 'last'  # its states are k
    c.stage.transfer.weights.distil = 0.0
    found = job.run(c, tmp_path / 'run')
    assert np.isfinite(found['models']['tpad']['test']['mrr@20'])


@pytest.mark.slow
def test_a_text_encoder_reads_items_and_a_small_base_sessions(tmp_path):
    """Its vectors are the rows k, which the other stages read; joint trains its adapter."""
    directory = tiny_bert.save('bert', tmp_path / 'checkpoint')
    c = config(directory, 0, 'knowledge,transfer,joint',
               ('gen_transfer', 'align', 'distil', 'next_item'))
    c.mllm.text_length, c.model.reread, c.stage.knowledge.steps = 22, False, 0
    found = job.run(c, tmp_path / 'run')
    assert np.isfinite(found['models']['tpad']['test']['mrr@20'])
    k = np.load(tmp_path / 'run/features/knowledge/k.npy')
    expected, *_ = tiny_bert.vectors(directory, sources.load(c, tmp_path / 'run').texts[1:])
    np.testing.assert_allclose(k[1:, 0], expected, rtol=0, atol=3e-5)


@pytest.mark.slow
def test_encoded_rows_after_a_kill(base_dir, tmp_path, monkeypatch):
    """A kill leaves what is on the disk once two of five parts of the rows are there."""
    whole, killed, save, saved = tmp_path / 'whole', tmp_path / 'killed', store._save, []

    def copying(file, *rows_and_marks):
        save(file, *rows_and_marks)
        saved.append(file.relative_to(tmp_path).as_posix())
        if file == whole / 'features/knowledge/k.00001.npy':
            shutil.copytree(whole, killed)

    monkeypatch.setattr(store, '_save', copying)
    job.run(small(base_dir), whole)
    parts = sorted(p.name for p in (killed / 'features/knowledge').iterdir())
    assert 'k.npy' not in parts
    assert sum(name.startswith('k.0') for name in parts) == 2
    job.run(small(base_dir), killed)
    again = [name for name in saved if name.startswith('killed')]
    assert len([name for name in saved if name.startswith('whole')]) == len(again) + 2
    stored = sorted(p.name for p in (killed / 'features/knowledge').iterdir())
    assert stored == ['k.manifest.json', 'k.npy']
    for name in stored:
        one, two = (run / 'features/knowledge' / name for run in (whole, killed))
        assert one.read_bytes() == two.read_bytes(), name


@pytest.mark.slow
def test_a_llava_leaves_adapters_that_change_it(tmp_path):
    directory = tiny_hf.save('llava', tmp_path / 'checkpoint')
    c = config(directory, 32, 'knowledge,transfer', ('gen_knowledge', 'distil'))
    c.mllm.pooling, c.model.form = 'last', 'full'
    job.run(c, tmp_path / 'run')
    adapters = tmp_path / 'run/adapters'
    assert {p.name for p in adapters.iterdir()} == {'knowledge', 'transfer', 'distil'}
    tree, scale = export.load_adapter(adapters / 'knowledge', spec.read(directory))
    assert scale == c.model.lora_alpha / c.model.lora_rank
    assert np.abs(tree['decoder']['layers']['attention']['q']['b']).max() > 0
    out = tmp_path / 'merged'
    assert merge.main([str(directory), str(adapters / 'knowledge'), str(out)]) == 0
    found = spec.read(directory)
    before, after = (load.load(d, found, dtype='float32') for d in (directory, out))
    kernel, b = before['decoder']['layers']['down']['kernel'], tree['decoder']['layers']['down']
    np.testing.assert_allclose(after['decoder']['layers']['down']['kernel'],
                               kernel + scale * b['a'] @ b['b'], atol=1e-6)
    assert merge.main([str(directory)]) == 2
