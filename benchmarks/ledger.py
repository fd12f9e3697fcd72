"""The speed ledger: `python -m benchmarks.ledger` writes docs/speed.md from benchmarks/*.json.

A row reads its numbers from the JSON file that a benchmark wrote; the page has no other source.
`--run='session_gnn --peer=DIR --data=FILE'` runs a benchmark first, `--short` all of SHORT.
"""

import json
import shlex
import statistics
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from absl import app, flags

from benchmarks.checkout import ROOT
from tpad_jax.core import files

FLAGS = flags.FLAGS
PAGE = ROOT / 'docs' / 'speed.md'
SHORT = 'encode_text --out=benchmarks/encode_text.json', 'alignment', 'conditions', 'service'
HEAD = ['work and unit', 'ours', 'peer', 'limit', 'ratio', 'machine', 'commit']
NONE = 'not measured'
TITLE = """# Speed

Measured speed by kind of work. The [results](../benchmarks/RESULTS.md) have the conditions.

`python -m benchmarks.ledger` writes this page from benchmarks/*.json. `--run='NAME OPTIONS'` runs
a benchmark first, `--short` runs those that take minutes and need no data.

Every number is a rate. *Peer* is other code for the same work on the same machine, *ratio* is ours
divided by the peer's. *Limit* is the rate that the machine's plain matrix product would allow.
Compare rows of one machine only.
"""


class Row(NamedTuple):
    """A line of a table: rates, each in the unit that `work` names, or None.

    Attributes:
      work: with its unit.
      ours: rate.
      machine: in words.
      commit: first digits, or ''.
      peer: rate of other code.
      name: of that code.
      limit: rate.
    """

    work: str
    ours: float
    machine: str
    commit: str = ''
    peer: float | None = None
    name: str = ''
    limit: float | None = None

    def cells(self) -> list[str]:
        """The texts of the line, in the order of HEAD."""
        peer = f'{number(self.peer)} ({self.name})' if self.peer else NONE
        ratio = f'{self.ours / self.peer:.2f}' if self.peer else NONE
        return [self.work, number(self.ours), peer, number(self.limit), ratio, self.machine,
                self.commit or 'not recorded']


def number(x) -> str:
    """Three significant digits, at least all before the point."""
    if x is None:
        return NONE
    return f'{x:,.0f}' if x >= 100 else f'{x:.3g}'


def reading(prepare, load):
    """Raw files, and a checkpoint."""
    sides, megabytes = prepare['sides'], prepare['bytes'] / 1e6
    ours, peer = (side['cpu'] for side in (sides['here'], sides[prepare['against']]))
    yield Row('raw reviews to tables, MB per CPU second', megabytes / ours,
              f'{prepare["cores"]} CPUs', prepare['commit'][:7], megabytes / peer,
              prepare['against'])
    for cell in load['cells']:
        if cell['files'] == 'single':
            yield Row(f'a checkpoint of bfloat16 into {cell["dtype"]}, MB/s',
                      load['gb'] * 1000 / cell['seconds'], f'{load["cores"]} CPUs')


def encoding(encode, encode_text):
    """Items by an MLLM, and texts."""
    product = encode['product_gflops']
    size = f'{encode["parameters"] / 1e6:.0f}M'
    yield Row(f'items by a random Qwen3-VL of {size}, {encode["dtype"]}, items/s',
              encode['sides']['tpad_jax']['items_per_second'],
              f'{encode["threads"]} CPUs, {product:.0f} GFLOP/s', '',
              encode['sides']['torch']['items_per_second'], 'torch',
              product / encode['gflop_per_item'])
    texts = {(x['tokens'], x['side']): x['texts_per_core_second'] for x in encode_text}
    for tokens in sorted({x['tokens'] for x in encode_text}):
        yield Row(f'texts of {tokens} tokens by the shape of MiniLM, texts per CPU second',
                  texts[tokens, 'tpad_jax'], '1 CPU', '', texts[tokens, 'torch'], 'torch')


def sessions(work):
    """Return the rows of one work of `session_gnn`, 'train' or 'score', over its runs."""
    def rows(*runs):
        for run in runs:
            product, peer = run['products_gflops']['ours'], run['cells']['peer'][work]
            machine = f'{run["threads"]} CPUs, {product:.0f} GFLOP/s'
            for name, cell in run['cells'].items():
                if name == 'peer':
                    continue
                size = cell['batch' if work == 'train' else 'ranked']
                what = f'{name.split(",")[0]}, {cell["softmax"]} softmax, {size} rows'
                # no benchmark counts what scoring computes
                limit = (product * 1e9 / run['threads'] / cell['operations']
                         if work == 'train' and 'operations' in cell else None)
                for key, unit in (('pairs_per_s', 'pairs/s'), ('pairs_per_cpu_s', 'per CPU s')):
                    yield Row(f'{what}, {unit}', cell[work][key], machine,
                              run.get('commit', '')[:7], peer[key], "authors'",
                              limit if key == 'pairs_per_cpu_s' else None)
    return rows


