"""The reasons for a list: the session's nearest items, the expert that decided, the conditions."""

from collections.abc import Sequence

import numpy as np

from tpad_jax.evaluation import experts, metrics, scorers
from tpad_jax.serving.conditions import CAPS, Wanted, allowed

NEAREST = 3  # items of the session that are named


def explain(shop, rows: np.ndarray, lists: np.ndarray, table,
            asked: Sequence[Wanted] | None = None) -> list[dict]:
    """Explain lists.

    Args:
      shop: recommender.Recommender.
      rows: int32 [S, N + C]. Prefixes, and what `calls.with_events` adds.
      lists: int32 [S, k]. Their lists, 0 after the last item.
      table: the catalogue.
      asked: S conditions, or None.

    Returns:
      S dicts:
        items: per item of the list {'near': [[id, cosine], ...], the session's nearest items by z,
          'expert': the expert that adds most to its score, 'model' without experts}
        removed: {condition: number of items of the catalogue that it does not allow}
        missing: [{'item': id, 'by': [condition, ...]}], the items of the list without conditions
          that are not in this one
    """
    names, out = shop.ids, []
    plain = shop.first(rows, lists.shape[1], table)[0] if asked else lists
    prefixes = rows[:, :shop.max_length]
    near = metrics.unit(shop.vectors(prefixes))  # [S, N, D]
    decided = _decided(shop, rows, lists, table)
    for n, row in enumerate(prefixes):
        best, prefix = lists[n][lists[n] > 0], row[row > 0]
        cosines = metrics.unit(shop.vectors(best)) @ near[n, :len(prefix)].T
        order = np.argsort(-cosines, axis=1, kind='stable')[:, :NEAREST]
        items = [{'near': [[names[prefix[p]], round(float(line[p]), 4)] for p in nearest],
                  'expert': expert}
                 for line, nearest, expert in zip(cosines, order, decided[n], strict=False)]
        x = asked[n] if asked else Wanted()
        parts = allowed(x.conditions, table)
        if len(x.hidden):
            parts['seen'] = ~np.isin(np.arange(table.count), x.hidden)
        out.append({'items': items,
                    'removed': {name: int((~part[1:]).sum()) for name, part in parts.items()},
                    'missing': [{'item': names[item], 'by': _by(item, parts, x)}
                                for item in plain[n] if item not in best]})
    return out


def _by(item, parts, asked):
    """Name the conditions that keep an item out of a list, else those that changed its order."""
    conditions = asked.conditions
    order = {'boost': conditions.boost, 'rerank': asked.rerank and not conditions.diversity,
             **{name: getattr(conditions, name) for name in ('diversity', *CAPS)}}
    return [name for name, part in parts.items() if not part[item]] or [
        name for name, value in order.items() if value]


def _decided(shop, rows, lists, table):
    if shop.served.experts is None:
        return [['model'] * lists.shape[1]] * len(rows)
    z, out = np.pad(shop.embed_items(), ((1, 0), (0, 0)))[:table.count], []
    bound = scorers.Bound((), (), (), z, shop.served.experts)
    for begin in range(0, len(rows), experts.ROWS):
        part = slice(begin, begin + experts.ROWS)
        terms = experts.terms(bound, rows[part, :shop.max_length], lists[part],
                              shop.encode(rows[part]))
        out += np.array(list(terms))[np.argmax(list(terms.values()), axis=0)].tolist()
    return out
