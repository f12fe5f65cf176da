"""Step caches: when the block stack runs (a gate) and what stands in for it when it does not (a forecaster)."""
