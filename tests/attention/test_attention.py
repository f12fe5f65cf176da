"""Attention through diffusers' dispatcher: the same pictures, by the kernel that was asked for, in one twin alone."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from diffusers import AttentionBackendName, attention_backend
from diffusers.models import attention_dispatch
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor
from torch import Tensor, nn

import tiny
from fastdit import (
    RALU,
    Attention,
    FirstBlockCache,
    IncompatibleStack,
    InvalidConfig,
    NeverFired,
    Stack,
    Taylor,
    ToCa,
    UnsupportedModel,
    accelerate,
)
from fastdit.attention.torch_kernels import KERNELS
from fastdit.blocks.attention import AttentionCall
from fastdit.testing import AcceleratorContract
from fastdit.testing.tiny import randn

# Tiny models gain nothing from fused kernels, and torch says so.
pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning")

WORKING = ("_native_math", "_native_flash", "flex")
SHORT = RALU(steps=(2, 2, 2), ends=(0.3, 0.45), ratio=0.3)
Registry = attention_dispatch._AttentionBackendRegistry


@pytest.fixture
def answered(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Note the name of every backend of diffusers, and every kernel of torch's, that computes something."""
    names: list[str] = []

    def named(name: str, attend: Any) -> Any:
        def noted(call: Any) -> Any:
            names.append(name)
            return attend(call)

        return noted

    def noting(name: AttentionBackendName, compute: Any) -> Any:
        def noted(**kwargs: Any) -> Any:
            names.append(name.value)
            return compute(**kwargs)

        return noted

    for name, compute in list(Registry._backends.items()):
        monkeypatch.setitem(Registry._backends, name, noting(name, compute))
    for kernel, attend in list(KERNELS.items()):
        monkeypatch.setitem(KERNELS, kernel, named(kernel, attend))
    return names


@pytest.fixture
def registry() -> Iterator[None]:
    """Setting a backend on one model makes it the process's in diffusers; put that back."""
    before = Registry._active_backend
    yield
    Registry.set_active_backend(before)


class TestContract(AcceleratorContract):
    accelerator = Attention("_native_math")
    neutral = Attention("native")


@pytest.mark.parametrize("backend", WORKING)
def test_a_backend_gives_what_it_gives_when_the_whole_process_uses_it(backend: str, answered: list[str]) -> None:
    pipe, call = tiny.flux()
    plain = tiny.run(pipe, call)
    with attention_backend(backend):
        expected = tiny.run(pipe, call)
    fast = accelerate(pipe, [Attention(backend)], strict=True)
    answered.clear()
    found = tiny.run(fast, call)
    assert torch.equal(found, expected)
    torch.testing.assert_close(found, plain, rtol=0, atol=1e-4)
    # Five blocks in each of four steps; the model's own calls reach torch through the dispatcher too.
    assert answered.count(backend) == 5 * 4


@pytest.mark.parametrize("name", ["sd3", "pixart", "wan", "z_image", "flux2", "qwen_image"])
def test_models_that_do_not_know_the_dispatcher_take_a_backend_too(name: str, answered: list[str]) -> None:
    pipe, call = getattr(tiny, name)()
    plain = tiny.run(pipe, call)
    fast = accelerate(pipe, [Attention("_native_math")], strict=True)
    answered.clear()
    torch.testing.assert_close(tiny.run(fast, call), plain, rtol=0, atol=1e-4)
    assert "_native_math" in answered


@pytest.mark.parametrize(
    "stop", [True, pytest.param(False, marks=pytest.mark.exhaustive)], ids=["after an error", "to the end"]
)
def test_the_process_and_the_user_s_models_know_nothing_of_it(stop: bool) -> None:
    pipe, call = tiny.flux()
    other, _ = tiny.flux(seed=1)
    expected = tiny.run(pipe, call), tiny.run(other, call)
    processors = {name: dict(vars(part)) for name, part in pipe.transformer.attn_processors.items()}
    seen: list[Any] = []

    def callback(_: Any, step: int, timestep: Tensor, tensors: dict[str, Any]) -> dict[str, Any]:
        seen.append(Registry.get_active_backend()[0])
        assert torch.equal(tiny.run(other, call), expected[1])
        if stop:
            raise KeyboardInterrupt
        return {}

    fast = accelerate(pipe, [Attention("flex")])
    try:
        tiny.run(fast, call, callback_on_step_end=callback)
    except KeyboardInterrupt:
        assert stop
    assert set(seen) == {AttentionBackendName.NATIVE} == {Registry.get_active_backend()[0]}
    assert {name: dict(vars(part)) for name, part in pipe.transformer.attn_processors.items()} == processors
    assert torch.equal(tiny.run(pipe, call), expected[0])
    assert torch.equal(tiny.run(other, call), expected[1])


