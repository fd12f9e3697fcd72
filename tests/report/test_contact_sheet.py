"""The contact sheet: the same bytes again, and the pictures and frames that a gallery asks for."""

import base64
import io

import numpy as np
import pytest
from PIL import Image

from tests import tiny_report
from tpad_jax.report import gallery

GREEN = [int(gallery.GREEN[at:at + 2], 16) for at in (1, 3, 5)]


def picture(grey):
    made = io.BytesIO()
    Image.new('RGB', (8, 8), (grey,) * 3).save(made, 'WEBP', lossless=True)
    return 'data:image/webp;base64,' + base64.b64encode(made.getvalue()).decode()


def sheet(prefix=(1, 2), target=3, tpad=(4, 5, 6, 7, 8), ids=(4, 5, 6, 7, 8), grey=128):
    """A sheet of one session, as an array [H, W, 3]; item 2 has no picture, 4 was left out."""
    items = {str(i): {'title': '$5 case for $6 手机 ' + 'x' * 60, 'picture': picture(grey)}
             for i in range(1, 12)}
    del items['2']['picture']
    items['4']['picture'] = None
    return np.asarray(gallery.draw_sheet({
        'models': ['tpad', 'knowledge_only', 'id_only'], 'items': items,
        'sessions': [{'prefix': list(prefix), 'target': target, 'models': {
            'tpad': {'first': list(tpad)}, 'id_only': {'first': list(ids)}}}]}))


def green(image):
    return int((image == GREEN).all(-1).sum())


def test_the_target_and_every_hit_have_a_frame():
    none = green(sheet())
    one, two = green(sheet(tpad=(4, 5, 3, 7, 8))), green(sheet(tpad=(4, 5, 3, 7, 8),
                                                               ids=(3, 4, 5, 6, 7)))
    assert one - none == two - one > 500
    # an item of the prefix that is the target again has none: it was not recommended
    assert green(sheet(prefix=(3, 1))) == none


def test_the_last_five_of_a_long_prefix_are_shown():
    five, nine, two = (sheet(prefix=prefix) for prefix in
                       ((5, 6, 7, 8, 9), (1, 1, 1, 1, 5, 6, 7, 8, 9), (8, 9)))
    assert five.shape == nine.shape == two.shape
    grey = [int((image == 128).all(-1).sum()) for image in (five, nine, two)]
    assert grey[0] == grey[1]
    # a few pixels of the titles' edges have the same grey
    assert grey[0] - grey[2] == pytest.approx(3 * gallery.TILE ** 2, abs=30)


def test_a_run_writes_it_once_and_the_same_again(tmp_path):
    tiny_report.write(tmp_path / 'run')
    assert gallery.write_sheet(tmp_path / 'run') == tmp_path / 'run' / gallery.SHEET
    before = (tmp_path / 'run' / gallery.SHEET).read_bytes()
    gallery.write_sheet(tmp_path / 'run')
    assert (tmp_path / 'run' / gallery.SHEET).read_bytes() == before
    with Image.open(tmp_path / 'run' / gallery.SHEET) as image:
        rows = min(gallery.ROWS, len(gallery.read(tmp_path / 'run')['sessions']))
        assert image.height == gallery.TOP + rows * gallery.ROW


def test_without_a_gallery_there_is_no_sheet(tmp_path):
    assert gallery.write_sheet(tmp_path) is None
    assert not list(tmp_path.iterdir())
