"""Mutation testing: how many small changes to the code that decides are noticed by tests.

A mutant is a module with one change: a comparison, an operator, a condition, a number or a switch is another, a
statement is gone, or nothing is returned. Texts and types stay. Mutants are drawn by a seed, some of each module. A
forked process imports each in the place of the module and runs the module's own fast tests, those that reach the
changed function, the quickest first. It is killed where one fails, or where they do not come to an end.

Tests that were written for the mutants of one seed say little of how many of those are killed: report another.
"""

from __future__ import annotations

import ast
import builtins
import contextlib
import gc
import importlib
import importlib.util
import json
import os
import random
import re
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from importlib.machinery import ModuleSpec, SourceFileLoader
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated, Any

import pytest
import typer

ROOT = Path(__file__).parents[1]
RESULT = ROOT / "benchmarks" / "results" / "mutation.json"

_CALLS = ("core/test_run", "core/test_clock", "core/test_idle", "step_cache/test_scopes")
_CACHES = (
    "step_cache/test_values",
    "step_cache/test_decision",
    "step_cache/test_gates",
    "step_cache/test_options_together",
    "step_cache/test_scopes",
)
_STAGES = ("schedule/test_recipe", "schedule/test_edges", "schedule/test_ralu", "schedule/test_progressive")
_RUNS = ("schedule/test_from_pictures", "schedule/test_text_attention", "schedule/test_ralu_reference")
#: The modules that are changed, each with the files of its own tests.
TARGETS: dict[str, tuple[str, ...]] = {
    "run": (*_CALLS, "core/test_records"),
    "blocks.chain": (*_CALLS, "core/test_records", "core/test_handed_on"),
    "step_cache.policy": _CACHES,
    "step_cache.base": (*_CACHES, "core/test_idle"),
    "step_cache.decision": _CACHES,
    "step_cache.site": _CACHES,
    "step_cache.tally": (*_CACHES, "core/test_idle"),
    "step_cache.gates.interval": _CACHES,
    "step_cache.gates.threshold": _CACHES,
    "step_cache.gates.teacache": ("step_cache/test_teacache", "step_cache/test_values"),
    "step_cache.gates.first_block_cache": ("step_cache/test_first_block_cache", *_CACHES),
    "step_cache.gates.dbcache": _CACHES,
    "step_cache.gates.easycache": _CACHES,
    "step_cache.gates.magcache": ("step_cache/test_curves", *_CACHES),
    "step_cache.gates.seacache": _CACHES,
    "step_cache.gates.cg_taylor": ("step_cache/test_cg_taylor", *_CACHES),
    "step_cache.gates.step_mask": ("step_cache/test_step_mask", *_CACHES),
    "step_cache.gates.fora": _CACHES,
    "step_cache.gates.taylorseer": ("step_cache/test_forecasters", *_CACHES),
    "schedule.recipe": ("schedule/test_matching", *_STAGES),
    "schedule.matching": ("schedule/test_matching", *_STAGES),
    "schedule.presets": (*_STAGES, "schedule/test_marginals"),
    "schedule.preset_schedule": _STAGES,
    "schedule.staged": (*_STAGES, *_RUNS, "predict/test_codings"),
    "schedule.stage_pass": (*_STAGES, *_RUNS, "schedule/test_whole_frames"),
}

#: The seconds after which tests of a mutant do not come to an end.
LIMIT = 300.0

_COMPARED: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
}
_OPERATED: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.Mult,
    ast.Pow: ast.Mult,
    ast.BitOr: ast.BitAnd,
    ast.BitAnd: ast.BitOr,
}
_REMOVED = (ast.Expr, ast.Assign, ast.AugAssign, ast.Raise, ast.Delete)


#: The seconds of each test and the functions that it reached; the modules that were imported.
Found = tuple[dict[str, tuple[float, list[str]]], list[str]]


@dataclass(frozen=True)
class Change:
    """One small change to a module that was parsed: where it is, what it does, and how to make it."""

    line: int
    function: str | None
    what: str
    make: Callable[[], None]


def changes(tree: ast.Module) -> list[Change]:
    """List every change that a module offers, in the order of its text."""
    return list(_changes(tree, "", None))


def _changes(node: ast.AST, path: str, function: str | None) -> Iterator[Change]:
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        path = f"{path}.{node.name}".lstrip(".")
        function = path if isinstance(node, ast.FunctionDef) else function
    yield from _own(node, function)
    for name, value in ast.iter_fields(node):
        if name in ("annotation", "returns", "decorator_list", "bases") or isinstance(node, (ast.JoinedStr, ast.Raise)):
            continue  # types and texts
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST) and not _left_alone(child):
                yield from _changes(child, path, function)


