"""A full disk and a place that cannot be written to; the job after these and after damage."""

import errno
import os
import resource
import shutil
import signal
import subprocess
import time
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from ml_collections import ConfigDict
from rich.console import Console

from benchmarks import faults
from tests.job import test_job
from tests.training.test_checkpoint import assert_same, make_state, opened
from tests.training.test_damaged_checkpoints import halve
from tpad_jax import train
from tpad_jax.baselines import tune
from tpad_jax.core import log as log_lib
from tpad_jax.data import catalogue
from tpad_jax.errors import InputError
from tpad_jax.features import store
from tpad_jax.job import job
from tpad_jax.training.checkpoint import abstract
from tpad_jax.training.workdir import claim, enter, locked

config = test_job.config  # a fixture
WIDTH = 60_000  # of a state: 480 kB


def states(*steps):
    return {step: make_state(step, width=WIDTH) for step in steps}


def save(checkpoints, saved, wait=True):
    """All of them, the earlier the better."""
    for step, state in saved.items():
        checkpoints.save(step, state, {'step': step}, 1 / step, wait)


def grow(writer, many):
    """Log until something breaks."""
    for step in range(1000):
        writer.scalars('joint', step, {f'loss/{i}': step for i in range(many)})


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 1 MiB of its own, `mount(options)` to change it."""
    where = tmp_path / 'disk'
    where.mkdir()

    def mount(options):
        try:
            done = subprocess.run(['mount', '-t', 'tmpfs', '-o', options, 'tmpfs', where],
                                  capture_output=True, text=True, check=False)
        except FileNotFoundError as error:
            pytest.skip(f'no mount here: {error}')
        if done.returncode:
            pytest.skip(f'no file system can be mounted here: {done.stderr.strip()}')

    mount('size=1m')
    yield where, lambda options: mount(f'remount,{options}')
    subprocess.run(['umount', '-l', where], check=True)


@contextmanager
def no_file_above(size):
    """Files cannot grow beyond so many bytes, as under a quota."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


# --- a full disk --------------------------------------------------------------------------------


def test_a_full_disk_leaves_what_was_saved(small_disk):
    where, remount = small_disk
    saved = states(1, 2, 3, 4)
    like = abstract(saved[1])
    with (pytest.raises(InputError, match=r'checkpoint \d could not be written \(No space left on '
                                          r'device\).*make room'),
          opened(where / 'c') as checkpoints):
        save(checkpoints, saved)
    last = max(int(f.name) for f in (where / 'c').iterdir() if f.name.isdigit())
    assert 1 <= last < 4
    with opened(where / 'c') as checkpoints:
        assert_same(checkpoints.latest(like)[1], saved[last])
        assert_same(checkpoints.best(like)[1], saved[1])
    remount('size=8m')
    with opened(where / 'c') as checkpoints:
        checkpoints.save(4, saved[4], {}, wait=True)
        assert_same(checkpoints.latest(like)[1], saved[4])
    assert not list((where / 'c').glob('*tmp*'))


def test_a_quota_leaves_what_was_saved_and_is_told_at_the_next_save(tmp_path):
    saved = states(1, 2, 3)
    like = abstract(saved[1])
    with opened(tmp_path / 'c') as checkpoints:
        checkpoints.save(1, saved[1], {}, wait=True)
        first = saved.pop(1)
        with (no_file_above(4096), pytest.raises(InputError, match='checkpoint 2 could not be '
                                                                   r'written \(File too large')):
            save(checkpoints, saved, wait=False)
    with opened(tmp_path / 'c') as checkpoints:
        assert checkpoints.latest(like)[0] == 1
        assert_same(checkpoints.latest(like)[1], first)
        checkpoints.save(2, saved[2], {}, wait=True)
        assert_same(checkpoints.latest(like)[1], saved[2])


