"""Which pictures a folder of raw files lacks, fetching all of them, and the report."""

import asyncio
import time
from collections import Counter
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

from rich.console import Console

from tpad_jax.core import files
from tpad_jax.core.console import progress
from tpad_jax.data import images
from tpad_jax.data.download.fetching import Fetcher
from tpad_jax.data.download.hosts import FetchError, Guarded, Limits
from tpad_jax.data.download.journal import Journal
from tpad_jax.data.sources import amazon, event_files

POLL = 0.2  # seconds between two checks for a signal
DEFAULT = Limits()


def download(raw_dir: str | Path, limits: Limits = DEFAULT, *, allow_private: bool = False,
             again: bool = False, unreviewed: bool = False, bad_share: float = 0.05,
             stopping: Callable[[], bool] = lambda: False, console: Console | None = None) -> dict:
    """Fetch the pictures of a folder of raw files, and write images/download.json.

    Args:
      raw_dir: the folder, see `amazon.find_files`; or a CSV or Parquet file of items, next to which
        `images/` is.
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
    raw_dir = Path(raw_dir)
    if raw_dir.is_file():
        urls, raw_dir = event_files.read_urls(raw_dir, bad_share), raw_dir.parent
    else:
        urls = amazon.read_urls(raw_dir, bad_share, stopping)
    folder = amazon.image_folder(raw_dir)
    folder.mkdir(exist_ok=True)
    journal = Journal(folder / 'download.jsonl')
    try:
        retried = {None, 'address_refused'} if allow_private else {None}
        if again:
            retried.update(journal.failed.values())
        report = {'there': 0, 'without_url': 0, 'unreviewed': 0}
        ask, failures = _plan(urls, folder, journal.failed, report, unreviewed, retried)
        started = time.monotonic()

        async def run():
            fetcher = Fetcher(folder, journal, limits, Guarded(allow_private))
            try:
                await _fetch_all(fetcher, ask, failures, limits.jobs, stopping, console)
            finally:
                await fetcher.close()
                report.update(_outcome(report, ask, failures, fetcher), lines=urls.lines,
                              seconds=round(time.monotonic() - started, 1),
                              journal_lines_rejected=journal.rejected)
                files.write_json(folder / 'download.json', report)

        asyncio.run(run())
        return report
    finally:
        journal.close()


def _plan(found: amazon.PictureUrls, folder: Path, failed: dict, counts: dict, unreviewed: bool,
          retried: set) -> tuple[dict[str, tuple[str, ...]], list[dict]]:
    """-> {asin: addresses} to request, and failures without a request; counts the other items."""
    ask, failures = {}, []
    present = images.by_stem(folder)
    for asin, urls in sorted(found.urls.items()):
        untried = tuple(url for url in urls if failed.get((asin, url)) in retried)
        unusable = {path: images.unusable(path, folder.parent) for path in present.get(asin, ())}
        if not unreviewed and asin not in found.reviewed:
            counts['unreviewed'] += 1
        elif any(not reason and path.stat().st_size for path, reason in unusable.items()):
            counts['there'] += 1
        elif any(unusable.values()):  # somebody else's file is not replaced
            reason = next(filter(None, unusable.values()))
            failures.append(_failure(asin, urls, reason, remembered=True))
        elif not urls:
            counts['without_url'] += 1
        elif not untried:
            failures.append(_failure(asin, urls, failed[asin, urls[-1]], remembered=True))
        else:
            ask[asin] = untried
    return ask, failures


def _failure(asin, urls, reason, for_good=True, remembered=False):
    return {'asin': asin, 'reason': reason, 'for_good': for_good, 'remembered': remembered,
            'urls': list(urls)}


async def _fetch_all(fetcher: Fetcher, ask: dict[str, tuple[str, ...]], failures: list[dict],
                     jobs: int, stopping: Callable[[], bool], console: Console | None) -> None:
    """Fetch with so many workers, until all is fetched or `stopping`; extends `failures`."""
    todo, remembered = iter(in_turns(ask)), len(failures)

    async def work(update):
        for asin in todo:
            try:
                await fetcher.fetch(asin, ask[asin])
            except FetchError as error:
                failures.append(_failure(asin, ask[asin], error.reason, error.final))
            failed = len(failures) - remembered
            update(fetcher.fetched + failed,
                   f'{failed} failed  {fetcher.sizes["received"] / 1e6:.1f} MB')

    with images.quiet(), progress('pictures', len(ask), console=console) as update:
        tasks = {asyncio.create_task(work(update)) for _ in range(jobs)}
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


def in_turns(ask: dict[str, tuple[str, ...]]) -> list[str]:
    """Order items so that the hosts take turns.

    Args:
      ask: {asin: addresses}.

    Returns:
      The asins.
    """
    turn, asked = {}, Counter()  # of an item, and of a host
    for asin, urls in ask.items():
        host = ''.join(urls[0].split('/')[2:3])
        turn[asin] = asked[host]
        asked[host] += 1
    return sorted(ask, key=turn.get)


def _outcome(counts: dict, ask: dict, failures: list[dict], fetcher: Fetcher) -> dict:
    failures = sorted(failures, key=lambda failure: failure['asin'])
    asked = fetcher.fetched + sum(not failure['remembered'] for failure in failures)
    counts = {**counts, 'fetched': fetcher.fetched, 'failed': len(failures),
              'left': len(ask) - asked}
    for_good = sum(failure['for_good'] for failure in failures)
    return {'date': datetime.now(UTC).isoformat(timespec='seconds'), 'items': sum(counts.values()),
            **counts, 'reasons': dict(sorted(Counter(f['reason'] for f in failures).items())),
            'for_good': for_good, 'for_now': len(failures) - for_good,
            'bytes': dict(fetcher.sizes), 'failures': failures,
            'answers': {str(status): n for status, n in sorted(fetcher.requests.items())}}
