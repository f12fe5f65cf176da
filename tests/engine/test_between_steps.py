"""What an engine depends on, one thing at a time: each is seen at the next call, and what was before comes back."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import pieces
import pytest
import torch
from pieces import Written
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import tiny
from fastdit import AOT, Compile, EngineBuildFailed, EngineMismatch, EngineWarning, NeverFired, accelerate
from fastdit.engine.fingerprint import Structure
from fastdit.engine.key import environment_of
from fastdit.engine.piece import Execute, PieceCall
from fastdit.testing import flux_transformer, generate, tiny_flux

CPU = torch.device("cpu")


@dataclasses.dataclass(frozen=True)
class Frozen(Written):
    """Runs what a block was when the engine was built, weights and all, as an engine does that has them baked in."""

    bakes_weights: ClassVar[bool] = True

    def build(self, call: PieceCall, folder: Path) -> Execute:
        super().build(call, folder)
        model = call.apart()
        for part in model.module.modules():
            for name, weight in part._parameters.items():
                part._parameters[name] = None if weight is None else nn.Parameter(weight.detach().clone())
        return lambda later: dataclasses.replace(later, module=model.module).run()


class Gain:
    """Something of a block's own that is no module."""

    def __init__(self) -> None:
        self.factors = [1.0, 2.0]


def model() -> pieces.Model:
    made = pieces.model()
    for block in made.blocks:
        block.processor = Gain()
        block.table = torch.ones(8)
    return made


def _child(block: Any) -> None:
    block.linear = pieces.model(1).blocks[0].linear


def _weight(block: Any) -> None:
    block.linear.weight = nn.Parameter(block.linear.weight.detach() * 2.0)


def _memory(block: Any) -> None:
    block.linear.weight.data = block.linear.weight.data.clone()


def _in_place(block: Any) -> None:
    with torch.no_grad():
        block.linear.weight.mul_(2.0)


CHANGES: dict[str, Callable[[Any], object]] = {
    "an attribute": lambda block: setattr(block, "gain", 0.25),
    "a new attribute": lambda block: setattr(block, "more", 1),
    "a child": _child,
    "a weight": _weight,
    "a weight in place": _in_place,
    "a processor": lambda block: setattr(block, "processor", nn.Identity()),
    "an item of a processor's list": lambda block: block.processor.factors.__setitem__(0, 3.0),
    "a tensor that is no weight": lambda block: block.table.add_(1.0),
    "a mode": lambda block: block.train(),
    "a hook inside": lambda block: block.linear.register_forward_hook(lambda *_: None),
    "a weight's memory": _memory,
}


@pytest.mark.parametrize("what", CHANGES)
def test_what_changes_in_a_block_is_seen_without_a_digest(what: str) -> None:
    block = model().blocks[0]
    structure = Structure(block, values=True)
    assert structure.unchanged
    CHANGES[what](block)
    assert not structure.unchanged


def test_what_is_put_back_as_it_was_is_no_change() -> None:
    block = model().blocks[0]
    block.gain = float("0.5")
    structure = Structure(block)
    block.gain = float("0.5")  # another object
    block.processor.factors[0] = float("1.0")
    with torch.no_grad():
        block.linear.weight.mul_(1.5)  # weights are read at every call
    assert structure.unchanged


@pytest.mark.parametrize("what", sorted(set(CHANGES) - {"a hook inside"}))
def test_a_block_that_changes_between_two_steps_of_a_run_runs_as_it_is_now(what: str, tmp_path: Path) -> None:
    module, hidden_states = model(), pieces.inputs()
    twin = accelerate(module, [Frozen(directory=str(tmp_path))])
    with torch.no_grad(), twin.fastdit.run(2):
        assert torch.equal(twin(hidden_states), module(hidden_states))
        CHANGES[what](module.blocks[1])
        assert torch.equal(twin(hidden_states), module(hidden_states))


def test_a_hook_that_is_put_inside_a_block_between_two_steps_is_refused_by_name(tmp_path: Path) -> None:
    module = model()
    twin = accelerate(module, [Written(directory=str(tmp_path))])
    with torch.no_grad(), twin.fastdit.run(2):
        twin(pieces.inputs())
        CHANGES["a hook inside"](module.blocks[1])
        with pytest.raises(EngineBuildFailed, match=r"blocks\.1\.linear \(Linear\) has a hook"):
            twin(pieces.inputs())


