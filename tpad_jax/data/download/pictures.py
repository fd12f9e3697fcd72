"""Which pictures a folder of raw files lacks, fetching all of them, and the report."""

import asyncio
import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

import httpcore2
from rich.console import Console

from tpad_jax.core import files
from tpad_jax.core.progress import progress
from tpad_jax.data import images
from tpad_jax.data.download.addresses import Guarded
from tpad_jax.data.download.fetching import Fetcher, checked
from tpad_jax.data.download.hosts import FetchError, Limits
from tpad_jax.data.download.journal import Journal
from tpad_jax.data.sources import amazon
from tpad_jax.data.untrusted import stay_inside
from tpad_jax.errors import InputError

POLL = 0.2  # seconds between two checks for a signal
DEFAULT = Limits()


class _Plan(NamedTuple):
    """What to do about every item.

    Attributes:
      ask: {asin: addresses} to request.
      counts: items 'unreviewed', 'there' and 'without_url'.
      failed: as 'failures' in the report.
    """

    ask: dict[str, tuple[str, ...]]
    counts: Counter
    failed: list[dict]


def download(raw_dir: str | Path, limits: Limits = DEFAULT, *, allow_private: bool = False,
             again: bool = False, unreviewed: bool = False, bad_share: float = 0.05,
             stopping: Callable[[], bool] = lambda: False, console: Console | None = None) -> dict:
    """Fetch the pictures of a folder of raw files, and write images/download.json.

    Args:
      raw_dir: the folder, see `amazon.find_files`.
      limits: of the download.
      allow_private: whether addresses of private networks and of this machine may be asked.
      again: whether final failures of an earlier run are asked again.
      unreviewed: whether items that no review names get a picture too; no job uses it.
      bad_share: share of a file's lines that may be damaged, see `untrusted.Lines.check`.
      stopping: called several times a second; True stops.
      console: where progress goes; None: standard error.

    Returns:
      The content of download.json. 'items' is the sum of 'there' (before this run), 'fetched',
      'failed', 'without_url', 'unreviewed' and 'left' (not asked, as the run was stopped).
      'failed' is the sum of 'reasons' {reason: count}, and of 'for_good' and 'for_now' (the next
      run asks again). 'failures' holds each with its reason and addresses, 'remembered' if it was
      not asked. 'bytes' and 'answers' are `Fetcher.sizes` and `requests`, 'lines' the counts of the
      raw files.

    Raises:
      InputError: as `amazon.read_urls`; or a place to write to is in use otherwise.
      Stopped: while the metadata were read.
      OSError: the disk cannot be written any more; finished pictures are kept.
    """
    folder = Path(raw_dir) / 'images'
    urls = amazon.read_urls(raw_dir, bad_share, stopping)
    stay_inside(folder, Path(raw_dir))
    if folder.exists() and not folder.is_dir():
        raise InputError(f'{folder}: not a directory. Expected one for the pictures. Fix: move the '
                         'file away.')
    folder.mkdir(exist_ok=True)
    journal = Journal(folder / 'download.jsonl')
    try:
        forgiven = {'address_refused'} if allow_private else set()
        plan = _plan(urls, folder, journal, again=again, unreviewed=unreviewed, forgiven=forgiven)
        return asyncio.run(_run(plan, folder, journal, limits, Guarded(allow_private), stopping,
                                console, urls.lines))
    finally:
        journal.close()


def _plan(found: amazon.PictureUrls, folder: Path, journal: Journal, *, again: bool,
          unreviewed: bool, forgiven: set[str]) -> _Plan:
    ask, counts, failed = {}, Counter(there=0, without_url=0, unreviewed=0), []
    present = images.by_stem(folder)
    for asin, urls in sorted(found.urls.items()):
        failures = {url: journal.failed.get((asin, url)) for url in urls}
        untried = tuple(url for url in urls if again or failures[url] in {None, *forgiven})
        unusable = {path: images.unusable(path, folder.parent) for path in present.get(asin, ())}
        if not unreviewed and asin not in found.reviewed:
            counts['unreviewed'] += 1
        elif any(not reason and path.stat().st_size for path, reason in unusable.items()):
            counts['there'] += 1
        elif any(unusable.values()):  # somebody else's file is not replaced
            failed.append(_failure(asin, urls, next(filter(None, unusable.values())), True, True))
        elif not urls:
            counts['without_url'] += 1
        elif not untried:
            failed.append(_failure(asin, urls, failures[urls[-1]], True, True))
        else:
            ask[asin] = untried
    return _Plan(ask, counts, failed)


def _failure(asin, urls, reason, for_good, remembered):
    return {'asin': asin, 'reason': reason, 'for_good': for_good, 'remembered': remembered,
            'urls': list(urls)}


async def _run(plan: _Plan, folder: Path, journal: Journal, limits: Limits,
               network: httpcore2.AsyncNetworkBackend, stopping: Callable[[], bool],
               console: Console | None, lines: dict) -> dict:
    """Fetch what the plan asks for with `limits.jobs` workers, and write the report."""
    fetcher, failed, fetched = Fetcher(folder, journal, limits, network), list(plan.failed), 0
    todo, started = iter(in_turns(plan.ask)), time.monotonic()

    async def work(update):
        nonlocal fetched
        for asin in todo:
            try:
                await fetcher.fetch(asin, plan.ask[asin])
                fetched += 1
            except FetchError as error:
                failed.append(_failure(asin, plan.ask[asin], error.reason, error.final, False))
            missing = len(failed) - len(plan.failed)
            update(fetched + missing, f'{missing} failed  {fetcher.sizes["received"] / 1e6:.1f} MB')

    with images.quiet(), progress('pictures', len(plan.ask), console=console) as update:
        tasks = {asyncio.create_task(work(update)) for _ in range(limits.jobs)}
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
            report = _report(plan, fetched, failed, fetcher)
            report |= {'seconds': round(time.monotonic() - started, 1), 'lines': lines,
                       'journal_lines_rejected': journal.rejected}
            files.write_json(folder / 'download.json', report)
    return report


def in_turns(ask: dict[str, tuple[str, ...]]) -> Iterable[str]:
    """Order items so that the hosts take turns.

    Args:
      ask: {asin: addresses}.

    Yields:
      The asins.
    """
    hosts = defaultdict(deque)
    for asin, urls in ask.items():
        try:
            hosts[checked(urls[0]).host].append(asin)
        except FetchError:
            hosts[''].append(asin)
    turns = deque(hosts.values())
    while turns:
        waiting = turns.popleft()
        yield waiting.popleft()
        if waiting:
            turns.append(waiting)


def _report(plan: _Plan, fetched: int, failed: list[dict], fetcher: Fetcher) -> dict:
    failed = sorted(failed, key=lambda failure: failure['asin'])
    asked = len(failed) - len(plan.failed) + fetched
    counts = {**plan.counts, 'fetched': fetched, 'failed': len(failed),
              'left': len(plan.ask) - asked}
    for_good = sum(failure['for_good'] for failure in failed)
    return {'date': datetime.now(UTC).isoformat(timespec='seconds'), 'items': sum(counts.values()),
            **counts,
            'reasons': dict(sorted(Counter(failure['reason'] for failure in failed).items())),
            'for_good': for_good, 'for_now': len(failed) - for_good, 'bytes': dict(fetcher.sizes),
            'answers': {str(status): n for status, n in sorted(fetcher.requests.items())},
            'failures': failed}
