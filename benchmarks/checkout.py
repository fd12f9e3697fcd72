"""Which commit a figure is of."""

import subprocess
from functools import partial
from pathlib import Path

ROOT = Path(__file__).parents[1]


def commit(*paths: str) -> str:
    """The last commit of these paths, or of all; with a + where tracked files differ from it."""
    git = partial(subprocess.run, cwd=ROOT, capture_output=True, text=True, check=False)
    head = git(['git', 'log', '-1', '--format=%H', '--', *paths]).stdout.strip()
    changed = git(['git', 'diff', '--quiet', 'HEAD', '--', *(paths or ['*.py'])]).returncode
    return head + '+' * bool(changed)
