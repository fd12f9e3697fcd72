"""TPAD without a part, or with another in its place: `--config=configs/ablations.py:NAME`.

Each is tpad_jax/config.py with the few keys below changed. `full` is TPAD as the paper has it, with
the MLLMs frozen while the recommender trains; `joint` adds the step that trains all of it at once.
"""

from tpad_jax import config

# of what every name changes, {config key: value}
ABLATIONS = {
    'full': {},
    'joint': {'stages': 'knowledge,transfer,recommend,joint'},
    # the paper's parts, taken out one by one
    'without_generation': {'stage.knowledge.steps': 0, 'losses.gen_knowledge.weight': 0.0,
                           'losses.gen_transfer.weight': 0.0},
    'without_disentanglement': {'losses.disentangle.weight': 0.0, 'losses.club_fit.weight': 0.0},
    'without_alignment': {'losses.align.weight': 0.0},
    'without_distillation': {'losses.distil.weight': 0.0},
    'without_discrepancy': {'losses.discrepancy.weight': 0.0},
    'without_transfer': {'stages': 'knowledge,recommend', 'model.recommend': 'k'},
    'without_knowledge': {'stage.knowledge.steps': 0, 'model.form': 'full',
                          'losses.align.weight': 0.0},
    # in place of K's own reading for r
    'adapter_only': {'model.reread': False},
    'random_adapter': {'stages': 'knowledge,recommend', 'model.recommend': 'k',
                       'model.feature_hidden': 256},
    'merging': {'model.blend.kind': 'mean', 'stage.transfer.fresh': '',
                'losses.distil.weight': 0.0, 'losses.discrepancy.weight': 0.0},
    # as much of it as leaves T little to foretell by
    'strong_disentanglement': {'losses.disentangle.weight': 0.02},
    # five times the distillation, at the step whose T foretells validation best
    'longer_transfer': {'stage.transfer.steps': 360, 'stage.transfer.eval_every': 60},
    # what a recommender is given
    'longer_knowledge': {'stages': 'knowledge,recommend', 'model.recommend': 'k',
                         'stage.knowledge.steps': 180},
    'frozen_raw': {'stages': 'knowledge,recommend', 'model.recommend': 'k',
                   'stage.knowledge.steps': 0},
    'id_only': {'stages': 'recommend', 'model.recommend': '', 'model.use_side': False},
    'content_only': {'model.use_id': False},
    'true_attributes': {'stages': 'recommend', 'model.recommend': 'true', 'model.use_side': False},
}


def get_config(variant: str = 'full'):
    """`variant`: one of ABLATIONS.

    Raises:
      ValueError: another variant.
    """
    if variant not in ABLATIONS:
        raise ValueError(f'configs/ablations.py has no variant {variant!r}: name one of '
                         f'{", ".join(ABLATIONS)}')
    c = config.get_config()
    c.name = f'ablation_{variant}'
    c.stages = 'knowledge,transfer,recommend'
    c.rivals = {}
    c.update_from_flattened_dict(ABLATIONS[variant])
    return c
