"""fid.py in depth: metrics against closed forms and loops over pairs, the network against another."""

import ast
import csv
import hashlib
import itertools
import json
import math
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torchvision import datasets
from torchvision.transforms.functional import gaussian_blur, resize

import dcgan64_celeba
import fid
from test_scripts import ROOT, fails


def gaussian(size, count, seed):
    """Mean and covariance of correlated rows, and the rows (count, size), in float64."""
    rng = torch.Generator().manual_seed(seed)
    rows = torch.randn(count, size, dtype=torch.float64, generator=rng)
    rows = rows @ torch.randn(size, size, dtype=torch.float64, generator=rng) + torch.arange(size) / size
    return rows.mean(0), torch.cov(rows.T), rows


# %% The Frechet distance
def test_the_distance_of_diagonal_gaussians_has_a_closed_form():
    """In one dimension it is (m1 - m2)^2 + (s1 - s2)^2; of diagonal covariances, the sum of these."""
    m1, s1 = torch.tensor([1.0, -2.0, 0.5]).double(), torch.tensor([0.3, 2.0, 1e-3]).double()
    m2, s2 = torch.tensor([-1.5, 0.0, 0.5]).double(), torch.tensor([1.1, 1.9, 4.0]).double()
    for i in (slice(0, 1), slice(1, 2), slice(2, 3), slice(None)):
        expected = ((m1[i] - m2[i]) ** 2 + (s1[i] - s2[i]) ** 2).sum().item()
        distance = fid.frechet_distance(m1[i], torch.diag(s1[i] ** 2), m2[i], torch.diag(s2[i] ** 2))
        assert distance.shape == ()
        assert distance.item() == pytest.approx(expected, rel=1e-9)
    zero = torch.zeros(3, 3).double()  # all images alike
    assert fid.frechet_distance(m1, zero, m2, zero).item() == pytest.approx(((m1 - m2) ** 2).sum().item())
    one_sided = fid.frechet_distance(m1, zero, m2, torch.diag(s2**2)).item()
    assert one_sided == pytest.approx(((m1 - m2) ** 2 + s2**2).sum().item())


@pytest.mark.parametrize("size", [2, 30, 200])
def test_the_trace_of_the_root_is_that_of_the_eigenvalues_of_the_product(size):
    (m1, s1, _), (m2, s2, _) = gaussian(size, 3 * size, 1), gaussian(size, 4 * size, 2)
    roots = np.sqrt(np.linalg.eigvals(s1.numpy() @ s2.numpy()).astype(complex)).real.sum()
    expected = ((m1 - m2) ** 2).sum() + s1.trace() + s2.trace() - 2 * roots
    distance = fid.frechet_distance(m1, s1, m2, s2)
    assert distance.item() == pytest.approx(expected.item(), rel=1e-8)
    assert fid.frechet_distance(m2, s2, m1, s1).item() == pytest.approx(distance.item(), rel=1e-9)
    rotation, _ = torch.linalg.qr(gaussian(size, size, 3)[2])
    turned = [rotation @ m1, rotation @ s1 @ rotation.T, rotation @ m2, rotation @ s2 @ rotation.T]
    assert fid.frechet_distance(*turned).item() == pytest.approx(distance.item(), rel=1e-8)
    assert 0 <= fid.frechet_distance(m1, s1, m1, s1).item() <= 1e-9 * s1.trace().item()


def test_fewer_images_than_features_make_singular_covariances():
    """100 rows of 400 features; tr (S1 S2)^(1/2) is the nuclear norm of X1 X2' / 99, X the centred rows."""
    (m1, s1, x1), (m2, s2, x2) = gaussian(400, 100, 4), gaussian(400, 100, 5)
    singular = torch.linalg.svdvals((x1 - m1) @ (x2 - m2).T) / 99
    expected = ((m1 - m2) ** 2).sum() + s1.trace() + s2.trace() - 2 * singular.sum()
    assert fid.frechet_distance(m1, s1, m2, s2).item() == pytest.approx(expected.item(), rel=1e-10)
    assert fid.frechet_distance(m1, s1, m1, s1).item() <= 1e-9 * s1.trace().item()
    # Variances from 1 to 1e-14: rounding makes the small eigenvalues of a product near 1e-16, of any sign.
    deviations, zero = torch.logspace(0, -7, 40).double(), torch.zeros(40).double()
    rotation, _ = torch.linalg.qr(gaussian(40, 40, 6)[2])
    s1, s2 = (rotation @ torch.diag((scale * deviations) ** 2) @ rotation.T for scale in (1, 2))
    expected = (deviations**2).sum().item()
    assert fid.frechet_distance(zero, s1, zero, s2).item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("count", [2, 100, 2500])
def test_moments_keep_their_digits_far_from_zero(count):
    rows = gaussian(12, count, 7)[2] + 1e5  # sums of squares would lose ten digits
    mu, sigma = fid.moments(rows)
    assert torch.allclose(mu, rows.mean(0), rtol=1e-14)
    assert torch.allclose(sigma, torch.cov(rows.T), rtol=1e-9, atol=1e-9)
    mu, sigma = fid.moments(rows.float())  # what networks give
    assert mu.dtype == sigma.dtype == torch.float64
    assert torch.allclose(sigma, torch.cov(rows.float().double().T), rtol=1e-9, atol=1e-9)


