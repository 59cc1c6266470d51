"""r3gan.py: its losses, penalties, step, initial weights, and stacked digits."""

import copy
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision import datasets

import r3gan
import vanilla_gan
from test_scripts import ROOT


def test_r3gan_losses_by_hand():
    real, fake = torch.tensor([[1.0], [-2.0]]), torch.tensor([[0.0], [1.5]])
    pairs = [(1.0, 0.0), (-2.0, 1.5)]
    d_loss = np.mean([np.log1p(np.exp(f - r)) for r, f in pairs])
    g_loss = np.mean([np.log1p(np.exp(r - f)) for r, f in pairs])
    assert r3gan.discriminator_loss(real, fake).item() == pytest.approx(d_loss)
    assert r3gan.generator_loss(real, fake).item() == pytest.approx(g_loss)
    assert r3gan.generator_loss(fake, real).item() == pytest.approx(d_loss)  # G wants what D would, swapped
    shifted = r3gan.discriminator_loss(real + 7, fake + 7)  # only differences count
    assert shifted.item() == pytest.approx(d_loss)
    usual = vanilla_gan.discriminator_loss(real, fake)
    assert r3gan.discriminator_loss(real, fake, pairing=False).item() == pytest.approx(usual.item())
    usual = vanilla_gan.generator_loss(fake)
    assert r3gan.generator_loss(real, fake, pairing=False).item() == pytest.approx(usual.item())


def test_r3gan_slopes_of_a_quadratic_discriminator_by_hand():
    """D(x) = a.x + b/2 |x|^2 has the gradient a + b x."""
    a, b = torch.randn(1, 2, 3, 3), 0.7
    x = torch.randn(5, 2, 3, 3, requires_grad=True)
    logits = (a * x + b / 2 * x.square()).sum((1, 2, 3))[:, None]
    expected = (a + b * x).detach().square().sum((1, 2, 3))
    torch.testing.assert_close(r3gan.squared_slopes(logits, x).detach(), expected)


@pytest.mark.parametrize(("r1_weight", "r2_weight"), [(0, 0), (2, 0), (0, 3)])
def test_r3gan_step_is_the_papers(r1_weight, r2_weight):
    """The gradients worked out by hand, of a D whose logits are w |x|^2; G learns from the updated D."""

    class Square(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.tensor(0.1))

        def forward(self, images):
            return self.w * images.square().sum((1, 2, 3))[:, None]

    class Scale(nn.Module):
        latent_dim = 2

        def __init__(self):
            super().__init__()
            self.s = nn.Parameter(torch.tensor(0.5))

        def forward(self, z):
            return self.s * z[:, :, None, None]

    d, g, real = Square(), Scale(), torch.randn(4, 2, 1, 1)
    optimizers = {"optimizer_g": torch.optim.SGD(g.parameters(), 0.1)}
    optimizers["optimizer_d"] = torch.optim.SGD(d.parameters(), 0.01)
    torch.manual_seed(5)
    weights = {"r1_weight": r1_weight, "r2_weight": r2_weight}
    ema = copy.deepcopy(g).requires_grad_(False)
    step = {"pairing": True, "ema_images": 4} | weights  # 4 images leave half of the old average
    metrics = r3gan.train_step(g, d, **optimizers, ema=ema, real=real, **step)
    assert not ema.s.requires_grad
    assert ema.s.item() == pytest.approx((0.5 + g.s.item()) / 2)
    torch.manual_seed(5)
    z1, z2 = torch.randn(4, 2), torch.randn(4, 2)
    x2, f2 = real.square().sum((1, 2, 3)), (0.5 * z1).square().sum(1)  # |x|^2 and |G(z)|^2
    lead = 0.1 * (f2 - x2)  # the slope of w |x|^2 is 2 w x
    gradient = (lead.sigmoid() * (f2 - x2)).mean() + 4 * 0.1 * (r1_weight * x2.mean() + r2_weight * f2.mean())
    w = 0.1 - 0.01 * gradient
    assert d.w.item() == pytest.approx(w.item(), rel=1e-5)
    assert metrics["r1"].item() == pytest.approx(4 * 0.01 * x2.mean().item(), rel=1e-5)
    z2_squared = z2.square().sum(1)
    lead = w * (x2 - 0.25 * z2_squared)
    gradient = (lead.sigmoid() * -w * 2 * 0.5 * z2_squared).mean()
    assert g.s.item() == pytest.approx((0.5 - 0.1 * gradient).item(), rel=1e-5)


def test_r3gan_images_stay_as_loud_through_all_layers_at_first():
    torch.manual_seed(0)
    args = r3gan.parse_args(["--device", "cpu", "--width", "64"])
    parts = r3gan.build(args)
    x = torch.randn(64, 1, 28, 28)
    for layer in parts["discriminator"].layers:
        if isinstance(layer, nn.Conv2d):
            assert 0.5 < x.square().mean().sqrt().item() < 2
        x = layer(x)
    x = torch.randn(64, 100)
    for layer in parts["generator"].layers[:-1]:
        x = layer(x)
    assert 0.5 < x[:, :, 2:-2, 2:-2].std().item() < 2.5


def test_r3gan_stacks_three_digits_and_counts_their_modes(tmp_path, capsys):
    args = r3gan.parse_args(["--dataset", "stacked", "--device", "cpu", "--limit", "50"])
    images = r3gan.load_images(args)
    assert images.shape == (50, 3, 28, 28)
    digits = datasets.MNIST(ROOT / "data").data
    known = {digit.numpy().tobytes() for digit in digits}
    assert all(channel.numpy().tobytes() in known for image in images for channel in image)
    assert not any(torch.equal(image[0], image[1]) or torch.equal(image[1], image[2]) for image in images)

    class Tells(nn.Module):
        """Of an image of one level v, the digit v."""

        def __init__(self):
            super().__init__()
            self.unused = nn.Parameter(torch.zeros(1))

        def prepare(self, images):
            return images.float()

        def forward(self, x):
            return None, F.one_hot(x[:, 0, 0, 0].long(), 10).float()

    class Draws(nn.Module):
        """The mode 123 for the first three of four z, else 132."""

        latent_dim = 1

        def __init__(self):
            super().__init__()
            self.count, self.unused = 0, nn.Parameter(torch.zeros(1))

        def forward(self, z):
            numbers = torch.arange(self.count, self.count + len(z))
            self.count += len(z)
            levels = torch.tensor([1.0, 2.0, 3.0]).repeat(len(z), 1)
            levels[numbers % 4 == 3] = torch.tensor([1.0, 3.0, 2.0])
            return (levels / 127.5 - 1)[:, :, None, None].expand(-1, -1, 28, 28)

    r3gan.count_modes(Tells(), Draws(), tmp_path, epoch=3, count=1000)
    kl = 0.75 * math.log(750) + 0.25 * math.log(250)
    assert (tmp_path / "modes.csv").read_text() == f"3,2,{kl:.4f}\n"
    assert "2 of 1,000 modes" in capsys.readouterr().out
