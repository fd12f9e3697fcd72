"""Read the config.json of a checkpoint as plain numbers, and refuse what is not implemented.

`transformers` reads the file and updates older forms. Theta and M-RoPE sections come from
`rope_parameters`, never from the default of a class. An unknown family, tower, decoder, rope type
or activation would silently change the result, so each is refused by name.
"""

import json
import math
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from tpad_jax.errors import InputError, refuse_if, refusing
from tpad_jax.models.hf import sentence

ACTIVATIONS = ('silu', 'gelu', 'gelu_pytorch_tanh', 'quick_gelu')
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
HALF = (0.5, 0.5, 0.5)  # mean and std of SigLIP and Qwen3-VL
DECODERS = ('llama', 'qwen2', 'qwen3', 'mistral')  # of a model with a Tower


@dataclass(frozen=True)
class Decoder:
    """A causal decoder: RMSNorm, grouped-query attention, SwiGLU.

    Attributes:
      vocab: number of tokens.
      width: of the states.
      layers: number of blocks.
      heads: query heads.
      kv_heads: key and value heads. Each serves heads / kv_heads query heads.
      head_dim: width of a head.
      hidden: inner width of the SwiGLU.
      eps: of the norms.
      theta: base of the rotary frequencies.
      qkv_bias: whether q, k and v have biases.
      qk_norm: whether q and k pass an RMSNorm per head.
      sections: rotary frequencies per position coordinate (M-RoPE). (): one coordinate.
      interleaved: whether coordinates alternate over the frequencies (Qwen3-VL). Otherwise they
        form blocks.
      tied: whether input and output share the embedding.
    """

    vocab: int
    width: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    hidden: int
    eps: float
    theta: float
    qkv_bias: bool
    qk_norm: bool
    sections: tuple[int, ...]
    interleaved: bool
    tied: bool


@dataclass(frozen=True)
class Tower:
    """A CLIP or SigLIP vision transformer at its native, square resolution.

    Attributes:
      kind: 'clip', which has a class token first and a norm before the blocks, 'siglip', or
        'idefics3', a SigLIP with a norm after the blocks.
      width: of the states.
      layers: blocks that run. One less than `stored` gives the states of the last but one.
      stored: blocks in the checkpoint.
      heads: attention heads.
      hidden: inner width of the MLP.
      image: side of an image in pixels.
      patch: side of a patch in pixels.
      activation: of the MLP.
      eps: of the norms.
      keep_class: whether the output includes the class token (CLIP).
      merge: side of a token of the output in patches (pixel shuffle of Idefics3).
    """

    kind: str
    width: int
    layers: int
    stored: int
    heads: int
    hidden: int
    image: int
    patch: int
    activation: str
    eps: float
    keep_class: bool
    merge: int = 1


@dataclass(frozen=True)
class Grid:
    """A Qwen vision transformer: rotary positions in two dimensions, neighbours merged at the end.

    Attributes:
      kind: 'qwen2', 'qwen2_5' or 'qwen3'.
      width: of the states.
      layers: number of blocks.
      heads: attention heads.
      hidden: inner width of the MLP.
      patch: side of a patch in pixels.
      merge: side of a merged token in patches.
      out: width of the merged tokens.
      activation: of the blocks.
      eps: of the norms.
      places: side of the learned table of positions, which is resampled (Qwen3-VL). 0: no table.
      window: side of an attention window in pixels (Qwen2.5-VL). 0: no windows.
      full: blocks that attend outside of windows.
      deep: blocks whose states also become features of the decoder's first layers (DeepStack).
    """

    kind: str
    width: int
    layers: int
    heads: int
    hidden: int
    patch: int
    merge: int
    out: int
    activation: str
    eps: float
    places: int
    window: int
    full: tuple[int, ...]
    deep: tuple[int, ...]


