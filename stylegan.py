"""StyleGAN: a style sets the contrast of each layer's maps; 32x32 digits, 64x64 faces, folders of pictures.

    python stylegan.py                              # MNIST at 32x32, into runs/stylegan/001
    python stylegan.py --dataset faces              # the cartoon faces in data/faces, at 64x64
    python stylegan.py --generate 64 --truncation 0.7 --checkpoint runs/stylegan/001/checkpoint.pt

Where does variety enter an image? In the scripts so far that start from noise, only once: z is the input of
G's first layer. Here that input is a constant. A mapping network f turns z into w = f(z), and in each layer
an affine map of its own, A and b, turns w into a style y: a scale and a shift for each feature map x_i.

    AdaIN(x_i, y) = (1 + y_scale,i) (x_i - mean(x_i)) / std(x_i) + y_shift,i,    y = A w + b

This adaptive instance normalisation first resets a map's mean and contrast, whatever earlier styles had made
of them. So a style says how much each map counts in the next convolution; then the next style takes over.
That lets some layers take w from one image, the rest from another. To prepare for that, nine of ten fakes in
training have two w, one up to a random layer, then the other: style mixing (--mixing; short runs drew better
images without). Detail that no style decides is to come from noise: each layer adds one random picture to all
its maps, at learned strengths; in training a new one for each image, in samples the same for all.

Why map z at all? z has the same distribution whatever the data are, in a space Z; the space of w is W. If no
old face in the data wears a cap, a G fed with z has to bend Z so that no z means that combination. With f in
between, W can leave that corner empty. (In short runs w predicted class no better than an untrained f's w.)

L_D and L_G are those of vanilla_gan.py. R1, gamma / 2 E|grad_x D(x)|^2 with gamma = 10, keeps D (before its
sigmoid) flat at real images; wgan_gp.py wants a slope of 1 between real and fake. R1 acts in every tenth
step, tenfold. Without it, or with gamma = 0.1, short runs drew nearly one image for all z. Also new: D is
told how much the images of a group differ (minibatch standard deviation); weights are scaled in use, so that
all layers learn alike, f a hundred times slower (equalised rates); samples come from G's averaged weights.

What to watch: interpolation.png, rows in pairs: an arc between two z above a line between their w.
mixing.png: pairs of rows take their coarse (4x4, 8x8), middle (16x16) or fine styles from the image above,
the rest from the left. truncation.png: w drawn towards its mean, in the last two columns past it;
--truncation 1 is w itself, 0 the mean. (Digits with 0.7: recall 0.32, not 0.46; precision 0.735, not 0.705.)
z_share: the part of the images' variance that z decides; near 0, G ignores z. path_z, path_w: the paper's
path lengths, but of pixels, not of features. A smaller path_w proves nothing: an untrained f has it, too.

Papers: Karras et al. 2018, arXiv 1812.04948; 2017, 1710.10196 (equalised rates, minibatch deviation); 2019,
1912.04958 (R1 in few steps); Mescheder et al. 2018, 1801.04406. Departures: full size from the start, small
networks, the gamma for 1024x1024, a first constant from N(0, 1), not ones; D halves before a stage's second
convolution, not in it; G's step uses the fakes of D's step again; a rate of 2e-3; truncation in all layers.
"""

import argparse
import copy
import functools
import hashlib
import inspect
import json
import math
import os
import random
import signal
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from PIL import Image, ImageOps
from torch import nn
from torch.utils.data import DataLoader
from torchvision import datasets
from torchvision.transforms.functional import resize, to_pil_image
from torchvision.utils import make_grid
from tqdm import tqdm

# %% Settings


def add_flags(add):
    """The flags, those of this script's idea first; `add` is argparse's parser.add_argument."""
    add("--mapping-layers", type=int, default=8, help="layers from z to w; 0: w is z, scaled")
    add("--mixing", type=float, default=0.9, help="share of fakes in training made from two w; 0: none")
    add("--no-noise", action="store_true", help="no noise in the layers")
    add("--r1-weight", type=float, default=10.0, help="gamma, the weight of R1; 0: none")
    every = "R1 in each Kth step, K times as strong; history.csv has its mean, so K should divide 20"
    add("--r1-every", type=int, default=10, metavar="K", help=every)
    add("--ema-images", type=int, default=10000, help="images until an old generator has half its weight")
    psi = "psi for --generate, 0 or more: below 1, w moves to its mean; None: 1"
    add("--truncation", type=float, help=psi)
    add("--image-size", type=int, help="32, 64, 128 or 256; None: 64 for faces, celeba, folder, else 32")
    width = "channels of the largest maps, elsewhere at most 4 times that; None: 32, with --dataset faces 16"
    add("--width", type=int, help=width)
    add("--epochs", type=int, help="passes over the training set; None: 5, and 30 with --dataset faces")
    add("--max-steps", type=int, help="stop after this many steps, if that comes sooner")
    add("--lr-g", type=float, default=2e-3, help="Adam's learning rate for the generator")
    add("--lr-d", type=float, default=2e-3, help="Adam's learning rate for the discriminator")
    add("--batch-size", type=int, default=32, help="images per step, a multiple of 2 or 3")
    add("--latent-dim", type=int, default=128, help="length of the noise vector z and of w")
    choices = ["mnist", "fashion_mnist", "cifar10", "faces", "celeba", "folder"]
    add("--dataset", choices=choices, default="mnist", help="what to train on")
    add("--data-dir", default="data", help="where the data set, or the folder of images, is")
    add("--fid-every", type=int, metavar="K", help="every K epochs: distance, precision, recall, by fid.py")
    add("--fid-samples", type=int, default=10000, metavar="N", help="how many samples it measures")
    add("--device", default="auto", help="auto takes cuda, then mps, then cpu; or any torch device string")
    bf16 = "bf16 is faster only where the processor computes in it: benchmark.py tells"
    add("--precision", choices=["fp32", "bf16"], default="fp32", help=bf16)
    add("--seed", type=int, default=42, help="all randomness follows from it")
    add("--out-dir", help="a new folder for the run; None: the next free number in runs/<script>")
    add("--resume", metavar="PATH", help="go on from this checkpoint.pt, with its settings and in its folder")
    add("--generate", type=int, metavar="N", help="no training: write N images, with --checkpoint")
    add("--checkpoint", metavar="PATH", help="the checkpoint.pt that --generate uses")


