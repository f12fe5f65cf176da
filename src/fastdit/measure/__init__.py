"""The one instrument behind every number this project prints: timing, intervals, image metrics, FLOPs, results."""
