"""The recipe of docs/features_elsewhere.md, as it stands there."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tpad_jax.data.sources import amazon_tables
from tpad_jax.data.synthetic import planted
from tpad_jax.features import store

ROOT = Path(__file__).parents[2]
ITEMS = 400  # of which faiss wants 256 in training sessions


@pytest.mark.slow
def test_the_recipe_runs_on_what_a_run_leaves(tmp_path):
    run = tmp_path / 'run'
    planted.write(run / 'raw', seed=0, items=ITEMS, train=600, valid=20, test=20)
    amazon_tables.prepare(run / 'raw', run / 'data', gap_hours=24.0, core=1, min_length=2, valid=20,
                    test=20, seed=0)
    rng = np.random.default_rng(0)
    for stage, name, shape in ('knowledge', 'k', (2, 16)), ('transfer', 'r', (32,)):
        store.write(run / 'features' / stage, name, rng.normal(size=(ITEMS + 1, *shape)), {})
    page = (ROOT / 'docs/features_elsewhere.md').read_text()
    text = re.search(r'^```python\n(# elsewhere.py\n.*?)^```$', page, re.DOTALL | re.MULTILINE)[1]
    three = "{'knowledge k': k,"
    assert three in text  # one, of few codebooks, is enough: what faiss does for each takes long
    one = "{'distilled r': r}.items() or "
    text = text.replace(three, one + three).replace('n_codebook=8', 'n_codebook=2')
    (tmp_path / 'elsewhere.py').write_text(text)
    done = subprocess.run([sys.executable, 'elsewhere.py', str(run), '1'], cwd=tmp_path, text=True,
                          capture_output=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found = re.findall(r'^distilled r *\| +([\d.]+) \| +([\d.]+)', done.stdout, re.MULTILINE)
    assert len(found) == 1, done.stdout
    assert all(0 <= float(x) <= 1 for x in found[0])
