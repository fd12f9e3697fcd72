"""The planted catalogue: items and sessions whose true next-item distribution is known.

`write` writes raw Amazon files in the 2023 form, which the ordinary pipeline reads. Everything is a
pure function of the seed. The catalogue, its texts, its images and each split's sessions have
separate random streams. So the same seed with fewer training sessions or more noise is the same
world, tested on the same sessions. Two seeds with one `law_seed` are two catalogues with other
items, texts, pictures, popularity and sessions, in which the same attributes follow each other.
"""

import json
import os
import tempfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from tpad_jax.data import text
from tpad_jax.data.sources import Source
from tpad_jax.data.synthetic import rendering, wording
from tpad_jax.errors import refuse_if

# The definition; these are not options.
POPULARITY_SIGMA = 0.5
COLD_SHARE, UNIFORM_SHARE, POPULARITY_SHARE = 0.15, 0.05, 0.05
CATEGORY_WEIGHTS, OTHER_CATEGORY = (0.6, 0.3, 0.1), 1e-4
BRAND_WEIGHT, SUCCESSOR_WEIGHT = 20.0, 5.0
LENGTHS = (2, 8)  # both included
SMALLEST = {'seed': 0, 'law_seed': 0, 'items': 2, 'train': 0, 'valid': 0, 'test': 0,
            'noise': 0}  # of options

_TRANSITIONS, _ITEMS, _TEXTS, _IMAGES = range(1, 5)
_SPLITS = {'train': 5, 'valid': 6, 'test': 7}  # random stream of each
_CATEGORY, _BRAND, _STYLE, _COLOUR, _MATERIAL = range(5)
START = 1_600_000_000  # seconds; an arbitrary date in 2020
EVENT_SECONDS, SESSION_SECONDS = 60, 600  # eight events end before the next session starts


class Planted(NamedTuple):
    """A drawn world of V items. Row k of a per-item array is planted id k + 1; id 0 is padding.

    Attributes:
      attributes: int32 [V, 5]. Category, brand, style, colour, material.
      popularity: float64 [V], sums to 1.
      cold: bool [V]. In no training session.
      category_weights: float64 [12, 12], C[last, next].
      next_style: int32 [5].
      next_colour: int32 [8].
    """

    attributes: np.ndarray
    popularity: np.ndarray
    cold: np.ndarray
    category_weights: np.ndarray
    next_style: np.ndarray
    next_colour: np.ndarray


def _stream(seed, number):
    return np.random.default_rng([seed, number])


def _cycle(rng, size):
    """A successor for every value along one random cycle: no value follows itself. int32 [size]."""
    order = rng.permutation(size)
    successor = np.empty(size, np.int32)
    successor[order] = np.roll(order, -1)
    return successor


def draw(seed, items=600, law_seed=None):
    """Draw the world of a seed.

    Attributes are independent and uniform, popularity is log-normal (sigma 0.5), and exactly
    round(0.15 items) random items are cold. Each category has three other categories, drawn without
    replacement, with weights 0.6, 0.3, 0.1; all others, itself included, weigh 1e-4. Successors of
    style and of colour follow one random cycle, so that every value is followed by another one and
    follows exactly one.

    Args:
      seed: of the world.
      items: V.
      law_seed: of what follows what, the last three fields of the world. None: `seed`.

    Returns:
      The world.

    Raises:
      InputError: a negative seed or fewer than 2 items.
    """
    law_seed = seed if law_seed is None else law_seed
    _check(seed=seed, law_seed=law_seed, items=items)
    rng = _stream(law_seed, _TRANSITIONS)
    categories = len(wording.CATEGORIES)
    weights = np.full((categories, categories), OTHER_CATEGORY)
    for row in range(categories):
        others = np.delete(np.arange(categories), row)
        weights[row, rng.choice(others, len(CATEGORY_WEIGHTS), replace=False)] = CATEGORY_WEIGHTS
    next_style = _cycle(rng, len(wording.STYLES))
    next_colour = _cycle(rng, len(wording.COLOURS))
    rng = _stream(seed, _ITEMS)
    attributes = rng.integers(0, wording.SIZES, (items, len(wording.SIZES)), dtype=np.int32)
    popularity = np.exp(POPULARITY_SIGMA * rng.standard_normal(items))
    cold = np.zeros(items, bool)
    cold[rng.permutation(items)[:round(COLD_SHARE * items)]] = True
    popularity /= popularity.sum()
    return Planted(attributes, popularity, cold, weights, next_style, next_colour)


