"""A small batch and all outputs, made of random numbers: what `check` tries a loss on.

Names, shapes and dtypes come from the table of outputs. Every size differs from the others, so that
a mistaken axis shows.
"""

import flax
import jax
import jax.numpy as jnp
import numpy as np

from tpad_jax.models.outputs import OUTPUTS
from tpad_jax.models.sessions import repeats
from tpad_jax.mutual_information import critics
from tpad_jax.types import Batch

# rows, positions, items, width, modalities, text tokens, vocabulary, replicas
B, N, V, D, M, T, W, REPLICAS = 16, 3, 9, 4, 2, 5, 11, 8
SIZES = {'B': B, 'N': N, 'V+1': V + 1, 'D': D, 'M D': M * D, 'T': T, 'P': T, 'W': W, 'C': D,
         'width': D}  # P = T: an image has as many tokens as a text
# Outputs whose values mean something: `named` and `make` compute them.
SPECIAL = {'items', 'next', 'repeat', 'image.there', 'text.there', 'warm', 'popularity', 'cluster',
           'club', 'teacher.vocabulary'}
CRITICS = {'align': critics.Critic('separable', 6), 'distil': critics.Critic('bilinear', 6)}
CLUB = critics.GaussianQ(6)
SCORES = {'club': CLUB} | {f'critic.{name}': critic for name, critic in CRITICS.items()}


def entries(is_table, *dtypes) -> dict[str, tuple[int, ...]]:
    """Shapes of the outputs that random numbers can replace: {name: shape}."""
    return {name: tuple(SIZES[size] for size in entry.shape.split(', '))
            for name, entry in OUTPUTS.items() if name[0] != '_' and name not in SPECIAL
            and entry.is_table == is_table and entry.dtype in dtypes}


def make(seed):
    """Make a batch and raw rows; some rows are padded, among them all of one replica."""
    rng = np.random.default_rng(seed)
    length = rng.integers(1, N + 1, B)
    real = np.arange(N) < length[:, None]
    valid = np.ones(B, bool)
    valid[[2, 3, 7]] = False  # rows 2 and 3 are the whole of one replica
    items, following = (np.where(real, rng.integers(1, V + 1, (B, N)), 0) for _ in range(2))
    batch = Batch(items, following, rng.integers(1, V - 1, B), valid, np.arange(B))
    batch = jax.tree.map(lambda x: x if x is valid else x.astype(np.int32), batch)
    raw = {name: rng.normal(size=shape).astype(np.float32)
           for name, shape in entries(False, 'float32').items()}
    raw['repeat'] = np.asarray(repeats.shifts(rng.normal(size=N), batch.items), np.float32)
    for name, shape in entries(False, 'int32').items():  # tokens, -1 pads
        words = rng.integers(0, W, shape)
        words[np.arange(T) >= rng.integers(1, T + 1, (B, 1))] = -1
        raw[name] = words.astype(np.int32)
    raw |= {name: rng.random(shape) < 0.5 for name, shape in entries(False, 'bool').items()}
    return batch, raw


def make_params(seed):
    """Make the replicated parameters: a matrix per output of rows, tables, critics and q."""
    rng = np.random.default_rng(seed)
    one, two = jnp.ones((1, D)), jnp.ones((1, M * D))
    inputs = {'critic.align': (two, one), 'club': (one, one), 'critic.distil': (one, one)}
    shapes = {n: jax.eval_shape(SCORES[n].init, jax.random.key(0), *x) for n, x in inputs.items()}
    shapes |= {n: jnp.ones(shape) for n, shape in entries(True, 'float32').items()}
    params = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32) * 0.7, shapes)
    for name, (_, *sizes) in entries(False, 'float32').items():
        width = sizes[-1] if sizes else 1
        mixing = np.eye(width) + 0.3 * rng.normal(size=(width, width))
        params[name] = mixing.astype(np.float32)
    return params


