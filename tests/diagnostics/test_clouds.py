"""Diagnostics: against closed forms, and warnings that come where they should and only there."""

import types

import jax
import numpy as np
import pytest

from tpad_jax import losses
from tpad_jax.diagnostics import clouds as clouds_lib, probes, records, snapshots
from tpad_jax.mutual_information.critics import GaussianQ, Score
from tpad_jax.report import curves
from tpad_jax.types import Batch

RNG = np.random.default_rng(0)


def rotation(n):
    return np.linalg.qr(RNG.normal(size=(n, n)))[0]


def test_effective_rank_of_known_spectra():
    assert clouds_lib.effective_rank(3 * rotation(12)) == pytest.approx(12)
    assert clouds_lib.effective_rank(np.outer(np.arange(1, 9), np.ones(5))) == pytest.approx(1)
    assert clouds_lib.effective_rank(np.zeros((4, 3))) == 0
    # singular values 3 and 1: shares 3/4 and 1/4
    two = rotation(6)[:, :2] @ np.diag([3, 1]) @ rotation(5)[:2]
    assert clouds_lib.effective_rank(two) == pytest.approx(
        np.exp(-0.75 * np.log(0.75) - 0.25 * np.log(0.25)))


def test_alignment_and_uniformity_of_known_clouds():
    x = RNG.normal(size=(30, 7))
    assert clouds_lib.alignment(x, 5 * x) == pytest.approx(0)
    assert clouds_lib.alignment(x, -x) == pytest.approx(4)
    quarter = np.stack([np.cos([0, np.pi / 3]), np.sin([0, np.pi / 3])], 1)
    assert clouds_lib.alignment(quarter, quarter[[0, 0]]) == pytest.approx((0 + 1) / 2)
    # an orthonormal frame: every pair at squared distance 2
    assert clouds_lib.uniformity(4 * rotation(9)) == pytest.approx(-4)
    assert clouds_lib.uniformity(np.ones((6, 3))) == pytest.approx(0)
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    pairs = [np.exp(-2 * ((a - b) ** 2).sum()) for i, a in enumerate(unit)
             for j, b in enumerate(unit) if i != j]
    assert clouds_lib.uniformity(x) == pytest.approx(np.log(np.mean(pairs)))
    cosines = [a @ b for i, a in enumerate(unit) for j, b in enumerate(unit) if i != j]
    assert clouds_lib.mean_cosine(x) == pytest.approx(np.mean(cosines))


def test_cka_and_cross_correlation():
    x, y = RNG.normal(size=(40, 6)), RNG.normal(size=(40, 4))
    moved = 3 * x @ rotation(6) + 5
    assert clouds_lib.linear_cka(x, moved) == pytest.approx(1)
    center = np.eye(40) - 1 / 40
    k, m = (center @ a @ a.T @ center for a in (x, y))  # by its definition, over Gram matrices
    assert clouds_lib.linear_cka(x, y) == pytest.approx(
        (k * m).sum() / np.sqrt((k * k).sum() * (m * m).sum()))
    assert clouds_lib.linear_cka(x, np.ones((40, 3))) == 0
    whole = np.corrcoef(x.T, y.T)[:6, 6:]
    assert clouds_lib.cross_correlation(x, y) == pytest.approx(np.sqrt((whole ** 2).mean()))


@pytest.mark.parametrize(('name', 'cloud', 'says'), [
    ('t', np.outer(RNG.normal(size=200), RNG.normal(size=64)), ['effective rank']),
    ('k_text', RNG.normal(size=(200, 64)) + 100, ['mean cosine', 'variance']),
    ('r', np.ones((200, 64)), ['effective rank', 'mean cosine', 'variance']),
    ('p', np.zeros((200, 64)), ['effective rank', 'variance']),
    ('c', RNG.normal(size=(200, 64)), []),
    ('c', RNG.normal(size=(5, 64)), []),  # four directions are all that five rows can have
    ('c', RNG.normal(size=(200, 8)) @ RNG.normal(size=(8, 64)) + 1, []),
], ids=['a line', 'far from the origin', 'one point', 'zeros', 'Gaussian', 'few rows', 'narrow'])
def test_a_collapse_is_told_where_there_is_one(name, cloud, says):
    told = clouds_lib.warnings({name: clouds_lib.feature(cloud)}, {}, 'after stage joint')
    assert len(told) == bool(says)
    for line in told:
        assert line.startswith(f'After stage joint the feature {name} has collapsed: ')
        assert f'Remedy: {clouds_lib.REMEDIES[name[0]]}' in line
        reasons = ('effective rank', 'mean cosine', 'variance')
        assert [r for r in reasons if r in line.split('Remedy')[0]] == says


def test_estimates_that_say_nothing_are_told():
    fine = {'log_q/club_fit': 0.2, 'room/align': 1.0, 'mi_align': 3.0, 'align': -3.0}
    assert not clouds_lib.warnings({}, fine, 'after stage transfer')
    q, full, none = clouds_lib.warnings({}, {
        'log_q/club_fit': -0.1, 'room/align': 0.1, 'mi_disentangle': -0.3}, 'after stage transfer')
    assert 'is -0.300 nats, below 0' in none
    assert 'vCLUB estimate is not a bound' in q
    assert 'log N' in full