def losses(alignment):
    """The losses that compare all pairs of a batch."""
    cell = alignment['products']
    yield Row(f'alignment losses of {cell["batch"]} rows of width {cell["width"]}, steps/s',
              1000 / cell['milliseconds'], f'{alignment["cpus"]} CPUs', alignment['commit'][:7],
              limit=1000 / cell['products_milliseconds'])


def serving(serving, conditions, exported, service):
    """Lists of the best items for sessions."""
    yield Row(f'exact top {serving["k"]} of {serving["items"]:,} items, sessions/s',
              serving['sessions per second'], serving['machine'], serving['commit'][:7])
    for name, rate in conditions['sessions per second'].items():
        yield Row(f'the same, conditions on the list: {name}, sessions/s', rate,
                  conditions['machine'], conditions['commit'][:7])
    for cell in exported['approximate']['graph']:
        yield Row(f'approximate, {cell["looked at"]} looked at, recall {cell["recall@20"]:.2f}, '
                  'sessions/s', cell['sessions per second'], exported['machine'],
                  exported['commit'][:7])
    for cell in service['load']:
        yield Row(f'HTTP, {service["items"]} items, {cell["connections"]} connections, requests/s',
                  cell['requests per second'], service['machine'], service['commit'][:7])


def neighbours(session_knn):
    """Rules and neighbours."""
    for name, cell in session_knn['methods'].items():
        yield Row(f'{name}, {cell["items"]:,} items, ranks/s',
                  cell['rows'] / cell['rank_seconds'][0], f'{session_knn["cpus"]} CPUs')


def information(mi):
    """Estimates of mutual information."""
    bounds = {}
    for name, cell in mi['cells'].items():
        bounds.setdefault(name.split()[0], []).append(cell)
    for bound, cells in bounds.items():
        commits = sorted({cell['commit'][:7] for cell in cells})
        yield Row(f'{bound}, estimates per hour (median of {len(cells)})',
                  3600 / statistics.median(cell['seconds'] for cell in cells),
                  f'{mi["cpus"]} CPUs', ', '.join(commits))


SR_GNN = 'session_gnn', 'session_gnn_epyc', 'session_gnn_xeon'  # the same work on three machines
KINDS = {  # heading: the JSON files, and what makes rows of them
    'Reading': (('prepare', 'load'), reading),
    'Encoding': (('encode', 'encode_text'), encoding),
    'Training': (SR_GNN, sessions('train')),
    'Losses': (('alignment',), losses),
    'Scoring and ranking the whole catalogue': (SR_GNN, sessions('score')),
    'Rules and neighbours': (('session_knn',), neighbours),
    'Top-K and serving': (('serving', 'conditions', 'exported', 'service'), serving),
    'Estimates of mutual information': (('mi',), information)}


def page(folder: Path) -> str:
    """The text of docs/speed.md.

    Args:
      folder: with the JSON files.
    """
    parts = [TITLE]
    for heading, (names, make) in KINDS.items():
        rows = make(*(json.loads((folder / f'{name}.json').read_text()) for name in names))
        lines = [HEAD, ['---'] * len(HEAD), *(row.cells() for row in rows)]
        source = ', '.join(f'[{name}.json](../benchmarks/{name}.json)' for name in names)
        parts.append(f'## {heading}\n\n' + '\n'.join(f'| {" | ".join(line)} |' for line in lines)
                     + f'\n\nFrom {source}.\n')
    return '\n'.join(parts)


def main(argv):
    """Run what is asked for; write the page."""
    del argv
    for command in (*FLAGS.run, *(SHORT if FLAGS.short else ())):
        name, *options = shlex.split(command)
        subprocess.run([sys.executable, '-m', f'benchmarks.{name}', *options], cwd=ROOT, check=True)
    with files.replacing(PAGE) as partial_file:
        partial_file.write_text(page(ROOT / 'benchmarks'))
    print(f'written: {PAGE}')


if __name__ == '__main__':
    flags.DEFINE_multi_string('run', [], 'a benchmark and its options, as NAME --option=value')
    flags.DEFINE_boolean('short', False, f'run {"; ".join(SHORT)}')
    app.run(main)
