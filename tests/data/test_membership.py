"""Which items are read and ranked: decided before validation, renumbered alike everywhere."""

import numpy as np
import pytest

from tests.data.sources.test_event_files import START, load
from tpad_jax.data import sessions
from tpad_jax.errors import InputError
from tpad_jax.evaluation.evaluate import evaluate

DAY = 86_400_000
# Items by letter. C is reviewed once, before validation; D first in a validation session, E first
# in a test session, F never.
BASKETS = ['AB', 'BA', 'C', 'AB', 'DAB', 'BA', 'AEB', 'BC']
EVENTS = [('user', 'item', 'time'), *(
    (f'U{day}', letter, 1000 * START + DAY * day + 1000 * step)
    for day, basket in enumerate(BASKETS) for step, letter in enumerate(basket))]
ITEMS = [('id', 'title', 'brand'), *((letter, f'tea {letter}', 'x') for letter in 'FEDCBA')]


@pytest.mark.parametrize(('choice', 'kept', 'targets'), [
    ('all', 'ABCDEF', 'EBC'), ('reviewed', 'ABC', '-BC'), ('sessions', 'AB', '-B-')])
def test_targets_outside_are_misses(tmp_path, choice, kept, targets):
    data = load(tmp_path, events=EVENTS, items=ITEMS, catalogue=choice)
    assert data.asins[1:] == sorted(kept)
    assert data.titles[1:] == [f'tea {letter}' for letter in kept]
    assert data.choices == {'all': 6, 'reviewed': 3, 'sessions': 2}
    assert data.warm.tolist() == [False, *(letter in 'AB' for letter in kept)]
    names = np.array(['-', *kept])
    rows = sessions.rows(data.test, 5)
    assert ''.join(names[rows.target]) == targets
    assert ''.join(names[sessions.rows(data.valid, 5).target]) == ('ABA' if 'D' in kept else 'BA')
    assert len(data.has_image) == len(data.texts) == len(data.side) == 1 + len(kept)
    # a scorer that puts every target first finds all that are ranked, and nothing else
    result, ranks = evaluate(lambda items: np.eye(1 + len(kept), dtype=np.float32)[
        np.resize(rows.target, len(items))], rows, data.warm, ks=(1, 20))
    assert result['hit@1'] == result['hit@20'] == sum(x != '-' for x in targets) / 3
    assert result['slices']['repeat']['rows'] == 0
    assert (ranks['equal'] == 1).all()


def test_later_events_do_not_decide(tmp_path):
    """Events from validation on may change; the items stay."""
    later = [EVENTS[0], *((user, 'F' if int(user[1:]) > 5 else item, time)
                          for user, item, time in EVENTS[1:])]
    data = load(tmp_path, events=later, items=ITEMS, catalogue='reviewed')
    assert data.asins[1:] == ['A', 'B', 'C']


def test_validation_without_ranked_pairs_is_refused(tmp_path):
    events = [('U5', 'E', row[2]) if row[:2] == ('U5', 'B') else row for row in EVENTS]
    with pytest.raises(InputError, match=r"config.data.catalogue='sessions': valid: none of its 1"):
        load(tmp_path, events=events, items=ITEMS, catalogue='sessions', valid=1.0)
