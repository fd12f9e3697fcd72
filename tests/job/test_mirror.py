"""A workdir's copy: whole, cut short anywhere, damaged, of another run, out of reach."""

import json
import os
import shutil
import threading
import time
from pathlib import Path

import pytest
from etils import epath

from tpad_jax.errors import InputError, Stopped
from tpad_jax.job import mirror

FIRST = {'config.json': '{"seed": 0}', 'log.jsonl': 'one\n', 'stages/transfer/2/a': 'aa',
         'stages/transfer/2/metadata': 'mm', 'features/knowledge/k.npy': 'kk',
         'events/transfer/file': 'e'}
NEVER = {'raw/meta.json.gz': 'r', 'data/items': 'd', 'profile/joint/trace': 't',
         'stages/transfer/4.orbax-checkpoint-tmp-7/a': 'half', 'features/knowledge/r.npy.part': 'x',
         'features/knowledge/r.npy.partial': 'x', 'stages/transfer/6.partial/a': 'half',
         'stages/transfer/2-old.partial/a': 'half'}
THEN = {'log.jsonl': 'one\ntwo\n', 'stages/transfer/4/a': 'bb', 'stages/transfer/4/metadata': 'nn',
        'events/transfer/file': 'ee', 'results.json': '{}'}


def lay(root, files):
    for name, text in files.items():
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)


def there(root):
    return {p.relative_to(root).as_posix(): p.read_text() for p in root.rglob('*') if p.is_file()}


@pytest.fixture
def run(tmp_path):
    """A workdir, and a mirror that has its first files."""
    lay(tmp_path / 'run', {**FIRST, **NEVER})
    one = mirror.Mirror(tmp_path / 'run', str(tmp_path / 'mirror'))
    one.push()
    return one


def fetched(tmp_path, name='new'):
    where = tmp_path / name
    mirror.Mirror(where, str(tmp_path / 'mirror')).fetch()
    return there(where)


def test_an_empty_workdir_gets_what_was_copied_and_only_that(tmp_path, run):
    assert fetched(tmp_path) == FIRST


def test_what_changed_is_copied_and_what_is_gone_is_deleted(tmp_path, run, monkeypatch):
    lay(tmp_path / 'run', THEN)
    shutil.rmtree(tmp_path / 'run/stages/transfer/2')
    written, kind = [], type(epath.Path(tmp_path))
    monkeypatch.setattr(kind, 'write_bytes', lambda self, data: (
        written.append(Path(self).relative_to(tmp_path / 'mirror').as_posix()),
        Path(self).write_bytes(data))[1])
    run.push()
    assert sorted(written) == sorted(f'{name}.partial' for name in (*THEN, 'mirror.json'))
    left = {n: x for n, x in FIRST.items() if not n.startswith('stages/transfer/2/')}
    assert fetched(tmp_path) == {**left, **THEN}
    assert not (tmp_path / 'mirror/stages/transfer/2/a').exists()
    del written[:]
    run.push()
    assert not written


@pytest.mark.parametrize('cut', range(14))
def test_a_copy_cut_short_gives_the_state_before_or_behind(tmp_path, run, monkeypatch, cut, capsys):
    """A kill behind any number of writes and deletions: no step is half there."""
    lay(tmp_path / 'run', THEN)
    shutil.rmtree(tmp_path / 'run/stages/transfer/2')
    kind, left = type(epath.Path(tmp_path)), [cut]

    def counted(original):
        def one(self, *args, **kwargs):
            if not left[0]:
                if args and isinstance(args[0], bytes):  # a write is cut in its middle
                    Path(self).write_bytes(args[0][:3])
                raise KeyboardInterrupt
            left[0] -= 1
            return original(self, *args, **kwargs)
        return one

    for owner, name in ((kind, 'write_bytes'), (os, 'replace'), (kind, 'unlink')):
        monkeypatch.setattr(owner, name, counted(getattr(owner, name)))
    with pytest.raises(KeyboardInterrupt):
        run.push()
    monkeypatch.undo()
    found = fetched(tmp_path)
    assert found['config.json'] == FIRST['config.json']
    assert found['log.jsonl'] in (FIRST['log.jsonl'], THEN['log.jsonl'])
    steps = {name.split('/')[2] for name in found if name.startswith('stages')}
    assert len(steps) == 1
    expected = FIRST if steps == {'2'} else THEN
    assert {n: x for n, x in found.items() if n.startswith('stages')} == {
        n: x for n, x in expected.items() if n.startswith('stages')}
    again = mirror.Mirror(tmp_path / 'run', str(tmp_path / 'mirror'))
    again.fetch()
    again.push()  # the run itself goes on copying
    assert fetched(tmp_path, 'later') == {
        **{n: x for n, x in FIRST.items() if not n.startswith('stages/transfer/2/')}, **THEN}


