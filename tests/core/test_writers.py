"""Logs that can be resumed, JSON without NaN, shares of the oracle, and what is printed."""

import io
import json
import math

import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tpad_jax.core import console as console_lib, files, log
from tpad_jax.errors import InputError
from tpad_jax.evaluation import tables


def curves_of(folder):
    """{tag: [(step, value)]} as TensorBoard shows the folder."""
    reader = EventAccumulator(str(folder)).Reload()
    return {tag: [(one.step, one.value) for one in reader.Scalars(tag)]
            for tag in reader.Tags()['scalars']}


def test_scalars_go_to_the_log_and_to_the_events(tmp_path):
    writer = log.Writer(tmp_path)
    writer.scalars('transfer', np.int64(1), {'loss': jnp.float32(1.23456789), 'rows': np.int32(7)})
    first = (tmp_path / 'log.jsonl').read_text()  # flushed before close
    writer.scalars('joint', 2, {'loss': float('nan'), 'valid/hit@20': 0.5, 'count': 10**7})
    writer.close()
    assert first == '{"stage": "transfer", "step": 1, "loss": 1.23457, "rows": 7}\n'
    lines = log.read_log(tmp_path / 'log.jsonl')
    wanted = {'stage': 'joint', 'step': 2, 'loss': None, 'valid/hit@20': 0.5, 'count': 10**7}
    assert lines[1] == wanted
    assert isinstance(lines[1]['count'], int)
    assert curves_of(tmp_path / 'events' / 'joint') == {
        'valid/hit@20': [(2, 0.5)], 'count': [(2, 10**7)]}


def test_rewind_lets_each_step_stand_once(tmp_path):
    writer = log.Writer(tmp_path)
    for stage in ('align', 'transfer'):
        for step in (1, 2, 3):
            writer.scalars(stage, step, {'loss': 1.0})
    writer.close()
    with open(tmp_path / 'log.jsonl', 'a') as file:
        file.write('{"stage": "transfer", "st')  # killed in the middle of a line
    writer = log.Writer(tmp_path)
    writer.rewind('transfer', 1)
    writer.scalars('transfer', 2, {'loss': 5.0})
    writer.close()
    lines = [(x['stage'], x['step'], x['loss']) for x in log.read_log(tmp_path / 'log.jsonl')]
    assert lines == [('align', n, 1.0) for n in (1, 2, 3)] + [
        ('transfer', 1, 1.0),
        ('transfer', 2, 5.0),
    ]
    assert curves_of(tmp_path / 'events' / 'transfer') == {'loss': [(1, 1.0), (2, 5.0)]}


def test_a_garbled_line_is_named(tmp_path):
    (tmp_path / 'log.jsonl').write_text('{"stage": "a", "step": 1}\n{"step"}\n')
    with pytest.raises(InputError, match='line 2'):
        log.read_log(tmp_path / 'log.jsonl')
    with pytest.raises(InputError, match='does not exist'):
        log.read_log(tmp_path / 'none.jsonl')


def test_write_json_is_strict_and_whole(tmp_path):
    value = {
        'a': np.float32(1 / 3),
        'n': np.int64(3),
        'bad': [float('nan'), math.inf],
        'rows': (1, np.arange(2)),
        'flag': np.bool_(True),
        'text': 'x',
        'none': None,
        'jax': jnp.float32(0.5),
    }
    path = tmp_path / 'deep' / 'results.json'
    files.write_json(path, value)

    def refuse(word):
        raise AssertionError(word)

    assert json.loads(path.read_text(), parse_constant=refuse) == {
        'a': 0.333333,
        'n': 3,
        'bad': [None, None],
        'rows': [1, [0, 1]],
        'flag': True,
        'text': 'x',
        'none': None,
        'jax': 0.5,
    }
    before = path.read_text()
    with pytest.raises(TypeError):
        files.write_json(path, {'a': object()})
    assert path.read_text() == before
    assert [x.name for x in path.parent.iterdir()] == ['results.json']


@pytest.mark.parametrize(('value', 'written'), [
    (0.6543214, 0.654321), (-0.6543216, -0.654322), (123.45678949, 123.456789), (1e-3, 0.001),
    (0.0123456789, 0.012346), (0.00012345678, 0.000123457), (1e-7, 1e-7), (-1.5e-12, -1.5e-12),
    (0.0, 0.0), (1 / 3 * 1e-9, 3.33333e-10)])
