"""What becomes of the tokens at a stage switch, one way a file."""

from fastdit.schedule.lifts.corrected import CorrectedLift
from fastdit.schedule.lifts.latent import LatentLift
from fastdit.schedule.lifts.pixel import PixelLift
from fastdit.schedule.lifts.spectral import SpectralLift
from fastdit.schedule.lifts.token_copy import TokenCopy

__all__ = ["CorrectedLift", "LatentLift", "PixelLift", "SpectralLift", "TokenCopy"]