def test_a_model_that_runs_in_another_thread_meanwhile_keeps_its_own_attention(answered: list[str]) -> None:
    pipe, call = tiny.flux()
    other, _ = tiny.flux(seed=1)
    fast = accelerate(pipe, [Attention("_native_math")])
    inside, done = threading.Event(), threading.Event()
    found: list[str] = []

    def wait(*_: Any) -> None:
        inside.set()
        assert done.wait(30)

    def first() -> None:
        tiny.run(fast, call)

    handle = pipe.transformer.transformer_blocks[1].register_forward_pre_hook(wait)
    thread = threading.Thread(target=first)
    thread.start()
    assert inside.wait(30)
    answered.clear()
    tiny.run(other, call)  # while the twin stands between two of its blocks
    found = list(answered)
    done.set()
    thread.join(30)
    handle.remove()
    assert set(found) == {"native"}
    assert "_native_math" in answered


@pytest.mark.parametrize(
    ("backend", "reason"),
    [
        ("xformers", "xformers"),
        ("sage", "sageattention"),
        ("flash", "flash-attn"),
        ("flash_hub", "Hub|kernels"),
        ("_native_cudnn", "CUDA devices alone"),
        ("_native_efficient", "CUDA devices alone"),
        ("_native_npu", "torch_npu"),
    ],
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="these may work beside a GPU")
def test_a_backend_that_cannot_attend_here_is_refused_with_the_reason_and_what_can(backend: str, reason: str) -> None:
    pipe, call = tiny.flux()
    plain = tiny.run(pipe, call)
    with pytest.raises(
        UnsupportedModel, match=f"'{backend}' can't be used for FluxTransformer2DModel on cpu"
    ) as caught:
        accelerate(pipe, [Attention(backend)])
    assert caught.match(reason) and caught.match("heads of 16")
    for name in ("native", *WORKING):
        assert name in str(caught.value).partition("take one that works there")[2]
    assert torch.equal(tiny.run(pipe, call), plain)


def test_a_backend_that_answers_wrongly_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(Registry._backends, AttentionBackendName.FLEX, lambda query, **_: torch.zeros_like(query))
    with pytest.raises(UnsupportedModel, match="something else than attention"):
        accelerate(tiny.flux()[0], [Attention("flex")])


def test_a_backend_that_fails_on_what_the_model_asks_for_is_named_and_nothing_stands_in() -> None:
    pipe, call = tiny.pixart()  # its text has a mask, which flash kernels do not take
    fast = accelerate(pipe, [Attention("_native_flash")])
    with pytest.raises(UnsupportedModel, match=r"'_native_flash' failed on queries .* under a mask"):
        tiny.run(fast, call)
    assert not fast.fastdit.last_run.completed


@pytest.mark.parametrize("backend", ["", "fast", "Native", (), ("native", "fast"), ["fast"], 3, None])
def test_a_name_that_diffusers_does_not_know_is_refused(backend: Any) -> None:
    with pytest.raises(InvalidConfig):
        Attention(backend)


def test_each_stage_has_its_own_backend_and_the_plan_says_which(answered: list[str]) -> None:
    pipe, call = tiny.flux(size=128, steps=6)
    call.pop("num_inference_steps")
    expected = tiny.run(accelerate(pipe, [SHORT]), call)
    fast = accelerate(pipe, [SHORT, Attention(("native", "flex", "_native_math"))])
    plan = fast.fastdit.explain(128, 128).splitlines()
    for line, backend in zip(plan[1:4], ("native", "flex", "_native_math"), strict=True):
        assert line.endswith(f"attention by {backend}")
    answered.clear()
    torch.testing.assert_close(tiny.run(fast, call), expected, rtol=0, atol=1e-3)
    assert list(dict.fromkeys(answered)) == ["native", "flex", "_native_math"]
    assert answered.count("flex") == answered.count("_native_math") == 2 * 5


