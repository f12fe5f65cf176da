"""Which tokens the next stage refines, one way a file."""

from fastdit.schedule.selectors.edges import Edges
from fastdit.schedule.selectors.latent_variance import LatentVariance
from fastdit.schedule.selectors.pixel_gradient import PixelGradient
from fastdit.schedule.selectors.text_attention import TextAttention
from fastdit.schedule.selectors.velocity_variance import VelocityVariance

__all__ = ["Edges", "LatentVariance", "PixelGradient", "TextAttention", "VelocityVariance"]
