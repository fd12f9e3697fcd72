"""Update a finished run by new items, sessions and events.

The MLLM reads the new items alone. The recommender continues from its parameters on the new
sessions and a replay of old ones, drawn by their weight. The experts keep their fitted weights, and
their tables are counted again, where a session weighs half after every half-life [ours].

An update is a folder, WORKDIR/updates/NUMBER, which is complete before WORKDIR/current names it:

    served/        the artefact
    data/          all items and sessions, for the next update
    features/      rows of the items
    state.safetensors, about.json, drift.json
"""

import json
import shutil
import time
from collections import Counter
from collections.abc import Callable
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict
from safetensors.numpy import load_file

from tpad_jax.baselines import content_lasso
from tpad_jax.config import names
from tpad_jax.core import files, log
from tpad_jax.data import sessions as sessions_lib, sources
from tpad_jax.data.events import attached
from tpad_jax.data.sources import additions, external_features
from tpad_jax.errors import Stopped, refuse_if, refusing
from tpad_jax.evaluation import experts
from tpad_jax.features import store
from tpad_jax.job import fitting, gate, recommenders
from tpad_jax.job.job import Job
from tpad_jax.serving import artifact, new_items, recommender
from tpad_jax.training import checkpoint, step
from tpad_jax.training.workdir import config_of, locked

ID = 'recommender/fusion/id'
STATE, ABOUT, DRIFT = 'state.safetensors', 'about.json', 'drift.json'
EPOCHS = 3.0  # over the new sessions and the replay
REPLAY = 1.0  # old sessions for each new one
RATE = 0.25  # of the learning rate of stage recommend
READ = 512  # items whose content is in memory
LEAST = 1e-30  # weight of a session: the replay is drawn by weights, and none of them may be 0


def update(run: Path, directory: Path, *, held_out: float = 0.1, half_life: float = 0.0,
           base: str = '', stopping: Callable[[], bool] = lambda: False) -> dict:
    """Update a run and serve the result from then on.

    Args:
      run: workdir of a finished run.
      directory: of the new files, see data/sources/additions.py.
      held_out: share of the new sessions, the newest, on which both artefacts are measured.
      half_life: days after which a session weighs half; 0: as the update before, at first the time
        that the run's sessions span. Without times it is counted in sessions.
      base: directory of the run's MLLM if it moved.
      stopping: asked between and within the steps.

    Returns:
      The drift report, see docs/updating.md.

    Raises:
      InputError: the run or the new files are unusable, or the run has an option that an update
        does not know.
      Stopped: `stopping` returned True. The artefact before is served.
    """
    config, seconds = config_of(run), {}
    with locked(run):
        before = artifact.read(run)
        _check(config, before)
        with _timed(seconds, 'read'):
            known, about = _known(run, config, before)
            new = additions.read(config, directory, known)
            data, kept = additions.merge(config, known, new, held_out)
            data = attached(data, config)
        items = [{**item, 'id': item['asin'], 'image': new.pictures[row]} for row, item in
                 zip(kept.tolist(), new.items[kept].iter_rows(named=True), strict=True)]
        about = {'before': before.directory.parent.relative_to(run).as_posix(),
                 'half_life': half_life or about['half_life'], 'new': str(directory.resolve())}
        updates = run / artifact.UPDATES
        number = 1 + max([0, *(int(x.name) for x in updates.glob('*') if x.name.isdigit())])
        target, folder = (updates / f'{number:04d}{end}' for end in ('', files.PARTIAL))
        for leftover in updates.glob(f'*{files.PARTIAL}'):  # of an update that was killed
            shutil.rmtree(leftover)
        job = Job(config, folder, stopping, data=data)
        refuse_if(not job.valid.target.any(), f'--held_out={held_out}: no event of the '
                  f'{len(data.valid.start)} held-out sessions is predicted. Expected some. Fix: '
                  'raise it')
        rows, unused = _rows(before, known, items, directory, base, seconds, config.data.features)
        if stopping():
            raise Stopped('stopped; the artefact before is served')
        share = _shares(data.train, about['half_life'])
        old = len(additions.history(known).start)
        bound, ids = _train(job, before, known, rows, share, old, seconds)
        events = np.bincount(data.train.items, share[data.train.owner], data.num_items + 1)
        _write(job, before, bound, ids, rows, np.ceil(events).astype(np.int64))
        with _timed(seconds, 'evaluate'):
            drift = {'update': number, **_drift(job, before, share, old)}
        drift |= {'lines': new.lines, 'pictures': dict(unused), 'seconds': seconds}
        files.write_json(folder / DRIFT, drift)
        files.write_json(folder / ABOUT, about)
        folder.rename(target)
        files.write_text(run / artifact.POINTER, f'{artifact.UPDATES}/{target.name}\n')
    return drift


