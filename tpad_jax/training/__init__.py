"""What trains a stage: step, loop, optimiser, checkpoints."""
