"""`fastdit tune`: the search, what it keeps, its winner's neighbours, and masks of a fixed budget."""

from __future__ import annotations

import json
import runpy
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from fastdit import Budget, InvalidConfig, Stack, accelerate, load_mini, testing
from fastdit.bench.cost import CostMeter
from fastdit.bench.grammar import parse_stack, stack_text
from fastdit.bench.source import Source
from fastdit.bench.tune import Cliff, Goal, Search, Tried, Workbench, _beats, _loses, neighbours
from fastdit.bench.tune_command import fewer_steps
from fastdit.cli import app
from fastdit.measure.statistics import Interval
from fastdit.mini.prompts import training
from fastdit.predict.cost import keep_model


@pytest.fixture(scope="module")
def workbench() -> Workbench:
    made = Workbench(Source("mini"), training(4, 0), (64, 64), 4)
    call = {"prompt": made.prompts[0], "height": 64, "width": 64}
    # A search takes as many rounds as fit in a minute.
    keep_model(made.pipeline, CostMeter(made.pipeline, call).rounds(most=1))
    return made


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FASTDIT_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.mark.exhaustive
def test_a_search_goes_on_and_keeps_stacks_that_can_be_loaded(workbench: Workbench, tmp_path: Path) -> None:
    goal = Goal(seconds=60.0)
    Search(workbench, goal, tmp_path).run(1.0, trials=1)
    said: list[str] = []
    again = Search(workbench, goal, tmp_path)
    assert len(again.study.trials) > 1  # those that were begun, and the presets that wait
    again.run(1.0, trials=1, say=said.append)
    front = again.front()
    assert len(again.finished()) == 2 and front == sorted(front, key=lambda one: one.seconds)
    assert "on the front" in said[-1]
    winner = goal.best(front)
    assert winner is not None and winner.quality == max(one.quality for one in front)
    paths = again.save(winner, again.cliffs(winner))
    assert any(path.name.endswith("-winner") for path in paths)
    for path, one in zip(paths, front, strict=True):
        accelerate(workbench.pipeline, Stack.from_pretrained(path))
        told = json.loads((path / "tuning.json").read_text())
        assert told["quality"] == one.quality and told["prompts"] == workbench.prompts
    with pytest.raises(InvalidConfig, match="another search, of goal"):
        Search(workbench, Goal(seconds=1.0), tmp_path)


@pytest.mark.parametrize("free", ["free", "free regions"])
@pytest.mark.parametrize("seed", range(4))
def test_whatever_is_suggested_of_a_schedule_s_free_parameters_is_a_stack(
    workbench: Workbench, tmp_path: Path, free: str, seed: int
) -> None:
    optuna = pytest.importorskip("optuna")
    search = Search(workbench, Goal(seconds=60.0), tmp_path)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=seed))
    study.enqueue_trial({"schedule": free, "cache": ""})
    stack = search.suggested(study.ask())
    assert type(stack.schedule).__name__ == {"free": "ProgressiveResolution", "free regions": "RALU"}[free]
    assert accelerate(workbench.pipeline, stack).fastdit.plan(256, 256, None).steps == sum(stack.schedule.steps)


@pytest.mark.exhaustive
@pytest.mark.usefixtures("workbench")  # whose costs are kept
def test_the_example_of_a_search_finds_a_stack_and_reports_it_on_other_prompts(tmp_path: Path) -> None:
    example = runpy.run_path(str(Path(__file__).parents[2] / "docs" / "examples" / "tuning.py"))
    folder = example["found"](Goal(seconds=60.0), 1e-3, 64, tmp_path)
    pipeline = load_mini()
    pipeline.set_progress_bar_config(disable=True)
    seconds, score = example["reported"](accelerate(pipeline, Stack.from_pretrained(folder)), 64)
    assert folder.parent == tmp_path and seconds > 0 and 0 <= score <= 1


@pytest.mark.exhaustive
def test_what_can_t_be_in_time_is_thrown_out_before_it_runs(workbench: Workbench, tmp_path: Path) -> None:
    search = Search(workbench, Goal(seconds=1e-6), tmp_path)
    made: list[object] = []
    search.workbench.tried, before = made.append, search.workbench.tried  # type: ignore[assignment]
    try:
        search.run(1.0, trials=2)
    finally:
        search.workbench.tried = before  # type: ignore[method-assign]
    assert not made and not search.finished()
    assert all("hopeless" in one.user_attrs for one in search.study.trials if one.state.is_finished())
    assert search.counted().startswith("2 trials; 2 not run, since they would take ")


def test_a_part_that_never_acted_is_left_out_of_what_is_kept(workbench: Workbench) -> None:
    tried = workbench.tried(parse_stack("TeaCache .00001, Attention('_native_math')"))
    assert tried is not None and tried.stack == stack_text(parse_stack("Attention('_native_math')"))
    acting = workbench.tried(parse_stack("TeaCache .25"))
    assert acting is not None and acting.stack == stack_text(parse_stack("TeaCache .25"))


