"""A stack is data: it is checked, explained, written and read back, and nothing in a file is ever executed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from fastdit import (
    AOT,
    RALU,
    Compile,
    FastditError,
    FirstBlockCache,
    InvalidConfig,
    Reuse,
    SkipPolicy,
    Stack,
    StepMask,
    Taylor,
    TeaCache,
    accelerate,
)

STACKS = {
    "empty": [],
    "preset": [RALU("5x")],
    "custom": [RALU(steps=(1, 1, 2), ends=(0.3, 0.45), ratio=0.25, restart=4.0, fidelity="paper")],
    "teacache": [TeaCache(0.25, coefficients="flux-dev", policy=SkipPolicy(first=2, last=1, max_consecutive=3))],
    "coefficients": [TeaCache(0.5, coefficients=(1.0, 2.0, 3.0, 4.0, 5.0), forecast=Taylor(order=2))],
    "first block": [FirstBlockCache(0.08, forecast=Reuse())],
    "mask": [StepMask((1, 0, 1, 1), forecast=Taylor(order=1))],
    "two": [RALU("4x"), FirstBlockCache(0.1)],
}


@pytest.mark.parametrize("name", STACKS)
def test_a_stack_comes_back_from_json_as_it_was(name: str, tmp_path: Path) -> None:
    stack = Stack(STACKS[name])
    text = stack.to_json()
    data = json.loads(text) if isinstance(text, str) else text
    assert json.loads(json.dumps(data)) == data
    assert Stack.from_json(text) == stack
    stack.save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["stack.json"]
    assert Stack.from_pretrained(tmp_path) == stack
    assert Stack.from_pretrained(str(tmp_path)).to_json() == text


def saved(tmp_path: Path) -> tuple[Path, dict[str, Any]]:
    Stack([RALU("4x"), TeaCache(0.25, coefficients="flux-dev")]).save_pretrained(tmp_path)
    path = tmp_path / "stack.json"
    return path, json.loads(path.read_text())


def parts(data: dict[str, Any]) -> list[dict[str, Any]]:
    return next(value for value in data.values() if isinstance(value, list))


@pytest.mark.parametrize(
    "name",
    ["Compile9", "os.system", "builtins.eval", "torch.nn.Linear", "__import__", "", None, 3, "Stack", "Accelerator"],
)
def test_an_unknown_type_in_a_file_is_refused(name: Any, tmp_path: Path) -> None:
    path, data = saved(tmp_path)
    parts(data)[0]["type"] = name
    path.write_text(json.dumps(data))
    with pytest.raises(InvalidConfig):
        Stack.from_pretrained(tmp_path)


@pytest.mark.parametrize("version", [0, 3, 99, "1", None, 1.5, True, [1]])
def test_an_unknown_version_is_refused(version: Any, tmp_path: Path) -> None:
    path, data = saved(tmp_path)
    data["fastdit_stack"] = version
    path.write_text(json.dumps(data))
    with pytest.raises(InvalidConfig):
        Stack.from_pretrained(tmp_path)


def test_a_missing_version_is_refused(tmp_path: Path) -> None:
    path, data = saved(tmp_path)
    path.write_text(json.dumps({key: value for key, value in data.items() if key != "fastdit_stack"}))
    with pytest.raises(InvalidConfig):
        Stack.from_pretrained(tmp_path)


def test_an_extra_field_is_refused_wherever_it_is(tmp_path: Path) -> None:
    path, data = saved(tmp_path)
    for place in (data, parts(data)[0], parts(data)[1]["forecast"], parts(data)[1]["policy"]):
        place["surprise"] = 1
        path.write_text(json.dumps(data))
        with pytest.raises(InvalidConfig):
            Stack.from_pretrained(tmp_path)
        del place["surprise"]
    path.write_text(json.dumps(data))
    assert Stack.from_pretrained(tmp_path) == Stack([RALU("4x"), TeaCache(0.25, coefficients="flux-dev")])


@pytest.mark.parametrize(
    ("index", "field", "value"),
    [
        (0, "preset", "8x"),
        (0, "fidelity", "rough"),
        (1, "threshold", "0.25"),
        (1, "threshold", None),
        (1, "threshold", [1]),
        (1, "coefficients", "nobody"),
        (1, "forecast", {"type": "SkipPolicy"}),
        (1, "forecast", {"type": "RALU", "preset": "4x"}),
        (1, "forecast", 3),
        (1, "policy", {"type": "Reuse"}),
        (1, "policy", None),
    ],
    ids=str,
)
def test_a_field_with_a_wrong_value_is_refused(index: int, field: str, value: Any, tmp_path: Path) -> None:
    path, data = saved(tmp_path)
    parts(data)[index][field] = value
    path.write_text(json.dumps(data))
    with pytest.raises(InvalidConfig):
        Stack.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "null",
        "3",
        '"RALU"',
        '{"fastdit_stack": 1}',
        '{"fastdit_stack": 1, "accelerators": {}}',
        "\x80\x04K\x01.",
    ],
)
def test_a_file_that_is_no_stack_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "stack.json").write_text(text)
    with pytest.raises(InvalidConfig):
        Stack.from_pretrained(tmp_path)


@pytest.mark.parametrize("engine", [AOT, Compile])
def test_a_stack_from_elsewhere_does_not_say_where_files_are_written(engine: Any, tmp_path: Path) -> None:
    here = Stack([engine(directory=str(tmp_path / "engines"))])
    assert Stack.from_json(here.to_json()) == Stack([engine()])
    data = here.to_json()
    data["accelerators"][0]["directory"] = None  # as it was once written
    assert Stack.from_json(data) == Stack([engine()])
    data["accelerators"][0]["directory"] = "/etc"
    with pytest.raises(InvalidConfig, match=r"accelerators\[0\]: .*directory names a folder of this machine"):
        Stack.from_json(data)


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_a_number_that_is_none_is_refused(number: str, tmp_path: Path) -> None:
    path, _ = saved(tmp_path)
    path.write_text(path.read_text().replace("0.25", number))
    with pytest.raises(InvalidConfig):
        Stack.from_pretrained(tmp_path)


def test_a_directory_without_a_stack_is_refused_and_the_path_is_named(tmp_path: Path) -> None:
    with pytest.raises((FastditError, OSError), match=r"stack\.json"):
        Stack.from_pretrained(tmp_path)


def test_a_stack_that_was_read_back_runs_as_the_one_that_was_written(tmp_path: Path) -> None:
    pipe, call = tiny.flux(size=128, steps=6)
    stack = Stack([RALU("4x"), FirstBlockCache(0.9)])
    stack.save_pretrained(tmp_path)
    first = tiny.run(accelerate(pipe, stack), call)
    assert torch.equal(tiny.run(accelerate(pipe, Stack.from_pretrained(tmp_path)), call), first)


def test_a_twin_s_stack_is_the_one_it_was_given() -> None:
    pipe, _ = tiny.flux()
    stack = Stack([RALU("4x"), FirstBlockCache(0.1)])
    assert accelerate(pipe, stack).fastdit.stack == stack
    assert accelerate(pipe, [RALU("4x"), FirstBlockCache(0.1)]).fastdit.stack == stack


def test_the_explanation_is_readable_and_complete() -> None:
    pipe, _ = tiny.flux()
    text = Stack([RALU("4x"), TeaCache(0.25, coefficients="flux-dev")]).explain(pipe, height=1024, width=1024)
    for word in ("RALU", "TeaCache", "0.25", "1024", "4096", "18"):
        assert word in text, f"{word!r} is not in\n{text}"
    assert all(len(line) <= 160 for line in text.splitlines())
    assert len(text.splitlines()) >= 4


def test_the_explanation_of_a_rescaled_preset_says_that_it_is_one() -> None:
    pipe, _ = tiny.flux()
    text = Stack([RALU("4x")]).explain(pipe, height=1024, width=1024, num_inference_steps=10)
    plan = accelerate(pipe, [RALU("4x")]).fastdit.plan(1024, 1024, 10)
    assert plan.notes
    assert all(note in text for note in plan.notes)


@pytest.mark.parametrize("name", tiny.PIPELINES)
def test_every_pipeline_s_plan_without_a_schedule_is_one_stage(name: str) -> None:
    pipe, _ = tiny.PIPELINES[name]()
    plan = accelerate(pipe, [FirstBlockCache(0.1)]).fastdit.plan(num_inference_steps=7)
    assert len(plan.stages) == 1
    assert plan.steps == plan.stages[0].steps == 7
    assert "FirstBlockCache" in str(plan) or "7" in str(plan)
    text = Stack([FirstBlockCache(0.1)]).explain(pipe, num_inference_steps=7)
    assert "FirstBlockCache" in text


def test_explaining_and_planning_run_nothing() -> None:
    pipe, _ = tiny.flux()
    state = torch.get_rng_state()
    stack = Stack([RALU("4x"), FirstBlockCache(0.1)])
    with tiny.counted_blocks(pipe.transformer) as counts:
        stack.explain(pipe, height=128, width=128)
        accelerate(pipe, stack).fastdit.plan(128, 128)
    assert counts == [0] * 5
    assert torch.equal(torch.get_rng_state(), state)
    assert accelerate(pipe, stack).fastdit.last_run is None


def test_the_record_is_plain_data() -> None:
    pipe, call = tiny.flux(size=128, steps=6)
    fast = accelerate(pipe, [RALU(steps=(2, 2, 2), ends=(0.3, 0.45), ratio=0.3), FirstBlockCache(1e6)])
    tiny.run(fast, call)
    data = fast.fastdit.last_run.to_json()
    assert json.loads(json.dumps(data)) == data
    assert len(data["steps"]) == 6
    record = fast.fastdit.last_run
    assert 0 < sum(step.seconds for step in record.steps) <= record.seconds


def test_importing_fastdit_is_fast_and_leaves_torch_alone() -> None:
    program = (
        "import sys, time; start = time.perf_counter(); import fastdit; took = time.perf_counter() - start; "
        "heavy = [m for m in ('torch', 'diffusers', 'transformers', 'cv2', 'numpy') if m in sys.modules]; "
        "assert not heavy, heavy; print(took); assert 'RALU' in dir(fastdit); from fastdit import RALU; RALU('4x')"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 0.3


@pytest.mark.exhaustive
def test_neither_scipy_nor_opencv_is_needed() -> None:
    import subprocess
    import sys

    code = (
        "import sys; sys.modules.update(cv2=None, scipy=None); import fastdit; from fastdit.testing import *; "
        "pipe, call = tiny_flux(steps=4); fast = fastdit.accelerate(pipe, [fastdit.RALU.paper('4x')]); "
        "generate(fast, call); print(fast.fastdit.last_run.computed)"
    )
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "4", done.stderr


def test_the_public_names_are_all_there_and_nothing_else_is_promised() -> None:
    import fastdit

    for name in dir(fastdit):
        assert getattr(fastdit, name) is not None
    assert {"accelerate", "Stack", "RALU", "TeaCache", "FirstBlockCache", "StepMask"} <= set(fastdit.__all__)
    with pytest.raises(AttributeError, match="nothing_of_the_kind"):
        fastdit.nothing_of_the_kind  # noqa: B018


def test_a_stack_s_json_is_read_in_a_process_that_has_used_nothing_yet() -> None:
    import json
    import subprocess
    import sys

    written = json.dumps(Stack([FirstBlockCache(0.1, forecast=Taylor(1))]).to_json())
    code = f"import fastdit, json; print(fastdit.Stack.from_json(json.loads({written!r})))"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "FirstBlockCache" in shown
