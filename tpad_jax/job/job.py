"""The whole job: raw files in, a trained and evaluated recommender out; every part of it resumes.

    prepare     raw files (or the planted catalogue) -> tables, batches, content; or sessions of ids
    stages      knowledge -> rows k, transfer -> rows r, recommend (and its rivals), joint, refit
    report      baselines, test metrics, results.json, figures
"""

import copy
import json
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from rich.console import Console

from tpad_jax.config import MAKES, STAGES, names
from tpad_jax.core import console as console_lib
from tpad_jax.core import log
from tpad_jax.data import batches, item_graphs, sessions, sources, text
from tpad_jax.data import catalogue as catalogue_lib
from tpad_jax.data.sources import external_features
from tpad_jax.data.synthetic import planted, wording
from tpad_jax.diagnostics import snapshots
from tpad_jax.distributed import devices, hosts
from tpad_jax.errors import InputError, Stopped
from tpad_jax.evaluation import tables
from tpad_jax.evaluation.evaluate import evaluate
from tpad_jax.evaluation.scorers import scorer
from tpad_jax.features import bases
from tpad_jax.features import encoder as encoder_lib
from tpad_jax.job import plan, recommenders, results
from tpad_jax.job.background import COMPILE, LOOK, TUNE, Background, workers
from tpad_jax.job.stages import ENTRIES
from tpad_jax.job.validate import check, check_inputs, check_workdir
from tpad_jax.models import readers, tpad
from tpad_jax.training import handover, profiling
from tpad_jax.training import loop as loop_lib
from tpad_jax.training import step as step_lib
from tpad_jax.training.checkpoint import Checkpoints
from tpad_jax.training.workdir import claim, enter, locked
from tpad_jax.types import Batch

DONE = 'finished'  # a file beside a finished stage's checkpoints