def rollback(run: Path) -> str:
    """Serve the artefact before the current one.

    Args:
      run: workdir of the run.

    Returns:
      Its folder below the workdir, '.' for that of the run itself.

    Raises:
      InputError: the run was never updated, or the artefact before is damaged.
    """
    with locked(run):
        current = artifact.place(run).parent
        refuse_if(current == run, f'{run}: it serves what the run itself trained. Expected an '
                  'update. Fix: none is needed')
        with refusing((OSError, ValueError, KeyError), f'{current / ABOUT}: damaged', 'Fix: write '
                      f'updates/NUMBER of an earlier update into {run / artifact.POINTER}, or '
                      'delete that file to serve the run itself'):
            before = json.loads((current / ABOUT).read_text())['before']
        artifact.read(run, run / before / artifact.FOLDER)
        files.write_text(run / artifact.POINTER, '' if before == '.' else f'{before}\n')
    return before


def line(drift: dict) -> str:
    """Describe a drift report in a few lines."""
    old, new, shift = (*(drift['held_out'][x] for x in ('before', 'after')),
                       drift['popularity_shift'])
    return (f'update {drift["update"]}: {drift["items"]["new"]} new items '
            f'({drift["items"]["share"]:.1%} of the catalogue, {drift["items"]["events"]:.1%} of '
            f'the new events), {drift["sessions"]["new"]} new sessions\n'
            f'popularity: {shift["found"]:.1%} of the events moved to other items '
            f'({shift["chance"]:.1%} by chance)\n'
            f'newest {drift["held_out"]["sessions"]} sessions: hit@20 {old["hit@20"]:.4f} before, '
            f'{new["hit@20"]:.4f} now; nll {old["nll"]:.3f} before, {new["nll"]:.3f} now')


def _check(config, before) -> None:
    """Refuse runs that an update would not continue as they were trained."""
    again = 'Fix: train again on all data'
    refuse_if('recommend' in names(config.federated.stages), 'config.federated.stages='
              f'{config.federated.stages!r}: an update has no clients. {again}')
    option = before.directory
    refuse_if(any(spec.memory for spec in before.specs), f'{option}: its recommender has a memory '
              f'of sessions (config.model.memory), which an update does not fit. {again}')
    read = {name for spec in before.specs for name in spec.recommend}
    refuse_if(not read <= {'k', 'r'} and read != {'given'}, f'{option}: its recommender reads '
              f'{", ".join(sorted(read))}. Expected k and r, or given. {again}')
    needs = frozenset().union(*(loss.needs for loss in step.stage_losses(
        gate.without_distillation(config), 'recommend')))
    refuse_if(not needs <= recommenders.ALONE, 'config.losses: those of stage recommend read '
              f'{", ".join(sorted(needs - recommenders.ALONE))}. Expected outputs of the '
              f'recommender alone. {again}')


def _known(run, config, before):
    """Return the data of the artefact before, and the record of its update."""
    folder = before.directory.parent
    if folder != run:
        with refusing(artifact.UNREADABLE, f'{folder}: damaged', 'Fix: python -m tpad_jax.update '
                      f'{run} --rollback'):
            return (additions.restore(folder / 'data'), json.loads((folder / ABOUT).read_text()))
    sources.chosen(config).check(config)
    data = sources.load(config, run)
    refuse_if(data.fingerprint != before.about['data'], f'{sources.origin(config)}: not the data '
              'that the run was trained on. Expected the same. Fix: restore them')
    if config.refit and before.about['features'] != 'joint':  # it was trained on both
        data = replace(data, warm=sessions_lib.warm_items(
            sessions_lib.join(data.train, data.valid), data.num_items))
    start = additions.history(data).start
    return data, {'half_life': float((start[-1] - start[0]) / sessions_lib.DAY or len(start))}


@contextmanager
def _timed(seconds: dict, name: str):
    begun = time.perf_counter()
    yield
    seconds[name] = time.perf_counter() - begun


def _shares(train, half_life: float) -> np.ndarray:
    """Weigh every session: float64 [S], half after each half-life before the newest one."""
    age = (train.start[-1] - train.start) / sessions_lib.DAY
    if not age.any():  # there are no times
        age = np.arange(len(age))[::-1]
    return np.maximum(0.5 ** (age / half_life), LEAST)


