"""Our vision-language models and text encoders beside torch's: `python -m benchmarks.parity`.

Builds the tiny random models of tests/tiny_hf.py, or takes `--checkpoint=DIR` of any family that is
implemented, gives both sides the same rows with no, one and two images, padded on the left and on
the right, and compares over the tokens that are there: every hidden state, the logits, tokens
written greedily with a cache and, of tiny models or with --gradients, gradients. Prints a line per
comparison, closes with the largest differences of hidden states and logits, and leaves with status
1 if anything is above its bar.

`--write_golden` writes the input of tests/models/hf/test_hf_golden.py: a
tiny bfloat16 checkpoint per family, and torch's float32 outputs on it. Torch runs first and is gone
when ours is loaded.
"""

import json
import re
import shutil
import sys
import tempfile
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from flax.traverse_util import flatten_dict

from benchmarks import parity_torch as theirs
from configs import amazon
from tests import tiny_bert, tiny_hf
from tpad_jax.data import text
from tpad_jax.distributed.devices import compiled
from tpad_jax.features import bases
from tpad_jax.models.hf import keys, load, sentence, spec as specs, vlm
from tpad_jax.models.hf.bert import Bert
from tpad_jax.models.hf.generate import generate
from tpad_jax.models.mllms import TextReader

FLAGS = flags.FLAGS
GOLDEN = Path(__file__).parent.parent / 'tests' / 'models' / 'hf' / 'golden'
FAMILIES = tuple(specs.FAMILIES)
TINY_BAR, BAR, GRADIENT_BAR = 3e-5, 1e-3, 1e-5
WATCHED = (r'embed/embedding|vision/patch/kernel|vision/layers/.*kernel|'
           r'decoder/layers/(attention/q|down)/kernel')


def compare(got, expected) -> dict:
    """Largest difference of two arrays, absolute and relative to the expected one's RMS."""
    gap = float(np.max(np.abs(got.astype(np.float64) - expected)))
    size = float(np.sqrt(np.mean(np.square(expected, dtype=np.float64))))
    return {'max_abs_diff': gap, 'max_rel_diff': gap / (size + 1e-30)}


def outputs(model, tokens, mask, image):
    """First and last hidden states [B, S, D], and logits; for `apply`."""
    stream = model.prompt(tokens, mask, image)
    last = model(stream)
    return stream.x, last, model.logits(last)


def forward(model: vlm.VLM):
    """Compiled (params, tokens, mask, image) -> hidden states as torch lists them, logits."""
    def states(params, *given):
        (first, last, logits), inner = model.apply({'params': params}, *given, method=outputs,
                                                   mutable=['intermediates'])
        each = inner['intermediates']['decoder']['layers']['state'][0]
        hidden = jnp.concatenate([first[None], each[:-1], last[None]])
        return hidden.astype(jnp.float32), logits

    return compiled(states)


def gradients(model: vlm.VLM, params, given: theirs.Prompt, weight, there: dict):
    """Gradients of the sum of weight x logits, ours and torch's, of the WATCHED parameters.

    Args:
      there: torch's, by tensor.

    Yields:
      (path, ours, torch's), in our layout.
    """
    def loss(params):
        return (model.apply({'params': params}, *_arrays(given), method=outputs)[2] * weight).sum()

    here = flatten_dict(compiled(jax.grad(loss))(params), sep='/')
    for entry in keys.table(model.spec):
        if re.fullmatch(WATCHED, entry.path):
            layers = [entry.here(there[name]) for name in entry.names]
            yield (entry.path, np.asarray(here[entry.path]),
                   layers[0] if entry.layers is None else np.stack(layers))


def _arrays(given):
    return given.tokens.astype(np.int32), given.mask, given.image


