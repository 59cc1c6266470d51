"""--published is the tutorials' networks: each listing is written down, given our weights, and compared."""

import math

import pytest
import torch
from torch import nn

import cgan
import dcgan32_wgan_sn
import dcgan_mnist
import wgan_gp
from test_scripts import assert_same_bits


def listing_28(first_channels, bias, norm):
    """The tutorials' generator and discriminator for 28x28, written down layer by layer."""
    g = nn.Sequential(
        nn.Linear(100 if first_channels == 1 else 110, 256 * 7 * 7),
        nn.BatchNorm1d(256 * 7 * 7),
        nn.ReLU(),
        nn.Unflatten(1, (256, 7, 7)),
        nn.ConvTranspose2d(256, 128, kernel_size=4, stride=2, padding=1, bias=bias),
        nn.BatchNorm2d(128),
        nn.ReLU(),
        nn.ConvTranspose2d(128, 1, kernel_size=4, stride=2, padding=1, bias=bias),
        nn.Tanh(),
    )
    d = nn.Sequential(
        nn.Conv2d(first_channels, 64, kernel_size=4, stride=2, padding=1, bias=bias),
        nn.LeakyReLU(0.2),
        nn.Conv2d(64, 128, kernel_size=4, stride=2, padding=1, bias=bias),
        nn.BatchNorm2d(128) if norm else nn.Identity(),
        nn.LeakyReLU(0.2),
        nn.Flatten(),
        nn.Linear(128 * 7 * 7, 1),
    )
    return g, d


def fill(listing, ours):
    """Put our weights into a listing, in order; what it has and we leave out are biases, and these are 0."""
    pairs = [list(module.modules()) for module in (listing, ours)]
    pairs = [[layer for layer in layers if list(layer.parameters(recurse=False))] for layers in pairs]
    assert [type(layer) for layer in pairs[0]] == [type(layer) for layer in pairs[1]]
    for theirs, layer in zip(*pairs):
        state = {"bias": torch.zeros(len(layer.weight[0]))} if isinstance(layer, nn.ConvTranspose2d) else {}
        if isinstance(layer, nn.Conv2d):
            state = {"bias": torch.zeros(len(layer.weight))}
        state = {name: tensor for name, tensor in state.items() if name in theirs.state_dict()}
        theirs.load_state_dict(state | layer.state_dict())


def starts_as_pytorch_has_it(network):
    """Whether its linear layer has weights from U(-b, b) with b^2 = 1 / inputs, not from N(0, 0.02^2)."""
    linear = next(layer for layer in network.modules() if isinstance(layer, nn.Linear))
    bound = 1 / math.sqrt(linear.in_features)
    assert linear.weight.abs().max() <= bound
    return linear.weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.02)


@pytest.mark.parametrize("script", [dcgan_mnist, wgan_gp, cgan])
def test_published_is_the_tutorials_listing(script):
    """dcgan_mnist.py: biases in linear layers alone, N(0, 0.02). The others: biases and PyTorch's weights.

    Biases before batch normalisation do nothing, and that of G's last layer next to nothing: ours has none.
    """
    args = script.parse_args(["--published", "--device", "cpu"])
    parts = script.build(args)
    g, d = list(parts.values())[:2]
    their_g, their_d = listing_28(
        2 if script is cgan else 1, script is not dcgan_mnist, script is not wgan_gp
    )
    if script is cgan:  # the embeddings come first, and go in with noise and image
        classes = torch.arange(5)
        z = torch.randn(5, 100)
        g_input = torch.cat([z, g.embedding(classes)], 1)
        images = torch.randn(5, 1, 28, 28)
        d_input = torch.cat([images, d.embedding(classes).view(5, 1, 28, 28)], 1)
        assert (g.embedding.weight.shape, d.embedding.weight.shape) == ((10, 10), (10, 784))
        fakes, logits = g(z, classes), d(images, classes)
    else:
        g_input, d_input = torch.randn(5, 100), torch.randn(5, 1, 28, 28)
        fakes, logits = g(g_input), d(d_input)
    fill(their_g, g.layers)
    fill(their_d, d.layers)
    torch.testing.assert_close(their_g(g_input), fakes)
    torch.testing.assert_close(their_d(d_input), logits)
    rate = {dcgan_mnist: 2e-4, wgan_gp: 1e-4, cgan: 2e-4}[script]
    betas = (0.0, 0.9) if script is wgan_gp else (0.5, 0.999)
    for optimizer in list(parts.values())[2:]:
        assert (optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["betas"]) == (rate, betas)
    assert args.batch_size == (128 if script is dcgan_mnist else 64)
    assert starts_as_pytorch_has_it(g) == (script is not dcgan_mnist)


