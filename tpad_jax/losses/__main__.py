"""Check the contract of a loss: `python -m tpad_jax.losses check pkg.module:function`.

    --KEY=VALUE                 keyword of the function, as in its entry of config.losses
    --module=pkg.module:Class   flax module of its head; --fields.KEY=VALUE sets its fields

Prints a line per check. Exit status: 0, or 2 if the contract is broken.
"""

import ast
import sys

import jax

from tpad_jax.core import cli, startup
from tpad_jax.errors import InputError
from tpad_jax.losses import check, contract

SIGNS = {True: 'ok', False: 'NO', None: '--'}


@cli.command('tpad_jax.losses')
def main(argv: list[str]) -> int:
    """Check a loss; return the exit status."""
    if '--help' in argv or '-h' in argv:
        print(__doc__)
        return 0
    flags = [arg.removeprefix('--').partition('=') for arg in argv if arg.startswith('--')]
    words = [arg for arg in argv if not arg.startswith('--')]
    if len(words) != 2 or words[0] != 'check' or not all(equals for _, equals, _ in flags):
        raise InputError('expected: check pkg.module:function [--KEY=VALUE ...]. Fix: see '
                         'python -m tpad_jax.losses --help')
    startup.check_environment()
    jax.config.update('jax_platforms', 'cpu')
    keywords = {name: _literal(text) for name, _, text in flags}
    fields = {name.removeprefix('fields.'): keywords.pop(name)
              for name in [*keywords] if name.startswith('fields.')}
    module, fn = keywords.pop('module', ''), contract.resolve(words[1], words[1])
    head = contract.make_module(f'config.losses.{words[1]}', module, fields) if module else None
    status = 0
    for finding in check.check(fn, keywords, head):
        print(f'{SIGNS[finding.ok]}  {finding.what:<9}  {finding.text}', flush=True)
        status = cli.UNUSABLE if finding.ok is False else status
    return status


def _literal(text):
    try:
        return ast.literal_eval(text)
    except (SyntaxError, ValueError):
        return text  # usually the name of an output


if __name__ == '__main__':
    sys.exit(main())
