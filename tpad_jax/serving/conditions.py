"""Lists under conditions: what a list may hold, and how its order changes [ours].

Python, `python -m tpad_jax.recommend` and the HTTP service read the same dict; see `Conditions`. A
list holds the best allowed items exactly: the search skips the others, it does not filter a list
afterwards. The compiled search is the same for all conditions, which are bits of a table's rows.
"""

import contextlib
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import NamedTuple

import msgspec
import numpy as np

from tpad_jax.data.untrusted import shown
from tpad_jax.errors import InputError, refuse_if
from tpad_jax.serving import topk
from tpad_jax.serving.rerank import FIRST, Context, Reranker, diverse

BOOSTS = 64, 1024  # boosted items of a compiled call; the smallest that is large enough
KEPT = 256  # masks that are kept for repeated conditions
BELOW = ' > '  # between the levels of a category
CAPS = {'most_per_brand': 'brand', 'most_per_category': 'category'}
LIMITS = {'categories': 'category', 'not_categories': 'category', 'brands': 'brand',
          'not_brands': 'brand', 'price': 'price'}
IDS = 'items', 'not_items', 'in_stock'


@dataclass(frozen=True)
class Conditions:
    """Conditions of a list; None, 0 or False where one is not set.

    Attributes:
      items: only these item ids.
      not_items: none of these item ids.
      in_stock: only these item ids; those that are not in the catalogue are ignored.
      categories: only items of these categories. 'a' includes 'a > b'.
      not_categories: no items of these categories.
      brands: only items of these brands.
      not_brands: no items of these brands.
      price: (lowest, highest), both included; an item without a price is not allowed.
      unseen: no item of the session.
      boost: (id, number) pairs; the number is added to the item's score.
      most_per_brand: items of a brand at most. Items without a brand are not limited.
      most_per_category: items of a category at most.
      diversity: 0 to 1; see `rerank.mmr`.
    """

    items: tuple[str, ...] | None = None
    not_items: tuple[str, ...] | None = None
    in_stock: tuple[str, ...] | None = None
    categories: tuple[str, ...] | None = None
    not_categories: tuple[str, ...] | None = None
    brands: tuple[str, ...] | None = None
    not_brands: tuple[str, ...] | None = None
    price: tuple[float, float] | None = None
    unseen: bool = False
    boost: tuple[tuple[str, float], ...] = ()
    most_per_brand: int = 0
    most_per_category: int = 0
    diversity: float = 0.0


def read(given) -> Conditions:
    """Read conditions of unknown origin.

    Args:
      given: a dict as of JSON: the attributes of `Conditions`, 'boost' being {id: number}, and null
        for an open end of a price. A value of None sets nothing.

    Raises:
      InputError: it is not such a dict.
    """
    known = [field.name for field in fields(Conditions)]
    if not isinstance(given, dict):  # the text of thousands of ids is not made for nothing
        raise InputError(f'conditions={given!r:.60}: not a dict. Expected some of '
                         f'{", ".join(known)}. Fix: correct it')
    out = {}
    for name, value in given.items():
        refuse_if(name not in known, f'conditions.{name!s:.60}: unknown. Expected some of '
                  f'{", ".join(known)}. Fix: correct the name')
        if value is None:
            continue
        if name == 'price':
            rule = '[lowest, highest], numbers from 0 on, null for an open end'
            right = isinstance(value, list | tuple) and len(value) == 2 and all(
                end is None or _number(end, 0) for end in value)
            ends = (0.0 if value[0] is None else value[0],
                    math.inf if value[1] is None else value[1]) if right else (1, 0)
            right, value = right and ends[0] <= ends[1], ends if right else value
        elif name == 'boost':
            rule = f'at most {BOOSTS[-1]} pairs of an item id and a number, {{id: number}}'
            right = isinstance(value, dict) and len(value) <= BOOSTS[-1] and all(
                isinstance(key, str) and _number(x, -1e6, 1e6) for key, x in value.items())
            value = tuple(sorted(value.items())) if right else value
        elif name == 'unseen':
            rule, right = 'true or false', isinstance(value, bool)
        elif name in CAPS:
            rule, right = 'a whole number from 1 on', isinstance(value, int) and _number(value, 1)
        elif name == 'diversity':
            rule, right = 'a number from 0 to 1', _number(value, 0, 1)
        else:
            rule, right = 'a list of texts', False
            with contextlib.suppress(msgspec.ValidationError):  # thousands of ids are common
                value, right = msgspec.convert(value, tuple[str, ...]), True
        if not right:
            raise InputError(f'conditions.{name}={given[name]!r:.60}: it cannot be used. Expected '
                             f'{rule}. Fix: correct it')
        out[name] = value
    return Conditions(**out)


