"""Exports that transformers and peft load, adapters of theirs, and what is refused."""

import filecmp
import json
import shutil
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

pytest.importorskip('torch')

import torch
import transformers
from safetensors.numpy import load_file, save_file

from benchmarks import parity_torch
from tests import tiny_hf
from tpad_jax.errors import InputError
from tpad_jax.models.hf import export, keys, load, spec as specs, vlm
from tpad_jax.nn import linear

# peft asks transformers by an older name
pytestmark = pytest.mark.filterwarnings('ignore:.is_gradient_checkpointing:FutureWarning')

FAMILIES = ('llava', 'llava_onevision', 'qwen2_vl', 'qwen2_5_vl', 'qwen3_vl')
BAR = 1e-5
RANK, ALPHA = 3, 7
TARGETS = {'llava': r'decoder.*(q|down)$|vision.*/v$|projector/fc2',
           'qwen2_5_vl': r'decoder.*(v|gate)$|merger/fc1|vision/layers/attention/qkv',
           'llama': r'decoder.*(q|down)$',
           'qwen3_vl': r'decoder.*/(q|k|v|o|gate|up|down)$|deep/fc1|^head'}


def shard(directory):
    """A saved checkpoint's one file cut into two, with an index."""
    found, parts = load_file(directory / 'model.safetensors'), [{}, {}]
    for i, (name, x) in enumerate(found.items()):
        parts[i % 2][name] = x
    index = {}
    for i, part in enumerate(parts):
        save_file(part, directory / f'part{i}.safetensors', metadata={'format': 'pt'})
        index |= dict.fromkeys(part, f'part{i}.safetensors')
    (directory / 'model.safetensors.index.json').write_text(json.dumps(
        {'metadata': {}, 'weight_map': index}))
    (directory / 'model.safetensors').unlink()
    return directory


def read(directory, dtype='float32'):
    return load.load(directory, specs.read(directory), dtype=dtype)


def same_files(one, two):
    names, others = (sorted(str(p.relative_to(d)) for p in d.rglob('*') if p.is_file())
                     for d in (one, two))
    assert names == others
    return filecmp.cmpfiles(one, two, names, shallow=False)[1:] == ([], [])


def opened(directory):
    """The torch model of a directory, which must hold exactly its tensors."""
    kind = (transformers.AutoModelForCausalLM if specs.read(directory).vision is None else
            transformers.AutoModelForImageTextToText)
    model, info = kind.from_pretrained(
        directory, local_files_only=True, attn_implementation='eager', output_loading_info=True)
    assert not any(info[k] for k in ('missing_keys', 'unexpected_keys', 'mismatched_keys')), info
    return model.eval()


@pytest.mark.parametrize('name', FAMILIES)
def test_untuned_round_trip_is_bit_exact(name, tmp_path):
    source = tiny_hf.save(name, tmp_path / 'single')
    (source / 'pooling').mkdir()
    (source / 'pooling/config.json').write_text('{}')
    half = shutil.copytree(source, tmp_path / 'half')
    found = {n: x.astype('bfloat16') for n, x in load_file(source / 'model.safetensors').items()}
    save_file(found, half / 'model.safetensors', metadata={'format': 'pt'})
    sources = [source, half]
    sources += [shard(shutil.copytree(d, tmp_path / f'{d.name}_sharded')) for d in sources]
    for source in sources:
        # bfloat16 by way of float32
        out = export.export(read(source), source, tmp_path / f'{source.name}_out')
        assert same_files(source, out), source.name
    opened(tmp_path / 'single_out')
    opened(tmp_path / 'single_sharded_out')


def test_other_weights_and_hidden_files_stay_behind(tmp_path):
    source = tiny_hf.save('llava', tmp_path / 'a')
    for name in ('pytorch_model.bin', 'consolidated.safetensors', '.hidden'):
        (source / name).write_text('other weights')
    (source / '.cache').mkdir()
    (source / '.cache/file.json').write_text('{}')
    (source / 'loop').symlink_to(source)
    out = export.export(read(source), source, tmp_path / 'b')
    names = {p.name for p in out.iterdir()}
    assert names >= {'config.json', 'tokenizer.json', 'preprocessor_config.json'}
    assert not names & {'pytorch_model.bin', 'consolidated.safetensors', '.hidden', '.cache',
                        'loop'}


