"""How engines are built, kept, found again and refused, shown by one that builds in no time."""

from __future__ import annotations

import gc
import json
import math
import warnings
from pathlib import Path
from typing import Any

import pieces
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pieces import Forgetful, Written
from torch import nn
from torch.overrides import TorchFunctionMode

import tiny
from fastdit import (
    AOT,
    RALU,
    ClusCa,
    Compile,
    DuCa,
    EngineBuildFailed,
    EngineMismatch,
    EngineWarning,
    FastditWarning,
    FirstBlockCache,
    IncompatibleStack,
    InvalidConfig,
    NeverFired,
    Stack,
    StepMask,
    ToCa,
    accelerate,
    load_mini,
)
from fastdit.engine.arguments import canonical, canonical_strides, in_canonical_strides, outline_of
from fastdit.engine.checksum import sample_of, weights_of
from fastdit.engine.fingerprint import Structure, structure_of
from fastdit.testing import generate, tiny_flux

MASK = (True, False, True, False)


def test_blocks_of_equal_structure_share_an_engine_and_give_the_plain_numbers(tmp_path: Path) -> None:
    module = pieces.model()
    twin = accelerate(module, [Written(directory=str(tmp_path))])
    with torch.no_grad():
        assert torch.equal(pieces.run(twin, pieces.inputs()), module(pieces.inputs()))
    assert [build.kept for build in twin.fastdit.workshop.builds] == [False]
    assert [step.engine for step in twin.fastdit.last_run.steps] == ["Written"]


def test_another_twin_finds_what_is_kept(tmp_path: Path) -> None:
    for kept in (False, True):
        twin = accelerate(pieces.model(), [Written(directory=str(tmp_path))])
        pieces.run(twin, pieces.inputs())
        assert [build.kept for build in twin.fastdit.workshop.builds] == [kept]
        del twin
        gc.collect()  # engines live as long as their twins


def test_a_kept_engine_of_no_use_is_built_again_and_that_is_said(tmp_path: Path) -> None:
    for again in (False, True):
        twin = accelerate(pieces.model(), [Forgetful(directory=str(tmp_path))])
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            found = pieces.run(twin, pieces.inputs())
        assert [str(warning.message).count("nobody remembers") for warning in said] == [1] * again
        assert [build.kept for build in twin.fastdit.workshop.builds] == [False]
        with torch.no_grad():
            assert torch.equal(found, pieces.model()(pieces.inputs()))
        del twin
        gc.collect()


