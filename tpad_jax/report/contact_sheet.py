"""Draws test sessions as one picture: what was read, what came next and what was recommended."""

import base64
import io
import itertools
import textwrap
import unicodedata
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from tpad_jax.core import files
from tpad_jax.report import gallery

FILE = Path('figures') / 'contact_sheet.png'
MODELS = 'tpad', 'id_only'  # whose lists are shown, where a run has them
ROWS, PREFIX = 6, 5  # sessions, and the latest items of each
TILE, STEP = 96, 108  # pixels of a picture, and from one picture to the next
TOP, LEFT, ROW = 32, 28, 142  # pixels: heading, left margin, session
LETTERS = 17  # of a line of an item's title
INK, GREY, PALE, BLANK = '#222222', '#777777', '#dddddd', '#f2f2f2'
GREEN = '#009e73'  # frames the true next item


def write(workdir: Path) -> Path | None:
    """Draw the first sessions of a run's gallery to workdir/figures/contact_sheet.png.

    Returns:
      The file; None, and no file, for a run without a gallery.
    """
    stored = gallery.read(workdir)
    if not stored or not stored['sessions']:
        return None
    file = workdir / FILE
    with files.replacing(file) as partial:
        # 256 colours: half the size
        draw(stored).quantize(256).save(partial, 'PNG')
    return file


def draw(stored: dict) -> Image.Image:
    """Draw a sheet.

    Args:
      stored: a gallery, as `gallery.read` returns it.

    Returns:
      An RGB picture with one line per session: the last items of its prefix, the true next item
      and the first items of each of MODELS. Green frames mark the true next item.
    """
    models = [name for name in MODELS if name in stored['models']]
    groups = [('session so far', PREFIX), ('true next', 1),
              *((f'{name}: top {gallery.FIRST}', gallery.FIRST) for name in models)]
    sessions = stored['sessions'][:ROWS]
    *columns, left = itertools.accumulate(
        (width * STEP + STEP // 3 for _, width in groups), initial=LEFT)
    sheet = Image.new('RGB', (left, TOP + ROW * len(sessions)), 'white')
    pen = ImageDraw.Draw(sheet)
    for (heading, _), column in zip(groups, columns, strict=True):
        pen.text((column, 8), heading, GREEN if heading == 'true next' else INK,
                 ImageFont.load_default(15))
    for number, session in enumerate(sessions):
        y = TOP + ROW * number
        shown = session['prefix'][-PREFIX:]
        lists = [[None] * (PREFIX - len(shown)) + shown, [session['target']],
                 *(session['models'][name]['first'] for name in models)]
        for place, (column, items) in enumerate(zip(columns, lists, strict=True)):
            for position, item in enumerate(items):
                if item is not None:
                    _tile(sheet, pen, (column + position * STEP, y), stored['items'][str(item)],
                          framed=place > 0 and item == session['target'])
        if hidden := len(session['prefix']) - len(shown):
            pen.text((4, y + TILE // 2), f'+{hidden}', GREY, ImageFont.load_default(12))
        if number:
            pen.line((LEFT, y - 6, left - STEP // 3, y - 6), PALE)
    return sheet


def _tile(sheet, pen, corner, item, framed):
    """Draw an item's picture and title with its upper left corner at a place."""
    x, y = corner
    if item.get('picture'):
        encoded = base64.b64decode(item['picture'].partition(',')[2])
        sheet.paste(Image.open(io.BytesIO(encoded)).resize((TILE, TILE)), corner)
    else:
        pen.rectangle((x, y, x + TILE, y + TILE), BLANK)
        pen.text((x + 26, y + TILE // 2 - 6), 'no image', GREY, ImageFont.load_default(11))
    if framed:
        pen.rectangle((x - 3, y - 3, x + TILE + 2, y + TILE + 2), None, GREEN, 4)
    # Pillow's own font has no accented letters, and would draw a square in their place
    bare = ''.join(letter for letter in unicodedata.normalize('NFKD', item['title'])
                   if not unicodedata.combining(letter))
    title = textwrap.wrap(bare, LETTERS, max_lines=2, placeholder='\u2026')
    for line, text in enumerate(title):
        pen.text((x, y + TILE + 5 + 13 * line), text, INK, ImageFont.load_default(11))
