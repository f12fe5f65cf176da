"""The costs of one pipeline on one machine, as data, and where they are kept: $FASTDIT_CACHE/costs."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from math import log
from pathlib import Path
from statistics import median
from typing import Any

from fastdit.engine.key import environment_of
from fastdit.engine.places import cache_home, made
from fastdit.errors import InvalidConfig
from fastdit.models.components import transformers_of
from fastdit.predict.curve import Curve

#: Raised whenever what is kept changes its meaning.
FORMAT = 2


@dataclass(frozen=True)
class BlockCost:
    """One block of a list, of which the model calls `count`: seconds and FLOPs."""

    count: int
    seconds: Curve
    flops: Curve


@dataclass(frozen=True)
class Probe:
    """What a stack did in runs of one size, of so many image tokens at its finest.

    `shares` is the mean share of the blocks' FLOPs that each step spent, `outer` that of what is outside the blocks;
    `low` and `high` are the least and the most that one run spent over the mean; `factor` is what the run's forwards
    took over what the model says of them, which is a token cache's own work.
    """

    tokens: int
    shares: tuple[float, ...]
    outer: tuple[float, ...]
    low: float
    high: float
    factor: float

    @classmethod
    def at(cls, probes: Sequence[Probe], tokens: int) -> Probe:
        """Say what a stack does at a size between or beyond those of its probes, of which there is at least one.

        Everything is linear in the logarithm of the tokens, since a larger picture changes less from step to step and
        a cache skips more of it; beyond the probes only as far as twice, or half, of their tokens.
        """
        known = sorted(probes, key=lambda one: one.tokens)
        if len(known) == 1:
            return replace(known[0], tokens=tokens)
        small, large = min(pairwise(known), key=lambda two: abs(log(tokens**2 / (two[0].tokens * two[1].tokens))))
        reached = min(max(tokens, small.tokens / 2), 2 * large.tokens)
        part = log(reached / small.tokens) / log(large.tokens / small.tokens)

        def between(first: float, last: float) -> float:
            return first + part * (last - first)

        def shares(first: Sequence[float], last: Sequence[float]) -> tuple[float, ...]:
            return tuple(min(max(between(*each), 0.0), 1.0) for each in zip(first, last, strict=True))

        return cls(
            tokens,
            shares(small.shares, large.shares),
            shares(small.outer, large.outer),
            min(small.low, large.low),
            max(small.high, large.high),
            max(between(small.factor, large.factor), 0.0),
        )


#: How far repeated timings of the same work may be apart, as a part of the least, for costs to be called steady.
STEADY = 0.25

#: Repeats below which nothing is said of them.
_FEWEST = 4


@dataclass(frozen=True)
class Steadiness:
    """How far repeated timings of the same work were apart when costs were taken: of what was the least steady.

    `spread` is how far their median is above the least, `drift` how far the last half's median is from the first
    half's, both as parts. `noisy` says that one of them is above `STEADY`.
    """

    what: str
    repeats: int
    spread: float
    drift: float
    noisy: bool

    @classmethod
    def of(cls, timings: Mapping[str, Sequence[float]]) -> Steadiness | None:
        """Judge repeated timings by name, each in the order of time; None where nothing was repeated enough.

        >>> Steadiness.of({"a block": [1.0, 1.0, 1.5, 1.5, 1.5]}).drift
        0.5
        """
        judged = [cls._judged(what, seconds) for what, seconds in timings.items() if len(seconds) >= _FEWEST]
        return max(judged, key=lambda one: max(one.spread, abs(one.drift)), default=None)

    @classmethod
    def _judged(cls, what: str, seconds: Sequence[float]) -> Steadiness:
        half = len(seconds) // 2
        spread = median(seconds) / min(seconds) - 1.0
        drift = median(seconds[half:]) / median(seconds[:half]) - 1.0
        return cls(what, len(seconds), spread, drift, max(spread, abs(drift)) > STEADY)

    def __str__(self) -> str:
        return (
            f"of {self.repeats} timings of {self.what} the median is {self.spread:.0%} above the least, and the last "
            f"half {abs(self.drift):.0%} {'above' if self.drift > 0 else 'below'} the first"
        )


@dataclass(frozen=True)
class CostModel:
    """Seconds, FLOPs and bytes of a pipeline's parts as functions of rows and image tokens.

    `rows` is how many rows a forward has for each image (2 with both branches in one batch), `forwards` how many there
    are a step. `rest` is a forward without its blocks; `call` and `step` are seconds outside of the forwards, once and
    each step; `decode` and `encode` are the autoencoder's. `weights` are bytes, and so are `forward_bytes` and
    `decode_bytes`, the most that is alive beside them. `engines` holds a block's seconds under an engine, `probes` what
    stacks did, by their texts and steps. `error` is the mean relative error of the fit at its own points, `steadiness`
    tells whether the machine was busy with something else; None for costs of a version that did not ask.
    """

    pipeline: str
    machine: str
    rows: int
    forwards: int
    sizes: tuple[int, ...]
    blocks: Mapping[str, BlockCost]
    rest: BlockCost
    call: float
    step: float
    decode: Curve
    encode: Curve
    weights: int
    forward_bytes: Curve
    decode_bytes: Curve
    error: float
    engines: Mapping[str, Mapping[str, Curve]] = field(default_factory=dict)
    probes: Mapping[str, tuple[Probe, ...]] = field(default_factory=dict)
    steadiness: Steadiness | None = None

    @property
    def doubt(self) -> float:
        """How far the costs may be off because of noise, as a part of them; 0 for steady ones."""
        found = self.steadiness
        return max(found.spread, abs(found.drift)) if found is not None and found.noisy else 0.0

    @property
    def warning(self) -> str | None:
        """Say that the costs are noisy, by how much, and what to do; None for steady ones."""
        if not self.doubt:
            return None
        return (
            f"these costs are noisy: {self.steadiness}; something else ran when they were taken, so take them again "
            "when nothing else does: fastdit plan PIPE --measure"
        )

    def to_json(self) -> dict[str, Any]:
        """Give the model as plain data."""
        return {"format": FORMAT, **dataclasses.asdict(self)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> CostModel:
        """Make a model of what `to_json` gave. Raises `InvalidConfig` for another version, or what is none."""
        try:
            if data["format"] != FORMAT:
                raise InvalidConfig(f"these costs have version {data['format']}, and this reads {FORMAT}; measure anew")
            values = {**data}
            del values["format"]
            for name in ("decode", "encode", "forward_bytes", "decode_bytes"):
                values[name] = Curve(**data[name])
            if data.get("steadiness") is not None:
                values["steadiness"] = Steadiness(**data["steadiness"])
            values["rest"] = _block(data["rest"])
            values["blocks"] = {name: _block(one) for name, one in data["blocks"].items()}
            values["engines"] = {
                engine: {name: Curve(**one) for name, one in own.items()} for engine, own in data["engines"].items()
            }
            values["probes"] = {
                name: tuple(
                    Probe(**{**one, "shares": tuple(one["shares"]), "outer": tuple(one["outer"])}) for one in each
                )
                for name, each in data["probes"].items()
            }
            return cls(**{**values, "sizes": tuple(data["sizes"])})
        except (KeyError, TypeError, AttributeError) as error:
            raise InvalidConfig(f"these are no costs of a pipeline: {error!r}; measure them anew") from error


def _block(data: Mapping[str, Any]) -> BlockCost:
    return BlockCost(data["count"], Curve(**data["seconds"]), Curve(**data["flops"]))


def place_of(pipeline: Any) -> Path:
    """Give the file of a pipeline's costs on this machine: another one for every model, precision, device, version."""
    device = pipeline._execution_device
    parts = [f"format {FORMAT}", type(pipeline).__name__, repr(environment_of(device))]
    for name, module in sorted(transformers_of(pipeline).items()):
        parts.append(f"{name} {type(module).__name__} {module.dtype} {dict(getattr(module, 'config', {}))!r}")
    vae = getattr(pipeline, "vae", None)
    parts.append(f"{type(vae).__name__} {dict(getattr(vae, 'config', {}))!r}")
    return cache_home() / "costs" / f"{hashlib.sha256(chr(10).join(parts).encode()).hexdigest()[:32]}.json"


def kept_model(pipeline: Any) -> CostModel | None:
    """Read the costs that were measured of a pipeline on this machine; None where none are kept."""
    path = place_of(pipeline)
    if not path.is_file():
        return None
    try:
        return CostModel.from_json(json.loads(path.read_text(encoding="utf-8")))
    except ValueError as error:
        raise InvalidConfig(f"{path} can't be read: {error}; remove it, and measure anew") from error


def keep_model(pipeline: Any, model: CostModel) -> Path:
    """Keep a pipeline's costs; give the file."""
    path = place_of(pipeline)
    made(path.parent)
    partial = path.with_suffix(".part")
    partial.write_text(json.dumps(model.to_json()) + "\n", encoding="utf-8")
    partial.replace(path)
    return path
