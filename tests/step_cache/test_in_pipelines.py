"""Step caches in the ways that pipelines really call their transformers: guidance, strengths, solvers, families."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from diffusers import (
    DPMSolverMultistepScheduler,
    FlowMatchHeunDiscreteScheduler,
    FluxImg2ImgPipeline,
    UniPCMultistepScheduler,
    WanVideoToVideoPipeline,
)
from torch import Tensor, nn

import tiny
from fastdit import (
    DMD,
    RALU,
    CGTaylor,
    DBCache,
    EasyCache,
    FirstBlockCache,
    FoCa,
    IncompatibleStack,
    Interval,
    InvalidConfig,
    MagCache,
    MagnitudeCurve,
    NeverFired,
    PublishedTaylor,
    Reuse,
    SeaCache,
    SkipPolicy,
    Stack,
    StepMask,
    Taylor,
    TaylorSeer,
    TeaCache,
    ToCa,
    UnsupportedModel,
    accelerate,
)
from fastdit.accelerator import Change
from fastdit.twins.foreign_state import changes_of
from pairwise import crossed

pytestmark = pytest.mark.usefixtures("no_grad")

STEPS = 10
LINE = (1.0, 0.0)
FREE = SkipPolicy(first=1, last=0)
GATES: dict[str, Any] = {
    "first block": FirstBlockCache(1e6, policy=SkipPolicy(first=1, max_consecutive=3)),
    "interval with Taylor": Interval(3, forecast=Taylor(1)),
    "EasyCache": EasyCache(1.0, policy=SkipPolicy(first=2, max_consecutive=3)),
}
each_gate = pytest.mark.parametrize("gate", GATES.values(), ids=GATES.keys())


def latents_of(fast: Any, call: dict[str, Any], **changes: Any) -> Tensor:
    return tiny.run(fast, call, output_type="latent", **changes)


def of_branch(fast: Any, branch: str) -> list[Any]:
    return [step for step in fast.fastdit.last_run.steps if step.branch == branch]


def actions(steps: Any) -> list[str]:
    return [step.action for step in steps]


def branches(fast: Any) -> list[str]:
    return list(dict.fromkeys(step.branch for step in fast.fastdit.last_run.steps))


def test_a_cache_of_whole_forwards_is_refused_where_a_model_predicts_more_than_its_latents() -> None:
    pipe, call = tiny.pixart(steps=STEPS)  # a variance, too
    with pytest.raises(UnsupportedModel, match=r"the latents' own shape"):
        latents_of(accelerate(pipe, [EasyCache(1.0)]), call)


@pytest.mark.parametrize(
    ("name", "calls", "rows"),
    [("sd3", 1, 2), ("pixart", 1, 2), ("flux", 2, 1), ("qwen-image", 2, 1), ("wan", 2, 1)],
)
def test_branches_in_one_batch_are_decided_together_and_branches_of_their_own_calls_apart(
    name: str, calls: int, rows: int
) -> None:
    pipe, call = tiny.PIPELINES[name](steps=STEPS)
    if name == "flux":
        call = tiny.flux_negative(call)
    fast = accelerate(pipe, [Interval(3)])
    latents_of(fast, call)
    assert len(branches(fast)) == calls
    assert {step.batch for step in fast.fastdit.last_run.steps} == {rows}
    for branch in branches(fast):
        steps = of_branch(fast, branch)
        assert [step.step for step in steps] == list(range(STEPS))
        assert [step.action == "computed" for step in steps] == [step % 3 == 0 for step in range(STEPS)]


def two_prompts(name: str) -> tuple[Any, dict[str, Any]]:
    """A pipeline with both branches in one batch, and two prompts that are far apart."""
    pipe, call = tiny.PIPELINES[name](steps=STEPS)
    one = {key: value for key, value in call.items() if isinstance(value, Tensor)}
    strong = {key: value if "mask" in key else 4.0 * value.flip(-1) for key, value in one.items()}
    return pipe, {**call, **{key: torch.cat([value, strong[key]]) for key, value in one.items()}}


@pytest.mark.parametrize(
    ("name", "cache"),
    [
        ("pixart", FirstBlockCache(0.75, per_image=True, forecast=Taylor(1))),
        ("sd3", TeaCache(0.5, LINE, per_image=True)),
        ("sd3", EasyCache(0.5, per_image=True)),
    ],
    ids=str,
)
def test_each_row_of_a_guided_batch_decides_by_itself_and_for_itself(name: str, cache: Any) -> None:
    pipe, call = two_prompts(name)
    fast = accelerate(pipe, [cache])
    noise = tiny.randn(2, 4, 8, 8, seed=7)
    together = latents_of(fast, call, latents=noise)
    assert torch.isfinite(together).all()
    assert fast.fastdit.last_run.partial > 0
    assert {step.batch for step in fast.fastdit.last_run.steps} == {4}
    assert torch.equal(latents_of(fast, call, latents=noise), together)
    for index in range(2):
        own = {key: value[index : index + 1] for key, value in call.items() if isinstance(value, Tensor)}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", NeverFired)  # one of the two may have nothing to skip
            alone = latents_of(fast, call | own, latents=noise[index : index + 1])
        torch.testing.assert_close(together[index : index + 1], alone, rtol=1e-3, atol=1e-3)


def test_rows_are_proved_separable_anew_where_a_shared_tensor_has_as_many_rows_as_the_batch() -> None:
    """22 tokens share a table of 22 positions; among 22 images the table looks as if it held a row of each."""
    pipe, call = tiny.flux(steps=6)
    fast = accelerate(pipe, [FirstBlockCache(0.7, per_image=True, policy=FREE)])

    def batch(count: int) -> dict[str, Any]:
        strength = torch.linspace(0.05, 4.0, count)
        return call | {
            "prompt_embeds": call["prompt_embeds"] * strength[:, None, None],
            "pooled_prompt_embeds": call["pooled_prompt_embeds"] * strength[:, None],
        }

    latents_of(fast, batch(4))
    assert fast.fastdit.last_run.partial > 0
    with pytest.raises(UnsupportedModel, match="one by one"):
        latents_of(fast, batch(22))


def guided_from(pipe: Any, fast: Any, call: dict[str, Any], scales: list[float]) -> Tensor:
    """Run with a guidance scale of its own at each step, set by the callback of the step before."""

    def callback(twin: Any, step: int, _: Tensor, values: dict[str, Any]) -> dict[str, Any]:
        twin._guidance_scale = scales[min(step + 1, STEPS - 1)]
        return values

    return latents_of(fast, call, guidance_scale=scales[0], callback_on_step_end=callback)


@pytest.mark.parametrize(
    ("gate", "guided"), crossed(GATES.values(), [range(4, STEPS), range(0, 6), range(3, 8), [0, 1, 2, 7, 8, 9]])
)
def test_a_branch_that_comes_and_goes_starts_computed_and_does_not_disturb_the_other(gate: Any, guided: Any) -> None:
    pipe, call = tiny.wan(steps=STEPS)
    fast = accelerate(pipe, [gate])
    alone = latents_of(fast, call, guidance_scale=1.0)
    undisturbed = actions(fast.fastdit.last_run.steps)
    # With the same prompt on both sides guidance changes nothing, so the conditional branch must act as it did alone.
    same = call | {"negative_prompt_embeds": call["prompt_embeds"]}
    scales = [3.0 if step in guided else 1.0 for step in range(STEPS)]
    found = guided_from(pipe, fast, same, scales)
    assert actions(of_branch(fast, "cond")) == undisturbed
    late = of_branch(fast, "uncond")
    assert [step.step for step in late] == list(guided)
    entries = [step for step in late if step.step - 1 not in guided]
    assert actions(entries) == ["computed"] * len(entries)
    if gate is GATES["interval with Taylor"] and guided != range(0, 6):
        assert {step.reason for step in entries} <= {"first steps", "no history", "left out before"}
    assert torch.isfinite(found).all()
    assert torch.equal(guided_from(pipe, fast, same, scales), found)
    if guided == range(0, 6):
        torch.testing.assert_close(found, alone, rtol=1e-3, atol=1e-3)


@each_gate
def test_a_guided_batch_that_shrinks_to_one_branch_is_computed_there(gate: Any) -> None:
    """Z-Image leaves guidance out from a share of the run on: two rows become one."""
    pipe, call = tiny.z_image(steps=STEPS)
    fast = accelerate(pipe, [gate])
    found = latents_of(fast, call, cfg_truncation=0.5)
    steps = fast.fastdit.last_run.steps
    shrunk = next(step for step in steps if step.batch == 1)
    assert 0 < shrunk.step < STEPS - 1
    assert (shrunk.action, shrunk.reason) == ("computed", "another shape")
    assert torch.isfinite(found).all()
    assert torch.equal(latents_of(fast, call, cfg_truncation=0.5), found)


def test_a_guided_batch_that_shrinks_in_a_callback_is_computed_there() -> None:
    pipe, call = tiny.sd3(steps=STEPS)

    def callback(twin: Any, step: int, _: Tensor, values: dict[str, Any]) -> dict[str, Any]:
        if step == 4:
            twin._guidance_scale = 1.0
            return {name: value if name == "latents" else value.chunk(2)[1] for name, value in values.items()}
        return values

    inputs = ["latents", "prompt_embeds", "pooled_prompt_embeds"]
    for cache in (Interval(3, forecast=Taylor(2)), FirstBlockCache(1e6, per_image=True)):
        fast = accelerate(pipe, [cache])
        changes = {"callback_on_step_end": callback, "callback_on_step_end_tensor_inputs": inputs}
        assert torch.isfinite(latents_of(fast, call, **changes)).all()
        steps = fast.fastdit.last_run.steps
        assert [step.batch for step in steps] == [2] * 5 + [1] * 5
        assert steps[5].action == "computed"


def unguided_after(step: int) -> dict[str, Any]:
    """What makes an SD3 pipeline leave guidance out after a step: its batch has half as many rows from then on."""

    def callback(twin: Any, now: int, _: Tensor, values: dict[str, Any]) -> dict[str, Any]:
        if now != step:
            return {}
        twin._guidance_scale = 0.0
        return {name: value.chunk(2)[1] for name, value in values.items()}

    return {
        "callback_on_step_end": callback,
        "callback_on_step_end_tensor_inputs": ["prompt_embeds", "pooled_prompt_embeds"],
    }


NEUTRAL = {
    "easy": EasyCache(0.0),
    "easy, each image": EasyCache(0.0, per_image=True),
    "line": CGTaylor(0.0),
    "sea": SeaCache(0.0),
    "tea": TeaCache(0.0, LINE),
    "mag": MagCache(0.0, MagnitudeCurve((1.0, 0.9))),
    "first block": FirstBlockCache(0.0),
}


@pytest.mark.parametrize("cache", NEUTRAL.values(), ids=NEUTRAL)
def test_a_neutral_cache_is_exact_where_a_guided_batch_shrinks_in_a_callback(cache: Any) -> None:
    pipe, call = tiny.sd3(steps=6, batch=2)
    plain = latents_of(pipe, call, **unguided_after(2))
    fast = accelerate(pipe, [cache])
    assert torch.equal(latents_of(fast, call, **unguided_after(2)), plain)
    assert [step.batch for step in fast.fastdit.last_run.steps] == [4] * 3 + [2] * 3


@pytest.mark.parametrize("per_image", [False, True], ids=["together", "each image"])
@pytest.mark.parametrize("scope", ["stack", "forward"])
def test_a_history_is_not_carried_to_a_batch_of_fewer_images(per_image: bool, scope: str) -> None:
    pipe, call = tiny.sd3(size=128, steps=6)
    schedule = RALU(steps=(2, 2, 2), ends=(0.3, 0.45), ratio=0.3)
    change = "carry" if scope == "stack" else "reset"
    cache = StepMask((1, 1, 0, 0, 0, 0), per_image=per_image, scope=scope, stage_change=change)
    fast = accelerate(pipe, [schedule, cache])
    found = latents_of(fast, call, **unguided_after(1))
    steps = fast.fastdit.last_run.steps
    assert len(found) == 1 and [step.batch for step in steps] == [2, 2, 1, 1, 1, 1]
    assert steps[2].action == "computed"
    if scope == "stack":
        assert actions(steps[3:]) == ["reused"] * 3


@pytest.mark.parametrize("order", [("cond", "uncond"), ("uncond", "cond")], ids=" then ".join)
def test_in_a_loop_of_one_s_own_a_branch_may_appear_at_any_step(order: tuple[str, str]) -> None:
    pipe, call = tiny.flux(steps=STEPS)
    calls = tiny.recorded_calls(pipe, call)
    twin = accelerate(pipe.transformer, [Interval(3, forecast=Taylor(1))])
    with twin.fastdit.run(STEPS, branches=order):
        for step, (args, kwargs) in enumerate(calls):
            for name in order if step >= 4 else ("cond",):
                with twin.cache_context(name):
                    twin(*args, **kwargs)
    assert [step.step for step in of_branch(twin, "cond")] == list(range(STEPS))
    late = of_branch(twin, "uncond")
    assert [step.step for step in late] == list(range(4, STEPS))
    assert (late[0].action, late[0].reason) == ("computed", "no history")
    assert late[-1].reason == "last steps"
    assert actions(of_branch(twin, "cond")) == [
        "computed" if step % 3 == 0 else "forecast" if step > 3 else "reused" for step in range(STEPS)
    ]


def test_a_branch_that_is_named_as_it_appears_is_kept_apart_too() -> None:
    pipe, call = tiny.flux(steps=STEPS)
    calls = tiny.recorded_calls(pipe, call)
    twin = accelerate(pipe.transformer, [Interval(3)])
    with twin.fastdit.run(STEPS):
        for step, (args, kwargs) in enumerate(calls):
            for name in ("cond", "uncond") if 3 <= step < 8 else ("cond",):
                with twin.cache_context(name):
                    twin(*args, **kwargs)
    assert [(step.step, step.action) for step in of_branch(twin, "uncond")] == [
        (3, "computed"), (4, "reused"), (5, "reused"), (6, "computed"), (7, "reused"),
    ]  # fmt: skip
    assert [step.action == "computed" for step in of_branch(twin, "cond")] == [step % 3 == 0 for step in range(STEPS)]


def test_another_shape_that_comes_with_other_arguments_empties_the_history_too() -> None:
    """Other arguments are observed anew, and what is observed is computed; what is kept must go all the same."""
    pipe, call = tiny.flux(steps=STEPS)
    _, pair = tiny.flux(steps=STEPS, batch=2)
    few, many = tiny.recorded_calls(pipe, call), tiny.recorded_calls(pipe, pair)
    twin = accelerate(pipe.transformer, [Interval(2, forecast=Taylor(1))])

    def outputs(calls: list[Any]) -> list[Tensor]:
        with twin.fastdit.run(STEPS):
            return [twin(*args, **kwargs)[0] for args, kwargs in calls]

    changed = [(args, kwargs | {"joint_attention_kwargs": None}) for args, kwargs in many[4:6]]
    assert many[4][1]["joint_attention_kwargs"] is not None
    found = outputs([*few[:4], *changed])[4:]
    steps = twin.fastdit.last_run.steps
    assert [step.action for step in steps[3:]] == ["forecast", "computed", "reused"]
    assert torch.equal(found[0], pipe.transformer(*changed[0][0], **changed[0][1])[0])
    # One computed step is no slope: the next one takes its residual as it is.
    assert found[1].shape == found[0].shape


PICTURE = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(3))


def image_to_image(steps: int) -> tiny.Built:
    pipe, call = tiny.flux(steps=steps)
    pipe = FluxImg2ImgPipeline(**pipe.components)
    pipe.set_progress_bar_config(disable=True)
    return pipe, call | {"image": PICTURE}


def video_to_video(steps: int) -> tiny.Built:
    """This pipeline leaves out the first timesteps without telling its scheduler."""
    pipe, call = tiny.wan(steps=steps)
    parts = {name: part for name, part in pipe.components.items() if name in ("vae", "scheduler", "transformer")}
    pipe = WanVideoToVideoPipeline(tokenizer=None, text_encoder=None, **parts)
    pipe.set_progress_bar_config(disable=True)
    del call["num_frames"]
    return pipe, call | {"video": torch.rand(1, 5, 3, 32, 32, generator=torch.Generator().manual_seed(3))}


@pytest.mark.parametrize(("build", "length"), crossed([image_to_image, video_to_video], [3, 5, 8, 10]))
def test_a_strength_shortens_the_run_and_the_last_step_is_computed(
    build: Callable[[int], tiny.Built], length: int
) -> None:
    strength = length / STEPS
    pipe, call = build(STEPS)
    fast = accelerate(pipe, [FirstBlockCache(1e6)])
    assert torch.isfinite(tiny.run(fast, call, strength=strength)).all()
    for branch in branches(fast):
        assert actions(of_branch(fast, branch)) == ["computed", *["reused"] * (length - 2), "computed"]
    # The noise levels are those of the timesteps that are walked along.
    whole = accelerate(pipe, [FirstBlockCache(1e6)])
    tiny.run(whole, call, strength=1.0)
    levels = [step.sigma for step in of_branch(whole, branches(whole)[0])]
    assert [step.sigma for step in of_branch(fast, branches(fast)[0])] == levels[STEPS - length :]
    masked = accelerate(pipe, [StepMask(((1, 0) * 10)[:length])])
    tiny.run(masked, call, strength=strength)
    assert [step.action == "computed" for step in of_branch(masked, branches(masked)[0])] == [
        step % 2 == 0 for step in range(length)
    ]
    if length < STEPS:
        with pytest.raises(InvalidConfig, match=f"the run has {length} steps"):
            tiny.run(accelerate(pipe, [StepMask((1, 0) * 5)]), call, strength=strength)


@pytest.mark.parametrize(("build", "strength"), crossed([image_to_image, video_to_video], [0.5, 1.0]))
def test_magcache_reads_its_curve_at_the_scheduler_s_place(build: Callable[[int], tiny.Built], strength: float) -> None:
    """Only entry 7 lets no step pass, so the step at the scheduler's eighth timestep alone is computed."""
    curve = MagnitudeCurve(tuple(0.1 if place == 7 else 1.0 for place in range(STEPS)))
    pipe, call = build(STEPS)
    fast = accelerate(pipe, [MagCache(0.2, curve, policy=FREE)])
    tiny.run(fast, call, strength=strength)
    skipped = STEPS - round(STEPS * strength)
    steps = of_branch(fast, branches(fast)[0])
    assert [step.step + skipped for step in steps if step.action == "computed"] == [skipped, 7]


