"""Which tokens the next stage refines, one way a file."""