def _rows(before, known, items, directory, base, seconds, features) -> tuple[dict, Counter]:
    """Read the rows of all items, from files and, of the new items, by the MLLM.

    Returns:
      {name: float32 [V+1, ...]}, and {reason: pictures that could not be read}.
    """
    folder, unused = before.directory.parent, Counter()
    wanted = {name for spec in before.specs for name in spec.recommend}
    if before.experts and len(before.experts['tables']['axes']) > 1 and 'given' not in wanted:
        wanted |= {'k'}  # the experts' content
    rows, read = {}, []
    for name in sorted(wanted):
        places = (folder / 'features' / place for place in (before.about['features'], 'knowledge'))
        place = next((x for x in places if (x / f'{name}.npy').is_file()), None)
        rows[name] = (external_features.read(features, known.asins).rows
                      if place is None and name == 'given' else store.read(
                          place or folder / 'features', name))
    if 'given' in rows and items:
        read = [{'given': external_features.read(
            directory / Path(features).name, ['', *(item['id'] for item in items)]).rows[1:]}]
    elif rows and items:
        with _timed(seconds, 'load'):
            reader = new_items.Reader(before, base)
        # the first call compiles
        with _timed(seconds, 'compile_encode'):
            read = [reader.features(items[:new_items.ROWS], unused)]
        with _timed(seconds, 'encode'):
            read += [reader.features(items[begin:begin + READ], unused)
                     for begin in range(new_items.ROWS, len(items), READ)]
    return {name: np.concatenate([x, *(part[name] for part in read)])
            for name, x in rows.items()}, unused


def _ids(run, config, before, i) -> np.ndarray | None:
    """Read the trained id embeddings of a recommender, which the artefact does not hold."""
    folder = before.directory.parent
    if (folder / STATE).is_file():
        return load_file(folder / STATE).get(f'{i}')
    name = 'joint' if before.about['features'] == 'joint' else ('recommend', 'partner')[i]
    if config.refit and name != 'joint':
        name = ('refit', 'partner_refit')[i]
    found = checkpoint.chosen_parameters(run / 'stages' / name).get(ID)
    return None if found is None else np.asarray(found)


def _train(job, before, known, rows, share, old, seconds):
    """Continue the recommenders and count the experts' tables.

    Args:
      job: of the update.
      before: the artefact before.
      known: its data.
      rows: of `_rows`.
      share: float64 [S]. Weights of the training sessions.
      old: how many of the sessions the run knew.
      seconds: gets those of the parts.

    Returns:
      scorers.Bound of the model, and {index of a recommender: its id embeddings}.
    """
    data, run, config = job.data, job.workdir.parents[1], job.config
    rng, fresh = np.random.default_rng([config.seed, old]), np.arange(old, len(share))
    replayed = rng.choice(old, min(old, round(REPLAY * len(fresh))), replace=False,
                          p=share[:old] / share[:old].sum())
    part = sessions_lib.take(data.train, np.append(np.sort(replayed), fresh))
    stage = config.stage.recommend
    count = np.maximum(part.lengths - 1, 0)
    count = int((count if stage.every_prefix else count > 0).sum())
    job.config = config = gate.without_distillation(config)
    config.stage.recommend.update(
        steps=max(1, round(EPOCHS * count / stage.batch_size)), epochs=0.0, eval_every=0,
        learning_rate=RATE * stage.learning_rate)
    job.catalogue = {name: jnp.asarray(x) for name, x in rows.items()}
    job.spec, job.params, ids = job.modules(None, config), {}, {}
    job.count()
    members = [job, *([recommenders.partner_job(job)] if len(before.specs) > 1 else [])]
    for i, (member, (params, _)) in enumerate(zip(members, before.weights, strict=True)):
        member.params = {path: jnp.asarray(x) for path, x in flatten_dict(params, sep='/').items()}
        if ID in member.params:
            member.params[ID] = _extended(_ids(run, config, before, i), member.params, known,
                                          data.num_items)
        member.final = replace(data, train=part)
        name = ('recommend', 'partner')[i]
        with closing(log.Writer(job.workdir)) as member.writer:
            trained, _, _ = fitting.fit(member, name, 'recommend', member.stage_spec('recommend'),
                                        steps=member.config.stage.recommend.steps)
        member.params, member.final = member.params | trained, data
        ids |= {f'{i}': member.params[ID]} if ID in member.params else {}
    spent = {part: sum(x[part] for x in job.spent.values()) for part in ('all', 'compile')}
    seconds |= {'compile_train': spent['compile'], 'train': spent['all'] - spent['compile']}
    mixture = None
    with _timed(seconds, 'count'):
        if before.experts:
            weights = before.experts['weights']
            fit = experts.Fit({name: float(weights.get(name, 0)) for name in experts.WEIGHTS}, 0.0,
                              0, float(before.experts['tables']['decay']))
            table = recommenders.tables(job, None, share)
            if 'basis' in before.experts['tables']:
                table |= content_lasso.extended(before.experts['tables'], content_lasso.held(
                    content_lasso.named(data.texts, data.side, data.vocabulary),
                    before.about['attributes']))
            mixture = experts.mixture(fit, table)
        bound = recommenders.scorer_of(members, mixture).bound
    return bound, ids


