"""Measuring a pipeline of one's own: stacks as text, experiments as data, cells on disk, and what they show."""
