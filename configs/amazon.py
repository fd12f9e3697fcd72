"""Raw Amazon files: `--config=configs/amazon.py` or `configs/amazon.py:tiny`, a smoke run of all
stages.

Without `--config.data.raw_dir=DIR` the planted catalogue is written and read in its place.
"""

from configs import base


def get_config(variant: str = ''):
    """`variant`: '' or 'tiny'.

    Raises:
      ValueError: another variant.
    """
    c = base.get_config()
    c.name = 'amazon'
    if variant == 'tiny':
        c.name = 'amazon_tiny'
        c.save_every = 5
        # compile quickly rather than well: so few steps never earn it back
        c.xla_flags = '--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false'
        c.log_every = 1
        c.search.trials = 1  # baselines as they are
        c.data.planted.update(items=80, train=300, valid=60, test=80)
        for name, steps in dict(knowledge=8, transfer=8, recommend=40, joint=6).items():
            c.stage[name].update(steps=steps, batch_size=32)
        c.stage.recommend.eval_every = 20
        c.stage.joint.update(eval_every=3, refresh_every=3)
    elif variant:
        raise ValueError(f'configs/amazon.py has no variant {variant!r}: leave it out or name tiny')
    return c
