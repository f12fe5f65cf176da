"""Twins in several threads share parts that keep something of a call: each is served as if it were alone."""

from __future__ import annotations

import copy
import os
import pickle
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

import tiny
from fastdit import accelerate
from fastdit.models.turns import in_turn
from fastdit.process import Turn
from fastdit.testing import generate


def at_once(*works: Callable[[], Any]) -> list[Any]:
    """Do all of it in threads that begin together."""
    begin = threading.Barrier(len(works))

    def work(one: Callable[[], Any]) -> Any:
        begin.wait()
        return one()

    with ThreadPoolExecutor(len(works)) as pool:
        return list(pool.map(work, works))


def slowly(cls: type, name: str) -> type:
    """Subclass a class so that others get a turn in the middle of a method's work."""

    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        made = getattr(cls, name)(self, *args, **kwargs)
        time.sleep(0.05)
        return made

    return type(cls.__name__, (cls,), {name: method})


def test_a_prompt_is_read_with_the_padding_that_was_asked_for() -> None:
    pipe, _ = tiny.flux(text=True)
    pipe.tokenizer.__class__ = slowly(type(pipe.tokenizer), "set_truncation_and_padding")
    one, other = (accelerate(pipe, []).tokenizer for _ in range(2))

    def padded() -> int:
        return len(one("a cat", padding="max_length", max_length=16, truncation=True).input_ids)

    def plain() -> int:
        return len(other("a cat", padding=False).input_ids)

    expected = [padded(), plain()]
    assert expected[0] == 16 > expected[1]
    assert at_once(padded, plain) == expected


def test_pictures_of_prompts_are_those_of_twins_that_run_alone() -> None:
    pipe, call = tiny.flux(text=True)
    pipe.tokenizer.__class__ = slowly(type(pipe.tokenizer), "set_truncation_and_padding")
    twins = [accelerate(pipe, []) for _ in range(2)]
    works = [lambda twin=twin, seed=seed: generate(twin, call, seeds=seed) for seed, twin in enumerate(twins)]
    alone = [work() for work in works]
    for found, expected in zip(at_once(*works), alone, strict=True):
        assert torch.equal(found, expected)


def test_frames_are_decoded_beside_another_s() -> None:
    pipe, _ = tiny.wan()
    pipe.vae.decoder.register_forward_pre_hook(lambda *_: time.sleep(0.02))
    twins = [accelerate(pipe, []) for _ in range(2)]
    latents = [torch.randn(1, pipe.vae.config.z_dim, 3, 4, 4, generator=torch.manual_seed(seed)) for seed in range(2)]
    works = [
        lambda twin=twin, frames=frames: twin.vae.decode(frames, return_dict=False)[0]
        for twin, frames in zip(twins, latents, strict=True)
    ]
    alone = [work() for work in works]
    for found, expected in zip(at_once(*works), alone, strict=True):
        assert torch.equal(found, expected)


def test_a_guider_s_memory_is_a_run_s_own() -> None:
    from diffusers.guiders import AdaptiveProjectedMixGuidance

    pipe, call = tiny.described("HunyuanImagePipeline")
    guider = AdaptiveProjectedMixGuidance(
        adaptive_projected_guidance_momentum=-0.5, adaptive_projected_guidance_start_step=0
    )
    pipe.register_modules(guider=guider, ocr_guider=guider)
    one, other = (accelerate(pipe, []) for _ in range(2))
    alone = generate(one, call)

    def amid(_: Any, step: int, __: Any, values: Any) -> Any:
        if step == 1:
            generate(other, call, seeds=5)
        return values

    assert torch.equal(generate(one, {**call, "callback_on_step_end": amid}), alone)
    assert guider._step is None, "the user's own guider was used"


class TestAPartInTurn:
    def part(self) -> Any:
        return tiny.wan()[0].vae

    def test_is_the_same_object_in_another_class(self) -> None:
        part = self.part()
        shown = in_turn(part)
        assert isinstance(shown, type(part)) and vars(shown) is vars(part)
        assert in_turn(part) is shown
        shown.use_tiling = True
        assert part.use_tiling

    def test_keeps_a_method_that_is_set_in_the_place_of_its_own(self) -> None:
        part = self.part()
        shown = in_turn(part)
        shown.decode = lambda frames: frames + 1
        assert part.decode(1) == shown.decode(1) == 2
        del shown.decode
        assert "decode" not in vars(part)

    @pytest.mark.parametrize("copied", [copy.deepcopy, lambda shown: pickle.loads(pickle.dumps(shown))])
    def test_is_copied_as_an_object_of_its_own_class(self, copied: Callable[[Any], Any]) -> None:
        part = self.part()
        assert type(copied(in_turn(part))) is type(part)

    def test_is_any_part_s_own_that_keeps_nothing(self) -> None:
        pipe, _ = tiny.flux(text=True)
        fast = accelerate(pipe, [])
        assert fast.text_encoder is pipe.text_encoder and fast.vae is pipe.vae


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_child_waits_for_no_thread_of_its_parent() -> None:
    turn = Turn()
    taken, leave = threading.Event(), threading.Event()

    def hold() -> None:
        with turn.lock:
            taken.set()
            leave.wait()

    thread = threading.Thread(target=hold)
    thread.start()
    taken.wait()
    child = os.fork()
    if child == 0:
        os._exit(0 if turn.lock.acquire(timeout=5) else 1)
    leave.set()
    thread.join()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
