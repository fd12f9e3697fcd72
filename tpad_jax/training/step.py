"""The step of a stage: its losses, the update itself, and its first state."""

from contextlib import closing
from dataclasses import dataclass, replace
from functools import lru_cache, partial

import jax
import jax.numpy as jnp
import optax
from flax.traverse_util import unflatten_dict
from ml_collections import FrozenConfigDict

from tpad_jax import losses
from tpad_jax.config import MAKES, STAGES, names
from tpad_jax.distributed import collectives
from tpad_jax.distributed.devices import compiled
from tpad_jax.errors import refuse_if
from tpad_jax.models import output_table, outputs, sessions, tpad
from tpad_jax.training import accumulation, federated, optimizer
from tpad_jax.training.stages import ENTRIES
from tpad_jax.types import Batch, State

FEW = 10  # steps up to which the compilation of a step takes longer than the steps


@dataclass(frozen=True)
class StepSpec:
    """The static part of a train step, which is compiled once for all that are equal.

    Attributes:
      model: the modules.
      losses: of the stage.
      fresh: features computed from content.
      tx: the optimiser.
      seed: of all draws.
      skip: how many updates in a row may be skipped because a number was not finite.
      parts: of a replica's rows, whose activations exist one after the other.
      seldom: whether so few steps are computed that a good program is not worth its compilation.
      rounds: a step is a round of these clients, see federated.py; None: there are none.
    """

    model: tpad.TPAD
    losses: tuple[losses.LossSpec, ...]
    fresh: frozenset
    tx: optax.GradientTransformation
    seed: int
    skip: int = 0
    parts: int = 1
    seldom: bool = False
    rounds: federated.Rounds | None = None

    @property
    def needs(self) -> frozenset:
        """Names of the outputs that the losses read."""
        return frozenset().union(*(spec.needs for spec in self.losses))

    @property
    def reads_content(self) -> bool:
        """Whether an output that is read needs the images and words of the batch's items."""
        plan = outputs.Plan(self.model.form, self.model.recommend, self.model.reread, self.fresh)
        return 'content' in output_table.required(self.needs, plan)


def train_step(state: State, batch, catalogue: dict, *, spec: StepSpec, axis: str | None):
    """Make one update: pure, the same function under jit (axis=None), pmap and shard_map.

    Args:
      state: donated.
      batch: this replica's rows.
      catalogue: rows per item, read only.
      spec: static.
      axis: name of the replicas' axis, or None.

    Returns:
      The new state and {name: scalar}, equal on all replicas; and 'not_finite', see `combine`.
    """
    if spec.rounds is not None:
        own = replace(spec, tx=spec.rounds.tx, rounds=None)

        def one(state, batch):
            state, logged = train_step(state.replace(frozen=frozen), batch, catalogue, spec=own,
                                       axis=axis)
            return state.replace(frozen={}), logged

        frozen = state.frozen
        state, logged = federated.run(spec.rounds, spec.tx, one, state.replace(frozen={}), batch)
        return state.replace(frozen=frozen), logged
    key = jax.random.fold_in(jax.random.key(spec.seed), state.step)

    def read(params, batch):
        tree = unflatten_dict({**state.frozen, **params}, sep='/')
        out = outputs.forward(spec.model, tree, batch, catalogue, spec.needs, spec.fresh, key)
        rows, tables = output_table.split_tables(out)
        return rows, (tables, losses.bound(spec.losses, tree))

    def objective(rows, rest, batch):
        tables, heads = rest
        loss, loss_state, logged = losses.combine(
            spec.losses, {**rows, **tables}, batch, state.loss_state, axis=axis, key=key,
            step=state.step, heads=heads, rows=True)
        return loss, (loss_state, logged)

    grads, (loss_state, logged) = accumulation.gradient(read, objective, state.params, batch,
                                                        spec.parts)
    # `combine` sums over replicas, so each replica's gradient is that of the whole, for its rows
    # only, times their number: the mean is the sum over all rows.
    grads = collectives.mean(grads, axis)
    logged['optim/grad_norm'] = optax.tree.norm(grads)
    if spec.skip:  # a loss that is not finite, or whose gradient is not, changes nothing
        fine = jnp.isfinite(logged['loss'])
        first = min(grads)  # one is enough for `apply_if_finite`
        grads = {**grads, first: jnp.where(fine, grads[first], jnp.nan)}
        fine &= jnp.isfinite(logged['optim/grad_norm'])
        loss_state = jax.tree.map(partial(jnp.where, fine), loss_state, state.loss_state)
    updates, opt_state = spec.tx.update(grads, state.opt_state, state.params)
    if spec.skip:
        logged['optim/skipped'] = opt_state.total_notfinite
        logged['optim/skipped_in_row'] = opt_state.notfinite_count
    params = optax.apply_updates(state.params, updates)
    return State(state.step + 1, params, state.frozen, opt_state, loss_state), logged


