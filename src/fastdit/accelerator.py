"""The levels of a stack and what an accelerator of each level declares.

An accelerator is a frozen dataclass: configuration and plug-in at once. It declares its effects as data and never
names another accelerator; `fastdit.stack` derives what goes together. Whatever it must remember lives in a state
object that is made for one run and dies with it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from enum import Enum
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from .errors import InvalidConfig

if TYPE_CHECKING:
    import torch

    from .attention.seeing import SeenAttention
    from .layout import TokenLayout
    from .models.family import Family
    from .run import StepContext


class Level(Enum):
    """Where an accelerator acts, outermost first. The level, not the order in the list, decides the nesting."""

    SCHEDULE = "schedule"
    STEP_CACHE = "step cache"
    TOKEN_CACHE = "token cache"
    ATTENTION = "attention"
    ENGINE = "engine"


class Change(Enum):
    """What an accelerator, or the state of a model, alters for everything that runs inside it."""

    TOKEN_COUNT = "the number of tokens between stages"
    TIMESTEPS = "the timesteps of the run"
    STEP_ORDER = "which steps run the block stack"
    ARITHMETIC_ORDER = "the order of floating-point operations"
    BATCH_ROWS = "which images of a batch run through a block together"
    ACTIVATION_PRECISION = "the precision of activations, which it rounds to a few bits"
    SHARED_SEQUENCE = "where the tokens are, each rank holding a part of them"
    ATTENTION_BACKEND = "what its attention is handed to"
    BLOCK_PARTS = "which parts of a block run"
    COMPILED_ATTENTION = "where its attention is computed, inside compiled code"
    KEY_PLACES = "the places of keys, which differ from query to query"


class Need(Enum):
    """What an accelerator requires of the model or of the run."""

    BLOCK_LISTS = "block lists whose streams can be observed"
    MODULATED_SIGNAL = "the first block's modulated input"
    FRAME_SIZES = "latents whose frame can have another size at each stage"
    TOKEN_POSITIONS = "token positions that can be set"
    FIXED_TOKENS = "one token set for the whole run"
    OWN_TIMESTEPS = "the pipeline's own timesteps"
    TOKEN_GRID = "the rows and columns of the image tokens, in one plane"
    SEPARABLE_ROWS = "blocks that treat the images of a batch one by one"
    FIXED_ROWS = "the same images in every block call"
    PRECISE_ACTIVATIONS = "activations that are not rounded, since an extrapolation amplifies what rounding adds"
    WHOLE_FRAME = "all the image's tokens in one place"
    PLAIN_ATTENTION = "attention that is torch's scaled_dot_product_attention"
    WHOLE_BLOCKS = "blocks that run as a whole"
    SEEN_ATTENTION = "attention whose calls can be seen"
    ONE_FRAME = "attention in which a key has one place for all queries"


class Break(Enum):
    """Which guarantee of the plain pipeline no longer holds."""

    BIT_EXACTNESS = "outputs are no longer bit-equal to the plain pipeline's"
    BATCH_INVARIANCE = "an image may depend on its batch-mates"
    SEED_IMAGE = "a seed no longer gives the plain pipeline's image"
    WHOLE_GRAPH = "the forward can't be compiled as one graph: a decision is read between its blocks"


#: A need that is violated by a change. Conflicts are derived from this, never listed in pairs.
VIOLATIONS: dict[Need, Change] = {
    Need.FIXED_TOKENS: Change.TOKEN_COUNT,
    Need.OWN_TIMESTEPS: Change.TIMESTEPS,
    Need.FIXED_ROWS: Change.BATCH_ROWS,
    Need.PRECISE_ACTIVATIONS: Change.ACTIVATION_PRECISION,
    Need.WHOLE_FRAME: Change.SHARED_SEQUENCE,
    Need.PLAIN_ATTENTION: Change.ATTENTION_BACKEND,
    Need.WHOLE_BLOCKS: Change.BLOCK_PARTS,
    Need.SEEN_ATTENTION: Change.COMPILED_ATTENTION,
    Need.ONE_FRAME: Change.KEY_PLACES,
}


@dataclasses.dataclass(frozen=True)
class Effects:
    """What one configuration changes, needs and breaks."""

    changes: frozenset[Change] = frozenset()
    needs: frozenset[Need] = frozenset()
    breaks: frozenset[Break] = frozenset()

    def adding(
        self, *, changes: Iterable[Change] = (), needs: Iterable[Need] = (), breaks: Iterable[Break] = ()
    ) -> Effects:
        """Give these effects with more of them."""
        return Effects(self.changes | {*changes}, self.needs | {*needs}, self.breaks | {*breaks})


_REGISTRY: dict[str, type[Any]] = {}
_Type = TypeVar("_Type", bound=type[Any])


def register(cls: _Type) -> _Type:
    """Allow a configuration class to be named in a stack's JSON. Raises `InvalidConfig` for a name already taken."""
    if _REGISTRY.get(cls.__name__, cls) is not cls:
        raise InvalidConfig(f"the configuration name {cls.__name__!r} is already registered; rename the new class")
    _REGISTRY[cls.__name__] = cls
    return cls


