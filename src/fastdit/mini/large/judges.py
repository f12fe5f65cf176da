"""Two judges that say whether a picture shows what its prompt asked for, and whether it is intact.

One is for searches, the other for tables, and no figure of a table may have been searched for with its judge. They
share what they are asked and nothing else: `ConvolutionalJudge` and `AttentiveJudge` differ in architecture, seed and
renders. Both read whole pictures at their full resolution.

A judge reports, for each object that there is, how many it sees, where, how large and whether it is partly covered; the
ground; the light; and how badly the picture is damaged in each of the known ways. `score` makes one number of it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional

from fastdit.errors import InvalidConfig
from fastdit.mini.judge import as_pixels
from fastdit.mini.language import Purpose
from fastdit.mini.large.scenes import GROUNDS, KINDS, LIGHTS, OBJECTS, Scene, parse

if TYPE_CHECKING:
    from fastdit.mini.judge import Images

#: What judges were taught to see as damage, graded.
DAMAGES = ("blur", "aliasing", "seams", "glow", "bleaching", "doubled edges")

WEIGHTS = Path(__file__).parent / "weights"
_READ_TOGETHER = 8
_MOST = 3
#: Per object: the logits of 0 to 3 of it, then x, y and size (as parts of the side), then a logit of being covered.
_PER_OBJECT = _MOST + 1 + 4
_GLOBAL = len(GROUNDS) + len(LIGHTS) + 1 + len(DAMAGES)
#: How sharply a predicted place, and a size, counts as being on the asked-for side of a limit.
_SOFTNESS = 0.02
_SIZE_SOFTNESS = 0.006
_SMALL, _BIG = 0.31, 0.57
#: The logit of an object's middle before anything is learned, and the heat below which a peak is none.
_RARE, _FAINT = -4.5, 0.2


@dataclass(frozen=True)
class Verdict:
    """What a judge sees in pictures [B]."""

    counts: Tensor  # logits [B, objects, 4]
    places: Tensor  # x, y and size [B, objects, 3]
    covered: Tensor  # logits [B, objects]
    ground: Tensor  # logits [B, grounds]
    light: Tensor  # logits [B, 1 + lights], daylight first
    damages: Tensor  # logits of the severities [B, damages]
    maps: Tensor  # logits of where the middle of each object is [B, objects, height / 16, width / 16]
    features: Tensor  # [B, F]


def _verdict(found: tuple[Tensor, Tensor], whole: Tensor, features: Tensor) -> Verdict:
    per_object, maps = found
    ground, light, damages = whole.split_with_sizes([len(GROUNDS), len(LIGHTS) + 1, len(DAMAGES)], dim=1)
    return Verdict(
        counts=per_object[..., : _MOST + 1],
        places=per_object[..., _MOST + 1 : _MOST + 4],
        covered=per_object[..., -1],
        ground=ground,
        light=light,
        damages=damages,
        maps=maps,
        features=features,
    )


class _ObjectReader(nn.Module):
    """Finds objects by maps of where their middles may be: each is read at its peaks, which are also counted."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.maps = nn.Conv2d(width, len(OBJECTS), 1)
        with torch.no_grad():
            self.maps.bias.fill_(_RARE)  # type: ignore[union-attr]
        self.read = nn.Linear(width + 2, _PER_OBJECT)

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        """Give what is said of each object [B, objects, ..] and the maps, of hidden states [B, C, h, w]."""
        maps = self.maps(hidden_states).float()
        heat = maps.sigmoid()
        peaks = torch.where(heat >= functional.max_pool2d(heat, 3, stride=1, padding=1), heat - _FAINT, 0.0)
        number = peaks.clamp(min=0.0).flatten(2).sum(dim=2, keepdim=True) / (1.0 - _FAINT)
        weights = (2.0 * maps).flatten(2).softmax(dim=2)
        seen = weights @ hidden_states.flatten(2).mT.float()
        per_object = self.read(torch.cat([seen, number, heat.flatten(2).amax(dim=2, keepdim=True)], dim=2))
        row, column = ((torch.arange(size, device=maps.device) + 0.5) / size for size in maps.shape[2:])
        grid = weights.unflatten(2, maps.shape[2:])
        middle = torch.stack([(grid.sum(dim=2) * column).sum(dim=-1), (grid.sum(dim=3) * row).sum(dim=-1)], dim=-1)
        return per_object + functional.pad(middle, (_MOST + 1, 2)), maps


