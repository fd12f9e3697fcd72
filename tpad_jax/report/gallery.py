"""What the page of a run shows and nothing else in its workdir holds: a gallery of test sessions.

workdir/report/gallery.json: the sessions that are shown, the first items of each model on them,
what speaks for an item (below), and every item that occurs once, with its title and its picture as
a WebP data URI. A page is made anew from this file without a model.

What speaks for a recommended item [ours]: how like the prefix's items it is in k and in r, what
lies nearest to it there, how often training went from the last item to it and, where the catalogue
is planted, its true probability. Likeness is the cosine of rows without the catalogue's mean.
"""

import base64
import io
import json
from pathlib import Path

import numpy as np
from PIL import Image

from tpad_jax.core import files
from tpad_jax.data import images
from tpad_jax.diagnostics import snapshots
from tpad_jax.diagnostics.clouds import unit
from tpad_jax.errors import InputError
from tpad_jax.evaluation import metrics
from tpad_jax.evaluation.scorers import top
from tpad_jax.features import store

FILE = Path('report') / 'gallery.json'
MODELS = 'tpad', 'knowledge_only', 'id_only'  # whose lists are shown, where a run has them
SESSIONS, FIRST, NEAR = 24, 5, 4  # sessions, items of a list, neighbours of an item
PICTURE, QUALITY = 96, 60  # pixels of a side, of WebP
ROOM = 1_700_000  # characters of all pictures together: the page stays small whatever the catalogue
TITLE = 120  # characters of a title


def write(job, scorers: dict, ranks: dict, best: str) -> Path | None:
    """Write the gallery of a finished run.

    Args:
      job: job.Job. scorers: {model: scorer}. ranks: {model: {'above', 'equal'}} of all test rows.
      best: which model 'tpad' is, and so which rows k and r it reads.

    Returns:
      The file; None, and no file, for a run without content or without any of MODELS.
    """
    shown = [name for name in MODELS if name in scorers]
    file = job.workdir / FILE
    file.unlink(missing_ok=True)  # it is of a run of fewer stages
    if job.content is None or not shown:
        return None
    rows, chosen = job.test, drawn(job)
    lists = {name: np.concatenate([top(metrics.dense(scores), FIRST) for _, scores in
                                   metrics.scored(scorers[name], rows.items[chosen],
                                                  job.data.num_items, name=name)])
             for name in shown}
    clouds = {name: unit(x - x.mean(0)) for name, x in _rows(job, best).items()}
    truth = None if job.probabilities is None else job.probabilities(rows.items[chosen])
    pairs = _steps(job.final.train, job.data.num_items + 1)
    sessions = []
    for number, row in enumerate(chosen):
        prefix = rows.items[row][rows.items[row] > 0]
        own = {name: found[number] for name, found in lists.items()}
        said = np.unique(np.concatenate([rows.target[row:row + 1], *own.values()]))
        sessions.append({
            'row': row, 'session': rows.session[row], 'prefix': prefix, 'target': rows.target[row],
            'models': {name: {'first': own[name], 'above': ranks[name]['above'][row],
                              'equal': ranks[name]['equal'][row]} for name in shown},
            'why': {int(item): _why(item, prefix, clouds, pairs,
                                    None if truth is None else truth[number]) for item in said}})
    told = np.unique(np.concatenate([found.ravel() for found in lists.values()]))
    near = {name: _nearest(x, told) for name, x in clouds.items()}
    files.write_json(file, {
        'models': shown, 'items': _items(job, sessions, near), 'sessions': sessions,
        'sides': list(clouds), 'catalogue': job.data.num_items, 'colours': _colours(job)})
    return file


def read(workdir) -> dict | None:
    """The gallery of a workdir, or None where it has none; ids are str where they are keys.

    Raises:
      InputError: the file is damaged.
    """
    file = Path(workdir) / FILE
    if not file.is_file():
        return None
    try:
        found = json.loads(file.read_text())
        found['models'], found['items'], found['sessions'], found['colours']
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f'{file} is damaged ({type(error).__name__}); delete it, and the page is '
                         'made without a gallery') from error
    return found


