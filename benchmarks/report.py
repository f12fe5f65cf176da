"""Write docs/results.md from the committed results, and what other pages show of them: nothing is typed by hand."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import typer

import fastdit
import pages
from fastdit.measure.environment import Environment
from fastdit.measure.results import Results
from fastdit.measure.table import header, rows
from measurements import load

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
MINI = Path(fastdit.__file__).parent / "mini"
LARGE_EVALUATION = ROOT / "benchmarks" / "training" / "large" / "evaluation.json"
EVALUATIONS = {"FLUX": MINI / "evaluation.json", "SD3": MINI / "evaluation-sd3.json"}


def machine(data: Mapping[str, Any]) -> str:
    return f"Machine: {Environment(**data['environment'])}."


def interval(data: Mapping[str, float], digits: int) -> str:
    return f"{data['estimate']:.{digits}f} [{data['low']:.{digits}f}, {data['high']:.{digits}f}]"


def markdown(results: Results) -> str:
    """The table of a measurement."""
    names = header(results)
    lines = [names, ("---", *("---:",) * (len(names) - 1)), *(row.cells for row in rows(results))]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def overhead(data: Mapping[str, Any]) -> list[str]:
    lines = ["| twin | over plain |", "|---|--:|"]
    lines += [f"| {name} | {interval(ratio, 4)} |" for name, ratio in data["ratios"].items()]
    return [
        f"## What a stack costs where it saves nothing: {data['model']}",
        f"An empty stack, and caches whose threshold lets them skip nothing: twin over plain, {data['processes']} "
        f"processes of {data['rounds']} paired rounds of {data['steps']} steps at {data['tokens']} tokens (bar "
        f"{data['bar']}).",
        "\n".join(lines),
        machine(data),
    ]


def flops(data: Mapping[str, Any]) -> list[str]:
    lines = ["| run | transformer, attention included | as the paper counts |", "|---|--:|--:|"]
    first = next(iter(data["tflops"].values()))
    for name, row in data["tflops"].items():
        cells = (f"{row[key]:.1f} ({first[key] / row[key]:.2f}x)" for key in ("transformer", "published"))
        lines.append(f"| {name} | {' | '.join(cells)} |")
    title = f"## TFLOPs of {data['model']} at {data['pixels']} px, {data['text_tokens']} text tokens"
    return [title, "Counted on the meta device.", "\n".join(lines)]


def efficiency(data: Mapping[str, Any]) -> list[str]:
    ratio = data["flops"]["plain"] / data["flops"][data["preset"]]
    return [
        "## ProgressiveResolution's saving on the clock",
        f"A random FLUX of {data['parameters'] / 1e6:.0f} M parameters, 1024 image tokens, {data['dtype']}: "
        f"ProgressiveResolution {data['preset']} is **{interval(data['speed_up'], 2)}** times faster than "
        f"{data['steps']} plain steps, {ratio:.2f} times by FLOPs; {data['share']:.3f} of the saving "
        f"arrives (bar {data['bar']}).",
        machine(data),
    ]


def engines(data: Mapping[str, Any]) -> list[str]:
    names = list(data["stages"][0]["ratios"])
    lines = [f"| image tokens | eager, s | {' | '.join(f'{name}: faster, first call, error' for name in names)} |"]
    lines.append(f"|--:|--:|{'--:|' * len(names)}")
    for row in data["stages"]:
        eager = row["errors"]["eager"]
        cells = (
            f"{interval(row['ratios'][name], 2)}, {row['first'][name]:.0f} s, {row['errors'][name] / eager:.2f}"
            for name in names
        )
        lines.append(f"| {row['tokens']} | {median(row['seconds']['eager']):.3f} | {' | '.join(cells)} |")
    starts = "; ".join(
        f"{name} {first:.1f} s, then {second:.1f} s ({first / second:.1f} times sooner)"
        for name, (first, second) in data["starts"].items()
    )
    return [
        "## Engines at the shapes of RALU's three stages",
        f"A random FLUX of {data['parameters'] / 1e6:.0f} M parameters in {data['dtype']}. Errors are to the same "
        f"model in float32, as multiples of the eager model's (bar {data['bars']['error']}).",
        "\n".join(lines),
        f"First picture in a first process, and in a second one: {starts}.",
        machine(data),
    ]


def composition(data: Mapping[str, Any]) -> list[str]:
    lines = ["| part | faster |", "|---|--:|"]
    lines += [f"| {name} | {interval(ratio, 2)} |" for name, ratio in data["speed_ups"].items()]
    return [
        "## ProgressiveResolution, TeaCache and Compile together",
        f"Measured over the product of the parts: **{interval(data['share'], 3)}** (bar {data['bar']}).",
        "\n".join(lines),
        machine(data),
    ]


def quality(results: Results, title: str = "Quality at equal time on the embedded pipeline") -> list[str]:
    return [
        f"## {title}",
        f"{len(results.prompts)} held-out prompts, {results.images_per_round} a call, calls in turns. The judge's soft "
        "score (0 to 1) is compared with plain sampling of fewer steps that takes as long.",
        markdown(results),
        "The Frechet distance is in the judge's features, to real renders of held-out prompts (jackknife interval).",
        f"Machine: {results.environment}.",
    ]


def spatial(results: Results, title: str) -> list[str]:
    names = [configuration.name for configuration in results.configurations]
    lines = ["| preset | speed-up | rival | its time | judge, preset - rival | Frechet distance, preset - rival |"]
    lines.append("|---|--:|---|--:|--:|--:|")
    for preset in (name for name in names if name.startswith("ProgressiveResolution ")):
        shown = preset.removeprefix("ProgressiveResolution ")
        own = shown.partition(",")[0]
        plain = _plain_around(results, preset)
        others = [name for name in names if name.startswith(f"{own} rival: ")]
        for rival in plain + others:
            time = results[rival].median_seconds / results[preset].median_seconds
            scores = (results.advantage(preset, rival, metric) for metric in ("judge", "frechet"))
            told = " | ".join("-" if score is None else format(score, "+.3f") for score in scores)
            speed = format(results.speed_up(preset), ".2f")
            lines.append(f"| {shown} | {speed} | {rival.removeprefix(f'{own} rival: ')} | {time:.2f} | {told} |")
    return [
        f"## {title}",
        f"{_pictures(results)} Each preset beside the schedules that take as long (*its time* is the rival's over the "
        "preset's); differences are paired, a higher judge's score and a lower distance are better.",
        "\n".join(lines),
        "Everything that took part:",
        markdown(results),
        f"Machine: {results.environment}.",
    ]


def exchanged(results: Results) -> list[str]:
    lines = [
        "| run | its time | fewer FLOPs | judge | judge, run - preset | Frechet distance, run - preset | sharpness |"
    ]
    lines.append("|---|--:|--:|--:|--:|--:|--:|")
    preset = results[results.baseline]
    for entry in results.configurations:
        time = entry.median_seconds / preset.median_seconds
        scores = (results.advantage(entry.name, preset.name, metric) for metric in ("judge", "frechet"))
        shown = ("-" if entry is preset or score is None else format(score, "+.3f") for score in scores)
        own = (format(entry.metrics[name].interval, spec) for name, spec in (("judge", ".3f"), ("sharpness", ".2f")))
        judge, sharpness = own
        cells = (f"{time:.2f}", f"{results.flops_ratio(entry.name):.2f}", judge, *shown, sharpness)
        lines.append(f"| {entry.name} | {' | '.join(cells)} |")
    return [
        "## What each part of a schedule is worth",
        f"{preset.name} on the embedded pipeline and the same with one part exchanged: {_pictures(results)} Time and "
        "FLOPs are to the preset's; differences are paired, a higher judge's score and a lower distance are better.",
        "\n".join(lines),
        f"Machine: {results.environment}.",
    ]


def _pictures(results: Results) -> str:
    """Say what a comparison was made of."""
    prompts, rounds = len(set(results.prompts)), len(results[results.baseline].seconds)
    several = len(results.prompts) // prompts
    each = f", {several} pictures each" if several > 1 else ""
    return (
        f"{prompts} held-out prompts{each}, in {results.settings['dtype']}, {results.images_per_round} a call; timed "
        f"apart from that, in {rounds} rounds in turns."
    )


def _plain_around(results: Results, name: str) -> list[str]:
    """Give the plain runs next to a configuration's time: the fastest that is slower, the slowest that is faster."""
    goal = results[name].median_seconds
    plain = sorted((c for c in results.configurations if c.stack is None), key=lambda c: c.median_seconds)
    slower = [entry.name for entry in plain if entry.median_seconds >= goal][:1]
    return slower + [entry.name for entry in plain if entry.median_seconds < goal][-1:]