def test_published_and_refined_is_the_other_tutorials_listing():
    parts = dcgan_mnist.build(dcgan_mnist.parse_args(["--published", "--refine", "--device", "cpu"]))
    g, _ = listing_28(1, bias=False, norm=True)
    g = nn.Sequential(
        *g[:7],
        nn.ConvTranspose2d(128, 64, kernel_size=4, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(64),
        nn.ReLU(),
        nn.ConvTranspose2d(64, 1, kernel_size=3, stride=1, padding=1, bias=False),
        nn.Tanh(),
    )
    z = torch.randn(5, 100)
    fakes = parts["generator"](z)
    fill(g, parts["generator"])
    torch.testing.assert_close(g(z), fakes)
    assert fakes.shape == (5, 1, 28, 28)


def test_published_32_is_the_tutorials_listing():
    """With kernels of 3 in the middle, as it is printed, it would give 26 pixels, not 32: here they are 4."""
    args = dcgan32_wgan_sn.parse_args(["--published", "--device", "cpu"])
    parts = dcgan32_wgan_sn.build(args)
    rates = [parts[name].param_groups[0]["lr"] for name in ("optimizer_g", "optimizer_c")]
    assert rates == [3e-5, 6e-5]
    assert (args.batch_size, args.epochs * (60_000 // 32)) == (32, 20_625)
    g = nn.Sequential(
        nn.ConvTranspose2d(100, 256, kernel_size=4, stride=1, padding=0, bias=False),
        nn.BatchNorm2d(256),
        nn.ReLU(),
        nn.ConvTranspose2d(256, 128, kernel_size=4, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(128),
        nn.ReLU(),
        nn.ConvTranspose2d(128, 64, kernel_size=4, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(64),
        nn.ReLU(),
        nn.ConvTranspose2d(64, 1, kernel_size=4, stride=2, padding=1, bias=False),
        nn.Tanh(),
    )
    critic = nn.Sequential(
        nn.Conv2d(1, 64, kernel_size=5, stride=2, padding=2),
        nn.LeakyReLU(0.2),
        nn.Conv2d(64, 128, kernel_size=5, stride=2, padding=2, bias=False),
        nn.BatchNorm2d(128),
        nn.LeakyReLU(0.2),
        nn.Conv2d(128, 256, kernel_size=5, stride=2, padding=2, bias=False),
        nn.BatchNorm2d(256),
        nn.LeakyReLU(0.2),
        nn.Conv2d(256, 1, kernel_size=5, stride=2, padding=1),
    )
    z, images = torch.randn(5, 100), torch.randn(5, 1, 32, 32)
    g.load_state_dict(dict(zip(g.state_dict(), parts["generator"].state_dict().values())))
    torch.testing.assert_close(g(z[:, :, None, None]), parts["generator"](z))
    for _ in range(50):
        scores = parts["critic"](images)  # the power iteration settles
    state = [tensor for name, tensor in parts["critic"].state_dict().items() if not name.endswith(".u")]
    critic.load_state_dict(dict(zip(critic.state_dict(), state)))
    with torch.no_grad():
        for layer in critic:
            if isinstance(layer, nn.Conv2d):  # spectral normalisation, by a singular value decomposition
                layer.weight /= torch.linalg.svdvals(layer.weight.flatten(1))[0]
    torch.testing.assert_close(critic(images).flatten(1), scores, rtol=1e-3, atol=1e-4)
    torch.manual_seed(args.seed)
    plain = dcgan32_wgan_sn.Generator()  # PyTorch's own first weights
    assert_same_bits(dcgan32_wgan_sn.build(args)["generator"].state_dict(), plain.state_dict())
