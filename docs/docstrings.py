"""For the site: the examples that end docstrings, without a heading, become a section of examples."""

from __future__ import annotations

import re
import textwrap

import griffe


class Examples(griffe.Extension):
    """Put examples where griffe looks for them."""

    def on_object(self, *, obj: griffe.Object, **_: object) -> None:
        if obj.docstring is not None:
            obj.docstring.value = re.sub(r"(?ms)^>>> .*", self._section, obj.docstring.value)

    def _section(self, example: re.Match[str]) -> str:
        return "Examples:\n" + textwrap.indent(example[0], "    ")