class Wanted(NamedTuple):
    """The conditions of one session.

    Attributes:
      conditions: what its list may hold.
      hidden: int [n]. Rows that its list must not hold, items that were seen.
      rerank: changes the order of the first items, or None.
      bits: uint8 [R / 8] of what the conditions allow, see `topk.packed`; None: every item.
    """

    conditions: Conditions = Conditions()
    hidden: np.ndarray = np.zeros(0, np.int64)
    rerank: Reranker | None = None
    bits: np.ndarray | None = None


def wanted(shop, rows: np.ndarray, table, conditions: dict | None,
           seen: Sequence[Sequence[str]] | None = None, rerank: Reranker | None = None
           ) -> list[Wanted] | None:
    """Resolve the conditions of sessions; None where there are none.

    Args:
      shop: recommender.Recommender.
      rows: int32 [S, N]. Prefixes.
      table: the catalogue.
      conditions: as for `read`, or None.
      seen: S lists of item ids that a visitor has seen; unknown ids are ignored.
      rerank: changes the order of the first items of each list.

    Raises:
      InputError: an id, a name or a value is unusable, or the run does not store what a condition
        reads.
    """
    if not conditions and seen is None and rerank is None:
        return None
    asked = read(conditions or {})
    refuse_if(asked.diversity and rerank, f'conditions.diversity={asked.diversity}: there is a '
              'reranker, too. Expected one of them. Fix: leave one out')
    refuse_if(seen is not None and len(seen) != len(rows), f'seen has {len(seen or ())} lists for '
              f'{len(rows)} sessions. Expected a list for each. Fix: correct it')
    bits = _bits(shop, table, asked)
    _boosts(table, [Wanted(asked)])
    for field, column in CAPS.items():
        if getattr(asked, field):
            _column(table, column, field)
    order = diverse(asked.diversity) if asked.diversity else rerank
    out = []
    for row, names in zip(rows, seen or [()] * len(rows), strict=True):
        if not isinstance(names, list | tuple) or not all(isinstance(x, str) for x in names):
            raise InputError(f'seen={names!r:.60}: not a list of item ids (texts). Expected one '
                             'for each session. Fix: correct it')
        known = [n for name in names if (n := table.number.get(name, table.count)) < table.count]
        known += row[row > 0].tolist() * asked.unseen
        out.append(Wanted(asked, np.array(known, int), order, bits))
    return out


def allowed(conditions: Conditions, table) -> dict[str, np.ndarray]:
    """Compute which items each condition allows.

    Args:
      conditions: see `Conditions`.
      table: the catalogue.

    Returns:
      {field: bool [V + 1]}.

    Raises:
      InputError: as `wanted`.
    """
    out = {}
    for field in IDS:
        if (names := getattr(conditions, field)) is not None:
            mask = np.zeros(table.count, bool)
            mask[_rows(table, names, field)] = True
            out[field] = mask != field.startswith('not')
    for field, column in LIMITS.items():
        if (value := getattr(conditions, field)) is None:
            continue
        values = _column(table, column, field)
        if field == 'price':
            low, high = np.asarray(value, np.float32)  # as prices are stored
            right = values.is_between(low, high).fill_null(False).to_numpy()
        else:
            right = values.is_in(_chosen(values, value, field)).fill_null(False).to_numpy()
        out[field] = np.append(False, right != field.startswith('not'))
    return out


