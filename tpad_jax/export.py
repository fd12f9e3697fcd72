"""A finished run for programs without this package: `python -m tpad_jax.export RUN DIR`.

    item_ids.json            the item ids by number, from 1 on
    items.parquet            item_id, title, events, vector (z) and features (r, if the run has it)
    item_vectors.safetensors, item_features.safetensors
                             the same, in the form that config.data.features reads
    recommender.jax          sessions -> scores and items, a jax.export artefact
    weights.safetensors      its first argument
    sessions.parquet         line, id and vector of every session of --sessions
    items.faiss              with --ann: the vectors in a graph, for approximate lists
    README.md, export.json   how it is loaded by jax alone; what it is, and the recall of --ann

Exit status: 0 done, 1 a number was not finite or a defect, 2 unusable input in one sentence.
"""

import argparse
import errno
import json
import sys
from pathlib import Path

from tpad_jax.core.startup import BROKEN, UNUSABLE, begin
from tpad_jax.errors import UNWRITABLE, InputError

PLATFORMS, MAX_ROWS = ('cpu', 'cuda', 'tpu'), 4096
README = '''# {model} of {items} items

Made by `python -m tpad_jax.export`. `recommender.jax` needs jax and flatbuffers, nothing else:

```python
import json

import jax
import numpy as np
from jax import export


def read(file):
    """The arrays of a .safetensors file."""
    data = open(file, 'rb').read()
    size = 8 + int.from_bytes(data[:8], 'little')
    found = {{name: (x['shape'], data[size + x['data_offsets'][0]:size + x['data_offsets'][1]])
             for name, x in json.loads(data[8:size]).items()}}
    whole = 'near', 'together'  # these hold item numbers
    dtype = {{name: np.int32 if name.endswith(whole) else np.float32 for name in found}}
    return {{name: np.frombuffer(x, dtype[name]).reshape(s) for name, (s, x) in found.items()}}


recommend = jax.jit(export.deserialize(bytearray(open('recommender.jax', 'rb').read())).call)
weights = jax.device_put(read('weights.safetensors'))
ids = ['', *json.load(open('item_ids.json'))]
number = {{name: n for n, name in enumerate(ids)}}

session = [ids[1], ids[2]]  # in the order of time; ids that are not in `number` are left out
known = [number[name] for name in session][-{length}:]
rows = np.zeros(({rows}, {length}), np.int32)  # {rows} sessions a call; rows of zeros fill it up
rows[0, :len(known)] = known
scores, items = recommend(weights, rows)  # [{rows}, {k}], best first
print([ids[n] for n in items[0].tolist()])
```

A session of which nothing is left says nothing: give it the items with most `events` instead.
`vector` times a session's vector is its score{but}.
'''


def main(argv) -> int:
    """Export the run that argv names and return the exit status."""
    parser = argparse.ArgumentParser(
        prog='python -m tpad_jax.export', allow_abbrev=False,
        description='Writes a finished run as files that need no tpad_jax.')
    parser.add_argument('run', help='workdir of a finished run')
    parser.add_argument('directory', type=Path, help='made if absent')
    parser.add_argument('--k', type=int, default=20, help='items per list, default 20')
    parser.add_argument('--rows', type=int, default=64, help='sessions per call, default 64')
    parser.add_argument('--sessions', metavar='FILE',
                        help='.jsonl, .jsonl.gz or .parquet: their vectors are written, too')
    parser.add_argument('--ann', action='store_true',
                        help='an index for approximate lists, its recall measured on --sessions')
    given = parser.parse_args(argv)
    begin('')
    try:
        told = export(given.run, given.directory, given.k, given.rows, given.sessions, given.ann)
    except InputError as error:
        return _said(error, UNUSABLE)
    except FloatingPointError as error:
        return _said(error, BROKEN)
    except OSError as error:
        if error.errno not in (*UNWRITABLE, errno.EEXIST, errno.ENOTDIR):
            raise
        return _said(f'{error.filename or given.directory}: {error.strerror}; choose another DIR',
                     UNUSABLE)
    print(*told, sep='\n')
    return 0


def export(run, directory: Path, k: int = 20, rows: int = 64, sessions: str | None = None,
           ann: bool = False) -> list[str]:
    """Write all files and return a line for each.

    Args:
      run: workdir of a finished run. directory: made if absent. k: items per list. rows: sessions
        per call of the artefact. sessions: a file of them, whose vectors are written. ann: an index
        for approximate lists, too.

    Raises:
      InputError: the run, k or the sessions are unusable, or --ann has no sessions or no faiss.
    """
    from tpad_jax.serving import (
        artifact,
        recommender,  # here: --help and a wrong flag need no jax
    )

    if ann and sessions is None:
        raise InputError('--ann has to say its recall: give --sessions=FILE to measure it on')
    if not 1 <= rows <= MAX_ROWS:
        raise InputError(f'--rows={rows}: a number from 1 to {MAX_ROWS} is needed')
    kept = artifact.read(run)
    shop = recommender.Recommender(kept)
    list(shop.begin(shop.rows([[]])[0], k))  # refuses a k out of bounds
    directory.mkdir(parents=True, exist_ok=True)
    about = {'model': kept.about['model'], 'items': len(kept.ids) - 1, 'k': k, 'rows': rows,
             'max_length': shop.max_length, 'data': kept.about['data']}
    _items(kept, Path(run), directory)
    _artefact(kept, directory, k, rows)
    moved = [what for what, given in (
        ('the items it holds itself', [spec.repeats for spec in kept.specs]),
        ('their companions', [spec.together for spec in kept.specs])) if any(given)]
    but = f', but for the shift of {" and ".join(moved)}' if moved else ''
    (directory / 'README.md').write_text(README.format(length=shop.max_length, **about, but=but))
    if sessions is not None:
        vectors, known = _sessions(shop, sessions, directory)
    if ann:
        about['ann'] = _ann(shop, vectors, known, k, directory)
    (directory / 'export.json').write_text(json.dumps(about, indent=1) + '\n')
    told = [f'{directory / file.name}  {file.stat().st_size:,} bytes'
            for file in sorted(directory.iterdir()) if file.is_file()]
    if ann:
        told.append(f'recall@{k} of items.faiss on {about["ann"]["sessions"]} sessions: '
                    f'{about["ann"]["recall"]:.4f}')
    return told


