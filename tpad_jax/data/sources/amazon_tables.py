"""Raw Amazon files -> prepared tables on disk: a TFDS builder that needs no TensorFlow.

Three tables in array_record, each one builder config: `items` (words and price), `images` (the
encoded picture, so that reading the catalogue reads no picture) and `sessions` (train, valid,
test). `prepared.json` next to them is written last: without it nothing is finished.
"""

import contextlib
import hashlib
import io
import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path

import numpy as np
import polars as pl
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordWriter

from tpad_jax.core import files
from tpad_jax.data import audit, images, sessions as sessions_lib, text
from tpad_jax.data.catalogue import Data, restrict
from tpad_jax.data.sessions import Sessions
from tpad_jax.data.sources import Source, amazon, amazon_fields, tf_examples
from tpad_jax.data.sources.amazon import Raw
from tpad_jax.errors import refuse_if

FINISHED = 'prepared.json'
TEXTS = 'catalogue.arrow'  # of raw files, until the tables are written
# Options of the tables. gap_hours: the longest pause inside a session; the 2018 form has times of a
# day, so that a session is one user's day and the gap is not read. core: items rarer than this in
# training sessions leave them; 1 is off. min_length: shorter sessions are dropped. valid, test:
# share (below 1) or number of sessions. seed: of the order among equal times.
OPTIONS = {'gap_hours': float, 'core': int, 'min_length': int, 'valid': float, 'test': float,
           'seed': int}
READ_CHUNK = 16_384  # records per read
SESSIONS_PER_RECORD = 1024  # one by one, a million sessions take a minute to read
# arrays of a block of sessions
SESSIONS = {'items': np.int32, 'lengths': np.int32, 'start': np.int64, 'time': np.int64,
            'kind': np.int32, 'visitor': np.int64}
WORDS = ('asin', 'title', 'text', 'brand', 'category')  # the columns of `items` that hold a string


class ImageBytes(Sequence):
    """The encoded images by item id; b'' for the padding item 0 and where there is none."""

    def __init__(self, data_dir):
        """Open the table of images in a prepared directory."""
        self._source = read_table(data_dir, 'images', 'images')

    def __len__(self) -> int:
        return len(self._source) + 1

    def __getitem__(self, item: int) -> bytes:
        if not 0 <= item < len(self):
            raise IndexError(f'item ids are 0..{len(self) - 1}')
        return self._source[item - 1]['image'] if item else b''


class Amazon(tfds.core.DatasetBuilder):
    """The tables of one category; record k of `items` and of `images` is item id k + 1.

    A price of NaN and an image of no bytes mean that there is none.
    A record of `sessions` is a block of them: the arrays of `Sessions`, empty where they are None,
    and the lengths of the sessions, int32 [S].
    """

    VERSION = tfds.core.Version('1.2.0')
    BUILDER_CONFIGS = [  # noqa: RUF012 (TFDS reads a plain class attribute)
        tfds.core.BuilderConfig(name=name) for name in ('items', 'images', 'sessions')]

    def __init__(self, *, records: dict[str, Iterable[bytes]] | None = None, **kwargs):
        """Make a builder.

        Args:
          records: split name -> its records, serialized; needed only to write.
          **kwargs: TFDS's own.
        """
        super().__init__(**kwargs)
        self._records = records

    def _info(self) -> tfds.core.DatasetInfo:
        features = {
            'items': dict.fromkeys(WORDS, tfds.features.Text())
                     | {'price': np.float32, 'has_image': np.bool_, 'reviewed': np.bool_},
            'images': {'image': tfds.features.Text()},  # undecoded bytes
            'sessions': {name: tfds.features.Tensor(shape=(None,), dtype=dtype)
                         for name, dtype in SESSIONS.items()},
        }[self.builder_config.name]
        # the order of the records is the numbering of items and the time order of sessions
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features),
                                     disable_shuffling=True)

    def _download_and_prepare(self, dl_manager, download_config=None) -> None:
        refuse_if(self._records is None, f'{self.name}: TFDS cannot download it. Expected tables '
                  'in data_dir. Fix: run python -m tpad_jax.data.prepare RAW_DIR DATA_DIR.')
        # TFDS's own way to write takes 100 microseconds per record and a second copy on the disk
        infos = []
        for split, records in self._records.items():
            template = self._get_filename_template(split)
            sizes = []
            writer = ArrayRecordWriter(str(template.sharded_filepath(shard_index=0, num_shards=1)),
                                       'group_size:1,snappy')
            for record in records:
                writer.write(record)
                sizes.append(len(record))
            writer.close()
            infos.append(tfds.core.SplitInfo(name=split, shard_lengths=[len(sizes)],
                                             num_bytes=sum(sizes), filename_template=template))
        self.info.set_splits(tfds.core.splits.SplitDict(infos))

    def _as_dataset(self, split, decoders=None, read_config=None, shuffle_files=False):
        raise NotImplementedError('array_record is read by as_data_source')


