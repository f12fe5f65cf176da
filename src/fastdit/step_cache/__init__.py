"""The step-cache level: whether a step's blocks run, and what stands in where they don't."""
