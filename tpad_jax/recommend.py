"""Recommend items for a file of sessions: `python -m tpad_jax.recommend RUN --sessions=FILE`.

Sessions are read, answered and written in batches of one shape, so nothing is compiled twice and
memory does not grow. A line that is not a session is printed on stderr and skipped. An answer has
the id of its session, or its line. tpad_jax/serving/session_files.py describes the files.

Exit status: 0 done, 1 a number was not finite or a defect, 2 unusable input in one sentence, 75
stopped by SIGINT or SIGTERM. More skipped lines than --bad_share are status 2; the answers stay.
"""

import json
import sys
import time
from collections import Counter, deque
from pathlib import Path

from tpad_jax.core import cli, startup
from tpad_jax.errors import Stopped, refusing

NAME = 'tpad_jax.recommend'
K = 20  # items per list, or all items of a smaller catalogue
PRINTED = 20  # skipped lines that are printed; the rest is counted
QUIET_SECONDS = 30  # between two lines of progress


@cli.command(NAME, 'Writes what a finished run recommends for the sessions of a file.', {
    'run': dict(help='workdir of a finished run'),
    '--sessions': dict(required=True, metavar='FILE',
                       help='.jsonl, .jsonl.gz or .parquet; - is JSONL on standard input'),
    '--k': dict(type=int, help=f'items per session, default {K}'),
    '--out': dict(default='-', metavar='FILE',
                  help='.jsonl or .parquet; default: JSONL on standard output'),
    '--scores': dict(action='store_true', help='JSONL with the scores'),
    '--conditions': dict(default='', metavar='FILE', help='JSON: what the lists may hold'),
    '--explain': dict(action='store_true', help='JSONL with the reasons'),
    '--added': dict(default='', metavar='FILE', help='items that save_added or serve wrote'),
    '--bad_share': dict(type=cli.number(float, 0, 1), default=0.05,
                        help='share of the lines that may be skipped, default 0.05'),
})
def main(args) -> None:
    """Answer the sessions of a file."""
    run(args, startup.begin())


def run(args, stopping=lambda: False) -> None:
    """Answer all sessions.

    Args:
      args: the parsed arguments.
      stopping: whether a signal asked to stop.

    Raises:
      InputError: the run, the file or k is unusable, or too many lines are not sessions.
      Stopped: `stopping` returned True; the answers so far are written.
    """
    # here: --help does not wait for jax
    from tpad_jax.serving import calls, conditions, recommender, session_files
    from tpad_jax.serving.explain import explain

    count, pending = Counter(), deque()

    def skip(line, reason):
        count['skipped'] += 1
        if count['skipped'] <= PRINTED:
            cli.say(NAME, f'{args.sessions}: line {line} is skipped: {reason}')

    def write():
        sessions, unknown, rows, asked, finish = pending.popleft()
        items, scores = finish()
        why = explain(shop, rows, items, shop.table, asked) if args.explain else None
        sink.write(sessions, unknown, items, scores, why)
        count.update(sessions=len(sessions), empty=int((rows[:, 0] == 0).sum()),
                     unknown=sum(map(len, unknown)))

    source = session_files.Source(args.sessions, skip)
    shop = recommender.load(args.run)
    if args.added:
        shop.restore_added(args.added)
    k = min(K, len(shop.ids) - 1) if args.k is None else args.k
    limits = {}
    if args.conditions:
        with refusing((OSError, ValueError), f'--conditions={args.conditions}: it cannot be read',
                      'Expected a file with a JSON object. Fix: correct it'):
            limits = json.loads(Path(args.conditions).read_text())
    started = printed = time.monotonic()
    with session_files.Sink(args.out, shop.ids, args.scores) as sink:
        stopped = False
        for sessions in source.in_batches(calls.SIZES[-1]):
            rows, unknown = shop.rows([session.session for session in sessions])
            seen = [session.seen for session in sessions]
            asked = conditions.wanted(shop, rows, shop.table, limits, seen if any(seen) else None)
            given = calls.with_events(shop, rows, [session.session for session in sessions],
                                      [s.events for s in sessions] if shop.reads[0] else None)
            pending.extend((sessions, unknown, given, asked, finish)
                           for finish in shop.begin(given, k, shop.table, asked))
            if len(pending) > 1:  # the device has the next batch before this one is written
                write()
            if time.monotonic() - printed > QUIET_SECONDS:
                printed = time.monotonic()
                cli.say(NAME, f'{count["sessions"]} sessions, '
                        f'{count["sessions"] / (printed - started):.0f} sessions/s')
            stopped = stopping()
            if stopped:
                break
        while pending:
            write()
        cli.say(NAME, f'{count["sessions"]} sessions answered, {count["empty"]} of them empty, '
                f'{count["unknown"]} unknown item ids, {count["skipped"]} lines skipped; '
                f'{time.monotonic() - started:.0f} s')
        if stopped:
            raise Stopped(f'stopped after line {source.number}')
        source.check(args.bad_share, '--bad_share')


if __name__ == '__main__':
    sys.exit(main())
