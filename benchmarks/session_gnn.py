"""SR-GNN's speed beside its authors' PyTorch code: `python -m benchmarks.session_gnn --peer DIR
--data FILE.npz`.

DIR holds the authors' model.py and utils.py, brought from outside this tree; FILE.npz ready-made
sessions (`data/sources/ids.py`). Both get the same rows (every prefix of every session, its
last --max_length items), width 100, the whole softmax, Adam at 1e-3 with an L2 penalty of 1e-5 and
the same number of cores, each in a process of its own; they take turns, so that what else the
machine does falls on both. The peer runs its own functions as its own loop calls them; ours are the
library's batches, train step and ranks. Before anything is timed, ours gets the peer's weights, and
the scores of real rows and the losses of the first steps are compared.

Prints the table and writes `benchmarks/session_gnn.json`.
"""

import multiprocessing
import os
import platform
import time
from pathlib import Path

import numpy as np
from absl import app, flags
from rich.console import Console
from rich.table import Table

from benchmarks import session_gnn_ours, session_gnn_peer
from benchmarks.checkout import commit
from tpad_jax.core import files

FLAGS = flags.FLAGS
BARS = {'train': 3.5, 'score': 4.5}  # times the peer's pairs/s
CHECKED = 500  # rows whose scores are compared


class Side:
    """A process that holds one contestant; asked by name, it answers by what its method returns."""

    def __init__(self, make, *args):
        """Start it; `make` is called there with `args`."""
        context = multiprocessing.get_context('spawn')
        self.pipe, other = context.Pipe()
        self.process = context.Process(target=serve, args=(other, make, args), daemon=True)
        self.process.start()
        other.close()

    def __call__(self, name, *args):
        """The answer of one method."""
        self.pipe.send((name, args))
        return self.pipe.recv()

    def close(self):
        """End the process."""
        self.pipe.close()
        self.process.join()


def serve(pipe, make, args):
    """Answer until the other end closes."""
    contestant = make(*args)
    while True:
        try:
            name, args = pipe.recv()
        except EOFError:
            return
        pipe.send(getattr(contestant, name)(*args))


def check_parity(peer, ours) -> dict:
    """The peer's weights in ours: largest differences of scores and of the first steps' losses.

    As text: they are smaller than what the JSON's numbers keep.
    """
    weights = peer('weights')
    theirs = peer('scores', CHECKED)
    mine = ours('scores', weights, CHECKED)
    losses = peer('losses', 5), ours('losses', weights, 5)
    return {'rows': CHECKED, 'largest_score': float(np.abs(theirs).max()),
            'scores': f'{np.abs(theirs - mine).max():.1e}',
            'losses': f'{np.abs(np.subtract(*losses)).max():.1e}', 'first_losses': losses[0]}


def main(argv):
    """Check, take turns, print, write."""
    del argv
    missing = [n for n in ('model.py', 'utils.py') if not (Path(FLAGS.peer) / n).is_file()]
    if missing:
        raise app.UsageError(f'--peer={FLAGS.peer} has no {" and no ".join(missing)}; it must be '
                             "the directory of the authors' PyTorch code")
    shared = FLAGS.data, FLAGS.max_length, FLAGS.threads
    peer = Side(session_gnn_peer.Peer, FLAGS.peer, *shared, session_gnn_ours.BATCH,
                session_gnn_ours.WIDTH)
    ours = Side(session_gnn_ours.Ours, *shared, FLAGS.cell)
    cells = ['peer', *FLAGS.cell]
    facts = {'peer': peer('facts'), **ours('facts')}
    parity = check_parity(peer, ours)
    print(f'parity: scores of {CHECKED} rows differ by at most {parity["scores"]} (the largest '
          f'is {parity["largest_score"]:.2f}), losses of 5 steps by {parity["losses"]}',
          flush=True)
    rates = {name: {'train': [], 'score': []} for name in cells}
    for number in range(FLAGS.repeats + 1):  # the first turn warms up
        for work in ('train', 'score'):
            for name in cells:
                side, args = (peer, ()) if name == 'peer' else (ours, (name,))
                pairs, wall, cpu = side(work, *args, FLAGS.seconds if number else 1.0)
                if number:
                    rates[name][work].append({'pairs': pairs, 'wall': wall, 'cpu': cpu})
    products = {'peer': peer('product'), 'ours': ours('product')}
    peer.close()
    ours.close()
    out = {'cells': {name: summary(rates[name], facts[name]) for name in cells}, 'parity': parity,
           'commit': commit(), 'products_gflops': products, 'bars': BARS, 'seconds': FLAGS.seconds,
           'repeats': FLAGS.repeats, 'max_length': FLAGS.max_length, 'threads': FLAGS.threads,
           'machine': {'cpus': os.cpu_count(), 'processor': platform.processor(),
                       'load': os.getloadavg(), 'date': time.strftime('%Y-%m-%d')}}
    show(out)
    files.write_json(Path(FLAGS.out), out)


