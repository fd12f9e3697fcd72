"""A system of the literature as an option: `--config=configs/systems.py:NAME`.

Each name of SYSTEMS changes a few options of the default job, in which the Transfer-MLLM is taught
before anything is distilled. docs/systems/index.md has what each gave and when to use it.
"""

from tpad_jax import config

DEFAULT = config.get_config()
# {name: {config key: value}}
SYSTEMS = {
    # what follows by words and side values, as a rule too; the prior is config.data.prior
    'llm_lasso': {'baselines': f'{DEFAULT.baselines},content_lasso'},
    # the Transfer-MLLM also learns how a session is distributed over clusters of items
    'p2rec': {'model.clusters': 32, 'model.clusters_of': 'z', 'losses.clusters.weight': 0.3,
              'losses.clusters.stages': 'teach'},
    # eight clients teach the Transfer-MLLM without showing their sessions; a reader that has learnt
    # to do without a picture or a text
    'fedmllm': {'federated.stages': 'teach', 'federated.clients': 8, 'federated.local': 12,
                'federated.proximal': 0.01, 'stage.teach.steps': 20, 'stage.teach.epochs': 0.0,
                'stage.teach.eval_every': 5, 'stage.teach.patience': 0,
                'model.modality_dropout': 0.3},
    # adapters by kind of token, of which K's and T's are merged where they read words
    'damc': {'model.lora_by_kind': True, 'model.blend.kind': 'damc', 'model.blend.weights': '2,1',
             'stages': 'knowledge,transfer,recommend', 'stage.transfer.fresh': '',
             'losses.distil.weight': 0.0, 'losses.discrepancy.weight': 0.0},
    # a larger MLLM, config.mllm.teacher, teaches the heads alone; then the texts teach heads and
    # adapters; then both do
    'llava_kd': {'stage.knowledge.steps': 90, 'stage.knowledge.later': (('^lora/', 1 / 3),),
                 'losses.gen_knowledge.schedule': ((0, 0.0), (29, 0.0), (30, 1.0))}
    | {f'losses.{name}.{key}': value for name in ('teach_text', 'teach_image', 'teach_relations')
       for key, value in (('weight', 1.0), ('schedule', (
           (0, 1.0), (29, 1.0), (30, 0.0), (59, 0.0), (60, 1.0))))},
    # half of the decoder's weights are zero before anything is trained
    'tamp': {'mllm.prune': 0.5, 'mllm.prune_by': 'tamp'},
    # sessions retrieve from a gated memory of the training sessions
    'ra_blip': {'model.memory': 100, 'stages': 'knowledge,teach,transfer,recommend'},
    # the views of a session are held to the Transfer-MLLM's intents
    'intents': {'losses.intents.weight': 0.1},
    # sessions are summarised block by block; the other parts are docs/systems/mllm_msr.md
    'mllm_msr': {'model.form': 'recurrent', 'model.block': 3},
}
UNTAUGHT = ('damc',)  # the Transfer-MLLM learns in stage transfer, as in configs/ablations.py:full


def get_config(name: str = ''):
    """Return the config of a system.

    Args:
      name: one of SYSTEMS.

    Raises:
      ValueError: the name is unknown.
    """
    if name not in SYSTEMS:
        raise ValueError(f'configs/systems.py:{name}: this system is unknown. Expected one of '
                         f'{", ".join(SYSTEMS)}. Fix: name one of them after the colon.')
    c = config.get_config()
    c.name = name
    c.update_from_flattened_dict(({} if name in UNTAUGHT else config.TAUGHT) | SYSTEMS[name])
    return c
