"""No branch by a device's own data where the compiler adds communication to it: devices would wait.

tests/training/test_step.py trains so on eight devices; this names the part that branches.
"""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec

from tpad_jax.distributed import devices as devices_lib
from tpad_jax.models.sessions import sr_gnn
from tpad_jax.nn.softmax import log_partition

ROWS, N, D, V = 8, 4, 8, 20
ITEMS = jnp.ones((ROWS, N), jnp.int32)


def softmax(x):
    return log_partition(x[:, 0], jnp.ones((V + 1, D)), jnp.ones(V + 1, bool))


def session_gnn(x):
    model = sr_gnn.SessionGNN(max_length=N)
    items = ITEMS[:len(x)]
    return model.apply(model.init(jax.random.key(0), x, items), x, items).sum(axis=1)


@pytest.mark.parametrize('part', [softmax, session_gnn])
@pytest.mark.parametrize(('model_shards', 'branches'), [(1, True), (2, False)])
def test_branches_are_left_out_where_parameters_are_sharded(
        monkeypatch, part, model_shards, branches):
    monkeypatch.setattr(sr_gnn, 'FEW', 0)  # as a large batch
    mesh, rows = devices_lib.choose('shard_map', 8, model_shards).mesh, PartitionSpec('data')
    lifted = jax.shard_map(part, mesh=mesh, in_specs=rows, out_specs=rows, axis_names={'data'},
                           check_vma=False)
    traced = jax.jit(jax.grad(lambda x: lifted(x).sum())).trace(jnp.ones((ROWS, N, D)))
    assert ('cond[' in str(traced.jaxpr)) == branches