def heun(steps: int) -> tiny.Built:
    pipe, call = tiny.sd3(steps=steps)
    pipe.scheduler = FlowMatchHeunDiscreteScheduler(shift=3.0)
    return pipe, call


def dpm(steps: int) -> tiny.Built:
    pipe, call = tiny.pixart(steps=steps)
    assert isinstance(pipe.scheduler, DPMSolverMultistepScheduler)
    return pipe, call


def unipc(steps: int) -> tiny.Built:
    pipe, call = tiny.wan(steps=steps)
    assert isinstance(pipe.scheduler, UniPCMultistepScheduler)
    return pipe, call


@pytest.mark.parametrize(
    ("build", "forecast"), crossed([heun, dpm, unipc], [Reuse(), Taylor(2), PublishedTaylor(1), FoCa(), DMD(3)])
)
def test_steps_are_the_solver_s_forwards_and_every_forecast_stays_finite(
    build: Callable[[int], tiny.Built], forecast: Any
) -> None:
    pipe, call = build(STEPS)
    forwards = 2 * STEPS - 1 if build is heun else STEPS
    fast = accelerate(pipe, [Interval(2, forecast=forecast, policy=SkipPolicy(first=3, last=2))])
    found = latents_of(fast, call)
    assert torch.isfinite(found).all()
    assert torch.equal(latents_of(fast, call), found)
    assert fast.fastdit.plan(num_inference_steps=STEPS).steps == forwards
    for branch in branches(fast):
        steps = of_branch(fast, branch)
        assert [step.step for step in steps] == list(range(forwards))
        forced = [step.step for step in steps if step.reason in ("first steps", "last steps")]
        assert forced == [0, 1, 2, forwards - 2, forwards - 1]
        assert [step.action == "computed" for step in steps[3:-2]] == [place % 2 == 1 for place in range(forwards - 5)]


