"""Check the contract of a loss: `python -m tpad_jax.losses check pkg.module:function`.

    --KEY=VALUE                 keyword of the function, as in its entry of config.losses
    --module=pkg.module:Class   flax module of its head; --fields.KEY=VALUE sets its fields

Prints a line per check. Exit status: 0, or 2 if the contract is broken.
"""

import sys

import jax

from tpad_jax.core import cli, findings, startup
from tpad_jax.losses import check, contract


@cli.command('tpad_jax.losses')
def main(argv: list[str]) -> int:
    """Check a loss; return the exit status."""
    if '--help' in argv or '-h' in argv:
        print(__doc__)
        return 0
    name, keywords = findings.arguments(argv, 'tpad_jax.losses', 'pkg.module:function')
    startup.check_environment()
    jax.config.update('jax_platforms', 'cpu')
    fields = {name.removeprefix('fields.'): keywords.pop(name)
              for name in [*keywords] if name.startswith('fields.')}
    module, fn = keywords.pop('module', ''), contract.resolve(name, name)
    head = contract.make_module(f'config.losses.{name}', module, fields) if module else None
    return findings.show(check.check(fn, keywords, head))


if __name__ == '__main__':
    sys.exit(main())
