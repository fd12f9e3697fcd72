"""A run that begins from another one: what it takes over, how it resumes, what is refused."""

import shutil

import numpy as np
import pytest

from tests.job.test_job import Killed, Recorded, changed, make_config, stops
from tpad_jax.errors import InputError
from tpad_jax.features import store
from tpad_jax.job import job
from tpad_jax.training import checkpoint

AS_IT_IS = {f'stage.{stage}.steps': 0 for stage in ('knowledge', 'teach', 'transfer')}


@pytest.fixture(scope='module')
def base(base_dir):
    fewer = {f'losses__{name}__weight': 0.0  # parameters that nothing moves are taken over, too
             for name in ('gen_transfer', 'disentangle', 'club_fit', 'discrepancy')}
    return changed(make_config(base_dir), save_every=100, **fewer)


@pytest.fixture(scope='module')
def first(base, tmp_path_factory):
    """A finished run without a recommender, and what its stages trained."""
    workdir = tmp_path_factory.mktemp('first') / 'run'
    config = changed(base, stages='knowledge,teach,transfer', baselines='', diagnostics=0)
    with Recorded() as params:
        job.run(config, workdir)
    return config, workdir, params


@pytest.mark.slow
def test_a_catalogue_is_read_by_the_other_run_as_it_is(first, tmp_path):
    """With equal items, rows are those of the other run, bit by bit; other items have others.

    Sessions of the new catalogue are not read, so one is enough.
    """
    config, origin, _ = first
    for seed in 0, 1:
        config = changed(config, begin_from=str(origin), **AS_IT_IS)
        config.data.planted.update(train=1, seed=seed, law_seed=0)
        results = job.run(config, tmp_path / str(seed))
        assert list(results['models']) == ['teacher']  # T of the other run alone
        for stage, row in ('knowledge', 'k'), ('transfer', 'r'):
            ours, theirs = (store.read(run / 'features' / stage, row)
                            for run in (tmp_path / str(seed), origin))
            assert (ours == theirs).all() == (seed == 0), row


@pytest.mark.slow
def test_stages_start_from_the_other_run_and_resume(first, tmp_path):
    config, origin, trained = first
    config = changed(config, begin_from=str(origin), stages='knowledge,transfer,recommend',
                     stage__knowledge__steps=0, stage__transfer__steps=4, rivals={}, diagnostics=0,
                     save_every=4, experts='', stage__transfer__learning_rate=0.0,
                     model__lessons=100, model__event_time=True)
    config.data.planted.update(seed=1, law_seed=0)
    with Recorded() as whole:
        job.run(config, tmp_path / 'whole')
    for path, x in whole['transfer'].items():  # a rate of zero moves nothing, so d was not copied
        np.testing.assert_allclose(x, trained['transfer'][path], rtol=1e-6, err_msg=path)
    # the recommender went on from what the other run's T taught it, ids aside, which were at zero
    lessons = checkpoint.chosen_parameters(tmp_path / 'whole' / 'stages' / 'lessons')
    moved = {path: float(np.abs(x - lessons[path]).max()) for path, x in whole['recommend'].items()
             if path in lessons}
    assert moved, lessons.keys()
    assert not any('id' in path.split('/') for path in moved), moved
    assert max(moved.values()) < 0.1, moved  # 0 where no step is better than the lessons
    with stops({'recommend': (5, 'kill')}) as stopping, pytest.raises(Killed):
        job.run(config, tmp_path / 'killed', stopping)
    with Recorded() as resumed:
        job.run(config, tmp_path / 'killed')
    for path, x in whole['recommend'].items():
        np.testing.assert_array_equal(x, resumed['recommend'][path], err_msg=path)
    other = tmp_path / 'other'
    shutil.copytree(origin, other)
    next(other.glob('stages/transfer/*/checksums.json')).write_text('{}')
    with pytest.raises(InputError, match='begin_from was'):
        job.run(changed(config, begin_from=str(other)), tmp_path / 'killed')


@pytest.mark.slow
@pytest.mark.parametrize(('changes', 'message'), [
    ({'begin_from': 'nowhere'}, 'not a finished run'),
    ({'model.lora_rank': 3}, 'of other widths'),
    ({'begin_from': '', 'stages': 'knowledge', 'model.lessons': 100}, 'no stage trains the'),
    ({'model.codes': (2, 4)}, r'model\.codes is False there and \[2, 4\] here'),
    ({'model.lora_alpha': 8.0}, r'model\.lora_alpha is 16\.0 there and 8\.0 here'),
    ({'mllm.tokenizer': 'own', 'mllm.own.vocab': 400}, 'a tokenizer was trained'),
    ({'mllm.base': 'another'}, 'its base has other parameters'),
])
def test_a_run_that_does_not_fit_is_refused(first, tmp_path, changes, message):
    config, origin, _ = first
    if 'mllm.base' in changes:
        changes = {'mllm.base': str(shutil.copytree(config.mllm.base, tmp_path / 'base'))}
        with (tmp_path / 'base' / 'config.json').open('a') as file:
            file.write(' ')  # a file with other bytes
    config = changed(config, **{'begin_from': str(origin)} | changes)
    with pytest.raises(InputError, match=message):
        job.run(config, tmp_path / 'run')
    assert not (tmp_path / 'run' / 'stages').exists()
