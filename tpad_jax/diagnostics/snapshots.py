"""The features of a run before and after a stage: looked at on validation sessions, kept, told.

    knowledge           k, an item's, by modality                         after
    transfer, joint     k and r of items, t, c and p of positions         before and after

What was found lies in workdir/diagnostics/<stage>-<moment>.json, the clouds themselves in .npz
beside it (float16, for the figure); a stage that is taken up again reads them there. One row per
session, in evaluation mode: nothing is dropped or withheld.
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
from tpad_jax.data.synthetic import wording
from tpad_jax.diagnostics import clouds as clouds_lib
from tpad_jax.diagnostics import probes
from tpad_jax.distributed.devices import compiled
from tpad_jax.models import outputs, tpad
from tpad_jax.models.knowledge import MODALITIES
from tpad_jax.types import Batch

MOMENTS = {'knowledge': ('after',), 'transfer': ('before', 'after'), 'joint': ('before', 'after')}
READ = ('k', 't', 'c', 'p', 'r', 'r_next')  # outputs of positions
PAIRS = {'align': ('k', 'c'), 'distil': ('r_next', 'p'), 'disentangle': ('c', 'p')}
ROWS = 64  # sessions a call reads
POSITIONS = 1000  # of the clouds
SIDE = ('brand', 'category', 'price')  # columns of the side features


def take(job, stage: str, moment: str, spec, encoder) -> dict | None:
    """Look at a stage's features, or read what was found; says what it means, warnings first.

    Args:
      job: job.Job with the parameters and rows of that moment. moment: 'before' or 'after'.
      spec: training.StepSpec of the stage; 0: it has no step, and only items are looked at.
      encoder: encode.Encoder of the rows the stage makes.

    Returns:
      What the file holds; None where the config or the stage asks for nothing, and on all processes
      but the first.
    """
    if (not job.config.diagnostics or moment not in MOMENTS.get(stage, ())
            or jax.process_index() != 0):
        return None
    if len(_sessions(job).target) < 2:
        return None
    directory = job.workdir / 'diagnostics'
    file = directory / f'{stage}-{moment}.json'
    if not file.is_file():
        begun = time.perf_counter()
        found, clouds = _look(job, stage, moment, spec, encoder)
        before = directory / f'{stage}-before.npz'
        if moment == 'after' and before.is_file():
            was = _load(before)
            for name, figures in found['features'].items():
                figures['cka_before'] = clouds_lib.linear_cka(was[name], clouds[name])
        directory.mkdir(parents=True, exist_ok=True)
        np.savez(directory / f'{stage}-{moment}.npz',
                 **{n: x.astype(np.float16) if x.dtype == np.float32 else x
                    for n, x in clouds.items()})
        files.write_json(file, found)  # last: without it nothing is there
        spent = job.seconds.get('diagnostics', 0.0) + time.perf_counter() - begun
        job.seconds['diagnostics'] = spent
    found = json.loads(file.read_text())
    console = Console()
    for line in found['warnings']:
        console.print(f'Warning: {line}', markup=False, highlight=False)
    if moment == 'after':
        before = directory / f'{stage}-before.json'
        was = json.loads(before.read_text()) if before.is_file() else None
        for line in lines(stage, was, found):
            console.print(line, markup=False, highlight=False)
    return found


def collect(workdir) -> dict:
    """All that was found in a workdir: {stage: {moment: ...}} and 'warnings', a list."""
    out = {}
    for stage, moments in MOMENTS.items():
        for moment in moments:
            file = workdir / 'diagnostics' / f'{stage}-{moment}.json'
            if file.is_file():
                out.setdefault(stage, {})[moment] = json.loads(file.read_text())
    told = [line for stage in out.values() for found in stage.values()
            for line in found.pop('warnings')]
    return {**out, 'warnings': told} if out else {}


def clouds(workdir) -> tuple[str, dict, str, dict] | None:
    """The clouds before alignment and after its last stage: (title, {name: array}), each.

    A cloud is float32 [n, M D], a modality of k in its own of the M places, as in r and c; 'items'
    and 'at', 'next' are the item ids of their rows.
    """
    directory = workdir / 'diagnostics'
    run = [stage for stage in ('transfer', 'joint') if all(  # and did not only hand on its rows
        (directory / f'{stage}-{moment}.json').is_file() for moment in MOMENTS[stage])]
    if not run:
        return None
    both = [_load(directory / f'{run[0]}-before.npz'), _load(directory / f'{run[-1]}-after.npz')]
    for found in both:
        for i, name in enumerate(MODALITIES):
            width = found[f'k_{name}'].shape[1]
            found[f'k_{name}'] = np.pad(found[f'k_{name}'], (
                (0, 0), (i * width, (len(MODALITIES) - 1 - i) * width)))
    return f'before {run[0]}', both[0], f'after {run[-1]}', both[1]


def labels(job) -> dict[str, np.ndarray]:
    """What is known of items 1..V: {attribute: int [V]}, below 0 where it is not."""
    if job.planted is not None:
        return dict(zip(wording.ATTRIBUTES, job.attributes.T, strict=True))
    data = job.data
    several = SIDE if len(data.side_sizes) == len(SIDE) and not job.config.data.ready else [
        f'side_{i}' for i in range(len(data.side_sizes))]
    return {name: ids if size == 2 and name not in SIDE else ids - 1  # of two, 0 is "not so"
            for name, ids, size in zip(several, data.side[1:].T, data.side_sizes, strict=False)}


def category(job) -> np.ndarray:
    """The one label of items 1..V that a figure colours them by, int [V], below 0 for none.

    The category, where there is one; else the first value that holds of those of a field of lists;
    else the first side feature.
    """
    known = labels(job)
    if 'category' in known:
        return known['category']
    held = [ids for ids, size in zip(known.values(), job.data.side_sizes, strict=False)
            if size == 2]
    if len(held) > 1:
        return np.where(np.any(held, axis=0), np.argmax(held, axis=0), -1)
    return next(iter(known.values()), np.full(job.data.num_items, -1))


def shown(specs: tuple) -> tuple[str, ...]:
    """List the metrics next to the progress bar: each loss, and the likelihood of a `club_fit`."""
    return tuple(name for spec in specs for name in (
        (spec.name, f'log_q/{spec.name}') if spec.fn is losses.club_fit else (spec.name,)))


def lines(stage: str, before: dict | None, after: dict) -> list[str]:
    """A stage's figures in words: ranks, estimates on held-out sessions, probes."""
    def both(part, name, key=None):
        found = [moment[part][name] if key is None else moment[part][name][key]
                 for moment in (before, after) if moment and name in moment[part]]
        return f'{name} ' + ' -> '.join(f'{x:.2f}' for x in found)

    out = [f'effective rank over {stage}, on {after["sessions"]} validation sessions: '
           + '  '.join(both('features', n, 'effective_rank') for n in after['features'])]
    told = [n for n in after['held_out'] if n.startswith(('mi_', 'room/', 'log_q/'))]
    if told:
        out.append('  nats there: ' + '  '.join(both('held_out', n) for n in told))
    for name, found in after['probes'].items():
        if found:
            out.append(f'linear probes on cold items, from {name}: '
                       + '  '.join(f'{n} {x["accuracy"]:.2f}' for n, x in found.items()))
    return out


