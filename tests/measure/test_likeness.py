"""LPIPS and DINOv2: what they say of pictures, by weights that are here, and what is said where they are not."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn import functional
from typer.testing import CliRunner

from fastdit import InvalidConfig
from fastdit.bench.source import Source
from fastdit.cli import app
from fastdit.measure import likeness
from fastdit.measure.likeness import MissingWeights, Wanted, opened


@pytest.fixture(autouse=True)
def afresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Open networks anew, and none of the user's own."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    opened.cache_clear()
    yield
    opened.cache_clear()


@pytest.fixture(scope="module")
def dino(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A DINOv2 of one layer and random weights, as `save_pretrained` writes it."""
    from transformers import Dinov2Config, Dinov2Model

    torch.manual_seed(0)
    config = Dinov2Config(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14)
    folder = tmp_path_factory.mktemp("dino")
    Dinov2Model(config).save_pretrained(folder)
    return folder


def alexnet(path: Path) -> dict[str, torch.Tensor]:
    """Write random weights in the form in which torchvision publishes AlexNet's; give them."""
    shapes = {0: (64, 3, 11), 3: (192, 64, 5), 6: (384, 192, 3), 8: (256, 384, 3), 10: (256, 256, 3)}
    random = torch.Generator().manual_seed(0)
    weights = {}
    for layer, (out, inside, side) in shapes.items():
        fan = inside * side * side
        weights[f"features.{layer}.weight"] = torch.randn(out, inside, side, side, generator=random) * (2 / fan) ** 0.5
        weights[f"features.{layer}.bias"] = 0.1 * torch.randn(out, generator=random)
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({**weights, "classifier.6.bias": torch.zeros(1000)}, path)
    return weights


def picture(seed: int, noise: float = 0.0) -> Image.Image:
    smooth = np.random.default_rng(seed).uniform(0, 255, (4, 4, 3)).repeat(18, axis=0).repeat(18, axis=1)
    rough = np.random.default_rng(seed + 100).normal(0, 255 * noise, smooth.shape)
    return Image.fromarray((smooth + rough).clip(0, 255).astype(np.uint8))


def test_dinov2_is_one_for_equal_pictures_and_less_the_further_they_are(dino: Path) -> None:
    measured = opened(f"dinov2={dino}")
    reference = picture(0)
    equal, near, far = measured([reference, picture(0, 0.02), picture(1)], [reference] * 3)
    assert equal == pytest.approx(1.0, abs=1e-6) and far < near < 1.0
    assert measured.said.startswith("class tokens of DINOv2 ") and "transformers " in measured.said


def test_dinov2_is_the_cosine_of_the_models_own_class_tokens(dino: Path) -> None:
    from transformers import AutoModel

    model: Any = AutoModel.from_pretrained(dino).eval().requires_grad_(False)
    tokens = []
    for one in (picture(2), picture(3)):
        pixels = np.asarray(one.resize((224, 224), Image.Resampling.BICUBIC), dtype=np.float32) / 255
        scaled = (pixels - np.array([0.485, 0.456, 0.406])) / np.array([0.229, 0.224, 0.225])
        tokens.append(model(torch.from_numpy(scaled).float().permute(2, 0, 1)[None]).last_hidden_state[0, 0])
    expected = float(tokens[0] @ tokens[1] / (tokens[0].norm() * tokens[1].norm()))
    assert opened(f"dinov2={dino}")([picture(2)], [picture(3)])[0] == pytest.approx(expected, abs=1e-5)


def test_lpips_is_the_papers_sum_over_layers_and_zero_for_equal_pictures(tmp_path: Path) -> None:
    weights = alexnet(tmp_path / "torch" / "hub" / "checkpoints" / "alexnet-owt-7be5be79.pth")
    measured = opened("lpips")
    reference = picture(0)
    equal, near, far = measured([reference, picture(0, 0.02), picture(1)], [reference] * 3)
    assert equal == 0.0 and 0.0 < near < far
    assert far == pytest.approx(written_out(picture(1), reference, weights), rel=1e-4)
    assert "LPIPS of AlexNet" in measured.said and "torchmetrics" in measured.said


