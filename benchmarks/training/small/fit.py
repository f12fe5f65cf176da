"""The loop that trains a transformer at several sizes at once, for a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from training.small.data import Size
from training.small.optimizer import MuonWithAdamW
from training.small.stage import Stage

_RATE = 2e-3
_CHECKPOINT_STEPS = 250


def start_as_identity(model: Any) -> None:
    """Set modulation and output to zero, which diffusers does not do: every block starts as the identity."""
    modulations = [
        module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.endswith(("norm1.linear", "norm1_context.linear", "norm.linear"))
    ]
    for module in (*modulations, model.norm_out.linear, model.proj_out):
        nn.init.zeros_(module.weight)
        nn.init.zeros_(module.bias)


def optimizer_of(model: nn.Module, dtype: torch.dtype = torch.bfloat16) -> MuonWithAdamW:
    """Muon for the blocks' matrices (multiplied in `dtype`), AdamW for everything else."""
    hidden = {
        name
        for name, parameter in model.named_parameters()
        if "transformer_blocks" in name and parameter.ndim == 2 and "norm" not in name
    }
    return MuonWithAdamW(model, hidden, lr=_RATE, dtype=dtype)


def fit(
    stage: Stage,
    model: nn.Module,
    average: nn.Module,
    sizes: Sequence[Size],
    loss_of: Callable[[int], torch.Tensor],
    save: Callable[[], None],
    *,
    late: float,
    averaging: float,
) -> None:
    """Train until the stage's time is spent.

    `loss_of` gives the loss of a batch at one of two `sizes`, by its place; they take turns by their shares, the late
    ones from the progress `late` on. `average` follows the weights, at most by the factor `averaging` a step, and
    `save` is called now and then and at the end.
    """
    optimizer = optimizer_of(model)
    seen, losses = [0] * len(sizes), [0.0] * len(sizes)
    while stage.progress < 1.0:
        share = sizes[0].shares[stage.progress > late]
        which = 0 if (stage.step * share) % 1.0 < share else 1
        loss = loss_of(which)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step(stage.lr_factor(warmup_steps=150, decay_share=0.35))
        decay = min(averaging, (stage.step + 1) / (stage.step + 20))
        with torch.no_grad():
            torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1.0 - decay)
        seen[which] += sizes[which].batch
        losses[which] += (1.0 if losses[which] == 0.0 else 0.02) * (loss.item() - losses[which])
        if stage.step % 50 == 0:
            counts = {f"samples_{size.pixels}": count for size, count in zip(sizes, seen, strict=True)}
            stage.log(**counts, **{f"loss_{s.pixels}": value for s, value in zip(sizes, losses, strict=True)})
        if stage.step % _CHECKPOINT_STEPS == _CHECKPOINT_STEPS - 1:
            save()
        stage.step += 1
    save()
