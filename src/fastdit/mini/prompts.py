"""The language of the mini model: what a picture can show, how a prompt says it, and which prompts training never saw.

A `Scene` holds what was *asked for*. Whatever it leaves open (``None``) the renderer, and the model, may choose freely.
This module imports nothing heavy, so that prompts can be listed without loading torch.
"""

from __future__ import annotations

import itertools
import random
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

OBJECTS = (
    "apple",
    "banana",
    "ball",
    "star",
    "heart",
    "car",
    "tree",
    "umbrella",
    "mushroom",
    "butterfly",
    "fish",
    "penguin",
    "cat",
    "pig",
    "grapes",
    "watermelon",
    "house",
    "tulip",
    "doughnut",
    "crab",
)
BACKGROUNDS = ("white", "gray", "black", "orange", "green", "blue", "purple", "pink")
SIZES = ("small", "big")
PLACES = ("left", "right", "top", "bottom", "center")
RELATIONS = ("left of", "right of", "above", "below")

Kind = Literal["single", "pair"]

_PLACE_PHRASES = {
    "left": "on the left",
    "right": "on the right",
    "top": "at the top",
    "bottom": "at the bottom",
    "center": "in the center",
}
_PLURALS = ("grapes",)
_HELD_OUT_SHARE = 8  # one distinct prompt in eight is never trained on


@dataclass(frozen=True)
class Scene:
    """What a prompt asks for: one object with a size and a place, or two objects with a relation."""

    objects: tuple[str, ...]
    background: str | None = None
    size: str | None = None
    place: str | None = None
    relation: str | None = None

    def __post_init__(self) -> None:
        pair = len(self.objects) == 2
        if len(self.objects) not in (1, 2) or any(name not in OBJECTS for name in self.objects):
            raise ValueError(f"a scene shows one or two of {', '.join(OBJECTS)}; got {self.objects}")
        if pair != (self.relation is not None):
            raise ValueError("two objects need a relation, and one object has none")
        if pair and (self.size or self.place):
            raise ValueError("size and place belong to scenes of one object")
        if self.size == "big" and self.place not in (None, "center"):
            raise ValueError("a big object fills the picture and can only be in the center")
        for value, choices in (
            (self.background, BACKGROUNDS),
            (self.size, SIZES),
            (self.place, PLACES),
            (self.relation, RELATIONS),
        ):
            if value is not None and value not in choices:
                raise ValueError(f"{value!r} is none of {', '.join(choices)}")

    @property
    def kind(self) -> Kind:
        return "single" if len(self.objects) == 1 else "pair"

    def prompt(self) -> str:
        """The scene in words, for example ``"a small apple on the left on a blue background"``."""
        return self._said(_with_article)

    @property
    def trained_prompt(self) -> str:
        """The scene in the words that the weights were trained on, which put an article before grapes, too."""
        return self._said(_with_any_article)

    @property
    def held_out(self) -> bool:
        """Whether this scene's prompt was kept out of training; decided by its text there alone."""
        return zlib.crc32(self.trained_prompt.encode()) % _HELD_OUT_SHARE == 0

    def _said(self, with_article: Callable[[str], str]) -> str:
        words = [with_article(" ".join(filter(None, (self.size, self.objects[0]))))]
        if self.place is not None:
            words.append(_PLACE_PHRASES[self.place])
        if self.relation is not None:
            words += [self.relation, with_article(self.objects[1])]
        if self.background is not None:
            words += ["on", with_article(self.background), "background"]
        return " ".join(words)


def parse(prompt: str) -> Scene:
    """Read a prompt of `Scene.prompt`'s grammar, or the training's, back; raises ValueError for anything else."""
    words = prompt.lower().split()
    objects = tuple(word for word in words if word in OBJECTS)
    background = words[words.index("background") - 1] if "background" in words else None
    relation = next((phrase for phrase in RELATIONS if f" {phrase} " in f" {prompt.lower()} "), None)
    place = None
    if relation is None:
        place = next((name for name, phrase in _PLACE_PHRASES.items() if phrase in prompt.lower()), None)
    scene = Scene(
        objects=objects,
        background=background,
        size=next((word for word in words if word in SIZES), None),
        place=place,
        relation=relation,
    )
    if words not in (scene.prompt().split(), scene.trained_prompt.split()):
        raise ValueError(f"not a prompt of the mini model: {prompt!r} (did you mean {scene.prompt()!r}?)")
    return scene


def held_out(count: int, seed: int = 0, *, kind: Kind | None = None, background: bool = False) -> list[str]:
    """`count` prompts that training never used, in a fixed random order; repeats only once all were given.

    `kind` keeps to single objects or pairs (default: three singles to one pair, as in training); `background` keeps
    to prompts that name one.
    """
    return _draw(count, seed, kind, background, held_out=True)


def training(count: int, seed: int = 0, *, kind: Kind | None = None, background: bool = False) -> list[str]:
    """`count` prompts of training, for whatever is tuned or calibrated; else as `held_out`."""
    return _draw(count, seed, kind, background, held_out=False)


def _draw(count: int, seed: int, kind: Kind | None, background: bool, *, held_out: bool) -> list[str]:
    if kind is None:
        pairs = _draw(count // 4, seed, "pair", background, held_out=held_out)
        singles = _draw(count - len(pairs), seed, "single", background, held_out=held_out)
        mixed = singles + pairs
        random.Random(seed).shuffle(mixed)
        return mixed
    scenes = _all_singles() if kind == "single" else _all_pairs()
    prompts = [
        scene.prompt() for scene in scenes if scene.held_out == held_out and (scene.background or not background)
    ]
    random.Random(seed).shuffle(prompts)
    return list(itertools.islice(itertools.cycle(prompts), count))


def vocabulary() -> list[str]:
    """Every word that a prompt can hold, in a fixed order."""
    scenes = itertools.chain(_all_singles(), _all_pairs())
    return sorted({word for scene in scenes for word in scene.prompt().split()})


def _all_singles() -> Iterator[Scene]:
    for name, background, size, place in itertools.product(
        OBJECTS, (None, *BACKGROUNDS), (None, *SIZES), (None, *PLACES)
    ):
        if size != "big" or place in (None, "center"):
            yield Scene((name,), background, size, place)


def _all_pairs() -> Iterator[Scene]:
    for first, second, background, relation in itertools.product(OBJECTS, OBJECTS, (None, *BACKGROUNDS), RELATIONS):
        if first != second:
            yield Scene((first, second), background, relation=relation)


def _with_article(noun: str) -> str:
    return noun if noun.endswith(_PLURALS) else _with_any_article(noun)


def _with_any_article(noun: str) -> str:
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"