def test_a_checkpoint_that_is_damaged_in_the_mirror_is_left_out_whole(tmp_path, run, capsys):
    lay(tmp_path / 'run', THEN)
    run.push()
    (tmp_path / 'mirror/stages/transfer/4/metadata').write_text('n')
    found = fetched(tmp_path)
    assert not any(name.startswith('stages/transfer/4/') for name in found)
    assert found['stages/transfer/2/a'] == 'aa'
    told = capsys.readouterr().err
    assert '1 files' in told
    assert 'stages/transfer/4/metadata' in told


def test_the_mirror_of_another_run_is_not_written_over(tmp_path, run):
    lay(tmp_path / 'other', {'config.json': '{"seed": 1}'})
    with pytest.raises(InputError, match='the mirror of another run'):
        mirror.Mirror(tmp_path / 'other', str(tmp_path / 'mirror')).fetch()


@pytest.mark.parametrize(('text', 'told'), [
    ('{"a": ', 'is damaged'), ('{"../out": [1, "x"]}', 'is outside a workdir'),
    ('{"/etc/passwd": [1, "x"]}', 'is outside a workdir')])
def test_a_manifest_that_is_none_is_refused(tmp_path, text, told):
    lay(tmp_path / 'mirror', {'mirror.json': text})
    with pytest.raises(InputError, match=told):
        fetched(tmp_path)
    assert not (tmp_path / 'out').exists()


def test_it_is_kept_while_a_run_goes_on_and_whole_behind_it(tmp_path):
    where, workdir = tmp_path / 'mirror', tmp_path / 'run'

    def stopped():
        with mirror.kept(workdir, str(where), every=0.01):
            lay(workdir, FIRST)
            until = time.monotonic() + 60
            while not (where / 'mirror.json').exists():
                assert time.monotonic() < until
                time.sleep(0.01)
            lay(workdir, THEN)
            raise Stopped('stopped')

    with pytest.raises(Stopped):
        stopped()
    assert json.loads((where / 'mirror.json').read_text()).keys() == {**FIRST, **THEN}.keys()
    with mirror.kept(tmp_path / 'new', str(where)):
        assert there(tmp_path / 'new') == {**FIRST, **THEN}


def test_out_of_reach_it_warns_once_and_is_an_error_in_the_end(tmp_path, monkeypatch, capsys):
    lay(tmp_path, {'file': ''})
    where = tmp_path / 'file/mirror'
    push, tried = mirror.Mirror.push, threading.Semaphore(0)

    def counted(self):
        tried.release()
        push(self)

    monkeypatch.setattr(mirror.Mirror, 'push', counted)

    def ended():
        with mirror.kept(tmp_path / 'run', str(where), every=0.001):
            lay(tmp_path / 'run', FIRST)
            for _ in range(4):
                assert tried.acquire(timeout=60)

    with pytest.raises(InputError, match='file/mirror'):
        ended()
    assert capsys.readouterr().err.count('could not be written') == 1
    with pytest.raises(Stopped), mirror.kept(tmp_path / 'run', str(where)):
        raise Stopped('stopped')  # which the command says, and the status
    assert 'file/mirror' in capsys.readouterr().err