def written_out(image: Image.Image, reference: Image.Image, weights: dict[str, torch.Tensor]) -> float:
    """LPIPS of AlexNet as its layers stand in the paper's code, with torchmetrics' linear weights."""
    linear = torch.load(
        str(files("torchmetrics") / "functional/image/lpips_models/alex.pth"), map_location="cpu", weights_only=True
    )
    strides, total = {0: (4, 2), 3: (1, 2), 6: (1, 1), 8: (1, 1), 10: (1, 1)}, 0.0
    seen = []
    for one in (image, reference):
        pixels = torch.from_numpy(np.asarray(one, dtype=np.float32) / 127.5 - 1.0).permute(2, 0, 1)[None]
        value = (pixels - torch.tensor([-0.030, -0.088, -0.188]).view(1, 3, 1, 1)) / torch.tensor(
            [0.458, 0.448, 0.450]
        ).view(1, 3, 1, 1)
        layers = []
        for layer, (stride, padding) in strides.items():
            if layer in (3, 6):
                value = functional.max_pool2d(value, 3, 2)
            own = weights[f"features.{layer}.weight"], weights[f"features.{layer}.bias"]
            value = functional.conv2d(value, *own, stride=stride, padding=padding).relu()
            layers.append(value / (value.pow(2).sum(1, keepdim=True) + 1e-8).sqrt())
        seen.append(layers)
    for number, (ours, theirs) in enumerate(zip(*seen, strict=True)):
        total += float(functional.conv2d((ours - theirs) ** 2, linear[f"lin{number}.model.1.weight"]).mean())
    return total


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("dinov2", r"facebook/dinov2-base.*--local-dir dino.*Nothing is downloaded"),
        ("dinov2=nowhere", r"nowhere is no folder"),
        ("lpips", r"alexnet-owt-7be5be79.pth.*lpips=FILE.*Nothing is downloaded"),
        ("lpips=nowhere.pth", r"there is no nowhere.pth"),
    ],
)
def test_without_weights_it_is_said_what_is_needed(text: str, told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("the network was asked"))
    with pytest.raises(MissingWeights, match=told):
        opened(text)


def test_a_file_of_something_else_is_refused(tmp_path: Path, dino: Path) -> None:
    torch.save({"features.0.weight": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(MissingWeights, match="no weights of AlexNet"):
        opened(f"lpips={tmp_path / 'other.pth'}")
    from transformers import ViTConfig, ViTModel

    config = ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, image_size=16)
    ViTModel(config).save_pretrained(tmp_path / "vit")
    with pytest.raises(MissingWeights, match="of the type vit, and no DINOv2"):
        opened(f"dinov2={tmp_path / 'vit'}")


def test_a_name_that_is_none_is_refused() -> None:
    with pytest.raises(InvalidConfig, match="fidelity is lpips or dinov2"):
        Wanted.parsed("fid")


def test_the_bench_refuses_missing_weights_before_anything_is_loaded(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(Source, "load", lambda _: pytest.fail("a pipeline was loaded"))
    asked = ["bench", "mini", "--stack", "Interval 2", "--fidelity", "dinov2=nowhere", "--out", str(tmp_path / "out")]
    done = CliRunner().invoke(app, asked)
    assert done.exit_code == 2 and "nowhere is no folder" in done.stderr and not (tmp_path / "out").exists()


def test_the_bench_keeps_what_networks_see_apart_from_quality_and_names_them(dino: Path, tmp_path: Path) -> None:
    import json

    asked = ["bench", "mini", "--stack", "Interval 2", "--prompt", "an apple", "--prompt", "two boats"]
    more = ["--size", "64", "--steps", "4", "--minutes", "0.0001", "--fidelity", f"dinov2={dino}"]
    done = CliRunner().invoke(app, [*asked, *more, "--out", str(tmp_path), "--json"])
    assert done.exit_code == 0, done.output
    (group,) = json.loads(done.stdout)
    assert group["fidelity"]["dinov2"] == opened(f"dinov2={dino}").said and "torchmetrics" in group["fidelity"]["ssim"]
    plain, half = group["rows"][:2]
    assert "dinov2" not in plain["metrics"] and half["metrics"]["dinov2"]["interval"]["estimate"] <= 1.0
    assert len(half["metrics"]["dinov2"]["samples"]) == 2
    assert "DINOv2" in next(tmp_path.glob("*.html")).read_text()


def test_lpips_has_the_layers_of_alexnet() -> None:
    convolutions = [layer for layer in likeness._Lpips().features if isinstance(layer, nn.Conv2d)]
    assert sum(one.weight.numel() + one.bias.numel() for one in convolutions) == 2_469_696
