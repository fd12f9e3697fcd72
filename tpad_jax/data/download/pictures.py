"""Which pictures a folder of raw files lacks, all of them asked for, and what became of each."""

import asyncio
import json
import os
import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from tpad_jax.data import images
from tpad_jax.data.download.addresses import Guarded
from tpad_jax.data.download.fetching import Fetcher, host_of
from tpad_jax.data.download.hosts import Failed, Limits
from tpad_jax.data.download.journal import Journal
from tpad_jax.data.sources import amazon
from tpad_jax.data.untrusted import stay_inside
from tpad_jax.errors import InputError

POLL = 0.2  # seconds between two looks for a signal
QUIET_SECONDS = 30  # between two lines of progress where the output is no terminal
ENDINGS = '.jpg', '.png'
DEFAULT = Limits()


class _Plan(NamedTuple):
    """What is to be done: {asin: addresses} to ask, and of the other items why not."""

    ask: dict[str, tuple[str, ...]]
    counts: Counter  # items 'unreviewed', 'there', 'without_url'
    failed: list[dict]  # as in the report


def download(raw_dir: str | Path, limits: Limits = DEFAULT, *, allow_private: bool = False,
             again: bool = False, unreviewed: bool = False, bad_share: float = 0.05,
             stopping: Callable[[], bool] = lambda: False, console: Console | None = None) -> dict:
    """Gets the pictures of a folder of raw files, and writes images/download.json.

    Args:
      raw_dir: the folder, see `amazon.find`.
      limits: what to keep to.
      allow_private: whether addresses of private networks and of this machine may be asked.
      again: whether what failed for good in an earlier run is asked again.
      unreviewed: whether items that no review names get a picture too; no job uses it.
      bad_share: of a file's lines that may be damaged, see `files.Lines.check`.
      stopping: asked several times a second whether to stop.
      console: where progress goes.

    Returns:
      What download.json holds. 'items' is the sum of 'there' (before this run), 'fetched',
      'failed', 'without_url', 'unreviewed' and 'left' (not asked, as the run was stopped);
      'failed' is that of 'reasons' {reason: count}, and of 'for_good' and 'for_now' (the next run
      asks again). 'failures' holds each with its reason and addresses, 'remembered' if it was not
      asked. 'bytes', 'answers': as `Fetcher.sizes` and `requests`. 'lines': of the raw files.

    Raises:
      InputError: as `amazon.read`; or a place to write to is none.
      OSError: the disk can be written no more; what is finished is kept.
    """
    folder = Path(raw_dir) / 'images'
    found = amazon.read_urls(raw_dir, bad_share, stopping)
    stay_inside(folder, Path(raw_dir))
    if folder.exists() and not folder.is_dir():
        raise InputError(f'{folder} is no folder; move it away, the pictures go into one of this '
                         'name')
    folder.mkdir(exist_ok=True)
    journal = Journal(folder / 'download.jsonl')
    try:
        plan = _plan(found, Path(raw_dir), journal, again=again, unreviewed=unreviewed,
                     forgiven={'address_refused'} if allow_private else set())
        return asyncio.run(_run(plan, folder, journal, limits, Guarded(allow_private), stopping,
                                console or Console(stderr=True), found.lines))
    finally:
        journal.close()


def _plan(found, raw_dir, journal, *, again, unreviewed, forgiven):
    ask, counts, failed = {}, Counter(there=0, without_url=0, unreviewed=0), []
    for asin, urls in sorted(found.urls.items()):
        why = {url: journal.failed.get((asin, url)) for url in urls}
        open_ = tuple(url for url in urls if again or why[url] in {None, *forgiven})
        there = [path for path in (raw_dir / 'images' / (asin + end) for end in ENDINGS)
                 if os.path.lexists(path)]
        unusable = {path: images.unusable(path, raw_dir) for path in there}
        if not unreviewed and asin not in found.reviewed:
            counts['unreviewed'] += 1
        elif any(not reason and path.stat().st_size for path, reason in unusable.items()):
            counts['there'] += 1
        elif any(unusable.values()):  # nothing of another's is replaced
            failed.append(_failure(asin, urls, next(filter(None, unusable.values())), True, True))
        elif not urls:
            counts['without_url'] += 1
        elif not open_:
            failed.append(_failure(asin, urls, why[urls[-1]], True, True))
        else:
            ask[asin] = open_
    return _Plan(ask, counts, failed)