@pytest.mark.parametrize(('name', 'dtype', 'sharded'), [
    ('llava', 'float32', True), ('qwen2_5_vl', 'bfloat16', False), ('qwen3_vl', 'float32', False),
    ('llava_onevision', 'bfloat16', True), ('qwen2_vl', 'float32', True)])
def test_other_parameters_replace_the_sources(name, dtype, sharded, tmp_path):
    """Exporting model b over model a's directory gives b, but for tensors nothing reads."""
    a, b = (tiny_hf.save(name, tmp_path / x, seed=i, dtype=getattr(torch, dtype))
            for i, x in enumerate('ab'))
    expected = load_file(b / 'model.safetensors')
    if sharded:
        shard(a)
    params = read(b, dtype)
    out = export.export(params, a, tmp_path / 'out')
    got, spec = {}, specs.read(a)
    for file in out.glob('*.safetensors'):
        got |= load_file(file)
    own = {f for f in got if keys.needless(keys.canonical(f, spec), spec)}
    assert bool(own) == name.startswith('llava')  # a tower's last norm, at least
    assert got.keys() == expected.keys()
    for key, x in expected.items():
        assert (got[key].tobytes() == x.tobytes()) == (key not in own), key


def test_a_tied_head_that_is_stored_stays_the_embedding(tmp_path):
    a = tiny_hf.save('qwen3_vl_tied', tmp_path / 'a')
    b = read(tiny_hf.save('qwen3_vl_tied', tmp_path / 'b', seed=1))
    file, name = a / 'model.safetensors', 'model.language_model.embed_tokens.weight'
    found = load_file(file)
    save_file({**found, 'lm_head.weight': found[name]}, file, metadata={'format': 'pt'})
    assert same_files(a, export.export(read(a), a, tmp_path / 'same'))
    got = load_file(export.export(b, a, tmp_path / 'new') / 'model.safetensors')
    for one in (name, 'lm_head.weight'):
        np.testing.assert_array_equal(got[one], b['embed']['embedding'])
    save_file({**found, 'lm_head.weight': found[name] + 1}, file, metadata={'format': 'pt'})
    with pytest.raises(InputError, match='differs from'):
        export.export(b, a, tmp_path / 'other')


def test_all_or_nothing(tmp_path, monkeypatch):
    source = tiny_hf.save('llava', tmp_path / 'a', tokenizer=False)
    params = read(source)
    with pytest.raises(InputError, match='exists already'):
        export.export(params, source, source)
    wrong = {**params, 'head': {'kernel': params['head']['kernel'][:, 1:]}, 'extra': jnp.ones(1)}
    del wrong['embed']
    with pytest.raises(InputError) as error:
        export.export(wrong, source, tmp_path / 'b')
    for word in ('embed/embedding is missing', 'extra is [1], not expected',
                 'head/kernel is [48, 319]'):
        assert word in str(error.value)

    def broken(*_):
        raise OSError('no space left')

    monkeypatch.setattr(keys.Entry, 'there', broken)
    with pytest.raises(OSError, match='no space'):
        export.export(params, source, tmp_path / 'b')
    assert [p.name for p in tmp_path.iterdir()] == ['a']


@cache
def case(name, tmp=None):
    """A saved model: directory, spec, parameters, an adapter, a prompt, torch's keywords for it."""
    directory = tiny_hf.save(name, tmp)
    spec, side = specs.read(directory), tiny_hf.side(name)
    params = load.load(directory, spec, dtype='float32')
    pair = linear.init(jax.random.key(0), params, rank=RANK, targets=TARGETS[name])
    pair = jax.tree.map(lambda x: 0.1 * jax.random.normal(jax.random.key(x.size), x.shape), pair)
    words = parity_torch.words(directory, spec)
    given = parity_torch.prompt(spec, side, left=True, words=words,
                                images=tiny_hf.images(3, side))
    return directory, spec, params, pair, given


@pytest.fixture(params=[name if name in ('llava', 'qwen3_vl') else
                        pytest.param(name, marks=pytest.mark.slow) for name in TARGETS])
def made(request, tmp_path_factory):
    root = tmp_path_factory.getbasetemp() / f'case_{request.param}'
    return case(request.param, root)


def torch_logits(model, made):
    directory, spec, _, _, given = made
    return parity_torch.run(model, parity_torch.keywords(model, directory, given, spec),
                            spec)[1][given.mask]


@cache
def forward(spec, side):
    def run(model, *given):
        return model.logits(model(model.prompt(*given)))

    return jax.jit(lambda v, *given: vlm.VLM(spec, side).apply(v, *given, method=run))


