"""What tests of accelerators share, the library's own and others': contracts and tiny models."""

from fastdit.testing.contract import (
    STEPS,
    AcceleratorContract,
    EngineContract,
    counted_calls,
    flux_transformer,
    generate,
    kl_autoencoder,
    seed_weights,
    tiny_flux,
)

__all__ = [
    "STEPS",
    "AcceleratorContract",
    "EngineContract",
    "counted_calls",
    "flux_transformer",
    "generate",
    "kl_autoencoder",
    "seed_weights",
    "tiny_flux",
]