def test_probes_read_what_is_there_and_leave_out_what_cannot_be_probed():
    warm = np.arange(300) < 240
    label = RNG.integers(0, 3, 300)
    rows = np.eye(3)[label] + 0.1 * RNG.normal(size=(300, 3))
    given = {'there': label, 'some': np.where(np.arange(300) % 2, label, -1),
             'noisy': np.where(warm & (np.arange(300) % 4 == 0), (label + 1) % 3, label),
             'unknown': np.full(300, -1),
             'one': np.zeros(300, int), 'warm only': np.where(warm, label, -1)}
    found = probes.attributes(rows.reshape(300, 3, 1), given, warm)
    assert found.keys() == {'there', 'some', 'noisy'}
    assert [x['accuracy'] for x in found.values()] == [1, 1, 1]  # the noise is on warm items only
    assert [(x['rows'], x['classes']) for x in found.values()] == [(60, 3), (30, 3), (60, 3)]
    assert found['there']['chance'] == np.bincount(label[~warm]).max() / 60


@pytest.mark.slow
def test_log_q_is_the_gain_over_what_the_mean_and_variances_say():
    """Against the densities of scipy."""
    from scipy.stats import norm
    c, p = (RNG.normal(size=(4, 3, 5)).astype(np.float32) + 2 for _ in range(2))
    q = GaussianQ(8)
    params = q.init(jax.random.key(0), c[0], p[0])
    batch = types.SimpleNamespace(mask=np.arange(12).reshape(4, 3) % 5 > 0)
    found = losses.club_fit({'c': c, 'p': p, 'club': Score(q, params['params'])}, batch)
    moments = params['params']['moments']
    hidden = jax.nn.gelu(c @ moments['in']['kernel'] + moments['in']['bias'])
    mean, log_var = np.split(hidden @ moments['out']['kernel'] + moments['out']['bias'], 2, -1)
    log_var = 4 * np.tanh(log_var / 4)
    seen = p[batch.mask]
    gain = norm(mean, np.exp(log_var / 2)).logpdf(p) - norm(seen.mean(0), seen.std(0)).logpdf(p)
    np.testing.assert_allclose(found.metrics['log_q'], gain.mean(-1), atol=1e-5)


def test_a_modality_of_k_is_drawn_in_its_own_place(tmp_path):
    x = RNG.normal(size=(4, 3)).astype(np.float32)
    (tmp_path / 'diagnostics').mkdir()
    assert not records.clouds(tmp_path)
    for moment in ('before', 'after'):
        (tmp_path / 'diagnostics' / f'transfer-{moment}.json').write_text('{}')
        np.savez(tmp_path / 'diagnostics' / f'transfer-{moment}.npz', k_image=x, k_text=2 * x)
    title, found = next(iter(records.clouds(tmp_path).items()))
    assert title == 'before transfer'
    np.testing.assert_array_equal(found['k_image'] + found['k_text'], np.hstack([x, 2 * x]))


def test_items_are_coloured_by_what_is_known_of_them():
    def job(side, sizes, ready):
        data = types.SimpleNamespace(side=np.pad(side, ((1, 0), (0, 0))), side_sizes=sizes,
                                     num_items=len(side))
        return types.SimpleNamespace(planted=None, data=data, config=types.SimpleNamespace(
            data=types.SimpleNamespace(ready=ready)))

    raw = job(np.array([[1, 2, 3], [0, 0, 1]]), (3, 4, 11), '')
    assert probes.category(raw).tolist() == [1, -1]
    assert probes.known_attributes(raw)['brand'].tolist() == [0, -1]
    lists = job(np.array([[5, 0, 1], [0, 1, 1], [2, 0, 0]]), (9, 2, 2), 'a folder')
    assert probes.category(lists).tolist() == [1, 0, -1]
    assert probes.known_attributes(lists)['side_2'].tolist() == [1, 1, 0]
    assert probes.category(job(np.zeros((4, 0), int), (), 'a folder')).tolist() == [-1] * 4


def test_content_of_a_part_is_its_own_items():
    ids = np.array([0, 3, 5, 8, 9])
    content = types.SimpleNamespace(
        image=np.arange(10, dtype=np.uint8)[:, None, None, None], has_image=np.ones(10, bool),
        tokens=np.arange(10, dtype=np.int32)[:, None])
    rows = types.SimpleNamespace(items=np.array([[3, 9], [8, 0]]), next=np.array([[9, 8], [3, 0]]),
                                 target=np.array([8, 3]))
    batch = snapshots._batch(rows, ids, slice(0, 3), 3, content)
    assert isinstance(batch, Batch)
    np.testing.assert_array_equal(batch.tokens[batch.slots, 0], [[3, 9], [8, 0], [0, 0]])
    np.testing.assert_array_equal(batch.image[batch.next_slots].ravel(), [9, 8, 3, 0, 0, 0])
    np.testing.assert_array_equal(ids[batch.items], [[3, 9], [8, 0], [0, 0]])
    assert list(batch.valid) == [True, True, False]


def test_the_plane_is_where_all_clouds_vary_most():
    axes = rotation(6)
    shares = np.diag([3.0, 1, 0, 0, 0, 0])
    clouds = [RNG.normal(size=(n, 6)) @ shares @ axes + 20 * axes[5] for n in (500, 50)]
    _, basis, share = curves.plane(clouds)
    assert share > 0.95
    np.testing.assert_allclose(np.abs(axes @ basis)[:2], np.eye(2), atol=0.1)
    np.testing.assert_allclose(basis.T @ basis, np.eye(2), atol=1e-6)
