"""What happens during a run: hooks, checkpoints, several processes, mixed precision, and the record of it."""
