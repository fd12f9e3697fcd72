"""Tiny random torch models of every family, as `transformers` builds and saves them.

Nothing stays at a value that would hide a mistake: biases and norms are random, query heads share
key heads, rotary bases and eps differ from the classes' defaults, all three position coordinates
have frequencies, and Qwen2.5-VL's windows do not divide the image.
"""

import functools
from pathlib import Path

import numpy as np
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

VOCAB, BYTES = 320, 300  # the config's and the trained tokens; special tokens lie between
CLIP_MEAN, CLIP_STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
QWEN = ('<|endoftext|>', '<|im_start|>', '<|im_end|>', '<|vision_start|>', '<|vision_end|>',
        '<|image_pad|>', '<|video_pad|>')
IDEFICS_TOKENS = ('<s>', '</s>', '<pad>', '<image>', '<|im_start|>', '<end_of_utterance>',
                  '<fake_token_around_image>', '<global-img>')
LLAVA = ('<s>', '</s>', '<pad>', '<image>', '<|im_start|>', '<|im_end|>', '<video>')
TEXT = ('The red shoe stands on a wooden shelf, and the blue one lies below it. A customer looked '
        'at the lamp, the small table and the chair; then bought the lamp. What comes next? '
        'Title: canvas shoe. Price: 20. Brand: none. Description: a light shoe of canvas.')
QWEN_CHAT = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}{% if m.content is string %}"
    "{{ m.content }}{% else %}{% for part in m.content %}{% if part.type == 'image' %}"
    "{{ '<|vision_start|><|image_pad|><|vision_end|>' }}{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}{% endif %}{{ '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}")
LLAVA_CHAT = (
    "{% for m in messages %}{{ m.role.upper() + ': ' }}{% if m.content is string %}"
    "{{ m.content }}{% else %}{% for part in m.content %}{% if part.type == 'image' %}"
    "{{ '<image>\\n' }}{% else %}{{ part.text }}{% endif %}{% endfor %}{% endif %}{{ ' ' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}")


def _text(theta, eps, **more):
    return dict(vocab_size=VOCAB, hidden_size=48, intermediate_size=80, num_hidden_layers=3,
                num_attention_heads=4, num_key_value_heads=2, hidden_act='silu', rms_norm_eps=eps,
                max_position_embeddings=512, **_rope(theta), **more)


def _rope(theta, **more):
    return {'rope_parameters': {'rope_type': 'default', 'rope_theta': theta, **more}}


CLIP = dict(model_type='clip_vision_model', hidden_size=32, intermediate_size=64,
            num_hidden_layers=3, num_attention_heads=4, image_size=32, patch_size=8,
            hidden_act='quick_gelu', layer_norm_eps=1e-5, projection_dim=16)
SIGLIP = dict(model_type='siglip_vision_model', hidden_size=32, intermediate_size=64,
              num_hidden_layers=3, num_attention_heads=4, image_size=32, patch_size=8,
              hidden_act='gelu_pytorch_tanh', layer_norm_eps=1e-6, vision_use_head=False)
GRID = dict(depth=3, num_heads=2, patch_size=8, spatial_merge_size=2, temporal_patch_size=2)
LLAMA = _text(7e4, 1e-5, model_type='llama', head_dim=12)
QWEN2 = _text(1e6, 1e-6, model_type='qwen2')
QWEN3 = _text(3e6, 1e-6, model_type='qwen3', head_dim=16)
QWEN2_VL = {**_text(1e6, 1e-6), **_rope(1e6, mrope_section=[1, 2, 3])}
QWEN3_VL = {**_text(5e6, 1e-6, head_dim=16),
            **_rope(5e6, mrope_section=[4, 2, 2], mrope_interleaved=True)}
V3 = dict(**GRID, hidden_size=24, intermediate_size=56, out_hidden_size=48,
          hidden_act='gelu_pytorch_tanh', num_position_embeddings=25,
          deepstack_visual_indexes=[0, 2])

IDEFICS = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
               image_size=32, patch_size=4, hidden_act='gelu_pytorch_tanh', layer_norm_eps=1e-6)