class Job:
    """One workdir's run: what is read once and handed to every stage.

    Attributes:
      data, content: see data.pipeline; ready-made sessions have no content (None).
      final: what the models that are tested were trained on; `data`, but after a refit.
      probabilities: the planted catalogue's, or None.
      spec: the modules. params: all parameters {path: array}, as the stages so far left them.
      catalogue: rows per item on the device. seconds: {stage: s} over all sittings, spent: what of
        them went to fitting.SPENT; sitting: s spent in stages by this one.
    """

    def __init__(self, config, workdir: Path, stopping, profile: int = 0):
        """Prepare data and parameters; `stopping` is asked between and within stages."""
        self.config, self.workdir = config, workdir
        self.stopping = lambda: self.background.closing or stopping()
        self.profile = profile
        self.devices = devices.choose(config.parallel, config.devices, config.model_shards,
                                      precision=config.precision)
        self.seconds, self.spent, self.sitting, self.catalogue = {}, {}, {}, {}
        self.background, self.compiling, self.encoders, self.looks = Background(0), {}, {}, []
        self.content = None
        self.source = sources.chosen(config)
        self.planted = self.source.world(config) if self.source.world else None
        with hosts.one_first('data'):
            self.data = sources.load(config, workdir)
        self.max_length = min(config.data.max_length, self.source.longest or config.data.max_length)
        self.final = self.data
        last_only = config.data.protocol == 'published' and config.data.published_last_only
        split = partial(sessions.rows, max_length=self.max_length, every_prefix=not last_only)
        self.valid, self.test = split(self.data.valid), split(self.data.test)

    def build(self, stages, console) -> None:
        """Read content, the base and the first parameters; the slow part of preparing."""
        c, data = self.config, self.data
        self.probabilities = None
        shared = dict(recommend=names(c.model.recommend), items=data.num_items,
                      max_length=self.max_length, side_sizes=data.side_sizes)
        if not self.source.content:
            self.spec = tpad.build(None, c.model, **shared)
            self.count()
            self.params = self.fresh(self.spec)
            return
        base = self.base = bases.read(c)
        where = self.workdir / 'data'
        with hosts.one_first('content'):
            if c.mllm.tokenizer == 'own':
                text.train_tokenizer(data.texts[1:], where / 'tokenizer', base.module.vocab)
            self.content = catalogue_lib.content(data, where, image_size=base.image_size,
                                            tokenizer_dir=where / 'tokenizer' if c.mllm.tokenizer
                                            else base.directory, text_length=c.mllm.text_length,
                                            bad_share=c.data.bad_share)
        teacher = bases.teacher(c, base)
        self.spec = tpad.build(base.module, c.model, pooling=c.mllm.pooling, chunk=c.mllm.chunk,
                               teacher=teacher and teacher.reader, **shared)
        self.count()
        if c.data.features:
            given = external_features.read(c.data.features, data.asins)
            console.print(f'{c.data.features}: {given.unknown} ids of no item {list(given.some)}, '
                          f'{given.repeated} rows said twice', markup=False, highlight=False)
            self.catalogue['given'] = jnp.asarray(given.rows)
        if self.planted is not None:
            self.probabilities = planted.catalogue_probabilities(self.planted, data.asins)
            self.attributes = self.planted.attributes[planted.planted_ids(data.asins)[1:] - 1]
            hot = [np.eye(n, dtype=np.float32)[a]
                   for n, a in zip(wording.SIZES, self.attributes.T, strict=True)]
            self.catalogue['true'] = jnp.pad(jnp.concatenate(hot, axis=1), ((1, 0), (0, 0)))
        blank = {n: jnp.zeros((data.num_items + 1, *s)) for n, s in
                 (('k', (2, c.model.features)),
                  ('r', (2, c.model.features) if self.spec.blended else (2 * c.model.features,)))}
        self.blank = jax.eval_shape(lambda: blank)
        make = jax.jit(partial(  # followed once, though both its shapes and its values are asked
            tpad.init, spec=self.spec, catalogue={**self.catalogue, **blank},
            rank=c.model.lora_rank, targets=c.model.lora_targets,
            image_shape=self.content.image.shape[1:], text_length=c.mllm.text_length))
        shapes = jax.eval_shape(make, jax.random.key(c.seed))
        taught = {'teacher': teacher.shapes} if teacher else {}
        if c.mllm.checkpoint:  # said before gigabytes are read
            for line in plan.of_run(c, base.module, shapes | taught, {**self.catalogue, **blank},
                                    self.devices, stages=stages, positions=self.max_length,
                                    side=base.image_size):
                console.print(line, markup=False, highlight=False)
        dtypes = {'base': c.mllm.param_dtype, 'teacher': c.mllm.teacher_dtype}
        self.compile_ahead(stages, {
            path: x.update(dtype=jnp.dtype(dtypes.get(path.split('/')[0], x.dtype)))
            for path, x in flatten_dict(shapes | taught, sep='/').items()})
        held, cut = {n: shapes[n] for n in base.given}, self.devices.own.model > 1
        loaded = base.load(held, self.devices.own.shardings(held) if cut else None)
        if teacher:
            where = self.devices.own.shardings(teacher.shapes) if cut else None
            loaded = loaded | {'teacher': teacher.load(where)}
        draw = devices.compiled(
            lambda key: {n: p for n, p in make(key).items() if n not in base.given})
        params = draw(jax.random.key(c.seed))
        self.params = flatten_dict({**params, **loaded}, sep='/')

    def count(self) -> None:
        """Lay the catalogue's rows that are counted on training sessions over what it has."""
        c, data = self.config.model, self.final
        rows = {'warm': data.warm, 'side': data.side,
                'popularity': sessions.counts(data.train, data.num_items).astype(np.float32)}
        if c.encoder == 'gce_gnn':
            rows['near'], rows['near_weight'] = item_graphs.neighbours(
                data.train, data.num_items, window=c.near_window, most=c.near)
        if c.together:
            rows['together'], rows['together_lift'] = item_graphs.companions(
                data.train, data.num_items, most=c.together)
        self.catalogue = {**self.catalogue, **jax.tree.map(jnp.asarray, rows)}

    def fresh(self, spec) -> dict:
        """A recommender's first parameters {path: array}, for the catalogue as it is counted."""
        make = devices.compiled(partial(tpad.recommender_init, spec=spec))
        params = make(jax.random.key(self.config.seed), catalogue=self.catalogue)
        return flatten_dict({'recommender': params}, sep='/')

    def nested(self, trained: dict | None = None) -> dict:
        """All parameters as a tree, with `trained` {path: array} laid over them."""
        return unflatten_dict({**self.params, **(trained or {})}, sep='/')

    def encoder(self, stage: str) -> encoder_lib.Encoder | None:
        """The encoder of the rows that a stage makes, the same one at every call; None: no rows."""
        if stage in MAKES and stage not in self.encoders:
            m = self.config.mllm
            # two threads may come here at once: the first one's is kept
            self.encoders.setdefault(stage, encoder_lib.Encoder(
                self.spec, self.content, MAKES[stage], rows=m.encode_rows, part=m.encode_part,
                devices=self.devices.own))
        return self.encoders.get(stage)

    def stage_spec(self, stage: str) -> step_lib.StepSpec | None:
        """The static part of a stage's step; None: the stage takes its model as it is."""
        if not self.config.stage[stage].steps:
            return None
        return step_lib.make_spec(self.config, stage, self.spec, self.config.seed)

    def run_stage(self, stage: str, writer, progress, name: str = '') -> None:
        """Train a stage, or read its finished checkpoint, and add the rows that it makes.

        Args:
          stage: of config.STAGES.
          writer: log.Writer of the run.
          progress: as console.progress.
          name: of its folder, where that is not the stage's.
        """
        name = name or stage
        c, spec, encoder = self.config.stage[stage], self.stage_spec(stage), self.encoder(stage)
        self.params = handover.copied(self.params, stage, c.copy)
        if spec and 'cluster' in spec.needs:
            self.catalogue = {**self.catalogue, 'cluster': handover.clustered(
                self.catalogue['k'], self.config.model.clusters, self.config.seed)}
        self.first = self.params
        (self.workdir / 'stages' / name).mkdir(parents=True, exist_ok=True)
        trained, rows, record = {}, {}, {'seconds': 0.0}
        if spec:
            self.look(stage, 'before', spec, encoder)
            self.background.results([self.compiling[name]] if name in self.compiling else [])
            trained, rows, record = self.fit(name, stage, spec, writer, progress, encoder)
        self.params = {**self.params, **trained}
        if stage == 'transfer' and self.config.model.blend.kind:
            self.params = handover.blended(self.params, self.config)
            trained = {p: x for p, x in trained.items() if not p.startswith('lora/distil/')}
        self.record = record
        (self.workdir / 'stages' / name / DONE).touch()
        self.seconds[name] = record['seconds']
        if encoder is not None:
            self.catalogue = self.catalogue | encoder.leave(
                self.nested(), self.workdir / 'features' / name, progress, self.stopping, rows,
                stage=stage, seed=self.config.seed, data=self.data.fingerprint,
                checkpoint=self.base.fingerprint)
            bases.save_adapters(self.workdir / 'adapters', self.config, self.base, trained)
        self.look(stage, 'after', spec, encoder)

    def look(self, stage: str, moment: str, spec, encoder) -> None:
        """Look at a stage's features, see `snapshots.take`, next to what follows."""
        if moment not in snapshots.MOMENTS.get(stage, ()):
            return
        take = partial(snapshots.take, copy.copy(self), stage, moment, spec, encoder)
        if not self.background:
            take()
            return
        earlier = self.looks[-1:]  # whose file this one reads, and whose lines come first

        def in_turn():
            self.background.results(earlier)
            take()

        self.looks.append(self.background.submit(in_turn, LOOK))

    def compile_ahead(self, stages, shapes: dict) -> None:
        """Compile the steps of stages in the background, in the order in which they are needed.

        Args:
          stages: those that this run trains or has trained.
          shapes: {path: shape and dtype} of all parameters.
        """
        rows = self.catalogue
        for number, stage in enumerate(stages):
            finished = (self.workdir / 'stages' / stage / DONE).is_file()
            blended = self.config.model.blend.kind and stage == 'joint'  # the rank is not known yet
            if self.background and not finished and not blended:
                self.compiling[stage] = self.background.submit(
                    partial(self._compile, stage, shapes, rows), COMPILE + number)
            rows = {**rows, **{name: self.blank[name] for name in MAKES.get(stage, ())}}

    def _compile(self, stage, shapes, rows):
        spec, c = self.stage_spec(stage), self.config.stage[stage]
        if spec is None or spec.modules:  # a loss's own parameters are made when its stage starts
            return
        if 'cluster' in spec.needs:
            rows = {**rows, 'cluster': np.zeros(self.data.num_items + 1, np.int32)}
        if c.eval_every and ENTRIES[stage].validates_rows:
            rows = {**rows, **{name: self.blank[name] for name in MAKES[stage]}}
        with closing(self.batches(stage, spec)(start_step=0)) as drawn:
            batch = Batch.of(next(drawn))
        state = jax.eval_shape(partial(step_lib.start, spec, pattern=c.train), shapes)
        loop_lib.compile_step(self.devices, spec, state, batch, rows)
        if stage in MAKES:
            self.encoder(stage).compile(unflatten_dict(shapes, sep='/'))

    def batches(self, stage: str, spec: step_lib.StepSpec) -> Callable[..., Iterator[dict]]:
        """(start_step) -> host batches of a stage, see data/batches.py."""
        c = self.config.stage[stage]
        shared = dict(batch_size=c.batch_size, seed=self.config.seed,
                      **self.devices.drawn_here(c.accumulate))
        reads = (spec.fresh or spec.model.form == 'full' or spec.needs
                 & ({'describe', 'foretell'} | readers.STATES | readers.THERE))
        content = self.content if reads and ENTRIES[stage].content else None
        if ENTRIES[stage].batches == 'items':
            return partial(batches.item_batches, self.data, content=content, **shared)
        return partial(batches.session_batches, self.final, content=content,
                       every_prefix=c.every_prefix, max_length=self.max_length, steps=c.steps,
                       **shared)

    def count_both(self) -> None:
        """Add validation's sessions to the training sessions, for what is trained from here on."""
        both = sessions.join(self.data.train, self.data.valid)
        warm = sessions.warm_items(both, self.data.num_items)
        self.final = replace(self.data, train=both, warm=warm)
        self.count()

    def fit(self, name, stage, spec, writer, progress, encoder, params=None, steps=None):
        """Run a stage's loop.

        Args:
          name: of its folder and in the log.
          stage: whose config and batches it has.
          spec: step.StepSpec.
          writer, progress: see `run_stage`.
          encoder: of the rows the stage makes, or None.
          params: {path: array} of all parameters; None: the run's.
          steps: exactly so many, without validation (a refit); None: as config.stage says.

        Returns:
          See `loop.fit`.
        """
        c, params = self.config.stage[stage], self.params if params is None else params
        catalogue = self.catalogue
        draw = self.batches(stage, spec)
        params = step_lib.with_own(spec, params, partial(draw, start_step=0), catalogue)
        bind = ENTRIES[stage].scorer(spec.model, self.devices.own)
        validating = c.eval_every and steps is None
        refreshing = c.refresh_every
        if ENTRIES[stage].validates_rows and validating:
            blank = {row: jnp.zeros(self.blank[row].shape) for row in MAKES[stage]}
            refreshing, catalogue = True, {**blank, **catalogue}

        def validate(state, catalogue):
            tree = unflatten_dict({**params, **state.params}, sep='/')
            result, _ = evaluate(bind(tree, catalogue), self.valid, self.data.warm, ks=(20,),
                                 name=name)
            return {k: result[k] for k in recommenders.KEPT}

        checkpoints = Checkpoints(self.workdir / 'stages' / name)
        if (checkpoints.directory / DONE).is_file() and not checkpoints.steps():
            raise InputError(f'{checkpoints.directory} is of a finished stage, but no checkpoint '
                             'is left in it; restore them from a copy, or delete the folder to '
                             'train the stage again')
        loop = loop_lib.Loop(
            name=name, total=steps or c.steps, devices=self.devices,
            batches=lambda step: draw(start_step=step), checkpoints=checkpoints, writer=writer,
            progress=progress, log_every=self.config.log_every, save_every=self.config.save_every,
            eval_every=c.eval_every, patience=c.patience, refresh_every=c.refresh_every,
            validate=validate if validating else None,
            refresh=(lambda state: encoder(unflatten_dict({**params, **state.params}, sep='/')))
            if refreshing else None, refreshed=MAKES.get(stage, ()),
            stopping=self.stopping, shown=snapshots.shown(spec.losses),
            broken=self.workdir / 'not_finite', profile=self.profile and profiling.Profile(
                self.workdir / 'profile', self.profile, name, self.devices))
        begun = time.perf_counter()
        try:
            out = loop_lib.fit(loop, spec, step_lib.start(spec, params, c.train), catalogue)
            self.spent[name] = {'all': out[-1]['seconds'], **out[-1]['spent']}
            return out
        finally:
            checkpoints.close()
            self.sitting[name] = time.perf_counter() - begun

    def pause(self) -> None:
        """End the run here if a signal came or a task failed; what is finished is kept.

        Raises:
          Stopped: a signal came.
        """
        self.background.check()
        if self.stopping():
            raise Stopped('stopped between stages')