@dataclass(frozen=True)
class Spec:
    """A complete model: a decoder, and a vision transformer or none.

    Attributes:
      family: model_type of transformers.
      decoder: its decoder.
      vision: its vision transformer. None: it reads texts alone.
      projector: activation between tower and decoder (LLaVA). '': one layer after a Tower, none
        after a Grid.
      projector_bias: whether the projector's layers have biases.
      newline: whether a learned token ends every image (OneVision).
      image_id: the placeholder of an image token in a prompt. -1: there is none.
      start_ids: tokens before an image.
      end_ids: tokens after an image.
      mean: of the pixels per channel, on 0..1.
      std: of the pixels per channel, on 0..1.
    """

    family: str
    decoder: Decoder
    vision: Tower | Grid | None = None
    projector: str = ''
    projector_bias: bool = False
    newline: bool = False
    image_id: int = -1
    start_ids: tuple[int, ...] = ()
    end_ids: tuple[int, ...] = ()
    mean: tuple[float, float, float] = HALF
    std: tuple[float, float, float] = HALF

    def without_vision(self) -> 'Spec':
        """The same decoder without its vision transformer."""
        return replace(self, vision=None, newline=False, start_ids=(), end_ids=())

    @property
    def unit(self) -> int:
        """Pixels of the smallest image's side: a tower's only size, or a token of a grid, or 0."""
        v = self.vision
        return v.patch * v.merge if isinstance(v, Grid) else v.image if v else 0

    def cells(self, side: int) -> tuple[int, int]:
        """Return the rows and columns of an image's tokens.

        Args:
          side: height and width of the image in pixels.

        Raises:
          InputError: the vision tower cannot read an image of this size.
        """
        native, unit = isinstance(self.vision, Tower), self.unit
        if self.vision is None:
            refuse_if(side, f'config.mllm.image_size={side}: this model reads texts alone. '
                      'Expected 0. Fix: set it so')
            return 0, 0
        refuse_if(side < unit or side % unit or (native and side != unit),
                  f'config.mllm.image_size={side}: not a size that this vision tower reads. '
                  f'Expected {"" if native else "a multiple of "}{unit} pixels. Fix: set it so')
        return (side // (self.vision.patch if native else unit) // (
            self.vision.merge if native else 1),) * 2

    def image_tokens(self, side: int) -> int:
        """Return the tokens of an image in a prompt, without start_ids and end_ids.

        Args:
          side: height and width of the image in pixels.
        """
        return math.prod(self.cells(side)) + self.newline + self.class_tokens

    @property
    def class_tokens(self) -> int:
        """Tokens before those of an image's cells: 1 where a tower's class token is kept."""
        return int(isinstance(self.vision, Tower) and self.vision.keep_class)


def read(directory) -> Spec | sentence.TextEncoder:
    """Read the sizes of a checkpoint directory.

    Raises:
      InputError: config.json is missing, or it names an architecture, rope type, activation or
        option that is not implemented.
    """
    file, families = Path(directory) / 'config.json', FAMILIES | ENCODERS
    from transformers import AutoConfig  # slow to import

    with refusing((OSError, ValueError, TypeError, KeyError, AttributeError),
                  f'{file}: cannot be read', 'Expected the config.json of a Hugging Face model. '
                  'Fix: correct the path, or download the file again'):
        family = json.loads(file.read_text()).get('model_type')
        _require(file, 'model_type', family, family in families, ' or '.join(families))
        config = AutoConfig.from_pretrained(directory, local_files_only=True)
    sizes = families[family](file, config)
    return _with_pixels(sizes, directory) if isinstance(sizes, Spec) else sizes


def _llava(file, config):
    only = partial(_only, file, config)
    depth = config.vision_config.num_hidden_layers
    onevision = config.model_type == 'llava_onevision'
    clip = only('vision_config.model_type', ('siglip_vision_model',) if onevision else
                ('siglip_vision_model', 'clip_vision_model')).startswith('clip')
    # a list joins the states of several layers
    layer = only('vision_feature_layer', (*range(-depth, 0), *range(1, depth + 1)))
    # 'default' drops the first token, which is a patch with SigLIP. OneVision keeps all tokens of
    # its SigLIP tower with either strategy.
    strategy = only('vision_feature_select_strategy',
                    ('default', 'full') if clip or onevision else ('full',))
    spec = _with_tower(file, config, kind='clip' if clip else 'siglip', keep_class=clip and
                       strategy == 'full', layers=depth + 1 + layer if layer < 0 else layer)
    spec = replace(spec, projector=only('projector_hidden_act', ACTIVATIONS), newline=onevision,
                   projector_bias=config.multimodal_projector_bias)
    return replace(spec, mean=CLIP_MEAN, std=CLIP_STD) if clip else spec


