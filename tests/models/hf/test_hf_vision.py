"""The vision towers against transformers' torch classes, on tiny random models of every kind."""

from dataclasses import replace
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax.traverse_util import flatten_dict, unflatten_dict
from transformers import CLIPVisionConfig, CLIPVisionModel, SiglipVisionConfig, SiglipVisionModel
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl as qwen2_5
from transformers.models.qwen2_vl import modeling_qwen2_vl as qwen2
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.qwen3_vl import modeling_qwen3_vl as qwen3

from tpad_jax.errors import InputError
from tpad_jax.models.hf import spec, vit
from tpad_jax.models.hf.vit import GridTransformer, VisionTransformer, resampled, windows
from tpad_jax.nn import linear

BAR = 3e-5  # parity, float32
WRONG = 5 * BAR  # what a wrong piece costs at least
W, LAYERS, HEADS, HIDDEN, OUT, P = 32, 3, 2, 48, 24, 4
IMAGE = 18  # pixels of a Tower's image: 4 x 4 patches and a rest that belongs to none
CLIP = spec.Tower('clip', W, LAYERS, LAYERS, HEADS, HIDDEN, IMAGE, P, 'quick_gelu', 1e-5, True)
SIGLIP = replace(CLIP, kind='siglip', activation='gelu_pytorch_tanh', eps=1e-6,
                 keep_class=False)
QWEN2 = spec.Grid('qwen2', W, LAYERS, HEADS, 2 * W, P, 2, OUT, 'quick_gelu', 1e-6, 0, 0, (), ())
QWEN2_5 = replace(QWEN2, kind='qwen2_5', hidden=HIDDEN, activation='silu', window=4 * P, full=(1,))
QWEN3 = replace(QWEN2, kind='qwen3', hidden=HIDDEN, activation='gelu_pytorch_tanh', places=5,
                deep=(0, 2))
GRIDS = {g.kind: g for g in (QWEN2, QWEN2_5, QWEN3)}


def random(model, seed=0):
    """All parameters drawn anew, biases and norms too; what is embedded is small.

    Small states let a norm's eps show, which is lost on states of variance one.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            draw = torch.randn(p.shape, generator=generator)
            if p.ndim == 1:
                p.copy_(0.2 * draw + float('norm' in name and name.endswith('weight')))
            else:
                p.copy_(draw * p[0].numel() ** -0.5)
            if 'patch_embed' in name or 'position' in name or 'pos_embed' in name:
                p.mul_(0.05)
    return model.eval()


@cache
def clip_model():
    return random(CLIPVisionModel(CLIPVisionConfig(
        hidden_size=W, intermediate_size=HIDDEN, num_hidden_layers=LAYERS, image_size=IMAGE,
        num_attention_heads=HEADS, patch_size=P, hidden_act='quick_gelu', layer_norm_eps=1e-5)))


@cache
def siglip_model():
    return random(SiglipVisionModel(SiglipVisionConfig(
        hidden_size=W, intermediate_size=HIDDEN, num_hidden_layers=LAYERS, image_size=IMAGE,
        num_attention_heads=HEADS, patch_size=P, vision_use_head=False)))


@cache
def grid_model(kind):
    shared = {'depth': LAYERS, 'num_heads': HEADS, 'patch_size': P}
    if kind == 'qwen2':
        return random(qwen2.Qwen2VisionTransformerPretrainedModel(qwen2.Qwen2VLVisionConfig(
            embed_dim=W, hidden_size=OUT, mlp_ratio=2, **shared)))
    shared |= {'hidden_size': W, 'intermediate_size': HIDDEN, 'out_hidden_size': OUT}
    if kind == 'qwen2_5':
        return random(qwen2_5.Qwen2_5_VisionTransformerPretrainedModel(
            qwen2_5.Qwen2_5_VLVisionConfig(window_size=4 * P, fullatt_block_indexes=[1], **shared)))
    return random(qwen3.Qwen3VLVisionModel(qwen3.Qwen3VLVisionConfig(
        num_position_embeddings=25, deepstack_visual_indexes=[0, 2], **shared)))


def pick(state, prefix, names):
    """{ours: {kernel or scale, bias}} of torch's modules {ours: theirs} below `prefix`."""
    out = {}
    for ours, theirs in names.items():
        weight = state[f'{prefix}{theirs}.weight']
        out[*ours.split('/'), 'scale' if weight.ndim == 1 else 'kernel'] = weight.T
        if f'{prefix}{theirs}.bias' in state:
            out[*ours.split('/'), 'bias'] = state[f'{prefix}{theirs}.bias']
    return unflatten_dict(out)


