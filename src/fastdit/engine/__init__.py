"""The engine level: how blocks execute for the shape of one stage."""
