"""Our side of `benchmarks.session_gnn`: the library's batches, train step and ranks."""

import os
import time
from functools import partial

import numpy as np

from benchmarks.session_gnn_work import fastest, training_bytes, training_operations
from tpad_jax.core import startup
from tpad_jax.data import sessions
from tpad_jax.data.sources import ids

BATCH, WIDTH = 100, 100  # as published
STEPS = 5000  # more than a cell runs: the static sizes of its batches hold for so many


def published(c):
    """config -> the same with the published SR-GNN: no dropout, no positions, no repeats."""
    c.model.update(encoder='sr_gnn', width=WIDTH, positions=False, dropout=0.0, item_dropout=0.0,
                   id_dropout=0.0, normalise=False, repeats=False)
    c.losses.next_item.update(h='h', temperature=1.0, smoothing=0.0, chunk=0, dtype='float32')
    c.stage.recommend.update(every_prefix=True, optimiser='adam', learning_rate=1e-3,
                             weight_decay=1e-5, schedule='constant', warmup=0.0)
    return c


def narrow(c):
    """The published SR-GNN with its softmax in bfloat16, sums in float32."""
    published(c).losses.next_item.update(chunk=2048, dtype='bfloat16')
    return c


def default(c):
    """configs/sessions.py as it comes: the encoder, batch and softmax one would use."""
    return c


# name: config, rows of a step (0: the config's) and rows that are ranked at a time
CELLS = {
    'SR-GNN': (published, BATCH, BATCH),  # what the peer does
    'SR-GNN, batch 512': (published, 512, 512),
    'SR-GNN, bfloat16': (narrow, 512, 512),
    'default encoder': (default, 0, 512),
}


