"""The traps of session evaluation, each also built in on purpose: the same check must then fail."""

import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import polars as pl
import pytest

from configs import sessions as configs
from tpad_jax.baselines import rules
from tpad_jax.core import log
from tpad_jax.data import item_graphs, sessions, text
from tpad_jax.data.sessions import Sessions
from tpad_jax.data.sources import amazon_tables
from tpad_jax.data.synthetic import planted
from tpad_jax.distributed import devices
from tpad_jax.evaluation import evaluate, metrics, slices
from tpad_jax.evaluation.scorers import scorer
from tpad_jax.job import job
from tpad_jax.models import tpad
from tpad_jax.models.sessions import ENCODERS

V, N = 30, 6
TABLES = 'train', 'valid', 'warm', 'side', 'side_sizes', 'titles'  # of pipeline.Data


def drawn(seed, count, most=9, items=V):
    """Sessions of 2 to `most` items; an item is followed by the next but two, most often."""
    rng = np.random.default_rng(seed)
    parts = []
    for length in rng.integers(2, most + 1, count):
        steps = np.where(rng.random(length) < 0.8, 2, rng.integers(0, items, length))
        parts.append(1 + (rng.integers(items) + np.cumsum(steps)) % items)
    offsets = np.cumsum([0, *map(len, parts)]).astype(np.int64)
    return Sessions(np.concatenate(parts).astype(np.int32), offsets, np.arange(count))


TRAIN, TEST = drawn(0, 200), drawn(1, 40)
ROWS = sessions.rows(TEST, N)
WARM = np.arange(V + 1) > 0


def score(items):
    """Every item's score depends on the prefix's last one; no ties."""
    last = items[np.arange(len(items)), np.count_nonzero(items, axis=1) - 1]
    return np.float32((last[:, None] * 7919 + np.arange(V + 1) * 104729) % 10007)


# --- the scorers under test ---------------------------------------------------------------------


def baseline(name):
    features = {'features': np.random.default_rng(0).normal(size=(V + 1, 5))}
    return rules.BASELINES[name][0](TRAIN, V, **features if name in rules.CONTENT else {})


def neural(encoder, **rates):
    """scoring.scorer with random parameters, which are the same whatever the rates."""
    c = configs.get_config(f'diginetica,{encoder}').model
    c.update(width=8, features=8, **rates)
    spec = tpad.build(None, c, recommend=(), items=V, max_length=N, side_sizes=())
    near, weight = item_graphs.neighbours(TRAIN, V, most=4)
    catalogue = jax.tree.map(jnp.asarray, {
        'warm': WARM, 'side': np.zeros((V + 1, 0), np.int32), 'near': near, 'near_weight': weight})
    shapes = jax.eval_shape(partial(tpad.recommender_init, spec=spec), jax.random.key(0),
                            catalogue=catalogue)
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape) * 0.5, x.dtype), shapes)
    return scorer(spec, devices.choose('jit', 0))({'recommender': params}, catalogue)


SCORERS = {**{name: partial(baseline, name) for name in rules.BASELINES},
           **{name: partial(neural, name) for name in ENCODERS},
           'repeats': partial(neural, 'attention', repeats=True)}


def table(score, items, chunk):
    """All scores [R, V + 1], computed `chunk` rows at a time."""
    return np.concatenate([metrics.dense(part) for _, part in
                           metrics.scored(score, items, V, chunk=chunk)])


# --- batch neighbours ---------------------------------------------------------------------------


def independent(score, items):
    """Whether a row's scores are the same alone, in another order, and in other company."""
    close = partial(np.allclose, rtol=1e-5, atol=1e-6)
    whole, order = table(score, items, len(items)), np.random.default_rng(0).permutation(len(items))
    return (close(table(score, items, 1), whole) and close(table(score, items, 5), whole)
            and close(table(score, items[order], len(items)), whole[order]))


@pytest.mark.parametrize('name', SCORERS)
def test_a_row_knows_nothing_of_its_neighbours(name):
    assert independent(SCORERS[name](), ROWS.items[:16])