def begin(shop, rows: np.ndarray, k: int, table, asked: Sequence[Wanted]):
    """Dispatch the search of some sessions.

    Args:
      shop: recommender.Recommender.
      rows: int32 [s, N]. Prefixes of one call.
      k: length of a list.
      table: the catalogue.
      asked: s conditions.

    Returns:
      A function that waits and returns items int32 [s, k], 0 after the last item that the
      conditions allow, and scores float32 [s, k], NaN there and in rows of empty sessions.
    """
    every = _bits(shop, table, Conditions())
    bits = np.zeros((len(asked), len(every)), np.uint8)
    for row, x in zip(bits, asked, strict=True):
        own = every if x.bits is None else x.bits  # of a time with fewer items, perhaps
        row[:len(own)] = own
        topk.clear(row, x.hidden)
    boosts = _boosts(table, asked)
    depth = max([k, *(FIRST for x in asked if x.rerank)])
    answer = shop.search(rows, depth, table, bits, boosts)
    return partial(_finish, shop, rows, k, table, asked, bits, boosts, answer)


def _finish(shop, rows, k, table, asked, bits, boosts, answer):
    """Complete lists greedily. Where "at most n" runs out of items, the search continues.

    The next search skips all items that were read before, and those whose brand is full, so it
    begins exactly where the list before ended.
    """
    lists = np.zeros((len(rows), k), np.int32)
    values = np.full((len(rows), k), np.nan, np.float32)
    codes = {field: _codes(shop, table, field) for field in CAPS
             if any(getattr(x.conditions, field) for x in asked)}
    counts, lengths = [Counter() for _ in rows], np.zeros(len(rows), int)
    pending, first = np.arange(len(rows)), True
    while len(pending):
        scores, items = (np.array(x)[:len(pending)] for x in answer)
        broken = np.flatnonzero((np.isnan(scores) | (scores == np.inf)).any(axis=1))
        if len(broken):
            raise FloatingPointError(f'the scores of session {pending[broken[0]]} of this call are '
                                     'not finite')
        items[scores == topk.LOWEST] = 0
        if first:
            _reordered(shop, rows, items, scores, asked)
        again = []
        for n, row in enumerate(pending):
            best, own = items[n][items[n] > 0], scores[n]
            complete = len(best) < len(items[n])
            if rows[row, 0] == 0:  # no session to read: the items with most events
                order = shop.by_events(table)
                best, complete = order[topk.unpacked(bits[row])[order]], True
                own = np.full(len(best), np.nan)
            caps = {field: (code, getattr(asked[row].conditions, field))
                    for field, code in codes.items() if getattr(asked[row].conditions, field)}
            places = _greedy(best, caps, counts[row], k - lengths[row])
            end = lengths[row] + len(places)
            lists[row, lengths[row]:end], values[row, lengths[row]:end] = best[places], own[places]
            lengths[row] = end
            if end < k and not complete:
                topk.clear(bits[row], best)
                for field, (code, most) in caps.items():
                    full = [c for (of, c), n in counts[row].items() if of == field and n >= most]
                    topk.clear(bits[row], np.flatnonzero(np.isin(code, full)))
                again.append(row)
        pending, first = np.array(again, int), False
        if again:
            answer = shop.search(rows[pending], k, table, bits[pending],
                                 boosts and [x[pending] for x in boosts])
    return lists, values


def _greedy(items, caps, counts, room):
    """Return the places of the items that are taken, and count their brands and categories."""
    if not caps:
        return np.arange(min(room, len(items)))
    places = []
    for place, item in enumerate(items.tolist()):
        if len(places) == room:
            break
        groups = [(field, code[item]) for field, (code, _) in caps.items() if code[item]]
        if all(counts[group] < caps[group[0]][1] for group in groups):
            counts.update(groups)
            places.append(place)
    return np.array(places, int)