def summary(rates, facts) -> dict:
    """Medians over the repeats: pairs/s on the wall, and per processor second."""
    found = dict(facts)
    for work, turns in rates.items():
        found[work] = {
            'pairs_per_s': float(np.median([t['pairs'] / t['wall'] for t in turns])),
            'pairs_per_cpu_s': float(np.median([t['pairs'] / t['cpu'] for t in turns])),
            'turns': turns}
    return found


def show(out):
    """The table; it explains itself."""
    cells, peak = out['cells'], out['products_gflops']['ours']
    table = Table(title='pairs (prefix, next item) per second', title_justify='left', box=None)
    for head in ('', 'batch', 'train', 'x peer', 'rank', 'x peer', 'MF/pair', 'GF/s', 'of peak',
                 'MB/pair', 'per CPU s: train', 'rank'):
        table.add_column(head, justify='right' if head else 'left', no_wrap=True)
    for name, cell in cells.items():
        row = [name, str(cell['batch'])]
        for work in ('train', 'score'):
            rate = cell[work]['pairs_per_s']
            row += [f'{rate:,.0f}', f'{rate / cells["peer"][work]["pairs_per_s"]:.2f}']
        if 'operations' in cell:
            speed = out['threads'] * cell['train']['pairs_per_cpu_s'] * cell['operations'] / 1e9
            share = f'{100 * speed / peak:.0f} %'
            row += [f'{cell["operations"] / 1e6:.0f}', f'{speed:.0f}', share,
                    f'{cell["bytes"] / 1e6:.1f}']
        else:
            row += [''] * 4
        row += [f'{cell[work]["pairs_per_cpu_s"]:,.0f}' for work in ('train', 'score')]
        table.add_row(*row)
    Console(width=140).print(table)
    print(f'Medians of {out["repeats"]} turns of {out["seconds"]:.0f} s on {out["threads"]} cores, '
          f'prefixes of at most {out["max_length"]} items. Scoring ranks the whole catalogue for '
          'every row (the peer: its first 20 items).\n'
          'MF and MB per pair are operations and memory traffic of training by a formula (see '
          'benchmarks/session_gnn_work.py), GF/s what follows for the rate per CPU second on these '
          'cores; a plain float32 '
          f'matrix product reaches {peak:.0f} GF/s here (PyTorch: '
          f'{out["products_gflops"]["peer"]:.0f}), which is what "of peak" refers to. The last two '
          'columns divide by processor seconds: what other processes take does not count.')


if __name__ == '__main__':
    flags.DEFINE_string('peer', None, "directory of the authors' model.py and utils.py",
                        required=True)
    flags.DEFINE_string('data', None, 'the .npz of sessions', required=True)
    flags.DEFINE_float('seconds', 15.0, 'of a turn')
    flags.DEFINE_integer('repeats', 5, 'turns of each')
    flags.DEFINE_integer('max_length', 20, 'items of the longest prefix')
    flags.DEFINE_multi_string('cell', list(session_gnn_ours.CELLS), 'ours, SR-GNN first')
    flags.DEFINE_integer('threads', 2, 'cores of either')
    flags.DEFINE_string('out', str(Path(__file__).with_suffix('.json')), 'where the figures go')
    app.run(main)
