"""ToCa, DuCa and ClusCa against straight-line references, and what every token cache must keep to."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from diffusers.models.attention_processor import AttnProcessor
from hypothesis import given
from hypothesis import strategies as st
from reference_flux import denoise
from reference_token_cache import ClusCaReference, DuCaReference, ToCaReference
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

import tiny
from fastdit import (
    RALU,
    ClusCa,
    DuCa,
    EasyCache,
    FastditWarning,
    FirstBlockCache,
    IncompatibleStack,
    Interval,
    InvalidConfig,
    NeverFired,
    SeaCache,
    Stack,
    TeaCache,
    ToCa,
    UnsupportedModel,
    accelerate,
)
from fastdit.step import StepContext
from fastdit.token_cache.clusca import k_means
from fastdit.token_cache.scores import SCORES, with_spatial_bonus
from pairwise import crossed

pytestmark = pytest.mark.usefixtures("no_grad")

STEPS = 10
ON_A_CPU: dict[Any, Any] = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda query, key, value, *_, **__: sdpa_flop_count(
        query, key, value
    )
}
"""Which operator attention is on a CPU, and how many FLOPs it costs: torch counts it on other devices only."""
CACHES = [ToCa(ratio=0.3), DuCa(5, ratio=0.3), ClusCa(3, clusters=4, gamma=0.2)]
MODELS = ["flux", "sd3", "pixart"]
each_cache = pytest.mark.parametrize("cache", CACHES, ids=lambda cache: type(cache).__name__)


def actions(fast: Any, branch: int = 0) -> list[str]:
    steps = fast.fastdit.last_run.steps
    names = list(dict.fromkeys(step.branch for step in steps))
    return [step.action for step in steps if step.branch == names[branch]]


def agrees_with(cache: Any, reference: ToCaReference, call: Any, pipe: Any) -> None:
    """Same latents, same kinds of steps, and both did leave tokens out."""
    fast = accelerate(pipe, [cache])
    found = tiny.run(fast, call, output_type="latent")
    expected = denoise(pipe, call, torch.Generator().manual_seed(0), [reference])
    assert actions(fast) == reference.kinds
    assert "partial" in reference.kinds
    torch.testing.assert_close(found, expected.latents, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(found, tiny.run(pipe, call, output_type="latent"), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("score", SCORES)
def test_toca_equals_the_reference_with_every_score(score: str) -> None:
    pipe, call = tiny.flux(steps=STEPS, batch=2, size=(64, 96))
    agrees_with(ToCa(4, 0.3, score), ToCaReference(STEPS, 4, 0.3, score), call, pipe)


@pytest.mark.parametrize(
    "options",
    [
        {"interval": 3, "ratio": 0.5, "first": 1},
        {"age_weight": 0.0},
        {"age_weight": 2.0, "ratio": 0.2},
        {"layer_slope": -1.5, "ratio": 0.4},
        {"step_slope": 0.8, "ratio": 0.4},
        {"interval": 3, "interval_slope": 0.6, "first": 1},
        {"ratio": 0.0},
        {"seed": 7, "score": "random"},
    ],
    ids=str,
)
def test_toca_equals_the_reference_with_every_option(options: dict[str, Any]) -> None:
    pipe, call = tiny.flux(steps=STEPS)
    agrees_with(ToCa(**options), ToCaReference(STEPS, **options), call, pipe)


@pytest.mark.parametrize(("size", "cell"), crossed([(64, 64), (64, 96), (32, 128)], [2, 3]))
def test_the_spatial_bonus_follows_the_picture_s_own_grid(size: tuple[int, int], cell: int) -> None:
    # 2 x 8 tokens are as many as 4 x 4: a grid that is guessed from the count would be another.
    pipe, call = tiny.flux(steps=STEPS, size=size)
    options: dict[str, Any] = {"ratio": 0.3, "spatial_bonus": 0.6, "cell": cell}
    grid = (size[0] // 16, size[1] // 16)
    agrees_with(ToCa(**options), ToCaReference(STEPS, **options, grid=grid), call, pipe)


@pytest.mark.parametrize("options", [{}, {"interval": 6}, {"score": "value_norm", "age_weight": 0.5}], ids=str)
def test_duca_equals_the_reference(options: dict[str, Any]) -> None:
    pipe, call = tiny.flux(steps=STEPS, batch=2)
    options = {"interval": 5, "ratio": 0.25, "first": 2} | options
    agrees_with(DuCa(**options), DuCaReference(STEPS, **options), call, pipe)


@pytest.mark.parametrize(
    "options",
    [{"gamma": 0.0}, {"gamma": 0.3}, {"clusters": 100, "gamma": 0.5}, {"iterations": 1}, {"seed": 3}],
    ids=str,
)
def test_clusca_equals_the_reference(options: dict[str, Any]) -> None:
    pipe, call = tiny.flux(steps=STEPS, batch=2, size=(64, 96))
    options = {"interval": 3, "clusters": 5, "gamma": 0.1, "first": 2} | options
    agrees_with(ClusCa(**options), ClusCaReference(STEPS, **options), call, pipe)


@each_cache
def test_branches_of_true_guidance_are_kept_apart(cache: Any) -> None:
    pipe, call = tiny.flux(steps=STEPS)
    call = tiny.flux_negative(call)
    fast = accelerate(pipe, [cache])
    found = tiny.run(fast, call, output_type="latent")
    kinds = {ToCa: ToCaReference, DuCa: DuCaReference, ClusCa: ClusCaReference}
    options = {
        name: getattr(cache, name) for name in ("interval", "ratio", "clusters", "gamma") if hasattr(cache, name)
    }
    references = [kinds[type(cache)](STEPS, **options) for _ in range(2)]
    expected = denoise(pipe, call, torch.Generator().manual_seed(0), references)
    torch.testing.assert_close(found, expected.latents, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("cache", "model"), crossed([ToCa(ratio=1.0), ToCa(1), DuCa(ratio=1.0), ClusCa(1)], MODELS))
def test_a_neutral_token_cache_is_bit_equal_to_the_plain_pipeline(cache: Any, model: str) -> None:
    pipe, call = tiny.PIPELINES[model](steps=5)
    plain = tiny.run(pipe, call)
    fast = accelerate(pipe, [cache], strict=True)
    assert cache.neutral
    assert torch.equal(tiny.run(fast, call), plain)
    assert set(actions(fast)) == {"computed"}


@pytest.mark.parametrize(("score", "model"), crossed(SCORES, MODELS))
def test_full_steps_are_bit_equal_to_the_plain_pipeline_and_a_run_of_them_says_it_gained_nothing(
    score: str, model: str
) -> None:
    pipe, call = tiny.PIPELINES[model](steps=3)
    plain = tiny.run(pipe, call)
    fast = accelerate(pipe, [ToCa(score=score, first=3)])
    with pytest.warns(NeverFired, match="interval"):
        assert torch.equal(tiny.run(fast, call), plain)


@pytest.mark.parametrize(("cache", "model"), crossed(CACHES, MODELS))
def test_partial_steps_work_on_every_described_model_and_repeat_bit_for_bit(cache: Any, model: str) -> None:
    pipe, call = tiny.PIPELINES[model](steps=STEPS)
    plain = tiny.run(pipe, call)
    fast = accelerate(pipe, [cache], strict=True)
    found = tiny.run(fast, call)
    torch.manual_seed(123)  # nothing is drawn from the global generator
    state = torch.get_rng_state()
    assert torch.equal(tiny.run(fast, call), found)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.isfinite(found).all()
    assert not torch.equal(found, plain)
    assert torch.equal(tiny.run(pipe, call), plain)


@pytest.mark.parametrize(("cache", "model"), crossed(CACHES, MODELS))
def test_the_flops_of_a_record_are_those_really_spent(cache: Any, model: str) -> None:
    pipe, call = tiny.PIPELINES[model](steps=STEPS)
    fast = accelerate(pipe, [cache])
    spent = spent_flops(fast, call)
    steps = fast.fastdit.last_run.steps
    assert [step.flops for step in steps] == spent
    assert all((step.flops < step.full_flops) == (step.action != "computed") for step in steps)
    assert all(step.flops < 0.5 * step.full_flops for step in steps if step.action == "partial")


def spent_flops(fast: Any, call: dict[str, Any]) -> list[int]:
    """Run a twin and count, forward by forward, the FLOPs that its transformer really spends."""
    spent: list[int] = []
    twin = type(fast.transformer)
    plain_call = twin.__call__

    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        with FlopCounterMode(display=False, custom_mapping=ON_A_CPU) as counter:
            output = plain_call(self, *args, **kwargs)
        # In the model's own forward, which a skipped one does not reach: clusters are found after it.
        spent.append(sum(counter.get_flop_counts().get(twin.__name__, {}).values()))
        return output

    twin.__call__ = counted
    tiny.run(fast, call)
    twin.__call__ = plain_call
    return spent


@pytest.mark.parametrize(("cache", "model"), crossed(CACHES, MODELS))
def test_real_calls_of_blocks_and_of_their_parts_equal_the_record(cache: Any, model: str) -> None:
    pipe, call = tiny.PIPELINES[model](steps=STEPS)
    fast = accelerate(pipe, [cache])
    blocks = tiny.main_blocks(pipe.transformer)
    attention = "attn1" if model == "pixart" else "attn"
    calls: list[int] = []
    handles = [
        getattr(block, attention).register_forward_hook(lambda *_, number=number: calls.append(number))
        for number, block in enumerate(blocks)
    ]
    with tiny.counted_blocks(pipe.transformer) as counts:
        tiny.run(fast, call)
    for handle in handles:
        handle.remove()
    record = fast.fastdit.last_run
    assert (record.computed, record.partial, record.skipped) == tuple(
        actions(fast).count(action) for action in ("computed", "partial", "reused")
    )
    assert counts == [record.computed + record.partial] * len(blocks)
    assert sum(counts) == sum(step.blocks_run for step in record.steps)
    assert sorted(calls) == sorted(list(range(len(blocks))) * record.computed)


def test_the_feed_forward_sees_the_chosen_tokens_only() -> None:
    pipe, call = tiny.flux(steps=STEPS)
    rows: list[tuple[str, int]] = []
    double, single = pipe.transformer.transformer_blocks[0], pipe.transformer.single_transformer_blocks[0]
    for name, module in (("ff", double.ff), ("mlp", single.proj_mlp), ("out", single.proj_out)):
        module.register_forward_pre_hook(lambda _, args, name=name: rows.append((name, args[0].shape[1])))
    fast = accelerate(pipe, [ToCa(ratio=0.25, layer_slope=0.0)])
    tiny.run(fast, call)
    record = fast.fastdit.last_run
    for name, tokens in (("ff", 16), ("mlp", 22), ("out", 22)):
        seen = [count for found, count in rows if found == name]
        assert seen == [tokens if action == "computed" else 4 for action in actions(fast)]
    assert "25.0% of the tokens" in record.steps[3].reason


def test_what_becomes_of_the_text_at_a_partial_step_changes_no_image() -> None:
    pipe, call = tiny.flux(steps=STEPS)
    reference = ToCaReference(STEPS, ratio=0.3)
    update = reference.update

    def with_another_text(kept: Any, fresh: Any, rows: Any) -> Any:
        for block in reference.kept.values():
            if block.text_fed is not None:
                block.text_fed = block.text_fed + 1.0
        return update(kept, fresh, rows)

    reference.update = with_another_text  # type: ignore[method-assign]
    expected = denoise(pipe, call, torch.Generator().manual_seed(0), [reference]).latents
    found = tiny.run(accelerate(pipe, [ToCa(ratio=0.3)]), call, output_type="latent")
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@each_cache
def test_an_image_of_a_batch_comes_out_as_it_does_alone(cache: Any) -> None:
    pipe, call = tiny.flux(steps=STEPS, batch=3)
    fast = accelerate(pipe, [cache])
    latents = tiny.randn(3, 16, 16, seed=5)
    together = tiny.run(fast, call, output_type="latent", latents=latents)
    for number in range(3):
        alone = {name: call[name][number : number + 1] for name in ("prompt_embeds", "pooled_prompt_embeds")}
        own = {"output_type": "latent", "latents": latents[number : number + 1]}
        torch.testing.assert_close(tiny.run(fast, call | alone, **own)[0], together[number], rtol=1e-4, atol=1e-5)


def test_both_halves_of_a_guided_batch_choose_the_same_tokens_where_that_is_asked_for() -> None:
    pipe, call = tiny.sd3(steps=STEPS)
    for halves in (True, False):
        fast = accelerate(pipe, [ToCa(ratio=0.25, layer_slope=0.0, score="attention", guidance_halves=halves)])
        same: list[bool] = []
        with spied_choice(same):
            tiny.run(fast, call)
        assert same
        assert all(same) == halves


@contextmanager
def spied_choice(same: list[bool]) -> Iterator[None]:
    """Note of each choice of tokens whether both images of the batch made the same."""
    choose = ToCa.choose

    def spy(self: Any, choice: Any) -> Any:
        index = choose(self, choice)
        same.append(index is not None and torch.equal(index[0], index[1]))
        return index

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ToCa, "choose", spy)
        yield


def test_halves_of_an_odd_batch_are_refused() -> None:
    pipe, call = tiny.flux(steps=STEPS)
    with pytest.raises(InvalidConfig, match="two halves"):
        tiny.run(accelerate(pipe, [ToCa(guidance_halves=True)]), call)


@each_cache
def test_a_run_starts_from_nothing_whatever_ran_before(cache: Any) -> None:
    pipe, call = tiny.flux(steps=STEPS)
    fast = accelerate(pipe, [cache])
    first = tiny.run(fast, call)
    tiny.run(fast, call, seed=5, height=96, width=32)

    def interrupt(*_: Any) -> dict[str, Any]:
        raise RuntimeError("enough")

    with pytest.raises(RuntimeError, match="enough"):
        tiny.run(fast, call, seed=6, callback_on_step_end=interrupt)
    assert torch.equal(tiny.run(fast, call), first)


@each_cache
def test_a_forward_that_fails_leaves_nothing_for_the_next_one(cache: Any) -> None:
    pipe, call = tiny.flux(steps=STEPS)
    calls = tiny.recorded_calls(pipe, call)
    twin = accelerate(pipe.transformer, [cache])
    last = pipe.transformer.single_transformer_blocks[-1]
    with twin.fastdit.run(num_inference_steps=STEPS + 1):
        for args, kwargs in calls[:5]:
            twin(*args, **kwargs)
        handle = last.norm.register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            # A partial step (or one that is full) breaks off in its last block.
            for args, kwargs in calls[5:9]:
                twin(*args, **kwargs)
        handle.remove()
        args, kwargs = calls[9]
        found = twin(*args, **kwargs)[0]
    assert twin.fastdit.last_run.steps[-1].action == "computed"
    assert torch.equal(found, pipe.transformer(*args, **kwargs)[0])


@pytest.mark.parametrize(("cache", "change"), crossed(CACHES, ["image", "text", "batch"]))
def test_another_shape_within_a_run_is_computed_in_full(cache: Any, change: str) -> None:
    pipe, call = tiny.flux(steps=STEPS)
    _, other = tiny.flux(steps=STEPS, size=96 if change == "image" else 64, batch=2 if change == "batch" else 1)
    if change == "text":
        other["prompt_embeds"] = tiny.randn(1, 9, 32, seed=21)
    few, many = tiny.recorded_calls(pipe, call), tiny.recorded_calls(pipe, other)
    twin = accelerate(pipe.transformer, [cache])
    with twin.fastdit.run(num_inference_steps=STEPS):
        for args, kwargs in few[:5]:
            twin(*args, **kwargs)
        args, kwargs = many[5]
        found = twin(*args, **kwargs)[0]
    assert twin.fastdit.last_run.steps[4].action != "computed"
    assert twin.fastdit.last_run.steps[5].action == "computed"
    assert torch.equal(found, pipe.transformer(*args, **kwargs)[0])


@pytest.mark.parametrize(("cache", "model"), crossed(CACHES, MODELS))
def test_half_precision_and_model_offload_work(cache: Any, model: str) -> None:
    pipe, call = tiny.PIPELINES[model](steps=STEPS)
    pipe.to(torch.bfloat16)
    call = {name: value.bfloat16() if "embeds" in name else value for name, value in call.items()}
    fast = accelerate(pipe, [cache])
    found = tiny.run(fast, call, output_type="latent")
    assert torch.isfinite(found).all()
    pipe.enable_model_cpu_offload(device="cpu")
    assert torch.equal(tiny.run(fast, call, output_type="latent"), found)


def test_offloading_that_sits_on_the_blocks_is_refused() -> None:
    pipe, call = tiny.pixart(steps=STEPS)
    fast = accelerate(pipe, [ToCa()])
    add_hook_to_module(pipe.transformer.transformer_blocks[0], ModelHook())
    with pytest.raises(IncompatibleStack, match="offload"):
        tiny.run(fast, call)


@each_cache
def test_a_lora_that_is_loaded_between_runs_is_seen(cache: Any) -> None:
    pipe, call = tiny.flux(steps=STEPS)
    fast = accelerate(pipe, [cache])
    before = tiny.run(fast, call)
    pipe.load_lora_weights(tiny.lora(pipe.transformer), adapter_name="style")
    after = tiny.run(fast, call)
    assert not torch.allclose(before, after)
    assert torch.equal(after, tiny.run(accelerate(pipe, [cache]), call))


@each_cache
def test_with_ralu_every_stage_starts_with_a_full_step(cache: Any) -> None:
    pipe, call = tiny.flux(size=128, steps=12)
    fast = accelerate(pipe, [RALU(steps=(4, 4, 4), ends=(0.3, 0.45), ratio=0.3), dataclasses.replace(cache, first=1)])
    found = tiny.run(fast, call)
    kinds = actions(fast)
    assert torch.isfinite(found).all()
    assert [step.tokens for step in fast.fastdit.last_run.steps] == [16] * 4 + [28] * 4 + [64] * 4
    for start in (0, 4, 8):
        assert kinds[start] == "computed"
        assert kinds[start + 1] != "computed"


@each_cache
def test_carried_over_a_switch_the_first_step_of_a_stage_may_be_partial(cache: Any) -> None:
    pipe, call = tiny.flux(size=128, batch=2)
    call.pop("num_inference_steps")
    carried = dataclasses.replace(cache, interval=20, stage_change="carry")
    fast = accelerate(pipe, [RALU.paper("4x", fidelity="exact"), carried])
    images = tiny.run(fast, call)
    assert torch.isfinite(images).all()
    assert torch.equal(tiny.run(fast, call), images)
    found = actions(fast)
    assert found[:3] == ["computed"] * 3
    assert "computed" not in found[3:]


def test_what_is_kept_of_a_block_is_lifted_token_by_token() -> None:
    from fastdit.models.roles import TOKEN_ROLES
    from fastdit.token_cache.memory import BlockMemory, TokenState

    values = torch.arange(8.0).reshape(1, 4, 2)
    text = torch.full((1, 3, 2), -1.0)
    sources = torch.tensor([[0, 1, 1, 3, 2]])
    joined = BlockMemory(
        0, TOKEN_ROLES["FluxSingleTransformerBlock"], (1, 4), (torch.Size((1, 3, 2)), torch.Size((1, 4, 2)))
    )
    joined.kept = {"attn": torch.cat([text, values], dim=1)}
    joined.refreshed = torch.tensor([[0, 1, 2, 3]])
    double = BlockMemory(1, TOKEN_ROLES["FluxTransformerBlock"], (1, 4), (torch.Size((1, 3, 2)), torch.Size((1, 4, 2))))
    double.kept = {"attn": (values, text), "ff": values, "ff_context": text}
    state = TokenState({("single", 0): joined, ("double", 0): double})
    state.lift(sources, 4)
    expected = values[:, sources[0]]
    assert torch.equal(joined.kept["attn"], torch.cat([text, expected], dim=1))
    assert joined.refreshed.tolist() == [[0, 1, 1, 3, 2]]
    assert torch.equal(double.kept["attn"][0], expected) and torch.equal(double.kept["attn"][1], text)
    assert torch.equal(double.kept["ff"], expected) and torch.equal(double.kept["ff_context"], text)
    assert joined.shape == (1, 5) and joined.streams[1] == (1, 5, 2)


def test_a_mixed_stage_goes_without_the_spatial_bonus_and_says_so() -> None:
    pipe, call = tiny.flux(size=128, steps=12)
    schedule = RALU(steps=(4, 4, 4), ends=(0.3, 0.45), ratio=0.3)
    fast = accelerate(pipe, [schedule, ToCa(ratio=0.3, spatial_bonus=0.5, first=1)])
    with pytest.warns(FastditWarning, match="stage 1 form no plain grid") as caught:
        tiny.run(fast, call)
    assert len(caught) == 1


shares = st.floats(0.0, 1.0)
slopes = st.floats(-3.0, 3.0)


def at(step: int, total: int) -> StepContext:
    return StepContext(step, total, 0, step, "main")


@given(shares, slopes, slopes, st.integers(1, 5000), st.integers(1, 60), st.integers(2, 50), st.data())
def test_a_block_recomputes_between_none_and_all_of_the_tokens(
    ratio: float, layer: float, step: float, tokens: int, layers: int, steps: int, data: Any
) -> None:
    cache = ToCa(ratio=ratio, layer_slope=layer, step_slope=step)
    place, now = data.draw(st.integers(0, layers - 1)), data.draw(st.integers(0, steps - 1))
    assert 0 <= cache.count(tokens, place, layers, at(now, steps)) <= tokens
    flat = ToCa(ratio=ratio, layer_slope=0.0)
    assert flat.count(tokens, place, layers, at(now, steps)) == round(tokens * ratio)


@given(st.integers(1, 12), st.floats(-0.99, 0.99), st.integers(1, 60), st.sampled_from([ToCa, DuCa]))
def test_full_steps_are_never_further_apart_than_the_interval_that_holds_there(
    interval: int, slope: float, steps: int, kind: Any
) -> None:
    cache = kind(interval, interval_slope=slope)
    last = 0
    for step in range(1, steps):
        longest = round(interval / (1 + slope - 2 * slope * step / steps))
        if cache.phase(at(step, steps), step - last) == "computed":
            assert step - last == max(1, longest) or slope != 0.0
            last = step
        assert step - last < max(1, longest)


@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 4), st.floats(0.1, 2.0), st.integers(0, 1000))
def test_the_spatial_bonus_goes_to_the_best_token_of_each_patch(
    rows: int, columns: int, cell: int, bonus: float, seed: int
) -> None:
    scores = torch.rand(2, rows * columns, generator=torch.Generator().manual_seed(seed))
    reference = ToCaReference(1, cell=cell, spatial_bonus=bonus, grid=(rows, columns))
    found = with_spatial_bonus(scores, (rows, columns), cell, bonus)
    expected = torch.tensor([reference.with_bonus(row) for row in scores.tolist()])
    torch.testing.assert_close(found, expected)


@given(st.integers(1, 30), st.integers(1, 8), st.integers(1, 10), st.integers(0, 1000))
def test_clusters_are_those_of_a_k_means_in_plain_loops(tokens: int, clusters: int, rounds: int, seed: int) -> None:
    points = torch.randn(2, tokens, 3, generator=torch.Generator().manual_seed(seed))
    start = points[:, : min(clusters, tokens)]
    reference = ClusCaReference(1, clusters=clusters, iterations=rounds, centroids=[own.clone() for own in start])
    reference.learn(points)
    centroids, members = k_means(points, start, rounds)
    assert members.tolist() == reference.members
    torch.testing.assert_close(centroids, torch.stack(reference.centroids))


@pytest.mark.parametrize(("cache", "model"), crossed(CACHES, ["flux2", "qwen-image", "wan", "z-image"]))
def test_a_model_whose_blocks_are_not_described_is_refused_with_the_way_to_describe_them(
    cache: Any, model: str
) -> None:
    pipe, _ = tiny.PIPELINES[model]()
    with pytest.raises(UnsupportedModel, match="TOKEN_ROLES"):
        accelerate(pipe, [cache])


@each_cache
def test_images_that_are_decided_one_by_one_are_refused_beside_a_token_cache(cache: Any) -> None:
    with pytest.raises(IncompatibleStack, match="same images in every block call"):
        Stack([TeaCache(0.2, per_image=True), cache])


@pytest.mark.parametrize(
    ("cache", "gate"),
    crossed(CACHES, [SeaCache(0.9), FirstBlockCache(1.0, leading=2, trailing=1), Interval(2), EasyCache(0.4)]),
)
def test_with_a_step_cache_skipped_steps_run_nothing_and_the_flops_are_those_really_spent(
    cache: Any, gate: Any
) -> None:
    pipe, call = tiny.flux(steps=14)
    fast = accelerate(pipe, [gate, cache])
    tiny.run(fast, call)
    spent = spent_flops(fast, call)
    record = fast.fastdit.last_run
    # SeaCache multiplies the frame of tokens with a matrix along each axis; a record leaves out what gates spend.
    side = math.isqrt(record.steps[0].tokens)
    gates = 2 * 2 * side**3 * pipe.transformer.inner_dim if isinstance(gate, SeaCache) else 0
    assert [step.flops + gates for step in record.steps] == spent
    assert record.skipped > 0 and record.partial > 0
    assert torch.equal(tiny.run(fast, call), tiny.run(fast, call))


def test_the_blocks_whose_signal_decides_run_on_every_token() -> None:
    pipe, call = tiny.flux(steps=14)
    leading = pipe.transformer.transformer_blocks[0].ff
    seen: list[int] = []
    handle = leading.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[1]))
    fast = accelerate(pipe, [FirstBlockCache(0.5), ToCa(4, 0.25, first=2)])
    with pytest.warns(NeverFired, match="FirstBlockCache"):  # every step is decided, and every one computed
        tiny.run(fast, call)
    handle.remove()
    assert fast.fastdit.last_run.partial > 0
    assert len(set(seen)) == 1


def test_two_token_caches_are_refused() -> None:
    with pytest.raises(IncompatibleStack, match="token cache level"):
        Stack([DuCa(), ToCa()])


@each_cache
def test_a_block_with_a_forward_of_its_own_is_refused(cache: Any) -> None:
    pipe, call = tiny.flux(steps=STEPS)
    block = pipe.transformer.transformer_blocks[1]
    block.forward = block.forward
    with pytest.raises(IncompatibleStack, match=r"transformer_blocks\.1"):
        tiny.run(accelerate(pipe, [cache]), call)


@each_cache
def test_feed_forward_chunking_is_refused(cache: Any) -> None:
    pipe, call = tiny.sd3(steps=STEPS)
    for block in pipe.transformer.transformer_blocks:
        block.set_chunk_feed_forward(8, dim=1)
    with pytest.raises(IncompatibleStack, match="chunking"):
        tiny.run(accelerate(pipe, [cache]), call)


@pytest.mark.parametrize("score", ["attention", "value_norm", "text"])
def test_a_score_that_can_t_be_seen_is_refused_with_the_scores_that_can(score: str) -> None:
    pipe, call = tiny.pixart(steps=STEPS)
    pipe.transformer.set_attn_processor(AttnProcessor())
    with pytest.raises(IncompatibleStack, match="output_norm"):
        tiny.run(accelerate(pipe, [ToCa(score=score)]), call)
    assert torch.isfinite(tiny.run(accelerate(pipe, [ToCa()]), call)).all()


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (ToCa, {"interval": 0}),
        (ToCa, {"interval": 2.5}),
        (ToCa, {"ratio": 1.1}),
        (ToCa, {"ratio": float("nan")}),
        (ToCa, {"score": "best"}),
        (ToCa, {"first": -1}),
        (ToCa, {"age_weight": -0.1}),
        (ToCa, {"spatial_bonus": "much"}),
        (ToCa, {"cell": 0}),
        (ToCa, {"layer_slope": float("inf")}),
        (ToCa, {"interval_slope": 1.0}),
        (ToCa, {"guidance_halves": 1}),
        (DuCa, {"ratio": None}),
        (ClusCa, {"clusters": 0}),
        (ClusCa, {"gamma": 1.5}),
        (ClusCa, {"iterations": 0}),
        (ClusCa, {"seed": -1}),
    ],
    ids=str,
)
def test_a_value_that_makes_no_sense_is_refused_when_it_is_written(kind: Any, options: dict[str, Any]) -> None:
    with pytest.raises(InvalidConfig, match=kind.__name__):
        kind(**options)


@each_cache
def test_a_stack_with_a_token_cache_survives_json(cache: Any) -> None:
    stack = Stack([RALU.paper("4x", fidelity="exact"), cache])
    assert Stack.from_json(json.loads(json.dumps(stack.to_json()))) == stack