# %% KID, Inception Score, precision and recall
def test_the_kid_is_a_sum_over_pairs():
    x, y = gaussian(3, 5, 9)[2], gaussian(3, 7, 10)[2]

    def kernel(a, b):
        return (sum(p * q for p, q in zip(a.tolist(), b.tolist())) / 3 + 1) ** 3

    xx = [kernel(a, b) for a, b in itertools.permutations(x, 2)]  # no row with itself
    yy = [kernel(a, b) for a, b in itertools.permutations(y, 2)]
    xy = [kernel(a, b) for a in x for b in y]
    expected = sum(xx) / 20 + sum(yy) / 42 - 2 * sum(xy) / 35
    assert fid.squared_mmd(x, y).item() == pytest.approx(expected, rel=1e-12)
    mean, spread = fid.kernel_distance(x.float(), y[:5].float(), subsets=3)  # three times the same, all of it
    assert mean == pytest.approx(fid.squared_mmd(x, y[:5]).item(), rel=1e-5)
    assert spread == pytest.approx(0, abs=1e-9 * abs(mean))


def test_the_kid_is_unbiased():
    """0 between two halves of one set, within its error; and it sees a set that is shifted."""
    a, b = torch.randn(4000, 8, generator=torch.Generator().manual_seed(0)).split(2000)
    mean, spread = fid.kernel_distance(a, b, subsets=20, size=500)
    assert abs(mean) < 3 * spread
    assert fid.kernel_distance(a, b + 0.5, subsets=20, size=500)[0] > 10 * spread


def test_the_inception_score_of_known_predictors():
    sure = 1e3 * torch.eye(10).repeat(20, 1)  # one-hot, and all classes equally often in each tenth
    mean, spread = fid.inception_score(sure)
    assert mean == pytest.approx(10, rel=1e-9)
    assert spread == pytest.approx(0, abs=1e-9)
    assert fid.inception_score(torch.zeros(200, 10))[0] == pytest.approx(1, rel=1e-12)
    assert fid.inception_score(sure[:1].repeat(200, 1))[0] == pytest.approx(1, rel=1e-9)
    halves = torch.cat([sure[:100], torch.zeros(100, 10)])
    mean, spread = fid.inception_score(halves, splits=2)
    assert (mean, spread) == (pytest.approx(5.5), pytest.approx(4.5))  # 10 and 1
    p = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.1, 0.8]], dtype=torch.float64)
    kl = (p * (p / p.mean(0)).log()).sum(1)
    assert fid.inception_score(p.log() + 3, splits=1)[0] == pytest.approx(kl.mean().exp().item(), rel=1e-12)


def test_precision_and_recall_are_loops_over_pairs():
    rng = torch.Generator().manual_seed(0)
    real, fake = torch.randn(50, 4, generator=rng), 0.7 * torch.randn(40, 4, generator=rng) + 0.8

    def covered(points, centres, k):
        """The share of points in the ball of a centre, which reaches to the kth nearest other centre."""
        radii = [sorted((a.double() - b.double()).norm() for b in centres)[k] for a in centres]
        balls = list(zip(centres, radii))
        inside = [any((p.double() - centre.double()).norm() <= r for centre, r in balls) for p in points]
        return sum(inside) / len(points)

    for k in (1, 3):
        expected = covered(fake, real, k), covered(real, fake, k)
        assert fid.precision_recall(real, fake, k) == pytest.approx(expected)
        assert 0.1 < min(expected) < max(expected) < 1
    assert fid.precision_recall(real, real.flip(0)) == (1, 1)
    assert fid.precision_recall(real, fake + 100) == (0, 0)


def test_precision_and_recall_of_more_rows_than_are_compared_at_once():
    rng = torch.Generator().manual_seed(0)
    many, more = (torch.randn(count, 4, generator=rng) for count in (1100, 1300))
    squares = torch.cdist(more.double(), many.double()).square()
    recalled = (squares.T <= fid.squared_radii(more, 3)).any(1).double().mean().item()
    precise = (squares <= fid.squared_radii(many, 3)).any(1).double().mean().item()
    assert fid.precision_recall(many, more) == pytest.approx((precise, recalled))


def test_copies_are_at_distance_0_and_have_no_recall():
    rng = torch.Generator().manual_seed(0)
    copies = torch.rand(10, 300, generator=rng).repeat(4, 1)  # whose radii are 0, in spite of rounding
    assert not fid.squared_radii(copies, 3).any()
    assert fid.precision_recall(copies, copies[:20]) == (1, 1)
    digits = datasets.MNIST(ROOT / "data").data[:2050, None] / 255
    features = F.adaptive_avg_pool2d(digits, 7).flatten(1)
    real, other, few = features.split([1000, 1000, 50])
    assert fid.precision_recall(real, other)[1] > 0.8
    assert fid.precision_recall(real, few.repeat(20, 1))[1] == 0  # a copy's nearest neighbours are copies


