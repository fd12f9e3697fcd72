"""Processes give what one process reads; what becomes of a killed one; when none is started."""

import gzip
import io
import os
import signal
import subprocess
import sys

import polars as pl
import pytest

from tests.data.prepare.test_prepare import BOM, OPTIONS, tree, write
from tests.data.sources.test_amazon_blocks import ODD
from tpad_jax.data.prepare import __main__ as prepare
from tpad_jax.data.sources import amazon, amazon_blocks, amazon_processes
from tpad_jax.data.sources.amazon_parts import Part
from tpad_jax.data.untrusted import Reason
from tpad_jax.errors import InputError


@pytest.fixture
def large(monkeypatch):
    """Files of any size are read by two processes, in parts of a few lines."""
    monkeypatch.setattr(amazon_processes, 'LARGE', 1)
    monkeypatch.setattr(amazon_processes, 'LARGE_PACKED', 1)
    monkeypatch.setattr(amazon_processes, 'PART', 7000)
    monkeypatch.setattr(os, 'sched_getaffinity', lambda _: {0, 1}, raising=False)


@pytest.mark.parametrize('packed', [False, True])
def test_tables_by_processes_are_those_of_one(tmp_path, capsys, request, packed):
    raw, told = write(tmp_path / 'raw', packed), []
    for name in ('one', 'several'):
        assert prepare.main([str(raw), str(tmp_path / name), *OPTIONS]) == 0
        assert prepare.main([str(raw), str(tmp_path / f'{name}2')]) != 0  # too much is damaged
        told.append(capsys.readouterr())
        request.getfixturevalue('large')
    assert told[0] == told[1]
    assert 'lines are damaged' in told[0].err
    assert tree(tmp_path / 'one') == tree(tmp_path / 'several')


def test_a_part_is_read_as_a_block(tmp_path):
    data = BOM + b'\n'.join(ODD)
    (tmp_path / 'X.jsonl').write_bytes(data)
    path, end = str(tmp_path / 'X.jsonl'), len(data) - 3
    with amazon_processes.Processes(1) as processes:
        for kind in ('events', 'items'):
            whole = processes.parse(data.removeprefix(BOM), kind, '2023')
            part = processes.parse(Part(kind, path, 0, end), kind, '2023')
            assert (part.number, part.rejected) == (whole.number, whole.rejected)
            assert len(part.rejected) > 5
            assert part.values[0].equals(whole.values[0])
            empty = processes.parse(Part(kind, path, end, end + 9), kind, '2023')
            assert (empty.number, empty.rejected) == (0, [])
        with pytest.raises(InputError, match=r'Y\.jsonl cannot be read'):
            processes.parse(Part('items', path.replace('X', 'Y'), 0, 9), 'items', '2023')
        assert processes.parse(data, 'events', '2023').number == whole.number  # it still lives


@pytest.mark.parametrize('kind', ['events', 'items'])
def test_blocks_of_a_part_are_joined(kind):
    blocks = [b'\n'.join(ODD[:9]), Reason('line_too_long'), b'\n'.join(ODD[9:])]
    parsed, file = [amazon_blocks.parse(block, kind, '2023') for block in blocks], io.BytesIO()
    told = amazon_processes._parsed(blocks, kind, '2023', file)
    assert told['number'] == len(ODD) + 1
    assert told['rejected'] == [(begin + position, reason)
                                for begin, part in zip((0, 9, 10), parsed, strict=True)
                                for position, reason in part.rejected]
    tables = [part.values if kind == 'events' else part.values[0] for part in parsed]
    if kind == 'items':
        assert told['unused'] == [(len(tables[0]) + row, what) for row, what in parsed[2].values[1]]
        assert told['unused']
        assert not parsed[0].values[1]
    assert pl.read_ipc(file.getvalue()).equals(pl.concat(tables))


@pytest.mark.usefixtures('large')
@pytest.mark.parametrize(('program', 'error', 'words'), [
    ('import os; os.kill(os.getpid(), 9)', InputError, 'killed by signal 9'),
    ('print("no answer"); input()', RuntimeError, 'ended with'),
    ('import sys; sys.exit(3)', RuntimeError, 'ended with 3')])
def test_a_process_that_ends_stops_the_reading(tmp_path, monkeypatch, program, error, words):
    started, start = [], subprocess.Popen
    monkeypatch.setattr(amazon_processes, 'PROGRAM', program)
    monkeypatch.setattr(subprocess, 'Popen',
                        lambda *args, **kwargs: started.append(start(*args, **kwargs))
                        or started[-1])
    with pytest.raises(error, match=words):
        amazon.read(write(tmp_path), store=tmp_path / 'store')
    assert len(started) == 2
    assert all(process.poll() is not None for process in started)


def test_processes_end_with_the_one_that_started_them(tmp_path):
    code = ('import os\nfrom tpad_jax.data.sources.amazon_processes import Processes\n'
            'some = Processes(1)\nsome.parse(b"", "items", "2023")\nos.kill(os.getpid(), 9)')
    killed = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True,
                            env={**os.environ, 'PYTHONPATH': os.pathsep.join(sys.path)},
                            timeout=200, check=False)  # it waits for all that write to its output
    assert killed.returncode == -signal.SIGKILL
    assert not killed.stderr


def test_small_files_start_no_process_and_processes_import_little(tmp_path, monkeypatch):
    raw = write(tmp_path)
    (raw / 'X.jsonl').rename(raw / 'X')
    with gzip.open(raw / 'X.jsonl.gz', 'wb') as file:
        file.write((raw / 'X').read_bytes())
    monkeypatch.setattr(amazon_processes, 'Processes', None)
    amazon.read(raw)
    code = ('import sys, tpad_jax.data.sources.amazon_processes\n'
            'print({"jax", "tensorflow_datasets", "scipy"} & {*sys.modules})')
    told = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True,
                          env={**os.environ, 'PYTHONPATH': os.pathsep.join(sys.path)})
    assert told.stdout == 'set()\n'
