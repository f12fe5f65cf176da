"""Everything that the adapter uses of torch-tensorrt is in the published wheel, by name and keyword.

The wheel is read, not imported: importing it needs a CUDA build of torch and the TensorRT libraries.
"""

from __future__ import annotations

import ast
import os
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

import fastdit_tensorrt

WHEEL = os.environ.get("TORCH_TENSORRT_WHEEL", "")
needs_wheel = pytest.mark.skipif(
    not Path(WHEEL).is_file(),
    reason="set TORCH_TENSORRT_WHEEL to what `pip download torch-tensorrt==2.14.0 --no-deps` gives",
)

#: Where the wheel defines what the adapter calls.
DEFINED = {
    "torch_tensorrt.dynamo.compile": ("torch_tensorrt/dynamo/_compiler.py", "compile"),
    "torch_tensorrt.save": ("torch_tensorrt/_compile.py", "save"),
    "torch_tensorrt.load": ("torch_tensorrt/_compile.py", "load"),
}

#: What `torch_tensorrt.Input` takes, which it reads from its `**kwargs`.
INPUT = ("shape", "profiles", "dtype")

ADAPTER = Path(fastdit_tensorrt.__file__).parent


def source(name: str) -> str:
    with zipfile.ZipFile(WHEEL) as wheel:
        return wheel.read(name).decode()


def function(name: str, module: str, within: str | None = None) -> ast.FunctionDef:
    """Find the function of a file of the wheel, or the method of one of its classes."""
    body = ast.parse(source(module)).body
    if within is not None:
        body = next(node.body for node in body if isinstance(node, ast.ClassDef) and node.name == within)
    return next(node for node in body if isinstance(node, ast.FunctionDef) and node.name == name)


def calls(root: str) -> Iterator[tuple[str, list[str], int]]:
    """List the adapter's calls whose name begins with `root`: the name, its keywords, how many more arguments."""
    for path in ADAPTER.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                name = ast.unparse(node.func).replace("_torch_tensorrt()", "torch_tensorrt")
                if name.startswith(root):
                    yield name, [str(keyword.arg) for keyword in node.keywords], len(node.args)


def test_every_call_of_torch_tensorrt_is_one_that_is_checked() -> None:
    assert {name.removesuffix(".module") for name, *_ in calls("torch_tensorrt.")} == {
        "torch_tensorrt.dynamo.compile",
        "torch_tensorrt.save",
        "torch_tensorrt.load",
        "torch_tensorrt.load(str(folder / _PROGRAM))",
    }


@needs_wheel
@pytest.mark.parametrize("name", DEFINED)
def test_every_keyword_and_position_is_a_parameter(name: str) -> None:
    module, defined = DEFINED[name]
    taken = function(defined, module).args
    names = {argument.arg for argument in (*taken.args, *taken.kwonlyargs)}
    found = [(keywords, count) for called, keywords, count in calls(name) if called == name]
    assert found
    for keywords, count in found:
        assert set(keywords) <= names
        assert count <= len(taken.args)


@needs_wheel
def test_an_input_takes_profiles_a_shape_and_a_type() -> None:
    given = {keyword for _, keywords, _ in calls("make") for keyword in keywords}
    assert given == set(INPUT)
    read = source("torch_tensorrt/_Input.py")
    assert all(f'"{keyword}" in kwargs' in read or f'kwargs.get("{keyword}")' in read for keyword in INPUT)
    assert all(f'"{name}"' in read for name in ("min_shape", "opt_shape", "max_shape"))
    exported = ast.parse(source("torch_tensorrt/__init__.py"))
    assert any(
        isinstance(node, ast.ImportFrom) and node.module == "torch_tensorrt._Input" and node.names[0].name == "Input"
        for node in ast.walk(exported)
    )


@needs_wheel
def test_the_cache_has_the_methods_of_its_base() -> None:
    base = "torch_tensorrt/dynamo/_engine_cache.py"
    for name in ("save", "load"):
        theirs = [argument.arg for argument in function(name, base, "BaseEngineCache").args.args]
        (own,) = (
            [argument.arg for argument in node.args.args]
            for node in ast.walk(ast.parse((ADAPTER / "cache.py").read_text()))
            if isinstance(node, ast.FunctionDef) and node.name == name
        )
        assert own == theirs
    abstract = [
        node.name
        for node in ast.walk(ast.parse(source(base)))
        if isinstance(node, ast.FunctionDef) and "abstractmethod" in map(ast.unparse, node.decorator_list)
    ]
    assert set(abstract) == {"__init__", "save", "load"}


@needs_wheel
def test_a_cached_engine_is_refitted_and_the_weights_are_not_in_it() -> None:
    pulled = ast.unparse(function("pull_cached_engine", "torch_tensorrt/dynamo/conversion/_conversion.py"))
    assert "_refit_single_trt_engine_with_gm" in pulled
    inserted = ast.unparse(function("insert_engine_to_cache", "torch_tensorrt/dynamo/conversion/_conversion.py"))
    assert "EXCLUDE_WEIGHTS" in inserted


@needs_wheel
def test_both_runtimes_switch_profiles_by_the_method_that_is_called() -> None:
    assert function("set_active_profile", "torch_tensorrt/dynamo/runtime/_TRTEngine.py", "TRTEngine")
    assert "set_active_profile" in source("torch_tensorrt/dynamo/runtime/_TorchTensorRTModule.py")


@needs_wheel
def test_the_wheel_asks_for_the_torch_that_the_adapter_pins() -> None:
    with zipfile.ZipFile(WHEEL) as wheel:
        (metadata,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    asked = [line for line in source(metadata).splitlines() if line.startswith("Requires-Dist: torch<")]
    assert asked == ["Requires-Dist: torch<2.15.0,>=2.14.0"]
    pinned = (ADAPTER.parents[1] / "pyproject.toml").read_text()
    assert '"torch>=2.14,<2.15"' in pinned
