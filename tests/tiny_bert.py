"""Tiny random text encoders in the form of sentence-transformers, and their vectors by torch."""

import json
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

from tests import tiny_hf

SPECIALS = {'bert': ('[PAD]', '[UNK]', '[CLS]', '[SEP]', '[MASK]'),
            'xlm-roberta': ('<s>', '<pad>', '</s>', '<unk>', '<mask>')}
SIZES = dict(vocab_size=211, hidden_size=36, num_hidden_layers=3, num_attention_heads=3,
             intermediate_size=56, max_position_embeddings=44)
FAMILIES = {  # config class, and what differs from SIZES
    'bert': (transformers.BertConfig, dict(hidden_act='gelu', layer_norm_eps=1e-12)),
    'xlm-roberta': (transformers.XLMRobertaConfig, dict(
        hidden_act='gelu_pytorch_tanh', layer_norm_eps=1e-5, type_vocab_size=1))}
TEXTS = ('A red shoe', '', 'The lamp, the small table and the chair; then the lamp again. ' * 8,
         'canvas shoe of canvas')


def save(family: str, directory, *, pooling='mean', normalise=True, longest=24):
    """Write a random model, its tokenizer and the files of sentence-transformers."""
    transformers.utils.logging.disable_progress_bar()
    kind, more = FAMILIES[family]
    tokenizer = make_tokenizer(family)
    config = kind(**SIZES, **more, pad_token_id=tokenizer.pad_token_id,
                  bos_token_id=tokenizer.cls_token_id, eos_token_id=tokenizer.sep_token_id)
    model = transformers.AutoModel.from_config(config).float()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for path, p in model.named_parameters():
            spread = 0.3 if p.ndim == 1 or 'embeddings' in path else p.shape[1] ** -0.5
            p.copy_(torch.randn(p.shape, generator=generator) * spread)
            if 'LayerNorm.weight' in path:
                p.add_(1)
    directory = Path(directory)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    names = ['Transformer', 'Pooling', *['Normalize'] * normalise]
    write = {'modules.json': [
                 {'idx': i, 'name': str(i), 'path': f'{i}_{name}' if i else '',
                  'type': f'sentence_transformers.models.{name}'} for i, name in enumerate(names)],
             'sentence_bert_config.json': {'max_seq_length': longest, 'do_lower_case': False},
             '1_Pooling/config.json': {
                 'word_embedding_dimension': SIZES['hidden_size'],
                 'pooling_mode_cls_token': pooling == 'cls',
                 'pooling_mode_mean_tokens': pooling == 'mean',
                 'pooling_mode_max_tokens': False}}
    for name, content in write.items():
        (directory / name).parent.mkdir(exist_ok=True)
        (directory / name).write_text(json.dumps(content))
    return directory


def make_tokenizer(family: str):
    """A trained WordPiece tokenizer that frames a text as the family does."""
    specials = SPECIALS[family]
    first, last, pad, unknown = ((specials[0], specials[2], specials[1], specials[3])
                                 if family == 'xlm-roberta' else
                                 (specials[2], specials[3], specials[0], specials[1]))
    tokenizer = Tokenizer(models.WordPiece(unk_token=unknown))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.train_from_iterator([tiny_hf.TEXT] * 4, trainers.WordPieceTrainer(
        vocab_size=200, special_tokens=list(specials), show_progress=False))
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f'{first} $A {last}', special_tokens=[
            (name, tokenizer.token_to_id(name)) for name in (first, last)])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, cls_token=first, sep_token=last, pad_token=pad,
        unk_token=unknown, model_input_names=['input_ids', 'attention_mask'])


def vectors(directory, texts=TEXTS, *, pooling='mean', normalise=True, longest=24, dtype='float32'):
    """What `SentenceTransformer(directory).encode(texts)` computes, by its documented formulas.

    Returns:
      numpy [texts, D], hidden states [layers + 1, texts, S, D], tokens and mask [texts, S].
    """
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    model = transformers.AutoModel.from_pretrained(
        directory, dtype=getattr(torch, dtype), attn_implementation='eager').eval()
    given = tokenizer(list(texts), padding=True, truncation=True, max_length=longest,
                      return_tensors='pt')
    with torch.no_grad():
        out = model(**given, output_hidden_states=True)
    state, mask = out.last_hidden_state, given['attention_mask'][..., None].to(
        out.last_hidden_state.dtype)
    x = state[:, 0] if pooling == 'cls' else (state * mask).sum(1) / mask.sum(1).clamp(min=1e-9)
    if normalise:
        x = torch.nn.functional.normalize(x, p=2, dim=1)
    return (x.numpy(), torch.stack(out.hidden_states).numpy(),
            given['input_ids'].numpy(), given['attention_mask'].bool().numpy())
