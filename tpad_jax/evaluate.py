"""Compare finished runs row by row: `python -m tpad_jax.evaluate --compare RUN_A RUN_B`."""

import sys

from tpad_jax.evaluation import compare

if __name__ == '__main__':
    sys.exit(compare.main())