def run(directory, side: int, *, dtype: str, steps: int, with_gradients: bool, double=False):
    """All comparisons of one checkpoint, as they are made.

    Args:
      double: whether torch's own rounding is compared as well, that is, its float64 with `dtype`,
        padded on the right: a row of padding that attends to nothing is NaN in float64.

    Yields:
      (padding, what, {'max_abs_diff', 'max_rel_diff'}), or {'equal', 'of'} for tokens.
    """
    spec = specs.read(directory)
    if isinstance(spec, sentence.TextEncoder):
        yield from encoded(directory, spec, dtype)
        return
    images, words = tiny_hf.images(3, side), theirs.words(directory, spec)
    prompts = {padding: theirs.prompt(spec, side, left=padding == 'left', words=words,
                                      images=images) for padding in ('left', 'right')}
    weight = None
    if with_gradients:
        shape = (*prompts['left'].tokens.shape, spec.decoder.vocab)
        weight = np.random.default_rng(0).standard_normal(shape, np.float32)
        weight *= prompts['left'].mask[..., None]
    torch_model, expected = theirs.load(directory, dtype), {}
    for padding, given in prompts.items():
        asked = theirs.keywords(torch_model, directory, given, spec)
        expected[padding] = theirs.run(torch_model, asked, spec,
                                       weight if padding == 'left' else None)
        if padding == 'left' and steps:
            chosen = theirs.greedy(torch_model, asked, steps)
    del torch_model
    theirs.free()
    if double:
        torch_model = theirs.load(directory, 'float64')
        exact = theirs.run(torch_model, theirs.keywords(torch_model, directory, prompts['right'],
                                                        spec), spec)
        del torch_model
        theirs.free()

    params = load.load(directory, spec, dtype=dtype)
    model = vlm.VLM(spec, side, dtype=dtype)
    states = forward(model)

    def compared(kind, i, got, mask):
        """The differences from torch's, and torch's own from its float64."""
        there = expected[padding][kind][i][mask]
        own = {'torch_from_float64': compare(there, exact[kind][i][mask])['max_rel_diff']
               } if double and padding == 'right' else {}
        return compare(got[mask], there) | own

    for padding, given in prompts.items():
        hidden, logits = map(np.asarray, states(params, *_arrays(given)))
        for i in range(len(hidden)):
            what = 'inputs' if i == 0 else 'last' if i == len(hidden) - 1 else f'layer {i}'
            yield padding, what, compared(0, i, hidden[i], given.mask)
        yield padding, 'logits', compared(1, ..., logits, given.mask)
        if steps:
            written, _ = generate(model, params, _arrays(given), steps=steps, stop=())
            same = np.asarray(written) == chosen
            yield padding, 'tokens', {'equal': int(same.sum()), 'of': same.size}
    if with_gradients:
        there = expected['left'][2]
        for path, ours, torchs in gradients(model, params, prompts['left'], weight, there):
            gap = np.linalg.norm(ours - torchs) / (np.linalg.norm(torchs) + 1e-30)
            yield ('left', f'gradient of {path}',
                   {'norm_rel_diff': float(gap), **compare(ours, torchs)})


def encoded(directory, spec, dtype):
    """The comparisons of a text encoder: states of torch's tokens, and vectors of texts."""
    read = sentence.pooling(directory)
    kind, longest = read.kind or 'mean', min(read.longest or spec.longest, spec.longest, 64)
    there, hidden_there, tokens, mask = tiny_bert.vectors(
        directory, pooling=kind, normalise=read.normalise, longest=longest, dtype=dtype)
    params = load.load(directory, spec, dtype=dtype)
    _, inner = compiled(partial(Bert(spec, dtype=dtype).apply, mutable=['intermediates']))(
        {'params': params}, tokens.astype(np.int32), mask)
    for i, states in enumerate(np.asarray(inner['intermediates']['layers']['state'][0]), start=1):
        yield 'right', f'layer {i}', compare(states[mask], hidden_there[i][mask])
    c = amazon.get_config('text_encoder')
    c.mllm.update(checkpoint=str(directory), pooling=kind, dtype=dtype, text_length=longest - 2)
    base = bases.read(c)
    given = text.tokenize(list(tiny_bert.TEXTS), base.directory, c.mllm.text_length)
    found = compiled(TextReader(base.module).apply)(
        {'params': {'base': params}}, None, None, given)[:, 0]
    yield 'right', 'vectors', compare(np.asarray(found), there)


def judged(directory, side, name, *, bar=None, tiny=True, **options) -> list[dict]:
    """`run`, printed line by line, each with whether it is `good`: below its bar.

    Args:
      bar: of absolute differences for a tiny model, else of those relative to RMS.
      options: of `run`.
    """
    out, bar = [], bar or (TINY_BAR if tiny else BAR)
    for padding, what, found in run(directory, side, **options):
        if what == 'tokens':  # in bfloat16 near ties fall either way
            good = found['equal'] == found['of'] or options['dtype'] != 'float32'
            shown = f'{found["equal"]}/{found["of"]} equal'
        else:
            if what.startswith('gradient'):
                good = found['norm_rel_diff'] <= (GRADIENT_BAR if tiny else bar)
            else:
                good = found['max_abs_diff' if tiny else 'max_rel_diff'] <= bar  # false for NaN
            shown = ' '.join(f'{k}={v:.2e}' for k, v in found.items())
        out.append(dict(model=name, padding=padding, what=what, good=good, **found))
        warning = '' if good else 'ABOVE THE BAR '
        print(f'{name:16} {padding:6}{what:48}{warning}{shown}', flush=True)
    return out