MAY_BE_ZERO = ["mapping_layers", "mixing", "truncation", "r1_weight"]  # of the flags that are numbers


# %% Networks

GAIN = math.sqrt(2)  # roughly keeps the size of activations through a LeakyReLU


class EqualLinear(nn.Module):
    """(N, inputs) to (N, outputs). Weights are stored as N(0, 1) and scaled in use.

    Adam's steps are about as large for all parameters. As all stored weights are of one size, each layer
    changes by about the same fraction per step: equalised learning rates. With `lr_mul` 0.01 they are stored
    as N(0, 100^2), and the layer learns at a hundredth of the rate, as the paper has it for the mapping.
    """

    def __init__(self, inputs, outputs, gain=1.0, lr_mul=1.0):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs) / lr_mul)
        self.bias = nn.Parameter(torch.zeros(outputs))
        self.scale, self.lr_mul = gain / math.sqrt(inputs) * lr_mul, lr_mul

    def forward(self, x):
        return F.linear(x, self.weight * self.scale, self.bias * self.lr_mul)


class EqualConv2d(nn.Module):
    """Maps (N, inputs, H, W) to (N, outputs, H, W), with weights as in EqualLinear."""

    def __init__(self, inputs, outputs, kernel, gain=GAIN, bias=True):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs, kernel, kernel))
        self.bias = nn.Parameter(torch.zeros(outputs)) if bias else None
        self.scale, self.padding = gain / (kernel * math.sqrt(inputs)), kernel // 2

    def forward(self, x):
        return F.conv2d(x, self.weight * self.scale, self.bias, padding=self.padding)


class Blur(nn.Module):
    """Maps (N, C, H, W) smoothed with [1, 2, 1] / 4 in both directions, and padded with zeros."""

    def __init__(self):
        super().__init__()
        row = torch.tensor([1.0, 2.0, 1.0]) / 4
        self.register_buffer("kernel", row * row[:, None], persistent=False)

    def forward(self, x):
        return F.conv2d(x, self.kernel.expand(x.shape[1], 1, 3, 3), padding=1, groups=x.shape[1])


def adain(x, style):
    """Equation 1: maps x (N, C, H, W), given the means and the contrasts that a style (N, 2C) asks for.

    The first half of the style plus 1 is the standard deviation of each map, the second half its mean.
    """
    scale, shift = style[:, :, None, None].chunk(2, 1)
    # A group for each map is instance normalisation, and faster than F.instance_norm with channels last.
    return F.group_norm(x, x.shape[1], eps=1e-8) * (1 + scale) + shift


class Mapping(nn.Module):
    """Noise z (N, latent_dim), each scaled to a mean square of 1, to w (N, latent_dim)."""

    def __init__(self, latent_dim=128, layers=8):
        super().__init__()
        self.layers = nn.Sequential()
        for _ in range(layers):
            self.layers.extend([EqualLinear(latent_dim, latent_dim, GAIN, 0.01), nn.LeakyReLU(0.2)])

    def forward(self, z):
        return self.layers(z * (z.square().mean(1, keepdim=True) + 1e-8).rsqrt())


class StyledLayer(nn.Module):
    """Maps (N, inputs, H, W) and w (N, latent_dim) to maps (N, outputs, size, size)."""

    def __init__(self, inputs, outputs, latent_dim, size, conv=True, up=False, noise=True):
        super().__init__()
        self.conv = EqualConv2d(inputs, outputs, 3, bias=False) if conv else nn.Identity()
        self.strength = nn.Parameter(torch.zeros(outputs, 1, 1)) if noise else None
        self.bias = nn.Parameter(torch.zeros(outputs, 1, 1))
        self.style = EqualLinear(latent_dim, 2 * outputs)  # A and b of equation 1
        self.register_buffer("noise", torch.randn(1, 1, size, size))  # in eval mode, always the same
        self.up = nn.Upsample(scale_factor=2) if up else nn.Identity()  # each pixel becomes 2x2 equal ones
        self.blur = Blur() if up else nn.Identity()

    def forward(self, x, w):
        x = self.blur(self.conv(self.up(x)))
        if self.strength is not None:
            fresh = torch.randn(len(x), 1, *x.shape[2:], device=x.device) if self.training else self.noise
            x = x + self.strength * fresh
        return adain(F.leaky_relu(x + self.bias, 0.2), self.style(w))


