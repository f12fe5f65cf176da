"""Whether the source keeps its bars: its size, the order of its rooms, the length of methods and signatures.

Prints every count beside its bar with what lies behind it, and exits with 1 where one is over.
"""

from __future__ import annotations

import argparse
import ast
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

SOURCE = Path(__file__).parents[1] / "src" / "fastdit"

#: The levels of a stack: none imports another.
LEVELS = ("schedule", "step_cache", "token_cache", "attention", "engine")

#: Rooms by their order: what a row holds may import from its own row (levels aside) and from those below it.
ORDER = (
    ("__main__",),
    ("cli",),
    ("bench",),
    ("measure", "testing", "mini", "citation"),
    ("acceleration",),
    ("predict",),
    ("stack", "plan"),
    ("twins",),
    LEVELS,
    ("models",),
    ("blocks",),
    ("run", "record", "step", "layout", "accelerator", "meter", "flops"),
    ("structure", "nested", "config", "process", "errors"),
    ("__init__",),
)

#: What a call passes through whatever the stack is.
CORE = ("acceleration", "stack", "plan", "accelerator", "step", "run", "record", "meter", "layout", "twins")

#: Folders in which a file is one method, or a level's base.
METHODS = ("step_cache/gates", "step_cache/forecasters", "schedule", "token_cache", "engine", "attention")

METHOD_LINES = 200
PARAMETERS = 6


@dataclass(frozen=True)
class Count:
    """One count of the source beside the most that it may be, and what lies behind it, a line each."""

    name: str
    value: int
    most: int
    behind: tuple[str, ...] = ()

    @property
    def over(self) -> bool:
        return self.value > self.most

    def __str__(self) -> str:
        return f"{'over' if self.over else 'ok':4}  {self.name:34} {self.value:>7,} of at most {self.most:,}"


@dataclass(frozen=True)
class Import:
    """One module of the package that imports another; `when` is "module", "call" (in a function) or "types"."""

    importer: str
    imported: str
    line: int
    when: str


@dataclass(frozen=True)
class Module:
    """One file of the package; `name` is its path below the package, dotted, and a package's ends in `__init__`."""

    name: str
    path: str
    text: str
    tree: ast.Module

    @property
    def room(self) -> str:
        return self.name.partition(".")[0]

    @property
    def lines(self) -> int:
        return self.text.count("\n")


def modules_of(package: Path) -> dict[str, Module]:
    """Read every file of a package, by name."""
    found = {}
    for path in sorted(package.rglob("*.py")):
        relative = path.relative_to(package)
        text = path.read_text(encoding="utf-8")
        name = ".".join(relative.with_suffix("").parts)
        found[name] = Module(name, relative.as_posix(), text, ast.parse(text))
    return found


def imports_of(module: Module, modules: Mapping[str, Module], package: str = "fastdit") -> Iterator[Import]:
    """Give what of the package a module imports: modules, and the packages around them that it is not in itself."""
    for node, when in _imports_in(module.tree, "module"):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif node.level:
            raise ValueError(f"{module.path}:{node.lineno}: a relative import; name the module in full")
        else:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        found = {target for name in names for target in _targets(name, modules, package)}
        around = {f"{parent}.__init__" for parent in _parents(module.name)} | {"__init__", module.name}
        for target in sorted(found - around):
            yield Import(module.name, target, node.lineno, when)


def _imports_in(node: ast.AST, when: str) -> Iterator[tuple[ast.Import | ast.ImportFrom, str]]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import | ast.ImportFrom):
            yield child, when
        elif isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            yield from _imports_in(ast.Module(child.body, []), "types")
            yield from _imports_in(ast.Module(child.orelse, []), when)
        else:
            inside = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            yield from _imports_in(child, "call" if inside and when == "module" else when)


def _targets(name: str, modules: Mapping[str, Module], package: str) -> Iterator[str]:
    """Give the modules that run where a dotted name is imported, for a name of the package's."""
    first, *parts = name.split(".")
    if first != package:
        return
    for depth in range(len(parts) + 1):
        dotted = ".".join(parts[:depth])
        for candidate in (dotted, f"{dotted}.__init__".lstrip(".")):
            if candidate in modules:
                yield candidate


def _parents(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:depth]) for depth in range(1, len(parts))]


