"""FLUX.1-dev and Stable Diffusion 3 medium at full size on one GPU, in calls that fit a borrowed half hour.

`check` tells whether everything runs on the card and gives its first numbers, `measure` times stacks against the plain
pipeline, `rivals` times other libraries beside them. README.md has the plan, minute by minute.
"""