def _idefics(file, config):
    side, merge = (config.vision_config.image_size // config.vision_config.patch_size,
                   config.scale_factor)
    for option in ('qk_layer_norms', 'use_resampler'):
        _only(file, config, f'text_config.{option}', (None, False))
    _require(file, 'scale_factor', merge, side % merge == 0,
             f'a divisor of the {side} patches of a side')
    return _with_tower(file, config, kind='idefics3', merge=merge, keep_class=False,
                       layers=config.vision_config.num_hidden_layers)


def _with_tower(file, config, **fields):
    """Return the Spec of a decoder with a Tower, some of whose fields are given."""
    only, v = partial(_only, file, config), config.vision_config
    tower = Tower(width=v.hidden_size, stored=v.num_hidden_layers, heads=v.num_attention_heads,
                  hidden=v.intermediate_size, image=v.image_size, patch=v.patch_size,
                  activation=only('vision_config.hidden_act', ACTIVATIONS), eps=v.layer_norm_eps,
                  **fields)
    text = only('text_config.model_type', DECODERS)
    return Spec(config.model_type, _decoder(file, config, text), tower,
                image_id=config.image_token_id)


def _qwen(file, config):
    only = partial(_only, file, config)
    v, kind = config.vision_config, config.model_type.removesuffix('_vl')
    first, windowed, third = (kind == name for name in ('qwen2', 'qwen2_5', 'qwen3'))
    width = v.embed_dim if first else v.hidden_size
    grid = Grid(
        kind=kind, width=width, layers=v.depth, heads=v.num_heads,
        hidden=int(width * v.mlp_ratio) if first else v.intermediate_size, patch=v.patch_size,
        merge=v.spatial_merge_size, out=v.hidden_size if first else v.out_hidden_size,
        activation=only('vision_config.hidden_act', ACTIVATIONS), eps=1e-6,
        places=round(v.num_position_embeddings ** 0.5) if third else 0,
        window=v.window_size if windowed else 0,
        full=tuple(v.fullatt_block_indexes) if windowed else (),
        deep=tuple(v.deepstack_visual_indexes) if third else ())
    only('vision_config.temporal_patch_size', (2,))
    only('vision_config.rope_parameters.rope_theta', (None, 10_000.0))
    _require(file, 'vision_config.deepstack_visual_indexes', list(grid.deep),
             list(grid.deep) == sorted({i for i in grid.deep if i < v.depth}),
             f'rising numbers below the depth, {v.depth}')
    side = grid.patch * grid.merge
    _require(file, 'vision_config.window_size', grid.window, not windowed or grid.window >= side,
             f'at least {side} pixels, a merged token')
    mean, std = (HALF, HALF) if third else (CLIP_MEAN, CLIP_STD)
    return Spec(config.model_type, _decoder(file, config, kind, mrope=True), grid,
                image_id=config.image_token_id, start_ids=(config.vision_start_token_id,),
                end_ids=(config.vision_end_token_id,), mean=mean, std=std)


def _text(file, config):
    return Spec(config.model_type, _decoder(file, config, config.model_type))


def _text_encoder(file, config):
    return sentence.sizes(config, partial(_only, file, config), ACTIVATIONS)


TEXTS = dict.fromkeys(('llama', 'qwen2', 'qwen3'), _text)
FAMILIES = {'llava': _llava, 'llava_onevision': _llava, 'qwen2_vl': _qwen, 'qwen2_5_vl': _qwen,
            'qwen3_vl': _qwen, 'idefics3': _idefics, 'smolvlm': _idefics, **TEXTS}
