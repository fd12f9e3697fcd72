"""Serve a finished run over HTTP: `python -m tpad_jax.serve RUN`; see docs/serving.md.

At the first SIGTERM or SIGINT the service takes no more connections, /ready answers 503, accepted
requests are answered, and the process exits. A second signal ends it at once.

Exit status: 0 stopped by a signal with every accepted request answered, 1 some were not within
--grace seconds, or a defect, 2 unusable input in one sentence.
"""

import argparse
import asyncio
import contextlib
import os
import signal
import socket
import sys
from collections.abc import Callable
from pathlib import Path

from tpad_jax.core import cli, startup
from tpad_jax.errors import refuse_if, refusing

NAME = 'tpad_jax.serve'


@cli.command(NAME, 'Answers sessions over HTTP by a finished run.', {
    'run': dict(type=Path, help='workdir of a finished run'),
    '--host': dict(default='127.0.0.1', help='default 127.0.0.1: only this machine'),
    '--port': dict(type=cli.number(int, 0, 2**16 - 1), default=8000, help='default 8000, 0: any'),
    '--k': dict(type=cli.number(int, 1), help='items of the longest list, default 20 or all items'),
    '--waiting': dict(type=cli.number(int, 1), default=4096, help='sessions that may wait, 4096'),
    '--timeout': dict(type=cli.number(float, 0.001, 3600), default=10.0,
                      help='seconds until a request is given up, default 10'),
    '--grace': dict(type=cli.number(int, 0), default=30,
                    help='seconds to answer accepted requests after a signal, default 30'),
    '--no_new_items': dict(action='store_true', help='refuse to add items'),
    '--added': dict(default='', metavar='FILE', help='keeps the added items over a restart'),
    '--base': dict(default='', metavar='DIR', help="where the run's MLLM is, if it was moved"),
})
def main(args) -> int:
    """Serve a run until a signal; return the exit status."""
    stopping = startup.begin()
    # programs of one device wait for each other: new items are read on the second one
    os.environ.setdefault('JAX_NUM_CPU_DEVICES', '2')
    loop = None
    with contextlib.suppress(ImportError):  # a faster event loop, which Windows lacks
        import uvloop
        loop = uvloop.new_event_loop
    with asyncio.Runner(loop_factory=loop) as runner:
        return runner.run(serve(args, stopping))


async def serve(args: argparse.Namespace, stopping: Callable[[], bool] = lambda: False) -> int:
    """Listen until a signal.

    Args:
      args: the parsed arguments.
      stopping: whether a signal came before this function listens to signals.

    Returns:
      The exit status.

    Raises:
      InputError: the run cannot be served, packages are missing, or the port is not available.
    """
    with refusing(ImportError, 'a package is missing', 'Fix: pip install "tpad_jax[serve]"'):
        import uvicorn  # here: of an extra, and --help needs none

        from tpad_jax.serving import calls, http, recommender

    shop = recommender.load(args.run, base=args.base, added=args.added)
    most = min(calls.MAX_K, shop.trained)
    refuse_if(args.k and args.k > most, f'--k={args.k}: the longest list of this run has {most} '
              'items. Fix: lower it')
    count, about = http.Count(), f'{shop.model} of {len(shop.ids) - 1} items'
    app = http.app(shop, args.run, new_items=not args.no_new_items, added=args.added, count=count,
                   limits=http.Limits(k=args.k or 20, waiting=args.waiting, seconds=args.timeout))
    del shop  # an update replaces it, and its memory is free then
    with refusing(OSError, f'{args.host}:{args.port} is not available',
                  'Fix: choose another --host or --port'):
        listening = socket.create_server((args.host, args.port), backlog=2048)
    # without it a body waits 40 ms for the acknowledgement of its headers
    listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    class Server(uvicorn.Server):
        @contextlib.contextmanager
        def capture_signals(self):
            yield  # signals are handled below, with an exit status

        async def startup(self, sockets=None):
            await super().startup(sockets)
            host, port = listening.getsockname()[:2]
            if self.started:
                cli.say(NAME, f'{about} at http://{host}:{port}, its page at /, the interface at '
                        '/docs')

    server = Server(uvicorn.Config(app, log_level='warning', access_log=False, lifespan='on',
                                   timeout_graceful_shutdown=args.grace))

    def stop():
        server.force_exit = count.stopping
        count.stopping = server.should_exit = True

    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop)
    if stopping():
        stop()
    await server.serve(sockets=[listening])
    cli.say(NAME, f'{count.accepted} requests accepted, {count.answered} answered')
    return 0 if count.answered == count.accepted else cli.BROKEN


if __name__ == '__main__':
    sys.exit(main())
