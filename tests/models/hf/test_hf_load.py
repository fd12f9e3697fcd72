"""Checkpoints of every naming read alike, onto any device; what is wrong is said before reading."""

import json
import re
from functools import cache

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh, NamedSharding, PartitionSpec

pytest.importorskip('torch')

import torch
from safetensors.torch import save_file

from tests import tiny_hf
from tpad_jax.errors import InputError
from tpad_jax.models.hf import keys, load, spec as specs, vlm

V, T, P = 'model.vision_tower.', 'model.language_model.', 'model.multi_modal_projector.'
NAMINGS = {  # {what a name begins with in the model: on disk}, first match counts
    'llava': [{V: V + 'vision_model.'},
              {T: 'language_model.model.', 'lm_head.': 'language_model.lm_head.',
               V: 'vision_tower.vision_model.', 'model.': ''},
              {T: 'language_model.model.', 'lm_head.': 'language_model.lm_head.', 'model.': ''},
              {T: T + 'model.', 'lm_head.': 'model.language_model.lm_head.'},
              {'model.': ''}],
    'llava_onevision': [{T: 'language_model.model.', 'lm_head.': 'language_model.lm_head.',
                         V: 'vision_tower.vision_model.', 'model.': ''}],
    'qwen2_vl': [{T: 'model.', 'model.visual.': 'visual.'}, {'model.': ''}],
    'qwen2_5_vl': [{T: 'model.', 'model.visual.': 'visual.'}, {'model.': ''}],
    'qwen3_vl': [{'model.': ''}],
    'qwen3': [{'model.': ''}],
    'smolvlm': [{'model.': ''}],
}


@cache
def tensors(name, seed=0):
    """The state dict of a tiny model, without what is tied."""
    found = {k: t.contiguous() for k, t in tiny_hf.build(name, seed).state_dict().items()}
    if tiny_hf.config(name).tie_word_embeddings:
        found.pop('lm_head.weight')
    return found


def write(name, directory, found=None, **changed):
    """A checkpoint of the state dict `found`; `changed`: keys of config.json."""
    directory.mkdir(exist_ok=True)
    config = {**tiny_hf.config(name).to_dict(), **changed}
    (directory / 'config.json').write_text(json.dumps(config))
    save_file(tensors(name) if found is None else found, directory / 'model.safetensors')
    return directory


def write_shards(name, directory, count=3):
    """The same in shards, layers mixed."""
    write(name, directory)
    (directory / 'model.safetensors').unlink()
    index = {}
    for i in range(count):
        part = dict(list(tensors(name).items())[i::count])
        save_file(part, directory / f'part{i}.safetensors')
        index |= dict.fromkeys(part, f'part{i}.safetensors')
    (directory / 'model.safetensors.index.json').write_text(json.dumps({'weight_map': index}))
    return directory


def read(directory, dtype='float32', sharding=None):
    params = load.load(directory, specs.read(directory), dtype=dtype, sharding=sharding)
    return flatten_dict(params, sep='/')


def renamed(name, naming):
    def on_disk(key):
        for begin, new in naming.items():
            if key.startswith(begin):
                return new + key.removeprefix(begin)
        return key

    return {on_disk(key): t for key, t in tensors(name).items()}


def equal(got, expected):
    assert got.keys() == expected.keys()
    for path, x in expected.items():
        assert got[path].dtype == x.dtype
        assert np.asarray(got[path]).tobytes() == np.asarray(x).tobytes(), path


@pytest.mark.parametrize('name', tiny_hf.NAMES)
def test_the_tree_is_the_models(name, tmp_path):
    spec = specs.read(write(name, tmp_path))
    got = {p: x.shape for p, x in read(tmp_path).items()}
    want = flatten_dict(vlm.shapes(spec), sep='/')
    assert got == {p: x.shape for p, x in want.items()}
    names = [n for e in keys.table(spec) for n in e.names]
    assert len(set(names)) == len(names)
    assert set(names) <= tensors(name).keys()


def test_values(tmp_path):
    got, sd = read(write('qwen3_vl', tmp_path)), tensors('qwen3_vl')
    np.testing.assert_array_equal(got['decoder/layers/attention/q/kernel'][1],
                                  sd[T + 'layers.1.self_attn.q_proj.weight'].T)
    np.testing.assert_array_equal(got['embed/embedding'], sd[T + 'embed_tokens.weight'])
    np.testing.assert_array_equal(got['vision/deep/norm/bias'][1],
                                  sd['model.visual.deepstack_merger_list.1.norm.bias'])
    # a patch read channel by channel, row by row, is what the convolution sees
    weight, image = sd['model.visual.patch_embed.proj.weight'], torch.randn(3, 2, 8, 8)
    with torch.no_grad():
        expected = torch.nn.functional.conv3d(image[None], weight).flatten().numpy()
    flat = [image[:, i].flatten().numpy() for i in range(2)]
    mine = sum(x @ w for x, w in zip(flat, np.asarray(got['vision/patch/kernel']), strict=True))
    np.testing.assert_allclose(mine, expected, atol=1e-5)


