"""The token-cache level: which tokens are recomputed inside a step that runs."""
