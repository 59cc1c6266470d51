"""gan_2d.py in depth: its points, pictures, losses and flags, and what its default run promises."""

import math
import types

import numpy as np
import pytest
import torch
from PIL import Image

import gan_2d
from test_scripts import assert_same_bits, fails, read, short


@pytest.mark.parametrize("dataset", ["ring", "grid", "spiral", "lines"])
def test_points_are_where_their_density_says(dataset):
    torch.manual_seed(0)
    clusters = gan_2d.Clusters(dataset)
    points = clusters.draw(400_000)
    for blur in 0.0, 0.3:
        noise = blur * torch.randn_like(points)
        p, _, edges = gan_2d.plane(points, clusters, blur, cells=30)
        x, y = ((points + noise)[:, axis].numpy() for axis in (0, 1))
        counted, _, _ = np.histogram2d(y, x, bins=[edges.numpy()] * 2)
        assert p.sum().item() == pytest.approx(1, abs=1e-3)
        assert np.abs(counted / len(points) - p.numpy()).max() < 6 * math.sqrt(p.max() / len(points))


@pytest.mark.parametrize(("dataset", "number", "std"), [("ring", 8, 0.1), ("grid", 25, 0.2)])
def test_clusters_do_not_touch(dataset, number, std):
    clusters = gan_2d.Clusters(dataset)
    assert (len(clusters.centres), clusters.std) == (number, std)
    assert torch.pdist(clusters.centres).min() > 6 * std


def test_noise_on_counted_fakes_is_a_convolution():
    """The smooth q is what noise on each fake would give."""
    torch.manual_seed(0)
    ring = gan_2d.Clusters("ring")
    fakes = torch.tensor([0.51, -1.27]) + 0.3 * torch.randn(500_000, 2)
    _, smooth, _ = gan_2d.plane(fakes, ring, blur=0.1)
    _, noisy, _ = gan_2d.plane(fakes + 0.1 * torch.randn_like(fakes), ring)
    assert (smooth - noisy).abs().max() < 6 * math.sqrt(noisy.max() / len(fakes))
    assert smooth.sum().item() == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("dataset", ["ring", "grid", "spiral", "lines"])
def test_divergence_of_points_from_their_own_density_and_from_another(dataset):
    torch.manual_seed(0)
    clusters = gan_2d.Clusters(dataset)
    points = clusters.draw(50_000)

    def js(fakes):
        return gan_2d.measure(fakes, points[:5000], clusters)["js"]

    assert js(points) < 0.02  # what chance does
    assert js(points + 20) == pytest.approx(math.log(2), abs=1e-3)  # outside the grid
    if dataset == "lines":
        assert js(points + torch.tensor([1.0, 0.0])) == pytest.approx(math.log(2), abs=1e-3)
    half_right = 0.5 * math.log(4 / 3) + 0.25 * math.log(2 / 3) + 0.25 * math.log(2)
    assert js(torch.cat([points, points + 20])) == pytest.approx(half_right, abs=0.015)


def test_the_loss_of_any_d_bounds_the_divergence_from_below():
    """log 2 - L_D / 2 <= JSD, with equality for the ideal D."""
    p, q = torch.tensor([0.5, 0.3, 0.2]).double(), torch.tensor([0.1, 0.3, 0.6]).double()
    js = gan_2d.jensen_shannon(p, q)

    def bound(scores):  # E over p and q, from ten points of each
        where_p, where_q = (torch.repeat_interleave(torch.arange(3), (10 * r).round().long()) for r in (p, q))
        return math.log(2) - gan_2d.discriminator_loss(scores[where_p], scores[where_q], "minimax").item() / 2

    ideal = (p / (p + q)).logit()
    assert bound(ideal) == pytest.approx(js)
    for _ in range(20):
        assert bound(ideal + torch.randn(3)) < js
    assert bound(torch.zeros(3)) == pytest.approx(0, abs=1e-7)


