"""Pure functional flax.linen modules: no axis names, no optimiser, no config objects."""
