"""A search for the stacks that give the best pictures in a time, or the least time for pictures good enough.

Trials are stacks: Optuna proposes them by two objectives, seconds and quality, and keeps its study in SQLite, so that a
search goes on where it stood. The cost model throws out a stack whose least seconds are more than is asked; a trial
that is shown, picture by picture, to be worse than one that takes no longer is broken off. What is searched with is not
what is reported: the search sees training prompts alone.
"""

from __future__ import annotations

import hashlib
import json
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib import import_module
from pathlib import Path
from statistics import mean, median
from typing import TYPE_CHECKING, Any

import torch

from fastdit.acceleration import accelerate
from fastdit.bench.cost import CostMeter
from fastdit.bench.grammar import parse_stack, stack_text
from fastdit.bench.matrix import unfired
from fastdit.bench.source import Source
from fastdit.bench.store import BenchError, write_whole
from fastdit.bench.workers import Job, Workers
from fastdit.errors import FastditError, FastditWarning, InvalidConfig
from fastdit.measure.environment import Environment
from fastdit.measure.statistics import Interval, mean_difference
from fastdit.measure.timing import timed
from fastdit.mini import Architecture
from fastdit.mini.language import Judge, Purpose, judge_of, language_of
from fastdit.predict.cost import CostModel, keep_model, kept_model
from fastdit.predict.estimate import predict
from fastdit.stack import Stack

if TYPE_CHECKING:
    from PIL.Image import Image

#: Pictures after which a trial may be broken off.
EARLY = 4

#: How far over the goal a stack's least seconds may be said to be before it is thrown out; farther by noisy costs.
DOUBT = 1.1

#: A loss of quality by a neighbour's threshold that is called a cliff, and how far away neighbours are.
CLIFF, NEIGHBOURS = 0.05, (0.9, 1.1)

#: What stands for a schedule's free parameters, where some preset of it fits.
_FREE = {"ProgressiveResolution": "free", "RALU": "free regions"}
_PRESETS = ("2x", "3x", "4x", "5x", "6x", "7x", "9x", "10x", "14x")
_GATES = {"TeaCache": (0.05, 1.0), "FirstBlockCache": (0.01, 0.5), "EasyCache": (0.01, 0.5), "Interval": (2, 8)}


def optuna() -> Any:
    """Import Optuna. Raises `InvalidConfig` with the command that installs it."""
    try:
        found: Any = import_module("optuna")
    except ModuleNotFoundError as error:
        raise InvalidConfig(
            "a search needs Optuna, which is not installed; run: pip install 'fastdit[tune]'"
        ) from error
    found.logging.set_verbosity(found.logging.WARNING)
    return found


@dataclass(frozen=True)
class Goal:
    """What is asked: at most so many seconds, or quality of at least so much; one of the two.

    Raises `InvalidConfig` for both or none, and for what can't be reached by anything.
    """

    seconds: float | None = None
    quality: float | None = None

    def __post_init__(self) -> None:
        if (self.seconds is None) == (self.quality is None):
            raise InvalidConfig(
                "say what is wanted: at most so many --seconds, or --floor for the quality, and not both"
            )
        if self.seconds is not None and self.seconds <= 0:
            raise InvalidConfig(f"a call takes more than 0 s, got --seconds {self.seconds}")

    def best(self, found: Sequence[Tried]) -> Tried | None:
        """Choose the winner; None where nothing reaches the goal."""
        if self.seconds is not None:
            reaching = [one for one in found if one.seconds <= self.seconds]
            return max(reaching, key=lambda one: one.quality, default=None)
        good = [one for one in found if self.quality is not None and one.quality >= self.quality]
        return min(good, key=lambda one: one.seconds, default=None)


@dataclass(frozen=True)
class Tried:
    """A stack that made its pictures: seconds a call, and each picture's quality."""

    stack: str
    seconds: float
    qualities: tuple[float, ...]

    @property
    def quality(self) -> float:
        return mean(self.qualities)