LlavaConfig, OneVision = transformers.LlavaConfig, transformers.LlavaOnevisionConfig
MODELS = {  # config class and what it is given
    'llava': (LlavaConfig, dict(vision_config=CLIP, text_config=LLAMA, vision_feature_layer=-2,
                                vision_feature_select_strategy='default', image_seq_length=16)),
    'llava_qwen2': (LlavaConfig, dict(vision_config=SIGLIP, text_config=QWEN2,
                                      vision_feature_layer=-1, image_seq_length=16,
                                      vision_feature_select_strategy='full')),
    'llava_qwen3': (LlavaConfig, dict(vision_config=SIGLIP, text_config=QWEN3,
                                      vision_feature_layer=-2, image_seq_length=16,
                                      vision_feature_select_strategy='full')),
    'llava_onevision': (OneVision, dict(vision_config=SIGLIP, text_config=QWEN2,
                                        image_grid_pinpoints=[[32, 32], [32, 64], [64, 32]])),
    'qwen2_vl': (transformers.Qwen2VLConfig, dict(
        vision_config=dict(**GRID, embed_dim=24, hidden_size=48, mlp_ratio=2,
                           hidden_act='quick_gelu'), text_config=QWEN2_VL)),
    'qwen2_5_vl': (transformers.Qwen2_5_VLConfig, dict(
        vision_config=dict(**GRID, hidden_size=24, intermediate_size=40, out_hidden_size=48,
                           hidden_act='silu', window_size=32, fullatt_block_indexes=[1]),
        text_config=QWEN2_VL)),
    'qwen3_vl': (transformers.Qwen3VLConfig, dict(vision_config=V3, text_config=QWEN3_VL)),
    'qwen3_vl_tied': (transformers.Qwen3VLConfig, dict(vision_config=V3, text_config=QWEN3_VL,
                                                       tie_word_embeddings=True)),
}
MODELS |= {
    'smolvlm': (transformers.SmolVLMConfig, dict(vision_config=IDEFICS, text_config=LLAMA,
                                                 scale_factor=2)),
    # nine patches a side: places are rounded
    'idefics3': (transformers.Idefics3Config, dict(
        vision_config={**IDEFICS, 'image_size': 36}, text_config=LLAMA, scale_factor=3))}
MODELS |= {name: (transformers.AutoConfig, text)  # texts alone
           for name, text in (('llama', LLAMA), ('qwen2', QWEN2), ('qwen3', QWEN3))}
NAMES = tuple(MODELS)


def reads_texts(name: str) -> bool:
    """Whether `name` has no vision transformer."""
    return 'vision_config' not in MODELS[name][1]


def side(name: str) -> int:
    """Pixels of a side of the images `name` is tried with."""
    return 0 if reads_texts(name) else 48 if name.startswith('qwen') else (
        36 if name == 'idefics3' else 32)


def config(name: str):
    """The transformers config of model `name`, with the ids of the tokenizer `save` trains."""
    kind, given = MODELS[name]
    ids = {token: BYTES + i for i, token in enumerate(_specials(name))}
    text = dict(given.get('text_config', given))
    if name.startswith('qwen'):
        text.update(eos_token_id=ids['<|im_end|>'], bos_token_id=ids['<|endoftext|>'],
                    pad_token_id=ids['<|endoftext|>'])
        more = dict(image_token_id=ids['<|image_pad|>'], video_token_id=ids['<|video_pad|>'],
                    vision_start_token_id=ids['<|vision_start|>'],
                    vision_end_token_id=ids['<|vision_end|>'])
    else:
        text.update(eos_token_id=ids['</s>'], bos_token_id=ids['<s>'], pad_token_id=ids['<pad>'])
        more = {'image_token_id' if name in ('smolvlm', 'idefics3') else 'image_token_index':
                ids['<image>']}
        if kind is OneVision:
            more['video_token_index'] = ids['<video>']
    if reads_texts(name):
        return kind.for_model(tie_word_embeddings=name == 'llama', **text)
    return kind(**{'tie_word_embeddings': False, **given, **more, 'text_config': text})


