"""The attention level: which kernel computes attention."""
