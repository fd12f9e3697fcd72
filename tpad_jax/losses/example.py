"""A small batch and every output a stage can name, made of random numbers: what losses are checked
on. Every size differs from the others, so that a mistaken axis shows.
"""

import flax
import jax
import jax.numpy as jnp
import numpy as np

from tpad_jax.models.sessions import repeats
from tpad_jax.mutual_information import critics
from tpad_jax.types import Batch

# rows, positions, items, width, modalities, text tokens, vocabulary, replicas
B, N, V, D, M, T, W, REPLICAS = 16, 3, 9, 4, 2, 5, 11, 8
# Widths of the outputs that `models.tpad.forward` names; one that a new loss reads is added here.
POSITIONS = {'k': M * D, 't': D, 'c': D, 'p': D, 'r': D, 'r_next': D, 'h_each': D}
TEXTS = ('describe', 'foretell')
# with as many tokens as the texts
STATES = ('k.text', 'r.text', 'teacher.text', 'k.image', 'r.image', 'teacher.image')
CRITICS = {'align': critics.Critic('separable', 6), 'distil': critics.Critic('bilinear', 6)}
CLUB = critics.GaussianQ(6)


def make(seed):
    """A batch with repeats and padded rows, all of one replica's among them, and raw rows."""
    rng = np.random.default_rng(seed)
    length = rng.integers(1, N + 1, B)
    real = np.arange(N) < length[:, None]
    valid = np.ones(B, bool)
    valid[[2, 3, 7]] = False  # rows 2 and 3 are the whole of one replica
    batch = Batch(items=np.where(real, rng.integers(1, V + 1, (B, N)), 0).astype(np.int32),
                  next=np.where(real, rng.integers(1, V + 1, (B, N)), 0).astype(np.int32),
                  target=rng.integers(1, V - 1, B).astype(np.int32), valid=valid,
                  row=np.arange(B, dtype=np.int32))
    raw = {n: rng.normal(size=(B, N, w)).astype(np.float32) for n, w in POSITIONS.items()}
    raw['h'] = rng.normal(size=(B, D)).astype(np.float32)
    raw['repeat'] = np.asarray(repeats.shifts(rng.normal(size=N), batch.items), np.float32)
    raw['interest'] = rng.normal(size=(B, D)).astype(np.float32)
    for name in STATES:
        raw[name] = rng.normal(size=(B, T, D)).astype(np.float32)
    for name in TEXTS:
        raw[name] = rng.normal(size=(B, T, D)).astype(np.float32)
        words = rng.integers(0, W, (B, T))
        words[np.arange(T) >= rng.integers(1, T + 1, (B, 1))] = -1
        raw[f'{name}.tokens'] = words.astype(np.int32)
    return batch, raw


def make_params(seed):
    """One matrix per named output, the tables, critics and q: the replicated parameters."""
    rng = np.random.default_rng(seed)
    one, two = jnp.ones((1, D)), jnp.ones((1, M * D))
    modules = {'critic.align': (CRITICS['align'], two, one), 'club': (CLUB, one, one),
               'critic.distil': (CRITICS['distil'], one, one)}
    shapes = {n: jax.eval_shape(m.init, jax.random.key(0), *x) for n, (m, *x) in modules.items()}
    shapes |= {'z': jnp.ones((V + 1, D)), 'vocabulary': jnp.ones((W, D))}
    params = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32) * 0.7, shapes)
    widths = {**POSITIONS, 'h': D, 'interest': D, **dict.fromkeys((*TEXTS, *STATES), D)}
    mixing = {n: np.eye(w) + 0.3 * rng.normal(size=(w, w)) for n, w in widths.items()}
    return params | {n: x.astype(np.float32) for n, x in mixing.items()}


def named(params, raw, batch):
    """Outputs by name, each a function of replicated parameters and this replica's rows."""
    out = {n: x @ params[n] if n in params else x for n, x in raw.items()}
    warm = jnp.arange(V + 1) < V - 1  # the last two items are cold; row 0 is padding
    out |= {'items': batch.items, 'next': batch.next, 'warm': warm.at[0].set(False),
            'z': params['z'], **dict.fromkeys(('vocabulary', 'teacher.vocabulary'),
                                              params['vocabulary']),
            'popularity': 1.0 + jnp.arange(V + 1) % 3, 'cluster': jnp.arange(V + 1) % D}
    # which tokens are there: of an image all or none, in one row of three
    out['text.there'] = raw['describe.tokens'] >= 0
    out['image.there'] = out['text.there'] & (batch.row % 3 > 0)[:, None]
    modules = {f'critic.{n}': c for n, c in CRITICS.items()} | {'club': CLUB}
    out |= {n: critics.Score(c, params[n]['params']) for n, c in modules.items()}
    return out


def foretold(params, raw):
    """Rows whose p is what q expects of their c: upper bounds are positive there, and pull."""
    c = raw['c'].reshape(-1, D) @ params['c']
    half, centre, _ = np.split(np.asarray(CLUB.apply(params['club'], c, c, factors=True)[0]),
                               [D, 2 * D], axis=1)
    p = centre / (-2 * half) @ np.linalg.inv(params['p'])
    return raw | {'p': p.reshape(raw['p'].shape).astype(np.float32)}


def garbled(batch, raw, seed):
    """The same batch and raw rows, but for what stands in padded rows, positions and tokens."""
    rng, rows = np.random.default_rng(seed), batch.valid[:, None]
    other = Batch(items=np.where(rows, batch.items, 4), next=np.where(rows, batch.next, 5),
                  target=np.where(batch.valid, batch.target, 6), valid=batch.valid,
                  row=np.where(batch.valid, batch.row, 0))
    mask, garbage = np.asarray(batch.mask), {}
    for name, x in raw.items():
        real = {T: raw.get(f'{name}.tokens', raw['describe.tokens']) >= 0, N: mask, D: mask[:, :1]}
        real = real[x.shape[1]] & rows
        if x.dtype == np.int32:  # tokens of a valid row end where they end
            garbage[name] = np.where(rows, x, 3)
        else:
            real = real if x.ndim == 2 else real[..., None]
            garbage[name] = np.where(real, x, 20 * rng.normal(size=x.shape)).astype(np.float32)
    return other, garbage


def numbered(raw):
    """Raw rows whose features carry the number of their position, b N + n, in their first place."""
    number = np.arange(B * N, dtype=np.float32).reshape(B, N)
    return {n: np.concatenate([number[..., None], x[..., 1:]], -1) if n in POSITIONS else x
            for n, x in raw.items()}


@flax.struct.dataclass
class LookUp:
    """A critic that looks its scores [B N, B N] up by the numbers of `numbered`; NaN where the
    features it is given no longer carry them.
    """

    scores: jax.Array

    def __call__(self, x, y):
        """x [A, I], y [G, J] -> [A, G]."""
        i, j = (a[:, 0].astype(jnp.int32) for a in (x, y))
        known = (i == x[:, 0])[:, None] & (j == y[:, 0])
        return jnp.where(known, self.scores[i[:, None] % (B * N), j % (B * N)], jnp.nan)

    def factors(self, x, y):
        """None: scores that are looked up are no product."""

    def own(self, x, y):
        """Scores of the pairs alone, [A]."""
        return jax.vmap(lambda a, b: self(a[None], b[None])[0, 0])(x, y)
