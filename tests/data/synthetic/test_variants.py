"""Variants of the planted catalogue: each oracle against the sessions that were drawn."""

from types import SimpleNamespace

import numpy as np
import pytest

from tpad_jax.data import catalogue
from tpad_jax.data.sessions import Sessions
from tpad_jax.data.synthetic import planted as planted_lib, variants

SIZES = dict(seed=3, items=100, train=300, valid=20, test=1500)


def test_a_variant_that_is_off_is_not_there(tmp_path):
    sizes = dict(seed=1, items=12, train=10, valid=2, test=2)
    for name, more in ('plain', {}), ('off', dict(drift=0.0, kinds=0, visitors=0)):
        planted_lib.write(tmp_path / name, **sizes, **more)
    plain, off = (sorted(file.read_bytes() for file in (tmp_path / name).rglob('*.json*'))
                  for name in ('plain', 'off'))
    assert plain == off


@pytest.mark.parametrize('option', [dict(drift=1.5), dict(kinds=2), dict(visitors=200)])
def test_the_oracle_equals_what_is_drawn(option):
    world = variants.draw(SIZES | option)
    assert (world.sessions == variants.draw(SIZES | option).sessions).all()
    asins = ['', *(planted_lib.asin(number + 1) for number in range(SIZES['items']))]
    oracle = variants.follow(SIZES | option, asins, np.arange(320, 320 + SIZES['test']))
    test = world.sessions[SIZES['train'] + SIZES['valid']:]
    rows, targets = [], []
    for number, session in enumerate(test):
        for length in range(1, np.count_nonzero(session)):
            rows.append([*np.where(np.arange(7) < length, session[:7], 0), number])
            targets.append(session[length])
    rows, targets = np.array(rows), np.array(targets)
    truth, without = oracle(rows), oracle(rows[:, :7])
    np.testing.assert_allclose(truth.sum(axis=1), 1)
    top = np.argpartition(-truth, 10, axis=1)[:, :10]
    exact = np.take_along_axis(truth, top, 1).sum(axis=1)
    gap = (top == targets[:, None]).sum() - exact.sum()
    assert abs(gap) < 3 * np.sqrt((exact * (1 - exact)).sum())
    # calibrated, and much more likely than the law without the variant
    every = np.arange(len(targets))
    nll = [-np.log(p[every, targets]) for p in (truth, without)]
    entropy = -(truth * np.log(np.maximum(truth, 1e-300))).sum(axis=1)
    assert abs(nll[0].mean() - entropy.mean()) < 4 * nll[0].std() / np.sqrt(len(targets))
    assert nll[0].mean() < nll[1].mean() - 0.1


def test_no_cold_item_follows_where_a_window_tests_training_sessions():
    options = SimpleNamespace(max_length=20, planted=SIZES | dict.fromkeys(variants.NAMES, 0))
    world = planted_lib.draw(SIZES['seed'], SIZES['items'])
    asins = ['', *(planted_lib.asin(number + 1) for number in range(SIZES['items']))]
    start = planted_lib.START + planted_lib.SESSION_SECONDS * np.array([299, 300])
    oracle = variants.truth(options, world, SimpleNamespace(
        asins=asins, test=SimpleNamespace(start=start)))
    rows = np.array([[5, 9, 0, 0, 0, 0, 0, 0], [5, 9, 0, 0, 0, 0, 0, 1]])
    expected = [planted_lib.probabilities(world, rows[:1, :2], cut)[0] for cut in (True, False)]
    np.testing.assert_allclose(oracle(rows)[:, 1:], expected)


def test_kinds_are_those_of_the_session_where_others_are_left_out():
    options = SIZES | dict(kinds=3)
    world, kept = variants.draw(options), np.array([0, 2, 7])
    part = Sessions(world.sessions[kept][world.sessions[kept] > 0], None,
                    planted_lib.START + planted_lib.SESSION_SECONDS * kept)
    data = catalogue.Data(*[None] * 7, part, part, part, *[None] * 5)
    made = variants.with_kinds(data, options).valid
    np.testing.assert_array_equal(made.kind, np.concatenate(
        [world.kind[number][world.sessions[number] > 0] for number in kept]))


def test_a_visitor_is_known_better_after_each_session():
    world = variants.draw(SIZES | dict(visitors=200))
    belief = variants.beliefs(world, 200)
    right = np.take_along_axis(belief[:, 0], world.favourite[:, None], 1)[:, 0]
    np.testing.assert_allclose(belief[:200, 0], 0.2)
    means = [part.mean() for part in np.split(right[:1800], 9)]
    assert means[1] > 0.4
    assert means[-1] > 0.95
