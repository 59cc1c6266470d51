"""evidence/: what benchmark.py times and lets learn, and what claims.py changes, trains and measures."""

import json
import math
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn
from torchvision.utils import save_image

import benchmark
import claims
import dcgan_mnist
import wgan_gp
from test_scripts import ROOT, TRANSLATORS


@pytest.fixture(autouse=True)
def at_root(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.mark.parametrize("name", benchmark.SHAPES)
def test_a_step_can_be_timed_in_all_forms(name):
    device = torch.device("cpu")
    for precision in benchmark.precisions(name, device):
        benchmark.ours(name, device, precision)()
    player, step = benchmark.plain(name, device)
    before = next(player.generator.parameters()).detach().clone()
    step()
    assert not torch.equal(before, next(player.generator.parameters()))
    both = name in ("dcgan32_wgan_sn", "dcgan64_celeba", "stylegan", *TRANSLATORS)
    assert benchmark.precisions(name, device) == (["fp32", "bf16"] if both else ["fp32"])


def test_a_call_is_timed_over_many_calls(monkeypatch):
    """One to find out how many fill the time, then these; the clock ticks once a call."""
    now = [0.0]
    monkeypatch.setattr(benchmark.time, "perf_counter", lambda: now[0])
    calls = []

    def function():
        calls.append(1)
        now[0] += 1.0 if len(calls) == 1 else 0.5  # the first is slow, as first calls are

    assert benchmark.seconds(function, torch.device("cpu"), least=20) == 0.5
    assert len(calls) == 21


@pytest.mark.parametrize("name", ["cgan", "stylegan", "pix2pix", "cyclegan"])
def test_what_a_script_learns_in_a_time_is_what_its_own_training_learns(name, tmp_path):
    """An epoch of few images ends before the time does: the same weights, bit for bit."""
    script = benchmark.importlib.import_module(name)
    flags = ["--limit", "24", "--batch-size", "4", "--epochs", "1"]
    generator, taken, steps = benchmark.script_learns(script, flags, 60.0, "cpu")
    assert steps == (3 if name == "cyclegan" else 6)  # half of the 24 digits are A there
    assert 0 < taken < 60
    script.main([*flags, "--dataset", "mnist", "--device", "cpu", "--out-dir", str(tmp_path / "run")])
    checkpoint = torch.load(tmp_path / "run/checkpoint.pt", weights_only=True)
    trained = checkpoint.get("ema", checkpoint["generator"])
    assert all(torch.equal(tensor, trained[key]) for key, tensor in generator.state_dict().items())
    side = 28 if name == "cgan" else 32
    images = benchmark.samples_of(script, generator, 30, "cpu")
    assert images.shape == (30, 1, side, side)
    assert images.min() >= 0
    assert images.max() <= 1


def test_a_script_that_learns_stops_when_its_time_is_over():
    flags = ["--limit", "256", "--epochs", "10000"]
    _, taken, steps = benchmark.script_learns(
        benchmark.importlib.import_module("dcgan_mnist"), flags, 1.0, "cpu"
    )
    assert 1 <= taken < 20
    assert steps < 2000


def test_the_quick_table_adds_up(capsys):
    benchmark.main(["--quick", "--script", "pix2pix", "--device", "cpu"])
    first, _, head, _, values = capsys.readouterr().out.splitlines()
    assert re.match(r"torch \d+\.\d+.*, \d+ threads of \S", first)
    row = dict(zip(*[[cell.strip() for cell in line.strip("|").split("|")] for line in (head, values)]))
    assert row["script"] == "pix2pix.py"
    speed, plain = (float(row[column].replace(",", "")) for column in ("images/s fp32", "plain loop"))
    assert float(row["times as fast"]) == pytest.approx(speed / plain, abs=0.02)
    assert benchmark.table([{"a": "1"}, {"a": "22", "b": "3"}]).splitlines()[2:] == ["| 1 |  |", "| 22 | 3 |"]


# %% claims.py
def test_claims_count_the_classes_of_samples():
    logits = torch.full((1000, 10), -50.0)
    predicted = torch.tensor([0] * 500 + [1] * 250 + [2] * 241 + [3] * 9)  # 3 has less than 1%
    logits[torch.arange(1000), predicted] = 50.0
    labels = predicted.clone()
    labels[:100] = 9
    report = claims.class_report(logits, labels)
    shares = np.array([0.5, 0.25, 0.241, 0.009])
    assert (report["classes"], report["confidence"]) == (3, pytest.approx(1))
    assert report["entropy"] == pytest.approx(-(shares * np.log10(shares)).sum(), rel=1e-9)
    assert report["class_accuracy"] == pytest.approx(0.9)
    assert claims.class_report(torch.eye(10).repeat(5, 1))["confidence"] == pytest.approx(
        math.e / (math.e + 9)
    )


def test_changes_from_outside_last_as_long_as_their_run():
    original = dcgan_mnist.Discriminator
    images = torch.randn(4, 1, 28, 28)
    for edit in claims.without_batch_norm, claims.with_pooling, claims.with_relu, claims.blind:
        with claims.edited("Discriminator", edit)(dcgan_mnist):
            network = dcgan_mnist.Discriminator(16, 3)
            assert network(images).shape == (4, 1)
        kinds = {type(layer) for layer in network.modules()}
        assert (nn.BatchNorm2d in kinds) == (edit is not claims.without_batch_norm)
        assert (nn.MaxPool2d in kinds) == (edit is claims.with_pooling)
        assert (nn.LeakyReLU in kinds) == (edit is not claims.with_relu)
    assert dcgan_mnist.Discriminator is original
    with claims.edited("Critic", claims.with_batch_norm)(wgan_gp):
        kinds = [type(layer) for layer in wgan_gp.Critic(16, 3).layers]
    blocks = [nn.Conv2d, nn.BatchNorm2d, nn.LeakyReLU] * 3
    assert kinds == [*blocks[:1], *blocks[2:], nn.Flatten, nn.Linear]
    with claims.beta1_of_0_9(dcgan_mnist):
        parts = dcgan_mnist.build(dcgan_mnist.parse_args(["--device", "cpu"]))
    assert parts["optimizer_g"].param_groups[0]["betas"] == (0.9, 0.999)


def test_a_blind_discriminator_adds_up_what_patches_of_ten_pixels_say():
    """A second derivative by two pixels that are ten rows apart is 0; with a third convolution it is not."""
    rows = torch.zeros(1, 1, 28, 28, dtype=torch.float64)

    def mixed_difference(network):
        def score(upper, lower):
            image = rows.clone()
            image[..., 8, 10:18], image[..., 19, 10:18] = upper, lower
            return network.double().eval()(image).item()

        return score(1, 1) - score(1, 0) - score(0, 1) + score(0, 0)

    assert abs(mixed_difference(claims.blinded(dcgan_mnist.Discriminator(16, 3)))) < 1e-12
    assert abs(mixed_difference(dcgan_mnist.Discriminator(16, 2))) < 1e-12
    assert abs(mixed_difference(dcgan_mnist.Discriminator(16, 3))) > 1e-9


def test_digits_are_put_together_from_two():
    digits = torch.arange(1.0, 4.0)[:, None, None, None].expand(3, 1, 28, 28)
    both = claims.halves(digits, torch.tensor([1, 2, 0]))
    assert both[:, 0, :9, 0].unique(dim=1).flatten().tolist() == [1, 2, 3]
    assert both[:, 0, 19:, 0].unique(dim=1).flatten().tolist() == [2, 3, 1]
    assert claims.halves(digits)[:, 0, 19:, 0].unique(dim=1).flatten().tolist() == [1, 2, 3]
    assert (both[:, :, 9:19] == -1).all()


@pytest.fixture
def small_setting(tmp_path, monkeypatch, no_plots):
    """A function that makes a setting of two epochs of 200 digits each, and 200 samples are measured."""
    monkeypatch.setattr(claims, "RUNS", tmp_path)
    monkeypatch.setattr(claims, "SAMPLES", 200)
    command = "dcgan_mnist --limit 200 --epochs 2 --batch-size 50"
    return lambda change=None: claims.Setting("small", command, change, (42,))


def test_a_run_that_was_stopped_goes_on_and_none_is_trained_twice(small_setting, monkeypatch):
    setting, steps, train_step = small_setting(), [], dcgan_mnist.train_step

    def stopped_in_the_second_epoch(**given):
        steps.append(1)
        if len(steps) == 6:
            raise KeyboardInterrupt
        return train_step(**given)

    with monkeypatch.context() as patch:
        patch.setattr(dcgan_mnist, "train_step", stopped_in_the_second_epoch)
        with pytest.raises(RuntimeError, match="130"):
            claims.train(setting, 42)
    claims.train(setting, 42)
    with monkeypatch.context() as patch:
        patch.setattr(dcgan_mnist, "main", lambda argv: pytest.fail("trained twice"))
        claims.train(setting, 42)
    checkpoint = torch.load(setting.folder(42) / "checkpoint.pt", weights_only=True)
    dcgan_mnist.main(
        [*setting.command.split()[1:], "--device", "cpu", "--out-dir", str(claims.RUNS / "whole")]
    )
    whole = torch.load(claims.RUNS / "whole/checkpoint.pt", weights_only=True)
    assert all(torch.equal(whole["generator"][key], value) for key, value in checkpoint["generator"].items())
    seconds = json.loads((setting.folder(42) / "seconds.json").read_text())
    assert 0 < seconds["1"] < seconds["2"]


def test_a_changed_run_is_measured_with_its_change_and_as_fid_does(small_setting, monkeypatch):
    """From the command line, with samples of the seed that claims.py takes."""
    monkeypatch.setattr(claims, "EPOCHS", set())
    setting = small_setting(claims.edited("Generator", claims.without_batch_norm))
    assert setting.folder(42) != small_setting().folder(42)
    claims.train(setting, 42)
    (row,) = claims.measure(setting, 42)
    assert (row["epoch"], row["seed"]) == (2, 42)
    with setting.change(dcgan_mnist):
        generator = dcgan_mnist.load_generator(setting.folder(42) / "checkpoint.pt")
    assert not any(isinstance(layer, nn.BatchNorm2d) for layer in generator.modules())
    torch.manual_seed(0)
    folder = claims.RUNS / "images"
    folder.mkdir()
    for number, image in enumerate(dcgan_mnist.sample(generator, torch.randn(200, 100))):
        save_image(image, folder / f"{number:03d}.png")
    command = ["fid.py", "mnist:test", str(folder), "--features", "classifier", "--json"]
    output = subprocess.run([sys.executable, *command], capture_output=True, text=True, check=True).stdout
    expected = json.loads(output)
    assert row["distance"] == pytest.approx(expected["frechet_distance"], rel=1e-4)
    for name in "precision", "recall":
        assert row[name] == pytest.approx(expected[name], abs=1e-3)


def test_tables_show_means_and_extremes(tmp_path):
    setting = claims.Setting("a setting", "dcgan_mnist")
    claim = claims.Claim("text", (setting,), ("distance", "distance after 30 s", "range of d_loss"))
    rows = [
        {
            "setting": setting.name,
            "seed": seed,
            "epoch": epoch,
            "seconds": 20.0 * epoch,
            "distance": value,
            "d_loss": epoch,
        }
        for seed, values in ((42, (8.0, 4.0)), (43, (6.0, 2.0)))
        for epoch, value in enumerate(values, 1)
    ]
    claims.write_rows(tmp_path / "rows.csv", rows)
    assert claims.read_rows(tmp_path / "rows.csv") == rows
    cells = claims.table(claim, rows).splitlines()[-1].strip("| ").split(" | ")
    assert cells == ["a setting", "2", "2", "3.00 (2.00 to 4.00)", "7.00 (6.00 to 8.00)", "1 to 2"]


@pytest.mark.parametrize("name", claims.CLAIMS)
def test_the_commands_of_claims_are_valid(name):
    for setting in claims.CLAIMS[name].settings:
        assert setting.args.epochs >= 1
    folders = [setting.folder(42) for setting in claims.CLAIMS[name].settings]
    assert len({*folders}) == len(folders)


def test_claims_are_listed_from_any_folder(tmp_path):
    command = [sys.executable, str(ROOT / "evidence/claims.py"), "--list"]
    output = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    assert "python dcgan_mnist.py --epochs 10 (Discriminator_blind), 3 seeds" in output