def stage_losses(config, stage: str) -> tuple[losses.LossSpec, ...]:
    """Make the specs of the losses that a stage uses with a weight other than 0.

    Raises:
      InputError: an entry is not a loss (see `losses.LossSpec`), it reads an output that the stage
        does not compute, or no loss has a weight.
    """
    trained = [other for other in names(config.stages) if config.stage[other].steps]
    # the file of any loss of the run may add outputs: import all of them before a name is checked
    for name in dict.fromkeys(name for other in trained for name in _weights(config, other)):
        losses.resolve(name, config.losses[name].fn)
    specs = [losses.from_entry(name, config.losses[name], weight)
             for name, weight in _weights(config, stage).items()]
    missing = _missing(config, stage)
    known = [n for n in outputs.names(config.model.critics) if n not in missing]
    for spec in specs:
        absent = sorted(spec.needs - set(known))
        why = '; '.join(sorted({missing[n] for n in absent if n in missing}))
        computed = f'stage {stage} does not compute ({why})' if why else 'no stage computes'
        refuse_if(absent, f'config.losses.{spec.name}: it reads {", ".join(absent)}, which '
                  f'{computed}. Expected {", ".join(known)}. Fix: name another output.')
    refuse_if(not specs, f'config.stage.{stage}: no loss has a weight. Expected at least one. Fix: '
              f'give one of config.losses a weight and {stage!r} among its stages.')
    return tuple(specs)


def stored_rows(config, stage: str) -> tuple[str, ...]:
    """List the rows k and r of the catalogue that a stage's losses read.

    Args:
      config: of the run.
      stage: of config.STAGES.

    Raises:
      InputError: see `stage_losses`.
    """
    needs = frozenset().union(*(spec.needs for spec in stage_losses(config, stage)))
    needed, fresh = required(config, stage, needs), names(config.stage[stage].fresh)
    return tuple(row for row in ('k', 'r') if f'_{row}' in needed and row not in fresh)


def required(config, stage: str, needs) -> set[str]:
    """Collect all that the outputs `needs` need in a stage, see `output_table.required`."""
    return output_table.required(needs, _plan(config, stage))


def _weights(config, stage):
    """{name: weight} of the losses that a stage uses with a weight other than 0."""
    changed = config.stage[stage].weights
    weights = {name: entry.weight if changed.get(name) is None else changed[name]
               for name, entry in config.losses.items() if stage in names(entry.stages)}
    return {name: weight for name, weight in weights.items() if weight}


def _plan(config, stage):
    """The options that decide what the outputs of a stage need."""
    model = config.model
    return outputs.Plan(model.form, names(model.recommend), model.reread,
                        frozenset(names(config.stage[stage].fresh)))


def _missing(config, stage):
    """{output: why} of the outputs that a stage of this config cannot compute."""
    model, plan, fresh = config.model, _plan(config, stage), config.stage[stage].fresh
    earlier = {row for s in STAGES[:STAGES.index(stage)] for row in MAKES.get(s, ())}
    later = sorted({row for rows in MAKES.values() for row in rows} - earlier)
    read = ', '.join(row for row in later if row in names(model.recommend))
    rules = (
        (not sessions.reads_prefixes(sessions.build(model, 1)), 'prefixes', 'config.model.encoder='
         f'{model.encoder} does not read all prefixes of a session at once'),
        (not config.mllm.teacher, 'teacher', 'config.mllm.teacher names no teacher'),
        (not model.clusters, 'clusters', 'config.model.clusters is 0'),
        (not model.bottleneck, 'bottleneck', 'config.model.bottleneck is False'),
        (model.blend.kind, 'trained r', 'config.model.blend makes r, which no loss trains'),
        (read, 'features', f'the recommender reads {read}, which a later stage makes'),
        (not ENTRIES[stage].content, 'content', f'stage {stage} reads no content'),
        *((row not in plan.fresh, f'_{row}', f'no earlier stage makes the rows {row}, and '
           f'config.stage.{stage}.fresh={fresh!r} does not name {row}') for row in later))
    lacking = {name: why for broken, name, why in rules if broken}
    sources = {name: sorted(output_table.required([name], plan) & lacking.keys())
               for name in outputs.OUTPUTS}
    return {name: '; '.join(lacking[n] for n in why) for name, why in sources.items() if why}


