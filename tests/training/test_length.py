"""The length of a stage by the size of the data."""

import numpy as np
import pytest

from tpad_jax import config
from tpad_jax.data.sessions import Sessions
from tpad_jax.training import length


def sessions(count):
    """Sessions of three events, and one of a single event, which gives no row."""
    offsets = np.append(np.arange(count + 1) * 3, count * 3 + 1)
    return Sessions(np.ones(count * 3 + 1, np.int32), offsets, np.zeros(count + 1, np.int64))


@pytest.mark.parametrize(('every_prefix', 'count', 'steps'), [
    (True, 3200, 400), (False, 3200, 200), (True, 40, 100), (True, 10**5, 600)])
def test_steps_validations_and_decay_follow_the_rows(monkeypatch, every_prefix, count, steps):
    monkeypatch.setattr(length, 'LEAST', 6400)
    c = config.get_config()
    c.stage.recommend.update(steps=600, epochs=4.0, batch_size=64, every_prefix=every_prefix,
                             eval_every=150, weight_decay=1.0)
    before = c.stage.recommend.to_dict()
    found = length.of_data(c, sessions(count)).stage.recommend
    assert (found.steps, found.eval_every) == (steps, steps // 4)
    assert found.steps * found.weight_decay == pytest.approx(600)
    assert c.stage.recommend.to_dict() == before
    again = length.of_data(length.of_data(c, sessions(count)), sessions(count))
    assert again.stage.recommend == found
    c.stage.recommend.epochs = 0.0
    assert length.of_data(c, sessions(count)).stage.recommend.steps == 600
