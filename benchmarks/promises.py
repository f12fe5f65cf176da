"""Who keeps what is promised: the checks of `fastdit.testing.PROMISES` on fastdit's caches and on other libraries'.

Every check runs in a process of its own, for some libraries change classes, on a tiny FLUX of the installed diffusers.
"""

from __future__ import annotations

import functools
import importlib.metadata
import json
import multiprocessing
import os
import re
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import diffusers
import torch
import typer

from fastdit.accelerator import Accelerator
from fastdit.schedule.ralu import RALU
from fastdit.step_cache.curves import MagnitudeCurve
from fastdit.step_cache.gates.first_block_cache import FirstBlockCache
from fastdit.step_cache.gates.magcache import MagCache
from fastdit.step_cache.gates.taylorseer import TaylorSeer
from fastdit.testing import PROMISES, STEPS, Inapplicable, Subject, of_accelerator, tiny_flux
from fastdit.testing.promises import Apply
from fastdit.token_cache.toca import ToCa
from saving import save

RESULT = Path(__file__).parent / "results" / "promises.json"
MUTATION = RESULT.with_name("mutation.json")

_HEAD = """The same checks, each in a process of its own, on a tiny FLUX with random weights and {steps} steps:
{versions}. A check is asked of every library in its own way of being switched on. "No" has the number
of what was seen, "-" that of why there was nothing to ask. Other libraries promise few of these things, and a "no" is
no fault where nothing was promised: diffusers' hooks and cache-dit change the pipeline itself by design, and cache-dit
must be told of two branches (`enable_separate_cfg`), which was not done. What is shown is this model and these
settings, no more.
"""

CURVE = tuple(1.0 - 0.01 * step for step in range(STEPS))


def hooked(make: Callable[[Any], Any]) -> Apply:
    """Switch one of diffusers' caches on; `make` gives its configuration for a pipeline."""

    def apply(pipeline: Any) -> Any:
        pipeline.transformer.enable_cache(make(pipeline))
        return pipeline

    return apply


def _timestep(pipeline: Any) -> Any:
    """Give a pipeline's present timestep, and outside of a call the one that it begins with."""
    return pipeline.current_timestep or 1000


def of_diffusers() -> Iterator[tuple[str, Subject]]:
    """Give diffusers' caches: as they act, neutral, and with a setting that is no number."""

    def subject(kind: Any, acting: dict[str, Any], neutral: dict[str, Any] | None, invalid: dict[str, Any]) -> Subject:
        def configured(changes: dict[str, Any]) -> Apply:
            def make(pipeline: Any) -> Any:
                if "current_timestep_callback" not in kind.__dataclass_fields__:
                    return kind(**changes)
                return kind(**changes, current_timestep_callback=functools.partial(_timestep, pipeline))

            return hooked(make)

        return Subject(
            tiny_flux, configured(acting), None if neutral is None else configured(neutral), configured(invalid)
        )

    yield (
        "FirstBlockCache",
        subject(diffusers.FirstBlockCacheConfig, {"threshold": 0.8}, {"threshold": 0.0}, {"threshold": "0.8"}),
    )
    seer = {"disable_cache_before_step": 2, "taylor_factors_dtype": torch.float32}
    yield (
        "TaylorSeer",
        subject(
            diffusers.TaylorSeerCacheConfig,
            {"cache_interval": 3, **seer},
            {"cache_interval": 1, **seer},
            {"cache_interval": "3", **seer},
        ),
    )
    mag = {"num_inference_steps": STEPS, "mag_ratios": list(CURVE)}
    yield (
        "MagCache",
        subject(
            diffusers.MagCacheConfig,
            {"threshold": 0.2, **mag},
            {"threshold": 0.0, **mag},
            {"threshold": "0.2", **mag},
        ),
    )
    # Its own range of timesteps, for it can't begin with a skipped step.
    faster = {"is_guidance_distilled": True, "tensor_format": "BFCHW"}
    yield (
        "FasterCache",
        subject(
            diffusers.FasterCacheConfig,
            {"spatial_attention_block_skip_range": 2, **faster},
            {"spatial_attention_block_skip_range": 1, **faster},
            {"spatial_attention_block_skip_range": "2", **faster},
        ),
    )
    pab = {"spatial_attention_timestep_skip_range": (-1, 1001)}
    yield (
        "PyramidAttentionBroadcast",
        subject(
            diffusers.PyramidAttentionBroadcastConfig,
            {"spatial_attention_block_skip_range": 2, **pab},
            {"spatial_attention_block_skip_range": 1, **pab},
            {"spatial_attention_block_skip_range": "2", **pab},
        ),
    )


