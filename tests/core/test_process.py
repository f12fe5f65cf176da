"""What belongs to the whole process is after any two threads as it was before, and is never one twin's alone."""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.utils import logging as diffusers_logging
from torch import nn
from torch.nn.modules import module as torch_s

import tiny
from fastdit import accelerate
from fastdit.engine.inductor import inductor_in
from fastdit.meter import count
from fastdit.mini import parts
from fastdit.process import environment, unheard_warnings

FOLDERS = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")


def entered_while_another_is_inside(
    contexts: list[AbstractContextManager[Any]], inside: Callable[[], Any] = lambda: None
) -> list[Any]:
    """Enter two contexts in two threads, the second while the first is inside, and leave the first one first."""
    found: list[Any] = []
    both, first_left = threading.Event(), threading.Event()

    def second() -> None:
        with contexts[1]:
            both.set()
            first_left.wait(10)
            found.append(inside())

    thread = threading.Thread(target=second)
    with contexts[0]:
        thread.start()
        both.wait(0.2)  # one that takes turns gets here by the clock
        found.append(inside())
    first_left.set()
    thread.join(10)
    assert not thread.is_alive()
    return found


@pytest.mark.parametrize("before", [None, "the user's own"])
def test_two_builds_at_once_have_a_folder_each_and_the_environment_is_as_before(
    before: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in FOLDERS:
        monkeypatch.setenv(name, before) if before is not None else monkeypatch.delenv(name, raising=False)
    filters = list(warnings.filters)
    found = entered_while_another_is_inside(
        [inductor_in(tmp_path / "one"), inductor_in(tmp_path / "other")], lambda: os.environ[FOLDERS[0]]
    )
    assert found == [str(tmp_path / "one"), str(tmp_path / "other")]
    assert [os.environ.get(name) for name in FOLDERS] == [before] * 2
    assert warnings.filters == filters


def test_loaders_say_as_much_as_before_after_two_embedded_pipelines_were_loaded_at_once() -> None:
    before = diffusers_logging.get_verbosity(), diffusers_logging.is_progress_bar_enabled()
    entered_while_another_is_inside([parts.quiet(), parts.quiet()])
    assert (diffusers_logging.get_verbosity(), diffusers_logging.is_progress_bar_enabled()) == before


def test_warnings_are_held_back_in_one_thread_and_shown_as_ever_in_the_others() -> None:
    shown: list[str] = []

    def warned() -> None:
        try:
            warnings.warn("seen by another thread", UserWarning, stacklevel=1)
        except UserWarning as error:  # warnings are errors here
            shown.append(str(error))

    with unheard_warnings() as texts:
        thread = threading.Thread(target=warned)
        thread.start()
        thread.join()
        warnings.warn("the compiler's remark", UserWarning, stacklevel=1)
    assert shown == ["seen by another thread"] and texts == ["the compiler's remark"]
    with pytest.raises(UserWarning, match="as ever"):
        warnings.warn("as ever", UserWarning, stacklevel=1)


@pytest.mark.parametrize("first", ["ours", "the user's"])
def test_no_filter_is_left_where_somebody_else_s_filters_are_put_back_in_between(first: str) -> None:
    @contextmanager
    def user_s() -> Iterator[None]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ResourceWarning)
            yield

    before = list(warnings.filters)
    contexts: list[AbstractContextManager[Any]] = [unheard_warnings(), user_s()]
    entered_while_another_is_inside(contexts if first == "ours" else contexts[::-1])
    assert warnings.filters == before


def test_what_was_set_is_put_back_after_an_error_and_within_itself() -> None:
    with pytest.raises(KeyboardInterrupt), environment({"FASTDIT_A": "1"}), environment({"FASTDIT_A": "2"}):
        assert os.environ["FASTDIT_A"] == "2"
        raise KeyboardInterrupt
    assert "FASTDIT_A" not in os.environ


class Noting(nn.Module):
    """Notes, while it runs, how many hooks every module of the process has."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.noted = nn.Linear(3, 5), []

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        self.noted.append((len(torch_s._global_forward_pre_hooks), len(torch_s._global_forward_hooks)))
        output: torch.Tensor = self.linear(values)
        return output


def test_counting_flops_hooks_no_other_module_of_the_process() -> None:
    """Where torch's own counter does, a module that runs in another thread is counted, or raises."""
    module = Noting()
    counted = count(module, torch.ones(2, 3))
    assert module.noted == [(0, 0)]
    assert counted.modules == {"": 60, "linear": 60} and counted.total == 60


def in_a_forked_child(act: Callable[[], None]) -> int:
    """Do something in a child of this process, and give its exit status: 0 unless that raised."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python's own, about forks beside threads
        child = os.fork()
    if child == 0:
        status = 1
        try:
            act()
            status = 0
        finally:
            os._exit(status)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status)


def test_a_child_that_is_forked_while_another_thread_builds_can_build_itself() -> None:
    inside, done = threading.Event(), threading.Event()

    def build() -> None:
        with environment({}):
            inside.set()
            done.wait(10)

    def build_in_the_child() -> None:
        other = threading.Thread(target=lambda: environment({}).__enter__(), daemon=True)
        other.start()
        other.join(5)
        assert not other.is_alive()

    thread = threading.Thread(target=build)
    thread.start()
    inside.wait(10)
    status = in_a_forked_child(build_in_the_child)
    done.set()
    thread.join()
    assert status == 0


def test_a_child_that_is_forked_while_another_thread_calls_a_twin_can_call_it_itself() -> None:
    pipe, call = tiny.flux(steps=1)
    fast = accelerate(pipe, [])
    inside, done = threading.Event(), threading.Event()

    def wait(*_: Any) -> None:
        inside.set()
        assert done.wait(30)

    def call_in_the_child() -> None:
        done.set()
        tiny.run(fast, call)

    handle = pipe.transformer.transformer_blocks[1].register_forward_pre_hook(wait)
    thread = threading.Thread(target=tiny.run, args=(fast, call))
    thread.start()
    assert inside.wait(30)
    status = in_a_forked_child(call_in_the_child)
    done.set()
    thread.join()
    handle.remove()
    assert status == 0
