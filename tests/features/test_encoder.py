"""Reading the catalogue: buckets change no row, calls overlap, a store resumes."""

import re
import threading
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from tpad_jax import config as base
from tpad_jax.data.catalogue import Content
from tpad_jax.distributed import devices as devices_lib
from tpad_jax.errors import InputError, Stopped
from tpad_jax.features import encoder as encoder_lib, store
from tpad_jax.models import readers, tpad
from tpad_jax.models.builtin.mllm import MLLM

V, T, SIDE, ROWS, PART = 53, 40, 8, 8, 16
SIZES = dict(vocab=23, width=8, layers=1, heads=2, hidden=8, channels=(8, 8), vision_layers=1)
LENGTHS = np.repeat([0, 3, 8, 9, 20, 39, 40], [5, 12, 12, 2, 1, 14, 7])  # of the texts
SIZES_OF_PARTS = (16, 15, 16, 6)  # two of the short texts, two of the long


@lru_cache
def content():
    """Texts of LENGTHS in a random order, a token 0 in many; one image in eight absent."""
    rng = np.random.default_rng(0)
    lengths = np.append(0, rng.permutation(LENGTHS))
    tokens = rng.integers(0, SIZES['vocab'], (V + 1, T))
    tokens[np.arange(T) >= lengths[:, None]] = -1
    has_image = np.arange(V + 1) % 8 > 0
    image = rng.integers(0, 256, (V + 1, SIDE, SIDE, 3)) * has_image[:, None, None, None]
    return Content(image.astype(np.uint8), has_image, tokens.astype(np.int32), broken=2)


@lru_cache
def model():
    """The smallest TPAD with random parameters, adapters too: the modules, nested parameters."""
    config = base.get_config().model
    config.update(features=8, width=8, lora_rank=2)
    spec = tpad.build(MLLM(**SIZES), config, recommend=('r',), items=V, max_length=4,
                      side_sizes=(3, 3, 3))
    catalogue = {'warm': jnp.ones(V + 1, bool), 'side': jnp.zeros((V + 1, 3), jnp.int32),
                 'k': jnp.zeros((V + 1, 2, 8)), 'r': jnp.zeros((V + 1, 8))}
    shapes = jax.eval_shape(partial(
        tpad.init, spec=spec, catalogue=catalogue, rank=2, targets=config.lora_targets,
        image_shape=(SIDE, SIDE, 3), text_length=T), jax.random.key(0))
    rng = np.random.default_rng(1)
    return spec, jax.tree.map(
        lambda x: jnp.asarray(rng.normal(size=x.shape) * 0.5, jnp.float32), shapes)


def make(names=('k', 'r'), **options):
    return encoder_lib.Encoder(model()[0], content(), names,
                               **{'rows': ROWS, 'part': PART, **options})


@lru_cache
def made():
    """One encoder for the tests that need no other, so that it compiles once."""
    return make()


@lru_cache
def rows():
    return {name: np.asarray(x) for name, x in made()(model()[1]).items()}


def changed(path, by=1e-3):
    """The parameters, one number of one array moved."""
    flat = flatten_dict(model()[1], sep='/')
    flat[path] = flat[path].at[(0,) * flat[path].ndim].add(by)
    return unflatten_dict(flat, sep='/')


def fill(directory, params=None, **options):
    params = model()[1] if params is None else params
    made().leave(params, directory, origin={'seed': 0}, **options)


def contents(directory):
    return {file.name: file.read_bytes() for file in directory.iterdir()}


# --- buckets ------------------------------------------------------------------------------------


@pytest.mark.parametrize(('lengths', 'whole', 'part', 'expected'), [
    ([1, 8, 9, 16, 30, 32], 32, 1, [(8, [1, 2]), (16, [3, 4]), (32, [5, 6])]),
    ([1, 8, 9, 16, 30, 32], 32, 2, [(8, [1, 2]), (16, [3, 4]), (32, [5, 6])]),
    ([1, 8, 9, 16, 30, 32], 32, 3, [(16, [1, 2, 3, 4]), (32, [5, 6])]),
    ([1, 8, 9, 16, 30, 32], 32, 7, [(32, [1, 2, 3, 4, 5, 6])]),
    ([1, 0, 9, 2], 128, 7, [(32, [1, 2, 3, 4])]),  # no longer than the longest needs
    ([40, 1, 90, 2], 100, 2, [(32, [2, 4]), (100, [1, 3])]),
    ([3, 6, 1], 6, 1, [(6, [1, 2, 3])]),
    ([0, 0], 64, 1, [(16, [1, 2])])])
def test_buckets(lengths, whole, part, expected):
    tokens = np.where(np.arange(whole) < np.append(0, lengths)[:, None], 0, -1)
    found = encoder_lib.buckets(tokens, part, np.arange(len(tokens)) > 0)
    assert [(length, ids.tolist()) for length, _, ids in found] == expected


