"""Refuse configs that cannot run, before anything is computed or created, in one sentence each."""

import re
from pathlib import Path

from tpad_jax.config import MAKES, STAGES, names
from tpad_jax.data import sources
from tpad_jax.distributed import devices
from tpad_jax.errors import InputError, refuse_if
from tpad_jax.evaluation import metrics
from tpad_jax.features import bases
from tpad_jax.job import ranges
from tpad_jax.losses import check as loss_check
from tpad_jax.models.hf.bert import Bert
from tpad_jax.training import begin_from, federated, handover, step
from tpad_jax.training.stages import ENTRIES

WRITTEN = {'describe', 'mention', '_k.states', '_r.states'}  # outputs of a K that writes texts
IDENTITY = ('recommend', 'use_id', 'use_side')  # options by which a recommender tells items apart


def check(config, among=None) -> tuple[str, ...]:
    """Refuse a config that cannot run.

    `ranges` declares the values of single options; the rules here compare several.

    Args:
      config: of the run.
      among: devices that are not of this process, see `devices.choose`.

    Returns:
      The stages of the run.

    Raises:
      InputError: a value out of its range, options that contradict each other, or a directory
        without the files that it should have.
    """
    for name, loss in config.losses.items():
        missing = [key for key in ('fn', 'weight', 'stages') if key not in loss]
        refuse_if(missing, f'config.losses.{name} has no {" and no ".join(missing)}. Expected fn, '
                  'weight and stages')
    for name, baseline in config.rivals.items():
        refuse_if(name.startswith('tpad') or name in ('experts_only', 'id_only_experts'),
                  f'config.rivals.{name}: another model of the run has this name. Fix: rename it.')
        refuse_if(not {'recommend'} <= set(baseline) <= set(IDENTITY), f'config.rivals.{name} sets '
                  f'{", ".join(baseline)}. Expected recommend, and of use_id, use_side any')
    ranges.check(config)
    begin_from.check(config)
    metrics.registry(config.metrics)
    stages = names(config.stages)
    refuse_if(not stages or list(stages) != sorted(set(stages), key=STAGES.index),
              f'config.stages={config.stages!r} is not usable. Expected one or more of '
              f'{",".join(STAGES)}, each once and in this order')
    for stage in stages:
        refuse_if(stage not in ENTRIES or stage not in config.stage, f'config.stages names '
                  f'{stage}, which has no options in config.stage or no entry in '
                  'training/stages.py. Fix: add both')
    source = sources.chosen(config)
    _check_model(config, source)
    shards = devices.choose(config.parallel, config.devices, config.model_shards, among,
                            config.precision).shards
    for stage in stages:
        _check_stage(config, stage, shards)
        _check_evaluated(config, stage, stages)
    federated.check(config, shards)
    refuse_if('joint' in stages and config.refit, 'config.refit=True trains the recommender again, '
              'but stage joint also changes its inputs. Fix: leave one of the two out')
    refuse_if(config.refit and config.model.lessons, f'config.model.lessons='
              f'{config.model.lessons}: a refit (config.refit) reads none. Fix: leave one out')
    refuse_if('joint' in stages and config.partner, 'config.partner adds the scores of a second '
              'recommender, which stage joint does not train. Fix: leave one of the two out')
    if config.partner:
        check(handover.partnered(config), among)
    refuse_if('joint' in stages and config.model.memory, f'config.model.memory='
              f'{config.model.memory}: stage joint changes the vectors that a memory holds. Fix: '
              'leave joint out of config.stages, or set it to 0')
    source.check(config)
    refuse_if(source.world and config.data.catalogue != 'all', 'config.data.catalogue='
              f"{config.data.catalogue!r}: the planted catalogue's true probabilities are of all "
              "items. Expected 'all'. Fix: leave it out, or name other data")
    refuse_if(config.data.protocol == 'published' and source.timed, "config.data.protocol="
              "'published' is for prepared sessions, which have no times. Fix: name them by "
              'config.data.npz or config.data.ready')
    if not source.content:
        _check_without_content(config, stages)
        return stages
    refuse_if(config.mllm.tokenizer == 'own' and config.mllm.checkpoint, 'config.mllm.tokenizer: a '
              'checkpoint reads the tokens that it was trained on. Fix: leave it empty')
    features = config.data.features
    refuse_if(features and not Path(features).is_file(), f'config.data.features={features!r} is '
              'not a file. Expected item features as in tpad_jax/data/sources/external_features.py')
    base = bases.read(config)
    bases.teacher(config, base)
    trained = any(re.search(config.stage[stage].train, 'base/decoder/layers/') for stage in stages)
    refuse_if(config.mllm.prune and (trained or isinstance(base.module, Bert)
                                     or not MAKES.keys() & set(stages)), 'config.mllm.prune='
              f'{config.mllm.prune}: it prunes the frozen decoder of an MLLM that reads items. '
              'Fix: set it to 0, or name such an MLLM and a stage that reads items')
    if isinstance(base.module, Bert):
        _check_text_encoder(config, stages)
        return stages
    width, pooling = base.module.width, config.mllm.pooling
    refuse_if(
        step.reads_raw(config) and (config.model.features != width or pooling == 'summary'),
        f'config.stage.knowledge.steps=0: k are the states of the checkpoint, of width {width}. '
        f'config.model.features={config.model.features} and config.mllm.pooling={pooling!r} need '
        f"training. Expected {width}, and 'last' or 'mean'. Fix: set them so, or train")
    return stages


