"""The results of a finished run: every model on the same rows, results.json and the page."""

import datetime
import importlib.metadata
import json
import platform
import shutil
import subprocess
import time
from functools import partial
from pathlib import Path

import jax
import numpy as np

from tpad_jax.baselines import content_lasso, rules
from tpad_jax.config import names
from tpad_jax.core import console as console_lib, files, log as log_lib
from tpad_jax.core.console import say
from tpad_jax.data import audit, sessions, sources
from tpad_jax.diagnostics import records, transitions
from tpad_jax.errors import refusing
from tpad_jax.evaluation import compare, likelihood, lists, metrics, slices, statistics, tables
from tpad_jax.evaluation.evaluate import evaluate
from tpad_jax.job import recommenders
from tpad_jax.report import gallery, page
from tpad_jax.serving import artifact
from tpad_jax.training.loop import SPENT

PACKAGES = ('jax', 'flax', 'optax', 'orbax-checkpoint', 'tensorflow-datasets', 'grain', 'numpy')


def report(job, stages, scorers, chosen, facts, tuning, begun, console) -> dict:
    """Score everything on the same rows, write the results and the page, print the table.

    Args:
      job: job.Job.
      stages: the finished ones.
      scorers: {model: scorer} of the recommenders, the run's own first.
      chosen: {model: validation metrics}, see `score_models`.
      facts: {model: more that results.json holds of it}.
      tuning: background.Task of `tune_baselines`.
      begun: when the run began, by time.perf_counter.
      console: of the run.

    Returns:
      The content of results.json.
    """
    started = time.perf_counter()
    oracle_task = job.background.submit(partial(oracle_scores, job))
    tuned, = job.background.results([tuning])
    scorers.update({name: baseline.scorer for name, baseline in tuned.items()})
    chosen |= {name: baseline.valid for name, baseline in tuned.items()}
    facts |= {name: {'search': {'params': baseline.params, **baseline.record},
                     'calibration': baseline.calibration._asdict()}
              for name, baseline in tuned.items()}
    models, ranks = score_models(job, scorers, chosen, facts)
    (truth, truth_ranks), = job.background.results([oracle_task])
    job.seconds['report'] = time.perf_counter() - started
    # Stages count all their sittings, the rest this one. Those of earlier sittings may have run at
    # the same time, so that the total of a resumed run is an upper limit.
    here = time.perf_counter() - begun - sum(job.sitting.values())
    within = 'read', 'baselines', 'experts', 'report', 'diagnostics'
    job.seconds['total'] = here + sum(s for name, s in job.seconds.items() if name not in within)
    out = {'data': data_facts(job), 'audit': job.data.audit, 'models': models,
           # what training logged last
           'losses': {line['stage']: {name: x for name, x in line.items() if name != 'stage'}
                      for line in log_lib.read_log(job.workdir / 'log.jsonl') if 'loss' in line},
           'provenance': {**provenance(job), 'stages': stages},
           'seconds': job.seconds, 'spent': job.spent}
    if truth is not None:
        out['oracle'] = truth
    compared = transitions.measured(job)
    if diagnostics := records.collect(job.workdir) | compared:
        out['diagnostics'] = diagnostics
        probes = diagnostics.get('knowledge', {}).get('after', {}).get('probes', {}).get('k')
        out |= {'probes': {name: x['accuracy'] for name, x in probes.items()}} if probes else {}
    if 'tpad' in scorers:
        artifact.write(job, models['tpad']['is'], scorers['tpad'])
    write(job, out, ranks if truth is None else {**ranks, 'oracle': truth_ranks})
    file = write_page(job, out, scorers, ranks, console)
    tables.show(out, console)
    if compared:
        say(console, transitions.line(compared))
    waited = {name: sum(run[name] for run in job.spent.values()) for name in ('all', *SPENT)}
    waited['encode'] = sum(x for name, x in job.seconds.items() if name.endswith('_encode'))
    say(console, 'seconds of training: ' + ', '.join(f'{n} {x:.1f}' for n, x in waited.items()))
    say(console, f'results: {job.workdir / "results.json"}  ' + f'report: {file}  ' * bool(file)
        + f'total: {job.seconds["total"]:.0f} s')
    return out