#: Speed-ups over 50 plain steps at which the libraries' best caches are set side by side.
TARGETS = (1.5, 2.0, 3.0)


def library(name: str) -> str:
    """Say whose a configuration is, by its name."""
    if name.endswith(" steps"):
        return "fewer plain steps"
    return next((peer for peer in ("diffusers", "cache-dit") if name.startswith(peer)), "fastdit")


def caching(results: Results) -> list[str]:
    names = [configuration.name for configuration in results.configurations if configuration.name != results.baseline]
    lines = ["| at least | whose | its most faithful run | speed-up | judge | PSNR dB | SSIM | Frechet |"]
    lines.append("|--:|---|---|--:|--:|--:|--:|--:|")
    for target in TARGETS:
        fast = [name for name in names if results.speed_up(name).estimate >= target]
        for whose in dict.fromkeys(map(library, names)):
            own = [name for name in fast if library(name) == whose]
            if not own:
                lines.append(f"| {target:g} | {whose} | none as fast | | | | | |")
                continue
            best = max(own, key=lambda name: results[name].metrics["psnr"].interval.estimate)
            shown = (
                format(results[best].metrics[name].interval, spec)
                for name, spec in (("judge", ".3f"), ("psnr", ".1f"), ("ssim", ".4f"), ("frechet", ".3f"))
            )
            speed = format(results.speed_up(best), ".2f")
            lines.append(f"| {target:g} | {whose} | {best} | {speed} | {' | '.join(shown)} |")
    return [
        "## Caches at equal time on the embedded pipeline",
        f"{len(results.prompts)} held-out prompts, {results.images_per_round} a call, all in turns in one run. Of each "
        "library's runs that are at least so much faster than 50 plain steps, the one whose pictures are nearest to "
        "those of 50 steps (PSNR):",
        "\n".join(lines),
        "Everything that took part:",
        markdown(results),
        f"Machine: {results.environment}.",
    ]


