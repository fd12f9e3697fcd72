"""Evaluation over time: one run per window, and their summary."""

import json

from tpad_jax import config
from tpad_jax.job import windows


def test_windows_run_from_the_earliest_and_are_summarised(tmp_path, monkeypatch, capsys):
    ran = []

    def run(c, workdir, stopping):
        number = c.data.window
        ran.append((number, workdir.name, stopping))
        day = f'2024-03-{20 - 7 * number:02d}'
        test = {'rows': 10 * number, 'hit@20': 0.1 * number, 'mrr@20': 0.05,
                'interval': {'hit@20': [0.0, 0.5]}}
        return {'data': {'test_days': [day, day], 'sessions': {'train': 5}},
                'models': {'tpad': {'test': test, 'is': 'other'}, 'other': {'test': test},
                           'pop': {'test': test}},
                'oracle': {'rows': 10 * number, 'hit@20': 0.9, 'mrr@20': 0.5}}

    monkeypatch.setattr(windows.job, 'run', run)
    c = config.get_config()
    out = windows.run(c, tmp_path, 2, 'stopping')
    assert ran == [(2, 'window_2', 'stopping'), (1, 'window_1', 'stopping')]
    assert c.data.window == 0
    assert json.loads((tmp_path / 'windows.json').read_text()) == {'windows': out}
    assert [window['models']['tpad']['hit@20'] for window in out] == [0.2, 0.1]
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ['tpad', '20.0', '10.0', '15.0'] in lines
    assert ['oracle', '90.0', '90.0', '90.0'] in lines
    page = (tmp_path / 'windows.html').read_text()
    assert 'days from 2024-03-06' in page
    assert page.count('class="curve"') == 3