def test_pictures_are_the_right_way_up(tmp_path):
    """D grows with x alone; the one cluster is on the right and all fakes are above the middle."""
    ring = gan_2d.Clusters("ring")
    ring.centres = torch.tensor([[2.0, 0.0]])
    discriminator = torch.nn.Linear(2, 1, bias=False)
    discriminator.weight.data = torch.tensor([[3.0, 0.0]])
    fakes = 0.1 * torch.randn(20_000, 2) + torch.tensor([0.0, 2.0])
    (tmp_path / "samples").mkdir()
    gan_2d.draw(discriminator, fakes, ring.draw(5), ring, tmp_path, 1, "non-saturating")
    picture = np.array(Image.open(tmp_path / "samples/epoch_0001.png").convert("RGB")).astype(int)
    assert picture.shape == (360, 720, 3)
    blue = picture[:, :, 2] - picture[:, :, 0]
    assert blue[180, 350] > 50 > -50 > blue[180, 10]  # left half: D, on its right and on its left
    assert blue[172:188, 652:668].mean() > 50  # right half: real points without fakes
    assert blue[52:68, 532:548].mean() < -50  # above the middle, fakes alone; rows count from the top
    assert len({*map(tuple, picture[300:340, 400:440].reshape(-1, 3))}) == 1  # grey, where no points are


def test_the_landscape_is_flat_for_one_distance_and_straight_for_the_other():
    args = types.SimpleNamespace(seed=42, width=64, device="cpu")
    divergence = [gan_2d.measured_distance(theta, "non-saturating", args) for theta in (0.0, 0.5, 1.5)]
    assert divergence == pytest.approx([0, math.log(2), math.log(2)], abs=0.02)
    wasserstein = [gan_2d.measured_distance(theta, "wasserstein-gp", args) for theta in (0.0, 0.5, 1.5)]
    assert wasserstein == pytest.approx([0, 0.5, 1.5], abs=0.05)


def test_lines_end_with_the_landscape(tmp_path, monkeypatch, no_plots):
    asked = []
    monkeypatch.setattr(gan_2d, "measured_distance", lambda theta, loss, args: asked.append(theta) or theta)
    gan_2d.main(short("gan_2d", tmp_path / "run", "--dataset", "lines"))
    assert (tmp_path / "run/landscape.png").exists()
    assert asked == sorted(asked[:10]) * 2  # both distances


@pytest.mark.parametrize("loss", gan_2d.LOSSES)
def test_all_losses_train_and_resume_exactly(loss, tmp_path, no_plots):
    gan_2d.main(short("gan_2d", tmp_path / "whole", "--loss", loss))
    gan_2d.main(short("gan_2d", tmp_path / "run", "--loss", loss, "--epochs", 1))
    gan_2d.main(["--resume", str(tmp_path / "run/checkpoint.pt"), "--epochs", "2"])
    whole, resumed = read(tmp_path / "whole/checkpoint.pt"), read(tmp_path / "run/checkpoint.pt")
    assert_same_bits(whole, resumed)
    steps = 5 if loss == "wasserstein-gp" else 1
    assert whole["settings"]["d_steps"] == steps
    assert whole["optimizer_d"]["state"][0]["step"] == 2 * 6 * steps
    weight = {"wasserstein-gp": 10.0, "relativistic": 1.0}.get(loss, 0.0)
    assert whole["settings"]["penalty_weight"] == weight
    assert all(math.isfinite(value) for means in whole["history"] for value in means.values())


def test_every_step_has_points_of_its_own(tmp_path, monkeypatch, no_plots):
    batches, train_step = [], gan_2d.train_step
    monkeypatch.setattr(gan_2d, "train_step", lambda **all: batches.append(all["real"]) or train_step(**all))
    gan_2d.main(short("gan_2d", tmp_path / "run", "--d-steps", 3))
    assert [len(real) for real in batches] == [3 * 4] * 12
    assert len(torch.cat(batches).unique(dim=0)) == 12 * 3 * 4


