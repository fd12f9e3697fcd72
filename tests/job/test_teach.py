"""Stage teach: its parameters and loss, the gate, and runs with an open and a closed gate."""

import copy
import json
from dataclasses import replace
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax.traverse_util import unflatten_dict
from scipy.special import log_softmax

from tests import tiny_stages
from tests.job import test_job
from tpad_jax import config as base, losses
from tpad_jax.data.sessions import Rows
from tpad_jax.distributed import devices
from tpad_jax.evaluation import scorers
from tpad_jax.features import store
from tpad_jax.job import gate, job
from tpad_jax.models import outputs
from tpad_jax.mutual_information.critics import Critic
from tpad_jax.training import step as step_lib
from tpad_jax.types import Batch

WAY = devices.choose('jit', 1, 1).own


@pytest.fixture(scope='module')
def taught():
    """The smallest T that reads an item as one token and ranks by cosines, and a batch."""
    spec, params, catalogue = tiny_stages.model()
    width = spec.transfer.features
    spec = replace(spec, transfer=spec.transfer.clone(whole=True),
                   critics=(('distil', Critic('cosine', width)),))
    params = {path: x for path, x in params.items() if not path.startswith('critic/')} | {
        'critic/distil/log_scale': jnp.float32(1.5)}
    catalogue = {name: x for name, x in catalogue.items() if name != 'r'} | {
        'popularity': jnp.arange(1.0, tiny_stages.V + 2)}
    config = copy.deepcopy(tiny_stages.make_config())
    config.stage.teach.update(optimiser='sgd', learning_rate=0.1, weight_decay=0.0)
    batch = Batch.of(next(tiny_stages.draw('transfer')))
    return spec, params, catalogue, config, batch


def test_teach_is_a_softmax_over_the_warm_catalogue_and_trains_no_base(taught):
    """The loss equals numpy's from p and r. A step trains T and A alone."""
    spec, params, catalogue, config, batch = taught
    stage = step_lib.make_spec(config, 'teach', spec, seed=5)
    state = step_lib.start(stage, params, config.stage.teach.train)
    step = jax.jit(lambda *args: step_lib.train_step(*args, spec=stage, axis=None))
    new, logged = step(state, batch, catalogue)
    out = outputs.forward(spec, unflatten_dict(params, sep='/'), batch, catalogue,
                          frozenset({'p', 'teach.z'}), frozenset({'r'}))
    r, p = np.float64(out['teach.z'][:, :-1]), np.float64(out['p'])
    cosine = p / np.linalg.norm(p, axis=-1, keepdims=True) @ r.T
    warm, count = np.asarray(catalogue['warm']), np.asarray(catalogue['popularity'], np.float64)
    np.testing.assert_allclose(np.linalg.norm(r, axis=1), np.exp(1.5), rtol=1e-4)
    shares = log_softmax(np.where(warm, cosine + np.log(count), -np.inf), axis=-1)
    at = np.nonzero(np.asarray(batch.items))
    own = shares[(*at, np.asarray(batch.next)[at])]
    assert logged['loss'] == pytest.approx(-own.mean(), rel=1e-4)
    mean = np.log(count[warm]).mean()  # of the cold items, which are scored
    np.testing.assert_allclose(out['teach.z'][:, -1], np.where(warm, np.log(count), mean),
                               rtol=1e-5)
    roots = {path.split('/')[0] for path in new.params}
    assert roots == {'lora', 'transfer', 'disentangle', 'adapter', 'critic'}
    assert not any(path.startswith(('lora/knowledge', 'lora/distil')) for path in new.params)
    for path in 'adapter/linear/kernel', 'transfer/into_0/kernel', 'lora/transfer/':
        moved = [p for p in new.params if p.startswith(path)]
        assert moved, path
        assert all(np.abs(new.params[p] - params[p]).max() > 0 for p in moved), path


def test_scores_of_the_teacher_are_those_it_trains_by(taught):
    """The scorer's rows, its ranks and the loss agree; a position sees no later item."""
    spec, params, catalogue, _, batch = taught
    tree = unflatten_dict(params, sep='/')
    scorer = scorers.transfer_scorer(spec, WAY, frozenset({'r'}))(tree, catalogue)
    items, last = np.asarray(batch.items), np.asarray(batch.last)
    out = outputs.forward(spec, tree, batch, catalogue, frozenset({'teach.h', 'teach.z'}),
                          frozenset({'r'}))
    expected = out['teach.h'][np.arange(len(items)), last] @ out['teach.z'].T
    scores = scorer(items)
    np.testing.assert_allclose(scores[:, 1:], expected[:, 1:], rtol=1e-4, atol=1e-4)
    target = np.asarray(batch.target)
    above, _ = scorer.ranks(items, target)
    np.testing.assert_array_equal(
        above, (scores[:, 1:] > scores[np.arange(len(items)), target][:, None]).sum(1))
    np.testing.assert_allclose(
        scorer(np.where(np.arange(items.shape[1]) < 1, items, 0))[:, 1:],
        (out['teach.h'][:, 0] @ out['teach.z'].T)[:, 1:], rtol=1e-4, atol=1e-4)