def _reordered(shop, rows, items, scores, asked):
    """Order the first items by the new scores of their rerankers, in place."""
    for rerank in {x.rerank: None for x in asked if x.rerank}:
        chosen = np.array([n for n, x in enumerate(asked) if x.rerank is rerank])
        context = Context(rows[chosen, :shop.max_length], shop.vectors, shop.titles)
        first = items[chosen, :FIRST]
        new = np.where(first > 0, rerank(first, scores[chosen, :FIRST], context), -np.inf)
        if new.shape != first.shape or np.isnan(new).any():
            raise FloatingPointError('a reranker returned scores that are not finite')
        order = np.argsort(-new, axis=1, kind='stable')
        for array in (items, scores):
            array[chosen, :FIRST] = np.take_along_axis(array[chosen, :FIRST], order, axis=1)


def _bits(shop, table, conditions):
    """Return the bits uint8 of what conditions allow; those of repeated ones are kept."""
    limits = replace(conditions, unseen=False, boost=(), most_per_brand=0, most_per_category=0,
                     diversity=0.0)

    def make():
        mask = np.zeros(topk.rounded(table.count, topk.STEP), bool)
        mask[1:table.count] = True
        for part in allowed(limits, table).values():
            mask[:table.count] &= part
        return topk.packed(mask)

    return _kept(shop, (limits, table.count), make)


def _codes(shop, table, field):
    """Number the brands or categories: int [V + 1], 0 where an item has none."""
    def make():
        codes = _column(table, CAPS[field], field).replace('', None).rank('dense').fill_null(0)
        return np.append(0, codes.to_numpy()).astype(np.int64)

    return _kept(shop, (field, table.count), make)


def _kept(shop, key, make):
    kept = shop.kept_masks
    if (value := kept.get(key)) is None:
        while len(kept) >= KEPT:
            kept.pop(next(iter(kept)), None)
        value = kept[key] = make()
    return value


def _boosts(table, asked):
    """Return items int32 [s, M] and the numbers float32 [s, M] added to their scores, or None."""
    most = max(len(x.conditions.boost) for x in asked)
    if not most:
        return None
    room = next(n for n in BOOSTS if n >= most)
    items, shifts = np.zeros((len(asked), room), np.int32), np.zeros((len(asked), room), np.float32)
    for row, x in enumerate(asked):
        ids, numbers = zip(*x.conditions.boost, strict=True) if x.conditions.boost else ((), ())
        items[row, :len(ids)], shifts[row, :len(ids)] = _rows(table, ids, 'boost'), numbers
    return [items, shifts]


def _rows(table, names: Iterable[str], field: str) -> list[int]:
    """Return the rows of item ids; of a list of stock those of the known ones."""
    numbers = {name: table.number.get(name, table.count) for name in names}
    unknown = [name for name, number in numbers.items() if number >= table.count]
    refuse_if(unknown and (field != 'in_stock' or len(unknown) == len(numbers)),
              f'conditions.{field}: {len(unknown)} of {len(numbers)} ids are not in the catalogue '
              f'({shown(map(repr, unknown), 3):.200}). Expected item ids of the run. Fix: correct '
              'or remove them')
    return [number for number in numbers.values() if number < table.count]


def _column(table, column: str, field: str):
    if column not in table.attributes.columns:
        raise InputError(f'conditions.{field}: the served run stores no {column} of its items. '
                         f'Expected data with a {column}, and a run of this version. Fix: leave '
                         'the condition out, or repeat the run')
    return table.attributes[column]


def _chosen(values, names, field: str) -> list[str]:
    """Return the values that names name, themselves or a level above them."""
    levels = {value: {BELOW.join(value.split(BELOW)[:n]) for n in range(1, 1 + len(
        value.split(BELOW)))} for value in values.unique() if value}
    unknown = set(names).difference(*levels.values())
    refuse_if(unknown, f'conditions.{field}: no item has '
              f'{shown(map(repr, sorted(unknown)), 3):.200}. Expected names of the catalogue. '
              'Fix: correct or remove them')
    return [value for value, above in levels.items() if not above.isdisjoint(names)]


def _number(x, low, high=1e12) -> bool:
    return isinstance(x, int | float) and not isinstance(x, bool) and low <= x <= high