def _extended(ids, params, known, total) -> jnp.ndarray:
    """Give id embeddings to items without training sessions so far: that of all cold items.

    Args:
      ids: float32 [v+1, D] of the known items.
      params: {path: array} of the recommender.
      known: the data before. `warm` are the items whose embeddings are trained.
      total: V after the update.

    Returns:
      float32 [V+1, D].
    """
    shared = params.get(ID.replace('/id', '/shared'), jnp.zeros(ids.shape[1:]))
    out = np.tile(np.asarray(shared), (total + 1, 1))
    out[:len(ids)][known.warm] = ids[known.warm]
    return jnp.asarray(out)


def _write(job, before, bound, ids, rows, events) -> None:
    """Write the artefact and what the next update reads."""
    folder = job.workdir
    artifact.renew(before, folder / artifact.FOLDER, job.data, bound, events)
    additions.save(job.data, folder / 'data')
    for name, x in rows.items():
        store.write(folder / 'features' / before.about['features'], name, x,
                    {'data': job.data.fingerprint, 'before': before.about['data']})
    files.write_tensors(folder / STATE, ids)
    shutil.rmtree(folder / 'stages')


def _drift(job, before, share, old) -> dict:
    """Describe what changed, and measure both artefacts on the held-out sessions."""
    data, known = job.data, len(before.ids) - 1
    train, held = data.train, data.valid
    new = sessions_lib.take(train, np.arange(old, len(share)))
    p, q = (x / x.sum() for x in (
        np.bincount(train.items, share[train.owner] * (train.owner < old), data.num_items + 1),
        sessions_lib.counts(new, data.num_items)))
    # of as many events that are drawn from p
    chance = np.sqrt(2 * p * (1 - p) / (np.pi * len(new.items))).sum() / 2
    after = artifact.read(job.workdir.parents[1], job.workdir / artifact.FOLDER)
    measured = {}
    for name, served in (('before', before), ('after', after)):
        total = len(served.ids) - 1
        part = held._replace(items=np.where(held.items > total, 0, held.items))
        events = data.events and replace(data.events, items=np.where(
            data.events.items > total, 0, data.events.items))
        rows = sessions_lib.rows(part, job.max_length, sources.every_prefix(job.config), events)
        scores_of = scorer(recommender.Recommender(served))
        some = SimpleNamespace(valid=rows, config=job.config, data=SimpleNamespace(num_items=total))
        measured[name] = fitting.validated(scores_of, some, name)
        some.valid = rows.take((rows.target > 0) & (rows.target <= known))
        measured[name]['nll'] = (fitting.validated(scores_of, some, name)['nll']
                                 if len(some.valid.target) else float('nan'))
    return {'items': {'known': known, 'new': data.num_items - known,
                      'share': 1 - known / data.num_items,
                      'events': float((new.items > known).mean())},
            'sessions': {'known': old, 'new': len(new.start) + len(held.start)},
            'popularity_shift': {'found': float(np.abs(p - q).sum() / 2), 'chance': float(chance)},
            'held_out': {'sessions': len(held.start), 'rows': len(rows.target), **measured}}


def scorer(shop: recommender.Recommender) -> Callable:
    """Make the scorer of an artefact: int32 [B, N + C] -> float32 [B, V+1]."""
    z = shop.embed_items()

    def scores(items):
        out = np.pad(shop.encode(items) @ z.T, ((0, 0), (1, 0)))
        if (moved := shop.shifts(items)) is not None:
            np.add.at(out, (np.arange(len(items))[:, None], moved[0]), moved[1])
        out[:, 0] = 0
        return out

    scores.reads = 'context' if shop.reads[0] else None
    return scores