def test_a_mask_for_a_solver_of_second_order_has_an_entry_for_each_forward() -> None:
    pipe, call = heun(4)
    fast = accelerate(pipe, [StepMask((1, 0, 1, 0, 1, 0, 1))])
    latents_of(fast, call)
    assert [step.action == "computed" for step in fast.fastdit.last_run.steps] == [True, False] * 3 + [True]
    assert "7 forwards for 4 steps" in fast.fastdit.explain(num_inference_steps=4)
    with pytest.raises(InvalidConfig, match="the run has 7 steps"):
        latents_of(accelerate(pipe, [StepMask((1, 0, 0, 1))]), call)


@pytest.mark.parametrize(
    ("cache", "first"),
    [(gate, 0) for gate in GATES.values()] + [(TaylorSeer(3, 1, first=3), 3), (TeaCache(0.9, LINE), 0)],
    ids=[*GATES, "TaylorSeer", "TeaCache"],
)
def test_the_second_denoiser_of_a_run_starts_from_nothing_and_the_record_tells_them_apart(
    cache: Any, first: int
) -> None:
    pipe, call = tiny.wan_two(steps=STEPS)
    fast = accelerate(pipe, [cache])
    found = latents_of(fast, call)
    assert torch.isfinite(found).all()
    assert torch.equal(latents_of(fast, call), found)
    for branch in ("cond", "uncond"):
        steps = of_branch(fast, branch)
        assert [step.step for step in steps] == list(range(STEPS))
        names = [step.transformer for step in steps]
        assert names == sorted(names) and set(names) == {"transformer", "transformer_2"}
        opening = steps[names.index("transformer_2")]
        assert (opening.action, opening.reason) == ("computed", "no history")
        assert actions(steps[: cache.policy.first]) == ["computed"] * cache.policy.first
    assert fast.fastdit.last_run.to_json()["steps"][-1]["transformer"] == "transformer_2"


