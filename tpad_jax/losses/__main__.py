"""Whether a loss keeps its contract: `python -m tpad_jax.losses check pkg.module:function`.

    --KEY=VALUE                 a keyword of the function, as in its entry of config.losses
    --module=pkg.module:Class   the flax module of its head; --fields.KEY=VALUE its fields

Prints a line per check; exit status 0, or 2 where the contract is broken.
"""

import ast
import sys

import jax

from tpad_jax.core.startup import UNUSABLE
from tpad_jax.errors import InputError
from tpad_jax.losses import check, contract

SIGNS = {True: 'ok', False: 'NO', None: '--'}


def main(argv) -> int:
    """Check the loss that argv names and return the exit status."""
    if '--help' in argv or '-h' in argv:
        print(__doc__)
        return 0
    flags = [arg for arg in argv if arg.startswith('--')]
    words = [arg for arg in argv if not arg.startswith('--')]
    if len(words) != 2 or words[0] != 'check' or not all('=' in flag for flag in flags):
        print(f'tpad_jax.losses: {__doc__}', file=sys.stderr)
        return UNUSABLE
    jax.config.update('jax_platforms', 'cpu')
    keywords, fields = {}, {}
    for flag in flags:
        name, _, text = flag.removeprefix('--').partition('=')
        into = fields if name.startswith('fields.') else keywords
        into[name.removeprefix('fields.')] = _read(text)
    module = keywords.pop('module', '')
    try:
        fn = contract.resolve(words[1], words[1])
        head = contract.own_module(words[1], module, fields) if module else None
    except InputError as error:
        print(f'{SIGNS[False]}  found      {error}')
        return UNUSABLE
    broken = False
    for finding in check.check(fn, keywords, head):
        print(f'{SIGNS[finding.ok]}  {finding.what:<9}  {finding.told}', flush=True)
        broken |= finding.ok is False
    return UNUSABLE if broken else 0


def _read(text):
    try:
        return ast.literal_eval(text)
    except (SyntaxError, ValueError):
        return text  # a name of an output, most often


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))
