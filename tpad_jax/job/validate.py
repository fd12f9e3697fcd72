"""What can be refused before anything is computed or created, each in one sentence."""

import difflib
import re
from pathlib import Path

from tpad_jax import losses
from tpad_jax.baselines import rules
from tpad_jax.config import MAKES, STAGES, names, partnered
from tpad_jax.data import sources
from tpad_jax.distributed import devices
from tpad_jax.errors import InputError
from tpad_jax.evaluation import metrics
from tpad_jax.features import bases
from tpad_jax.losses import check as check_lib
from tpad_jax.losses import distillation
from tpad_jax.models import tpad
from tpad_jax.models.hf import layers
from tpad_jax.models.knowledge import POOLING
from tpad_jax.mutual_information import critics
from tpad_jax.training import handover, merge_adapters, step


def check(config, among=None) -> tuple[str, ...]:
    """The stages asked for, once the config is known to be usable.

    Args:
      config: the run's. among: devices that are not this process's, see `parallel.choose`.

    Raises:
      InputError: an unknown stage, loss, keyword, row name or choice, an unusable number, a
        directory that does not hold what it should.
    """
    stages = names(config.stages)
    for stage in stages:
        _one_of('stages', stage, STAGES)
    if not stages or list(stages) != sorted(set(stages), key=STAGES.index):
        raise InputError(f'config.stages={config.stages!r}: name one or more of '
                         f'{",".join(STAGES)}, each once and in this order')
    for name, loss in config.losses.items():
        for key in ('fn', 'weight', 'stages'):
            if key not in loss:
                raise InputError(f'config.losses.{name} has no {key}: it needs fn, weight, stages')
        for stage in names(loss.stages):
            _one_of(f'losses.{name}.stages', stage, STAGES)
        if 'dtype' in loss:
            _one_of(f'losses.{name}.dtype', loss.dtype, ('float32', 'bfloat16'))
        if 'chunk' in loss:
            _at_least(0, f'losses.{name}.chunk', loss.chunk)
        if loss.fn == 'mdist':
            _check_divergence(name, loss)
    _one_of('model.encoder', config.model.encoder, tpad.ENCODERS)
    _check_blend(config.model)
    _at_least(1, 'model_shards', config.model_shards)
    shards = devices.choose(config.parallel, config.devices, config.model_shards, among,
                            config.precision).shards
    for stage in stages:
        _check_stage(config, stage, shards)
    for key in ('save_every', 'log_every'):
        _at_least(1, key, config[key])
    _at_least(0, 'seed', config.seed)
    _at_least(0, 'diagnostics', config.diagnostics)
    _at_least(0, 'skip_not_finite', config.skip_not_finite)
    _at_least(0, 'data.seed', config.data.seed)
    for key in ('max_length', 'core', 'min_length'):
        _at_least(1, f'data.{key}', config.data[key])
    if not 0 <= config.data.bad_share <= 1:
        raise InputError(f'config.data.bad_share={config.data.bad_share} must be a share in 0..1')
    for key in ('valid', 'test'):
        if not config.data[key] > 0:
            raise InputError(f'config.data.{key}={config.data[key]} must be a share or a number of '
                             'sessions above 0')
    for key in ('lora_rank', 'gnn_steps', 'width', 'heads', 'near', 'near_window'):
        _at_least(1, f'model.{key}', config.model[key])
    for key in ('layers', 'together'):
        _at_least(0, f'model.{key}', config.model[key])
    if config.model.together_strength < 0 or not 0 < config.model.together_decay <= 1:
        raise InputError(f'config.model.together_strength={config.model.together_strength} must '
                         'not be below 0, and config.model.together_decay='
                         f'{config.model.together_decay} in 0..1, above 0')
    _at_least(1, 'search.trials', config.search.trials)
    for name in names(config.baselines):
        _one_of('baselines', name, tuple(rules.BASELINES))
    metrics.registry(config.metrics)
    if config.model.encoder == 'attention' and config.model.width % config.model.heads:
        raise InputError(f'config.model.width={config.model.width} must be a multiple of '
                         f'config.model.heads={config.model.heads}')
    if not config.model.temperature > 0:
        raise InputError(f'config.model.temperature={config.model.temperature} must be above 0')
    for key in ('withhold', 'word_dropout', 'id_dropout', 'feature_dropout', 'dropout',
                'item_dropout'):
        if not 0 <= config.model[key] < 1:
            raise InputError(f'config.model.{key}={config.model[key]} must be in 0..1, below 1')
    _at_least(1, 'mllm.text_length', config.mllm.text_length)
    _at_least(0, 'mllm.image_size', config.mllm.image_size)
    _at_least(0, 'mllm.chunk', config.mllm.chunk)
    for key in ('encode_rows', 'encode_part'):
        _at_least(1, f'mllm.{key}', config.mllm[key])
    for key, choices in (('param_dtype', ('float32', 'bfloat16')),
                         ('dtype', ('float32', 'bfloat16')), ('attention', layers.ATTENTION),
                         ('teacher_dtype', ('float32', 'bfloat16')),
                         ('remat', layers.REMAT), ('pooling', POOLING)):
        _one_of(f'mllm.{key}', config.mllm[key], choices)
    _one_of('model.form', config.model.form, ('compressed', 'full'))
    for name, kind in config.model.critics.items():
        _one_of(f'model.critics.{name}', kind, critics.KINDS)
    for row in names(config.model.recommend):
        _one_of('model.recommend', row, ('k', 'r', 'given', 'true'))
    source = sources.chosen(config)
    if 'true' in names(config.model.recommend) and not source.world:
        raise InputError("config.model.recommend names 'true', the attributes the planted "
                         'catalogue was drawn with, and other data have none; name k, r or given')
    _check_rivals(config)
    _at_least(0, 'model.clusters', config.model.clusters)
    _pattern('model.lora_targets', config.model.lora_targets)
    _one_of('data.protocol', config.data.protocol, ('ours', 'published'))
    if config.refit and 'joint' in stages:
        raise InputError('config.refit=True trains the recommender anew, but its last stage is '
                         'joint, which also changes what it reads; leave one of the two out')
    if config.partner:
        if 'joint' in stages:
            raise InputError('config.partner adds the scores of a second recommender, which stage '
                             'joint does not train; leave one of the two out')
        check(partnered(config), among)
    source.check(config)
    if not source.content:
        _check_without_content(config, stages)
        return stages
    if config.data.protocol == 'published':
        raise InputError('config.data.protocol=published is said of ready-made sessions alone: '
                         'give them with --config.data.npz=FILE')
    _one_of('mllm.tokenizer', config.mllm.tokenizer, ('', 'own'))
    if config.mllm.tokenizer and config.mllm.checkpoint:
        raise InputError(f'config.mllm.tokenizer={config.mllm.tokenizer}: a checkpoint reads the '
                         'tokens it was taught; leave it empty')
    if config.data.features and not Path(config.data.features).is_file():
        raise InputError(f'config.data.features={config.data.features} is no file; give item '
                         'features as data/given.py says')
    bases.teacher(config, bases.read(config))
    return stages


