"""`python -m fastdit`: the `fastdit` command."""

from fastdit.cli import app

app(prog_name="fastdit")