def test_soft_targets_against_torch():
    """The value and the gradient of kl_div over the whole catalogue; none for the teacher."""
    rng = np.random.default_rng(0)
    names = dict(h=(4, 6), z=(9, 6), taught=(4, 3), table=(9, 3))
    out = {name: rng.normal(size=shape).astype(np.float32) for name, shape in names.items()}

    def fn(out):
        return losses.soft_next_item(out, None, teacher='taught', teacher_items='table',
                                     temperature=2.0)

    slopes = jax.grad(lambda out: fn(out).sum())(out)
    there = {name: torch.tensor(x, requires_grad=True) for name, x in out.items()}
    own, known = (torch.log_softmax(there[h] @ there[z][1:].T / 2, 1)
                  for h, z in (('h', 'z'), ('taught', 'table')))
    value = 4 * torch.nn.functional.kl_div(own, known.detach(), reduction='none',
                                           log_target=True).sum(1)
    value.sum().backward()
    np.testing.assert_allclose(fn(out), value.detach(), rtol=1e-4)
    for name in 'h', 'z':
        np.testing.assert_allclose(slopes[name], there[name].grad, rtol=1e-3, atol=1e-5)
    assert not np.asarray(slopes['taught']).any()
    assert not np.asarray(slopes['table']).any()


@pytest.mark.parametrize(('rule', 'is_open'), [(1.0, False), (9.0, True), (None, True)])
def test_the_gate_closes_on_a_teacher_below_a_rule(monkeypatch, rule, is_open):
    rng = np.random.default_rng(0)
    rows = Rows(*np.ones((2, 50, 1), np.int32), rng.integers(1, 21, 50), np.arange(50))
    monkeypatch.setitem(gate.stages.ENTRIES, 'teach', SimpleNamespace(
        scorer=lambda *_: lambda *_: lambda items: rng.normal(size=(len(items), 21))))
    of = SimpleNamespace(config=base.get_config(), data=SimpleNamespace(num_items=20), valid=rows,
                         spec=None, devices=WAY, nested=dict, catalogue={},
                         record={'valid': {'hit@20': 0.1}})
    of.devices = SimpleNamespace(own=WAY)
    rules = {} if rule is None else {
        'markov': SimpleNamespace(valid={'nll': rule}), 'pop': SimpleNamespace(valid={'nll': 99.0})}
    found = gate.judge(of, rules).facts['gate']
    assert (found['open'], found['rule']) == (is_open, rule and 'markov')
    assert found['nll'] == pytest.approx(np.log(20), abs=0.1)  # of noise, calibrated
    assert ('it is distilled from' in found['text']) is is_open


def test_nothing_learns_from_a_teacher_behind_a_closed_gate():
    c = base.get_config()
    c.update_from_flattened_dict(base.TAUGHT | {'losses.soft.weight': 0.5})
    closed = gate.without_distillation(c)
    assert not closed.stage.transfer.steps
    left = {stage: {spec.name for spec in step_lib.stage_losses(closed, stage)}
            for stage in ('teach', 'recommend', 'joint')}
    assert left == {'teach': {'teach'}, 'recommend': {'next_item'},
                    'joint': {'next_item', 'gen_knowledge'}}
    assert c.stage.transfer.steps  # a copy was changed


@pytest.mark.slow
def test_runs_behind_an_open_and_a_closed_gate(base_dir, tmp_path, monkeypatch):
    """Open: T is in the results, and a killed run resumes bit by bit. Closed: r are k."""
    c = test_job.changed(test_job.make_config(base_dir), **base.TAUGHT)
    c = test_job.changed(
        c, baselines='markov', experts='', diagnostics=0, losses__soft__weight=0.5,
        stages='knowledge,teach,transfer,recommend', stage__knowledge__steps=0,
        stage__transfer__steps=2,
        stage__transfer__eval_every=0, stage__teach__batch_size=16, stage__teach__steps=8,
        stage__teach__eval_every=4, model__codes=(2, 4), model__words=True,
        model__recommend='k,r,codes')
    c.rivals = {}
    rule = SimpleNamespace(valid={'nll': 99.0})
    monkeypatch.setattr(gate, 'judge', lambda of, _, judge=gate.judge: judge(of, {'markov': rule}))
    with test_job.Recorded() as params:
        whole = job.run(c, tmp_path / 'whole')
    resumed, stopped, _ = test_job.run_through(c, tmp_path / 'resumed', {'teach': (5, 'kill')})
    assert stopped == 1
    for stage in 'teach', 'recommend':
        for path, x in params[stage].items():
            np.testing.assert_array_equal(x, resumed[stage][path], f'{stage}: {path}')
    teacher = whole['models']['teacher']
    assert teacher['test'].keys() == whole['models']['tpad']['test'].keys()
    rule.valid['nll'] = 0.5
    closed = job.run(c, tmp_path / 'closed')['models']['teacher']['gate']
    assert not closed['open']
    assert closed['text'] in (tmp_path / 'closed/report/index.html').read_text()
    results = [json.loads((tmp_path / run / 'results.json').read_text())
               for run in ('whole', 'closed')]
    assert [{'transfer', 'soft'} & {*x['losses'], *x['losses']['recommend']} for x in results] == [
        {'transfer', 'soft'}, set()]
    k, r, other = (np.float64(store.read(tmp_path / run / 'features' / stage, row))[1:].reshape(
        40, -1) for run, stage, row in (('closed', 'knowledge', 'k'), ('closed', 'transfer', 'r'),
                                        ('whole', 'transfer', 'r')))
    k *= np.sqrt(k.shape[1] / (k**2).sum(axis=1, keepdims=True))
    np.testing.assert_allclose(r, k, rtol=1e-3, atol=1e-4)
    assert np.abs(other - k).max() > 1e-2
