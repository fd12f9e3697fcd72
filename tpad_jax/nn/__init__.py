"""Layers and kernels that any model may use."""
