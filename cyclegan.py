"""CycleGAN: translate between two sets of pictures, without pairs; 32x32 digits, cartoon faces, any folders.

    python cyclegan.py                              # outlines to digits and back, into runs/cyclegan/001
    python cyclegan.py --dataset faces --batch-size 4 --epochs 6    # line drawings to cartoon faces and back
    python cyclegan.py --translate FOLDER --checkpoint runs/cyclegan/001/checkpoint.pt

pix2pix.py learns from pairs of a question and its answer. Often there are none: you can photograph horses and
zebras, but not the same horse as a zebra. All you have is two sets of pictures, the domains A and B.

A discriminator D_B can tell whether a translation looks like a picture of B. That alone does not tie the
output to the input: a network that answered every 7 with a fine 3 would pass. So CycleGAN trains two
generators at once, G_AB and G_BA, and asks that a picture survive the journey there and back:

    L_G = E[(D_B(G_AB(a)) - 1)^2] + E[(D_A(G_BA(b)) - 1)^2]
        + 10 (E|G_BA(G_AB(a)) - a| + E|G_AB(G_BA(b)) - b|)
    L_D = 1/2 E[(D_B(b) - 1)^2] + 1/2 E[D_B(G_AB(a))^2] + the same for D_A

But even these losses do not say that a 7 must stay a 7. If G_AB turned all 7s into 3s and all 3s into 7s,
G_BA could turn them back. We rely on the networks: it seems easiest for convolutions to keep every stroke
where it is. And a small cycle loss may be a cheat: in faint noise one generator can hide what the other will
need (with mosaics G_BA does: RESULTS.md, hidden). What is the cycle good for? With --cycle-weight 0 --epochs
1 nearly all outlines became one picture.

New against pix2pix.py: no pairs; squares pull D's answers to 1 for real and 0 for fake (least squares; the
paper found it more stable); instance normalisation, which gives each map of each picture a mean of 0 and a
deviation of 1; in G residual blocks, which add to what they are given, instead of skips; G's step before
D's, as in the authors' code; half of the fakes that D sees are from earlier steps (--pool).

What to watch: samples/, rows of a, G_AB(a), the truth, and back again; below the white line the same from b.
Here A is drawn from B, so the truth is known; but in training A and B come from different digits. If both G
were perfect, d_a, d_b, g_ab and g_ba would be 0.25; if D wins, d_a and d_b go to 0, g_ab and g_ba to 1.
a2b_error and b2a_error are differences from the truth, a2b2a_error and b2a2b_error those after the round
trip, of 1,000 test pictures, from 0 to 1. Black and white, or colours, may come out swapped, since the other
G can swap them back. The paper's remedy, not tried here: --identity-weight 5 asks G_AB to leave pictures of B
as they are (if those of A have as many channels).

Papers: Zhu et al. 2017, arXiv 1703.10593; Mao et al. 2016, 1611.04076 (least squares); Shrivastava et al.
2016, 1612.07828 (pool); Chu et al. 2017, 1712.02950 (hiding). Departures: small pictures, no random cropping
or mirroring, half G's width, four residual blocks for up to 64 pixels, patches of 16 or 34 (the paper: 70),
batches of 16 (the paper: 1), and a pool of 50 steps (the paper: of 50 images).
"""

