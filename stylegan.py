"""StyleGAN: a style for each layer, a volume knob for each feature. Digits, faces, folders of pictures.

    python stylegan.py                              # MNIST at 32x32, into runs/stylegan/001
    python stylegan.py --dataset faces              # the cartoon faces in data/faces, at 64x64
    python stylegan.py --generate 64 --truncation 0.7 --checkpoint pretrained/stylegan.pt

    z ──► mapping ──► w ───┬─────────┬──────────┬──────────┐
                           ▼ style   ▼ style    ▼ style    ▼ style
            constant ──► 4x4 ──►   8x8 ──►   16x16 ──►   32x32 ──► image

Until now, z entered at the first layer, which had to settle the whole image at once. Here a constant enters,
and every layer hears from z. A mapping network turns z into w. In each layer, an affine map of its own turns
w into a style y = A w + b: a scale and a shift for each feature map x_i.

    AdaIN(x_i, y) = (1 + y_scale[i]) (x_i - mean(x_i)) / std(x_i) + y_shift[i]

AdaIN wipes each map's mean and contrast, and the style sets new ones: a volume knob for each feature. The
next AdaIN wipes them again, so a style directs one layer alone: shapes at low resolution, and colours and
details at high resolution. Why w, and not z? Say no old face in the data wears a cap. A Gaussian has no hole
where "old, with a cap" would be, so G would have to bend Z to make one. W can leave that corner empty.

R1 adds gamma / 2 E|grad_x logit(x)|^2 to D's loss from vanilla_gan.py, to keep D flat at real images. More
ideas have a comment where they are used, from equalised learning rates to averaged weights.

What to watch: mixing.png. Pairs of rows take coarse, middle and fine styles from the images at the top. Try
--truncation 1, 0.5 and 0 in the third command: what do its cartoon faces gain, and what do they lose?

Papers: Karras et al. 2018, arXiv 1812.04948; 2017, 1710.10196; Mescheder et al. 2018, 1801.04406. Departures:
no progressive growing; small networks; rates of 2e-3; a constant from N(0, 1); D's blocks halve before their
second convolution; G reuses D's fakes; R1 in every tenth step (StyleGAN2: in each 16th, and Adam adapted).
"""

import argparse
import contextlib
import copy
import hashlib
import json
import math
import os
import sys
import time
from collections import Counter
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from PIL import Image, ImageOps
from torch import accelerator, nn
from torchvision import datasets
from torchvision.transforms.functional import resize
from torchvision.utils import save_image
from tqdm import tqdm

# %% Settings
SCRIPT = "stylegan"
DATA = str(Path(globals().get("__file__", "cell")).resolve().parent / "data")  # notebooks have no __file__
PANELS = [["d_loss", "g_loss"], ["d_real", "d_fake"], ["r1"], ["diversity"]]  # what losses.png shows
CACHE = Path(DATA, "cache")  # or, if that cannot be written, in the home folder
CACHE = CACHE if os.access(CACHE if CACHE.exists() else DATA, os.W_OK) else Path.home() / ".cache/gans"
FACES = {"image_size": 64, "width": 16, "epochs": 30}  # settings for the cartoons, where none are given
DEFAULTS = {"faces": FACES, "celeba": {"image_size": 64}, "folder": {"image_size": 64}}
CELEBA = Path("celeba", "img_align_celeba")  # where torchvision has its pictures, in --data-dir


def add_flags(add):
    """The flags, this script's own first; `add` is argparse's parser.add_argument."""
    add("--mapping-layers", type=int, default=8, choices=range(9), help="layers from z to w; 0: none")
    add("--mixing", type=float, default=0.9, help="share of training's fakes that have two w, 0 to 1")
    add("--no-noise", action="store_true", help="no noise in the layers")
    add("--r1-weight", type=float, default=10.0, help="gamma, the weight of R1")
    add("--r1-every", type=int, default=10, metavar="K", help="R1 in every Kth step, K times as strong")
    add("--ema-images", type=int, default=10_000, help="half-life of the weights' average, in images")
    add("--truncation", type=float, help="psi, for --generate: below 1, w nears its mean; None: 1")
    add("--image-size", type=int, default=32, choices=[32, 64, 128, 256], help="faces, celeba, folder: 64")
    add("--width", type=int, default=32, help="channels at full size, up to 4 times that below; faces: 16")
    add("--epochs", type=int, default=5, help="passes over the training images; faces: 30")
    add("--lr-g", type=float, default=2e-3, help="Adam's learning rate for the generator")
    add("--lr-d", type=float, default=2e-3, help="Adam's learning rate for the discriminator")
    add("--batch-size", type=int, default=32, help="images per step, a multiple of 2 or 3")
    add("--latent-dim", type=int, default=128, help="length of the noise vector z, and of w")
    choices = ["mnist", "fashion_mnist", "cifar10", "faces", "celeba", "folder"]
    add("--dataset", choices=choices, default="mnist", help="what to train on")
    add("--data-dir", default=DATA, help="where the data set, or your folder, is")
    add("--flip", action=argparse.BooleanOptionalAction, default=False, help="mirror images at random")
    add("--limit", type=int, metavar="N", help="train on N of the images only, for a quick look")
    add("--fid-every", type=int, metavar="K", help="every K epochs, measure samples with fid.py")
    add("--device", default="auto", help="auto (a GPU if there is one), cpu, cuda, cuda:1, mps, ...")
    add("--precision", choices=["fp32", "tf32", "bf16"], default="fp32", help="faster, less exact than fp32")
    add("--seed", type=int, default=42, help="all randomness follows from it")
    add("--keep-every", type=int, metavar="K", help="every K epochs, also save the generator alone")
    add("--out-dir", help="a new folder for the run; default: the next free number in runs/<script>")
    add("--resume", metavar="PATH", help="go on from this checkpoint.pt; flags you give win over its own")
    add("--generate", type=int, metavar="N", help="no training: write N images, with --checkpoint")
    add("--checkpoint", metavar="PATH", help="the checkpoint.pt that --generate uses")