def test_first_and_last_count_the_steps_of_the_run_and_not_those_of_a_denoiser() -> None:
    pipe, call = tiny.wan_two(steps=STEPS)
    fast = accelerate(pipe, [FirstBlockCache(1e6, policy=SkipPolicy(first=2, last=2))])
    latents_of(fast, call)
    steps = of_branch(fast, "cond")
    start = next(step.step for step in steps if step.transformer == "transformer_2")
    assert 2 < start < STEPS - 3
    assert [step.step for step in steps if step.action == "computed"] == [0, 1, start, STEPS - 2, STEPS - 1]


@pytest.mark.parametrize(
    ("cache", "most"),
    [
        (FirstBlockCache(0.1), 2),
        (Interval(2, forecast=Taylor(1)), 2),
        (EasyCache(), 1),
        (EasyCache(policy=SkipPolicy(first=0)), 1),
        (TaylorSeer(4), 1),
        (DBCache(leading=1), 0),
        (StepMask((1, 1, 1, 0), policy=SkipPolicy(first=1, last=1)), 0),
        (EasyCache(policy=SkipPolicy(first=1, last=2)), 0),
    ],
    ids=lambda value: value.describe() if hasattr(value, "describe") else str(value),
)
def test_a_plan_of_four_steps_says_how_little_there_is_to_gain(cache: Any, most: int) -> None:
    pipe, call = tiny.flux(guidance=False, steps=4)
    gain = f"can skip at most {most} of 4 steps" if most else "can skip none of 4 steps"
    assert gain in accelerate(pipe, [cache]).fastdit.explain(64, 64, 4)
    if most:
        return
    for strict in (False, True):
        fast = accelerate(pipe, [cache], strict=strict)
        with tiny.counted_blocks(pipe.transformer) as counts, pytest.raises(NeverFired, match="can skip none"):
            tiny.run(fast, call)  # a warning is an error here, and comes before the first step all the same
        assert counts == [0] * 5
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert torch.equal(tiny.run(accelerate(pipe, [cache]), call), tiny.run(pipe, call))
    assert [warning.category for warning in caught] == [NeverFired]