import argparse
import csv
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
import zlib
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
    add("--cycle-weight", type=float, default=10.0, help="weight of the cycle loss; 0: none")
    add("--identity-weight", type=float, default=0.0, help="weight of the identity loss (colours); 0: none")
    add(
        "--pool",
        type=int,
        default=50,
        help="size of the pool of earlier fakes for D, in batches; 0: none",
    )
    add("--norm", choices=["instance", "batch"], default="instance", help="normalisation in all networks")
    add("--blocks", type=int, help="residual blocks; None: 4 for up to 64 pixels, 6 for 128, 9 for 256")
    add("--width", type=int, default=32, help="channels of the generators' first layer (the paper: 64)")
    patch = "strided layers of D, n: patches of 9 * 2^n - 2 pixels a side (0: one); None: by --image-size"
    add("--patch-layers", type=int, help=patch)
    tasks = "how A is drawn from B; None: lines with --dataset faces, else outline (folders have their own A)"
    add("--task", choices=["outline", "mosaic", "half", "grey", "lines", "glasses"], help=tasks)
    add("--image-size", type=int, help="pixels, a power of 2 from 32 to 256; None: 32 for digits, else 64")
    add("--epochs", type=int, default=4, help="passes over the larger of the two domains")
    add("--decay", type=float, default=0.5, help="share of --epochs at full rates; then they fall to 0")
    add("--max-steps", type=int, help="stop after this many steps, if that comes sooner")
    add("--lr-g", type=float, default=2e-4, help="Adam's learning rate for the generators")
    add("--lr-d", type=float, default=2e-4, help="Adam's learning rate for the discriminators")
    add("--batch-size", type=int, default=16, help="images of A and of B per step (the paper: 1)")
    names = ["mnist", "fashion_mnist", "faces", "folder", "folders"]
    help_ = "folder: pictures of which --task draws A; folders: A and B, in one of the usual layouts"
    add("--dataset", choices=names, default="mnist", help=help_)
    add(
        "--data-dir",
        default="data",
        help="where it is; of folders: with trainA and trainB in it, for example",
    )
    add("--folder-a", help="with --dataset folders: the folder of A, wherever it is")
    add("--folder-b", help="with --dataset folders: the folder of B")
    add("--fid-every", type=int, metavar="K", help="every K epochs: distance, precision, recall, by fid.py")
    add(
        "--fid-samples", type=int, default=10000, metavar="N", help="how many translated test images it takes"
    )
    add("--device", default="auto", help="auto takes cuda, then mps, then cpu; or any torch device string")
    bf16 = "bf16 is faster only where the processor computes in it: benchmark.py tells"
    add("--precision", choices=["fp32", "bf16"], default="fp32", help=bf16)
    add("--seed", type=int, default=42, help="all randomness follows from it")
    add("--out-dir", help="a new folder for the run; None: the next free number in runs/<script>")
    add("--resume", metavar="PATH", help="go on from this checkpoint.pt, with its settings and in its folder")
    add("--generate", type=int, metavar="N", help="no training: translate N test images, with --checkpoint")
    add("--translate", metavar="FOLDER", help="no training: translate your own questions, with --checkpoint")
    add("--direction", choices=["a2b", "b2a"], help="what --generate and --translate translate; None: a2b")
    add("--checkpoint", metavar="PATH", help="the checkpoint.pt that --generate and --translate use")


MAY_BE_ZERO = ["cycle_weight", "identity_weight", "pool", "patch_layers", "blocks"]  # of the numbers


# %% Networks

NORMS = {"batch": nn.BatchNorm2d, "instance": nn.InstanceNorm2d}


class Reflect(nn.Module):
    """Images (N, C, H, W) with mirrored borders: nn.ReflectionPad2d, but reproducible on CUDA."""

    def __init__(self, pixels):
        super().__init__()
        self.pixels = pixels

    def forward(self, x):
        p = self.pixels
        x = torch.cat([x[..., 1 : p + 1].flip(-1), x, x[..., -p - 1 : -1].flip(-1)], -1)
        return torch.cat([x[..., 1 : p + 1, :].flip(-2), x, x[..., -p - 1 : -1, :].flip(-2)], -2)


class Residual(nn.Module):
    """x (N, width, H, W) plus two convolutions of it; no ReLU after the sum, so it can also subtract."""

    def __init__(self, width, norm):
        super().__init__()
        self.layers = nn.Sequential(
            Reflect(1),
            nn.Conv2d(width, width, 3, bias=False),
            NORMS[norm](width),
            nn.ReLU(),
            Reflect(1),
            nn.Conv2d(width, width, 3, bias=False),
            NORMS[norm](width),
        )

    def forward(self, x):
        return x + self.layers(x)


class Generator(nn.Module):
    """Images (N, in_channels, S, S) to images (N, out_channels, S, S) in [-1, 1], for any S that 4 divides.

    The comments give the shapes for S = 32 and width 32.
    """

    def __init__(self, in_channels=1, out_channels=1, width=32, blocks=4, norm="instance"):
        super().__init__()
        up = {"stride": 2, "padding": 1, "output_padding": 1, "bias": False}
        self.layers = nn.Sequential(
            Reflect(3),
            nn.Conv2d(in_channels, width, 7, bias=False),  # (N, 32, 32, 32)
            NORMS[norm](width),
            nn.ReLU(),
            nn.Conv2d(width, 2 * width, 3, stride=2, padding=1, bias=False),  # (N, 64, 16, 16)
            NORMS[norm](2 * width),
            nn.ReLU(),
            nn.Conv2d(2 * width, 4 * width, 3, stride=2, padding=1, bias=False),  # (N, 128, 8, 8)
            NORMS[norm](4 * width),
            nn.ReLU(),
            *(Residual(4 * width, norm) for _ in range(blocks)),  # (N, 128, 8, 8)
            nn.ConvTranspose2d(4 * width, 2 * width, 3, **up),  # (N, 64, 16, 16)
            NORMS[norm](2 * width),
            nn.ReLU(),
            nn.ConvTranspose2d(2 * width, width, 3, **up),  # (N, 32, 32, 32)
            NORMS[norm](width),
            nn.ReLU(),
            Reflect(3),
            nn.Conv2d(width, out_channels, 7),  # (N, out_channels, 32, 32)
            nn.Tanh(),
        )

    def forward(self, images):
        return self.layers(images)


