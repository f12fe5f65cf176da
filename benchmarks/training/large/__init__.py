"""The recipe of a larger text-to-image model and its judges; `python -m training.large --help`."""
