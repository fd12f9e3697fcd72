"""Matrix products: the MLLM's at XLA's default precision, all others at config.precision."""

import inspect
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from tests import tiny_stages as tiny
from tpad_jax.config import get_config
from tpad_jax.core.precision import PRECISIONS
from tpad_jax.distributed import devices as devices_lib
from tpad_jax.errors import InputError
from tpad_jax.evaluation import scorers
from tpad_jax.job import validate
from tpad_jax.models.builtin.mllm import MLLM
from tpad_jax.mutual_information import bounds, estimator
from tpad_jax.mutual_information.critics import GaussianQ, Score
from tpad_jax.training import step as step_lib
from tpad_jax.types import Batch

PRODUCTS = ('dot_general', 'conv_general_dilated')
# flax names the scope of the base MLLM's methods; both readers call them
INSIDE = ('base.', 'base/')


def products(jaxpr, scope=''):
    """(scope, precision of both operands) of every product in a jaxpr and those inside it."""
    for equation in jaxpr.eqns:
        where = f'{scope}/{equation.source_info.name_stack}'
        if equation.primitive.name in PRODUCTS:
            yield where, equation.params['precision']
        for inner in jaxprs_in_params(equation.params):
            yield from products(inner, where)


def test_products_of_a_train_step():
    spec, params, catalogue = tiny.model()
    config = tiny.make_config()
    made = step_lib.make_spec(config, 'transfer', spec, seed=5)
    devices = devices_lib.choose('jit', 1, precision='tensorfloat32')
    batch = Batch.of(next(tiny.draw('transfer')))
    step = devices.lift(partial(step_lib.train_step, spec=made))
    state = step_lib.start(made, params, config.stage.transfer.train)
    traced = step.trace(state, batch, catalogue)
    inside, outside = [], []
    for where, used in products(traced.jaxpr.jaxpr):
        (inside if any(name in where for name in INSIDE) else outside).append((where, used))
    assert len(inside) > 20
    assert len(outside) > 20
    assert {used for _, used in inside} == {(jax.lax.Precision.DEFAULT,) * 2}
    assert {used for _, used in outside} == {(jax.lax.Precision.HIGH,) * 2}


def test_a_setting_of_the_process_reaches_the_mllm():
    """`benchmarks.parity` compares on any device in full float32."""
    model, tokens = MLLM(**tiny.SIZES), jnp.ones((2, 3), jnp.int32)

    def read(m):
        return m(m.say(tokens, tokens > 0))

    params = jax.eval_shape(partial(model.init, method=read), jax.random.key(0))
    with jax.default_matmul_precision('highest'):
        for apply in (model.apply, devices_lib.compiled(model.apply, precision='bfloat16',
                                                        static_argnames='method')):
            found = {used for _, used in products(jax.make_jaxpr(
                partial(apply, method=read))(params).jaxpr)}
            assert found == {(jax.lax.Precision.HIGHEST,) * 2}


@pytest.mark.parametrize('how', ['jit', 'pmap', 'shard_map'])
def test_every_way_of_spreading_a_step_sets_the_precision(how):
    devices = devices_lib.choose(how, 1)
    lifted = devices.lift(lambda state, batch, catalogue, *, axis: batch @ catalogue)
    batch = jnp.ones((4, 3)) if how != 'pmap' else jnp.ones((1, 4, 3))
    assert lifted.lower({}, batch, jnp.ones((3, 2))).as_text().count('[HIGHEST, HIGHEST]') == 1


def test_products_of_the_ranks(monkeypatch):
    texts, lift = [], devices_lib.Devices.lift

    def recorded(self, step):
        lifted = lift(self, step)

        def call(*args):
            texts.append(lifted.lower(*args).as_text())
            return lifted(*args)

        return call

    monkeypatch.setattr(devices_lib.Devices, 'lift', recorded)
    rank = scorers.ranker(lambda weights, z, items: z[items[:, 0]] @ weights,
                               devices_lib.choose('jit', 1))
    rank(jnp.eye(3), jnp.ones((9, 3)), np.ones((4, 2), np.int32), np.ones(4, np.int32))
    assert texts[0].count('dot_general') == texts[0].count('[HIGHEST, HIGHEST]') > 1


def test_products_of_an_estimate():
    q, x = GaussianQ(4), jnp.ones((12, 2))
    settings = estimator.Settings(batch=4, steps=2)
    texts = [estimator.fit.lower(jax.random.key(0), {'train': (x, x), 'check': (x, x)},
                                 'likelihood', q, settings).as_text()]
    score = Score(q, q.init(jax.random.key(0), x, x)['params'])
    texts.append(bounds.off_diagonal.lower(score, x, x, jnp.arange(12), 'score').as_text())
    for text in texts:
        assert text.count('dot_general') == text.count('[HIGHEST, HIGHEST]') > 0


def test_the_default_is_float32_and_others_are_refused():
    config = get_config()
    assert config.precision == 'float32'
    assert inspect.signature(devices_lib.choose).parameters['precision'].default == 'float32'
    for precision in PRECISIONS:
        config.precision = precision
        validate.check(config)
    config.precision = 'float16'
    with pytest.raises(InputError, match=r"config\.precision='float16'"):
        validate.check(config)