def run(config, workdir, stopping=lambda: False, until: str = '', profile: int = 0) -> dict:
    """Run or resume the whole job in `workdir`; a finished one prints its results at once.

    Args:
      config, workdir: of the run. stopping: asked between and within stages, see `processes`.
      until: 'validation' leaves once the recommender is trained and never looks at test.
      profile: steps of every stage to trace and time, see `profiling.Profile`; 0: none.

    Returns:
      What results.json holds; until validation, {'valid': {metric: value}} at the chosen step.

    Raises:
      InputError: unusable input or config. Stopped: `stopping` answered True; state is saved.
    """
    workdir, console = Path(workdir), Console(quiet=jax.process_index() > 0)
    check_workdir(workdir)
    stages = check(config)
    finished = {s for s in STAGES if (workdir / 'stages' / s / DONE).is_file()}
    check_inputs(config, stages, finished)
    enter(workdir, config)
    with locked(workdir):
        return _run(config, workdir, stopping, until, profile, stages, finished, console)


def _run(config, workdir, stopping, until, profile, stages, finished, console) -> dict:
    begun = time.perf_counter()
    job = Job(config, workdir, stopping, profile)
    claim(workdir, config.to_dict(), job.data.fingerprint)
    file = workdir / 'results.json'
    results_before = _read_results(file) if file.is_file() else None
    if results_before and set(stages) <= set(results_before['provenance']['stages']):
        console.print(tables.table(results_before))
        console.print(f'{file}: finished {results_before["provenance"]["date"]}, nothing was '
                      'trained now; --workdir=DIR starts another run', markup=False,
                      highlight=False)
        return results_before
    stages = [stage for stage in STAGES if stage in finished.union(stages)]
    writer = log.Writer(workdir)
    try:
        # a trace of the device shows one stage at a time
        job.background = Background(0 if profile else workers(config.workers, job.devices))
        job.build(stages, console)
        results.introduce(job, console)
        recorded = _run_stages(job, stages, writer, until)
        if until == 'validation':
            return {'valid': job.record['valid']}
        with hosts.one_first('report'):  # the others find it finished
            if jax.process_count() > 1:
                job.stopping = lambda: False  # they ask nothing meanwhile: all must equally often
            if jax.process_index() == 0:
                return results.report(job, stages, *recorded, begun, console)
        return json.loads(file.read_text())
    finally:
        job.background.close()
        writer.close()


