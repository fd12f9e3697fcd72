"""Every bound of mutual information against the closed form: `python -m benchmarks.mi`.

Pairs of d-dimensional Gaussians of I = 1 to 10 nats, I = -(d / 2) ln(1 - rho^2), and the same with
a cubed y. A separable MLP critic is trained for 4,000 steps on fresh draws, by InfoNCE, by MINE
(reported as Donsker-Varadhan and, made its own by a constant from 20,000 further training pairs, as
NWJ), by jsd (as jsd and as SMILE), and a Gaussian q by its likelihood (vCLUB and L1Out). Everything
is reported on 20,000 fresh pairs with standard errors (see `mutual_information.report`).

A finished cell goes at once into `benchmarks/mi.json` with the commit that made it; the same
command goes on with what is missing. `--show` prints what is there. What is judged:

    infonce, mine, nwj   nowhere above the truth: one-sided tests at 5 %, Holm over all their cells
    infonce              at most log N
    mine, nwj            within 10 % of the truth up to 4 nats at batch 1,024
    club, vclub          within 10 % of CLUB's own closed form d rho^2 / (1 - rho^2) up to 4 nats
                         (vclub where y is not cubed; club with the true conditional)
"""

import json
import os
import platform
import time
from datetime import UTC, datetime
from functools import partial
from itertools import product
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from rich.console import Console
from rich.table import Table
from scipy import stats

from benchmarks import hierarchical
from benchmarks.checkout import commit
from tpad_jax.core import files
from tpad_jax.mutual_information import estimator as mi

FLAGS = flags.FLAGS
KEPT = Path(__file__).with_suffix('.json')
NATS, WIDTHS, DATA, BATCHES = (1, 2, 4, 6, 8, 10), (5, 20), ('gaussian', 'cubed'), (128, 1024)
STEPS, PAIRS, HIDDEN, WIDTH = 4000, 20_000, 128, 32
RATE = {'infonce': 5e-3, 'mine': 5e-3, 'jsd': 5e-3, 'likelihood': 2e-3}  # and what each is read by
READ = {'mine': ('mine', 'nwj'), 'infonce': ('infonce',), 'likelihood': ('vclub', 'l1out'),
        'jsd': ('jsd', 'smile')}
JUDGED = 0.1  # relative distance of what has to be near
LEVEL = 0.05


def correlation(nats, width):
    """rho of `width` pairs of Gaussians that share `nats`."""
    return np.sqrt(-np.expm1(-2 * nats / width))


def closed_form(bound, nats, width):
    """What a bound should read: the information, or for CLUB what it is itself."""
    rho = correlation(nats, width)
    return width * rho**2 / (1 - rho**2) if bound in ('club', 'vclub') else float(nats)


@partial(jax.jit, static_argnames=('count', 'width', 'cubed'))
def sample(key, rho, count, width, cubed):
    """x, y [count, width], each column of variance one."""
    a, b = jax.random.split(key)
    x = jax.random.normal(a, (count, width))
    y = rho * x + jnp.sqrt(1 - rho**2) * jax.random.normal(b, (count, width))
    return x, y**3 / 15**0.5 if cubed else y


def draw(key, data, step, batch, *, width, cubed):
    """`mutual_information.fit`'s draw: fresh pairs at every step."""
    return sample(jax.random.fold_in(key, step), data['rho'], batch, width, cubed)


# one function object per kind of data, so that programs are compiled once for all nats
DRAW = {(w, d): partial(draw, width=w, cubed=d == 'cubed') for w, d in product(WIDTHS, DATA)}


class TrueScore:
    """log p(y|x) of the data up to what CLUB cancels, as `mutual_information` takes a critic."""

    def __init__(self, rho, cubed):
        self.rho, self.cubed = rho, cubed

    def factors(self, x, y):
        """a, b with a b^T the log-density of the uncubed y; the cube's Jacobian cancels."""
        y = jnp.cbrt(y * 15**0.5) if self.cubed else y
        precision = 1 / (1 - self.rho**2)
        half = (self.rho * x) ** 2
        a = [jnp.full_like(x, -0.5 * precision), precision * self.rho * x,
             -0.5 * precision * half.sum(-1, keepdims=True)]
        return jnp.concatenate(a, -1), jnp.concatenate([y * y, y, jnp.ones_like(y[:, :1])], -1)


jax.tree_util.register_pytree_node(
    TrueScore, lambda s: ((s.rho,), s.cubed), lambda cubed, rho: TrueScore(*rho, cubed))


def cells(objective, data, width, nats, batch):
    """{key: cell} of one training, on the same fresh pairs for every bound of a setting."""
    began = time.perf_counter()
    rho, cubed = np.float32(correlation(nats, width)), data == 'cubed'
    keys = jax.random.split(jax.random.fold_in(jax.random.key(width), 100 * nats + cubed), 4)
    fresh, seen = (sample(k, rho, PAIRS, width, cubed) for k in keys[:2])
    found, curve = [], {}
    if objective == 'club':
        found = [mi.report('vclub', TrueScore(rho, cubed), *fresh)]
    else:
        module = mi.module(READ[objective][0], 'separable', HIDDEN, WIDTH)
        settings = mi.Settings(batch=batch, steps=STEPS, learning_rate=RATE[objective])
        check = sample(keys[2], rho, 2048, width, cubed)
        score, curve = mi.fit(jax.random.fold_in(keys[3], batch), {'rho': rho, 'check': check},
                              objective, module, settings, DRAW[width, data])
        found = [mi.report(bound, score, *fresh, batch=batch, seen=seen, curve=curve)
                 for bound in READ[objective]]
    seconds = time.perf_counter() - began
    out = {}
    for one in found:
        bound = 'club' if objective == 'club' else one.bound
        out[name(bound, data, width, nats, batch)] = {
            'value': one.value, 'error': one.error, 'truth': closed_form(bound, nats, width),
            'interval': one.interval, 'pairs': one.pairs, 'warning': one.warning,
            'degrees': PAIRS // batch - 1 if bound in ('infonce', 'l1out') else PAIRS - 1,
            'likelihood': one.likelihood, 'curve': [float(x) for x in one.curve.get('value', ())],
            'seconds': seconds, 'commit': commit(), 'jax': jax.__version__,
            'device': jax.devices()[0].device_kind,
            'date': datetime.now(UTC).strftime('%Y-%m-%d')}
    return out


