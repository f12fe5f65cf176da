"""The large model's training goes on exactly where it was left, and from what is published."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderTiny

from fastdit.mini.large.scenes import held_out, parse, training
from training.large import autoencoder, checkpoint, latents, text, transformer
from training.large.latents import Size
from training.large.run import Run
from training.large.transformer import Phase, Trainer

# Where products are quicker in bfloat16, norms keep their float32 weights and say so.
pytestmark = pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")

CPU = torch.device("cpu")
_published = checkpoint.transformer


@pytest.fixture
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with untrained parts, and a recipe of tiny steps whose second is guided."""
    tokenizer = text.build_tokenizer()
    clip, t5 = text.build(tokenizer)
    for part, name in ((clip, "text_encoder"), (t5, "text_encoder_2"), (tokenizer, "tokenizer")):
        part.save_pretrained(tmp_path / name)
    vae = autoencoder.build()
    vae.register_to_config(shift_factor=0.25, scaling_factor=2.0)
    vae.save_pretrained(tmp_path / "vae")
    transformer.build_scheduler().save_pretrained(tmp_path / "scheduler")
    encoder = text.encoder(tmp_path, CPU)
    monkeypatch.setattr(text, "encoder", lambda *_: encoder)
    monkeypatch.setattr(checkpoint, "transformer", lambda: None)
    monkeypatch.setattr(latents, "BLOCK", 2)
    monkeypatch.setattr(transformer, "SIZES", {32: Size(32, 3, 1.5), 64: Size(64, 3, 2.0)})
    phases = (Phase(3, {32: 1.0}), Phase(float("inf"), {32: 0.5, 64: 0.5}, guided=True))
    monkeypatch.setattr(transformer, "PHASES", phases)
    return tmp_path


def _trainer(directory: Path) -> Trainer:
    torch.manual_seed(7)
    trainer = Trainer(Run("transformer", directory, 60.0, CPU), CPU, transformer.build(double=1, single=1, heads=1))
    trainer.restore()
    return trainer


def test_training_goes_on_bit_for_bit_where_it_was_left(directory: Path) -> None:
    straight = _trainer(directory)
    losses = [straight.step() for _ in range(3)]
    first = _trainer(directory)
    again = [first.step()]
    first.run.save(**first.state())
    second = _trainer(directory)
    assert (second.run.step, second.run.samples) == (1, 3)
    again += [second.step() for _ in range(2)]
    assert again == losses
    for name, weight in straight.model.state_dict().items():
        assert torch.equal(weight, second.model.state_dict()[name]), name
        assert torch.equal(straight.average.state_dict()[name], second.average.state_dict()[name]), name


def test_what_is_published_is_small_and_training_goes_on_from_it(
    directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = _trainer(directory)
    trainer.step()
    trainer.run.log(loss=1.0)
    trainer.run.save(**trainer.state())
    folder, fresh = tmp_path / "published", tmp_path / "fresh"
    # what isn't there yet is left out
    shutil.rmtree(directory / "scheduler")
    checkpoint.publish(directory, folder)
    checkpoint.unpack(fresh, folder)
    published = _published(folder)
    monkeypatch.setattr(checkpoint, "transformer", lambda: published)
    later = _trainer(fresh)
    assert (later.run.step, later.run.samples, later.run.warm_from) == (1, 3, 1)
    for name, weight in later.model.state_dict().items():
        torch.testing.assert_close(weight, trainer.model.state_dict()[name], atol=1e-3, rtol=1e-3)
    assert json.loads((fresh / "log.jsonl").read_text().splitlines()[0])["loss"] == 1.0


def test_the_rate_warms_up_stays_and_falls_before_a_known_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr("time.process_time", lambda: now)
    run = Run("text", tmp_path, 30.0, CPU, cooldown=10.0)
    assert run.rate_factor(10) == 0.1
    run.step, now = 10, 600.0
    assert run.rate_factor(10) == 1.0 and not run.over
    now = 25 * 60.0
    assert run.rate_factor(10) == 0.5
    now = 30 * 60.0
    assert run.rate_factor(10) == 0.02 and run.over
    run.save()
    later = Run("text", tmp_path, 30.0, CPU, cooldown=10.0, ends=45.0)
    later.resume(CPU)
    assert (later.step, later.minutes) == (10, 30.0) == (10, checkpoint.minutes_of("text", tmp_path))
    now += 10 * 60.0
    assert later.rate_factor(10) == 0.5 and not later.over
    now += 5 * 60.0
    assert later.over


def test_the_decoder_learns_on_while_latents_stay(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "FOLDER", directory / "nothing")
    monkeypatch.setattr(autoencoder, "_BATCH", 1)
    monkeypatch.setattr(autoencoder, "_WINDOW", 32)
    monkeypatch.setattr(autoencoder, "held_out_images", lambda count, *_: torch.zeros(1, 3, 32, 32))
    before = AutoencoderTiny.from_pretrained(directory / "vae")
    autoencoder.train(directory, CPU, 60.0, decoder_only=True, steps=2)
    after = AutoencoderTiny.from_pretrained(directory / "vae")
    images = torch.rand(1, 3, 32, 32)
    assert torch.equal(before.encode(images).latents, after.encode(images).latents)
    assert (before.config.shift_factor, before.config.scaling_factor) == (0.25, 2.0)
    assert (after.config.shift_factor, after.config.scaling_factor) == (0.25, 2.0)
    assert not torch.equal(before.decoder.layers[0].weight, after.decoder.layers[0].weight)


def test_every_prompt_fits_the_text_encoders_and_prompts_of_samples_are_held_out() -> None:
    tokenizer = text.build_tokenizer()
    longest = "a pineapple left of a watermelon in the sky at night"
    ids = text.tokenize(tokenizer, [longest, "two buses at sunset"])
    assert ids.shape == (2, text.LENGTH)
    assert ids[0, -1] == tokenizer.eos_token_id
    assert tokenizer.unk_token_id not in ids
    assert all(parse(prompt).held_out for prompt in held_out(20))
    assert not any(parse(prompt).held_out for prompt in training(20))
    assert all(parse(prompt).ground for prompt in held_out(20, background=True))
