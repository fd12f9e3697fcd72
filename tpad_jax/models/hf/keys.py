"""The one-to-one table of a Hugging Face checkpoint's tensors and the parameters here.

`table` lists every parameter of a model with its name inside the model of transformers 5.
`canonical` converts the names in a checkpoint to these. Reading, export and adapters use the table.
"""

import math
import re
from dataclasses import dataclass
from functools import cache

import numpy as np
from einops import rearrange
from flax.traverse_util import flatten_dict

from tpad_jax.models.hf import bert, vlm
from tpad_jax.models.hf.sentence import TextEncoder
from tpad_jax.models.hf.spec import TEXTS, Spec, Tower

# Axes of one layer's tensor on disk and of the parameter, which are the same for 'plain'. In these
# forms the first axis on disk is the last one here: rows of a file are columns of a kernel.
FORMS = {'linear': ('o i', 'i o'), 'patch': ('w c p q', '(c p q) w'),
         'patch3': ('w c t p q', 't (c p q) w')}

# (prefix of parameters, prefix of tensors, {module: its name, or parameter: its complete name}). A
# tensor of every layer has '{}' in its name.
QKV = {f'attention/{x}': f'self_attn.{x}_proj' for x in 'qkv'}
GATED = {x: f'mlp.{x}_proj' for x in ('gate', 'up', 'down')}


def _text(root):
    """Return the names of a decoder whose tensors begin with `root`."""
    return (('decoder/layers/', f'{root}layers.{{}}.', {
                'attention_norm': 'input_layernorm', 'mlp_norm': 'post_attention_layernorm', **QKV,
                'attention/o': 'self_attn.o_proj', 'attention/q_norm': 'self_attn.q_norm',
                'attention/k_norm': 'self_attn.k_norm', **GATED}),
            ('', '', {'embed/embedding': f'{root}embed_tokens.weight',
                      'decoder/norm': f'{root}norm', 'head': 'lm_head',
                      'newline': 'model.image_newline'}))


TOWER = (('vision/layers/', 'model.vision_tower.encoder.layers.{}.', {
             'norm1': 'layer_norm1', 'norm2': 'layer_norm2', **QKV,
             'attention/o': 'self_attn.out_proj', 'fc1': 'mlp.fc1', 'fc2': 'mlp.fc2'}),
         ('vision/', 'model.vision_tower.', {
             'patch': 'embeddings.patch_embedding', 'class': 'embeddings.class_embedding',
             'place': 'embeddings.position_embedding.weight', 'pre_norm': 'pre_layrnorm'}),
         ('projector/', 'model.multi_modal_projector.', {'fc1': 'linear_1', 'fc2': 'linear_2'}))
ENCODER = (('layers/', 'encoder.layer.{}.', {
               'attention/q': 'attention.self.query', 'attention/k': 'attention.self.key',
               'attention/v': 'attention.self.value', 'attention/o': 'attention.output.dense',
               'norm1': 'attention.output.LayerNorm', 'fc1': 'intermediate.dense',
               'fc2': 'output.dense', 'norm2': 'output.LayerNorm'}),
           ('', 'embeddings.', {'embed': 'word_embeddings', 'place': 'position_embeddings.weight',
                                'kind': 'token_type_embeddings.weight', 'norm': 'LayerNorm'}))

IDEFICS = (('vision/layers/', 'model.vision_model.encoder.layers.{}.', TOWER[0][2]),
           ('vision/', 'model.vision_model.', {**TOWER[1][2], 'post_norm': 'post_layernorm'}),
           ('projector/', 'model.connector.modality_projection.', {'kernel': 'proj.weight'}))

_TOWER = ((r'(?:model\.)?language_model\.(?:model\.)?(?!lm_head\.)', 'model.language_model.'),
          (r'(?:model\.)?(?:language_model\.)?lm_head\.', 'lm_head.'),
          (r'(?:model\.)?vision_tower\.(?:vision_model\.)?', 'model.vision_tower.'),
          (r'(?:model\.)?multi_modal_projector\.', 'model.multi_modal_projector.'),
          (r'(?:model\.)?image_newline$', 'model.image_newline'))
_GRID = ((r'(?:model\.)?visual\.', 'model.visual.'),
         (r'(?:model\.)?language_model\.', 'model.language_model.'),
         (r'model\.(?=(?:layers|embed_tokens|norm)\.)', 'model.language_model.'))
_IDEFICS = (r'(?:model\.)?(?=(?:text_model|vision_model|connector)\.)', 'model.'),
_BARE = (r'(?:model\.)?(?=(?:layers|embed_tokens|norm)\.)', 'model.'),
NEEDLESS = re.compile(r'(^|\.)(position_ids|rotary_(pos_)?emb\.inv_freq)$'
                      r'|^model\.vision_tower\.(head|post_layernorm)\.')
# heads of a text encoder, and buffers
UNREAD = re.compile(r'(pooler|cls|lm_head)\.|embeddings\.(position|token_type)_ids$')