def prepare(raw_dir, data_dir, *, bad_share: float = 1.0, read: Callable[[], Raw] | None = None,
            inputs: Sequence[Path] = (), reading: dict | None = None, **options) -> None:
    """Read raw files, cut, split and filter their sessions, and write the tables.

    A finished `data_dir` of the same raw bytes and options stays as it is; an unfinished one is
    built again. One process of a run may call this.

    Args:
      raw_dir: folder of one category's raw files, see `amazon.read`.
      data_dir: folder to write to, made if absent; other files in it are not touched.
      bad_share: share of a raw file's lines that may be damaged, see `amazon.read`.
      read: reads files of another form than Amazon's.
      inputs: all files that `read` reads.
      reading: options of `read`.
      **options: what decides the content of the tables, the keys of OPTIONS.

    Raises:
      InputError: unusable raw files or options, or data_dir holds other finished data.
    """
    raw_dir, data_dir = Path(raw_dir), Path(data_dir)
    options = {name: kind(options[name]) for name, kind in OPTIONS.items()} | (reading or {})
    with ThreadPoolExecutor(1) as pool:  # hashed while they are read, so that the disk is read once
        identity = pool.submit(fingerprint, raw_dir, options, inputs)
        if (data_dir / FINISHED).is_file():
            before = read_finished(data_dir)
            differing = ', '.join(
                f'{key} ({before["options"].get(key)} there, {value} now)' for key, value in
                options.items() if before['options'].get(key) != value)
            refuse_if(before['fingerprint'] != identity.result(), f'{data_dir} was prepared with '
                      f'{"another " + differing if differing else "other raw files"}, not with '
                      f'{raw_dir} and the config. Expected the same. Fix: name another workdir.')
            return
        if (data_dir / Amazon.name).exists():
            shutil.rmtree(data_dir / Amazon.name)
        raw = read() if read else amazon.read(raw_dir, bad_share,
                                              store=data_dir / Amazon.name / TEXTS)
    pauses = {'gap_seconds': round(options['gap_hours'] * 3600), **raw.cutting}
    shortest = options['min_length']
    with ThreadPoolExecutor(1) as pool:  # a table without sessions is written while they are cut
        pictures = pool.submit(write_table, data_dir, 'images',
                               {'images': _image_records(raw.catalogue['image'])})
        sessions = sessions_lib.cut(raw.interactions, **pauses, seed=options['seed'],
                                    min_length=shortest)
        parts = sessions_lib.split(sessions, options['valid'], options['test'])
        splits = dict(zip(('train', 'valid', 'test'), parts, strict=True))
        splits['train'] = sessions_lib.k_core(splits['train'], options['core'], shortest)
        warm = sessions_lib.warm_items(splits['train'], raw.catalogue.height)
        ties = sessions_lib.time_ties(raw.interactions, **pauses)
        items = raw.catalogue.with_columns(reviewed=_reviewed(raw,
                                                              int(splits['valid'].start.min())))
        pictures.result()
    raw = raw._replace(catalogue=None, interactions=None)  # the audit needs the memory
    del sessions, parts
    with ThreadPoolExecutor(1) as pool:  # the audit hardly needs the interpreter's lock
        report = pool.submit(audit.audit, *splits.values(), warm, form=raw.form, ties=ties)
        write_table(data_dir, 'items', {'items': _item_records(items)})
        del items
        write_table(data_dir, 'sessions', {split: _session_records(part)
                                           for split, part in splits.items()})
    (data_dir / Amazon.name / TEXTS).unlink(missing_ok=True)
    finished = dict(version=str(Amazon.VERSION), fingerprint=identity.result(), options=options,
                    form=raw.form, lines=raw.lines, audit=report.result(), kinds=raw.kinds)
    files.write_text(data_dir / FINISHED, json.dumps(finished, indent=1, allow_nan=False))