def build(name: str, seed: int = 0):
    """A random float32 model in eval mode; equal for equal `seed`."""
    made = config(name)
    auto = transformers.AutoModelForCausalLM if reads_texts(name) else (
        transformers.AutoModelForImageTextToText)
    kind = auto._model_mapping[type(made)]
    made._attn_implementation = 'eager'
    model = kind(made).float().eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for path, p in model.named_parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * _spread(path, p))
            if p.ndim == 1 and path.endswith('weight'):
                p.add_(1)  # norms
    text = made.get_text_config()
    model.generation_config.eos_token_id = text.eos_token_id
    model.generation_config.pad_token_id = text.pad_token_id
    return model


def _spread(path, p):
    if p.ndim == 1 or 'embed_tokens' in path or 'position' in path or 'pos_embed' in path:
        return 0.1
    # a faint image, so that eps in the norms of the tower matters
    return (0.1 if 'patch_embed' in path else 1) / (p.numel() / p.shape[0]) ** 0.5


def save(name: str, directory, tokenizer: bool = True, *, seed: int = 0, dtype=torch.float32):
    """Write model, generation config, tokenizer and image processor to `directory`."""
    transformers.utils.logging.disable_progress_bar()
    build(name, seed).to(dtype).save_pretrained(directory)
    if not reads_texts(name):
        processor(name).save_pretrained(directory)
    if tokenizer:
        make_tokenizer(name).save_pretrained(directory)
    return Path(directory)


def _specials(name):
    return QWEN if name.startswith('qwen') else IDEFICS_TOKENS if name in (
        'smolvlm', 'idefics3') else LLAVA


@functools.cache
def _bpe(specials):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator([TEXT] * 4, trainers.BpeTrainer(
        vocab_size=BYTES, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False))
    assert tokenizer.get_vocab_size() == BYTES
    tokenizer.add_special_tokens(list(specials))
    return tokenizer


def make_tokenizer(name: str):
    """A byte-level BPE tokenizer, trained here, with the family's special tokens and template."""
    qwen = name.startswith('qwen')
    made = transformers.PreTrainedTokenizerFast(
        tokenizer_object=_bpe(_specials(name)), padding_side='left',
        eos_token='<|im_end|>' if qwen else '</s>', bos_token=None if qwen else '<s>',
        pad_token='<|endoftext|>' if qwen else '<pad>',
        additional_special_tokens=list(_specials(name)))
    made.chat_template = QWEN_CHAT if qwen else LLAVA_CHAT
    return made


def processor(name: str):
    """The family's image processor (of PIL, no torchvision) for the tiny sizes."""
    half = dict(image_mean=[0.5] * 3, image_std=[0.5] * 3)
    if name.startswith('qwen'):
        return transformers.Qwen2VLImageProcessorPil(
            patch_size=8, merge_size=2, temporal_patch_size=2, min_pixels=256, max_pixels=65536,
            **half if name.startswith('qwen3')
            else dict(image_mean=CLIP_MEAN, image_std=CLIP_STD))
    square = {'height': 32, 'width': 32}
    if name == 'llava':
        return transformers.CLIPImageProcessorPil(
            size={'shortest_edge': 32}, crop_size=square, image_mean=CLIP_MEAN, image_std=CLIP_STD)
    if name == 'llava_onevision':
        return transformers.LlavaOnevisionImageProcessorPil(
            size=square, image_grid_pinpoints=[[32, 32], [32, 64], [64, 32]], **half)
    if name in ('smolvlm', 'idefics3'):
        return transformers.Idefics3ImageProcessorPil(
            size={'longest_edge': 32}, max_image_size={'longest_edge': 32}, **half)
    return transformers.SiglipImageProcessorPil(size=square, **half)


def images(count: int, pixels: int, seed: int = 0):
    """Smooth random images uint8 [count, pixels, pixels, 3]."""
    from PIL import Image

    if not pixels:
        return np.zeros((count, 0, 0, 3), np.uint8)
    random = np.random.default_rng(seed)
    small = random.integers(0, 256, (count, 4, 4, 3), dtype=np.uint8)
    return np.stack([np.asarray(Image.fromarray(s).resize((pixels, pixels), Image.BICUBIC))
                     for s in small])
