"""The planted catalogue: its exact distribution, its sampling, its words, images and raw files."""

import hashlib
import json
import os
from itertools import pairwise

import numpy as np
import pytest
from PIL import Image
from scipy.special import chdtri

from tpad_jax.data.synthetic import planted as planted_lib, rendering, wording
from tpad_jax.errors import InputError


def by_definition(planted, prefix, warm_only):
    """P(. | prefix) item by item, as method.md writes it."""
    items = len(planted.popularity)
    first, last = planted.attributes[prefix[0] - 1], planted.attributes[prefix[-1] - 1]
    star = []
    for item in range(items):
        category, brand, style, colour, _ = planted.attributes[item]
        weight = planted.popularity[item] * planted.category_weights[last[0], category]
        weight *= 20 if brand == first[1] else 1
        weight *= 5 if style == planted.next_style[last[2]] else 1
        weight *= 5 if colour == planted.next_colour[last[3]] else 1
        star.append(weight)
    total = sum(star)
    mixture = [0.9 * weight / total + 0.05 / items + 0.05 * planted.popularity[item]
               for item, weight in enumerate(star)]
    if warm_only:
        mixture = [0.0 if planted.cold[item] else p for item, p in enumerate(mixture)]
    return np.array(mixture) / sum(mixture)


def prefixes_and_targets(sessions):
    """Every prefix of every session with what followed."""
    rows = [(np.where(np.arange(sessions.shape[1]) < n, s, 0), s[n])
            for s in sessions for n in range(1, (s > 0).sum())]
    return np.stack([row[0] for row in rows]), np.array([row[1] for row in rows])


def test_draw_keeps_the_definition():
    planted = planted_lib.draw(4, items=5000)
    for row, weights in enumerate(planted.category_weights):
        assert sorted(weights)[-4:] == [1e-4, 0.1, 0.3, 0.6]
        assert weights[row] == 1e-4
    for successor in (planted.next_style, planted.next_colour):
        assert sorted(successor) == list(range(len(successor)))
        assert (successor != np.arange(len(successor))).all()
    assert planted.cold.sum() == 750
    assert np.log(planted.popularity).std() == pytest.approx(0.5, abs=0.02)
    for column, size in enumerate((12, 8, 5, 8, 5)):
        counts = np.bincount(planted.attributes[:, column], minlength=size)
        assert ((counts - 5000 / size) ** 2 / (5000 / size)).sum() < chdtri(size - 1, 1e-4)
    assert not np.array_equal(planted.attributes, planted_lib.draw(5, items=5000).attributes)


def test_two_catalogues_of_one_law_have_other_items(tmp_path):
    first, second = planted_lib.draw(4, 300), planted_lib.draw(5, 300, law_seed=4)
    law = 'category_weights', 'next_style', 'next_colour'
    for name in planted_lib.Planted._fields:
        same = (getattr(first, name) == getattr(second, name)).all()
        assert same == (name in law), name
    oracles = [planted_lib.probabilities(planted_lib.draw(4, 300, law_seed), np.array([[1, 2, 0]]))
               for law_seed in (None, 4, 5)]  # the oracle follows the law
    assert (oracles[0] == oracles[1]).all()
    assert abs(oracles[0] - oracles[2]).max() > 0.01
    files = []
    for law_seed in None, 4, 5:
        directory = tmp_path / str(law_seed)
        planted_lib.write(directory, seed=4, law_seed=law_seed, items=20, train=30, valid=2, test=2)
        files.append({file.name: file.read_bytes() for file in directory.glob('*.json*')})
    assert files[0] == files[1]
    assert 'law_seed' not in json.loads(files[0].pop('planted.json'))
    assert [name for name in files[0] if files[0][name] != files[2][name]] == ['Planted.jsonl']


@pytest.mark.parametrize('warm_only', [False, True])
def test_probabilities_are_the_definition(warm_only):
    planted = planted_lib.draw(0, items=90)
    prefixes = [[7], [3, 3], [1, 50, 90], [90, 2, 17, 44]]
    padded = np.array([prefix + [0] * (4 - len(prefix)) for prefix in prefixes])
    got = planted_lib.probabilities(planted, padded, warm_only)
    want = np.stack([by_definition(planted, prefix, warm_only) for prefix in prefixes])
    np.testing.assert_allclose(got, want, rtol=1e-12)
    with pytest.raises(ValueError, match='empty'):
        planted_lib.probabilities(planted, np.zeros((1, 3), int))


