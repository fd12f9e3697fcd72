"""The data audit in front of every run: what the sessions are, and what may not be claimed on them.

Counts what has misled this field: an order inside sessions that is a file's and not the
customer's, test sessions seen in training, repeats, cold targets, coarse times.
"""

from itertools import pairwise

import numpy as np
from scipy.special import expit

from tpad_jax.data.sessions import DAY, Sessions
from tpad_jax.data.shuffle_test import GAINS, shuffle_test

MIN_SEEN = 6  # times a pair of items must be adjacent to say something about direction
MIN_PAIRS = 30  # such pairs, below which the order test says nothing
ORDER_STEPS, ORDER_RATE = 60, 2.0  # of the fit of one fixed order of all items
LENGTHS = ('2', '3', '4', '5', '6-10', '11+')
_EDGES = (3, 4, 5, 6, 11)  # first length of the next bin

# above these a number becomes a warning
ONE_WAY = 0.5
FIXED_ORDER = 0.7
TIES = 0.05
MOST_TIES = 0.5  # above it the order inside sessions is as good as unknown
OVERLAP = 0.05
DUPLICATES = 0.2
REPEATS = 0.3
COLD = 0.3
SURE = 3  # standard errors that a loss by shuffling has to exceed


def audit(train: Sessions, valid: Sessions, test: Sessions, warm: np.ndarray, *, form: str,
          ties: float) -> dict:
    """Examines the three splits.

    Args:
      train: training sessions after all filters.
      valid: validation sessions as they are scored.
      test: test sessions as they are scored.
      warm: bool [V + 1], the items of the training sessions.
      form: what the data come from, '2018' or '2023', say.
      ties: share of neighbouring events of one session with equal times (`sessions.time_ties`);
        nan if the data have no times.

    Returns:
      A JSON-able dict of numbers (shares in 0..1, None where nothing could be counted) with
      `lengths` {bin: sessions} of the training sessions, `shuffle` (`shuffle.shuffle_test`),
      `warnings`, a list of sentences, and `verdict`, whether claims about transitions can be made.
      `tie_share` and `day_granular` are None where times are not known, which sessions that all
      start at the same moment say as well.
    """
    seen = set(_keys(train))
    starts = np.concatenate([train.start, valid.start, test.start])
    report = {
        'form': form,
        'items': len(warm) - 1,
        'warm_items': int(warm.sum()),
        'sessions': {name: len(part.start) for name, part in
                     (('train', train), ('valid', valid), ('test', test))},
        'events': len(train.items) + len(valid.items) + len(test.items),
        'lengths': length_histogram(train),
        **order_artefact(train, test),
        'repeat_share': repeat_share(test),
        'overlap_share': _mean([key in seen for key in _keys(test)]),
        'duplicate_share': 1 - len(seen) / len(train.start) if len(train.start) else None,
        'cold_target_share': _mean(~warm[_targets(test)]),
        'tie_share': None if np.isnan(ties) else float(ties),
        'day_granular': bool((starts % DAY == 0).all()) if len(np.unique(starts)) > 1 else None,
        'shuffle': shuffle_test(train, test),
    }
    return {**report, 'warnings': _warnings(report), 'verdict': verdict(report)}


def order_artefact(train: Sessions, test: Sessions) -> dict:
    """Tests whether the order inside sessions looks like a list's instead of a customer's.

    Of the unordered pairs of different items adjacent at least MIN_SEEN times in `train`, the
    share that occurs in one direction only, next to what a fair coin would give: 2 * 0.5^n for a
    pair seen n times. True transitions can be directed as well; but a list's order is *one* order
    of all items. So the order that fits `train` best is estimated, and `fixed_order_share` is the
    share of `test`'s adjacent pairs it predicts (equal places count half): 0.5 if there is none.

    Returns:
      order_pairs (pairs counted), one_way_share, one_way_by_chance, fixed_order_share.
    """
    first, second = _adjacent(train)
    size = 1 + max((int(part.items.max()) for part in (train, test) if len(part.items)), default=0)
    key = np.minimum(first, second) * size + np.maximum(first, second)
    _, pair, count = np.unique(key, return_inverse=True, return_counts=True)
    forward = np.bincount(pair, weights=first < second, minlength=len(count))
    often = count >= MIN_SEEN
    one_way = (forward == 0) | (forward == count)

    place = _fixed_order(first, second, size)
    known = np.isin(np.arange(size), np.concatenate([first, second]))
    a, b = _adjacent(test)
    both = known[a] & known[b]
    step = np.sign(place[b[both]] - place[a[both]])
    return {'order_pairs': int(often.sum()),
            'one_way_share': _mean(one_way[often]),
            'one_way_by_chance': _mean(2 * 0.5 ** count[often]),
            'fixed_order_share': _mean((1 + step) / 2)}