class Ours:
    """Our side with its data read, ready to be asked."""

    def __init__(self, path, max_length, threads, cells):
        """Read, build and start every cell; jax is imported in this process only."""
        startup.keep_memory()  # what launch.py does for itself
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
        from configs import sessions as configs

        os.environ['XLA_FLAGS'] = configs.get_config().xla_flags
        import jax
        import jax.numpy as jnp

        self.jax, self.max_length, self.threads = jax, max_length, threads
        train, test, *_ = ids.read(path)
        self.data = ids.data(train, test, test)
        self.num_items = self.data.num_items
        self.train_rows = sessions.rows(train, max_length)
        self.test_rows = sessions.rows(test, max_length)
        counts = sessions.counts(train, self.num_items).astype(np.float32)
        self.catalogue = {'warm': jnp.asarray(self.data.warm), 'side': jnp.asarray(self.data.side),
                          'popularity': jnp.asarray(counts)}
        self.cells = {name: self._build(*CELLS[name]) for name in cells}

    def _build(self, change, batch, ranked):
        import jax
        from flax.traverse_util import flatten_dict

        from configs import sessions as configs
        from tpad_jax.data import batches
        from tpad_jax.distributed import devices as devices_lib
        from tpad_jax.evaluation import scorers
        from tpad_jax.models import tpad
        from tpad_jax.training import step

        config = change(configs.get_config())
        batch = batch or config.stage.recommend.batch_size
        devices = devices_lib.choose('auto', 0)
        model = tpad.build(None, config.model, recommend=(), items=self.num_items,
                           max_length=self.max_length, side_sizes=())
        spec = step.make_spec(config, 'recommend', model, config.seed)
        make = devices_lib.compiled(partial(tpad.recommender_init, spec=model))
        params = {'recommender': make(jax.random.key(0), catalogue=self.catalogue)}
        params = flatten_dict(params, sep='/')
        every = config.stage.recommend.every_prefix
        draw = batches.session_batches(self.data, batch_size=batch, seed=0, every_prefix=every,
                                       max_length=self.max_length, shards=devices.shards,
                                       steps=STEPS)
        return {'devices': devices, 'spec': spec, 'params': params, 'draw': draw, 'batch': batch,
                'ranked': ranked, 'every': every, 'encoder': config.model.encoder,
                'width': config.model.width, 'softmax': config.losses.next_item.dtype,
                'state': devices.share(step.start(spec, params, '^recommender/')),
                'step': devices.lift(partial(step.train_step, spec=spec)),
                'bind': scorers.scorer(model, devices)}

    def facts(self) -> dict:
        """Per cell: what it is; for the published network operations and bytes per pair."""
        from tpad_jax.models.sessions.sr_gnn import rooms

        out = {}
        for name, cell in self.cells.items():
            out[name] = {n: cell[n] for n in ('batch', 'ranked', 'encoder', 'width', 'softmax')}
            if CELLS[name][0] is not published:
                continue
            size, batch = (self.num_items + 1, cell['width']), cell['batch']
            positions = rooms(batch, self.max_length)
            compiled = cell['step'].lower(cell['state'], self._next(cell)[0],
                                          self.catalogue).compile()
            cost = compiled.cost_analysis()
            out[name] |= {
                'operations': training_operations(*size, batch, positions[0], again=1),
                'bytes': training_bytes(*size, batch),
                # the compiler counts all branches, packed rows and padded ones, and every operand
                # of every operation, in a cache or not
                'operations_of_all_branches': training_operations(
                    *size, batch, sum(positions), again=1),
                'compiler_operations': cost['flops'] / batch,
                'compiler_bytes': cost['bytes accessed'] / batch}
        return out

    def scores(self, weights, count) -> np.ndarray:
        """[count, V] of the first test rows, by the peer's weights."""
        from flax.traverse_util import unflatten_dict

        cell = next(iter(self.cells.values()))
        tree = unflatten_dict(self._taken(cell, weights), sep='/')
        return cell['bind'](tree, self.catalogue)(self.test_rows.items[:count])[:, 1:]

    def losses(self, weights, steps) -> list:
        """Of the first steps on the first training rows, by the peer's weights."""
        from tpad_jax.training import step

        cell = next(iter(self.cells.values()))
        state = cell['devices'].share(step.start(cell['spec'], self._taken(cell, weights),
                                                  '^recommender/'))
        found, rows, batch = [], self.train_rows, cell['batch']
        for number in range(steps):
            part = slice(number * batch, (number + 1) * batch)
            given = dict(items=rows.items[part], next=rows.next[part], target=rows.target[part],
                         valid=np.ones(batch, bool), row=np.arange(batch, dtype=np.int32))
            state, logged = cell['step'](state, cell['devices'].place(given), self.catalogue)
            found.append(float(logged['loss']))
        return found

    def train(self, name, seconds):
        """(pairs, wall, processor seconds) of training, as `fitting.fit` drives the step."""
        cell, pending, pairs = self.cells[name], None, 0
        state, (batch, count) = cell['state'], self._next(cell)
        self.jax.block_until_ready((state, batch))
        begun, cpu = time.perf_counter(), time.process_time()
        while time.perf_counter() - begun < seconds:
            state, logged = cell['step'](state, batch, self.catalogue)
            pairs += count
            batch, count = self._next(cell)  # is made while the step computes
            if pending is not None:
                float(pending['loss'])
            pending = logged
        cell['state'] = self.jax.block_until_ready(state)
        return pairs, time.perf_counter() - begun, time.process_time() - cpu

    def score(self, name, seconds):
        """The same of ranking test rows exactly."""
        from flax.traverse_util import unflatten_dict

        cell, rows, pairs, at = self.cells[name], self.test_rows, 0, 0
        tree = unflatten_dict(cell['state'].params, sep='/')
        count = 20 * cell['ranked']
        begun, cpu = time.perf_counter(), time.process_time()
        scorer = cell['bind'](tree, self.catalogue)
        while time.perf_counter() - begun < seconds:
            part = slice(at, at + count)
            above, _ = scorer.ranks(rows.items[part], rows.target[part], rows=cell['ranked'])
            pairs += len(above)
            at = at + count if at + count < len(rows.target) else 0
        return pairs, time.perf_counter() - begun, time.process_time() - cpu

    def product(self) -> float:
        """GF/s of a plain float32 matrix product."""
        x = self.jax.numpy.ones((2048, 2048))
        product = self.jax.jit(lambda x: x @ x)
        return fastest(lambda: product(x).block_until_ready(), self.threads)

    def _next(self, cell):
        """The next batch, placed, and its pairs: one per row, or one per item of a session."""
        batch = next(cell['draw'])
        pairs = len(batch['row']) if cell['every'] else int((batch['items'] > 0).sum())
        return cell['devices'].place(batch), pairs

    def _taken(self, cell, weights) -> dict:
        """The parameters {path: array} with the peer's weights in them."""
        def joined(*names):
            return np.concatenate([weights[n].T for n in names], axis=-1)

        taken = {
            'node_kernel': joined('gnn.linear_edge_out.weight', 'gnn.linear_edge_in.weight',
                                  'gnn.w_hh'),
            'node_bias': joined('gnn.linear_edge_out.bias', 'gnn.linear_edge_in.bias', 'gnn.b_hh'),
            'edge_bias': joined('gnn.b_iah', 'gnn.b_oah'),
            'message_kernel': joined('gnn.w_ih'), 'message_bias': joined('gnn.b_ih'),
            'w1_kernel': joined('linear_one.weight'), 'w1_bias': joined('linear_one.bias'),
            'w2_kernel': joined('linear_two.weight'), 'w2_bias': joined('linear_two.bias'),
            'q_kernel': joined('linear_three.weight'),
            'w3_kernel': joined('linear_transform.weight'),
            'w3_bias': joined('linear_transform.bias')}
        taken = {f'recommender/encoder/{n}': x for n, x in taken.items()}
        taken['recommender/fusion/id'] = weights['embedding.weight']
        return {**cell['params'], **{n: self.jax.numpy.asarray(x) for n, x in taken.items()}}