def _run_stages(job, stages, writer, until):
    """Run the stages and what is independent of them.

    Returns:
      {name: scorer} of all recommenders, {name: validation metrics} of each at its chosen step, and
      the task that tunes the baselines.
    """
    knowledge, tuning, joint = None, None, {}
    company = recommenders.Recommenders(job, writer, console_lib.progress)
    trains = 'recommend' in stages and until != 'validation'
    for stage in stages:
        job.pause()
        if trains and 'recommend' in stages[stages.index(stage):]:
            company.begin(stage)
        if tuning is None and stage != 'knowledge' and not until:
            tuning = job.background.submit(partial(
                results.baseline_scorers, job, knowledge, trains and job.config.refit), TUNE)
        job.run_stage(stage, writer, console_lib.progress)
        if stage == 'knowledge':
            knowledge = np.asarray(job.catalogue['k']).reshape(job.data.num_items + 1, -1)
        elif stage == 'recommend' and until == 'validation':
            return None
        elif stage == 'recommend':
            company.take_own()
        elif stage == 'joint':
            bind = scorer(job.spec, job.devices.own)
            joint = {'tpad_joint': bind(job.nested(), job.catalogue)}
    scorers, chosen = company.finish() if trains else ({}, {})
    job.background.results(job.looks)
    if joint:
        chosen['tpad_joint'] = job.record['valid']
    if tuning is None:
        tuning = job.background.submit(partial(results.baseline_scorers, job, knowledge, False))
    return scorers | joint, chosen, tuning


def _read_results(file: Path) -> dict:
    """Read the results of a finished run.

    Raises:
      InputError: they are damaged.
    """
    try:
        found = json.loads(file.read_text())
        found['models'], found['provenance']['stages'], found['provenance']['date']
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f'{file} is damaged ({type(error).__name__}: {error}). Expected the '
                         'results of a finished run. Fix: delete it, and the same command makes it '
                         'again from the checkpoints') from error
    return found
