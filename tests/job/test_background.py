"""Tasks next to the stages: their order, failures and ends."""

import threading
import time
from types import SimpleNamespace

import pytest

from tpad_jax.errors import Stopped
from tpad_jax.job.background import Background, workers


@pytest.fixture
def threads():
    """One thread next to the main one."""
    background = Background(1)
    yield background
    background.close()


def test_without_threads_a_task_runs_when_its_result_is_asked_for():
    background, ran = Background(0), []
    tasks = [background.submit(lambda i=i: ran.append(i) or i, priority=-i) for i in range(3)]
    assert not ran
    assert background.results(tasks) == [0, 1, 2] == ran
    background.close()


def test_the_lowest_number_runs_first(threads):
    order, gate = [], threading.Event()
    first = threads.submit(gate.wait)
    time.sleep(0.1)  # it runs, the others wait
    later = [threads.submit(lambda i=i: order.append(i), priority=i) for i in (3, 1, 2)]
    gate.set()
    first.future.result(10)
    for task in later:
        task.future.result(10)
    assert order == [1, 2, 3]


def test_the_main_thread_takes_a_task_that_waits(threads):
    gate = threading.Event()
    running = threads.submit(gate.wait)
    while threads._queue:
        time.sleep(0.01)
    waiting = threads.submit(threading.current_thread)
    assert threads.results([waiting]) == [threading.main_thread()]
    gate.set()
    assert threads.results([running]) == [True]


def test_the_main_thread_helps_while_it_waits(threads):
    gate, threads_of = threading.Event(), []
    running = threads.submit(gate.wait)
    while threads._queue:
        time.sleep(0.01)

    def other():
        threads_of.append(threading.current_thread())
        gate.set()

    threads.submit(other)
    assert threads.results([running], help_others=True) == [True]
    assert threads_of == [threading.main_thread()]


def test_a_failure_is_raised_before_its_result_is_asked_for(threads):
    def fail():
        raise FloatingPointError('id_only: not finite')

    task = threads.submit(fail)
    task.future.exception(10)
    with pytest.raises(FloatingPointError, match='id_only'):
        threads.check()
    with pytest.raises(FloatingPointError, match='id_only'):
        threads.results([task])


def test_an_end_drops_what_waits_and_waits_for_what_runs():
    background, ran = Background(1), []

    def training():
        while not background.closing:
            time.sleep(0.01)
        ran.append('saved')
        raise Stopped

    background.submit(training)
    while background._queue:
        time.sleep(0.01)
    background.submit(lambda: ran.append('never'))
    background.close()
    assert ran == ['saved']


@pytest.mark.parametrize(('how', 'backend', 'wanted', 'items', 'number'), [
    ('jit', 'cpu', 3, 600, 3), ('jit', 'cpu', 0, 600, 0), ('jit', 'cpu', -1, 600, 1),
    ('pmap', 'cpu', 3, 600, 0), ('shard_map', 'cpu', -1, 600, 0), ('jit', 'gpu', 3, 600, 0),
    ('jit', 'tpu', -1, 600, 0), ('jit', 'cpu', -1, 10**6, 0), ('jit', 'cpu', 1, 10**6, 1)])
def test_only_a_cpu_has_room_for_more_than_one_stage(monkeypatch, how, backend, wanted, items,
                                                     number):
    monkeypatch.setattr('jax.default_backend', lambda: backend)
    monkeypatch.setattr('os.sched_getaffinity', lambda _: {0, 1})
    assert workers(wanted, SimpleNamespace(how=how), items * 64) == number
