"""The language of the large model: what a picture can show, how a prompt says it, which prompts training never saw.

A `Scene` holds what was *asked for*, and leaves most of a picture open: which fruit "a fruit" is, where it stands, how
large, on what, in which light. A transformer has to decide all this early and draw it late, which is what a sampler of
few steps can get wrong. This module imports nothing heavy.
"""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

#: Objects by kind. A prompt may name either.
KINDS: dict[str, tuple[str, ...]] = {
    "fruit": ("apple", "banana", "pineapple", "watermelon"),
    "animal": ("owl", "frog", "panda", "fish"),
    "vehicle": ("car", "bus", "tractor", "rocket"),
    "plant": ("tulip", "cactus", "sunflower", "tree"),
    "snack": ("doughnut", "burger", "cupcake", "pizza"),
    "toy": ("robot", "ball", "balloon", "drum"),
}
OBJECTS: tuple[str, ...] = tuple(itertools.chain.from_iterable(KINDS.values()))
NOUNS: tuple[str, ...] = (*OBJECTS, *KINDS)
#: Grounds, with the words that put an object on them.
GROUNDS: dict[str, str] = {
    "wood": "on wood",
    "bricks": "on bricks",
    "grass": "on grass",
    "sand": "on sand",
    "water": "on water",
    "sky": "in the sky",
    "checks": "on checks",
    "dots": "on dots",
}
SIZES = ("small", "big")
PLACES = {"left": "on the left", "right": "on the right", "top": "at the top", "bottom": "at the bottom"}
RELATIONS = ("left of", "above", "behind")
#: Lights, with the words that ask for them; daylight is never said.
LIGHTS = {"night": "at night", "sunset": "at sunset"}
COUNTS = {2: "two", 3: "three"}

_PLURALS = {"fish": "fish", "bus": "buses", "cactus": "cactuses"}
_HELD_OUT_SHARE = 8  # one distinct prompt in eight is never trained on


@dataclass(frozen=True)
class Scene:
    """What a prompt asks for: one noun, a number of them, or two with a relation."""

    nouns: tuple[str, ...]
    count: int = 1
    relation: str | None = None
    size: str | None = None
    place: str | None = None
    ground: str | None = None
    light: str | None = None

    def __post_init__(self) -> None:
        if len(self.nouns) not in (1, 2) or any(noun not in NOUNS for noun in self.nouns):
            raise ValueError(f"a scene names one or two of {', '.join(NOUNS)}; got {self.nouns}")
        if (len(self.nouns) == 2) != (self.relation is not None) or len(set(self.nouns)) != len(self.nouns):
            raise ValueError("two different nouns need a relation, and one noun has none")
        if self.count not in (1, *COUNTS) or (self.count > 1 and self.relation):
            raise ValueError(f"there are one to three of a noun, and one of each of two; got {self.count}")
        if (self.size or self.place) and (self.count > 1 or self.relation):
            raise ValueError("size and place belong to scenes of one object")
        if self.size == "big" and self.place:
            raise ValueError("a big object fills the picture and has no place")
        for value, choices in (
            (self.relation, RELATIONS),
            (self.size, SIZES),
            (self.place, PLACES),
            (self.ground, GROUNDS),
            (self.light, LIGHTS),
        ):
            if value is not None and value not in choices:
                raise ValueError(f"{value!r} is none of {', '.join(choices)}")

    def prompt(self) -> str:
        """The scene in words, for example ``"a fruit left of a small owl on wood at night"``."""
        if self.count > 1:
            words = [COUNTS[self.count], _plural(self.nouns[0])]
        else:
            words = [_with_article(" ".join(filter(None, (self.size, self.nouns[0]))))]
        if self.relation is not None:
            words += [self.relation, _with_article(self.nouns[1])]
        if self.place is not None:
            words.append(PLACES[self.place])
        if self.ground is not None:
            words.append(GROUNDS[self.ground])
        if self.light is not None:
            words.append(LIGHTS[self.light])
        return " ".join(words)

    @property
    def held_out(self) -> bool:
        """Whether this scene's prompt is kept out of training; decided by its text alone."""
        return zlib.crc32(self.prompt().encode()) % _HELD_OUT_SHARE == 0


