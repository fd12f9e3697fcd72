"""An adapter into its checkpoint: `python -m tpad_jax.merge CHECKPOINT ADAPTER OUT`.

ADAPTER is a directory in PEFT's form, as a run on a checkpoint leaves it under `adapters/`, or as
`peft` wrote it. OUT becomes a Hugging Face directory that `transformers` loads, with the files,
names and dtypes of CHECKPOINT.
"""

import sys

from tpad_jax.errors import InputError
from tpad_jax.models.hf import export, load, peft, spec


def merge(checkpoint, adapter, out):
    """Write CHECKPOINT with ADAPTER summed into its kernels to OUT.

    Raises:
      InputError: a directory is not what it should be, or `out` exists.
    """
    found = spec.read(checkpoint)
    pairs, scale = peft.load_adapter(adapter, found)
    kinds = {t.dtype for t in load.stored(checkpoint) if t.dtype is not None}
    # sums are float32 whatever this is; it is what the result will have, where there is one
    params = load.load(checkpoint, found, dtype=kinds.pop() if len(kinds) == 1 else 'float32')
    return export.export(export.merge(params, pairs, scale), checkpoint, out)


def main(argv=None):
    """Merge and say where; status 2 and one sentence on unusable input."""
    args = sys.argv[1:] if argv is None else argv
    try:
        if len(args) != 3:
            raise InputError('give three directories: CHECKPOINT ADAPTER OUT')
        print(merge(*args))
    except InputError as error:
        print(f'tpad_jax.merge: {error}', file=sys.stderr)
        return 2
    return 0


if __name__ == '__main__':
    sys.exit(main())
