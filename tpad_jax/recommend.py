"""The lists of a finished run for sessions by the million: `python -m tpad_jax.recommend RUN`.

Sessions are read, answered and written in batches of one shape, so that nothing is compiled twice
and memory stays flat. A line that is no session is named on stderr and left out; answers name the
ids of their sessions, or their lines. What files look like: tpad_jax/serving/session_files.py.

Exit status: 0 done, 1 a number was not finite or a defect, 2 unusable input in one sentence (more
lines than --bad_share left out is such; what was answered stays), 75 stopped by SIGINT or SIGTERM.
"""

import argparse
import sys
import time
from collections import deque

from tpad_jax.core.startup import BROKEN, STOPPED, UNUSABLE, begin
from tpad_jax.errors import UNWRITABLE, InputError

TOLD = 20  # lines left out that are named; the rest is counted
QUIET_SECONDS = 30  # between two lines of progress


def main(argv) -> int:
    """Answer the sessions that argv names and return the exit status."""
    parser = argparse.ArgumentParser(
        prog='python -m tpad_jax.recommend', allow_abbrev=False,
        description='Writes the items a finished run recommends for every session of a file.')
    parser.add_argument('run', help='workdir of a finished run')
    parser.add_argument('--sessions', required=True, metavar='FILE',
                        help='.jsonl, .jsonl.gz or .parquet; - is JSONL on standard input')
    parser.add_argument('--k', type=int, default=20, help='items per session, default 20')
    parser.add_argument('--out', default='-', metavar='FILE',
                        help='.jsonl or .parquet; default: JSONL on standard output')
    parser.add_argument('--scores', action='store_true', help='JSONL with the scores')
    parser.add_argument('--added', default='', metavar='FILE',
                        help='items that were added to the run: what save_added or serve left')
    parser.add_argument('--bad_share', type=float, default=0.05,
                        help='share of the lines that may be no sessions, default 0.05')
    given = parser.parse_args(argv)
    stopping = begin('')
    try:
        return run(given, stopping)
    except InputError as error:
        return _said(error, UNUSABLE)
    except FloatingPointError as error:
        return _said(error, BROKEN)
    except BrokenPipeError:  # who reads has seen enough
        sys.stdout = None  # which else would be flushed, and complain
        return 0
    except OSError as error:
        if error.errno not in UNWRITABLE:
            raise
        return _said(f'{error.filename or given.out}: {error.strerror}; make room or choose '
                     'another --out', UNUSABLE)


def run(given, stopping=lambda: False) -> int:
    """Answer all sessions; `given`: the parsed arguments. Returns the exit status.

    Raises:
      InputError: the run, the file or k is unusable, or too many lines are no sessions.
    """
    from tpad_jax.serving import (
        recommender,  # here: --help and a wrong flag need no jax
        session_files,
    )

    told = 0

    def tell(line, reason):
        nonlocal told
        told += 1
        if told <= TOLD:
            _say(f'{given.sessions}: line {line} is left out: {reason}')

    source = session_files.Source(given.sessions, tell)
    shop = recommender.load(given.run)
    if given.added:
        shop.restore_added(given.added)
    sink = session_files.Sink(given.out, shop.ids, given.scores)
    count = {'sessions': 0, 'empty': 0, 'unknown': 0}
    begun = spoke = time.monotonic()
    pending, stopped = deque(), False

    def write():
        asked, unknown, rows, finish = pending.popleft()
        sink.write(asked, unknown, *finish())
        count['sessions'] += len(asked)
        count['empty'] += int((rows[:, 0] == 0).sum())
        count['unknown'] += sum(map(len, unknown))

    try:
        for asked in session_files.in_batches(source, recommender.SIZES[-1]):
            rows, unknown = shop.rows([one.session for one in asked])
            for finish in shop.begin(rows, given.k):
                pending.append((asked, unknown, rows, finish))
            if len(pending) > 1:  # the device has the next batch before this one is written
                write()
            if time.monotonic() - spoke > QUIET_SECONDS:
                spoke = time.monotonic()
                _say(f'{count["sessions"]} sessions, '
                     f'{count["sessions"] / (spoke - begun):.0f} sessions/s')
            stopped = stopping()
            if stopped:
                break
        while pending:
            write()
    except BaseException:
        sink.close()
        raise
    _say(f'{count["sessions"]} sessions answered, {count["empty"]} of them empty, '
         f'{count["unknown"]} unknown item ids, {told} lines left out; '
         f'{time.monotonic() - begun:.0f} s')
    kept = '' if sink.partial is None else f'; what was answered lies in {sink.partial}'
    if stopped:
        sink.close()
        return _said(f'stopped behind line {source.number}{kept}', STOPPED)
    try:
        source.check(given.bad_share)
    except InputError as error:
        sink.close()
        raise InputError(f'{error}{kept}') from error
    sink.finish()
    return 0


def _say(text):
    print(f'tpad_jax.recommend: {" ".join(str(text).split())}', file=sys.stderr)


def _said(text, status):
    _say(text)
    return status


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))
