"""Twins of a pipeline, its denoiser and its scheduler: same classes, same weights, behaviour of their own."""
