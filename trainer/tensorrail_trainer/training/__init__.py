"""The training loop, its log and its checkpoints."""
