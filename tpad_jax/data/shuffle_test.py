"""The shuffle test: how much the order inside sessions helps the simplest rules.

The items of every session are put in a random order, in training and in test. Rules counted before
and after are compared on test targets. A directed rule loses by it the information in the order, a
symmetric rule the information in closeness. If neither loses, the order holds no information.
"""

from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import scipy.sparse as sp

from tpad_jax.core import ties
from tpad_jax.data.item_graphs import decayed, followers
from tpad_jax.data.sessions import Rows, Sessions, rows, take

AT = 20  # K of the metrics
# gain for the target at place 1, 2, .. AT
GAINS = {'hit@20': np.ones(AT), 'mrr@20': 1 / np.arange(1, AT + 1)}
SAMPLE, CHUNK = 5_000, 64  # test rows at most, and rows that are scored at once
LONGEST, DECAY = 10, 0.6  # steps between the items of a rule; weight per step from the prefix's end
PREFIX = 20  # items of a prefix that rules look at
# rule: steps of its pairs, weight per step from the prefix's end, counted in both directions
RULES = {'markov': (1, 0.0, False), 'sr': (LONGEST, DECAY, False),
         'symmetric': (LONGEST, DECAY, True)}


def shuffle_test(train: Sessions, test: Sessions, *, seed: int = 0,
                 every_prefix: bool = True) -> dict:
    """Measure hit@20 and mrr@20 of three rules before and after shuffling every session.

    'markov' follows the last item by one step. 'sr' follows all items of the prefix by up to 10
    steps; a pair weighs 1 / steps, and 0.6 for each step from the prefix's end. 'symmetric' is the
    same counted in both directions. The same rows (session and place) are scored before and after.

    Args:
      train: sessions that the rules are counted on.
      test: every prefix of its sessions is a row; at most SAMPLE of them, drawn by the seed.
      seed: of the sample and of the orders.
      every_prefix: False: a session is one row. Its target, the last item, stays the target, as
        the items before it may be known from training.

    Returns:
      'rows', and {rule: {metric: {'before', 'after', 'error'}}}: 'error' is the standard error of
      their difference; None without rows.
    """
    rng = np.random.default_rng(seed)
    size = 1 + max((int(part.items.max()) for part in (train, test) if len(part.items)), default=0)
    places = {name: [] for name in RULES}
    pairs = (train, test), (shuffled(train, rng), shuffled(test, rng, every_prefix))
    ends = np.maximum(test.lengths - 1, 0).clip(max=None if every_prefix else 1).cumsum()
    total = int(ends[-1]) if len(ends) else 0
    picked = np.sort(rng.choice(total, min(total, SAMPLE), replace=False))
    # rows of the sessions that have picked ones: those of all take a hundred times the memory
    owners, owner = np.unique(np.searchsorted(ends, picked, 'right'), return_inverse=True)
    sizes = np.diff(ends, prepend=0)[owners]
    picked = picked - (ends[owners] - sizes.cumsum())[owner]
    for counted, tested in pairs:
        scored = rows(take(tested, owners), PREFIX, every_prefix)
        tables = {steps: followers(counted, size - 1, steps, lag_power=1)
                  for steps in {steps for steps, *_ in RULES.values()}}
        for name, (steps, decay, both) in RULES.items():
            table = tables[steps]
            table = sp.csr_array(table + table.T) if both else table
            # rows at a time share a pass over all items; their scores take memory. scipy releases
            # the lock
            chunks = [picked[begin:begin + CHUNK] for begin in range(0, len(picked), CHUNK)]
            with ThreadPoolExecutor(4) as pool:
                parts = list(pool.map(partial(_places, table, scored, decay=decay), chunks))
            places[name].append(tuple(map(np.concatenate, zip(*parts, strict=True))) or None)
    return {'rows': len(picked),
            **{name: {metric: _summary(gain, *pair) for metric, gain in GAINS.items()}
               for name, pair in places.items()}}


def shuffled(sessions: Sessions, rng: np.random.Generator, whole: bool = True) -> Sessions:
    """Put the items of every session in a random order; unless `whole`, its last one stays last."""
    place = rng.random(len(sessions.items))
    if not whole:
        place[sessions.offsets[1:][sessions.lengths > 0] - 1] = 1
    return sessions._replace(items=sessions.items[np.lexsort((place, sessions.owner))])


def _places(table: sp.csr_array, scored: Rows, picked: np.ndarray, decay: float
            ) -> tuple[np.ndarray, np.ndarray]:
    """Items above each picked row's target, and those at its score with it: int [r] each."""
    items, target = scored.items[picked], scored.target[picked]
    scores = sp.csr_array(decayed(items, decay, table.shape[0] - 1) @ table)
    scores.data = scores.data.round(9)  # sums in another order tie all the same
    scores.eliminate_zeros()
    target_score = scores[np.arange(len(items)), target]
    listed = np.diff(scores.indptr)
    limit = np.repeat(target_score, listed)
    above, equal = (np.diff(np.searchsorted(np.flatnonzero(mask), scores.indptr))
                    for mask in (scores.data > limit, scores.data == limit))
    # at score 0 no rule leads to the target, which ties with all items that no rule leads to
    return above, np.where(target_score == 0, table.shape[0] - 1 - listed, equal)


def _summary(gain: np.ndarray, before: tuple | None, after: tuple | None) -> dict:
    """A metric before and after; ties earn the mean over their orders."""
    if before is None:
        return {'before': None, 'after': None, 'error': None}
    earned = [ties.mean_gain(gain, above, equal, AT) for above, equal in (before, after)]
    return {'before': float(earned[0].mean()), 'after': float(earned[1].mean()),
            'error': float((earned[0] - earned[1]).std() / len(earned[0]) ** 0.5)}
