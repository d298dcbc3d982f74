"""CBAM, and the ways to put it into a network."""
