"""The schedule level: how many steps, at which noise levels, on which token layouts."""
