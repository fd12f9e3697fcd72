"""Choose the tokenizer of item texts by measurement, and refuse texts that all read alike.

The small base knows the words of the planted catalogue. Texts of another kind take several of its
tokens a word, so that few words are read. Such a catalogue gets a tokenizer trained on it. The
base's weights mean nothing under another vocabulary: it is drawn at random and trained in stage
knowledge on the catalogue's items, whose words k predicts without their order. To write texts takes
longer to learn, and three times as long a step, so neither MLLM does [ours].
"""

import copy
from pathlib import Path

import numpy as np

from tpad_jax.config import flat, get_config
from tpad_jax.data import text
from tpad_jax.errors import refuse_if

SAMPLE = 4000  # texts that are measured, spread over the catalogue
LONGEST = 2048  # tokens of a text that are counted
MANY = 2.5  # tokens a word: 1.6 on planted texts, 3.3 to 3.8 on the public catalogues tried
FITTING = 0.75  # share of the texts that should fit, if config.mllm.own.text_length allows
TRAIN = '^(base|lora/knowledge|knowledge)/'  # what stage knowledge trains of a base drawn at random


def counts(texts: list[str], directory: Path) -> tuple[np.ndarray, np.ndarray]:
    """Count tokens and words, int [n] each.

    Args:
      texts: n texts.
      directory: of the tokenizer.
    """
    tokens = text.tokenize(texts, directory, LONGEST)
    return (tokens >= 0).sum(1), np.array([len(words.split()) for words in texts])


def fitted(config, texts: list[str], shipped: Path, own: Path, reads: bool = True):
    """Choose the tokenizer, and the options that follow from it.

    Where a tokenizer is trained, the values of config.mllm.own replace the options of the same
    meaning that still have their default.

    Args:
      config: of the run, not changed.
      texts: V + 1 texts; [0] is ''.
      shipped: directory of the base's tokenizer.
      own: directory for a trained one.
      reads: whether a stage of the run reads the texts; else 'auto' trains none.

    Returns:
      The config with a mllm.tokenizer of '' or 'own', the directory of the tokenizer, and
      {'tokenizer', 'tokens_per_word', 'share_that_fit', 'text_length', 'different'} for results.
    """
    config = copy.deepcopy(config)
    c, some = config.mllm, [words for words in texts if words]
    some = some[::max(1, len(some) // SAMPLE)] or ['']
    auto = reads and c.tokenizer == 'auto' and not (c.base or c.checkpoint or c.teacher)
    where, (tokens, words) = shipped, counts(some, shipped)
    if c.tokenizer == 'own' or (auto and tokens.sum() > MANY * words.sum()):
        where = own
        if not (own / 'tokenizer.json').is_file():  # that of an earlier sitting stays
            text.train_tokenizer(texts[1:], own, c.own.vocab)
        tokens, words = counts(some, own)
        length = 8 * int(np.ceil(np.quantile(tokens, FITTING) / 8))
        changes = {'mllm.text_length': min(max(c.text_length, length), c.own.text_length),
                   'stage.knowledge.steps': c.own.steps, 'stage.knowledge.train': TRAIN,
                   'stage.knowledge.learning_rate': c.own.learning_rate,
                   'losses.words.weight': 1.0, 'losses.gen_knowledge.weight': 0.0,
                   'losses.gen_transfer.weight': 0.0}
        before, now = dict(flat(get_config())), dict(flat(config))
        config.update_from_flattened_dict({
            key: value for key, value in changes.items() if now[key] == before[key]})
    c.tokenizer = 'own' if where is own else ''
    return config, where, {
        'tokenizer': c.tokenizer or ('checkpoint' if c.checkpoint else 'base'),
        'tokens_per_word': float(tokens.sum() / max(1, words.sum())),
        'share_that_fit': float((tokens <= c.text_length).mean()),
        'text_length': c.text_length, 'different': len(set(texts[1:]))}


def check_different(texts: list[str], tokens: np.ndarray, has_image: np.ndarray,
                    where: Path) -> None:
    """Refuse texts that all read alike, before a stage trains on them.

    Args:
      texts: V + 1 texts; [0] is ''.
      tokens: int32 [V + 1, T].
      has_image: bool [V + 1]. With pictures, items may differ although their texts do not.
      where: directory of the tokenizer.

    Raises:
      InputError: all items have the same tokens.
    """
    equal = len(tokens) > 2 and (tokens[1:] == tokens[1]).all()
    refuse_if(equal and not has_image.any(), f'all {len(texts) - 1} items have the same text for '
              f'the tokenizer in {where}, cut at {tokens.shape[1]} tokens: {texts[1][:80]!r} '
              f'(there are {len(set(texts[1:]))} different ones). Expected texts that differ. Fix: '
              'name other fields (config.data.words), raise config.mllm.text_length, or leave out '
              'the stages that read texts.')


def check_rows(name: str, rows, source: str) -> None:
    """Refuse a feature that is the same for every item: nothing can be recommended by it.

    Args:
      name: of the rows.
      rows: float [V + 1, ...].
      source: what they were made from, and what to change.

    Raises:
      InputError: all rows of the items are equal.
    """
    rows = rows.reshape(len(rows), -1)[1:]
    refuse_if(len(rows) > 1 and bool((abs(rows - rows[0]) <= 1e-6 * abs(rows[0]).max()).all()),
              f'the feature {name!r} is the same for all {len(rows)} items: {source}')