@pytest.mark.parametrize('leak', [
    lambda s: s - s.mean(axis=0),  # a norm over the batch
    lambda s: s + np.roll(s, 1, axis=0),  # the row before is the same session's
    lambda s: s * len(s)])
def test_a_scorer_that_knows_its_neighbours_is_caught(leak):
    assert not independent(lambda items: leak(score(items)), ROWS.items[:16])


# --- dropout ------------------------------------------------------------------------------------


def repeatable(score):
    twice = [evaluate.evaluate(score, ROWS, WARM)[0] for _ in range(2)]
    return twice[0] == twice[1]


@pytest.mark.parametrize('encoder', ENCODERS)
def test_nothing_is_dropped_at_test(encoder, monkeypatch):
    seen = []
    original = tpad.encode_sessions

    def spied(spec, params, items, z_table, catalogue, keys=None, *args, **kwargs):
        seen.append(keys)
        return original(spec, params, items, z_table, catalogue, keys, *args, **kwargs)

    monkeypatch.setattr(tpad, 'encode_sessions', spied)
    rates = dict.fromkeys(('dropout', 'item_dropout', 'id_dropout', 'feature_dropout'), 0.6)
    none = {**dict.fromkeys(rates, 0.0), 'id_dropout': 1e-9}  # with 0 there are other parameters
    dropping, whole = neural(encoder, **rates), neural(encoder, **none)
    np.testing.assert_array_equal(dropping(ROWS.items[:64]), whole(ROWS.items[:64]))
    assert repeatable(dropping)
    assert seen
    assert all(keys is None for keys in seen)


def test_dropout_at_test_is_caught():
    rng = np.random.default_rng(0)
    assert not repeatable(lambda items: score(items) * (rng.random((len(items), V + 1)) < 0.8))


# --- every row once -----------------------------------------------------------------------------


def each_once(scored, total, chunk):
    """Whether every row is scored once, by its own prefix."""
    times = np.zeros(total, int)
    for part, scores in scored(score, ROWS.items[:total], V, chunk=chunk):
        times[part] += 1
        if not np.array_equal(scores, score(ROWS.items[part])):
            return False
    return bool((times == 1).all())


def overlapping(score, items, num_items, *, chunk):
    """The last batch is filled up with rows of the one before."""
    for begin in range(0, len(items), chunk):
        begin = min(begin, len(items) - chunk)
        yield slice(begin, begin + chunk), score(items[begin:begin + chunk])


@pytest.mark.parametrize('total', [1, 15, 16, 17, 33])
def test_every_row_counts_once(total, monkeypatch):
    assert each_once(metrics.scored, total, 16)
    rows = ROWS.take(slice(total))
    monkeypatch.setattr(metrics, 'CHUNK', 16)
    result, found = evaluate.evaluate(score, rows, WARM)
    own = metrics.counts(score(rows.items), rows.target)
    assert result['rows'] == total
    np.testing.assert_array_equal(found['above'], own[0])
    assert result['mrr@20'] == pytest.approx(metrics.mrr(*own, 20).mean())


def test_rows_counted_twice_are_caught():
    assert each_once(overlapping, 32, 16)
    assert not each_once(overlapping, 33, 16)


# --- ties ---------------------------------------------------------------------------------------


def fair(counts):
    """Whether a scorer that cannot tell items apart earns what guessing does, whatever the ids."""
    earned = {}
    for first in (1, 11, 21):  # targets of small, middling and large ids
        target = np.arange(first, first + 10)
        above, equal = counts(np.zeros((10, V + 1), np.float32), target)
        earned[first] = metrics.hit(above, equal, 10).mean()
    return all(value == pytest.approx(10 / V) for value in earned.values())


def test_ties_favour_no_item():
    assert fair(metrics.counts)


def test_ties_by_index_are_caught():
    def by_index(scores, target):
        order = np.argsort(-scores[:, 1:], axis=1, kind='stable') + 1
        return np.argmax(order == target[:, None], axis=1), np.ones(len(target), int)

    assert not fair(by_index)
    assert not fair(lambda scores, target: (metrics.counts(scores, target)[0],
                                            np.ones(len(target), int)))  # ties are all wins