def test_entries_go_there_and_back(tmp_path):
    for name in ('llava', 'qwen2_5_vl'):
        for entry in keys.table(specs.read(write(name, tmp_path))):
            x = np.arange(np.prod(entry.stored)).reshape(entry.stored)
            np.testing.assert_array_equal(entry.there(entry.here(x)), x)


@pytest.mark.parametrize(('name', 'naming'), [(n, i) for n in NAMINGS
                                              for i in range(len(NAMINGS[n]))])
def test_every_naming_gives_the_same_bits(name, naming, tmp_path):
    expected = read(write(name, tmp_path / 'new'))
    found = renamed(name, NAMINGS[name][naming])
    assert found.keys() != tensors(name).keys()
    equal(read(write(name, tmp_path / 'old', found)), expected)


@pytest.mark.parametrize('name', ['llava', 'qwen2_vl', 'qwen3_vl'])
def test_what_transformers_writes(name, tmp_path):
    tiny_hf.save(name, tmp_path / 'saved', tokenizer=False)
    equal(read(tmp_path / 'saved'), read(write(name, tmp_path / 'state')))


def test_shards_pieces_and_dtypes(tmp_path, monkeypatch):
    expected = read(write('llava', tmp_path / 'one'))
    equal(read(write_shards('llava', tmp_path / 'many')), expected)
    half = read(tmp_path / 'many', 'bfloat16')
    equal(half, {p: x.astype('bfloat16') for p, x in expected.items()})
    monkeypatch.setattr(load, 'PIECE', 700)  # a few rows, and at times less than one
    equal(read(tmp_path / 'many'), expected)
    equal(read(tmp_path / 'many', 'bfloat16'), half)


def test_bfloat16_into_both(tmp_path):
    found = {k: t.bfloat16() for k, t in tensors('qwen2_5_vl').items()}
    write('qwen2_5_vl', tmp_path, found)
    half, whole = read(tmp_path, 'bfloat16'), read(tmp_path)
    w = found['model.visual.blocks.2.mlp.gate_proj.weight']
    np.testing.assert_array_equal(whole['vision/layers/gate/kernel'][2], w.float().T)
    equal(whole, {p: x.astype('float32') for p, x in half.items()})


@pytest.mark.parametrize('rule', [PartitionSpec(), PartitionSpec(None, None, 'x'),
                                  PartitionSpec(None, 'x')], ids=str)
def test_each_device_reads_its_part_once(rule, tmp_path, monkeypatch):
    write('llava', tmp_path)
    expected, count = read(tmp_path), []
    mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ('x', 'y'))  # pairs hold the same
    split = r'decoder/layers/(gate|up|attention/q)/kernel'
    tree = {p: NamedSharding(mesh, rule if re.search(split, p) else PartitionSpec())
            for p in expected}
    read_rows = load.read_rows

    def counted(*args):
        count.append((rows := read_rows(*args)).nbytes)
        return rows

    monkeypatch.setattr(load, 'read_rows', counted)
    got = read(tmp_path, sharding=unflatten_dict(tree, sep='/'))
    equal(got, expected)
    q = got['decoder/layers/attention/q/kernel']
    assert q.sharding.spec == rule
    whole = sum(x.nbytes for x in expected.values())
    if rule != PartitionSpec(None, 'x'):  # columns of a file's rows: the rows are read
        assert sum(count) == whole
    equal(read(tmp_path, sharding=NamedSharding(mesh, PartitionSpec())), expected)


def test_all_faults_in_one_error_and_nothing_read(tmp_path, monkeypatch):
    found = dict(tensors('llava'))
    lost = [T + 'norm.weight', T + 'layers.1.mlp.up_proj.weight']
    for key in lost:
        del found[key]
    found[T + 'layers.0.attention.q.weight'] = found.pop(T + 'layers.0.self_attn.q_proj.weight')
    found[T + 'layers.3.mlp.up_proj.weight'] = torch.zeros(2, 2)
    found[P + 'linear_1.bias'] = torch.zeros(7)
    found[P + 'linear_2.bias'] = found[P + 'linear_2.bias'].to(torch.int8)
    found['language_model.lm_head.weight'] = found['lm_head.weight'].clone()
    write('llava', tmp_path, found)
    monkeypatch.setattr(load, 'read_rows', lambda *_: pytest.fail('data was read'))
    with pytest.raises(InputError) as error:
        read(tmp_path)
    missing, unexpected, shape, kind = str(error.value).split(': ', 2)[2].split('; ')[:4]
    assert missing == 'missing ' + ', '.join(sorted(
        [*lost, T + 'layers.0.self_attn.q_proj.weight']))
    assert unexpected.startswith('unexpected ')
    for key in ('layers.0.attention.q.weight', 'layers.3.mlp.up_proj.weight', 'lm_head.weight'):
        assert key in unexpected
    assert shape == f'of another shape {P}linear_1.bias [7], not [48]'
    assert kind.startswith(f'not a float {P}linear_2.bias. Expected')


