"""`Stack`: accelerators that act together; it derives what goes together, checks a pipeline, saves itself."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from fastdit.accelerator import VIOLATIONS, Accelerator, Level, Need
from fastdit.attention.base import AttentionKernel
from fastdit.config import decode, encode, parsed, shown
from fastdit.engine.base import Engine
from fastdit.errors import IncompatibleStack, InvalidConfig, UnsupportedModel
from fastdit.models.components import require_block_lists, require_family, transformers_of
from fastdit.models.undescribed import why_not
from fastdit.plan import make_plan
from fastdit.schedule.base import Schedule
from fastdit.step_cache.base import StepCache
from fastdit.token_cache.base import TokenCache
from fastdit.twins.foreign_state import changes_of

VERSION = 2
_FILE = "stack.json"


class Stack(Sequence[Accelerator]):
    """Accelerators that act together, ordered by level. Raises `IncompatibleStack` if two can't."""

    def __init__(self, accelerators: Iterable[Accelerator] | Accelerator = ()) -> None:
        if not isinstance(accelerators, (Accelerator, Iterable)):
            raise InvalidConfig(f"a stack is made of accelerators, got {shown(accelerators)}; write [RALU('4x'), ...]")
        given = (accelerators,) if isinstance(accelerators, Accelerator) else tuple(accelerators)
        for accelerator in given:
            if not isinstance(accelerator, Accelerator):
                raise InvalidConfig(
                    f"a stack is made of accelerators, got {shown(accelerator)}; write RALU('4x'), TeaCache(0.25), ..."
                )
        order = list(Level)
        self._accelerators = tuple(sorted(given, key=lambda accelerator: order.index(accelerator.level)))
        self._check_declarations()

    def __getitem__(self, index: Any) -> Any:
        return self._accelerators[index]

    def __len__(self) -> int:
        return len(self._accelerators)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Stack) and self._accelerators == other._accelerators

    def __hash__(self) -> int:
        return hash(self._accelerators)

    def __repr__(self) -> str:
        return f"Stack([{', '.join(accelerator.describe() for accelerator in self)}])"

    @property
    def schedule(self) -> Schedule | None:
        """The accelerator of the schedule level, if any."""
        return next((accelerator for accelerator in self if isinstance(accelerator, Schedule)), None)

    @property
    def step_cache(self) -> StepCache | None:
        """The accelerator of the step-cache level, if any."""
        return next((accelerator for accelerator in self if isinstance(accelerator, StepCache)), None)

    @property
    def token_cache(self) -> TokenCache | None:
        """The accelerator of the token-cache level, if any."""
        return next((accelerator for accelerator in self if isinstance(accelerator, TokenCache)), None)

    @property
    def attention(self) -> AttentionKernel | None:
        """The accelerator of the attention level, if any."""
        return next((accelerator for accelerator in self if isinstance(accelerator, AttentionKernel)), None)

    @property
    def engine(self) -> Engine | None:
        """The accelerator of the engine level, if any."""
        return next((accelerator for accelerator in self if isinstance(accelerator, Engine)), None)

    def _check_declarations(self) -> None:
        """Derive every conflict from what the accelerators declare."""
        for level in Level:
            names = [accelerator.describe() for accelerator in self if accelerator.level is level]
            if len(names) > 1:
                raise IncompatibleStack(
                    f"{' and '.join(names)} both decide the {level.value} level, where one must rule; keep one of them"
                )
        for one in self:
            for other in self:
                for need in one.effects.needs:
                    if one is not other and VIOLATIONS.get(need) in other.effects.changes:
                        raise IncompatibleStack(
                            f"{one.describe()} needs {need.value}, and {other.describe()} changes "
                            f"{VIOLATIONS[need].value}; drop one of them"
                        )
        if self.attention is not None and self.schedule is None:
            self.attention.check_stages(1)

    def check(self, pipeline: Any = None) -> None:
        """Raise a named error if the stack can't run on this pipeline or bare module; nothing is changed."""
        self._check_declarations()
        if pipeline is not None:
            transformers = transformers_of(pipeline)
            for accelerator in self:
                if accelerator.effects.needs & {Need.FRAME_SIZES, Need.TOKEN_POSITIONS, Need.TOKEN_GRID}:
                    self._check_family(pipeline, accelerator)
                if Need.BLOCK_LISTS in accelerator.effects.needs:
                    require_block_lists(transformers, accelerator)
                for transformer in transformers.values():
                    accelerator.check(pipeline, transformer)
            for name, transformer in transformers.items():
                self.check_state(name, transformer)

    def _check_family(self, pipeline: Any, accelerator: Accelerator) -> None:
        """Raise `UnsupportedModel` if the tokens of a pipeline's family are not as an accelerator needs them."""
        family, needs = require_family(pipeline, accelerator), accelerator.effects.needs
        if Need.TOKEN_POSITIONS in needs and not family.mixes:
            raise UnsupportedModel(
                f"{accelerator.describe()} must place tokens, and can't in {type(pipeline).__name__}, whose stages "
                f"are whole frames: {why_not(type(pipeline))}; take a schedule of whole frames, such as "
                "ProgressiveResolution"
            )
        if family.one_plane:
            return
        frames = f"{type(pipeline).__name__}'s fill one for each of several frames"
        if Need.TOKEN_GRID in needs:
            raise UnsupportedModel(
                f"{accelerator.describe()} needs {Need.TOKEN_GRID.value}, and {frames}; use another, such as "
                "FirstBlockCache"
            )
        if Need.FRAME_SIZES in needs:
            for other in self:
                if Need.CARRIED_TOKENS in other.effects.needs:
                    raise UnsupportedModel(
                        f"{other.describe()} needs {Need.CARRIED_TOKENS.value}, and {frames}; set stage_change='reset'"
                    )

    def check_state(self, name: str, module: nn.Module) -> None:
        """Raise `IncompatibleStack` if the state that a transformer is in changes what an accelerator needs."""
        violable = [(one, need) for one in self for need in one.effects.needs if need in VIOLATIONS]
        for made in changes_of(module) if violable else ():
            for accelerator, need in violable:
                if VIOLATIONS[need] is made.change:
                    raise IncompatibleStack(
                        f"{accelerator.describe()} needs {need.value}, and {name} ({type(module).__name__}) changes "
                        f"{made.change.value} ({made.cause}); {made.remedy}"
                    )

    def explain(
        self,
        pipeline: Any,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
    ) -> str:
        """Give the plan of a call as readable text: stages, tokens, noise levels, and what acts where."""
        return str(make_plan(self, pipeline, height, width, num_inference_steps))

    def to_json(self) -> dict[str, Any]:
        """Give the stack as plain, versioned data."""
        return {"fastdit_stack": VERSION, "accelerators": [encode(accelerator) for accelerator in self]}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Stack:
        """Rebuild a stack. Raises `InvalidConfig` for another version, an unknown type or an unknown field."""
        if not isinstance(data, Mapping) or set(data) != {"fastdit_stack", "accelerators"}:
            raise InvalidConfig("a stack's JSON has exactly the keys 'fastdit_stack' and 'accelerators'")
        version = data["fastdit_stack"]
        if type(version) is not int or not 1 <= version <= VERSION:
            raise InvalidConfig(
                f"this stack was written in version {shown(version)} and this fastdit reads {VERSION} and older; "
                "write it again with a matching release"
            )
        if not isinstance(data["accelerators"], list):
            raise InvalidConfig("'accelerators' must be a list of accelerators")
        if version == 1:
            for item in data["accelerators"]:
                _refuse_two_stages_named_ralu(item)
        return cls(decode(item, f"accelerators[{index}]") for index, item in enumerate(data["accelerators"]))

    def save_pretrained(self, directory: str | Path) -> None:
        """Write stack.json into a directory, which is made if needed."""
        Path(directory).mkdir(parents=True, exist_ok=True)
        (Path(directory) / _FILE).write_text(json.dumps(self.to_json(), indent=2) + "\n", encoding="utf-8")

    @classmethod
    def from_pretrained(cls, directory: str | Path) -> Stack:
        """Read what `save_pretrained` wrote."""
        return cls.from_json(parsed(Path(directory) / _FILE, "Stack.save_pretrained"))


def _refuse_two_stages_named_ralu(item: object) -> None:
    """Raise `InvalidConfig` for a RALU of the first version, whose presets were two stages of whole frames."""
    if isinstance(item, Mapping) and item.get("type") == "RALU" and not item.get("ratio"):
        given = shown(item["preset"]) if item.get("preset") else f"steps={shown(item.get('steps'))}"
        raise InvalidConfig(
            "this stack was written when RALU's presets had no region-adaptive stage; what it means is now written "
            f"ProgressiveResolution({given}, ...)"
        )