def _look(job, stage, moment, spec, encoder):
    """What a file holds, and the clouds."""
    rows = _sessions(job)
    ids = np.union1d(rows.items, rows.next)  # of the padding item, too
    k = np.asarray(job.catalogue['k'])[ids].astype(np.float32)
    found = {f'k_{name}': k[1:, i] for i, name in enumerate(MODALITIES)}
    out = {'sessions': len(rows.target), 'pairs': {}, 'held_out': {}, 'probes': {}}
    kept = {'items': ids[1:]}
    if stage != 'knowledge':
        r = (np.asarray(job.catalogue['r'])[ids] if 'r' in job.catalogue
             else encoder.some(job.nested(), ids)['r'])
        r[0] = 0  # as in the catalogue; what the encoder read for it is none
        found['r'] = r[1:].reshape(len(r) - 1, -1)
    if stage != 'knowledge' and spec:
        params = {n: p for n, p in job.nested().items() if n != 'recommender'}
        params = job.devices.own.share(params)
        of = _positions(job, stage, spec.model, params, rows, ids, {'k': k, 'r': r})
        some = min(len(rows.target), max(2, job.config.stage[stage].batch_size))
        out['held_out'], embedded = _measure(spec, params, rows, ids, of, some)
        at = np.flatnonzero(rows.items)
        at = np.sort(np.random.default_rng(job.config.seed).permutation(at)[:POSITIONS])
        of = {name: x.reshape(-1, x.shape[-1])[at] for name, x in of.items()}
        found |= {name: of[name] for name in ('t', 'c', 'p')}
        kept |= {'at': rows.items.ravel()[at], 'next': rows.next.ravel()[at]}
        inside = at[at < some * rows.items.shape[1]]
        for name, (x, y) in PAIRS.items():
            common = embedded.get(name)
            out['pairs'][f'{x},{y}'] = clouds_lib.pair(
                *(a[:len(inside)] for a in (of[x], of[y])),
                common and tuple(np.asarray(a)[inside] for a in common))
    if moment == 'after':
        cut = {name: np.asarray(job.catalogue[name])[1:] for name in MAKES[stage]}
        out['probes'] = {name: probes.attributes(x, labels(job), job.data.warm[1:],
                                                 job.config.seed) for name, x in cut.items()}
    out['features'] = {name: clouds_lib.feature(x) for name, x in found.items()}
    news = {name: x for name, x in out['features'].items()
            if stage != 'transfer' or not name.startswith('k_')}  # those were told before
    told = (moment == 'after' or stage == 'transfer')
    held = out['held_out'] if moment == 'after' else {}  # q is not fitted yet
    out['warnings'] = clouds_lib.warnings(news, held, f'{moment} stage {stage}') if told else []
    return out, {**found, **kept}


