"""Tiny random models of every family against torch, as benchmarks/parity.py compares them."""

from dataclasses import replace
from types import SimpleNamespace

import jax
import numpy as np
import pytest

pytest.importorskip('torch')

from benchmarks import parity, parity_torch
from tests import tiny_hf
from tpad_jax.models.hf import load, spec as specs
from tpad_jax.models.hf.vlm import VLM


@pytest.mark.slow
@pytest.mark.parametrize(('name', 'gradients'), [
    ('llava', True), ('qwen2_5_vl', True), ('qwen3_vl_tied', True), ('llava_qwen2', False),
    ('llava_qwen3', False)])
def test_states_and_gradients(name, gradients, tmp_path):
    """Gradients by each kind of tower, and variants that have no golden file."""
    tiny_hf.save(name, tmp_path, seed=1)
    found = parity.judged(tmp_path, tiny_hf.side(name), name, dtype='float32', steps=0,
                          with_gradients=gradients)
    wrong = [f for f in found if not f['good']]
    assert not wrong, wrong
    assert any(f['what'].startswith('gradient of') for f in found) == gradients


@pytest.mark.slow
@pytest.mark.parametrize(('name', 'side'), [  # test_hf_vision compares the towers at more sizes
    ('qwen2_5_vl', 80), ('qwen3_vl', 16)])
def test_other_sizes_of_images(name, side, tmp_path):
    """Beside torch in float64: in float32 its own rounding comes to 2.8e-5 in one of these."""
    tiny_hf.save(name, tmp_path, seed=2)
    spec = specs.read(tmp_path)
    # on the right: a row that attends to nothing, as padding on the left does, is NaN in float64
    given = parity_torch.prompt(spec, side, left=False, words=parity_torch.words(tmp_path, spec),
                                images=tiny_hf.images(3, side))
    there = parity_torch.load(tmp_path, 'float64')
    hidden, logits, _ = parity_torch.run(
        there, parity_torch.keywords(there, tmp_path, given, spec), spec)
    params = load.load(tmp_path, spec, dtype='float32')
    found = parity.forward(VLM(spec, side))(params, *parity._arrays(given))
    for here, expected in ((np.stack(found[0]), hidden), (np.asarray(found[1])[None],
                                                          logits[None])):
        assert np.abs(here - expected)[:, given.mask].max() <= parity.TINY_BAR


def test_rows_differ_in_images_and_length(tmp_path):
    tiny_hf.save('llava', tmp_path)
    spec = specs.read(tmp_path)
    words, images = parity_torch.words(tmp_path, spec), tiny_hf.images(3, 32)
    left, right = (parity_torch.prompt(spec, 32, left=x, words=words, images=images)
                   for x in (True, False))
    held = (right.tokens == spec.image_id).sum(1)
    np.testing.assert_array_equal(held, [0, 16, 32])
    assert not left.mask[:2, 0].any()
    assert not right.mask[:2, -1].any()
    assert left.mask[:, -1].all()
    assert right.mask[:, 0].all()
    np.testing.assert_array_equal(left.tokens[left.mask], right.tokens[right.mask])


def test_a_difference_is_above_the_bar(tmp_path, monkeypatch):
    tiny_hf.save('llava', tmp_path)
    read = specs.read

    def other(directory):
        spec = read(directory)
        return replace(spec, decoder=replace(spec.decoder, theta=1e4))

    monkeypatch.setattr(specs, 'read', other)
    found = parity.judged(tmp_path, 32, 'llava', dtype='float32', steps=0, with_gradients=False)
    assert {f['what'] for f in found if f['good']} == {'inputs'}


@pytest.mark.parametrize(('name', 'bar', 'steps', 'status'), [
    ('llava', 1e-9, 0, 1), pytest.param('qwen2_vl', 0.01, 2, 0, marks=pytest.mark.slow)])
def test_the_commands_status_is_by_the_bar(name, bar, steps, status, tmp_path, monkeypatch, capsys):
    tiny_hf.save(name, tmp_path)
    out = tmp_path / 'parity.json'
    monkeypatch.setattr(parity, 'FLAGS', SimpleNamespace(
        write_golden=False, checkpoint=str(tmp_path), side=tiny_hf.side(name), dtype='float32',
        steps=steps, bar=bar, gradients=None, out=str(out)))
    monkeypatch.setattr(jax.config, 'update', lambda *_: None)
    with pytest.raises(SystemExit) as left:
        parity.main([])
    assert left.value.code == status
    assert 'max_abs_diff=' in capsys.readouterr().out
    assert out.is_file()