def load(data_dir) -> Data:
    """Load the tables that `prepare` wrote, all but the images.

    Args:
      data_dir: folder of the tables.

    Returns:
      The data.

    Raises:
      InputError: nothing finished is in data_dir.
    """
    finished = read_finished(data_dir)
    schema = {**dict.fromkeys(WORDS, pl.Binary), 'price': pl.Float32, 'has_image': pl.Boolean,
              'reviewed': pl.Boolean}
    source = read_table(data_dir, 'items', 'items', tfds.decode.DeserializeMethod.RAW_BYTES)
    items = pl.concat([tf_examples.parsed(records, schema) for records in _chunks(source)]
                      ).with_columns(pl.col(WORDS).cast(pl.String), pl.col('price').fill_nan(None))
    splits = {split: _sessions(data_dir, split) for split in ('train', 'valid', 'test')}
    warm = sessions_lib.warm_items(splits['train'], items.height)
    side, side_sizes = text.side_features(items, warm)
    words = {f'{name}s': ['', *items[name]] for name in ('asin', 'title', 'text')}
    return Data(**words, image_bytes=ImageBytes(data_dir), side=side, side_sizes=side_sizes,
                has_image=np.append(False, items['has_image'].to_numpy()), **splits, warm=warm,
                reviewed=np.append(False, items['reviewed'].to_numpy()),
                vocabulary=text.side_vocabulary(items, warm), kinds=tuple(finished['kinds']),
                attributes={name: [None, *items[name]] for name in ('brand', 'category', 'price')},
                **{key: finished[key] for key in ('lines', 'audit', 'fingerprint', 'form')})


def fingerprint(raw_dir, options: dict, inputs: Sequence[Path] = ()) -> str:
    """Digest the names and bytes of the raw files, images included, and the options.

    Args:
      raw_dir: folder of the raw files.
      options: of `prepare`.
      inputs: other files to digest in place of Amazon's.

    Returns:
      sha256 in hex.

    Raises:
      InputError: raw_dir does not hold one category's files.
    """
    raw_dir, paths = Path(raw_dir), inputs
    if not paths:
        raw = amazon.find_files(raw_dir)
        pictures = sorted(path for paths in images.by_stem(raw_dir / 'images').values()
                          for path in paths if not images.unusable(path, raw_dir))
        paths = [raw.metadata, raw.reviews, *pictures]
    total = hashlib.sha256(json.dumps(options, sort_keys=True).encode())
    with ThreadPoolExecutor() as pool:  # hashing releases the interpreter's lock
        for path, digest in zip(paths, pool.map(files.sha256, paths), strict=True):
            inside = path.is_relative_to(raw_dir)
            name = path.relative_to(raw_dir).as_posix() if inside else path.name
            total.update(f'\n{name} {digest}'.encode(errors='surrogateescape'))
    return total.hexdigest()


def write_table(data_dir: Path, table: str, records: dict[str, Iterable[bytes]]) -> None:
    """Write one table, split by split.

    Args:
      data_dir: folder of the tables.
      table: name of the builder config.
      records: {split: its records, serialized as `tf.train.Example`}.
    """
    tfds.disable_progress_bar()
    builder = Amazon(data_dir=data_dir, config=table, records=records)
    with contextlib.redirect_stdout(io.StringIO()):  # TFDS announces a download in bold
        builder.download_and_prepare(file_format='array_record',
                                     download_dir=data_dir / Amazon.name / 'downloads')


def read_table(data_dir, table: str, split: str,
               method=tfds.decode.DeserializeMethod.DESERIALIZE_AND_DECODE):
    """Open one split of a table for random access by record number.

    Args:
      data_dir: folder of the tables.
      table: name of the builder config.
      split: of the table.
      method: of TFDS, what is done to a record.

    Returns:
      TFDS's data source.
    """
    return Amazon(data_dir=data_dir, config=table).as_data_source(
        split, deserialize_method=method)