#: Models whose signal is described and that give each block a text made anew, so that no chain of blocks is seen.
UNOBSERVABLE = ("bria-fibo", "hidream")


@pytest.mark.filterwarnings("ignore:.*FluxPosEmbed:FutureWarning")
@pytest.mark.filterwarnings("ignore:.*Transformer2DModelOutput:FutureWarning")
@pytest.mark.filterwarnings("ignore:In CPU autocast:UserWarning")
@pytest.mark.parametrize("name", tiny.TRANSFORMERS)
@pytest.mark.exhaustive
def test_teacache_with_a_bare_line_works_in_every_family_whose_signal_is_described(name: str) -> None:
    model, call = tiny.TRANSFORMERS[name]()
    first = next(iter(call))
    twin = accelerate(model, [TeaCache(1.0, LINE)])

    def whole() -> list[Tensor]:
        with twin.fastdit.run(num_inference_steps=5):
            return [first_tensor(twin(**{**call, first: call[first] * (1.0 + 0.02 * step)})) for step in range(5)]

    if name in UNOBSERVABLE:
        with pytest.raises(UnsupportedModel, match="reaches the next block unchanged"):
            whole()
        return
    found = whole()
    record = twin.fastdit.last_run
    assert record.skipped > 0 and record.doubts == 0
    assert all(torch.isfinite(tensor).all() for tensor in found)
    assert all(torch.equal(one, other) for one, other in zip(whole(), found, strict=True))


