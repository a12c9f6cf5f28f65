"""A whole training: its data, its set-up, its loop and its checkpoints."""