@pytest.mark.parametrize('many', [1, 30])  # the log's last line is cut, or an event
def test_a_log_that_cannot_grow_ends_the_run_and_goes_on_later(tmp_path, many):
    """It does not stand still, either: a writer's thread that a full disk ended would do that."""
    writer = log_lib.Writer(tmp_path)
    with no_file_above(4096), pytest.raises(OSError, match='too large'):
        grow(writer, many)
    with no_file_above(4096), pytest.raises(OSError, match='too large'):
        writer.close()
    assert (tmp_path / 'log.jsonl').read_bytes().endswith(b'\n') == (many > 1)
    writer = log_lib.Writer(tmp_path)
    lines = log_lib.read_log(tmp_path / 'log.jsonl')
    assert [line['step'] for line in lines] == [*range(len(lines))]
    assert len(lines) > 3
    writer.rewind('joint', 2)
    writer.scalars('joint', 3, {'loss': 1.0})
    writer.close()
    assert [line['step'] for line in log_lib.read_log(tmp_path / 'log.jsonl')] == [0, 1, 2, 3]


def test_files_that_are_mapped_say_that_the_disk_is_full(small_disk):
    """And do not end the process by a signal."""
    where, remount = small_disk
    ids, rows = np.array_split(np.arange(1, 1201), 2), np.ones((600, 128), np.float32)

    def fill():
        store.fill(where / 'store', lambda own, _: ((i, {'k': rows}) for i in own), parts=ids,
                      shapes={'k': (128,)}, made_by={'k': {'seed': 1}})

    with pytest.raises(OSError, match='No space left'):
        fill()
    remount('size=4m')
    fill()
    assert store.read(where / 'store', 'k')[1:].all()
    pictures = SimpleNamespace(fingerprint='f' * 64, num_items=500, has_image=np.ones(501, bool))
    with pytest.raises(InputError, match=r'bytes are free\. Expected 6,156,288 for'):
        catalogue._decode(pictures, 64, where / 'pixels.npy', where / 'there.npy')


def test_a_journal_that_was_cut_goes_on(tmp_path):
    def search(most):
        return tune.search(lambda p, n: {'hit@20': -p['x'] ** 2}, {'x': ('float', -1.0, 1.0)},
                             {'x': 0.5}, trials=most, seed=0, storage=tmp_path / 'journal')

    search(3)
    whole = (tmp_path / 'journal').read_bytes()
    (tmp_path / 'journal').write_bytes(whole[:-7])
    found = search(4)
    assert found == search(4)
    (tmp_path / 'journal').unlink()
    assert search(4) == found


# ml_collections reads a config file by a deprecated function
@pytest.mark.filterwarnings('ignore:the load_module:DeprecationWarning')
@pytest.mark.parametrize('number', [errno.ENOSPC, errno.EROFS, errno.ENOENT])
def test_the_command_says_it_in_a_sentence(tmp_path, monkeypatch, capsys, number):
    def run(*_, **__):
        raise OSError(number, os.strerror(number), '/runs/log.jsonl')

    monkeypatch.setattr(job, 'run', run)
    monkeypatch.setattr(train.startup, 'begin', lambda _: lambda: False)
    argv = ['--config=configs/amazon.py', f'--workdir={tmp_path}']
    if number == errno.ENOENT:  # a defect: the traceback shows the place
        with pytest.raises(OSError, match='No such file'):
            train.main(argv)
        return
    assert train.main(argv) == 2
    told = capsys.readouterr().err
    assert told.count('\n') == 1
    assert f'/runs/log.jsonl: {os.strerror(number)}; finished work is kept' in told


# --- read-only ----------------------------------------------------------------------------------


@pytest.fixture
def unprivileged(tmp_path, monkeypatch):
    """In an empty directory without write access, as a user whom that binds; root is none."""
    monkeypatch.chdir(tmp_path)  # paths relative to it need no way through its parents
    tmp_path.chmod(0o555)
    if os.geteuid():
        yield
        return
    os.setegid(65534)
    os.seteuid(65534)
    yield
    os.seteuid(0)
    os.setegid(0)