# --- prefixes -----------------------------------------------------------------------------------


def ends_before_its_target(unroll):
    """Whether each prefix is the last N items before its target, and nothing else."""
    found = unroll(TEST, N)
    row = 0
    for begin, end in zip(TEST.offsets, TEST.offsets[1:], strict=False):
        for at in range(begin + 1, end):
            prefix = TEST.items[max(begin, at - N):at]
            padded = np.pad(prefix, (0, N - len(prefix)))
            if not np.array_equal(found.items[row], padded) or found.target[row] != TEST.items[at]:
                return False
            row += 1
    return row == len(found.target)


def test_a_prefix_keeps_its_last_items_and_never_its_target():
    assert np.diff(TEST.offsets).max() > N + 1
    assert ends_before_its_target(sessions.rows)


def test_first_items_and_targets_in_a_prefix_are_caught():
    def first(part, width):
        every = sessions.rows(part, 99)
        return every._replace(items=every.items[:, :width])

    def with_target(part, width):
        found = sessions.rows(part, width)
        items = found.items.copy()
        short = np.flatnonzero(np.count_nonzero(items, axis=1) < width)
        items[short, np.count_nonzero(items, axis=1)[short]] = found.target[short]
        return found._replace(items=items)

    assert not ends_before_its_target(first)
    assert not ends_before_its_target(with_target)


# --- what is counted on test --------------------------------------------------------------------


def raw_files(directory, half):
    """The planted catalogue's raw files, test sessions redrawn from one half of the items."""
    planted.write(directory, seed=0, items=40, train=120, valid=20, test=40, noise=0.1)
    file = directory / 'Planted.jsonl'
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    begun = {}
    for line in lines:
        begun[line['user_id']] = min(line['timestamp'], begun.get(line['user_id'], np.inf))
    last = set(sorted(begun, key=begun.get)[-40:])
    rng = np.random.default_rng(half)
    for line in lines:
        if line['user_id'] in last:
            item = int(rng.integers(1, 21)) + 20 * half
            line['asin'] = line['parent_asin'] = planted.asin(item)
    file.write_text(''.join(json.dumps(line) + '\n' for line in lines))


def prepared(directory, half):
    raw_files(directory / 'raw', half)
    amazon_tables.prepare(directory / 'raw', directory / 'data',
                          gap_hours=0.1, core=5, min_length=2,
                    valid=20, test=40, seed=0)
    return amazon_tables.load(directory / 'data')


@pytest.fixture(scope='module')
def two(tmp_path_factory):
    """The same data twice but for the test sessions."""
    return [prepared(tmp_path_factory.mktemp(f'data{half}'), half) for half in (0, 1)]


def same(a, b):
    return all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b),
                                                    strict=True))


def test_no_table_is_counted_on_test(two):
    a, b = two
    assert not np.array_equal(a.test.items, b.test.items)
    for name in TABLES:
        assert same(getattr(a, name), getattr(b, name)), name
    assert not a.warm[1:].all()  # the filter has bitten


def test_tables_counted_on_test_are_caught(two):
    def faulty(data):
        both = sessions.join(data.train, data.test)
        counts = np.bincount(both.items, minlength=data.num_items + 1)
        return {'warm': sessions.warm_items(both, data.num_items),
                'filter': sessions.k_core(both, 8).items,
                'popularity': slices.popularity_quartiles(counts),
                'graph': item_graphs.neighbours(both, data.num_items)}

    a, b = (faulty(data) for data in two)
    assert not any(same(a[name], b[name]) for name in a)


def test_side_features_come_from_training_items():
    """A value that only items of no training session have is unknown, not a word of its own."""
    table = pl.DataFrame({'brand': ['a', 'a', 'b', 'b'], 'category': ['c'] * 4,
                          'price': [1., 1., 2., 2.]}, schema_overrides={'price': pl.Float32})
    cold = np.array([False, True, True, False, False])
    side, _ = text.side_features(table, cold)
    assert (side[3:, 0] == 0).all()
    faulty, _ = text.side_features(table, np.arange(5) > 0)
    assert (faulty[3:, 0] > 0).all()


