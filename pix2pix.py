"""pix2pix: translate a picture into another, learned from pairs; 32x32 digits, cartoon faces, any folders.

    python pix2pix.py                               # mosaics to digits, 10 epochs, into runs/pix2pix/001
    python pix2pix.py --dataset faces --batch-size 4                # line drawings to cartoon faces
    python pix2pix.py --translate FOLDER --checkpoint runs/pix2pix/001/checkpoint.pt

In cgan.py both players are told a class. Here they are told a picture. The generator G is given a picture a,
the question, and draws an answer G(a); the discriminator D sees a beside the true answer b, or beside G(a).

Why a GAN at all, when the true answer is known? Because a question may have many answers. Different
digits share a mosaic, and L1, the mean difference of pixels, makes G hedge between them: the safest value
of a pixel is its median over all answers, and so doubtful strokes are lost or smeared. D asks instead
whether b could be *an* answer to *this* a. pix2pix adds the two losses: L1 gets the large shapes right,
and D makes them sharp (--l1-weight, --gan-weight):

    L_D = -1/2 E[log D(a, b)] - 1/2 E[log(1 - D(a, G(a)))]
    L_G = -E[log D(a, G(a))] + 100 E|b - G(a)|

New against cgan.py: D is a PatchGAN. As L1 takes care of the whole, D may look at details: its convolutions
end in a map of logits, and each judges one patch, of 16x16 pixels if the picture has 32x32. G is a U-Net: it
halves the picture down to a single pixel and doubles it up again, and at each size the way up is also given
what the way down had there, since question and answer share their layout (skips; --no-skips: none). And there
is no noise z, because the authors found that G ignored it. All that is left to chance is dropout, in the
first layers on the way up. Dropout is off in tests, except in variants.png: see how little it changes.

What to watch: the pictures in samples/, rows of questions, answers and truths. `g_loss` is the first part of
L_G. If D could not tell answers from truths, L_D and `g_loss` would both be log 2 = 0.69; if D wins, `g_loss`
grows. After each epoch, 1,000 test images are translated. `error` is their mean difference from the truth (0
to 1). Where a is made from b (--task), `evidence` is how far a is from the question that the answer would
give (0 is best). `sharpness` compares neighbouring pixels: 1 is as sharp as the truth; less means blurred,
faint or missing strokes, more means noise. L1 alone (--gan-weight 0) aims at a small `error` and nothing
else: with --epochs 1 its `error` was 2% less than with both, but its `sharpness` 0.92, not 0.96 (RESULTS.md,
l1).

Papers: Isola et al. 2016, arXiv 1611.07004; Ronneberger et al. 2015, 1505.04597 (U-Net). Departures: small
pictures (at 32 pixels, only two layers have dropout, not three); half G's width, batches of 32 (the paper: 1
to 10), rates that fall to 0 in the second half, as in the authors' later code, no random cropping or
mirroring, and at test time no dropout and the running statistics of batch normalisation.
"""

import argparse
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
    add("--l1-weight", type=float, default=100.0, help="weight of the L1 loss; 0: the GAN alone")
    add("--gan-weight", type=float, default=1.0, help="weight of the adversarial loss; 0: L1 alone")
    add("--no-condition", action="store_true", help="the discriminator does not see the question a")
    add("--no-skips", action="store_true", help="a generator without the connections that make it a U-Net")
    patch = "strided layers of D, n: patches of 9 * 2^n - 2 pixels a side (0: one); None: by --image-size"
    add("--patch-layers", type=int, help=patch)
    add("--dropout", type=float, default=0.5, help="in G's first layers on the way up, below 1")
    add("--norm", choices=["batch", "instance"], default="batch", help="normalisation in both networks")
    add("--width", type=int, default=32, help="channels of the generator's first layer (the paper: 64)")
    tasks = "how A is drawn from B; None: lines with --dataset faces, else mosaic (folders have their own A)"
    add("--task", choices=["mosaic", "outline", "half", "grey", "lines"], help=tasks)
    add("--direction", choices=["a2b", "b2a"], default="a2b", help="what is translated into what")
    add("--image-size", type=int, help="pixels, a power of 2 from 32 to 256; None: 32 for digits, else 64")
    add("--epochs", type=int, default=10, help="passes over the training set")
    add("--decay", type=float, default=0.5, help="share of --epochs at full rates; then they fall to 0")
    add("--max-steps", type=int, help="stop after this many steps, if that comes sooner")
    add("--lr-g", type=float, default=2e-4, help="Adam's learning rate for the generator")
    add("--lr-d", type=float, default=2e-4, help="Adam's learning rate for the discriminator")
    add("--batch-size", type=int, default=32, help="images per step (the paper: 1 to 10)")
    names = ["mnist", "fashion_mnist", "faces", "folder", "folders"]
    help_ = "folder: pictures of which --task draws A; folders: A and B, in one of the usual layouts"
    add("--dataset", choices=names, default="mnist", help=help_)
    add(
        "--data-dir",
        default="data",
        help="where it is; of folders: with trainA and trainB in it, for example",
    )
    add("--folder-a", help="with --dataset folders: the folder of A, wherever it is")
    add("--folder-b", help="with --dataset folders: that of B, with the same names")
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
    add("--checkpoint", metavar="PATH", help="the checkpoint.pt that --generate and --translate use")


