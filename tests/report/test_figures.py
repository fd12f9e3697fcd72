"""Figures: written, the same bytes again, and showing what they were given."""

import json

import numpy as np
import pytest
from PIL import Image

from tpad_jax.errors import InputError
from tpad_jax.report import figures


def write_log(path, lines):
    path.write_text(''.join(json.dumps(line) + '\n' for line in lines))
    return path


def pixels(path):
    with Image.open(path) as image:
        return np.asarray(image.convert('RGB'))


def count(path, colour):
    wanted = [int(colour[at : at + 2], 16) for at in (1, 3, 5)]
    return int((pixels(path) == wanted).all(-1).sum())


@pytest.fixture
def log(tmp_path):
    lines = []
    for stage in ('acquire', 'transfer'):
        for step in range(1, 20):
            line = {'stage': stage, 'step': step, 'loss': 1 / step, 'align': 2 / step}
            if stage == 'transfer':
                line |= {'mi_align': 1 - 1 / step, 'time/rows': 5.0, 'note': 'text'}
            if step % 5 == 0:
                line |= {'valid/hit@20': step / 100, 'valid/mrr@20': None}
            lines.append(line)
    return write_log(tmp_path / 'log.jsonl', lines)


def test_learning_curves_are_the_same_bytes_again_and_grow_with_the_stages(tmp_path, log):
    assert figures.learning_curves(log, tmp_path / 'new' / 'a.png')
    figures.learning_curves(log, tmp_path / 'b.png')
    assert (tmp_path / 'new' / 'a.png').read_bytes() == (tmp_path / 'b.png').read_bytes()
    one = [json.loads(line) for line in log.read_text().splitlines()[:19]]
    figures.learning_curves(write_log(tmp_path / 'one.jsonl', one), tmp_path / 'one.png')
    assert pixels(tmp_path / 'b.png').shape[0] == 2 * pixels(tmp_path / 'one.png').shape[0]
    assert count(tmp_path / 'one.png', figures.COLOURS[0]) > 100


def test_where_no_stage_trained_there_is_no_curve(tmp_path):
    assert not figures.learning_curves(write_log(tmp_path / 'log.jsonl', []), tmp_path / 'x.png')
    assert not (tmp_path / 'x.png').exists()


def test_mutual_information_is_drawn_only_where_logged(tmp_path, log):
    assert figures.mutual_information(log, tmp_path / 'mi.png')
    assert count(tmp_path / 'mi.png', figures.COLOURS[0]) > 100
    bare = write_log(tmp_path / 'bare.jsonl', [{'stage': 'a', 'step': 1, 'loss': 1.0}])
    assert not figures.mutual_information(bare, tmp_path / 'none.png')
    assert not (tmp_path / 'none.png').exists()
    named = write_log(tmp_path / 'named.jsonl', [{'stage': 'a', 'step': 1, 'x/mi_align': 1.0}])
    assert figures.mutual_information(named, tmp_path / 'named.png')


def test_a_missing_log_is_named(tmp_path):
    with pytest.raises(InputError, match='does not exist'):
        figures.learning_curves(tmp_path / 'log.jsonl', tmp_path / 'x.png')


def test_hit_curves_draw_every_model_and_the_oracle(tmp_path):
    places = np.arange(1, 51)
    curves = {f'model {n}': places / (60 + n) for n in range(3)} | {'cost $5 $6': places / 61}
    figures.hit_curves(curves, places / 50, tmp_path / 'with.png')
    figures.hit_curves(curves, None, tmp_path / 'without.png')
    for colour in figures.COLOURS[:4]:
        assert count(tmp_path / 'with.png', colour) > 50
    assert count(tmp_path / 'with.png', figures.INK) > count(tmp_path / 'without.png', figures.INK)


def test_labels_of_equal_curves_do_not_touch(tmp_path):
    figure = figures.Figure()
    axis = figure.subplots()
    axis.set_ylim(0, 100)
    figures._label_ends(axis, {name: (1, 50.0, 'k') for name in 'abc'} | {'d': (1, 90.0, 'k')})
    places = sorted(text.xy[1] for text in axis.texts)
    assert places == pytest.approx([44.5, 50.0, 55.5, 90.0])  # around their mean, a line apart


def row(hits, prefix=2):
    image = np.full((8, 8, 3), 128, np.uint8)
    return {
        'prefix': [image] * prefix,
        'target': image,
        'models': {'tpad': [image, None, image], 'pop': [image] * 3},
        'hits': hits,
        'titles': {
            'prefix': ['$5 case for $6'] * prefix,
            'target': '手机 case, ' + 'x' * 60,
            'models': {'tpad': ['', 'a', 'b'], 'pop': ['a'] * 3},
        },
    }


def test_contact_sheet_frames_the_target_and_every_hit(tmp_path):
    greens = []
    for hits in ((None, None), (0, None), (0, 2)):
        rows = [row(dict(zip(('tpad', 'pop'), hits, strict=True)))]
        figures.contact_sheet(rows, tmp_path / 'sheet.png')
        greens.append(count(tmp_path / 'sheet.png', figures.GREEN))
    frame = greens[1] - greens[0]
    assert frame > 100
    assert greens[2] - greens[1] == pytest.approx(frame, rel=0.2)


def test_contact_sheet_shows_the_last_five_of_a_long_prefix(tmp_path):
    none = {'tpad': None, 'pop': None}
    for name, prefix in (('five', 5), ('nine', 9), ('two', 2)):
        figures.contact_sheet([row(none, prefix)], tmp_path / f'{name}.png')
    five, nine, two = (pixels(tmp_path / f'{name}.png') for name in ('five', 'nine', 'two'))
    assert five.shape == nine.shape
    assert five.shape[1] > two.shape[1]
    grey = [int((sheet == 128).all(-1).sum()) for sheet in (five, nine)]
    assert grey[0] == pytest.approx(grey[1], rel=0.01)