# --- unseen items -------------------------------------------------------------------------------


def all_kept(test, data):
    """Whether test rows are all there, those of cold targets among them and counted as misses."""
    rows, counts = sessions.rows(test, N), np.bincount(data.train.items,
                                                       minlength=data.num_items + 1)
    result, _ = evaluate.evaluate(lambda items: np.tile(counts, (len(items), 1)), rows, data.warm,
                                  ks=(5,))
    every = len(data.test.items) - len(data.test.start)
    parts = result['slices']
    return bool(result['rows'] == every
                and parts['cold']['rows'] > 0 and parts['cold']['hit@5'] == 0
                and parts['warm']['rows'] + parts['cold']['rows'] == every
                and result['hit@5'] == pytest.approx(
                    parts['warm']['hit@5'] * parts['warm']['rows'] / every))


def test_unseen_items_stay_in_the_test_and_count_as_misses(two):
    data = two[0]
    assert all_kept(data.test, data)
    assert data.audit['cold_target_share'] > 0  # and are reported
    assert data.audit['sessions']['test'] == 40


def test_unseen_items_dropped_in_silence_are_caught(two):
    data = two[0]
    warm = data.warm[data.test.items]
    owner = np.repeat(np.arange(len(data.test.start)), np.diff(data.test.offsets))[warm]
    lengths = np.bincount(owner, minlength=len(data.test.start))
    dropped = Sessions(data.test.items[warm], np.append(0, np.cumsum(lengths)), data.test.start)
    assert not all_kept(dropped, data)


# --- the whole catalogue ------------------------------------------------------------------------


def whole(counts):
    """Whether a rank counts every item of the catalogue that scores above the target."""
    scores = np.tile(np.arange(V + 1, dtype=np.float32), (V, 1))
    above, _ = counts(scores, np.arange(1, V + 1))
    return np.array_equal(above, V - np.arange(1, V + 1))


def test_a_rank_counts_the_whole_catalogue():
    assert whole(metrics.counts)


def test_sampled_negatives_are_caught():
    def sampled(scores, target):
        some = np.random.default_rng(0).choice(np.arange(1, V + 1), 10, replace=False)
        kept = np.append(0, some)
        own = np.take_along_axis(scores, target[:, None], axis=1)
        return (scores[:, kept[1:]] > own).sum(axis=1), np.ones(len(target), int)

    assert not whole(sampled)


# --- selection ----------------------------------------------------------------------------------


def chosen(directory, test, spoil=lambda made: None):
    """What a recommender's training chose: its validations, the step and the parameters."""
    directory.mkdir()
    np.savez(directory / 'made.npz', train_items=TRAIN.items, train_offsets=TRAIN.offsets,
             test_items=test.items, test_offsets=test.offsets)
    c = configs.get_config('diginetica,sr_gnn')
    c.data.update(npz=str(directory / 'made.npz'), valid=0.2, max_length=N)
    c.model.update(width=8, features=8)
    for name, loss in c.losses.items():
        loss.weight = float(name == 'next_item')
    c.stage.recommend.update(batch_size=32, steps=12, eval_every=4, learning_rate=0.03)
    c.parallel = 'jit'
    made = job.Job(c, directory / 'run', lambda: False)
    spoil(made)
    made.build(('recommend',), None)
    made.writer = log.Writer(directory / 'run')
    made.run_stage('recommend')
    made.writer.close()
    return made.record['history'], made.record['chosen'], made.params


def test_nothing_is_chosen_on_test(tmp_path):
    """Nor does anything trained depend on it: other test sessions, the same run to the bit."""
    def on_test(made):
        made.valid = made.test

    other = drawn(7, 25)
    a, b = chosen(tmp_path / 'a', TEST), chosen(tmp_path / 'b', other)
    assert len(a[0]) == 3
    assert a[:2] == b[:2]
    assert same(a[2], b[2])
    assert chosen(tmp_path / 'c', other, on_test)[0] != b[0]
