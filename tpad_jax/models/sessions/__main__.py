"""Check a session encoder: `python -m tpad_jax.models.sessions check pkg.module:function`.

    --KEY=VALUE   an option of config.model that the encoder's entry reads

In place of pkg.module:function, a name of ENCODERS. Prints a line per check. Exit status: 0, or 2
if the contract is broken.
"""

import sys

import jax

from tpad_jax.core import cli, findings, startup
from tpad_jax.models.sessions import check


@cli.command('tpad_jax.models.sessions')
def main(argv: list[str]) -> int:
    """Check an encoder; return the exit status."""
    if '--help' in argv or '-h' in argv:
        print(__doc__)
        return 0
    name, options = findings.arguments(argv, 'tpad_jax.models.sessions', 'pkg.module:function')
    startup.check_environment()
    jax.config.update('jax_platforms', 'cpu')
    return findings.show(check.check(name, **options))


if __name__ == '__main__':
    sys.exit(main())
