"""Export a finished run for programs without this package: `python -m tpad_jax.export RUN DIR`.

    item_ids.json            the item ids in the order of their numbers, from 1
    items.parquet            item_id, title, events, vector (z) and features (r, if the run has it)
    item_vectors.safetensors, item_features.safetensors
                             the same in the form that config.data.features reads
    recommender.jax          sessions -> scores and items, an artefact of jax.export
    weights.safetensors      its first argument
    sessions.parquet         line, id and vector of every session of --sessions
    items.faiss              with --ann: a graph of the vectors, for approximate lists
    README.md, export.json   how to load it with jax alone; its contents, and the recall of --ann

Exit status: 0 done, 1 a number was not finite or a defect, 2 unusable input in one sentence, 75
stopped by SIGINT or SIGTERM.
"""

import json
import string
import sys
from pathlib import Path

from tpad_jax.core import cli, files, startup
from tpad_jax.errors import InputError, refuse_if

K = 20  # items per list, or all items of a smaller catalogue
PLATFORMS, MAX_ROWS = ('cpu', 'cuda', 'tpu'), 4096
README = Path(__file__).parent / 'serving' / 'export_readme.md'  # template


@cli.command('tpad_jax.export', 'Writes a finished run as files that need no tpad_jax.', {
    'run': dict(help='workdir of a finished run'),
    'directory': dict(type=Path, help='created if absent'),
    '--k': dict(type=int, help=f'items per list, default {K}'),
    '--rows': dict(type=cli.number(int, 1, MAX_ROWS), default=64, help='sessions per call, 64'),
    '--sessions': dict(metavar='FILE', help='.jsonl, .jsonl.gz or .parquet, to be encoded'),
    '--bad_share': dict(type=cli.number(float, 0, 1), default=0.05,
                        help='share of the lines of --sessions that may be skipped, 0.05'),
    '--ann': dict(action='store_true', help='also write an index for approximate lists'),
})
def main(args) -> None:
    """Export a run and print its files."""
    startup.prepare()
    print(*export(**vars(args)), sep='\n')


def export(run: str | Path, directory: Path, k: int | None = None, rows: int = 64,
           sessions: str | None = None, bad_share: float = 0.05, ann: bool = False) -> list[str]:
    """Write all files.

    Args:
      run: workdir of a finished run.
      directory: created if absent.
      k: items per list. None: K, or all items of a smaller catalogue.
      rows: sessions per call of the artefact.
      sessions: file of sessions whose vectors are written.
      bad_share: share of the lines of `sessions` that may be skipped, in 0..1.
      ann: whether to write an index for approximate lists, too.

    Returns:
      Lines to print, one per file.

    Raises:
      InputError: the run, k or the sessions are unusable, or `ann` has no sessions or no faiss.
    """
    from tpad_jax.serving import artifact, recommender  # here: --help does not wait for jax

    refuse_if(ann and sessions is None,
              '--ann needs sessions to measure its recall. Fix: give --sessions=FILE')
    served = artifact.read(run)
    shop = recommender.Recommender(served)
    total = len(served.ids) - 1
    k = min(K, total) if k is None else k
    list(shop.begin(shop.rows([[]])[0], k))  # refuses a k out of bounds
    directory.mkdir(parents=True, exist_ok=True)
    about = {'model': served.about['model'], 'items': total, 'k': k, 'rows': rows,
             'max_length': shop.max_length, 'data': served.about['data']}
    _write_items(served, directory)
    _write_recommender(served, directory, k, rows)
    options = {'the items it holds itself': 'repeats', 'their companions': 'together',
               'what its memory retrieves': 'memory'}
    shifts = [items for items, option in options.items()
              if any(getattr(spec, option) for spec in served.specs)]
    shifts += ['items that the rules of experts know'] * (served.experts is not None)
    but = f', but for the shift of {" and ".join(shifts)}' if shifts else ''
    readme = string.Template(README.read_text())
    files.write_text(directory / 'README.md',
                     readme.substitute(about, length=shop.max_length, but=but))
    if sessions is not None:
        vectors, prefixes = _write_sessions(shop, sessions, bad_share, directory)
    if ann:
        about['ann'] = _write_ann(shop, vectors, prefixes, k, directory)
    files.write_json(directory / 'export.json', about)
    lines = [f'{directory / file.name}: {file.stat().st_size:,} bytes'
             for file in sorted(directory.iterdir()) if file.is_file()]
    if ann:
        lines.append(f'recall@{k} of items.faiss on {about["ann"]["sessions"]} sessions: '
                     f'{about["ann"]["recall"]:.4f}')
    return lines