def write_page(job, results: dict, scorers: dict, ranks: dict, console) -> Path | None:
    """Write the page of the run and the files that it reads next to results.json.

    Args:
      job: job.Job.
      results: the content of results.json.
      scorers: {model: scorer}.
      ranks: {model: {'above', 'equal'}} of the test rows.
      console: of the run, which prints the reason where there is no page.

    Returns:
      Its path, or None where it could not be made or no model was trained.
    """
    best = results['models'].get('tpad', {}).get('is', '')
    try:
        gallery.write(job, scorers, ranks, best)
        gallery.write_sheet(job.workdir)
        if not results['models']:
            say(console, 'report: none, because neither a recommender nor a baseline was trained')
            return None
        return page.write(job.workdir)
    except Exception as error:  # of any kind: a finished run is not lost over a page
        say(console, f'The page could not be made ({type(error).__name__}: {error}); the results '
            f'are complete. Fix: python -m tpad_jax.report {job.workdir} tries again.')
        return None


def score_models(job, scorers: dict, chosen: dict, facts: dict) -> tuple[dict, dict]:
    """Measure every scorer on validation and test.

    Args:
      job: job.Job.
      scorers: {model: scorer}.
      chosen: {model: validation metrics} of the moment when it was chosen. After a refit, which
        trains on these rows, they are the only ones.
      facts: {model: more that results.json holds of it}, its calibration among it.

    Returns:
      {model: {'valid': {...}, 'test': {...}, **facts}} and {model: {'above', 'equal'}} of the test
      rows. The test metrics have intervals, see `add_intervals`.
    """
    seen, warm, gains = training_counts(job), job.final.warm, metrics.registry(job.config.metrics)
    values = {metric: metrics.gain_table(gain, compare.AT) for metric, gain in gains.items()}
    truth = None if job.probabilities is None else remembering(job, job.probabilities)

    def score(name):
        job.pause()
        scorer = remembering(job, scorers[name])
        if job.final is job.data:
            valid, _ = evaluate(scorer, job.valid, warm, counts=seen, gains=gains, name=name)
        else:
            valid = chosen[name]
        test, rank = evaluate(scorer, job.test, warm, counts=seen, name=name, gains=gains,
                              probabilities=truth)
        add_intervals(test, job.test, warm, rank, values)
        if (calibration := facts.get(name, {}).get('calibration')) is not None:
            known = likelihood.Calibration(**calibration)
            predicted = likelihood.predicted(scorer, job.test, len(warm) - 1, known,
                                             seed=job.config.seed)
            test['nll'] = None if predicted is None else float(predicted[0].mean())
            if predicted is not None:
                test['reliability'] = lists.reliability(*predicted[1:])
        first = lists.first(scorer, job.test.read_by(scorer), len(warm) - 1, name=name)
        test['lists'] = lists.measured(
            first, job.test.target, seen, warm, job.catalogue.get('given', job.catalogue.get('k')))
        return {'valid': valid, 'test': test}, rank

    # a scorer with two names is measured once
    first = {id(scores): name for name, scores in reversed(scorers.items())}
    tasks = [job.background.submit(partial(score, name)) for name in first.values()]
    scored = dict(zip(first, job.background.results(tasks), strict=True))
    scored = {name: scored[id(scores)] for name, scores in scorers.items()}
    return ({name: x | facts.get(name, {}) for name, (x, _) in scored.items()},
            {name: x for name, (_, x) in scored.items()})


def remembering(job, scorer: metrics.Scorer) -> metrics.Scorer:
    """Keep the scores of all rows, which several measures read, if those of the test rows are few.

    It has no `ranks`: few scores are ranked on the host, which compiles nothing more.
    """
    if len(job.test.target) * (job.data.num_items + 1) > metrics.HELD:
        return scorer
    kept = {}

    def scores(items):
        key = items.tobytes()
        if key not in kept:
            kept[key] = scorer(items)
        return kept[key]

    scores.reads = getattr(scorer, 'reads', None)
    return scores


def training_counts(job) -> np.ndarray:
    """Count the training events of every item, after a refit with validation's: int64 [V + 1]."""
    return sessions.counts(job.final.train, job.final.num_items)


