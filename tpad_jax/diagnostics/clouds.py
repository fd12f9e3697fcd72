"""Describes clouds of feature vectors in numbers, and warns of collapsed ones. On the host.

A cloud is float [n, D], a row per item or per position of a session. A measure scales the rows to
length one only where its source does so.
"""

import numpy as np
from scipy.spatial.distance import pdist
from scipy.special import entr  # scipy.stats takes a second to import

# A feature below one of the first three, or above the fourth, is called collapsed [ours].
LEAST_SPREAD = 1e-3  # share of the mean square that is variance
LEAST_RANK = 0.03  # effective rank, as a share of the most that n rows of width D can have
LEAST_DIRECTIONS = 2.0  # effective rank, for any width
MOST_COSINE = 0.98  # mean cosine of two rows
FULL = 0.3  # nats below log N: a closer InfoNCE estimate is only a lower bound

# The options that fix a collapsed feature, by the first part of its name.
REMEDIES = {
    'k': 'raise config.stage.knowledge.steps or the weight of its loss, or lower '
         'config.stage.knowledge.learning_rate; every later stage reads k',
    't': 'raise config.losses.gen_transfer.weight, or lower config.losses.disentangle.weight and '
         'config.losses.discrepancy.weight',
    'c': 'raise config.losses.align.weight or lower config.losses.disentangle.weight',
    'p': 'raise config.losses.distil.weight or lower config.losses.disentangle.weight',
    'r': 'raise config.losses.distil.weight or lower config.losses.discrepancy.weight',
}


def unit(x: np.ndarray) -> np.ndarray:
    """Scale the rows of x [n, D] to length one, in float64; zero stays zero."""
    x = np.asarray(x, np.float64)
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)


def effective_rank(x: np.ndarray) -> float:
    """Compute exp of the entropy of the singular values' shares.

    The result is between 1 and min(n, D): n orthogonal rows of one length have n, multiples of one
    row have 1. Zeros have 0 [ours]. Source: Roy and Vetterli 2007, equation 4 [paper].
    """
    values = np.linalg.svd(np.asarray(x, np.float64), compute_uv=False)
    return float(np.exp(entr(values / values.sum()).sum())) if values.any() else 0.0


def mean_cosine(x: np.ndarray) -> float:
    """Average the cosine of two different rows of x [n, D], n > 1. Rows of zeros have cosine 0."""
    n, total = len(x), unit(x).sum(0)
    # without the cosines of rows with themselves
    return float((total @ total - (np.linalg.norm(x, axis=1) > 0).sum()) / (n * (n - 1)))


def spread(x: np.ndarray) -> float:
    """Divide the variance of the rows of x [n, D] by their mean square; zeros have 0."""
    x = np.asarray(x, np.float64)
    square = (x * x).sum(1).mean()
    return float(x.var(0).sum() / square) if square else 0.0


def alignment(x: np.ndarray, y: np.ndarray) -> float:
    """Average the squared distance of pairs on the unit sphere.

    Source: Wang and Isola 2020, alpha = 2 [paper].

    Args:
      x: float [n, D].
      y: float [n, D]. Row i of both is a pair.

    Returns:
      0 for equal directions, about 2 for unrelated pairs, at most 4.
    """
    return float(((unit(x) - unit(y)) ** 2).sum(1).mean())


def uniformity(x: np.ndarray) -> float:
    """Compute the log of the mean of exp(-2 d^2) over pairs of different rows on the unit sphere.

    It is 0 where all rows are equal and near -4 where they are spread evenly. Source: Wang and
    Isola 2020, t = 2 [paper].
    """
    return float(np.log(np.exp(-2 * pdist(unit(x), 'sqeuclidean')).mean()))


def linear_cka(x: np.ndarray, y: np.ndarray) -> float:
    """Compute the linear centred kernel alignment of x [n, D] and y [n, E].

    It is 1 where one cloud is the other rotated and scaled, and 0 where no column of one correlates
    with a column of the other. Unrelated clouds of few rows have about D / n; a constant cloud has
    0. Source: Kornblith et al. 2019, section 3 [paper].
    """
    x, y = (np.asarray(a, np.float64) - np.mean(a, 0, np.float64) for a in (x, y))
    scale = np.linalg.norm(x.T @ x) * np.linalg.norm(y.T @ y)
    return float(np.linalg.norm(x.T @ y) ** 2 / scale) if scale else 0.0


