"""Ready-made sessions with content: what is read, what is refused, and the job that runs on it."""

import gzip
import io
import json
import zipfile

import numpy as np
import pytest
from PIL import Image

from configs import movielens
from tests import tiny_base
from tpad_jax.data import catalogue
from tpad_jax.data.sources import folder
from tpad_jax.errors import InputError
from tpad_jax.job import validate

WORDS = 'genres', 'year', 'title', 'tags'


def picture(colour):
    made = io.BytesIO()
    Image.new('RGB', (8, 12), colour).save(made, 'PNG')
    return made.getvalue()


def records(count=8):
    """Item numbers are not ids: 10, 20, ..., and one item no session names."""
    for k in range(1, count + 1):
        yield {'item': 10 * k, 'title': f'Film &amp; {k}', 'year': 1990 + k % 2,
               'genres': ['Comedy', 'War'][: 1 + k % 2], 'image': f'{k}.png',
               **({'tags': ['old']} if k == 3 else {})}
    yield {'item': 7, 'title': 'Unseen', 'year': 1, 'genres': [], 'image': 'none.png'}


def write(directory, *, zipped=True, lines=None, **changes):
    rng = np.random.default_rng(0)
    arrays = {'catalog_item': np.arange(9) * 10}
    for part, count in (('train', 30), ('test', 8)):
        arrays[f'{part}_items'] = rng.integers(1, 9, 4 * count)
        arrays[f'{part}_offsets'] = np.arange(count + 1) * 4
    np.savez(directory / 'sessions.npz', **{**arrays, **changes})
    lines = [json.dumps(r) for r in records()] if lines is None else lines
    with gzip.open(directory / 'items.jsonl.gz', 'wt', encoding='utf-8') as file:
        file.write('\n'.join(lines) + '\n')
    pictures = {f'{k}.png': picture((20 * k, 0, 0)) for k in range(1, 8)}  # item 8 has none
    if zipped:
        with zipfile.ZipFile(directory / 'images.zip', 'w') as file:
            for name, data in pictures.items():
                file.writestr(f'posters/{name}', data)
    else:
        (directory / 'images').mkdir()
        for name, data in pictures.items():
            (directory / 'images' / name).write_bytes(data)
    return directory


def load(directory, **changes):
    options = dict(words=WORDS, sides=('year', 'genres'), ordered=True, valid=0.1, seed=0)
    return folder.load(directory, **{**options, **changes})


@pytest.mark.parametrize('zipped', [True, False])
def test_ids_texts_pictures_and_side_features_join(tmp_path, zipped):
    data = load(write(tmp_path, zipped=zipped))
    assert data.asins == ['', *(str(10 * k) for k in range(1, 9))]
    assert data.titles[2] == 'Film & 2'
    assert data.texts[3] == 'Comedy War. 1991. Film & 3. old'
    assert data.texts[2] == 'Comedy. 1990. Film & 2'
    np.testing.assert_array_equal(data.has_image, [False, *[True] * 7, False])
    assert [data.image_bytes[k] for k in (0, 3, 8)] == [b'', picture((60, 0, 0)), b'']
    year, comedy, war = data.side.T
    np.testing.assert_array_equal(year, [0, 2, 1, 2, 1, 2, 1, 2, 1])
    np.testing.assert_array_equal(comedy, [0, *[1] * 8])
    np.testing.assert_array_equal(war, [0, 1, 0, 1, 0, 1, 0, 1, 0])
    assert data.side_sizes == (3, 2, 2)
    assert data.lines == {'read': 9, 'kept': 8, 'rejected': {'in no session': 1},
                          'unused': {'image_not_there': 1}}
    assert len(data.valid.start) == 3
    assert load(tmp_path).fingerprint == data.fingerprint
    assert load(tmp_path, words=('title',)).fingerprint != data.fingerprint


def test_content_has_pixels_and_tokens_of_an_own_tokenizer(tmp_path):
    from tpad_jax.data import text
    data = load(write(tmp_path))
    text.train_tokenizer(data.texts[1:], tmp_path / 'tokenizer', 400)
    found = catalogue.content(data, tmp_path / 'made', image_size=4, text_length=8,
                             tokenizer_dir=tmp_path / 'tokenizer')
    assert (found.image[3, :, :, 0] == 60).all()
    assert found.broken == 0
    assert (found.tokens[1:] >= 0).any(axis=1).all()
    assert (found.tokens[1:, :1] == found.tokens[1, 0]).all()  # every text begins with one word


@pytest.mark.parametrize(('changes', 'told'), [
    (dict(lines=['{"item": 10}', '{"item": 10}']), 'line 2'),
    (dict(lines=['{"item": 10}', 'no json']), 'line 2 cannot be read'),
    (dict(lines=['{"item": 10, "title": "a"}']), 'lacks 7 of 8 items'),
    (dict(catalog_item=np.arange(4)), r'catalog_item is int64 \[4\]'),
    (dict(catalog_item=np.ones(9, int)), 'more than one id'),
])
def test_what_does_not_join_is_refused(tmp_path, changes, told):
    with pytest.raises(InputError, match=told):
        load(write(tmp_path, **changes))


def test_unknown_fields_and_two_sources_are_refused(tmp_path):
    with pytest.raises(InputError, match="no item has the field 'plot'"):
        load(write(tmp_path), words=('plot',))
    c = movielens.get_config()
    c.data.ready = str(tmp_path / 'nowhere')
    with pytest.raises(InputError, match='not a directory'):
        validate.check(c)
    c.data.update(ready=str(tmp_path), raw_dir=str(tmp_path))
    with pytest.raises(InputError, match='two sources'):
        validate.check(c)


@pytest.mark.slow
def test_the_job_refits_all_and_tests_all(base_dir, tmp_path):
    from tpad_jax.job import job
    c = movielens.get_config()
    c.data.ready = str(write(tmp_path))
    c.mllm.update(base=str(base_dir), image_size=tiny_base.SIDE, text_length=8)
    c.mllm.own.vocab = 400
    c.model.features = tiny_base.WIDTH
    c.parallel, c.search.trials, c.data.words = 'jit', 1, 'genres,year,title'
    c.stages, c.model.recommend = 'knowledge,recommend', 'k'
    c.refit, c.skip_not_finite = True, 0
    c.diagnostics, c.baselines, c.experts = 0, 'vstan,content_knn', ''
    c.rivals = dict(id_only=c.rivals.id_only)
    c.xla_flags = '--xla_backend_optimization_level=0'
    for name in ('knowledge', 'recommend'):
        c.stage[name].update(steps=1, batch_size=4, optimiser='sgd')
    c.stage.recommend.eval_every = 1
    c.partner = dict(model=dict(encoder='sr_gnn', width=12, recommend='k'),
                     losses=dict(next_item=dict(h='h')))
    found = job.run(c, tmp_path / 'run')
    assert found['data']['refit']
    assert {'tpad', 'attention', 'sr_gnn', 'id_only', 'vstan',
            'content_knn'} <= set(found['models'])
    stages = {json.loads(line)['stage'] for line in
              (tmp_path / 'run' / 'log.jsonl').read_text().splitlines()}
    for name in ('', 'partner', 'id_only', 'id_only_partner'):
        assert f'{name}_refit'.strip('_') in stages
    for name in ('attention', 'sr_gnn'):
        assert found['models'][name]['valid']['step'] == 1
    ranks = np.load(tmp_path / 'run' / 'ranks.npz', allow_pickle=False)
    ways = {ranks[f'{name}/above'].tobytes() for name in ('tpad_recommend', 'attention', 'sr_gnn')}
    assert len(ways) == 3  # what is served is neither of the two