def _check(**options):
    for name, value in options.items():
        refuse_if(not value >= SMALLEST[name], f'config.data.planted.{name}={value}: too small. '
                  f'Expected {SMALLEST[name]} or more. Fix: raise it.')


def probabilities(planted, prefixes, warm_only=False):
    """Compute the exact distribution of the item that follows each prefix.

    P(i | prefix) = 0.90 P* + 0.05 / V + 0.05 pop(i), where P* is pop(i) C[cat(last), cat(i)]
    B[brand(first), brand(i)] S[style(last), style(i)] O[colour(last), colour(i)], normalised over
    all V items. B is 20 where the brands are equal, S and O are 5 at the successor; all are 1
    elsewhere. Items already in the session may follow again. Validation and test follow P itself.
    Training follows P cut to warm items and divided by their share of it (the mixture as a whole).

    Args:
      planted: the world, V items.
      prefixes: int32 [R, N]. Planted ids 1..V, left aligned, 0 pads; at least one id per row.
      warm_only: the distribution of training sessions, zero at cold items.

    Returns:
      float64 [R, V], column k for planted id k + 1; rows sum to 1.

    Raises:
      ValueError: a prefix without items.
    """
    prefixes = np.asarray(prefixes)
    if (prefixes[:, 0] == 0).any():
        raise ValueError('a prefix is empty: what follows depends on its first and last items.')
    first = planted.attributes[prefixes[:, 0] - 1]
    lengths = (prefixes > 0).sum(1)
    last = planted.attributes[prefixes[np.arange(len(prefixes)), lengths - 1] - 1]
    items = planted.attributes.T
    weight = planted.category_weights[last[:, _CATEGORY]][:, items[_CATEGORY]]
    weight *= planted.popularity
    weight[first[:, _BRAND, None] == items[_BRAND]] *= BRAND_WEIGHT
    weight[planted.next_style[last[:, _STYLE], None] == items[_STYLE]] *= SUCCESSOR_WEIGHT
    weight[planted.next_colour[last[:, _COLOUR], None] == items[_COLOUR]] *= SUCCESSOR_WEIGHT
    weight *= (1 - UNIFORM_SHARE - POPULARITY_SHARE) / weight.sum(1, keepdims=True)
    weight += UNIFORM_SHARE / weight.shape[1] + POPULARITY_SHARE * planted.popularity
    if warm_only:
        weight[:, planted.cold] = 0
        weight /= weight.sum(1, keepdims=True)
    return weight


def catalogue_probabilities(planted, asins):
    """Express the full distribution in the ids of a catalogue, as evaluation takes it.

    Args:
      planted: the world, V items.
      asins: list of V + 1 str, the catalogue's, [0] being padding; all V planted items, in any
        order.

    Returns:
      Function of int32 [R, N] (catalogue ids, left aligned, 0 pads) -> float64 [R, V + 1], whose
      column 0 is 0.

    Raises:
      InputError: the catalogue is not this planted one, or not all of it.
    """
    ids = planted_ids(planted, asins)

    def follow(prefixes):
        return np.pad(probabilities(planted, ids[prefixes])[:, ids[1:] - 1], ((0, 0), (1, 0)))

    return follow


def true_rows(planted, asins):
    """Look up the attributes of a catalogue's items.

    Args:
      planted: the world.
      asins: list of V + 1 str, the catalogue's, [0] being padding.

    Returns:
      int [V, attributes], and one-hot float32 [V + 1, sum of their sizes] with a row for padding.
    """
    attributes = planted.attributes[planted_ids(planted, asins)[1:] - 1]
    hot = [np.eye(size, dtype=np.float32)[values]
           for size, values in zip(wording.SIZES, attributes.T, strict=True)]
    return attributes, np.pad(np.concatenate(hot, axis=1), ((1, 0), (0, 0)))


def sample(probability, uniforms):
    """Draw ids 1..V by inverting each row's running sum.

    Args:
      probability: float64 [R, V].
      uniforms: float64 [R] in [0, 1).

    Returns:
      int32 [R].
    """
    running = np.cumsum(probability, axis=1)
    # "<=" steps over items of probability 0, whose running sum equals the one before.
    below = running <= (uniforms * running[:, -1])[:, None]
    return below.sum(1, dtype=np.int32) + 1


