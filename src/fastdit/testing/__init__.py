"""What tests of accelerators share, the library's own and others': contracts and tiny models."""

from fastdit.testing.accelerator_contract import AcceleratorContract
from fastdit.testing.engine_contract import EngineContract
from fastdit.testing.folders import private_folders
from fastdit.testing.models import PIPELINES, STEPS, TRANSFORMERS, tiny_flux
from fastdit.testing.promises import PROMISES, Inapplicable, Promise, Subject, of_accelerator
from fastdit.testing.tiny import counted_calls, flux_transformer, generate, kl_autoencoder, seed_weights
from fastdit.testing.unusual import UNUSUAL

__all__ = [
    "PIPELINES",
    "PROMISES",
    "STEPS",
    "TRANSFORMERS",
    "UNUSUAL",
    "AcceleratorContract",
    "EngineContract",
    "Inapplicable",
    "Promise",
    "Subject",
    "counted_calls",
    "flux_transformer",
    "generate",
    "kl_autoencoder",
    "of_accelerator",
    "private_folders",
    "seed_weights",
    "tiny_flux",
]
