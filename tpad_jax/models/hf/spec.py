"""What a checkpoint's config.json says of a model, as plain numbers; anything unknown is refused.

`transformers` reads the file and brings older forms up to date. Theta and M-RoPE sections are taken
from `rope_parameters`, never from a class's default, and what a wrong guess would silently change
(family, tower, decoder, rope type, activation) is named in a refusal.
"""

import json
from dataclasses import dataclass
from pathlib import Path

from tpad_jax.errors import InputError

ACTIVATIONS = ('silu', 'gelu', 'gelu_pytorch_tanh', 'quick_gelu')
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class Decoder:
    """A causal decoder: RMSNorm, grouped-query attention, SwiGLU.

    Attributes:
      kv_heads: key and value heads, each shared by heads / kv_heads query heads.
      hidden: inner width of the SwiGLU. eps: of the norms. theta: base of the rotary frequencies.
      qkv_bias: q, k and v have biases. qk_norm: q and k pass an RMSNorm per head.
      sections: rotary frequencies per position coordinate (M-RoPE), (): one coordinate.
      interleaved: coordinates alternate over the frequencies (Qwen3-VL), not in blocks.
      tied: the output embedding is the input's.
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
      layers: blocks that run: all, or without the last for the last but one's states.
      stored: blocks the checkpoint holds.
      image, patch: pixels. has_class: a class token stands first (CLIP); keep_class: it stays.
      pre_norm: a norm before the blocks (CLIP). eps: of the norms.
    """

    kind: str  # 'clip' or 'siglip'
    width: int
    layers: int
    stored: int
    heads: int
    hidden: int
    image: int
    patch: int
    activation: str
    eps: float
    has_class: bool
    keep_class: bool
    pre_norm: bool


