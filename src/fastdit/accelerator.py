"""The levels of a stack and what an accelerator of each level declares.

An accelerator is a frozen dataclass: configuration and plug-in at once. It declares its effects as data and never
names another accelerator; `fastdit.stack` derives what goes together. Whatever it must remember lives in a state
object that is made for one run and dies with it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from enum import Enum
from typing import TYPE_CHECKING, Any, ClassVar

from fastdit.config import Config

if TYPE_CHECKING:
    from fastdit.blocks.chain import Pass
    from fastdit.run import Run


class Level(Enum):
    """Where an accelerator acts, outermost first. The level, not the order in the list, decides the nesting."""

    SCHEDULE = "schedule"
    WEIGHTS = "weights"
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
    CARRIED_TOKENS = "tokens that can be followed through a switch of stages, in one plane"


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


@dataclasses.dataclass(frozen=True)
class Accelerator(Config):
    """Base of every accelerator: a level and its declared effects.

    Its fields are checked against their annotations. A class declares the `changes`, `needs` and `breaks` that it adds
    to its bases', whose own hold for it too; `effects` gives those of one configuration, which may be more.
    """

    level: ClassVar[Level]
    changes: ClassVar[frozenset[Change]] = frozenset()
    needs: ClassVar[frozenset[Need]] = frozenset()
    breaks: ClassVar[frozenset[Break]] = frozenset()

    @property
    def effects(self) -> Effects:
        """What this configuration changes, needs and breaks."""
        changes, needs, breaks = (_declared(type(self), name) for name in ("changes", "needs", "breaks"))
        return Effects(changes, needs, breaks)

    @property
    def neutral(self) -> bool:
        """Whether this configuration asks for no change at all, so that never firing is what was wanted."""
        return False

    def check(self, pipeline: Any, transformer: Any) -> None:
        """Raise a named error if this model can't carry the accelerator. Nothing has been changed yet."""

    def lasting(self) -> Any:
        """Make what lives as long as a twin and is shared by its runs: what was learned of a model, engines."""
        return None

    def remarks(self, models: Sequence[Any], stages: int, lasting: Any) -> Iterable[str]:
        """Give what a plan says of this on such models: the engines that are needed, the memory that is taken."""
        return ()

    def enter(self, run: Run, lasting: Any) -> Pass | None:
        """Give what acts in one run; None where nothing is to be done in it. `lasting` is what `lasting` made."""
        raise NotImplementedError

    def describe(self) -> str:
        """Give the configuration in one line for plans and tables."""
        shown = []
        for field in dataclasses.fields(self):
            if not field.init:
                continue  # derived from the others
            value = getattr(self, field.name)
            default = field.default_factory() if callable(field.default_factory) else field.default
            if value != default or not (field.kw_only or value is None):
                shown.append(f"{field.name}={value!r}")
        return f"{type(self).__name__}({', '.join(shown)})"


def _declared(cls: type[Accelerator], name: str) -> frozenset[Any]:
    """Join what a class and all of its bases declare under a name, so that no subclass can lose an effect."""
    return frozenset().union(*(vars(base).get(name, ()) for base in cls.__mro__))