def sample_sessions(planted, count, rng, warm_only=False, chunk=2048, lengths=LENGTHS):
    """Draw sessions of uniform length.

    The first item is drawn by popularity, the others by `probabilities`. Every session takes one
    number more than `longest` from the generator. So with one seed the first sessions of a long
    sample are those of a short one.

    Args:
      planted: the world, V items.
      count: S, the number of sessions.
      rng: numpy generator.
      warm_only: training sessions: the first item, too, by popularity among the warm.
      chunk: rows at a time, which bounds memory and does not change the result.
      lengths: (shortest, longest), both included.

    Returns:
      int32 [S, longest] planted ids, left aligned, 0 pads.
    """
    shortest, longest = lengths
    uniforms = rng.random((count, 1 + longest))
    lengths = shortest + (uniforms[:, 0] * (longest - shortest + 1)).astype(np.int32)
    popularity = np.where(planted.cold, 0, planted.popularity) if warm_only else planted.popularity
    sessions = np.zeros((count, longest), np.int32)
    for begin in range(0, count, chunk):
        part, u = sessions[begin:begin + chunk], uniforms[begin:begin + chunk, 1:]
        part[:, 0] = sample(np.broadcast_to(popularity, (len(part), len(popularity))), u[:, 0])
        for position in range(1, longest):
            going = np.flatnonzero(lengths[begin:begin + chunk] > position)
            follow = probabilities(planted, part[going, :position], warm_only)
            part[going, position] = sample(follow, u[going, position])
    return sessions


def asin(planted_id):
    """Make the external id of a planted item: 'P000000001' for 1."""
    return f'P{planted_id:09d}'


def planted_ids(planted, asins):
    """Look up the planted ids of a catalogue's items.

    Args:
      planted: the world, V items.
      asins: list of V + 1 str, the catalogue's, [0] being padding.

    Returns:
      int32 [V + 1].

    Raises:
      InputError: the catalogue is not this planted one, or not all of it.
    """
    names = [asin(number + 1) for number in range(len(planted.popularity))]
    refuse_if(sorted(asins[1:]) != names,
              f'the {len(asins) - 1} items of the catalogue are not the {len(names)} planted ones. '
              'Expected the same items. Fix: set config.data.planted.items and turn k-core off.')
    return np.array([0, *(int(name[1:]) for name in asins[1:])], np.int32)


def _review(user, item, seconds):
    return {'rating': 5.0, 'title': '', 'text': '', 'images': [], 'asin': asin(item),
            'parent_asin': asin(item), 'user_id': f'U{user:09d}', 'timestamp': seconds * 1000,
            'helpful_vote': 0, 'verified_purchase': True}


def _metadata(item, title, brand, description):
    return {'main_category': 'Planted', 'title': title, 'average_rating': 5.0, 'rating_number': 1,
            'features': [], 'description': [description], 'price': None, 'images': [], 'videos': [],
            'store': brand or None, 'categories': ['Planted'], 'details': {},
            'parent_asin': asin(item), 'bought_together': None}


def _write_lines(path, records):
    with open(path, 'w', encoding='ascii', newline='\n') as file:
        file.writelines(json.dumps(record) + '\n' for record in records)