def circles(imports: Iterable[Import]) -> list[list[str]]:
    """Give the groups of modules of which every one reaches every other by imports that run with the module."""
    edges: dict[str, set[str]] = {}
    for one in imports:
        if one.when == "module":
            edges.setdefault(one.importer, set()).add(one.imported)
    reached = {name: _reached(name, edges) for name in edges}
    groups = {
        frozenset(other for other in reached[name] if name in reached.get(other, ()))
        for name in edges
        if name in reached[name]
    }
    return sorted(sorted(group) for group in groups)


def _reached(start: str, edges: Mapping[str, set[str]]) -> set[str]:
    reached: set[str] = set()
    waiting = [start]
    while waiting:
        for name in edges.get(waiting.pop(), set()) - reached:
            reached.add(name)
            waiting.append(name)
    return reached


def going_up(imports: Iterable[Import]) -> list[Import]:
    """Give the imports of a room by a lower one, or by another level. What is imported for types alone is left out."""
    place = {room: number for number, rooms in enumerate(ORDER) for room in rooms}
    found = []
    for one in imports:
        importer, imported = (name.partition(".")[0] for name in (one.importer, one.imported))
        for room in (importer, imported):
            if room not in place:
                raise ValueError(f"the room {room!r} has no place in the order of rooms; give it one")
        between_levels = importer in LEVELS and imported in LEVELS and importer != imported
        if one.when != "types" and (place[importer] > place[imported] or between_levels):
            found.append(one)
    return found


def long_signatures(module: Module) -> Iterator[tuple[int, str, int]]:
    """Give line, name and number of parameters of every function with too many.

    `self` and `cls` don't count, nor do a command's options, which no code gives.
    """
    for node in ast.walk(module.tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            arguments = node.args
            every = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, arguments.vararg, arguments.kwarg]
            count = sum(one is not None and one.arg not in ("self", "cls") for one in every)
            if count > PARAMETERS and "typer." not in ast.unparse(arguments):
                yield node.lineno, node.name, count


def counts(package: Path = SOURCE) -> list[Count]:
    """Count everything that has a bar."""
    modules = modules_of(package)
    imports = [one for module in modules.values() for one in imports_of(module, modules, package.name)]
    files = sorted(modules.values(), key=lambda module: -module.lines)
    by_room: Counter[str] = Counter()
    for module in files:
        by_room[module.room] += module.lines
    core = [module for module in files if module.room in CORE]
    methods = [module for module in files if module.path.startswith(tuple(f"{folder}/" for folder in METHODS))]
    long = [module for module in methods if module.lines > METHOD_LINES]
    around = circles(imports)
    up = going_up(imports)
    signatures = [
        f"{module.path}:{line} {name} has {count}"
        for module in modules.values()
        for line, name, count in long_signatures(module)
    ]
    words = Counter({module.path: len(re.findall(r"\bAny\b", module.text)) for module in files})
    return [
        Count("lines", sum(by_room.values()), 15_000, _listed(by_room)),
        Count("lines of the core", sum(map(_lines, core)), 2_300, _listed({one.path: one.lines for one in core})),
        Count("import circles", len(around), 0, tuple(" <-> ".join(names) for names in around)),
        Count("imports that go up", len(up), 0, tuple(f"{x.importer}:{x.line} imports {x.imported}" for x in up)),
        Count(f"methods above {METHOD_LINES} lines", len(long), 0, _listed({one.path: one.lines for one in long})),
        Count(f"functions above {PARAMETERS} parameters", len(signatures), 0, tuple(signatures)),
        Count("the word Any", sum(words.values()), 479, _listed(words)),
    ]


def _lines(module: Module) -> int:
    return module.lines


def _listed(numbers: Mapping[str, int]) -> tuple[str, ...]:
    return tuple(
        f"{number:>6,} {name}" for name, number in sorted(numbers.items(), key=lambda item: -item[1]) if number
    )


def main() -> int:
    """Print the counts, and behind those that are over what they are made of; give the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--allow", action="append", default=[], help="a count that may be over without failing")
    allowed = parser.parse_args().allow
    found = counts()
    for count in found:
        print(count)
        for line in count.behind if count.over else ():
            print(f"        {line}")
    return int(any(count.over and count.name not in allowed for count in found))


if __name__ == "__main__":
    sys.exit(main())