def test_backends_for_stages_that_a_run_does_not_have_are_refused() -> None:
    with pytest.raises(InvalidConfig, match="2 backends, and the run has 1 stage;"):
        Stack([Attention(("native", "flex"))])
    pipe, _ = tiny.flux(size=128)
    fast = accelerate(pipe, [SHORT, Attention(("native", "flex"))])
    with pytest.raises(InvalidConfig, match="2 backends, and the run has 3 stages"):
        fast.fastdit.explain(128, 128)
    with pytest.raises(InvalidConfig, match="2 backends, and the run has 3 stages"):
        fast(prompt_embeds=torch.zeros(1, 6, 32), pooled_prompt_embeds=torch.zeros(1, 32), height=128, width=128)


@pytest.mark.parametrize("attention", [Attention("flex"), Attention(("native", "flex", "native"))])
def test_a_stack_with_it_is_the_same_after_json(attention: Attention) -> None:
    stack = Stack([SHORT, attention])
    assert Stack.from_json(stack.to_json()) == stack
    assert stack.attention == attention


@pytest.mark.usefixtures("registry")
@pytest.mark.parametrize("whose", ["the model's own", "the process's"])
@pytest.mark.parametrize("accelerator", [Attention("_native_math"), Attention("native"), ToCa(3, score="attention")])
def test_a_backend_that_the_user_has_set_is_not_overruled_in_silence(whose: str, accelerator: Any) -> None:
    pipe, call = tiny.flux(size=128)
    fast = accelerate(pipe, [accelerator])
    target = pipe.transformer if whose == "the model's own" else tiny.flux(seed=1)[0].transformer
    target.set_attention_backend("flex")
    for attempt in (lambda: tiny.run(fast, call), lambda: accelerate(pipe, [accelerator])):
        with pytest.raises(IncompatibleStack, match=r"'flex', .*set_attention_backend\('native'\)"):
            attempt()
    pipe.transformer.set_attention_backend("native")
    assert torch.isfinite(tiny.run(fast, call)).all()


def test_a_model_whose_attention_never_reaches_torch_s_warns_that_nothing_fired() -> None:
    class ByHand(FluxAttnProcessor):
        def __call__(
            self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Any = None, *_: Any, **__: Any
        ) -> Any:
            return hidden_states if encoder_hidden_states is None else (hidden_states, encoder_hidden_states)

    pipe, call = tiny.flux()
    pipe.transformer.set_attn_processor(ByHand())
    with pytest.warns(NeverFired, match=r"Attention\(backend='flex'\) answered no call"):
        tiny.run(accelerate(pipe, [Attention("flex")]), call)
    with pytest.raises(NeverFired):
        tiny.run(accelerate(pipe, [Attention("flex")], strict=True), call)


@pytest.mark.exhaustive
def test_caches_act_the_same_over_another_kernel() -> None:
    pipe, call = tiny.flux(size=128, steps=8)
    for cache in (FirstBlockCache(1.0), ToCa(3, 0.25, first=2, score="attention"), ToCa(3, 0.25, first=2)):
        plain = accelerate(pipe, [cache])
        expected = tiny.run(plain, call)
        for backend in ("_native_math", "flex"):
            fast = accelerate(pipe, [cache, Attention(backend)], strict=True)
            torch.testing.assert_close(tiny.run(fast, call), expected, rtol=0, atol=1e-3)
            actions = [step.action for step in fast.fastdit.last_run.steps]
            assert actions == [step.action for step in plain.fastdit.last_run.steps]


def test_a_kernel_that_rounds_is_not_extrapolated_over() -> None:
    with pytest.raises(IncompatibleStack, match=r"Attention\(backend='sage'\) changes the precision of activations"):
        Stack([FirstBlockCache(0.1, forecast=Taylor(1)), Attention("sage")])
    Stack([FirstBlockCache(0.1), Attention("sage")])
    Stack([FirstBlockCache(0.1, forecast=Taylor(1)), Attention("flash")])


