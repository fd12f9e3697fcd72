"""Prompts laid end to end: positions, parts that are absent, deep features."""

import jax.numpy as jnp
import numpy as np
import pytest

from tpad_jax.models import stream


def words(count, rows=1, mask=True):
    return stream.plain(jnp.zeros((rows, count, 4)), jnp.full((rows, count), mask))


def image(rows, columns, there=True, batch=1, deep=None):
    x = jnp.zeros((batch, rows * columns, 4))
    return stream.grid(x, jnp.full((batch, rows * columns), there), rows, columns, deep)


def counted(parts):
    """Positions as Qwen2-VL defines them, token by token: ints are words, pairs are grids."""
    out, now = [], 0
    for part in parts:
        if isinstance(part, int):
            out += [(now + i,) * 3 for i in range(part)]
            now += part
        else:
            out += [(now, now + r, now + c) for r in range(part[0]) for c in range(part[1])]
            now += max(part)
    return out


@pytest.mark.parametrize('parts', [
    (3,), (2, (2, 3), 2), ((3, 2), (2, 2), 1), (1, (1, 4), 2, (4, 1), 3)])
def test_positions_of_words_and_images(parts):
    joined = stream.join(*(words(p) if isinstance(p, int) else image(*p) for p in parts))
    assert stream.positions(joined)[0].tolist() == [list(p) for p in counted(parts)]


def test_what_is_absent_takes_no_position_wherever_it_stands():
    whole = stream.join(words(2), image(2, 3), words(3))
    holes = stream.join(words(4, mask=False), words(2), image(2, 2, there=False), image(2, 3),
                        words(1, mask=False), words(3), words(2, mask=False))
    there = np.asarray(holes.mask[0])
    np.testing.assert_array_equal(stream.positions(holes)[0][there], stream.positions(whole)[0])


def test_rows_may_lack_an_image_the_others_have():
    seen = image(2, 2, batch=2).replace(mask=jnp.array([[True] * 4, [False] * 4]))
    after = stream.positions(stream.join(seen, words(2, rows=2)))[:, 4:, 0]
    assert after.tolist() == [[2, 3], [0, 1]]


def test_deep_features_stand_where_their_image_stands():
    deep = jnp.arange(1.0, 1 + 4 * 2 * 4).reshape(1, 4, 2, 4)
    joined = stream.join(words(2), image(2, 2, deep=deep), words(1))
    assert joined.deep.shape == (1, 7, 2, 4)
    np.testing.assert_array_equal(joined.deep[:, 2:6], deep)
    assert not joined.deep[:, :2].any()
    assert not joined.deep[:, 6:].any()
    assert stream.join(words(2), image(2, 2)).deep is None


def test_rows_and_flatten_keep_tokens_and_their_marks_together():
    one = stream.join(words(1, rows=3), image(2, 2, batch=3))
    one = one.replace(x=one.x + jnp.arange(3.0)[:, None, None])
    laid = stream.flatten(stream.rows(one, jnp.array([[2, 0], [1, 1]])))
    assert laid.x[..., 0].tolist() == [[2.0] * 5 + [0.0] * 5, [1.0] * 10]
    assert stream.positions(laid)[0, 5:, 1].tolist() == [3, 4, 4, 5, 5]