def test_what_others_warn_of_while_a_picture_is_made_is_not_kept_back(
    workbench: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = workbench.pipeline.check_inputs

    def loud(*args: Any, **kwargs: Any) -> Any:
        warnings.warn("the model is old", UserWarning, stacklevel=1)
        return before(*args, **kwargs)

    monkeypatch.setattr(workbench.pipeline, "check_inputs", loud)
    with pytest.warns(UserWarning, match="the model is old"), warnings.catch_warnings():
        warnings.simplefilter("always", UserWarning)
        workbench.picture(workbench.pipeline, 0, None)


def test_a_prompt_that_the_judge_can_t_read_is_refused_before_anything_is_loaded() -> None:
    prompts = ["a cat on a pink background"] * 3 + ["a fish on a yellow background"]
    with pytest.raises(InvalidConfig, match=r"fish on a yellow.*none of"):
        Workbench(Source("mini"), prompts, None, None)


def test_the_winner_is_the_best_in_time_or_the_fastest_that_is_good() -> None:
    slow, quick, bad = Tried("a", 2.0, (0.9, 0.9)), Tried("b", 1.0, (0.8, 0.8)), Tried("c", 0.5, (0.1, 0.3))
    assert Goal(seconds=1.5).best([slow, quick, bad]) is quick
    assert Goal(quality=0.5).best([slow, quick, bad]) is quick
    assert Goal(quality=0.95).best([slow, quick, bad]) is None
    assert _beats(quick, Tried("d", 1.0, (0.7,))) and not _beats(quick, quick) and not _beats(quick, bad)
    assert _loses([Tried("e", 1.0, (0.9,) * 4)], [0.1, 0.2, 0.1, 0.15], 2.0)
    assert not _loses([Tried("e", 3.0, (0.9,) * 4)], [0.1, 0.2, 0.1, 0.15], 2.0)


@pytest.mark.parametrize("given", [{}, {"seconds": 1.0, "quality": 0.5}, {"seconds": -1.0}])
def test_a_goal_is_one_thing(given: dict[str, float]) -> None:
    with pytest.raises(InvalidConfig):
        Goal(**given)


def test_neighbours_have_other_thresholds_and_a_cliff_is_a_loss_that_is_shown() -> None:
    around = list(neighbours(parse_stack("ToCa, FirstBlockCache .1")))
    assert [one.step_cache.threshold for one in around] == [0.09, 0.11]  # type: ignore[union-attr]
    assert not list(neighbours(parse_stack("Interval 3")))
    assert Cliff("a", Interval(-0.2, -0.3, -0.1)).found and "a cliff" in str(Cliff("a", Interval(-0.2, -0.3, -0.1)))
    assert not Cliff("a", Interval(-0.2, -0.5, 0.1)).found and not Cliff("a", Interval(-0.01, -0.02, -0.005)).found


def test_without_optuna_the_command_that_installs_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    done = CliRunner().invoke(app, ["tune", "mini", "--seconds", "2"])
    assert done.exit_code == 2 and "pip install 'fastdit[tune]'" in done.stderr


def test_prompts_of_the_search_are_none_of_the_report(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("a cat\na pig\n")
    arguments = ["tune", "mini", "--seconds", "2", "--prompts", str(file), "--test-prompts", str(file)]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 2 and "what is searched with is not what is reported" in done.stderr


@pytest.mark.parametrize(("steps", "total"), [(1, 5), (3, 8), (6, 28), (7, 7)])
def test_a_budget_begins_with_so_many_evaluations_evenly_spaced(steps: int, total: int) -> None:
    mask = Budget(steps).uniform(total)
    assert len(mask) == total and sum(mask) == steps and mask[0]


def test_a_budget_finds_a_mask_of_exactly_so_many_that_is_no_worse_than_even_ones(tmp_path: Path) -> None:
    pipeline, call = testing.PIPELINES["FluxPipeline"](size=64, steps=8, batch=1)
    given = {name: value for name, value in call.items() if name not in ("generator", "output_type")}
    del given["num_inference_steps"]
    found = Budget(3, trials=6).search(pipeline, [given], 8)
    assert sum(found.mask.mask) == 3 and found.error <= found.uniform_error and 1 < found.tried <= 6
    found.save(tmp_path)
    assert Stack.from_pretrained(tmp_path) == Stack([found.mask])
    assert json.loads((tmp_path / "tuning.json").read_text())["budget"] == 3
    twin = accelerate(pipeline, Stack.from_pretrained(tmp_path))
    twin(**given, num_inference_steps=8)
    assert twin.fastdit.last_run.computed == 3
    with pytest.raises(InvalidConfig, match="more than the run's 2 steps"):
        Budget(3).search(pipeline, [given], 2)


def test_plain_steps_that_reach_the_goal_too_are_named_beside_the_winner() -> None:
    from tests.measure.samples import make_results

    results = make_results()
    fastest_plain = min(one.median_seconds for one in results.configurations if one.stack is None)
    (line,) = fewer_steps(results, "RALU 4x", 100.0)
    assert "reaches the goal, too; the winner is" in line and "judge" in line
    assert list(fewer_steps(results, "RALU 4x", 0.5 * fastest_plain)) == []
