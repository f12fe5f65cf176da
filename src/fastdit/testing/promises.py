"""What is promised of a pipeline that was made faster, whoever made it: named checks over any way of doing so.

    for promise in PROMISES.values():
        promise.check(of_accelerator(Interval(3)))

A `Subject` says how a pipeline is made and made faster. A check raises AssertionError where a promise is broken, and
`Inapplicable` where a subject has nothing that it could be asked of.
"""

from __future__ import annotations

import gc
import inspect
import math
import pickle
import tempfile
import threading
import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastdit.acceleration import accelerate
from fastdit.accelerator import Accelerator, Break, Change, Level
from fastdit.errors import FastditError, FastditWarning, InvalidConfig
from fastdit.nested import ArgumentNames, tensors_of
from fastdit.stack import Stack
from fastdit.step_cache.base import StepCache
from fastdit.testing.models import tiny_flux
from fastdit.testing.tiny import Built, Call, counted_calls, generate

#: Makes a pipeline faster: gives what is called in its place, which may be the pipeline itself.
Apply = Callable[[Any], Any]


@dataclass(frozen=True)
class Subject:
    """A way of making pipelines faster, and the pipeline on which that is looked at.

    `build` takes options such as `batch` and makes the pipeline and the arguments of a call. `neutral` is a setting
    that must change nothing, `invalid` one that must be refused; None where there is none.
    """

    build: Callable[..., Built]
    apply: Apply
    neutral: Apply | None = None
    invalid: Apply | None = None
    accelerator: Accelerator | None = None
    reads_signal: bool = False

    def made(self, **options: int) -> tuple[Any, Any, Call]:
        """Make a pipeline and the same one faster, and the arguments of a call."""
        pipeline, call = self.build(**options)
        return pipeline, self.apply(pipeline), call


def of_accelerator(
    accelerator: Accelerator,
    neutral: Accelerator | None = None,
    *,
    reads_signal: bool = False,
    build: Callable[..., Built] = tiny_flux,
) -> Subject:
    """Give the subject of an accelerator that acts in the steps of `build`'s call."""

    def invalid(pipeline: Any) -> Any:
        return accelerate(pipeline, [accelerator, accelerator])

    return Subject(
        build,
        lambda pipeline: accelerate(pipeline, [accelerator]),
        None if neutral is None else lambda pipeline: accelerate(pipeline, [neutral]),
        invalid,
        accelerator,
        reads_signal,
    )


class Inapplicable(Exception):
    """A promise can't be asked of a subject; the message says why."""


@dataclass(frozen=True)
class Promise:
    """What is promised, in a sentence, and the check that shows it."""

    says: str
    check: Callable[[Subject], None]


def _acts(subject: Subject) -> None:
    accelerator, (_, fast, call) = _own(subject), subject.made()
    found = generate(fast, call)
    record = fast.fastdit.last_run
    assert torch.isfinite(found).all()
    assert record.completed and record.doubts == 0
    if accelerator.level in (Level.STEP_CACHE, Level.TOKEN_CACHE):
        assert record.skipped + record.partial > 0
        assert record.flops < sum(step.full_flops for step in record.steps)
        assert record.cache_bytes > 0


def _neutral_is_exact(subject: Subject) -> None:
    if subject.neutral is None:
        raise Inapplicable("no setting of it is neutral")
    pipeline, call = subject.build()
    plain = generate(pipeline, call)
    assert torch.equal(generate(subject.neutral(pipeline), call), plain)


def _untouched(subject: Subject) -> None:
    pipeline, call = subject.build()
    before, state = generate(pipeline, call), _state(pipeline)
    generate(subject.apply(pipeline), call)
    assert _state(pipeline) == state, "the pipeline's own parts, hooks or methods are others than before"
    assert torch.equal(generate(pipeline, call), before), "the pipeline itself gives something else"


def _atomic(subject: Subject) -> None:
    if subject.invalid is None:
        raise Inapplicable("no setting of it is refused")
    pipeline, call = subject.build()
    before, state = generate(pipeline, call), _state(pipeline)
    try:
        subject.invalid(pipeline)
    except Exception:
        refused = True
    else:
        refused = False
    assert refused, "a setting that means nothing was taken"
    assert _state(pipeline) == state, "what was refused left a trace"
    assert torch.equal(generate(pipeline, call), before), "the pipeline gives something else after the refusal"


