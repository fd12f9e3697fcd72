"""Committed checkpoints of every family give torch's committed outputs; no torch is needed.

`python -m benchmarks.parity --write_golden` writes them. What any one part of the models is worth
in these outputs is tested as well: without it they must be off by more than the bar.
"""

import subprocess
import sys
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from tpad_jax.models.hf import load, spec as specs, vlm
from tpad_jax.models.hf.generate import generate
from tpad_jax.nn import linear

GOLDEN = Path(__file__).parent / 'golden'
NAMES = sorted(p.name for p in GOLDEN.iterdir())
BAR = 3e-5
# compiling takes most of the time of programs of this size
jit = partial(jax.jit, compiler_options={'xla_backend_optimization_level': 0})


@cache
def case(name):
    """Spec, parameters and what torch said."""
    spec = specs.read(GOLDEN / name)
    return spec, load.load(GOLDEN / name, spec, dtype='float32'), load_file(
        GOLDEN / name / 'expected.safetensors')


def padded(expected, left):
    """The rows laid out: tokens [B, S], mask [B, S], image, as the model takes them."""
    row = expected['row']
    count = np.bincount(row)
    tokens, mask = np.zeros((2, len(count), count.max()), np.int32)
    for b, n in enumerate(count):
        at = slice(-n, None) if left else slice(n)
        tokens[b, at], mask[b, at] = expected['tokens'][row == b], 1
    return tokens, mask.astype(bool), expected['image']


@cache
def forward(spec, side, every=True):
    """Compiled (params, tokens, mask, image) -> hidden states (or the last layer's), logits."""
    model = vlm.VLM(spec, side)

    def outputs(m, tokens, mask, image):
        stream = m.prompt(tokens, mask, image)
        last = m(stream)
        return stream.x, last, m.logits(last)

    @jit
    def run(params, *given):
        with jax.default_matmul_precision('highest'):
            (first, last, logits), inner = model.apply({'params': params}, *given, method=outputs,
                                                       mutable=['intermediates'])
            each = inner['intermediates']['decoder']['layers']['state'][0]
            hidden = jnp.concatenate([first[None], each[:-1], last[None]])
            return hidden if every else None, logits

    return run


def off(spec, params, expected):
    """How far the logits are from torch's."""
    tokens, mask, image = padded(expected, False)
    _, logits = forward(spec, image.shape[-2], False)(params, tokens, mask, image)
    return np.abs(np.asarray(logits)[mask] - expected['logits']).max()


def test_every_family_is_there():
    found = {specs.read(GOLDEN / name).family for name in NAMES}
    assert found == set(specs.FAMILIES)


@pytest.mark.parametrize('left', [False, True], ids=['right', 'left'])
@pytest.mark.parametrize('name', [  # others have the parts of these three
    pytest.param(name, marks=[pytest.mark.slow] * (name in ('qwen2', 'qwen3', 'idefics3')))
    for name in NAMES])
def test_hidden_states_and_logits_are_torchs(name, left):
    spec, params, expected = case(name)
    tokens, mask, image = padded(expected, left)
    hidden, logits = forward(spec, image.shape[-2])(params, tokens, mask, image)
    hidden = np.asarray(hidden)[:, mask]
    assert hidden.shape == expected['hidden'].shape
    np.testing.assert_allclose(hidden, expected['hidden'], rtol=0, atol=BAR)
    np.testing.assert_allclose(np.asarray(logits)[mask], expected['logits'], rtol=0, atol=BAR)


