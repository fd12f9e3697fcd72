"""Mutual information of two clouds of points: critics, bounds and a standalone estimator."""

from tpad_jax.mutual_information.estimator import Estimate, Settings, estimate

__all__ = ['Estimate', 'Settings', 'estimate']
