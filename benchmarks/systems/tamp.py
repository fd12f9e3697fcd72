"""TAMP: what is left of an MLLM when most of its decoder's weights are zero.

Planted worlds with the default base, nothing trained: k of all items are the only input of a rule
that follows content (the experts 'content', 'popularity' and 'cold'), as cold items have nothing
else. Data set `checkpoint` (--data=checkpoint=DIR,texts=FILE): a text decoder, and the likelihood
of texts that it was not calibrated on, one for a line of FILE (JSON lines with a field 'title', or
plain text; may be gzipped).
"""

import gzip
import json
from pathlib import Path
from types import SimpleNamespace

from benchmarks.systems import Cell, Test, content_rule, planted

RATES, WORLDS, DATA = (30, 50, 70), range(3), ('checkpoint',)
ARMS = ['unpruned', *(f'{by}_{rate}' for rate in RATES for by in ('tamp', 'wanda', 'magnitude'))]
MEASURES = {'share, cold': (100, 1), 'share': (100, 1), 'k, CKA': (1, 3), 'nll': (1, 3)}
TESTS = [Test(f'tamp_{rate}', f'wanda_{rate}', 'share, cold') for rate in RATES]
TESTS += [Test(f'wanda_{rate}', f'magnitude_{rate}', 'share, cold') for rate in RATES]
TESTS += [Test('tamp_50', 'unpruned', 'share, cold', above=-0.03)]
TESTS += [Test(f'{more}_{rate}', f'{less}_{rate}', 'nll', 'checkpoint') for rate in RATES[:2]
          for more, less in (('wanda', 'tamp'), ('magnitude', 'wanda'))]
TEXTS, TOKENS = 64, 32  # held-out texts, and their longest


def cells():
    """World after world, then the checkpoint."""
    return [Cell(arm, 'planted', world) for world in WORLDS for arm in ARMS] + [
        Cell(arm, 'checkpoint') for arm in ARMS if not arm.endswith('70')]


def run(cell, place):
    """Prune, and read items or texts."""
    by, _, rate = cell.arm.partition('_')
    share = int(rate or 0) / 100
    return (_texts if cell.on == 'checkpoint' else _items)(cell, place, by, share)


def _items(cell, place, by, share):
    import numpy as np
    from rich.console import Console

    from configs import amazon
    from tpad_jax.diagnostics import clouds
    from tpad_jax.features import prune
    from tpad_jax.job.job import Job

    c = amazon.get_config()
    c.update_from_flattened_dict({'stages': 'knowledge', 'stage.knowledge.steps': 0,
                                  'data.planted.seed': cell.world, 'rivals': {}})
    place.workdir.mkdir(parents=True, exist_ok=True)
    job = Job(c, place.workdir, place.stopping)
    job.build(('knowledge',), Console(quiet=True))
    before = job.nested()
    params = before if not share else prune.pruned(
        job.spec, before, job.content, share=share, by=by, seed=cell.world)[0]
    read, some = job.encoders['knowledge'], 1 + np.arange(200)
    k = np.asarray(read(params)['k'])
    return {**planted(job, content_rule(job, k)), 'k, CKA': clouds.linear_cka(*(
        x.reshape(len(some), -1) for x in (read.some(before, some)['k'], k[some])))}


def _texts(cell, place, by, share):
    import jax
    import jax.numpy as jnp
    import numpy as np

    from tpad_jax import config
    from tpad_jax.data import text
    from tpad_jax.distributed.devices import compiled
    from tpad_jax.features import bases, prune
    from tpad_jax.models.mllms import KnowledgeMLLM

    c = config.get_config()
    c.mllm.checkpoint = place.data['checkpoint']
    base = bases.read(c, pictures=False)
    params = {**base.load({}), 'lora': {}}
    tokens = text.tokenize(['', *_lines(Path(place.data['texts']), 2 * TEXTS)], base.directory,
                           TOKENS)
    if share:
        content = SimpleNamespace(tokens=tokens[:TEXTS + 1], has_image=np.zeros(TEXTS + 1, bool),
                                  image=np.zeros((TEXTS + 1, 0, 0, 3), np.uint8))
        spec = SimpleNamespace(knowledge=KnowledgeMLLM(base.module, 64, 'mean'), lora_scale=1.0,
                               chunk=0)
        params, _ = prune.pruned(spec, params, content, share=share, by=by)

    def nll(module, tokens):
        logits = module.logits(module(module.say(tokens)))[:, :-1]
        own = jnp.take_along_axis(logits, jnp.maximum(tokens[:, 1:], 0)[..., None], 2)[..., 0]
        each = jax.nn.logsumexp(logits, axis=2) - own
        return jnp.where(tokens[:, 1:] >= 0, each, 0).sum(axis=1)

    measure = compiled(lambda params, tokens: base.module.apply({'params': params['base']}, tokens,
                                                                method=nll))
    held = tokens[TEXTS + 1:]
    sums = np.concatenate([measure(params, part) for part in np.split(held, len(held) // 8)])
    return {'nll': (sums, (held[:, 1:] >= 0).sum(axis=1))}


def _lines(file, count):
    """The first texts of a file."""
    with (gzip.open if file.suffix == '.gz' else open)(file, 'rt', encoding='utf-8') as lines:
        found = [line.strip() for line, _ in zip(lines, range(4 * count), strict=False)]
    found = [json.loads(line).get('title') or '' if line.startswith('{') else line
             for line in found]
    return [line for line in found if len(line) > 20][:count]