@dataclass(frozen=True)
class Cliff:
    """A neighbour of the winner, and what its pictures lose."""

    stack: str
    difference: Interval

    @property
    def found(self) -> bool:
        return self.difference.high < 0 and self.difference.estimate < -CLIFF

    def __str__(self) -> str:
        told = "a cliff" if self.found else "no cliff"
        return f"{self.stack}: {self.difference:+.3f} in quality, {told}"


class Workbench:
    """Makes and judges pictures: an embedded pipeline's by a judge, others' by their SSIM to the plain pipeline's.

    Of an embedded pipeline's judges it is the one for searches, unless what was found is `judged_for` tables.
    """

    def __init__(
        self,
        source: Source,
        prompts: Sequence[str],
        size: tuple[int, int] | None,
        steps: int | None,
        *,
        judged_for: Purpose = "search",
    ) -> None:
        self.source, self.prompts, self.size, self.steps = source, list(prompts), size, steps
        if len(self.prompts) < EARLY:
            raise InvalidConfig(f"a search compares at least {EARLY} prompts, got {len(self.prompts)}")
        self._judge: Judge | None = None
        if source.architecture is not None:
            self._judge = judge_of(source.architecture, judged_for)
        if source.architecture is not None and self._judge is not None:
            _check_readable(source.architecture, self.prompts)
        self.pipeline = source.load()
        self._references: list[Image] = []

    def picture(
        self, pipeline: Any, number: int, steps: int | None, said: list[warnings.WarningMessage] | None = None
    ) -> tuple[float, Image]:
        """Make the picture of a prompt; give the seconds that it took, and add what fastdit warned of to `said`."""
        call: dict[str, Any] = {"prompt": self.prompts[number]}
        if self.size is not None:
            call |= {"height": self.size[0], "width": self.size[1]}
        if steps is not None:
            call["num_inference_steps"] = steps
        generator = torch.Generator().manual_seed(number)
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always", FastditWarning)
            seconds, output = timed(lambda _: pipeline(**call, generator=generator), 0, pipeline._execution_device)
        for one in warned:
            if not issubclass(one.category, FastditWarning):  # of others nothing is kept back
                warnings.warn_explicit(one.message, one.category, one.filename, one.lineno)
            elif said is not None:
                said.append(one)
        return seconds, output.images[0]

    @property
    def quality_is(self) -> str:
        """What `quality` gives."""
        return "SSIM to the plain run" if self._judge is None else "the judge's score"

    def quality(self, number: int, image: Image) -> float:
        """Judge the picture of a prompt."""
        if self._judge is not None:
            return float(self._judge.score([image], [self.prompts[number]])[0])
        from fastdit.measure.images import ssim

        while len(self._references) <= number:
            self._references.append(self.picture(self.pipeline, len(self._references), self.steps)[1])
        return ssim([image], [self._references[number]])[0]

    def twin(self, stack: Stack) -> Any:
        """Open a stack, its engines built. Raises what `accelerate` does."""
        twin = accelerate(self.pipeline, stack)
        twin.fastdit.plan(*(self.size or (None, None)), self.steps if stack.schedule is None else None)
        if stack.engine is not None:
            twin.fastdit.warmup(*(self.size or (None, None)), progress=False)
        return twin

    def tried(self, stack: Stack, losing: Callable[[Sequence[float], float], bool] = lambda *_: False) -> Tried | None:
        """Make a stack's pictures; None where it was `losing` on the way, by qualities and seconds so far.

        What is given is the stack without the parts that never acted in any of the pictures.
        """
        twin, steps = self.twin(stack), self.steps if stack.schedule is None else None
        seconds: list[float] = []
        qualities: list[float] = []
        idle = list(stack)
        for number in range(len(self.prompts)):
            said: list[warnings.WarningMessage] = []
            took, image = self.picture(twin, number, steps, said)
            idle = unfired(idle, said)
            seconds.append(took)
            qualities.append(self.quality(number, image))
            if number + 1 >= EARLY and losing(qualities, median(seconds)):
                return None
        acting = Stack([part for part in stack if part not in idle])
        return Tried(stack_text(acting), median(seconds), tuple(qualities))


