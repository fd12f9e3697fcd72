"""Item texts and side features: cleaning, tokens, and ids of brand, category and price level."""

import html
import json
import re
from collections import Counter
from collections.abc import Iterable
from functools import partial
from pathlib import Path

import numpy as np
import polars as pl

from tpad_jax.errors import InputError

PRICE_LEVELS = 10
# what tokenizer_config.json says of a tokenizer that needs no more than tokenizer.json
PLAIN = {'tokenizer_class', 'backend', 'model_max_length', 'pad_token'}
TOKENIZER_CHUNK = 8192  # texts per call, so that Python lists of ids stay small
NESTED = 4  # levels of lists in a field whose words are read

# each alternative consumes what it scans, so the time is linear in the text's length
_MARKUP = re.compile(r'<(script|style)\b.*?(?:</\1\s*>|\Z)|<!--.*?(?:-->|\Z)|</?[a-z][^<>]*>',
                     re.IGNORECASE | re.DOTALL)
# control characters and halves of a surrogate pair, which no UTF-8 file can hold
_UNPRINTABLE = re.compile('[\x00-\x1f\x7f-\x9f\ud800-\udfff]+')
_SPACE = re.compile(r'\s+')
# a character number that Python would refuse to read: it has a limit to a number's digits
_NO_CHARACTER = re.compile('&#[0-9]{1000,};?')


def clean(text: str) -> str:
    """Plain text of a web page's fragment: entities resolved, tags removed, white space collapsed.

    Entities are resolved first, because the raw files hold escaped tags as well as plain ones.
    A lone `<` or `>` ("size < 5") is no tag and stays.
    """
    text = _MARKUP.sub(' ', html.unescape(_NO_CHARACTER.sub('\ufffd', text)))
    return _SPACE.sub(' ', _UNPRINTABLE.sub(' ', text)).strip()


def said(value, levels: int = NESTED) -> str:
    """The words of a field: a list's one after the other, a number's digits, '' of nothing."""
    if isinstance(value, list):
        return ' '.join(filter(None, (said(one, levels - 1) for one in value))) if levels else ''
    return '' if value is None or isinstance(value, dict) else clean(str(value))


def joined(values: Iterable) -> str:
    """One text of an item's fields, "title. brand": what each says, empty ones left out."""
    return '. '.join(filter(None, map(said, values)))


def item_texts(catalogue: pl.DataFrame) -> list[str]:
    """One text per item, "title. brand. category. description" of its non-empty parts.

    -> list of V + 1 str; index 0 (padding) is ''.
    """
    columns = catalogue.select('title', 'brand', 'category', 'description')
    return ['', *('. '.join(part for part in row if part) for row in columns.iter_rows())]


def tokenize(texts: list[str], tokenizer_dir: str | Path, length: int) -> np.ndarray:
    """Token ids of the texts by the Hugging Face tokenizer in a local directory.

    Special tokens are left to the prompt, and a text that spells one out does not become it; long
    texts keep their first `length` tokens, short ones are padded on the right with -1.

    -> int32 [V + 1, length]; an empty text is all padding.

    Raises:
      InputError: the directory holds no usable tokenizer.
    """
    encode = _plain(Path(tokenizer_dir), length) or partial(
        read_tokenizer(tokenizer_dir), add_special_tokens=False, truncation=True,
        max_length=length, split_special_tokens=True)
    tokens = np.full((len(texts), length), -1, np.int32)
    for begin in range(0, len(texts), TOKENIZER_CHUNK):
        chunk = encode(texts[begin:begin + TOKENIZER_CHUNK])
        for row, ids in zip(tokens[begin:begin + TOKENIZER_CHUNK], chunk['input_ids'],
                            strict=True):
            row[:len(ids)] = ids
    return tokens


def _plain(directory, length):
    """texts -> {'input_ids'} without `transformers`, which takes seconds to import.

    None unless tokenizer.json says all of the tokenizer, as `train_tokenizer` leaves it.

    Raises:
      InputError: that file is missing or damaged.
    """
    try:
        found = json.loads((directory / 'tokenizer_config.json').read_bytes())
    except (OSError, ValueError):
        return None  # `read_tokenizer` knows other files, and says what is wrong
    if (not isinstance(found, dict) or found.get('tokenizer_class') != 'TokenizersBackend'
            or found.keys() - PLAIN):
        return None
    from tokenizers import Tokenizer

    file = directory / 'tokenizer.json'
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises nothing narrower
        raise InputError(f'{file} is no usable tokenizer ({error}); copy the file anew') from error
    tokenizer.encode_special_tokens = True
    tokenizer.no_padding()
    tokenizer.enable_truncation(length)

    def encode(texts):
        found = tokenizer.encode_batch(texts, add_special_tokens=False)
        return {'input_ids': [one.ids for one in found]}

    return encode


