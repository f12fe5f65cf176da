"""The recipe of the embedded pipeline and its judge; `python -m training.small --help`."""
