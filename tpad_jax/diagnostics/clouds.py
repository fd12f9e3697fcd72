"""What a cloud of feature vectors looks like, and words for one that has collapsed. On the host.

A cloud is float [n, D], a row per item or per position of a session. Figures are of the rows scaled
to length one where their source says so, and of the rows as they are otherwise.
"""

import numpy as np

# A feature below one of the first three, or above the fourth, is called collapsed [ours].
LEAST_SPREAD = 1e-3  # share of the mean square that is variance
LEAST_RANK = 0.03  # effective rank, as a share of the most that n rows of width D can have
LEAST_DIRECTIONS = 2.0  # effective rank, whatever the width
MOST_COSINE = 0.98  # mean cosine of two rows
FULL = 0.3  # nats below log N at which an InfoNCE estimate says no more than "at least"

# What to turn where a feature has collapsed, by its name without what stands behind an underscore.
REMEDIES = {
    'k': 'raise config.stage.knowledge.steps or config.losses.gen_knowledge.weight, or lower '
         'config.stage.knowledge.learning_rate; every later stage reads k',
    't': 'raise config.losses.gen_transfer.weight, or lower config.losses.disentangle.weight and '
         'config.losses.discrepancy.weight',
    'c': 'raise config.losses.align.weight or lower config.losses.disentangle.weight',
    'p': 'raise config.losses.distil.weight or lower config.losses.disentangle.weight',
    'r': 'raise config.losses.distil.weight or lower config.losses.discrepancy.weight',
}


def unit(x: np.ndarray) -> np.ndarray:
    """Rows of x [n, D] scaled to length one, in float64; zero stays zero."""
    x = np.asarray(x, np.float64)
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)


def effective_rank(x: np.ndarray) -> float:
    """exp of the entropy of the singular values' shares (Roy and Vetterli 2007, equation 4).

    Between 1 and min(n, D): n orthogonal rows of one length have n, multiples of one row have 1.
    Of zeros it is 0 [ours].
    """
    values = np.linalg.svd(np.asarray(x, np.float64), compute_uv=False)
    if not values.sum():
        return 0.0
    share = values / values.sum()
    share = share[share > 0]
    return float(np.exp(-(share * np.log(share)).sum()))


def mean_cosine(x: np.ndarray) -> float:
    """Mean cosine of two different rows of x [n, D], n > 1. Rows of zeros have cosine 0."""
    n, total = len(x), unit(x).sum(0)
    own = (np.linalg.norm(x, axis=1) > 0).sum()  # every row with itself
    return float((total @ total - own) / (n * (n - 1)))


def spread(x: np.ndarray) -> float:
    """Variance of the rows of x [n, D] as a share of their mean square; of zeros it is 0."""
    x = np.asarray(x, np.float64)
    whole = (x * x).sum(1).mean()
    return float(x.var(0).sum() / whole) if whole else 0.0


def alignment(x: np.ndarray, y: np.ndarray) -> float:
    """Mean squared distance of pairs on the unit sphere (Wang and Isola 2020, alpha = 2).

    x, y [n, D], row i of both a pair. 0: the same directions; 2: what unrelated pairs have; 4 at
    most.
    """
    return float(((unit(x) - unit(y)) ** 2).sum(1).mean())


def uniformity(x: np.ndarray) -> float:
    """log of the mean of exp(-2 d^2) over pairs of different rows on the unit sphere.

    Wang and Isola 2020, t = 2. 0 where all rows are one, near -4 where they are spread evenly.
    """
    x = unit(x)
    square = np.maximum((x * x).sum(1)[:, None] + (x * x).sum(1)[None] - 2 * x @ x.T, 0)
    n = len(x)
    mass = np.exp(-2 * square)
    return float(np.log((mass.sum() - np.trace(mass)) / (n * (n - 1))))


def linear_cka(x: np.ndarray, y: np.ndarray) -> float:
    """Linear centred kernel alignment of x [n, D] and y [n, E] (Kornblith et al. 2019, section 3).

    1 where one is a rotation of the other and scaled, 0 where no column of one is correlated with
    one of the other; unrelated clouds of few rows read high, about D / n. A constant cloud has 0.
    """
    x, y = (np.asarray(a, np.float64) - np.mean(a, 0, np.float64) for a in (x, y))
    own = np.linalg.norm(x.T @ x) * np.linalg.norm(y.T @ y)
    return float(np.linalg.norm(x.T @ y) ** 2 / own) if own else 0.0


