"""`python -m tpad_jax.recommend`: sessions from files and pipes, and lines that are none."""

import gzip
import json
import re
import subprocess
import sys

import polars as pl
import pytest

import tpad_jax
from tests import tiny_served
from tpad_jax import recommend
from tpad_jax.core import startup
from tpad_jax.serving import calls


@pytest.fixture(scope='module')
def run(served_run):
    return served_run


@pytest.fixture
def command(run, monkeypatch, capfd):
    """argv behind the run -> exit status, standard output, standard error."""
    def call(*argv, stopping=lambda: False):
        monkeypatch.setattr(startup, 'begin', lambda: stopping)
        status = recommend.main([str(run), *map(str, argv)])
        return status, *capfd.readouterr()

    return call


SESSIONS = [[f'I{n}' for n in row if n] for row in tiny_served.prefixes(calls.SIZES[-1] + 9)]


def write(file, sessions=SESSIONS, broken=()):
    """A JSONL file of sessions, every second with an id, and broken lines at their places."""
    lines = [json.dumps({'session': s} | ({'id': f's{n}', 'more': 1} if n % 2 else {}))
             for n, s in enumerate(sessions)]
    for place, line in sorted(broken):
        lines.insert(place, line)
    opened = gzip.open(file, 'wt') if file.suffix == '.gz' else file.open('w')
    with opened:
        opened.write('\n'.join(lines) + '\n')
    return file


@pytest.mark.parametrize('name', ['sessions.jsonl', 'sessions.jsonl.gz'])
def test_answers_are_those_of_the_object(command, run, tmp_path, name):
    status, out, told = command('--sessions', write(tmp_path / name), '--k', 5, '--scores')
    found = [json.loads(line) for line in out.splitlines()]
    like = tpad_jax.load(run).recommend(SESSIONS, k=5)
    assert status == 0
    assert [one['items'] for one in found] == like.items
    assert [one['scores'] for one in found] == [
        pytest.approx(row, rel=1e-5) for row in like.scores.tolist()]
    assert [one.get('id', one.get('line')) for one in found] == [
        f's{n}' if n % 2 else n + 1 for n in range(len(SESSIONS))]
    assert f'{len(SESSIONS)} sessions answered, 0 of them empty, 0 unknown item ids' in told


def test_conditions_of_a_file_and_seen_items_of_a_line(command, run, tmp_path):
    shop, file = tpad_jax.load(run), tmp_path / 'sessions.jsonl'
    conditions = {'price': [1, 4], 'most_per_brand': 2, 'unseen': True}
    (tmp_path / 'conditions.json').write_text(json.dumps(conditions))
    sessions, seen = [['I1', 'I2'], [], ['I3']], [['I8', 'other'], [], ['I9']]
    file.write_text('\n'.join(json.dumps({'session': s, 'seen': x})
                              for s, x in zip(sessions, seen, strict=True)))
    argv = '--sessions', file, '--k', 9, '--explain', '--scores'
    status, out, _ = command(*argv, '--conditions', tmp_path / 'conditions.json')
    found = [json.loads(line) for line in out.splitlines()]
    like = shop.recommend(sessions, 9, conditions, seen=seen, explain=True)
    assert status == 0
    assert [x['items'] for x in found] == like.items
    assert [x['why'] for x in found] == like.why
    assert len(found[0]['scores']) == len(found[0]['items']) < 9
    assert found[1]['empty']
    assert len(found[1]['items']) == 6
    for text, said in (('{', 'it cannot be read'), ('{"price": 3}', r'conditions\.price=3: it')):
        (tmp_path / 'conditions.json').write_text(text)
        status, _, told = command(*argv, '--conditions', tmp_path / 'conditions.json')
        assert status == 2
        assert re.search(said, told)


def test_added_items_are_known(command, run, tmp_path):
    shop, file = tpad_jax.load(run), tmp_path / 'added.safetensors'
    shop.add_items([{'id': 'new', **tiny_served.fields(3)}])
    shop.save_added(file)
    sessions = write(tmp_path / 'sessions.jsonl', [['new'], ['I1', 'new']])
    status, out, told = command('--sessions', sessions, '--k', 31, '--added', file)
    assert status == 0
    assert '0 unknown item ids' in told
    assert [json.loads(line)['items'] for line in out.splitlines()] == shop.recommend(
        [['new'], ['I1', 'new']], k=31).items
    status, _, told = command('--sessions', sessions, '--added', tmp_path / 'none')
    assert status == 2
    assert 'does not hold added items' in told


def test_a_small_catalogue_lowers_the_default_length_only(command, run, tmp_path, monkeypatch):
    sessions = write(tmp_path / 'sessions.jsonl', SESSIONS[:2])
    total = len(tpad_jax.load(run).ids) - 1
    monkeypatch.setattr(recommend, 'K', total + 1)
    status, out, _ = command('--sessions', sessions)
    assert status == 0
    assert [len(json.loads(line)['items']) for line in out.splitlines()] == [total] * 2
    status, _, told = command('--sessions', sessions, '--k', total + 1)
    assert status == 2
    assert f'k={total + 1} is out of bounds' in told