def check_inputs(config, stages: tuple[str, ...], finished: set[str]) -> None:
    """Refuse a stage that reads rows which no earlier stage makes.

    Args:
      config: of the run.
      stages: the stages to run.
      finished: the stages that an earlier run of the workdir finished.

    Raises:
      InputError: naming the rows and the stage that makes them, or the stage that trains T.
    """
    recommended = {}  # row -> the option that reads it
    for name, baseline in config.rivals.items():
        if 'given' in names(baseline.recommend):
            recommended['given'] = f'config.rivals.{name}'
    if config.partner:
        other = handover.partnered(config)
        recommended |= dict.fromkeys(names(other.model.recommend), 'config.partner')
    recommended |= dict.fromkeys(names(config.model.recommend), '')
    refuse_if('given' in recommended and not config.data.features, "the rows 'given' are read from "
              'config.data.features, which is empty. Fix: give a file of item features')
    c = config.stage.transfer
    taught = 'teach' in finished.union(stages) or config.begin_from
    refuse_if('transfer' in stages and c.steps and not (taught or re.search(c.train, 'transfer/')),
              f'config.stage.transfer.train={c.train!r}: no stage trains the Transfer-MLLM, from '
              'which stage transfer distils. Fix: add teach to config.stages')
    refuse_if(config.model.lessons and not taught, f'config.model.lessons={config.model.lessons}: '
              'no stage trains the Transfer-MLLM, which draws them. Expected teach in '
              'config.stages, or config.begin_from. Fix: add one, or set it to 0')
    if 'codes' in recommended:  # are made of k
        recommended.setdefault('k', recommended['codes'])
    # come with the planted catalogue, with that file, with texts, and with k
    available = {'true', 'given', 'lexical', 'codes'}
    for stage in STAGES:
        if stage not in stages and stage not in finished:
            continue
        entry, reads = ENTRIES[stage], list(ENTRIES[stage].reads)
        if stage in stages and config.stage[stage].steps:
            reads += [row for row in step.stored_rows(config, stage) if row not in reads]
        for row in (*reads, *(recommended if entry.recommends else ())):
            if row not in available:
                maker = next(s for s in STAGES if row in MAKES.get(s, ()))
                reader = '' if row in reads else recommended[row]
                whose, instead = (f' ({reader})', f', or remove {reader}') if reader else ('', '')
                raise InputError(f'stage {stage}{whose} reads the rows {row!r}, which stage '
                                 f'{maker} makes. Fix: add {maker} to config.stages{instead}')
        available |= {*MAKES.get(stage, ())}