ENCODERS = dict.fromkeys(sentence.FAMILIES, _text_encoder)


def _decoder(file, config, kind, mrope=False):
    prefix, text = (('text_config.', config.text_config) if hasattr(config, 'text_config')
                    else ('', config))
    only, rope = partial(_only, file, text), getattr(text, 'rope_parameters', None) or {}
    only('hidden_act', ('silu',), prefix)
    only('rope_parameters.rope_type', ('default', 'mrope'), prefix)
    for option in ('mlp_bias', 'attention_bias', 'use_sliding_window'):
        only(option, (None, False), prefix)
    if text.model_type == 'mistral':
        only('sliding_window', (None,), prefix)
    head_dim = getattr(text, 'head_dim', None) or text.hidden_size // text.num_attention_heads
    sections = tuple(rope.get('mrope_section') or ()) if mrope else ()
    theta = rope.get('rope_theta')
    _require(file, f'{prefix}rope_parameters.rope_theta', theta, bool(theta), 'a number')
    _require(file, f'{prefix}rope_parameters.mrope_section', list(sections),
             not mrope or sum(sections) == head_dim // 2, f'the sum {head_dim // 2}, half a head')
    return Decoder(
        vocab=text.vocab_size, width=text.hidden_size, layers=text.num_hidden_layers,
        heads=text.num_attention_heads, kv_heads=text.num_key_value_heads, head_dim=head_dim,
        hidden=text.intermediate_size, eps=text.rms_norm_eps, theta=float(theta),
        qkv_bias=kind in ('qwen2', 'qwen2_5'), qk_norm=kind == 'qwen3', sections=sections,
        interleaved=mrope and kind == 'qwen3', tied=bool(config.tie_word_embeddings))


def _only(file, config, key, choices, prefix=''):
    """Return the value of a dotted key. Refuse one that is not implemented."""
    value = config
    for name in key.split('.'):
        value = value.get(name) if isinstance(value, dict) else getattr(value, name, None)
    _require(file, prefix + key, value, value in choices, ' or '.join(map(repr, choices)))
    return value


def _require(file, key, value, usable, rule):
    refuse_if(not usable, f'{file}: {key}={value!r} is not implemented. Expected {rule}. Fix: copy '
              "the original model's value, or choose another checkpoint")


def _with_pixels(spec: Spec, directory) -> Spec:
    """Set mean and std of the pixels as the checkpoint's image processor has them.

    Like transformers, prefer the processor_config.json that holds an image processor to
    preprocessor_config.json. The models divide pixels by 255, then apply mean and std. Both are
    scaled here so that the result is that of the image processor's options.

    Raises:
      InputError: the file cannot be read, or a value in it is unusable.
    """
    try:
        for name, part in (('processor_config.json', 'image_processor'),
                           ('preprocessor_config.json', None)):
            file = Path(directory) / name
            options = json.loads(file.read_text()) if file.is_file() else {}
            options = options.get(part) if part else options
            if options:
                break
        if options.get('do_resize', True) is not True:
            raise ValueError('do_resize must be true, as every picture is resized')
        rescale, normalise = (options.get(key, True) for key in ('do_rescale', 'do_normalize'))
        if not (isinstance(rescale, bool) and isinstance(normalise, bool)):
            raise ValueError('do_rescale and do_normalize must be true or false')
        scale = 255 * float(options.get('rescale_factor', 1 / 255)) if rescale else 255.0
        mean, std = ((options.get('image_mean', spec.mean), options.get('image_std', spec.std))
                     if normalise else (0.0, 1.0))
        # a single number counts for all channels
        mean, std = (tuple(float(x) / scale for x in np.broadcast_to(v, 3)) for v in (mean, std))
        if not all(map(math.isfinite, mean + std)) or 0 in std:
            raise ValueError('image_mean and image_std must be finite, image_std not 0')
    except (ValueError, TypeError, AttributeError, ZeroDivisionError) as error:
        raise InputError(f'{file}: unusable config of an image processor ({error}). Expected the '
                         'file of the original model. Fix: download it again') from error
    return replace(spec, mean=mean, std=std)