@pytest.mark.usefixtures('unprivileged')
def test_a_workdir_of_somebody_else():
    with pytest.raises(InputError, match=r'=run: cannot be created .*Permission denied.*Fix:'):
        enter(Path('run'), ConfigDict())
    with pytest.raises(InputError, match=r'=\.: cannot be written to. Fix:'):
        enter(Path('.'), ConfigDict())


def test_a_read_only_disk(small_disk):
    where, remount = small_disk
    state = make_state(1)
    with opened(where / 'c') as checkpoints:
        checkpoints.save(1, state, {})
    remount('ro')
    for workdir, told in ((where, 'cannot be written to'), (where / 'run', 'cannot be created')):
        with pytest.raises(InputError, match=f'{workdir}: {told}.*choose another --workdir'):
            enter(workdir, ConfigDict())
    with (pytest.raises(InputError, match='Read-only file system'), opened(where / 'd')):
        pass
    with (pytest.raises(InputError, match=r'checkpoint 2 could not be written \(Read-only file'),
          opened(where / 'c') as checkpoints):
        checkpoints.save(2, state, {}, wait=True)
    remount('rw')
    with opened(where / 'c') as checkpoints:
        assert_same(checkpoints.latest(abstract(state))[1], state)


# --- the benchmark ------------------------------------------------------------------------------


def test_moments_of_kills_lie_where_they_should(monkeypatch):
    monkeypatch.setattr(faults, 'FLAGS', SimpleNamespace(seed=3))
    log = [{'stage': stage, 'step': step} for stage in ('a', 'b') for step in (1, 2, 3)]
    seen = {'lines': [9.0, 9.5, 10.0, 19.0, 20.0, 20.5, 30.0], 'saves': [['a', 3], ['b', 2]]}
    drawn = [faults.moment(number, log, seen, 0) for number in range(50)]
    assert drawn == [faults.moment(number, log, seen, 0) for number in range(50)]
    by_kind = {kind: [one for one in drawn if one['kind'] == kind] for kind in faults.KINDS}
    assert {kind: len(found) for kind, found in by_kind.items()} == {
        'training': 20, 'save': 20, 'between': 10}
    assert {one['line'] for one in by_kind['training']} == {1, 2, 4, 5}
    assert {one['line'] for one in by_kind['between']} <= {0, 3, 6}
    assert {(one['stage'], one['step'], one['line']) for one in by_kind['save']} == {
        ('a', 3, 3), ('b', 2, 5)}
    took = np.diff([0, *seen['lines']])
    assert all(0 <= one['seconds'] < took[one['line']]
               for one in by_kind['training'] + by_kind['between'])


def test_steps_are_read_back_from_events(tmp_path):
    writer = log_lib.Writer(tmp_path)
    for step in (4, 5):
        writer.scalars('joint', step, {'loss': 0.5, 'optim/rate': 1.0})
    writer.scalars('joint', 6, {'valid/hit@20': 0.5})
    writer.close()
    file, = (tmp_path / 'events' / 'joint').iterdir()
    assert faults.written(file) == {4, 5}
    file.write_bytes(file.read_bytes()[:-3])  # a kill in the middle of a line
    assert faults.written(file) == {4, 5}
    file.write_bytes(file.read_bytes()[:-100])
    assert faults.written(file) == {4}
    assert faults.steps(faults.log(tmp_path)) == {'joint': 6}


@pytest.mark.parametrize('failed', [{}, {'params': ['joint/6']}])
def test_the_table_says_what_failed(failed, capsys):
    one = {'run': 2, 'seed': 0, 'hit': 'save', 'stage': 'joint', 'again': {'joint': 2},
           'failed': failed}
    assert faults.show([one], Console(width=110)) == (not failed)
    assert ('FAILED run 2, seed 0: params' in capsys.readouterr().out) == bool(failed)


# --- the job ------------------------------------------------------------------------------------


def test_a_second_run_is_refused_before_it_reads_data(config, tmp_path):
    with locked(tmp_path), pytest.raises(InputError, match='another run uses it'):
        job.run(config, tmp_path)
    assert [f.name for f in tmp_path.iterdir()] == ['run.lock']


