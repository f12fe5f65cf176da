"""The engine level: what the pieces of a model are compiled into, and where that is kept. See `engine.py`."""
