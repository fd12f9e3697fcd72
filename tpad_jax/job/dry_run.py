"""`--dry-run`: what a run would read, and about how long it would take. No model is trained."""

import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from tpad_jax.config import MAKES
from tpad_jax.data import audit, catalogue, sources, untrusted
from tpad_jax.features import bases, tokenizers
from tpad_jax.job import memory_plan, results, validate
from tpad_jax.training import length

EXAMPLES = 3  # items and sessions that are printed
WIDTH = 90  # characters of a printed value
SIZE = 1024  # rows and columns of the matrices that the speed is measured by
# Share of that speed which steps reach: 0.2 to 0.3 on CPUs with the default config. Large models on
# accelerators reach more.
EFFICIENCY = 0.25


def lines(config) -> list[str]:
    """Read the data of a run into a temporary directory, and describe them.

    Args:
      config: of the run.

    Returns:
      Columns, counts, the audit, examples and the estimated time.

    Raises:
      InputError: an unusable config or unusable data.
    """
    stages, source = validate.check(config), sources.chosen(config)
    validate.check_inputs(config, stages, set())
    with tempfile.TemporaryDirectory() as folder:
        data = sources.load(config, Path(folder))
        examples, config = _examples(data), length.of_data(config, data.train)
        if source.content:  # a trained tokenizer changes the steps
            config, *_ = tokenizers.fitted(
                config, data.texts, bases.read(config, bool(data.has_image.any())).directory,
                Path(folder) / 'tokenizer', reads=bool(MAKES.keys() & set(stages)))
    out = [f'data: {sources.origin(config)} ({data.form})']
    out += [f'column: {line}' for line in source.columns(config)]
    counts = {'rejected': {}, 'unused': {}, **data.lines}
    out += [f'lines: {counts["read"]} read, {counts["kept"]} kept',
            f'rejected: {untrusted.reasons(counts["rejected"]) or "none"}',
            f'unused parts of kept lines: {untrusted.reasons(counts["unused"]) or "none"}',
            f'kinds of events: {", ".join(data.kinds) or "not known"}',
            f'catalogue: {results.choices_of(config.data.catalogue, data.choices)}',
            f'pictures: {int(data.has_image.sum())} of {data.num_items} items']
    out += [f'audit: {line}' for line in audit.describe(data.audit)]
    longest = min(config.data.max_length, source.longest or config.data.max_length)
    subject = memory_plan.subject_of(config, data.num_items, data.side_sizes, longest)
    return [*out, *examples, *_times(subject, stages)]


def _examples(data: catalogue.Data) -> list[str]:
    """The first items, and the first training sessions."""
    items = range(1, min(EXAMPLES, data.num_items) + 1)
    out = [f'item {data.asins[item]!r}: {data.texts[item][:WIDTH]!r}, side features '
           f'{data.side[item].tolist()}' for item in items]
    return out + ['session: ' + ', '.join(data.asins[item] for item in part)[:WIDTH]
                  for part in np.split(data.train.items, data.train.offsets[1:-1])[:EXAMPLES]]


def _times(subject: memory_plan.Subject, stages: tuple[str, ...]) -> list[str]:
    """A line for each stage, and the sum."""
    speed, total, out, reading = _speed(), 0.0, [], 0.0
    items = subject.catalogue['warm'].shape[0] - 1
    for stage in stages:
        c = subject.config.stage[stage]
        step = memory_plan.step_operations(subject, stage) if c.steps else 0.0
        if stage == 'knowledge':  # a step reads a batch and goes back, thrice the work of reading
            reading = step * subject.devices.shards / c.batch_size / 3
        times = len(MAKES.get(stage, ())) * (1 + c.steps // c.refresh_every if c.refresh_every
                                            else 1)
        seconds = (c.steps * step + times * items * reading / subject.devices.shards) / speed
        total += seconds
        out.append(f'time of {stage}: about {_minutes(seconds)} for {c.steps} steps of '
                   f'{step / 1e9:.3g} GFLOP' + f' and {times} time(s) all items' * bool(times))
    return [*out, f'estimated time: about {_minutes(total)} at {speed / 1e9:.3g} GFLOP/s, measured '
            'here; compilation, baselines and the report come in addition']


def _speed() -> float:
    """Floating-point operations per second of a device in steps of training."""
    matrix, product = jnp.ones((SIZE, SIZE), jnp.float32), jax.jit(jnp.dot)
    product(matrix, matrix).block_until_ready()
    begun = time.perf_counter()
    for _ in range(8):
        result = product(matrix, matrix)
    result.block_until_ready()
    return EFFICIENCY * 8 * 2 * SIZE ** 3 / (time.perf_counter() - begun)


def _minutes(seconds: float) -> str:
    return f'{seconds:.0f} s' if seconds < 100 else f'{seconds / 60:.0f} min'
