"""Mutual information of two clouds of points: critics, bounds and a standalone estimator."""

from tpad_jax.mutual_information.estimator import estimate
from tpad_jax.mutual_information.held_out import Estimate, Settings

__all__ = ['Estimate', 'Settings', 'estimate']
