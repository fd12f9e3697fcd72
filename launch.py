"""Run TPAD: `python launch.py --config=configs/amazon.py [--workdir=DIR] [--config.KEY=VALUE ...]`.

The same as `python -m tpad_jax.train`, which runs in any directory.
"""

import sys

from tpad_jax import train

if __name__ == '__main__':
    sys.exit(train.main(name='launch.py'))