def read_tokenizer(directory: str | Path):
    """The tokenizer in a local directory.

    Raises:
      InputError: it holds no usable one.
    """
    if not Path(directory).is_dir():
        raise InputError(f'{directory}: no such directory; give the local directory of a '
                         'tokenizer (tokenizer.json and tokenizer_config.json)')
    from transformers import AutoTokenizer  # slow to import, and few callers tokenize

    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True,
                                                  trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise InputError(f'{directory}: no usable tokenizer ({str(error).splitlines()[0]}); '
                         'it needs tokenizer.json and tokenizer_config.json') from error
    tokenizer.padding_side = tokenizer.truncation_side = 'right'
    return tokenizer


def train_tokenizer(corpus: list[str], directory: str | Path, vocab: int) -> None:
    """Writes a byte-level BPE of at most `vocab` tokens, so that no text is unknown, trained here.

    The corpus' most frequent words become one token each.

    Args:
      corpus: texts. directory: made if absent, see `read_tokenizer`; one that is there is replaced.
      vocab: rows of the model's embedding.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast  # here: it takes seconds to import

    tokenizer = Tokenizer(models.BPE(unk_token=None))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=vocab, special_tokens=['<pad>'],
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
                                  show_progress=False)
    tokenizer.train_from_iterator(corpus, trainer)
    whole = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token='<pad>')
    whole.save_pretrained(directory)


def side_features(catalogue: pl.DataFrame,
                  warm: np.ndarray) -> tuple[np.ndarray, tuple[int, int, int]]:
    """Brand, category and price level of every item as ids; 0 is unknown (and padding).

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
    """What the side features of an item, one to come included, are told by.

    It comes from the warm items alone. A value that fewer than two of them have says nothing that
    the item's id does not. The price levels 1..10 are the tenths of the warm items' prices.

    Returns:
      {'brand': values in their alphabetic order, 'category': likewise, 'price': 9 edges, or none
      where no warm item has a price}; JSON can hold it.
    """
    warm = warm[1:]
    price = _prices(catalogue)
    known = warm & ~np.isnan(price)
    edges = np.quantile(price[known], np.arange(1, PRICE_LEVELS) / PRICE_LEVELS) if (
        known.any()) else np.zeros(0)
    return {'brand': _shared(catalogue['brand'].to_list(), warm),
            'category': _shared(catalogue['category'].to_list(), warm), 'price': edges.tolist()}


def side_ids(catalogue: pl.DataFrame, vocabulary: dict[str, list]) -> np.ndarray:
    """Ids int32 [V, 3] of the rows of a catalogue, by `side_vocabulary`."""
    found = np.zeros((catalogue.height, 3), np.int32)
    for column, name in enumerate(('brand', 'category')):
        number = {value: n for n, value in enumerate(vocabulary[name], start=1)}
        found[:, column] = [number.get(value, 0) for value in catalogue[name]]
    price = _prices(catalogue)
    known = ~np.isnan(price)
    if vocabulary['price']:
        found[known, 2] = 1 + np.searchsorted(vocabulary['price'], price[known], side='right')
    return found


def value_ids(values: list[str], warm: np.ndarray) -> tuple[np.ndarray, int]:
    """Ids int32 [V] of values at least two warm items have, in their alphabetic order from 1."""
    ids = {value: number for number, value in enumerate(_shared(values, warm), start=1)}
    return np.array([ids.get(value, 0) for value in values], np.int32), len(ids) + 1


def _shared(values, warm) -> list[str]:
    """The values at least two warm items have, in their alphabetic order."""
    counts = Counter(value for value, seen in zip(values, warm, strict=True) if seen and value)
    return sorted(value for value, count in counts.items() if count > 1)


def _prices(catalogue) -> np.ndarray:
    return catalogue['price'].cast(pl.Float64).fill_null(np.nan).to_numpy()