def isolation(data: Mapping[str, Any]) -> list[str]:
    rival = data["baseline"]
    lines = [
        f"| run | computed | last stage from | fewer FLOPs | judge | judge - {rival} | intact | intact - {rival} |"
    ]
    lines.append("|---|--:|--:|--:|--:|--:|--:|--:|")
    for row in data["rows"]:
        shown = (interval(row[key], 3) for key in ("judge", "judge_difference", "intact", "intact_difference"))
        computed = f"{row['computed']} of {row['forwards']}"
        restart = "-" if row["restart"] is None else f"sigma {row['restart']:.3f}"
        lines.append(f"| {row['name']} | {computed} | {restart} | {row['fewer_flops']:.2f} | {' | '.join(shown)} |")
    return [
        "## Where RALU's loss on the embedded pipeline comes from",
        f"{data['prompts']} held-out prompts in bfloat16, one setting changed at a time. *intact* is the judge's "
        "probability that a picture of a single object has no damage. Differences are paired by picture. FLOPs are the "
        "transformer's, so these are not equal times.",
        "\n".join(lines),
        machine(data),
    ]


def evaluation(data: Mapping[str, Any], architecture: str) -> list[str]:
    names = ["soft", "single_objects", "pairs", "background", "place", "intact", "relative_sharpness", "frechet"]
    lines = [f"| steps | {' | '.join(name.replace('_', ' ') for name in names)} |", f"|--:|{'--:|' * len(names)}"]
    half = {f"{steps} at 128 px": row for steps, row in data["half_size"].items()}
    rows = {**data["steps"], **half, "real renders": data["judge_on_renders"]}
    for steps, row in rows.items():
        cells = (interval(row[name], 3) if name in row else "-" for name in names)
        lines.append(f"| {steps} | {' | '.join(cells)} |")
    measures = ["soft", "relative_sharpness", "frechet"]
    falls = ["| steps | soft | relative sharpness | frechet |", "|--:|--:|--:|--:|"]
    for steps, fall in data["falls"].items():
        falls.append(f"| {steps} | {' | '.join(interval(fall[name], 4) for name in measures)} |")
    compared = ", ".join(steps for steps, row in data["steps"].items() if "frechet" in row)
    return [
        f"## The embedded {architecture} pipeline itself",
        f"{data['prompts']} held-out prompts at 256 px, by the judge; sharpness and Frechet distance (to real renders) "
        f"over {data['pictures']} pictures at {compared} steps.",
        "\n".join(lines),
        "What fewer plain steps lose, paired by picture (positive is worse):",
        "\n".join(falls),
    ]


