"""The command that prepares tables: without Beam, with it, killed, and refused."""

import gzip
import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest

from tests.data.sources.test_amazon_blocks import ODD, TIME
from tpad_jax.core import cli
from tpad_jax.data import untrusted
from tpad_jax.data.prepare import __main__ as prepare, pipeline
from tpad_jax.data.sources import amazon_parts, amazon_tables

BOM = b'\xef\xbb\xbf'
OPTIONS = '--core=2', '--valid=20', '--test=20', '--gap_hours=12', '--bad_share=0.5'
# of the runners on one machine the one that starts no process and asks for no binary
BEAM = '--runner=FnApiRunner'


def write(folder, packed=False):
    """Raw files with every kind of odd line, byte order marks, repeated lines and a picture."""
    rng = np.random.default_rng(1)
    reviews = [json.dumps({'parent_asin': f'A{rng.integers(70)}', 'user_id': f'u{rng.integers(60)}',
                           'timestamp': TIME + int(rng.integers(1000)) * 10**6}).encode()
               for _ in range(1500)]
    items = [json.dumps({'parent_asin': f'A{k % 60}', 'title': f'Mug &amp; {k}', 'price': k / 7,
                         'store': '<b' if k % 9 else 'é'}).encode() for k in rng.permutation(90)]
    for lines in (reviews, items):
        for line in (*ODD, *(BOM + line for line in lines[:20]), *lines[20:40]):
            lines.insert(int(rng.integers(len(lines))), line)
    (folder / 'images').mkdir(parents=True)
    (folder / 'images/A7.jpg').write_bytes(b'a picture')
    (folder / 'images/Z.jpg').write_bytes(b'of no item')
    for name, lines in (('X.jsonl', reviews), ('meta_X.jsonl', items)):
        data = BOM + b'\n'.join(lines)
        if packed:  # cut short
            (folder / f'{name}.gz').write_bytes(gzip.compress(data)[:-200])
        else:
            (folder / name).write_bytes(data)
    return folder


def tree(folder):
    return {path.relative_to(folder): path.read_bytes()
            for path in folder.rglob('*') if path.is_file()}


def test_the_command_prepares_what_a_run_finds_finished(tmp_path, capsys):
    raw, tables = write(tmp_path / 'raw'), tmp_path / 'tables'
    assert prepare.main([str(raw), str(tables), *OPTIONS]) == 0
    told, before = capsys.readouterr().out, tree(tables)
    assert 'rejected, item_without_metadata: ' in told
    amazon_tables.prepare(raw, tables, gap_hours=12, core=2, min_length=2, valid=20, test=20,
                          seed=0)
    assert tree(tables) == before
    assert prepare.main([str(raw), str(tables)]) == cli.UNUSABLE
    assert 'prepared with another gap_hours (12.0 there, 24.0 now)' in capsys.readouterr().err


def test_without_beam_a_runner_is_refused(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, 'apache_beam', None)
    paths = [str(tmp_path), str(tmp_path / 'tables')]
    assert prepare.main([*paths, '--runner=DirectRunner']) == cli.UNUSABLE
    assert 'Fix: pip install "tpad_jax[beam]", or correct the name' in capsys.readouterr().err
    assert prepare.main([*paths, '--beam_option=direct_num_workers=2']) == cli.UNUSABLE
    assert 'no Beam runs' in capsys.readouterr().err


def test_lines_of_the_parts_of_a_file_are_those_of_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr(untrusted, 'MAX_LINE', 64)
    monkeypatch.setattr(amazon_parts, 'MAX_LINE', 64)
    rng, path = np.random.default_rng(2), tmp_path / 'lines'
    for _ in range(300):
        words = b'\n', BOM, b'x', b'y' * int(rng.integers(1, 200))
        path.write_bytes(b''.join(words[k] for k in rng.integers(4, size=rng.integers(1, 60))))
        step = int(rng.integers(1, 150))
        whole = list(untrusted.Lines(path)._lines())
        assert [line for part in amazon_parts.parts('items', path, str(path), step)
                for line in amazon_parts.PartLines(part)._lines()] == whole


@pytest.mark.parametrize('packed', [False, True])
def test_tables_of_beam_are_those_without_it(tmp_path, monkeypatch, capsys, packed):
    pytest.importorskip('apache_beam')
    monkeypatch.setattr(untrusted, 'MAX_LINE', 50_000)
    monkeypatch.setattr(amazon_parts, 'MAX_LINE', 50_000)
    monkeypatch.setattr(pipeline, 'PART', 7000)
    monkeypatch.setattr(pipeline, 'ROWS', 100)
    raw, told = write(tmp_path / 'raw', packed), []
    for name, flags in (('alone', ()), ('beam', (BEAM,))):
        assert prepare.main([str(raw), str(tmp_path / name), *OPTIONS, *flags]) == 0
        told.append(capsys.readouterr().out)
    assert told[0] == told[1]
    assert ('truncated_file' if packed else 'line_too_long') in told[0]
    assert tree(tmp_path / 'alone') == tree(tmp_path / 'beam')
    refusals = []
    for name, flags in (('alone', ()), ('beam', (BEAM,))):
        assert prepare.main([str(raw), str(tmp_path / f'{name}2'), *flags]) == cli.UNUSABLE
        refusals.append(capsys.readouterr().err.splitlines()[-1])
    assert refusals[0] == refusals[1]
    assert 'lines are damaged' in refusals[0]


@pytest.mark.slow
@pytest.mark.parametrize('place', ['pipeline.number_users', 'amazon_tables._session_records'])
def test_a_killed_command_leaves_no_table_that_a_run_reads(tmp_path, place):
    pytest.importorskip('apache_beam')
    raw, tables = write(tmp_path / 'raw'), tmp_path / 'tables'
    code = ('import os, signal, sys\nfrom tpad_jax.data.prepare import __main__, pipeline\n'
            f'from tpad_jax.data.sources import amazon_tables\n{place} = '
            'lambda *_: os.kill(os.getpid(), signal.SIGKILL)\nsys.exit(__main__.main())')
    killed = subprocess.run([sys.executable, '-c', code, raw, tables, *OPTIONS, BEAM], check=False,
                            env={**os.environ, 'PYTHONPATH': os.pathsep.join(sys.path)})
    assert killed.returncode == -signal.SIGKILL
    assert list(tables.rglob('*.arrow'))  # it was not killed before the work
    assert not (tables / amazon_tables.FINISHED).exists()
    assert not (tables / 'amazon/sessions/1.2.0').exists()
    for folder, flags in ((tables, (BEAM,)), (tmp_path / 'alone', ())):
        assert prepare.main([str(raw), str(folder), *OPTIONS, *flags]) == 0
    assert tree(tables) == tree(tmp_path / 'alone')
