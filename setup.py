"""Puts configs/ into the wheel as tpad_jax.configs; setup.cfg has everything else."""

from setuptools import find_packages, setup

setup(packages=[*find_packages(include=['tpad_jax', 'tpad_jax.*']), 'tpad_jax.configs'],
      package_dir={'tpad_jax.configs': 'configs'})