@pytest.mark.exhaustive
def test_compiled_blocks_are_compiled_once_more_for_each_kernel_and_call_no_other() -> None:
    from torch._dynamo.testing import CompileCounter

    pipe, call = tiny.flux()
    plain = tiny.run(pipe, call)
    compiler = CompileCounter()
    pipe.transformer.compile_repeated_blocks(backend=compiler, fullgraph=True)
    try:
        tiny.run(pipe, call)
    except torch._dynamo.exc.TorchDynamoException:
        pytest.skip("this version of diffusers can't be compiled by this version of torch")
    twins = {name: accelerate(pipe, [Attention(name)], strict=True) for name in ("_native_math", "_native_flash")}
    for fast in twins.values():
        before = compiler.frame_count
        torch.testing.assert_close(tiny.run(fast, call), plain, rtol=0, atol=1e-4)
        assert compiler.frame_count == before + 2  # FLUX has two kinds of blocks
    before = compiler.frame_count
    for known in (*twins.values(), pipe):
        torch.testing.assert_close(tiny.run(known, call), plain, rtol=0, atol=1e-4)
    assert compiler.frame_count == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="names what a CPU lacks")
def test_the_trial_is_in_the_precision_that_the_model_computes_in() -> None:
    pipe, _ = tiny.flux()
    pipe.transformer.to(torch.bfloat16)
    pipe.transformer.norm_out.to(torch.float32)  # as diffusers keeps some weights
    with pytest.raises(UnsupportedModel, match=r"on cpu in torch\.bfloat16"):
        accelerate(pipe, [Attention("_native_cudnn")])


OF_SIX = {"none": None, "keys": (torch.arange(6) != 3).expand(6, 6), "added": randn(2, 1, 6, 6, seed=4)}
SWITCHES = ("flash", "mem_efficient", "math", "cudnn")


def switches() -> tuple[bool, ...]:
    """What torch may choose among in this process."""
    return tuple(getattr(torch.backends.cuda, f"{name}_sdp_enabled")() for name in SWITCHES)


@pytest.mark.parametrize("backend", WORKING)
def test_while_a_kernel_computes_the_process_chooses_among_all_of_them_as_before(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two threads that put such switches back leave those of the other."""
    pipe, call = tiny.flux(steps=1)
    fast = accelerate(pipe, [Attention(backend)], strict=True)
    before, set_meanwhile = switches(), []
    for name in SWITCHES:
        monkeypatch.setattr(torch._C, f"_set_sdp_use_{name}", lambda on, name=name: set_meanwhile.append(name))
    tiny.run(fast, call)
    assert set_meanwhile == [] and switches() == before


@pytest.mark.parametrize("options", [{}, {"scale": 0.3}, {"is_causal": True}, {"enable_gqa": True}], ids=str)
@pytest.mark.parametrize(
    "mask", [None, (torch.arange(6) != 3).expand(6, 6), randn(2, 1, 6, 6, seed=4)], ids=["none", "keys", "added"]
)
@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_kernel_that_is_called_gives_what_torch_gives_when_it_may_take_no_other(
    backend: str, mask: Tensor | None, options: dict[str, Any], dtype: torch.dtype
) -> None:
    if mask is not None and (backend == "_native_flash" or "is_causal" in options):
        pytest.skip("no kernel takes both, and flash takes no mask")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and backend in ("_native_efficient", "_native_cudnn"):
        pytest.skip("a kernel for CUDA devices alone")
    if backend in ("_native_flash", "_native_cudnn") and device == "cuda" and dtype == torch.float32:
        pytest.skip("in half precision alone")
    heads = 2 if "enable_gqa" in options else 4
    query, key, value = (randn(2, h, 6, 8, seed=s).to(device, dtype) for s, h in enumerate((4, heads, heads)))
    mask = mask if mask is None or mask.dtype == torch.bool else mask.to(dtype)
    mask = None if mask is None else mask.to(device)
    call = AttentionCall(query, key, value, attn_mask=mask, **options)
    if "enable_gqa" in options and backend != "_native_math":
        repeated = (each.repeat_interleave(2, dim=1) for each in (key, value))
        expected = torch_s(backend, AttentionCall(query, *repeated, attn_mask=mask))
    else:
        expected = torch_s(backend, call)
    assert torch.equal(KERNELS[backend](call), expected)


def torch_s(backend: str, call: AttentionCall) -> Tensor:
    """Attend by torch, which may take one of its kernels alone."""
    names = {"math": "MATH", "flash": "FLASH_ATTENTION", "efficient": "EFFICIENT_ATTENTION", "cudnn": "CUDNN_ATTENTION"}
    with nn.attention.sdpa_kernel(getattr(nn.attention.SDPBackend, names[backend.removeprefix("_native_")])):
        return call.by_torch()


@pytest.mark.parametrize(
    ("keys", "values"), [((1, 2, 5, 8), (1, 2, 5, 8)), ((2, 4, 5, 8), (2, 4, 6, 8)), ((2, 4, 5, 8), (2, 4, 5, 4))]
)
def test_a_fused_kernel_refuses_what_it_would_read_past_its_end(keys: tuple[int, ...], values: tuple[int, ...]) -> None:
    with pytest.raises(NotImplementedError, match="it takes"):
        KERNELS["_native_flash"](AttentionCall(randn(2, 4, 6, 8, seed=0), torch.ones(keys), torch.ones(values)))


def test_a_bare_module_takes_a_kernel() -> None:
    pipe, call = tiny.flux(steps=1)
    ((_, kwargs),) = tiny.recorded_calls(pipe, call)
    plain = pipe.transformer(
        **kwargs,
    )[0]
    twin = accelerate(pipe.transformer, [Attention("_native_math")], strict=True)
    with twin.fastdit.run(num_inference_steps=1), torch.no_grad():
        found = twin(**kwargs)[0]
    torch.testing.assert_close(found, plain, rtol=0, atol=1e-4)


class Masked(nn.Module):
    """One attention with a mask and options, as any model may call it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, query: Tensor, key: Tensor, value: Tensor, options: dict[str, Any]) -> Tensor:
        return nn.functional.scaled_dot_product_attention(query * self.weight, key, value, **options)