def write_golden(root=GOLDEN):
    """Write a checkpoint per family, in bfloat16, and torch's float32 outputs on it.

    expected.safetensors: `tokens` int32 [N] and `row` int32 [N], the prompts' tokens without
    padding and their rows; `image` uint8 [B, n, side, side, 3]; `hidden` [layers + 1, N, D] and
    `logits` [N, V], float32; `written` int32 [B, 16], what follows, greedily.
    """
    import torch
    from safetensors.numpy import save_file

    for name in FAMILIES:
        directory, side = Path(root) / name, tiny_hf.side(name)
        shutil.rmtree(directory, ignore_errors=True)
        tiny_hf.save(name, directory, tokenizer=False, dtype=torch.bfloat16)
        (directory / 'generation_config.json').unlink()
        spec = specs.read(directory)
        given = theirs.prompt(spec, side, left=True, words=theirs.words(directory, spec),
                              images=tiny_hf.images(3, side))
        model = theirs.load(directory, 'float32')
        asked = theirs.keywords(model, directory, given, spec)
        hidden, logits, _ = theirs.run(model, asked, spec)
        save_file(dict(tokens=given.tokens[given.mask].astype(np.int32),
                       row=np.nonzero(given.mask)[0].astype(np.int32), image=given.image,
                       hidden=np.ascontiguousarray(hidden[:, given.mask]),
                       logits=np.ascontiguousarray(logits[given.mask]),
                       written=theirs.greedy(model, asked, 16).astype(np.int32)),
                  directory / 'expected.safetensors')
        size = sum(f.stat().st_size for f in directory.iterdir())
        print(f'{directory}: {size / 1e6:.2f} MB')


def main(argv):
    """Compare, print, write JSON; status 1 if anything is above its bar."""
    del argv
    jax.config.update('jax_default_matmul_precision', 'highest')
    if FLAGS.write_golden:
        write_golden()
        return
    options, found = dict(dtype=FLAGS.dtype, steps=FLAGS.steps, bar=FLAGS.bar), []
    if FLAGS.checkpoint:
        spec = specs.read(FLAGS.checkpoint)
        side = FLAGS.side or 0 if isinstance(spec, sentence.TextEncoder) else spec.unit * (
            8 if isinstance(spec.vision, specs.Grid) else 1)
        found = judged(FLAGS.checkpoint, side, Path(FLAGS.checkpoint).resolve().name, tiny=False,
                       with_gradients=bool(FLAGS.gradients), double=FLAGS.dtype == 'float32',
                       **options)
    for name in [] if FLAGS.checkpoint else FLAGS.models:
        with tempfile.TemporaryDirectory() as directory:
            if name in tiny_bert.FAMILIES:
                tiny_bert.save(name, directory)
                side = 0
            else:
                tiny_hf.save(name, directory, seed=FLAGS.seed)
                side = FLAGS.side or tiny_hf.side(name)
            found += judged(directory, side, name,
                            with_gradients=FLAGS.gradients is not False, **options)
    wrong = sum(not f['good'] for f in found)
    print(f'{len(found)} comparisons, {wrong} above the bar')
    states = [f for f in found if 'equal' not in f and 'norm_rel_diff' not in f]
    print(' '.join(f'{key}={max((f[key] for f in states), default=float("nan")):.2e}'
                   for key in ('max_abs_diff', 'max_rel_diff')))
    if FLAGS.out:
        facts = dict(dtype=FLAGS.dtype, device=jax.devices()[0].device_kind, comparisons=found)
        Path(FLAGS.out).write_text(json.dumps(facts, indent=1) + '\n')
    sys.exit(int(wrong > 0 or not found))


if __name__ == '__main__':
    flags.DEFINE_string('checkpoint', None, 'directory of a checkpoint instead of tiny models')
    flags.DEFINE_list('models', [*tiny_hf.NAMES, *tiny_bert.FAMILIES], 'tiny models')
    flags.DEFINE_integer('seed', 0, 'of the tiny models')
    flags.DEFINE_integer('side', None, 'pixels of an image side')
    flags.DEFINE_enum('dtype', 'float32', ['float32', 'bfloat16'], 'of both sides')
    flags.DEFINE_float('bar', None, f'largest difference, absolute for tiny models ({TINY_BAR}), '
                                    f'relative to RMS for checkpoints ({BAR})')
    flags.DEFINE_integer('steps', 32, 'tokens to decode, 0: none')
    flags.DEFINE_bool('gradients', None, 'compare gradients; by default of tiny models')
    flags.DEFINE_string('out', None, 'JSON file to write')
    flags.DEFINE_bool('write_golden', False, 'write tests/models/hf/golden and exit')
    app.run(main)
