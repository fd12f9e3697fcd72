"""The memory that a run needs on a device: `--plan`, and the lines before a checkpoint is read.

Parameters, the optimiser's state, batches and the catalogue's rows are counted exactly, from their
shapes. The temporary memory of a step is the compiler's number for the very step if the devices are
those of this machine. Otherwise it is an estimate from the step's operations (`live_bytes`), which
is traced with shapes alone. Neither knows a loss or an encoder by name.

Not counted: a checkpoint's copy of the state, rows encoded between steps, parameters of a loss's
module, and the program itself. Each device is taken to hold its temporary arrays uncut.
"""

import dataclasses
import math
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict

from tpad_jax.config import MAKES, STAGES
from tpad_jax.data import sources, text
from tpad_jax.data.sources import external_features
from tpad_jax.data.synthetic import wording
from tpad_jax.distributed import devices as devices_lib
from tpad_jax.errors import refuse_if
from tpad_jax.features import bases, lexical
from tpad_jax.job.validate import check, remarks
from tpad_jax.models import sessions, tpad
from tpad_jax.training import loop, profiling, step as step_lib
from tpad_jax.training.stages import ENTRIES
from tpad_jax.types import Batch

KINDS = {'v5e': 15.75, 'v6e': 31.25}  # GiB a program may use of a chip's 16 and 32
GIB = 2**30


