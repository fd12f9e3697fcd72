"""The pages on extensions, followed to the letter."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests import eight_devices

ROOT = Path(__file__).parents[1]


def blocks(page):
    """(language, text) of a page's code blocks, in order."""
    return re.findall(r'^```(\w+)\n(.*?)^```$', page.read_text(), re.DOTALL | re.MULTILINE)


# What the pages call tiny is a minute of work; here it is less: a base of one layer, few steps, and
# in every stage one of the built-in losses. Python imports this at its start.
TINIER = '''
import os
from tpad_jax import config

def tiny(c, tiny=config.tiny):
    tiny(c)
    c.data.planted.update(items=48, train=160, valid=24, test=24)
    c.diagnostics, c.baselines, c.experts, c.mllm.text_length = 0, 'pop', '', 8
    c.mllm.base, c.model.features = os.environ['TINY_BASE'], 16
    c.rivals, c.workers, c.skip_not_finite = {}, 0, 0
    c.stage.recommend.eval_every = c.stage.joint.eval_every = 0
    for stage in c.stage.values():
        stage.update(steps=2, batch_size=16, optimiser='sgd')
    for name in {*c.losses} - {'gen_knowledge', 'distil', 'next_item'}:
        c.losses[name].weight = 0.0

config.tiny = tiny
'''


@pytest.mark.slow
@pytest.mark.parametrize('page', ['a_loss', 'an_output', 'an_encoder', 'a_dataset', 'a_metric',
                                  'a_stage'])
def test_a_page_followed_to_the_letter(page, tmp_path, base_dir):
    """A block that begins with '# name.py' is that file; bash is run, sh has its config checked."""
    file = ROOT / 'docs' / f'add_{page}.md'
    (tmp_path / 'start').mkdir()
    (tmp_path / 'start' / 'sitecustomize.py').write_text(TINIER)
    env = {'PATH': f'{Path(sys.executable).parent}:/usr/bin:/bin', 'HOME': str(tmp_path),
           'PYTHONPATH': f'{ROOT}:{tmp_path / "start"}', 'XLA_FLAGS': ' '.join(eight_devices.QUICK),
           'TINY_BASE': str(base_dir),
           **{n: x for n, x in os.environ.items() if 'CACHE' in n}}

    def run(text):
        done = subprocess.run(['bash', '-euo', 'pipefail', '-c', text], cwd=tmp_path, text=True,
                              capture_output=True, check=False, env=env)
        assert done.returncode == 0, f'{text}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}'

    modules, checks = [], []
    for language, text in blocks(file):
        if language == 'python':
            (tmp_path / re.match(r'# (\w+\.py)\n', text)[1]).write_text(text)
        elif text.startswith('python -m tpad_jax.losses check '):
            checks.append(shlex.split(text)[3:])
        elif language == 'bash':
            run(text)
        elif language == 'sh':
            script = re.match(r'python (\w+)\.py', text)  # registers what the config names
            modules += [script[1]] if script else []
            modules.append(re.search(r'--config=(\w+)\.py', text)[1])
    if modules:  # and what checks losses, in one process, since each imports jax
        run(f"""python - <<'END'
import {", ".join(modules)}
from tpad_jax.job.validate import check
from tpad_jax.losses.__main__ import main
for module in {", ".join(modules)},:
    if hasattr(module, "get_config"):
        check(module.get_config())
for argv in {checks}:
    assert main(argv) == 0
END""")
    if page == 'a_loss':
        found = json.loads((tmp_path / 'runs/mine/results.json').read_text())['losses']
        assert np.isfinite(found['transfer']['pull'])