class Discriminator(nn.Module):
    """A PatchGAN: images (N, C, H, W), of `channels` in all, to a number for each patch (N, 1, h, w).

    A patch has 9 * 2^layers - 2 pixels a side, or a single one if `layers` is 0. The comments give the shapes
    for images of 32 pixels and one layer.
    """

    def __init__(self, channels=2, width=64, layers=1, norm="batch"):
        super().__init__()
        stride, form = (2, {"kernel_size": 4, "padding": 1}) if layers else (1, {"kernel_size": 1})
        parts = [nn.Conv2d(channels, width, stride=stride, **form), nn.LeakyReLU(0.2)]  # (N, 64, 16, 16)
        taken = width
        for level in range(max(1, layers)):  # the last of these does not halve
            leaving, stride = min(2 * taken, 8 * width), 2 if level < layers - 1 else 1
            parts += [nn.Conv2d(taken, leaving, stride=stride, bias=False, **form)]  # (N, 128, 15, 15)
            parts += [NORMS[norm](leaving), nn.LeakyReLU(0.2)]
            taken = leaving
        self.layers = nn.Sequential(*parts, nn.Conv2d(taken, 1, **form))  # (N, 1, 14, 14)

    def forward(self, *images):
        return self.layers(torch.cat(images, 1))


def init_weights(module):
    """Weights of convolutions from N(0, 0.02), those of batch normalisation from N(1, 0.02), biases 0."""
    if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
        nn.init.normal_(module.weight, 0.0, 0.02)
    elif isinstance(module, nn.BatchNorm2d):
        nn.init.normal_(module.weight, 1.0, 0.02)
    if getattr(module, "bias", None) is not None:
        nn.init.zeros_(module.bias)


# %% Losses


def discriminator_loss(real_scores, fake_scores):
    """1/2 E[(D(b) - 1)^2] + 1/2 E[D(G(a))^2]: least squares over images and patches."""
    return ((real_scores - 1).square().mean() + fake_scores.square().mean()) / 2


def generator_loss(fake_scores):
    """E[(D(G(a)) - 1)^2]."""
    return (fake_scores - 1).square().mean()


def l1_loss(x, y):
    """E|x - y|, a mean over all pixels."""
    return (x - y).abs().mean()


# %% Training step

# What a step reports, grouped by the panels of losses.png.
PANELS = {"adversarial": ("g_ab", "g_ba"), "discriminators": ("d_a", "d_b")}
PANELS |= {"cycle": ("cycle_a", "cycle_b"), "identity": ("identity",)}
METRICS = [name for names in PANELS.values() for name in names]


class ImagePool(nn.Module):
    """Earlier fakes (size, C, S, S), so that a discriminator does not see only those of this step.

    A module, so that its images are in the checkpoint; without them, --resume would not be exact.
    """

    def __init__(self, size, channels, side):
        super().__init__()
        self.count = 0  # a Python int, so that no step waits for the device
        self.register_buffer("images", torch.zeros(size, channels, side, side))

    def get_extra_state(self):
        return torch.tensor(self.count)

    def set_extra_state(self, state):
        self.count = int(state)

    def query(self, fakes):
        """Give back `fakes` (N, C, S, S), but swap each with probability 1/2 for one in the pool.

        As long as the pool has room, fakes are copied to it and given back.
        """
        free = min(len(fakes), len(self.images) - self.count)
        self.images[self.count : self.count + free] = fakes[:free]
        self.count += free
        late = fakes[free:]
        if not len(self.images) or not len(late):
            return fakes
        slots = torch.randperm(len(self.images), device=fakes.device)[: len(late)]
        swap = torch.rand(len(late), 1, 1, 1, device=fakes.device) < 0.5
        earlier = self.images[slots]  # of each two, one goes to D now, and the other stays for later
        self.images[slots] = torch.where(swap, late, earlier)
        return torch.cat([fakes[:free], torch.where(swap, earlier, late)])