class _Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(8, width)
        self.first = nn.Conv2d(width, width, 3, padding=1)
        self.second = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, hidden_states: Tensor) -> Tensor:
        change: Tensor = self.second(functional.gelu(self.first(functional.gelu(self.norm(hidden_states)))))
        return hidden_states + change


class ConvolutionalJudge(nn.Module):
    """Convolutions at a quarter to a thirty-second of the size; objects are found at a sixteenth."""

    def __init__(self, widths: tuple[int, int, int, int] = (32, 64, 112, 144)) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, widths[0], 6, stride=4, padding=1), _Residual(widths[0]))
        self.levels = nn.ModuleList(
            nn.Sequential(nn.Conv2d(narrow, wide, 2, stride=2), _Residual(wide), _Residual(wide))
            for narrow, wide in pairwise(widths)
        )
        self.norm = nn.GroupNorm(8, widths[-1])
        self.enlarge = nn.ConvTranspose2d(widths[-1], widths[-2], 2, stride=2)
        self.merged = nn.Sequential(_Residual(widths[-2]), nn.GroupNorm(8, widths[-2]), nn.GELU())
        self.objects = _ObjectReader(widths[-2])
        # fine texture is gone from the last level: damages are read from the first one, too
        self.fine = nn.Linear(2 * widths[0], len(DAMAGES))
        self.whole = nn.Linear(2 * widths[-1], _GLOBAL)

    def forward(self, pixels: Tensor) -> Verdict:
        """Read pictures [B, 3, H, W] in [0, 1], H and W multiples of 32."""
        early = self.first(pixels * 2 - 1)
        hidden_states, passed = early, []
        for level in self.levels:
            hidden_states = level(hidden_states)
            passed.append(hidden_states)
        last = functional.gelu(self.norm(hidden_states))
        found = self.objects(self.merged(passed[-2] + self.enlarge(last)))
        mean, highest = last.mean(dim=(2, 3)), last.amax(dim=(2, 3))
        whole = self.whole(torch.cat([mean, highest], dim=1))
        texture = self.fine(torch.cat([early.mean(dim=(2, 3)), early.abs().mean(dim=(2, 3))], dim=1))
        return _verdict(found, whole + functional.pad(texture, (_GLOBAL - len(DAMAGES), 0)), mean)


class AttentiveJudge(nn.Module):
    """A transformer over squares of 16 pixels; a query of the whole reads its tokens, which tell where objects are."""

    def __init__(self, width: int = 160, layers: int = 4, heads: int = 5) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 96, 8, stride=8)
        self.merge = nn.Conv2d(96, width, 2, stride=2)
        self.where = nn.Linear(2 * 8, width)
        settings = {"dim_feedforward": 3 * width, "dropout": 0.0, "activation": "gelu", "batch_first": True}
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(width, heads, norm_first=True, **settings)  # type: ignore[arg-type]
            for _ in range(layers)
        )
        self.query = nn.Parameter(torch.randn(1, width) * width**-0.5)
        self.reader = nn.TransformerDecoderLayer(width, heads, norm_first=True, **settings)  # type: ignore[arg-type]
        self.norm = nn.LayerNorm(width)
        self.objects = _ObjectReader(width)
        self.whole = nn.Linear(width, _GLOBAL)

    def forward(self, pixels: Tensor) -> Verdict:
        """Read pictures [B, 3, H, W] in [0, 1]."""
        grid = self.merge(functional.gelu(self.patches(pixels * 2 - 1)))
        tokens = grid.flatten(2).mT + self.where(self._places(grid))
        for layer in self.layers:
            tokens = layer(tokens)
        tokens = self.norm(tokens)
        read = self.reader(self.query.expand(len(pixels), -1, -1), tokens)[:, 0]
        found = self.objects(tokens.mT.unflatten(2, grid.shape[2:]))
        return _verdict(found, self.whole(read), tokens.mean(dim=1))

    def _places(self, grid: Tensor) -> Tensor:
        row, column = ((torch.arange(size, device=grid.device) + 0.5) / size for size in (grid.shape[2], grid.shape[3]))
        frequencies = math.pi * torch.tensor([1.0, 2.0, 4.0, 8.0], device=grid.device)
        waves = [
            torch.cat([(axis[:, None] * frequencies).sin(), (axis[:, None] * frequencies).cos()], dim=1)
            for axis in (row, column)
        ]
        size = (grid.shape[2], grid.shape[3], -1)
        return torch.cat([waves[0][:, None].expand(size), waves[1][None].expand(size)], dim=-1).flatten(0, 1)