def _write_items(served, directory):
    """Write the tables of all items."""
    import numpy as np
    import polars as pl

    from tpad_jax.features import store

    columns = {'item_id': served.ids[1:], 'title': served.titles[1:], 'events': served.events[1:],
               'vector': served.z[1:]}
    features = served.directory.parent / 'features' / served.about['features']
    if (features / 'r.npy').is_file():
        r = store.read(features, 'r')[1:]
        columns['features'] = r.reshape(len(r), -1)
    files.write_text(directory / 'item_ids.json', json.dumps(served.ids[1:]))
    # in the form that data/sources/external_features.py reads
    ids = np.frombuffer('\n'.join(served.ids[1:]).encode() + b'\n', np.uint8)
    for name, column in (('vectors', 'vector'), ('features', 'features')):
        if column in columns:
            files.write_tensors(directory / f'item_{name}.safetensors',
                                {'features': columns[column], 'ids': ids})
    with files.replacing(directory / 'items.parquet') as partial:
        pl.DataFrame(columns).write_parquet(partial)


def _write_recommender(served, directory, k, rows):
    """Write the compiled search and its weights."""
    import jax
    import numpy as np
    from flax.traverse_util import flatten_dict, unflatten_dict

    from tpad_jax.core.precision import exact_products
    from tpad_jax.evaluation import scorers
    from tpad_jax.serving import topk

    total = len(served.z)
    weights = {'z': np.pad(served.z, ((0, topk.rounded(total) - total), (0, 0)))}
    if served.experts is not None:
        weights |= flatten_dict({'experts': served.experts}, sep='/')
    for i, (params, near) in enumerate(served.weights):
        flat = flatten_dict({**params, 'rows': near}, sep='/')
        # z holds the output of the fusion already
        weights |= {f'{i}/{path}': x for path, x in flat.items() if '/fusion/' not in path}
    search = topk.searcher(scorers.session_encoder(served.specs),
                           scorers.session_shifts(served.specs))

    def recommend(weights, items):
        tree = unflatten_dict(weights, sep='/')
        models = tuple(({'recommender': tree[f'{i}']['recommender']}, tree[f'{i}'].get('rows', {}))
                       for i in range(len(served.specs)))
        return search((models, tree.get('experts')), weights['z'], total, items, k=k)

    shapes = (jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), weights),
              jax.ShapeDtypeStruct((rows, served.about['max_length']), np.int32))
    exported = jax.export.export(jax.jit(exact_products(recommend)), platforms=PLATFORMS)
    with files.replacing(directory / 'recommender.jax') as partial:
        partial.write_bytes(exported(*shapes).serialize())
    files.write_tensors(directory / 'weights.safetensors', weights)


def _write_sessions(shop, file, bad_share, directory):
    """Write the vectors of the sessions of a file, batch by batch.

    Returns:
      Vectors float32 [S, D] and prefixes int32 [S, N] of the first batch.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    from tpad_jax.serving import session_files

    source, first = session_files.Source(file), None
    schema = pa.schema({'line': pa.int64(), 'id': pa.string(), 'vector': pa.list_(pa.float32())})
    with (files.replacing(directory / 'sessions.parquet') as partial,
          pq.ParquetWriter(partial, schema) as out):
        for sessions in source.in_batches(session_files.FLUSH):
            h = shop.embed_sessions([session.session for session in sessions])
            out.write_table(pa.Table.from_pylist([
                dict(line=session.line, id=session_files.column_id(session.id), vector=vector)
                for session, vector in zip(sessions, h, strict=True)], schema))
            first = first or (h, shop.rows([session.session for session in sessions])[0])
        source.check(bad_share, '--bad_share')
    if first is None:
        raise InputError(f'{file} has no session. Fix: give a file with sessions')
    return first


def _write_ann(shop, vectors, prefixes, k, directory):
    """Write the index for approximate lists and measure its recall on sessions with known items."""
    from tpad_jax.serving import ann

    known = prefixes[:, 0] > 0
    refuse_if(not known.any(), '--ann measures its recall on --sessions, but none of them names an '
              'item of the run. Fix: give sessions of its items')
    index = ann.build(shop.embed_items())
    ann.write(index, directory / 'items.faiss')
    lists, _ = ann.search(index, vectors[known], k, shop.shifts(prefixes[known]))
    recall = ann.recall(lists, shop.first(prefixes[known], k)[0])
    return {'sessions': int(known.sum()), 'recall': recall, 'neighbours': ann.NEIGHBOURS,
            'looked at': ann.SEARCH}


if __name__ == '__main__':
    sys.exit(main())
