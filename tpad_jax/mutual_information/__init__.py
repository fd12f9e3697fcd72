"""Mutual information of two clouds of points: critics, bounds and an estimator for use alone."""

from tpad_jax.mutual_information.estimator import Estimate, Training, estimate

__all__ = ['Estimate', 'Training', 'estimate']