def stacked(state, prefix, count, names):
    trees = [pick(state, f'{prefix}{i}.', names) for i in range(count)]
    return jax.tree.map(lambda *x: np.stack(x), *trees)


def numbers(model):
    return {k: v.numpy() for k, v in model.state_dict().items()}


def tower_params(model, tower):
    state = numbers(model)
    attention = {f'attention/{n}': f'self_attn.{n}_proj' for n in 'qkv'}
    names = attention | {'attention/o': 'self_attn.out_proj', 'norm1': 'layer_norm1',
                         'norm2': 'layer_norm2', 'fc1': 'mlp.fc1', 'fc2': 'mlp.fc2'}
    params = {'layers': stacked(state, 'encoder.layers.', tower.layers, names),
              'place': state['embeddings.position_embedding.weight'],
              'patch': {'kernel': state['embeddings.patch_embedding.weight'].reshape(W, -1).T}}
    if tower.kind == 'siglip':
        params['patch']['bias'] = state['embeddings.patch_embedding.bias']
    else:
        params['class'] = state['embeddings.class_embedding']
        params |= pick(state, '', {'pre_norm': 'pre_layrnorm'})
    return params


def grid_params(model, grid):
    state = numbers(model)
    if grid.kind == 'qwen2_5':
        names = {n: f'mlp.{n}_proj' for n in ('gate', 'up', 'down')}
    else:
        names = {n: f'mlp.{n}' if grid.kind == 'qwen2' else f'mlp.linear_{n}'
                 for n in ('fc1', 'fc2')}
    names |= {'norm1': 'norm1', 'norm2': 'norm2', 'attention/qkv': 'attn.qkv',
              'attention/o': 'attn.proj'}
    merger = ({'norm': 'norm', 'fc1': 'linear_fc1', 'fc2': 'linear_fc2'} if grid.kind == 'qwen3'
              else {'norm': 'ln_q', 'fc1': 'mlp.0', 'fc2': 'mlp.2'})
    kernel = state['patch_embed.proj.weight'].transpose(2, 1, 3, 4, 0).reshape(2, -1, W)
    params = {'patch': {'kernel': kernel}, 'merger': pick(state, 'merger.', merger),
              'layers': stacked(state, 'blocks.', LAYERS, names)}
    if grid.kind == 'qwen3':
        params['patch']['bias'] = state['patch_embed.proj.bias']
        params['place'] = state['pos_embed.weight']
        params['deep'] = stacked(state, 'deepstack_merger_list.', len(grid.deep), merger)
    return params


def jit(module):
    return partial(jax.jit, compiler_options={'xla_backend_optimization_level': 0})(module.apply)


def same_tree(module, params, patches):
    """The module's own tree of parameters is exactly the one given."""
    shapes = jax.eval_shape(module.init, jax.random.key(0), patches)['params']
    own = {k: v.shape for k, v in flatten_dict(shapes).items()}
    return own == {k: v.shape for k, v in flatten_dict(params).items()}


@jax.default_matmul_precision('highest')
def run(module, params, patches):
    return jax.tree.map(np.asarray, jit(module)({'params': params}, patches))


def photos(side, count=2, seed=1):
    image = np.random.default_rng(seed).integers(0, 256, (count, side, side, 3))
    return image.astype(np.uint8)


def normalised(image):
    return vit.normalise(jnp.asarray(image), spec.CLIP_MEAN, spec.CLIP_STD, jnp.float32)


