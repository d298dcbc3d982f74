"""Find checkpoints, load them without running code from them, compare them with a model, and translate their keys."""
