"""What the contracts can't know: that each method does what its formula says."""

from __future__ import annotations

import math
import subprocess
import sys
from importlib.metadata import entry_points
from types import SimpleNamespace

import pytest
import torch
from diffusers import DiffusionPipeline

from fastdit import Interval, InvalidConfig, ProgressiveResolution, Reuse, accelerate
from fastdit.blocks.attention import AttentionCall
from fastdit.models import family_of
from fastdit.step import StepContext
from fastdit.testing import generate, tiny_flux
from fastdit.testing.tiny import assembled, component, flow_matching, randn
from fastdit_sample import EASY_ANIMATE, AttentionBroadcast, CosineSteps, Fading, LatentDrift, QueryChunks, SharpLift

STEP = StepContext(step=3, total_steps=12, stage=0, stage_step=3, branch="call 0")


def test_a_step_is_skipped_while_what_enters_the_blocks_is_near_what_entered_at_the_last_computed_one() -> None:
    gate, memory = LatentDrift(0.5), LatentDrift(0.5).memory()
    verdicts = []
    for value in (1.0, 1.2, 1.4, 1.6, 1.8):
        site = SimpleNamespace(entered=torch.full((1, 4, 2), value))
        signal = gate.signal(site)
        change = gate.change(memory, signal)
        amount, scale = (1.0, 1.0) if change is None else change.tolist()
        verdicts.append(gate.decide(memory, amount / scale, STEP).compute)
        gate.remember(memory, signal, verdicts[-1])
    assert verdicts == [True, False, False, True, False]


def test_a_residual_fades_by_the_same_share_at_every_step() -> None:
    history = Fading(0.5).begin()
    history.record(3, [torch.tensor([8.0])])
    assert [float(history.predict(step)[0]) for step in (4, 5, 6)] == [4.0, 2.0, 1.0]


def test_one_that_does_not_fade_is_reuse() -> None:
    pipeline, call = tiny_flux()
    fading, reused = (accelerate(pipeline, [Interval(3, forecast=one)]) for one in (Fading(1.0), Reuse()))
    assert torch.equal(generate(fading, call), generate(reused, call))


def test_noise_levels_lie_on_a_cosine() -> None:
    pipeline, call = tiny_flux(steps=4)
    fast = accelerate(pipeline, [CosineSteps()])
    generate(fast, call)
    sigmas = [step.sigma for step in fast.fastdit.last_run.steps]
    assert sigmas == pytest.approx([math.cos(math.pi * step / 8) for step in range(4)])


def test_what_has_no_fine_part_is_only_enlarged() -> None:
    frames = torch.full((1, 2, 3, 4), 0.7)
    torch.testing.assert_close(SharpLift(2.0).enlarged(frames), torch.full((1, 2, 6, 8), 0.7))


@pytest.mark.parametrize("queries", [1, 3, 100])
def test_chunks_give_torch_s_attention(queries: int) -> None:
    query, key, value = (randn(2, 3, size, 8, seed=size) for size in (5, 6, 6))
    mask = randn(2, 3, 5, 6, seed=7)
    some = (mask > 0).index_fill(3, torch.tensor([0]), True)  # no query without a key
    for one in (None, mask, some, mask[:1, :1, :1]):
        found = QueryChunks(queries).kernel("query chunks")(AttentionCall(query, key, value, one))
        expected = torch.nn.functional.scaled_dot_product_attention(query, key, value, one)
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(("every", "expected"), [(2, [3, 5, 7]), (3, [3, 4, 6, 7])])
def test_attention_runs_in_every_so_many_steps_inside_the_window(every: int, expected: list[int]) -> None:
    pipeline, call = tiny_flux(steps=12)
    fast = accelerate(pipeline, [AttentionBroadcast(every, window=(0.25, 0.75))])
    generate(fast, call)
    actions = [step.action for step in fast.fastdit.last_run.steps]
    assert [index for index, action in enumerate(actions) if action == "partial"] == expected
    assert actions.count("computed") == 12 - len(expected)


def test_values_out_of_range_are_refused_by_name() -> None:
    with pytest.raises(InvalidConfig, match="QueryChunks's queries is"):
        QueryChunks(0)


def easy_animate() -> tuple[DiffusionPipeline, dict[str, object]]:
    """Make a tiny EasyAnimatePipeline without a text encoder, and the arguments of a call: a video of two planes."""
    autoencoder = {"latent_channels": 4, "block_out_channels": (8, 8, 8, 8), "norm_num_groups": 4}
    parts = {
        "text_encoder": None,
        "tokenizer": None,
        "scheduler": flow_matching(),
        "transformer": component("EasyAnimateTransformer3DModel"),
        "vae": component("AutoencoderKLMagvit", autoencoder),
    }
    call: dict[str, object] = {"height": 64, "width": 96, "num_frames": 5, "num_inference_steps": 4}
    for seed, name in enumerate(("prompt", "negative_prompt")):
        call |= {f"{name}_embeds": randn(1, 6, 32, seed=seed), f"{name}_attention_mask": torch.ones(1, 6)}
    return assembled("EasyAnimatePipeline", parts), {**call, "output_type": "latent"}


def test_the_family_is_found_by_its_entry_point_and_takes_stages() -> None:
    pipeline, call = easy_animate()
    family = family_of(pipeline)
    assert family is not None and family.name == EASY_ANIMATE.name
    fast = accelerate(pipeline, [ProgressiveResolution(steps=(2, 2), lift=SharpLift())])
    plain, found = (one(**call, generator=torch.Generator().manual_seed(0)).frames for one in (pipeline, fast))
    assert torch.isfinite(found).all() and found.shape == plain.shape
    assert [step.tokens for step in fast.fastdit.last_run.steps] == [6, 6, 24, 24]


STACK = """
from fastdit import Stack
parts = [{"type": "LatentDrift", "forecast": {"type": "Fading", "keep": 0.9}}, {"type": "Replay"}]
print(Stack.from_json({"fastdit_stack": 1, "accelerators": parts}))
"""


def test_every_entry_point_has_the_name_of_its_class() -> None:
    own = [entry for entry in entry_points(group="fastdit.accelerators") if entry.value.startswith("fastdit_sample.")]
    assert len(own) == 7
    assert [entry.name for entry in own] == [entry.load().__name__ for entry in own]


def test_a_stack_s_json_may_name_what_nobody_has_imported() -> None:
    said = subprocess.run([sys.executable, "-c", STACK], capture_output=True, text=True, check=True).stdout
    assert said == "Stack([LatentDrift(forecast=Fading(keep=0.9), threshold=0.1), Replay()])\n"
