"""The one-to-one table of a Hugging Face checkpoint's tensors and the parameters here.

`table` lists every parameter of a Spec with its name inside the model of transformers 5.
`canonical` converts the names in a checkpoint to these. Reading, export and adapters use the table.
"""

import re
from dataclasses import dataclass

import numpy as np
from einops import rearrange

from tpad_jax.models.hf.spec import Spec, Tower

# Axes of one layer's tensor on disk and of the parameter, which are the same for 'plain'. In these
# forms the first axis on disk is the last one here: rows of a file are columns of a kernel.
FORMS = {'linear': ('o i', 'i o'), 'patch': ('w c p q', '(c p q) w'),
         'patch3': ('w c t p q', 't (c p q) w')}

_TOWER = ((r'(?:model\.)?language_model\.(?:model\.)?(?!lm_head\.)', 'model.language_model.'),
          (r'(?:model\.)?(?:language_model\.)?lm_head\.', 'lm_head.'),
          (r'(?:model\.)?vision_tower\.(?:vision_model\.)?', 'model.vision_tower.'),
          (r'(?:model\.)?multi_modal_projector\.', 'model.multi_modal_projector.'),
          (r'(?:model\.)?image_newline$', 'model.image_newline'))
_GRID = ((r'(?:model\.)?visual\.', 'model.visual.'),
         (r'(?:model\.)?language_model\.', 'model.language_model.'),
         (r'model\.(?=(?:layers|embed_tokens|norm)\.)', 'model.language_model.'))
NEEDLESS = re.compile(r'(^|\.)(position_ids|rotary_(pos_)?emb\.inv_freq)$'
                      r'|^model\.vision_tower\.(head|post_layernorm)\.')


