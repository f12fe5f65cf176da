"""Schedules: which noise levels a run visits and on which token layout."""