def name(bound, data, width, nats, batch):
    """A cell's key."""
    return f'{bound} {data} d={width} I={nats} N={batch}'


def plan():
    """Every training, what decides first."""
    for data, width, nats in product(DATA, WIDTHS, NATS):
        yield 'club', data, width, nats, 0
    for batch, objective in ((1024, 'mine'), (1024, 'likelihood'), (1024, 'infonce'),
                             (128, 'mine'), (128, 'likelihood'), (128, 'infonce'),
                             (1024, 'jsd'), (128, 'jsd')):
        for nats, width, data in product((4, 2, 1, 6, 8, 10), WIDTHS, DATA[::-1]):
            yield objective, data, width, nats, batch


def judge(found):
    """Sentences on what has to hold, of the cells that are there."""
    split = {key: (*key.split()[:2], *(int(part.split('=')[1]) for part in key.split()[2:]))
             for key in found}
    lower = [key for key, (bound, *_) in split.items() if bound in mi.LOWER]
    z = [(found[k]['value'] - found[k]['truth']) / found[k]['error'] for k in lower]
    p = [stats.t.sf(x, found[k]['degrees']) for x, k in zip(z, lower, strict=True)]
    above = [k for k, q in zip(lower, hierarchical.holm(p), strict=True) if q <= LEVEL]
    highest = max(zip(z, lower, strict=True), default=(0, 'none'))
    yield (f'{len(lower)} cells of lower bounds: {len(above)} significantly above the truth '
           f'{above or ""}; the highest lies {highest[0]:+.1f} standard errors off '
           f'({highest[1]})')
    over = [k for k in lower if split[k][0] == 'infonce'
            and found[k]['value'] > np.log(split[k][4])]
    yield f'InfoNCE above log N: {len(over)} {over or ""}'
    for bounds, what in ((('mine', 'nwj'), 'mine and nwj at batch 1024'),
                         (('club', 'vclub'), 'club, and vclub where y is not cubed')):
        near = {k: found[k]['value'] / found[k]['truth'] - 1 for k, s in split.items()
                if s[0] in bounds and s[3] <= 4 and (s[4] == 1024 or s[0] not in mi.LOWER)
                and not (s[0] == 'vclub' and s[1] == 'cubed')}
        far = {k: round(100 * x, 1) for k, x in near.items() if abs(x) > JUDGED}
        worst = max(near.values(), key=abs, default=0)
        yield (f'{what}, up to 4 nats: {len(near) - len(far)} of {len(near)} within '
               f'{100 * JUDGED:.0f} %, the worst {100 * worst:+.1f} % {far or ""}')


def show(found):
    """One table per kind of data, and the verdicts."""
    console = Console(width=150)
    order = ('club', 'vclub', 'l1out', 'infonce', 'mine', 'nwj', 'smile', 'jsd')
    for data, width in product(DATA, WIDTHS):
        table = Table(title=f'{data}, d = {width}: nats (standard error)', title_justify='left',
                      box=None)
        table.add_column('bound')
        for nats in NATS:
            table.add_column(f'I = {nats}', justify='right', no_wrap=True)
        table.add_row("CLUB's closed form", *(f'{closed_form("club", n, width):.2f}'
                                              for n in NATS))
        for bound, batch in product(order, (0, *BATCHES)):
            row = [found.get(name(bound, data, width, nats, batch)) for nats in NATS]
            if any(row):
                table.add_row(f'{bound} {batch or ""}', *(
                    f'{c["value"]:.2f} ({c["error"]:.3f}){"!" * bool(c["warning"])}' if c else '-'
                    for c in row))
        console.print(table, '')
    print('!: the estimate came with a warning')
    for line in judge(found):
        print(line)


def read():
    """Finished cells {key: cell}."""
    return json.loads(KEPT.read_text())['cells'] if KEPT.is_file() else {}


def main(argv):
    """Train and report what is missing, cell by cell; print all that is there."""
    del argv
    for what in () if FLAGS.show else plan():
        objective, *where = what
        wanted = [name(b, *where) for b in READ.get(objective, ('club',))]
        if ((FLAGS.objectives and objective not in FLAGS.objectives)
                or read().keys() >= set(wanted)):
            continue
        made = cells(*what)
        for key, cell in made.items():
            print(f'{key}: {cell["value"]:.3f} +- {cell["error"]:.3f}, truth {cell["truth"]:.3f}, '
                  f'{cell["seconds"]:.0f} s {cell["warning"]}', flush=True)
        files.write_json(KEPT, {
            'machine': platform.machine(), 'cpus': os.cpu_count(), 'jax': jax.__version__,
            'steps': STEPS, 'critic': {'hidden': HIDDEN, 'width': WIDTH}, 'rate': RATE,
            'cells': read() | made})  # another process may have added some
    show(read())


if __name__ == '__main__':
    flags.DEFINE_list('objectives', '', f'only these of {", ".join(RATE)} and club')
    flags.DEFINE_bool('show', False, 'train nothing, print what is there')
    app.run(main)