def remarks(config, stages: tuple[str, ...]) -> list[str]:
    """List what is permitted and seldom meant: rows that a stage computes and does not write.

    Args:
      config: of the run.
      stages: those that are trained.
    """
    out = []
    for place, stage in enumerate(stages):
        for row in set(names(config.stage[stage].fresh)) - {*MAKES.get(stage, ())}:
            for later in stages[place + 1:]:
                reads = {*ENTRIES[later].reads, *step.stored_rows(config, later)} if config.stage[
                    later].steps else {*ENTRIES[later].reads}
                if row in reads.union(names(config.model.recommend) * ENTRIES[later].recommends):
                    out.append(f'stage {stage} computes {row!r} (config.stage.{stage}.fresh) and '
                               f'does not write it: stage {later} reads the rows from before. To '
                               f'write it: config.MAKES[{stage!r}] = ({row!r},)')
                    break
                if row in MAKES.get(later, ()):
                    break
    return out


def check_workdir(workdir: Path) -> None:
    """Refuse a path that orbax would read as a pattern of paths: it lists checkpoints by a glob.

    Args:
      workdir: of the run.

    Raises:
      InputError: naming the character.
    """
    path = str(workdir.absolute())
    for special in re.findall(r'[*?\\\[]', path):
        raise InputError(f'--workdir={str(workdir)!r}: {path} has the character {special}, by '
                         'which checkpoints are not found again. Fix: choose a path without it')


def _check_stage(config, stage, shards):
    """Refuse settings of a stage that contradict each other."""
    c, key = config.stage[stage], f'config.stage.{stage}.'
    kept = begin_from.TRAINED if config.begin_from else ('knowledge',)
    refuse_if(not c.steps and stage not in kept, f'{key}steps=0: only stages that begin from '
              f'another run (config.begin_from), and stage knowledge, may keep their model as it '
              f'is. Fix: leave {stage} out of config.stages')
    chosen = step.stage_losses(config, stage) if c.steps else ()
    for spec in chosen:
        if ':' in config.losses[spec.name].fn:  # the built-in ones are tested
            loss_check.check_shape(spec)
    parts = shards * c.accumulate
    refuse_if(c.batch_size % parts, f'{key}batch_size={c.batch_size} must be a multiple of '
              f'{parts}: {shards} device(s) times {c.accumulate} part(s) ({key}accumulate)')
    refuse_if(c.refresh_every and stage != 'joint', f'{key}refresh_every={c.refresh_every}: only '
              'stage joint reads rows that it changes. Fix: set it to 0')
    if c.steps and (stage == 'teach' or (stage == 'transfer' and c.eval_every)):
        _check_ranking(config, stage, chosen)
    refuse_if(stage == 'joint' and c.eval_every and not c.refresh_every, f'{key}refresh_every=0 '
              'would validate on rows from before the stage. Fix: set it to 1 or more')
    refuse_if(c.copy and not re.fullmatch(r'[^>]+->[^>]+', c.copy), f'{key}copy={c.copy!r} is not '
              'usable. Expected a->b, two parameter paths')
    refuse_if(config.mllm.teacher and re.search(c.train, 'teacher/base/'), f'{key}train='
              f'{c.train!r} matches config.mllm.teacher, which no stage trains. Fix: begin with ^')


def _check_text_encoder(config, stages):
    """Refuse losses of what a text encoder does not compute."""
    for stage in stages:
        for spec in step.stage_losses(config, stage) if config.stage[stage].steps else ():
            absent = step.required(config, stage, spec.needs) & WRITTEN
            refuse_if(absent, f'config.losses.{spec.name}: it reads outputs ({", ".join(absent)}) '
                      'that the text encoder of config.mllm.checkpoint does not compute, as it '
                      'writes no text. Expected losses of its vectors. Fix: set config.stage.'
                      f'{stage}.weights.{spec.name}=0, or config.stage.{stage}.steps=0')