MAY_BE_ZERO = ["l1_weight", "gan_weight", "patch_layers", "dropout"]  # of the flags that are numbers


# %% Networks

NORMS = {"batch": nn.BatchNorm2d, "instance": nn.InstanceNorm2d}


class Generator(nn.Module):
    """A U-Net: images (N, in_channels, size, size) to images (N, out_channels, size, size) in [-1, 1].

    The comments give the shapes for size 32 and width 32. Without `skips` it is an encoder and a decoder.
    """

    def __init__(
        self, in_channels=1, out_channels=1, size=32, width=32, norm="batch", skips=True, dropout=0.5
    ):
        super().__init__()
        self.skips, self.down, self.up = skips, nn.ModuleList(), nn.ModuleList()
        halvings = int(math.log2(size))  # down to one pixel
        widths = [width * min(2**level, 8) for level in range(halvings)]
        # Down: (N, 32, 16, 16), (N, 64, 8, 8), (N, 128, 4, 4), (N, 256, 2, 2), (N, 256, 1, 1)
        for level, (taken, leaving) in enumerate(zip([in_channels, *widths], widths)):
            inner = 0 < level < halvings - 1  # the picture, and a single pixel, are not normalised
            layers = [nn.LeakyReLU(0.2)] if level else []
            layers += [nn.Conv2d(taken, leaving, 4, stride=2, padding=1, bias=not inner)]
            self.down.append(nn.Sequential(*layers, *([NORMS[norm](leaving)] if inner else [])))
        # Up: (N, 256, 2, 2), (N, 128, 4, 4), (N, 64, 8, 8), (N, 32, 16, 16), (N, out_channels, 32, 32)
        for step, level in enumerate(reversed(range(halvings))):
            taken, leaving = widths[level] * (2 if skips and step else 1), [out_channels, *widths][level]
            layers = [nn.ReLU(), nn.ConvTranspose2d(taken, leaving, 4, stride=2, padding=1, bias=not level)]
            layers += [NORMS[norm](leaving)] if level else [nn.Tanh()]
            layers += [nn.Dropout(dropout)] if step < min(3, halvings - 3) else []
            self.up.append(nn.Sequential(*layers))

    def forward(self, a):
        images, kept = a, []
        for layers in self.down:
            images = layers(images)
            kept.append(images)
        images = self.up[0](kept.pop())  # the single pixel, which has nothing to be joined with
        for layers in self.up[1:]:
            skip = kept.pop()  # as large as `images`
            images = layers(torch.cat([images, skip], 1) if self.skips else images)
        return images


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


def discriminator_loss(real_logits, fake_logits):
    """-1/2 E[log D(a, b)] - 1/2 E[log(1 - D(a, G(a)))], means over images and patches (section 3.3)."""
    real_loss = F.binary_cross_entropy_with_logits(real_logits, torch.ones_like(real_logits))
    fake_loss = F.binary_cross_entropy_with_logits(fake_logits, torch.zeros_like(fake_logits))
    return (real_loss + fake_loss) / 2  # halved as in the paper; Adam makes up for it


def generator_loss(fake_logits):
    """The adversarial part of L_G, -E[log D(a, G(a))]."""
    return F.binary_cross_entropy_with_logits(fake_logits, torch.ones_like(fake_logits))


def l1_loss(fake, b):
    """E|b - G(a)|, a mean over all pixels (equation 3)."""
    return (fake - b).abs().mean()


# %% Training step

# What a step reports, grouped by the panels of losses.png.
PANELS = {"loss": ("d_loss", "g_loss"), "probability": ("d_real", "d_fake"), "l1": ("l1",)}
METRICS = [name for names in PANELS.values() for name in names]