@dataclass(frozen=True)
class Entry:
    """One parameter.

    Attributes:
      path: of the parameter, for example 'decoder/layers/attention/q/kernel'.
      name: of the tensor in transformers 5, with '{}' for the layer.
      form: 'plain' or a key of FORMS.
      stored: shape of one layer's tensor on disk.
      layers: number of layers, stacked on axis 0. None: the parameter is not stacked.
    """

    path: str
    name: str
    form: str
    stored: tuple[int, ...]
    layers: int | None

    @property
    def names(self) -> tuple[str, ...]:
        """The tensors of the parameter, one per layer."""
        return tuple(self.name.format(i) for i in range(self.layers or 1))

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the parameter."""
        layer = self.here(np.broadcast_to(np.uint8(0), self.stored)).shape
        return layer if self.layers is None else (self.layers, *layer)

    def here(self, rows):
        """Convert rows [n, *stored[1:]] of a tensor on disk. Unless 'plain', n is the last axis."""
        return rows if self.form == 'plain' else rearrange(rows, ' -> '.join(FORMS[self.form]))

    def there(self, layer):
        """Convert one layer of the parameter to the tensor on disk, `stored`."""
        if self.form == 'plain':
            return layer
        disk, memory = FORMS[self.form]
        return rearrange(layer, f'{memory} -> {disk}',
                         **dict(zip(disk.split(), self.stored, strict=True)))


def canonical(name: str, spec: Spec) -> str:
    """Convert a tensor's name in a checkpoint to its name in the model of transformers 5.

    LLaVA has four namings. The prefix `model.` may be absent; the decoder's `model.` then follows
    `language_model.`. The tower may have `vision_model.` or not. Qwen2-VL and 2.5 have two namings,
    the older one with `visual.` and `model.layers.`. A bare model omits `model.`. Unknown names are
    returned unchanged.
    """
    for pattern, prefix in _TOWER if isinstance(spec.vision, Tower) else _GRID:
        match = re.match(pattern, name)
        if match:
            return prefix + name[match.end():]
    return name


def needless(name: str, spec: Spec) -> bool:
    """Whether a tensor of this canonical name may exist but is not read. Export copies it.

    These are buffers, pooling heads, a tower's final norm, layers after the one whose states are
    used, and an output embedding that the config ties to the input embedding.
    """
    v = spec.vision
    layer = re.match(r'model\.vision_tower\.encoder\.layers\.(\d+)\.', name)
    if layer and isinstance(v, Tower):
        return v.layers <= int(layer[1]) < v.stored
    return bool(NEEDLESS.search(name)) or (spec.decoder.tied and name == 'lm_head.weight')


def table(spec: Spec) -> tuple[Entry, ...]:
    """List every parameter of the model with its tensors."""
    return *_decoder(spec.decoder), *(
        _tower(spec) if isinstance(spec.vision, Tower) else _grid(spec.vision))


def _decoder(d):
    w, inner, kv = d.width, d.heads * d.head_dim, d.kv_heads * d.head_dim
    root = 'model.language_model.'
    yield Entry('embed/embedding', root + 'embed_tokens.weight', 'plain', (d.vocab, w), None)
    yield from _entries('decoder/layers/', root + 'layers.{}.', d.layers, [
        ('attention_norm', 'input_layernorm', 'plain', (w,), False),
        ('mlp_norm', 'post_attention_layernorm', 'plain', (w,), False),
        ('attention/q', 'self_attn.q_proj', 'linear', (inner, w), d.qkv_bias),
        ('attention/k', 'self_attn.k_proj', 'linear', (kv, w), d.qkv_bias),
        ('attention/v', 'self_attn.v_proj', 'linear', (kv, w), d.qkv_bias),
        ('attention/o', 'self_attn.o_proj', 'linear', (w, inner), False), *_gated(d, False)])
    if d.qk_norm:
        yield from _entries('decoder/layers/attention/', root + 'layers.{}.self_attn.', d.layers, [
            (f'{x}_norm', f'{x}_norm', 'plain', (d.head_dim,), False) for x in 'qk'])
    yield from _entries('decoder/', root, None, [('norm', 'norm', 'plain', (w,), False)])
    if not d.tied:
        yield from _entries('', '', None, [('head', 'lm_head', 'linear', (d.vocab, w), False)])


def _tower(spec):
    v, w, wide, root = spec.vision, spec.vision.width, spec.decoder.width, 'model.vision_tower.'
    clip = v.kind == 'clip'
    places = (v.image // v.patch) ** 2 + clip
    yield from _entries('vision/', root, None, [
        ('patch', 'embeddings.patch_embedding', 'patch', (w, 3, v.patch, v.patch), not clip)])
    yield Entry('vision/place', root + 'embeddings.position_embedding.weight', 'plain',
                (places, w), None)
    if clip:
        yield Entry('vision/class', root + 'embeddings.class_embedding', 'plain', (w,), None)
        yield from _entries('vision/', root, None, [
            ('pre_norm', 'pre_layrnorm', 'plain', (w,), True)])
    yield from _entries('vision/layers/', root + 'encoder.layers.{}.', v.layers, [
        ('norm1', 'layer_norm1', 'plain', (w,), True),
        ('norm2', 'layer_norm2', 'plain', (w,), True),
        ('attention/q', 'self_attn.q_proj', 'linear', (w, w), True),
        ('attention/k', 'self_attn.k_proj', 'linear', (w, w), True),
        ('attention/v', 'self_attn.v_proj', 'linear', (w, w), True),
        ('attention/o', 'self_attn.out_proj', 'linear', (w, w), True),
        ('fc1', 'mlp.fc1', 'linear', (v.hidden, w), True),
        ('fc2', 'mlp.fc2', 'linear', (w, v.hidden), True)])
    yield from _entries('projector/', 'model.multi_modal_projector.', None, [
        ('fc1', 'linear_1', 'linear', (wide, w), spec.projector_bias),
        ('fc2', 'linear_2', 'linear', (wide, wide), spec.projector_bias)])
    if spec.newline:
        yield Entry('newline', 'model.image_newline', 'plain', (wide,), None)


def _grid(v):
    w, joined, root = v.width, v.width * v.merge**2, 'model.visual.'
    third, centred = v.kind == 'qwen3', v.kind != 'qwen2_5'  # LayerNorm, otherwise RMSNorm
    norm, first, second = (('norm', 'linear_fc1', 'linear_fc2') if third
                           else ('ln_q', 'mlp.0', 'mlp.2'))
    mlp = 'mlp.linear_' if third else 'mlp.'
    merger = [('fc1', first, 'linear', (joined, joined), True),
              ('fc2', second, 'linear', (v.out, joined), True)]
    yield from _entries('vision/', root, None, [
        ('patch', 'patch_embed.proj', 'patch3', (w, 3, 2, v.patch, v.patch), third),
        ('merger/norm', f'merger.{norm}', 'plain', (w,), centred)])
    if third:
        yield Entry('vision/place', root + 'pos_embed.weight', 'plain', (v.places**2, w), None)
    yield from _entries('vision/layers/', root + 'blocks.{}.', v.layers, [
        ('norm1', 'norm1', 'plain', (w,), centred), ('norm2', 'norm2', 'plain', (w,), centred),
        ('attention/qkv', 'attn.qkv', 'linear', (3 * w, w), True),
        ('attention/o', 'attn.proj', 'linear', (w, w), True),
        *([('fc1', f'{mlp}fc1', 'linear', (v.hidden, w), True),
           ('fc2', f'{mlp}fc2', 'linear', (w, v.hidden), True)] if centred else _gated(v, True))])
    yield from _entries('vision/merger/', root + 'merger.', None, merger)
    if v.deep:
        yield from _entries('vision/deep/', root + 'deepstack_merger_list.{}.', len(v.deep), [
            ('norm', norm, 'plain', (joined,), True), *merger])


def _gated(sizes, bias):
    up = (sizes.hidden, sizes.width)
    return [('gate', 'mlp.gate_proj', 'linear', up, bias),
            ('up', 'mlp.up_proj', 'linear', up, bias),
            ('down', 'mlp.down_proj', 'linear', up[::-1], bias)]


def _entries(path, name, layers, rows):
    """Return the weight, and the bias if there is one, of modules.

    Args:
      path: prefix of the parameters.
      name: prefix of the tensors.
      layers: see `Entry`.
      rows: (path, name, form, stored shape of the weight, has a bias). The weight of a 'plain'
        module is the scale of a norm.
    """
    for part, module, form, stored, bias in rows:
        weight = 'scale' if form == 'plain' else 'kernel'
        yield Entry(f'{path}{part}/{weight}', f'{name}{module}.weight', form, stored, layers)
        if bias:
            yield Entry(f'{path}{part}/bias', f'{name}{module}.bias', 'plain', stored[:1], layers)