def train_step(
    generator, discriminator, pool_a, pool_b, optimizer_g, optimizer_d, a, b, cycle_weight, identity_weight
):
    """Update both generators, then both discriminators, on images a and b (N, C, S, S) in [-1, 1].

    `generator` holds "ab" and "ba", `discriminator` "a" and "b". Returns the METRICS, detached; those of the
    cycle and identity losses are on the scale from 0 (black) to 1 (white).
    """
    ab, ba = generator["ab"], generator["ba"]

    # The generators learn to fool the discriminators, frozen here, and to undo each other.
    discriminator.requires_grad_(False)
    fake_b, fake_a = ab(a), ba(b)
    g_ab, g_ba = generator_loss(discriminator["b"](fake_b)), generator_loss(discriminator["a"](fake_a))
    cycle_a, cycle_b = l1_loss(ba(fake_b), a), l1_loss(ab(fake_a), b)
    identity = torch.zeros_like(cycle_a)
    if identity_weight > 0:  # what is in B already should stay as it is
        identity = l1_loss(ab(b), b) + l1_loss(ba(a), a)
    g_loss = g_ab + g_ba + cycle_weight * (cycle_a + cycle_b) + identity_weight * identity
    optimizer_g.zero_grad()
    g_loss.backward()
    optimizer_g.step()
    discriminator.requires_grad_(True)

    # The discriminators learn to tell real from fake, of this step or earlier; detached: no gradient to G.
    d_a = discriminator_loss(discriminator["a"](a), discriminator["a"](pool_a.query(fake_a.detach())))
    d_b = discriminator_loss(discriminator["b"](b), discriminator["b"](pool_b.query(fake_b.detach())))
    optimizer_d.zero_grad()
    (d_a + d_b).backward()
    optimizer_d.step()

    found = {"g_ab": g_ab, "g_ba": g_ba, "d_a": d_a, "d_b": d_b}
    found |= {"cycle_a": cycle_a / 2, "cycle_b": cycle_b / 2, "identity": identity / 2}
    return {name: value.detach() for name, value in found.items()}


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


# %% Pairs: the pictures A and B, how far an answer is from the truth, and one's own pictures

# Where A and B may be: trainA, trainB; A/train, ...; train/A, ...; A, B; side by side in the files of train.
LAYOUTS = "{part}{side}", "{side}/{part}", "{part}/{side}", "{side}", "{part}"