def test_flags_win_over_the_defaults_of_a_loss_and_over_a_checkpoint(tmp_path, no_plots):
    args = gan_2d.parse_args(["--loss", "wasserstein-gp", "--d-steps", "2"])
    assert (args.d_steps, args.penalty_weight) == (2, 10)
    gan_2d.main(short("gan_2d", tmp_path / "run", "--epochs", 1, "--loss", "wasserstein-gp", "--d-steps", 2))
    resume = ["--resume", str(tmp_path / "run/checkpoint.pt"), "--epochs", "2", "--lr-d", "1e-5"]
    assert gan_2d.parse_args(resume).d_steps == 2
    gan_2d.main([*resume, "--beta2", "0.9"])
    saved = read(tmp_path / "run/checkpoint.pt")
    for name, rate in ("optimizer_g", 1e-3), ("optimizer_d", 1e-5):
        assert (saved[name]["param_groups"][0]["lr"], saved[name]["param_groups"][0]["betas"]) == (
            rate,
            (0.5, 0.9),
        )


@pytest.mark.parametrize(
    "flags", ["--dataset mnist", "--loss hinge", "--beta1 1", "--beta2 1.5", "--d-steps 0", "--steps 0"]
)
def test_a_wrong_flag_is_named_in_one_line(flags, tmp_path, capsys):
    fails(gan_2d, ["--out-dir", tmp_path / "run", *flags.split()], capsys, flags.split()[0])
    assert not (tmp_path / "run").exists()


def test_a_film_has_at_most_100_pictures(tmp_path):
    (tmp_path / "samples").mkdir()
    for epoch in range(1, 251):
        Image.new("RGB", (8, 8), (epoch, 0, 0)).save(tmp_path / "samples" / f"epoch_{epoch:04d}.png")
    gan_2d.film(tmp_path)
    assert 50 < Image.open(tmp_path / "progress.gif").n_frames <= 100


def test_the_fakes_reach_all_clusters(tmp_path, no_plots):
    gan_2d.main(["--out-dir", str(tmp_path / "run"), "--epochs", "30"])
    last = read(tmp_path / "run/checkpoint.pt")["history"][-1]
    assert last["modes"] >= 7
    assert last["near"] > 0.5
    assert last["sliced"] < 0.3
    assert math.log(2) - last["d_loss"] / 2 < last["js"] < 0.5  # what D knows of it bounds it from below


def test_divergence_in_closed_form():
    p, q = torch.tensor([0.5, 0.5, 0.0, 0.0]), torch.tensor([0.0, 0.0, 0.25, 0.75])
    assert gan_2d.jensen_shannon(p, q) == pytest.approx(math.log(2))
    assert gan_2d.jensen_shannon(p, p) == 0
    half = gan_2d.jensen_shannon(torch.tensor([1.0, 0.0]), torch.tensor([0.5, 0.5]))
    assert half == pytest.approx((math.log(4 / 3) + 0.5 * math.log(2 / 3) + 0.5 * math.log(2)) / 2)
    outside = gan_2d.jensen_shannon(torch.tensor([0.5]), torch.tensor([0.0]))  # what lacks of 1 lies outside
    assert outside == pytest.approx(half)


def test_distance_of_a_set_that_was_moved():
    x, shift = torch.randn(4000, 2), torch.tensor([3.0, -4.0])
    assert gan_2d.sliced_wasserstein(x, x + shift) == pytest.approx(
        5 * 2 / math.pi, rel=1e-3
    )  # mean of |cos|
    assert gan_2d.sliced_wasserstein(x, x[torch.randperm(4000)]) == 0


def test_counts_clusters_that_have_a_tenth_of_their_due():
    """Of 1,000 points a cluster of eight is due 125, so 13 count, and 12 do not; 3 std are 0.3."""
    ring = gan_2d.Clusters("ring")
    away = ring.centres[3:4] + torch.tensor([[0.29, 0.0]])
    for count, modes in (13, 2), (12, 1):
        points = torch.cat([ring.centres[:1].expand(900, -1), away.expand(count, -1), torch.zeros(100, 2)])
        measures = gan_2d.measure(points[:1000], ring.draw(50), ring)
        assert measures["modes"] == modes
        assert measures["near"] == pytest.approx((900 + count) / 1000, abs=0.013)
    assert gan_2d.measure(away.expand(1000, -1) + 0.05, ring.draw(50), ring)["modes"] == 0