class Trials:
    """Makes the pictures of stacks in another process, each trial a file of its own in a folder."""

    def __init__(self, workbench: Workbench, folder: Path) -> None:
        self.workbench, self.folder = workbench, folder

    @classmethod
    def from_json(cls, data: Mapping[str, Any], folder: Path) -> Trials:
        """Open the workbench that `Search` describes."""
        size = None if data["size"] is None else (data["size"][0], data["size"][1])
        return cls(Workbench(Source(**data["source"]), data["prompts"], size, data["steps"]), folder)

    def make(self, asked: Mapping[str, Any]) -> None:
        """Try a stack, and leave what came of it."""
        known = [Tried(stack, seconds, tuple(qualities)) for stack, seconds, qualities in asked["known"]]
        try:
            tried = self.workbench.tried(
                parse_stack(asked["stack"]), lambda qualities, seconds: _loses(known, qualities, seconds)
            )
            found: dict[str, Any] = {"loses": True} if tried is None else {"tried": asdict(tried)}
        except FastditError as error:
            found = {"refused": str(error)}
        text = json.dumps({"stack": asked["stack"], **found}) + "\n"
        write_whole(lambda path: path.write_text(text, encoding="utf-8"), trial_path(self.folder, asked["stack"]))


def trial_path(folder: Path, stack: str) -> Path:
    """Give the file of a trial that a worker made."""
    return folder / "trials" / f"{hashlib.sha256(stack.encode()).hexdigest()[:24]}.json"


