"""The values that each option may take, declared once and checked before anything is computed."""

import difflib
import fnmatch
import functools
import math
import numbers
import re
from collections.abc import Collection
from typing import NamedTuple

from tpad_jax.baselines import rules
from tpad_jax.config import STAGES, flat, names
from tpad_jax.errors import InputError
from tpad_jax.losses import distillation
from tpad_jax.models.hf import layers
from tpad_jax.models.knowledge import POOLING
from tpad_jax.models.sessions import ENCODERS
from tpad_jax.mutual_information import critics
from tpad_jax.training import merge_adapters

LARGE = 1e9  # a larger number is a typing error
INT32 = 2**31 - 1  # counts are int32 on devices
ROWS = ('k', 'r', 'given', 'true')  # of the catalogue, which a recommender reads


class Range(NamedTuple):
    """Finite numbers from `low` to `high`; `above` and `below` exclude an end."""

    low: float
    high: float = LARGE
    whole: bool = False
    above: bool = False
    below: bool = False
    optional: bool = False  # None: the option is not set

    def holds(self, value) -> bool:
        """Return whether the range has the value; nan, text and booleans are in none."""
        if value is None:
            return self.optional
        kind = numbers.Integral if self.whole else numbers.Real
        if not isinstance(value, kind) or isinstance(value, bool):
            return False
        return (self.low < value if self.above else self.low <= value) and (
            value < self.high if self.below else value <= self.high)

    def __str__(self):
        return (f'a {"whole " * self.whole}number {"above" if self.above else "from"} '
                f'{self.low:.10g} {"and below" if self.below else "to"} {self.high:.10g}')


class ShareOrCount(NamedTuple):
    """A share of the sessions between 0 and 1, or from 1 on a number of sessions."""

    def holds(self, value) -> bool:
        """Return whether the value is a share or a count."""
        return (Range(0, 1, above=True, below=True).holds(value)
                or (Range(1, INT32).holds(value) and value == int(value)))

    def __str__(self):
        return 'a share of the sessions above 0 and below 1, or a whole number of sessions'


class Choice(NamedTuple):
    """One of some texts, or with `several` any of them separated by commas."""

    choices: Collection[str]
    several: bool = False

    def holds(self, value) -> bool:
        """Return whether the value names choices only."""
        return isinstance(value, str) and (
            set(names(value)) <= set(self.choices) if self.several else value in self.choices)

    def __str__(self):
        texts = ', '.join(text or "''" for text in self.choices)
        return f'some of {texts}, separated by commas' if self.several else f'one of {texts}'


class Pattern(NamedTuple):
    """A regular expression."""

    def holds(self, value) -> bool:
        """Return whether the value compiles."""
        try:
            return bool(re.compile(value))
        except (re.error, TypeError):
            return False

    def __str__(self):
        return 'a valid regular expression'


class Pairs(NamedTuple):
    """Any number of pairs, each element with its rule."""

    first: Range | Pattern
    second: Range

    def holds(self, value) -> bool:
        """Return whether the value is a tuple or list of such pairs."""
        return isinstance(value, tuple | list) and all(
            isinstance(pair, tuple | list) and len(pair) == 2 and self.first.holds(pair[0])
            and self.second.holds(pair[1]) for pair in value)

    def __str__(self):
        return f'pairs ({self.first}, {self.second})'


