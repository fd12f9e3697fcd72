"""DAMC: one Knowledge-MLLM of two that learnt one modality each.

Planted worlds and a small base that was pretrained for few steps. Adapters by kind of token learn
to describe items, with heads that do not change: from pictures alone ('image': nearly all words are
withheld from the reader), from texts alone ('text': there are no pictures), or from both. Composed
adapters are the first two together: their sum or mean over all tokens (NaiveMC), or 'damc', where
pictures keep the adapter that learnt to see and the others are means. Every arm then reads complete
items. Rows k are judged by probes of cold items and by a rule that follows k alone.
"""

from benchmarks.systems import Cell, Test, base, of_content

PARTS, WORLDS = ('image', 'text'), range(3)
ARMS = {'both': ('both',), 'image': ('image',), 'text': ('text',), 'sum': PARTS, 'mean': PARTS,
        'damc': PARTS}
BASE = dict(width=64, layers=1, steps=60)
MEASURES = {'probe': (100, 1), 'share, cold': (100, 1), 'share': (100, 1)}
TESTS = [Test('damc', other, 'share, cold') for other in ('image', 'text', 'sum', 'mean')]
TESTS += [Test('both', 'damc', 'share, cold')]


def cells():
    """World after world."""
    return [Cell(arm, 'planted', world) for world in WORLDS for arm in ARMS]


def run(cell, place):
    """Train the arm's adapters, compose them and read the catalogue."""
    from flax.traverse_util import unflatten_dict

    from benchmarks import ablation
    from tpad_jax.training import merge_adapters

    trees, path = [], 'lora/knowledge/'
    for part in ARMS[cell.arm]:
        job = ablation.train(_config(cell, place, part), place.workdir.parent / (
            f'{part}{cell.world}'), place.stopping, ('knowledge',))
        trees.append({tuple(name.removeprefix(path).split('/')): x
                      for name, x in job.params.items() if name.startswith(path)})
    kind = cell.arm if len(trees) > 1 else 'sum'
    blend = merge_adapters.blend(trees, kind=kind)
    job = ablation.opened(_config(cell, place, 'both'), place.workdir, place.stopping,
                          ('knowledge',))
    job.writer.close()
    params = unflatten_dict(job.params | {
        path + '/'.join(name): x for name, x in blend.items()}, sep='/')
    return of_content(job, job.encoders['knowledge'](params)['k'])


def _config(cell, place, part):
    """Of stage knowledge, with what its items show: 'image', 'text' or 'both'."""
    from tpad_jax import config

    c = config.get_config()
    c.stages, c.rivals, c.diagnostics = 'knowledge', {}, 0
    c.seed = c.data.planted.seed = cell.world
    c.mllm.base, c.model.lora_by_kind = base(place, **BASE), True
    c.stage.knowledge.update(steps=90, learning_rate=2e-3, train='^lora/knowledge/')
    if part == 'image':
        c.model.withhold = 0.999
    elif part == 'text':
        c.data.missing.image = 1.0
    return c