def write(raw_dir, *, seed, items=600, train=6000, valid=400, test=1200, noise=rendering.NOISE,
          law_seed=None, **varied):
    """Write the planted catalogue as raw Amazon files of the 2023 form.

    - `Planted.jsonl`: events, 60 s apart, each session by another user; all training sessions, then
      validation, then test, one session ending before the next starts.
    - `meta_Planted.jsonl`: brand in `store`, one category for all, no price.
    - `images/<asin>.jpg`: 64 x 64, quality 90.
    - `planted.json`: the options.

    The directory appears completely or not at all. One that holds the same options stays as it is.
    The same options give the same bytes.

    Args:
      raw_dir: the directory to make, or an empty one.
      seed: of the world and of everything in it.
      items: size of the catalogue.
      train: number of training sessions; a smaller sample is a part of a larger one.
      valid: number of validation sessions.
      test: number of test sessions.
      noise: standard deviation of the pixel noise in the range 0..1.
      law_seed: see `draw`.
      **varied: drift, kinds and visitors of variants.py, whose sessions are of other streams.

    Raises:
      InputError: the directory holds anything else, or an option is unusable.
    """
    raw_dir = Path(raw_dir)
    options = dict(seed=int(seed), items=int(items), train=int(train), valid=int(valid),
                   test=int(test), noise=float(noise))
    if law_seed not in (None, seed):  # absent from the files of the usual catalogue
        options['law_seed'] = int(law_seed)
    _check(**options)
    options |= {name: value for name, value in varied.items() if value}
    if _already_written(raw_dir, options):
        return
    planted = draw(seed, items, law_seed)
    words = wording.texts(planted.attributes, _stream(seed, _TEXTS))
    images = rendering.render(planted.attributes, _stream(seed, _IMAGES), noise)
    sessions = _variants().draw(options).sessions if any(varied.values()) else np.concatenate([
        sample_sessions(planted, options[split], _stream(seed, stream), warm_only=split == 'train')
        for split, stream in _SPLITS.items()])
    raw_dir.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f'.{raw_dir.name}.', dir=raw_dir.parent) as building:
        directory = Path(building, 'raw')
        (directory / 'images').mkdir(parents=True)
        _write_lines(directory / 'meta_Planted.jsonl', map(_metadata, range(1, items + 1), *words))
        for item, image in enumerate(images, 1):
            Image.fromarray(image).save(directory / 'images' / f'{asin(item)}.jpg', quality=90)
        _write_lines(directory / 'Planted.jsonl', (
            _review(number % (varied.get('visitors') or len(sessions)), item,
                    START + number * SESSION_SECONDS + place * EVENT_SECONDS)
            for number, session in enumerate(sessions.tolist())
            for place, item in enumerate(session) if item))
        (directory / 'planted.json').write_text(json.dumps(options, indent=2) + '\n')
        try:
            os.replace(directory, raw_dir)
        except OSError:  # another process was first; the same options give the same bytes
            if not _already_written(raw_dir, options):
                raise


def _already_written(raw_dir, options):
    """Check whether the directory holds these options; refuses one that holds anything else."""
    if not raw_dir.exists() or (raw_dir.is_dir() and not any(raw_dir.iterdir())):
        return False
    file = raw_dir / 'planted.json'
    refuse_if(not file.is_file(), f'{raw_dir} exists and is not a planted catalogue. Expected a '
              'new directory. Fix: name another workdir.')
    written = json.loads(file.read_text())
    refuse_if(written != options, f'{raw_dir} holds a planted catalogue of {written}. Expected '
              f'{options}. Fix: remove it or name another workdir.')
    return True


def _load(config, workdir):
    """Write the raw files and read them as any others, without k-core."""
    from tpad_jax.data.sources import amazon_tables  # seconds, which drawing alone does not need

    c = config.data.planted
    raw_dir = workdir / 'raw'
    refuse_if(0 < c.visitors * SESSION_SECONDS <= 3600 * config.data.gap_hours,
              f'config.data.planted.visitors={c.visitors}: a visitor returns after '
              f'{c.visitors * SESSION_SECONDS / 3600:.1f} hours, within one session. Expected more '
              f'than config.data.gap_hours={config.data.gap_hours}. Fix: raise the number.')
    varied = any(c[name] for name in _variants().NAMES)
    refuse_if(varied and config.data.max_length < LENGTHS[1] - 1, 'config.data.max_length='
              f'{config.data.max_length}: the law of a variant depends on the complete session. '
              f'Expected {LENGTHS[1] - 1} or more. Fix: raise it.')
    write(raw_dir, **c)
    # every session is cut as it was drawn, so that k-core and a share of the sessions mean nothing
    data = amazon_tables.prepared(config, raw_dir, workdir, core=1, valid=c.valid, test=c.test)
    return _variants().with_kinds(data, c) if c.kinds else data  # the raw files have none


def _variants():
    """Import the module of the variants, which needs this one."""
    from tpad_jax.data.synthetic import variants

    return variants


def _sizes(config, _workdir):
    return config.data.planted['items'], (
        len(wording.BRANDS) + 1, len(wording.CATEGORIES) + 1, text.PRICE_LEVELS + 1)


SOURCE = Source(load=_load, sizes=_sizes, longest=LENGTHS[1] - 1,
                world=lambda config: draw(config.data.planted.seed, config.data.planted['items'],
                                        config.data.planted.law_seed))
