"""`--dry-run`: facts of the data and the time, and nothing is written."""

import numpy as np
import pytest

from tpad_jax import config
from tpad_jax.data import sources
from tpad_jax.job import dry_run, memory_plan


def test_ids_are_described_and_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    items = 1 + np.arange(400) % 50
    offsets = np.arange(0, 401, 4)
    np.savez('ids.npz', train_items=items, train_offsets=offsets, test_items=items,
             test_offsets=offsets)
    c = config.get_config()
    c.stages, c.rivals, c.data.npz, c.data.catalogue = 'recommend', {}, 'ids.npz', 'reviewed'
    c.model.update(recommend='', use_side=False, width=256)
    c.stage.recommend.steps = 7
    lines = dry_run.lines(c)
    assert [path.name for path in tmp_path.iterdir()] == ['ids.npz']
    assert lines[0] == 'data: ids.npz (npz)'
    assert 'lines: 200 read, 200 kept' in lines
    assert 'catalogue: reviewed: 50 items (all: 50, sessions: 50)' in lines
    assert 'session: 1, 2, 3, 4' in lines
    assert 'for 7 steps of ' in lines[-2]
    assert lines[-1].startswith('estimated time: about ')
    data = sources.load(c, tmp_path)
    operations = []
    for batch in (256, 512):
        c.stage.recommend.batch_size = batch
        operations.append(memory_plan.step_operations(
            memory_plan.subject_of(c, data.num_items, (), 20), 'recommend'))
    # all but the optimiser's part is proportional to the batch
    assert operations[1] / operations[0] == pytest.approx(2, rel=0.1)
