"""Settings of a stage that fit no parameter are refused before any stage is trained."""

import copy
from dataclasses import replace
from types import SimpleNamespace

import pytest

from tests import tiny_stages
from tpad_jax.errors import InputError
from tpad_jax.training import handover, step as step_lib


def check(stage='transfer', clusters=0, **changes):
    model, params, _ = tiny_stages.model()
    config = copy.deepcopy(tiny_stages.make_config())
    config.model.clusters = clusters
    config.losses.clusters.weight = 0.1 * (clusters > 0)
    config.stage[stage].update(changes)
    spec = step_lib.make_spec(config, stage, model, seed=5)
    handover.check_stage(config, stage, spec, params, tiny_stages.V)


@pytest.mark.parametrize(('changes', 'words'), [
    ({'train': '^nothing/'}, r"config\.stage\.transfer: train='\^nothing/': matches no parameter"),
    ({'rates': (('^clubs/', 10.0),)}, r"rates: the pattern '\^clubs/' matches no trained"),
    # it exists, but the stage does not train it
    ({'rates': (('^recommender/', 10.0),)}, r"pattern '\^recommender/' matches no trained"),
    ({'copy': 'lora/knowledges->lora/distil'}, r"transfer\.copy='lora/knowledges->lora/distil'"),
    ({'copy': 'lora/knowledge->lora/distill'}, r"transfer\.copy='lora/knowledge->lora/distill'"),
    ({'clusters': 10**6}, r'config\.model\.clusters=1000000: there are \d+ items'),
])
def test_a_setting_that_fits_nothing_is_refused(changes, words):
    check()
    with pytest.raises(InputError, match=words):
        check(**changes)


def test_rates_of_parameters_that_a_loss_brings_are_not_refused_early():
    model, params, _ = tiny_stages.model()
    config = copy.deepcopy(tiny_stages.make_config())
    spec = step_lib.make_spec(config, 'transfer', model, seed=5)
    mine = SimpleNamespace(name='mine', module=True, needs=frozenset())
    spec = replace(spec, losses=(*spec.losses, mine))
    config.stage.transfer.rates = (('^loss/mine/kernel', 2.0),)
    handover.check_stage(config, 'transfer', spec, params, tiny_stages.V)
