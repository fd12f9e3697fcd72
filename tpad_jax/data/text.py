"""Item texts and side features: words, tokens, and ids of brand, category and price level."""

import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import polars as pl

from tpad_jax.data.cleaning import clean
from tpad_jax.errors import refuse_if, refusing

PRICE_LEVELS = 10
# keys in tokenizer_config.json of a tokenizer that tokenizer.json describes completely
PLAIN = {'tokenizer_class', 'backend', 'model_max_length', 'pad_token'}
TOKENIZER_CHUNK = 8192  # texts per call, so that Python lists of ids stay small
NESTED = 4  # levels of lists in a field whose words are read


def words_of(value, levels: int = NESTED) -> str:
    """Read the words of a field.

    Args:
      value: a text, a number (its digits), a list of these or lists, or anything else.
      levels: of nested lists that are read.

    Returns:
      The words, '' if there are none.
    """
    if isinstance(value, list):
        parts = (words_of(part, levels - 1) for part in value) if levels else ()
        return ' '.join(filter(None, parts))
    return '' if value is None or isinstance(value, dict) else clean(str(value))


def counted_words(record: dict, name: str, unused: Counter) -> str:
    """Read the words of a field, and count a text without any: page code or punctuation.

    Args:
      record: fields of an item.
      name: of the field.
      unused: increased at '<name>_page_code'.
    """
    value = record.get(name)
    words = words_of(value)
    unused[f'{name}_page_code'] += isinstance(value, str) and bool(value.strip()) and not words
    return words


def joined(values: Iterable) -> str:
    """Join the words of an item's fields, as in "title. brand"; empty ones are left out."""
    return '. '.join(filter(None, map(words_of, values)))


def item_text() -> pl.Expr:
    """Join title, brand, category and description, as in "title. brand"; '' where there is none."""
    parts = [pl.when(pl.col(name) != '').then(pl.col(name))  # null for none
             for name in ('title', 'brand', 'category', 'description')]
    return pl.concat_str(parts, separator='. ', ignore_nulls=True)


def item_texts(catalogue: pl.DataFrame) -> list[str]:
    """Join title, brand, category and description of every item, as `item_text`.

    Args:
      catalogue: V rows.

    Returns:
      List of V + 1 str; index 0 (padding) is ''.
    """
    return ['', *catalogue.select(item_text()).to_series()]


def tokenize(texts: list[str], tokenizer_dir: str | Path, length: int) -> np.ndarray:
    """Tokenize texts by the Hugging Face tokenizer in a local directory.

    Special tokens belong to the prompt, and a text that spells one out does not become it. Long
    texts keep their first `length` tokens; short ones are padded on the right with -1.

    Args:
      texts: V + 1 texts.
      tokenizer_dir: the directory.
      length: tokens per text.

    Returns:
      int32 [V + 1, length]; an empty text is all padding.

    Raises:
      InputError: the directory holds no usable tokenizer.
    """
    encode = _encoder(Path(tokenizer_dir), length)
    tokens = np.full((len(texts), length), -1, np.int32)
    for begin in range(0, len(texts), TOKENIZER_CHUNK):
        for row, ids in enumerate(encode(texts[begin:begin + TOKENIZER_CHUNK]), start=begin):
            tokens[row, :len(ids)] = ids
    return tokens


def _encoder(directory, length):
    """Make a function texts -> lists of ids, without importing `transformers` where possible.

    That import takes seconds. It is not needed where tokenizer.json describes the tokenizer
    completely, as that of `train_tokenizer` does.

    Args:
      directory: of the tokenizer.
      length: tokens per text.

    Returns:
      The function.

    Raises:
      InputError: a file is missing or damaged.
    """
    try:
        settings = dict(json.loads((directory / 'tokenizer_config.json').read_bytes()))
    except (OSError, ValueError, TypeError):
        settings = {}  # `read_tokenizer` knows other files, and names what is wrong
    if settings.get('tokenizer_class') != 'TokenizersBackend' or settings.keys() - PLAIN:
        tokenizer = read_tokenizer(directory)
        return lambda texts: tokenizer(
            texts, add_special_tokens=False, truncation=True, max_length=length,
            split_special_tokens=True)['input_ids']
    from tokenizers import Tokenizer

    file = directory / 'tokenizer.json'
    with refusing(Exception, f'{file} is not a usable tokenizer',  # it raises nothing narrower
                  'Expected a file of the tokenizers library. Fix: copy it again.'):
        tokenizer = Tokenizer.from_file(str(file))
    tokenizer.encode_special_tokens = True
    tokenizer.no_padding()
    tokenizer.enable_truncation(length)
    return lambda texts: [encoding.ids for encoding in
                          tokenizer.encode_batch(texts, add_special_tokens=False)]


