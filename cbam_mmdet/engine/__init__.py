"""What a run consists of: hooks, checkpoints, several processes, mixed precision, and its record."""
