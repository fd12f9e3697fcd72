"""The whole job: raw files in, a trained and evaluated recommender out; every part of it resumes.

* prepare: raw files (or the planted catalogue) become tables, batches and content; or sessions of
  ids are read.
* stages: knowledge makes the rows k, teach the Transfer-MLLM, transfer the rows r, then recommend,
  joint and a refit. Trained baselines, diagnostics, compilation and tuning run next to them, see
  background.py.
* report: test metrics of all models, results.json, the page.
"""

import copy
import json
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from rich.console import Console

from tpad_jax.config import MAKES, STAGES
from tpad_jax.core import log, precision, startup
from tpad_jax.core.console import say
from tpad_jax.data import catalogue, item_graphs, missing, sessions, sources
from tpad_jax.data.sources import external_features
from tpad_jax.data.synthetic import planted, variants
from tpad_jax.diagnostics import clouds, records, snapshots
from tpad_jax.distributed import devices, hosts
from tpad_jax.errors import Stopped
from tpad_jax.evaluation import tables
from tpad_jax.features import bases, lexical, tokenizers
from tpad_jax.features.encoder import Encoder
from tpad_jax.job import fitting, gate, memory_plan, recommenders, results, validate
from tpad_jax.job.background import LARGE, LOOK, TUNE, Background, workers
from tpad_jax.models import readers, sessions as encoders
from tpad_jax.training import begin_from, federated, handover, length, step
from tpad_jax.training.stages import ENTRIES
from tpad_jax.training.workdir import claim, enter, locked