# %% Networks
GAIN = math.sqrt(2)  # keeps activations at about the same size through a LeakyReLU


class EqualLinear(nn.Module):
    """(N, inputs) to (N, outputs), with an equalised learning rate.

    Adam moves all weights by about the same amount, so small ones change faster for their size. Here all are
    stored as N(0, 1), and forward multiplies them by the usual 1 / sqrt(inputs). With lr_mul = 0.01 they are
    stored as N(0, 100^2), and the layer learns a hundred times slower.
    """

    def __init__(self, inputs, outputs, gain=1.0, lr_mul=1.0):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs) / lr_mul)
        self.bias = nn.Parameter(torch.zeros(outputs))
        self.scale = gain / math.sqrt(inputs) * lr_mul
        self.lr_mul = lr_mul

    def forward(self, x):
        return F.linear(x, self.weight * self.scale, self.bias * self.lr_mul)


class EqualConv2d(nn.Module):
    """Maps (N, inputs, H, W) to (N, outputs, H, W), with weights as in EqualLinear."""

    def __init__(self, inputs, outputs, kernel, gain=GAIN, bias=True):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs, kernel, kernel))
        self.bias = nn.Parameter(torch.zeros(outputs)) if bias else None
        self.scale = gain / (kernel * math.sqrt(inputs))
        self.padding = kernel // 2

    def forward(self, x):
        return F.conv2d(x, self.weight * self.scale, self.bias, padding=self.padding)


class Blur(nn.Module):
    """Smooths feature maps (N, C, H, W) with [1, 2, 1] / 4 in both directions, each map by itself."""

    def __init__(self):
        super().__init__()
        row = torch.tensor([1.0, 2.0, 1.0]) / 4
        self.register_buffer("kernel", row * row[:, None], persistent=False)  # (3, 3)

    def forward(self, x):
        channels = x.shape[1]
        return F.conv2d(x, self.kernel.expand(channels, 1, 3, 3), padding=1, groups=channels)


def adain(x, style):
    """Normalises each of the maps x (N, C, H, W), then scales and shifts it as its style (N, 2C) says."""
    y_scale, y_shift = style[:, :, None, None].chunk(2, 1)  # each (N, C, 1, 1)
    # One group for each map: the same as F.instance_norm, which is slower with channels last.
    return (1 + y_scale) * F.group_norm(x, x.shape[1], eps=1e-8) + y_shift


class StyledLayer(nn.Module):
    """Feature maps (N, inputs, H, W) and w (N, latent_dim) to feature maps (N, outputs, side, side)."""

    def __init__(self, inputs, outputs, latent_dim, side, conv=True, up=False, noise=True):
        super().__init__()
        self.up = nn.Upsample(scale_factor=2) if up else nn.Identity()
        self.conv = EqualConv2d(inputs, outputs, 3, bias=False) if conv else nn.Identity()
        self.blur = Blur() if up else nn.Identity()  # hides that each pixel was doubled to a block of 2x2
        self.strength = nn.Parameter(torch.zeros(outputs, 1, 1)) if noise else None
        self.bias = nn.Parameter(torch.zeros(outputs, 1, 1))
        self.style = EqualLinear(latent_dim, 2 * outputs)  # y = A w + b
        self.register_buffer("noise", torch.randn(1, 1, side, side))  # for eval mode

    def forward(self, x, w):
        x = self.blur(self.conv(self.up(x)))
        if self.strength is not None:
            # Where a single hair lies is random, and w need not store it. So a random picture is added to all
            # maps, at a strength that each map learns. In training every image gets a new one.
            noise = torch.randn(len(x), 1, *x.shape[2:], device=x.device) if self.training else self.noise
            x = x + self.strength * noise
        return adain(F.leaky_relu(x + self.bias, 0.2), self.style(w))


