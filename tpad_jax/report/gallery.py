"""Stores the part of a run's page that no other file of its workdir has: test sessions.

workdir/report/gallery.json holds the sessions, the first items of each model on them, the reasons
for an item (below), and every item once, with its title and its picture as a WebP data URI. A page
is made again from this file without a model. A contact sheet draws its first sessions as a picture.

The reasons for a recommended item [ours] are its likeness to the prefix's items in k and in r, its
nearest items there, the expert that adds most to its score, how often training went from the last
item to it and, where the catalogue is planted, its true probability. Likeness is the cosine of rows
without the catalogue's mean.
"""

import base64
import io
import itertools
import json
import textwrap
import unicodedata
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from tpad_jax.core import files
from tpad_jax.data import images, item_graphs
from tpad_jax.diagnostics import probes, records
from tpad_jax.diagnostics.clouds import unit
from tpad_jax.errors import refusing
from tpad_jax.evaluation import metrics
from tpad_jax.features import store

FILE = Path('report') / 'gallery.json'
MODELS = 'tpad', 'knowledge_only', 'id_only'  # whose lists are shown, where a run has them
SESSIONS, FIRST, NEAR = 24, 5, 4  # sessions, items of a list, neighbours of an item
PICTURE, QUALITY = 96, 60  # pixels of a side, of WebP
ROOM = 1_700_000  # characters of all pictures together: a page stays small for any catalogue
TITLE = 120  # characters of a title
# of the contact sheet
SHEET = Path('figures') / 'contact_sheet.png'
SHOWN = 'tpad', 'id_only'  # whose lists a contact sheet shows, where a run has them
ROWS, PREFIX = 6, 5  # sessions, and the latest items of each
TILE, STEP = 96, 108  # pixels of a picture, and from one picture to the next
TOP, LEFT, ROW = 32, 28, 142  # pixels: heading, left margin, session
LETTERS = 17  # of a line of an item's title
INK, GREY, PALE, BLANK = '#222222', '#777777', '#dddddd', '#f2f2f2'
GREEN = '#009e73'  # frames the true next item



def write(job, scorers: dict, ranks: dict, best: str) -> Path | None:
    """Write the gallery of a finished run.

    Args:
      job: job.Job.
      scorers: {model: scorer}.
      ranks: {model: {'above', 'equal'}} of all test rows.
      best: the model that 'tpad' is; it decides which rows k and r are read.

    Returns:
      The file; None, and no file, for a run without content or without any of MODELS.
    """
    shown = [name for name in MODELS if name in scorers]
    file = job.workdir / FILE
    file.unlink(missing_ok=True)  # an earlier run of fewer stages may have left one
    if job.content is None or not shown:
        return None
    rows, drawn = job.test, drawn_rows(job)
    lists = {name: np.concatenate([
        metrics.top(metrics.dense(scores), FIRST) for _, scores in metrics.scored(
            scorers[name], rows.read_by(scorers[name])[drawn], job.data.num_items, name=name)])
        for name in shown}
    clouds = {name: unit(x - x.mean(0)) for name, x in _rows(job, best).items()}
    truth = None if job.probabilities is None else job.probabilities(
        rows.read_by(job.probabilities)[drawn])
    followers = item_graphs.followers(job.final.train, job.data.num_items, 1)
    explained = [np.unique(np.append(rows.target[row], [first[number] for first in lists.values()]))
                 for number, row in enumerate(drawn)]
    decided = _decided(scorers.get('tpad'), rows.items[drawn], explained)
    sessions = []
    for number, row in enumerate(drawn):
        prefix = rows.items[row][rows.items[row] > 0]
        first = {name: items[number] for name, items in lists.items()}
        sessions.append({
            'row': row, 'session': rows.session[row], 'prefix': prefix, 'target': rows.target[row],
            'models': {name: {'first': first[name], 'above': ranks[name]['above'][row],
                              'equal': ranks[name]['equal'][row]} for name in shown},
            'why': {int(item): {**_why(item, prefix, clouds, followers,
                                       None if truth is None else truth[number]), **expert}
                    for item, expert in zip(explained[number], decided[number], strict=True)}})
    recommended = np.unique(np.concatenate([items.ravel() for items in lists.values()]))
    near = {name: _nearest(x, recommended) for name, x in clouds.items()}
    files.write_json(file, {
        'models': shown, 'items': _items(job, sessions, near), 'sessions': sessions,
        'sides': list(clouds), 'catalogue': job.data.num_items, 'colours': _colours(job)})
    return file


def read(workdir: str | Path) -> dict | None:
    """Read the gallery of a workdir, or None without one; ids are str where they are keys.

    Raises:
      InputError: the file is damaged.
    """
    file = Path(workdir) / FILE
    if not file.is_file():
        return None
    with refusing((ValueError, KeyError, TypeError), f'{file} is damaged',
                  'Fix: delete it to get the page without a gallery'):
        stored = json.loads(file.read_text())
        stored['models'], stored['items'], stored['sessions'], stored['colours']
    return stored