def cross_correlation(x: np.ndarray, y: np.ndarray) -> float:
    """Root mean square of the correlations of x's columns [n, D] with y's [n, E], in 0..1.

    Uncorrelated columns read about n^-1/2. A column that does not vary has correlation 0.
    """
    x, y = (np.asarray(a, np.float64) - np.mean(a, 0, np.float64) for a in (x, y))
    x, y = (a / np.maximum(np.linalg.norm(a, axis=0), 1e-12) for a in (x, y))
    return float(np.sqrt(((x.T @ y) ** 2).mean()))


def feature(x: np.ndarray) -> dict:
    """A feature's figures, {name: number}, from its cloud [n, D].

    The effective rank is of the rows without their mean [ours], which has its say in `spread` and
    `mean_cosine`.
    """
    x = np.asarray(x, np.float64)
    return {'rows': len(x), 'width': x.shape[1], 'effective_rank': effective_rank(x - x.mean(0)),
            'mean_cosine': mean_cosine(x), 'spread': spread(x), 'uniformity': uniformity(x)}


def pair(x: np.ndarray, y: np.ndarray, embedded: tuple | None = None) -> dict:
    """Figures of two features whose rows are pairs, {name: number}.

    Args:
      x, y: float [n, D] and [n, E].
      embedded: both as their critic compares them, [n, F] each; None: as they are, if D = E.
    """
    out = {'cka': linear_cka(x, y), 'cross_correlation': cross_correlation(x, y)}
    if embedded is None and x.shape[1] != y.shape[1]:
        return out
    a, b = (x, y) if embedded is None else embedded
    return {**out, 'alignment': alignment(a, b), 'uniformity': [uniformity(a), uniformity(b)],
            'space': 'features' if embedded is None else 'critic'}


def collapse(found: dict) -> list[str]:
    """Why a feature with these figures (see `feature`) has collapsed; empty: it has not."""
    most = min(found['rows'] - 1, found['width'])
    least = max(LEAST_RANK * most, min(LEAST_DIRECTIONS, 0.5 * most))
    why = []
    if found['effective_rank'] < least:
        why.append(f'its effective rank is {found["effective_rank"]:.2f} of {most}, below '
                   f'{least:.1f}')
    if found['mean_cosine'] > MOST_COSINE:
        why.append(f'two rows have a mean cosine of {found["mean_cosine"]:.3f}, above '
                   f'{MOST_COSINE}')
    if found['spread'] < LEAST_SPREAD:
        why.append(f'its variance is {found["spread"]:.1e} of its mean square, below '
                   f'{LEAST_SPREAD}')
    return why


def warnings(features: dict, held_out: dict, when: str) -> list[str]:
    """What the figures of one moment warn of, a sentence or two each.

    Args:
      features: {name: figures of `feature`}.
      held_out: {name: number} as the losses log them, on sessions the stage does not train on.
      when: 'after stage transfer', say.
    """
    out = []
    for name, found in features.items():
        why = collapse(found)
        if why:
            out.append(f'{when[0].upper()}{when[1:]} the feature {name} has collapsed: '
                       f'{", and ".join(why)}. Remedy: {REMEDIES[name.split("_")[0]]}.')
    for name, value in held_out.items():
        kind, _, loss = name.rpartition('/')
        if kind == 'log_q' and value <= 0:
            out.append(f'{when[0].upper()}{when[1:]} the likelihood of q ({loss}) is '
                       f'{value:.3f} nats per dimension above that of a Gaussian which knows only '
                       'the mean and variances: no vCLUB figure made with it is a bound. Remedy: '
                       f'raise config.losses.{loss}.weight or the steps of the stage.')
        if name[:3] == 'mi_' and value < 0:
            out.append(f'{when[0].upper()}{when[1:]} the estimate of {name[3:]} is {value:.3f} '
                       'nats, which no mutual information is: its critic, or q, knows nothing of '
                       'these sessions. Remedy: raise the steps of the stage, or the weight of '
                       'the loss that fits it.')
        if kind == 'room' and value < FULL:
            out.append(f'{when[0].upper()}{when[1:]} the InfoNCE estimate of {loss} is within '
                       f'{value:.2f} nats of log N, the most it can say: the mutual information '
                       'is at least that. Remedy: a larger batch_size.')
    return out
