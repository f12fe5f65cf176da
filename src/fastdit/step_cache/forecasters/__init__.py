"""What stands in for a skipped step, one forecaster a file."""
