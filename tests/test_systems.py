"""The configs of related systems, and the frame of their benchmarks on cells made by hand."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from rich.console import Console

from benchmarks import systems
from benchmarks.systems import mllm_msr
from configs import systems as configs
from tpad_jax import config
from tpad_jax.data.synthetic import planted
from tpad_jax.job import validate
from tpad_jax.models.builtin import files


def test_every_config_is_usable_and_another_name_is_refused():
    for name in configs.SYSTEMS:
        c = configs.get_config(name)
        c.devices, c.mllm.teacher = 1, str(files.DEFAULT)  # some need them
        validate.check(c)
    assert len(configs.SYSTEMS) == 9
    with pytest.raises(ValueError, match=r'other: this system is .*Expected one of .*p2rec'):
        configs.get_config('other')


def test_cells_run_once_and_are_compared_by_session(tmp_path, monkeypatch):
    ran, rng = [], np.random.default_rng(0)
    cells = [systems.Cell(arm, 'set', world, seed) for arm in ('a', 'b') for world in (0, 1)
             for seed in (0, 1)]
    sums = {cell: rng.random(7).astype(np.float32) for cell in cells}
    weight = np.arange(1.0, 8)

    def run(cell, place):
        assert place.data == {'set': 'here'}
        ran.append(cell)
        return {'gain': (sums[cell], weight), 'bytes': 3}

    claim = systems.Test('b', 'a', 'gain', 'set')
    fake = SimpleNamespace(
        MEASURES={'gain': (100, 1), 'bytes': (1, 0)}, TESTS=[claim], DATA=('set',), run=run,
        cells=lambda: cells)
    monkeypatch.setattr(systems, 'FOLDER', tmp_path)
    monkeypatch.setattr(systems, 'module', {'fake': fake}.__getitem__)
    systems.run('fake', tmp_path, lambda: False, {})
    assert not ran  # its data set has no directory
    (tmp_path / 'fake').mkdir()
    for _ in range(2):
        systems.run('fake', tmp_path, lambda: False, {'set': 'here'})
        assert ran == cells
    (test, worlds, mean, low, high, _), = systems.judged(systems.read('fake'), [claim])
    expected = np.mean([sums[b].sum() - sums[a].sum() for a, b in zip(
        cells[:4], cells[4:], strict=True)]) / weight.sum()
    assert (test, worlds, mean) == (claim, 2, pytest.approx(expected))
    assert low < mean < high
    with Path(tmp_path, 'out').open('w') as file:
        systems.show('fake', Console(file=file, width=120))
    assert f'{100 * expected:+.1f} [' in Path(tmp_path, 'out').read_text()


def test_claims_are_about_cells_and_measures_that_exist():
    assert set(systems.names()) == configs.SYSTEMS.keys()
    for name in systems.names():
        system = systems.module(name)
        cells = list(system.cells())
        assert len({cell.file for cell in cells}) == len(cells)
        arms = {(cell.arm, cell.on) for cell in cells}
        for test in system.TESTS:
            assert {(test.arm, test.on), (test.other, test.on)} <= arms, (name, test)
            assert test.measure in system.MEASURES


def test_long_sessions_follow_the_planted_law(tmp_path):
    c = config.get_config()
    c.data.planted.update(items=60, train=200, valid=3, test=3)
    data, world = mllm_msr.load(c, tmp_path), planted.draw(0, 60)
    assert (data.train.lengths.min(), data.train.lengths.max()) == mllm_msr.LENGTHS
    ids = planted.planted_ids(world, data.asins)
    assert (data.warm[1:] == ~world.cold[ids[1:] - 1]).all()
    follow = planted.catalogue_probabilities(world, data.asins)
    begin = data.train.offsets[:-1]
    pairs = data.train.items[begin][:, None], data.train.items[begin + 1]
    assert np.log(follow(pairs[0])[np.arange(200), pairs[1]]).mean() > -np.log(60) + 0.3