def _items(kept, run, directory):
    import polars as pl

    from tpad_jax.features import store as store_lib

    z = kept.z[1:]
    columns = {'item_id': kept.ids[1:], 'title': kept.titles[1:], 'events': kept.events[1:],
               'vector': z}
    (directory / 'item_ids.json').write_text(json.dumps(kept.ids[1:]))
    _keyed(directory / 'item_vectors.safetensors', z, kept.ids)
    store = run / 'features' / kept.about['features']
    if (store / 'r.npy').is_file():
        r = store_lib.read(store, 'r')[1:]
        columns['features'] = r = r.reshape(len(r), -1)
        _keyed(directory / 'item_features.safetensors', r, kept.ids)
    pl.DataFrame(columns).write_parquet(directory / 'items.parquet')


def _keyed(file, rows, ids):
    """Rows and their ids, as data/given.py reads them."""
    import numpy as np
    from safetensors.numpy import save_file

    words = np.frombuffer('\n'.join(ids[1:]).encode() + b'\n', np.uint8)
    save_file({'features': np.ascontiguousarray(rows), 'ids': words}, file)


def _artefact(kept, directory, k, rows):
    import jax
    import numpy as np
    from flax.traverse_util import flatten_dict, unflatten_dict
    from safetensors.numpy import save_file

    from tpad_jax.evaluation import scorers
    from tpad_jax.serving import topk

    total = len(kept.z)
    weights = {'z': np.pad(kept.z, ((0, topk.rounded(total) - total), (0, 0)))}
    for i, (params, near) in enumerate(kept.weights):
        weights |= {f'{i}/{path}': x for path, x in
                    flatten_dict({**params, 'rows': near}, sep='/').items()
                    if '/fusion/' not in path}  # is in z
    search = topk.searcher(scorers.session_encoder(kept.specs),
                           scorers.session_shifts(kept.specs))

    def recommend(weights, items):
        tree = unflatten_dict(weights, sep='/')
        own = tuple(({'recommender': tree[i]['recommender']}, tree[i].get('rows', {}))
                    for i in map(str, range(len(kept.specs))))
        return search(own, weights['z'], total, items, k=k)

    shape = rows, kept.about['max_length']
    made = jax.export.export(jax.jit(recommend), platforms=PLATFORMS)(
        jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), weights),
        jax.ShapeDtypeStruct(shape, np.int32))
    (directory / 'recommender.jax').write_bytes(made.serialize())
    save_file({path: np.ascontiguousarray(x) for path, x in weights.items()},
              directory / 'weights.safetensors')


def _sessions(shop, file, directory):
    """Vectors of the sessions of a file, written as they come; -> vectors and rows of the first."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq

    from tpad_jax.serving import session_files

    source, kept = session_files.Source(file), []
    schema = pa.schema([('line', pa.int64()), ('id', pa.string()),
                        ('vector', pa.list_(pa.float32()))])
    with pq.ParquetWriter(directory / 'sessions.parquet', schema) as out:
        for asked in session_files.in_batches(source, session_files.FLUSH):
            h = shop.embed_sessions([one.session for one in asked])
            edges = pa.array(np.arange(len(h) + 1, dtype=np.int32) * h.shape[1])
            out.write_table(pa.table([
                pa.array([one.line for one in asked], pa.int64()),
                pa.array([session_files.said(one.id) for one in asked], pa.string()),
                pa.ListArray.from_arrays(edges, pa.array(h.ravel()))], schema=schema))
            if not kept:
                kept = h, shop.rows([one.session for one in asked])[0]
    source.check(0.05)
    if not kept:
        raise InputError(f'{file} holds no session')
    return kept


def _ann(shop, vectors, rows, k, directory):
    from tpad_jax.serving import ann

    index = ann.build(shop.embed_items())
    ann.write(index, directory / 'items.faiss')
    there = rows[:, 0] > 0
    found, _ = ann.search(index, vectors[there], k)
    return {'sessions': int(there.sum()),
            'recall': ann.recall(found, shop.first(rows[there], k)[0]),
            'neighbours': ann.NEIGHBOURS, 'looked at': ann.SEARCH}


def _said(text, status):
    print(f'tpad_jax.export: {" ".join(str(text).split())}', file=sys.stderr)
    return status


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))
