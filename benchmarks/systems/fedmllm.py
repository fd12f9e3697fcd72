"""FedMLLM: what rounds of clients lose against training at one place, and missing modalities.

Rounds: the Transfer-MLLM is taught on the sessions of eight clients, which are divided by the brand
of the last item (Dirichlet 0.5). All arms compute as many gradients per session: one client alone
('local'), the mean of the clients ('fedavg'), with a pull ('fedprox'), with momentum ('fedadam'),
and all sessions at one place ('central'). Missing: a recommender of content alone, where so many
cold items lack their picture or their text, half each, with and without hiding in training.
"""

from benchmarks.systems import Cell, Test, planted

ROUNDS, RATES, WORLDS = 'rounds', (0.0, 0.3, 0.6, 0.9), range(3)
CLIENTS, LOCAL, NUMBER, SESSIONS = 8, 3, 20, 1500
ARMS = {'local': {'only': '0'}, 'fedavg': {}, 'fedprox': {'proximal': 0.01},
        'fedadam': {'rule': 'adam', 'server_rate': 0.01}, 'central': None}
DROPOUT = {'complete': 0.0, 'hidden': 0.3}
MEASURES = {'share': (100, 1), 'share, cold': (100, 1), 'MB a round': (1, 2)}
TESTS = [Test('fedavg', 'local', 'share', ROUNDS), Test('central', 'fedavg', 'share', ROUNDS),
         *(Test('hidden', 'complete', 'share, cold', f'missing {rate}') for rate in RATES)]


def cells():
    """Rounds first."""
    return [Cell(arm, ROUNDS, world) for world in WORLDS for arm in ARMS] + [
        Cell(arm, f'missing {rate}', world) for world in WORLDS for arm in DROPOUT
        for rate in RATES]


def run(cell, place):
    """Train the arm and compare it with the oracle."""
    from benchmarks import ablation
    from configs import amazon
    from tpad_jax.evaluation.scorers import scorer

    c = amazon.get_config()
    c.rivals, c.diagnostics, c.seed = {}, 0, cell.seed
    c.data.planted.update(seed=cell.world, train=SESSIONS)
    if cell.on == ROUNDS:
        return _rounds(c, cell, place)
    c.stages, c.data.missing.of = 'knowledge,recommend', 'cold'
    rate = float(cell.on.split()[1])
    c.data.missing.update(image=rate / 2, text=rate / 2)
    c.model.update(modality_dropout=DROPOUT[cell.arm], recommend='k', use_id=False, use_side=False)
    job = ablation.train(c, place.workdir, place.stopping, ('knowledge', 'recommend'))
    return planted(job, scorer(job.spec, job.devices)(job.nested(), job.catalogue))


def _rounds(c, cell, place):
    """The share of the Transfer-MLLM's lists, and what a round sends."""
    from benchmarks import ablation
    from tpad_jax.training import optimizer
    from tpad_jax.training.stages import ENTRIES

    c.stages = 'knowledge,teach'
    changes = ARMS[cell.arm]
    steps, every = (NUMBER, 5) if changes is not None else (
        NUMBER * LOCAL * CLIENTS, 5 * LOCAL * CLIENTS)
    c.stage.teach.update(steps=steps, eval_every=every, epochs=0.0, patience=0)
    c.federated.update(clients=CLIENTS, local=LOCAL, stages='' if changes is None else 'teach',
                       **(changes or {}))
    if not (place.workdir / 'config.json').is_file():
        ablation.after_knowledge(c, place.workdir, place.workdir.parent, place.stopping)
    job = ablation.train(c, place.workdir, place.stopping, ('knowledge', 'teach'))
    score = ENTRIES['teach'].scorer(job.spec, job.devices)(job.nested(), job.catalogue)
    trained, _ = optimizer.split(job.params, c.stage.teach.train)
    sent = 0 if changes is None else 2 * (1 if changes.get('only') else CLIENTS) * sum(
        x.nbytes for x in trained.values())
    return planted(job, score) | {'MB a round': sent / 2**20}