def _disabled(pipeline: Any) -> None:
    pipeline.disable_lora()


def _weaker(pipeline: Any) -> None:
    pipeline.set_adapters("style", 0.5)


def _processors(pipeline: Any) -> None:
    class Doubled(type(pipeline.transformer.single_transformer_blocks[0].attn.processor)):  # type: ignore[misc]
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return 2.0 * super().__call__(*args, **kwargs)

    for block in pipeline.transformer.single_transformer_blocks:
        block.attn.set_processor(Doubled())


SWITCHES = {"disable_lora": _disabled, "set_adapters": _weaker, "set_attn_processor": _processors}


def _with_a_lora() -> tiny.Built:
    pipeline, call = tiny_flux(steps=3)
    pipeline.transformer = flux_transformer(layers=0, single_layers=1)
    pipeline.load_lora_weights(tiny.lora(pipeline.transformer, strength=0.5), adapter_name="style")
    return pipeline, call


def _switched(make: Callable[[Any], Any], switch: Callable[[Any], None]) -> torch.Tensor:
    """Generate a picture, with a switch after the first step."""
    pipeline, call = _with_a_lora()

    def after(_: Any, step: int, __: Any, values: dict[str, Any]) -> dict[str, Any]:
        if step == 0:
            switch(pipeline)
        return values

    found: torch.Tensor = generate(make(pipeline), call, callback_on_step_end=after)
    return found


@pytest.mark.parametrize("what", SWITCHES)
def test_a_model_that_diffusers_switches_between_two_steps_gives_the_plain_picture(what: str, tmp_path: Path) -> None:
    plain = _switched(lambda pipeline: pipeline, SWITCHES[what])
    unswitched = _switched(lambda pipeline: pipeline, lambda _: None)
    frozen = [Frozen(directory=str(tmp_path))]
    assert torch.equal(_switched(lambda pipeline: accelerate(pipeline, frozen), SWITCHES[what]), plain)
    assert not torch.allclose(plain, unswitched)


def test_a_lora_s_scale_that_the_forward_itself_sets_is_seen_and_needs_one_engine(tmp_path: Path) -> None:
    pipeline, call = _with_a_lora()
    fast = accelerate(pipeline, [Frozen(directory=str(tmp_path))])
    for scale in (1.0, 0.5, 0.5):
        call["joint_attention_kwargs"] = {"scale": scale}
        assert torch.equal(generate(fast, call), generate(pipeline, call))
    assert len(fast.fastdit.workshop.builds) == 2


@pytest.mark.exhaustive
@pytest.mark.parametrize("what", SWITCHES)
@pytest.mark.parametrize("engine", [AOT, Compile])
def test_compiled_code_follows_a_model_that_diffusers_switches_between_two_steps(engine: Any, what: str) -> None:
    plain = _switched(lambda pipeline: pipeline, SWITCHES[what])
    found = _switched(lambda pipeline: accelerate(pipeline, [engine()]), SWITCHES[what])
    torch.testing.assert_close(found, plain, rtol=1e-4, atol=1e-4)


@contextmanager
def put(place: Any, name: str, value: object) -> Iterator[None]:
    before = getattr(place, name)
    setattr(place, name, value)
    try:
        yield
    finally:
        setattr(place, name, before)


@contextmanager
def called(set_to: Callable[..., Any], value: Any, before: Any) -> Iterator[None]:
    set_to(value)
    try:
        yield
    finally:
        set_to(before)


def _deterministic(**options: Any) -> Any:
    return called(lambda on: torch.use_deterministic_algorithms(on, **(options if on else {})), True, False)


MATMUL, CUDNN = torch.backends.cuda.matmul, torch.backends.cudnn

