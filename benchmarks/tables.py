"""The documentation's tables of accelerators, written from the classes themselves: level, docstring, declared needs."""

from __future__ import annotations

import inspect
import re
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import fastdit
from fastdit.accelerator import Accelerator, Level, Need
from fastdit.errors import InvalidConfig
from fastdit.schedule.lifts.base import Lift
from fastdit.schedule.selectors.base import Selector
from fastdit.step_cache.forecasters.base import Forecaster

ROOT = Path(__file__).parents[1]

BEGIN, END = "<!-- accelerators: written by benchmarks/report.py -->", "<!-- accelerators: end -->"

#: The parts that an accelerator takes as an argument, by what they are.
PARTS: dict[str, type[object]] = {"forecaster": Forecaster, "lift": Lift, "selector": Selector}


@dataclass(frozen=True)
class Page:
    """Where a table is and what it holds: every accelerator, the parts of these kinds, and what they need or not."""

    path: str
    parts: tuple[str, ...]
    needs: bool


PAGES = (Page("README.md", ("forecaster",), needs=False), Page("docs/accelerators.md", tuple(PARTS), needs=True))


def table(page: Page) -> str:
    """Every public accelerator by its level, then the parts."""
    public = [value for name in dir(fastdit) if inspect.isclass(value := getattr(fastdit, name))]
    accelerators = [cls for cls in public if issubclass(cls, Accelerator)]
    kinds = {level.value: [cls for cls in accelerators if cls.level is level] for level in Level}
    kinds |= {part: [cls for cls in public if issubclass(cls, PARTS[part])] for part in page.parts}
    lines = ["| name | level | what it does |", "|---|---|---|"]
    lines += [f"| `{cls.__name__}` | {kind} | {_first_line(cls)} |" for kind, ones in kinds.items() for cls in ones]
    if page.needs:
        needs = (_needs(cls) for ones in kinds.values() for cls in ones)
        lines = [line + cell for line, cell in zip(lines, (" needs |", "---|", *needs), strict=True)]
    return "\n".join(lines)


def _first_line(cls: type[object]) -> str:
    return (inspect.getdoc(cls) or "").splitlines()[0].replace("|", "\\|")


def _needs(cls: type[object]) -> str:
    """What it needs of the model and the run: as it is by default where it has defaults, else what its class says."""
    declared: frozenset[Need] = getattr(cls, "needs", frozenset())
    if issubclass(cls, Accelerator):
        with suppress(TypeError, InvalidConfig):
            declared = cls().effects.needs
    return f" {'; '.join(sorted(need.value for need in declared))} |"


def with_table(text: str, page: Page) -> str:
    """A page with its table written anew. Raises `ValueError` where the page has no place for one."""
    between = re.compile(f"{re.escape(BEGIN)}.*?{re.escape(END)}", re.DOTALL)
    if len(between.findall(text)) != 1:
        raise ValueError(f"the page needs {BEGIN} and {END} around the place of its table, once")
    return between.sub(lambda _: f"{BEGIN}\n\n{table(page)}\n\n{END}", text)


def write() -> None:
    """Write the tables into their pages."""
    for page in PAGES:
        path = ROOT / page.path
        path.write_text(with_table(path.read_text(encoding="utf-8"), page), encoding="utf-8")
