"""Merge an adapter into its checkpoint: `python -m tpad_jax.merge CHECKPOINT ADAPTER OUT`.

ADAPTER is a directory in PEFT's form: written by a run on a checkpoint below `adapters/`, or by
`peft`. OUT becomes a Hugging Face directory that `transformers` loads, with the files, names and
dtypes of CHECKPOINT.
"""

import sys
from pathlib import Path

from tpad_jax.core import cli
from tpad_jax.features import bases
from tpad_jax.models.hf import export, load, spec


def merge(checkpoint: str | Path, adapter: str | Path, out: str | Path) -> Path:
    """Write a checkpoint with an adapter added to its kernels.

    Args:
      checkpoint: Hugging Face directory, or hub id.
      adapter: directory in PEFT's form.
      out: directory to create.

    Returns:
      `out`.

    Raises:
      InputError: a directory is not of its form, or `out` exists.
    """
    checkpoint = bases.local('CHECKPOINT', str(checkpoint))
    description = spec.read(checkpoint)
    pairs, scale = export.load_adapter(adapter, description)
    dtypes = {t.dtype for t in load.stored(checkpoint) if t.dtype is not None}
    # sums are float32 in any case; a checkpoint of one dtype is written in it
    params = load.load(checkpoint, description, dtype=dtypes.pop() if len(dtypes) == 1 else
                       'float32')
    return export.export(export.merge(params, pairs, scale), checkpoint, out)


@cli.command('tpad_jax.merge', 'Merges an adapter into its checkpoint.', {
    'checkpoint': dict(help='Hugging Face directory, or hub id'),
    'adapter': dict(help="directory in PEFT's form"),
    'out': dict(help='directory to create'),
})
def main(args) -> None:
    """Merge and print the new directory."""
    print(merge(args.checkpoint, args.adapter, args.out))


if __name__ == '__main__':
    sys.exit(main())