def _first_equals_second(subject: Subject) -> None:
    _, fast, call = subject.made()
    first, other = generate(fast, call), generate(fast, call, seeds=1)
    assert not torch.equal(first, other)
    assert torch.equal(generate(fast, call), first)
    assert torch.equal(generate(subject.made()[1], call, seeds=1), other)


def _sizes_apart(subject: Subject) -> None:
    _, fast, call = subject.made()
    if "image" in call:
        raise Inapplicable("the picture that it begins with has a size of its own")
    first = generate(fast, call)
    assert torch.isfinite(generate(fast, call, height=call["width"], width=call["height"] // 2)).all()
    assert torch.equal(generate(fast, call), first)


def _any_exit(subject: Subject) -> None:
    _, fast, call = subject.made()
    expected = generate(fast, call)
    steps = call["num_inference_steps"]
    for last in (0, steps // 2, steps - 1):

        def stop(_pipeline: object, step: int, _timestep: object, values: Call, last: int = last) -> Call:
            if step == last:
                raise KeyboardInterrupt
            return values

        with Made() as made, suppress(KeyboardInterrupt):
            _watched(fast, call, stop)
            raise AssertionError("the call was not stopped")
        held = made.alive()
        if subject.accelerator is not None:
            assert not fast.fastdit.last_run.completed
        assert torch.equal(generate(fast, call), expected), "the next call is another than a fresh one"
        assert held == 0, "tensors of the broken call are held until the next"


def _branches_apart(subject: Subject) -> None:
    """Guidance that is almost nothing gives the lone run, whatever the other branch's prompt made of its state."""
    _, fast, call = subject.made()
    if "pooled_prompt_embeds" not in call or "true_cfg_scale" not in _parameters(fast) or "true_cfg_scale" in call:
        raise Inapplicable("it has no branch of guidance that could be left out")
    alone = generate(fast, call)
    negative = {f"negative_{name}": 1.0 - call[name] for name in ("prompt_embeds", "pooled_prompt_embeds")}
    both = generate(fast, call, **negative, true_cfg_scale=1.0 + 1e-9)
    assert torch.allclose(both, alone, rtol=1e-3, atol=1e-4), "a branch runs otherwise beside another"


def _pipelines_apart(subject: Subject) -> None:
    other, call = subject.build()
    plain = generate(other, call)
    _, fast, _ = subject.made()
    expected, found = generate(fast, call), []

    def interrupt(_pipeline: object, step: int, _timestep: object, values: Call) -> Call:
        if step == 1:
            found.append(generate(other, call))
        return values

    assert torch.equal(_watched(fast, call, interrupt), expected), "another pipeline's call amid a run changes it"
    assert torch.equal(found[0], plain), "another pipeline gives something else amid a run"
    assert torch.equal(generate(other, call), plain), "another pipeline gives something else after it"


def _threads_apart(subject: Subject) -> None:
    pipeline, call = subject.build()
    twins = subject.accelerator is not None  # of one pipeline; others' ways change the pipeline itself
    made = [subject.apply(pipeline) if twins else subject.made()[1] for _ in range(2)]
    expected = [generate(fast, call, seeds=seed) for seed, fast in enumerate(made)]
    found: dict[int, list[torch.Tensor]] = {0: [], 1: []}
    processors = torch.get_num_threads()

    def work(seed: int) -> None:
        torch.set_num_threads(processors)  # a new thread's first products of matrices may take another number
        found[seed] += [generate(made[seed], call, seeds=seed) for _ in range(2)]

    threads = [threading.Thread(target=work, args=(seed,)) for seed in found]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed, images in found.items():
        equal = [torch.equal(image, expected[seed]) for image in images]
        assert equal == [True, True], "a thread gives something else beside another"


def _never_silent(subject: Subject) -> None:
    """A run of one step leaves nothing to skip."""
    if subject.accelerator is not None and subject.accelerator.level not in (Level.STEP_CACHE, Level.TOKEN_CACHE):
        raise Inapplicable("it acts in a run of any length")
    _, fast, call = subject.made()
    with warnings.catch_warnings(record=True) as caught, suppress(FastditError):
        warnings.simplefilter("always")
        generate(fast, call, num_inference_steps=1)
        assert caught, "nothing was said of a run that gained nothing"


def _finite(subject: Subject) -> None:
    pipeline, fast, call = subject.made()
    assert torch.isfinite(generate(fast, call)).all()
    if not subject.reads_signal:
        return
    shape = generate(pipeline, call).shape
    for value in (math.nan, math.inf):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            generate(fast, call, latents=torch.full(shape, value))
        record = fast.fastdit.last_run
        assert record.skipped == 0 and record.doubts > 0
        assert sum(type(warning.message) is FastditWarning for warning in caught) == 1


def _counters_are_real(subject: Subject) -> None:
    accelerator, (pipeline, fast, call) = _own(subject), subject.made()
    if Change.BATCH_ROWS in accelerator.effects.changes or accelerator.level == Level.TOKEN_CACHE:
        raise Inapplicable("blocks run for a part of the samples or tokens")
    generate(fast, call)  # a twin's first forward is observed
    with counted_calls(pipeline.transformer) as counts:
        generate(fast, call)
    ran = [step.blocks_run for step in fast.fastdit.last_run.steps]
    if None in ran:
        raise Inapplicable("nothing of the stack sees its blocks, and its forward can't be run on shapes alone")
    assert sum(ran) == sum(counts)


def _batch_rule(subject: Subject) -> None:
    accelerator = _own(subject)
    if not isinstance(accelerator, StepCache) or Break.BATCH_INVARIANCE in accelerator.effects.breaks:
        raise Inapplicable("the images of a batch are decided together")
    seeds = (5, 6)  # no three, which are a picture's channels
    _, fast, call = subject.made(batch=len(seeds))
    together = generate(fast, call, seeds=seeds)
    for index, seed in enumerate(seeds):
        own = {name: _of_image(value, index, len(seeds)) for name, value in call.items()}
        alone = generate(fast, own, seeds=seed)
        torch.testing.assert_close(together[index : index + 1], alone, rtol=1e-3, atol=1e-4)


def _configurations_are_data(subject: Subject) -> None:
    stack = Stack([_own(subject)])
    assert Stack.from_json(stack.to_json()) == stack
    with tempfile.TemporaryDirectory() as folder:
        stack.save_pretrained(folder)
        assert Stack.from_pretrained(folder) == stack
    (data,) = stack.to_json()["accelerators"]
    for changes in ({"type": "os.system"}, {"no_such_field": 1}):
        with suppress(InvalidConfig):
            Stack.from_json({**stack.to_json(), "accelerators": [{**data, **changes}]})
            raise AssertionError(f"{changes} was taken")


def _pickles_or_says_so(subject: Subject) -> None:
    _, fast, call = subject.made()
    expected = generate(fast, call)
    try:
        written = pickle.dumps(fast)
    except FastditError:
        return
    assert torch.equal(generate(pickle.loads(written), call), expected)


def _gradients(subject: Subject) -> None:
    if subject.neutral is None:
        raise Inapplicable("no setting of it is neutral")
    pipeline, call = subject.build()
    given = _first_forward(pipeline, call)
    name, latents = next(iter(given.items()))
    if not isinstance(latents, torch.Tensor):
        raise Inapplicable("its latents come in a list")

    def gradient(module: Any) -> torch.Tensor:
        leaf = latents.clone().requires_grad_()
        with torch.enable_grad():
            tensors_of(module(**{**given, name: leaf}))[0].square().sum().backward()
        assert leaf.grad is not None
        return leaf.grad

    plain = gradient(pipeline.transformer)
    if subject.accelerator is None:
        module = subject.neutral(pipeline).transformer
        with module.cache_context("cond"):
            assert torch.equal(gradient(module), plain), "the gradient is another than the plain model's"
        return
    with suppress(FastditError):
        twin: Any = subject.neutral(pipeline.transformer)
        with twin.fastdit.run(1):
            assert torch.equal(gradient(twin), plain), "the gradient is another than the plain model's"


def _compiles_nothing_again(subject: Subject) -> None:
    from torch._dynamo.utils import counters

    _, fast, call = subject.made()
    generate(fast, call)
    before = {name: dict(values) for name, values in counters.items()}
    generate(fast, call)
    assert {name: dict(values) for name, values in counters.items()} == before


PROMISES: dict[str, Promise] = {
    "acts": Promise("It acts within a run, and the record says so: what was skipped, FLOPs, memory.", _acts),
    "neutral is exact": Promise("A neutral setting changes no bit.", _neutral_is_exact),
    "original untouched": Promise("The user's own pipeline stays as it was.", _untouched),
    "apply is atomic": Promise("What can't be applied is refused and leaves no trace.", _atomic),
    "first equals second": Promise("A call knows nothing of those before it.", _first_equals_second),
    "sizes apart": Promise("Another size between two calls leaves no trace.", _sizes_apart),
    "any exit is clean": Promise("After an interrupt nothing is held, and the next call is as ever.", _any_exit),
    "branches apart": Promise("A branch of guidance sees nothing of the other's state.", _branches_apart),
    "pipelines apart": Promise("Another pipeline of the class is as ever, even amid a run.", _pipelines_apart),
    "threads apart": Promise("Pipelines in two threads give what each gives alone.", _threads_apart),
    "never silent": Promise("A run in which nothing can be gained says so.", _never_silent),
    "finite": Promise("Finite latents stay finite; a signal that is not means compute, and is said once.", _finite),
    "counters are real": Promise("The counts of the record are the real calls of blocks.", _counters_are_real),
    "batch rule": Promise("An image does not depend on those beside it where the class says so.", _batch_rule),
    "configurations are data": Promise("A configuration is data and survives its file.", _configurations_are_data),
    "pickles or says so": Promise("It can be pickled, or says by name that it can't.", _pickles_or_says_so),
    "gradients are whole": Promise("Under a neutral setting gradients are whole, or refused by name.", _gradients),
    "compiles nothing again": Promise("A second call compiles nothing.", _compiles_nothing_again),
}
"""The promises by name."""


def _own(subject: Subject) -> Accelerator:
    if subject.accelerator is None:
        raise Inapplicable("it has no record and no declared effects")
    return subject.accelerator


def _state(pipeline: Any) -> object:
    """Outline what an applied cache could have changed of a pipeline: its class's methods, its modules and theirs."""
    parts = dict(pipeline.transformer.named_modules())
    return (
        type(pipeline),
        dict(vars(type(pipeline))),
        {name: id(part) for name, part in pipeline.components.items()},
        {name: (id(part), type(part), sorted(vars(part))) for name, part in parts.items()},
        {name: (len(part._forward_hooks), len(part._forward_pre_hooks)) for name, part in parts.items()},
    )


def _of_image(value: Any, index: int, batch: int) -> Any:
    """Give what of a call's argument belongs to one image of a batch."""
    if isinstance(value, list) and len(value) == batch:
        return value[index : index + 1]
    if not isinstance(value, torch.Tensor) or batch not in value.shape[:2]:
        return value
    return value[index : index + 1] if value.shape[0] == batch else value[:, index : index + 1]


def _parameters(pipeline: Any) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(type(pipeline).__call__).parameters


def _watched(pipeline: Any, call: Call, callback: Callable[..., Call]) -> torch.Tensor:
    """Call a pipeline that calls back after each step."""
    if "callback_on_step_end" not in _parameters(pipeline):
        raise Inapplicable("its pipeline calls nobody back with what it could hand on")
    return generate(pipeline, call, callback_on_step_end=callback)


def _first_forward(pipeline: Any, call: Call) -> Call:
    """Give the arguments of a call's first forward by name."""
    calls: list[Call] = []
    names = ArgumentNames(type(pipeline.transformer).forward)

    def note(_: object, args: tuple[object, ...], kwargs: Call) -> None:
        calls.append(names(args, kwargs))

    hook = pipeline.transformer.register_forward_pre_hook(note, with_kwargs=True)
    generate(pipeline, call, num_inference_steps=1)
    hook.remove()
    return calls[0]


class Made(TorchDispatchMode):
    """Notes every tensor of three dimensions and more that is made while it is open: latents, features, pictures.

    It holds none of them, so what is still `alive` afterwards is held by somebody else.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._made: list[weakref.ref[torch.Tensor]] = []

    def __torch_dispatch__(
        self,
        operator: Callable[..., object],
        types: Sequence[type],
        args: tuple[object, ...] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        found = operator(*args, **(kwargs or {}))
        given = {id(tensor) for tensor in tensors_of((args, kwargs))}
        # An operator in place gives what it was given.
        made = [tensor for tensor in tensors_of(found) if tensor.dim() >= 3 and id(tensor) not in given]
        self._made += [weakref.ref(tensor) for tensor in made]
        return found

    def alive(self) -> int:
        """Count the tensors that somebody holds, and not only a cycle of the interrupted call's own."""
        if any(tensor() is not None for tensor in self._made):
            gc.collect()
        return sum(tensor() is not None for tensor in self._made)
