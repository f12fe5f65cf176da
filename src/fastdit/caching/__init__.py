"""Step caches decide whether a step's block stack runs; token caches, which tokens it recomputes when it does."""