def add_intervals(result: dict, rows, warm: np.ndarray, rank: dict,
                  gains: dict = compare.BUILT_IN) -> None:
    """Add 'interval' to a result and to its slices 'warm' and 'cold', in place.

    {metric: [low, high]}: 95 % by bootstrap over sessions, of every metric at 20; None where fewer
    than two sessions have rows.

    Args:
      result: of `evaluate`.
      rows: its R rows.
      warm: bool [V + 1].
      rank: its {'above', 'equal'}.
      gains: the metrics' values by place, see `compare.Run`.
    """
    earned = compare.earned(gains, rank['above'], rank['equal'])
    known = warm[rows.target]
    session = np.unique(rows.session, return_inverse=True)[1]
    edges = statistics.intervals(*statistics.sliced(
        earned, (np.ones(len(earned), bool), known, ~known), session))
    parts = result, result['slices']['warm'], result['slices']['cold']
    for part, bounds in zip(parts, map(partial(map, compare.interval), edges), strict=True):
        part['interval'] = dict(zip(compare.named(gains), bounds, strict=True))


def tune_baselines(job, features: np.ndarray | None, refit: bool) -> dict:
    """Tune the baselines of the config on validation.

    Args:
      job: job.Job.
      features: float [V+1, ...]. Item features for those that read some; None: there are none.
      refit: whether they are fitted on validation's sessions too, as the recommender is.

    Returns:
      {name: rules.Tuned}.
    """
    data, out, begun = job.config.data, {}, time.perf_counter()
    if features is not None:
        features = np.asarray(features).reshape(len(features), -1)
    ordered = None if job.source.timed else data.ordered
    train = job.data.train
    final = sessions.join(train, job.data.valid) if refit else train
    for name in names(job.config.baselines):
        job.pause()
        rows = features if name in rules.CONTENT else None
        if name == 'content_lasso':
            rows = content_lasso.wanted(job.config, job.data)
        if name in rules.CONTENT and rows is None:
            continue  # no stage has read the items, and no file holds their features
        out[name] = rules.tune(
            name, train, job.valid, job.data.num_items, trials=job.config.search.trials,
            seed=job.config.seed, storage=job.workdir / 'search.journal', final=final,
            features=rows, ordered=ordered)
    job.seconds['baselines'] = time.perf_counter() - begun
    return out


