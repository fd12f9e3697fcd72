"""Run TPAD: `python launch.py --config=configs/amazon.py [--workdir=DIR] [--config.KEY=VALUE ...]`.

The same as `python -m tpad_jax.train`, which runs anywhere.

Exit status: 0 done, 1 a number was not finite or a defect, 2 unusable input or config in one
sentence, 75 stopped by SIGINT or SIGTERM with its state saved (the same command goes on).
"""

from absl import app, flags

from tpad_jax import train

flags.adopt_module_key_flags(train)

if __name__ == '__main__':
    app.run(train.main, flags_parser=train.parse)