def _left_alone(node: ast.AST) -> bool:
    """Whether a node says something to readers and tools alone."""
    if isinstance(node, ast.If):
        return ast.unparse(node.test) == "TYPE_CHECKING"
    return isinstance(node, (ast.Import, ast.ImportFrom)) or _is_text(node)


def _is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def _own(node: ast.AST, function: str | None) -> Iterator[Change]:
    """Give the changes of a node itself."""

    def change(make: Callable[[], None], before: str, after: str) -> Change:
        return Change(getattr(node, "lineno", 0), function, f"{before} -> {after}", make)

    if isinstance(node, ast.Compare):
        for index, operator in enumerate(node.ops):
            other = [*node.ops[:index], _COMPARED[type(operator)](), *node.ops[index + 1 :]]
            text = ast.unparse(ast.Compare(node.left, other, node.comparators))
            yield change(_setting(node, "ops", other), ast.unparse(node), text)
    elif isinstance(node, ast.BoolOp):
        op = ast.And() if isinstance(node.op, ast.Or) else ast.Or()
        yield change(_setting(node, "op", op), ast.unparse(node), ast.unparse(ast.BoolOp(op, node.values)))
    elif isinstance(node, ast.BinOp) and type(node.op) in _OPERATED:
        other_op = _OPERATED[type(node.op)]()
        text = ast.unparse(ast.BinOp(node.left, other_op, node.right))
        yield change(_setting(node, "op", other_op), ast.unparse(node), text)
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        yield change(_setting(node, "op", ast.UAdd()), ast.unparse(node), f"+{ast.unparse(node.operand)}")
    elif isinstance(node, (ast.If, ast.While, ast.IfExp)):
        test = ast.UnaryOp(ast.Not(), node.test)
        yield change(_setting(node, "test", test), f"if {ast.unparse(node.test)}", f"if {ast.unparse(test)}")
    elif isinstance(node, ast.Constant) and isinstance(node.value, (bool, int, float)):
        value = not node.value if isinstance(node.value, bool) else node.value + 1
        yield change(_setting(node, "value", value), repr(node.value), repr(value))
    elif isinstance(node, ast.Return) and node.value is not None and not _is_none(node.value):
        yield change(_setting(node, "value", ast.Constant(None)), ast.unparse(node), "return None")
    for body in ("body", "orelse", "finalbody"):
        statements = getattr(node, body, None)
        for index, statement in enumerate(statements if isinstance(statements, list) else ()):
            if isinstance(statement, _REMOVED) and not _is_text(statement) and function is not None:
                text = f"{ast.unparse(statement).partition(chr(10))[0]} -> pass"
                nothing = ast.copy_location(ast.Pass(), statement)
                yield Change(statement.lineno, function, text, _placing(statements, index, nothing))


