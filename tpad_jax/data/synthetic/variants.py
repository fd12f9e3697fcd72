"""Variants of the planted catalogue in which time, kind or history of the events matter [ours].

Each changes the law of `planted.probabilities` and is off at 0 (`config.data.planted`):

    drift     each material comes into fashion and goes out again, once in CYCLE seconds: an item's
              popularity is multiplied by exp(drift cos(2 pi (t / CYCLE - material / 5)))
    kinds     so many of KINDS, drawn evenly for every event. The kind of the last event decides
              which category weights hold for the next one
    visitors  so many visitors come in turn, each with one favourite material for all sessions,
              whose items are TASTE times as popular

The oracle of `follow` is exact: it knows the law and all that was seen before the target (items,
kinds, times and the visitor's earlier sessions), but not the visitor's favourite. It weighs the
five by their posterior given those events (Bayes).
"""

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from tpad_jax.data.synthetic import planted as planted_lib, wording

KINDS = 'view', 'cart', 'buy'
CYCLE, TASTE = 90 * 86_400, 10.0
NAMES = 'drift', 'kinds', 'visitors'
LONGEST = planted_lib.LENGTHS[1]
_MATERIALS = wording.SIZES[-1]
_LAWS, _TASTES, _EVENTS = 8, 9, 10  # random streams; of events one for each split


class Varied(NamedTuple):
    """A world of V items and all of its S sessions, in the order of time.

    Attributes:
      planted: planted.Planted.
      categories: float64 [K, 12, 12]. Category weights by the kind of the last event.
      drift: strength of the fashions.
      favourite: int32 [S]. The material that the visitor likes; -1: visitors do not return.
      sessions: int32 [S, 8]. Planted ids, left aligned, 0 pads.
      kind: int32 [S, 8].
      cut: int [S]. Whether the law is that of training sessions, without cold items.
    """

    planted: planted_lib.Planted
    categories: np.ndarray
    drift: float
    favourite: np.ndarray
    sessions: np.ndarray
    kind: np.ndarray
    cut: np.ndarray


def draw(options: dict) -> Varied:
    """Draw a world and its sessions.

    Args:
      options: of config.data.planted.
    """
    seed, law_seed = options['seed'], options.get('law_seed')
    law_seed = seed if law_seed is None else law_seed
    drift, kinds, visitors = (options.get(name, 0) for name in NAMES)
    planted = planted_lib.draw(seed, options['items'], law_seed)
    # one law more for every kind but the first, each that of another planted catalogue
    seeds = np.random.default_rng([law_seed, _LAWS]).integers(0, 2**31, max(kinds, 1) - 1)
    laws = [planted, *(planted_lib.draw(0, 2, int(other)) for other in seeds)]
    sizes = [options[name] for name in ('train', 'valid', 'test')]
    total = sum(sizes)
    tastes = np.random.default_rng([seed, _TASTES]).integers(0, _MATERIALS, max(visitors, 1))
    favourite = tastes[np.arange(total) % visitors] if visitors else np.full(total, -1)
    drawn = [np.random.default_rng([seed, _EVENTS + i]).random((size, 1 + 2 * LONGEST))
             for i, size in enumerate(sizes)]
    uniforms = np.concatenate(drawn)
    kind = (uniforms[:, 1 + LONGEST:] * max(kinds, 1)).astype(np.int32)
    world = Varied(planted, np.stack([law.category_weights for law in laws]), drift,
                   favourite.astype(np.int32), np.zeros((total, LONGEST), np.int32), kind,
                   np.arange(total) < sizes[0])
    shortest = planted_lib.LENGTHS[0]
    lengths = shortest + (uniforms[:, 0] * (LONGEST - shortest + 1)).astype(np.int32)
    for place in range(LONGEST):
        for rows in _parts(np.flatnonzero(lengths > place)):
            world.sessions[rows, place] = planted_lib.sample(
                law(world, rows, place, favourite[rows]), uniforms[rows, 1 + place])
    return world


def law(world: Varied, number: np.ndarray, place: int, favourite: np.ndarray) -> np.ndarray:
    """Compute the distribution of the item at a place of sessions, if the favourite were known.

    Args:
      world: with the items before that place.
      number: int [R]. Numbers of the sessions.
      place: 0..7.
      favourite: int [R]. As in `Varied`.

    Returns:
      float64 [R, V], column k for planted id k + 1.
    """
    seconds = number * planted_lib.SESSION_SECONDS + place * planted_lib.EVENT_SECONDS
    material = np.arange(_MATERIALS)
    weight = np.exp(world.drift * np.cos(
        2 * np.pi * (seconds[:, None] / CYCLE - material / _MATERIALS)))
    weight = np.where(favourite[:, None] == material, TASTE * weight, weight)
    popularity = world.planted.popularity * weight[:, world.planted.attributes[:, -1]]
    popularity /= popularity.sum(axis=1, keepdims=True)
    out = np.empty_like(popularity)
    cut = world.cut[number]
    if not place:
        out[:] = np.where(cut[:, None] & world.planted.cold, 0, popularity)
        return out / out.sum(axis=1, keepdims=True)
    kind = world.kind[number, place - 1]
    for warm_only in np.unique(cut):
        for value in np.unique(kind):
            rows = (cut == warm_only) & (kind == value)
            if rows.any():
                changed = world.planted._replace(popularity=popularity[rows],
                                                 category_weights=world.categories[value])
                out[rows] = planted_lib.probabilities(
                    changed, world.sessions[number[rows], :place], bool(warm_only))
    return out


