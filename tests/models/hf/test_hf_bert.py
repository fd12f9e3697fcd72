"""Text encoders against torch, and what their directories may not say."""

import json

import jax
import numpy as np
import pytest

pytest.importorskip('torch')

from configs import amazon
from tests import tiny_bert
from tpad_jax.data import text
from tpad_jax.errors import InputError
from tpad_jax.features import bases
from tpad_jax.job import validate
from tpad_jax.models.mllms import TextReader

BAR = 3e-5


def config(directory, **mllm):
    c = amazon.get_config('text_encoder')
    c.mllm.update({'checkpoint': str(directory), 'text_length': 22, **mllm})
    return c


def vectors(c, texts):
    """k of items that have these texts, by the reader of the config."""
    base = bases.read(c)
    tokens = text.tokenize(list(texts), base.directory, c.mllm.text_length)
    image = np.zeros((len(texts), 0, 0, 3), np.uint8)
    read = jax.jit(TextReader(base.module).apply)
    return np.asarray(read({'params': base.load(None)}, image, np.ones(len(texts), bool), tokens))


@pytest.mark.parametrize(('family', 'pooling', 'normalise'), [
    ('bert', 'mean', True), ('bert', 'cls', True), ('xlm-roberta', 'mean', False)])
def test_vectors_are_those_of_sentence_transformers(family, pooling, normalise, tmp_path):
    """With padding, an empty text and one that is cut; the prefix is a part of the text."""
    how = dict(pooling=pooling, normalise=normalise)
    tiny_bert.save(family, tmp_path, **how)
    expected, *_, mask = tiny_bert.vectors(tmp_path, **how)
    assert mask.sum(1).tolist()[1:3] == [2, 24]
    found = vectors(config(tmp_path), tiny_bert.TEXTS)
    assert found.shape == (len(expected), 1, expected.shape[1])
    np.testing.assert_allclose(found[:, 0], expected, rtol=0, atol=BAR)
    prefixed = [f'the lamp: {x}' for x in tiny_bert.TEXTS[:2]]
    expected, *_ = tiny_bert.vectors(tmp_path, prefixed, **how)
    found = vectors(config(tmp_path, before='the lamp: ', text_length=18), tiny_bert.TEXTS[:2])
    np.testing.assert_allclose(found[:, 0], expected, rtol=0, atol=BAR)


def test_unusable_directories_and_options_are_refused(tmp_path):
    tiny_bert.save('bert', tmp_path)
    pooling, modules = tmp_path / '1_Pooling/config.json', tmp_path / 'modules.json'

    def refused(*words, **mllm):
        with pytest.raises(InputError) as caught:
            bases.read(config(tmp_path, **mllm))
        assert all(word in str(caught.value) for word in words), caught.value

    refused('text_length=23', 'at most 22', text_length=23)
    refused('image_size=32', 'reads no images', image_size=32)
    refused("pooling='last'", "'mean' or 'cls'", pooling='last')
    pooling.write_text(json.dumps({'pooling_mode_max_tokens': True}))
    refused('pooling_mode_max_tokens', 'not implemented')
    modules.write_text(modules.read_text().replace('models.Normalize', 'models.Dense'))
    refused('Dense', 'not implemented')
    modules.unlink()
    refused("pooling='summary'", 'modules.json')
    assert bases.read(config(tmp_path, pooling='cls', text_length=42)).module.pooling == 'cls'
    refused('text_length=43', 'at most 42', pooling='cls', text_length=43)


def test_losses_of_texts_that_it_would_write_are_refused(tmp_path):
    c = config(tiny_bert.save('bert', tmp_path))
    assert validate.check(c) == ('knowledge', 'transfer', 'recommend')
    c.stage.knowledge.steps = 3
    with pytest.raises(InputError, match=r'losses\.gen_knowledge.*weights\.gen_knowledge=0'):
        validate.check(c)
