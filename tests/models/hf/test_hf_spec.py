"""Options of config.json and of the image processor: as in transformers, or refused by name."""

import json

import numpy as np
import pytest

pytest.importorskip('torch')

from tests import tiny_hf
from tpad_jax.errors import InputError
from tpad_jax.models.hf import spec as specs, vit

MEAN, STD = [0.4, 0.5, 0.6], [0.2, 0.3, 0.25]
LEGACY, NESTED = 'preprocessor_config.json', 'processor_config.json'


def write(directory, name, change=(), **files):
    """config.json of a tiny model with dotted keys changed, and more JSON files."""
    config = tiny_hf.config(name).to_dict()
    for path, value in dict(change).items():
        *parents, key = path.split('.')
        inner = config
        for parent in parents:
            inner = inner[parent]
        inner[key] = value
    for file, content in {'config.json': config, **files}.items():
        (directory / file).write_text(json.dumps(content))
    return directory


@pytest.mark.parametrize(('options', 'nested'), [
    ({}, None), ({'do_rescale': False}, None), ({'do_normalize': False}, None),
    ({'do_rescale': False, 'do_normalize': False}, None), ({'rescale_factor': 1 / 127.5}, None),
    ({'image_std': 0.5}, None),
    # where transformers 5 writes it, the older file counts no more
    ({'image_mean': None, 'image_std': None}, {'do_normalize': False}), ({}, {'image_std': STD})])
@pytest.mark.parametrize('name', ['llava', 'qwen3_vl'])
def test_pixels_are_the_image_processors(name, options, nested, tmp_path):
    processor = tiny_hf.processor(name)
    legacy = {**processor.to_dict(), 'image_mean': MEAN, 'image_std': STD, **options}
    legacy = {key: value for key, value in legacy.items() if value is not None}
    files = {LEGACY: legacy}
    if nested is not None:
        files[NESTED] = {'image_processor': {**processor.to_dict(), 'image_mean': MEAN, **nested}}
    spec = specs.read(write(tmp_path, name, **files))
    image = tiny_hf.images(1, 32)
    got = vit.normalise(image, spec.mean, spec.std, np.float32)
    want = type(processor).from_pretrained(tmp_path)(images=list(image), return_tensors='np')
    want = want['pixel_values']
    if name == 'llava':
        want = want.transpose(0, 2, 3, 1)
    else:  # 4 x 4 patches in merged order, of two equal time steps
        got = np.asarray(vit.patches(got, 8)).reshape(1, 2, 2, 2, 2, 3, 1, 64).swapaxes(2, 3)
        got = np.broadcast_to(got, (*got.shape[:-2], 2, 64)).reshape(want.shape)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('files', [
    {LEGACY: {'do_rescale': 'no'}}, {LEGACY: {'image_mean': [0.5] * 4}}, {LEGACY: [1]},
    {LEGACY: {'image_std': [0.5, 0.0, 0.5]}}, {LEGACY: {'image_std': [float('nan')] * 3}},
    {LEGACY: {'rescale_factor': None}}, {LEGACY: {'do_resize': False}},
    {NESTED: {'image_processor': 'clip'}}])
def test_an_unusable_image_processor_is_refused(files, tmp_path):
    with pytest.raises(InputError, match=f'{next(iter(files))}: unusable config'):
        specs.read(write(tmp_path, 'llava', **files))


@pytest.mark.parametrize(('name', 'key', 'value'), [
    ('llava', 'vision_config.hidden_act', 'relu'), ('llava', 'vision_feature_layer', [-2, -5]),
    ('llava', 'vision_feature_layer', -4), ('llava', 'vision_feature_layer', 0),
    ('llava', 'text_config.attention_bias', True), ('llava', 'text_config.mlp_bias', True),
    ('llava', 'projector_hidden_act', 'tanh'), ('llava', 'text_config.hidden_act', 'gelu'),
    ('llava_qwen2', 'vision_feature_select_strategy', 'default'),
    ('llava_qwen2', 'text_config.use_sliding_window', True),
    ('qwen2_vl', 'vision_config.temporal_patch_size', 3),
    ('qwen2_5_vl', 'vision_config.window_size', 8),
    ('qwen3_vl', 'vision_config.deepstack_visual_indexes', [2, 0]),
    ('qwen3_vl', 'vision_config.deepstack_visual_indexes', [0, 9]),
    ('qwen2_vl', 'text_config.rope_parameters.mrope_section', [1, 2, 4]),
    ('llava', 'text_config.rope_parameters.rope_type', 'linear'),
    ('smolvlm', 'scale_factor', 3), ('smolvlm', 'text_config.qk_layer_norms', True),
    ('qwen3', 'attention_bias', True), ('llava', 'model_type', 'blip')])
def test_what_is_not_implemented_is_refused_by_name(name, key, value, tmp_path):
    more = {'text_config.rope_parameters.factor': 2.0} if value == 'linear' else {}
    with pytest.raises(InputError) as error:
        specs.read(write(tmp_path, name, {key: value, **more}))
    assert key.rpartition('.')[2] in str(error.value)
    assert 'Expected' in str(error.value)
