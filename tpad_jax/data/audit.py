"""The data audit at the start of every run: properties of the sessions, and the claims they allow.

It counts what has misled this field: sessions in the order of a file and not of the customer, test
sessions seen in training, repeats, cold targets, coarse times.
"""

from itertools import pairwise

import numpy as np
import polars as pl
from scipy.special import expit

from tpad_jax.data.sessions import DAY, Sessions, take
from tpad_jax.data.shuffle_test import GAINS, shuffle_test

MIN_SEEN = 6  # times that a pair of items must be adjacent to count for the order test
MIN_PAIRS = 30  # pairs that the order test needs
RECENT = 1_000_000  # events of the latest training sessions, by which order is tested
ORDER_STEPS, ORDER_RATE = 60, 2.0  # of the fit of one fixed order of all items
LENGTHS = ('2', '3', '4', '5', '6-10', '11+')
_EDGES = (3, 4, 5, 6, 11)  # first length of the next bin

# above these a share becomes a warning
ONE_WAY, FIXED_ORDER, TIES = 0.5, 0.7, 0.05
WARNED_SHARES = {
    'overlap_share': (0.05, 'the test sessions are identical to a training session, so memory '
                            'alone predicts them.'),
    'duplicate_share': (0.2, 'the training sessions repeat another one exactly.'),
    # 3 to 23 % on public sessions, 67 % on the histories of users
    'history_share': (0.3, 'the test prefixes of three items or more begin with three neighbours '
                           'of a training session, as the histories of users do. Only the last '
                           'item is new then'),
    'repeat_share': (0.3, 'the test targets are already in their session: compare with '
                          'repeat-last, and read the slice "new".'),
    'cold_target_share': (0.3, 'the test targets occur in no training session; models of item ids '
                               'cannot predict them.')}
# how the last item is scored alone, where there are no times (validate.check)
LAST_ALONE = (': score it alone by config.data.protocol=published and config.data.'
              'published_last_only=True')
MOST_TIES = 0.5  # above it the order inside sessions counts as unknown
UNITS = {'day': 1000 * DAY, 'hour': 3_600_000, 'minute': 60_000, 'second': 1000, 'millisecond': 1}
SURE = 3  # standard errors that a loss by shuffling has to exceed


def audit(train: Sessions, valid: Sessions, test: Sessions, warm: np.ndarray, *, form: str,
          ties: float, every_prefix: bool = True, timed: bool = True) -> dict:
    """Examine the three splits.

    Args:
      train: training sessions after all filters.
      valid: validation sessions as they are scored.
      test: test sessions as they are scored.
      warm: bool [V + 1], the items of the training sessions.
      form: of the source, such as '2018' or '2023'.
      ties: share of neighbouring events of one session with equal times (`sessions.time_ties`);
        nan if the data have no times.
      every_prefix: whether every item of a test session but the first is a target; False: the last
        one alone. The shares of test targets are of these.
      timed: see `sources.Source`: only sessions without times can be scored by their last item.

    Returns:
      A JSON-able dict of numbers (shares in 0..1, None where nothing could be counted) with
      `lengths` {bin: sessions} of the training sessions, `shuffle` (`shuffle_test.shuffle_test`),
      `warnings`, a list of sentences, and `verdict`, whether claims about transitions can be made.
      `tie_share` and `day_granular` are None where times are not known, as in sessions that all
      start at the same moment. `time_unit` is the coarsest of UNITS in which all times of events
      are whole, 'moment' for a single one, None where events have no times.
    """
    seen = set(_keys(train))
    different, overlap = len(seen), _mean([key in seen for key in _keys(test)])
    del seen  # the shuffle test needs the memory
    first = np.searchsorted(train.offsets, train.offsets[-1] - RECENT, 'right') - 1
    recent = take(train, np.arange(first, len(train.start))) if first > 0 else train
    starts = np.concatenate([train.start, valid.start, test.start])
    splits = {'train': train, 'valid': valid, 'test': test}
    times = [part.time for part in splits.values()]
    known = not any(time is None for time in times)
    if known:  # a source of prepared sessions counts no ties
        starts = np.concatenate(times) // 1000
        if np.isnan(ties):
            equal = [(np.diff(part.time) == 0)[np.diff(part.owner) == 0]
                     for part in splits.values()]
            ties = np.concatenate(equal).mean()
    days = bool((starts % DAY == 0).all()) if (starts != starts[:1]).any() else None
    unit = _unit(np.concatenate(times)) if known else None
    del starts
    report = {
        'form': form, 'items': len(warm) - 1, 'warm_items': int(warm.sum()),
        'sessions': {name: len(part.start) for name, part in splits.items()},
        'events': sum(len(part.items) for part in splits.values()),
        'lengths': length_histogram(train), **order_artefact(recent, test, every_prefix),
        'repeat_share': repeat_share(test, every_prefix),
        'overlap_share': overlap,
        'duplicate_share': 1 - different / len(train.start) if len(train.start) else None,
        'history_share': history_share(train, test),
        'cold_target_share': _mean(~warm[_steps(test, every=every_prefix)[1]]),
        'tie_share': None if np.isnan(ties) else float(ties),
        'time_unit': unit, 'day_granular': days,
        'shuffle': shuffle_test(recent, test, every_prefix=every_prefix)}
    return {**report, 'warnings': _warnings(report, every_prefix and not timed),
            'verdict': verdict(report)}


