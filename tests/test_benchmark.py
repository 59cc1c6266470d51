"""evidence/: benchmark.py on the scripts of the light frame, and what claims.py counts."""

import math

import numpy as np
import pytest
import torch

import benchmark
import claims
from test_scripts import IMAGES, ROOT


@pytest.mark.parametrize("name", IMAGES)
def test_a_step_can_be_timed_in_all_forms(name):
    device = torch.device("cpu")
    for precision in benchmark.precisions(name):
        step, batch = benchmark.ours(name, device, precision)
        assert batch()["real"].min() >= -1
        step()
    benchmark.ours(name, device, "fp32", channels_last=False)[0]()
    player, step = benchmark.tutorial(name, device)
    before = next(player.generator.parameters()).detach().clone()
    step()
    assert not torch.equal(before, next(player.generator.parameters()))
    both = name in ("dcgan32_wgan_sn", "dcgan64_celeba")
    assert benchmark.precisions(name) == (("fp32", "bf16") if both else ("fp32",))


@pytest.mark.parametrize("who", ["script", "tutorial"])
def test_what_a_script_learns_in_a_time(who, monkeypatch):
    """The same steps as the script's own: an epoch of few images ends before the time does."""
    monkeypatch.chdir(ROOT)
    flags = ["--limit", "24", "--batch-size", "4", "--epochs", "1"]
    images, labels, taken, steps = benchmark.light_samples("cgan", who, flags, 1.0, 30, "cpu")
    assert (images.dtype, images.shape) == (torch.uint8, (30, 1, 28, 28))
    assert labels.tolist() == [*range(10)] * 3
    assert taken < 60
    assert steps == 6 if who == "script" else steps > 0


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