def blocked(x, side, merge=2):
    """Tokens [B, side side, ...] in rows -> in transformers' order, merged neighbours in a row."""
    x = x.reshape(len(x), side // merge, merge, side // merge, merge, *x.shape[2:]).swapaxes(2, 3)
    return x.reshape(len(x), side * side, *x.shape[5:])


def tower_states(model, image):
    """torch's states before the blocks and after each of them."""
    with torch.no_grad():
        x = torch.from_numpy(np.asarray(normalised(image)).transpose(0, 3, 1, 2).copy())
        return [h.numpy() for h in model(x, output_hidden_states=True).hidden_states]


def grid_states(model, patches, side):
    """torch's merged tokens [B, P / 4, OUT] and its deep features [B, P / 4, n, OUT]."""
    x = blocked(np.asarray(patches).reshape(len(patches), side * side, 3, 1, P * P), side)
    x = np.repeat(x, 2, axis=3).reshape(-1, 3 * 2 * P * P)  # both time steps show the still image
    sizes = torch.tensor([[1, side, side]] * len(patches))
    with torch.no_grad():
        out = model(torch.from_numpy(x), grid_thw=sizes)

    def rows(x):
        return x.numpy().reshape(len(patches), side * side // 4, OUT)

    deep = getattr(out, 'deepstack_features', None)
    return rows(out.pooler_output), np.stack([rows(x) for x in deep], 2) if deep else None


def apart(a, b):
    assert a.shape == b.shape
    return np.abs(a - b).max()


@pytest.mark.parametrize('tower', [
    CLIP, replace(CLIP, layers=LAYERS - 1, keep_class=False), SIGLIP,
    replace(SIGLIP, layers=LAYERS - 1)], ids=['clip', 'clip -2', 'siglip', 'siglip -2'])
def test_tower_is_torchs(tower):
    model, image = clip_model() if tower.kind == 'clip' else siglip_model(), photos(IMAGE)
    dropped = tower.kind == 'clip' and not tower.keep_class
    want = tower_states(model, image)[tower.layers][:, dropped:]
    assert want.std() > 0.1
    patches = vit.patches(normalised(image), P)
    module, params = VisionTransformer(tower), tower_params(model, tower)
    assert same_tree(module, params, patches)
    assert apart(run(module, params, patches), want) < BAR


# merged tokens 2 x 2: one window; 3 x 3: windows of 2 and 1; 4 x 4: windows of 2
@pytest.mark.parametrize(('kind', 'side'), [
    ('qwen2', 4), ('qwen2', 6), ('qwen2_5', 4), ('qwen2_5', 6), ('qwen2_5', 8), ('qwen3', 4),
    ('qwen3', 6)])
def test_grid_is_torchs(kind, side):
    grid, model = GRIDS[kind], grid_model(kind)
    patches = vit.patches(normalised(photos(side * P)), P)
    want, want_deep = grid_states(model, patches, side)
    assert want.std() > 0.1
    module, params = GridTransformer(grid, (side, side)), grid_params(model, grid)
    if side == 6:
        assert same_tree(module, params, patches)
    got, deep = run(module, params, patches)
    assert apart(got, want) < BAR
    if grid.deep:
        assert apart(deep, want_deep) < BAR
    else:
        assert deep is None


def test_windows_start_at_the_corner_and_may_be_cut():
    same = windows((6, 6), QWEN2_5)[0, 0].reshape(6, 6, 36)
    assert [same[r, c].sum() for r, c in ((0, 0), (3, 3), (0, 4), (5, 0), (5, 5))] == [
        16, 16, 8, 8, 4]
    assert windows((4, 4), QWEN2_5) is None


def test_places_are_resampled_corner_upon_corner():
    table = np.add.outer(np.arange(3.0), 10 * np.arange(3.0)).reshape(9, 1)
    same = resampled(jnp.asarray(table), (3, 3))
    np.testing.assert_array_equal(same, table)
    more = np.add.outer(np.linspace(0, 2, 5), 10 * np.linspace(0, 2, 2)).reshape(10, 1)
    np.testing.assert_allclose(resampled(jnp.asarray(table), (5, 2)), more, atol=1e-6)


@pytest.mark.slow
def test_an_adapter_reaches_every_layer_and_merger():
    side, params = 4, grid_params(grid_model('qwen3'), QWEN3)
    rng = np.random.default_rng(3)
    adapter = linear.init(jax.random.key(1), params, rank=2, targets='layers|merger|deep')
    adapter = jax.tree.map(lambda x: rng.normal(0, 0.1, x.shape).astype(np.float32), adapter)
    flat, low = flatten_dict(params), flatten_dict(adapter)
    merged = {k: v + low[*k[:-1], 'a'] @ low[*k[:-1], 'b'] if (*k[:-1], 'a') in low and
              k[-1] == 'kernel' else v for k, v in flat.items()}
    module = GridTransformer(QWEN3, (side, side))
    patches = vit.patches(normalised(photos(side * P)), P)
    apply = jit(module)
    plain = apply({'params': params}, patches)
    got = apply({'params': params, 'lora': adapter}, patches)
    want = apply({'params': unflatten_dict(merged)}, patches)
    for a, b, c in zip(got, want, plain, strict=True):
        assert apart(a, b) < BAR
        assert apart(a, c) > WRONG
    adapter['patch'] = {'a': np.zeros((2, 3 * P * P, 2)), 'b': np.zeros((2, 2, W))}
    with pytest.raises(InputError, match='lora_targets'):
        module.apply({'params': params, 'lora': adapter}, patches)


@pytest.mark.slow
def test_what_is_recomputed_changes_no_gradient():
    side, params = 4, grid_params(grid_model('qwen3'), QWEN3)
    patches = vit.patches(normalised(photos(side * P)), P)

    def gradient(remat):
        module = GridTransformer(QWEN3, (side, side), remat=remat)

        def loss(p):
            tokens, deep = module.apply({'params': p}, patches)
            return (tokens ** 2).sum() + (deep ** 2).sum()

        return jax.jit(jax.grad(loss))(params)

    want = jax.tree.leaves(gradient('none'))
    assert all(np.abs(x).max() > 0 for x in want)
    for a, b in zip(jax.tree.leaves(gradient('full')), want, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4 * np.abs(b).max())


def test_the_patches_dtype_is_the_towers():
    for module, side in ((VisionTransformer(CLIP), 4), (GridTransformer(QWEN3, (6, 6)), 6)):
        patches = jax.ShapeDtypeStruct((1, side * side, 3 * P * P), jnp.bfloat16)
        out, params = jax.eval_shape(module.init_with_output, jax.random.key(0), patches)
        assert {x.dtype for x in jax.tree.leaves(out)} == {jnp.dtype('bfloat16')}
        assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype('float32')}


def test_pixels_are_clips():
    image = photos(16)
    processor = CLIPImageProcessorPil(do_resize=False, do_center_crop=False)
    want = processor(images=list(image), return_tensors='np')['pixel_values']
    np.testing.assert_allclose(normalised(image), want.transpose(0, 2, 3, 1), atol=1e-6)


def test_patches_are_qwens():
    side = 6
    image = photos(side * P)
    processor = Qwen2VLImageProcessorPil(do_resize=False, patch_size=P)
    found = processor(images=list(image), return_tensors='np')
    assert found['image_grid_thw'].tolist() == [[1, side, side]] * 2
    want = found['pixel_values'].reshape(2, side * side, 3, 2, P * P)
    got = blocked(np.asarray(vit.patches(normalised(image), P)), side)
    for step in range(2):
        np.testing.assert_allclose(got, want[:, :, :, step].reshape(got.shape), atol=1e-6)
    more = np.asarray(vit.patches(jnp.asarray(photos(8).reshape(1, 2, 8, 8, 3)), P))
    assert more.shape == (1, 2, 4, 3 * P * P)  # any leading axes
