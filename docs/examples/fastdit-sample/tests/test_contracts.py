"""Every method of the sample keeps the contract of its level."""

from fastdit import Interval, ProgressiveResolution
from fastdit.testing import AcceleratorContract, EngineContract
from fastdit_sample import AttentionBroadcast, CosineSteps, Fading, LatentDrift, QueryChunks, Replay, SharpLift


class TestLatentDrift(AcceleratorContract):
    accelerator = LatentDrift(0.8)
    neutral = LatentDrift(0.0)
    reads_signal = True


class TestFading(AcceleratorContract):
    accelerator = Interval(3, forecast=Fading(0.9))
    neutral = Interval(1, forecast=Fading(0.9))


class TestCosineSteps(AcceleratorContract):
    accelerator = CosineSteps()


class TestSharpLift(AcceleratorContract):
    accelerator = ProgressiveResolution(steps=(6, 6), lift=SharpLift(0.5))


class TestQueryChunks(AcceleratorContract):
    accelerator = QueryChunks(8)


class TestReplay(EngineContract):
    engine = staticmethod(Replay)


class TestAttentionBroadcast(AcceleratorContract):
    accelerator = AttentionBroadcast(2)
    neutral = AttentionBroadcast(1)