def train_step(generator, discriminator, optimizer_g, optimizer_d, a, b, l1_weight, gan_weight, condition):
    """Update the discriminator, then the generator, on pairs of images a and b (N, C, H, W) in [-1, 1].

    With `condition` false the discriminator sees b alone. Returns the METRICS, detached; l1 is on the scale
    from 0 (black) to 1 (white).
    """
    question = (a,) if condition else ()

    # The discriminator learns to tell the true answer from G's. Detached, the fakes carry no gradient to G.
    fake = generator(a)
    real_logits, fake_logits = discriminator(*question, b), discriminator(*question, fake.detach())
    d_loss = discriminator_loss(real_logits, fake_logits)
    optimizer_d.zero_grad()
    d_loss.backward()
    optimizer_d.step()

    # The generator learns to fool the updated discriminator, frozen here, and to come close to b.
    discriminator.requires_grad_(False)
    g_loss, l1 = generator_loss(discriminator(*question, fake)), l1_loss(fake, b)
    optimizer_g.zero_grad()
    (gan_weight * g_loss + l1_weight * l1).backward()
    optimizer_g.step()
    discriminator.requires_grad_(True)

    return {
        "d_loss": d_loss.detach(),
        "g_loss": g_loss.detach(),
        "d_real": real_logits.detach().sigmoid().mean(),
        "d_fake": fake_logits.detach().sigmoid().mean(),
        "l1": l1.detach() / 2,
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
TRACKED = {"test images": ("error", "evidence"), "detail": ("sharpness",)}
TRACKED |= {"of samples": ("distance",), "share": ("precision", "recall")}
DISTANCES = [name for names in TRACKED.values() for name in names]


def fill_in(args):
    """Choose the settings that were not given, and refuse those that do not go together."""
    check_pictures(args, "mosaic")
    if args.dropout >= 1:
        fail(f"--dropout: {args.dropout} is not below 1")
    if args.l1_weight == args.gan_weight == 0:
        fail("--gan-weight: with --l1-weight 0 it cannot be 0, too; raise one of them above 0")
    if args.fid_every and args.direction == "b2a" and not args.dataset.startswith("folder"):
        fail("--fid-every: fid.py knows the pictures B of this data set alone; leave out --direction or this")


def read_pairs(args):
    """Questions and answers to train on, those to test on, and the names of the latter."""
    *parts, (names, _) = read_pictures(args, paired=True)
    if not names:
        fail("--dataset: too few pictures to keep one in ten for testing; give more, or a test folder")
    train_on, test = (part if args.direction == "a2b" else part[::-1] for part in parts)
    if not args.dataset.startswith("folder"):  # pictures of folders stay in their mapped file
        train_on = [images.to(args.device) for images in train_on]
    return train_on, test, names


def build(args):
    """The generator of a run; args.channels are those of its questions and of its answers."""
    skips = not args.no_skips
    return Generator(*args.channels, args.image_size, args.width, args.norm, skips, args.dropout)


def draw_pictures(generator, test, names, args):
    """Two grids: rows of questions, answers, truths; and five questions, each with six draws of dropout.

    The last column of the second is twice the standard deviation of the draws: white is the most there is.
    """
    rows = choose(names, 20 if len(names) >= 20 else min(10, len(names)))
    a, b = (images[rows].expand(-1, max(args.channels), -1, -1) for images in test)
    questions = scaled(test[0][rows], args)
    made = sample(generator, questions).expand_as(b)
    strips = [images[i : i + 10] for i in range(0, len(rows), 10) for images in (a, made, b)]
    reseed(args.seed, "variants")
    generator.eval()
    for layer in generator.modules():
        if isinstance(layer, nn.Dropout):
            layer.train()
    with torch.no_grad(), fp32():
        drawn = torch.stack([generator(questions[:5]).cpu() for _ in range(6)])
    generator.train()
    drawn = torch.cat([drawn.add(1).mul(127.5), drawn.std(0, correction=0, keepdim=True).mul(255)])
    drawn = drawn.round().to(torch.uint8).expand(-1, -1, max(args.channels), -1, -1)
    variants = torch.cat([a[None, :5], drawn]).transpose(0, 1).flatten(0, 1)
    return make_grid(torch.cat(strips), min(10, len(rows))), make_grid(variants, 8)


def track(judge, generator, test, args, step):
    """Measure translations of test images; a row of the step and DISTANCES, nan for what is not measured."""
    found, (a, b) = dict.fromkeys(DISTANCES, math.nan), (images[:1000] for images in test)
    made = translate(generator, a, args)
    found |= {"error": difference(made, b), "sharpness": sharpness(made, b)}
    if args.task not in (None, "lines") and args.direction == "a2b":
        found["evidence"] = difference(draw(args.task, made), a)
    if judge:
        many = translate(generator, test[0][: args.fid_samples], args)
        found |= zip(("distance", "precision", "recall"), judge(many))
    shown = [f"{name} {value:.3f}" for name, value in found.items() if not math.isnan(value)]
    print("  " + "  ".join(shown), flush=True)
    return torch.tensor([[step, *found.values()]])


def train(args):
    """Train from the start, or go on from the checkpoint args.resume."""
    fill_in(args)
    (a, b), test, names = read_pairs(args)
    args.channels, size = [a.shape[1], b.shape[1]], args.batch_size
    if size > len(b):
        fail(f"--batch-size: {size} is not from 1 to {len(b)}, the number of pairs")
    steps_per_epoch = len(b) // size  # the last, short batch is dropped
    last_step = min(args.epochs * steps_per_epoch, args.max_steps or sys.maxsize)

    torch.manual_seed(args.seed)
    generator = place(build(args).apply(init_weights), args)
    seen = sum(args.channels) if not args.no_condition else args.channels[1]
    discriminator = Discriminator(seen, layers=args.patch_layers, norm=args.norm)
    discriminator = place(discriminator.apply(init_weights), args)
    optimizer_g = torch.optim.Adam(generator.parameters(), args.lr_g, betas=(0.5, 0.999), fused=True)
    optimizer_d = torch.optim.Adam(discriminator.parameters(), args.lr_d, betas=(0.5, 0.999), fused=True)
    parts = {"generator": generator, "discriminator": discriminator}
    parts |= {"optimizer_g": optimizer_g, "optimizer_d": optimizer_d}  # the order of train_step's arguments

    checkpoint = load_checkpoint(args.resume, **parts) if args.resume else {}
    history = checkpoint.get("history", torch.empty(0, len(METRICS))).to(args.device)  # a row for each step
    distances = checkpoint.get("distances", torch.empty(0, 1 + len(DISTANCES)))  # a row for each measurement
    judge = open_judge(args, b)
    folder = open_folder(args, f"runs/{SCRIPT}")
    (folder / "samples").mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(vars(args) | {"torch": torch.__version__}, indent=2))
    step, saved_at = len(history), save(folder, args, history, distances, parts)
    print(f"{len(b):,} images, {steps_per_epoch} steps an epoch, on {args.device}, into {folder}")
    while True:
        epoch, done = divmod(step, steps_per_epoch)
        if step and (done == 0 or step >= last_step):  # an epoch is complete, or was before --resume
            number = math.ceil(step / steps_per_epoch)
            grid, variants = draw_pictures(generator, test, names, args)
            to_pil_image(grid[: max(args.channels)]).save(folder / "samples" / f"epoch_{number:04d}.png")
            to_pil_image(variants[: max(args.channels)]).save(folder / "variants.png")
            due = judge and done == 0 and epoch % args.fid_every == 0
            row = track(judge if due else None, generator, test, args, step)
            distances = add_row(distances, row, steps_per_epoch)
            saved_at = save(folder, args, history, distances, parts)
            if number % max(1, number // 20) == 0 or step >= last_step:  # slow: ever more rarely
                write_report(folder, history, distances, steps_per_epoch)
        if step >= last_step:
            break

        reseed(args.seed, "order", epoch)
        batches = torch.randperm(len(b)).to(b.device).split(size)
        batches = batches[done : min(steps_per_epoch, done + last_step - step)]  # those still to do
        history = torch.cat([history, history.new_zeros(len(batches), len(METRICS))])
        name = f"epoch {epoch + 1}/{args.epochs}"
        bar = tqdm(batches, name, steps_per_epoch, leave=False, initial=done, unit=" images", unit_scale=size)
        for index in bar:
            left = 1 - step / (args.epochs * steps_per_epoch)  # share of the run that is left
            for optimizer, rate in ((optimizer_g, args.lr_g), (optimizer_d, args.lr_d)):
                optimizer.param_groups[0]["lr"] = rate * min(1, left / max(1 - args.decay, 1e-9))
            pair = scaled(a[index], args), scaled(b[index], args)
            reseed(args.seed, "step", step)
            rest = args.l1_weight, args.gan_weight, not args.no_condition
            history[step] = torch.stack([*train_step(*parts.values(), *pair, *rest).values()])
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
    """Translate the first args.generate test images, or the pictures in args.translate, into PNG files."""
    generator = place(build(args), args)
    load_checkpoint(args.checkpoint, generator=generator)
    if args.translate is not None:
        translate_own(args, generator, args.channels[0])
    else:
        _, (questions, _), names = read_pairs(args)
        translate_tests(args, generator, questions, names)


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