def length_histogram(sessions: Sessions) -> dict[str, int]:
    """Number of sessions by length, in the bins LENGTHS; those of one item are not counted."""
    lengths = np.diff(sessions.offsets)
    bins = np.digitize(lengths[lengths > 1], _EDGES)
    return dict(zip(LENGTHS, np.bincount(bins, minlength=len(LENGTHS)).tolist(), strict=True))


def repeat_share(sessions: Sessions) -> float | None:
    """Share of targets (every item but a session's first) that occurred earlier in the session."""
    owner = np.repeat(np.arange(len(sessions.start)), np.diff(sessions.offsets))
    events = np.stack([owner, sessions.items], axis=1)
    different = len(np.unique(events, axis=0))
    targets = len(_targets(sessions))
    return (len(events) - different) / targets if targets else None


def describe(report: dict) -> list[str]:
    """The audit in words, one line per finding, then the warnings, then the verdict."""
    sessions = report['sessions']
    lengths = ', '.join(f'{name}: {count}' for name, count in report['lengths'].items())
    lines = [
        f'{report["items"]} items, {report["warm_items"]} of them in training sessions; '
        f'{sessions["train"]} / {sessions["valid"]} / {sessions["test"]} sessions '
        f'(train / valid / test) with {report["events"]} events.',
        f'Training sessions by length: {lengths}.',
        f'Test targets: {_percent(report["cold_target_share"])} cold, '
        f'{_percent(report["repeat_share"])} already in their session.',
        f'Identical to a training session: {_percent(report["overlap_share"])} of the test '
        f'sessions; to an earlier one: {_percent(report["duplicate_share"])} of the training '
        'sessions.',
        f'Order: {report["order_pairs"]} item pairs are adjacent {MIN_SEEN} times or more, '
        f'{_percent(report["one_way_share"])} of them in one direction only '
        f'({_percent(report["one_way_by_chance"])} by a coin); one fixed order of the items '
        f'predicts {_percent(report["fixed_order_share"])} of the test pairs (50 % if there is '
        'none).',
        f'Shuffling every session, hit@20 on {report["shuffle"]["rows"]} test rows: '
        f'{_lost(report, "markov", "one step")}, {_lost(report, "sr", "ten steps")}, '
        f'{_lost(report, "symmetric", "ten steps either way")}.',
        'Equal times among neighbours in a session: '
        + ('not known.' if report['tie_share'] is None else f'{_percent(report["tie_share"])}.'),
    ]
    return [*lines, *(f'Warning: {sentence}' for sentence in report['warnings']),
            f'Verdict: {report["verdict"]}']


def verdict(report: dict) -> str:
    """One or two sentences: can claims about transitions be made on these data, and why.

    They cannot where the order inside sessions is a file's, where it is not known, or where
    shuffling the sessions costs the rules of direction nothing.
    """
    never = 'Nothing can be claimed about transitions on these data: '
    shuffled = report['shuffle']
    felt = [(rule, metric) for rule in ('sr', 'markov') for metric in GAINS
            if _loss(shuffled, rule, metric) > SURE * (shuffled[rule][metric]['error'] or 0)]
    if _is_a_files(report):
        return (f'{never}the order inside sessions is a file\'s, not the customers\' '
                f'({_percent(report["one_way_share"])} of the frequent pairs go one way only, one '
                f'fixed order of the items predicts {_percent(report["fixed_order_share"])} of the '
                'test pairs). A directed model that wins here may have learnt that order alone.')
    if report['day_granular']:
        return f'{never}the times are days, so the order inside sessions is not known.'
    if (report['tie_share'] or 0) > MOST_TIES:
        return (f'{never}{_percent(report["tie_share"])} of neighbouring events have equal times, '
                'so the order inside sessions is not known.')
    if not felt:
        return (f'{never}shuffling the sessions costs rules of direction nothing that '
                f'{report["shuffle"]["rows"]} test rows could show, so there is no order to model.')
    rule, metric = felt[0]
    close = _loss(shuffled, 'symmetric', metric) > _loss(shuffled, rule, metric) / 2
    figures = ' and '.join(_lost(report, *names, metric) for names in
                           ((rule, 'a directed rule'), ('symmetric', 'a symmetric one')))
    reserves = []
    if report['tie_share'] is None:
        reserves.append('the times are not known, so all of this rests on the sessions alone')
    elif report['tie_share'] > TIES:
        reserves.append(f'{_percent(report["tie_share"])} of neighbouring events have equal times')
    if report['order_pairs'] < MIN_PAIRS:
        reserves.append(f'{report["order_pairs"]} frequent pairs are too few to tell a file\'s '
                        'order from the customers\'')
    elif _one_way(report):
        reserves.append(f'{_percent(report["one_way_share"])} of the frequent pairs go one way '
                        'only, which the times must bear out')
    reserve = f' But {", and ".join(reserves)}.' if reserves else ''
    return ('Claims about transitions can be made on these data: no fixed order shows, and '
            f'shuffling costs {metric} ({figures}), '
            + ('more by closeness than by direction.' if close else 'by direction.') + reserve)


