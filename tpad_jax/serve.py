"""Serve a finished run over HTTP: `python -m tpad_jax.serve RUN`; see docs/serving.md.

A first SIGTERM or SIGINT: no more connections are taken, /ready says 503, what was accepted is
answered, and the process leaves. A second one does not wait.

Exit status: 0 stopped by a signal with every accepted request answered, 1 some were not within
--grace seconds, or a defect, 2 unusable input in one sentence.
"""

import argparse
import asyncio
import contextlib
import signal
import socket
import sys
from pathlib import Path

from tpad_jax.core.startup import BROKEN, UNUSABLE, begin
from tpad_jax.errors import InputError


def main(argv) -> int:
    """Serve the run that argv names until a signal; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog='python -m tpad_jax.serve', allow_abbrev=False,
        description='Answers sessions over HTTP by a finished run.')
    add = parser.add_argument
    add('run', type=Path, help='workdir of a finished run')
    add('--host', default='127.0.0.1', help='default 127.0.0.1: this machine alone')
    add('--port', type=int, default=8000, help='default 8000; 0: any that is free')
    add('--k', type=int, default=20, help='the longest list that is served, default 20')
    add('--waiting', type=int, default=4096, help='sessions that may wait, default 4096')
    add('--timeout', type=float, default=10.0, help='seconds until a request is given up')
    add('--grace', type=int, default=30, help='seconds to answer in when a signal came')
    add('--no_new_items', action='store_true', help='no item can be added')
    add('--added', default='', metavar='FILE', help='keeps the added items over a restart')
    add('--base', default='', metavar='DIR', help='where the run\'s MLLM lies, if it was moved')
    given = parser.parse_args(argv)
    stopping = begin('')
    try:
        with asyncio.Runner(loop_factory=_loop()) as runner:
            return runner.run(serve(given, stopping))
    except InputError as error:
        print(f'tpad_jax.serve: {error}', file=sys.stderr)
        return UNUSABLE


async def serve(given, stopping=lambda: False) -> int:
    """Listen until a signal and return the exit status.

    Args:
      given: the parsed arguments. stopping: whether a signal came before this listens to them.

    Raises:
      InputError: the run cannot be served, its packages are missing, or the port cannot be had.
    """
    try:
        import uvicorn  # here: extras, and --help needs none

        from tpad_jax.serving import http
    except ImportError as error:
        raise InputError(f'{error.name} is not installed; pip install "tpad_jax[serve]"') from error
    from tpad_jax.serving import recommender

    if (given.k < 1 or given.waiting < 1 or not 0 < given.timeout < 3600 or given.grace < 0
            or not 0 <= given.port < 2**16):
        raise InputError('--k and --waiting are at least 1, --timeout lies between 0 and 3600 '
                         'seconds, --grace is not negative and --port below 65536')
    shop = recommender.load(given.run, base=given.base)
    if given.added and Path(given.added).is_file():
        shop.restore_added(given.added)
    limits = http.Limits(k=given.k, waiting=given.waiting, seconds=given.timeout)
    count = http.Count()
    app = http.app(shop, given.run, limits=limits, new_items=not given.no_new_items,
                      added=given.added, count=count)
    try:
        listening = socket.create_server((given.host, given.port), backlog=2048)
    except OSError as error:
        raise InputError(f'{given.host}:{given.port} cannot be listened on ({error}); choose '
                         'another --host or --port') from error
    # else a body waits for the acknowledgement of its headers, 40 ms
    listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    server = uvicorn.Server(uvicorn.Config(
        app, log_level='warning', access_log=False, lifespan='on',
        timeout_graceful_shutdown=given.grace))
    server.capture_signals = contextlib.nullcontext  # they are ours, and end in a status of ours

    def stop():
        server.force_exit = count.stopping
        count.stopping = server.should_exit = True

    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop)
    if stopping():
        stop()
    task = asyncio.ensure_future(server.serve(sockets=[listening]))
    while not (server.started or task.done()):
        await asyncio.sleep(0.02)
    if server.started:
        host, port = listening.getsockname()[:2]
        _say(f'{shop.model} of {len(shop.ids) - 1} items at http://{host}:{port}, its page at / '
             'and what can be asked at /docs')
    await task
    _say(f'{count.accepted} requests accepted, {count.answered} answered')
    return 0 if count.answered == count.accepted else BROKEN


def _loop():
    """The quicker event loop where it is installed; Windows has none."""
    try:
        import uvloop
    except ImportError:
        return None
    return uvloop.new_event_loop


def _say(text):
    print(f'tpad_jax.serve: {text}', file=sys.stderr, flush=True)


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))
