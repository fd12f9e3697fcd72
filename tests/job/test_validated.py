"""What validation measures, and what a refit takes from it."""

from types import SimpleNamespace

import numpy as np
import pytest
from ml_collections import ConfigDict

from tpad_jax.data.sessions import Rows
from tpad_jax.job import recommenders
from tpad_jax.job.fitting import validated

V, R = 12, 400


def test_the_likelihood_is_that_of_the_best_temperature():
    """And a target that is not ranked has none."""
    draw = np.random.default_rng(0)
    logits = draw.normal(size=(R, V + 1))
    shares = np.exp(logits[:, 1:]) / np.exp(logits[:, 1:]).sum(axis=1, keepdims=True)
    target = np.array([1 + draw.choice(V, p=share) for share in shares])
    expected = -np.log(shares[np.arange(R), target - 1])[150:].mean()
    target[:150] = 0
    items = np.arange(R, dtype=np.int32)[:, None]
    job = SimpleNamespace(valid=Rows(items, items, target, items[:, 0]),
                          data=SimpleNamespace(num_items=V), config=SimpleNamespace(seed=0))
    found = [validated(lambda rows, by=by: by * logits[rows[:, 0]], job, 'model')
             for by in (1.0, 5.0)]
    assert found[0] == pytest.approx(found[1], abs=1e-3)
    assert found[0]['nll'] == pytest.approx(expected, abs=0.01)


def test_the_schedule_of_a_refit_ends_with_it(monkeypatch):
    config = ConfigDict({'stage': {'recommend': {'steps': 100}}})
    job = SimpleNamespace(pause=lambda: None, config=config, record={'chosen': 30}, first={},
                          params={}, seconds={}, spec=None, fresh=lambda spec: {},
                          stage_spec=lambda stage: None)

    def fit(job, name, stage, spec, params, steps):
        assert (job.config.stage[stage].steps, steps) == (30, 30)
        return {}, None, {'seconds': 0.0}

    monkeypatch.setattr(recommenders, 'fit', fit)
    recommenders._refit(job, 'recommend')
    assert config.stage.recommend.steps == 100  # others share it