def _sessions(job):
    """The validation sessions that are looked at, one row each: drawn by the run's seed."""
    rows = sessions.rows(job.data.valid, job.max_length, every_prefix=False)
    number = len(rows.target)
    chosen = np.random.default_rng([job.config.seed, number]).permutation(number)
    return jax.tree.map(lambda x: x[np.sort(chosen[:job.config.diagnostics])], rows)


def _positions(job, stage, model, params, rows, ids, tables):
    """{name: float32 [S, N, .]} of READ, for S sessions, some of them at a time.

    Args:
      ids: int [I], the items that occur, ascending, 0 first. tables: their rows {name: [I, ...]}.
    """
    full = model.form == 'full'
    size = max(1, job.config.stage[stage].batch_size // job.devices.shards) if full else ROWS
    catalogue = {**tables, 'warm': job.data.warm[ids]}
    read, parts = _reader(model), []
    for begin in range(0, len(rows.target), size):
        part = _batch(rows, ids, slice(begin, begin + size), size)
        if full:
            part = _with_content(part, ids, job.content)
        parts.append(jax.device_get(read(params, catalogue, part)))
    return {name: np.concatenate([np.asarray(p[name], np.float32) for p in parts])
            [:len(rows.target)] for name in READ}


def _measure(spec, params, rows, ids, of, some):
    """What the stage's losses log on the first `some` sessions; the pairs as critics compare them.

    Returns:
      {name: number} of the losses that read nothing but features of positions and critics, and
      {pair: (x, y)}, float [some * N, F] each.
    """
    available = {'items', 'next', *READ, 'club', *(f'critic.{n}' for n, _ in spec.model.critics)}
    chosen = tuple(replace(loss, weight=1.0, schedule=()) for loss in spec.losses
                   if loss.needs <= available and not loss.takes('key') and not loss.module)
    if not chosen:
        return {}, {}
    batch = _batch(rows, ids, slice(0, some), some)
    logged, embedded = _meter(spec.model, chosen)(
        params, {name: x[:some] for name, x in of.items()}, batch)
    logged.pop('loss')
    return {name: float(x) for name, x in logged.items()}, embedded


@lru_cache(maxsize=4)  # one compilation for all moments
def _reader(model: tpad.TPAD):
    def read(params, catalogue, batch):
        out = outputs.forward(model, params, batch, catalogue, frozenset(READ), frozenset())
        return {name: out[name] for name in READ}

    return compiled(read)


@lru_cache(maxsize=4)
def _meter(model: tpad.TPAD, chosen: tuple):
    names = frozenset({'items', 'next', 'club', *(f'critic.{name}' for name, _ in model.critics)})

    def measure(params, of, batch):
        out = outputs.forward(model, params, batch, {}, names, frozenset())
        _, _, logged = losses.combine(chosen, {**out, **of}, batch, losses.first_states(chosen))
        laid = {name: out[f'critic.{name}'].factors(*(
            of[x].reshape(-1, of[x].shape[-1]) for x in PAIRS[name]))
            for name, _ in model.critics if name in PAIRS}
        return logged, {name: both for name, both in laid.items() if both is not None}

    return compiled(measure)


def _batch(rows, ids, part: slice, size: int) -> Batch:
    """Rows as a batch of `size`, filled up; items are numbered as they stand in `ids`."""
    def fill(x):
        x = x[part]
        return np.pad(x, ((0, size - len(x)), *((0, 0),) * (x.ndim - 1)))

    items, following = (fill(np.searchsorted(ids, x).astype(np.int32))
                        for x in (rows.items, rows.next))
    target = fill(np.searchsorted(ids, rows.target).astype(np.int32))
    return Batch(items=items, next=following, target=target, valid=target > 0,
                 row=np.arange(size, dtype=np.int32))


def _with_content(batch: Batch, ids, content) -> Batch:
    """The content of a batch's own items, in rows that any batch of its size has room for."""
    size, positions = batch.items.shape
    present = np.union1d(np.union1d(batch.items, batch.next), 0)
    room = min(size * (positions + 1) + 1, len(ids))
    own = np.pad(ids[present], (0, room - len(present))).astype(np.int32)
    slots, following = (np.searchsorted(present, x).astype(np.int32)
                        for x in (batch.items, batch.next))
    return batch.replace(slots=slots, next_slots=following,
                         **batches.content_rows(content, own[None]))


def _load(file):
    with np.load(file, allow_pickle=False) as found:
        return {name: found[name].astype(np.float32) if found[name].dtype == np.float16
                else found[name] for name in found.files}