def cross_correlation(x: np.ndarray, y: np.ndarray) -> float:
    """Compute the root mean square correlation of x's columns [n, D] with y's [n, E], in 0..1.

    Uncorrelated columns have about n^-1/2. A constant column has correlation 0.
    """
    x, y = (np.asarray(a, np.float64) - np.mean(a, 0, np.float64) for a in (x, y))
    x, y = (a / np.maximum(np.linalg.norm(a, axis=0), 1e-12) for a in (x, y))
    return float(np.sqrt(((x.T @ y) ** 2).mean()))


def feature(x: np.ndarray) -> dict:
    """Describe a feature by its cloud [n, D]: {name: number}.

    The effective rank is that of the rows without their mean [ours]; `spread` and `mean_cosine`
    include the mean.
    """
    x = np.asarray(x, np.float64)
    return {'rows': len(x), 'width': x.shape[1], 'effective_rank': effective_rank(x - x.mean(0)),
            'mean_cosine': mean_cosine(x), 'spread': spread(x), 'uniformity': uniformity(x)}


def pair(x: np.ndarray, y: np.ndarray, embedded: tuple = ()) -> dict:
    """Describe two features whose rows are pairs: {name: number}.

    Args:
      x: float [n, D].
      y: float [n, E].
      embedded: the two as their critic compares them, [n, F] each. (): x and y, if D = E.
    """
    out = {'cka': linear_cka(x, y), 'cross_correlation': cross_correlation(x, y)}
    a, b = embedded or (x, y)
    if a.shape[1] != b.shape[1]:
        return out
    return {**out, 'alignment': alignment(a, b), 'uniformity': [uniformity(a), uniformity(b)],
            'space': 'critic' if embedded else 'features'}


def collapse(numbers: dict) -> list[str]:
    """List the reasons why a feature with these numbers of `feature` has collapsed, if any."""
    rank, cosine, share = (numbers[n] for n in ('effective_rank', 'mean_cosine', 'spread'))
    most = min(numbers['rows'] - 1, numbers['width'])
    least = max(LEAST_RANK * most, min(LEAST_DIRECTIONS, 0.5 * most))
    reasons = {
        f'its effective rank is {rank:.2f} of {most}, below {least:.1f}': rank < least,
        f'two rows have a mean cosine of {cosine:.3f}, above {MOST_COSINE}': cosine > MOST_COSINE,
        f'its variance is {share:.1e} of its mean square, below {LEAST_SPREAD}':
            share < LEAST_SPREAD}
    return [reason for reason, applies in reasons.items() if applies]


def warnings(features: dict, held_out: dict, when: str) -> list[str]:
    """Warn of the numbers of one moment, in a sentence or two each.

    Args:
      features: {name: numbers of `feature`}.
      held_out: {name: number} as the losses log them, on sessions the stage does not train on.
      when: the moment, such as 'after stage transfer'.
    """
    out = [f'the feature {name} has collapsed: {", and ".join(collapse(numbers))}. Remedy: '
           f'{REMEDIES[name.split("_")[0]]}.'
           for name, numbers in features.items() if collapse(numbers)]
    for name, value in held_out.items():
        kind, _, loss = name.rpartition('/')
        if kind == 'log_q' and value <= 0:
            out.append(f'the likelihood of q ({loss}) is {value:.3f} nats per dimension above that '
                       'of a Gaussian that reads no x: its vCLUB estimate is not a bound. Remedy: '
                       f'raise config.losses.{loss}.weight or the steps of the stage.')
        if name[:3] == 'mi_' and value < 0:
            out.append(f'the estimate of {name[3:]} is {value:.3f} nats, below 0: its critic or q '
                       'does not fit these sessions. Remedy: raise the steps of the stage.')
        if kind == 'room' and value < FULL:
            out.append(f'the InfoNCE estimate of {loss} is within {value:.2f} nats of its limit '
                       'log N: the mutual information is at least that. Remedy: raise batch_size.')
    return [f'{when[0].upper()}{when[1:]} {line}' for line in out]