def our_logits(made, pair, scale):
    directory, spec, params, _, given = made
    out = forward(spec, tiny_hf.side(directory.name.removeprefix('case_')))(
        {'params': params, 'lora': linear.scaled(pair, scale)}, given.tokens.astype(np.int32),
        given.mask, given.image)
    return np.asarray(out)[given.mask]


def close(got, expected, plain):
    assert np.abs(expected - plain).max() > 0.1, 'the adapter does nothing'
    np.testing.assert_allclose(got, expected, atol=BAR, rtol=0)


@pytest.mark.slow
def test_peft_loads_our_adapter_and_transformers_the_merged_model(made, tmp_path):
    peft = pytest.importorskip('peft')  # here, since it takes seconds to import
    directory, spec, params, pair, _ = made
    scale = ALPHA / RANK
    ours = our_logits(made, pair, scale)
    export.save_adapter(tmp_path / 'adapter', pair, spec, RANK, ALPHA, directory)
    base = opened(directory)
    plain = torch_logits(base, made)
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / 'adapter')
    held = {k.replace('.default', '') for k in theirs.state_dict() if '.lora_' in k}
    assert held == load_file(tmp_path / 'adapter/adapter_model.safetensors').keys()
    close(torch_logits(theirs, made), ours, plain)
    merged = export.merge(params, pair, scale)
    out = export.export(merged, directory, tmp_path / 'merged')
    close(torch_logits(opened(out), made), ours, plain)


def by_peft(made, directory, **options):
    """An adapter of peft, all of it random, saved to a directory, and torch's logits with it."""
    peft = pytest.importorskip('peft')
    modules = {'llava': ['q_proj', 'fc1'], 'qwen3_vl': ['k_proj', 'linear_fc2']}
    config = peft.LoraConfig(**{'r': 4, 'lora_alpha': 6, 'target_modules': modules[
        made[0].name.removeprefix('case_')], **options})
    model = peft.get_peft_model(opened(made[0]), config)
    torch.manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if '.lora_' in name:
                p.normal_(0, 0.1)
    model.save_pretrained(directory)
    return torch_logits(model.eval(), made)


@pytest.mark.slow
@pytest.mark.parametrize('made', ['llava', 'qwen3_vl'], indirect=True)
def test_an_adapter_of_peft_is_read(made, tmp_path):
    rs = made[0].name == 'case_llava'
    expected = by_peft(made, tmp_path, use_rslora=rs)
    pair, scale = export.load_adapter(tmp_path, made[1])
    assert scale == pytest.approx(6 / (2 if rs else 4))
    ours = our_logits(made, pair, scale)
    close(expected, ours, our_logits(made, pair, 0.0))


def test_adapters_of_other_namings_and_back(tmp_path, tmp_path_factory):
    _, spec, _, pair, _ = case('llava', tmp_path_factory.getbasetemp() / 'case_llava')
    export.save_adapter(tmp_path, pair, spec, RANK, ALPHA, 'base')
    file = tmp_path / 'adapter_model.safetensors'
    found = load_file(file)
    for turns in ({}, {'model.language_model.': 'language_model.model.', 'model.vision_tower.':
                       'vision_tower.vision_model.', 'model.multi': 'multi'},
                  {'base_model.model.model.': 'base_model.model.'}, {'base_model.model.': ''},
                  {'_A.weight': '_A.default.weight', '_B.weight': '_B.default.weight'}):
        changed = {}
        for name, x in found.items():
            for old, new in turns.items():
                name = name.replace(old, new)
            changed[name] = x
        save_file(changed, file)
        got, scale = export.load_adapter(tmp_path, spec)
        assert scale == ALPHA / RANK
        got, want = flatten_dict(got), flatten_dict(pair)
        assert got.keys() == want.keys()
        for path, x in want.items():
            np.testing.assert_array_equal(got[path], x)


