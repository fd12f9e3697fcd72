"""TPAD in JAX: transitional patterns distilled into multimodal item representations."""


def load(workdir, **options):
    """A finished run as an object that recommends, see `serving.load`; only now is jax imported.

        shop = tpad_jax.load('runs/amazon')
        shop.recommend([['P000000123', 'P000000045']], k=20).items
    """
    from tpad_jax.serving import recommender

    return recommender.load(workdir, **options)
