"""The values that each option may take, declared once and checked before anything is computed."""

import difflib
import fnmatch
import functools
import math
import numbers
import re
from collections.abc import Callable, Collection
from typing import Any, NamedTuple

from tpad_jax.baselines import rules
from tpad_jax.config import STAGES, flat, names
from tpad_jax.core.precision import PRECISIONS
from tpad_jax.data import catalogue, missing
from tpad_jax.errors import InputError
from tpad_jax.evaluation import experts
from tpad_jax.losses import tokens
from tpad_jax.models.hf import layers
from tpad_jax.models.mllms import POOLING
from tpad_jax.models.sessions import ENCODERS
from tpad_jax.mutual_information import critics
from tpad_jax.training import federated, merge_adapters

LARGE = 1e9  # a larger number is a typing error
LONG, DEEP = 2**20, 1000  # most numbers of a row, and most layers: beyond, a run would not begin
INT32 = 2**31 - 1  # counts are int32 on devices
ROWS = ('k', 'r', 'given', 'true', 'codes')  # of the catalogue, which a recommender reads


class Rule(NamedTuple):
    """The values that an option may take.

    Attributes:
      text: what is expected, for messages.
      holds: value -> whether the rule has it.
      choices: texts of which a near one is suggested.
    """

    text: str
    holds: Callable[[Any], bool]
    choices: Collection[str] = ()


def number(low: float, high: float = LARGE, *, whole: bool = False, above: bool = False,
           below: bool = False, optional: bool = False) -> Rule:
    """Make the rule of finite numbers, which has neither nan nor text nor booleans.

    Args:
      low: the smallest number.
      high: the largest number.
      whole: whether a fraction is refused.
      above: whether `low` itself is refused.
      below: whether `high` itself is refused.
      optional: whether None is accepted: the option is not set.
    """
    kind = numbers.Integral if whole else numbers.Real

    def holds(value):
        if not isinstance(value, kind) or isinstance(value, bool):
            return optional and value is None
        return (low < value if above else low <= value) and (
            value < high if below else value <= high)

    return Rule(f'a {"whole " * whole}number {"above" if above else "from"} {low:.10g} '
                f'{"and below" if below else "to"} {high:.10g}', holds)


def choice(choices: Collection[str]) -> Rule:
    """Make the rule of one of some texts."""
    return Rule('one of ' + ', '.join(text or "''" for text in choices),
                lambda value: isinstance(value, str) and value in choices, choices)


def choices_of(choices: Collection[str], hint: str = '') -> Rule:
    """Make the rule of any number of texts, separated by commas."""
    text = f'some of {", ".join(choices)}, separated by commas{hint}'
    return Rule(text, lambda value: isinstance(value, str) and set(names(value)) <= set(choices),
                choices)


def pairs(first: Rule, second: Rule) -> Rule:
    """Make the rule of any number of pairs, each element with its rule."""
    return Rule(f'pairs ({first.text}, {second.text})', lambda value: isinstance(
        value, tuple | list) and all(
            isinstance(pair, tuple | list) and len(pair) == 2 and first.holds(pair[0])
            and second.holds(pair[1]) for pair in value))


def _compiles(value):
    try:
        return bool(re.compile(value))
    except (re.error, TypeError):
        return False


def _is_share_or_count(value):
    return number(0, 1, above=True, below=True).holds(value) or (
        number(1, INT32).holds(value) and value == int(value))


def _are_codes(value):
    return isinstance(value, tuple | list) and (not value or (
        len(value) == 2 and number(1, DEEP, whole=True).holds(value[0])
        and number(2, LONG, whole=True).holds(value[1])))


ENCODER = Rule(f'one of {", ".join(ENCODERS)}, or package.module:function', lambda value: (
    isinstance(value, str) and (value in ENCODERS or ':' in value)), ENCODERS)