@pytest.mark.parametrize(('changes', 'words'), [
    ({'stage__joint__train': '^nothing/'}, r"config\.stage\.joint: train='\^nothing/'"),
    ({'stage__transfer__copy': 'lora/k->lora/distil'}, r"config\.stage\.transfer\.copy='lora/k->"),
    ({'stage__joint__rates': (('^lora/knowledges', 2.0),)}, r"rates: .*'\^lora/knowledges'"),
    # the run's own recommender has this table, its trained baseline of ids has none
    ({'stage__recommend__rates': (('^recommender/fusion/feature_0', 2.0),)},
     r"config\.stage\.recommend: rates: .*feature_0"),
    ({'model__clusters': 1000, 'losses__clusters__weight': 0.1}, r'config\.model\.clusters=1000: '),
], ids=['train', 'copy', 'rates', 'rates of a trained baseline', 'clusters'])
def test_what_fits_no_parameter_is_refused_before_any_stage(config, tmp_path, changes, words):
    c = test_job.changed(config, **changes)
    with c.unlocked():
        c.rivals.id_only = {'recommend': '', 'use_side': False}
    with pytest.raises(InputError, match=words):
        job.run(c, tmp_path / 'run')
    assert not (tmp_path / 'run' / 'stages').exists()


def knowledge(c, workdir, stopping=lambda: False):
    """The job's first stage alone, and what its parameters became."""
    enter(workdir, c)
    made = job.Job(c, workdir, stopping)
    claim(workdir, c.to_dict(), made.data.fingerprint)
    made.build(('knowledge',), Console(quiet=True))
    made.writer = log_lib.Writer(workdir)
    try:
        with test_job.Recorded() as params:
            made.run_stage('knowledge')
    finally:
        made.writer.close()
    return params['knowledge'], test_job.log_of(workdir)


@pytest.mark.slow
def test_the_job_after_damage_and_a_full_disk(config, tmp_path, small_disk, capsys):
    """The same parameters and log as a run that nothing happened to."""
    c = test_job.changed(config, stages='knowledge', diagnostics=0,
                         stage__knowledge__steps=7)
    expected, log = knowledge(c, tmp_path / 'whole')

    def same(workdir):
        found, lines = knowledge(c, workdir)
        for path, x in expected.items():
            np.testing.assert_array_equal(found[path], x, err_msg=path)
        assert lines == log

    where, stage = tmp_path / 'damaged', tmp_path / 'damaged/stages/knowledge'
    with test_job.stops({'knowledge': (5, 'kill')}) as stopping, pytest.raises(test_job.Killed):
        knowledge(c, where, stopping)
    halve(stage / '4' / '_CHECKPOINT_METADATA')
    same(where)
    assert 'checkpoint 4 is damaged' in capsys.readouterr().err
    halve(stage / '7' / 'state' / 'manifest.ocdbt')  # of a stage that had ended
    same(where)
    for step in ('6', '7'):
        shutil.rmtree(stage / step)
    with pytest.raises(InputError, match='of a finished stage, but holds no checkpoint'):
        knowledge(c, where)
    (where / 'results.json').write_text('{')
    with pytest.raises(InputError, match=r'results\.json is damaged .*delete it'):
        job.run(c, where)

    disk, remount = small_disk
    remount('size=32m')
    at = iter(range(1, 8))

    def fills():
        if next(at) == 3:
            until = time.monotonic() + 300  # a thread writes it
            while not (disk / 'run/stages/knowledge/2').is_dir() and time.monotonic() < until:
                time.sleep(0.05)
            with open(disk / 'filler', 'wb', buffering=0) as file:
                while file.write(bytes(4096)) == 4096:
                    pass
        return False

    with pytest.raises((InputError, OSError), match='No space left'):
        knowledge(c, disk / 'run', fills)
    assert [f.name for f in (disk / 'run/stages/knowledge').iterdir() if f.name.isdigit()] == ['2']
    (disk / 'filler').unlink()
    same(disk / 'run')
