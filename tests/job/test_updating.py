"""Updates of a run: what the MLLM reads, what continues, kills, rollback and damage."""

import json
import shutil
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import polars as pl
import pytest

from benchmarks.update import World
from tests.job.test_job import changed, make_config
from tpad_jax import export, load
from tpad_jax.core import files
from tpad_jax.errors import InputError, Stopped
from tpad_jax.features import store
from tpad_jax.job import job, updating
from tpad_jax.serving import artifact, new_items
from tpad_jax.training.workdir import locked

pytestmark = pytest.mark.slow


class Killed(BaseException):
    """Stands for a kill: nothing in the package handles it."""


@pytest.fixture(scope='module')
def made(base_dir, tmp_path_factory):
    """A finished run on raw files, and folders of two later weeks with two new items each."""
    folder = tmp_path_factory.mktemp('made')
    world = World(0, 40, 4, 2)
    for name, weeks, count in (('old', (0, 1), 60), ('2', [2], 40), ('3', [3], 40)):
        world.write(folder / name, weeks, count)
    untrained = {f'losses__{name}__weight': 0.0  # no update reads what these losses train
                 for name in ('gen_transfer', 'align', 'disentangle', 'club_fit', 'discrepancy')}
    config = changed(make_config(base_dir), rivals={},
                     baselines='', diagnostics=0, stages='knowledge,transfer,recommend',
                     stage__knowledge__steps=0, stage__transfer__eval_every=0,
                     data__raw_dir=str(folder / 'old'), data__core=1, data__valid=20,
                     data__test=20, **untrained)
    job.run(config, folder / 'run')
    return folder


def test_updates_are_killed_and_made_and_undone(made, monkeypatch):
    run, first = made / 'run', artifact.read(made / 'run')
    lists = load(run).recommend([[first.ids[1]], []], 5).items

    def as_before():
        """Nothing but unfinished files and complete updates that are not served."""
        assert artifact.read(run).directory == first.directory
        assert load(run).recommend([[first.ids[1]], []], 5).items == lists

    def killed(*args, **more):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(updating.fitting, 'fit', killed)
        with pytest.raises(Killed):
            updating.update(run, made / '2')
    assert [x.name for x in (run / 'updates').iterdir()] == ['0001.partial']
    as_before()
    with pytest.raises(Stopped, match='the artefact before is served'):
        updating.update(run, made / '2', stopping=lambda: True)
    as_before()

    read, count, write = new_items.Reader.features, [], files.write_text

    def counted(self, items, unused):
        count.extend(item['id'] for item in items)
        return read(self, items, unused)

    def before_the_switch(path, text):
        if path == run / 'current':
            raise Killed
        write(path, text)

    monkeypatch.setattr(new_items.Reader, 'features', counted)
    with monkeypatch.context() as patch:
        patch.setattr(files, 'write_text', before_the_switch)
        with pytest.raises(Killed):
            updating.update(run, made / '2')
    as_before()
    assert len(count) == len(set(count)) == 2  # the MLLM read the new items, once
    assert not set(count) & set(first.ids)
    assert sorted(x.name for x in (run / 'updates').iterdir()) == ['0001']  # complete, not served

    # as if the kill had come a moment later
    files.write_text(run / 'current', 'updates/0001\n')
    second = artifact.read(run)
    assert second.ids == [*first.ids, *count]
    assert second.directory == run / 'updates' / '0001' / 'served'
    count.clear()
    drift = updating.update(run, made / '3')  # an update of an update needs no older files
    assert (drift['items']['known'], drift['items']['new']) == (38, 2)
    assert drift['items']['share'] == pytest.approx(1 / 20)
    assert drift['sessions'] == {'known': 160, 'new': 40}
    assert set(drift['held_out']) == {'sessions', 'rows', 'before', 'after'}
    assert json.loads((run / 'updates' / '0002' / 'drift.json').read_text())['update'] == 2
    third = load(run)
    assert third.ids == [*second.ids, *count]
    assert len(count) == 2
    rows = [store.read(folder, 'r') for folder in (
        run / 'features' / 'transfer', second.directory.parent / 'features' / 'transfer',
        third.served.directory.parent / 'features' / 'transfer')]
    for old, new in pairwise(rows):
        np.testing.assert_array_equal(new[:len(old)], old)  # known items are not read again
        assert np.abs(new[len(old):]).max() > 0.01
    export._write_items(third.served, made / 'export')
    assert pl.read_parquet(made / 'export' / 'items.parquet')['features'].len() == 40
    moved = np.abs(third.served.z[1:37] - first.z[1:]).max(axis=1)
    assert (moved > 0).all()

    with pytest.raises(InputError, match='none of its sessions begins after the newest'):
        updating.update(run, made / '2')
    with monkeypatch.context() as patch, locked(run):  # by an update that may switch yet
        patch.setattr(artifact, 'read', killed)
        with pytest.raises(InputError, match='another run uses it'):
            updating.update(run, made / '3')
    shutil.copytree(run, made / 'copy')
    assert [updating.rollback(run), updating.rollback(run)] == ['updates/0001', '.']
    as_before()
    with pytest.raises(InputError, match='Expected an update'):
        updating.rollback(run)


def test_no_session_is_too_old_to_be_drawn():
    share = updating._shares(SimpleNamespace(start=np.array([0, 10**9, 2 * 10**9])), 0.5)
    assert sorted(np.random.default_rng(0).choice(3, 3, replace=False, p=share / share.sum())) == [
        0, 1, 2]


def test_a_damaged_update_is_not_rolled_back_to_and_names_the_way_out(made):
    run = made / 'copy'
    for name in ('model.safetensors', 'items.parquet'):
        file = run / 'updates' / '0001' / 'served' / name
        content = file.read_bytes()
        file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        with pytest.raises(InputError, match='damaged'):
            updating.rollback(run)
        assert artifact.place(run).parent.name == '0002'  # still served
        file.write_bytes(content)
    (run / 'updates' / '0002' / 'served' / 'reader.safetensors').unlink()
    with pytest.raises(InputError, match=r'Fix: python -m tpad_jax.update .* --rollback'):
        load(run)
    updating.rollback(run)
    assert len(load(run).ids) == 39