def refused(directory, *words):
    with pytest.raises(InputError) as error:
        read(directory)
    for word in words:
        assert word in str(error.value), error.value


def test_damaged_files_are_named(tmp_path):
    write('llava', tmp_path)
    file = tmp_path / 'model.safetensors'
    whole = file.read_bytes()
    for broken in (whole[:-100], whole[:200], whole[:4], b'', whole + b'more',
                   b'\x10' + 7 * b'\0' + b'{"a": 1}' + 8 * b' ', b'\xff' * 500):
        file.write_bytes(broken)
        refused(tmp_path, 'model.safetensors: damaged', 'download it again')


def test_shards_that_are_not_there(tmp_path):
    write_shards('llava', tmp_path)
    (tmp_path / 'part1.safetensors').rename(tmp_path / 'elsewhere')
    refused(tmp_path, 'lacks 1 of 3 files', 'part1.safetensors')
    (tmp_path / 'elsewhere').rename(tmp_path / 'part1.safetensors')
    index = tmp_path / 'model.safetensors.index.json'
    for text in ('{', '[]', '{"weight_map": {"a": "../model.safetensors"}}'):
        index.write_text(text)
        refused(tmp_path, 'nor a usable model.safetensors.index.json')
    index.unlink()
    refused(tmp_path, 'neither model.safetensors nor', 'FileNotFoundError')


def test_pickles_are_refused_with_a_way_out(tmp_path):
    write('llava', tmp_path)
    (tmp_path / 'model.safetensors').rename(tmp_path / 'pytorch_model.bin')
    refused(tmp_path, 'pytorch_model.bin', 'python -c', 'save_pretrained')


def test_what_is_not_needed_is_allowed(tmp_path):
    expected = read(write('qwen3_vl_tied', tmp_path))
    more = {'lm_head.weight': tensors('qwen3_vl_tied')[T + 'embed_tokens.weight'].clone(),
            T + 'rotary_emb.inv_freq': torch.ones(4)}
    equal(read(write('qwen3_vl_tied', tmp_path, {**tensors('qwen3_vl_tied'), **more})), expected)
    assert 'head/kernel' not in expected
    other = {**more, 'lm_head.weight': more['lm_head.weight'] + 1}
    write('qwen3_vl_tied', tmp_path, {**tensors('qwen3_vl_tied'), **other})
    refused(tmp_path, 'lm_head.weight differs from', 'tie_word_embeddings')
    for shape in ((), (0, 4)):
        other = {**more, 'lm_head.weight': torch.zeros(shape)}
        write('qwen3_vl_tied', tmp_path, {**tensors('qwen3_vl_tied'), **other})
        refused(tmp_path, 'lm_head.weight differs from', 'tie_word_embeddings')
    expected = read(write('llava_qwen3', tmp_path))
    assert expected['vision/layers/fc1/kernel'].shape[0] == 2
    more = {V + 'head.probe': torch.ones(1, 1, 4),
            V + 'embeddings.position_ids': torch.arange(4)[None]}
    equal(read(write('llava_qwen3', tmp_path, {**tensors('llava_qwen3'), **more})), expected)
    # a layer the config does not know is not one that is merely unused
    found = {**tensors('llava_qwen3'), V + 'encoder.layers.3.mlp.fc1.bias': torch.ones(64)}
    write('llava_qwen3', tmp_path, found)
    refused(tmp_path, 'unexpected', 'layers.3.mlp.fc1.bias')


@pytest.mark.parametrize(('name', 'naming', 'kind'), [
    ('qwen3_vl', {'model.': ''}, 'Qwen3VLForConditionalGeneration'),
    ('qwen3_vl', {}, 'Qwen3VLModel'), ('qwen3_vl', {}, 'Qwen3VLForConditionalGeneration')])
def test_a_bare_model_has_no_head(name, naming, kind, tmp_path):
    found = renamed(name, naming)
    del found['lm_head.weight']
    write(name, tmp_path, found, architectures=[kind])
    if not naming and kind != 'Qwen3VLModel':
        refused(tmp_path, 'missing lm_head.weight')
        return
    expected = read(write(name, tmp_path / 'whole'))
    del expected['head/kernel']
    equal(read(tmp_path), expected)