COUNT, COUNT_OR_NONE = Range(1, INT32, whole=True), Range(0, INT32, whole=True)
FLOAT_TYPES = Choice(('float32', 'bfloat16'))
# {key: rule}; a star matches any name
RULES = {key: rule for rule, keys in (
    # one seed more would repeat the stream of seed 0: keys of jax are made from 32 bits
    (Range(0, 2**32 - 1, whole=True), 'seed data.seed data.planted.seed'),
    (COUNT, 'save_every log_every model_shards search.trials data.core data.min_length '
     'data.max_length mllm.text_length mllm.encode_rows mllm.encode_part model.features '
     'model.lora_rank model.width model.gnn_steps model.heads model.near model.near_window '
     'stage.*.batch_size stage.*.accumulate losses.*.samples losses.*.widths'),
    (COUNT_OR_NONE, 'devices diagnostics skip_not_finite mllm.image_size mllm.chunk model.layers '
     'model.clusters model.feature_hidden model.together model.blend.rank stage.*.steps '
     'stage.*.eval_every stage.*.patience stage.*.refresh_every losses.*.chunk'),
    (Range(2, INT32, whole=True), 'data.planted.items'),
    (Range(-1, 1024, whole=True), 'workers'),
    (COUNT_OR_NONE, 'data.planted.train data.planted.valid data.planted.test'),
    (Range(0, 1), 'data.bad_share data.planted.noise stage.*.warmup'),
    (Range(0, 1, above=True), 'model.blend.keep model.together_decay'),
    # a share of 1 would leave nothing to learn from
    (Range(0, 1, below=True), 'model.withhold model.word_dropout model.id_dropout '
     'model.feature_dropout model.dropout model.item_dropout losses.*.smoothing losses.*.skew '
     'losses.*.decay'),
    (Range(0), 'model.together_strength stage.*.learning_rate stage.*.weight_decay losses.*.weight '
     'losses.*.power losses.*.sharpness losses.*.uniform'),
    (Range(0, optional=True), 'stage.*.weights.*'),
    (Range(0, above=True), 'data.gap_hours model.lora_alpha model.temperature stage.*.clip '
     'losses.*.temperature losses.*.clip'),
    (ShareOrCount(), 'data.valid data.test'),
    (Choice(STAGES, several=True), 'stages losses.*.stages'),
    (Choice(ROWS, several=True), 'model.recommend'),
    (Choice(ROWS, several=True), 'rivals.*.recommend'),
    (Choice(('k', 'r'), several=True), 'stage.*.fresh'),
    (Choice(tuple(rules.BASELINES), several=True), 'baselines'),
    (Choice(ENCODERS), 'model.encoder'),
    (Choice(('compressed', 'full')), 'model.form'),
    (Choice(critics.KINDS), 'model.critics.*'),
    (Choice(('', *merge_adapters.KINDS)), 'model.blend.kind'),
    (Choice(('ours', 'published')), 'data.protocol'),
    (Choice(('', 'own')), 'mllm.tokenizer'),
    (Choice(layers.ATTENTION), 'mllm.attention'),
    (Choice(layers.REMAT), 'mllm.remat'),
    (Choice(POOLING), 'mllm.pooling'),
    (FLOAT_TYPES, 'mllm.param_dtype mllm.dtype mllm.teacher_dtype losses.*.dtype'),
    (Choice(distillation.KINDS), 'losses.*.kind'),
    (Choice(('adamw', 'adam', 'sgd')), 'stage.*.optimiser'),
    (Choice(('cosine', 'constant')), 'stage.*.schedule'),
    (Pattern(), 'model.lora_targets stage.*.train'),
    # regular expressions over parameter paths, and factors of the learning rate
    (Pairs(Pattern(), Range(0, above=True)), 'stage.*.rates'),
    # steps, and factors of the weight
    (Pairs(COUNT_OR_NONE, Range(0)), 'losses.*.schedule'),
) for key in keys.split()}
# keys of a loss that mean the same for every loss
COMMON = ('weight', 'stages', 'dtype', 'chunk', 'schedule')


def check(config) -> None:
    """Refuse every option whose value is not in its declared range.

    A number without a rule is a keyword of a user's loss; it must be finite.

    Args:
      config: of a run.

    Raises:
      InputError: naming the option, its value and what it may be.
    """
    for key, value in flat(config):
        rule = rule_of(key, config)
        if rule is None and isinstance(value, float) and not math.isfinite(value):
            rule = Range(-LARGE)
        if rule is not None and not rule.holds(value):
            near = difflib.get_close_matches(str(value), getattr(rule, 'choices', ()), 1)
            raise InputError(f'config.{key}={value!r} is not usable. Expected {rule}'
                             + ''.join(f'. Did you mean {name!r}?' for name in near))


def rule_of(key: str, config):
    """Return the rule of an option, or None.

    Args:
      key: such as 'stage.transfer.warmup'.
      config: of a run. The keywords of a loss that is not built in have no rules.
    """
    if key.startswith('losses.'):
        _, loss, name = key.split('.', 2)
        if ':' in config.losses[loss].get('fn', '') and name not in COMMON:
            return None
    return _matching(key)


@functools.cache
def _matching(key):
    matches = (rule for pattern, rule in RULES.items() if fnmatch.fnmatchcase(key, pattern))
    return next(matches, None)
