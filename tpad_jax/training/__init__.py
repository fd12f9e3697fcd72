"""Training of a stage: step, loop, optimizer, checkpoints, workdir."""
