"""One method of each kind for fastdit, as somebody else would write it."""

from fastdit_sample.broadcast import AttentionBroadcast
from fastdit_sample.engine import Replay
from fastdit_sample.family import EASY_ANIMATE
from fastdit_sample.forecaster import Fading
from fastdit_sample.gate import LatentDrift
from fastdit_sample.kernel import QueryChunks
from fastdit_sample.lift import SharpLift
from fastdit_sample.schedule import CosineSteps

__all__ = [
    "EASY_ANIMATE",
    "AttentionBroadcast",
    "CosineSteps",
    "Fading",
    "LatentDrift",
    "QueryChunks",
    "Replay",
    "SharpLift",
]