def parse(prompt: str) -> Scene:
    """Read a prompt of `Scene.prompt`'s grammar back; raises ValueError for anything else."""
    said = f" {prompt.lower()} "
    singular = {noun: noun for noun in NOUNS} | {_plural(noun): noun for noun in NOUNS}

    def found(phrases: dict[str, str]) -> str | None:
        return next((name for name, phrase in phrases.items() if f" {phrase} " in said), None)

    count = next((count for count, word in COUNTS.items() if f" {word} " in said), 1)
    scene = Scene(
        nouns=tuple(singular[word] for word in said.split() if word in singular),
        count=count,
        relation=found({relation: relation for relation in RELATIONS}),
        size=found({size: size for size in SIZES}),
        place=found(PLACES),
        ground=found(GROUNDS),
        light=found(LIGHTS),
    )
    if scene.prompt().split() != said.split():
        raise ValueError(f"not a prompt of this model: {prompt!r} (did you mean {scene.prompt()!r}?)")
    return scene


def random_scene(random: np.random.Generator, *, held_out: bool = False) -> Scene:
    """Draw a scene of the training or the held-out set, words left out at random."""
    for _ in range(1000):
        form = random.random()
        ground = str(random.choice(list(GROUNDS))) if random.random() < 0.6 else None
        light = str(random.choice(list(LIGHTS))) if random.random() < 0.25 else None
        if form < 0.45:
            size = (None, None, None, "small", "big")[random.integers(5)]
            place = str(random.choice(list(PLACES))) if random.random() < 0.35 and size != "big" else None
            scene = Scene((_noun(random),), size=size, place=place, ground=ground, light=light)
        elif form < 0.65:
            count = int(random.choice(list(COUNTS)))
            scene = Scene((_noun(random),), count=count, ground=ground, light=light)
        else:
            first, second = _noun(random), _noun(random)
            if first == second:
                continue
            relation = str(random.choice(RELATIONS))
            scene = Scene((first, second), relation=relation, ground=ground, light=light)
        if scene.held_out == held_out:
            return scene
    raise RuntimeError("no scene of the wanted split in 1000 draws")


def held_out(count: int, seed: int = 0, *, background: bool = False) -> list[str]:
    """`count` prompts that training never used, in a fixed random order, in which one may come twice.

    `background` keeps to prompts that name a ground.
    """
    return _draw(count, seed, background, held_out=True)


def training(count: int, seed: int = 0, *, background: bool = False) -> list[str]:
    """`count` prompts of training, for whatever is tuned or calibrated; else as `held_out`."""
    return _draw(count, seed, background, held_out=False)


def _draw(count: int, seed: int, background: bool, *, held_out: bool) -> list[str]:
    random = np.random.default_rng((5, seed))
    scenes = (random_scene(random, held_out=held_out) for _ in itertools.count())
    return [scene.prompt() for scene in itertools.islice((s for s in scenes if s.ground or not background), count)]


def all_scenes() -> Iterator[Scene]:
    """Every scene that can be said, in a fixed order."""
    surroundings = list(itertools.product((None, *GROUNDS), (None, *LIGHTS)))
    for noun, (ground, light) in itertools.product(NOUNS, surroundings):
        for size, place in itertools.product((None, *SIZES), (None, *PLACES)):
            if size != "big" or place is None:
                yield Scene((noun,), size=size, place=place, ground=ground, light=light)
        for count in COUNTS:
            yield Scene((noun,), count=count, ground=ground, light=light)
    for first, second in itertools.permutations(NOUNS, 2):
        for relation, (ground, light) in itertools.product(RELATIONS, surroundings):
            yield Scene((first, second), relation=relation, ground=ground, light=light)


def vocabulary() -> list[str]:
    """Every word that a prompt can hold, in a fixed order."""
    phrases = (*GROUNDS.values(), *PLACES.values(), *LIGHTS.values(), *RELATIONS, *SIZES, *COUNTS.values(), "a", "an")
    words = {word for phrase in phrases for word in phrase.split()}
    return sorted(words | set(NOUNS) | {_plural(noun) for noun in NOUNS})


def _noun(random: np.random.Generator) -> str:
    return str(random.choice(list(KINDS) if random.random() < 0.3 else OBJECTS))


def _plural(noun: str) -> str:
    return _PLURALS.get(noun, f"{noun}s")


def _with_article(noun: str) -> str:
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"
