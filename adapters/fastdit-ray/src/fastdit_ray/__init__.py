"""Accelerated pipelines on Ray Serve: replicas that are warm for every size they serve, and a trace to measure them."""

from fastdit_ray.deployment import Replica, application
from fastdit_ray.pictures import Asked, Pictures, Served, SizeNotWarmed
from fastdit_ray.trace import Trace, trace

__all__ = ["Asked", "Pictures", "Replica", "Served", "SizeNotWarmed", "Trace", "application", "trace"]
