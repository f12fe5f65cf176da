"""Twins of a pipeline, its transformer and its scheduler: same classes, same weights, behaviour of their own."""
