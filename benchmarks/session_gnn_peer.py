"""The authors' PyTorch SR-GNN as a contestant of `benchmarks.session_gnn`.

Nothing of it stands here: its modules are imported from a directory outside this tree, and its
functions are called in the order its own training and test loops call them.
"""

import os
import sys
import time
import warnings
from types import SimpleNamespace

import numpy as np

from benchmarks.session_gnn_work import fastest, read, training_bytes, training_operations


class Peer:
    """The peer with its data read, ready to be asked; torch is imported in its process only."""

    def __init__(self, directory, path, max_length, threads, batch, width):
        """Import, read, build."""
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
        sys.path.insert(0, directory)
        import torch

        torch.set_num_threads(threads)
        torch.manual_seed(0)
        # its way to make a tensor from a list of arrays, which torch calls slow
        warnings.filterwarnings('ignore', message='Creating a tensor from a list')
        import model
        import utils

        self.torch, self.code, self.batch = torch, model, batch
        num_items, train, test = read(path, max_length)
        self.train_data, self.test_data = (
            utils.Data(([row[row > 0].tolist() for row in rows.items], rows.target.tolist()),
                       shuffle=shuffle) for rows, shuffle in ((train, True), (test, False)))
        options = SimpleNamespace(hiddenSize=width, batchSize=batch, nonhybrid=False, step=1,
                                  lr=1e-3, l2=1e-5, lr_dc=0.1, lr_dc_step=3)
        self.first_rows = np.arange(batch * 5).reshape(5, batch)
        self.model = model.trans_to_cuda(model.SessionGraph(options, num_items + 1))

    def facts(self) -> dict:
        """What its table row says; operations are those of what it computes, padding included."""
        size = self.model.embedding.weight.shape
        positions = self.batch * self.train_data.len_max
        return {'batch': self.batch,
                'operations': training_operations(*size, self.batch, positions, again=0),
                'bytes': training_bytes(*size, self.batch)}

    def weights(self) -> dict:
        """{name: array} before any step."""
        return {n: x.detach().cpu().numpy().copy() for n, x in self.model.state_dict().items()}

    def scores(self, count) -> np.ndarray:
        """[count, V] of the first test rows."""
        self.model.eval()
        with self.torch.no_grad():
            return self.code.forward(self.model, np.arange(count), self.test_data)[1].cpu().numpy()

    def losses(self, steps) -> list:
        """Of the first steps on the first training rows."""
        self.model.train()
        return [self._step(rows).item() for rows in self.first_rows[:steps]]

    def train(self, seconds):
        """(pairs, wall, processor seconds) of training on shuffled rows."""
        self.model.train()
        return self._turn(self.train_data, self._step, seconds)

    def score(self, seconds):
        """The same of its evaluation: the first 20 items of every row, hit and reciprocal rank."""
        self.model.eval()
        self.gains = []
        return self._turn(self.test_data, self._rank, seconds)

    def product(self) -> float:
        """GF/s of a plain float32 matrix product."""
        x = self.torch.ones(2048, 2048)
        return fastest(lambda: x @ x, self.torch.get_num_threads())

    def _turn(self, data, work, seconds):
        parts = data.generate_batch(self.batch)
        pairs, begun, cpu = 0, time.perf_counter(), time.process_time()
        for rows in parts:
            work(rows)
            pairs += len(rows)
            if time.perf_counter() - begun > seconds:
                break
        return pairs, time.perf_counter() - begun, time.process_time() - cpu

    def _step(self, rows):
        model = self.model
        model.optimizer.zero_grad()
        target, scores = self.code.forward(model, rows, self.train_data)
        target = self.code.trans_to_cuda(self.torch.Tensor(target).long())
        loss = model.loss_function(scores, target - 1)
        loss.backward()
        model.optimizer.step()
        return loss

    def _rank(self, rows):
        target, scores = self.code.forward(self.model, rows, self.test_data)
        best = self.code.trans_to_cpu(scores.topk(20)[1]).detach().numpy()
        for row, item in zip(best, target, strict=True):
            place = np.where(row == item - 1)[0]
            self.gains.append((np.isin(item - 1, row), 1 / (place[0] + 1) if len(place) else 0))
