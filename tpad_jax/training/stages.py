"""The table of stages: a stage is its options in the config and one entry here.

config.STAGES gives the order of the stages, and config.MAKES the rows that each of them makes.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from tpad_jax.evaluation.scorers import scorer, transfer_scorer


@dataclass(frozen=True)
class Entry:
    """One stage.

    Attributes:
      reads: rows of the catalogue that it reads, other than those of config.model.recommend.
      recommends: whether it reads the rows of config.model.recommend.
      batches: 'items', one item per row, or 'sessions', one prefix per row.
      content: whether its steps may read images and texts.
      scorer: (model, devices) -> (params, catalogue) -> scores, by which it is validated.
      validates_rows: whether validation needs rows that the stage itself makes.
    """

    reads: tuple[str, ...] = ()
    recommends: bool = False
    batches: str = 'sessions'
    content: bool = True
    scorer: Callable = scorer
    validates_rows: bool = False


ENTRIES = {
    'knowledge': Entry(batches='items'),
    'teach': Entry(reads=('k',), content=False,
                   scorer=partial(transfer_scorer, fresh=frozenset({'r'}))),
    'transfer': Entry(reads=('k',), scorer=transfer_scorer, validates_rows=True),
    'recommend': Entry(recommends=True, content=False),
    'joint': Entry(reads=('k', 'r'))}