def _is_none(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and node.value is None


def _setting(node: ast.AST, name: str, value: object) -> Callable[[], None]:
    return lambda: setattr(node, name, value)


def _placing(statements: list[ast.stmt], index: int, statement: ast.stmt) -> Callable[[], None]:
    return lambda: statements.__setitem__(index, statement)


def functions(tree: ast.Module) -> Iterator[tuple[str, ast.FunctionDef]]:
    """List the functions of a module by their paths."""

    def walk(node: ast.AST, path: str) -> Iterator[tuple[str, ast.FunctionDef]]:
        for child in ast.iter_child_nodes(node):
            named = isinstance(child, (ast.FunctionDef, ast.ClassDef))
            inside = f"{path}.{child.name}".lstrip(".") if named else path
            if isinstance(child, ast.FunctionDef):
                yield inside, child
            yield from walk(child, inside)

    yield from walk(tree, "")


def path_of(module: str) -> Path:
    return ROOT / "src" / "fastdit" / f"{module.replace('.', '/')}.py"


def parsed(module: str) -> ast.Module:
    return ast.parse(path_of(module).read_text(encoding="utf-8"))


class Importing:
    """Has modules imported from trees in the place of their files."""

    def __init__(self, trees: dict[str, ast.Module]) -> None:
        self.trees = {f"fastdit.{module}": (path_of(module), tree) for module, tree in trees.items()}

    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        if name not in self.trees:
            return None
        file, tree = self.trees[name]

        class Loader(SourceFileLoader):
            def get_code(self, fullname: str) -> Any:
                return compile(ast.fix_missing_locations(tree), str(file), "exec")

        return importlib.util.spec_from_file_location(name, file, loader=Loader(name, str(file)))


class Reached:
    """A plugin of pytest that notes for each test its seconds and the functions that it reached."""

    def __init__(self) -> None:
        self.now: set[str] = set()
        self.tests: dict[str, tuple[float, list[str]]] = {}

    def reach(self, function: str) -> None:
        self.now.add(function)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        self.now.clear()
        start = time.process_time()
        try:
            return (yield)
        finally:
            self.tests[item.nodeid] = time.process_time() - start, sorted(self.now)


def instrumented(module: str, reach: str) -> ast.Module:
    """Give a module whose functions say that they were reached."""
    tree = parsed(module)
    for path, function in functions(tree):
        call = ast.parse(f"__import__('builtins').{reach}({f'{module}:{path}'!r})").body[0]
        function.body.insert(int(_is_text(function.body[0])), call)
    return tree


def in_a_fork(work: Callable[[], int], limit: float) -> int | None:
    """Give what the work comes to in a process of its own; None where it takes longer than `limit` seconds."""
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        code = 3
        try:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, 1)
            os.dup2(nowhere, 2)
            signal.signal(signal.SIGALRM, signal.SIG_DFL)  # which ends the process
            signal.setitimer(signal.ITIMER_REAL, limit)
            held = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
            resource.setrlimit(resource.RLIMIT_AS, (held + 6 * 2**30,) * 2)
            code = work()
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return None if code == -signal.SIGALRM else code


def tested(trees: dict[str, ast.Module], tests: Sequence[str], *plugins: object) -> int:
    """Run tests with some modules as they are in `trees`."""
    sys.meta_path.insert(0, Importing(trees))  # type: ignore[arg-type]
    early = "ignore::pytest.PytestAssertRewriteWarning"  # plugins that are imported by now
    options = ("-W", early, "-x", "-n0", "-p", "no:cacheprovider", "-p", "no:terminal")
    return int(pytest.main([*options, *tests], plugins=list(plugins)))


def reached(file: str) -> Found:
    """Run a file of tests once; give what each of them reached, and the modules that were imported."""
    with tempfile.NamedTemporaryFile(suffix=".json") as kept:

        def work() -> int:
            plugin = Reached()
            vars(builtins)["reach"] = plugin.reach
            code = tested({module: instrumented(module, "reach") for module in TARGETS}, [f"tests/{file}.py"], plugin)
            Path(kept.name).write_text(json.dumps([plugin.tests, _of_others()]), encoding="utf-8")
            return code

        if (code := in_a_fork(work, 3600.0)) != 0:
            raise SystemExit(f"{file}: its tests fail without any change ({code})")
        tests, imported = json.loads(Path(kept.name).read_bytes())
    return tests, imported


def _of_others() -> list[str]:
    """List the modules that are imported and no part of the project."""
    own = str(ROOT)
    return [
        name
        for name, module in sys.modules.items()
        if not name.startswith("fastdit") and not str(getattr(module, "__file__", None)).startswith(own)
    ]


def own_tests(
    module: str, function: str | None, tests: dict[str, tuple[float, list[str]]], seconds: float
) -> list[str]:
    """Choose of a module's tests those that reach a function, the quickest first, as many as fit into the seconds."""
    files = {f"tests/{file}.py" for file in TARGETS[module]}
    fit = {
        test: took
        for test, (took, found) in tests.items()
        if test.partition("::")[0] in files and (function is None or f"{module}:{function}" in found)
    }
    chosen: list[str] = []
    for test, took in sorted(fit.items(), key=lambda pair: pair[1]):
        seconds -= took
        if chosen and seconds < 0:
            break
        chosen.append(test)
    return chosen


@dataclass(frozen=True)
class Mutant:
    """What became of a mutant: killed, timeout, survived, or untested where no test reaches it."""

    module: str
    function: str | None
    line: int
    what: str
    verdict: str


def verdict(module: str, index: int | None, tests: Sequence[str], more: Sequence[str] = ()) -> str:
    """Say what a module's tests make of its change number `index`, or of the module as it is; `more` are tried last."""
    if not tests:
        return "untested"

    def work() -> int:
        tree = parsed(module)
        if index is not None:
            changes(tree)[index].make()
        return tested({module: tree}, tests)

    code = in_a_fork(work, LIMIT)
    if code is None:
        return "timeout"
    if code == 0 and (rest := [test for test in more if test not in tests]):
        return verdict(module, index, rest)
    return {0: "survived", 3: "broken", 5: "broken"}.get(code, "killed")


