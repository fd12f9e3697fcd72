"""TPAD without a part, or with a part replaced: `--config=configs/ablations.py:NAME`.

Each variant changes a few options of `full`, which is TPAD as in the paper: the MLLMs are frozen
while the recommender trains. `joint` adds the stage that trains everything at once.
"""

from tpad_jax import config

TAUGHT = config.TAUGHT | {'stages': 'knowledge,teach,transfer,recommend'}
BOTTLENECK = {'model.bottleneck': True, 'losses.bottleneck.weight': 1e-3}
# {name: {config key: value}}
ABLATIONS = {
    'full': {},
    'joint': {'stages': 'knowledge,transfer,recommend,joint'},
    # one part of the paper removed
    'without_generation': {'stage.knowledge.steps': 0, 'losses.gen_knowledge.weight': 0.0,
                           'losses.gen_transfer.weight': 0.0},
    'without_disentanglement': {'losses.disentangle.weight': 0.0, 'losses.club_fit.weight': 0.0},
    'without_alignment': {'losses.align.weight': 0.0},
    'without_distillation': {'losses.distil.weight': 0.0},
    'without_discrepancy': {'losses.discrepancy.weight': 0.0},
    'without_transfer': {'stages': 'knowledge,recommend', 'model.recommend': 'k'},
    'without_knowledge': {'stage.knowledge.steps': 0, 'model.form': 'full',
                          'losses.align.weight': 0.0},
    # r made in another way than by reading items again
    'adapter_only': {'model.reread': False},
    'random_adapter': {'stages': 'knowledge,recommend', 'model.recommend': 'k',
                       'model.feature_hidden': 256},
    'merging': {'model.blend.kind': 'mean', 'stage.transfer.fresh': '',
                'losses.distil.weight': 0.0, 'losses.discrepancy.weight': 0.0},
    # the Transfer-MLLM learns first and is then frozen, as in configs/amazon.py, and one part of
    # that changed: the recommender learns from its distribution, too; the recommender reads r
    # alone, or inputs as wide without r; r are T's items as they are; the base reads sessions, an
    # item as three tokens; and the distillation of `full`, by a head and in slow steps
    'taught': TAUGHT,
    'taught_soft': TAUGHT | {'losses.soft.weight': 0.5},
    'taught_r_alone': TAUGHT | {'model.recommend': 'r'},
    'taught_k_twice': TAUGHT | {'model.recommend': 'k,k'},
    'taught_adapter_only': TAUGHT | {'model.reread': False},
    'taught_by_base': TAUGHT | {'model.session_layers': 0, 'model.form': 'compressed'},
    'taught_through_head': TAUGHT | {
        'model.critics.distil': 'separable',
        'stage.transfer.rates': (('^lora/distil/', 0.1), ('^adapter/', 0.2))},
    # an information bottleneck on p in place of disentanglement, in the paper's form and taught
    'bottleneck': BOTTLENECK | {'losses.disentangle.weight': 0.0, 'losses.club_fit.weight': 0.0},
    'taught_bottleneck': TAUGHT | BOTTLENECK,
    # positions of one session are never negatives of each other
    'taught_groups': TAUGHT | {'losses.distil.by_session': True},
    # the Transfer-MLLM also reads words and ranks items by those it expects; it and the recommender
    # also read residual codes of k
    'taught_words': TAUGHT | {'model.words': True},
    'taught_codes': TAUGHT | {'model.codes': (3, 16), 'model.recommend': 'k,r,codes'},
    # so much disentanglement that p keeps little to predict from
    'strong_disentanglement': {'losses.disentangle.weight': 0.02},
    # five times the distillation steps, stopped where T predicts validation items best
    'longer_transfer': {'stage.transfer.steps': 360, 'stage.transfer.eval_every': 60},
    # other inputs of the recommender
    'longer_knowledge': {'stages': 'knowledge,recommend', 'model.recommend': 'k',
                         'stage.knowledge.steps': 180},
    'frozen_raw': {'stages': 'knowledge,recommend', 'model.recommend': 'k',
                   'stage.knowledge.steps': 0},
    'id_only': {'stages': 'recommend', 'model.recommend': '', 'model.use_side': False},
    'content_only': {'model.use_id': False},
    'true_attributes': {'stages': 'recommend', 'model.recommend': 'true', 'model.use_side': False},
}


def get_config(variant: str = 'full'):
    """Return the config of a variant.

    Args:
      variant: one of ABLATIONS.

    Raises:
      ValueError: the variant is unknown.
    """
    if variant not in ABLATIONS:
        raise ValueError(f'configs/ablations.py has no variant {variant!r}. Expected one of '
                         f'{", ".join(ABLATIONS)}')
    c = config.get_config()
    c.name = f'ablation_{variant}'
    c.stages = 'knowledge,transfer,recommend'
    c.rivals = {}
    # longer than the default run: the settings of the cells in benchmarks/ablation
    c.stage.knowledge.steps, c.stage.transfer.steps, c.model.item_dropout = 60, 72, 0.2
    c.stage.recommend.update(batch_size=512, epochs=0.0, eval_every=50, patience=5)
    c.update_from_flattened_dict(ABLATIONS[variant])
    return c