@pytest.mark.exhaustive
@settings(max_examples=4)
@given(data=st.data())
def test_a_kept_file_that_was_changed_never_makes_a_wrong_picture(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    directory = tmp_path_factory.mktemp("kept")
    module, hidden_states = pieces.model(), pieces.inputs()
    pieces.run(accelerate(module, [Written(directory=str(directory))]), hidden_states)
    gc.collect()
    path = data.draw(st.sampled_from(sorted(directory.rglob("payload.txt")) + sorted(directory.rglob("manifest.json"))))
    content = path.read_bytes()
    place = data.draw(st.integers(0, 12 if path.suffix == ".txt" else len(content) - 1))
    path.write_bytes(content[:place] + data.draw(st.sampled_from([b"7", b"", b"e"])) + content[place + 1 :])
    twin = accelerate(module, [Written(directory=str(directory))])
    with warnings.catch_warnings(record=True) as said, torch.no_grad():
        warnings.simplefilter("always")
        assert torch.equal(pieces.run(twin, hidden_states), module(hidden_states))
    # A manifest whose spacing alone has changed means the same, so that nothing need be said.
    assert [type(one.message) for one in said] in ([], [EngineWarning])
    del twin
    gc.collect()
    again = accelerate(module, [Written(directory=str(directory))])
    pieces.run(again, hidden_states)
    assert [build.kept for build in again.fastdit.workshop.builds] == [True]


def test_a_build_that_fails_is_an_error_with_the_shape_and_leaves_nothing(tmp_path: Path) -> None:
    twin = accelerate(pieces.model(), [Written(fails=True, directory=str(tmp_path))])
    with pytest.raises(EngineBuildFailed, match=r"blocks\.0 .*\[1, 4, 8\].*the compiler gave up"):
        pieces.run(twin, pieces.inputs())
    assert [path for path in tmp_path.iterdir() if path.is_dir()] == []


def test_where_it_was_asked_for_a_failed_build_runs_eagerly_and_is_said_in_plan_and_record(tmp_path: Path) -> None:
    pipeline, call = tiny_flux(steps=2)
    plain = generate(pipeline, call)
    fast = accelerate(pipeline, [Written(fails=True, on_failure="eager", directory=str(tmp_path))])
    with pytest.warns(FastditWarning) as said:
        assert torch.equal(generate(fast, call), plain)
    # One for each kind of block, and that nothing was gained.
    assert [one.category for one in said] == [EngineWarning, EngineWarning, NeverFired]
    assert {step.engine for step in fast.fastdit.last_run.steps} == {"eager"}
    said_in_plan = fast.fastdit.explain(64, 64)
    assert "FluxTransformerBlock float32[1, 16, 32] on cpu runs eagerly" in said_in_plan
    assert said_in_plan.count("runs eagerly: RuntimeError: the compiler gave up") == 2


def test_a_hook_inside_a_block_is_refused_by_name(tmp_path: Path) -> None:
    module = pieces.model()
    module.blocks[1].linear.register_forward_hook(lambda *_: None)
    twin = accelerate(module, [Written(directory=str(tmp_path))])
    with pytest.raises(EngineBuildFailed, match=r"blocks\.1\.linear \(Linear\) has a hook"):
        pieces.run(twin, pieces.inputs())


def test_something_that_answers_torch_s_functions_is_refused_by_name(tmp_path: Path) -> None:
    class Answers(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            return func(*args, **(kwargs or {}))

    twin = accelerate(pieces.model(), [Written(directory=str(tmp_path))])
    with Answers(), pytest.raises(EngineMismatch, match="Answers answers calls"):
        pieces.run(twin, pieces.inputs())


def test_an_argument_that_nothing_is_known_of_is_refused_by_name() -> None:
    with pytest.raises(EngineMismatch, match=r"a\['x'\]\[1\] is a object"):
        outline_of({"x": [1, object()]}, "a")


@pytest.mark.parametrize("shape", [(64, 64), (576, 576), (2304, 576), (576, 64), (128, 32)], ids=str)
def test_a_weight_s_sample_is_spread_over_its_rows_and_its_columns(shape: tuple[int, int]) -> None:
    sample = sample_of(torch.arange(shape[0] * shape[1]).view(shape))
    assert 32 <= len(sample) <= 128
    assert len(set((sample % shape[1]).tolist())) >= 16
    assert len(set((sample // shape[1]).tolist())) >= 32


def test_a_change_that_leaves_the_first_column_alone_is_seen() -> None:
    first, second = nn.Linear(64, 64, bias=False), nn.Linear(64, 64, bias=False)
    second.weight.data = first.weight.data.clone()
    assert weights_of(first) == weights_of(second)
    second.weight.data[:, 1:] *= 1.01
    assert weights_of(first) != weights_of(second)


def test_what_a_module_computes_by_is_in_its_structure() -> None:
    first, second = pieces.model(0).blocks[0], pieces.model(1).blocks[1]
    assert structure_of(first) == structure_of(second)
    assert weights_of(first) != weights_of(second)
    second.gain = 0.25
    assert structure_of(first) != structure_of(second)
    second.gain = 0.5
    second.linear.weight.requires_grad_(False)
    assert structure_of(first) != structure_of(second)


@pytest.mark.parametrize("name", ["gain", "linear.in_features", "forward", "linear.note", "training"])
def test_an_attribute_that_comes_goes_or_is_exchanged_is_seen(name: str) -> None:
    block = pieces.model().blocks[0]
    structure = Structure(block)
    assert structure.unchanged
    *path, own = name.split(".")
    part = block.get_submodule(".".join(path))
    before = vars(part).get(own)
    setattr(part, own, "another")
    assert not structure.unchanged
    delattr(part, own)
    assert structure.unchanged is (before is None)


def test_arguments_in_canonical_strides_are_handed_on_as_they_are() -> None:
    tensor = torch.randn(3, 4)
    nested = (tensor, {"a": [tensor, 2.0]})
    assert in_canonical_strides(nested) is nested
    found = in_canonical_strides((tensor, {"a": [tensor.T, 2.0]}))
    assert found[0] is tensor and found[1]["a"][0].is_contiguous() and torch.equal(found[1]["a"][0], tensor.T)


def test_a_lora_and_its_scale_are_in_the_structure_also_between_the_steps_of_a_run(tmp_path: Path) -> None:
    pipeline, call = tiny_flux(steps=4)
    fast = accelerate(pipeline, [Written(directory=str(tmp_path))])
    generate(fast, call)
    built = len(fast.fastdit.workshop.builds)
    pipeline.load_lora_weights(tiny.lora(pipeline.transformer), adapter_name="style")
    generate(fast, call)
    assert len(fast.fastdit.workshop.builds) == 2 * built

    def weaken(_: Any, step: int, __: Any, values: dict[str, Any]) -> dict[str, Any]:
        if step == 1:
            pipeline.set_adapters("style", 0.5)
        return values

    found = generate(fast, call, callback_on_step_end=weaken)
    assert len(fast.fastdit.workshop.builds) == 3 * built
    pipeline.set_adapters("style", 1.0)
    assert torch.equal(generate(pipeline, call, callback_on_step_end=weaken), found)


def test_settings_of_the_process_that_compilers_bake_in_are_in_the_key(tmp_path: Path) -> None:
    twin = accelerate(pieces.model(), [Written(directory=str(tmp_path))])
    pieces.run(twin, pieces.inputs())
    torch.use_deterministic_algorithms(True)
    try:
        pieces.run(twin, pieces.inputs())
    finally:
        torch.use_deterministic_algorithms(False)
    pieces.run(twin, pieces.inputs())
    assert len(twin.fastdit.workshop.builds) == 2


@pytest.mark.parametrize("other", [ToCa(), DuCa(), ClusCa(), FirstBlockCache(0.1, per_image=True)])
def test_what_changes_inside_a_block_or_its_rows_is_a_derived_conflict(other: Any) -> None:
    with pytest.raises(IncompatibleStack, match=r"blocks that run as a whole|the same images in every block call"):
        Stack([other, Compile()])


class Unasked(nn.Module):
    """A model that has blocks and calls none."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([pieces.Block(8)])

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return 2.0 * hidden_states


@pytest.mark.parametrize("strict", [False, True])
def test_an_engine_that_is_asked_for_no_block_in_a_whole_run_is_noticed(strict: bool, tmp_path: Path) -> None:
    twin = accelerate(Unasked(), [Written(directory=str(tmp_path))], strict=strict)
    with pytest.raises(NeverFired) if strict else pytest.warns(NeverFired, match=r"Written\(.*asked for no block"):
        pieces.run(twin, pieces.inputs())
    assert [step.engine for step in twin.fastdit.last_run.steps] == ["none"]


def test_where_every_block_ran_eagerly_a_strict_run_is_an_error(tmp_path: Path) -> None:
    engine = Written(fails=True, on_failure="eager", directory=str(tmp_path))
    twin = accelerate(pieces.model(), [engine], strict=True)
    with pytest.warns(EngineWarning), pytest.raises(NeverFired, match="all 3 blocks ran eagerly"):
        pieces.run(twin, pieces.inputs())


@pytest.mark.parametrize(
    "cache",
    [StepMask(MASK), FirstBlockCache(1e6), FirstBlockCache(1e6, scope="list"), StepMask(MASK, scope="forward")],
)
def test_a_cache_decides_and_the_engine_runs_what_it_lets_run(cache: Any, tmp_path: Path) -> None:
    pipeline, call = tiny_flux(steps=4)
    alone = accelerate(pipeline, [cache])
    expected = generate(alone, call)
    fast = accelerate(pipeline, [cache, Written(directory=str(tmp_path))])
    assert torch.equal(generate(fast, call), expected)
    for step, lone in zip(fast.fastdit.last_run.steps, alone.fastdit.last_run.steps, strict=True):
        assert (step.action, step.reason) == (lone.action, lone.reason)
        assert step.engine == ("Written" if step.blocks_run else "none")


def test_a_warm_up_passes_through_every_stage_though_a_cache_would_skip_one(tmp_path: Path) -> None:
    pipeline, call = tiny_flux()
    mask = StepMask((True, *[False] * 10, True), stage_change="carry")
    fast = accelerate(pipeline, [RALU.paper("4x"), mask, Written(directory=str(tmp_path))])
    embeds = {name: call[name] for name in ("prompt_embeds", "pooled_prompt_embeds")}
    report = fast.fastdit.warmup(64, 64, 12, progress=False, **embeds)
    assert [build.stage[2] for build in report.builds] == ["coarse", "coarse", "mixed", "mixed", "fine", "fine"]
    assert math.isclose(sum(report.seconds_by_shape.values()), sum(build.seconds for build in report.builds))
    assert "6 engines" in str(report) and "mixed tokens of a 4 x 4 grid: built in" in str(report)
    generate(fast, call)
    assert len(fast.fastdit.workshop.builds) == 6


def test_the_embedded_pipeline_is_warmed_up_at_the_size_that_was_asked_for(tmp_path: Path) -> None:
    fast = accelerate(load_mini(), [Written(directory=str(tmp_path))])
    shapes = {build.shape for build in fast.fastdit.warmup(128, 128, 2, progress=False).builds}
    assert shapes == {"float32[1, 64, 256] on cpu"}


def test_a_warm_up_without_an_engine_runs_nothing_and_one_of_a_bare_module_is_refused_by_name() -> None:
    pipeline, _ = tiny_flux()
    fast = accelerate(pipeline, [FirstBlockCache(0.1)])
    assert fast.fastdit.warmup(64, 64).builds == () and fast.fastdit.last_run is None
    with pytest.raises(InvalidConfig, match="height"):
        fast.fastdit.warmup(-64, 64)
    with pytest.raises(InvalidConfig, match="your own loop"):
        accelerate(pipeline.transformer, [AOT()]).fastdit.warmup()


@pytest.mark.parametrize(
    "options", [{"on_failure": "hope"}, {"directory": 3}, {"packed": 1}, {"mode": "reduce-overhead"}]
)
def test_bad_options_are_refused_by_name(options: dict[str, Any]) -> None:
    with pytest.raises(InvalidConfig, match=next(iter(options))):
        Compile(**options)


@given(st.lists(st.integers(1, 4), min_size=1, max_size=4), st.randoms())
def test_canonical_strides_are_those_of_a_fresh_tensor_and_nothing_is_copied_needlessly(
    shape: list[int], random: Any
) -> None:
    fresh = torch.arange(float(math.prod(shape))).view(shape)
    assert fresh.stride() == canonical_strides(tuple(shape)) and canonical(fresh) is fresh
    order = random.sample(range(len(shape)), len(shape))
    turned = fresh.permute(order)
    made = canonical(turned)
    assert made.stride() == canonical_strides(tuple(turned.shape)) and torch.equal(made, turned)
    odd = fresh.as_strided(
        shape, [stride if size > 1 else 17 for size, stride in zip(shape, fresh.stride(), strict=True)]
    )
    assert canonical(odd).data_ptr() == fresh.data_ptr()


def test_the_commands_list_and_clear_what_is_kept(tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from fastdit.cli import app

    pieces.run(accelerate(pieces.model(), [Written(directory=str(tmp_path))]), pieces.inputs())
    run = CliRunner().invoke
    listed = json.loads(run(app, ["engines", "list", "--directory", str(tmp_path), "--json"]).output)
    assert [(entry["key"]["engine"], entry["key"]["piece"]) for entry in listed] == [("Written", "Block")]
    assert "1 engines" in run(app, ["engines", "list", "--directory", str(tmp_path)]).output
    assert "1 engines removed" in run(app, ["engines", "clear", "--directory", str(tmp_path)]).output
    assert "0 engines" in run(app, ["engines", "list", "--directory", str(tmp_path)]).output
