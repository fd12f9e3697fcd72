"""Begin a run from another one on other data: its Transfer-MLLM, adapters, heads and critics.

Sessions of one catalogue then teach what follows what in another catalogue whose items are read by
the same model [ours]. The recommender with its table of ids is not taken over, and neither are rows
of the catalogue, which are read again.
"""

import json
from pathlib import Path

from ml_collections import ConfigDict

from tpad_jax.config import STAGES, flat
from tpad_jax.core.digest import files_digest
from tpad_jax.errors import refuse_if, refusing
from tpad_jax.features import codes, store
from tpad_jax.nn import linear
from tpad_jax.training import checkpoint, step

# options that give parameters of equal shapes another meaning
MEANING = ('mllm.pooling', 'mllm.tokenizer', 'model.bottleneck', 'model.codes',
           'model.critics.align', 'model.critics.distil', 'model.form', 'model.lora_alpha',
           'model.lora_targets', 'model.reread')
TRAINED = tuple(stage for stage in STAGES if stage != 'recommend')  # what is taken over


def check(config) -> None:
    """Refuse a config.begin_from that is not a finished run, before a workdir is created.

    Args:
      config: of the run.

    Raises:
      InputError: as above.
    """
    refuse_if(config.begin_from and not Path(config.begin_from, 'results.json').is_file(),
              f'config.begin_from={config.begin_from!r}: not a finished run. Expected the '
              'workdir of one, with results.json. Fix: finish that run, or correct the path')
    refuse_if(config.begin_from and config.model.words, 'config.model.words=True: words are rows '
              'of one catalogue. Expected no config.begin_from with it. Fix: leave one out')


def fingerprint(run: str) -> str:
    """Digest the checkpoints that a run's stages left: 16 hexadecimal digits."""
    found = sorted(file for stage in TRAINED for file in
                   Path(run, 'stages', stage).glob(f'*/{checkpoint.CHECKSUMS}'))
    return files_digest({str(file.relative_to(run)): file for file in found})


def parameters(config, shapes: dict, base: str) -> dict:
    """Read what another run has trained, and check that it fits this one.

    Args:
      config: of this run, with the tokenizer that it uses.
      shapes: {path: shape and dtype} of all parameters of this run.
      base: fingerprint of this run's base.

    Returns:
      {path: array}; empty where config.begin_from is ''.

    Raises:
      InputError: the other run is unfinished or damaged, it trained none of these, or its base,
        widths or an option of `MEANING` differ.
    """
    check(config)
    run, option = Path(config.begin_from), f'config.begin_from={config.begin_from!r}'
    if not config.begin_from:
        return {}
    with refusing((ValueError, KeyError, TypeError), f'{run / "results.json"}: damaged', 'Fix: '
                  'delete it and repeat the command of that run'):
        theirs = ConfigDict(json.loads((run / 'results.json').read_text())['provenance']['config'])
        before, now = (dict(flat(c)) | {'k without training': step.reads_raw(c)}
                       for c in (theirs, config))
    origin = store.manifest(run / 'features' / 'knowledge', 'k')['fingerprint'].get('checkpoint')
    refuse_if('own' in (before['mllm.tokenizer'], now['mllm.tokenizer']), f'{option}: a tokenizer '
              "was trained on one run's texts (config.mllm.tokenizer), so their bases differ. "
              "Expected the base's tokenizer in both. Fix: set config.mllm.tokenizer='' in both")
    refuse_if(origin != base, f'{option}: its base has other parameters (config.mllm). Expected '
              'the same base. Fix: choose another run, or its base')
    for key in (*MEANING, 'k without training'):
        # an older run lacks newer options, and JSON has no tuples
        earlier, own = (list(x) if isinstance(x, tuple) and x else x or False
                        for x in (before.get(key), now[key]))
        refuse_if(earlier != own, f'{option}: {key} is {earlier!r} there and {own!r} here. '
                  'Expected the same. Fix: choose another run, or its option')
    out = parameters(theirs, shapes, base) if theirs.get('begin_from') else {}
    for stage in TRAINED:
        if (run / 'stages' / stage).is_dir():
            out |= checkpoint.chosen_parameters(run / 'stages' / stage)
    out = {path: x for path, x in out.items() if not path.startswith(('recommender/', 'loss/'))}
    refuse_if(any(path.startswith('base/') for path in out), f'{option}: it trained its base '
              '(config.stage.*.train). Expected the base of its files. Fix: choose another run')
    if config.model.codes:  # of that run's items, which are read here alike
        k = store.read(run / 'features' / 'knowledge', 'k')
        out.setdefault(codes.PATH, codes.centres(k, *config.model.codes, theirs.seed))
    refuse_if(not out, f'{option}: none of its stages trained the Transfer-MLLM or an adapter. '
              f'Expected one of {", ".join(TRAINED)}. Fix: choose another run')
    faults = linear.misfits(out, {path: shapes[path].shape for path in out if path in shapes})
    refuse_if(faults, f'{option}: of other widths: {faults.split(";")[0]}. Expected the same '
              'config.model. Fix: choose another run, or its widths')
    return out