def drawn(job) -> np.ndarray:
    """Rows of the test, int [n]: of n sessions drawn by the run's seed one row each.

    The row has a prefix of two items or more, where its session has one.
    """
    rows, rng = job.test, np.random.default_rng(job.config.seed)
    several = (rows.items > 0).sum(1) >= 2
    chosen = []
    for session in rng.permutation(np.unique(rows.session))[:SESSIONS]:
        own = np.flatnonzero(rows.session == session)
        long = own[several[own]]
        chosen.append(rng.choice(long if len(long) else own))
    return np.sort(np.asarray(chosen))


def _rows(job, best):
    """{'k' | 'r': float [V, D]} of items 1..V as the best model reads them, where there are any."""
    made = {'k': 'knowledge', 'r': 'transfer'}
    if best == 'tpad_joint':
        made = dict.fromkeys(made, 'joint')
    found = {}
    for name, stage in made.items():
        directory = job.workdir / 'features' / stage
        if (directory / f'{name}.npy').is_file():
            rows = store.read(directory, name, slice(1, None))
            found[name] = np.asarray(rows, np.float32).reshape(len(rows), -1)
    return found


def _steps(train, width):
    """How often training goes from an item a to a b: a * width + b ascending, counts, width."""
    inside = np.ones(len(train.items), bool)
    inside[train.offsets[1:-1]] = False
    ahead = train.items[:-1].astype(np.int64) * width + train.items[1:]
    steps, counts = np.unique(ahead[inside[1:]], return_counts=True)
    return steps, counts, width


def _why(item, prefix, clouds, pairs, truth):
    """What speaks for an item after a prefix; cosines stand in the prefix's order."""
    steps, counts, width = pairs
    step = int(prefix[-1]) * width + int(item)
    at = np.searchsorted(steps, step)
    out = {'followed': int(counts[at]) if at < len(steps) and steps[at] == step else 0}
    for name, x in clouds.items():
        out[name] = np.round(x[prefix - 1] @ x[item - 1], 3)
    return out if truth is None else {**out, 'true': truth[item]}


def _nearest(x, told):
    """{item: [[item, cosine], ...]} of the ids `told`, nearest first; x float [V, D], unit rows."""
    found = {}
    for item in told:
        like = x @ x[item - 1]
        like[item - 1] = -np.inf
        best = np.argsort(-like, kind='stable')[:min(NEAR, len(x) - 1)]
        found[int(item)] = [[int(other) + 1, round(float(like[other]), 3)] for other in best]
    return found


def _items(job, sessions, near):
    """{id: title, warm, near, picture}; pictures in the order in which they would be missed."""
    order = [item for one in sessions for item in (*one['prefix'], one['target'])]
    order += [item for one in sessions for model in one['models'].values()
              for item in model['first']]
    order += [other for found in near.values() for pairs in found.values() for other, _ in pairs]
    out, room = {}, ROOM
    for item in dict.fromkeys(map(int, order)):
        own = {name: found[item] for name, found in near.items() if item in found}
        title = job.data.titles[item] or job.data.asins[item]
        out[item] = {'title': title[:TITLE - 1] + '\u2026' * (len(title) >= TITLE),
                     'warm': bool(job.final.warm[item]), **({'near': own} if own else {})}
        if job.content.has_image[item]:
            uri = _picture(job.data.image_bytes[item])
            room -= len(uri)
            out[item]['picture'] = uri if room >= 0 else None
    return out


def _picture(encoded):
    with images.quiet():
        pixels = images.decode(encoded, PICTURE)
    packed = io.BytesIO()
    Image.fromarray(pixels).save(packed, 'WEBP', quality=QUALITY)
    return 'data:image/webp;base64,' + base64.b64encode(packed.getvalue()).decode()


def _colours(job):
    """{id: place of its category among the most common} of the items whose features are drawn."""
    clouds = snapshots.clouds(job.workdir)
    if clouds is None:
        return {}
    label = snapshots.category(job)
    known, counts = np.unique(label[label >= 0], return_counts=True)
    place = {value: i for i, value in enumerate(known[np.argsort(-counts, kind='stable')])}
    ids = np.unique(np.concatenate([cloud[name] for cloud in (clouds[1], clouds[3])
                                    for name in ('items', 'at', 'next')]))
    return {int(item): place[label[item - 1]] for item in ids if item and label[item - 1] >= 0}