class Job:
    """The run of one workdir: what is read once and what the stages hand to each other.

    Attributes:
      data: catalogue.Data.
      content: catalogue.Content, or None for sessions of ids.
      final: the data that the tested models were trained on: `data`, or those of a refit.
      probabilities: the planted catalogue's, or None.
      spec: the modules.
      params: all parameters {path: array} after the stages so far. Never changed in place.
      catalogue: rows per item on the device. Never changed in place.
      blank: {row: shape and dtype} of the rows that stages make.
      taken: {path: array} of the parameters of another run, see begin_from.py.
      writer: log.Writer of the run, once it begins.
      encoders: {stage: encoder of the rows that it makes}.
      background: the threads next to the main one.
      compiling: {stage: task} of the steps that are compiled ahead.
      seconds: {run of steps: seconds} over all sittings.
      spent: of these seconds, those by loop.SPENT.
      sitting: {run of steps: seconds} of this sitting.
    """

    def __init__(self, config, workdir: Path, stopping, profile: int = 0, data=None):
        """Prepare the data of a run.

        Args:
          config: of the run.
          workdir: of the run, which exists.
          stopping: asked between and within stages.
          profile: steps of every stage to trace and time.
          data: catalogue.Data; None: those of the config.
        """
        self.config, self.workdir, self.profile = config, workdir, profile
        self.stopping = lambda: self.background.closing or stopping()
        self.devices = devices.choose(config.parallel, config.devices, config.model_shards,
                                      precision=config.precision)
        self.seconds, self.spent, self.sitting, self.catalogue = {}, {}, {}, {}
        self.background, self.compiling, self.encoders, self.looks = Background(0), {}, {}, []
        self.writer = self.content = self.probabilities = None
        self.blank, self.taken = {}, {}
        self.source = sources.chosen(config)
        self.planted = self.source.world(config) if self.source.world else None
        with hosts.one_first('data'):
            self.data = data or sources.load(config, workdir)
        self.max_length = min(config.data.max_length, self.source.longest or config.data.max_length)
        self.final, self.asked = self.data, config
        self.config = config = length.of_data(config, self.data.train)
        split = partial(sessions.rows, max_length=self.max_length,
                        every_prefix=sources.every_prefix(config), events=self.data.events)
        self.valid, self.test = split(self.data.valid), split(self.data.test)
        self.modules = partial(step.build_model, items=self.data.num_items,
                               max_length=self.max_length, side_sizes=self.data.side_sizes)

    def build(self, stages, console) -> None:
        """Read content, the base and the first parameters: the slow part of preparing.

        Args:
          stages: those that this run trains or has trained.
          console: of the run.
        """
        c, data = self.config, self.data
        if not self.source.content:
            self.spec = self.modules(None, c)
            self.count()
            self.params = self.fresh(self.spec)
            return self._check_patterns(stages)
        # a run on rows of a file reads no content
        data, self.missing = missing.hide(data, c.data.missing, c.data.seed)
        pictures = bool(data.has_image.any()) and any(ENTRIES[stage].content for stage in stages)
        where = self.workdir / 'data'
        with hosts.one_first('content'):
            c, words, self.texts = tokenizers.fitted(
                c, data.texts, bases.read(c, pictures).directory, where / 'tokenizer',
                reads=bool(MAKES.keys() & set(stages)))
            self.config, self.base = c, (base := bases.read(c, pictures))
            self.content = catalogue.content(
                data, where, image_size=base.image_size if pictures else 0,
                text_length=c.mllm.text_length, bad_share=c.data.bad_share,
                tokenizer_dir=words)
        teacher = bases.teacher(c, base)
        build = partial(self.modules, teacher=teacher and teacher.reader)
        self.spec = build(base.module, c)
        self.encoders = {stage: Encoder(self.spec, self.content, MAKES[stage], c.mllm.encode_rows,
                                        c.mllm.encode_part, self.devices.own)
                         for stage in stages if stage in MAKES}
        if self.encoders:
            tokenizers.check_different(data.texts, self.content.tokens, self.content.has_image,
                                       words)
        self.count()
        if c.data.features:
            features = external_features.read(c.data.features, data.asins)
            say(console, f'{c.data.features}: {features.unknown} ids of unknown items '
                f'{list(features.some)}, {features.repeated} repeated rows')
            self.catalogue['given'] = jnp.asarray(features.rows)
            tokenizers.check_rows('given', self.catalogue['given'], f'{c.data.features}. Fix: '
                                  'compute the features again.')
        if 'recommend' in stages and lexical.wanted(c, self.planted is not None):
            self.catalogue['lexical'] = jnp.asarray(lexical.rows(data.texts, c.seed))
        if c.model.words:
            self.catalogue['words'] = fitting.word_rows(data)
        if self.planted is not None:
            self.probabilities = variants.truth(c.data, self.planted, data)
            self.attributes, true = planted.true_rows(self.planted, data.asins)
            self.catalogue['true'] = jnp.asarray(true)
        rows = memory_plan.rows(c, data.num_items, len(data.side_sizes), self.spec.knowledge.shape)
        self.blank = {name: rows[name] for name in rows.keys() & {'k', 'r', 'codes'}}
        blank = {name: jnp.zeros(x.shape) for name, x in self.blank.items()}
        make = step.initialiser(c, self.spec, (base.image_size, base.image_size, 3))
        given = dict(key=jax.random.key(c.seed), catalogue={**self.catalogue, **blank})
        shapes = jax.eval_shape(precision.exact_products(make), **given)
        every = memory_plan.parameter_shapes(
            c, shapes | ({'teacher': teacher.shapes} if teacher else {}))
        self.taken = begin_from.parameters(c, every, base.fingerprint)
        self.params = every  # shapes, until the values are read
        self._check_patterns(stages)
        if c.mllm.checkpoint:  # printed before gigabytes are read
            subject = memory_plan.Subject(
                c, build, base.module, every, self.catalogue | self.blank, self.devices,
                self.max_length, base.image_size)
            for line in memory_plan.of_run(subject, stages):
                say(console, line)
        fitting.compile_ahead(self, stages, every)
        placed = self.devices.own.shardings if self.devices.own.model > 1 else lambda shapes: None
        loaded = base.load(held := {n: shapes[n] for n in base.given}, placed(held))
        loaded = loaded | ({'teacher': teacher.load(placed(teacher.shapes))} if teacher else {})
        params = step.without(make, base.given)(**given)
        self.params = flatten_dict({**params, **loaded}, sep='/') | self.taken
        if c.mllm.prune:
            self.params = fitting.pruned(self, console)

    def _check_patterns(self, stages):
        """Refuse settings that fit no parameter before anything is compiled or trained."""
        for stage in stages:
            handover.check_stage(self.config, stage, self.stage_spec(stage), self.params,
                                 self.data.num_items)
        if 'recommend' in stages:
            recommenders.check(self)

    def count(self) -> None:
        """Add the catalogue's rows that are counted on training sessions."""
        c, data = self.config.model, self.final
        rows = {'warm': data.warm, 'side': data.side,
                'popularity': sessions.counts(data.train, data.num_items).astype(np.float32)}
        if encoders.reads_graph(self.spec.encoder):
            rows['near'], rows['near_weight'] = item_graphs.neighbours(
                data.train, data.num_items, window=c.near_window, most=c.near)
        if c.together:
            rows['together'], rows['together_lift'] = item_graphs.companions(
                data.train, data.num_items, most=c.together)
        self.catalogue = {**self.catalogue, **jax.tree.map(jnp.asarray, rows)}

    def fresh(self, spec) -> dict:
        """Draw a recommender's first parameters {path: array}, for the catalogue as counted."""
        make = step.recommender_initialiser(spec)
        params = make(jax.random.key(self.config.seed), catalogue=self.catalogue)
        return flatten_dict({'recommender': params}, sep='/')

    def nested(self) -> dict:
        """Return all parameters as a tree."""
        return unflatten_dict(self.params, sep='/')

    def stage_spec(self, stage: str) -> step.StepSpec | None:
        """Make the static part of a stage's step; None: the stage takes its model as it is."""
        if not self.config.stage[stage].steps:
            return None
        spec = step.make_spec(self.config, stage, self.spec, self.config.seed)
        return federated.with_rounds(spec, self.config, stage, self.final)

    def run_stage(self, stage: str, name: str = '') -> None:
        """Train a stage, or read its finished checkpoint, and add the rows that it makes.

        Args:
          stage: of config.STAGES.
          name: of its folder, where that is not the stage's.
        """
        name, c, spec = name or stage, self.config.stage[stage], self.stage_spec(stage)
        encoder = self.encoders.get(stage)
        self.params = handover.copied(self.params, stage, c.copy, self.taken)
        if spec and 'cluster' in spec.needs:
            self.catalogue = {**self.catalogue, 'cluster': recommenders.clusters(self)}
        self.params = recommenders.begun(self, name)
        self.first = recommenders.others(self.params)  # a refit draws a recommender's again
        folder = self.workdir / 'stages' / name
        folder.mkdir(parents=True, exist_ok=True)
        trained, rows, self.record = {}, {}, {'seconds': 0.0}
        if spec:
            self.look(stage, 'before', spec, encoder)
            self.background.results([self.compiling[name]] if name in self.compiling else [])
            trained, rows, self.record = fitting.fit(self, name, stage, spec)
        self.params = {**self.params, **trained}
        if stage == 'transfer' and self.config.model.blend.kind:
            self.params = handover.blended(self.params, self.config)
            trained = {p: x for p, x in trained.items() if not p.startswith('lora/distil/')}
        (folder / fitting.DONE).touch()
        self.seconds[name] = self.record['seconds']
        # K does not read again, or nothing was distilled
        if stage == 'transfer' and not rows and not (self.spec.reread and (spec or self.taken)):
            r = devices.compiled(partial(readers.adapt_items, self.spec))(
                self.nested(), self.catalogue['k'])
            rows = {'r': r.at[0].set(0)}
        if encoder is not None:
            begun = time.perf_counter()
            self.catalogue = self.catalogue | encoder.leave(
                self.nested(), rows=rows, **fitting.store_of(self, stage))
            if stage == 'knowledge':
                fitting.add_codes(self)
            self.sitting[f'{name}_encode'] = self.seconds[f'{name}_encode'] = (
                time.perf_counter() - begun)
            lost = ('of {different} different texts, read as {text_length} tokens of the '
                    '{tokenizer} tokenizer, training kept nothing. Fix: ').format(**self.texts)
            for name in encoder.names:
                tokenizers.check_rows(name, self.catalogue[name], f'{lost}{clouds.REMEDIES[name]}.')
            bases.save_adapters(self.workdir / 'adapters', self.config, self.base, trained)
        self.look(stage, 'after', spec, encoder)

    def look(self, stage: str, moment: str, spec, encoder) -> None:
        """Look at a stage's features while the next one runs, see `snapshots.take`."""
        if moment not in records.MOMENTS.get(stage, ()):
            return
        take = partial(snapshots.take, copy.copy(self), stage, moment, spec, encoder)
        if not self.background:
            return take()
        earlier = self.looks[-1:]  # whose file this one reads, and whose lines come first

        def in_turn():
            self.background.results(earlier)
            take()

        self.looks.append(self.background.submit(in_turn, LOOK))

    def count_both(self) -> None:
        """Add validation's sessions to the training sessions, for what is trained from here on."""
        both = sessions.join(self.data.train, self.data.valid)
        warm = sessions.warm_items(both, self.data.num_items)
        self.final = replace(self.data, train=both, warm=warm)
        self.count()

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
      config: of the run.
      workdir: of the run.
      stopping: asked between and within stages, see `hosts.together`.
      until: 'validation' ends the run once the recommender is trained, without reading test.
      profile: steps of every stage to trace and time, see `profiling.Profile`; 0: none.

    Returns:
      What results.json holds; until validation, {'valid': {metric: value}} at the chosen step.

    Raises:
      InputError: unusable input or config.
      Stopped: `stopping` returned True; the state is saved.
    """
    workdir, console = Path(workdir), Console(quiet=jax.process_index() > 0)
    validate.check_workdir(workdir)
    stages = validate.check(config)
    finished = {stage for stage in STAGES if fitting.is_finished(workdir, stage)}
    validate.check_inputs(config, stages, finished)
    enter(workdir, config)
    with locked(workdir):
        return _run(config, workdir, stopping, until, profile, stages, finished, console)


def _run(config, workdir, stopping, until, profile, stages, finished, console) -> dict:
    begun = time.perf_counter()
    job = Job(config, workdir, stopping, profile)
    claim(workdir, config.to_dict(), job.data.fingerprint)
    file = workdir / 'results.json'
    results_before = results.read(file) if file.is_file() else None
    made = results_before['provenance'] if results_before else {}
    if made and set(stages) <= set(made['stages']) and not (
            config.rivals.keys() - made.get('config', config).get('rivals', {}).keys()):
        tables.show(results_before, console)
        say(console, f'{file}: finished {results_before["provenance"]["date"]}, nothing was '
            'trained now; --workdir=DIR starts another run')
        return results_before
    stages = [stage for stage in STAGES if stage in finished.union(stages)]
    if until == 'validation' and 'recommend' in stages:
        stages = stages[:stages.index('recommend') + 1]  # later ones are not compiled either
    job.writer = log.Writer(workdir)
    try:
        if (table := job.data.num_items * config.model.width) > LARGE:
            startup.return_memory()
        # a trace of the device shows one stage at a time
        job.background = Background(0 if profile else workers(config.workers, job.devices, table))
        job.build(stages, console)
        job.seconds['read'] = time.perf_counter() - begun
        results.introduce(job, console)
        for line in validate.remarks(config, tuple(stages)):
            say(console, f'Warning: {line}')
        recorded = _run_stages(job, stages, until, console)
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
        job.writer.close()


def _run_stages(job, stages, until, console):
    """Run the stages and what is independent of them.

    Returns:
      See `Recommenders.finish`, and the task that tunes the baselines.
    """
    tuning, joint, taught = None, None, None
    company = recommenders.Recommenders(job)
    trains = 'recommend' in stages and until != 'validation'

    def tune(refit):  # with the features k of now: stage joint changes them
        rows = job.catalogue
        return partial(results.tune_baselines, job, rows.get('given', rows.get('k')), refit)

    for stage in stages:
        job.pause()
        if trains and 'recommend' in stages[stages.index(stage):]:
            company.begin(stage)
        # stage teach compares T with the tuned rules
        if tuning is None and stage != 'knowledge' and (not until or stage == 'teach'):
            tuning = job.background.submit(tune(trains and job.config.refit), TUNE)
        before = job.params
        job.run_stage(stage)
        if stage == 'teach':
            taught = gate.judge(job, *job.background.results([tuning], help_others=True))
            say(console, taught.facts['gate']['text'])
            if not taught.facts['gate']['open']:
                job.params, job.config = before, gate.without_distillation(job.config)
        if stage == 'recommend':
            if not trains:
                return None
            company.take_own()
        elif stage == 'joint':
            joint = copy.copy(job)
    scorers, chosen, facts = company.finish(joint) if trains or joint else ({}, {}, {})
    if taught:
        scorers['teacher'], chosen['teacher'], facts['teacher'] = taught
    job.background.results(job.looks)
    if tuning is None:
        tuning = job.background.submit(tune(False))
    return scorers, chosen, facts, tuning