def first_tensor(value: Any) -> Tensor:
    return value if isinstance(value, Tensor) else first_tensor(value[0])


def test_easycache_takes_latents_in_a_list_and_refuses_to_pick_images_out_of_it() -> None:
    pipe, call = tiny.z_image(steps=STEPS)
    fast = accelerate(pipe, [EasyCache(1.0)])
    with tiny.counted_blocks(pipe.transformer) as counts:
        latents_of(fast, call)
    record = fast.fastdit.last_run
    assert record.skipped > 0
    assert set(counts) == {record.computed}
    with pytest.raises(UnsupportedModel, match="per_image"):
        latents_of(accelerate(pipe, [EasyCache(1.0, per_image=True)]), call)


@pytest.fixture(scope="module")
def quantised() -> Any:
    """A FLUX transformer whose linear layers round what enters them to eight bits, anew in each call."""
    from torch.ao.quantization import quantize_dynamic

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch is about to drop what its users still have
        return quantize_dynamic(tiny.flux_transformer(), {nn.Linear}, dtype=torch.qint8)


def with_transformer(transformer: Any) -> tiny.Built:
    pipe, call = tiny.flux(steps=STEPS)
    pipe.transformer = transformer
    return pipe, call


@pytest.mark.parametrize(
    ("gate", "forecast"),
    crossed([Interval, FirstBlockCache, EasyCache], [Taylor(1), Taylor(2), PublishedTaylor(1), FoCa(), DMD(3)]),
)
def test_a_forecast_that_amplifies_is_refused_where_activations_are_rounded(
    gate: Any, forecast: Any, quantised: Any
) -> None:
    pipe, _ = with_transformer(quantised)
    for check in (lambda stack: accelerate(pipe, stack), lambda stack: Stack(stack).check(pipe.transformer)):
        with pytest.raises(IncompatibleStack, match=r"forecast=.*transformer \(FluxTransformer2DModel\).*is a Linear"):
            check([gate(forecast=forecast)])


def test_reuse_is_allowed_where_activations_are_rounded(quantised: Any) -> None:
    pipe, call = with_transformer(quantised)
    for cache in (Interval(3), Interval(3, forecast=Taylor(0)), FirstBlockCache(0.7), EasyCache(0.7), ToCa(3, first=2)):
        fast = accelerate(pipe, [cache])
        found = latents_of(fast, call)
        assert torch.isfinite(found).all()
        assert fast.fastdit.last_run.skipped + fast.fastdit.last_run.partial > 0
        assert torch.equal(latents_of(fast, call), found)
    exact = accelerate(tiny.flux(steps=STEPS)[0], [cache])
    latents_of(exact, call)
    full = [[step.full_flops for step in twin.fastdit.last_run.steps] for twin in (fast, exact)]
    assert full[0] == full[1]  # a product is a product, in whatever precision


