"""Two real processes of four devices each: the steps of one device, one stop, one checkpoint.

The stage that compiles quickest stands for all; `python -m benchmarks.replicas` runs each of them.
"""

import json
import os
import pickle
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from tests.job import test_ready_made as ready
from tests.tiny_stages import STEPS, Run, agree, differences
from tpad_jax.distributed import devices, hosts
from tpad_jax.errors import InputError, Stopped
from tpad_jax.job import job

STAGE = 'recommend'
SHORT = dict(baselines='pop')  # the others know no processes
TOLD = 6  # the step behind which the second process is told to stop


def work(coordinator, process, directory, *stages):
    """What each of the two does; the findings lie in directory/<process>.pickle."""
    def store(found):
        (directory / f'{process}.pickle').write_bytes(pickle.dumps(found))

    hosts.join(coordinator, 2, int(process))
    asking, found = hosts.together(lambda: False), {}
    for stage in stages:
        run = Run(stage, 'processes', directory / stage, lambda step: asking())
        found[stage] = run.metrics, *jax.device_get((run.params, run.rows)), run.traces
    if stages != (STAGE,):
        return store(found)
    config = ready.config(directory / 'made.npz', parallel='auto', **SHORT)
    found['job'] = job.run(config, directory / 'job', asking)

    def stopping(step):
        if step == TOLD and process == '1':
            os.kill(os.getpid(), signal.SIGTERM)
        if step >= TOLD:
            time.sleep(1)  # jax looks for signals once a second
        return asking()

    try:
        Run(STAGE, 'processes', directory / 'stopped', stopping)
    except Stopped as stopped:
        found['stopped'] = str(stopped)
    return store(found)


def two(arguments, seconds=1200):
    """Run python with (coordinator, number) -> arguments twice; exit statuses, stdout, stderr."""
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        coordinator = f'127.0.0.1:{free.getsockname()[1]}'
    changes = {'XLA_FLAGS': os.environ['XLA_FLAGS'].replace('device_count=8', 'device_count=4'),
               'PYTHONPATH': str(Path(__file__).parents[2])}
    running = [subprocess.Popen([sys.executable, *arguments(coordinator, str(i))],
                                env=os.environ | changes, stdout=subprocess.PIPE,
                                stderr=subprocess.PIPE, text=True) for i in range(2)]
    try:
        output = [run.communicate(timeout=seconds) for run in running]
    finally:
        for run in running:
            run.kill()
    return [run.returncode for run in running], *zip(*output, strict=True)


def together(directory, *stages):
    """What both processes found of the stages."""
    codes, _, errors = two(lambda coordinator, i: (__file__, coordinator, i, directory, *stages))
    assert codes == [0, 0], errors
    return [pickle.loads((directory / f'{i}.pickle').read_bytes()) for i in range(2)]


@pytest.fixture(scope='module')
def pair(tmp_path_factory):
    """What both processes found, and where their checkpoints lie."""
    directory = tmp_path_factory.mktemp('pair')
    ready.write(directory / 'made.npz')
    return together(directory, STAGE), directory


@pytest.fixture(scope='module')
def one(tmp_path_factory):
    """The same steps on one device."""
    return Run(STAGE, 'jit', tmp_path_factory.mktemp('one'))


@pytest.mark.slow
def test_twenty_steps_are_those_of_one_device(pair, one):
    for process in pair[0]:
        found = differences(one, *process[STAGE])
        assert agree(found), found


@pytest.mark.slow
def test_a_signal_to_one_stops_both_and_one_process_goes_on(pair, one):
    found, directory = pair
    assert found[0]['stopped'] == found[1]['stopped']
    step = int(found[0]['stopped'].rsplit(' ', 1)[1])
    assert TOLD <= step < STEPS
    assert (directory / 'stopped' / str(step)).is_dir()
    rest = Run(STAGE, 'jit', directory / 'stopped')
    assert rest.metrics.keys() == set(range(step + 1, STEPS + 1))  # nothing is done twice
    for path, x in one.params.items():
        np.testing.assert_allclose(rest.params[path], x, rtol=0, atol=1e-5, err_msg=path)


@pytest.mark.slow
def test_a_whole_job_leaves_what_one_process_leaves(pair, tmp_path):
    found, directory = pair
    assert found[0]['job']['models'].keys() == found[1]['job']['models'].keys()
    config = ready.config(directory / 'made.npz', **SHORT)
    one = job.run(config, tmp_path)['models']['attention']
    two = found[0]['job']['models']['attention']
    assert two['valid']['step'] == one['valid']['step']
    for name in ('hit@20', 'mrr@20', 'ndcg@20'):
        np.testing.assert_allclose(two['test'][name], one['test'][name], rtol=1e-3)
    written = [(where / 'log.jsonl').read_text().count('\n')
               for where in (directory / 'job', tmp_path)]
    assert written[0] == written[1]  # by one of them alone


FAILING = """
import json
import sys
from tpad_jax.distributed import hosts
from tpad_jax.errors import InputError, Stopped

coordinator, process, cases = sys.argv[1:]
hosts.join(coordinator, 2, int(process))
for meeting, failing in json.loads(cases):
    done = []
    try:
        with getattr(hosts, meeting)('data'):
            if int(process) == failing:
                raise InputError('config.json: damaged')
            done.append('block')
    except InputError as error:
        done.append(str(error))
    try:
        with hosts.one_first('images'):
            if int(process) == failing:
                raise Stopped('at step 3')
    except Stopped as error:
        done.append(str(error))
    print(json.dumps(done))
"""


def test_an_error_in_one_process_ends_all():
    cases = {('one_first', 0): ([], 'data'),  # the other process has not entered the block
             ('one_first', 1): (['block'], 'data, other processes'),
             ('joined', 1): (['block'], 'data')}
    codes, output, errors = two(lambda coordinator, i: (
        '-c', FAILING, coordinator, i, json.dumps([*cases])), seconds=120)
    assert codes == [0, 0], errors
    told = ([json.loads(line) for line in x.splitlines()[-len(cases):]] for x in output)
    for found, ((_, failing), (before, where)) in zip(zip(*told, strict=True), cases.items(),
                                                      strict=True):
        assert found[failing] == ['config.json: damaged', 'at step 3']
        *done, failed, stopped = found[1 - failing]
        assert done == before
        assert failed.startswith(f"process {failing} failed in '{where}': InputError: config.json")
        assert re.fullmatch(f"process {failing} stopped in 'images.*': at step 3", stopped)


@pytest.mark.parametrize(('how', 'says'), [
    ('pmap', 'works in one process, but there are 2'), ('auto', 'processes have 8, 0 devices')])
def test_two_processes_go_by_shard_map_and_bring_equally_many(monkeypatch, how, says):
    monkeypatch.setattr(jax, 'process_count', lambda: 2)
    with pytest.raises(InputError, match=says):
        devices.choose(how, 8)


@pytest.mark.parametrize('given', [
    ('127.0.0.1:1', 0, -1), ('', 2, 0), ('127.0.0.1:1', 2, 2), ('127.0.0.1', 2, 0)])
def test_a_process_that_is_not_named_whole_is_refused(given):
    with pytest.raises(InputError, match='Fix: give all three'):
        hosts.join(*given)


if __name__ == '__main__':
    work(*sys.argv[1:3], Path(sys.argv[3]), *sys.argv[4:])
