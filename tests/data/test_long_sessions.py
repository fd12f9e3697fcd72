"""One session of very many events, and one user with all of them, in memory that is linear."""

import json
import tracemalloc

import numpy as np
import pytest

from tpad_jax.data import batches, sessions
from tpad_jax.data.sources import amazon_tables

EVENTS, ITEMS, N = 20_000, 200, 20  # a table of pairs of events would take 400 MB as bytes
START, DAY = 1_500_000_000, 86_400


@pytest.mark.slow
def test_a_session_of_very_many_events_is_read_and_batched(tmp_path):
    """The only user has one such session in training and one in test, as a bot has."""
    rng = np.random.default_rng(0)
    visits = [(0, EVENTS), *((10 * DAY * k, 3) for k in range(1, 41)), (500 * DAY, EVENTS)]
    (tmp_path / 'raw').mkdir()
    (tmp_path / 'raw' / 'meta_X.jsonl').write_text(''.join(
        json.dumps({'parent_asin': f'A{k:03d}', 'title': f'{k}'}) + '\n' for k in range(ITEMS)))
    (tmp_path / 'raw' / 'X.jsonl').write_text(''.join(json.dumps(
        {'user_id': 'bot', 'parent_asin': f'A{item:03d}', 'timestamp': 1000 * (START + begin + k)})
        + '\n' for begin, length in visits
        for k, item in enumerate(rng.integers(0, ITEMS, length).tolist())))

    tracemalloc.start()
    try:
        amazon_tables.prepare(tmp_path / 'raw', tmp_path / 'data', gap_hours=24, core=1,
                              min_length=2, valid=5, test=5, seed=0)
        data = amazon_tables.load(tmp_path / 'data')
        rows = sessions.rows(data.test, N)
        batch = next(batches.session_batches(data, batch_size=64, seed=0, max_length=N))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert data.train.lengths.max() == data.test.lengths.max() == EVENTS
    assert rows.items.shape == (EVENTS - 1 + 4 * 2, N)
    assert batch['items'].shape == (64, N)
    assert peak < 100e6