def test_a_model_that_is_quantised_later_is_refused_at_its_next_call(quantised: Any) -> None:
    pipe, call = tiny.flux(steps=STEPS)
    fast = accelerate(pipe, [Interval(3, forecast=Taylor(1))])
    latents_of(fast, call)
    kept = pipe.transformer.transformer_blocks[1]
    pipe.transformer.transformer_blocks[1] = quantised.transformer_blocks[1]
    with pytest.raises(IncompatibleStack, match=r"transformer_blocks\.1\."):
        latents_of(fast, call)
    pipe.transformer.transformer_blocks[1] = kept
    latents_of(fast, call)
    with pytest.raises(IncompatibleStack, match="changes the precision of activations"):
        fast.transformer = quantised
    bare = accelerate(pipe.transformer, [Interval(3, forecast=Taylor(1))])
    pipe.transformer.transformer_blocks[1] = quantised.transformer_blocks[1]
    with pytest.raises(IncompatibleStack), bare.fastdit.run(num_inference_steps=3):
        pass


def test_the_second_denoiser_is_checked_too(quantised: Any) -> None:
    pipe, _ = tiny.wan_two()
    pipe.transformer_2.blocks[0].ffn.net[2] = quantised.transformer_blocks[0].ff.net[2]
    with pytest.raises(IncompatibleStack, match=r"transformer_2 \(WanTransformer3DModel\).*blocks\.0\.ffn\.net\.2"):
        accelerate(pipe, [Interval(3, forecast=Taylor(1))])


class _Weight(Tensor):
    """A weight of a class of its own, as quantisers make them."""


def weight_of_a_class(**attributes: Any) -> nn.Linear:
    layer = nn.Linear(2, 2)
    weight = torch.zeros(2, 2).as_subclass(_Weight)
    vars(weight).update(attributes)
    layer._parameters["weight"] = weight  # type: ignore[assignment]
    return layer


def layer_of_a_class(name: str, **attributes: Any) -> nn.Linear:
    layer = type(name, (nn.Linear,), {})(2, 2)
    vars(layer).update(attributes)
    return layer


ROUNDING: dict[str, nn.Module] = {
    "torchao, dynamic": weight_of_a_class(act_quant_kwargs=object()),
    "torchao before tensors had options": weight_of_a_class(input_quant_func=abs),
    "torchao, scaled": weight_of_a_class(original_weight_tensor=SimpleNamespace(act_quant_kwargs=object())),
    "bitsandbytes, 8 bits": layer_of_a_class("Linear8bitLt"),
    "SVDQuant": layer_of_a_class("SVDQW4A4Linear"),
    "a fixed scale": layer_of_a_class("ScaledLinear", input_scale=torch.ones(())),
    "a fixed scale in a buffer": layer_of_a_class("BufferLinear", _buffers={"act_scale": torch.ones(())}),
    "a scale found by the class": type("OwnScale", (nn.Linear,), {"input_scale": 0.5})(2, 2),
    "quanto with activations": layer_of_a_class("QLinear", activation_qtype="qint8", input_scale=torch.ones(())),
    "ModelOpt": layer_of_a_class("QuantLinear", input_quantizer=SimpleNamespace(is_enabled=True)),
}
EXACT: dict[str, nn.Module] = {
    "plain": nn.Linear(2, 2),
    "torchao, weights alone": weight_of_a_class(act_quant_kwargs=None),
    "bitsandbytes, 4 bits": layer_of_a_class("Linear4bit"),
    "quanto, weights alone": layer_of_a_class("QLinear", activation_qtype=None, input_scale=torch.ones(())),
    "ModelOpt, weights alone": layer_of_a_class("QuantLinear", input_quantizer=SimpleNamespace(is_enabled=False)),
}


@pytest.mark.parametrize("kind", [*ROUNDING, *EXACT])
def test_what_quantisers_leave_in_a_model_tells_whether_activations_are_rounded(kind: str) -> None:
    model = nn.ModuleList([nn.Identity(), nn.Sequential({**ROUNDING, **EXACT}[kind])])
    found = changes_of(model)
    assert [made.change for made in found] == ([Change.ACTIVATION_PRECISION] if kind in ROUNDING else [])
    assert all(made.cause.startswith("1.0 is a ") for made in found)


def test_the_noise_of_rounded_activations_grows_in_an_extrapolation_and_not_in_reuse(quantised: Any) -> None:
    """Why the two are kept apart: the features of three steps, with and without rounding, predicted two steps on."""
    pipe, call = tiny.flux(steps=6)
    calls = tiny.recorded_calls(pipe, call)

    def features(transformer: Any, step: int) -> Tensor:
        """What the blocks add to the image tokens."""
        ends: list[Tensor] = []
        blocks = (transformer.transformer_blocks[0], transformer.single_transformer_blocks[-1])
        handles = [
            blocks[0].register_forward_pre_hook(
                lambda _, __, kwargs: ends.append(kwargs["hidden_states"]), with_kwargs=True
            ),
            blocks[1].register_forward_hook(lambda _, __, output: ends.append(output[1])),
        ]
        args, kwargs = calls[step]
        transformer(*args, **kwargs)
        for handle in handles:
            handle.remove()
        return ends[1] - ends[0]

    exact = {step: features(pipe.transformer, step) for step in (0, 1, 2)}
    rounded = {step: features(quantised, step) for step in (0, 1, 2)}
    noise = (rounded[2] - exact[2]).norm()
    assert noise > 0

    def error(forecast: Any) -> Tensor:
        histories = [forecast.begin(), forecast.begin()]
        for history, given in zip(histories, (exact, rounded), strict=True):
            for step, feature in given.items():
                history.record(step, [feature])
        one, other = (history.predict(4)[0] for history in histories)
        return (one - other).norm()

    torch.testing.assert_close(error(Reuse()), noise)
    assert error(Taylor(1)) > 1.5 * noise
    assert error(Taylor(2)) > 3.0 * noise


