"""How long a stage trains: steps, validations and decay by the size of the data [ours].

A number of steps that suits 25,000 training rows repeats 1,500 rows a hundred times: the model
overfits, and validation then stops it at its full learning rate, before it was annealed. So a stage
has a number of epochs, and its schedule ends with them.
"""

import copy

import numpy as np

from tpad_jax.data.sessions import Sessions
from tpad_jax.training.stages import ENTRIES

# rows read, repeats included: embeddings of a few hundred sessions underfit with 15,000
LEAST = 50_000


def of_data(config, train: Sessions):
    """Derive the steps of every stage that has epochs.

    Steps become epochs * rows / batch_size, for a recommender of at least LEAST rows, and at most
    `steps`. The validations keep their number. A step's decay grows as the steps shrink, which
    keeps the decay of a whole training: the average over which AdamW weighs gradients then spans
    the same number of epochs (Wang and Aitchison 2024, arXiv 2405.13698).

    Args:
      config: of the run, or one that this function returned, which it returns unchanged.
      train: training sessions.

    Returns:
      A copy with these steps.
    """
    config = copy.deepcopy(config)
    for name, stage in config.stage.items():
        if not (stage.epochs and stage.steps) or ENTRIES[name].batches != 'sessions':
            continue
        follow = np.maximum(train.lengths - 1, 0)  # items that follow another
        rows = int(follow.sum() if stage.every_prefix else (follow > 0).sum())
        least = LEAST if ENTRIES[name].recommends else stage.batch_size  # T reads no embeddings
        steps = min(round(max(stage.epochs * rows, least) / stage.batch_size), stage.steps)
        share = steps / stage.steps
        stage.update(steps=steps, eval_every=round(stage.eval_every * share) or
                     min(stage.eval_every, 1))
        if stage.optimiser == 'adamw':  # elsewhere the decay is a penalty in the loss
            stage.weight_decay /= share
    return config