def large_evaluation(data: Mapping[str, Any]) -> list[str]:
    parts = [
        "## The larger embedded FLUX pipeline itself",
        f"{data['prompts']} held-out prompts, by the judge for tables and by what the renderer knows (lower is better "
        "for the residue, the palette and the Frechet distance). Curvature is a trajectory's length over the distance "
        "between its ends, less 1.",
    ]
    for side, found in data["sides"].items():
        rows = {**{f"{steps} steps": row for steps, row in found["steps"].items()}, "renders": found["renders"]}
        names = list(next(iter(rows.values())))
        lines = [
            f"| {side} px | {' | '.join(name.replace('_', ' ') for name in names)} |",
            f"|---|{'--:|' * len(names)}",
        ]
        for name, row in rows.items():
            cells = (interval(row[measure], 3) if measure in row else "-" for measure in names)
            lines.append(f"| {name} | {' | '.join(cells)} |")
        parts.append("\n".join(lines))
        if found["falls"]:
            names = list(next(iter(found["falls"].values())))
            lines = [f"| steps | {' | '.join(names)} |", f"|---|{'--:|' * len(names)}"]
            lines += [
                f"| {steps} | {' | '.join(interval(fall[name], 4) for name in names)} |"
                for steps, fall in found["falls"].items()
            ]
            parts += ["What fewer plain steps lose, paired by picture (positive is worse):", "\n".join(lines)]
    return [*parts, machine(data)]


def host_time(data: Mapping[str, Any]) -> list[str]:
    lines = ["| forward | ms | of compile_repeated_blocks |", "|---|--:|--:|"]
    for name, milliseconds in data["milliseconds"].items():
        ratio = data["ratios"].get(name)
        lines.append(f"| {name} | {milliseconds:.1f} | {'' if ratio is None else interval(ratio, 3)} |")
    blocks = sum(data["blocks"])
    return [
        "## The host's part of a forward",
        f"A FLUX of {blocks} blocks so small that a forward is Python, dispatch and calls of compiled code: "
        f"{data['width']} wide, {data['tokens']} tokens, one thread, {data['rounds']} rounds of {data['batch']} "
        f"forwards in turns, beside diffusers' own compilation (bar {data['bar']}, for the better engine).",
        "\n".join(lines),
        machine(data),
    ]


def prediction(data: Mapping[str, Any]) -> list[str]:
    lines = ["| pipeline | rows | median error | 95th percentile | beside calls' medians |", "|---|--:|--:|--:|--:|"]
    everything = [row for one in data["pipelines"] for row in one["rows"]]
    for name, own in (*((one["pipeline"], one["rows"]) for one in data["pipelines"]), ("all", everything)):
        errors, beside = ([row[key] for row in own] for key in ("error", "error_of_median"))
        high, other = (float(np.quantile(found, 0.95)) for found in (errors, beside))
        lines.append(f"| {name} | {len(own)} | {median(errors):.1%} | {high:.1%} | {median(beside):.1%}, {other:.1%} |")
    return [
        "## Seconds that were predicted",
        f"Stacks at sizes that no cost was taken at, by costs of {min(len(row['seconds']) for row in everything)} "
        "rounds in turns with the calls: the prediction beside the lower quartile of a row's calls, which is what both "
        "mean by a call that nothing disturbs; the last column has the same errors, median and 95th percentile, beside "
        "the calls' medians.",
        "\n".join(lines),
        machine(data),
    ]


def tuning(data: Mapping[str, Any]) -> list[str]:
    parts = [
        f"## A search of {data['minutes']:.0f} minutes: {data['pipeline']}",
        f"{data['trials']} trials on {data['prompts']} training prompts, of which {data['finished']} were run to their "
        f"end. Then {data['tested']} held-out prompts: quality is the embedded judge's, and a difference (winner less "
        f"the other, paired) is shown with its interval. {data['plain_seconds']:.2f} s plain.",
    ]
    for found in data["winners"]:
        lines = [f"| at least {found['factor']:g} times | seconds | quality | winner less it |", "|---|--:|--:|--:|"]
        winner = found["winner"]
        if winner is None:
            parts.append(f"No stack of {found['factor']:g} times was found.")
            continue
        lines.append(f"| winner: {_made(winner)} | |")
        rivals = [*found["presets"], *([found["plain"]] if found["plain"] else [])]
        for one in rivals:
            name = f"plain, {one['steps']} steps" if "steps" in one else None
            lines.append(f"| {_made(one['made'], name)} | {interval(one['difference'], 3)} |")
        parts.append("\n".join(lines))
    return [*parts, machine(data)]