@pytest.fixture
def two_ranks() -> Iterator[None]:
    """A process group of two ranks whose other one need not be there: a refusal sends nothing."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    yield
    dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_available(), reason="this torch has no distributed package")
@pytest.mark.usefixtures("two_ranks")
@pytest.mark.parametrize("part", [SeaCache(), RALU("4x"), ToCa()], ids=lambda part: type(part).__name__)
def test_what_needs_the_whole_frame_is_refused_where_ranks_share_the_sequence(part: Any) -> None:
    from context_parallel import share_sequence

    pipe, call = tiny.flux(steps=18)
    fast = accelerate(pipe, [part])
    share_sequence(pipe.transformer, 2)
    assert [made.change for made in changes_of(pipe.transformer)] == [Change.SHARED_SEQUENCE]
    for attempt in (lambda: accelerate(pipe, [part]), lambda: tiny.run(fast, call)):
        with pytest.raises(IncompatibleStack, match=f"{type(part).__name__}.*image's tokens .*context parallel"):
            attempt()
    accelerate(pipe, [FirstBlockCache(0.1)])
    accelerate(pipe, [EasyCache(0.1, forecast=Taylor(1))])


class _Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inside = nn.Linear(8, 8)
        self.writes = False

    def forward(self, hidden_states: Tensor) -> Tensor:
        added = torch.tanh(self.inside(hidden_states))
        return hidden_states.add_(added) if self.writes else hidden_states + added


class _Layers(nn.Module):
    """Three blocks, any of which can be told to write into what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(_Layer() for _ in range(3))
        tiny.seed_weights(self, 2)

    def forward(self, hidden_states: Tensor) -> Tensor:
        hidden_states = hidden_states * 1.5
        for block in self.blocks:
            hidden_states = block(hidden_states)
        return hidden_states


def in_place(cache: Any, writing: int, after: int) -> Any:
    """Run five steps; from step `after` on, block `writing` writes in place."""
    model = _Layers()
    twin = accelerate(model, [cache])
    with twin.fastdit.run(num_inference_steps=5):
        for step in range(5):
            model.blocks[writing].writes = step >= after
            twin(tiny.randn(1, 4, 8, seed=step))
    return twin


@pytest.mark.parametrize(("writing", "inference"), crossed([0, 1, 2], [False, True]))
def test_a_block_that_writes_in_place_is_refused_when_the_wiring_is_learned(writing: int, inference: bool) -> None:
    with (
        torch.inference_mode(inference),
        pytest.raises(UnsupportedModel, match=rf"blocks\.{writing} in place"),
    ):
        in_place(Interval(2), writing, after=0)


@pytest.mark.parametrize("forecast", [Reuse(), Taylor(1)], ids=str)
def test_a_block_that_begins_to_write_in_place_later_is_refused_too(forecast: Any) -> None:
    with pytest.raises(IncompatibleStack, match=r"before blocks\.2 writes into its input in place"):
        in_place(Interval(2, forecast=forecast), 0, after=1)


def test_a_forward_that_writes_into_its_latents_is_refused_by_a_cache_that_skips_it_whole() -> None:
    class Writing(nn.Module):
        def forward(self, hidden_states: Tensor) -> Tensor:
            return hidden_states.mul_(0.5)

    twin = accelerate(Writing(), [EasyCache(1.0)])
    with pytest.raises(IncompatibleStack, match="latents in place"), twin.fastdit.run(num_inference_steps=5):
        twin(torch.ones(1, 2, 3))


@pytest.mark.parametrize(
    ("cache", "name"),
    crossed([FirstBlockCache(1e6), Interval(3, forecast=Taylor(1)), TeaCache(0.8, LINE)], ["flux", "wan"]),
)
def test_two_branches_hold_twice_the_memory_of_one(name: str, cache: Any) -> None:
    pipe, call = tiny.PIPELINES[name](steps=STEPS)
    fast = accelerate(pipe, [cache])
    one, two = (call, tiny.flux_negative(call)) if name == "flux" else (call | {"guidance_scale": 1.0}, call)
    latents_of(fast, one)
    alone = fast.fastdit.last_run.cache_bytes
    latents_of(fast, two)
    assert fast.fastdit.last_run.cache_bytes == 2 * alone > 0