def main(
    seed: int = 1,
    each: Annotated[int, typer.Option(help="How many mutants of a module.")] = 20,
    only: Annotated[str, typer.Option(help="Modules to change, by a pattern.")] = "",
    seconds: Annotated[
        float,
        typer.Option(help="How long a mutant's first tests take; eight times as long where it survives them."),
    ] = 8.0,
    jobs: Annotated[int, typer.Option(help="How many mutants are tested at a time.")] = 2,
    kept: Annotated[Path | None, typer.Option(help="Where what tests reach is kept for the next time.")] = None,
    out: Path = RESULT,
) -> None:
    """Draw mutants of the modules and run their tests; exit 1 where under 85 % of those in the result are killed."""
    os.chdir(ROOT)
    modules = [module for module in TARGETS if re.search(only, module)]
    files = list(dict.fromkeys(file for module in modules for file in TARGETS[module]))
    recorded: dict[str, Found] = json.loads(kept.read_bytes()) if kept is not None and kept.exists() else {}
    with ProcessPoolExecutor(jobs, get_context("fork")) as pool:
        missing = [file for file in files if file not in recorded]
        for file, found in zip(missing, pool.map(reached, missing), strict=True):
            recorded[file] = found
            if kept is not None:
                kept.write_text(json.dumps(recorded), encoding="utf-8")
    tests = {test: found for file in files for test, found in recorded[file][0].items()}
    imported = sorted({name for file in files for name in recorded[file][1]})
    for name in imported:
        with contextlib.suppress(Exception):  # names that no file has, such as torch.ops' own
            importlib.import_module(name)
    if own := [name for name in sys.modules if name.startswith("fastdit")]:
        raise SystemExit(f"imported before there are mutants: {own}")
    gc.freeze()  # what is here by now is walked by no child
    drawn = []
    for module in modules:
        offered = changes(parsed(module))
        chosen = random.Random(f"{seed} {module}").sample(range(len(offered)), min(each, len(offered)))
        drawn += [(module, index, offered[index]) for index in sorted(chosen)]
    asked = [
        (module, index, *(own_tests(module, change.function, tests, limit) for limit in (seconds, 8 * seconds)))
        for module, index, change in drawn
    ]
    mutants: list[Mutant] = []
    firsts = [next(quick for name, _, quick, _ in asked if name == module) for module in modules]
    with ProcessPoolExecutor(jobs, get_context("fork")) as pool:
        unchanged = pool.map(verdict, modules, [None] * len(modules), firsts)
        for module, first, found in zip(modules, firsts, unchanged, strict=True):
            if found not in ("survived", "untested"):
                raise SystemExit(f"{module}: as it is, it is {found} by {first}")
        for (module, _, change), found in zip(drawn, pool.map(verdict, *zip(*asked, strict=True)), strict=True):
            mutants.append(Mutant(module, change.function, change.line, change.what, found))
            print(f"{found}: {module}:{change.line} {change.function}: {change.what}", flush=True)
    rows = {
        module: {
            "seed": seed,
            "offered": len(changes(parsed(module))),
            "verdicts": Counter(mutant.verdict for mutant in mutants if mutant.module == module),
        }
        for module in modules
    }
    left = [asdict(mutant) for mutant in mutants if mutant.verdict not in ("killed", "timeout")]
    known = json.loads(out.read_bytes()) if out.exists() else {"modules": {}, "left": []}
    result = joined(known, {"modules": rows, "left": left})
    from saving import save  # imports fastdit, which mutants replace

    save(out, result)
    print(f"{result['killed']:.1%} of {result['mutants']} mutants are killed")
    if result["killed"] < 0.85:
        raise typer.Exit(1)


def joined(known: Mapping[str, Any], found: Mapping[str, Any]) -> dict[str, Any]:
    """Put what was found of some modules in the place of what was known of them, and add all up.

    `killed` is the share of all mutants, those among them that no test could tell from the original, too.
    """
    modules = {**known["modules"], **found["modules"]}
    left = [mutant for mutant in known["left"] if mutant["module"] not in found["modules"]] + found["left"]
    counts = sum((Counter(row["verdicts"]) for row in modules.values()), Counter[str]())
    share = (counts["killed"] + counts["timeout"]) / counts.total()
    return {"mutants": counts.total(), "killed": share, "modules": modules, "left": left}


if __name__ == "__main__":
    typer.run(main)
