"""Items that were not there when a run was trained: read as the catalogue's items were.

The run's own base and adapters read picture and text, the distilling side makes r of them, and the
recommender's fusion a vector z, as of a cold item. Only here is an MLLM loaded.
"""

import copy
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import polars as pl
from flax.traverse_util import flatten_dict, unflatten_dict
from ml_collections import ConfigDict

from tpad_jax.data import images, text
from tpad_jax.distributed.devices import compiled
from tpad_jax.errors import InputError
from tpad_jax.features import bases
from tpad_jax.models import tpad
from tpad_jax.models.hf.vlm import VLM
from tpad_jax.serving import artifact

ROWS = 8  # items of a compiled call
FIELDS = {'id', 'text', 'image', 'title', 'brand', 'category', 'description', 'price'}
MAX_TEXT = 2**16  # characters of a field


class Reader:
    """New items -> their vectors. Loads the MLLM when it is made.

    Args:
      kept: of the run. base: directory of its base or checkpoint, where that lies elsewhere now.

    Raises:
      InputError: the run has no MLLM, its base is not there or is another one, or its recommender
        reads features that no MLLM makes.
    """

    def __init__(self, kept: artifact.Served, base: str = ''):
        about, self._kept = kept.about, kept
        if about['mllm'] is None:
            raise InputError(f'{kept.directory}: the run is of item ids alone, without pictures '
                             'and texts: nothing can be said of a new item')
        self._rows = sorted({name for spec in kept.specs for name in spec.recommend})
        if not set(self._rows) <= {'k', 'r'}:
            raise InputError(f'{kept.directory}: the recommender reads the features '
                             f'{", ".join(self._rows)}, and a new item has only those an MLLM '
                             'makes, k and r')
        mllm = copy.deepcopy(about['mllm'])
        if base:
            mllm['checkpoint' if mllm['checkpoint'] else 'base'] = str(base)
        try:
            found = bases.read(ConfigDict({'mllm': mllm, 'model': about['models'][0]}))
        except InputError as error:
            raise InputError(f'the base that the run was made with cannot be read ({error}); say '
                             'where it lies now by base=DIR') from error
        if found.fingerprint != about['base']:
            raise InputError(f'{found.directory} is another base than the run was made with; say '
                             'where that lies by base=DIR')
        self._specs = tuple(artifact.spec_of(about, i, found.module)
                            for i in range(len(kept.specs)))
        self._side, self._length = found.image_size, mllm['text_length']
        own = kept.directory / artifact.TOKENIZER
        self._tokenizer = own if mllm['tokenizer'] else found.directory
        params = artifact.reader_params(kept)
        if not any(path.startswith('base/') for path in params):
            shapes = {} if isinstance(found.module, VLM) else bases.shapes_of(
                self._specs[0].knowledge, found.image_size)
            params = flatten_dict({'base': found.load(shapes)['base']}, sep='/') | params
        self._params = jax.device_put(unflatten_dict(params, sep='/'))
        self._recommenders = jax.device_put(tuple(params for params, _ in kept.weights))
        self._read = compiled(self._vectors)

    def __call__(self, items: Sequence[dict]) -> np.ndarray:
        """Vectors float32 [n, D] of items as `serving.Recommender.add_items` takes them.

        Raises:
          InputError: an item has neither text nor picture, an unknown field, or a picture that
            cannot be read.
        """
        content = [self._content(item) for item in items]
        tokens = text.tokenize([words for words, _, _ in content], self._tokenizer, self._length)
        image = np.stack([pixels for _, pixels, _ in content])
        seen = np.array([there for _, _, there in content])
        side = self._sides(items)
        found = []
        for begin in range(0, len(items), ROWS):
            part = slice(begin, begin + ROWS)
            size = len(tokens[part])
            given = (np.pad(x[part], ((0, ROWS - size), *((0, 0),) * (x.ndim - 1)), mode='edge')
                     for x in (image, seen, tokens, side))
            found.append(np.asarray(self._read(self._params, self._recommenders, *given))[:size])
        z = np.concatenate(found)
        broken = np.flatnonzero(~np.isfinite(z).all(axis=1))
        if len(broken):
            raise FloatingPointError(f'the vector of item {items[broken[0]]["id"]} is not finite')
        return z

    def _vectors(self, params, recommenders, image, seen, tokens, side):
        rows, reads = {}, {'k': partial(tpad.read_items, adapter='knowledge'),
                           'r': tpad.distil_items}
        for name in self._rows:
            rows[name] = reads[name](self._specs[0], params, image=image, has_image=seen,
                                     tokens=tokens).astype(jnp.float32)
        ids = jnp.zeros(len(image), jnp.int32)  # it has no embedding of its own: the cold items'
        catalogue = {'warm': jnp.zeros(1, bool), 'side': side}
        found = []
        for spec, own in zip(self._specs, recommenders, strict=True):
            features = [tpad.flat(rows[name][None])[0] for name in spec.recommend]
            z = spec.fusion.apply({'params': own['recommender']['fusion']}, ids,
                                  jnp.zeros(len(ids), bool), features, catalogue['side'])
            found.append(tpad.unit(z) if spec.normalise else z)
        return jnp.concatenate(found, axis=1)

    def _content(self, item):
        """Text, pixels and whether there are some."""
        words = item.get('text')
        if words is None:
            words = text.joined(item.get(name) for name in self._kept.about['words'])
        data = item.get('image')
        if isinstance(data, str | Path):
            reason = images.unusable(Path(data), Path(data).parent)
            if reason is not None:
                raise InputError(f'item {item["id"]}: {data} is not read ({reason}); give a JPEG, '
                                 'PNG, WebP or GIF file')
            data = Path(data).read_bytes()
        if data and len(data) > images.MAX_BYTES:
            raise InputError(f'item {item["id"]}: its picture has {len(data):,} bytes, and '
                             f'{images.MAX_BYTES:,} are read; give a smaller one')
        if not data:
            if not words.strip():
                raise InputError(f'item {item["id"]} has neither a text nor a picture; give one')
            return words, np.zeros((self._side, self._side, 3), np.uint8), False
        with images.quiet():
            pixels = images.read(bytes(data), self._side)
        if isinstance(pixels, images.Reason):
            raise InputError(f'item {item["id"]}: its picture cannot be used ({pixels}); give a '
                             'whole JPEG, PNG, WebP or GIF')
        return words, pixels, True

    def _sides(self, items):
        vocabulary, width = self._kept.about['vocabulary'], len(self._kept.about['side_sizes'])
        if not vocabulary:
            return np.zeros((len(items), width), np.int32)
        table = pl.DataFrame({
            'brand': [text.said(item.get('brand')) for item in items],
            'category': [text.said(item.get('category')) for item in items],
            'price': pl.Series([item.get('price') for item in items], dtype=pl.Float64)})
        return text.side_ids(table, vocabulary)