MASKS = {
    "none": None,
    "keys": (torch.arange(7) < 5).view(1, 1, 1, 7).expand(2, 1, 1, 7),
    "pairs": torch.arange(6).view(6, 1) >= torch.arange(7) - 2,
    "pairs of each image": (randn(2, 1, 6, 7, seed=3) > -1.0) | (torch.arange(7) == 0),
    "added": randn(2, 4, 6, 7, seed=4),
}


@pytest.mark.parametrize("options", [{}, {"scale": 0.3}, {"enable_gqa": True}], ids=str)
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("backend", ["_native_math", pytest.param("flex", marks=pytest.mark.exhaustive)])
def test_masks_and_options_mean_what_torch_says(backend: str, mask: str, options: dict[str, Any]) -> None:
    heads = 2 if "enable_gqa" in options else 4
    query, key, value = (randn(2, h, s, 8, seed=h + s) for h, s in ((4, 6), (heads, 7), (heads, 7)))
    full_key, full_value = (tensor.repeat_interleave(4 // heads, dim=1) for tensor in (key, value))
    scores = query @ full_key.transpose(2, 3) * options.get("scale", 8**-0.5)
    allowed = MASKS[mask]
    if allowed is not None:
        scores = scores + allowed if allowed.dtype != torch.bool else scores.masked_fill(~allowed, -torch.inf)
    expected = scores.softmax(dim=3) @ full_value
    twin = accelerate(Masked(), [Attention(backend)], strict=True)
    with twin.fastdit.run(num_inference_steps=1), torch.no_grad():
        found = twin(query, key, value, {"attn_mask": allowed, **options})
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_an_option_that_a_backend_would_drop_is_an_error_not_another_result() -> None:
    query = randn(1, 2, 4, 8, seed=0)
    twin = accelerate(Masked(), [Attention("flex")])
    with pytest.raises(UnsupportedModel, match="does not take dropout_p"), twin.fastdit.run(num_inference_steps=1):
        twin(query, query, query, {"dropout_p": 0.5})


def test_it_is_data() -> None:
    assert dataclasses.asdict(Attention("flex")) == {"backend": "flex"}
    assert Attention("native").neutral and Attention(("native", "native", "native")).neutral
    assert not Attention(("native", "flex", "native")).neutral