def order_artefact(train: Sessions, test: Sessions, every_prefix: bool = True) -> dict:
    """Test whether the order inside sessions looks like a list's instead of a customer's.

    `one_way_share` is the share of unordered pairs of different items, adjacent at least MIN_SEEN
    times in `train`, that occur in one direction only. By chance it would be 2 * 0.5^n for a pair
    seen n times. True transitions can be directed as well, but a list's order is *one* order of all
    items. So the order that fits `train` best is estimated. `fixed_order_share` is the share of
    `test`'s adjacent pairs that it predicts (equal positions count half): 0.5 without an order.

    Args:
      train: training sessions.
      test: test sessions.
      every_prefix: as in `audit`.

    Returns:
      order_pairs (pairs counted), one_way_share, one_way_by_chance, fixed_order_share.
    """
    first, second = _steps(train, changes=True)
    size = 1 + max((int(part.items.max()) for part in (train, test) if len(part.items)), default=0)
    key = np.minimum(first, second) * size + np.maximum(first, second)
    _, pair, count = np.unique(key, return_inverse=True, return_counts=True)
    forward = np.bincount(pair, weights=first < second, minlength=len(count))
    often = count >= MIN_SEEN
    one_way = (forward == 0) | (forward == count)

    position = _fixed_order(first, second, size)
    known = np.isin(np.arange(size), np.concatenate([first, second]))
    a, b = _steps(test, changes=True, every=every_prefix)
    comparable = known[a] & known[b]
    step = np.sign(position[b[comparable]] - position[a[comparable]])
    return {'order_pairs': int(often.sum()), 'one_way_share': _mean(one_way[often]),
            'one_way_by_chance': _mean(2 * 0.5 ** count[often]),
            'fixed_order_share': _mean((1 + step) / 2)}


def length_histogram(sessions: Sessions) -> dict[str, int]:
    """Count sessions by length, in the bins LENGTHS; those of one item are not counted."""
    bins = np.digitize(sessions.lengths[sessions.lengths > 1], _EDGES)
    return dict(zip(LENGTHS, np.bincount(bins, minlength=len(LENGTHS)).tolist(), strict=True))


def repeat_share(sessions: Sessions, every_prefix: bool = True) -> float | None:
    """Compute the share of targets that occurred in their session before.

    Args:
      sessions: of the test.
      every_prefix: as in `audit`.
    """
    _, first = np.unique(np.stack([sessions.owner, sessions.items]), axis=1, return_index=True)
    return _mean(~np.isin(np.flatnonzero(_targets(sessions, every_prefix)), first))


def history_share(train: Sessions, test: Sessions) -> float | None:
    """Compute the share of test prefixes whose first three items are neighbours in training.

    Of prefixes of three items or more. In the order of time a test session is new, and few begin
    so; where every user has one growing sequence, most do.
    """
    def runs(sessions):  # one number per three neighbouring events, of one session or not
        items = sessions.items.astype(np.int64)
        return items[:-2] + 2**21 * (items[1:-1] + 2**21 * items[2:])

    owner = train.owner
    begins = test.offsets[:-1][test.lengths > 3]
    known = pl.Series(runs(train)[owner[2:] == owner[:-2]])
    return _mean(pl.Series(runs(test)[begins]).is_in(known.implode()).to_numpy())