def _load_type(name: str) -> None:
    """Import what may register a configuration of this name: the library's own, then an installed adapter's.

    An adapter names its classes as entry points of the group `fastdit.accelerators`; only the one asked for is loaded.
    """
    import fastdit

    for public in fastdit.__all__:
        getattr(fastdit, public)
    entry = None if name in _REGISTRY else next(iter(entry_points(group="fastdit.accelerators", name=name)), None)
    if entry is not None:
        try:
            entry.load()
        except (ImportError, AttributeError) as error:
            raise InvalidConfig(
                f"{name!r} belongs to {entry.value}, an installed adapter that can't be imported: {error}"
            ) from error


def encode(value: Any) -> Any:
    """Turn a registered configuration into plain JSON data, nested configurations included."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        name = type(value).__name__
        if name not in _REGISTRY:
            raise InvalidConfig(f"{name} is not a registered configuration; decorate its class with @register")
        return {"type": name, **{f.name: encode(getattr(value, f.name)) for f in dataclasses.fields(value)}}
    if isinstance(value, (tuple, list)):
        return [encode(item) for item in value]
    return value


def decode(data: Any, where: str = "stack") -> Any:
    """Rebuild what `encode` wrote. Raises `InvalidConfig` for a type, a field or a value that is not allowed."""
    if isinstance(data, list):
        return tuple(decode(item, f"{where}[{index}]") for index, item in enumerate(data))
    if not isinstance(data, dict):
        return data
    fields = dict(data)
    name = fields.pop("type", None)
    if isinstance(name, str) and name not in _REGISTRY:
        _load_type(name)
    if not isinstance(name, str) or name not in _REGISTRY:
        known = ", ".join(sorted(_REGISTRY))
        raise InvalidConfig(
            f"{where}: unknown type {name!r}; the allowed types are {known}, and those of adapters once installed"
        )
    cls = _REGISTRY[name]
    allowed = {f.name for f in dataclasses.fields(cls)}
    if unknown := sorted(set(fields) - allowed):
        raise InvalidConfig(f"{where}: {name} has no field {', '.join(unknown)}; its fields are {sorted(allowed)}")
    arguments = {key: decode(value, f"{where}.{key}") for key, value in fields.items()}
    try:
        return cls(**arguments)
    except TypeError as error:
        raise InvalidConfig(f"{where}: {name} can't be built from {sorted(arguments)}: {error}") from error


def is_number(value: Any) -> bool:
    """Whether a configuration's value is a finite real number (True and False are not)."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def is_count(value: Any, least: int = 0) -> bool:
    """Whether a configuration's value is a whole number of at least `least`."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


@dataclasses.dataclass(frozen=True)
class Accelerator:
    """Base of every accelerator: a level and its declared effects.

    A class declares `changes`, `needs` and `breaks`; `effects` gives those of one configuration, which may be more.
    """

    level: ClassVar[Level]
    changes: ClassVar[frozenset[Change]] = frozenset()
    needs: ClassVar[frozenset[Need]] = frozenset()
    breaks: ClassVar[frozenset[Break]] = frozenset()

    @property
    def effects(self) -> Effects:
        """What this configuration changes, needs and breaks."""
        return Effects(self.changes, self.needs, self.breaks)

    @property
    def neutral(self) -> bool:
        """Whether this configuration asks for no change at all, so that never firing is what was wanted."""
        return False

    def check(self, pipeline: Any, transformer: Any) -> None:
        """Raise a named error if this model can't carry the accelerator. Nothing has been changed yet."""

    def describe(self) -> str:
        """Give the configuration in one line for plans and tables."""
        shown = []
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            default = field.default_factory() if callable(field.default_factory) else field.default
            if value != default or not (field.kw_only or value is None):
                shown.append(f"{field.name}={value!r}")
        return f"{type(self).__name__}({', '.join(shown)})"


