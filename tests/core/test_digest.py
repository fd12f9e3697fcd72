"""The checksum of an array."""

import jax.numpy as jnp
import numpy as np

from tpad_jax.core.digest import digest


def test_digest_sees_any_one_bit():
    array = jnp.asarray(np.random.default_rng(0).normal(size=(6, 5)), jnp.float32)
    octets = np.frombuffer(np.asarray(array).tobytes(), np.uint8)
    before = int(digest(array))
    for bit in range(octets.size * 8):
        other = octets.copy()
        other[bit // 8] ^= 1 << (bit % 8)
        assert int(digest(jnp.asarray(other.view(np.float32).reshape(6, 5)))) != before
    assert int(digest(array[::-1])) != before