def test_what_binds_to_nothing_is_refused(tmp_path, tmp_path_factory):
    _, spec, _, pair, _ = case('llava', tmp_path_factory.getbasetemp() / 'case_llava')
    export.save_adapter(tmp_path, pair, spec, RANK, ALPHA, 'base')
    file = tmp_path / 'adapter_model.safetensors'
    found = load_file(file)
    one = 'base_model.model.model.language_model.layers.1.self_attn.q_proj.lora_A.weight'

    def refused(changed, *words):
        save_file(changed, file)
        with pytest.raises(InputError) as error:
            export.load_adapter(tmp_path, spec)
        for word in words:
            assert word in str(error.value)

    rest = {k: x for k, x in found.items() if k != one}
    refused({k.replace('base_model.model.model', 'base_model.model.net'): x
             for k, x in found.items()}, f'{len(found)} of its tensors', one.split('model.')[-1])
    for other in ('.layers.9.', '.layers.1.foo.'):
        refused({**rest, one.replace('.layers.1.', other): found[one]}, '1 of its tensors', other)
    refused({**found, one.replace('lora_A', 'lora_magnitude_vector'): found[one]}, 'magnitude')
    refused({**found, one.replace('lora_A', 'lora_A.b'): found[one]}, '1 of its tensors')
    refused(rest, 'layers.1.self_attn.q_proj.lora_A is missing')
    refused({**rest, one: found[one][:, 1:].copy()}, 'q_proj.lora_A has shape', 'Expected [3, 48]')
    refused({}, 'the file is empty')
    file.rename(tmp_path / 'adapter_model.bin')
    with pytest.raises(InputError, match=r'pickled.*python -c'):
        export.load_adapter(tmp_path, spec)


@pytest.mark.parametrize(('option', 'word'), [
    ({'use_dora': True}, 'use_dora=true'), ({'bias': 'all'}, 'bias="all"'),
    ({'modules_to_save': ['lm_head']}, 'modules_to_save'), ({'rank_pattern': {'q': 2}}, 'rank_pa'),
    ({'alpha_pattern': {'q': 2}}, 'alpha_pattern'), ({'peft_type': 'LOHA'}, 'peft_type="LOHA"'),
    ({'init_lora_weights': 'pissa'}, 'pissa'), ({'r': None}, 'r and lora_alpha')])
def test_options_that_are_not_implemented_are_named(option, word, tmp_path, tmp_path_factory):
    _, spec, _, pair, _ = case('llava', tmp_path_factory.getbasetemp() / 'case_llava')
    export.save_adapter(tmp_path, pair, spec, RANK, ALPHA, 'base')
    file = tmp_path / 'adapter_config.json'
    file.write_text(json.dumps({**json.loads(file.read_text()), **option}))
    with pytest.raises(InputError) as error:
        export.load_adapter(tmp_path, spec)
    assert word in str(error.value)


def test_what_peft_cannot_hold_is_refused(tmp_path, tmp_path_factory):
    _, spec, params, pair, _ = case('llava', tmp_path_factory.getbasetemp() / 'case_llava')
    patch = linear.init(jax.random.key(0), params, rank=RANK, targets='patch')
    with pytest.raises(InputError, match='vision/patch'):
        export.save_adapter(tmp_path, patch, spec, RANK, ALPHA, 'base')
    with pytest.raises(InputError, match='Expected rank 2'):
        export.save_adapter(tmp_path, pair, spec, 2, ALPHA, 'base')
    assert not list(tmp_path.iterdir())


def test_merge(tmp_path_factory):
    _, _, params, pair, _ = case('llava', tmp_path_factory.getbasetemp() / 'case_llava')
    half = jax.tree.map(lambda x: x.astype('bfloat16'), params)
    got, old = flatten_dict(export.merge(half, pair, 0.7)), flatten_dict(half)
    pairs = flatten_dict(pair)
    assert {p[:-1] for p in old if (got[p] != old[p]).any()} == {p[:-1] for p in pairs}
    for path in {p[:-1] for p in pairs}:
        a, b = (np.asarray(pairs[*path, x], np.float64) for x in 'ab')
        w = np.asarray(old[*path, 'kernel']).astype(np.float64) + 0.7 * a @ b
        assert got[*path, 'kernel'].dtype == jnp.bfloat16
        # half a unit in the last place of bfloat16: the sum was not made of rounded parts
        error = np.abs(np.asarray(got[*path, 'kernel']).astype(np.float64) - w)
        assert (error <= 2.0**-9 * 1.01 * np.abs(w) * 2 + 1e-6).all()
    with pytest.raises(InputError, match=r'the kernel \(missing\)'):
        export.merge(params, {'decoder': {'q': pair['projector']['fc2']}}, 1.0)
    with pytest.raises(InputError, match='merge it into the model'):
        export.merge(params, {'projector': {'fc1': pair['projector']['fc2']}}, 1.0)