def describe(report: dict) -> list[str]:
    """Describe an audit: one line per finding, then the warnings, then the verdict."""
    sessions, share = report['sessions'], _percents(report)
    lengths = ', '.join(f'{name}: {count}' for name, count in report['lengths'].items())
    changes = ', '.join(_change(report, rule, name) for rule, name in (
        ('markov', 'one step'), ('sr', 'ten steps'), ('symmetric', 'ten steps either way')))
    lines = [
        f'{report["items"]} items, {report["warm_items"]} of them in training sessions; '
        f'{sessions["train"]} / {sessions["valid"]} / {sessions["test"]} sessions '
        f'(train / valid / test) with {report["events"]} events.',
        f'Training sessions by length: {lengths}.',
        f'Test targets: {share["cold_target_share"]} cold, {share["repeat_share"]} already in '
        'their session.',
        f'Identical to a training session: {share["overlap_share"]} of the test sessions; to an '
        f'earlier one: {share["duplicate_share"]} of the training sessions. Begin with three '
        f'neighbours of one: {share["history_share"]} of the test prefixes of three items or more.',
        f'Order: {report["order_pairs"]} item pairs are adjacent {MIN_SEEN} times or more, '
        f'{share["one_way_share"]} of them in one direction only ({share["one_way_by_chance"]} by '
        f'chance); one fixed order of the items predicts {share["fixed_order_share"]} of the test '
        'pairs (50 % without such an order).',
        f'Shuffling every session, hit@20 on {report["shuffle"]["rows"]} test rows: {changes}.',
        'Equal times among neighbours in a session: '
        + ('not known.' if report['tie_share'] is None else f'{share["tie_share"]}.')
        + {'moment': ' All events have the same time.', None: ''}.get(
            unit := report.get('time_unit'), f' All times are whole {unit}s.')]
    return [*lines, *(f'Warning: {sentence}' for sentence in report['warnings']),
            f'Verdict: {report["verdict"]}']


def verdict(report: dict) -> str:
    """State whether claims about transitions can be made on these data, and why.

    They cannot if the order inside sessions is a file's, if it is not known, or if shuffling the
    sessions does not lower the metrics of directed rules.

    Args:
      report: of `audit`, without its warnings.

    Returns:
      One or two sentences.
    """
    shuffled, doubts, times = report['shuffle'], _doubts(report), report['tie_share']
    affected = [(rule, metric) for rule in ('sr', 'markov') for metric in GAINS
                if _loss(shuffled, rule, metric) > SURE * (shuffled[rule][metric]['error'] or 0)]
    reasons = [sentence for forbids, sentence in doubts if forbids]
    if not affected:
        reasons.append(f'on {shuffled["rows"]} test rows, shuffling the sessions does not lower '
                       'the metrics of directed rules measurably')
    if reasons:
        return f'Claims about transitions cannot be made on these data: {reasons[0]}.'
    rule, metric = affected[0]
    close = _loss(shuffled, 'symmetric', metric) > _loss(shuffled, rule, metric) / 2
    changes = ' and '.join(_change(report, *names, metric) for names in
                           ((rule, 'a directed rule'), ('symmetric', 'a symmetric one')))
    reserves = [sentence for _, sentence in doubts]
    if report['order_pairs'] < MIN_PAIRS:
        reserves.append(f'{report["order_pairs"]} frequent pairs are too few to tell the order of '
                        'a file from that of the customers')
    if times is None:
        reserves.append('the times are not known, so that this holds for the sessions as they are')
    return ('Claims about transitions can be made on these data: there is no fixed order, and '
            f'shuffling lowers {metric} ({changes}), '
            + ('more by closeness than by direction.' if close else 'by direction.')
            + (f' But {"; ".join(reserves)}.' if reserves else ''))


