"""What every test shares: one torch thread, seeded randomness, no gradients, quiet pipelines."""

from __future__ import annotations

import atexit
import gc
import os
import shutil
import sys
import tempfile
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from xdist.workermanage import WorkerController

# The references and helpers of one room are used in another.
sys.path.extend(str(Path(__file__).parent / room) for room in ("schedule", "step_cache", "token_cache", "core"))
sys.path.extend((str(Path(__file__).parent), str(Path(__file__).parents[1] / "benchmarks")))
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from compiler import remembering

# The compiler is told to torch before torch is there; workers of xdist and processes that tests start get it from here.
if "CXX" not in os.environ and (found := shutil.which("g++")) is not None:
    _compiled = Path(tempfile.mkdtemp(prefix="compiler-"))
    atexit.register(shutil.rmtree, _compiled, ignore_errors=True)
    os.environ["CXX"] = str(remembering(_compiled, found))

import torch
from hypothesis import HealthCheck, settings

settings.register_profile(
    "fastdit", deadline=None, max_examples=25, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("fastdit")

# Half a million objects are made by imports and stay; to look among them for garbage would find none. See
# `pytest_collection_finish`.
gc.disable()

#: How many rows of a test are fast ones, unless its `rows` mark says otherwise.
FAST_ROWS = 4

_LEFT_OUT = pytest.StashKey[int]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--exhaustive", action="store_true", help="run the tests marked `exhaustive`, too")
    parser.addoption("--pretend-cuda", action="store_true", help="run tests/cuda; for a CUDA build of torch, no driver")


def _mark_rows(items: list[pytest.Item]) -> None:
    """Mark what a test has of rows beyond the fast ones as exhaustive.

    Those that stay are spread evenly over all, from a place that the test's name gives, so that among many tests over
    one list each of its members is somewhere.
    """
    tests: defaultdict[str, list[pytest.Item]] = defaultdict(list)
    for item in items:
        if not item.get_closest_marker("exhaustive"):
            tests[item.nodeid.partition("[")[0]].append(item)
    for name, rows in tests.items():
        mark = rows[0].get_closest_marker("rows")
        most, first = mark.args[0] if mark else FAST_ROWS, zlib.crc32(name.encode())
        stay = {(first + index * len(rows) // most) % len(rows) for index in range(min(most, len(rows)))}
        for index, item in enumerate(rows):
            if index not in stay:
                item.add_marker("exhaustive")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave the exhaustive tests out unless they are asked for. Files that are named are run with all their rows."""
    if config.args_source == pytest.Config.ArgsSource.TESTPATHS:
        _mark_rows(items)
    if config.getoption("--exhaustive"):
        return
    exhaustive = [item for item in items if item.get_closest_marker("exhaustive")]
    if exhaustive:
        config.hook.pytest_deselected(items=exhaustive)
        items[:] = [item for item in items if not item.get_closest_marker("exhaustive")]
    config.stash[_LEFT_OUT] = len(exhaustive)
    if hasattr(config, "workeroutput"):  # a worker of xdist
        config.workeroutput["left_out"] = len(exhaustive)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: WorkerController) -> None:
    """Each worker collects all tests, so any of them knows how many were left out."""
    node.config.stash[_LEFT_OUT] = getattr(node, "workeroutput", {}).get("left_out", 0)


def pytest_collection_finish() -> None:
    """What is imported by now stays: a collection of garbage need not walk it each time (some 450,000 objects)."""
    gc.collect()
    gc.freeze()
    gc.enable()


@pytest.fixture
def only_new_objects() -> Iterator[None]:
    """Keep older objects out of the collector's sight: looking through them takes up to seconds, each time."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()
    gc.collect()
    gc.freeze()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if left_out := config.stash.get(_LEFT_OUT, 0):
        terminalreporter.write_line(f"{left_out} tests marked exhaustive were left out; --exhaustive runs them, too")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """A process for each core when everything is run, none when some tests are named: a start costs ten seconds."""
    whole = config.args_source == pytest.Config.ArgsSource.TESTPATHS
    return min(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1, 8) * whole


def pytest_configure(config: pytest.Config) -> None:
    """Warnings are errors; these come out of released versions of the libraries, not out of ours."""
    # diffusers' DPM solver hands a tensor to numpy 2 in a way that torch does not know yet.
    config.addinivalue_line(
        "filterwarnings", "ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning"
    )
    # peft tells that a second LoRA is the second one.
    config.addinivalue_line("filterwarnings", "ignore:Already found a `peft_config` attribute:UserWarning")


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    """Tiny tensors gain nothing from threads, and a busy machine loses much by them."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def cache_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Keep the user's own folders out of the tests; engines are kept for the session, so that each is built once."""
    own = tmp_path_factory.getbasetemp()
    session = own.parent if "PYTEST_XDIST_WORKER" in os.environ else own  # one for all workers
    (home := session / "cache").mkdir(exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FASTDIT_CACHE", str(home))
        patch.setenv("FASTDIT_STATE", str(session / "state"))
        yield home


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    """Start each test from one global seed; nothing may depend on it, but a failure must repeat."""
    torch.manual_seed(0)
    yield


@pytest.fixture(autouse=True)
def nothing_compiled_stays() -> Iterator[None]:
    """After a test that compiled, drop what the compiler keeps for the whole process: graphs, guards, limits."""
    yield
    compiler = sys.modules.get("torch._dynamo.convert_frame")
    if compiler is not None and compiler.FRAME_COUNTER:  # counts from the last reset
        torch._dynamo.reset()


@pytest.fixture
def no_grad() -> Iterator[None]:
    """For tests with a loop of their own; the pipelines switch gradients off themselves."""
    with torch.no_grad():
        yield


@pytest.fixture
def generators() -> Callable[..., object]:
    """Fresh generators: `generators(3)` is one, `generators(3, 4)` a list of two."""

    def make(*seeds: int) -> object:
        made = [torch.Generator().manual_seed(seed) for seed in seeds]
        return made[0] if len(made) == 1 else made

    return make
