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
        if self.layers is None:
            return (self.name,)
        return tuple(self.name.format(i) for i in range(self.layers))

    @property
    def inner(self) -> tuple[int, ...]:
        """Shape of one layer of the parameter."""
        return self.here(np.broadcast_to(np.uint8(0), self.stored)).shape

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the parameter."""
        return self.inner if self.layers is None else (self.layers, *self.inner)

    def here(self, rows):
        """Convert rows [n, *stored[1:]] of a tensor on disk. Unless 'plain': [*inner[:-1], n]."""
        return rows if self.form == 'plain' else rearrange(rows, ' -> '.join(FORMS[self.form]))

    def there(self, layer):
        """Convert one layer, `inner`, to the tensor on disk, `stored`."""
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
    out = []
    d, text = spec.decoder, 'model.language_model.'
    add = _Adder(out, 'decoder/layers/', text + 'layers.{}.', d.layers)
    for norm, name in (('attention_norm', 'input_layernorm'),
                       ('mlp_norm', 'post_attention_layernorm')):
        add.scale(norm, name, d.width)
    inner, kv = d.heads * d.head_dim, d.kv_heads * d.head_dim
    for part, wide in (('q', inner), ('k', kv), ('v', kv)):
        add.linear(f'attention/{part}', f'self_attn.{part}_proj', wide, d.width, d.qkv_bias)
    add.linear('attention/o', 'self_attn.o_proj', d.width, inner, False)
    if d.qk_norm:
        add.scale('attention/q_norm', 'self_attn.q_norm', d.head_dim)
        add.scale('attention/k_norm', 'self_attn.k_norm', d.head_dim)
    _gated(add, d.width, d.hidden, False)
    add = _Adder(out, '', '', None)
    add.plain('embed/embedding', text + 'embed_tokens.weight', d.vocab, d.width)
    add.scale('decoder/norm', text + 'norm', d.width)
    if not d.tied:
        add.linear('head', 'lm_head', d.vocab, d.width, False)
    (_tower if isinstance(spec.vision, Tower) else _grid)(out, spec)
    return tuple(out)


def _tower(out, spec):
    v, d = spec.vision, spec.decoder
    add = _Adder(out, 'vision/', 'model.vision_tower.', None)
    add.put('patch/kernel', 'embeddings.patch_embedding.weight', 'patch',
            v.width, 3, v.patch, v.patch)
    if v.kind == 'siglip':
        add.plain('patch/bias', 'embeddings.patch_embedding.bias', v.width)
    if v.has_class:
        add.plain('class', 'embeddings.class_embedding', v.width)
    places = (v.image // v.patch) ** 2 + v.has_class
    add.plain('place', 'embeddings.position_embedding.weight', places, v.width)
    if v.pre_norm:
        add.norm('pre_norm', 'pre_layrnorm', v.width)
    add = _Adder(out, 'vision/layers/', 'model.vision_tower.encoder.layers.{}.', v.layers)
    add.norm('norm1', 'layer_norm1', v.width)
    add.norm('norm2', 'layer_norm2', v.width)
    for part, name in (('q', 'q_proj'), ('k', 'k_proj'), ('v', 'v_proj'), ('o', 'out_proj')):
        add.linear(f'attention/{part}', f'self_attn.{name}', v.width, v.width, True)
    add.linear('fc1', 'mlp.fc1', v.hidden, v.width, True)
    add.linear('fc2', 'mlp.fc2', v.width, v.hidden, True)
    add = _Adder(out, 'projector/', 'model.multi_modal_projector.', None)
    add.linear('fc1', 'linear_1', d.width, v.width, spec.projector_bias)
    add.linear('fc2', 'linear_2', d.width, d.width, spec.projector_bias)
    if spec.newline:
        _Adder(out, '', '', None).plain('newline', 'model.image_newline', d.width)


def _grid(out, spec):
    v = spec.vision
    old, rms, root = v.kind != 'qwen3', v.kind == 'qwen2_5', 'model.visual.'
    add = _Adder(out, 'vision/', root, None)
    add.put('patch/kernel', 'patch_embed.proj.weight', 'patch3', v.width, 3, 2, v.patch, v.patch)
    if not old:
        add.plain('patch/bias', 'patch_embed.proj.bias', v.width)
        add.plain('place', 'pos_embed.weight', v.places**2, v.width)
    add = _Adder(out, 'vision/layers/', root + 'blocks.{}.', v.layers)
    for norm in ('norm1', 'norm2'):
        (add.scale if rms else add.norm)(norm, norm, v.width)
    add.linear('attention/qkv', 'attn.qkv', 3 * v.width, v.width, True)
    add.linear('attention/o', 'attn.proj', v.width, v.width, True)
    if rms:
        _gated(add, v.width, v.hidden, True)
    else:
        for part in ('fc1', 'fc2'):
            wide = (v.hidden, v.width) if part == 'fc1' else (v.width, v.hidden)
            add.linear(part, f'mlp.{part if old else "linear_" + part}', *wide, True)
    norm, first, second = (('ln_q', 'mlp.0', 'mlp.2') if old
                           else ('norm', 'linear_fc1', 'linear_fc2'))
    joined = v.width * v.merge**2
    merger = _Adder(out, 'vision/merger/', root + 'merger.', None)
    (merger.scale if rms else merger.norm)('norm', norm, v.width)
    mergers = [merger]
    if v.deep:
        mergers.append(_Adder(out, 'vision/deep/', root + 'deepstack_merger_list.{}.',
                              len(v.deep)))
        mergers[1].norm('norm', norm, joined)
    for add in mergers:
        add.linear('fc1', first, joined, joined, True)
        add.linear('fc2', second, v.out, joined, True)


def _gated(add, width, hidden, bias):
    for part, wide in (('gate', (hidden, width)), ('up', (hidden, width)),
                       ('down', (width, hidden))):
        add.linear(part, f'mlp.{part}_proj', *wide, bias)


@dataclass(frozen=True)
class _Adder:
    """Appends entries with one path prefix, one name prefix and one number of layers."""

    out: list
    path: str
    name: str
    layers: int | None

    def put(self, path, name, form, *stored):
        self.out.append(Entry(self.path + path, self.name + name, form, stored, self.layers))

    def plain(self, path, name, *stored):
        self.put(path, name, 'plain', *stored)

    def scale(self, path, name, width):
        self.plain(f'{path}/scale', f'{name}.weight', width)

    def norm(self, path, name, width):
        self.scale(path, name, width)
        self.plain(f'{path}/bias', f'{name}.bias', width)

    def linear(self, path, name, fan_out, fan_in, bias):
        self.put(f'{path}/kernel', f'{name}.weight', 'linear', fan_out, fan_in)
        if bias:
            self.plain(f'{path}/bias', f'{name}.bias', fan_out)