def beliefs(world: Varied, visitors: int) -> np.ndarray:
    """Compute the posterior of each session's favourite before each of its events.

    Args:
      world: with its sessions.
      visitors: how many come in turn.

    Returns:
      float64 [S, 9, 5]: given all earlier sessions of the visitor and so many events of this one.
    """
    total = len(world.sessions)
    gain = np.zeros((total, LONGEST, _MATERIALS))
    for place in range(LONGEST):
        for rows in _parts(np.flatnonzero(world.sessions[:, place])):
            chosen = world.sessions[rows, place, None] - 1
            for taste in range(_MATERIALS):
                follow = law(world, rows, place, np.full(len(rows), taste))
                gain[rows, place, taste] = np.log(np.take_along_axis(follow, chosen, 1)[:, 0])
    inside = np.cumsum(np.pad(gain, ((0, 0), (1, 0), (0, 0))), axis=1)
    rounds = -(-total // visitors)
    whole = np.pad(inside[:, -1], ((0, rounds * visitors - total), (0, 0)))
    whole = whole.reshape(rounds, visitors, _MATERIALS)
    before = (np.cumsum(whole, axis=0) - whole).reshape(-1, _MATERIALS)[:total]
    inside += before[:, None]
    share = np.exp(inside - inside.max(axis=-1, keepdims=True))
    return share / share.sum(axis=-1, keepdims=True)


def follow(options: dict, asins: list[str], tested: np.ndarray) -> Callable:
    """Make the oracle of the test rows in the ids of a catalogue.

    Args:
      options: of config.data.planted.
      asins: list of V + 1 str, the catalogue's, [0] being padding.
      tested: int [T]. Numbers of the test sessions, of all.

    Returns:
      Function of int32 [R, 8]: a prefix of 7 ids and the number of its test session (its attribute
      `reads` asks for that) -> float64 [R, V + 1], whose column 0 is 0. Prefixes alone have the law
      of the catalogue without variants.

    Raises:
      InputError: as `planted.planted_ids`.
    """
    world = draw(options)
    ids = planted_lib.planted_ids(world.planted, asins)
    belief = beliefs(world, options['visitors']) if options.get('visitors') else None

    def probabilities(inputs):
        if inputs.shape[1] < LONGEST:
            return planted_lib.catalogue_probabilities(world.planted, asins)(inputs)
        number, length = tested[inputs[:, -1]], (inputs[:, :-1] > 0).sum(axis=1)
        out = np.zeros((len(inputs), len(ids)))
        for place in np.unique(length):
            rows = np.flatnonzero(length == place)
            share = [(-1, 1.0)] if belief is None else enumerate(belief[number[rows], place].T)
            for taste, weight in share:
                part = law(world, number[rows], place, np.full(len(rows), taste))
                out[rows, 1:] += (np.reshape(weight, (-1, 1)) * part)[:, ids[1:] - 1]
        return out

    probabilities.reads = 'session'
    return probabilities


def truth(options, planted, data) -> Callable:
    """Make the oracle of a planted catalogue, whether it is a variant or not.

    Args:
      options: config.data.
      planted: planted.Planted.
      data: catalogue.Data of the run.
    """
    tested, length = _numbers(data.test), min(options.max_length, LONGEST - 1)
    options = options.planted
    if any(options[name] for name in NAMES):
        return follow(options, data.asins, tested)
    plain = planted_lib.catalogue_probabilities(planted, data.asins)
    if tested.min() >= options['train']:
        return plain
    # a window of earlier days, in which cold items do not occur
    warm = np.append(False, ~planted.cold[planted_lib.planted_ids(planted, data.asins)[1:] - 1])

    def probabilities(inputs):
        out = plain(inputs[:, :length])
        if inputs.shape[1] > length:
            out[tested[inputs[:, -1]] < options['train']] *= warm
        return out / out.sum(axis=1, keepdims=True)

    probabilities.reads = 'session'
    return probabilities


def with_kinds(data, options: dict):
    """Add the kinds of the events to the sessions of a variant.

    Args:
      data: catalogue.Data.
      options: of config.data.planted.
    """
    world, parts = draw(options), {}
    for name in 'train', 'valid', 'test':
        part = getattr(data, name)
        number = _numbers(part)
        parts[name] = part._replace(kind=world.kind[number][world.sessions[number] > 0])
    return replace(data, kinds=KINDS[:options['kinds']], **parts)


def _numbers(sessions):
    """The number of each session among all that were drawn; of short ones some may be left out."""
    return (sessions.start - planted_lib.START) // planted_lib.SESSION_SECONDS


def _parts(rows, most=2048):
    """Split row numbers into parts whose tables fit into little memory."""
    return np.split(rows, range(most, len(rows), most)) if len(rows) else []
