"""New items of a finished run, read as the items of its catalogue were.

The run's base and adapters read picture and text, the distilled reader computes r, and the
recommender's fusion computes z as for a cold item. Where the run recommends from features computed
elsewhere, a new item brings its own and no MLLM is needed. No other serving module loads one.
"""

from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import polars as pl
from flax.traverse_util import flatten_dict, unflatten_dict
from ml_collections import ConfigDict
from safetensors.numpy import load_file

from tpad_jax.baselines import content_lasso
from tpad_jax.data import images, text
from tpad_jax.distributed.devices import compiled
from tpad_jax.errors import InputError, refuse_if
from tpad_jax.features import bases, codes
from tpad_jax.models import experts, readers, tpad
from tpad_jax.models.builtin.mllm import MLLM
from tpad_jax.serving import artifact

ROWS = 8  # items of a compiled call
FIELDS = {'id', 'text', 'image', 'title', 'brand', 'category', 'description', 'price', 'features'}
MAX_TEXT = 2**16  # characters of a field
_PICTURE = 'Fix: give a complete JPEG, PNG, WebP or GIF file'


class Reader:
    """Computes the vectors of new items. The constructor loads the MLLM, if the run needs it.

    Args:
      served: the artefact of the run.
      base: directory of the run's base or checkpoint, if it moved.

    Raises:
      InputError: the run has no MLLM, its base is missing or differs, or its recommender reads
        features that neither an MLLM computes nor an item brings.
    """

    def __init__(self, served: artifact.Served, base: str = ''):
        about, self._served = served.about, served
        # where the host has another device, as the service has: lists are computed meanwhile
        self._device = jax.local_devices()[-1]
        recommenders, rules = tuple(params for params, _ in served.weights), served.experts
        if rules is not None:  # of the tables those without a row per item
            rules = {'weights': rules['weights'],
                     'tables': {name: rules['tables'][name] for name in ('centre', 'axes')}}
        self._recommenders = jax.device_put((recommenders, rules), self._device)
        self._rows = {name for spec in served.specs for name in spec.recommend}
        self._given = 0  # numbers of an item's own features
        if self._rows == {'given'}:
            norm = recommenders[0]['recommender']['fusion']['feature_norm_0']
            self._specs, self._given = served.specs, len(norm['scale'])
            self._read = compiled(lambda given, *more: self._vectors({'given': given}, *more))
            return
        refuse_if(about['mllm'] is None, f'{served.directory}: the run has item ids only, so it '
                  'cannot read pictures or texts of a new item')
        refuse_if(not self._rows <= {'k', 'r', 'codes'}, f'{served.directory}: the recommender '
                  f'reads {", ".join(sorted(self._rows))}. Expected k, r or codes, which the MLLM '
                  'computes for a new item, or given alone')
        mllm = dict(about['mllm'])
        if base:
            mllm['checkpoint' if mllm['checkpoint'] else 'base'] = str(base)
        try:
            loaded = bases.read(ConfigDict({'mllm': mllm, 'model': about['models'][0]}),
                                about.get('pictures', True))
        except InputError as error:
            raise InputError(f'the base of the run cannot be read ({error}). Fix: give its '
                             'directory, base=DIR') from error
        refuse_if(loaded.fingerprint != about['base'], f'{loaded.directory} is not the base of the '
                  'run. Fix: give its directory, base=DIR')
        self._specs = tuple(artifact.spec_of(about, i, loaded.module)
                            for i in range(len(served.specs)))
        self._side = loaded.image_size if about.get('pictures', True) else 0
        self._length = mllm['text_length']
        self._tokenizer = (served.directory / artifact.TOKENIZER if mllm['tokenizer'] == 'own'
                           else loaded.directory)
        params = load_file(served.directory / artifact.READER)
        if not any(path.startswith('base/') for path in params):
            knowledge = self._specs[0].knowledge
            shapes = bases.shapes_of(knowledge, loaded.image_size) if isinstance(
                loaded.module, MLLM) else {}
            params = flatten_dict({'base': loaded.load(shapes)['base']}, sep='/') | params
        self._params = jax.device_put(unflatten_dict(params, sep='/'), self._device)
        self._features = compiled(self._rows_of)
        self._read = compiled(lambda read, *more: self._vectors(self._rows_of(*read), *more))

    def __call__(self, items: Sequence[dict]) -> np.ndarray:
        """Return vectors float32 [n, D] of new items.

        Args:
          items: as for `recommender.Recommender.add_items`.

        Raises:
          InputError: an item has neither text nor picture, an unknown field, or a picture that
            cannot be read; or its features do not have the run's form.
        """
        side = self._sides(items)
        if self._given:
            given, words = self._features_of(items), [self._words(item) for item in items]
            parts = ((rows, count, given[rows]) for rows, count in _calls(len(items)))
        else:
            content = [self._content(item) for item in items]
            parts, words = self._parts(content), [words for words, _, _ in content]
        z = np.concatenate([np.asarray(self._read(read, side[rows], self._recommenders))[:count]
                            for rows, count, read in parts])
        if self._served.experts and 'basis' in self._served.experts['tables']:  # of expert 'lasso'
            known = content_lasso.held(content_lasso.named(
                words, side, self._served.about['vocabulary']),
                self._served.about['attributes'])
            basis = self._served.experts['tables']['basis']
            z = np.concatenate([z, (known @ basis).astype(np.float32)], axis=1)
        broken = np.flatnonzero(~np.isfinite(z).all(axis=1))
        if len(broken):
            raise FloatingPointError(f'the vector of item {items[broken[0]]["id"]} is not finite')
        return z

    def features(self, items: Sequence[dict], unused: Counter) -> dict[str, np.ndarray]:
        """Return the rows float32 [n, ...] of new items that the recommender and experts read.

        Args:
          items: as for `__call__`; one without words and picture is read as such.
          unused: increased by the reasons why pictures are not read.
        """
        content, parts = [self._content(item, unused) for item in items], []
        for _, count, read in self._parts(content):
            rows = jax.device_get(self._features(*read))
            parts.append({name: x[:count] for name, x in rows.items()})
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def _parts(self, content):
        """Yield rows of a compiled call, how many are not its filling, and what it reads."""
        tokens = text.tokenize([words for words, _, _ in content], self._tokenizer, self._length)
        image = np.stack([pixels for _, pixels, _ in content])
        seen = np.array([there for _, _, there in content])
        for rows, count in _calls(len(content)):
            yield rows, count, (self._params, image[rows], seen[rows], tokens[rows])

    def _rows_of(self, params, image, seen, tokens):
        reads = {'k': partial(readers.read_items, adapter='knowledge'), 'r': readers.distil_items}
        rules = self._served.experts
        mixed = rules is not None and len(rules['tables']['axes']) > 1  # else without content
        coded = 'codes' in self._rows
        rows = {name: reads[name](self._specs[0], params, image=image, has_image=seen,
                                  tokens=tokens).astype(jnp.float32)
                for name in sorted(self._rows - {'codes'} | ({'k'} if mixed or coded else set()))}
        if coded:
            rows['codes'] = codes.rows(rows['k'], params['codes']['centres'])
        return rows

    def _vectors(self, rows, side, recommenders):
        recommenders, rules = recommenders
        ids = jnp.zeros(len(side), jnp.int32)  # the cold items' shared embedding
        parts = []
        for spec, params in zip(self._specs, recommenders, strict=True):
            features = [tpad.flat(rows[name][None])[0] for name in spec.recommend]
            z = spec.fusion.apply({'params': params['recommender']['fusion']}, ids,
                                  jnp.zeros(len(ids), bool), features, side)
            parts.append(tpad.unit(z) if spec.normalise else z)
        if rules is not None:  # an item without training events
            content = experts.projected(
                rows['given' if self._given else 'k'].reshape(len(ids), -1)
                if len(rules['tables']['axes']) > 1 else jnp.zeros((len(ids), 1)), rules['tables'])
            parts.append(experts.item_columns(rules['weights'], content, jnp.zeros(len(ids))))
        return jnp.concatenate(parts, axis=1)

    def _content(self, item, unused: Counter | None = None):
        """Return text, pixels and whether there is a picture.

        With `unused`, a picture that cannot be read is counted there and not refused.
        """
        option, words, data = f'item {item["id"]}', self._words(item), item.get('image')
        refuse_if(item.get('features') is not None, f'{option} brings features, but the run '
                  'computes those of an item. Fix: leave them out')
        if isinstance(data, str | Path):
            reason = images.unusable(Path(data), Path(data).parent)
            if reason is not None and unused is None:
                raise InputError(f'{option}: {data} is not read ({reason}). {_PICTURE}')
            data = Path(data).read_bytes() if reason is None else b''
        data, pixels = data or b'', None
        refuse_if(len(data) > images.MAX_BYTES, f'{option}: its picture has {len(data):,} bytes. '
                  f'Expected at most {images.MAX_BYTES:,}. Fix: give a smaller picture')
        if data and self._side:
            with images.quiet():
                pixels = images.read(bytes(data), self._side)
        if isinstance(pixels, images.Reason):
            if unused is None:
                raise InputError(f'{option}: its picture cannot be used ({pixels}). {_PICTURE}')
            unused[pixels] += 1
        elif pixels is not None:
            return words, pixels, True
        kinds = 'neither a text nor a picture' if self._side else 'no text'
        refuse_if(unused is None and not words.strip(), f'{option} has {kinds}. Fix: give one')
        return words, np.zeros((self._side, self._side, 3), np.uint8), False

    def _words(self, item):
        words = item.get('text')
        return words if words is not None else text.joined(
            item.get(name) for name in self._served.about['words'])

    def _features_of(self, items):
        """Return the features float32 [n, F] that the items bring."""
        out = np.zeros((len(items), self._given), np.float32)
        for row, item in zip(out, items, strict=True):
            given = item.get('features')
            try:
                given = np.asarray([] if given is None else given)
            except ValueError:  # rows of several lengths
                given = np.zeros(0)
            if given.dtype.kind in 'fiu':  # else it holds texts or anything
                with np.errstate(over='ignore'):  # too large for float32: named below
                    given = given.astype(np.float32)
            refuse_if(given.shape != row.shape or given.dtype != row.dtype
                      or not np.isfinite(given).all(),
                      f'item {item["id"]} has no usable features. Expected {self._given} finite '
                      'numbers, computed as those of the run\'s items. Fix: give them')
            row[:] = given
        return out

    def _sides(self, items):
        vocabulary, width = self._served.about['vocabulary'], len(self._served.about['side_sizes'])
        if not vocabulary:
            return np.zeros((len(items), width), np.int32)
        table = pl.DataFrame({
            'brand': [text.words_of(item.get('brand')) for item in items],
            'category': [text.words_of(item.get('category')) for item in items],
            'price': pl.Series([item.get('price') for item in items], dtype=pl.Float64)})
        return text.side_ids(table, vocabulary)