def data_facts(job) -> dict:
    """Describe the data, as results.json does under 'data'."""
    data, content = job.data, {}
    if job.content is not None:
        content = {'items_without_image': int((~job.content.has_image[1:]).sum()),
                   'images': job.content.pictures, 'texts': job.texts, 'missing': job.missing}
    lengths = {split: len(getattr(data, split).start) for split in ('train', 'valid', 'test')}
    if job.config.data.window:
        days = (data.test.start[[0, -1]] // sessions.DAY).astype('datetime64[D]')
        content['test_days'] = days.astype(str).tolist()
    return {'lines': data.lines, 'form': data.form, 'items': data.num_items, **content,
            'cold_items': int((~data.warm[1:]).sum()), 'sessions': lengths,
            'catalogue': {'choice': job.config.data.catalogue, 'items': data.choices,
                          'missed_test_rows': int((job.test.target == 0).sum())},
            'planted': job.planted is not None, 'protocol': job.config.data.protocol,
            'refit': job.final is not job.data, 'fingerprint': data.fingerprint}


def introduce(job, console):
    """Print the first lines of a run: its data, how they were cut, and their audit.

    Args:
      job: job.Job.
      console: of the run.
    """
    data, facts = job.data, data_facts(job)
    pictures = ('no content' if job.content is None
                else f'{facts["items_without_image"]} without image')
    console_lib.print_header(f'TPAD  {job.config.name}', {
        'data': sources.origin(job.config),
        **({'sessions read': _line_counts(facts['lines'])} if job.content is None else
           {'raw lines': _line_counts(facts['lines']), 'images': _line_counts(facts['images'])}),
        **({} if job.content is None else {'texts': _texts(facts['texts'])}),
        'items': f'{facts["items"]}, {facts["cold_items"]} cold, {pictures}',
        'catalogue': choices_of(job.config.data.catalogue, data.choices) + (
            f'; the next item of {missed} of {len(job.test.target)} test rows is not ranked: a miss'
            if (missed := facts['catalogue']['missed_test_rows']) else ''),
        'sessions': ', '.join(f'{n} {split}' for split, n in facts['sessions'].items()),
        'devices': f'{job.devices.shards} {jax.default_backend()} by {job.devices.how}'
                   + f' in {job.devices.processes} processes' * (job.devices.processes > 1),
        'workdir': job.workdir}, console)
    if left_out := recommenders.left_out(job):
        say(console, 'Trained baselines that are left out, because nothing makes the rows they '
            f'read: {", ".join(left_out)}.')
    for line in audit.describe(data.audit):
        say(console, line)
    # a prior that cannot be used is refused here, before anything is trained
    if (known := content_lasso.wanted(job.config, data)) and known.record:
        say(console, f'{job.config.data.prior}: {known.record["pairs"]} pairs of attributes, '
            f'{known.record["unknown"]} more with one that is not among the {len(known.names)} '
            'most frequent ones here.')


def choices_of(choice: str, counts: dict) -> str:
    """Describe how many items each choice has: 'all: 1547 items (reviewed: 147, sessions: 101)'.

    Args:
      choice: `config.data.catalogue`.
      counts: `choices` of the data.
    """
    others = ', '.join(f'{name}: {n}' for name, n in counts.items() if name != choice)
    return f'{choice}: {counts[choice]} items ({others})'


def _texts(facts):
    return (f'{facts["tokenizer"]} tokenizer, {facts["tokens_per_word"]:.1f} tokens a word, '
            f'{facts["share_that_fit"]:.0%} fit in {facts["text_length"]} tokens')


def _line_counts(counts):
    reasons = ', '.join(f'{n} {reason}' for reason, n in counts['rejected'].items()) or 'none'
    return f'{counts["read"]} read, {counts["kept"]} kept, rejected: {reasons}'


def provenance(job) -> dict:
    """Describe the config, the code's version and the machine of a run."""
    config, commit = job.config, ''
    if (Path(__file__).parents[2] / '.git').exists() and shutil.which('git'):
        commit = subprocess.run(['git', 'rev-parse', 'HEAD'], cwd=Path(__file__).parent,
                                capture_output=True, text=True, check=False).stdout.strip()
    return {'config': config.to_dict(), 'seed': config.seed, 'commit': commit or 'not a checkout',
            'packages': {name: importlib.metadata.version(name) for name in PACKAGES},
            'python': platform.python_version(), 'backend': jax.default_backend(),
            'device': jax.local_devices()[0].device_kind, 'devices': job.devices.shards,
            'date': datetime.datetime.now(datetime.UTC).isoformat(timespec='seconds')}


def oracle_scores(job) -> tuple[dict | None, dict | None]:
    """Measure the oracle on test: metrics and ranks, or (None, None) without a known truth."""
    if job.probabilities is None:
        return None, None
    truth = remembering(job, job.probabilities)
    return evaluate(truth, job.test, job.final.warm, probabilities=truth,
                    counts=training_counts(job), gains=metrics.registry(job.config.metrics),
                    name='oracle')


def write(job, results: dict, ranks: dict) -> None:
    """Write results.json, and every model's test ranks per row into ranks.npz for `compare`.

    Args:
      job: job.Job.
      results: the content of results.json.
      ranks: {model: {'above', 'equal'}} of the test rows.
    """
    rows, data = job.test, job.final
    np.savez_compressed(job.workdir / compare.FILE, **compare.contents(
        rows.session, rows.target, data.fingerprint, data.num_items,
        slices.features(rows, data.warm, training_counts(job)), ranks,
        metrics.registry(job.config.metrics)))
    files.write_json(job.workdir / 'results.json', results)


def read(file: Path) -> dict:
    """Read the results of a finished run.

    Raises:
      InputError: they are damaged.
    """
    with refusing((ValueError, KeyError, TypeError), f'{file} is damaged', 'Expected the results '
                  'of a finished run. Fix: delete it; the same command makes it again'):
        results = json.loads(file.read_text())
        results['models'], results['provenance']['stages'], results['provenance']['date']
    return results