class GroupDeviation(nn.Module):
    """Minibatch standard deviation: one more map beside (N, C, H, W), of how much a group's images differ.

    D judges one image at a time, and would never notice that all fakes are alike. So each group of four
    images gets its standard deviation, averaged over channels and pixels, as a map of a single value.
    """

    def forward(self, x):
        size = max(number for number in (1, 2, 3, 4) if len(x) % number == 0)  # of a group
        groups = x.unflatten(0, (size, -1))  # of 8 images, [:, 0] has 0, 2, 4 and 6, and [:, 1] the others
        deviation = (groups.var(0, correction=0) + 1e-8).sqrt().mean((1, 2, 3))  # one number for each group
        extra = deviation.repeat(size).view(-1, 1, 1, 1).expand(-1, 1, *x.shape[2:])  # (N, 1, H, W)
        return torch.cat([x, extra], 1)


def channels_at(size, width):
    """Channels at each resolution; for size 32 and width 32 {4: 128, 8: 128, 16: 64, 32: 32}."""
    sides = [side for side in (4, 8, 16, 32, 64, 128, 256) if side <= size]
    return {side: min(width * size // side, 4 * width) for side in sides}


class Mapping(nn.Module):
    """Noise z (N, latent_dim), its mean square made 1, to w (N, latent_dim)."""

    def __init__(self, latent_dim=128, layers=8):
        super().__init__()
        self.layers = nn.Sequential()
        for _ in range(layers):
            self.layers.append(EqualLinear(latent_dim, latent_dim, gain=GAIN, lr_mul=0.01))
            self.layers.append(nn.LeakyReLU(0.2))

    def forward(self, z):
        return self.layers(z * (z.square().mean(1, keepdim=True) + 1e-8).rsqrt())


class Synthesis(nn.Module):
    """A w for each layer (N, layers, latent_dim) to images (N, channels, size, size); in eval, in [-1, 1]."""

    def __init__(self, size=32, width=32, latent_dim=128, channels=1, noise=True):
        super().__init__()
        widths = channels_at(size, width)
        self.constant = nn.Parameter(torch.randn(1, widths[4], 4, 4))
        self.layers = nn.ModuleList()  # two at each resolution
        for side, outputs in widths.items():
            inputs = widths[max(4, side // 2)]
            up = side > 4  # at 4x4 there is nothing to double and convolve yet, only the constant
            self.layers.append(StyledLayer(inputs, outputs, latent_dim, side, conv=up, up=up, noise=noise))
            self.layers.append(StyledLayer(outputs, outputs, latent_dim, side, noise=noise))
        self.to_rgb = EqualConv2d(width, channels, 1, gain=1.0)

    def forward(self, ws):
        x = self.constant.expand(len(ws), -1, -1, -1)  # (N, C, 4, 4)
        for layer, w in zip(self.layers, ws.unbind(1)):
            x = layer(x, w)  # (N, C, 4, 4), (N, C, 4, 4), (N, C, 8, 8), (N, C, 8, 8), ...
        images = self.to_rgb(x)  # no tanh, as in the paper: D teaches G the range
        return images if self.training else images.clamp(-1, 1)


class Generator(nn.Module):
    """Noise z (N, latent_dim) to images (N, channels, size, size)."""

    def __init__(self, size=32, width=32, latent_dim=128, channels=1, mapping_layers=8, noise=True):
        super().__init__()
        self.latent_dim = latent_dim
        self.mapping = Mapping(latent_dim, mapping_layers)
        self.synthesis = Synthesis(size, width, latent_dim, channels, noise=noise)
        self.register_buffer("w_avg", torch.zeros(latent_dim))  # the running mean of w in training

    def ws(self, z, psi=1.0):
        """The w of each z (N, latent_dim), the same for all layers: (N, layers, latent_dim).

        Truncation: far from its mean, w was rare in training, and images are often bad. With psi below 1, w
        moves to w_avg + psi (w - w_avg), for better, more ordinary images. The paper spares fine layers.
        """
        w = torch.lerp(self.w_avg, self.mapping(z), psi)
        return w[:, None].expand(-1, len(self.synthesis.layers), -1)

    def forward(self, z):
        return self.synthesis(self.ws(z))


class Discriminator(nn.Module):
    """Images (N, channels, size, size) to logits (N, 1); the sigmoid of a logit says how likely "real" is."""

    def __init__(self, size=32, width=32, channels=1):
        super().__init__()
        widths = channels_at(size, width)
        layers = [EqualConv2d(channels, width, 1), nn.LeakyReLU(0.2)]  # (N, width, size, size)
        for side in sorted(widths, reverse=True)[:-1]:  # size, ..., 16, 8
            layers += [EqualConv2d(widths[side], widths[side], 3), nn.LeakyReLU(0.2), Blur(), nn.AvgPool2d(2)]
            layers += [EqualConv2d(widths[side], widths[side // 2], 3), nn.LeakyReLU(0.2)]  # at half the side
        last = widths[4]
        layers += [GroupDeviation(), EqualConv2d(last + 1, last, 3), nn.LeakyReLU(0.2)]  # (N, last, 4, 4)
        layers += [nn.Flatten(), EqualLinear(16 * last, last, gain=GAIN), nn.LeakyReLU(0.2)]  # (N, last)
        self.layers = nn.Sequential(*layers, EqualLinear(last, 1))  # (N, 1)

    def forward(self, images):
        return self.layers(images)


# %% Losses
def discriminator_loss(real_logits, fake_logits):
    """L_D = -E[log D(x)] - E[log(1 - D(G(z)))]; -log(sigmoid(logit)) = softplus(-logit)."""
    return F.softplus(-real_logits).mean() + F.softplus(fake_logits).mean()


def generator_loss(fake_logits):
    """L_G = -E[log D(G(z))], the non-saturating loss."""
    return F.softplus(-fake_logits).mean()


def r1_penalty(discriminator, real):
    """E|grad_x D(x)|^2 at real images (N, C, H, W), where D is the logit; |.|^2 is a sum over all pixels.

    Once fakes match real images, G should stop. But where D still has a slope, it keeps pushing G away.
    """
    real = real.detach().requires_grad_()
    # The sum gives a gradient for every image; create_graph makes the penalty differentiable, too.
    (gradient,) = torch.autograd.grad(discriminator(real).sum(), real, create_graph=True)
    return gradient.square().flatten(1).sum(1).mean()


# %% Training step
def mix(w1, w2, layers, mixing):
    """Style mixing: a share `mixing` of the images switches from w1 to w2 at a random layer.

    So no layer can rely on what another was told. Returns (N, layers, latent_dim).
    """
    # The first layer with w2, for each image; the authors draw one for the batch.
    cut = torch.randint(1, layers, (len(w1), 1), device=w1.device)
    unmixed = torch.rand(len(w1), 1, device=w1.device) >= mixing
    # With 4 layers and cut = [[1], [3]], first = [[True, False, False, False], [True, True, True, False]].
    first = torch.arange(layers, device=w1.device) < cut  # (N, layers): where w1 goes
    use_w1 = (first | unmixed)[:, :, None]  # (N, layers, 1)
    return torch.where(use_w1, w1[:, None], w2[:, None])


@torch.no_grad()
def average(ema, generator, decay):
    """Moves `ema` towards the generator: G wobbles from step to step, and its average hardly does."""
    torch._foreach_lerp_([*ema.parameters()], [*generator.parameters()], 1 - decay)  # all in one kernel
    for mean, new in zip(ema.buffers(), generator.buffers()):
        mean.copy_(new)


def train_step(
    generator, discriminator, optimizer_g, optimizer_d, ema, real, mixing, r1_weight, ema_images, precision
):
    """One step of D, then one of G, on images `real` (N, C, H, W) in [-1, 1]. Returns the metrics."""
    bf16 = precision == "bf16"

    # Two w for each image. The mapping, and R1 below, are never in bf16.
    z = torch.randn(2 * len(real), generator.latent_dim, device=real.device)
    w1, w2 = generator.mapping(z).chunk(2)
    generator.w_avg.lerp_(w1.detach().mean(0), 0.005)
    ws = mix(w1, w2, len(generator.synthesis.layers), mixing)

    # D learns to tell real from fake. Detached, the fakes carry no gradient back to G.
    with torch.autocast(real.device.type, torch.bfloat16, enabled=bf16):
        fake = generator.synthesis(ws).float()
        real_logits = discriminator(real).float()
        fake_logits = discriminator(fake.detach()).float()
    d_loss = discriminator_loss(real_logits, fake_logits)
    r1 = r1_weight / 2 * r1_penalty(discriminator, real) if r1_weight > 0 else real.new_zeros(())
    optimizer_d.zero_grad()
    (d_loss + r1).backward()
    optimizer_d.step()

    # G learns to fool the updated D, which is frozen now; the fakes are the same.
    discriminator.requires_grad_(False)
    with torch.autocast(real.device.type, torch.bfloat16, enabled=bf16):
        g_loss = generator_loss(discriminator(fake).float())
    optimizer_g.zero_grad()
    g_loss.backward()
    optimizer_g.step()
    discriminator.requires_grad_(True)
    average(ema, generator, decay=0.5 ** (len(real) / ema_images))

    metrics = {"d_loss": d_loss, "g_loss": g_loss}
    metrics |= {"d_real": real_logits.sigmoid().mean(), "d_fake": fake_logits.sigmoid().mean()}
    metrics["r1"] = r1  # K-fold in each Kth step, else 0 (--r1-every): on average, the usual R1 term
    metrics["diversity"] = (fake.var(0).mean() / real.var(0).mean()).sqrt()  # 1: fakes vary as real images do
    return {name: value.detach() for name, value in metrics.items()}  # .item() would wait for the GPU


# %% Training
def make_generator(args):
    """A generator with the settings of a run."""
    channels = 1 if "mnist" in args.dataset else 3
    sizes = args.image_size, args.width, args.latent_dim, channels
    return Generator(*sizes, mapping_layers=args.mapping_layers, noise=not args.no_noise)


def build(args):
    """The networks and optimisers of a run, by the names of train_step's arguments."""
    torch.manual_seed(args.seed)
    generator = make_generator(args)
    discriminator = Discriminator(args.image_size, args.width, 1 if "mnist" in args.dataset else 3)
    layout = torch.contiguous_format if "mps" in args.device else torch.channels_last  # faster; wrong on mps
    for network in generator, discriminator:
        network.to(args.device, memory_format=layout)
    adam = {"betas": (0.0, 0.99), "fused": True}  # fused: faster
    return {
        "generator": generator,
        "discriminator": discriminator,
        "optimizer_g": torch.optim.Adam(generator.parameters(), args.lr_g, **adam),
        "optimizer_d": torch.optim.Adam(discriminator.parameters(), args.lr_d, **adam),
        "ema": copy.deepcopy(generator).requires_grad_(False),
    }


def mirrored(images):
    """Each of the images (N, C, H, W) with probability 1/2 mirrored, left to right."""
    keep = torch.rand(len(images), 1, 1, 1, device=images.device) < 0.5
    return images.where(keep, images.flip(3))


def train(args):
    """Train from the start, or go on from the checkpoint args.resume."""
    images = load_images(args)
    batch_size = min(args.batch_size, len(images))
    if batch_size % 2 and batch_size % 3:
        fail("--batch-size, --limit: D compares groups of images; give a multiple of 2 or 3")
    if args.mixing > 1:
        fail("--mixing: a share is at most 1")
    parts = build(args)
    ema = parts["ema"]  # the averaged generator, which draws the samples
    history = []  # the mean metrics of each epoch
    if args.resume:
        history = load_checkpoint(args.resume, **parts)["history"]  # and the parts are as they were
        parts["optimizer_g"].param_groups[0]["lr"] = args.lr_g  # but with the rates of now
        parts["optimizer_d"].param_groups[0]["lr"] = args.lr_d
    if len(history) >= args.epochs:
        fail(f"--epochs: {args.resume} has run {len(history)} already; ask for more")
    if args.fid_every:
        import fid

        judge = fid.Judge(args.dataset, images, args.device, args.data_dir)  # may train a classifier first
    folder = open_folder(args, f"runs/{SCRIPT}")
    (folder / "config.json").write_text(json.dumps(vars(args) | {"torch": torch.__version__}, indent=2))
    steps = len(images) // batch_size * args.epochs
    few = " (few: for better pictures raise --epochs)" if steps < 1000 else ""
    print(f"{len(images):,} images, {steps:,} steps{few}, on {args.device}: {folder}", file=sys.stderr)

    for epoch in range(len(history) + 1, args.epochs + 1):
        torch.manual_seed(args.seed * 10_000 + epoch)  # so a resumed run draws the same numbers
        order = torch.randperm(len(images)).to(args.device)
        batches = order.split(batch_size)[: len(images) // batch_size]  # whole ones only
        settings = {"mixing": args.mixing, "ema_images": args.ema_images, "precision": args.precision}
        metrics, start = [], time.perf_counter()
        bar = tqdm(batches, f"epoch {epoch}", leave=False)
        for number, batch in enumerate(bar, start=(epoch - 1) * len(batches)):
            real = images[batch] / 127.5 - 1
            real = mirrored(real) if args.flip else real
            r1_weight = args.r1_weight * args.r1_every if number % args.r1_every == 0 else 0.0
            metrics.append(train_step(**parts, real=real, r1_weight=r1_weight, **settings))

        means = {name: torch.stack([step[name] for step in metrics]).mean().item() for name in metrics[0]}
        history.append({"epoch": epoch} | means)
        text = "  ".join(f"{name} {value:.3f}" for name, value in means.items())
        print(f"epoch {epoch}/{args.epochs}  {text}  {time.perf_counter() - start:.0f} s", flush=True)
        draw(ema, folder, epoch, args)
        if args.fid_every and epoch % args.fid_every == 0:
            fid.track(judge, lambda n: sample(ema, torch.randn(n, args.latent_dim)), folder, epoch)
        save(parts, history, folder, args)
        plot(history, folder, last=epoch == args.epochs)


# %% Data, pictures, files
def fail(message, status=2):
    """End the program with one line on stderr."""
    tqdm.write(f"{SCRIPT}.py: {message}", file=sys.stderr)
    raise SystemExit(status) from None


def load_images(args):
    """The training images as bytes (N, C, image_size, image_size), all of them on the device."""
    size = [args.image_size, args.image_size]
    torch.manual_seed(args.seed)
    if args.dataset in ("celeba", "folder"):
        folder = Path(args.data_dir, CELEBA if args.dataset == "celeba" else "").resolve()
        paths = list_pictures(folder)
        numbers = sorted(torch.randperm(len(paths))[: args.limit or None].tolist())
        images = read_pictures([paths[number] for number in numbers], args.image_size)
        if args.resume and getattr(args, "images", len(images)) != len(images):
            tqdm.write(f"pictures have changed: {args.images:,} before, {len(images):,} now", file=sys.stderr)
        args.images = len(images)  # into the checkpoint
        return images.to(args.device)
    images = read_sheets(args) if args.dataset == "faces" else read_dataset(args)
    images = images[torch.randperm(len(images))[: args.limit or None]]
    if "mnist" in args.dataset:
        images = F.pad(images, (2, 2, 2, 2))  # 28x28 to 32x32
    chunks = images.split(1000)  # resize needs floats: 4 times the memory
    return torch.cat([resize(chunk, size, antialias=True) for chunk in chunks]).to(args.device)


def read_dataset(args, train=True):
    """Digits, clothes or CIFAR-10's pictures (N, C, H, W), as they are."""
    names = {"fashion_mnist": "FashionMNIST", "mnist": "MNIST", "cifar10": "CIFAR10"}
    dataset_class = getattr(datasets, names[args.dataset])
    try:
        images = torch.as_tensor(dataset_class(args.data_dir, train=train, download=True).data)
    except Exception as error:  # many types are possible
        fail(f"--data-dir: no {args.dataset} in {args.data_dir}; your own: --dataset folder ({error!r:.99})")
    return images.movedim(3, 1) if images.ndim == 4 else images[:, None]


def read_sheets(args, pattern="train_??.webp"):
    """The cartoon faces (N, 3, 64, 64) of data/faces: a sheet has 32 rows of 32."""
    folder = Path(args.data_dir, "faces")
    sheets = [np.asarray(Image.open(path)) for path in sorted(folder.glob(pattern))]
    if {sheet.shape for sheet in sheets} != {(2048, 2048, 3)}:
        fail(f"--data-dir: {folder} lacks the sheets of faces; for your own, --dataset folder")
    faces = np.stack(sheets).reshape(-1, 32, 64, 32, 64, 3)  # (sheets, rows, 64, columns, 64, 3)
    return torch.from_numpy(faces).permute(0, 1, 3, 5, 2, 4).reshape(-1, 3, 64, 64)


@torch.no_grad()
def sample(generator, z):
    """Images (N, C, H, W) in [0, 1], on the CPU; in eval mode, so that each depends on its own z alone."""
    training, device = generator.training, next(generator.parameters()).device
    generator.eval()
    images = torch.cat([generator(chunk.to(device)).cpu() / 2 + 0.5 for chunk in z.split(500)])
    generator.train(training)
    return images


@torch.no_grad()
def draw(generator, folder, epoch, args):
    """Write an epoch's samples (always from the same z) and three pictures of styles."""
    (folder / "samples").mkdir(exist_ok=True)
    rng = torch.Generator().manual_seed(args.seed)  # leaves training's random numbers alone
    z = torch.randn(64, args.latent_dim, generator=rng).to(args.device)
    save_image(sample(generator, z), folder / "samples" / f"epoch_{epoch:04d}.png", nrow=8)

    # Pairs of rows with the same ends: an arc in Z, where each z is from N(0, I), and a straight line in W.
    rows, t = [], torch.linspace(0, 1, 10, device=z.device)[:, None]
    for z1, z2 in z[:8].split(2):
        arc = (t * math.pi / 2).cos() * z1 + (t * math.pi / 2).sin() * z2
        w1, w2 = generator.ws(torch.stack([z1, z2]))  # each (layers, latent_dim)
        rows += [generator.ws(arc), torch.lerp(w1, w2, t[:, None])]  # each (10, layers, latent_dim)
    save_image(sample(generator.synthesis, torch.cat(rows)), folder / "interpolation.png", nrow=10)

    # Six images on the left take the w of some layers from six at the top.
    left, top = generator.ws(z[:12]).split(6)  # each (6, layers, latent_dim)
    coarse, middle, fine = slice(0, 4), slice(4, 6), slice(6, None)  # layers: 4x4 and 8x8; 16x16; the others
    rows = [top[:1], top]  # a dummy fills the corner
    for row, layers in enumerate([coarse, coarse, middle, middle, fine, fine]):
        mixed = left[row].repeat(6, 1, 1)
        mixed[:, layers] = top[:, layers]
        rows += [left[row : row + 1], mixed]
    images = sample(generator.synthesis, torch.cat(rows))
    images[0] = 0
    save_image(images, folder / "mixing.png", nrow=7)

    # A column for each psi. Below 0, w is past its mean; -1 is the opposite of 1.
    columns = [generator.ws(z[:6], psi) for psi in (1, 0.7, 0.5, 0.3, 0, -0.5, -1)]
    ws = torch.stack(columns, 1).flatten(0, 1)  # (6 * 7, layers, latent_dim), row by row
    save_image(sample(generator.synthesis, ws), folder / "truncation.png", nrow=7)


def plot(history, folder, last):
    """Write history.csv after each epoch; every half a minute, and at last, losses.png and progress.gif."""
    rows = [",".join(f"{means.get(name, math.nan):.5g}" for name in history[-1]) for means in history]
    (folder / "history.csv").write_text("\n".join([",".join(history[-1]), *rows]) + "\n")
    path = folder / "losses.png"
    if not last and path.exists() and time.time() - path.stat().st_mtime < 30:
        return  # these can take longer than an epoch
    figure = Figure(figsize=(8, 2.4 * len(PANELS)), layout="constrained")
    for axis, names in zip(figure.subplots(len(PANELS), squeeze=False).flat, PANELS):
        values = [[means[name] for name in names] for means in history]
        axis.plot(range(1, len(history) + 1), values, ".-", label=names)
        axis.locator_params("x", integer=True)
        axis.set_xlabel("epoch")
        axis.legend()
    figure.savefig(path)
    paths = sorted(path for path in (folder / "samples").glob("epoch_????.png") if path.stat().st_size)
    with contextlib.suppress(OSError):  # one may be cut off
        frames = [Image.open(path) for path in paths[:: math.ceil(len(paths) / 100)]]  # at most 100
        frames[0].save(folder / "progress.gif", save_all=True, append_images=frames[1:], duration=200, loop=0)


def open_folder(args, parent):
    """The folder of a resumed run, or a new one: --out-dir or the next free of parent/001, parent/002, ..."""
    if args.resume and not args.out_dir:
        return Path(args.resume).parent
    folders = [args.out_dir] if args.out_dir else [f"{parent}/{number:03d}" for number in range(1, 10_000)]
    for folder in folders:
        with contextlib.suppress(FileExistsError):  # there, perhaps since a moment ago
            Path(folder).mkdir(parents=True)
            return Path(folder)
    fail(f"--out-dir: {folder} is there already; name a new folder")


def save(parts, history, folder, args):
    """Write the checkpoint, first under another name, so that there is never half of one."""
    networks = [module for module in parts.values() if isinstance(module, nn.Module)]
    if not all(weight.isfinite().all() for network in networks for weight in network.parameters()):
        fail(f"epoch {len(history)}: weights are not finite; try again with lower --lr-g and --lr-d", 1)
    not_saved = {"device", "out_dir", "resume", "generate", "checkpoint"}  # of this command, not of the run
    settings = {name: value for name, value in vars(args).items() if name not in not_saved and value != DATA}
    checkpoint = {name: module.state_dict() for name, module in parts.items()}
    checkpoint |= {"script": SCRIPT, "settings": settings, "history": history}
    tmp = folder / "checkpoint.tmp"
    try:
        if args.keep_every and len(history) % args.keep_every == 0:
            torch.save({name: checkpoint[name] for name in ("ema", "script", "settings")}, tmp)
            tmp.replace(folder / f"generator_epoch_{len(history):04d}.pt")
        torch.save(checkpoint, tmp)
        tmp.replace(folder / "checkpoint.pt")
    except (OSError, RuntimeError) as error:  # a full disk can look like either
        tmp.unlink(missing_ok=True)
        fail(f"cannot write to {folder}; the last good checkpoint.pt is kept ({error!r:.150})", 1)


def load_checkpoint(path, **modules):
    """A checkpoint of this script; networks and optimisers given by name are loaded from it."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)  # runs no code from the file
        if checkpoint["script"] != SCRIPT:
            raise ValueError(f"it is one of {checkpoint['script']}.py")
        for name, module in modules.items():
            module.load_state_dict(checkpoint[name])
    except Exception as error:  # many types are possible
        fail(f"{path}: give a checkpoint.pt of {SCRIPT}.py that fits ({error!r:.200})")
    return checkpoint


def load_generator(path, device="cpu"):
    """The averaged generator of a checkpoint: sample(load_generator(path), torch.randn(64, 128))."""
    generator = make_generator(argparse.Namespace(**load_checkpoint(path)["settings"]))
    load_checkpoint(path, ema=generator)
    return generator.to(device).eval()


# %% Folders: pictures are decoded once, into a file
def list_pictures(folder):
    """The paths of all pictures in a folder and below it, but no hidden ones, and none that a run made."""
    files, visited = [], set()
    for here, folders, names in os.walk(folder, followlinks=True):
        is_run = here != str(folder) and "config.json" in names and "samples" in folders
        if is_run or os.path.realpath(here) in visited:  # links can lead back up
            folders.clear()
            continue
        visited.add(os.path.realpath(here))
        folders[:] = sorted(name for name in folders if name[0] != ".")
        files += [Path(here, name) for name in names if name[0] != "." and Path(here, name).is_file()]
    pictures = sorted(path for path in files if path.suffix.lower() in Image.registered_extensions())
    others = Counter(path.suffix for path in files) - Counter(path.suffix for path in pictures)
    tqdm.write(f"{folder}: {len(pictures):,} pictures; other files: {dict(others) or 0}", file=sys.stderr)
    return pictures


def decode(path, size):
    """The middle square of a picture, upright and on white: bytes (3, size, size); None if it is damaged."""
    try:
        with Image.open(path) as file:
            image = ImageOps.exif_transpose(file)
        if image.mode.startswith(("I", "F")):  # grey, in 16 bits or as floats
            white = 65535 if image.mode != "F" else 1 if image.getextrema()[1] <= 1 else 255
            image = Image.fromarray((np.asarray(image) / white * 255 + 0.5).clip(0, 255).astype(np.uint8))
        image = ImageOps.fit(image.convert("RGBA"), (size, size), Image.Resampling.BILINEAR)
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
        return np.asarray(image).transpose(2, 0, 1)
    except Exception as error:  # many types are possible
        tqdm.write(f"skipped {path}: {error}", file=sys.stderr)


def read_pictures(paths, size):
    """Pictures as bytes (N, 3, size, size), decoded once, into a file in CACHE. All must fit in memory."""
    stats = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in paths]
    cache = CACHE / f"{hashlib.sha256(repr([size, stats]).encode()).hexdigest()[:16]}.npy"
    if cache.exists():
        return torch.from_numpy(np.load(cache))
    with ThreadPool(min(8, os.cpu_count() or 1, len(paths) or 1)) as pool:
        decoded = pool.imap(lambda path: decode(path, size), paths)
        images = [image for image in tqdm(decoded, "decoding", len(paths)) if image is not None]
    if not images:
        fail("--data-dir: no picture there can be read; check the path")
    tmp = cache.with_suffix(f".{os.getpid()}.npy")  # another process may decode the same
    try:
        CACHE.mkdir(parents=True, exist_ok=True)
        np.save(tmp, images)
        tmp.replace(cache)
    finally:
        tmp.unlink(missing_ok=True)  # half of it, if the disk is full
    return torch.from_numpy(np.stack(images))


# %% Command line
def parse_args(argv=None):
    """The settings: a flag that is given, else the checkpoint, else the default."""
    parser = argparse.ArgumentParser(f"{SCRIPT}.py", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.description = (__doc__ or "").split("\n")[0]  # none under python -OO
    parser.error = fail  # one line in place of argparse's usage text
    add_flags(parser.add_argument)
    args = parser.parse_args(argv)  # a first look, for --resume and the like
    if (args.generate is None) != (args.checkpoint is None) or (args.generate and args.resume):
        fail("--generate N needs --checkpoint PATH, and no --resume")
    if args.truncation is not None and not args.generate:
        fail("--truncation: it is for the images of --generate")
    if (args.resume, args.checkpoint) != (None, None):
        parser.set_defaults(**load_checkpoint(args.resume or args.checkpoint)["settings"])
    else:
        parser.set_defaults(**DEFAULTS.get(args.dataset, {}))
    args = parser.parse_args(argv)  # with the new defaults
    for name, value in vars(args).items():
        lowest = 0 if type(value) is float or name in ("seed", "mapping_layers", "limit", "fid_every") else 1
        if type(value) in (int, float) and name != "truncation" and not lowest <= value < 10**12:
            fail(f"--{name.replace('_', '-')}: give a number from {lowest} to 10**12")
    if args.fid_every and not args.checkpoint and not Path(DATA).with_name("fid.py").exists():
        fail("--fid-every: put fid.py of the same collection beside this script")
    auto = args.device == "auto"
    if auto:
        args.device = accelerator.current_accelerator().type if accelerator.is_available() else "cpu"
    try:
        torch.zeros(1, device=args.device).item()
    except Exception as error:  # many types are possible
        if not auto:
            fail(f"--device: there is no {args.device} on this machine; give cpu, or leave it out")
        tqdm.write(f"on cpu: {args.device} does not work here ({error!r:.150})", file=sys.stderr)
        args.device = "cpu"
    return args


def generate(args):
    """Write args.generate images as PNG files, drawn by the averaged generator in args.checkpoint."""
    generator = load_generator(args.checkpoint, args.device)
    folder = open_folder(args, Path(args.checkpoint).parent / "generated")
    torch.manual_seed(args.seed)
    z = torch.randn(args.generate, generator.latent_dim).to(args.device)
    ws = generator.ws(z, 1.0 if args.truncation is None else args.truncation)
    for number, image in enumerate(sample(generator.synthesis, ws)):
        save_image(image, folder / f"{number:05d}.png")
    print(f"{args.generate} images in {folder}", file=sys.stderr)


def main(argv=None):
    args = parse_args(argv)
    torch.backends.cudnn.deterministic = True  # so that --resume is exact
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = args.precision == "tf32"
    run = generate if args.checkpoint else train
    try:
        run(args)
    except KeyboardInterrupt:
        fail("stopped; --resume goes on after the last whole epoch, if there was one", 130)
    except OSError as error:  # a folder that is there already or cannot be written, a full disk
        fail(f"{error} (a run writes into --out-dir)")


if __name__ == "__main__":
    main([] if "kernel_launcher" in sys.argv[0] else None)  # the flags of a notebook are not ours