def test_items_without_a_picture_have_their_own_buckets(monkeypatch):
    tokens = np.where(np.arange(16) < np.array([0, 8, 16, 8, 16, 8])[:, None], 0, -1)
    image = np.array([0, 1, 1, 0, 0, 1], bool)

    def found(image, blind):
        monkeypatch.setattr(encoder_lib, 'BLIND', blind)
        return [(length, pictures, ids.tolist())
                for length, pictures, ids in encoder_lib.buckets(tokens, 1, image)]

    assert found(image, 2) == [(8, False, [3]), (8, True, [1, 5]), (16, False, [4]),
                               (16, True, [2])]
    assert found(image, 3) == [(8, True, [1, 3, 5]), (16, True, [2, 4])]  # too few for a call
    assert found(image & False, 1) == [(8, False, [1, 3, 5]), (16, False, [2, 4])]


def test_a_call_without_pictures_gives_the_rows_of_absent_ones(monkeypatch):
    expected = rows()  # made once for all tests, with the parts of the default
    monkeypatch.setattr(encoder_lib, 'BLIND', 6)
    apart = make(('k',), rows=6)
    assert [pictures for (_, pictures), _ in apart._parts].count(False) == 1
    np.testing.assert_allclose(apart(model()[1])['k'], expected['k'], rtol=0, atol=2e-5)
    texts = replace(content(), image=content().image[:, :0, :0])  # a reader of texts alone
    assert not any(pictures for (_, pictures), _ in encoder_lib.Encoder(
        model()[0], texts, ('k',), rows=6)._parts)


@pytest.mark.slow
def test_buckets_give_the_rows_of_no_buckets():
    """Against one call that reads every item with all of its padding."""
    spec, params = model()
    c = content()
    assert len(encoder_lib.buckets(c.tokens, PART, c.has_image)) == 2
    everything = jax.jit(lambda p: (
        readers.read_items(spec, p, 'knowledge', c.image, c.has_image, c.tokens),
        readers.distil_items(spec, p, c.image, c.has_image, c.tokens)))(params)
    for name, whole in zip(('k', 'r'), everything, strict=True):
        found, whole = rows()[name], np.asarray(whole)
        assert found.dtype == np.float32
        assert found.shape == whole.shape
        assert not found[0].any()
        assert abs(whole).max() > 0.5
        np.testing.assert_allclose(found[1:], whole[1:], rtol=0, atol=2e-5)
        assert len(np.unique(found[1:].reshape(V, -1), axis=0)) == V


def test_one_compilation_per_length():
    encoder_lib._reader.cache_clear()
    one = make()
    one(model()[1])
    before = one._write._cache_size()
    other = one(changed('lora/knowledge/decoder/layers/attention/q/b', 1.0))
    assert abs(other['k'] - rows()['k']).max() > 1e-3
    np.testing.assert_array_equal(other['r'], rows()['r'])
    assert one._read._cache_size() == 2
    assert one._write._cache_size() == before
    assert make()._read is one._read  # another encoder of equal modules finds it compiled


def test_all_devices_give_the_rows_of_one():
    """Four parts of every call, each on two devices that share a layer's kernels."""
    devices = devices_lib.choose('shard_map', 8, 2)
    found = make(('k',), devices=devices, rows=9)(model()[1])['k']
    assert found.sharding.is_fully_replicated
    assert len(found.devices()) == 8
    np.testing.assert_allclose(found, rows()['k'], rtol=0, atol=2e-5)


def test_contents_are_gathered_by_a_thread_while_the_device_computes():
    """The next two calls' images are asked for before the first call's rows are handed on."""
    asked, c = [], content()

    class Watched:
        shape, dtype = c.image.shape, c.image.dtype

        def __getitem__(self, at):
            if not isinstance(at, slice):
                asked.append(threading.current_thread() is threading.main_thread())
            return c.image[at]

    encoder = encoder_lib.Encoder(model()[0], Content(Watched(), c.has_image, c.tokens, 0), ('k',),
                             rows=ROWS, part=PART)
    seen = []

    def tell(done, text):
        seen.append(len(asked))

    @contextmanager
    def progress(*_):
        yield tell

    made_by = encoder.made_by(model()[1])
    assert made_by['k']['resolution'] == SIDE
    for _ in encoder._make(encoder._used(model()[1]), progress, lambda: False, iter([0, 1]),
                           [0, 1]):
        pass
    assert asked == [False] * 4  # two parts of two calls each
    assert seen[0] >= 3


# --- into files ---------------------------------------------------------------------------------


def test_a_store_holds_what_the_device_would_have(tmp_path):
    fill(tmp_path)
    for name in ('k', 'r'):
        np.testing.assert_array_equal(store.read(tmp_path, name), rows()[name])
        about = store.manifest(tmp_path, name)
        assert about['counts'] == {'items': V, 'without_image': V // 8,
                                   'broken_images': 2}
        assert about['parts'] == len(SIZES_OF_PARTS)
        print_ = about['fingerprint']
        assert print_ == {
            'seed': 0, 'adapter': {'k': 'knowledge', 'r': 'distil'}[name], 'pooling': 'summary',
            'prompt': [[], [], []], 'dtype': 'float32', 'resolution': SIDE, 'text_length': T,
            'tokens': print_['tokens'], 'parameters': print_['parameters']}