@pytest.mark.slow
def test_some_tokens_alone():
    """Logits of two tokens a row are torch's; the gradients are those of reading all tokens."""
    spec, params, expected = case('qwen3_vl')
    tokens, mask, image = padded(expected, False)
    last = mask.sum(1) - 1
    at = np.stack([last, last // 2], axis=1)
    model = vlm.VLM(spec, image.shape[-2], remat='full')
    adapter = linear.init(jax.random.key(0), params, rank=2, targets=r'^decoder/.*(q|k|down)$')
    adapter = jax.tree.map(lambda x: x + 0.02, adapter)

    @partial(jit, static_argnums=0)
    def run(few, adapter):
        def outputs(m):
            stream = m.prompt(tokens, mask, image)
            if few:
                return m.logits(m(stream, at=at))
            return m.logits(m(stream))[np.arange(len(at))[:, None], at]

        def logits(adapter):
            return model.apply({'params': params, 'lora': adapter}, method=outputs)

        with jax.default_matmul_precision('highest'):
            torchs = model.apply({'params': params}, method=outputs)
            return torchs, jax.grad(lambda adapter: (logits(adapter) ** 2).sum())(adapter)

    torchs, gradient = run(True, adapter)
    rows = [np.flatnonzero(expected['row'] == b) for b in range(len(at))]
    theirs = np.stack([expected['logits'][row[here]]
                       for row, here in zip(rows, at, strict=True)])
    np.testing.assert_allclose(torchs, theirs, rtol=0, atol=BAR)
    for one, two in zip(*map(jax.tree.leaves, (gradient, run(False, adapter)[1])), strict=True):
        assert np.abs(two).max() > 1e-3
        np.testing.assert_allclose(one, two, rtol=1e-4, atol=1e-4 * np.abs(two).max())


@pytest.mark.slow
@pytest.mark.parametrize('name', ['llama', 'qwen2_vl'])  # for others, test_hf_generate.py
def test_greedy_tokens_are_torchs(name):
    spec, params, expected = case(name)
    given = padded(expected, True)
    model = vlm.VLM(spec, given[2].shape[-2])
    written, _ = generate(model, params, given, steps=expected['written'].shape[1], stop=())
    np.testing.assert_array_equal(written, expected['written'])


def text(**changes):
    return lambda spec: replace(spec, decoder=replace(spec.decoder, **changes))


def vision(**changes):
    return lambda spec: replace(spec, vision=replace(spec.vision, **changes))


def whole(**changes):
    return lambda spec: replace(spec, **changes)


WRONG = {
    'deepstack dropped': ('qwen3_vl', vision(deep=())),
    'one rope coordinate': ('qwen3_vl', text(sections=())),
    'blocks for interleaved': ('qwen3_vl', text(interleaved=False)),
    'no qk-norm': ('qwen3_vl', text(qk_norm=False)),
    'theta of the class': ('qwen3_vl', text(theta=5e5)),
    'text eps': ('qwen3_vl', text(eps=1e-5)),
    'no qkv bias': ('qwen2_vl', text(qkv_bias=False)),
    'no windows': ('qwen2_5_vl', vision(window=0)),
    'the last layer': ('llava', vision(layers=3)),
    'gelu in the tower': ('llava', vision(activation='gelu')),
    'tanh in the projector': ('llava', whole(projector='gelu_pytorch_tanh')),
    'siglip eps': ('llava_onevision', vision(eps=1e-5)),
}
SLOW = 'no qkv bias', 'tanh in the projector', 'siglip eps'


@pytest.mark.parametrize('what', [
    pytest.param(what, marks=pytest.mark.slow if what in SLOW else ()) for what in WRONG])
def test_any_wrong_part_shows(what):
    name, change = WRONG[what]
    spec, params, expected = case(name)
    if what == 'the last layer':
        params = load.load(GOLDEN / name, change(spec), dtype='float32')
    found = off(change(spec), params, expected)
    assert found > 1.5 * BAR, found


WITHOUT_TORCH = """
import sys
from importlib.machinery import PathFinder
real = PathFinder.find_spec
PathFinder.find_spec = staticmethod(lambda n, *a: None if n == 'torch' else real(n, *a))
from tests.models.hf.test_hf_golden import NAMES, case, off
assert off(*case(NAMES[0])) < 3e-5
assert 'torch' not in sys.modules
"""


@pytest.mark.slow
def test_no_torch_is_needed():
    subprocess.run([sys.executable, '-c', WITHOUT_TORCH], check=True, cwd=Path(__file__).parents[3],
                   timeout=300)
