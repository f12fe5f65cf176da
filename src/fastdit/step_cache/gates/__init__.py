"""When to compute, one gate a file."""
