"""A FLUX transformer of eleven million parameters, trained at 64, 256 and 1,024 tokens.

Flow matching: x = (1 - sigma) x0 + sigma noise, target v = noise - x0. Composition is learned at 64 tokens, where a
sample costs a twentieth of what it costs at 1,024; `PHASES` says what comes when, by samples seen. Guidance is learned
last, as FLUX.1-dev has it, as an input g: a part of every batch draws g and moves its target by
(g - 1)(v(prompt) - v("")), both from the averaged weights at g = 1. Before, g is 1, one prompt in ten is empty, and a
sampler guides by a second prediction.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from diffusers import AutoencoderTiny, FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel
from torch import Tensor, nn

from training.large import checkpoint, text
from training.large.latents import Pool, Size
from training.large.run import Run, working_dtype
from training.small.fit import optimizer_of, start_as_identity

_AVERAGING = 0.9995
_EMPTY_SHARE = 0.1
_GUIDED_SHARE = 0.4
_GUIDANCE_RANGE = (1.0, 6.0)
_WARMUP_STEPS = 50
_LOGGED_STEPS = 20
#: Noise levels up to which it is seen where objects are, and from which on it isn't.
_SEEN, _UNSEEN = 0.45, 0.8


@dataclass(frozen=True)
class Phase:
    """What is trained until so many samples were seen: the shares of the sizes in the steps, and whether guided.

    A token that objects cover weighs 1 + `emphasis` times as much as one of the bare ground, where there is so little
    noise that objects are seen: grounds fill most of a picture and are learned long before shapes are. Where it is yet
    to be decided what there is, such weights would have more objects drawn than were asked for.
    """

    until: float
    shares: dict[int, float]
    guided: bool = False
    emphasis: float = 0.0


SIZES = {size.pixels: size for size in (Size(128, 64, 1.65), Size(256, 20, 1.9), Size(512, 6, 3.2))}
PHASES = (
    Phase(1.3e5, {128: 1.0}),
    Phase(6.0e5, {128: 0.5, 256: 0.5}, emphasis=3.0),
    Phase(6.6e5, {128: 0.1, 256: 0.45, 512: 0.45}, emphasis=2.0),
    Phase(float("inf"), {128: 0.1, 256: 0.45, 512: 0.45}, emphasis=2.0, guided=True),
)


def build(*, double: int = 2, single: int = 6, heads: int = 4) -> FluxTransformer2DModel:
    """Make an untrained transformer whose blocks start as the identity (modulation and output at zero)."""
    model = FluxTransformer2DModel(
        patch_size=1,
        in_channels=64,
        num_layers=double,
        num_single_layers=single,
        attention_head_dim=64,
        num_attention_heads=heads,
        joint_attention_dim=text.WIDTH,
        pooled_projection_dim=text.WIDTH,
        guidance_embeds=True,
        axes_dims_rope=(16, 24, 24),
    )
    start_as_identity(model)
    return model


def build_scheduler() -> FlowMatchEulerDiscreteScheduler:
    """Make FLUX.1-dev's scheduler with its range of shifts laid over this model's token counts."""
    return FlowMatchEulerDiscreteScheduler(
        shift=3.0,
        use_dynamic_shifting=True,
        base_shift=0.5,
        max_shift=1.15,
        base_image_seq_len=64,
        max_image_seq_len=1024,
    )


def phase_of(samples: int) -> Phase:
    """Give the phase that training is in after so many samples."""
    return next(phase for phase in PHASES if samples < phase.until)


def image_ids(side: int, device: torch.device) -> Tensor:
    """Give the pipeline's position ids of a square image, [side * side, 3]."""
    row, column = torch.meshgrid(torch.arange(side, device=device), torch.arange(side, device=device), indexing="ij")
    return torch.stack([torch.zeros_like(row), row, column], dim=-1).reshape(-1, 3).float()


def stratified_sigmas(count: int, shift: float, device: torch.device) -> Tensor:
    """Draw noise levels [B], one from each of B equal parts of (0, 1), and shift them as a scheduler does."""
    uniform = (torch.randperm(count) + torch.rand(count)) / count
    return (shift * uniform / (1.0 + (shift - 1.0) * uniform)).to(device)


