"""Tasks that run next to the stages of a run, on the processor cores that are idle otherwise.

A train step of the default config keeps about one core busy. Recommenders that do not read each
other, compilation of later stages and the tuning of baselines are independent of what the main
thread does, so they run in threads: a compiled program does not hold the interpreter's lock.

The order in which tasks run changes no result: each reads what it was given when it was submitted
and writes separate files.
"""

import bisect
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from typing import Any

import jax

from tpad_jax.core import startup
from tpad_jax.distributed.devices import Devices
from tpad_jax.errors import Stopped

# Priorities: what the main thread waits for first comes first.
COMPILE, LOOK, TRAIN, TUNE = 0, 10, 20, 30
# numbers in a table of item vectors, a million items in 32 columns: with larger ones a step waits
# for memory: a second training at the same time makes nothing faster and costs gigabytes
LARGE = 2**25


def workers(wanted: int, devices: Devices, table: int) -> int:
    """Count the threads to use next to the main one.

    An accelerator is not shared: its memory is planned for one stage. Neither are several devices
    or processes, whose collective operations have to meet in one order.

    Args:
      wanted: config.workers. -1: one thread per further core, at most THREADS of startup.py, and
        none if the table is LARGE.
      devices: those that run the steps.
      table: numbers in a table of item vectors.
    """
    if devices.how != 'jit' or jax.default_backend() != 'cpu' or jax.process_count() > 1:
        return 0
    if wanted >= 0:
        return wanted
    return 0 if table > LARGE else min(startup.cores() - 1, startup.THREADS)


class Task:
    """A call that runs once, in any thread."""

    def __init__(self, function: Callable[[], Any]):
        self._function, self.future = function, Future()

    def run(self) -> None:
        """Run it and keep its result or its exception."""
        try:
            self.future.set_result(self._function())
        except BaseException as error:  # raised again where the result is asked for
            self.future.set_exception(error)
        self._function = None  # and what it refers to


class Background:
    """Threads that run tasks in order of priority.

    Args:
      count: threads; 0: a task runs in the main thread when its result is asked for.
    """

    def __init__(self, count: int):
        self.closing = False
        self._queue, self._tasks = [], []  # (priority, number, task) of those that wait; all
        self._changed = threading.Condition()
        self._threads = [threading.Thread(target=self._work, name=f'background-{i}', daemon=True)
                         for i in range(count)]
        for thread in self._threads:
            thread.start()

    def __bool__(self) -> bool:
        return bool(self._threads)

    def submit(self, function: Callable[[], Any], priority: int = 0) -> Task:
        """Queue a call. Of those that wait, the one with the lowest priority number runs first."""
        task = Task(function)
        with self._changed:
            bisect.insort(self._queue, (priority, len(self._tasks), task))
            self._tasks.append(task)
            self._changed.notify()
        return task

    def results(self, tasks: Iterable[Task], help_others: bool = False) -> list:
        """Return what the tasks return; those that no thread has begun run here, in this order.

        Args:
          tasks: of this object.
          help_others: whether other tasks that wait run here too, while these are not done.

        Raises:
          Exception: that of the first task that failed.
        """
        tasks = list(tasks)
        for task in tasks:
            if self._take(task):
                task.run()
                self.check()
        while (help_others and not all(task.future.done() for task in tasks)
               and (other := self._take())):
            other.run()
            self.check()
        return [task.future.result() for task in tasks]

    def check(self) -> None:
        """Raise the exception of a task that failed, long before its result is needed."""
        for task in self._tasks:
            if task.future.done() and (error := task.future.exception()):
                raise error

    def close(self) -> None:
        """Drop the tasks that wait and return when those that run have ended.

        A training that runs saves and ends, because `closing` is one of the reasons to stop.
        """
        with self._changed:
            self.closing = True
            self._queue.clear()
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()

    def _take(self, wanted=None):
        """Take a task that waits from the queue, by default the first; None if it does not."""
        with self._changed:
            for entry in self._queue:
                if wanted in (None, entry[2]):
                    self._queue.remove(entry)
                    return entry[2]
        return None

    def _work(self):
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._queue or self.closing)
                if self.closing:
                    return
                _, _, task = self._queue.pop(0)
            task.run()
            if isinstance(task.future.exception(), Stopped):
                return  # a signal came: the main thread stops as well
