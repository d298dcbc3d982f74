"""Transforms that load an image from a file or from memory."""