@dataclasses.dataclass(frozen=True)
class StagePlan:
    """One stage of a run: its noise levels and its tokens.

    `sigmas` has one entry more than the stage has steps (its last is the stage's end), or is None where the
    pipeline's own scheduler decides. `tokens` counts image tokens, None where the model's layout is unknown.
    """

    index: int
    layout: str
    tokens: int | None
    steps: int
    sigmas: tuple[float, ...] | None = None


@dataclasses.dataclass(frozen=True)
class SchedulePlan:
    """The stages that a schedule chose for one image size and step count, with remarks for the reader."""

    stages: tuple[StagePlan, ...]
    rows: int
    columns: int
    notes: tuple[str, ...] = ()

    @property
    def steps(self) -> int:
        return sum(stage.steps for stage in self.stages)

    def at(self, index: int) -> tuple[int, int]:
        """Give the stage of a step of the run, and its number in that stage."""
        stage = 0
        while stage + 1 < len(self.stages) and index >= self.stages[stage].steps:
            index -= self.stages[stage].steps
            stage += 1
        return stage, index


@dataclasses.dataclass(frozen=True)
class Schedule(Accelerator):
    """An accelerator that owns the timesteps and the token layout of a run's stages."""

    level: ClassVar[Level] = Level.SCHEDULE

    def plan(self, rows: int, columns: int, num_inference_steps: int | None) -> SchedulePlan:
        """Choose the stages for a grid of `rows` x `columns` image tokens; None means the schedule's own count."""
        raise NotImplementedError

    def begin(self, plan: SchedulePlan, family: Family, pipeline: Any, generator: Any) -> ScheduleRun:
        """Make the state of one run."""
        raise NotImplementedError


class ScheduleRun:
    """What a schedule does in one run; made by `Schedule.begin` and dropped at the run's end."""

    def initial(self, latents: torch.Tensor) -> tuple[torch.Tensor, TokenLayout]:
        """Turn the pipeline's full-size unit noise into the first stage's latents and layout.

        Latents are in the pipeline's own shape throughout. Every forward of the first step calls this with its own
        batch, so it depends on nothing but the noise.
        """
        raise NotImplementedError

    def resume(
        self, stage: int, latents: torch.Tensor, clean: torch.Tensor, sigma: float
    ) -> tuple[torch.Tensor, TokenLayout]:
        """Turn a picture with noise of level `sigma`, at full size, into the latents and layout of `stage`.

        A run that does not begin with noise alone begins there; `clean` are the picture's own latents. Like `initial`
        it is called by every forward of the first step.
        """
        raise NotImplementedError

    def forced(self, stage: int, stage_step: int) -> str | None:
        """Say why a step must run every block on every token, whatever caches would do; None where they decide."""
        return None

    def attending(self, context: StepContext, transformer: Any, arguments: Mapping[str, Any]) -> SeenAttention | None:
        """Give what sees, and may answer, the attention of one forward; nothing by default.

        `arguments` are the forward's own, with the stage's latents in place.
        """
        return None

    def observe(self, velocity: torch.Tensor) -> None:
        """See the velocity that a step was taken with, in the pipeline's shape; nothing by default."""

    def transition(self, stage: int, latents: torch.Tensor, denoised: torch.Tensor) -> tuple[torch.Tensor, TokenLayout]:
        """Turn the last latents of `stage` into the next stage's, given the estimate of the clean latents."""
        raise NotImplementedError

    def lift(self, latents: torch.Tensor) -> torch.Tensor:
        """Bring latents of whatever stage the run stands in to the full grid, for a run that was interrupted."""
        raise NotImplementedError
