"""Items that lose a modality: in the data, and in a step."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from tpad_jax.data.catalogue import Data
from tpad_jax.data.missing import hide
from tpad_jax.errors import InputError
from tpad_jax.models.outputs import OUTPUTS

V = 2000
PICTURES, WARM = np.arange(V + 1) % 4 > 0, np.arange(V + 1) % 2 > 0


def hidden(image=0.0, text=0.0, of='all', seed=0, pictures=PICTURES):
    names = ['', *(f'item {i}' for i in range(1, V + 1))]
    data = Data(names, names, names, None, pictures, None, (), None, None, None, WARM, {}, {}, 'f',
                'none')
    return hide(data, ConfigDict(dict(image=image, text=text, of=of)), seed)


def test_more_items_lose_it_at_a_higher_rate_and_none_loses_both():
    some, counts = hidden(0.3, 0.4)
    more, _ = hidden(0.5, 0.5)
    mute = np.array([not text for text in some.texts])
    mute[0] = False  # padding
    assert not (mute & ~some.has_image).any()
    assert counts == {'image': (PICTURES & ~some.has_image).sum(), 'text': mute.sum()}
    assert abs(counts['image'] / 1500 - 0.3) < 0.05
    assert abs(counts['text'] / 1500 - 0.4) < 0.05
    assert not (more.has_image & ~some.has_image).any()
    assert (more.has_image ^ (np.array(more.texts) != ''))[PICTURES].all()  # one of them is left
    again = hidden(0.3, 0.4)[0]
    assert again.texts == some.texts
    assert again.fingerprint == some.fingerprint != more.fingerprint
    assert hidden(0.3, 0.4, seed=1)[0].texts != some.texts


def test_only_the_named_items_lose_it():
    cold, _ = hidden(1.0, of='cold')
    np.testing.assert_array_equal(cold.has_image, PICTURES & WARM)
    assert hidden()[1] == {}
    with pytest.raises(InputError, match=r'config.data.missing.image=0.6 and text=0.6'):
        hidden(0.6, 0.6)
    with pytest.raises(InputError, match=r'none of the items .all. has a picture'):
        hidden(text=0.5, pictures=np.zeros(V + 1, bool))


def test_a_step_hides_one_modality_of_items_that_have_both():
    tokens = jnp.where(jnp.arange(V)[:, None] % 5 == 0, -1, 7) * jnp.ones((V, 3), int)
    has_image = jnp.asarray(PICTURES[1:])

    def seen(rate, key):
        return OUTPUTS['_seen'].make(SimpleNamespace(
            content=(None, has_image, tokens), keys={'withhold': key},
            batch=SimpleNamespace(ids=jnp.arange(V)),
            spec=SimpleNamespace(withhold=0.0, modality_dropout=rate)))

    _, left, _, keep = seen(0.4, jax.random.key(0))
    both = np.asarray(has_image & (tokens[:, 0] >= 0))
    blind, mute = np.asarray(has_image & ~left), ~np.asarray(keep)[:, 0]
    assert not (blind & mute).any()
    assert not (blind | mute)[~both].any()
    for lost in (blind, mute):
        assert abs(lost[both].mean() - 0.2) < 0.05
    for untouched in (seen(0.0, jax.random.key(0)), seen(0.4, None)):  # off, or evaluation
        np.testing.assert_array_equal(untouched[1], has_image)