class LargeJudge:
    """A judge as the embedded pipelines' are used: it reads pictures and the prompts that they were made of."""

    def __init__(self, network: ConvolutionalJudge | AttentiveJudge) -> None:
        self.network = network.eval().requires_grad_(False)

    @torch.no_grad()
    def verdicts(self, images: Images) -> list[Verdict]:
        """Read pictures, a few at a time."""
        return [self.network(batch) for batch in as_pixels(images).split(_READ_TOGETHER)]

    def features(self, images: Images) -> Tensor:
        """Give features for a Frechet distance, float32 [B, F]."""
        return torch.cat([verdict.features for verdict in self.verdicts(images)])

    def score(self, images: Images, prompts: Sequence[str]) -> Tensor:
        """Give each picture's soft score in [0, 1], float32 [B]; see `score`."""
        scenes = [parse(prompt) for prompt in prompts]
        verdicts = self.verdicts(images)
        if sum(len(verdict.features) for verdict in verdicts) != len(scenes):
            raise ValueError(f"give one prompt a picture; got {len(scenes)} prompts")
        starts = range(0, len(scenes), _READ_TOGETHER)
        return torch.cat(
            [score(one, scenes[start : start + _READ_TOGETHER]) for one, start in zip(verdicts, starts, strict=True)]
        )

    def parts(self, images: Images, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Say whether the likeliest reading of each picture is right, float32 [B], NaN where a prompt doesn't ask.

        `objects_right` is for the objects, their number and their order, `background_right` for the ground; `intact` is
        what the damages leave.
        """
        scenes = [parse(prompt) for prompt in prompts]
        rows: list[dict[str, float]] = []
        for verdict in self.verdicts(images):
            for row in range(len(verdict.features)):
                scene = scenes[len(rows)]
                said = objects_probability(verdict, row, scene)
                found = {
                    "objects_right": float(said.min() > 0.5),
                    "intact": float((1 - verdict.damages[row].sigmoid()).prod()),
                }
                if scene.ground:
                    ground = int(verdict.ground[row].argmax())
                    found["background_right"] = float(ground == list(GROUNDS).index(scene.ground))
                rows.append(found)
        names = sorted({name for row in rows for name in row})
        return {name: torch.tensor([row.get(name, float("nan")) for row in rows]) for name in names}


def is_trained(purpose: Purpose, directory: Path = WEIGHTS) -> bool:
    """Whether a judge comes with the package."""
    return (directory / f"judge-{purpose}.safetensors").is_file()


def load_judge(purpose: Purpose, directory: Path = WEIGHTS) -> LargeJudge:
    """Load the judge for searches or the one for tables. Raises `InvalidConfig` for any other purpose."""
    from safetensors.torch import load_file

    if purpose not in ("search", "tables"):
        raise InvalidConfig(f"the judges are for 'search' and for 'tables', got {purpose!r}; give one of them")
    network = build_judge(purpose)
    weights = load_file(directory / f"judge-{purpose}.safetensors")
    network.load_state_dict({name: tensor.float() for name, tensor in weights.items()})
    return LargeJudge(network)


def build_judge(purpose: Purpose) -> ConvolutionalJudge | AttentiveJudge:
    """Make an untrained judge for a purpose."""
    return ConvolutionalJudge() if purpose == "search" else AttentiveJudge()


def score(verdict: Verdict, scenes: Sequence[Scene]) -> Tensor:
    """Give how well each picture [B] is what its scene asks for, in [0, 1].

    It is the geometric mean of the probabilities of what the prompt says (the objects and that there are no others,
    their order, size, place, the ground, the light), times what the damages leave of the picture.
    """
    intact = (1 - verdict.damages.sigmoid()).prod(dim=1)
    right = [_asked(verdict, row, scene) for row, scene in enumerate(scenes)]
    means = torch.stack([torch.stack(parts).clamp(min=1e-6).log().mean().exp() for parts in right])
    return means * intact


def objects_probability(verdict: Verdict, row: int, scene: Scene) -> Tensor:
    """Give the probabilities [1 or 2] that the objects are those of a scene and no others, and in their order."""
    counts = verdict.counts[row].softmax(dim=-1)
    first, second = _asked_for(scene)
    if second is None:
        return _exactly(counts, {first: scene.count})[None]
    one, two = (_likeliest(counts, members) for members in (first, second))
    apart = verdict.places[row, two] - verdict.places[row, one]
    if scene.relation == "behind":
        ordered = verdict.covered[row, one].sigmoid() * (-verdict.covered[row, two]).sigmoid()
    else:
        ordered = (apart[0 if scene.relation == "left of" else 1] / _SOFTNESS).sigmoid()
    return torch.stack([_exactly(counts, {first: 1, second: 1}), ordered])


def _asked_for(scene: Scene) -> tuple[frozenset[int], frozenset[int] | None]:
    """The objects that each noun may be: "a fruit left of an apple" asks for another fruit."""
    first, *others = (_members(noun) for noun in scene.nouns)
    if not others:
        return first, None
    second = others[0] - first if len(first) < len(others[0]) else others[0]
    return first - second, second


def _asked(verdict: Verdict, row: int, scene: Scene) -> list[Tensor]:
    """The probability of everything that a scene says."""
    counts = verdict.counts[row].softmax(dim=-1)
    first, _ = _asked_for(scene)
    parts = list(objects_probability(verdict, row, scene))
    if scene.size or scene.place:
        x, y, size = verdict.places[row, _likeliest(counts, first)]
        if scene.size:
            beyond = _SMALL - size if scene.size == "small" else size - _BIG
            parts.append((beyond / _SIZE_SOFTNESS).sigmoid())
        if scene.place:
            beyond = {"left": 0.5 - x, "right": x - 0.5, "top": 0.5 - y, "bottom": y - 0.5}[scene.place]
            parts.append((beyond / _SOFTNESS).sigmoid())
    if scene.ground:
        parts.append(verdict.ground[row].softmax(dim=0)[list(GROUNDS).index(scene.ground)])
    if scene.light:
        parts.append(verdict.light[row].softmax(dim=0)[1 + list(LIGHTS).index(scene.light)])
    return parts


def _members(noun: str) -> frozenset[int]:
    return frozenset(OBJECTS.index(name) for name in KINDS.get(noun, (noun,)))


def _likeliest(counts: Tensor, members: frozenset[int]) -> int:
    none = counts.detach()[:, 0]
    return min(members, key=lambda index: none[index].item())


def _exactly(counts: Tensor, asked: dict[frozenset[int], int]) -> Tensor:
    """The probability that there are so many of each set's members together, and nothing else."""
    inside = frozenset().union(*asked)
    probability = torch.stack([counts[i, 0] for i in range(len(OBJECTS)) if i not in inside]).prod()
    for members, number in asked.items():
        # the distribution of a sum: its generating polynomial is the members' product
        together = counts.new_tensor([1.0] + [0.0] * _MOST)
        for index in members:
            shifted = [functional.pad(together, (n, 0))[: _MOST + 1] * counts[index, n] for n in range(_MOST + 1)]
            together = torch.stack(shifted).sum(dim=0)
        probability = probability * together[number]
    return probability