# %% The network of the FID
@pytest.fixture(scope="session")
def inception(tmp_path_factory):
    """A file of random weights with the names of the released one; activations stay near 1."""
    network = fid.FIDInception()
    rng = torch.Generator().manual_seed(0)
    for name, weight in network.state_dict().items():
        if weight.ndim == 4:
            weight.normal_(0, math.sqrt(2 / weight[0].numel()), generator=rng)
        elif name.endswith(("bn.weight", "running_var")):
            weight.uniform_(0.5, 1.5, generator=rng)
        elif weight.is_floating_point():
            weight.normal_(0, 0.1, generator=rng)
    state = {name: weight for name, weight in network.state_dict().items() if "num_batches" not in name}
    path = tmp_path_factory.mktemp("weights") / "w.pth"
    torch.save(state, path)  # without the count of batches, which is younger than the released file
    return path


def enlarged(images):
    """Bilinear to 299x299 with pixels as squares, written as two matrices; images (N, C, H, W) in [0, 1]."""

    def matrix(size):
        place = ((torch.arange(299, dtype=torch.float64) + 0.5) * size / 299 - 0.5).clamp(0, size - 1)
        low = place.floor().long().clamp(max=max(size - 2, 0))
        rows = torch.zeros(299, size, dtype=torch.float64)
        rows[torch.arange(299), low] = 1 - (place - low)
        rows[torch.arange(299), (low + 1).clamp(max=size - 1)] += place - low
        return rows

    return matrix(images.shape[2]) @ images.double() @ matrix(images.shape[3]).T