class Search:
    """A search, whose study is `study.db` in a folder. Workers of a cluster make several trials at once.

    Their machines are not this one, so with them no trial is thrown out by what it would cost here.
    """

    def __init__(
        self,
        workbench: Workbench,
        goal: Goal,
        folder: Path,
        engines: Sequence[str] = (),
        seed: int = 0,
        workers: Workers | None = None,
    ) -> None:
        self.workbench, self.goal, self.folder, self.engines = workbench, goal, folder, tuple(engines)
        self.workers = workers
        folder.mkdir(parents=True, exist_ok=True)
        self._optuna = optuna()
        self.schedules, self.gates = list(self._possible_schedules()), list(self._possible_gates())
        self.study = self._optuna.create_study(
            study_name="fastdit",
            storage=f"sqlite:///{folder / 'study.db'}",
            directions=["minimize", "maximize"],
            sampler=self._optuna.samplers.TPESampler(seed=seed),
            load_if_exists=True,
        )
        self._check_same()
        if not self.study.trials:
            for schedule in self.schedules:
                if schedule not in _FREE.values():
                    self.study.enqueue_trial({"schedule": schedule, "cache": ""}, skip_if_exists=True)
        self._begin_lost_trials_again()
        self.model = self._costs() if workers is None else None

    def _check_same(self) -> None:
        """Refuse a folder that holds another search. Raises `InvalidConfig`."""
        bench = self.workbench
        own = {"source": asdict(bench.source), "prompts": bench.prompts, "size": bench.size, "steps": bench.steps}
        asked = json.loads(json.dumps({**own, "goal": asdict(self.goal), "engines": self.engines}))
        kept = self.study.user_attrs.get("search", asked)
        if kept != asked:
            other = [
                f"{name} {kept.get(name)!r} and not {asked[name]!r}" for name in asked if kept.get(name) != asked[name]
            ]
            raise InvalidConfig(f"{self.folder} holds another search, of {'; '.join(other)}; choose another with --out")
        self.study.set_user_attr("search", asked)

    def _begin_lost_trials_again(self) -> None:
        """Put what a search that was killed had begun in the queue again."""
        states = self._optuna.trial.TrialState
        for lost in self.study.get_trials(states=(states.RUNNING,)):
            self.study.tell(lost.number, state=states.FAIL)
            if lost.params:
                self.study.enqueue_trial(lost.params)

    def _costs(self) -> CostModel:
        found = kept_model(self.workbench.pipeline)
        if found is None or found.doubt:  # what was taken on a busy machine would throw out what is in time on this one
            size = dict(zip(("height", "width"), self.workbench.size or (), strict=False))
            found = CostMeter(self.workbench.pipeline, {"prompt": self.workbench.prompts[0], **size}).rounds()
            keep_model(self.workbench.pipeline, found)
        return found

    def _possible_schedules(self) -> Iterator[str]:
        yield ""
        names = [f"{kind} {preset}" for kind in ("ProgressiveResolution", "RALU") for preset in _PRESETS]
        fits = [name for name in names if self._fits(name)]
        yield from fits
        yield from (free for kind, free in _FREE.items() if any(name.startswith(kind) for name in fits))

    def _possible_gates(self) -> Iterator[str]:
        yield ""
        yield from (gate for gate in _GATES if self._fits(gate))

    def _fits(self, text: str) -> bool:
        try:
            stack = parse_stack(text)
            accelerate(self.workbench.pipeline, stack).fastdit.plan(*(self.workbench.size or (None, None)))
        except FastditError:
            return False
        return True

    def run(self, minutes: float, trials: int | None = None, say: Callable[[str], None] = lambda _: None) -> None:
        """Search until the time is up, or for so many trials."""
        ends = time.monotonic() + 60.0 * minutes
        done = 0
        if self.model is not None and self.model.warning is not None:
            say(self.model.warning)
        while time.monotonic() < ends and (trials is None or done < trials):
            if self.workers is None:
                self.study.optimize(self._trial, n_trials=1, catch=())
                done += 1
            else:
                count = self.workers.count if trials is None else min(self.workers.count, trials - done)
                self._trials(count)
                done += count
            found = self.front()
            best = self.goal.best(found)
            left = max(ends - time.monotonic(), 0.0) / 60
            told = "nothing reaches it yet" if best is None else f"{best.stack or 'plain'}: {_told(best)}"
            say(f"{self.counted()}, {len(found)} on the front, {left:.0f} min left; {told}")

    def counted(self) -> str:
        """Say how many trials ended, and how many of them were thrown out before they made a picture."""
        ended = [one for one in self.study.trials if one.state.is_finished()]
        hopeless = [one.user_attrs["hopeless"] for one in ended if "hopeless" in one.user_attrs]
        told = f"; {len(hopeless)} not run, since they would take {min(hopeless):.2f} s or more" if hopeless else ""
        return f"{len(ended)} trials{told}"

    def _trials(self, count: int) -> None:
        """Ask for trials, have workers make their pictures, and tell the study what came of each."""
        states, begun = self._optuna.trial.TrialState, []
        for _ in range(count):
            trial = self.study.ask()
            try:
                begun.append((trial, self._proposed(trial)))
            except self._optuna.TrialPruned:
                self.study.tell(trial, state=states.PRUNED)
        found = self._elsewhere([stack for _, stack in begun], self.finished())
        for trial, stack in begun:
            one = found[stack_text(stack)]
            if isinstance(one, Tried):
                self.study.tell(trial, self._ended(trial, one))
            else:
                trial.set_user_attr(*one)
                self.study.tell(trial, state=states.PRUNED)

    def _elsewhere(self, stacks: Sequence[Stack], known: Sequence[Tried]) -> dict[str, Tried | tuple[str, Any]]:
        """Have stacks tried by workers, but for those whose trial is kept; say what came of each, by its text."""
        assert self.workers is not None
        bench, own = self.workbench, [[one.stack, one.seconds, one.qualities] for one in known]
        common = {"source": asdict(bench.source), "prompts": bench.prompts, "size": bench.size, "steps": bench.steps}
        texts = dict.fromkeys(map(stack_text, stacks))
        found = {text: kept for text in texts if (kept := self._kept(text)) is not None}
        if not known:
            # What lost against others was broken off.
            found = {text: one for text, one in found.items() if isinstance(one, Tried)}
        jobs = [Job("trial", common, ({"stack": text, "known": own},)) for text in texts if text not in found]
        for made in self.workers.make(self.folder, jobs):
            text = made.cell["stack"]
            if made.error is not None and not made.died:
                raise BenchError(f"{text or 'plain'} can't be tried: {made.error}")
            kept = self._kept(text)
            found[text] = ("refused", made.error) if made.error is not None or kept is None else kept
        return found

    def _kept(self, stack: str) -> Tried | tuple[str, Any] | None:
        """Read what came of a trial by a worker: what was tried, or what is said of it; None for none."""
        path = trial_path(self.folder, stack)
        if not path.exists():
            return None
        data = json.loads(path.read_text(encoding="utf-8"))
        if "tried" in data:
            return Tried(**{**data["tried"], "qualities": tuple(data["tried"]["qualities"])})
        return ("loses", True) if "loses" in data else ("refused", data["refused"])

    def _trial(self, trial: Any) -> tuple[float, float]:
        stack, known = self._proposed(trial), self.finished()
        same = next((one for one in known if one.stack == stack_text(stack)), None)
        return self._ended(
            trial,
            same or self.workbench.tried(stack, lambda qualities, seconds: _loses(known, qualities, seconds)),
        )

    def _ended(self, trial: Any, tried: Tried | None) -> tuple[float, float]:
        if tried is None:
            trial.set_user_attr("loses", True)
            raise self._optuna.TrialPruned
        trial.set_user_attr("stack", tried.stack)
        trial.set_user_attr("qualities", list(tried.qualities))
        return tried.seconds, tried.quality

    def _proposed(self, trial: Any) -> Stack:
        """Make a trial's stack. Raises `TrialPruned` for what is refused, and for what can't be in time."""
        pruned = self._optuna.TrialPruned
        try:
            stack = self.suggested(trial)
            plan = self.workbench.twin(replaced_engine(stack)).fastdit.plan(
                *(self.workbench.size or (None, None)), self.workbench.steps if stack.schedule is None else None
            )
        except FastditError as error:
            trial.set_user_attr("refused", str(error))
            raise pruned() from error
        trial.set_user_attr("stack", stack_text(stack))
        if self.model is not None and self.goal.seconds is not None and stack.engine is None:
            least = predict(self.model, self.workbench.pipeline, plan).seconds.low
            if least > DOUBT * (1.0 + self.model.doubt) * self.goal.seconds:
                trial.set_user_attr("hopeless", least)
                raise pruned()
        return stack

    def suggested(self, trial: Any) -> Stack:
        """Make a stack of what a trial suggests."""
        parts = [self._schedule(trial.suggest_categorical("schedule", self.schedules), trial)]
        gate = trial.suggest_categorical("cache", self.gates)
        if gate:
            low, high = _GATES[gate]
            own = f"{gate} "
            value = (
                trial.suggest_int(own + "value", low, high)
                if gate == "Interval"
                else round(trial.suggest_float(own + "value", low, high, log=True), 3)
            )
            forecast = trial.suggest_categorical(own + "forecast", ["Reuse", "Taylor(1)"])
            parts.append(f"{gate} {value} forecast={forecast}")
        if self.engines:
            parts.append(trial.suggest_categorical("engine", ["", *self.engines]))
        return parse_stack(", ".join(part for part in parts if part))

    def _schedule(self, name: str, trial: Any) -> str:
        if name == _FREE["RALU"]:
            return self._regions(trial)
        if name != _FREE["ProgressiveResolution"]:
            return name
        coarse, fine = trial.suggest_int("coarse", 3, 30), trial.suggest_int("fine", 1, 12)
        end = round(trial.suggest_float("end", 0.3, 0.8), 2)
        start = round(min(trial.suggest_float("start", 0.05, 0.5), end), 2)
        return f"ProgressiveResolution(steps=({coarse}, {fine}), ends=({end},), starts=({start},))"

    def _regions(self, trial: Any) -> str:
        most = {"coarse": 14, "mixed": 8, "fine": 12}
        steps = tuple(trial.suggest_int(f"{stage} steps", 1, count) for stage, count in most.items())
        first = round(trial.suggest_float("first end", 0.1, 0.6), 2)
        second = round(first + trial.suggest_float("second end", 0.05, 0.35), 2)
        ratio = round(trial.suggest_float("ratio", 0.1, 0.5), 2)
        lift = trial.suggest_categorical("lift", ("TokenCopy", "PixelLift"))
        return f"RALU(steps={steps}, ends=({first}, {second}), ratio={ratio}, lift={lift}())"

    def finished(self) -> list[Tried]:
        """Give the trials that made all of their pictures."""
        complete = self._optuna.trial.TrialState.COMPLETE
        return [
            Tried(one.user_attrs["stack"], one.values[0], tuple(one.user_attrs["qualities"]))
            for one in self.study.get_trials(states=(complete,))
        ]

    def front(self) -> list[Tried]:
        """Give the trials that no other beats in both, the fastest first."""
        unique = {one.stack: one for one in self.finished()}.values()
        return sorted(
            (one for one in unique if not any(_beats(other, one) for other in unique)), key=lambda one: one.seconds
        )

    def cliffs(self, winner: Tried) -> list[Cliff]:
        """Try the winner's neighbours: the same stack with each gate's threshold a tenth lower and higher."""
        around = list(neighbours(parse_stack(winner.stack)))
        if self.workers is None:
            tried = [self.workbench.tried(stack) for stack in around]
        else:
            found = self._elsewhere(around, ())
            tried = [one if isinstance(one, Tried) else None for one in found.values()]
        if None in tried:
            raise BenchError(f"a neighbour of {winner.stack} can't be tried")
        return [Cliff(one.stack, mean_difference(one.qualities, winner.qualities)) for one in tried if one is not None]

    def save(self, winner: Tried | None, cliffs: Sequence[Cliff]) -> list[Path]:
        """Write the front's stacks, each a folder for `accelerate(pipe, folder)`, with what they were found by."""
        paths = []
        for number, one in enumerate(self.front()):
            path = self.folder / f"pareto-{number + 1:02}{'-winner' if winner and one.stack == winner.stack else ''}"
            parse_stack(one.stack).save_pretrained(path)
            provenance = {
                **self.study.user_attrs["search"],
                "trials": len(self.study.trials),
                "seconds": one.seconds,
                "quality": one.quality,
                "quality_is": self.workbench.quality_is,
                "environment": asdict(Environment.capture()),
                "cliffs": [str(cliff) for cliff in cliffs] if winner and one.stack == winner.stack else [],
            }
            (path / "tuning.json").write_text(json.dumps(provenance, indent=1) + "\n", encoding="utf-8")
            paths.append(path)
        return paths


