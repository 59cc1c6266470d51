"""evidence/: what benchmark.py times and lets learn, and what claims.py counts."""

import math

import numpy as np
import pytest
import torch

import benchmark
import claims
from test_scripts import IMAGES, ROOT, TRANSLATORS


@pytest.fixture(autouse=True)
def at_root(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.mark.parametrize("name", IMAGES)
def test_a_step_can_be_timed_in_all_forms(name):
    device = torch.device("cpu")
    for precision in benchmark.precisions(name):
        step, batch = benchmark.ours(name, device, precision)
        assert all(tensor.min() >= -1 for tensor in batch().values())
        step()
    benchmark.ours(name, device, "fp32", channels_last=False)[0]()
    player, step = benchmark.tutorial(name, device)
    before = next(player.generator.parameters()).detach().clone()
    step()
    assert not torch.equal(before, next(player.generator.parameters()))
    both = name in ("dcgan32_wgan_sn", "dcgan64_celeba", "stylegan", *TRANSLATORS)
    assert benchmark.precisions(name) == (("fp32", "bf16") if both else ("fp32",))


@pytest.mark.parametrize("who", ["script", "tutorial"])
@pytest.mark.parametrize("name", ["cgan", "stylegan", "pix2pix", "cyclegan"])
def test_what_a_script_learns_in_a_time(name, who):
    """The same steps as the script's own: an epoch of few images ends before the time does."""
    flags = ["--limit", "24", "--batch-size", "4", "--epochs", "1"]
    images, taken, steps = benchmark.samples_of(name, who, flags, 1.0, 30, "cpu")
    side = 28 if name == "cgan" else 32
    assert (images.dtype, images.shape) == (torch.uint8, (30, 1, side, side))
    assert taken < 60
    if who == "script":
        assert steps == (3 if name == "cyclegan" else 6)  # half of the 24 digits are A there
    else:
        assert steps > 0


@pytest.mark.parametrize("name", ["cgan", "cyclegan"])
def test_the_batches_are_those_of_the_script(name, monkeypatch, tmp_path):
    """Bit for bit, in the same order."""
    script, steps = benchmark.importlib.import_module(name), []
    train_step = script.train_step
    monkeypatch.setattr(script, "train_step", lambda **given: steps.append(given) or train_step(**given))
    flags = ["--limit", "24", "--batch-size", "4", "--epochs", "2", "--device", "cpu", "--seed", "3"]
    script.main([*flags, "--out-dir", str(tmp_path / "run")])
    ours = list(benchmark.batches(script, script.parse_args(flags)))
    assert len(ours) == len(steps)
    for batch, given in zip(ours, steps):
        assert all(torch.equal(tensor, given[name]) for name, tensor in batch.items())


def test_a_product_of_matrices_is_also_a_convolution():
    product, convolution = (job() for job in benchmark.products(torch.device("cpu")).values())
    assert torch.allclose(convolution.view(2048, 2048), product, atol=1e-2)


def test_the_quick_table_adds_up(capsys):
    benchmark.main(["--quick", "--script", "pix2pix", "--device", "cpu", "--markdown"])
    head, *rows = capsys.readouterr().out.splitlines()
    names, _, values = ([cell.strip() for cell in row.strip("|").split("|")] for row in rows)
    row = dict(zip(names, values))
    assert row["script"] == "pix2pix.py"
    rate = max(float(text.split()[-1].replace(",", "")) for text in head.split(" GFLOP/s")[:-1])
    share = float(row["images/s fp32"].replace(",", "")) * float(row["GFLOP"]) / rate
    assert float(row["of matmul"].strip("%")) == pytest.approx(100 * share, rel=0.02, abs=0.6)
    assert 0.1 < float(row["memory"].split()[0]) < 5
    for column in ("images/s fp32", "images/s bf16", "tutorial fp32", "tutorial bf16"):
        assert float(row[column].replace(",", "")) > 0
    assert benchmark.table([{"a": "1"}, {"a": "22", "b": "3"}], False) == "a   b\n1\n22  3"


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
    even = claims.class_report(torch.eye(10).repeat(5, 1))
    assert (even["classes"], even["entropy"], even["class_accuracy"]) == (10, pytest.approx(1), None)
    assert even["confidence"] == pytest.approx(math.e / (math.e + 9))