def reference_inception(state, images):
    """Features and logits of the FID Inception for images (N, 3, 299, 299) in [-1, 1]."""

    def conv(x, *names, stride=1, same=True):
        """One after another, the last with this stride; padded to keep the size where that is 1."""
        for name in names:
            step, weight = stride if name == names[-1] else 1, state[f"{name}.conv.weight"]
            padding = [size // 2 if step == 1 and same else 0 for size in weight.shape[2:]]
            x = F.conv2d(x, weight, stride=step, padding=padding)
            names_of_bn = "running_mean", "running_var", "weight", "bias"
            mean, variance, scale, shift = (state[f"{name}.bn.{key}"][:, None, None] for key in names_of_bn)
            x = ((x - mean) / (variance + 1e-3).sqrt() * scale + shift).clamp(min=0)
        return x

    def average(x):  # padding does not count: the sum over the window by the number of pixels in it
        ones = torch.ones(1, 1, 3, 3, dtype=x.dtype)
        total = F.conv2d(x.flatten(0, 1)[:, None], ones, padding=1).view_as(x)
        return total / F.conv2d(torch.ones_like(x[:1, :1]), ones, padding=1)

    def largest(x, stride=1, padding=1):
        return F.max_pool2d(x, 3, stride, padding)

    def block(x, block, *branches, stride=1, pool=average):
        """Branches side by side, each a chain of convolutions, and the pooled input."""
        chains = [[f"{block}.branch{name}" for name in branch.split()] for branch in branches]
        last = largest(x, 2, 0) if stride == 2 else conv(pool(x), f"{block}.branch_pool")
        return torch.cat([*(conv(x, *names, stride=stride) for names in chains), last], 1)

    x = conv(images, "Conv2d_1a_3x3", stride=2)
    x = conv(conv(x, "Conv2d_2a_3x3", same=False), "Conv2d_2b_3x3")
    x = conv(conv(largest(x, 2, 0), "Conv2d_3b_1x1"), "Conv2d_4a_3x3", same=False)
    x, double = largest(x, 2, 0), "3x3dbl_1 3x3dbl_2 3x3dbl_3"
    for letter in "bcd":
        x = block(x, f"Mixed_5{letter}", "1x1", "5x5_1 5x5_2", double)
    x = block(x, "Mixed_6a", "3x3", double, stride=2)
    double = "7x7dbl_1 7x7dbl_2 7x7dbl_3 7x7dbl_4 7x7dbl_5"
    for letter in "bcde":
        x = block(x, f"Mixed_6{letter}", "1x1", "7x7_1 7x7_2 7x7_3", double)
    x = block(x, "Mixed_7a", "3x3_1 3x3_2", "7x7x3_1 7x7x3_2 7x7x3_3 7x7x3_4", stride=2)
    forks = [f"{chain}{fork}" for chain in ("3x3_1 3x3_2", "3x3dbl_1 3x3dbl_2 3x3dbl_3") for fork in "ab"]
    x = block(block(x, "Mixed_7b", "1x1", *forks), "Mixed_7c", "1x1", *forks, pool=largest)
    features = x.flatten(2).mean(2)
    return features, features @ state["fc.weight"].T


def test_the_network_agrees_with_one_that_shares_nothing_but_the_weights(inception):
    """Every size and both colours, against a forward pass in float64."""
    network, _ = fid.load_inception(inception)
    assert not network.training
    state = {name: weight.double() for name, weight in torch.load(inception, weights_only=True).items()}
    rng = torch.Generator().manual_seed(1)
    prepared, expected = [], []
    for size in (28, 32, 64, 299):
        for channels in (1, 3):
            images = torch.randint(0, 256, (1, channels, size, size), dtype=torch.uint8, generator=rng)
            prepared.append(network.prepare(images))
            expected.append(enlarged(images.expand(-1, 3, -1, -1) / 255) * 2 - 1)
    prepared, expected = torch.cat(prepared), torch.cat(expected)
    assert (prepared - expected).abs().max() < 1e-5
    prepared, expected = prepared[[0, 3, 5]], expected[[0, 3, 5]]  # 28 grey, 32 and 64 in colour
    with torch.inference_mode():
        features, logits = network(prepared)
        right_features, right_logits = reference_inception(state, expected)
    assert (features.shape, logits.shape) == ((3, 2048), (3, 1008))
    assert (features - right_features).abs().max() < 1e-4 * right_features.abs().max()
    assert (logits - right_logits).abs().max() < 1e-4 * right_logits.abs().max()


# %% The command
@pytest.fixture
def folders(tmp_path, monkeypatch):
    """Two folders with 12 and 15 real digits as PNG; the working folder is tmp_path."""
    monkeypatch.chdir(tmp_path)
    digits = datasets.MNIST(ROOT / "data").data
    for name, images in ("a", digits[:12]), ("b", digits[100:115]):
        Path(name).mkdir()
        for number, digit in enumerate(images):
            Image.fromarray(digit.numpy()).save(f"{name}/{number}.png")
    return tmp_path


@pytest.fixture
def tiny(monkeypatch):
    """A network of twelve features, the mean colours of the quarters, in place of the Inception."""

    class Tiny(fid.FIDInception):
        size = 12

        def __init__(self):
            nn.Module.__init__(self)

        def forward(self, x):
            features = F.adaptive_avg_pool2d(x, 2).flatten(1)
            return features, features

    monkeypatch.setattr(fid, "load_inception", lambda path: (Tiny(), "cafe0123"))


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A folder in place of the one where torch.hub keeps weights; and the file there."""
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "hub"))
    return tmp_path / "hub/checkpoints" / fid.WEIGHTS


def fid_json(capsys, *argv):
    """The object that fid.py prints for these arguments."""
    capsys.readouterr()
    fid.main([*map(str, argv), "--json", "--device", "cpu"])
    return json.loads(capsys.readouterr().out)


def test_two_folders_are_compared_by_what_the_network_makes_of_them(folders, inception, capsys, monkeypatch):
    for path in [*folders.glob("?/[6-9].png"), *folders.glob("?/1?.png")]:
        path.unlink()
    # A score that tells what came in: with one image a chunk, the real one is 1 whatever the network says.
    monkeypatch.setattr(fid, "inception_score", lambda logits: (logits.sum().item(), 0.0))
    flags = "a", "b", "--weights", inception, "--batch-size", 4, "--metrics", "fid", "kid", "is", "pr"
    result = fid_json(capsys, *flags)
    network, weights = fid.load_inception(inception)
    assert result["weights"] == weights == hashlib.sha256(inception.read_bytes()).hexdigest()[:8]
    assert (result["paths"], result["images"]) == (["a", "b"], [6, 6])
    outputs = []
    for name in "ab":
        arrays = [np.asarray(Image.open(path)) for path in sorted(Path(name).iterdir())]
        with torch.inference_mode():
            outputs.append(network(network.prepare(torch.from_numpy(np.stack(arrays))[:, None])))
    (x, x_logits), (y, y_logits) = outputs
    x, y = x.double(), y.double()
    expected = fid.frechet_distance(x.mean(0), torch.cov(x.T), y.mean(0), torch.cov(y.T)).item()
    assert result["frechet_distance"] == pytest.approx(expected, rel=1e-4)
    assert result["kid"] == pytest.approx(fid.squared_mmd(x, y).item(), rel=1e-3)
    assert result["is"] == pytest.approx([x_logits.sum().item(), y_logits.sum().item()], rel=1e-4)
    assert (result["precision"], result["recall"]) == pytest.approx(fid.precision_recall(x, y))


def test_names_folders_modes_and_sizes_make_no_difference(folders, tiny, capsys):
    for number, path in enumerate(sorted(Path("b").iterdir())):
        digit, folder = Image.open(path), Path("c", str(number % 4), "deep")
        folder.mkdir(parents=True, exist_ok=True)
        copies = [digit.convert("RGBA"), digit.quantize(256), digit]
        copies[number % 3].save(folder / f"{100 - number}.png")
    assert fid_json(capsys, "b", "c")["frechet_distance"] < 1e-9
    Image.new("RGB", (50, 20), "red").save("b/wide.png")
    Image.new("RGB", (20, 50), (255, 0, 0)).save("b/tall.png")
    Image.new("RGBA", (20, 50), (255, 0, 0, 255)).save("c/wide.webp", lossless=True)
    Image.new("RGB", (50, 20), "red").save("c/wide.png")
    result = fid_json(capsys, "b", "c", "--batch-size", "4")
    assert (result["images"], round(result["frechet_distance"], 9)) == ([17, 17], 0)


def test_statistics_can_be_saved_and_compared(folders, tiny, capsys):
    for name in "ab":
        fid.main(["--save-stats", name, f"{name}.npz", "--device", "cpu"])
    with np.load("a.npz") as file:
        mu, sigma = file["mu"], file["sigma"]
    assert (mu.shape, mu.dtype, sigma.shape) == ((12,), np.float64, (12, 12))
    direct = fid_json(capsys, "a", "b")["frechet_distance"]
    mixed, stored = fid_json(capsys, "a.npz", "b"), fid_json(capsys, "a.npz", "b.npz")
    assert mixed["frechet_distance"] == pytest.approx(direct, rel=1e-6)
    assert stored["frechet_distance"] == pytest.approx(direct, rel=1e-6)
    assert mixed["images"] == [None, 15]
    np.savez("theirs.npz", mu=mu, sigma=sigma)  # as pytorch-fid writes them
    assert fid_json(capsys, "theirs.npz", "b.npz")["frechet_distance"] == stored["frechet_distance"]
    for name in ("a.npz", "b", "nowhere/c.npz"):  # nothing is written over
        fails(fid, ["--save-stats", "b", name], capsys, "--save-stats", name)
    fails(fid, ["--save-stats", "a.npz", "c.npz"], capsys, "a.npz", "--save-stats")
    fails(fid, ["a.npz", "b", "--metrics", "fid", "kid"], capsys, "a.npz", "--metrics")
    fails(fid, ["a.npz", "b", "--neighbours", "n.png"], capsys, "a.npz", "--neighbours")


def test_statistics_that_do_not_fit_are_named_in_one_line(folders, tiny, capsys):
    class Bomb:
        def __reduce__(self):
            return Path.touch, (Path("exploded"),)

    mu, sigma = np.zeros(12), np.eye(12)
    np.savez("good.npz", mu=mu, sigma=sigma, weights="cafe0123")
    np.savez("half.npz", mu=mu)
    np.savez("small.npz", mu=mu[:5], sigma=sigma[:5, :5])
    np.savez("odd.npz", mu=mu, sigma=sigma[:5])
    np.savez("nan.npz", mu=mu * np.nan, sigma=sigma)
    np.savez("objects.npz", mu=np.array([Bomb()], dtype=object), sigma=sigma)
    np.savez("other.npz", mu=mu, sigma=sigma, weights="01234567")
    Path("cut.npz").write_bytes(Path("good.npz").read_bytes()[:-100])
    fails(fid, ["half.npz", "good.npz"], capsys, "half.npz", "sigma")
    fails(fid, ["small.npz", "good.npz"], capsys, "small.npz", "5 and 12 features")
    fails(fid, ["odd.npz", "good.npz"], capsys, "odd.npz", "(5, 12)")
    fails(fid, ["nan.npz", "good.npz"], capsys, "nan.npz", "not finite")
    fails(fid, ["objects.npz", "good.npz"], capsys, "objects.npz", "mu (D,) and sigma")
    fails(fid, ["other.npz", "good.npz"], capsys, "other.npz", "different weights", "01234567")
    fails(fid, ["cut.npz", "good.npz"], capsys, "cut.npz", "mu (D,) and sigma")
    fails(fid, ["none.npz", "good.npz"], capsys, "none.npz", "No such file")
    assert not Path("exploded").exists()


def test_only_the_released_weights_on_both_sides_make_it_an_fid(folders, tiny, capsys, monkeypatch):
    monkeypatch.setattr(fid, "RELEASED", "cafe0123")
    fid.main(["--save-stats", "a", "known.npz", "--device", "cpu"])
    with np.load("known.npz") as file:
        np.savez("unknown.npz", mu=file["mu"], sigma=file["sigma"])
    for path in "a", "known.npz":
        result = fid_json(capsys, path, "b")
        assert (result["is_fid"], result["weights"]) == (True, "cafe0123")
        assert "fid" in result
    fid.main(["a", "b", "--num-images", "10", "--device", "cpu"])
    out, err = capsys.readouterr()
    assert "\nfid  " in out
    assert "do not compare" not in out
    assert "fewer images than the 12 features" in err
    for pair in ("unknown.npz", "b"), ("known.npz", "unknown.npz"), ("unknown.npz", "unknown.npz"):
        result = fid_json(capsys, *pair)
        assert "fid" not in result
        assert (result["is_fid"], result["weights"]) == (False, None)
    fid.main(["unknown.npz", "b", "--device", "cpu"])
    out = capsys.readouterr().out
    assert "frechet_distance" in out
    assert "do not compare" in out


def test_neighbours_are_drawn_below_the_images(folders, tiny, capsys):
    """Of copies under other names, the nearest are what they are copies of; none is drawn twice."""
    Path("copies").mkdir()
    for number, path in enumerate(sorted(Path("a").iterdir())):
        shutil.copy(path, f"copies/{100 - number}.png")
    fid_json(capsys, "a", "copies", "--neighbours", "n.png")
    picture = np.array(Image.open("n.png"))[2:, 2:, 0]  # tiles of 64 pixels, and 2 between them
    above, nearest, second, _ = picture.reshape(4, 66, 12, 66).transpose(0, 2, 1, 3)[:, :, :64, :64]
    assert np.array_equal(above, nearest)
    assert not (above == second).all((1, 2)).any()
    digits = datasets.MNIST(ROOT / "data").data[:12]
    expected = resize(digits, [64, 64], antialias=True).numpy()
    assert {image.tobytes() for image in above} == {image.tobytes() for image in expected}
    fails(fid, ["a", "b", "--neighbours", "n.png"], capsys, "--neighbours", "n.png", "new file")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("a b --device nonsense", "--device nonsense"),
        ("a", "two paths"),
        ("a b --save-stats a c.npz", "--save-stats"),
        ("--save-stats a c.npz --neighbours n.png", "--save-stats"),
        ("a b --num-images 1", "--num-images 2"),
        ("a b --num-images 3 --metrics pr", "--num-images 4"),
        ("a b --batch-size 0", "--batch-size"),
        ("a b --features classifier", "--dataset"),
        ("mnist fashion_mnist --features classifier", "--dataset"),
        ("mnist b --features classifier --weights x", "--weights classifier"),
        ("mnist:training b", "mnist:training [:test]"),
        ("nowhere a", "nowhere"),
        ("a nowhere", "nowhere"),  # before the weights
        ("mnist:test nowhere --features classifier", "nowhere"),  # and before anything is trained
        ("empty a", "empty 0"),
        ("one a", "one 1"),
        ("a/0.png b", "a/0.png"),
        ("a b --weights none.pth", "none.pth"),
    ],
)
def test_wrong_usage_is_named_in_one_line(folders, flags, words, capsys):
    Path("empty").mkdir()
    shutil.copytree("a", "one", ignore=shutil.ignore_patterns("?.png", "10.png"))
    fails(fid, [*flags.split(), "--data-dir", ROOT / "data"], capsys, *words.split())


def test_files_that_are_damaged_are_named_and_left_out(folders, tiny, capsys):
    whole = fid_json(capsys, "a", "b")
    Path("a/bad.png").write_bytes(Path("a/0.png").read_bytes()[:60])
    Path("a/worse.jpg").write_text("text")
    Path("a/.hidden.png").write_text("text")
    fid.main(["a", "b", "--device", "cpu", "--json", "--neighbours", "out.png"])
    output = capsys.readouterr()
    result = json.loads(output.out)
    assert result["images"] == whole["images"]
    assert result["frechet_distance"] == pytest.approx(whole["frechet_distance"], rel=1e-4)
    assert "skipped a/bad.png: " in output.err
    assert "skipped a/worse.jpg: cannot identify" in output.err
    assert "hidden" not in output.err
    for path in Path("a").iterdir():
        path.write_text("text")
    fails(fid, ["a", "b", "--device", "cpu"], capsys, "a", "can be read")


def test_files_are_cropped_and_resized_as_training_does(folders, tiny, capsys):
    Path("photos").mkdir()
    Path("samples").mkdir()
    for number in range(6):
        photo = Image.effect_noise((300 + 50 * number, 200), 90).convert("RGB")
        photo.save(f"photos/{number}.png")
        pixels = dcgan64_celeba.decode(Path("photos", f"{number}.png"), 64)
        Image.fromarray(pixels.transpose(1, 2, 0)).save(f"samples/{number}.png")
    assert fid_json(capsys, "photos", "samples", "--image-size", 64)["frechet_distance"] < 1e-6
    assert fid_json(capsys, "photos", "samples")["frechet_distance"] > 1e-5


def test_weights_of_another_network_are_named_in_one_line(folders, inception, capsys):
    state = torch.load(inception, weights_only=True)
    Path("cut.pth").write_bytes(inception.read_bytes()[:100_000])
    torch.save({name: w for name, w in state.items() if name != "fc.bias"}, "missing.pth")
    torch.save({**state, "AuxLogits.fc.weight": torch.zeros(3)}, "more.pth")
    torch.save({**state, "Mixed_7c.branch1x1.bn.bias": torch.full((320,), math.nan)}, "nan.pth")
    flags = ["b", "b", "--num-images", "2", "--device", "cpu", "--weights"]
    fails(fid, [*flags, "cut.pth"], capsys, "cut.pth", "not weights")
    fails(fid, [*flags, "missing.pth"], capsys, "missing.pth", "fc.bias")
    fails(fid, [*flags, "more.pth"], capsys, "more.pth", "AuxLogits.fc.weight")
    fails(fid, [*flags, "nan.pth"], capsys, "b: ", "not finite")


def test_weights_are_fetched_once_and_checked_by_their_hash(folders, hub, inception, capsys, monkeypatch):
    """From a folder in place of the release: a file with another hash is refused, the right one is kept."""
    (folders / "release").mkdir()
    shutil.copy(inception, folders / "release" / fid.WEIGHTS)
    monkeypatch.setattr(fid, "RELEASE", (folders / "release").as_uri() + "/")
    with pytest.raises(SystemExit) as exit_:
        fid.main(["a", "b", "--device", "cpu"])
    assert exit_.value.code == 2
    assert "invalid hash" in capsys.readouterr().err.splitlines()[-1]
    assert not hub.exists()
    weights = hashlib.sha256(inception.read_bytes()).hexdigest()[:8]
    monkeypatch.setattr(fid, "RELEASED", weights)
    assert fid.load_inception(None)[1] == weights
    shutil.rmtree(folders / "release")
    assert fid.load_inception(None)[1] == weights  # from the disk
    assert hub.read_bytes() == inception.read_bytes()


def test_without_a_network_it_says_where_to_put_the_weights(folders, hub, capsys, monkeypatch):
    monkeypatch.setattr(fid, "RELEASE", "file:///nowhere/")
    words = hub, fid.RELEASE + fid.WEIGHTS, "--weights FILE", "--features classifier"
    fails(fid, ["a", "b", "--device", "cpu"], capsys, *words)


# %% Classifiers
@pytest.fixture(scope="session")
def small_data(tmp_path_factory):
    """A data folder in MNIST's layout that holds the first 24 real images of each half."""
    raw = tmp_path_factory.mktemp("data") / "small/MNIST/raw"
    raw.mkdir(parents=True)
    for path in (ROOT / "data/MNIST/raw").glob("*-ubyte"):
        size, header = (784, 16) if "images" in path.name else (1, 8)
        data = path.read_bytes()[: header + 24 * size]
        (raw / path.name).write_bytes(data[:4] + struct.pack(">I", 24) + data[8:])
    return raw.parent.parent


def test_digits_are_compared_by_a_classifier_that_is_trained_once(folders, small_data, capsys):
    """A data set by its name, and the same images in a folder."""
    Path("digits").mkdir()
    for number, (image, _) in enumerate(datasets.MNIST(small_data)):
        image.save(f"digits/{number}.png")
    flags = "--features", "classifier", "--data-dir", small_data
    result = fid_json(capsys, "mnist", "digits", *flags)
    assert 0 <= result["frechet_distance"] < 1e-4
    assert (result["precision"], result["recall"]) == (1, 1)
    assert result["images"] == [24, 24]
    (cache,) = Path("data/cache").iterdir()
    assert result["weights"] == f"mnist classifier {hashlib.sha256(cache.read_bytes()).hexdigest()[:8]}"
    fid.main(["mnist", "digits", *map(str, flags), "--device", "cpu"])
    out, err = capsys.readouterr()
    assert "do not compare" in out
    assert "training" not in err  # only the first time
    report = fid_json(capsys, "mnist:test", "b", *flags, "--metrics", "fid", "kid", "is")
    assert report["frechet_distance"] > 1e-2  # other images
    assert {"kid", "kid_std", "is", "is_std", "precision", "recall"} <= report.keys()
    cache.rename("first.pt")
    fid.load_classifier("mnist", small_data, "cpu")  # the same bits, whatever else was random before
    again, first = (torch.load(path, weights_only=True) for path in (cache, "first.pt"))
    assert all(torch.equal(again[name], first[name]) for name in first)


def test_num_images_are_the_same_images_each_time(small_data):
    args = fid.parse_args(["mnist", "b", "--data-dir", str(small_data), "--num-images", "20"])
    images = fid.open_images("mnist", args).images
    assert torch.equal(images, fid.open_images("mnist", args).images)
    digits = datasets.MNIST(small_data).data[:, None]
    numbers = [(digits == image).flatten(1).all(1).nonzero().item() for image in images]
    assert len(set(numbers)) == 20
    assert numbers != sorted(numbers)


def test_the_classifier_of_digits_learns():
    """A quarter of an epoch of the real data is enough for 95%."""
    train, test = (datasets.MNIST(ROOT / "data", train=train) for train in (True, False))
    network = fid.DigitClassifier()
    fid.train_classifier(network, train.data[:15_000, None], train.targets[:15_000, None], epochs=1)
    assert not network.training
    with torch.inference_mode():
        features, logits = network(network.prepare(test.data[:2000, None]))
    assert features.shape == (2000, 128)
    assert (logits.argmax(1) == test.targets[:2000]).double().mean() > 0.95


def test_the_classifier_of_digits_takes_all_sizes():
    network = fid.DigitClassifier()
    digits = datasets.MNIST(ROOT / "data").data[:8, None]
    plain = network.prepare(digits)
    assert torch.equal(plain, digits / 255)
    assert torch.allclose(network.prepare(digits.expand(-1, 3, -1, -1)), plain)
    assert torch.equal(network.prepare(F.pad(digits, [2] * 4)), plain)
    large = resize(digits, [64, 64], antialias=True)
    assert network.prepare(large).shape == (8, 1, 28, 28)
    assert (network.prepare(large) - plain).abs().mean() < 0.05


def test_faces_differ_and_their_labels_say_what_the_table_says():
    """Also of an attribute with fewer classes in the test set. Grey hair has no colour."""
    tables = {}
    for split, count in ("train", 10_240), ("test", 1024):
        images, labels = fid.open_faces(ROOT / "data/faces", split)
        assert (images.shape, images.dtype, labels.shape) == ((count, 3, 64, 64), torch.uint8, (count, 11))
        assert len({image.numpy().tobytes() for image in images}) == count
        with open(ROOT / "data/faces" / f"{split}.csv", newline="") as file:
            tables[split] = list(csv.DictReader(file))
        for column, name in enumerate([*tables["train"][0]][1:]):
            classes = sorted({row[name] for row in tables["train"]})
            words = [classes[number] for number in labels[:, column]]
            assert words == [row[name] for row in tables[split]]
        grey = torch.tensor([row["hair_colour"] == "grey" for row in tables[split]])
        colourful = images[:, :, 8:14, 24:40].float().std(1).mean((1, 2))  # where the hair is
        assert colourful[grey].mean() < 0.8 * colourful[~grey].mean()


def test_faces_that_are_missing_or_cut_are_named_in_one_line(tmp_path, capsys):
    argv = ["faces", "faces:test", "--data-dir", tmp_path, "--features", "classifier"]
    fails(fid, argv, capsys, "--data-dir", "faces")
    (tmp_path / "faces").mkdir()
    for name in ("train_00.webp", "train_02.webp", "train.csv"):  # not all sheets
        shutil.copy(ROOT / "data/faces" / name, tmp_path / "faces")
    fails(fid, argv, capsys, "--data-dir", "2 sheets")
    (tmp_path / "faces/train_00.webp").write_bytes((ROOT / "data/faces/train_00.webp").read_bytes()[:1000])
    fails(fid, argv, capsys, "--data-dir", "faces")


def test_the_classifier_of_faces_notices_what_changes():
    """Features learned from what is on the faces put sets in the order that people would."""
    images, labels = fid.open_faces(ROOT / "data/faces", "train")
    tests, classes = fid.open_faces(ROOT / "data/faces", "test")
    torch.manual_seed(0)
    network = fid.FaceClassifier((labels.amax(0) + 1).tolist())
    fid.train_classifier(network, images[:5120], labels[:5120], epochs=2)
    args = fid.parse_args(["faces", "samples", "--features", "classifier", "--device", "cpu"])

    def distance(faces):
        stats = fid.measure(fid.ImageSet("faces", faces), network, "weights", args)
        return fid.frechet_distance(train.mu, train.sigma, stats.mu, stats.sigma).item()

    train = fid.measure(fid.ImageSet("train", images), network, "weights", args)
    assert distance(images) < 1e-3
    real = distance(tests)
    assert distance(tests[classes[:, 7] == 5]) > 1.1 * real  # no glasses
    assert distance(gaussian_blur(tests, 5, 1.5)) > 1.1 * real
    assert distance(torch.cat([tests[..., :32], tests[..., :32].flip(3)], 3)) > 1.1 * real  # symmetric
    with torch.inference_mode():
        logits = network(network.prepare(tests))[1]
    guesses = torch.stack([attribute.argmax(1) for attribute in logits.split(network.classes, 1)], 1)
    most_frequent = torch.stack([column.mode().values for column in classes.T])
    accuracy, blind = ((answer == classes).double().mean() for answer in (guesses, most_frequent))
    assert accuracy > max(0.6, blind + 0.1)


# %% While a script trains
def test_a_judge_says_what_the_command_says(folders, small_data, capsys, monkeypatch):
    digits = datasets.MNIST(ROOT / "data").data[100:115, None]
    torch.manual_seed(5)
    before = torch.get_rng_state()
    judge = fid.Judge("mnist", digits, "cpu", small_data)
    values = judge(digits)
    assert torch.equal(torch.get_rng_state(), before)  # training draws no random number more, or fewer
    result = fid_json(capsys, "mnist:test", "b", "--features", "classifier", "--data-dir", small_data)
    expected = result["frechet_distance"], result["precision"], result["recall"]
    assert values == pytest.approx(expected, rel=1e-4)
    large = fid.Judge("mnist", torch.zeros(4, 1, 64, 64), "cpu", small_data)  # as dcgan64_celeba.py has them
    assert large.real.shape == (24, 1, 64, 64)
    assert large(resize(judge.real, [64, 64], antialias=True))[0] == pytest.approx(0, abs=1e-3)


def test_a_judge_takes_inception_where_there_are_no_classes(hub, inception, tmp_path, capsys):
    """With weights that are not the released ones, in their place, on six digits and six others."""
    hub.parent.mkdir(parents=True)
    shutil.copy(inception, hub)
    digits = datasets.MNIST(ROOT / "data").data[:12, None].expand(-1, 3, -1, -1)
    real, fake = resize(digits, [64, 64], antialias=True).split(6)
    distance, precision, recall = fid.Judge("celeba", real, "cpu", tmp_path)(fake)
    network, _ = fid.load_inception(inception)
    with torch.inference_mode():
        x, y = (network(network.prepare(images))[0].double() for images in (real, fake))
    expected = fid.frechet_distance(x.mean(0), torch.cov(x.T), y.mean(0), torch.cov(y.T))
    assert distance == pytest.approx(expected.item(), rel=1e-3)
    assert (precision, recall) == pytest.approx(fid.precision_recall(x, y), abs=1e-6)
    with pytest.raises(SystemExit):
        fid.Judge("folder", real[:3], "cpu")
    assert "3 images are too few" in capsys.readouterr().err


# %% The text
def functions(name):
    source = (ROOT / f"{name}.py").read_text()
    nodes = [node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)]
    return {node.name: ast.get_source_segment(source, node) for node in nodes}


def test_functions_that_fid_shares_with_scripts_have_the_same_text():
    own = {"add_flags", "parse_args", "main", "decode"}  # other flags, no training, pictures of any size
    ours, theirs = functions("fid"), functions("dcgan_mnist") | functions("dcgan64_celeba")
    shared = ours.keys() & theirs.keys() - own
    assert shared == {"fail", "list_pictures"}
    for name in shared:
        assert ours[name] == theirs[name], name
    assert len((ROOT / "fid.py").read_text().splitlines()) <= 800


def test_a_name_that_means_a_data_set_and_a_folder_is_refused(folders, tiny, capsys):
    Path("a").rename("faces")
    fails(fid, ["faces", "b"], capsys, "faces:train", "./faces")
    assert fid_json(capsys, "./faces", "b")["images"] == [12, 15]