def _check_readable(architecture: Architecture, prompts: Sequence[str]) -> None:
    """Raise `InvalidConfig` for a prompt that an embedded pipeline's judge can't read."""
    prompt = ""
    try:
        for prompt in prompts:
            language_of(architecture).parse(prompt)
    except ValueError as error:
        raise InvalidConfig(f"the judge can't read the prompt {prompt!r}: {error}; take another") from error


def neighbours(stack: Stack) -> Iterator[Stack]:
    """Give a stack with its gate's threshold a tenth lower and higher; none where it has no threshold."""
    gate = stack.step_cache
    threshold = getattr(gate, "threshold", None)
    if gate is None or threshold is None:
        return
    for factor in NEIGHBOURS:
        moved: Any = replace(gate, **{"threshold": round(threshold * factor, 4)})
        yield Stack([moved if one is gate else one for one in stack])


def replaced_engine(stack: Stack) -> Stack:
    """Give a stack without its engine, which need not be built to plan."""
    return Stack([one for one in stack if one is not stack.engine])


def _loses(known: Sequence[Tried], qualities: Sequence[float], seconds: float) -> bool:
    """Whether pictures so far are shown to be worse than those of a stack that takes no longer."""
    for other in known:
        if other.seconds <= seconds:
            difference = mean_difference(qualities, other.qualities[: len(qualities)])
            if difference.high < 0:
                return True
    return False


def _beats(one: Tried, other: Tried) -> bool:
    at_least = one.seconds <= other.seconds and one.quality >= other.quality
    return at_least and (one.seconds, one.quality) != (other.seconds, other.quality)


def _told(one: Tried) -> str:
    return f"{one.seconds:.2f} s, quality {one.quality:.3f}"