def nothing_changed(data: Mapping[str, Any]) -> list[str]:
    own = {planted: [one for one in data["rows"] if one["planted"] is planted] for planted in (False, True)}
    lines = ["| later runs | pairs | said of the stack | stack's time, later over earlier | plain's |"]
    lines.append("|---|--:|---|--:|--:|")
    for planted, name in ((False, "unchanged"), (True, f"{data['slower']:.0%} slower")):
        said = data["slowed" if planted else "unchanged"]
        if not said:
            continue
        told = ", ".join(f"{verdict} {count}" for verdict, count in said.items())
        ranges = []
        for row in ("stack", "plain"):
            times = [one["time"]["estimate"] for one in own[planted] if one["row"] == row]
            ranges.append(f"{min(times):.3f} to {max(times):.3f}")
        lines.append(f"| {name} | {sum(said.values())} | {told} | {' | '.join(ranges)} |")
    judged = [one for one in data["rows"] if one["verdict"] in ("faster", "slower")]
    held = sum(one["time"]["low"] <= 1.0 <= one["time"]["high"] for one in judged)
    older = f" {held} of these verdicts has an interval that holds 1, and would be `not shown` today." if held else ""
    return [
        f"## Two runs of one experiment, of {data['rounds']} rounds",
        "What `fastdit compare` says of pairs of real runs, each in a process of its own, one after the other: where "
        "nothing changed, and where the stack's forwards wait for a part of their time. Times of the stack are those "
        "over the plain pipeline's of the same round; the plain pipeline's are seconds." + older,
        "\n".join(lines),
        machine(data),
    ]


def _made(made: Mapping[str, Any], name: str | None = None) -> str:
    qualities = made["qualities"]
    return f"{name or made['stack']} | {made['seconds']:.2f} | {sum(qualities) / len(qualities):.3f}"


SECTIONS = (
    ("flops", flops),
    ("flops-sd3-medium", flops),
    ("overhead", overhead),
    ("overhead-mini", overhead),
    ("efficiency", efficiency),
    ("engines", engines),
    ("host-time", host_time),
    ("composition", composition),
    ("prediction", prediction),
    ("nothing-changed", nothing_changed),
    ("slowdown", nothing_changed),
    ("tuning-mini", tuning),
    ("tuning-mini-sd3", tuning),
)


def main() -> None:
    """Write the page from whatever results are there, and what other pages show of them and of the classes."""
    parts = ["# Results", "Written by `benchmarks/report.py` from the JSON files in `benchmarks/results/`."]
    for name, section in SECTIONS:
        if (path := RESULTS / f"{name}.json").exists():
            parts += section(json.loads(path.read_text(encoding="utf-8")))
    if (path := RESULTS / "quality.json").exists():
        parts += quality(load(path))
    if (path := RESULTS / "quality-fast.json").exists():
        parts += quality(load(path), "About six times faster, and more")
    if (path := RESULTS / "presets-flux.json").exists():
        parts += quality(load(path), "FLUX's presets on the embedded pipeline")
    for mini, title in (("flux", "Schedules on the embedded pipeline"), ("sd3", "Schedules on its SD3 sister")):
        if (path := RESULTS / f"spatial-{mini}.json").exists():
            parts += spatial(load(path), title)
    if (path := RESULTS / "spatial-flux-512.json").exists():
        parts += quality(load(path), "Spatial schedules on the larger embedded pipeline")
    if (path := RESULTS / "parts.json").exists():
        parts += exchanged(load(path))
    if (path := RESULTS / "caching.json").exists():
        parts += caching(load(path))
    if (path := RESULTS / "isolation.json").exists():
        parts += isolation(json.loads(path.read_text(encoding="utf-8")))
    for architecture, path in EVALUATIONS.items():
        if path.exists():
            parts += evaluation(json.loads(path.read_text(encoding="utf-8")), architecture)
    if LARGE_EVALUATION.exists():
        parts += large_evaluation(json.loads(LARGE_EVALUATION.read_text(encoding="utf-8")))
    pages.write()
    (ROOT / "docs" / "results.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