def named(params, raw, batch):
    """Compute the outputs by name, each from the replicated parameters and this replica's rows."""
    out = {n: (x @ params[n] if x.ndim > 1 else x * params[n][0, 0]) if n in params else x
           for n, x in raw.items()}
    out |= {n: params[n] for n in entries(True, 'float32')}
    for n, shape in entries(True, 'bool', 'int32').items():
        numbers = jnp.arange(np.prod(shape)).reshape(shape)
        out[n] = numbers % 2 > 0 if OUTPUTS[n].dtype == 'bool' else numbers % D
    warm = jnp.arange(V + 1) < V - 1  # the last two items are cold; row 0 is padding
    out |= {'items': batch.items, 'next': batch.next, 'warm': warm.at[0].set(False),
            'teacher.vocabulary': params['vocabulary'], 'cluster': jnp.arange(V + 1) % D,
            'popularity': 1.0 + jnp.arange(V + 1) % 3}
    # which tokens exist: of an image all or none, in one row of three
    out['text.there'] = raw['describe.tokens'] >= 0
    out['image.there'] = out['text.there'] & (batch.row % 3 > 0)[:, None]
    return out | {n: critics.Score(c, params[n]['params']) for n, c in SCORES.items()}


def predicted(params, raw):
    """Replace p by what q expects of c: upper bounds are positive there, and pull."""
    c = raw['c'].reshape(-1, D) @ params['c']
    half, centre, _ = np.split(np.asarray(CLUB.apply(params['club'], c, c, factors=True)[0]),
                               [D, 2 * D], axis=1)
    p = centre / (-2 * half) @ np.linalg.inv(params['p'])
    return raw | {'p': p.reshape(raw['p'].shape).astype(np.float32)}


def garbled(batch, raw, seed):
    """Put other numbers into padded rows, positions and tokens."""
    rng, rows = np.random.default_rng(seed), batch.valid[:, None]
    other = Batch(items=np.where(rows, batch.items, 4), next=np.where(rows, batch.next, 5),
                  target=np.where(batch.valid, batch.target, 6), valid=batch.valid,
                  row=np.where(batch.valid, batch.row, 0))
    garbage = {}
    for name, x in raw.items():
        tokens = raw.get(f'{name}.tokens', raw['describe.tokens']) >= 0
        _, size, *_ = f'{OUTPUTS[name].shape}, , '.split(', ')
        real = rows & {'N': batch.mask, 'T': tokens, 'P': tokens}.get(size, rows)
        if x.dtype == np.float32:
            real = np.expand_dims(real, (*range(2, x.ndim),)) if x.ndim > 1 else real[:, 0]
            garbage[name] = np.where(real, x, 20 * rng.normal(size=x.shape)).astype(np.float32)
        else:  # tokens of a valid row end where they end
            garbage[name] = np.where(rows, x, np.asarray(3, x.dtype))
    return other, garbage


def numbered(raw):
    """Write the number of each position, b N + n, into the first place of its features."""
    number = np.arange(B * N, dtype=np.float32).reshape(B, N, 1)
    return {n: np.concatenate([number, x[..., 1:]], -1) for n, x in raw.items()
            if OUTPUTS[n].shape.startswith('B, N, ') and n not in SPECIAL}


@flax.struct.dataclass
class LookUp:
    """A critic that looks up its scores [B N, B N] by the numbers of `numbered`.

    The scores are NaN where the features no longer carry the numbers.
    """

    scores: jax.Array

    def __call__(self, x, y):
        """Score all pairs: x [A, I], y [G, J] -> [A, G]."""
        i, j = (a[:, 0].astype(jnp.int32) for a in (x, y))
        known = (i == x[:, 0])[:, None] & (j == y[:, 0])
        return jnp.where(known, self.scores[i[:, None] % (B * N), j % (B * N)], jnp.nan)

    def own(self, x, y):
        """Score each pair, [A]."""
        return jax.vmap(lambda a, b: self(a[None], b[None])[0, 0])(x, y)