@dataclass(frozen=True)
class Subject:
    """The shapes of a run that is planned.

    Attributes:
      config: the run's.
      build: (the MLLM or None, config) -> tpad.TPAD.
      base: the MLLM's module, or None without content.
      params: {path: shape and dtype} of all parameters, as `parameter_shapes` makes it.
      catalogue: {name: shape and dtype} of the rows per item.
      devices: devices.Devices, or anything with `shards` and `model`.
      positions: N, items of a prefix.
      side: pixels of an image's side.
    """

    config: object
    build: Callable
    base: object
    params: dict
    catalogue: dict
    devices: object
    positions: int
    side: int = 0

    def changed(self, **changes) -> 'Subject':
        """The same run with other settings, nested keys of the config."""
        c = self.config.copy_and_resolve_references()
        c.update_from_flattened_dict(changes)
        base, devices, model = self.base, self.devices, c.model_shards
        if hasattr(base, 'remat'):
            base = base.clone(remat=c.mllm.remat, dtype=c.mllm.dtype)
        if 'model_shards' in changes:
            devices = SimpleNamespace(shards=devices.shards * devices.model // model, model=model)
        return dataclasses.replace(self, config=c, base=base, devices=devices,
                                   params=parameter_shapes(c, self.params))


def parameter_shapes(config, params: dict) -> dict:
    """Give parameters the dtypes that they are held in: {path: jax.ShapeDtypeStruct}.

    Args:
      config: the run's.
      params: nested or {path: shape and dtype}.
    """
    dtypes = {'base': config.mllm.param_dtype, 'teacher': config.mllm.teacher_dtype}
    return {path: x.update(dtype=jnp.dtype(dtypes.get(path.split('/')[0], x.dtype)))
            for path, x in flatten_dict(params, sep='/').items()}


def stage_plan(subject: Subject, stage: str, compile_step: bool = False) -> dict[str, int]:
    """Plan the memory of a stage.

    Args:
      subject: of the run.
      stage: of config.STAGES.
      compile_step: whether the compiler is asked, which takes as long as the stage's compilation;
        the devices are this process's.

    Returns:
      Bytes per device of 'frozen', the parameters that the stage only reads; 'trained', those that
      it trains; 'optimiser', its state; 'batches', this step's and the next one's; 'catalogue',
      the rows per item; 'temporary', a step's gradients, activations and scores.
    """
    c, devices = subject.config.stage[stage], subject.devices
    held = partial(_bytes, model=devices.model)
    made = {row for earlier in STAGES[:STAGES.index(stage)] for row in MAKES.get(earlier, ())}
    rows = {name: x for name, x in subject.catalogue.items()
            if name in made or not any(name in some for some in MAKES.values())}
    if not c.steps:
        return {'frozen': held(subject.params), 'trained': 0, 'optimiser': 0, 'batches': 0,
                'catalogue': held(rows), 'temporary': 0}
    spec, state, batch, rows = _inputs(subject, stage, rows)
    if compile_step:
        device = dataclasses.replace(devices, how='jit', devices=devices.devices[:1], model=1)
        compiled = loop.compile_step(device, spec, state, batch, rows)
        temporary = compiled.memory_analysis().temp_size_in_bytes
    else:
        traced = jax.make_jaxpr(partial(loop.lean_step, spec=spec, axis=None))(
            state.replace(frozen={}), batch, {'catalogue': rows, 'frozen': state.frozen})
        temporary = profiling.live_bytes(traced.jaxpr)
    return {'frozen': held(state.frozen), 'trained': held(state.params),
            'optimiser': _tree_bytes(state.opt_state), 'batches': 2 * _tree_bytes(batch),
            'catalogue': held(rows), 'temporary': temporary}


def _inputs(subject, stage, rows):
    """The static part of a stage's step, and the shapes of its state, batch and rows."""
    model = subject.build(subject.base, subject.config)
    spec = step_lib.make_spec(subject.config, stage, model, 0)
    pattern = subject.config.stage[stage].train
    state = jax.eval_shape(partial(step_lib.start, spec, pattern=pattern, shapes=True),
                           subject.params)
    if 'cluster' in spec.needs:
        rows = {**rows, 'cluster': jax.ShapeDtypeStruct(rows['warm'].shape, jnp.int32)}
    return spec, state, _batch(subject, stage, spec), rows


def step_operations(subject: Subject, stage: str) -> float:
    """Count the floating-point operations of one device in a step of a stage, without compiling.

    Args:
      subject: of the run.
      stage: of config.STAGES, with steps.

    Returns:
      The number, as XLA counts it.
    """
    spec, state, batch, rows = _inputs(subject, stage, subject.catalogue)
    step = jax.jit(partial(loop.lean_step, spec=spec, axis=None))
    lowered = step.lower(state.replace(frozen={}), batch,
                         {'catalogue': rows, 'frozen': state.frozen})
    return lowered.cost_analysis()['flops']


def _batch(subject, stage, spec):
    """A device's part of a batch, as shapes: at most so many items, each of which is read once."""
    c, of_items = subject.config.stage[stage], ENTRIES[stage].batches == 'items'
    rows, n = c.batch_size // subject.devices.shards, 1 if of_items else subject.positions
    shapes = dict(items=(rows, n), next=(rows, n), target=(rows,), valid=(rows,), row=(rows,))
    if not of_items and not c.every_prefix:
        shapes['places'] = (rows * n,)
    if spec.reads_content:
        part = rows // c.accumulate * (1 if of_items else n + 1)
        seen = c.accumulate * (1 + min(part, subject.catalogue['warm'].shape[0] - 1))
        shapes |= dict(slots=(rows, n), next_slots=(rows, n), ids=(seen,), has_image=(seen,),
                       tokens=(seen, subject.config.mllm.text_length),
                       image=(seen, subject.side, subject.side, 3))
    dtypes = dict(valid=bool, has_image=bool, image=jnp.uint8)
    return Batch(**{name: jax.ShapeDtypeStruct(shape, dtypes.get(name, jnp.int32))
                    for name, shape in shapes.items()})


def _tree_bytes(tree):
    return sum(map(profiling.bytes_of, jax.tree.leaves(tree)))


def _bytes(arrays, model):
    """Bytes per device of {path: array}, cut over `model` devices by devices.RULES."""
    def parts(path, x):
        return model if devices_lib.MODEL in (devices_lib.rule(path, x.shape, model) or ()) else 1

    return sum(profiling.bytes_of(x) // parts(path, x) for path, x in arrays.items())


def limit() -> int | None:
    """Bytes that the first device of this process has; of a CPU those of the machine."""
    stats = jax.local_devices()[0].memory_stats()
    return stats.get('bytes_limit') if stats else os.sysconf(
        'SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES')


def gib(n: float) -> str:
    """Write bytes in GiB."""
    return f'{n / GIB:.2f}'


def of_run(subject: Subject, stages, available: int | None = None, compile_step: bool = False
           ) -> list[str]:
    """The plan of some stages in words: a line for each, and one for each that does not fit.

    Args:
      subject: of the run.
      stages: of config.STAGES.
      available: bytes of a device; None: those of this process's.
      compile_step: see `stage_plan`.
    """
    available, out, warnings = available or limit(), [], []
    for stage in stages:
        parts = stage_plan(subject, stage, compile_step)
        total = sum(parts.values())
        out.append(f'Memory of {stage}: {gib(total)} GiB per device = '
                   + ' + '.join(f'{name} {gib(x)}' for name, x in parts.items()))
        if available and total > available:
            warnings.append(f'Warning: {stage} may not fit into {gib(available)} GiB. '
                            + _remedies(subject, stage, total))
    return out + warnings


def _remedies(subject, stage, planned):
    """Which settings lower a stage that does not fit, in words: each change alone."""
    c, m, devices = subject.config.stage[stage], subject.config.mllm, subject.devices
    count, rows, tried = devices.shards * devices.model, c.batch_size // devices.shards, []
    if hasattr(subject.base, 'remat'):
        better = {'remat': 'full', 'param_dtype': 'bfloat16', 'dtype': 'bfloat16',
                  'chunk': m.chunk // 2 or 8}
        tried += [(f'mllm.{name}', to) for name, to in better.items() if m[name] not in (to, 1)]
    if rows > 1:
        tried.append((f'stage.{stage}.batch_size', devices.shards * (rows // 2)))
    if rows % (2 * c.accumulate) == 0:
        tried.append((f'stage.{stage}.accumulate', 2 * c.accumulate))
    for loss in step_lib.stage_losses(subject.config, stage):
        options = subject.config.losses[loss.name]
        tried += [(f'losses.{loss.name}.{option}', to) for option, now, to in (
            ('by_row', False, True), ('chunk', 0, 4096)) if options.get(option) == now]
    tried += [('model_shards', n) for n in (2, 4, 8) if n > devices.model and count % n == 0
              and c.batch_size % (count // n) == 0]
    now = sum(stage_plan(subject, stage).values())
    totals = [(sum(stage_plan(subject.changed(**{name: to}), stage).values()), name, to)
              for name, to in tried]
    lower = [f'config.{name}={to}: {gib(total * planned / now)}'
             for total, name, to in sorted(totals) if total < 0.99 * now]
    best = (f'With one change it is {", ".join(lower)}.' if lower
            else 'No setting of the config lowers it by much.')
    return f'{best} More devices with a larger config.model_shards hold less each.'


def target(value: str) -> tuple[int | None, int | None]:
    """Read what `--plan` names.

    Args:
      value: '' or 'true' (this machine), KIND-COUNT with a kind of KINDS, or NUMBERgib-COUNT.

    Returns:
      Bytes per device and number of devices; None, None: this machine's.

    Raises:
      InputError: the value is none of these.
    """
    if value in ('', 'true'):
        return None, None
    match = re.fullmatch(rf'({"|".join(KINDS)}|\d+(?:\.\d+)?gib)-([1-9]\d*)', value.lower())
    refuse_if(match is None, f'--plan={value}: names no devices. Expected v5e-8, v6e-8 or 24gib-8, '
              'GiB of each and their number. Fix: name them so, or nothing for this machine')
    kind, count = match.groups()
    return round((KINDS.get(kind) or float(kind.removesuffix('gib'))) * GIB), int(count)


def facts(config, workdir: Path, items: int | None) -> tuple[int, tuple[int, ...], int, str]:
    """Find out what the plan has to know of the data.

    Args:
      config: of the run.
      workdir: of the run.
      items: V where the command gives it, or None.

    Returns:
      V, how many values each side feature has, N, and in words where that comes from.

    Raises:
      InputError: raw files that are not prepared yet and no `items`.
    """
    source, longest = sources.chosen(config), config.data.max_length
    if items is not None:
        # the numbers of brands and categories are unknown
        side = (1, 1, text.PRICE_LEVELS + 1) if source.content else ()
        return items, side, longest, '--plan_items'
    total, side = sources.sizes(config, workdir)
    return total, side, min(longest, source.longest or longest), sources.origin(config)


def rows(config, items: int, sides: int, k: tuple[int, int] | None = None) -> dict:
    """The catalogue's rows that stages read, {name: shape and dtype} of [V+1, ...].

    Args:
      config: the run's.
      items: V.
      sides: how many side features.
      k: (M, D) of an item's k. None: that of a Knowledge-MLLM.
    """
    c, source = config.model, sources.chosen(config)
    shapes = {'side': (sides,), 'warm': (), 'popularity': ()}
    if sessions.reads_graph(sessions.build(c, 1)):
        shapes |= {'near': (c.near,), 'near_weight': (c.near,)}
    if c.together:
        shapes |= {'together': (c.together,), 'together_lift': (c.together,)}
    if source.content:
        shapes['k'] = k = k or (2, c.features)
        shapes['r'] = k if c.blend.kind else (math.prod(k),)
        if c.codes:
            shapes['codes'] = math.prod(c.codes),
        if c.words:
            shapes['words'] = tpad.WORDS,
        if config.data.features:
            shapes['given'] = external_features.width(config.data.features),
        if source.world:
            shapes['true'] = sum(wording.SIZES),
        if lexical.wanted(config, bool(source.world)):
            shapes['lexical'] = lexical.WIDTH,
    dtypes = {'side': jnp.int32, 'warm': bool, 'near': jnp.int32, 'together': jnp.int32}
    return {name: jax.ShapeDtypeStruct((items + 1, *shape), dtypes.get(name, jnp.float32))
            for name, shape in shapes.items()}


def lines(config, workdir, value: str, items: int | None = None) -> list[str]:
    """The plan of a run in words.

    Args:
      config: of the run.
      workdir: of the run.
      value: of `--plan`, see `target`.
      items: see `facts`.

    Raises:
      InputError: an unusable config or flag, or data that tell nothing yet.
    """
    room, count = target(value)
    among = None if count is None else range(count)
    stages = check(config, among)
    *sizes, origin = facts(config, Path(workdir), items)
    subject = subject_of(config, *sizes, among)
    available = room or limit()
    size = 'unknown size' if available is None else f'{gib(available)} GiB'
    way = 'estimated' if room else 'compiled'
    return [f'Planned for: {sizes[0]} items ({origin}), prefixes of {subject.positions}, '
            f'{len(subject.devices.devices)} device(s) of {size}; {way} from shapes alone',
            *of_run(subject, stages, available, compile_step=not room),
            *(f'Warning: {line}' for line in remarks(config, stages))]


def subject_of(config, total: int, sizes: tuple[int, ...], positions: int, among=None) -> Subject:
    """Find the shapes of a run.

    Args:
      config: of the run.
      total: V.
      sizes: how many values each side feature has.
      positions: N.
      among: devices that are not of this process, see `devices.choose`.
    """
    devices = devices_lib.choose(config.parallel, config.devices, config.model_shards, among,
                                 config.precision)
    key = jax.random.key(0)
    build = partial(step_lib.build_model, items=total, max_length=positions, side_sizes=sizes)
    if not sources.chosen(config).content:
        module, side, catalogue = None, 0, rows(config, total, len(sizes))
        make = partial(tpad.recommender_init, spec=build(None, config))
        shapes = {'recommender': jax.eval_shape(make, key, catalogue=catalogue)}
    else:
        base = bases.read(config)
        module, side, teacher = base.module, base.image_size, bases.teacher(config, base)
        build = partial(build, teacher=teacher and teacher.reader)
        model = build(module, config)
        catalogue = rows(config, total, len(sizes), model.knowledge.shape)
        make = step_lib.initialiser(config, model, (side, side, 3))
        shapes = jax.eval_shape(make, key, catalogue=catalogue)
        shapes |= {'teacher': teacher.shapes} if teacher else {}
    return Subject(config, build, module, parameter_shapes(config, shapes), catalogue, devices,
                   positions, side)