def of_cache_dit() -> Subject:
    """Give cache-dit's DBCache with one leading block."""

    def configured(threshold: Any) -> Apply:
        def apply(pipeline: Any) -> Any:
            os.environ.setdefault("CACHE_DIT_LOG_LEVEL", "warning")
            import cache_dit

            config = cache_dit.DBCacheConfig(
                Fn_compute_blocks=1, Bn_compute_blocks=0, residual_diff_threshold=threshold, max_warmup_steps=2
            )
            cache_dit.enable_cache(pipeline, cache_config=config)
            return pipeline

        return apply

    return Subject(tiny_flux, configured(0.8), configured(0.0), configured("0.8"))


def of_fastdit() -> Iterator[tuple[str, Subject]]:
    """Give fastdit's likes, and one method of each of the other levels that change a run."""
    rows: dict[str, tuple[Accelerator, Accelerator | None]] = {
        "FirstBlockCache": (FirstBlockCache(0.8), FirstBlockCache(0.0)),
        "TaylorSeer": (TaylorSeer(3, 2), TaylorSeer(1, 2)),
        "MagCache": (MagCache(0.2, MagnitudeCurve(CURVE)), MagCache(0.0, MagnitudeCurve(CURVE))),
        "ToCa": (ToCa(3, 0.25, first=2), ToCa(1)),
        "RALU": (RALU(steps=(4, 4, 4), ends=(0.3, 0.45), ratio=0.3), None),
    }
    for name, (accelerator, neutral) in rows.items():
        yield name, of_accelerator(accelerator, neutral, reads_signal=name == "FirstBlockCache")


def subjects() -> dict[str, Subject]:
    """List who is asked, by library and name."""
    found = {f"fastdit {name}": subject for name, subject in of_fastdit()}
    found |= {f"diffusers {name}": subject for name, subject in of_diffusers()}
    return {**found, "cache-dit DBCache": of_cache_dit()}


@dataclass(frozen=True)
class Answer:
    """What came of one check: kept, or not, or None where it could not be asked; and what was seen."""

    kept: bool | None
    seen: str = ""


def answered(promise: str, name: str) -> Answer:
    """Run a check in a process of its own."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_answer, args=(promise, name, theirs))
    process.start()
    theirs.close()
    found = ours.recv() if ours.poll(120) else Answer(False, "it did not come to an end in two minutes")
    process.kill()
    process.join()
    return found


def _answer(promise: str, name: str, out: Connection) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    try:
        PROMISES[promise].check(subjects()[name])
    except Inapplicable as reason:
        out.send(Answer(None, str(reason)))
    except BaseException as error:
        out.send(Answer(False, _seen(error)))
    else:
        out.send(Answer(True))


def _seen(error: BaseException) -> str:
    """Say in one line what a broken promise looked like."""
    text = re.sub(r" at 0x[0-9a-f]+", "", str(error).strip().partition("\n")[0])
    if isinstance(error, AssertionError):
        return text or f"`{traceback.extract_tb(error.__traceback__)[-1].line}` does not hold"
    return f"{type(error).__name__}: {text[:160]}"


def main(out: Path = RESULT) -> None:
    """Ask everybody everything and save the answers, which `report.py` writes into `docs/promises.md`."""
    rows = {promise: {name: answered(promise, name) for name in subjects()} for promise in PROMISES}
    versions = {package: importlib.metadata.version(package) for package in ("diffusers", "cache-dit")}
    save(out, {"steps": STEPS, "versions": versions, "promises": rows})
    for name in subjects():
        print(f"{name}: {sum(bool(row[name].kept) for row in rows.values())} of {len(rows)} kept")


def kept() -> str:
    """Write the committed answers as a table, with every reason once."""
    data = json.loads(RESULT.read_text(encoding="utf-8"))
    versions = ", ".join(f"{package} {version}" for package, version in data["versions"].items())
    return "\n".join((_HEAD.format(steps=data["steps"], versions=versions), table(data["promises"]), "", noticed()))


def noticed() -> str:
    """Say how many small changes to the code its tests notice."""
    data = json.loads(MUTATION.read_text(encoding="utf-8"))
    return (
        f"What keeps it so: of {data['mutants']} small changes to the {len(data['modules'])} modules that decide what "
        f"a run does, drawn at random, {data['killed']:.1%} are noticed by the modules' own fast tests "
        "(`benchmarks/mutation.py`)."
    )


def table(rows: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> str:
    """Lay answers out, a promise a row."""
    reasons: dict[str, int] = {}

    def cell(answer: Mapping[str, Any]) -> str:
        if answer["kept"]:
            return "yes"
        number = reasons.setdefault(answer["seen"], len(reasons) + 1)
        return f"- ({number})" if answer["kept"] is None else f"no ({number})"

    names = list(next(iter(rows.values())))
    lines = ["| promise | " + " | ".join(names) + " |", "|---|" + "---|" * len(names)]
    for promise, row in rows.items():
        shown = " | ".join(cell(row[name]) for name in names)
        lines.append(f"| **{promise}**: {PROMISES[promise].says} | {shown} |")
    lines.append("")
    lines += [f"{number}. {reason}" for reason, number in reasons.items()]
    return "\n".join(lines)


if __name__ == "__main__":
    typer.run(main)