#: Switches of the process, and the guard of Dynamo that each is for; "" for those that choose another kernel.
FLAGS: dict[str, tuple[str, Callable[[], Any]]] = {
    "threads": ("num_threads", lambda: called(torch.set_num_threads, 2, 1)),
    "dtype": ("default_dtype", lambda: called(torch.set_default_dtype, torch.float64, torch.float32)),
    "device": ("default device", lambda: torch.device("meta")),
    "deterministic": ("deterministic_algorithms", _deterministic),
    "deterministic, warn": ("deterministic_algorithms_warn_only", lambda: _deterministic(warn_only=True)),
    "filled memory": ("", lambda: put(torch.utils.deterministic, "fill_uninitialized_memory", False)),
    "tf32, as it was set": ("allow_tf32", lambda: called(torch.set_float32_matmul_precision, "high", "highest")),
    "reduced float16": ("allow_fp16_reduce", lambda: put(MATMUL, "allow_fp16_reduced_precision_reduction", False)),
    "reduced bfloat16": ("allow_bf16_reduce", lambda: put(MATMUL, "allow_bf16_reduced_precision_reduction", False)),
    "float16 sums": ("", lambda: put(MATMUL, "allow_fp16_accumulation", True)),
    "autocast": ("autocast_state", lambda: torch.autocast("cpu", torch.bfloat16)),
    "autocast elsewhere": (
        "autocast_state",
        lambda: called(lambda on: torch.set_autocast_enabled("cuda", on), True, False),
    ),
    "autocast cache": ("autocast_state", lambda: torch.autocast("cpu", enabled=False, cache_enabled=False)),
    "functions": ("torch_function", torch._C.DisableTorchFunctionSubclass),
    "all functions": ("torch_function_all_disabled", torch._C.DisableTorchFunction),
    "no flash attention": ("", lambda: sdpa_kernel([SDPBackend.MATH, SDPBackend.EFFICIENT_ATTENTION])),
    "attention's order": ("", lambda: sdpa_kernel([SDPBackend.MATH, SDPBackend.FLASH_ATTENTION], set_priority=True)),
    "cuDNN's search": ("", lambda: put(CUDNN, "benchmark", True)),
}
if hasattr(torch._C, "_get_fp32_precision_getter"):
    FLAGS |= {
        "tf32, as it is set": ("allow_tf32", lambda: put(MATMUL, "fp32_precision", "tf32")),
        "tf32 for all": ("", lambda: put(torch.backends, "fp32_precision", "tf32")),
        "oneDNN in bfloat16": ("", lambda: put(torch.backends.mkldnn.matmul, "fp32_precision", "bf16")),
    }


@pytest.mark.parametrize("flag", FLAGS)
def test_a_switch_of_the_process_is_part_of_what_engines_are_built_for(flag: str) -> None:
    before = environment_of(CPU)
    with FLAGS[flag][1]():
        assert environment_of(CPU) != before
    assert environment_of(CPU) == before


def test_everything_of_the_process_that_dynamo_guards_on_is_a_part_of_the_key() -> None:
    from torch._C._dynamo.guards import GlobalStateGuard

    if not hasattr(GlobalStateGuard, "__getstate__") or not isinstance(GlobalStateGuard().__getstate__(), str):
        pytest.skip("this torch does not tell what it guards on")
    guarded = set(json.loads(GlobalStateGuard().__getstate__())) - {"grad_mode"}  # gradients are refused
    assert guarded - {guard for guard, _ in FLAGS.values()} == set()


@pytest.mark.parametrize("flag", ["dtype", "tf32, as it is set", "reduced bfloat16", "no flash attention"])
def test_a_switch_between_two_steps_gets_an_engine_of_its_own_and_back_the_old_one(flag: str, tmp_path: Path) -> None:
    if flag not in FLAGS:
        pytest.skip("this torch has no newer way")
    twin, hidden_states = accelerate(pieces.model(), [Written(directory=str(tmp_path))]), pieces.inputs()
    with torch.no_grad(), twin.fastdit.run(3):
        twin(hidden_states)
        with FLAGS[flag][1]():
            twin(hidden_states)
        twin(hidden_states)
    assert len(twin.fastdit.workshop.builds) == 2


@pytest.mark.exhaustive
@pytest.mark.parametrize("engine", [Compile, AOT])
def test_compiled_code_runs_under_every_switch_of_the_process(engine: Any) -> None:
    module, hidden_states = pieces.model(), pieces.inputs()
    twin = accelerate(module, [engine()])
    with torch.no_grad(), twin.fastdit.run(2 * len(FLAGS)):
        for flag, (_, switch) in FLAGS.items():
            if flag in ("functions", "all functions", "device"):  # no engine for tensors without values
                continue
            twin(hidden_states)
            with switch():
                found, plain = twin(hidden_states), module(hidden_states)
                rough = 1e-2 if flag in ("autocast", "oneDNN in bfloat16") else 1e-4
                torch.testing.assert_close(found, plain, rtol=rough, atol=rough)