def _warnings(report: dict) -> list[str]:
    sentences = []
    if report['day_granular']:
        sentences.append(
            'Every session starts at midnight UTC: the times are days, not moments, so the order '
            'inside a session is not known (equal times were put in a seeded random order) and '
            'nothing may be claimed about transitions inside a day.')
    elif (report['tie_share'] or 0) > TIES:
        sentences.append(
            f'{_percent(report["tie_share"])} of neighbouring events in a session have equal '
            'times: their order is not known and was drawn at random with the seed.')
    if _one_way(report):
        facts = (f'Of {report["order_pairs"]} item pairs adjacent {MIN_SEEN} times or more '
                 f'{_percent(report["one_way_share"])} occur in one direction only '
                 f'({_percent(report["one_way_by_chance"])} by a coin)')
        if _is_a_files(report):
            sentences.append(
                f'{facts}, and one fixed order of the items predicts '
                f'{_percent(report["fixed_order_share"])} of the test pairs: the order inside '
                'sessions looks like that of a file, not of the customers, and a directed model '
                'may only be learning it.')
        else:
            sentences.append(
                f'{facts}: what follows is strongly directed; make sure that the times are real '
                'before claiming anything about transitions.')
    if (report['overlap_share'] or 0) > OVERLAP:
        sentences.append(f'{_percent(report["overlap_share"])} of the test sessions are identical '
                         'to a training session, so memory alone predicts them.')
    if (report['duplicate_share'] or 0) > DUPLICATES:
        sentences.append(f'{_percent(report["duplicate_share"])} of the training sessions repeat '
                         'another one exactly.')
    if (report['repeat_share'] or 0) > REPEATS:
        sentences.append(f'{_percent(report["repeat_share"])} of the test targets are already in '
                         'their session: compare with repeat-last, and read the slice "new".')
    if (report['cold_target_share'] or 0) > COLD:
        sentences.append(f'{_percent(report["cold_target_share"])} of the test targets occur in no '
                         'training session; models of item ids cannot predict them.')
    return sentences


def _one_way(report: dict) -> bool:
    return report['order_pairs'] >= MIN_PAIRS and report['one_way_share'] > ONE_WAY


def _is_a_files(report: dict) -> bool:
    return _one_way(report) and (report['fixed_order_share'] or 0) > FIXED_ORDER


def _loss(shuffled: dict, rule: str, metric: str) -> float:
    found = shuffled[rule][metric]
    return (found['before'] or 0) - (found['after'] or 0)


def _lost(report: dict, rule: str, name: str, metric: str = 'hit@20') -> str:
    """'one step 24.0 % -> 16.7 %', before and after shuffling."""
    found = report['shuffle'][rule][metric]
    return f'{name} {_percent(found["before"])} -> {_percent(found["after"])}'


def _fixed_order(first: np.ndarray, second: np.ndarray, size: int) -> np.ndarray:
    """Places of all items in one order, f64 [size]: the second of a pair stands behind the first.

    Bradley and Terry's model (1952), P(first before second) = sigmoid(place difference), fitted by
    gradient steps from equal places; stopping early stands in for a prior.
    """
    place = np.zeros(size)
    seen = np.bincount(first, minlength=size) + np.bincount(second, minlength=size)
    rate = ORDER_RATE / np.maximum(seen, 1)  # a count over 4 bounds the curvature
    for _ in range(ORDER_STEPS):
        surprise = expit(place[first] - place[second])
        place += rate * (np.bincount(second, surprise, size) - np.bincount(first, surprise, size))
    return place


def _adjacent(sessions: Sessions) -> tuple[np.ndarray, np.ndarray]:
    """Neighbouring events of different items -> (first, second), int64 each."""
    inside = np.ones(max(len(sessions.items) - 1, 0), bool)
    ends = sessions.offsets[1:-1] - 1
    inside[ends[(ends >= 0) & (ends < len(inside))]] = False
    first, second = (part[inside].astype(np.int64)
                     for part in (sessions.items[:-1], sessions.items[1:]))
    different = first != second
    return first[different], second[different]


def _targets(sessions: Sessions) -> np.ndarray:
    """Every event but each session's first, as item ids."""
    later = np.ones(len(sessions.items), bool)
    later[sessions.offsets[:-1][np.diff(sessions.offsets) > 0]] = False
    return sessions.items[later]


def _keys(sessions: Sessions) -> list[bytes]:
    """One key per session; equal for sessions of the same items in the same order."""
    data, bounds = sessions.items.tobytes(), (4 * sessions.offsets).tolist()
    return [data[begin:end] for begin, end in pairwise(bounds)]


def _mean(values: np.ndarray | list) -> float | None:
    return float(np.mean(values)) if len(values) else None


def _percent(share: float | None) -> str:
    return 'unknown' if share is None else f'{100 * share:.1f} %'