def build_model(base, config, *, items: int, max_length: int, side_sizes: tuple[int, ...],
                teacher=None) -> tpad.TPAD:
    """Build the model of a config.

    Args:
      base: the MLLM's module, or None without content.
      config: of the run.
      items: V.
      max_length: N.
      side_sizes: how many values each side feature has.
      teacher: reader of the teacher's features, or None.
    """
    return tpad.build(base, config.model, recommend=names(config.model.recommend), items=items,
                      max_length=max_length, side_sizes=side_sizes, pooling=config.mllm.pooling,
                      raw=reads_raw(config), chunk=config.mllm.chunk, teacher=teacher)


def reads_raw(config) -> bool:
    """Whether k are a checkpoint's states as they are, as its heads would stay random."""
    return bool(config.mllm.checkpoint) and not config.stage.knowledge.steps


def initialiser(config, model: tpad.TPAD, image_shape: tuple[int, int, int]):
    """Return (key, catalogue=rows) -> the first parameters of a model with content, nested."""
    return _initialiser(spec=model, rank=config.model.lora_rank, targets=config.model.lora_targets,
                        image_shape=image_shape, text_length=config.mllm.text_length)


@lru_cache(maxsize=16)  # what is traced serves shapes and values, and all jobs of a process
def _initialiser(**settings):
    return jax.jit(partial(tpad.init, **settings))


@lru_cache(maxsize=16)
def without(make, given: tuple[str, ...]):
    """Compile an initialiser without the top-level parameters that are given."""
    return compiled(lambda key, catalogue: {
        n: p for n, p in make(key=key, catalogue=catalogue).items() if n not in given}, seldom=True)


@lru_cache(maxsize=16)  # a refit, and other jobs of a process, find it compiled
def recommender_initialiser(model: tpad.TPAD):
    """Compile (key, catalogue=rows) -> the first parameters of a recommender alone."""
    return compiled(partial(tpad.recommender_init, spec=model), seldom=True)


def make_spec(config, stage: str, model: tpad.TPAD, seed: int) -> StepSpec:
    """Make the static part of a stage's step."""
    c, skip = config.stage[stage], config.skip_not_finite
    return StepSpec(model, stage_losses(config, stage), frozenset(names(c.fresh)),
                    _transformation(FrozenConfigDict(c), skip), seed, skip, c.accumulate,
                    c.steps <= FEW)


@lru_cache  # a spec of the same options has the same object, so that it is equal
def _transformation(stage, skip):
    tx = optimizer.optimizer(stage)
    return optax.apply_if_finite(tx, skip) if skip else tx


def with_own(spec: StepSpec, params: dict, batches, catalogue: dict) -> dict:
    """Return all parameters, with first ones for the losses' modules that have none yet.

    Args:
      spec: of the stage.
      params: {path: array}.
      batches: () -> iterator of the stage's host batches; only their shapes matter.
      catalogue: rows per item.
    """
    new = tuple(loss for loss in spec.losses if loss.module
                and not any(path.startswith(f'loss/{loss.name}/') for path in params))
    if not new:
        return params

    def read(params, batch, catalogue):
        tree = unflatten_dict(params, sep='/')
        return outputs.forward(spec.model, tree, batch, catalogue, spec.needs, spec.fresh,
                            jax.random.key(spec.seed)), batch

    with closing(batches()) as some:
        given = params, Batch.of(next(some)), catalogue
    return params | losses.first_parameters(new, read, given, spec.seed)


def start(spec: StepSpec, params: dict, pattern: str, *, shapes: bool = False) -> State:
    """Make a stage's first state.

    Args:
      spec: of the stage.
      params: {path: array}, all parameters.
      pattern: regular expression over the paths that train; the parameters of the stage's losses
        always do.
      shapes: whether it is only followed for shapes. Such a program may have no compiler options.
    """
    own = tuple(f'loss/{loss.name}/' for loss in spec.losses if loss.module)
    trained, frozen = optimizer.split(params, pattern, own)
    # A copy: what trains is donated, and the caller keeps its parameters. One program, since an
    # operation outside of jit compiles once per shape.
    jit = jax.jit if shapes else partial(compiled, seldom=True)
    copied, opt_state = jit(
        lambda tree: (jax.tree.map(jnp.copy, tree), spec.tx.init(tree)))(trained)
    return State(jnp.int32(0), copied, frozen, opt_state, losses.first_states(spec.losses))
