"""Which base a config stands on: what is read off a checkpoint's directory, what is refused."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip('torch')

from huggingface_hub import constants
from transformers import AutoTokenizer

from configs import amazon
from tests import tiny_hf
from tests.test_launch import CONFIG, assert_refused, start
from tpad_jax.core.digest import files_digest
from tpad_jax.errors import InputError
from tpad_jax.features import bases
from tpad_jax.job import validate
from tpad_jax.models.builtin.mllm import MLLM
from tpad_jax.models.hf import vlm
from tpad_jax.models.hf.vlm import VLM
from tpad_jax.training import step
from tpad_jax.training.workdir import claim

# as the files say: the native side of the tower, the nearest to 256 of a grid of 16 pixels
SIDES = {'llava': 32, 'qwen3_vl': 256}


@pytest.fixture(scope='module', params=SIDES)
def saved(request, tmp_path_factory):
    directory = tmp_path_factory.mktemp('saved') / request.param
    return request.param, tiny_hf.save(request.param, directory)


@pytest.fixture
def copied(saved, tmp_path):
    return saved[0], shutil.copytree(saved[1], tmp_path / 'copy')


def config(**mllm):
    c = amazon.get_config()
    c.mllm.update({name: str(x) if name in ('checkpoint', 'base') else x
                   for name, x in mllm.items()})
    return c


def refused(*told, **mllm):
    with pytest.raises(InputError) as caught:
        bases.read(config(**mllm))
    message = str(caught.value)
    assert '\n' not in message
    for word in told:
        assert str(word) in message


def test_what_is_read_off_a_directory(saved):
    name, directory = saved
    found = bases.read(config(checkpoint=directory, remat='dots', dtype='bfloat16', end='Done.'))
    module = found.module
    assert isinstance(module, VLM)
    assert (module.spec.family, module.side, found.image_size) == (name, SIDES[name], SIDES[name])
    assert (module.remat, module.dtype, module.how) == ('dots', 'bfloat16', 'xla')
    assert (found.directory, found.given) == (directory, ('base',))
    tokenizer = AutoTokenizer.from_pretrained(directory)
    said = ['USER: ', '\n'] if name == 'llava' else ['<|im_start|>user\n', '\n']
    own = [tuple(tokenizer(text, add_special_tokens=False)['input_ids']) for text in said]
    if name == 'llava':
        own[0] = (tokenizer.bos_token_id, *own[0])
    assert [module.before, module.between] == own
    assert tokenizer.decode(module.end) == 'Done.'


def test_its_parameters(saved):
    name, directory = saved
    side = 48 if name == 'qwen3_vl' else 32
    found = bases.read(config(checkpoint=directory, image_size=side, param_dtype='bfloat16'))
    loaded = found.load(None)['base']
    expected = vlm.shapes(found.module.spec)
    assert jax.tree.map(jnp.shape, loaded) == jax.tree.map(jnp.shape, expected)
    assert {x.dtype.name for x in jax.tree.leaves(loaded)} == {'bfloat16'}


def test_a_model_of_texts_alone_has_the_frame_of_its_own_files(tmp_path):
    directory = tiny_hf.save('qwen3', tmp_path)
    module = bases.read(config(checkpoint=directory)).module
    assert (module.spec.vision, module.side) == (None, 0)
    decode = AutoTokenizer.from_pretrained(directory).decode
    assert [decode(module.before), decode(module.end)] == [
        '<|im_start|>user\n', '<|im_end|>\n<|im_start|>assistant\n']
    (directory / 'modules.json').write_text('[]')  # of sentence-transformers
    module = bases.read(config(checkpoint=directory)).module
    assert (module.before, module.end) == ((), ())  # this tokenizer adds no special tokens
    refused('config.mllm.image_size=32', 'texts alone', checkpoint=directory, image_size=32)


def test_what_smolvlm_writes_around_a_picture(tmp_path):
    directory = tiny_hf.save('smolvlm', tmp_path)
    module = bases.read(config(checkpoint=directory)).module
    decode, spec = AutoTokenizer.from_pretrained(directory).decode, module.spec
    assert [decode(ids) for ids in (spec.start_ids, spec.end_ids, module.before)] == [
        '<fake_token_around_image><global-img>', '<fake_token_around_image>', '<|im_start|>User:']
    assert (module.side, spec.image_tokens(32)) == (32, 16)


def test_without_pictures_no_vision_transformer_is_loaded(saved):
    name, directory = saved
    found = bases.read(config(checkpoint=directory, image_size=SIDES[name]), pictures=False)
    assert (found.image_size, found.module.spec.start_ids) == (0, ())
    loaded, whole = (x.load(None)['base'] for x in (found, bases.read(config(
        checkpoint=directory))))
    assert whole.keys() - loaded.keys() >= {'vision'}
    assert loaded.keys() == {'decoder', 'embed', 'head'}
    assert jax.tree.map(jnp.shape, loaded) == {key: jax.tree.map(jnp.shape, whole[key])
                                               for key in loaded}


def test_the_fingerprint_is_of_every_file(copied):
    _, directory = copied

    def read():
        return bases.read(config(checkpoint=directory)).fingerprint

    first = read()
    assert read() == first
    (directory / 'README.md').write_text('of no consequence')
    assert read() == first
    (directory / 'merges.txt').write_text('of a tokenizer')
    assert read() != first
    (directory / 'merges.txt').unlink()
    seen = {first}
    files = [p for p in sorted(directory.iterdir()) if p.suffix in ('.json', '.safetensors')]
    assert {'config.json', 'model.safetensors', 'tokenizer.json'} < {p.name for p in files}
    for file in files:
        held = file.read_bytes()
        if file.suffix == '.json':
            file.write_bytes(held + b'\n')
        else:
            file.write_bytes(held[:len(held) // 2] + bytes([held[len(held) // 2] ^ 1])
                             + held[len(held) // 2 + 1:])
        seen.add(read())
        file.write_bytes(held)
    assert len(seen) == 1 + len(files)
    assert read() == first


def test_one_layer_of_a_large_file_shows(tmp_path, monkeypatch):
    monkeypatch.setattr('tpad_jax.core.digest.BLOCK', 16)
    monkeypatch.setattr('tpad_jax.core.digest.BLOCKS', 8)
    file = tmp_path / 'model.safetensors'
    held = bytearray(range(256)) * 8
    file.write_bytes(held)
    seen = {files_digest({file.name: file})}
    layer = len(held) // 7 + 16
    for begin in range(0, len(held) - layer, layer):
        changed = held.copy()
        changed[begin:begin + layer] = bytes(layer)
        file.write_bytes(changed)
        seen.add(files_digest({file.name: file}))
    assert len(seen) == 1 + len(range(0, len(held) - layer, layer))
    file.write_bytes(held + b'x')
    assert files_digest({file.name: file}) not in seen


def test_the_small_base_is_the_default():
    found = bases.read(config())
    assert isinstance(found.module, MLLM)
    assert found.given == ('base', 'knowledge')
    assert found.image_size == 32
    assert (found.module.before, found.module.between, found.module.end) == ((), (), ())


@pytest.mark.parametrize(('key', 'value'), [
    ('pooling', 'last'), ('dtype', 'bfloat16'), ('remat', 'full'), ('before', 'Look: ')])
def test_what_the_small_base_does_not_know_is_refused(key, value):
    refused(f'config.mllm.{key}={value!r}: the small base', 'config.mllm.checkpoint=DIR',
            **{key: value})


def test_two_bases_are_refused(saved):
    refused('config.mllm.checkpoint', 'config.mllm.base', 'give one', checkpoint=saved[1],
            base=saved[1])


def test_a_size_of_images_that_does_not_fit_is_refused(saved):
    name, directory = saved
    for side in (40, 8) if name == 'qwen3_vl' else (48,):
        refused(f'config.mllm.image_size={side}', 'multiple of 16' if name == 'qwen3_vl'
                else 'Expected 32 pixels', checkpoint=directory, image_size=side)


def test_a_hub_id_is_read_from_the_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, 'HF_HUB_CACHE', str(tmp_path))
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)
    refused("config.mllm.checkpoint='shop/tiny'", 'hf download shop/tiny', checkpoint='shop/tiny')
    cached = tmp_path / 'models--shop--tiny'
    (cached / 'refs').mkdir(parents=True)
    (cached / 'refs/main').write_text('0' * 40)
    directory = tiny_hf.save('llama', cached / 'snapshots' / ('0' * 40))
    found = bases.read(config(checkpoint='shop/tiny'))
    assert found.directory == directory
    assert found.fingerprint == bases.read(config(checkpoint=directory)).fingerprint
    claim(tmp_path / 'run', config(checkpoint='shop/tiny').to_dict())
    claim(tmp_path / 'run', config(checkpoint=directory).to_dict())  # the same files


def test_a_directory_that_is_no_checkpoint_is_refused(tmp_path):
    for directory in (tmp_path, tmp_path / 'none'):
        refused(f"config.mllm.checkpoint='{directory}'", 'config.json', 'the directory or the hub',
                checkpoint=directory)
    (tmp_path / 'config.json').write_text('{"model_type": "gpt2"}')
    refused(tmp_path / 'config.json', "'gpt2'", 'qwen3_vl', checkpoint=tmp_path)


def test_another_models_tokenizer_is_refused(copied):
    _, directory = copied
    told = (directory, 'ids up to', "use the checkpoint's tokenizer")
    held = (directory / 'config.json').read_text()

    def with_vocabulary(count):
        found = json.loads(held)
        found['text_config']['vocab_size'] = count
        (directory / 'config.json').write_text(json.dumps(found))

    with_vocabulary(tiny_hf.BYTES - 1)  # what an item's text may become
    refused(*told, f'{tiny_hf.BYTES - 1} embeddings', checkpoint=directory)
    with_vocabulary(tiny_hf.BYTES)  # what the frame is made of: special tokens
    refused(*told, f'{tiny_hf.BYTES} embeddings', checkpoint=directory)
    with_vocabulary(tiny_hf.BYTES + 3)  # others may lie beyond
    assert bases.read(config(checkpoint=directory)).module.spec.decoder.vocab == tiny_hf.BYTES + 3
    (directory / 'config.json').write_text(held)
    (directory / 'tokenizer.json').unlink()
    refused(directory, 'no usable tokenizer', 'tokenizer.json', checkpoint=directory)


def test_an_untrained_checkpoint_gives_its_states(tmp_path):
    """k are the mean states over the text, of mean square one, whatever the seed is."""
    c = config(checkpoint=tiny_hf.save('qwen3', tmp_path), pooling='mean')
    c.stage.knowledge.steps = 0
    with pytest.raises(InputError, match=r'steps=0: k are the states .* width 48\. .*=64'):
        validate.check(c)
    c.model.features = 48
    assert validate.check(c)
    base, tokens = bases.read(c), jnp.array([[5, 6, 7, -1]])
    spec = step.build_model(base.module, c, items=3, max_length=2, side_sizes=())
    content = jnp.zeros((1, 0, 0, 3), jnp.uint8), jnp.zeros(1, bool), tokens
    variables = spec.knowledge.init(jax.random.key(0), *content)['params']
    assert variables.keys() == {'base', 'norm'}
    loaded = base.load(None)['base']
    k = spec.knowledge.apply({'params': {**variables, 'base': loaded}}, *content)

    def read(module):
        prompt = *module.before, 5, 6, 7, *module.end
        states = module(module.say(jnp.array([prompt])))
        return states[:, len(module.before):len(module.before) + 3].mean(1)

    mean = base.module.apply({'params': loaded}, method=read)
    np.testing.assert_allclose(k[:, 1], mean / jnp.sqrt((mean**2).mean()), atol=1e-5)


def test_a_run_refuses_before_it_begins(saved):
    with pytest.raises(InputError, match=r"^config\.mllm\.checkpoint='/nowhere': no config"):
        validate.check(config(checkpoint='/nowhere'))
    with pytest.raises(InputError, match=r'config\.mllm\.attention'):
        validate.check(config(checkpoint=saved[1], attention='flash'))
    assert validate.check(config(checkpoint=saved[1]))


@pytest.mark.slow
def test_and_says_so_in_one_sentence(tmp_path):
    assert_refused(start(tmp_path, CONFIG, '--config.mllm.checkpoint=/nowhere'),
                   "config.mllm.checkpoint='/nowhere': no config.json")
    assert not list(tmp_path.iterdir())