def _calls(count):
    """Yield the rows of each compiled call, and how many are not its filling."""
    for part in np.split(np.arange(count), range(ROWS, count, ROWS)):
        yield np.pad(part, (0, ROWS - len(part)), mode='edge'), len(part)


def checked(items: Sequence[dict], words: Sequence[str]) -> None:
    """Refuse malformed items before anything is loaded.

    Args:
      items: as for `recommender.Recommender.add_items`.
      words: fields that make a text.

    Raises:
      InputError: an item is not a dict with an id, or has an unknown or an unusable field.
    """
    fields = FIELDS.union(words)
    for number, item in enumerate(items):
        name = item.get('id') if isinstance(item, dict) else None
        if not isinstance(name, str) or not name or len(name) > MAX_TEXT:
            raise InputError(f'new item {number} has no id. Expected a dict with a text "id"')
        for field in sorted(map(str, item.keys() - fields)):
            raise InputError(f'item {name} has the field {field!r}. Expected {sorted(fields)}')
        option, price = f'item {name}: its', item.get('price')
        long = sorted(field for field in item.keys() - {'image', 'price'}
                      if isinstance(item[field], str) and len(item[field]) > MAX_TEXT)
        refuse_if(long, f'{option} {", ".join(long)} has more than {MAX_TEXT} characters')
        refuse_if(not isinstance(item.get('text'), str | None), f'{option} text is not a text')
        refuse_if(not isinstance(item.get('image'), bytes | bytearray | str | Path | None),
                  f'{option} image is neither bytes nor a path')
        refuse_if(price is not None and not (isinstance(price, int | float) and 0 <= price < 1e12),
                  f'{option} price {price!r} is not a number from 0 on')