PATTERN = Rule('a valid regular expression', _compiles)
COUNT, COUNT_OR_NONE = number(1, INT32, whole=True), number(0, INT32, whole=True)
# {key: rule}; a star matches any name
RULES = {key: rule for rule, keys in (
    # one seed more would repeat the stream of seed 0: keys of jax are made from 32 bits
    (number(0, 2**32 - 1, whole=True), 'seed data.seed data.planted.seed'),
    (number(0, 2**32 - 1, whole=True, optional=True), 'data.planted.law_seed'),
    (COUNT, 'federated.local save_every log_every model_shards search.trials data.core '
     'data.min_length data.window_days mllm.own.steps mllm.encode_rows mllm.encode_part '
     'stage.*.batch_size '
     'stage.*.accumulate losses.*.samples losses.*.widths data.planted.train '
     'data.planted.valid data.planted.test'),
    (number(1, LONG, whole=True), 'data.max_length mllm.text_length mllm.own.text_length '
     'model.features model.lora_rank model.width model.heads model.near model.near_window'),
    (number(0, LONG, whole=True), 'mllm.image_size model.feature_hidden model.together '
     'model.memory'),
    (number(0, DEEP, whole=True), 'model.layers model.session_layers'),
    (number(1, DEEP, whole=True), 'model.block model.gnn_steps'),
    (number(0, 3, whole=True), 'data.planted.kinds'), (number(0, 5), 'data.planted.drift'),
    (COUNT_OR_NONE, 'data.planted.visitors data.window '
     'devices diagnostics skip_not_finite mllm.chunk model.clusters '
     'model.blend.rank stage.*.steps stage.*.eval_every stage.*.patience stage.*.refresh_every '
     'losses.*.chunk losses.*.nearest'),
    (number(2, INT32, whole=True), 'data.planted.items federated.clients'),
    (number(-1, 1024, whole=True), 'workers'),
    (number(0, 1), 'data.missing.image data.missing.text data.bad_share data.planted.noise '
     'stage.*.warmup'),
    (number(0, 1, above=True), 'federated.server_rate model.blend.keep model.together_decay'),
    # a share of 1 would leave nothing to learn from
    (number(0, 1, below=True), 'federated.momentum model.withhold model.word_dropout '
     'model.modality_dropout model.id_dropout model.feature_dropout model.dropout '
     'model.item_dropout model.session_dropout losses.*.smoothing losses.*.skew losses.*.decay'),
    (number(0), 'federated.proximal model.together_strength mllm.own.learning_rate '
     'stage.*.learning_rate stage.*.weight_decay stage.*.epochs losses.*.weight '
     'losses.*.power losses.*.sharpness losses.*.uniform losses.*.limit'),
    (number(0, optional=True), 'stage.*.weights.*'),
    (number(0, above=True), 'federated.concentration data.gap_hours model.lora_alpha '
     'model.temperature stage.*.clip losses.*.temperature losses.*.clip'),
    (Rule('a whole number, 0 or from 100 on', lambda x: x == 0 or number(
        100, INT32, whole=True).holds(x)), 'model.lessons'),
    (Rule('() or (levels, size), whole numbers from 1 and from 2', _are_codes), 'model.codes'),
    (Rule('a share of the sessions above 0 and below 1, or a whole number of sessions',
          _is_share_or_count), 'data.valid data.test'),
    (choices_of(STAGES, '; another stage is registered first (docs/add_a_stage.md)'),
     'stages federated.stages losses.*.stages'),
    (choice(federated.RULES), 'federated.rule'),
    (choices_of(ROWS), 'model.recommend'),
    (choices_of((*ROWS, 'lexical')), 'rivals.*.recommend'),
    (choices_of(('k', 'r')), 'stage.*.fresh'),
    (choices_of(tuple(rules.BASELINES)), 'baselines'), (choices_of(experts.NAMES), 'experts'),
    (choice(('auto', 'jit', 'pmap', 'shard_map')), 'parallel'),
    (choice(PRECISIONS), 'precision'),
    (ENCODER, 'model.encoder'),
    (choice(('item', 'compressed', 'recurrent', 'full')), 'model.form'),
    (choice(('k', 'z')), 'model.clusters_of'),
    (choice(critics.KINDS), 'model.critics.*'),
    (number(1), 'mllm.encode_lease'),
    (number(0, 0.8), 'mllm.prune'), (choice(('tamp', 'wanda', 'magnitude')), 'mllm.prune_by'),
    (choice(('', *merge_adapters.KINDS)), 'model.blend.kind'),
    (choice(('ours', 'published')), 'data.protocol'),
    (choice(catalogue.CATALOGUES), 'data.catalogue'), (choice(missing.PARTS), 'data.missing.of'),
    (choice(('utf-8', 'latin-1', 'cp1252')), 'data.encoding'),
    (choice(('auto', '', 'own')), 'mllm.tokenizer'),
    (number(300, INT32, whole=True), 'mllm.own.vocab'),
    (choice(layers.ATTENTION), 'mllm.attention'),
    (choice(layers.REMAT), 'mllm.remat'),
    (choice(POOLING), 'mllm.pooling'),
    (choice(('float32', 'bfloat16')),
     'mllm.param_dtype mllm.dtype mllm.teacher_dtype losses.*.dtype'),
    (choice(tokens.KINDS), 'losses.*.kind'),
    (choice(('adamw', 'adam', 'sgd')), 'stage.*.optimiser'),
    (choice(('cosine', 'constant')), 'stage.*.schedule'),
    (PATTERN, 'model.lora_targets stage.*.train'),
    # regular expressions over parameter paths, and factors of the learning rate
    (pairs(PATTERN, number(0, above=True)), 'stage.*.rates'),
    (pairs(PATTERN, number(0, 1)), 'stage.*.later'),
    # steps, and factors of the weight
    (pairs(COUNT_OR_NONE, number(0)), 'losses.*.schedule'),
) for key in keys.split()}
# keys of a loss that mean the same for every loss
COMMON = ('weight', 'stages', 'dtype', 'chunk', 'schedule')


def check(config) -> None:
    """Refuse every option whose value is not in its declared range.

    The keywords of a loss that is not built in have no rules, but a number must be finite.

    Args:
      config: of a run.

    Raises:
      InputError: naming the option, its value and what it may be.
    """
    for key, value in flat(config):
        group, loss, name = (*key.split('.', 2), '', '')[:3]
        users = group == 'losses' and ':' in config.losses[loss].get('fn', '')
        rule = None if users and name not in COMMON else _matching(key)
        if rule is None and isinstance(value, float) and not math.isfinite(value):
            rule = number(-LARGE)
        if rule is not None and not rule.holds(value):
            near = difflib.get_close_matches(str(value), rule.choices, 1)
            raise InputError(f'config.{key}={value!r} is not usable. Expected {rule.text}'
                             + ''.join(f'. Did you mean {name!r}?' for name in near))


@functools.cache
def _matching(key):
    matches = (rule for pattern, rule in RULES.items() if fnmatch.fnmatchcase(key, pattern))
    return next(matches, None)