def widths(size, width, most):
    """Channels at each side: `width` at `size`, doubled at each halving down to 4, at most `most`."""
    sides = [2**k for k in range(2, int(math.log2(size)) + 1)]  # 4, 8, ..., size
    return {side: min(width * size // side, most or 4 * width) for side in sides}


class Synthesis(nn.Module):
    """A w for each layer (N, layers, latent_dim) to images (N, channels, size, size).

    Unbounded in training; in eval mode cut to [-1, 1], and with the same noise for all images.
    """

    def __init__(self, size=32, width=32, latent_dim=128, channels=1, noise=True, most=None):
        super().__init__()
        stages = widths(size, width, most)
        inputs = stages[4]
        self.constant = nn.Parameter(torch.randn(1, inputs, 4, 4))
        self.layers = nn.ModuleList()  # two at each resolution
        for side, outputs in stages.items():
            grow = side > 4  # at 4x4, the constant stands for what was doubled and convolved
            self.layers.append(StyledLayer(inputs, outputs, latent_dim, side, grow, grow, noise))
            self.layers.append(StyledLayer(outputs, outputs, latent_dim, side, noise=noise))
            inputs = outputs
        self.to_rgb = EqualConv2d(width, channels, 1, gain=1.0)

    def forward(self, ws):
        x = self.constant.expand(len(ws), -1, -1, -1)  # (N, C, 4, 4)
        for layer, w in zip(self.layers, ws.unbind(1)):
            x = layer(x, w)  # (N, C, 4, 4), (N, C, 4, 4), (N, C, 8, 8), (N, C, 8, 8), ...
        x = self.to_rgb(x)  # (N, channels, size, size)
        return x if self.training else x.clamp(-1, 1)


class Generator(nn.Module):
    """Noise z (N, latent_dim) to images; with psi (N, 1), w is moved to w_avg + psi (w - w_avg) first.

    w_avg is the running mean of w in training. This is the truncation trick, here in all layers.
    """

    def __init__(
        self, size=32, width=32, latent_dim=128, channels=1, mapping_layers=8, noise=True, most=None
    ):
        super().__init__()
        self.latent_dim = latent_dim
        self.mapping = Mapping(latent_dim, mapping_layers)
        self.synthesis = Synthesis(size, width, latent_dim, channels, noise, most)
        self.register_buffer("w_avg", torch.zeros(latent_dim))

    def forward(self, z, psi=None):
        w = self.mapping(z)
        if psi is not None:
            w = torch.lerp(self.w_avg.expand_as(w), w, psi)
        return self.synthesis(self.spread(w))

    def spread(self, w):
        """The same w (N, latent_dim) for all layers: (N, layers, latent_dim)."""
        return w[:, None].expand(-1, len(self.synthesis.layers), -1)


class GroupDeviation(nn.Module):
    """Maps (N, C, H, W) and one more: how much the images of a group differ, the same number everywhere.

    It is the standard deviation over the group, averaged over C, H and W. The size of a group is the first of
    4, 3 and 2 that divides N; one of 4 has the images n, n + N/4, n + N/2 and n + 3N/4. So D notices if all
    fakes are alike.
    """

    def forward(self, x):
        size = next(size for size in (4, 3, 2, 1) if len(x) % size == 0)
        groups = x.unflatten(0, (size, -1))
        deviation = (groups.var(0, correction=0) + 1e-8).sqrt().mean((1, 2, 3))
        return torch.cat([x, deviation.repeat(size)[:, None, None, None].expand(-1, 1, *x.shape[2:])], 1)


class Discriminator(nn.Module):
    """Images (N, channels, size, size) to logits (N, 1); their sigmoid is the probability of "real"."""

    def __init__(self, size=32, width=32, channels=1, most=None):
        super().__init__()
        stages = widths(size, width, most)
        layers = [EqualConv2d(channels, width, 1), nn.LeakyReLU(0.2)]  # (N, width, size, size)
        for side in sorted(stages, reverse=True)[:-1]:  # size, ..., 16, 8
            now, after = stages[side], stages[side // 2]
            layers += [EqualConv2d(now, now, 3), nn.LeakyReLU(0.2), Blur(), nn.AvgPool2d(2)]
            layers += [EqualConv2d(now, after, 3), nn.LeakyReLU(0.2)]  # (N, after, side / 2, side / 2)
        layers += [GroupDeviation(), EqualConv2d(stages[4] + 1, stages[4], 3), nn.LeakyReLU(0.2)]
        layers += [nn.Flatten(), EqualLinear(16 * stages[4], stages[4], GAIN), nn.LeakyReLU(0.2)]
        self.layers = nn.Sequential(*layers, EqualLinear(stages[4], 1))  # (N, 1)

    def forward(self, images):
        return self.layers(images)


# %% Losses


def discriminator_loss(real_logits, fake_logits):
    """E[softplus(-D(x))] + E[softplus(D(G(z)))]: the cross-entropy of real images at 1 and fakes at 0."""
    return F.softplus(-real_logits).mean() + F.softplus(fake_logits).mean()


def generator_loss(fake_logits):
    """The non-saturating loss E[softplus(-D(G(z)))] = -E[log sigmoid(D(G(z)))]."""
    return F.softplus(-fake_logits).mean()


def r1_penalty(discriminator, real):
    """E |grad_x D(x)|^2 at real images (N, C, H, W), the sum over all pixels of an image; in fp32.

    The gradient is that of the sum of all logits: an image also moves those of its group (GroupDeviation).
    """
    real = real.detach().requires_grad_()
    with fp32():
        (gradient,) = torch.autograd.grad(discriminator(real).sum(), real, create_graph=True)
    return gradient.square().flatten(1).sum(1).mean()


# %% Training step

# What a step reports, grouped by the panels of losses.png.
PANELS = {"loss": ("d_loss", "g_loss"), "probability": ("d_real", "d_fake"), "penalty": ("r1",)}
PANELS |= {"diversity": ("diversity",)}
METRICS = [name for names in PANELS.values() for name in names]


def mix(w1, w2, layers, mixing):
    """(N, layers, latent_dim): w1; for a share `mixing` of the images, w2 from a random layer on."""
    cut = torch.randint(1, layers, (len(w1), 1, 1), device=w1.device)
    alone = torch.rand(len(w1), 1, 1, device=w1.device) >= mixing
    number = torch.arange(layers, device=w1.device)[:, None]
    return torch.where(alone | (number < cut), w1[:, None], w2[:, None])


@torch.no_grad()
def average(ema, generator, decay):
    """The weights of `ema` become decay * old + (1 - decay) * the generator's; its buffers are copied."""
    for mean, new in zip(ema.parameters(), generator.parameters()):
        mean.lerp_(new, 1 - decay)
    for mean, new in zip(ema.buffers(), generator.buffers()):
        mean.copy_(new)


def train_step(generator, discriminator, ema, optimizer_g, optimizer_d, real, mixing, r1_weight, ema_decay):
    """Update the discriminator, then the generator and its average `ema`, on a batch `real` (N, C, H, W).

    `real` is in [-1, 1]; `r1_weight` is 0 in the steps without the penalty. Returns the METRICS, detached.
    """
    # Two w for each image: the second is for the later layers of those that are mixed.
    z = torch.randn(2 * len(real), generator.latent_dim, device=real.device)
    w1, w2 = generator.mapping(z).chunk(2)
    generator.w_avg.lerp_(w1.detach().mean(0), 0.005)  # a mean over about 200 steps
    fake = generator.synthesis(mix(w1, w2, len(generator.synthesis.layers), mixing))

    # The discriminator learns to tell real from fake, and in some steps to be flat at real images.
    real_logits, fake_logits = discriminator(real), discriminator(fake.detach())
    d_loss, r1 = discriminator_loss(real_logits, fake_logits), torch.zeros((), device=real.device)
    if r1_weight > 0:
        r1 = r1_weight / 2 * r1_penalty(discriminator, real)
    optimizer_d.zero_grad()
    (d_loss + r1).backward()
    optimizer_d.step()

    # The generator learns to fool the updated discriminator, frozen here. The fakes still have their graph.
    discriminator.requires_grad_(False)
    g_loss = generator_loss(discriminator(fake))
    optimizer_g.zero_grad()
    g_loss.backward()
    optimizer_g.step()
    discriminator.requires_grad_(True)
    average(ema, generator, ema_decay)
    return {
        "d_loss": d_loss.detach(),
        "g_loss": g_loss.detach(),
        "d_real": real_logits.detach().sigmoid().mean(),
        "d_fake": fake_logits.detach().sigmoid().mean(),
        "r1": r1.detach(),
        # Root mean square distance of two fakes, over that of two real images: 0 if all fakes are alike.
        "diversity": (fake.detach().var(0, correction=0).mean() / real.var(0, correction=0).mean()).sqrt(),
    }


# %% Folders: pictures in sheets, or in files that are decoded once

SUFFIXES = ".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif"
CACHE = Path("data", "cache")  # decoded pictures


def read_sheets(folder, name):
    """The faces of the sheets `name` in a folder, uint8 (N, 3, 64, 64): a sheet has 32 rows of 32 faces."""
    sheets = sorted(folder.glob(name))
    try:
        faces = np.stack([np.asarray(Image.open(sheet)) for sheet in sheets]).reshape(-1, 32, 64, 32, 64, 3)
    except (OSError, ValueError) as error:
        hint = "copy data/faces of this script's repository there"
        fail(f"--data-dir: {folder} has no sheets of faces; {hint} ({error!r:.90})")
    return torch.from_numpy(faces).permute(0, 1, 3, 5, 2, 4).reshape(-1, 3, 64, 64)


def to_rgb(image):
    """A picture of any mode in RGB: upright as EXIF says, 16 bits made 8, transparent parts white."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16 bits of grey
        image = image.point(lambda value: value / 257 + 0.5).convert("L")
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == "RGB" else image.convert("RGB")


def count_cores():
    """How many processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def decode(path, size, half=None):
    """The middle square of a picture, or of its half 0 (left) or 1 (right), as the bytes of size x size RGB.

    There are none if the file cannot be read.
    """
    try:
        with Image.open(path) as image:
            image = to_rgb(image)
            if half is not None:
                left = half * image.width // 2
                image = image.crop((left, 0, left + image.width // 2, image.height))
            return ImageOps.fit(image, (size, size), Image.Resampling.BILINEAR).tobytes()
    except Exception:  # its type depends on the format and the damage
        return b""


def decode_all(paths, size, half):
    """The bytes of all pictures that can be read, one after the other; and for each path 1 or, if not, 0."""
    decoded = [decode(path, size, half) for path in paths]
    return b"".join(decoded), bytes(bool(pixels) for pixels in decoded)


def list_images(folder, flag="--data-dir"):
    """The files below a folder that are pictures by their suffix; `flag` is named if there is no folder."""
    if not folder.is_dir():
        fail(f"{flag}: {folder} is not a folder; give one with images")
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())


def map_images(folder, files, size, half=None):
    """Pictures of a folder, uint8 (N, 3, size, size), mapped from a file in CACHE; and their files.

    That file is made once, on all cores, and again when a picture was added, removed or changed, or when this
    script decodes in another way. Files that cannot be read are named, and left out.
    """
    stats = [(str(path.relative_to(folder)), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    key = stats, inspect.getsource(to_rgb), inspect.getsource(decode), Image.__version__
    use = SCRIPT, folder.resolve(), size, half
    where, content = (hashlib.sha256(repr(x).encode()).hexdigest()[:12] for x in (use, key))
    cache = CACHE / f"{where}-{content}.uint8"  # all pixels; then, for each file, whether it can be read
    if not cache.is_file():
        CACHE.mkdir(parents=True, exist_ok=True)
        readable, partial = b"", cache.with_suffix(f".{os.getpid()}")
        # Processes decode, because threads would wait for Python's lock.
        work = functools.partial(decode_all, size=size, half=half)
        loader = DataLoader(files, 32, num_workers=count_cores(), collate_fn=work) if files else []
        try:
            with open(partial, "wb") as file:
                for pixels, flags in tqdm(loader, "decoding", unit=" images", unit_scale=32):
                    file.write(pixels)
                    readable += flags
                file.write(readable)
            if not any(readable):
                fail(f"--data-dir: no image to read in {folder}; give a folder with {', '.join(SUFFIXES)}")
            cache.is_file() or os.replace(partial, cache)  # another process may have been faster
            for stale in set(CACHE.glob(f"{where}-*")) - {cache}:
                stale.unlink()
        finally:
            partial.unlink(missing_ok=True)
    mapped = torch.from_file(str(cache), size=cache.stat().st_size, dtype=torch.uint8)
    pixels, readable = mapped[: -len(files)], mapped[-len(files) :].tolist()
    if bad := [str(path) for path, good in zip(files, readable) if not good]:
        print(f"{len(bad)} of {len(files)} files cannot be read: {', '.join(bad[:5])}", flush=True)
    images = pixels.view(-1, size, size, 3).permute(0, 3, 1, 2)
    return images, [path for path, good in zip(files, readable) if good]


# %% Styles: pictures of what w does, and measures of it


def arc(z1, z2, t):
    """The points t (N, 1) in [0, 1] of the arcs from z1 to z2 (N, latent_dim), on the sphere of radius 1."""
    z1, z2 = F.normalize(z1), F.normalize(z2)
    angle = (z1 * z2).sum(1, keepdim=True).clamp(-1, 1).acos()
    return (((1 - t) * angle).sin() * z1 + (t * angle).sin() * z2) / angle.sin()


def path_lengths(generator, features, space, pairs, epsilon):
    """How fast features of the images change along paths: |change|^2 / epsilon^2 (pairs,), equations 2 and 3.

    A path is an arc between two z if `space` is "z", a straight line between two w if it is "w"; the place on
    it is random. `features` takes images in [-1, 1] to rows (N, F). Epsilon is a share of the path: in the
    paper 1e-4, too small for fp32. The generator has to be in eval mode, so that the noise is fixed.
    """
    like = generator.w_avg  # claims.py measures in float64
    z1, z2 = torch.randn(2, pairs, generator.latent_dim, dtype=like.dtype, device=like.device)
    t = torch.rand(pairs, 1, dtype=like.dtype, device=like.device)
    w1, w2, found = generator.mapping(z1), generator.mapping(z2), []
    for where in (t, t + epsilon):
        w = torch.lerp(w1, w2, where) if space == "w" else generator.mapping(arc(z1, z2, where))
        parts = generator.spread(w).split(64)
        found.append(torch.cat([features(generator.synthesis(ws)) for ws in parts]))
    return (found[1] - found[0]).square().sum(1) / epsilon**2


def share_of_z(generator, count=32, noises=4):
    """The part of the images' variance that z decides, and not noise: Var_z E[G] over that and E_z Var[G]."""
    z = torch.randn(count, generator.latent_dim, device=generator.w_avg.device)
    ws = generator.spread(generator.mapping(z)).repeat_interleave(noises, 0)
    generator.synthesis.train()  # fresh noise for each image
    images = generator.synthesis(ws).clamp(-1, 1)
    generator.synthesis.eval()
    images = images.unflatten(0, (count, noises))
    by_noise = images.var(1).mean()
    by_z = images.mean(1).var(0).mean() - by_noise / noises  # the means of so few still have some noise
    return (by_z / (by_z + by_noise)).item()


def draw_styles(ema, z, folder, args):
    """Write interpolation.png, mixing.png and truncation.png, from the first of z (64, latent_dim)."""
    sides = [layer.noise.shape[-1] for layer in ema.synthesis.layers]
    with torch.no_grad():
        w, t = ema.mapping(z), torch.linspace(0, 1, 10, device=z.device)[:, None]
        # Rows in pairs, with the same ends: an arc in Z, and a straight line in W.
        rows = []
        for (z1, z2), (w1, w2) in zip(z[:8].split(2), w[:8].split(2)):
            rows.append(ema.mapping(arc(z1.expand(10, -1), z2.expand(10, -1), t)))
            rows.append(torch.lerp(w1, w2, t))
        walk = sample(ema.synthesis, ema.spread(torch.cat(rows)))
        # Six images on the left take some layers' w from the six at the top. In the corner is a placeholder.
        left, top = ema.spread(w[:12]).split(6)
        cells, ranges = [top[:1], top], [(4, 8)] * 2 + [(16, 16)] * 2 + [(32, 256)] * 2
        for styles, (low, high) in zip(left, ranges):  # two rows of coarse, of middle and of fine styles
            taken = torch.tensor([low <= side <= high for side in sides], device=z.device)[:, None]
            cells += [styles[None], torch.where(taken, top, styles)]
        grid = sample(ema.synthesis, torch.cat(cells))
        grid[0] = 0
        psi = torch.tensor([1, 0.7, 0.5, 0.3, 0, -0.5, -1], device=z.device).repeat(6)[:, None]
        truncated = sample(ema, z[:6].repeat_interleave(7, 0), psi)
    pictures = {"interpolation": (walk, 10), "mixing": (grid, 7), "truncation": (truncated, 7)}
    for name, (images, across) in pictures.items():
        to_pil_image(make_grid(images, across)[: args.channels]).save(folder / f"{name}.png")


# %% Training

SCRIPT = Path(__file__).stem
LOG_EVERY = 20  # steps between rows of history.csv
SAVE_EVERY = 60  # seconds between checkpoints inside an epoch
PATHS = 256  # in Z and in W, to measure their lengths
# What is measured after an epoch; of these, the last two groups only with --fid-every.
TRACKED = {"share of z": ("z_share",), "path length": ("path_z", "path_w")}
TRACKED |= {"of samples": ("distance",), "share": ("precision", "recall")}
DISTANCES = [name for names in TRACKED.values() for name in names]


def fill_in(args):
    """Choose the settings that were not given, and refuse those that do not go together."""
    if args.image_size is None:
        args.image_size = 64 if args.dataset in ("faces", "celeba", "folder") else 32
    if args.image_size not in (32, 64, 128, 256):
        fail(f"--image-size: {args.image_size} is not 32, 64, 128 or 256; give one of these")
    args.epochs = args.epochs or (30 if args.dataset == "faces" else 5)
    args.width = args.width or (16 if args.dataset == "faces" else 32)
    if args.mixing > 1:
        fail(f"--mixing: {args.mixing} is a share of the images; give a number from 0 to 1")
    if args.truncation is not None:
        fail("--truncation: it is for pictures of a trained generator; give it with --generate")


def read_images(name, data_dir, size):
    """The training images, uint8 (N, C, size, size); those of a folder are mapped from a file."""
    kinds = {"mnist": datasets.MNIST, "fashion_mnist": datasets.FashionMNIST, "cifar10": datasets.CIFAR10}
    if name in ("celeba", "folder"):
        folder = Path(data_dir, *(["celeba", "img_align_celeba"] if name == "celeba" else []))
        return map_images(folder, list_images(folder), size)[0]
    if name == "faces":
        images = read_sheets(Path(data_dir, "faces"), "train_??.webp")
    else:
        try:
            images = torch.as_tensor(kinds[name](data_dir, download=True).data)
        except Exception as error:  # its type depends on where torchvision stumbles
            folder = Path(data_dir, getattr(kinds[name], "base_folder", f"{kinds[name].__name__}/raw"))
            fail(f"--data-dir: put the files of {name} in {folder} ({error!r:.90})")
        images = images.movedim(3, 1) if images.ndim == 4 else F.pad(images[:, None], [2] * 4)
    if images.shape[-1] == size:
        return images
    return torch.cat([resize(part, [size, size], antialias=True) for part in images.split(1000)])


def build(args):
    """A generator, its mapping always in fp32; args.channels are those of its images."""
    rest = args.channels, args.mapping_layers, not args.no_noise
    generator = Generator(args.image_size, args.width, args.latent_dim, *rest).to(args.device)
    place(generator.synthesis, args)
    return generator


def add_row(distances, row, steps_per_epoch):
    """The measurements and a new row, without rows of cut-off epochs or an older one of its step."""
    whole = (distances[:, 0] < row[0, 0]) & (distances[:, 0] % steps_per_epoch == 0)
    return torch.cat([distances[whole], row])


def track(judge, ema, args, step):
    """Measure the averaged generator; a row of the step and DISTANCES, nan for what is not measured.

    Noise is fixed for all but z_share, so that only w differs.
    """
    found = dict.fromkeys(DISTANCES, math.nan)
    reseed(args.seed, "distance")
    ema.eval()
    with torch.no_grad(), fp32():
        for space in ("z", "w"):
            lengths = path_lengths(ema, lambda images: images.flatten(1), space, PATHS, 1e-2)
            found[f"path_{space}"] = lengths.mean().item()
        found["z_share"] = share_of_z(ema)
    if judge:
        z = torch.randn(args.fid_samples, args.latent_dim).to(args.device)
        found |= zip(("distance", "precision", "recall"), judge(sample(ema, z)))
    shown = [f"{name} {value:.3f}" for name, value in found.items() if not math.isnan(value)]
    print("  " + "  ".join(shown), flush=True)
    return torch.tensor([[step, *found.values()]])


def train(args):
    """Train from the start, or go on from the checkpoint args.resume."""
    fill_in(args)
    images, size = read_images(args.dataset, args.data_dir, args.image_size), args.batch_size
    if not 2 <= size <= len(images) or size % 2 and size % 3:
        fail(f"--batch-size: {size} is not from 2 to {len(images)}, or makes no groups of 4, 3 or 2 for D")
    if args.dataset not in ("celeba", "folder"):  # pictures of folders stay in their mapped file
        images = images.to(args.device)
    args.channels, steps_per_epoch = images.shape[1], len(images) // size  # the last, short batch is dropped
    last_step = min(args.epochs * steps_per_epoch, args.max_steps or sys.maxsize)

    torch.manual_seed(args.seed)
    generator = build(args)
    discriminator = Discriminator(args.image_size, args.width, args.channels)
    place(discriminator, args)
    ema = copy.deepcopy(generator).requires_grad_(False)
    adam = {"betas": (0.0, 0.99), "eps": 1e-8, "fused": True}
    optimizer_g = torch.optim.Adam(generator.parameters(), args.lr_g, **adam)
    optimizer_d = torch.optim.Adam(discriminator.parameters(), args.lr_d, **adam)
    parts = {"generator": generator, "discriminator": discriminator, "ema": ema}
    parts |= {"optimizer_g": optimizer_g, "optimizer_d": optimizer_d}  # the order of train_step's arguments

    reseed(args.seed, "samples")
    fixed_z = torch.randn(64, args.latent_dim).to(args.device)
    checkpoint = load_checkpoint(args.resume, **parts) if args.resume else {}
    history = checkpoint.get("history", torch.empty(0, len(METRICS))).to(args.device)  # a row for each step
    distances = checkpoint.get("distances", torch.empty(0, 1 + len(DISTANCES)))  # a row for each measurement
    judge = open_judge(args, images)
    folder = open_folder(args, f"runs/{SCRIPT}")
    (folder / "samples").mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(vars(args) | {"torch": torch.__version__}, indent=2))
    step, saved_at = len(history), save(folder, args, history, distances, parts)
    print(f"{len(images):,} images, {steps_per_epoch} steps an epoch, on {args.device}, into {folder}")
    while True:
        epoch, done = divmod(step, steps_per_epoch)
        if step and (done == 0 or step >= last_step):  # an epoch is complete, or was before --resume
            number = math.ceil(step / steps_per_epoch)
            grid = make_grid(sample(ema, fixed_z), 8)[: args.channels]
            to_pil_image(grid).save(folder / "samples" / f"epoch_{number:04d}.png")
            draw_styles(ema, fixed_z, folder, args)
            due = judge and done == 0 and epoch % args.fid_every == 0
            distances = add_row(distances, track(judge if due else None, ema, args, step), steps_per_epoch)
            saved_at = save(folder, args, history, distances, parts)
            if number % max(1, number // 20) == 0 or step >= last_step:  # slow: ever more rarely
                write_report(folder, history, distances, steps_per_epoch)
        if step >= last_step:
            break

        reseed(args.seed, "order", epoch)
        batches = torch.randperm(len(images)).to(images.device).split(size)
        batches = batches[done : min(steps_per_epoch, done + last_step - step)]  # those still to do
        history = torch.cat([history, history.new_zeros(len(batches), len(METRICS))])
        name = f"epoch {epoch + 1}/{args.epochs}"
        bar = tqdm(batches, name, steps_per_epoch, leave=False, initial=done, unit=" images", unit_scale=size)
        for index in bar:
            real = images[index].to(args.device, non_blocking=True).float().div_(127.5).sub_(1)
            reseed(args.seed, "step", step)
            r1_weight = 0.0 if step % args.r1_every else args.r1_weight * args.r1_every
            decay = 0.5 ** (size / args.ema_images)
            metrics = train_step(*parts.values(), real, args.mixing, r1_weight, decay)
            history[step] = torch.stack([*metrics.values()])
            step += 1
            if step % LOG_EVERY == 0:
                bar.set_postfix_str(summary(history[step - LOG_EVERY : step]))
            if time.monotonic() > saved_at + SAVE_EVERY:
                saved_at = save(folder, args, history[:step], distances, parts)
        saved_at = save(folder, args, history, distances, parts)
        means = summary(history[epoch * steps_per_epoch :])
        print(f"{name}  {means}  {bar.format_dict['elapsed']:.0f} s", flush=True)
    print(f"{step} steps done, see {folder}")


# %% Plumbing: the same lines in every script


def fail(message, status=2):
    """End the program with one line on stderr, clear of the progress bar."""
    tqdm.write(f"{SCRIPT}.py: {message}", file=sys.stderr)
    raise SystemExit(status)


def reseed(*key):
    """Make all random numbers from here on follow from `key`, so that a checkpoint needs no random state."""
    seed = random.Random(repr(key)).getrandbits(63)  # of which a CPU's generator uses 32
    # Without an accelerator, the CPU's generator is enough, and quicker to seed.
    (torch if torch.accelerator.is_available() else torch.default_generator).manual_seed(seed)


class fp32:
    """`with fp32():` networks compute in fp32, whatever --precision says: for what must not be rounded."""

    active = False

    def __enter__(self):
        fp32.active = True

    def __exit__(self, *error):
        fp32.active = False


def place(network, args, layout=torch.channels_last):
    """Move a network to its device and layout; its forward pass runs in --precision and returns fp32."""

    def forward(self, *inputs):
        with torch.autocast(torch.device(args.device).type, torch.bfloat16, enabled=not fp32.active):
            return type(self).forward(self, *inputs).float()

    if args.precision == "bf16":
        network.forward = forward.__get__(network)  # a bound method, so that a copy runs its own layers
    return network.to(args.device, memory_format=layout)


@torch.no_grad()
def sample(generator, *inputs):
    """uint8 images (N, C, H, W) on the CPU; in eval mode, so that each depends on its own inputs alone."""
    generator.eval()
    with fp32():
        images = torch.cat([generator(*rows) for rows in zip(*(tensor.split(256) for tensor in inputs))])
    generator.train()
    return images.add(1).mul(127.5).round().to("cpu", torch.uint8)


def open_folder(args, parent):
    """The folder of a resumed run, or a new one: --out-dir or the next free of parent/001, parent/002, ..."""
    numbered = (Path(parent, f"{number:03d}") for number in range(1, sys.maxsize))
    folder = Path(args.out_dir or next(path for path in numbered if not path.exists()))
    try:
        folder.mkdir(parents=True, exist_ok=bool(args.resume))
    except OSError as error:
        fail(f"--out-dir: {folder}: {error.strerror}; name a new folder, or --resume the run in this one")
    args.out_dir = str(folder)
    return folder


def open_judge(args, images):
    """What measures samples for --fid-every: the Judge of fid.py, which is not needed otherwise; or None."""
    if not args.fid_every:
        return None
    if args.fid_samples < 4:
        fail(f"--fid-samples: {args.fid_samples} is too few; give 4 or more")
    try:
        import fid
    except ImportError as error:
        fail(f"--fid-every: put fid.py of this script's repository beside it, which measures ({error})")
    return fid.Judge(args.dataset, images, args.device, args.data_dir)


def load_checkpoint(path, **parts):
    """Read a checkpoint of this script as a dict, and give `parts` (networks, optimisers) their states."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        if checkpoint["script"] != SCRIPT:
            raise ValueError(f"it is one of {checkpoint['script']}.py")
        if absent := parts.keys() - checkpoint.keys():
            raise ValueError(f"it lacks {', '.join(sorted(absent))}, and is for --generate alone")
        for name, part in parts.items():
            part.load_state_dict(checkpoint[name])
    except Exception as error:  # its type depends on where the damage is
        fail(f"{path}: give a whole checkpoint.pt of {SCRIPT}.py ({' '.join(str(error).split()):.300})")
    return checkpoint


def save(folder, args, history, distances, parts):
    """Write the checkpoint beside the old one and move it into place. Returns the time on the clock."""
    states = {name: part.state_dict() for name, part in parts.items()}
    networks = [states[name] for name, part in parts.items() if isinstance(part, nn.Module)]
    finite = history.isfinite().all(1).tolist()
    finite += [tensor.isfinite().all().item() for state in networks for tensor in state.values()]
    if not all(finite):
        step = min(finite.index(False) + 1, len(history))
        fail(f"step {step}: a number is not finite; lower --lr-g or --lr-d (the checkpoint is good)", 1)
    states |= {"script": SCRIPT, "settings": vars(args), "step": len(history)}
    states |= {"history": history.clone(), "distances": distances}
    torch.save(states, folder / "checkpoint.tmp")
    os.replace(folder / "checkpoint.tmp", folder / "checkpoint.pt")  # so there is never half of one
    return time.monotonic()


def summary(rows):
    """The mean of each metric over some steps (steps, len(METRICS)), as text."""
    return "  ".join(f"{name} {mean:.3f}" for name, mean in zip(METRICS, rows.mean(0).tolist()))


def write_report(folder, history, distances, steps_per_epoch):
    """history.csv and losses.png, from means over LOG_EVERY steps; progress.gif, at most 100 frames."""
    steps = {*range(LOG_EVERY, len(history), LOG_EVERY), len(history), *distances[:, 0].int().tolist()}
    steps, history = sorted(steps), history.cpu()  # a row ends where distances were measured, too
    rows = [history[start:end].mean(0).tolist() for start, end in zip([0, *steps], steps)]
    measured = np.full((len(steps), len(DISTANCES)), np.nan)
    measured[np.isin(steps, distances[:, 0])] = distances[:, 1:]
    found = np.isfinite(measured).any(0)  # none, if nothing was measured
    table = np.column_stack([(np.array(steps) - 1) // steps_per_epoch + 1, steps, rows, measured[:, found]])
    names = METRICS + [name for name, there in zip(DISTANCES, found) if there]
    panels = {title: [name for name in shown if name in names] for title, shown in (PANELS | TRACKED).items()}
    panels = {title: shown for title, shown in panels.items() if shown}
    head, form = ",".join(["epoch", "step", *names]), ["%d", "%d", *["%.6g"] * len(names)]
    np.savetxt(folder / "history.csv", table, form, ",", header=head, comments="")
    figure = Figure(figsize=(8, 2.4 * len(panels)), layout="constrained")
    for axis, (title, shown) in zip(figure.subplots(len(panels), squeeze=False).flat, panels.items()):
        for name in shown:
            values, style = table[:, 2 + names.index(name)], ".-" if name in DISTANCES else "-"
            there = np.isfinite(values)
            axis.plot(table[there, 1], values[there], style, label=name, linewidth=1)
        axis.set(xlabel="step", ylabel=title)
        axis.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(folder / "losses.png")
    paths = sorted((folder / "samples").glob("epoch_*.png"), key=lambda path: int(path.stem[6:]))
    chosen = np.linspace(0, len(paths) - 1, min(len(paths), 100)).round().astype(int)
    frames = (Image.open(paths[number]) for number in chosen)  # one after the other, not all at once
    pause = [200] * (len(chosen) - 1) + [2000]  # milliseconds
    next(frames).save(folder / "progress.gif", save_all=True, append_images=frames, duration=pause, loop=0)


def parse_args(argv):
    """The settings of a run, checked; with --resume or --generate, those of the checkpoint."""
    parser = argparse.ArgumentParser(f"{SCRIPT}.py", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.description, parser.error = __doc__.split("\n")[0], fail
    add_flags(parser.add_argument)
    args = parser.parse_args(argv)
    path = args.checkpoint if args.resume is None else args.resume
    uses = [name for name in ("generate", "translate") if vars(args).get(name) is not None]
    if len(uses) != (args.checkpoint is not None) or (args.checkpoint and args.resume):
        use = uses[0] if uses else "generate"
        fail(f"--{use} goes with --checkpoint PATH, alone, and not with --resume; give these two")
    if path is not None:
        settings = load_checkpoint(path)["settings"]
        free = {"epochs", "max_steps", "device", "fid_every", "fid_samples"}
        asked = {"resume": path, "out_dir": str(Path(path).parent)}
        if uses:
            free = {"seed", "data_dir", "folder_a", "folder_b"}
            asked = {key: vars(args)[key] for key in "resume generate checkpoint device out_dir".split()}
        parser.set_defaults(**settings | asked)
        args = parser.parse_args(argv)  # flags that are not given now come from the checkpoint
        for name, value in (settings | asked).items():
            if value is not None and name not in free and vars(args)[name] != value:
                fail(f"--{name.replace('_', '-')}: {path} was made with {value}; leave this flag out")
    for name, value in vars(args).items():
        zero = name in MAY_BE_ZERO
        fine = name == "seed" or name != "generate" and value == parser.get_default(name)
        if type(value) in (int, float) and not (fine or zero and value == 0 or 0 < value < math.inf):
            fail(f"--{name.replace('_', '-')}: {value}; give a finite number above 0{', or 0' * zero}")
    if args.device == "auto":
        found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
        args.device = str(found)  # cuda or mps, for example
    if args.device.startswith("cuda") and "LOCAL_RANK" in os.environ:
        args.device = f"cuda:{os.environ['LOCAL_RANK']}"  # the one that torchrun has given this process
    try:
        torch.zeros(1, device=args.device).item()
    except (RuntimeError, AssertionError, NotImplementedError, ImportError):
        fail(f"--device: {args.device!r} is unknown or not on this machine; give cpu, or leave it out")
    return args


# %% Main


def generate(args):
    """Write args.generate images, made by the averaged generator in args.checkpoint, as PNG files."""
    generator = build(args)
    load_checkpoint(args.checkpoint, ema=generator)
    folder = open_folder(args, Path(args.checkpoint).parent / "generated")
    reseed(args.seed, "generate")
    psi = torch.full((256, 1), 1.0 if args.truncation is None else args.truncation, device=args.device)
    for start in tqdm(range(0, args.generate, 256), unit=" images", unit_scale=256):
        z = torch.randn(256, args.latent_dim).to(args.device)  # 256, so that no image depends on N
        for number, image in enumerate(sample(generator, z, psi)[: args.generate - start], start):
            to_pil_image(image).save(folder / f"{number:05d}.png")
    print(f"{args.generate} images in {folder}")


def main(argv=None):
    args = parse_args(argv)
    torch.backends.cudnn.deterministic = True  # --resume is to be exact
    torch.backends.cudnn.allow_tf32 = False  # TF32 would round fp32 in convolutions
    old_handler = signal.signal(signal.SIGTERM, signal.default_int_handler)  # KeyboardInterrupt, as by Ctrl-C
    try:
        (generate if args.generate else train)(args)
    except KeyboardInterrupt:
        saved = args.out_dir and Path(args.out_dir, "checkpoint.pt").is_file()
        fail(f"stopped; go on with --resume {args.out_dir}/checkpoint.pt" if saved else "stopped", 130)
    finally:
        signal.signal(signal.SIGTERM, old_handler)


if __name__ == "__main__":
    main()
