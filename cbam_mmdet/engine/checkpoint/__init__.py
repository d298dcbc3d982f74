"""Checkpoints: found, loaded without running code from them, compared, and their keys translated."""
