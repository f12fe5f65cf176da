"""What accelerators and their parts say of themselves, as Markdown: level, docstring, parameters, declared effects."""

from __future__ import annotations

import dataclasses
import inspect
import re
import textwrap
from contextlib import suppress
from typing import TypeVar

import fastdit
from fastdit.accelerator import Accelerator, Effects, Level
from fastdit.errors import InvalidConfig
from fastdit.schedule.lifts.base import Lift
from fastdit.schedule.selectors.base import Selector
from fastdit.step_cache.forecasters.base import Forecaster

#: The parts that an accelerator takes as an argument, by what they are.
PARTS: dict[str, type[object]] = {"forecaster": Forecaster, "lift": Lift, "selector": Selector}

Kind = TypeVar("Kind")

_ENTRY = re.compile(r"^(\w+): ", re.MULTILINE)


def public(base: type[Kind]) -> list[type[Kind]]:
    """Every public class of a kind."""
    found = (getattr(fastdit, name) for name in dir(fastdit))
    return [value for value in found if inspect.isclass(value) and issubclass(value, base)]


def accelerators() -> dict[Level, list[type[Accelerator]]]:
    """Every public accelerator by its level."""
    return {level: [cls for cls in public(Accelerator) if cls.level is level] for level in Level}


def levels() -> str:
    """The levels of a stack, outermost first, and what there is at each."""
    decides = {
        Level.SCHEDULE: "how many steps, at which noise level, on which tokens",
        Level.WEIGHTS: "what the linear layers of blocks hold",
        Level.STEP_CACHE: "whether a step's blocks run, are reused or are forecast",
        Level.TOKEN_CACHE: "which tokens are recomputed inside a step that runs",
        Level.ATTENTION: "which kernel computes attention",
        Level.ENGINE: "how the blocks that run are executed",
    }
    lines = ["| level | decides | here |", "|---|---|---|"]
    for level, classes in accelerators().items():
        here = ", ".join(f"`{cls.__name__}`" for cls in classes) or "adapters alone"
        lines.append(f"| {level.value} | {decides[level]} | {here} |")
    return "\n".join(lines)


def table() -> str:
    """Every public accelerator by its level, then the parts."""
    rows = [(cls, level.value, f"{cls.__name__.lower()}.md") for level, ones in accelerators().items() for cls in ones]
    rows += [(cls, kind, f"{kind}s.md#{cls.__name__.lower()}") for kind, base in PARTS.items() for cls in public(base)]
    lines = ["| name | level | what it does |", "|---|---|---|"]
    lines += [f"| [`{cls.__name__}`]({page}) | {kind} | {_cell(_first_line(cls))} |" for cls, kind, page in rows]
    return "\n".join(lines)


def parts(kind: str) -> str:
    """The parts of a kind, each under its name."""
    return "\n\n".join(f"## {cls.__name__}\n\n{_docstring(cls)}" for cls in public(PARTS[kind]))


def described(name: str) -> str:
    """An accelerator's docstring, and its effects as it is by default."""
    cls = getattr(fastdit, name)
    effects = Effects(*(frozenset[object](getattr(cls, field, ())) for field in ("changes", "needs", "breaks")))
    with suppress(TypeError, InvalidConfig):
        effects = cls().effects
    lines = [f"| level | {cls.level.value} |", "|---|---|"]
    for field in ("changes", "needs", "breaks"):
        declared = sorted(effect.value for effect in getattr(effects, field))
        lines.append(f"| {field} | {'; '.join(declared) or 'nothing'} |")
    return f"{_docstring(cls)}\n\n" + "\n".join(lines)


def _first_line(cls: type[object]) -> str:
    return (inspect.getdoc(cls) or "").splitlines()[0]


def _docstring(cls: type[object]) -> str:
    """A docstring as Markdown: its sections as tables, its formulas and examples as code."""
    found = []
    for block in re.split(r"\n\n(?=\S)", inspect.getdoc(cls) or ""):
        title, _, rest = block.partition("\n")
        if block.startswith(">>> "):
            found.append(f"```pycon\n{block}\n```")
        elif title.endswith(":") and rest.startswith("    ") and _ENTRY.match(textwrap.dedent(rest)):
            found.append(f"**{title}**\n\n{_section(cls, textwrap.dedent(rest))}")
        else:
            found.append(re.sub(r"(?m)(?:^    .*(?:\n|\Z)|^\n(?=    ))+", _formula, block).strip())
    return re.sub(r"arXiv (\d{4}\.\d{5})", r"[arXiv \1](https://arxiv.org/abs/\1)", "\n\n".join(found))


def _formula(lines: re.Match[str]) -> str:
    return f"\n```text\n{textwrap.dedent(lines[0]).strip()}\n```\n"


def _section(cls: type[object], text: str) -> str:
    """Entries `name: what`, each over several lines, as a table with the defaults of what are fields."""
    _, *pairs = _ENTRY.split(text)
    entries = dict(zip(pairs[::2], pairs[1::2], strict=True))
    defaults = {field.name: _default(field) for field in dataclasses.fields(cls) if field.name in entries}  # type: ignore[arg-type]
    lines = ["| name | default | what |", "|---|---|---|"] if defaults else ["| error | when |", "|---|---|"]
    for name, what in entries.items():
        default = [defaults.get(name, "")] if defaults else []
        lines.append(f"| {' | '.join((f'`{name}`', *default, _cell(' '.join(what.split()))))} |")
    return "\n".join(lines)


def _default(field: dataclasses.Field[object]) -> str:
    if callable(field.default_factory):
        return f"`{field.default_factory()!r}`"
    return "" if field.default is dataclasses.MISSING else f"`{field.default!r}`"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
