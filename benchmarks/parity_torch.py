"""What torch says: inputs for both sides, and hidden states, logits, gradients and greedy tokens
of a `transformers` model. Used by `benchmarks.parity`.
"""

import gc
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import transformers

from tpad_jax.models.hf import spec as specs
from tpad_jax.models.hf.spec import Grid, Spec

TEXTS = ('A red shoe', 'Next:', 'or a lamp', 'then one')


@dataclass
class Prompt:
    """Rows with no, one and two images; the tokens of an image are placeholders.

    Attributes:
      tokens: int64 [B, S]. mask: bool [B, S]. image: uint8 [B, n, side, side, 3], zeros behind
        counts[b] images.
    """

    tokens: np.ndarray
    mask: np.ndarray
    image: np.ndarray
    counts: tuple[int, ...]


def prompt(spec: Spec, side: int, *, left: bool, words, images, counts=(0, 1, 2)) -> Prompt:
    """One row per entry of `counts`, which differ in length; padded on the left or the right.

    Args:
      words: lists of token ids, used in turn for the text before, between and behind images.
      images: uint8 [sum(counts), side, side, 3].
    """
    rows, used = [], 0
    place = [*spec.start_ids, *[spec.image_id] * spec.image_tokens(side), *spec.end_ids]
    image = np.zeros((len(counts), max(counts), side, side, 3), np.uint8)
    for b, count in enumerate(counts):
        row = list(words[b % len(words)])
        for i in range(count):
            row += place + list(words[(b + i + 1) % len(words)])
            image[b, i], used = images[used], used + 1
        rows.append(row)
    length = max(map(len, rows))
    tokens, mask = np.zeros((2, len(rows), length), np.int64)
    for b, row in enumerate(rows):
        at = slice(length - len(row), None) if left else slice(len(row))
        tokens[b, at], mask[b, at] = row, 1
    return Prompt(tokens, mask.astype(bool), image, tuple(counts))


def words(directory, spec: Spec) -> list[list[int]]:
    """TEXTS in tokens; random ones where the directory holds no tokenizer."""
    if (Path(directory) / 'tokenizer.json').is_file():
        tokenizer = transformers.AutoTokenizer.from_pretrained(directory, local_files_only=True)
        return [tokenizer(text, add_special_tokens=False)['input_ids'] for text in TEXTS]
    random, top = np.random.default_rng(0), min(256, spec.decoder.vocab)
    return [random.integers(3, top, n).tolist() for n in (5, 2, 6, 3)]


def keywords(model, directory, given: Prompt, spec: Spec) -> dict:
    """What the model's forward and generate take for a prompt, but for position ids."""
    mask = torch.from_numpy(given.mask).long()
    out = {'input_ids': torch.from_numpy(given.tokens), 'attention_mask': mask}
    held = [given.image[b, i] for b, n in enumerate(given.counts) for i in range(n)]
    if not held or spec.vision is None:
        return out
    processor = transformers.AutoImageProcessor.from_pretrained(directory, local_files_only=True)
    if isinstance(spec.vision, Grid):
        seen = processor(held, do_resize=False, return_tensors='pt')
        out.update(image_grid_thw=seen['image_grid_thw'],
                   mm_token_type_ids=(out['input_ids'] == spec.image_id).int() * mask.int())
        pixels = seen['pixel_values']
    else:
        mean, std = (torch.tensor(getattr(processor, n)) for n in ('image_mean', 'image_std'))
        pixels = ((torch.from_numpy(np.stack(held)) / 255 - mean) / std).permute(0, 3, 1, 2)
        if spec.family in ('idefics3', 'smolvlm'):  # [B, n, 3, H, W], zeros where there is none
            rows = torch.zeros(*given.image.shape[:2], *pixels.shape[1:])
            rows[torch.arange(rows.shape[1]) < torch.tensor(given.counts)[:, None]] = pixels
            pixels = rows
        if spec.newline:  # two images or more: one tile each, and a newline
            pixels = pixels[:, None]
            out.update(image_sizes=torch.full((len(held), 2), held[0].shape[0]),
                       batch_num_images=torch.tensor([max(2, len(held))]))
    return {**out, 'pixel_values': pixels.to(model.dtype)}


def load(directory, dtype: str):
    """The model of a directory, in eval mode, with plain attention."""
    kind = (transformers.AutoModelForCausalLM if specs.read(directory).vision is None else
            transformers.AutoModelForImageTextToText)
    model = kind.from_pretrained(
        directory, dtype=getattr(torch, dtype), attn_implementation='eager', local_files_only=True)
    return model.eval()


def free():
    """Give back the memory of models that nothing names any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def run(model, given: dict, spec: Spec, weight=None):
    """One forward pass, and a backward one where `weight` is given.

    Args:
      weight: float32 [B, S, V]; the loss is the sum of weight x logits.

    Returns:
      numpy float32: hidden states [layers + 1, B, S, D] (the inputs, each layer's output, the last
      one's after the final norm), logits [B, S, V], {name: gradient} (empty without weight).
    """
    if not isinstance(spec.vision, Grid):  # these ignore left padding
        given = {**given, 'position_ids': (given['attention_mask'].cumsum(-1) - 1).clamp(min=0)}
    with torch.set_grad_enabled(weight is not None):
        out = model(**given, output_hidden_states=True, use_cache=False)
        gradients = {}
        if weight is not None:
            (out.logits.float() * torch.from_numpy(weight)).sum().backward()
            gradients = {name: p.grad.float().numpy() for name, p in model.named_parameters()
                         if p.grad is not None}
            model.zero_grad(set_to_none=True)
    hidden = np.stack([h.detach().float().numpy() for h in out.hidden_states])
    return hidden, out.logits.detach().float().numpy(), gradients


def greedy(model, given: dict, steps: int):
    """`steps` tokens chosen one by one, int64 [B, steps]; nothing ends a row before."""
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    with torch.no_grad():
        out = model.generate(**given, do_sample=False, max_new_tokens=steps, use_cache=True)
    return out[:, given['input_ids'].shape[1]:].numpy()