def drawn_rows(job) -> np.ndarray:
    """Draw sessions by the run's seed, and one test row of each: int [n].

    The row has a prefix of two items or more, where its session has one.
    """
    rows, rng = job.test, np.random.default_rng(job.config.seed)
    several = (rows.items > 0).sum(1) >= 2
    drawn, ranked = [], rows.target > 0
    for session in rng.permutation(np.unique(rows.session[ranked]))[:SESSIONS]:
        every = np.flatnonzero(ranked & (rows.session == session))
        long = every[several[every]]
        drawn.append(rng.choice(long if len(long) else every))
    return np.sort(np.asarray(drawn))


def write_sheet(workdir: Path) -> Path | None:
    """Draw the first sessions of a run's gallery to workdir/figures/contact_sheet.png.

    Returns:
      The file; None, and no file, for a run without a gallery.
    """
    stored = read(workdir)
    if not stored or not stored['sessions']:
        return None
    file = workdir / SHEET
    with files.replacing(file) as partial:
        # 256 colours: half the size
        draw_sheet(stored).quantize(256).save(partial, 'PNG')
    return file


def draw_sheet(stored: dict) -> Image.Image:
    """Draw a sheet.

    Args:
      stored: a gallery, as `read` returns it.

    Returns:
      An RGB picture with one line per session: the last items of its prefix, the true next item
      and the first items of each of SHOWN. Green frames mark the true next item.
    """
    models = [name for name in SHOWN if name in stored['models']]
    groups = [('session so far', PREFIX), ('true next', 1),
              *((f'{name}: top {FIRST}', FIRST) for name in models)]
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


def _rows(job, best):
    """{'k' | 'r': float [V, D]} of items 1..V as the best model reads them."""
    out = {}
    for name, stage in (('k', 'knowledge'), ('r', 'transfer')):
        directory = job.workdir / 'features' / ('joint' if best == 'tpad_joint' else stage)
        if (directory / f'{name}.npy').is_file():
            rows = store.read(directory, name, slice(1, None))
            out[name] = np.asarray(rows, np.float32).reshape(len(rows), -1)
    return out


def _why(item, prefix, clouds, followers, truth):
    """The reasons for an item after a prefix; cosines are in the prefix's order."""
    out = {} if truth is None else {'true': truth[item]}
    return {'followed': int(followers[prefix[-1], item]), **out,
            **{name: np.round(x[prefix - 1] @ x[item - 1], 3) for name, x in clouds.items()}}


def _decided(scores, items, explained):
    """[{item's {'expert': the one that adds most to its score}}] of each row; {} without any."""
    bound = getattr(scores, 'bound', None)
    if bound is None or bound.experts is None:
        return [[{}] * len(row) for row in explained]
    from tpad_jax.evaluation import experts  # a page that is made again does not import jax

    widest = max(map(len, explained))
    terms = experts.terms(bound, items, np.stack([np.resize(row, widest) for row in explained]))
    return [[{'expert': list(terms)[n]} for n in line[:len(row)]]
            for line, row in zip(np.argmax(list(terms.values()), axis=0), explained, strict=True)]


def _nearest(x, items):
    """{item: [[other item, cosine], ...]}, nearest first; x float [V, D], rows of length one."""
    out = {}
    for item in items:
        like = x @ x[item - 1]
        like[item - 1] = -np.inf
        best = np.argsort(-like, kind='stable')[:min(NEAR, len(x) - 1)]
        out[int(item)] = [[int(other) + 1, round(float(like[other]), 3)] for other in best]
    return out


def _items(job, sessions, near):
    """{id: title, warm, near, picture}. The most visible items get their pictures first."""
    order = [item for session in sessions for item in (*session['prefix'], session['target'])]
    order += [item for session in sessions for model in session['models'].values()
              for item in model['first']]
    order += [other for of in near.values() for pairs in of.values() for other, _ in pairs]
    out, room = {}, ROOM
    for item in dict.fromkeys(map(int, order)):
        title = job.data.titles[item] or job.data.asins[item]
        out[item] = {'title': title[:TITLE - 1] + '\u2026' * (len(title) >= TITLE),
                     'warm': bool(job.final.warm[item])}
        if neighbours := {name: of[item] for name, of in near.items() if item in of}:
            out[item]['near'] = neighbours
        uri = _picture(job.data.image_bytes[item]) if job.content.has_image[item] else ''
        if uri:
            room -= len(uri)
            out[item]['picture'] = uri if room >= 0 else None
    return out


def _picture(encoded):
    with images.quiet():
        pixels = images.decode(encoded, PICTURE)
    if pixels is None:  # it is damaged, and no stage has decoded it
        return ''
    packed = images.encode(pixels, 'WEBP', quality=QUALITY)
    return 'data:image/webp;base64,' + base64.b64encode(packed).decode()


def _colours(job):
    """{id: rank of its category by frequency} of the items whose features are drawn."""
    clouds = records.clouds(job.workdir)
    if not clouds:
        return {}
    label = probes.category(job)
    known, counts = np.unique(label[label >= 0], return_counts=True)
    place = {value: i for i, value in enumerate(known[np.argsort(-counts, kind='stable')])}
    ids = np.unique(np.concatenate([cloud[name] for cloud in clouds.values()
                                    for name in ('items', 'at', 'next')]))
    return {int(item): place[label[item - 1]] for item in ids if item and label[item - 1] >= 0}


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
    for line, text in enumerate(textwrap.wrap(bare, LETTERS, max_lines=2, placeholder='\u2026')):
        pen.text((x, y + TILE + 5 + 13 * line), text, INK, ImageFont.load_default(11))