@pytest.mark.parametrize('warm_only', [False, True])
def test_sessions_follow_the_first_item_and_length_laws(warm_only):
    planted = planted_lib.draw(1, items=40)
    sessions = planted_lib.sample_sessions(planted, 20_000, np.random.default_rng(0), warm_only)
    lengths = (sessions > 0).sum(1)
    assert ((sessions > 0) == (np.arange(8) < lengths[:, None])).all()
    counts = np.bincount(lengths, minlength=9)[2:]
    assert counts.sum() == 20_000
    assert ((counts - 20_000 / 7) ** 2 / (20_000 / 7)).sum() < chdtri(6, 1e-4)
    law = np.where(planted.cold, 0, planted.popularity) if warm_only else planted.popularity
    law = law / law.sum()
    counts = np.bincount(sessions[:, 0] - 1, minlength=40)
    kept = law > 0
    assert counts[~kept].sum() == 0
    expected = 20_000 * law[kept]
    assert ((counts[kept] - expected) ** 2 / expected).sum() < chdtri(kept.sum() - 1, 1e-4)
    if warm_only:
        assert not planted.cold[sessions[sessions > 0] - 1].any()


def oracle_errors(draws, warm_only=False):
    """Sampled minus exact hit@20 over all, warm and cold targets, in standard errors."""
    planted = planted_lib.draw(0)
    sessions = planted_lib.sample_sessions(planted, draws // 4, np.random.default_rng(9), warm_only)
    rows, targets = prefixes_and_targets(sessions)
    errors = {'all': [0.0, 0.0], 'warm': [0.0, 0.0], 'cold': [0.0, 0.0]}
    for begin in range(0, len(rows), 2000):
        p = planted_lib.probabilities(planted, rows[begin:begin + 2000], warm_only)
        top = np.argpartition(-p, 20, axis=1)[:, :20]
        mass, cold = np.take_along_axis(p, top, 1), planted.cold[top]
        hit = top == targets[begin:begin + 2000, None] - 1
        for name, where in (('all', True), ('warm', ~cold), ('cold', cold)):
            exact = (mass * where).sum(1)
            errors[name][0] += ((hit & where).sum(1) - exact).sum()
            errors[name][1] += (exact * (1 - exact)).sum()
    return {name: gap / np.sqrt(variance) if variance else gap
            for name, (gap, variance) in errors.items()}, len(rows)


@pytest.mark.parametrize('warm_only', [False, True])
def test_the_oracle_equals_sampling(warm_only):
    errors, _ = oracle_errors(12_000, warm_only)
    assert all(abs(error) < 3 for error in errors.values()), errors


@pytest.mark.slow
def test_the_oracle_equals_sampling_over_200_000_draws():
    errors, rows = oracle_errors(205_000)
    assert rows >= 200_000
    assert all(abs(error) < 3 for error in errors.values()), errors


@pytest.mark.parametrize('warm_only', [False, True])
def test_what_follows_one_item_is_sampled_as_stated(warm_only):
    planted = planted_lib.draw(2, items=60)
    popular = int(np.argmax(np.where(planted.cold, 0, planted.popularity))) + 1
    sessions = planted_lib.sample_sessions(planted, 60_000, np.random.default_rng(3), warm_only)
    followers = sessions[sessions[:, 0] == popular, 1] - 1
    law = planted_lib.probabilities(planted, np.array([[popular]]), warm_only)[0]
    expected, counts = len(followers) * law, np.bincount(followers, minlength=60)
    kept = law > 0
    assert len(followers) > 1000
    assert counts[~kept].sum() == 0
    statistic = ((counts[kept] - expected[kept]) ** 2 / expected[kept]).sum()
    assert statistic < chdtri(kept.sum() - 1, 1e-4)


def test_smaller_samples_are_parts_of_larger_ones_and_chunks_change_nothing():
    planted = planted_lib.draw(0, items=50)
    large = planted_lib.sample_sessions(planted, 300, np.random.default_rng(1), chunk=64)
    small = planted_lib.sample_sessions(planted, 100, np.random.default_rng(1))
    np.testing.assert_array_equal(large[:100], small)


def test_catalogue_probabilities_follow_a_permuted_catalogue():
    planted = planted_lib.draw(0, items=30)
    order = np.random.default_rng(0).permutation(30) + 1
    asins = ['', *(planted_lib.asin(k) for k in order)]
    got = planted_lib.catalogue_probabilities(planted, asins)(np.array([[5, 9, 0], [1, 0, 0]]))
    want = planted_lib.probabilities(planted, np.array([[order[4], order[8], 0], [order[0], 0, 0]]))
    assert (got[:, 0] == 0).all()
    for row in range(30):
        np.testing.assert_array_equal(got[:, row + 1], want[:, order[row] - 1])
    for unusable in (asins[:-1], [*asins[:-1], asins[1]], [*asins[:-1], 'B00000001X']):
        with pytest.raises(InputError):
            planted_lib.catalogue_probabilities(planted, unusable)


def said_in(title, brand, description):
    """The attribute values read back out of an item's texts: five sets of words."""
    words = set(f'{title} {brand} {description}'.replace('.', ' ').split())
    return [words & set(values) for values in wording.VALUES]


def test_texts_mention_attributes_at_the_stated_rates():
    items = 12_000
    attributes = planted_lib.draw(3, items).attributes
    said = [said_in(*words) for words in zip(
        *wording.texts(attributes, np.random.default_rng(0)), strict=True)]
    for column, rate in enumerate((0.9, 0.9, 0.6, 0.4, 0.7)):
        found = [words[column] for words in said]
        assert max(map(len, found)) == 1  # never two values of one attribute
        mentioned = sum(map(len, found))
        assert abs(mentioned - rate * items) < 4 * np.sqrt(rate * (1 - rate) * items)
        wrong = sum(1 for item, words in enumerate(found)
                    if words and words != {wording.VALUES[column][attributes[item, column]]})
        assert abs(wrong - 0.03 * mentioned) < 4 * np.sqrt(0.03 * 0.97 * mentioned)


def test_texts_are_short_and_of_few_words():
    attributes = planted_lib.draw(3, 12_000).attributes
    titles, brands, descriptions = wording.texts(attributes, np.random.default_rng(0))
    assert all(titles)
    for words in zip(titles, brands, descriptions, strict=True):
        assert len(' '.join(words).split()) <= 28
    vocabulary = set(' '.join(titles + brands + descriptions).replace('.', ' ').split())
    assert len(vocabulary | set(' '.join(wording.caption(attributes)).split())) <= 400
    names = [name for values in wording.VALUES for name in values]
    assert len(names) == len(set(names))
    assert wording.caption(np.array([[0, 0, 1, 0, 0]])) == [
        'category mug brand acme style striped colour red material steel']


def one_of_each_look():
    """int32 [480, 5]: every category, style and colour once."""
    category, style, colour = np.meshgrid(np.arange(12), np.arange(5), np.arange(8), indexing='ij')
    columns = (category, 0 * category, style, colour, 0 * category)
    return np.stack([column.ravel() for column in columns], 1).astype(np.int32)


@pytest.mark.slow
def test_images_show_category_style_and_colour_through_halving_and_noise():
    """A nearest-class reading of 32 x 32 noisy images beats chance by far on all three."""
    looks = one_of_each_look()
    train = np.tile(looks, (3, 1))
    shrink = [np.stack([np.asarray(Image.fromarray(image).resize((32, 32), Image.Resampling.BOX))
                        for image in rendering.render(part, np.random.default_rng(seed))]) / 255.0
              for part, seed in ((train, 0), (looks, 1))]
    centre = [images[:, 8:24, 8:24] for images in shrink]

    def features(images, crop):
        saturation = images.max(-1) - images.min(-1)
        spectrum = np.abs(np.fft.rfft2(crop.min(-1) - crop.min(-1).mean((1, 2), keepdims=True)))
        inside = saturation > np.quantile(saturation, 0.75, axis=(1, 2), keepdims=True)
        colour = (images * inside[..., None]).sum((1, 2)) / inside.sum((1, 2))[:, None]
        return {0: (saturation > 0.2).reshape(len(images), -1).astype(float),
                2: np.log(spectrum.reshape(len(images), -1) + 1), 3: colour}

    known, asked = (features(*pair) for pair in zip(shrink, centre, strict=True))
    for column, floor in ((0, 0.8), (2, 0.6), (3, 0.8)):
        a, b = asked[column], known[column]
        distance = (a ** 2).sum(1)[:, None] - 2 * a @ b.T + (b ** 2).sum(1)
        accuracy = (train[distance.argmin(1), column] == looks[:, column]).mean()
        assert accuracy > floor, (column, accuracy)


def test_noise_has_the_stated_size_and_leaves_the_pictogram():
    looks = one_of_each_look()[::7]
    clean = rendering.render(looks, np.random.default_rng(0), noise=0.0).astype(float) / 255
    for noise in (0.06, 0.12):
        noisy = rendering.render(looks, np.random.default_rng(0), noise).astype(float) / 255
        middling = (clean > 0.4) & (clean < 0.6)  # clipped at 0 and 1 elsewhere
        assert (noisy - clean)[middling].std() == pytest.approx(noise, rel=0.02)
    quiet = rendering.render(looks, np.random.default_rng(1), noise=0.0)
    hidden = looks.copy()
    hidden[:, [1, 4]] = 3  # brand and material cannot be seen
    np.testing.assert_array_equal(quiet, rendering.render(hidden, np.random.default_rng(1), 0.0))


def test_silhouettes_differ_and_stay_inside():
    fields = rendering.distance_fields()
    inside = fields < 0
    border = np.concatenate([inside[:, 0], inside[:, -1], inside[:, :, 0], inside[:, :, -1]], 1)
    assert not border.any()
    for a in range(12):
        for b in range(a):
            overlap = (inside[a] & inside[b]).sum() / (inside[a] | inside[b]).sum()
            assert overlap < 0.75, (wording.CATEGORIES[a], wording.CATEGORIES[b], overlap)


def digests(directory):
    return {str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(directory.rglob('*')) if path.is_file()}


SMALL = {'items': 40, 'train': 50, 'valid': 10, 'test': 20}


def test_write_leaves_the_sessions_it_sampled(tmp_path):
    planted_lib.write(tmp_path / 'raw', seed=6, **SMALL)
    planted = planted_lib.draw(6, 40)
    lines = [json.loads(line) for line in (tmp_path / 'raw/Planted.jsonl').read_text().splitlines()]
    users = {}
    for line in lines:
        users.setdefault(line['user_id'], []).append((line['timestamp'], line['parent_asin']))
    assert len(users) == 80
    for events in users.values():
        assert 2 <= len(events) <= 8
        assert all(b[0] - a[0] == 60_000 for a, b in pairwise(events))
    in_time = sorted(users.values())
    for before, after in pairwise(in_time):
        assert before[-1][0] < after[0][0]
    cold = {planted_lib.asin(k + 1) for k in np.flatnonzero(planted.cold)}
    assert len(cold) == 6
    training = {name for events in in_time[:50] for _, name in events}
    later = {name for events in in_time[50:] for _, name in events}
    assert not training & cold
    assert later & cold
    items = [json.loads(line)
             for line in (tmp_path / 'raw/meta_Planted.jsonl').read_text().splitlines()]
    assert [item['parent_asin'] for item in items] == [f'P{k:09d}' for k in range(1, 41)]
    assert {tuple(item['categories']) for item in items} == {('Planted',)}
    for item in items:
        with Image.open(tmp_path / 'raw/images' / f'{item["parent_asin"]}.jpg') as image:
            assert (image.size, image.mode, image.format) == ((64, 64), 'RGB', 'JPEG')


def test_write_is_a_pure_function_of_its_options(tmp_path):
    planted_lib.write(tmp_path / 'a', seed=6, **SMALL)
    planted_lib.write(tmp_path / 'b', seed=6, **SMALL)
    planted_lib.write(tmp_path / 'scarce', seed=6, **{**SMALL, 'train': 20, 'noise': 0.24})
    a, b, scarce = (digests(tmp_path / name) for name in ('a', 'b', 'scarce'))
    assert a == b
    assert a['meta_Planted.jsonl'] == scarce['meta_Planted.jsonl']
    assert a['images/P000000001.jpg'] != scarce['images/P000000001.jpg']
    events = [[json.loads(line)
               for line in (tmp_path / name / 'Planted.jsonl').read_text().splitlines()]
              for name in ('a', 'scarce')]
    for kept, first in ((slice(0, 20), 0), (slice(20, None), 30)):  # train; validation and test
        few, many = ([[event['asin'] for event in lines if event['user_id'] == user]
                      for user in sorted({event['user_id'] for event in lines})]
                     for lines in (events[1], events[0]))
        assert few[kept] == many[kept.start + first:][:len(few[kept])]


def test_write_accepts_the_same_catalogue_of_a_faster_process(tmp_path, monkeypatch):
    replace, faster = os.replace, tmp_path / 'faster'
    planted_lib.write(faster, seed=6, **SMALL)

    def late(source, target):
        replace(faster, target)
        replace(source, target)
    monkeypatch.setattr(os, 'replace', late)
    planted_lib.write(tmp_path / 'raw', seed=6, **SMALL)
    assert [path.name for path in tmp_path.iterdir()] == ['raw']


def test_write_never_mixes_two_catalogues(tmp_path):
    planted_lib.write(tmp_path / 'raw', seed=6, **SMALL)
    before = digests(tmp_path / 'raw')
    planted_lib.write(tmp_path / 'raw', seed=6, **SMALL)
    with pytest.raises(InputError, match='another workdir'):
        planted_lib.write(tmp_path / 'raw', seed=7, **SMALL)
    assert digests(tmp_path / 'raw') == before
    (tmp_path / 'other').mkdir()
    (tmp_path / 'other/mine.txt').write_text('mine')
    with pytest.raises(InputError, match='not a planted catalogue'):
        planted_lib.write(tmp_path / 'other', seed=6, **SMALL)
    with pytest.raises(InputError, match='noise'):
        planted_lib.write(tmp_path / 'new', seed=6, **SMALL, noise=-1)
    with pytest.raises(InputError, match='items'):
        planted_lib.write(tmp_path / 'new', seed=6, items=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ['other', 'raw']