def test_small_numbers_keep_significant_digits(tmp_path, value, written):
    files.write_json(tmp_path / 'x.json', {'x': value, 'row': [np.float64(value)]})
    assert json.loads((tmp_path / 'x.json').read_text()) == {'x': written, 'row': [written]}


def scores(hit, expected=None, warm=None, cold=None):
    made = {'hit@20': hit, 'mrr@20': hit / 2, 'ndcg@20': hit / 4}
    made['slices'] = {'warm': {}, 'cold': {}}
    if expected is not None:
        made['expected_hit@20'] = expected
        made['slices']['warm']['expected_hit@20'] = warm
        made['slices']['cold']['expected_hit@20'] = cold
    return made


PLANTED = {
    'models': {
        'tpad': {'valid': {}, 'test': scores(0.4, 0.3, 0.32, 0.1)},
        '[pop]': {'valid': {}, 'test': scores(0.1, 0.06, 0.08, 0.0)},
        'untested': {'valid': {}},
    },
    'oracle': scores(0.6, 0.6, 0.64, 0.4),
}


def shown(thing, width=100):
    console = Console(file=io.StringIO(), width=width)
    console.print(thing)
    return console.file.getvalue()


def test_shares_of_the_oracle():
    found = tables.shares(PLANTED)
    assert found['tpad'] == pytest.approx({'all': 0.5, 'warm': 0.5, 'cold': 0.25})
    assert found['[pop]'] == pytest.approx({'all': 0.1, 'warm': 0.125, 'cold': 0.0})
    assert all(math.isnan(value) for value in found['untested'].values())
    assert math.isnan(tables.shares({'models': PLANTED['models']})['tpad']['all'])


def test_table_of_planted_and_of_real_data():
    lines = shown(tables.table(PLANTED), width=80).splitlines()
    numbers = {line.split()[0]: line.split()[1:] for line in lines}
    assert numbers['tpad'] == ['40.00', '20.00', '10.00', '30.00', '50.00', '50.00', '25.00']
    assert numbers['[pop]'] == ['10.00', '5.00', '2.50', '6.00', '10.00', '12.50', '0.00']
    assert numbers['untested'] == ['-'] * 7
    assert numbers['oracle'][:4] == ['60.00', '30.00', '15.00', '60.00']
    real = scores(0.2)
    real['slices'] = {'warm': {'hit@20': 0.25}, 'cold': None}
    text = shown(tables.table({'models': {'sr': {'test': real}}}))
    assert text.splitlines()[-1].split() == ['sr', '20.00', '10.00', '5.00', '25.00', '-']
    assert 'oracle' not in text


def test_a_table_of_many_metrics_is_printed_in_full_on_a_narrow_console():
    names = [f'metric_number_{i}@20' for i in range(6)]
    console = Console(file=io.StringIO(), width=80)
    tables.show({'models': {'sr': {'test': dict.fromkeys(names, 0.25)}}}, console)
    lines = console.file.getvalue().splitlines()
    assert lines[1].split() == ['model', *names, 'hit', 'warm', 'hit', 'cold']
    assert lines[2].split() == ['sr', *['25.00'] * 6, '-', '-']
    console = Console(file=io.StringIO())
    tables.show({'models': {}}, console)
    assert console.file.getvalue() == ''


def test_plain_progress_is_sparse_and_ends_with_a_line(monkeypatch):
    clock = iter(range(0, 10_000, 1))
    monkeypatch.setattr(console_lib.time, 'monotonic', lambda: next(clock))
    console = Console(file=io.StringIO())
    with console_lib.progress('joint', 100, 20, console) as update:
        for step in range(21, 101):
            update(step, 'loss 1.0 [x]')
    lines = console.file.getvalue().splitlines()
    assert len(lines) == 3  # 80 seconds of one step each: two on the way and the last
    assert lines[0] == 'joint  50/100  loss 1.0 [x]  50 s left'
    assert lines[-1] == 'joint  100/100  loss 1.0 [x]  0 s left'


def test_progress_bar_shows_steps_and_losses():
    console = Console(file=io.StringIO(), force_terminal=True, width=120)
    with console_lib.progress('joint', 10, 0, console) as update:
        update(4, 'loss 0.25')
        update(5)
    text = console.file.getvalue()
    assert '5/10' in text
    assert 'loss 0.25' in text


def test_header():
    console = Console(file=io.StringIO(), width=60)
    console_lib.print_header('tpad', {'items': 600, 'data': '[planted]'}, console)
    text = console.file.getvalue()
    assert 'tpad' in text
    assert '600' in text
    assert '[planted]' in text
