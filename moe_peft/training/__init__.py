"""Training of the trainable tree next to a frozen one: step, optimisers, loop, checkpoints."""