class Trainer:
    """The transformer, its average, its optimiser, and what a step needs."""

    def __init__(
        self, run: Run, device: torch.device, model: FluxTransformer2DModel, *, compiled: bool = False
    ) -> None:
        self.run = run
        self.device = device
        self.model = model.to(device)
        #: The model as a step calls it: the same weights.
        self._trained: nn.Module = cast("nn.Module", torch.compile(self.model)) if compiled else self.model
        self.average = copy.deepcopy(self.model).requires_grad_(False)
        self.optimizer = optimizer_of(self.model, dtype=working_dtype(device))
        self.embed: text.Encode = text.encoder(run.directory, device)
        vae = AutoencoderTiny.from_pretrained(run.directory / "vae").float().eval()
        vae = vae.to(device, memory_format=torch.channels_last)
        self.pools = {pixels: Pool(size, vae, device) for pixels, size in SIZES.items()}

    def restore(self) -> None:
        """Go on from the working directory's checkpoint, or else from the weights of the published one."""
        if (state := self.run.resume(self.device)) is not None:
            self.model.load_state_dict(state["model"])
            self.average.load_state_dict(state["average"])
            self.optimizer.load_state_dict(state["optimizer"])
        elif (weights := checkpoint.transformer()) is not None:
            self.model.load_state_dict(weights.average)
            self.average.load_state_dict(weights.average)
            self.run.set_numbers(weights.numbers)
            self.run.warm_from = self.run.step

    def state(self) -> dict[str, Any]:
        """Give everything that a checkpoint holds."""
        return {
            "model": self.model.state_dict(),
            "average": self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }

    def step(self) -> tuple[int, float]:
        """Train on one batch; give its size in pixels and its loss."""
        run = self.run
        run.seed()
        phase = phase_of(run.samples)
        pixels = int(run.random(stream=3).choice(list(phase.shares), p=list(phase.shares.values())))
        loss = self._loss(pixels, phase)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step(run.rate_factor(_WARMUP_STEPS))
        kept = min(_AVERAGING, (run.step + 1) / (run.step + 20))
        with torch.no_grad():
            torch._foreach_lerp_(list(self.average.parameters()), list(self.model.parameters()), 1.0 - kept)
        run.step += 1
        run.samples += SIZES[pixels].batch
        return pixels, loss.item()

    def _loss(self, pixels: int, phase: Phase) -> Tensor:
        size, count = SIZES[pixels], SIZES[pixels].batch
        clean, objects, words = self.pools[pixels].draw(self.run, phase.shares[pixels])
        dropped = self.run.random(stream=4).random(count) < _EMPTY_SHARE
        prompt = self.embed(["" if drop else word for drop, word in zip(dropped, words, strict=True)])
        sigma = stratified_sigmas(count, size.shift, self.device)
        noise = torch.randn(clean.shape).to(self.device)
        noisy = torch.lerp(clean, noise, sigma[:, None, None])
        target = noise - clean
        guidance = torch.ones(count, device=self.device)
        if phase.guided:
            share = int(count * _GUIDED_SHARE)
            one = guidance[:share].clone()
            guidance[:share] = torch.empty(share).uniform_(*_GUIDANCE_RANGE).to(self.device)
            with torch.no_grad():
                conditional = (prompt[0][:share], prompt[1][:share])
                given = self._velocity(self.average, noisy[:share], sigma[:share], one, conditional, size.side)
                empty = self.embed([""] * share)
                without = self._velocity(self.average, noisy[:share], sigma[:share], one, empty, size.side)
            target[:share] += (guidance[:share, None, None] - 1.0) * (given - without)
        predicted = self._velocity(self._trained, noisy, sigma, guidance, prompt, size.side)
        seen = ((_UNSEEN - sigma) / (_UNSEEN - _SEEN)).clamp(0.0, 1.0)
        weights = 1.0 + phase.emphasis * seen[:, None] * objects
        return ((predicted - target).square().mean(dim=-1) * weights).mean() / weights.mean()

    def _velocity(
        self,
        model: nn.Module,
        latents: Tensor,
        sigma: Tensor,
        guidance: Tensor,
        prompt: tuple[Tensor, Tensor],
        side: int,
    ) -> Tensor:
        """Predict the velocity as the pipeline would have it predicted."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=working_dtype(self.device) == torch.bfloat16):
            velocity: Tensor = model(
                hidden_states=latents,
                timestep=sigma,
                guidance=guidance,
                pooled_projections=prompt[0],
                encoder_hidden_states=prompt[1],
                txt_ids=torch.zeros(text.LENGTH, 3, device=self.device),
                img_ids=image_ids(side, self.device),
                return_dict=False,
            )[0]
        return velocity.float()


def train(
    directory: Path,
    device: torch.device,
    minutes: float,
    *,
    cooldown: float = 0.0,
    steps: int | None = None,
    compiled: bool = False,
) -> None:
    """Train for some minutes (or up to a number of steps) from wherever training is.

    Compiling takes a minute for each size of picture and makes a step a fifth shorter on a CPU.
    """
    torch.manual_seed(2)
    run = Run("transformer", directory, minutes, device, cooldown=cooldown, steps=steps)
    checkpoint.unpack(directory)
    trainer = Trainer(run, device, build(), compiled=compiled)
    trainer.restore()
    build_scheduler().save_pretrained(directory / "scheduler")
    losses: dict[str, float] = {}
    while not run.over:
        pixels, loss = trainer.step()
        name = f"loss_{pixels}"
        losses[name] = losses.get(name, loss) + 0.05 * (loss - losses.get(name, loss))
        if run.step % _LOGGED_STEPS == 0:
            run.log(**losses)
        if run.wants_saving:
            run.save(**trainer.state())
    run.log(**losses)
    run.save(**trainer.state())