def test_lines_that_are_no_sessions(command, tmp_path):
    broken = [(1, 'garbage'), (3, '{"session": "I1"}'), (4, ''), (5, '{"session": ["I1", null]}'),
              (6, '{"session": ["I1", "no", 7]}'), (8, '{"session": [], "id": {"a": 1}}'),
              (9, '[]')]
    file = tmp_path / 'sessions.jsonl'
    write(file, SESSIONS[:30], broken)
    with file.open('ab') as more:
        more.write(b'\xff\xfe\n')
    status, out, told = command('--sessions', file, '--k', 3, '--bad_share', 0.2)
    found = [json.loads(line) for line in out.splitlines()]
    assert status == 0
    assert len(found) == 32
    for line, reason in ((2, 'bad_json'), (4, 'no_session'), (6, 'session_of_no_item_ids'),
                         (10, 'bad_json'), (38, 'bad_encoding')):
        assert f'line {line} is skipped: {reason}' in told
    assert '5 lines skipped' in told
    assert 'line 5 ' not in told  # a blank line is no damage
    assert (found[2]['line'], found[2]['unknown']) == (7, ['no', '7'])
    assert (found[4]['id'], found[4]['empty']) == ({'a': 1}, True)


def test_tables_in_and_out(command, run, tmp_path):
    given, out = tmp_path / 'sessions.parquet', tmp_path / 'answers.parquet'
    sessions = [*SESSIONS[:20], None, [], ['I1', 'no']]
    pl.DataFrame({'id': range(len(sessions)), 'session': sessions}).write_parquet(given)
    status, printed, told = command('--sessions', given, '--k', 4, '--out', out)
    assert (status, printed) == (0, '')
    assert 'line 21 is skipped: no_session' in told
    table = pl.read_parquet(out)
    like = tpad_jax.load(run).recommend([*SESSIONS[:20], [], ['I1', 'no']], k=4)
    assert table['items'].to_list() == like.items
    assert table['id'].to_list() == [str(n) for n in range(len(sessions)) if n != 20]
    assert table['line'].to_list() == [n + 1 for n in range(len(sessions)) if n != 20]
    assert table['unknown'].to_list() == like.unknown
    assert table['empty'].to_list() == like.empty.tolist()
    assert table['scores'][0].to_list() == pytest.approx(like.scores[0].tolist())
    numbers = tmp_path / 'numbers.parquet'
    pl.DataFrame({'session': [[1, 2]]}).write_parquet(numbers)
    assert command('--sessions', numbers, '--k', 4)[2].count('2 unknown item ids') == 1


def test_too_many_lines_left_out(command, tmp_path):
    file = write(tmp_path / 'sessions.jsonl', SESSIONS[:20], [(0, '{')])
    out = tmp_path / 'out.jsonl'
    status, _, told = command('--sessions', file, '--out', out, '--bad_share', 0.04)
    assert status == 2
    assert '1 of 21 lines are damaged (bad_json: 1; first line 1 bad_json)' in told
    assert '--bad_share=0.04' in told
    assert not out.exists()
    partial = tmp_path / 'out.jsonl.partial'
    assert f'the answers so far are in {partial}' in told
    assert len(partial.read_text().splitlines()) == 20


def test_a_signal_keeps_what_was_answered(command, tmp_path):
    out = tmp_path / 'out.jsonl'
    status, _, told = command('--sessions', write(tmp_path / 'sessions.jsonl'), '--out', out,
                              stopping=lambda: True)
    assert status == 75
    assert f'stopped after line {calls.SIZES[-1]}; the answers so far are in {out}.' in told
    assert len((tmp_path / 'out.jsonl.partial').read_text().splitlines()) == calls.SIZES[-1]


@pytest.mark.parametrize(('argv', 'said'), [
    (['--sessions', 'nowhere.jsonl'], r'nowhere\.jsonl does not exist'),
    (['--sessions', 'one.jsonl', '--k', '0'], 'k=0 is out of bounds'),
    (['--sessions', 'one.jsonl', '--out', '/nowhere/out.jsonl'], r'out\.jsonl\.partial cannot'),
    (['--sessions', 'broken.parquet'], r'broken\.parquet cannot be read as parquet'),
    (['--sessions', 'other.parquet'], 'has the columns items. Expected')])
def test_unusable_input(command, tmp_path, monkeypatch, argv, said):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / 'one.jsonl', SESSIONS[:1])
    (tmp_path / 'broken.parquet').write_bytes(b'PAR1 and no more')
    pl.DataFrame({'items': [1]}).write_parquet('other.parquet')
    status, _, told = command(*argv)
    assert status == 2
    assert re.search(said, told.splitlines()[-1])


@pytest.mark.slow
def test_a_pipe_and_help(run):
    command = [sys.executable, '-m', 'tpad_jax.recommend']
    lines = ''.join(json.dumps({'session': s}) + '\n' for s in SESSIONS[:5])
    done = subprocess.run([*command, run, '--sessions', '-', '--k', '3'], input=lines, text=True,
                          capture_output=True, check=True)
    assert [len(json.loads(line)['items']) for line in done.stdout.splitlines()] == [3] * 5
    told = subprocess.run([*command, '--help'], capture_output=True, text=True, check=True).stdout
    assert '--bad_share' in told