def check_inputs(config, stages, finished) -> None:
    """Refuse a stage that reads rows which no stage before it makes.

    Args:
      stages: to be run. finished: those an earlier run of the workdir took to their end.

    Raises:
      InputError: naming the rows and the stage that makes them.
    """
    own = names(config.model.recommend)
    if config.partner:
        own += names(partnered(config).model.recommend)
    rivals = [row for rival in config.rivals.values() for row in names(rival.recommend)]
    reads = {'transfer': ('k',), 'recommend': (*own, *rivals), 'joint': ('k', 'r')}
    made = {'true'}  # comes with the planted catalogue
    if config.data.features:
        made.add('given')
    elif 'given' in (*own, *rivals):
        raise InputError("the rows 'given' are read from config.data.features, which is empty; "
                         'give a file of item features')
    for stage in STAGES:
        if stage not in stages and stage not in finished:
            continue
        for row in reads.get(stage, ()):
            if row not in made:
                maker = next(s for s in STAGES if row in MAKES.get(s, ()))
                raise InputError(f'stage {stage} reads the rows {row!r}, which stage {maker} '
                                 f'makes: add {maker} to config.stages={",".join(stages)}')
        made |= {*MAKES.get(stage, ())}


def _check_stage(config, stage, shards):
    """Refuse a stage's own settings."""
    c, key = config.stage[stage], f'stage.{stage}.'
    _at_least(0, key + 'steps', c.steps)
    if not c.steps and stage != 'knowledge':
        raise InputError(f'config.{key}steps=0: only the knowledge stage may leave its model as it '
                         'is; leave the stage out of config.stages')
    if c.steps:
        chosen = step.stage_losses(config, stage)
        modules = dict(step.own_modules(config, chosen))
        for name, fn, _, keywords in chosen:
            if ':' in config.losses[name].fn:  # our own are tested
                check_lib.shape(name, fn, keywords, modules.get(name))
    _at_least(1, key + 'accumulate', c.accumulate)
    if c.batch_size < 1 or c.batch_size % (shards * c.accumulate):
        raise InputError(f'config.{key}batch_size={c.batch_size} must be a multiple of '
                         f'{shards * c.accumulate}, {shards} device(s) times {c.accumulate} '
                         f'part(s) (config.{key}accumulate)')
    for name in ('eval_every', 'patience', 'refresh_every'):
        _at_least(0, key + name, c[name])
    if c.refresh_every and stage != 'joint':
        raise InputError(f'config.{key}refresh_every={c.refresh_every}: only the joint stage reads '
                         'rows that it changes; set it to 0')
    if stage == 'transfer' and c.eval_every:
        _check_foretold(config, chosen)
    if stage == 'joint' and c.eval_every and not c.refresh_every:
        raise InputError(f'config.{key}refresh_every=0 would validate on rows from before the '
                         'stage; set it to 1 or more')
    if c.copy and not re.fullmatch(r'[^>]+->[^>]+', c.copy):
        raise InputError(f'config.{key}copy={c.copy!r} must read a->b, two parameter paths')
    for rate in c.rates:
        if not (isinstance(rate, tuple | list) and len(rate) == 2 and isinstance(rate[0], str)
                and isinstance(rate[1], int | float) and rate[1] > 0):
            raise InputError(f"config.{key}rates={c.rates!r} must hold pairs (regex over parameter "
                             "paths, factor above 0), as in (('^club/', 10.0),)")
        _pattern(key + 'rates', rate[0])
    _one_of(key + 'optimiser', c.optimiser, ('adamw', 'adam', 'sgd'))
    _one_of(key + 'schedule', c.schedule, ('cosine', 'constant'))
    for name in names(c.fresh):
        _one_of(key + 'fresh', name, ('k', 'r'))
    _pattern(key + 'train', c.train)
    if config.mllm.teacher and re.search(c.train, 'teacher/base/'):
        raise InputError(f'config.{key}train={c.train!r} matches the parameters of '
                         'config.mllm.teacher, which nothing trains; begin it with ^')


