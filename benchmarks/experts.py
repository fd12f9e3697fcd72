"""What each expert and each remedy is worth: `python -m benchmarks.experts NAME=RUN ...`.

NAME is of a data set, RUN the workdir of a finished run on it. The experts of a run are fitted
again without one of them, as `config.experts` without its name would, and the test rows are ranked
each time. Nothing is trained. NAME-REMEDY=RUN is a run of the same data
without a remedy, which is compared as it is. Prints nll and hit@20 on the test rows and how much
the nll grows, with an interval over sessions (bootstrap). Writes benchmarks/experts.json.
"""

import datetime
import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from tpad_jax import config as config_lib
from tpad_jax.core import files
from tpad_jax.data.sources import external_features
from tpad_jax.distributed import devices
from tpad_jax.evaluation import experts, metrics, statistics
from tpad_jax.evaluation.scorers import ranker, session_encoder, session_shifts
from tpad_jax.features import store
from tpad_jax.job.job import Job
from tpad_jax.serving import artifact

FILE = Path(__file__).with_suffix('.json')


class Finished:
    """A finished run: its rows, its recommender alone, and the tables of the experts."""

    def __init__(self, workdir: Path):
        about = json.loads((workdir / 'config.json').read_text())
        config = config_lib.get_config()
        config.update(about['config'])
        self.job, served = Job(config, workdir, lambda: False), artifact.read(workdir)
        specs, self.models = served.specs, jax.device_put(served.weights)
        self.commit = json.loads((workdir / 'results.json').read_text())['provenance']['commit']
        self.z = jnp.asarray(served.z)[:, :sum(spec.fusion.width for spec in specs)]
        encode, shifts = session_encoder(specs), session_shifts(specs)
        self.rank = ranker(encode, devices.choose('jit', 1, 1), shifts=shifts)
        rows = None
        if config.data.features:
            rows = external_features.read(config.data.features, self.job.data.asins).rows
        elif (workdir / 'features' / 'knowledge').is_dir():
            rows = store.read(workdir / 'features' / 'knowledge', 'k')
        self.table = experts.tables(self.job.data.train, self.job.data.num_items, rows,
                                    ordered=config.data.ordered)

        @jax.jit
        def score(items):
            scores = encode((self.models, None), self.z, items) @ self.z.T
            if (moved := shifts((self.models, None), self.z, items)) is not None:
                scores = scores.at[jnp.arange(len(items))[:, None], moved[0]].add(moved[1])
            return scores

        self.score = score

    def tested(self, names) -> dict:
        """Fit these experts and rank the test rows: {'nll', 'hit@20'}, float [rows] each."""
        fit = experts.fit(lambda items: self.score(jnp.asarray(items)), self.table, self.job.valid,
                          names, seed=self.job.config.seed)
        rules, columns = experts.mixture(fit, self.table)
        test = self.job.test
        above, equal, nll = self.rank((self.models, rules), jnp.concatenate([self.z, columns], 1),
                                      test.items, test.target, likelihood=True)
        return {'nll': nll, 'hit@20': metrics.mean_gain(metrics.GAINS['hit'], above, equal, 20)}


def growth(less: dict, whole: dict, session: np.ndarray) -> dict:
    """How much the nll grows from `whole` to `less`, with an interval over sessions."""
    totals, weight = statistics.sliced((less['nll'] - whole['nll'])[:, None],
                                       [np.ones(len(session), bool)], session)
    low, high = np.ravel(statistics.intervals(totals, weight))[:2]
    return {'nll': float(less['nll'].mean()), 'hit@20': float(less['hit@20'].mean()),
            'growth': float((less['nll'] - whole['nll']).mean()), 'interval': [low, high]}


def main(runs: list[str]) -> None:
    """Fit, rank, print and write."""
    content = json.loads(FILE.read_text()) if FILE.is_file() else {}
    whole = {}
    for entry in runs:
        name, workdir = entry.split('=', 1)
        name, _, remedy = name.partition('-')
        run = Finished(Path(workdir))
        session = run.job.test.session
        if remedy:
            content[name]['without'][remedy] = growth(run.tested(experts.NAMES), whole[name],
                                                      session)
            continue
        whole[name] = run.tested(experts.NAMES)
        content[name] = {
            'rows': len(session), 'commit': run.commit, 'date': f'{datetime.date.today()}',
            'nll': float(whole[name]['nll'].mean()), 'hit@20': float(whole[name]['hit@20'].mean()),
            'without': {less: growth(run.tested([n for n in experts.NAMES if n != less]),
                                     whole[name], session) for less in experts.NAMES}}
    files.write_json(FILE, content)
    for name, cell in content.items():
        table = Table(title=f'{name}: {cell["rows"]:,} test rows; all experts: nll '
                      f'{cell["nll"]:.3f}, hit@20 {100 * cell["hit@20"]:.1f} %', box=None,
                      title_justify='left')
        for head in ('without', 'nll', 'hit@20', 'nll grows by'):
            table.add_column(head, justify='left' if head == 'without' else 'right')
        for less, cut in cell['without'].items():
            low, high = cut['interval']
            table.add_row(less, f'{cut["nll"]:.3f}', f'{100 * cut["hit@20"]:.2f}',
                          f'{cut["growth"]:+.3f} [{low:+.3f}, {high:+.3f}]')
        Console(width=100).print(table)


if __name__ == '__main__':
    main(sys.argv[1:])