@pytest.mark.parametrize(
    ("compiler", "setting"), [("_inductor", "emulate_precision_casts"), ("_dynamo", "specialize_float")]
)
def test_a_compiler_s_settings_are_part_of_what_compiled_engines_are_built_for(compiler: str, setting: str) -> None:
    import torch._dynamo
    import torch._inductor.config

    config = getattr(torch, compiler).config
    for engine in (Compile(), AOT()):
        before = engine.environment(CPU)
        with config.patch({setting: not getattr(config, setting)}):
            assert engine.environment(CPU) != before
        assert engine.environment(CPU) == before


def test_a_compiler_that_is_switched_off_is_a_build_that_failed_and_not_an_engine(tmp_path: Path) -> None:
    twin = accelerate(pieces.model(), [Compile(directory=str(tmp_path))])
    before = twin.fastdit.stack.engine.environment(CPU)
    with torch.compiler.set_stance("force_eager"):
        assert twin.fastdit.stack.engine.environment(CPU) != before
        with pytest.raises(EngineBuildFailed, match=r"torch\.compile is switched off"):
            pieces.run(twin, pieces.inputs())


def test_a_counter_of_operators_is_refused_by_name_and_the_next_call_is_as_ever(tmp_path: Path) -> None:
    module, hidden_states = pieces.model(), pieces.inputs()
    twin = accelerate(module, [Written(directory=str(tmp_path))])
    expected = pieces.run(twin, hidden_states)
    with FlopCounterMode(display=False), pytest.raises(EngineMismatch, match="FlopCounterMode answers calls"):
        pieces.run(twin, hidden_states)
    assert torch.equal(pieces.run(twin, hidden_states), expected)
    assert len(twin.fastdit.workshop.builds) == 1


def test_where_it_was_asked_for_blocks_run_eagerly_under_a_counter_which_sees_them_all(tmp_path: Path) -> None:
    module, hidden_states = pieces.model(), pieces.inputs()
    twin = accelerate(module, [Written(on_failure="eager", directory=str(tmp_path))])
    with FlopCounterMode(display=False) as expected, torch.no_grad():
        module(hidden_states)
    with FlopCounterMode(display=False) as found, pytest.warns(EngineWarning), pytest.warns(NeverFired):
        pieces.run(twin, hidden_states)
    assert found.get_total_flops() == expected.get_total_flops() > 0
    assert [step.engine for step in twin.fastdit.last_run.steps] == ["eager"]


def test_a_prompt_of_another_length_is_another_engine_where_the_model_takes_it_as_it_is(tmp_path: Path) -> None:
    pipeline, call = tiny.qwen_image(steps=2)
    fast = accelerate(pipeline, [Written(directory=str(tmp_path))])
    engines = []
    for tokens in (4, 6, 4):
        shorter = {
            name: value[:, :tokens] if name.endswith(("embeds", "embeds_mask")) else value
            for name, value in call.items()
        }
        assert torch.equal(generate(fast, shorter), generate(pipeline, shorter))
        engines.append(len(fast.fastdit.workshop.builds))
    assert engines[0] < engines[1] == engines[2]


def _gguf(pipeline: Any) -> None:
    gguf = pytest.importorskip("gguf")
    from diffusers.quantizers.gguf.utils import GGUFLinear, GGUFParameter

    kind = gguf.GGMLQuantizationType.Q8_0
    for part in [*pipeline.transformer.single_transformer_blocks.modules()]:
        for name, linear in [*part.named_children()]:
            if isinstance(linear, nn.Linear):
                packed = torch.from_numpy(gguf.quants.quantize(linear.weight.detach().numpy(), kind))
                other = GGUFLinear(linear.in_features, linear.out_features, True, compute_dtype=torch.float32)
                other.bias, other.weight = linear.bias, GGUFParameter(packed, requires_grad=False, quant_type=kind)
                setattr(part, name, other)


@pytest.mark.exhaustive
def test_weights_of_gguf_run_compiled() -> None:
    pipeline, call = tiny_flux(steps=1)
    pipeline.transformer = flux_transformer(layers=0, single_layers=1)
    _gguf(pipeline)
    found = generate(accelerate(pipeline, [Compile()]), call)
    plain = generate(pipeline, call)
    assert float((found - plain).norm() / plain.norm()) < 1e-3