@dataclass(frozen=True)
class Entry:
    """One parameter.

    Attributes:
      path: of the parameter, for example 'decoder/layers/attention/q/kernel'.
      name: of the tensor in transformers 5, with '{}' for the layer.
      form: 'plain' or a key of FORMS.
      shape: of the parameter.
      layers: number of layers, stacked on axis 0. None: the parameter is not stacked.
    """

    path: str
    name: str
    form: str
    shape: tuple[int, ...]
    layers: int | None

    @property
    def names(self) -> tuple[str, ...]:
        """The tensors of the parameter, one per layer."""
        return tuple(self.name.format(i) for i in range(self.layers or 1))

    @property
    def stored(self) -> tuple[int, ...]:
        """Shape of one layer's tensor on disk."""
        layer = self.shape if self.layers is None else self.shape[1:]
        return self.there(np.broadcast_to(np.uint8(0), layer)).shape

    def here(self, rows):
        """Convert rows [n, *stored[1:]] of a tensor on disk. Unless 'plain', n is the last axis."""
        return rows if self.form == 'plain' else rearrange(rows, ' -> '.join(FORMS[self.form]))

    def there(self, layer):
        """Convert one layer of the parameter to the tensor on disk."""
        if self.form == 'plain':
            return layer
        sizes = {} if self.form == 'linear' else {'c': 3, 'p': math.isqrt(layer.shape[-2] // 3)}
        return rearrange(layer, ' -> '.join(FORMS[self.form][::-1]), **sizes)


def canonical(name: str, spec: Spec | TextEncoder) -> str:
    """Convert a tensor's name in a checkpoint to its name in the model of transformers 5.

    LLaVA has four namings. The prefix `model.` may be absent; the decoder's `model.` then follows
    `language_model.`. The tower may have `vision_model.` or not. Qwen2-VL and 2.5 have two namings,
    the older one with `visual.` and `model.layers.`. A bare model omits `model.`. A text encoder
    may have its family's prefix, and old norms have gamma and beta. Unknown names are returned
    unchanged.
    """
    if isinstance(spec, TextEncoder):
        name = re.sub(r'^(?:bert|roberta)\.', '', name)
        return name.replace('Norm.gamma', 'Norm.weight').replace('Norm.beta', 'Norm.bias')
    for pattern, prefix in _family(spec)[2]:
        match = re.match(pattern, name)
        if match:
            return prefix + name[match.end():]
    return name


def needless(name: str, spec: Spec | TextEncoder) -> bool:
    """Whether a tensor of this canonical name may exist but is not read. Export copies it.

    These are buffers, pooling heads, a tower's final norm, layers after the one whose states are
    used, an output embedding that the config ties to the input embedding, and the vision
    transformer of a model that reads texts alone.
    """
    if isinstance(spec, TextEncoder):
        return bool(UNREAD.match(name))
    v, (root, vision, _) = spec.vision, _family(spec)
    if v is None and vision and not name.startswith((root, 'lm_head.')):
        return True
    layer = re.match(r'model\.vision_tower\.encoder\.layers\.(\d+)\.', name)
    if layer and isinstance(v, Tower):
        return v.layers <= int(layer[1]) < v.stored
    return bool(NEEDLESS.search(name)) or (spec.decoder.tied and name == 'lm_head.weight')


@cache
def embed(spec: Spec) -> str:
    """Return the name of the input embedding's tensor."""
    return f'{_family(spec)[0]}embed_tokens.weight'


def _family(spec):
    """Return the root of a decoder's names, its vision's names, and the other namings."""
    if spec.family in TEXTS:
        return 'model.', (), _BARE
    if spec.family.startswith('llava'):
        return 'model.language_model.', TOWER, _TOWER
    if spec.family in ('idefics3', 'smolvlm'):
        return 'model.text_model.', IDEFICS, _IDEFICS
    return 'model.language_model.', _grid(spec.family == 'qwen3_vl'), _GRID


def _grid(third):
    """Return the names of a Grid's modules, which differ in Qwen3-VL."""
    fc, merger = ('mlp.linear_fc', ('norm', 'linear_fc1', 'linear_fc2')) if third else (
        'mlp.fc', ('ln_q', 'mlp.0', 'mlp.2'))
    merger = dict(zip(('norm', 'fc1', 'fc2'), merger, strict=True))
    return (('vision/layers/', 'model.visual.blocks.{}.', {
                'norm1': 'norm1', 'norm2': 'norm2', 'attention/qkv': 'attn.qkv',
                'attention/o': 'attn.proj', 'fc1': f'{fc}1', 'fc2': f'{fc}2', **GATED}),
            ('vision/merger/', 'model.visual.merger.', merger),
            ('vision/deep/', 'model.visual.deepstack_merger_list.{}.', merger),
            ('vision/', 'model.visual.', {
                'patch': 'patch_embed.proj', 'place': 'pos_embed.weight'}))


@cache
def table(spec: Spec | TextEncoder) -> tuple[Entry, ...]:
    """List every parameter of the model with its tensors."""
    if isinstance(spec, TextEncoder):
        parts, shapes = ENCODER, bert.shapes(spec)
    else:
        (root, vision, _), shapes = _family(spec), vlm.shapes(spec)
        parts = (*vision, *_text(root))
    entries = []
    for path, x in flatten_dict(shapes, sep='/').items():
        prefix, root, names = next(part for part in parts if path.startswith(part[0]))
        rest, leaf = path.removeprefix(prefix), path.rpartition('/')[2]
        name = root + (names.get(rest) or names[rest.removesuffix(f'/{leaf}')] + (
            '.bias' if leaf == 'bias' else '.weight'))
        form = 'plain' if leaf != 'kernel' else 'linear'
        if path == 'vision/patch/kernel':
            form = 'patch' if isinstance(spec.vision, Tower) else 'patch3'
        entries.append(Entry(path, name, form, x.shape, x.shape[0] if '{}' in name else None))
    return tuple(entries)