@dataclass(frozen=True)
class Grid:
    """A Qwen vision transformer: rotary positions in two dimensions, neighbours merged at the end.

    Attributes:
      patch, merge: pixels of a patch, patches of a merged token's side.
      out: width of the merged tokens. activation: of the blocks.
      places: side of the learned table of positions that is resampled (Qwen3-VL), 0: none.
      window: pixels of an attention window's side (Qwen2.5-VL), 0: none; full: blocks without.
      deep: blocks whose states also become features for the decoder's first layers (DeepStack).
    """

    kind: str  # 'qwen2', 'qwen2_5' or 'qwen3'
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
    """A whole vision-language model.

    Attributes:
      family: transformers' model_type.
      projector: activation between tower and decoder (LLaVA; '': a Grid merges instead).
      projector_bias: its layers have biases. newline: a learned token ends every image (OneVision).
      image_id: the token that holds an image token's place in a prompt.
      start_ids, end_ids: tokens before and behind an image.
      mean, std: of the pixels' channels, on 0..1.
    """

    family: str
    decoder: Decoder
    vision: Tower | Grid
    projector: str
    projector_bias: bool
    newline: bool
    image_id: int
    start_ids: tuple[int, ...]
    end_ids: tuple[int, ...]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def cells(self, side: int) -> tuple[int, int]:
        """Rows and columns of an image's tokens at `side` pixels, height and width.

        Raises:
          InputError: the vision tower cannot read an image of this size.
        """
        v = self.vision
        if isinstance(v, Tower):
            if side != v.image:
                raise InputError(f'config.mllm.image_size={side}, but this vision tower reads '
                                 f'{v.image} pixels only; set it so')
            return (v.image // v.patch,) * 2
        unit = v.patch * v.merge
        if side < unit or side % unit:
            raise InputError(f'config.mllm.image_size={side} must be a multiple of {unit} pixels, '
                             f'a merged token of this vision tower')
        return (side // unit,) * 2

    def image_tokens(self, side: int) -> int:
        """Tokens an image of `side` pixels takes in a prompt, start_ids and end_ids not counted."""
        rows, columns = self.cells(side)
        extra = self.newline + (isinstance(self.vision, Tower) and self.vision.keep_class)
        return rows * columns + int(extra)


def read(directory) -> Spec:
    """The Spec of a checkpoint directory.

    Raises:
      InputError: no config.json, or one of an architecture, rope type, activation or option that
        is not implemented here.
    """
    file = Path(directory) / 'config.json'
    if not file.is_file():
        raise InputError(f'{directory} holds no checkpoint: there is no config.json; give the '
                         'directory of a Hugging Face model')
    from transformers import AutoConfig  # slow to import

    try:
        family = json.loads(file.read_text()).get('model_type')
    except (ValueError, AttributeError) as error:
        raise InputError(f'{file} is no JSON object: {error}') from error
    if family not in FAMILIES:
        raise InputError(f'{file}: model_type {family!r} is not implemented; there are '
                         f'{", ".join(FAMILIES)}')
    try:
        config = AutoConfig.from_pretrained(directory, local_files_only=True)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise InputError(f'{file}: {str(error).splitlines()[0]}') from error
    return FAMILIES[family](file, config, _preprocessing(directory))


def _llava(file, config, pixels):
    v, layer = config.vision_config, config.vision_feature_layer
    if isinstance(layer, list | tuple):
        raise InputError(f'{file}: vision_feature_layer={list(layer)} joins several layers, which '
                         'is not implemented; one layer is')
    strategy = config.vision_feature_select_strategy
    _known(file, 'vision_feature_select_strategy', strategy, ('default', 'full'))
    _known(file, 'vision_config.model_type', v.model_type,
           ('clip_vision_model', 'siglip_vision_model'))
    clip = v.model_type == 'clip_vision_model'
    run = v.num_hidden_layers + 1 + layer if layer < 0 else layer
    if not 0 < run <= v.num_hidden_layers:
        raise InputError(f'{file}: vision_feature_layer={layer} is none of the vision tower\'s '
                         f'{v.num_hidden_layers} layers')
    # OneVision never drops a token of its (SigLIP) tower, whatever its strategy is called
    onevision = config.model_type == 'llava_onevision'
    if not clip and strategy == 'default' and not onevision:
        raise InputError(f'{file}: vision_feature_select_strategy=default drops the first token, '
                         'which is a patch with a SigLIP tower; such checkpoints say full')
    if onevision and clip:
        raise InputError(f'{file}: llava_onevision with a CLIP tower is not implemented')
    tower = Tower(
        'clip' if clip else 'siglip', v.hidden_size, run, v.num_hidden_layers,
        v.num_attention_heads, v.intermediate_size, v.image_size, v.patch_size,
        _activation(file, 'vision_config.hidden_act', v.hidden_act), v.layer_norm_eps, clip,
        clip and strategy == 'full', clip)
    text = config.text_config
    _known(file, 'text_config.model_type', text.model_type, ('llama', 'qwen2', 'qwen3', 'mistral'))
    decoder = _decoder(file, text, config, qkv_bias=text.model_type == 'qwen2',
                       qk_norm=text.model_type == 'qwen3')
    activation = _activation(file, 'projector_hidden_act', config.projector_hidden_act)
    mean, std = pixels or ((CLIP_MEAN, CLIP_STD) if clip else ((0.5,) * 3, (0.5,) * 3))
    image_id = getattr(config, 'image_token_id', None)
    image_id = config.image_token_index if image_id is None else image_id
    return Spec(config.model_type, decoder, tower, activation, config.multimodal_projector_bias,
                onevision, image_id, (), (), mean, std)


def _qwen(file, config, pixels):
    v, kind = config.vision_config, config.model_type.removesuffix('_vl')
    head = v.hidden_size if kind != 'qwen2' else v.embed_dim
    hidden = v.intermediate_size if kind != 'qwen2' else int(v.embed_dim * v.mlp_ratio)
    grid = Grid(
        kind, head, v.depth, v.num_heads, hidden, v.patch_size, v.spatial_merge_size,
        v.hidden_size if kind == 'qwen2' else v.out_hidden_size,
        _activation(file, 'vision_config.hidden_act', v.hidden_act), 1e-6,
        round(v.num_position_embeddings ** 0.5) if kind == 'qwen3' else 0,
        v.window_size if kind == 'qwen2_5' else 0,
        tuple(v.fullatt_block_indexes) if kind == 'qwen2_5' else (),
        tuple(v.deepstack_visual_indexes) if kind == 'qwen3' else ())
    if v.temporal_patch_size != 2:
        raise InputError(f'{file}: vision_config.temporal_patch_size={v.temporal_patch_size} is '
                         'not implemented; 2 is')
    theta = getattr(v, 'rope_parameters', None) or {}
    if theta.get('rope_theta', 10_000.0) != 10_000.0:
        raise InputError(f'{file}: vision_config.rope_parameters.rope_theta={theta["rope_theta"]} '
                         'is not implemented; 10000 is')
    if list(grid.deep) != sorted({i for i in grid.deep if i < v.depth}):
        raise InputError(f'{file}: vision_config.deepstack_visual_indexes={list(grid.deep)} must '
                         f'be rising and below depth, {v.depth}')
    if kind == 'qwen2_5' and grid.window < grid.patch * grid.merge:
        raise InputError(f'{file}: vision_config.window_size={grid.window} is smaller than a '
                         f'merged token, {grid.patch * grid.merge}')
    rope = _rope(file, config.text_config)
    if 'mrope_section' not in rope:
        raise InputError(f'{file}: text_config.rope_parameters has no mrope_section; copy it from '
                         'the model this checkpoint was made of')
    decoder = _decoder(file, config.text_config, config, qkv_bias=kind != 'qwen3',
                       qk_norm=kind == 'qwen3', sections=tuple(rope['mrope_section']),
                       interleaved=kind == 'qwen3')
    mean, std = pixels or (((0.5,) * 3, (0.5,) * 3) if kind == 'qwen3' else (CLIP_MEAN, CLIP_STD))
    return Spec(config.model_type, decoder, grid, '', True, False, config.image_token_id,
                (config.vision_start_token_id,), (config.vision_end_token_id,), mean, std)


FAMILIES = {'llava': _llava, 'llava_onevision': _llava, 'qwen2_vl': _qwen, 'qwen2_5_vl': _qwen,
            'qwen3_vl': _qwen}


def _decoder(file, text, whole, *, qkv_bias, qk_norm, sections=(), interleaved=False):
    rope = _rope(file, text)
    _known(file, 'text_config.hidden_act', text.hidden_act, ('silu',))
    for option in ('mlp_bias', 'use_sliding_window'):
        if getattr(text, option, False):
            raise InputError(f'{file}: text_config.{option}=true is not implemented')
    if getattr(text, 'attention_bias', False):
        raise InputError(f'{file}: text_config.attention_bias=true is not implemented')
    if text.model_type == 'mistral' and text.sliding_window is not None:
        raise InputError(f'{file}: text_config.sliding_window={text.sliding_window} is not '
                         'implemented; null is')
    head_dim = getattr(text, 'head_dim', None) or text.hidden_size // text.num_attention_heads
    if sections and sum(sections) != head_dim // 2:
        raise InputError(f'{file}: mrope_section {list(sections)} does not add up to half a head, '
                         f'{head_dim // 2}')
    tied = bool(whole.tie_word_embeddings)
    return Decoder(text.vocab_size, text.hidden_size, text.num_hidden_layers,
                   text.num_attention_heads, text.num_key_value_heads, head_dim,
                   text.intermediate_size, text.rms_norm_eps, float(rope['rope_theta']), qkv_bias,
                   qk_norm, sections, interleaved, tied)


def _rope(file, text):
    rope = getattr(text, 'rope_parameters', None)
    if not rope or 'rope_theta' not in rope:
        raise InputError(f'{file}: text_config.rope_parameters has no rope_theta')
    kind = rope.get('rope_type', rope.get('type', 'default'))
    _known(file, 'text_config.rope_parameters.rope_type', kind, ('default', 'mrope'))
    return rope


def _activation(file, key, name):
    _known(file, key, name, ACTIVATIONS)
    return name


def _known(file, key, value, choices):
    if value not in choices:
        raise InputError(f'{file}: {key} {value!r} is not implemented; there are '
                         f'{", ".join(choices)}')


def _preprocessing(directory):
    """Mean and std of the pixels from preprocessor_config.json, None where there is no such file.

    Raises:
      InputError: the file cannot be read, or asks for another rescaling than to 0..1.
    """
    file = Path(directory) / 'preprocessor_config.json'
    if not file.is_file():
        file = Path(directory) / 'processor_config.json'  # where transformers 5 nests it
        if not file.is_file():
            return None
    try:
        found = json.loads(file.read_text())
        found = found.get('image_processor', found)
        scale = found.get('rescale_factor', 1 / 255)
        if 'image_mean' not in found:
            return None
        mean, std = (tuple(float(x) for x in found[n]) for n in ('image_mean', 'image_std'))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f'{file} is no image processor\'s config: {error}') from error
    if abs(scale - 1 / 255) > 1e-6:
        raise InputError(f'{file}: rescale_factor {scale} is not implemented; 1/255 is')
    return mean, std