def checked(items: Sequence[dict], words: Sequence[str]) -> None:
    """Refuse items that are no items, before anything is loaded.

    Args:
      items: as `serving.Recommender.add_items` takes them. words: fields that make a text.

    Raises:
      InputError: one is no dict with an id, or has an unknown or an unusable field.
    """
    fields = FIELDS.union(words)
    for number, item in enumerate(items):
        name = item.get('id') if isinstance(item, dict) else None
        if not isinstance(name, str) or not name or len(name) > MAX_TEXT:
            raise InputError(f'new item {number} has no id; give a dict with a text "id"')
        unknown = sorted(map(str, item.keys() - fields))
        if unknown:
            raise InputError(f'item {name} has the field {unknown[0]!r}; known are '
                             f'{", ".join(sorted(fields))}')
        for field in item.keys() - {'image', 'price'}:
            if isinstance(item[field], str) and len(item[field]) > MAX_TEXT:
                raise InputError(f'item {name}: {field} has more than {MAX_TEXT} characters')
        if not isinstance(item.get('text'), str | None):
            raise InputError(f'item {name}: its text is no text')
        if not isinstance(item.get('image'), bytes | bytearray | str | Path | None):
            raise InputError(f'item {name}: its image is neither bytes nor a path')
        price = item.get('price')
        if price is not None and not (isinstance(price, int | float) and 0 <= price < 1e12):
            raise InputError(f'item {name}: its price {price!r} is no number from 0 on')