def read_finished(data_dir) -> dict:
    """Read what `prepare` recorded last.

    Args:
      data_dir: folder of the tables.

    Returns:
      version, fingerprint, options, form, lines, audit and kinds.

    Raises:
      InputError: nothing finished is there, or it has another layout than this code reads.
    """
    path = Path(data_dir) / FINISHED
    refuse_if(not path.is_file(), f'{path} does not exist. Expected finished tables. Fix: prepare '
              'them from raw files, or give --plan_items=N for a memory plan alone.')
    finished = json.loads(path.read_text())
    refuse_if(finished['version'] != str(Amazon.VERSION), f'{path}: the tables have version '
              f'{finished["version"]}. Expected {Amazon.VERSION}. Fix: delete {data_dir}.')
    return finished


def prepared(config, raw_dir: Path, workdir: Path, **cutting) -> Data:
    """Prepare raw files in the workdir, once, and load the tables.

    Args:
      config: the run's.
      raw_dir: folder of the raw files.
      workdir: the run's directory.
      **cutting: `core`, `valid` and `test` of `prepare`, and what a form other than Amazon's needs.

    Returns:
      The data.

    Raises:
      InputError: as `prepare`.
    """
    c = config.data
    prepare(raw_dir, workdir / 'data', gap_hours=c.gap_hours, min_length=c.min_length, seed=c.seed,
            bad_share=c.bad_share, **cutting)
    return load(workdir / 'data')


def _reviewed(raw: Raw, begin: int) -> pl.Series:
    """Whether each item has an event before second `begin`, when validation begins: bool [V]."""
    before = pl.col('time') // raw.cutting.get('per_second', 1) < begin
    numbers = raw.interactions.filter(before)['item'].unique()
    return pl.int_range(1, raw.catalogue.height + 1, eager=True).is_in(numbers.implode())


def _item_records(catalogue: pl.DataFrame) -> Iterator[bytes]:
    for chunk in catalogue.iter_slices(READ_CHUNK):
        yield from tf_examples.serialized(chunk.select(
            'asin', 'title', 'brand', 'category', 'reviewed', text.item_text().alias('text'),
            pl.col('price').fill_null(float('nan')), has_image=pl.col('image').is_not_null()
        )).to_pylist()


def _image_records(paths: Iterable[str | None]) -> Iterator[bytes]:
    none = tf_examples.serialized(pl.DataFrame({'image': [b'']}))[0].as_py()
    for path in paths:
        yield tf_examples.serialized(pl.DataFrame({'image': [Path(path).read_bytes()]})
                                     )[0].as_py() if path else none


def _session_records(sessions: Sessions) -> Iterator[bytes]:
    total = len(sessions.start)
    for begin in range(0, max(total, 1), SESSIONS_PER_RECORD):
        part = sessions_lib.between(sessions, begin, min(begin + SESSIONS_PER_RECORD, total))
        arrays = {**part._asdict(), 'lengths': part.lengths}
        yield tf_examples.of_integers({name: arrays[name] for name in SESSIONS})


def _sessions(data_dir, split: str) -> Sessions:
    records = [*chain(*_chunks(read_table(data_dir, 'sessions', split)))]
    arrays = {name: np.concatenate([record[name] for record in records]) for name in SESSIONS}
    offsets = np.append(0, np.cumsum(arrays.pop('lengths'))).astype(np.int64)
    absent = dict.fromkeys(name for name in ('time', 'kind', 'visitor') if not len(arrays[name]))
    return Sessions(**{**arrays, **absent}, offsets=offsets)


def _chunks(source) -> Iterator[list]:
    for begin in range(0, len(source), READ_CHUNK):
        yield source.__getitems__(range(begin, min(begin + READ_CHUNK, len(source))))


def _load(config, workdir: Path) -> Data:
    return prepared(config, config.data.raw_dir, workdir,
                    **{name: config.data[name] for name in ('core', 'valid', 'test')})


def prepared_sizes(config, workdir: Path) -> tuple[int, tuple[int, ...]]:
    """Return the sizes of tables that an earlier run prepared: reading raw files takes too long."""
    data = restrict(load(workdir / 'data'), config.data.catalogue)
    return data.num_items, data.side_sizes


def _columns(config) -> list[str]:
    """The fields of both raw files by what they are read as."""
    raw = amazon.find_files(config.data.raw_dir)
    fields = vars(amazon_fields.FIELDS[raw.form])
    return [f'{raw.reviews} and {raw.metadata}: ' + ', '.join(
        f'{field} is {name}' for name, field in fields.items() if isinstance(field, str) and field)]


SOURCE = Source(load=_load, check=lambda config: amazon.find_files(config.data.raw_dir),
                columns=_columns, sizes=prepared_sizes)
