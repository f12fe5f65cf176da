"""What becomes of the tokens at a stage switch, one way a file."""