def read_tokenizer(directory: str | Path):
    """Read the tokenizer in a local directory.

    Args:
      directory: local.

    Returns:
      A tokenizer of `transformers` that pads and truncates on the right.

    Raises:
      InputError: it holds no usable one.
    """
    refuse_if(not Path(directory).is_dir(), f'{directory}: no such directory. Expected one with '
              'tokenizer.json and tokenizer_config.json. Fix: correct the path.')
    from transformers import AutoTokenizer  # slow to import, and few callers tokenize

    with refusing((OSError, ValueError), f'{directory}: no usable tokenizer',
                  'Expected tokenizer.json and its config. Fix: copy both.'):
        tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True,
                                                  trust_remote_code=False)
    tokenizer.padding_side = tokenizer.truncation_side = 'right'
    return tokenizer


def train_tokenizer(corpus: list[str], directory: str | Path, vocab: int) -> None:
    """Train a byte-level BPE, which can encode any text, and write it.

    The corpus' most frequent words become one token each.

    Args:
      corpus: texts.
      directory: made if absent; its tokenizer is replaced.
      vocab: rows of the model's embedding, the most tokens.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast  # here: it takes seconds to import

    tokenizer = Tokenizer(models.BPE(unk_token=None))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(corpus, trainers.BpeTrainer(
        vocab_size=vocab, special_tokens=['<pad>'], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token='<pad>')
    fast.save_pretrained(directory)


def side_features(catalogue: pl.DataFrame,
                  warm: np.ndarray) -> tuple[np.ndarray, tuple[int, int, int]]:
    """Number brand, category and price level of every item; 0 is unknown (and padding).

    Args:
      catalogue: V rows with brand, category (str) and price (float or null).
      warm: bool [V + 1].

    Returns:
      ids int32 [V + 1, 3], and how many different ids each column can have, 0 included.
    """
    vocabulary = side_vocabulary(catalogue, warm)
    sizes = (*(len(vocabulary[name]) + 1 for name in ('brand', 'category')), PRICE_LEVELS + 1)
    return np.pad(side_ids(catalogue, vocabulary), ((1, 0), (0, 0))), sizes


def side_vocabulary(catalogue: pl.DataFrame, warm: np.ndarray) -> dict[str, list]:
    """Collect the values of side features that have an id, for later items too.

    They come from the warm items alone. A value that fewer than two of them have adds nothing to
    the item's id. The price levels 1..10 are the tenths of the warm items' prices.

    Args:
      catalogue: as in `side_features`.
      warm: bool [V + 1].

    Returns:
      {'brand': values in their alphabetic order, 'category': likewise, 'price': 9 edges, or none
      where no warm item has a price}; JSON can hold it.
    """
    warm = warm[1:]
    price = _prices(catalogue)
    known = price[warm & ~np.isnan(price)]
    edges = np.quantile(known, np.arange(1, PRICE_LEVELS) / PRICE_LEVELS) if len(known) else known
    return {'brand': _shared(catalogue['brand'], warm),
            'category': _shared(catalogue['category'], warm), 'price': edges.tolist()}


def side_ids(catalogue: pl.DataFrame, vocabulary: dict[str, list]) -> np.ndarray:
    """Number the side features of a catalogue.

    Args:
      catalogue: V rows.
      vocabulary: of `side_vocabulary`.

    Returns:
      int32 [V, 3].
    """
    price = _prices(catalogue)
    level = 1 + np.searchsorted(vocabulary['price'], price, side='right')
    level[np.isnan(price) | (not vocabulary['price'])] = 0
    columns = [_numbered(catalogue[name], vocabulary[name]) for name in ('brand', 'category')]
    return np.stack([*columns, level], axis=1).astype(np.int32)


def value_ids(values: list[str], warm: np.ndarray) -> tuple[np.ndarray, int]:
    """Number the values that at least two warm items have, in alphabetic order from 1.

    Args:
      values: V texts, '' for none.
      warm: bool [V].

    Returns:
      int32 [V], 0 for other values, and how many different ids there can be, 0 included.
    """
    shared = _shared(values, warm)
    return _numbered(values, shared), len(shared) + 1


def _numbered(values, vocabulary: list[str]) -> np.ndarray:
    """The place of every value in a vocabulary, from 1, or 0: int32 [V]."""
    ids = {value: number for number, value in enumerate(vocabulary, start=1)}
    return np.array([ids.get(value, 0) for value in values], np.int32)


def _shared(values, warm) -> list[str]:
    """The values at least two warm items have, in their alphabetic order."""
    counts = Counter(value for value, seen in zip(values, warm, strict=True) if seen and value)
    return sorted(value for value, count in counts.items() if count > 1)


def _prices(catalogue) -> np.ndarray:
    return catalogue['price'].cast(pl.Float64).fill_null(np.nan).to_numpy()
