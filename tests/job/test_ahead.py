"""`--plan`: what it prints and refuses, and that it leaves nothing behind."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from configs import amazon
from tests import tiny_hf
from tpad_jax.errors import InputError
from tpad_jax.job import ahead

ROOT = Path(__file__).parents[2]
GIB = 2**30


def planned(said='', items=None, variant='tiny', **changes):
    c = amazon.get_config(variant)
    c.update_from_flattened_dict(changes)
    return ahead.lines(c, '/nowhere', said, items)


def part(line, name):
    return float(re.search(rf'{name} ([\d.]+)', line)[1])


@pytest.mark.slow
def test_it_is_printed_and_nothing_else_happens(tmp_path):
    config = f'--config={ROOT / "configs" / "amazon.py"}:tiny'
    run = subprocess.run([sys.executable, ROOT / 'launch.py', config, '--plan=v5e-8',
                          '--config.model_shards=2'], cwd=tmp_path, text=True, check=False,
                         capture_output=True)
    assert run.returncode == 0, run.stderr
    first, *stages = run.stdout.splitlines()
    assert first == ('Planned for 80 items (the planted catalogue, seed 0), prefixes of 7 and 8 '
                     'device(s) of 15.75 GiB; nothing was computed.')
    assert [line.split()[2] for line in stages] == ['knowledge,', 'transfer,', 'recommend,',
                                                    'joint,']
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(('said', 'found'), [
    ('', (None, None)), ('true', (None, None)), ('v5e-8', (round(15.75 * GIB), 8)),
    ('V6E-16', (round(31.25 * GIB), 16)), ('24gib-1', (24 * GIB, 1)),
    ('79.5gib-8', (round(79.5 * GIB), 8))])
def test_devices_that_are_not_here(said, found):
    assert ahead.target(said) == found


@pytest.mark.parametrize('said', ['v5e', 'v9-8', '24-8', 'gib-8', '1.2.3gib-8', 'v5e-0', '8'])
def test_other_devices_are_refused(said):
    with pytest.raises(InputError, match=rf'--plan={re.escape(said)} names no devices.*24gib-8'):
        ahead.target(said)


@pytest.fixture
def ids(tmp_path):
    """A file of ready-made sessions over seven items."""
    items, offsets = np.tile(np.arange(1, 8), 20), np.arange(0, 141, 7)
    np.savez(tmp_path / 'ids.npz', train_items=items, train_offsets=offsets, test_items=items,
             test_offsets=offsets)
    return str(tmp_path / 'ids.npz')


def test_a_catalogue_that_is_too_large_says_what_to_turn(ids):
    alone = {'data.npz': ids, 'stages': 'recommend', 'model.recommend': '', 'rivals': {}}
    items = 2 * 10**6
    assert len(planned('4gib-1', 7, '', **alone)) == 2
    _, line, warning = planned('4gib-1', items, '', **alone)
    # a table with its gradient and moments, and one byte and one number for each row
    assert part(line, 'trained') == pytest.approx((items + 1) * 128 * 4 / GIB, abs=0.005)
    assert part(line, 'moments') == pytest.approx((items + 1) * 128 * 12 / GIB, abs=0.005)
    assert part(line, 'catalogue') == pytest.approx((items + 1) * 5 / GIB, abs=0.005)
    assert warning.startswith('Warning: recommend may not fit into 4.00 GiB. With one change it '
                              'is config.losses.next_item.chunk=4096: ')
    assert 'config.stage.recommend.batch_size=256' in warning
    chunked = planned('4gib-1', items, '', **alone, **{'losses.next_item.chunk': 4096})[1]
    assert f'next_item.chunk=4096: {re.search("device: ([0-9.]+)", chunked)[1]}' in warning


@pytest.mark.slow
def test_a_checkpoints_weights_are_not_read(tmp_path):
    directory = tiny_hf.save('qwen3_vl', tmp_path)
    for file in Path(directory).glob('*.safetensors'):
        file.unlink()
    found = planned('24gib-2', 5000, 'qwen3vl_2b', **{
        'mllm.checkpoint': str(directory), 'mllm.image_size': 32, 'model_shards': 2})
    assert found[0].startswith('Planned for 5000 items (--plan_items), prefixes of 20 ')
    assert [line.split()[2] for line in found[1:]] == ['knowledge,', 'transfer,', 'recommend,']


def test_what_is_said_of_data(tmp_path, ids):
    c = amazon.get_config()
    c.data.raw_dir = 'x'
    with pytest.raises(InputError, match=r'prepared data yet.*--plan_items=N'):
        ahead.facts(c, tmp_path, None)
    with pytest.raises(InputError, match='--plan_items=0 must be 1'):
        ahead.facts(c, tmp_path, 0)
    c.data.update(raw_dir='', npz=ids)
    assert ahead.facts(c, tmp_path, None) == (7, (), 20, ids)