@pytest.mark.parametrize('calls', [1, 3, 5])
def test_a_stopped_store_goes_on_to_the_same_bytes(tmp_path, calls):
    fill(tmp_path / 'whole')
    said = []

    @contextmanager
    def progress(title, total, start=0):
        said.append((title, total, start))
        yield lambda done, text: said.append((done, text))

    count = iter(range(calls))
    with pytest.raises(Stopped):
        fill(tmp_path / 'part', progress=progress, stopping=lambda: next(count, None) is None)
    assert said[0] == ('encode k,r', V, 0)
    assert len(said) == 2 + calls
    assert [done for done, _ in said[1:]] == sorted({done for done, _ in said[1:]})
    assert all(re.fullmatch(r'\d+ items/s', text) for _, text in said[1:])
    whole_parts = len(list((tmp_path / 'part').glob('k.[0-9]*.npy')))
    assert whole_parts == (calls + 1) // 2
    del said[:]
    fill(tmp_path / 'part', progress=progress)
    assert said[0] == ('encode k,r', V, sum(SIZES_OF_PARTS[:whole_parts]))
    assert said[-1][0] == V
    assert contents(tmp_path / 'part') == contents(tmp_path / 'whole')


def test_fewer_items_per_call_go_on_with_the_same_parts(tmp_path):
    """After a device ran out of memory, say."""
    count = iter(range(3))
    with pytest.raises(Stopped):
        fill(tmp_path, stopping=lambda: next(count, None) is None)
    smaller = make(rows=4)
    smaller.leave(model()[1], tmp_path, origin={'seed': 0})
    for name in ('k', 'r'):
        np.testing.assert_allclose(store.read(tmp_path, name), rows()[name], rtol=0, atol=2e-5)


def test_a_finished_store_is_read_and_not_made_again(tmp_path, monkeypatch):
    first = made().leave(model()[1], tmp_path, origin={'seed': 0})
    monkeypatch.setattr(encoder_lib.Encoder, '_contents', lambda *_: pytest.fail('encoded again'))
    again = made().leave(model()[1], tmp_path, origin={'seed': 0})
    for name in ('k', 'r'):
        np.testing.assert_array_equal(first[name], rows()[name])
        np.testing.assert_array_equal(again[name], rows()[name])


def test_rows_that_were_kept_are_left_as_they_are(tmp_path, monkeypatch):
    monkeypatch.setattr(encoder_lib.Encoder, '_contents', lambda *_: pytest.fail('encoded again'))
    found = made().leave(model()[1], tmp_path, rows={n: jnp.asarray(x) for n, x in rows().items()},
                         origin={'seed': 0})
    assert found.keys() == rows().keys()
    for name in ('k', 'r'):
        np.testing.assert_array_equal(store.read(tmp_path, name), rows()[name])


@pytest.mark.slow
def test_r_without_a_reading_of_its_own_is_read_under_the_adapter_of_k():
    spec, params = model()
    spec = replace(spec, reread=False)
    one = encoder_lib.Encoder(spec, content(), ('r',), rows=ROWS, part=PART)
    own = {**params, 'lora': {'knowledge': params['lora']['knowledge']}}
    c = content()
    expected = readers.distil_items(spec, own, c.image[1:], c.has_image[1:], c.tokens[1:])
    np.testing.assert_allclose(one(params)['r'][1:], expected, atol=1e-5)
    assert one.made_by(params)['r']['adapter'] == 'knowledge'


@pytest.mark.parametrize(('path', 'names'), [
    ('base/embed/embedding', {'k', 'r'}), ('knowledge/summary', {'k', 'r'}),
    ('lora/knowledge/decoder/layers/attention/q/b', {'k'}), ('adapter/skip/kernel', {'r'}),
    ('lora/distil/decoder/layers/attention/q/b', {'r'}),
    ('lora/transfer/decoder/layers/attention/q/b', set()),
    ('recommender/encoder/position', set())])
@pytest.mark.parametrize('large', [encoder_lib.LARGE, 0])
def test_the_fingerprint_knows_every_parameter_that_is_read(monkeypatch, path, names, large):
    monkeypatch.setattr(encoder_lib, 'LARGE', large)
    flat = flatten_dict(model()[1], sep='/')
    if path not in flat:
        path = next(p for p in flat if p.startswith(path.split('/')[0]))
    before, after = (made().made_by(p) for p in (model()[1], changed(path, 1e-6)))
    assert {name for name in before if before[name] != after[name]} == names
    assert before == made().made_by(jax.tree.map(jnp.copy, model()[1]))


def test_other_parameters_are_refused(tmp_path):
    fill(tmp_path)
    with pytest.raises(InputError, match=r'k\.manifest\.json: these .* features: parameters was'):
        fill(tmp_path, changed('knowledge/summary'))


def test_what_is_not_finite_is_not_stored(tmp_path):
    with pytest.raises(FloatingPointError, match=r"rows 'k' of \d+ items are not finite"):
        fill(tmp_path, changed('knowledge/summary', np.inf))
    assert not list(tmp_path.glob('*.npy'))