def _doubts(report: dict) -> list[tuple[bool, str]]:
    """List doubts about claims on transitions: whether one forbids them, and a sentence."""
    share, days, ties = _percents(report), report['day_granular'], report['tie_share'] or 0
    one_way = report['order_pairs'] >= MIN_PAIRS and report['one_way_share'] > ONE_WAY
    fixed = one_way and (report['fixed_order_share'] or 0) > FIXED_ORDER
    facts = (f'{share["one_way_share"]} of the frequent pairs occur in one direction only '
             f'({share["one_way_by_chance"]} by chance)')
    return [(forbids, sentence) for holds, forbids, sentence in (
        (fixed, True, f'{facts}, and one fixed order of the items predicts '
         f'{share["fixed_order_share"]} of the test pairs: the order inside sessions looks like '
         'that of a file, not of the customers, and a directed model may only be learning it'),
        (days, True, 'every session starts at midnight UTC: the times are days, not moments, so '
         'the order inside a session is not known (equal times are in a seeded random order)'),
        (not days and ties > TIES, ties > MOST_TIES,
         f'{share["tie_share"]} of neighbouring events in a session have equal times: their order '
         'is not known and was drawn at random with the seed'),
        (one_way and not fixed, False, f'{facts}: transitions are strongly directed; check that '
         'the times are real before you claim anything about transitions')) if holds]


def _warnings(report: dict, can_score_last: bool) -> list[str]:
    share = _percents(report)
    doubts = [f'{sentence[0].upper()}{sentence[1:]}.' for _, sentence in _doubts(report)]
    advice = {'history_share': f'{LAST_ALONE * can_score_last}.'}
    return doubts + [f'{share[name]} of {text}{advice.get(name, "")}'
                     for name, (limit, text) in WARNED_SHARES.items()
                     if (report[name] or 0) > limit]


def _loss(shuffled: dict, rule: str, metric: str) -> float:
    return (shuffled[rule][metric]['before'] or 0) - (shuffled[rule][metric]['after'] or 0)


def _change(report: dict, rule: str, name: str, metric: str = 'hit@20') -> str:
    """'one step 24.0 % -> 16.7 %', before and after shuffling."""
    values = report['shuffle'][rule][metric]
    return f'{name} {_percent(values["before"])} -> {_percent(values["after"])}'


def _fixed_order(first: np.ndarray, second: np.ndarray, size: int) -> np.ndarray:
    """Positions of all items in one order, f64 [size]: the second of a pair comes after the first.

    Bradley and Terry's model (1952), P(first before second) = sigmoid(position difference), fitted
    by gradient steps from equal positions; stopping early takes the role of a prior.
    """
    place = np.zeros(size)
    seen = np.bincount(first, minlength=size) + np.bincount(second, minlength=size)
    rate = ORDER_RATE / np.maximum(seen, 1)  # a count over 4 bounds the curvature
    for _ in range(ORDER_STEPS):
        surprise = expit(place.take(first) - place.take(second))
        place += rate * (np.bincount(second, surprise, size) - np.bincount(first, surprise, size))
    return place


def _unit(times: np.ndarray) -> str:
    """The coarsest unit in which all times (ms) are whole; 'moment' if there is one alone."""
    if (times == times[0]).all():
        return 'moment'
    return next(name for name, unit in UNITS.items() if (times % unit == 0).all())


def _targets(sessions: Sessions, every: bool) -> np.ndarray:
    """Which events are targets, bool [E]: all but a session's first, or only its last if longer."""
    follows, owner = np.ones(len(sessions.items), bool), sessions.owner
    follows[sessions.offsets[:-1][sessions.lengths > 0]] = False
    return follows if every else follows & np.append(owner[1:] != owner[:-1], True)


def _steps(sessions: Sessions, changes: bool = False, every: bool = True
           ) -> tuple[np.ndarray, np.ndarray]:
    """Targets and the events before them -> (earlier, later) items, int64; all, or `changes`."""
    earlier, later = sessions.items[:-1].astype(np.int64), sessions.items[1:].astype(np.int64)
    inside = _targets(sessions, every)[1:] & ((earlier != later) | (not changes))
    return earlier[inside], later[inside]


def _keys(sessions: Sessions) -> list[bytes]:
    """One key per session; equal for sessions of the same items in the same order."""
    data, bounds = sessions.items.tobytes(), (4 * sessions.offsets).tolist()
    return [data[begin:end] for begin, end in pairwise(bounds)]


def _mean(values: np.ndarray | list) -> float | None:
    return float(np.mean(values)) if len(values) else None


def _percents(report: dict) -> dict[str, str]:
    """The shares of a report in words, by key."""
    return {key: _percent(share) for key, share in report.items()
            if key.endswith(('_share', '_by_chance'))}


def _percent(share: float | None) -> str:
    return 'unknown' if share is None else f'{100 * share:.1f} %'
