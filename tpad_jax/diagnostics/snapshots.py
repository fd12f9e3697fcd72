"""Measures the features of a run before and after a stage, on validation sessions.

    knowledge           k of items, by modality                           after
    transfer, joint     k and r of items, t, c and p of positions         before and after

The record of a moment is in workdir/diagnostics/<stage>-<moment>.json, its clouds in .npz next to
it (float16, for the plots). A resumed stage reads the record again. Each session is one row, in
evaluation mode: no dropout, and complete items.
"""

import json
import time
from dataclasses import replace
from functools import lru_cache

import jax
import numpy as np
from rich.console import Console

from tpad_jax import losses
from tpad_jax.config import MAKES
from tpad_jax.core import files
from tpad_jax.data import batches, sessions
from tpad_jax.diagnostics import clouds as clouds_lib, probes, records
from tpad_jax.distributed.devices import compiled
from tpad_jax.models import mllms, outputs, tpad
from tpad_jax.types import Batch

READ = ('k', 't', 'c', 'p', 'r', 'r_next')  # outputs of positions
PAIRS = {'align': ('k', 'c'), 'distil': ('r_next', 'p'), 'disentangle': ('c', 'p')}
ROWS = 64  # sessions a call reads
POSITIONS = 1000  # of the clouds


def take(job, stage: str, moment: str, spec, encoder) -> dict | None:
    """Measure a stage's features, or read the stored record, and print it, warnings first.

    Args:
      job: job.Job with the parameters and rows of that moment.
      stage: its name.
      moment: one of the stage's MOMENTS.
      spec: StepSpec of the stage; 0: it has no step, and only items are measured.
      encoder: Encoder of the rows that the stage makes.

    Returns:
      The record, or None: if the config has no diagnostics or validation has fewer than two
      sessions, and on all processes except the first.
    """
    if not job.config.diagnostics or jax.process_index() or len(_sessions(job).target) < 2:
        return None
    folder = job.workdir / records.FOLDER
    file, before = folder / f'{stage}-{moment}.json', folder / f'{stage}-before.json'
    if not file.is_file():
        start = time.perf_counter()
        record, clouds = _measured(job, stage, moment, spec, encoder)
        if moment == 'after' and before.with_suffix('.npz').is_file():
            earlier = records.load(before.with_suffix('.npz'))
            for name, numbers in record['features'].items():
                numbers['cka_before'] = clouds_lib.linear_cka(earlier[name], clouds[name])
        folder.mkdir(parents=True, exist_ok=True)
        np.savez(file.with_suffix('.npz'), **{
            n: x.astype(np.float16) if x.dtype == np.float32 else x for n, x in clouds.items()})
        files.write_json(file, record)  # last: a moment without this file is measured again
        spent = job.seconds.get('diagnostics', 0.0) + time.perf_counter() - start
        job.seconds['diagnostics'] = spent
    record = json.loads(file.read_text())
    text = [f'Warning: {line}' for line in record['warnings']]
    if moment == 'after':
        earlier = json.loads(before.read_text()) if before.is_file() else None
        text += records.lines(stage, earlier, record)
    for line in text:
        Console().print(line, markup=False, highlight=False)
    return record


def shown(specs: tuple) -> tuple[str, ...]:
    """List the metrics next to the progress bar: each loss, and the likelihood of a `club_fit`."""
    return tuple(name for spec in specs for name in (
        (spec.name, f'log_q/{spec.name}') if spec.fn is losses.club_fit else (spec.name,)))


def _measured(job, stage, moment, spec, encoder):
    """The record of a moment, and its clouds."""
    rows = _sessions(job)
    ids = np.union1d(rows.items, rows.next)  # the padding item is one of them
    k = np.asarray(job.catalogue['k'])[ids].astype(np.float32)
    # a text encoder's rows have the last modality alone
    clouds = {f'k_{name}': k[1:, i] for i, name in enumerate(mllms.MODALITIES[-k.shape[1]:])}
    record = {'sessions': len(rows.target), 'pairs': {}, 'held_out': {}, 'probes': {}}
    item_ids, after = {'items': ids[1:]}, moment == 'after'
    if stage != 'knowledge':
        r = (np.asarray(job.catalogue['r'])[ids] if 'r' in job.catalogue
             else encoder.some(job.nested(), ids)['r'])
        r[0] = 0  # as in the catalogue; the encoder's output for padding has no meaning
        clouds['r'] = r[1:].reshape(len(r) - 1, -1)
    if stage != 'knowledge' and spec:
        params = {n: p for n, p in job.nested().items() if n != 'recommender'}
        params = job.devices.own.share(params)
        features = _positions(job, stage, spec.model, params, rows, ids, {'k': k, 'r': r})
        some = min(len(rows.target), max(2, job.config.stage[stage].batch_size))
        record['held_out'], embedded = _held_out(spec, params, rows, ids, features, some)
        at = np.flatnonzero(rows.items)
        at = np.sort(np.random.default_rng(job.config.seed).permutation(at)[:POSITIONS])
        features = {name: x.reshape(-1, x.shape[-1])[at] for name, x in features.items()}
        clouds |= {name: features[name] for name in ('t', 'c', 'p')}
        item_ids |= {'at': rows.items.ravel()[at], 'next': rows.next.ravel()[at]}
        inside = at[at < some * rows.items.shape[1]]  # positions that critics have compared
        record['pairs'] = {f'{x},{y}': clouds_lib.pair(
            features[x][:len(inside)], features[y][:len(inside)],
            tuple(np.asarray(a)[inside] for a in embedded.get(name, ())))
            for name, (x, y) in PAIRS.items()}
    if after:
        known = probes.known_attributes(job)
        record['probes'] = {name: probes.attributes(
            np.asarray(job.catalogue[name])[1:], known, job.data.warm[1:], job.config.seed)
            for name in MAKES[stage]}
    record['features'] = {name: clouds_lib.feature(x) for name, x in clouds.items()}
    # Stage knowledge has warned of k already, and stage joint starts where transfer ended. Before
    # a stage, q is not fitted yet. Without pictures, k of the image is constant.
    c = job.content
    unseen = [] if c.image.shape[1] and c.has_image[ids].any() else ['k_image']
    watched = {name: x for name, x in record['features'].items()
               if not (stage == 'transfer' and name.startswith('k_')) and name not in unseen}
    record['warnings'] = [] if (stage, moment) == ('joint', 'before') else clouds_lib.warnings(
        watched, record['held_out'] if after else {}, f'{moment} stage {stage}')
    return record, {**clouds, **item_ids}