def _check_evaluated(config, stage, stages):
    """Refuse a stage that trains the recommender where no evaluation follows it."""
    later, train = STAGES[STAGES.index(stage):], config.stage[stage].train
    evaluated = 'recommend' in later or 'joint' in {*later} & {*stages}
    refuse_if(not evaluated and ('recommender' in train or re.search(train, 'recommender/')),
              f'config.stage.{stage}.train={train!r}: it changes the recommender, which is '
              'evaluated after the stages recommend and joint only. Fix: insert the stage before '
              'recommend in config.STAGES, or before joint and add joint to config.stages.')


def _check_ranking(config, stage, chosen):
    """Refuse to read the lists of the Transfer-MLLM where they mean nothing."""
    model = config.model
    trained = any({'critic.distil', 'teach.z'} & spec.needs for spec in chosen)
    rules = ((model.blend.kind, 'config.model.blend makes r, which T is not trained to score'),
             (model.form == 'full',
              f'T scores stored rows k, and config.model.form is {model.form!r}'),
             (model.critics.distil == 'concatenated', 'config.model.critics.distil is '
              "'concatenated', by which a whole catalogue is not scored"),
             (not trained, 'no loss of the stage trains critic.distil, by which T scores items'))
    for broken, reason in rules:
        refuse_if(broken, f'config.stage.{stage}.eval_every={config.stage[stage].eval_every} '
                  f'chooses a step by what T predicts, but {reason}. Fix: '
                  + ('set it to 0' if stage == 'transfer' else 'leave teach out of config.stages'))


def _check_model(config, source):
    """Refuse settings of the model that contradict each other or the data."""
    model = config.model
    refuse_if(model.encoder == 'attention' and model.width % model.heads, 'config.model.width='
              f'{model.width} must be a multiple of config.model.heads={model.heads}')
    refuse_if(model.blend.kind and not model.reread, 'config.model.blend makes an adapter for '
              'reading again, which config.model.reread=False switches off. Fix: leave one out')
    refuse_if(model.session_layers and model.form == 'full', f'config.model.session_layers='
              f'{model.session_layers} reads rows k, and config.model.form is full. Expected 0 or '
              'another form. Fix: choose one')
    refuse_if(model.blend.kind == 'damc' and not model.lora_by_kind, 'config.model.blend.kind='
              "'damc' keeps the adapter of pictures. Expected adapters by kind of token. Fix: set "
              'config.model.lora_by_kind=True')
    if model.blend.kind:
        handover.parts(model.blend)
    refuse_if('true' in names(model.recommend) and not source.world, "config.model.recommend names "
              "'true', the planted catalogue's attributes. Fix: name k, r or given")
    reads = {name for x in (model, *config.rivals.values()) for name in names(x.recommend)}
    refuse_if('codes' in reads and not model.codes, "a recommender reads the rows 'codes', and "
              'config.model.codes is (). Expected (levels, size). Fix: set it, as to (3, 16)')
    identity = {key: model[key] for key in IDENTITY}
    changes = {'model': {}, **{f'rivals.{name}': x for name, x in config.rivals.items()}}
    for key, changed in changes.items():
        refuse_if(not any({**identity, **changed}.values()), f'config.{key} has no input that '
                  'tells items apart. Fix: set recommend, use_id or use_side')


def _check_without_content(config, stages):
    """Refuse options that need content where the source has only sessions of ids."""
    origin = sources.origin(config)
    refuse_if(config.data.features, f'config.data.features={config.data.features!r}: {origin} '
              'holds sessions of item ids without content. Fix: leave config.data.features empty.')
    read = [config.model.recommend, *(x.recommend for x in config.rivals.values())]
    refuse_if(stages != ('recommend',) or any(map(names, read)), f'{origin} holds item ids without '
              "content. Fix: set config.stages='recommend', and empty config.model.recommend and "
              'that of every entry of config.rivals')