def draw(task, images):
    """The question A that `task` makes of pictures B: uint8 (N, C, S, S) to uint8 (N, C or 1, S, S).

    mosaic: 8 rows of 8 blocks, each the mean of its pixels. outline: a ring of one pixel around what is
    bright. half: the lower half is black. grey: the mean of the channels. outline and grey have one channel.
    """
    drawn = []
    for part in images.split(1000):
        part = part.float()
        if task == "mosaic":
            part = F.interpolate(F.adaptive_avg_pool2d(part, 8), part.shape[2:])
        elif task == "half":
            part[:, :, part.shape[2] // 2 :] = 0
        else:
            part = part.mean(1, keepdim=True)
        if task == "outline":
            part = F.max_pool2d(part, 3, stride=1, padding=1) - part
        drawn.append(part.round().to(torch.uint8))
    return torch.cat(drawn)


def fit(images, size):
    """uint8 images (N, C, H, W) at `size` pixels; 28x28 is padded to 32x32, all else is resized."""
    if images.shape[-1] == 28 and size == 32:
        return F.pad(images, (2, 2, 2, 2))
    if images.shape[-1] == size:
        return images
    return torch.cat([resize(part, [size, size], antialias=True) for part in images.split(1000)])


def difference(x, y):
    """The mean absolute difference of two sets of uint8 images, from 0 to 1 (black to white)."""
    return (x.float() - y.float()).abs().mean().item() / 255


def sharpness(images, truth):
    """How much neighbouring pixels differ, on average, over how much they do in the truth (both uint8)."""
    x, y = (sum(part.float().diff(dim=dim).abs().mean() for dim in (2, 3)) for part in (images, truth))
    return (x / y).item()


def choose(names, count):
    """The first `count` rows, taken from each folder in turn: for digits, one of each class."""
    turns, seen = [], {}
    for row, name in enumerate(names):
        folder = os.path.dirname(name)
        seen[folder] = seen.get(folder, 0) + 1
        turns.append((seen[folder], folder, row))
    return [row for *_, row in sorted(turns)[:count]]


def held_out(name):
    """Whether a picture of this name is one in ten that is for testing, where there is no folder for that."""
    return zlib.crc32(name.encode()) % 10 == 0


def list_names(folder, flag="--data-dir"):
    """The files below a folder that are pictures, by name (path without suffix); those held_out come last."""
    found = list_images(folder, flag)
    files = {path.relative_to(folder).with_suffix("").as_posix(): path for path in found}
    if len(files) < len(found):
        print(f"{len(found) - len(files)} files in {folder} have the name of another, and are left out")
    return dict(sorted(files.items(), key=lambda item: (held_out(item[0]), item[0])))


def map_named(folder, files, size, half=None):
    """What map_images makes of the files that list_names has found, and the names of those it could read."""
    images, kept = map_images(folder, [*files.values()], size, half)
    names = {path: name for name, path in files.items()}
    return images, [names[path] for path in kept]


def count_channels(images):
    """1 if the images (N, C, S, S) are all grey, else C."""
    return 1 if all((part == part[:, :1]).all() for part in images.split(100)) else images.shape[1]


def has_odd_width(path):
    """Whether an image file has no two equal halves; those that cannot be read are named later."""
    try:
        with Image.open(path) as image:
            return image.width % 2 == 1
    except Exception:  # its type depends on the format and the damage
        return False


def read_pictures(args, paired):
    """The pictures A and B for training, those for testing, and the names of the latter: three pairs.

    Pictures are uint8 (N, C, S, S). Those for testing are pairs, row for row, if their names are equal; with
    `paired`, those for training are, too. If not, and A is drawn from B, A and B have no picture in common.
    """
    if args.dataset == "folders":
        return read_folders(args, paired)
    size, parts, names = args.image_size, ("train", "test"), []
    if args.dataset == "folder":
        folder = Path(args.data_dir)
        images, names = map_named(folder, list_names(folder), size)
        images, count = images[:, : count_channels(images)], sum(not held_out(name) for name in names)
        b, names = [images[:count], images[count:]], names[count:]
    elif args.dataset == "faces":
        folder = Path(args.data_dir, "faces")
        b = [fit(read_sheets(folder, f"{part}_??.webp"), size) for part in parts]
        names = [f"{row:05d}" for row in range(len(b[1]))]
    else:
        kind = {"mnist": datasets.MNIST, "fashion_mnist": datasets.FashionMNIST}[args.dataset]
        try:
            found = [kind(args.data_dir, train=part == "train", download=True) for part in parts]
        except Exception as error:  # its type depends on where torchvision stumbles
            raw = Path(args.data_dir, kind.__name__, "raw")
            fail(f"--data-dir: put the files of {args.dataset} in {raw} ({error!r:.90})")
        b = [fit(some.data[:, None], size) for some in found]
        names = [f"{label}/{row:05d}" for row, label in enumerate(found[1].targets.tolist())]
    if args.task == "lines":
        a = [fit(read_sheets(folder, f"{part}_??_lines.webp")[:, :1], size) for part in parts]
    elif args.task == "grey" and b[0].shape[1] == 1:
        fail(f"--task: the {args.dataset} in {args.data_dir} has no colour; give mosaic, outline or half")
    else:
        a = [draw(args.task, images) for images in b]
    if not paired:
        a[0], b[0] = a[0][0::2], b[0][1::2]
    return [a[0], b[0]], [a[1], b[1]], (names, names)


def find_folders(args, paired):
    """The folders of A and B to train on; those to test on, or None; which half of each file to take."""
    if bool(args.folder_a) != bool(args.folder_b):
        fail("--folder-a: it goes with --folder-b; give both")
    if args.folder_a:
        for flag in ("folder_a", "folder_b"):
            list_images(Path(vars(args)[flag]), f"--{flag.replace('_', '-')}")
        return [Path(args.folder_a), Path(args.folder_b)], None, (None, None)
    for layout in LAYOUTS if paired else LAYOUTS[:-1]:
        found = []
        for part in ("train", "test", "val"):
            folders = [Path(args.data_dir, layout.format(part=part, side=side)) for side in "AB"]
            if all(folder.is_dir() for folder in folders) and folders not in found:
                found.append(folders)
            elif part == "train":
                break
        if found:
            return found[0], (found[1:] or [None])[0], (None, None) if "{side}" in layout else (0, 1)
    layouts = "trainA and trainB, A/train and B/train, train/A and train/B, or A and B"
    layouts += ", or put A and B side by side in the files of train" if paired else ""
    fail(f"--data-dir: no A and B in {args.data_dir}; name them {layouts}, or give --folder-a and --folder-b")


def read_sides(folders, halves, size, paired):
    """The pictures of two folders, uint8 (N, 3, size, size), and their names; those held_out come last."""
    sides = [list_names(folder) for folder in folders]
    if paired and (alone := sorted(sides[0].keys() ^ sides[1].keys())):
        where = f"{len(alone)} pictures in {folders[0]} and {folders[1]}"
        fail(f"--dataset: {where} lack a partner of their name; add or remove {', '.join(alone[:5])}")
    if halves[1] and (odd := [path for path in sides[0].values() if has_odd_width(path)]):
        fail(f"--dataset: {odd[0]} has an odd width; give pictures with A and B side by side, equally wide")
    a, names_a = map_named(folders[0], sides[0], size, halves[0])
    b, names_b = map_named(folders[1], sides[1], size, halves[1])
    if paired and names_a != names_b:  # one of the two cannot be read
        both = {*names_a} & {*names_b}
        a, b = a[[name in both for name in names_a]], b[[name in both for name in names_b]]
        names_a = names_b = [name for name in names_a if name in both]
    return a, b, names_a, names_b


def read_folders(args, paired):
    """What read_pictures returns, of folders of files with A and B, or with both side by side."""
    folders, test, halves = find_folders(args, paired)
    *train, names_a, names_b = read_sides(folders, halves, args.image_size, paired)
    if test:
        *test, names_a, names_b = read_sides(test, halves, args.image_size, paired)
    else:
        counts = [sum(not held_out(name) for name in names) for names in (names_a, names_b)]
        test = [images[count:] for images, count in zip(train, counts)]
        train = [images[:count] for images, count in zip(train, counts)]
        names_a, names_b = names_a[counts[0] :], names_b[counts[1] :]
    channels = [count_channels(images) for images in train]
    train, test = ([images[:, :c] for images, c in zip(part, channels)] for part in (train, test))
    return train, test, (names_a, names_b)


def check_pictures(args, task):
    """Choose the settings about pictures that were not given, such as the usual `task`; refuse bad ones."""
    size = args.image_size or (32 if "mnist" in args.dataset else 64)
    if size not in (32, 64, 128, 256):
        fail(f"--image-size: {size} is not 32, 64, 128 or 256")
    if args.folder_a and args.dataset != "folders":
        fail("--folder-a: it goes with --dataset folders; give both")
    if args.task and args.dataset == "folders":
        fail("--task: folders have their own A; leave it out, or give --dataset folder, where it is drawn")
    if args.task in ("lines", "glasses") and args.dataset != "faces":
        fail(f"--task: only faces have {args.task}; give --dataset faces or another task")
    if args.patch_layers is None:
        args.patch_layers = min(3, size.bit_length() - 5)  # patches of about half a side, and the paper's 70
    if 3 * 2**args.patch_layers > size:
        most = int(math.log2(size / 3))
        fail(f"--patch-layers: {args.patch_layers} are too many for {size} pixels; give at most {most}")
    if args.decay > 1:
        fail(f"--decay: {args.decay} is not a share of the run; give one above 0 and at most 1")
    usual = {"faces": "lines", "folders": None}.get(args.dataset, task)
    args.image_size, args.task = size, args.task or usual


def scaled(images, args):
    """uint8 images as floats in [-1, 1] on the device of the run."""
    return images.to(args.device, non_blocking=True).float().div_(127.5).sub_(1)


def translate(generator, images, args):
    """uint8 images (N, C, S, S) of what the generator makes of uint8 images, 32 at a time."""
    return torch.cat([sample(generator, scaled(part, args)) for part in images.split(32)])


def add_row(distances, row, steps_per_epoch):
    """`distances` and a new row (a step, and what was found then); rows of its step or cut-off epochs go."""
    whole = (distances[:, 0] < row[0, 0]) & (distances[:, 0] % steps_per_epoch == 0)
    return torch.cat([distances[whole], row])


def translate_tests(args, generator, images, names):
    """Write what `generator` makes of the first args.generate test images, as PNGs with the same names."""
    if args.generate > len(names):
        fail(f"--generate: {args.generate} is more than the {len(names)} test images; give at most as many")
    folder = open_folder(args, Path(args.checkpoint).parent / "generated")
    for start in tqdm(range(0, args.generate, 32), unit=" images", unit_scale=32):
        # 32 at a time whatever --generate says: the last bits depend on how many there are.
        made = translate(generator, images[start : start + 32], args)
        for name, image in zip(names[start : args.generate], made):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            to_pil_image(image).save(folder / f"{name}.png")
    print(f"{args.generate} images in {folder}")


def translate_own(args, generator, channels):
    """Write what `generator` makes of the pictures below args.translate, as PNG files with the same names.

    Pictures are fitted as in training, and made grey if `channels` is 1.
    """
    root, size, count = Path(args.translate), args.image_size, 0
    files, nothing = list_images(root, "--translate"), f"--translate: no image to read in {root}"
    if not files:
        fail(f"{nothing}; give a folder with {', '.join(SUFFIXES)}")
    folder = open_folder(args, Path(args.checkpoint).parent / "translated")
    for path in tqdm(files, unit=" images"):
        if not (pixels := decode(path, size)):
            tqdm.write(f"{path} cannot be read")
            continue
        image = torch.frombuffer(bytearray(pixels), dtype=torch.uint8)
        image = image.view(1, size, size, 3).permute(0, 3, 1, 2)
        image = image if channels == 3 else draw("grey", image)
        target = folder / path.relative_to(root).with_suffix(".png")
        if target.exists():  # of another picture, such as a.jpg beside a.png
            target = target.with_name(f"{path.name}.png")
        target.parent.mkdir(parents=True, exist_ok=True)
        to_pil_image(translate(generator, image, args)[0]).save(target)
        count += 1
    if not count:
        fail(f"{nothing}: all files are damaged; give others")
    print(f"{count} images in {folder}")


# %% Training

SCRIPT = Path(__file__).stem
LOG_EVERY = 20  # steps between rows of history.csv
SAVE_EVERY = 60  # seconds between checkpoints inside an epoch
# What is measured after an epoch; of these, the last two groups only with --fid-every.
TRACKED = {
    "test images": ("a2b_error", "b2a_error", "evidence"),
    "there and back": ("a2b2a_error", "b2a2b_error"),
}
TRACKED |= {"detail": ("sharpness",), "of samples": ("distance",), "share": ("precision", "recall")}
DISTANCES = [name for names in TRACKED.values() for name in names]


def fill_in(args):
    """Choose the settings that were not given, and refuse those that do not go together."""
    check_pictures(args, "outline")
    if args.blocks is None:
        args.blocks = {128: 6, 256: 9}.get(args.image_size, 4)
    if args.direction:
        fail("--direction: training learns both; give it with --generate or --translate")
    if args.fid_every and args.task == "glasses":
        fail("--fid-every: fid.py measures against all faces, and B is those with glasses; leave it out")


def read_domains(args):
    """The pictures of A and of B to train on, those to test on, and the names of the latter."""
    if args.task == "glasses":  # A: faces without, B: faces with them
        folder, domains = Path(args.data_dir, "faces"), []
        for part in ("train", "test"):
            faces = fit(read_sheets(folder, f"{part}_??.webp"), args.image_size)
            with open(folder / f"{part}.csv") as file:
                wears = torch.tensor([row["glasses"] != "none" for row in csv.DictReader(file)])
            domains.append([faces[~wears], faces[wears]])
            names = [
                [f"{row:05d}" for row in where.nonzero().flatten().tolist()] for where in (~wears, wears)
            ]
    else:
        *domains, names = read_pictures(args, paired=False)
    if not all(names):
        fail("--dataset: too few pictures to keep one in ten for testing; give more, or a test folder")
    if args.dataset == "folders" and names[0] == names[1]:
        print("test pictures of the same name are taken for pairs")
    if not args.dataset.startswith("folder"):  # pictures of folders stay in their mapped file
        domains[0] = [images.to(args.device) for images in domains[0]]
    return *domains, names


def build(args):
    """Both generators; args.channels are those of A and of B."""
    made = {}
    for name, channels in (("ab", args.channels), ("ba", args.channels[::-1])):
        network = Generator(*channels, args.width, args.blocks, args.norm)
        made[name] = place(
            network.apply(init_weights), args, torch.contiguous_format
        )  # faster with instance norm
    return nn.ModuleDict(made)


def take(domain, side, step, args):
    """The batch of a step from domain "a" or "b", floats in [-1, 1]; each pass over it has a new order."""
    number, k = divmod(step, len(domain) // args.batch_size)
    reseed(args.seed, "order", side, number)
    rows = torch.randperm(len(domain))[k * args.batch_size : (k + 1) * args.batch_size]
    return scaled(domain[rows.to(domain.device)], args)


def draw_pictures(generator, test, names, args):
    """Rows of a, G_AB(a), the true b if it is known, G_BA(G_AB(a)); below a white line, the same from b."""
    grids, paired, count = [], names[0] == names[1], min(10, *map(len, names))
    for there, back, a, b, some in zip(("ab", "ba"), ("ba", "ab"), test, test[::-1], names):
        rows = choose(some, count)
        made = translate(generator[there], a[rows], args)
        again = translate(generator[back], made, args)
        strip = [a[rows], made, *([b[rows]] if paired else []), again]
        strip = torch.cat([images.expand(-1, max(args.channels), -1, -1) for images in strip])
        grids.append(make_grid(strip, len(rows)))
    rule = torch.full_like(grids[0][:, :2], 255)
    return torch.cat([grids[0], rule, grids[1]], 1)


def track(judge, generator, test, names, args, step):
    """Measure translations of test images; a row of the step and DISTANCES, nan for what is not measured."""
    a, b = (images[:1000] for images in test)
    found = dict.fromkeys(DISTANCES, math.nan)
    fake_b, fake_a = translate(generator["ab"], a, args), translate(generator["ba"], b, args)
    found["sharpness"] = sharpness(fake_b, b)
    found["a2b2a_error"] = difference(translate(generator["ba"], fake_b, args), a)
    found["b2a2b_error"] = difference(translate(generator["ab"], fake_a, args), b)
    if names[0] == names[1]:
        found["a2b_error"], found["b2a_error"] = difference(fake_b, b), difference(fake_a, a)
    if args.task not in (None, "lines", "glasses"):
        found["evidence"] = difference(draw(args.task, fake_b), a)
    if judge:
        many = translate(generator["ab"], test[0][: args.fid_samples], args)
        found |= zip(("distance", "precision", "recall"), judge(many))
    shown = [f"{name} {value:.3f}" for name, value in found.items() if not math.isnan(value)]
    print("  " + "  ".join(shown), flush=True)
    return torch.tensor([[step, *found.values()]])


def train(args):
    """Train from the start, or go on from the checkpoint args.resume."""
    fill_in(args)
    (a, b), test, names = read_domains(args)
    args.channels, size = [a.shape[1], b.shape[1]], args.batch_size
    if size > min(len(a), len(b)):
        fail(f"--batch-size: {size} is not from 1 to {min(len(a), len(b))}, the images of the smaller domain")
    if args.identity_weight and len({*args.channels}) > 1:
        fail("--identity-weight: one of A and B is grey, the other is not; leave it out or change --task")
    steps_per_epoch = max(len(a), len(b)) // size  # the last, short batch is dropped
    last_step = min(args.epochs * steps_per_epoch, args.max_steps or sys.maxsize)

    torch.manual_seed(args.seed)
    generator, discriminator = build(args), nn.ModuleDict()
    for side, channels in zip("ab", args.channels):
        network = Discriminator(channels, layers=args.patch_layers, norm=args.norm).apply(init_weights)
        discriminator[side] = place(network, args, torch.contiguous_format)
    pools = [ImagePool(args.pool * size, c, args.image_size).to(args.device) for c in args.channels]
    optimizer_g = torch.optim.Adam(generator.parameters(), args.lr_g, betas=(0.5, 0.999), fused=True)
    optimizer_d = torch.optim.Adam(discriminator.parameters(), args.lr_d, betas=(0.5, 0.999), fused=True)
    parts = {"generator": generator, "discriminator": discriminator, "pool_a": pools[0], "pool_b": pools[1]}
    parts |= {"optimizer_g": optimizer_g, "optimizer_d": optimizer_d}  # the order of train_step's arguments

    checkpoint = load_checkpoint(args.resume, **parts) if args.resume else {}
    history = checkpoint.get("history", torch.empty(0, len(METRICS))).to(args.device)  # a row for each step
    distances = checkpoint.get("distances", torch.empty(0, 1 + len(DISTANCES)))  # a row for each measurement
    judge = open_judge(args, b)
    folder = open_folder(args, f"runs/{SCRIPT}")
    (folder / "samples").mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(vars(args) | {"torch": torch.__version__}, indent=2))
    step, saved_at = len(history), save(folder, args, history, distances, parts)
    print(f"{len(a) + len(b):,} images, {steps_per_epoch} steps an epoch, on {args.device}, into {folder}")
    while True:
        epoch, done = divmod(step, steps_per_epoch)
        if step and (done == 0 or step >= last_step):  # an epoch is complete, or was before --resume
            number = math.ceil(step / steps_per_epoch)
            grid = draw_pictures(generator, test, names, args)
            to_pil_image(grid[: max(args.channels)]).save(folder / "samples" / f"epoch_{number:04d}.png")
            due = judge and done == 0 and epoch % args.fid_every == 0
            row = track(judge if due else None, generator, test, names, args, step)
            distances = add_row(distances, row, steps_per_epoch)
            saved_at = save(folder, args, history, distances, parts)
            if number % max(1, number // 20) == 0 or step >= last_step:  # slow: ever more rarely
                write_report(folder, history, distances, steps_per_epoch)
        if step >= last_step:
            break

        steps = range(step, min((epoch + 1) * steps_per_epoch, last_step))  # those still to do
        history = torch.cat([history, history.new_zeros(len(steps), len(METRICS))])
        name = f"epoch {epoch + 1}/{args.epochs}"
        bar = tqdm(steps, name, steps_per_epoch, leave=False, initial=done, unit=" images", unit_scale=size)
        for now in bar:
            left = 1 - now / (args.epochs * steps_per_epoch)  # share of the run that is left
            for optimizer, rate in ((optimizer_g, args.lr_g), (optimizer_d, args.lr_d)):
                optimizer.param_groups[0]["lr"] = rate * min(1, left / max(1 - args.decay, 1e-9))
            batch = take(a, "a", now, args), take(b, "b", now, args)
            reseed(args.seed, "step", now)
            rest = args.cycle_weight, args.identity_weight
            history[now] = torch.stack([*train_step(*parts.values(), *batch, *rest).values()])
            step = now + 1
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
    """Translate the first args.generate test images, or the pictures in args.translate, into PNG files."""
    generator, side = build(args), args.direction == "b2a"
    load_checkpoint(args.checkpoint, generator=generator)
    if args.translate is not None:
        translate_own(args, generator["ba" if side else "ab"], args.channels[side])
    else:
        _, test, names = read_domains(args)
        translate_tests(args, generator["ba" if side else "ab"], test[side], names[side])


def main(argv=None):
    args = parse_args(argv)
    torch.backends.cudnn.deterministic = True  # --resume is to be exact
    torch.backends.cudnn.allow_tf32 = False  # TF32 would round fp32 in convolutions
    old_handler = signal.signal(signal.SIGTERM, signal.default_int_handler)  # KeyboardInterrupt, as by Ctrl-C
    try:
        (generate if args.checkpoint else train)(args)
    except KeyboardInterrupt:
        saved = args.out_dir and Path(args.out_dir, "checkpoint.pt").is_file()
        fail(f"stopped; go on with --resume {args.out_dir}/checkpoint.pt" if saved else "stopped", 130)
    finally:
        signal.signal(signal.SIGTERM, old_handler)


if __name__ == "__main__":
    main()
