"""Two recommenders whose scores are added [ours].

Encoders of different kinds err on different sessions: where `config.partner` says how a second
recommender differs from the first, it is trained beside it, with its own stage and its own
validation, and the list that is served is made of the sum of both scores. Each is a log-linear
model with a temperature of its own, so the sum needs no weight, and none is tuned.
"""

import copy

from flax.traverse_util import unflatten_dict

from tpad_jax.errors import InputError
from tpad_jax.evaluate import evaluate
from tpad_jax.models import tpad
from tpad_jax.recommend import scorer

NAME = 'mixture'


def partnered(config):
    """The partner's whole config: the run's, with config.partner laid over it.

    Raises:
      InputError: config.partner names a key that does not exist.
    """
    other = copy.deepcopy(config)
    changes = other.partner.to_dict()
    other.partner = {}
    other.lock()
    try:
        other.update(changes)
    except (KeyError, TypeError) as error:
        raise InputError(f'config.partner does not fit the config: {error.args[0]}') from error
    return other


def run(job, writer, progress) -> tuple[dict, dict]:
    """Train the partner of a job whose recommend stage is done, and score both together.

    Returns:
      {name: scorer} and {name: validation metrics} of the mixture and of each of the two.
    """
    other = copy.copy(job)
    other.config = partnered(job.config)
    other.catalogue = dict(job.catalogue)
    other.spec = tpad.build(None, other.config.model, recommend=(), items=job.data.num_items,
                            max_length=job.max_length, side_sizes=job.data.side_sizes)
    other._count()
    other.params = other._fresh(other.spec)
    other.run_stage('recommend', writer, progress, name='partner')
    pair = job, other

    def bound(of):
        return scorer(tuple(j.spec for j in of), job.devices.own)(
            tuple(unflatten_dict(j.params, sep='/') for j in of), tuple(j.catalogue for j in of))

    valid, _ = evaluate(bound(pair), job.valid, job.data.warm, ks=(20,), name=NAME)
    names = [j.config.model.encoder for j in pair]
    if names[0] == names[1]:
        names[1] += '_partner'
    chosen = dict(zip(names, (j.record['valid'] for j in pair), strict=True))
    chosen[NAME] = {k: valid[k] for k in ('hit@20', 'mrr@20', 'ndcg@20')}
    if job.config.refit:
        for j, name in zip(pair, ('refit', 'partner_refit'), strict=True):
            job.pause()
            j.refit(writer, progress, name)
        job.final = other.final
    scorers = {name: bound((j,)) for name, j in zip(names, pair, strict=True)}
    return {NAME: bound(pair), **scorers}, chosen
