"""The diagnostics that a run has stored: read again, collected and put into words."""

import json
from pathlib import Path

import numpy as np

FOLDER = 'diagnostics'  # of a workdir
# the moments of each stage, in order
MOMENTS = {'knowledge': ('after',), 'transfer': ('before', 'after'), 'joint': ('before', 'after')}


def collect(workdir: Path) -> dict:
    """Read all diagnostics of a workdir: {stage: {moment: ...}} and 'warnings', a list."""
    out, warnings = {}, []
    for stage, moment in ((s, m) for s, moments in MOMENTS.items() for m in moments):
        file = workdir / FOLDER / f'{stage}-{moment}.json'
        if file.is_file():
            record = out.setdefault(stage, {})[moment] = json.loads(file.read_text())
            warnings += record.pop('warnings')
    return {**out, 'warnings': warnings} if out else {}


def clouds(workdir: Path) -> dict[str, dict]:
    """Read the clouds before alignment and after its last stage: {title: {name: array}}.

    A cloud is float32 [n, M D]. A modality of k fills its own of the M places, as in r and c.
    'items', 'at' and 'next' are the item ids of their rows. The result is empty without both
    moments: a stage without steps has no clouds.
    """
    folder = workdir / FOLDER
    stages = [stage for stage in ('transfer', 'joint')
              if all((folder / f'{stage}-{m}.json').is_file() for m in MOMENTS[stage])]
    moments = [(stages[0], 'before'), (stages[-1], 'after')] if stages else []
    out = {f'{moment} {stage}': load(folder / f'{stage}-{moment}.npz') for stage, moment in moments}
    for cloud in out.values():
        modalities = [name for name in cloud if name.startswith('k_')]
        for name, place in zip(modalities, np.eye(len(modalities), dtype='f'), strict=True):
            cloud[name] = np.kron(place, cloud[name])
    return out


def load(file: Path) -> dict[str, np.ndarray]:
    """Read the arrays of a moment; clouds, which are stored in float16, become float32."""
    with np.load(file, allow_pickle=False) as stored:
        return {name: x.astype(np.float32) if x.dtype == np.float16 else x
                for name, x in stored.items()}


def lines(stage: str, before: dict | None, after: dict) -> list[str]:
    """Put a stage's numbers into words: ranks, estimates on held-out sessions, probes.

    Args:
      stage: its name.
      before: the record of the moment before, if there is one.
      after: the record of the moment after.
    """
    def change(part, name, key=None):
        values = [record[part][name] if key is None else record[part][name][key]
                  for record in (before, after) if record and name in record[part]]
        return f'{name} ' + ' -> '.join(f'{x:.2f}' for x in values)

    out = [f'effective rank over {stage}, on {after["sessions"]} validation sessions: '
           + '  '.join(change('features', n, 'effective_rank') for n in after['features'])]
    estimates = [n for n in after['held_out'] if n.startswith(('mi_', 'room/', 'log_q/'))]
    if estimates:
        out.append('  held-out estimates, nats: '
                   + '  '.join(change('held_out', n) for n in estimates))
    for name, probes in after['probes'].items():
        if probes:
            out.append(f'linear probes on cold items, accuracy from {name}: '
                       + '  '.join(f'{n} {x["accuracy"]:.2f}' for n, x in probes.items()))
    return out