def _failure(asin, urls, reason, for_good, remembered):
    return {'asin': asin, 'reason': reason, 'for_good': for_good, 'remembered': remembered,
            'urls': list(urls)}


async def _run(plan, folder, journal, limits, network, stopping, console, lines) -> dict:
    fetcher, failed, fetched = Fetcher(folder, journal, limits, network), list(plan.failed), 0
    todo, begun = iter(_in_turns(plan.ask)), time.monotonic()

    async def work(advance):
        nonlocal fetched
        for asin in todo:
            try:
                await fetcher.fetch(asin, plan.ask[asin])
                fetched += 1
            except Failed as failure:
                failed.append(_failure(asin, plan.ask[asin], failure.reason, failure.final, False))
            advance(fetched, len(failed) - len(plan.failed), fetcher.sizes['received'])

    with images.quiet(), _Progress(len(plan.ask), console) as advance:
        tasks = {asyncio.create_task(work(advance)) for _ in range(limits.jobs)}
        try:
            while any(not task.done() for task in tasks) and not stopping():
                done, _ = await asyncio.wait(tasks, timeout=POLL,
                                             return_when=asyncio.FIRST_EXCEPTION)
                for task in done:
                    task.result()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await fetcher.close()
            report = _report(plan, fetched, failed, fetcher, journal, lines,
                             time.monotonic() - begun)
            _write(folder / 'download.json', report)
    return report


def _in_turns(ask: dict[str, tuple[str, ...]]) -> Iterable[str]:
    """The asins, a host's next when the others had their turn."""
    hosts = defaultdict(deque)
    for asin, urls in ask.items():
        hosts[host_of(urls[0])].append(asin)
    turns = deque(hosts.values())
    while turns:
        own = turns.popleft()
        yield own.popleft()
        if own:
            turns.append(own)


def _report(plan, fetched, failed, fetcher, journal, lines, seconds) -> dict:
    failed = sorted(failed, key=lambda one: one['asin'])
    asked = len(failed) - len(plan.failed) + fetched
    counts = {**plan.counts, 'fetched': fetched, 'failed': len(failed),
              'left': len(plan.ask) - asked}
    for_good = sum(one['for_good'] for one in failed)
    return {'date': datetime.now(UTC).isoformat(timespec='seconds'), 'seconds': round(seconds, 1),
            'items': sum(counts.values()), **counts,
            'reasons': dict(sorted(Counter(one['reason'] for one in failed).items())),
            'for_good': for_good, 'for_now': len(failed) - for_good,
            'bytes': dict(fetcher.sizes), 'answers': {str(status): count for status, count
                                                      in sorted(fetcher.requests.items())},
            'journal_lines_rejected': journal.rejected, 'lines': lines, 'failures': failed}


def _write(path: Path, value: dict) -> None:
    part = path.with_name('download.json.part')
    part.unlink(missing_ok=True)  # it may be a link
    part.write_text(json.dumps(value, indent=1) + '\n')
    os.replace(part, path)


class _Progress:
    """A bar, or sparse lines where there is no terminal; `advance(fetched, failed, received)`."""

    def __init__(self, total, console):
        self._total, self._console = total, console
        self._bar = Progress(
            TextColumn('[bold]pictures'), BarColumn(bar_width=24), MofNCompleteColumn(),
            TextColumn('{task.fields[told]}'), TextColumn('left'), TimeRemainingColumn(),
            console=console, refresh_per_second=4, disable=not console.is_terminal)
        self._task, self._spoke = self._bar.add_task('', total=total, told=''), time.monotonic()

    def __enter__(self):
        self._bar.start()
        return self._advance

    def __exit__(self, *_):
        self._bar.stop()

    def _advance(self, fetched, failed, received):
        told = f'{failed} failed  {received / 1e6:.1f} MB'
        self._bar.update(self._task, completed=fetched + failed, told=told)
        now = time.monotonic()
        if not self._console.is_terminal and now - self._spoke > QUIET_SECONDS:
            self._spoke = now
            self._console.print(f'pictures  {fetched + failed}/{self._total}  {told}',
                                highlight=False)
