"""evidence/: what benchmark.py times and lets learn."""

import re

import pytest
import torch

import benchmark
from test_scripts import IMAGES, ROOT, TRANSLATORS


@pytest.fixture(autouse=True)
def at_root(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.mark.parametrize("name", IMAGES)
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
