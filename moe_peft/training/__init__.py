"""Training of the trainable tree beside a frozen one: step, optimisers, loop, checkpoints."""
