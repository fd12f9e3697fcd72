"""TPAD in JAX: transitional patterns distilled into multimodal item representations."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tpad_jax.serving.recommender import Recommender


def load(workdir, *, base: str = '') -> 'Recommender':
    """Load a finished run as an object that recommends. jax is imported by this call.

        shop = tpad_jax.load('runs/amazon')
        shop.recommend([['P000000123', 'P000000045']], k=20).items

    Args:
      workdir: of the run.
      base: directory of the run's MLLM base, if it was moved; only `add_items` reads it.

    Returns:
      The recommender.

    Raises:
      InputError: the run is not finished, a file of it is damaged, or the environment forbids jax
        to promote ranks.
    """
    from tpad_jax.core import startup
    from tpad_jax.serving import recommender

    # lists are the same with 64 bits, but encoders cannot be traced without rank promotion
    startup.check_environment(['JAX_NUMPY_RANK_PROMOTION'])
    return recommender.load(workdir, base=base)