def _check_foretold(config, chosen):
    """Refuse to validate stage transfer where T's own lists mean nothing."""
    why = ''
    if config.model.blend.kind:
        why = 'config.model.blend makes r, which T is not taught to score'
    elif config.model.form != 'compressed':
        why = "T's lists are made from stored rows k, and config.model.form is " + config.model.form
    elif 'critic.distil' not in frozenset().union(
            *(losses.needs(name, fn, keywords) for name, fn, _, keywords in chosen)):
        why = 'no loss of the stage trains critic.distil, by which T scores items'
    if why:
        raise InputError(f'config.stage.transfer.eval_every={config.stage.transfer.eval_every} '
                         f'chooses a step by what T foretells, but {why}; set it to 0')


def _check_divergence(name, loss):
    """Refuse settings of an mdist that are none."""
    _one_of(f'losses.{name}.kind', loss.get('kind', 'forward'), distillation.KINDS)
    if not loss.get('temperature', 1.0) > 0:
        raise InputError(f'config.losses.{name}.temperature={loss.temperature} must be above 0')
    if not 0 <= loss.get('skew', 0.0) < 1:
        raise InputError(f'config.losses.{name}.skew={loss.skew} must be in 0..1, below 1')


def _check_blend(model):
    """Refuse a blend of adapters that cannot be made, or that nothing would read."""
    c = model.blend
    if c.kind and not model.reread:
        raise InputError(f'config.model.blend.kind={c.kind} makes an adapter that K reads items '
                         'again under, and config.model.reread=False reads none; leave one out')
    if c.kind:
        _one_of('model.blend.kind', c.kind, merge_adapters.KINDS)
        handover.parts(c)
    if not 0 < c.keep <= 1:
        raise InputError(f'config.model.blend.keep={c.keep} must be above 0 and at most 1')
    _at_least(0, 'model.blend.rank', c.rank)


def _check_without_content(config, stages):
    """Refuse what needs content where there are only sessions of ids."""
    if config.data.features:
        raise InputError(f'config.data.features={config.data.features!r}: {sources.origin(config)} '
                         'holds sessions of item ids without content. Expected a source with '
                         'content. Fix: leave config.data.features empty.')
    if stages != ('recommend',) or config.model.recommend or any(
            names(rival.recommend) for rival in config.rivals.values()):
        raise InputError(f'{sources.origin(config)} holds item ids without content. Expected '
                         "config.stages='recommend', and config.model.recommend and that of every "
                         'rival empty. Fix: set these.')


def _check_rivals(config):
    """Refuse recommenders without anything to tell items apart by, and keys that mean nothing."""
    own = {key: config.model[key] for key in ('recommend', 'use_id', 'use_side')}
    for name, rival in {'model': own, **config.rivals.to_dict()}.items():
        where = 'model' if name == 'model' else f'rivals.{name}'
        for key in rival:
            _one_of(where, key, own)
        for row in names(rival.get('recommend', '')):
            _one_of(f'{where}.recommend', row, ('k', 'r', 'given', 'true'))
        if 'recommend' not in rival:
            raise InputError(f'config.{where} has no recommend: name its rows, or none')
        whole = {**own, **rival}
        if not (whole['recommend'] or whole['use_id'] or whole['use_side']):
            raise InputError(f'config.{where} tells items apart by nothing: give it rows to '
                             'recommend from, use_id or use_side')


def _at_least(least, key, value):
    if value < least:
        raise InputError(f'config.{key}={value} must be {least} or more')


def _one_of(key, value, choices):
    if value not in choices:
        near = difflib.get_close_matches(str(value), map(str, choices), 1)
        raise InputError(f'config.{key} names {value!r}; choose from {", ".join(choices)}'
                         + ''.join(f'. Did you mean {name!r}?' for name in near))


def _pattern(key, pattern):
    try:
        re.compile(pattern)
    except re.error as error:
        raise InputError(f'config.{key}={pattern!r} is no regular expression: {error}') from error