def _sessions(job):
    """The validation sessions that are read, one row each, drawn by the run's seed."""
    rows = sessions.rows(job.data.valid, job.max_length, every_prefix=False)
    number = len(rows.target)
    order = np.random.default_rng([job.config.seed, number]).permutation(number)
    return jax.tree.map(lambda x: x[np.sort(order[:job.config.diagnostics])], rows)


def _positions(job, stage, model, params, rows, ids, tables):
    """Compute READ for S sessions, part by part: {name: float32 [S, N, .]}.

    Args:
      job: job.Job.
      stage: whose batch size limits a part, if the Transfer-MLLM reads whole items.
      model: tpad.TPAD.
      params: nested parameters on this process's devices.
      rows: S rows.
      ids: int [I]. The items that occur, ascending, 0 first.
      tables: {name: [I, ...]}, rows of these items.
    """
    size, content = ROWS, None
    if model.form == 'full':
        size = max(1, job.config.stage[stage].batch_size // job.devices.shards)
        content = job.content
    catalogue = {**tables, 'warm': job.data.warm[ids]}
    parts = [jax.device_get(_reader(model)(
        params, catalogue, _batch(rows, ids, slice(begin, begin + size), size, content)))
        for begin in range(0, len(rows.target), size)]
    return {name: np.concatenate([np.asarray(part[name], np.float32) for part in parts])
            [:len(rows.target)] for name in READ}


def _held_out(spec, params, rows, ids, features, some):
    """Evaluate the stage's losses on the first `some` sessions, and embed the pairs.

    Returns:
      {name: number} of the losses that read only features of positions and critics, and
      {pair: (x, y)}, float [some * N, F] each, as the critics compare them.
    """
    available = {'items', 'next', *READ, 'club', *(f'critic.{n}' for n, _ in spec.model.critics)}
    chosen = tuple(replace(loss, weight=1.0, schedule=()) for loss in spec.losses
                   if loss.needs <= available and not loss.takes('key') and not loss.module)
    if not chosen:
        return {}, {}
    batch = _batch(rows, ids, slice(0, some), some)
    logged, embedded = _meter(spec.model, chosen)(
        params, {name: x[:some] for name, x in features.items()}, batch)
    logged.pop('loss')
    return {name: float(x) for name, x in logged.items()}, embedded


@lru_cache(maxsize=4)  # one compilation for all moments
def _reader(model: tpad.TPAD):
    def read(params, catalogue, batch):
        out = outputs.forward(model, params, batch, catalogue, frozenset(READ), frozenset())
        return {name: out[name] for name in READ}

    return compiled(read, seldom=True)


@lru_cache(maxsize=4)
def _meter(model: tpad.TPAD, chosen: tuple):
    names = frozenset({'items', 'next', 'club', *(f'critic.{name}' for name, _ in model.critics)})

    def measure(params, features, batch):
        out = outputs.forward(model, params, batch, {}, names, frozenset())
        states = losses.first_states(chosen)
        _, _, logged = losses.combine(chosen, {**out, **features}, batch, states)
        factors = {name: out[f'critic.{name}'].factors(*(
            features[x].reshape(-1, features[x].shape[-1]) for x in PAIRS[name]))
            for name, _ in model.critics if name in PAIRS}
        return logged, {name: pair for name, pair in factors.items() if pair is not None}

    return compiled(measure, seldom=True)


def _batch(rows, ids, part: slice, size: int, content=None) -> Batch:
    """Rows as a batch of `size`, filled up; items are numbered by their place in `ids`.

    With `content`, the batch has the content of its items, in a number of rows that fits any batch
    of its size.
    """
    def fill(x):
        places = np.searchsorted(ids, x[part]).astype(np.int32)
        return np.pad(places, ((0, size - len(places)), *((0, 0),) * (x.ndim - 1)))

    items, following, target = map(fill, (rows.items, rows.next, rows.target))
    batch = Batch(items=items, next=following, target=target, valid=target > 0,
                  row=np.arange(size, dtype=np.int32))
    if content is None:
        return batch
    width = min(items.size + size + 1, len(ids))
    return batch.replace(**batches.with_content({'items': ids[items], 'next': ids[following]},
                                                content, 1, width))
