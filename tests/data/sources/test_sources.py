"""The registry: which source a config selects, and what every source's data must hold."""

import io
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from tpad_jax import config
from tpad_jax.data import catalogue, sources
from tpad_jax.data.sessions import Sessions
from tpad_jax.data.sources import ids
from tpad_jax.errors import InputError


def split(*sessions):
    lengths = [len(session) for session in sessions]
    return Sessions(np.concatenate(sessions).astype(np.int32), np.append(0, np.cumsum(lengths)),
                    np.arange(len(sessions)))


def load(config, workdir):
    """A reader as a user writes it: three splits, and what `sources.load` adds left out."""
    del config, workdir
    return ids.data(split([1, 2, 3], [2, 3]), split([1, 2]), split([3, 4]))


SOURCE = sources.Source(load, content=False)
DAMAGED = sources.Source(lambda config, workdir: replace(load(config, workdir), **damage))
damage = {}


@pytest.fixture
def registered(monkeypatch):
    monkeypatch.setattr(sources, 'SOURCES', dict(sources.SOURCES))
    sources.register('mine', SOURCE)


def selecting(**options):
    c = config.get_config()
    c.data.update(options)
    return c


@pytest.mark.usefixtures('registered')
@pytest.mark.parametrize('options', [
    {'source': 'mine'}, {'mine': 'somewhere'}, {'source': f'{__name__}:SOURCE'}])
def test_a_source_is_selected_by_name_by_its_own_option_and_by_import(tmp_path, options):
    c = selecting(**options)
    source, data = sources.chosen(c), sources.load(c, tmp_path)
    assert not source.content
    assert data.num_items == 4
    assert data.audit['sessions'] == {'train': 2, 'valid': 1, 'test': 1}
    assert len(data.fingerprint) == 64
    assert sources.sizes(c, tmp_path) == (4, ())
    assert sources.origin(c) == next(iter(options.values()))


def test_a_plain_function_is_a_source_with_content():
    c = selecting(source=f'{__name__}:load')
    assert sources.chosen(c) == sources.Source(load)


def test_the_built_in_ones_and_the_planted_catalogue_where_none_is_selected(tmp_path):
    names = [sources.selected(selecting(**options)) for options in (
        {}, {'npz': 'a'}, {'ready': 'a'}, {'raw_dir': 'a'}, {'source': 'npz', 'npz': 'a'})]
    assert names == ['planted', 'npz', 'ready', 'raw_dir', 'npz']
    c = selecting()
    items, side = sources.sizes(c, tmp_path)
    world = sources.chosen(c).world(c)
    assert items == len(world.attributes) == c.data.planted['items']
    assert len(side) == 3
    assert [sources.chosen(selecting(**{name: 'a'})).content for name in ('npz', 'ready')] == [
        False, True]


@pytest.mark.usefixtures('registered')
@pytest.mark.parametrize(('options', 'message'), [
    ({'npz': 'a', 'ready': 'b'}, r"data\.npz='a' and config\.data\.ready='b' name two sources"),
    ({'source': 'mine', 'raw_dir': 'b'}, "data.source='mine' and config.data.raw_dir='b' name two"),
    ({'source': 'minw'}, "data.source='minw': no such source.*planted, mine or module:object"),
    ({'source': 'no_module_of_this_name:f'}, 'no such source .ModuleNotFoundError'),
    ({'source': f'{__name__}:lod'}, 'no such source .AttributeError')])
def test_what_selects_no_source_or_two_is_refused(options, message):
    with pytest.raises(InputError, match=message):
        sources.chosen(selecting(**options))


@pytest.mark.usefixtures('registered')
def test_a_name_is_registered_once():
    sources.register('mine', SOURCE)  # a config file may be imported twice
    with pytest.raises(InputError, match="'npz': the name is taken"):
        sources.register('npz', SOURCE)


@pytest.mark.parametrize(('name', 'value', 'message'), [
    ('titles', [''], 'titles has 1 rows. Expected 5'),
    ('warm', np.ones(4, bool), 'warm has 4 rows'),
    ('asins', ['', 'a', 'b', 'a', 'c'], r"asins names \['a'\] more than once"),
    ('side', np.zeros(5, np.int32), r'side has shape \(5,\)'),
    ('side_sizes', (3,), r'side has shape \(5, 0\).*side_sizes=\(3,\)'),
    ('valid', split([1], [2]), 'valid: none of its 2 sessions has two items'),
    ('test', split([1, 5]), r'test_items\[1\]=5: not an item id. Expected 1..4'),
    ('train', Sessions(np.ones(3, np.int32), np.array([0, 2]), np.zeros(1)), 'train_offsets'),
])
def test_data_of_any_source_are_checked(tmp_path, monkeypatch, name, value, message):
    monkeypatch.setitem(damage, name, value)
    with pytest.raises(InputError, match=f'{__name__}:DAMAGED.*{message}'):
        sources.load(selecting(source=f'{__name__}:DAMAGED'), tmp_path)


def test_the_fingerprint_follows_the_sessions(tmp_path, monkeypatch):
    c = selecting(source=f'{__name__}:DAMAGED')
    before = sources.load(c, tmp_path).fingerprint
    assert sources.load(c, tmp_path).fingerprint == before
    monkeypatch.setitem(damage, 'test', split([4, 3]))
    assert sources.load(c, tmp_path).fingerprint != before


def test_a_source_of_its_own_may_have_pictures_and_texts(tmp_path, monkeypatch):
    file = io.BytesIO()
    Image.new('RGB', (8, 8), 'red').save(file, 'PNG')
    for name, value in dict(texts=['', 'a', 'b', 'c', 'd'], has_image=np.arange(5) % 4 > 0,
                            image_bytes=[b'', file.getvalue(), b'x', b'', b'']).items():
        monkeypatch.setitem(damage, name, value)
    data = sources.load(selecting(source=f'{__name__}:DAMAGED'), tmp_path)
    monkeypatch.setattr(catalogue.text, 'tokenize', lambda texts, *_: np.zeros((len(texts), 1)))
    content = catalogue.content(data, tmp_path / 'data', image_size=4, tokenizer_dir='',
                                text_length=1)
    assert content.has_image.tolist() == [False, True, False, False, False]
    assert (content.image[1] == [255, 0, 0]).all()
    assert content.pictures['rejected'] == {'image_empty_or_unreadable': 1,
                                            'image_of_unknown_format': 1}
