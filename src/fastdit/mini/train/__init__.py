"""The recipe of the embedded pipeline and its judge; `python -m fastdit.mini.train --help`."""
