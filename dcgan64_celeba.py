"""DCGAN for 64x64 colour pictures: faces, or any folder of images; on one processor or many.

    python dcgan64_celeba.py --device cuda          # 5 epochs of the faces in data/celeba/img_align_celeba
    python dcgan64_celeba.py --dataset folder --data-dir ~/Pictures --epochs 50
    python dcgan64_celeba.py --dataset fashion_mnist
    torchrun --nproc-per-node=2 dcgan64_celeba.py --device cuda

The architecture of the paper itself: the generator G starts from z as a picture of one pixel and 100
channels and doubles it four times, from 4x4 to 64x64; the discriminator D is its mirror. The losses are
those of vanilla_gan.py:

    L_D = -E[log D(x)] - E[log(1 - D(G(z)))]
    L_G = -E[log D(G(z))]

What is different from dcgan_mnist.py: two more doublings, no fully connected layer at either end, D's
target for real images is a plain 1. The layers are named as in PyTorch's own DCGAN example, so that its
weights (netG_epoch_*.pth, netD_epoch_*.pth) load into these networks, and the reverse.

What is larger is the data. 202,599 faces are decoded, cut to their middle square and made 64x64 once, on
all cores, into a file of 2.5 GB that later runs map into memory: a batch is then 128 rows of it.

Many processes (torchrun) share each batch: each takes its part of the same images and the same noise, and
DistributedDataParallel averages the gradients. So K processes do what one does, up to batch normalisation,
which takes its means over each process's own part. One detail is easy to get wrong: D's two forward passes
come before its backward pass, and D's running means must not be exchanged in between; and G's step goes
through D without waiting for D's gradients, which it does not want.

What to watch (seed 42, bf16, means over an epoch; pictures in the README). Fashion-MNIST, 9 epochs: D(real)
between 0.80 and 0.88, D(fake) between 0.12 and 0.20, L_G between 3.0 and 3.6 from the second epoch on. These
figures tell nothing of the garments, blurs after the first epoch and mostly clear at the end, nor that the
distance to the test set was smallest after the fourth (RESULTS.md: 104, then 134 to 180). Colour takes
patience: on 3,786 emoji pictures D was far ahead for 360 steps, D(real) 0.99 and D(fake) 0.01, and all
samples were one grey texture; it lost its lead at step 380 and again at 540, and then came colours and
shapes. A slower D turned this round and was no help: with --lr-d 5e-5 D(fake) was 0.97 in epoch 1 and 0.58 in
epoch 6, the last one tried, and the samples were noise. A run on faces has not been made yet.

Paper: Radford et al. 2015, arXiv 1511.06434. Departures, all as in PyTorch's example: kernels of 4 (the
paper: 5), half the channels, z normal and not uniform, the fakes of D's step used again in G's.
"""

import argparse
import atexit
import functools
import hashlib
import importlib.util
import json
import math
import os
import random
import signal
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from PIL import Image, ImageOps
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from torchvision import datasets
from torchvision.transforms.functional import resize, to_pil_image
from torchvision.utils import make_grid
from tqdm import tqdm

# ---- Networks ----------------------------------------------------------------------------------------------


class Generator(nn.Module):
    """Noise z (N, latent_dim) to images (N, channels, 64, 64) in [-1, 1]."""

    def __init__(self, latent_dim=100, channels=3):
        super().__init__()
        self.latent_dim = latent_dim
        self.main = nn.Sequential(
            nn.ConvTranspose2d(latent_dim, 512, 4, stride=1, padding=0, bias=False),  # (N, 512, 4, 4)
            nn.BatchNorm2d(512),
            nn.ReLU(),
            nn.ConvTranspose2d(512, 256, 4, stride=2, padding=1, bias=False),  # (N, 256, 8, 8)
            nn.BatchNorm2d(256),
            nn.ReLU(),
            nn.ConvTranspose2d(256, 128, 4, stride=2, padding=1, bias=False),  # (N, 128, 16, 16)
            nn.BatchNorm2d(128),
            nn.ReLU(),
            nn.ConvTranspose2d(128, 64, 4, stride=2, padding=1, bias=False),  # (N, 64, 32, 32)
            nn.BatchNorm2d(64),
            nn.ReLU(),
            nn.ConvTranspose2d(64, channels, 4, stride=2, padding=1, bias=False),  # (N, channels, 64, 64)
            nn.Tanh(),
        )

    def forward(self, z):
        return self.main(z[:, :, None, None]).float()


class Discriminator(nn.Module):
    """Images (N, channels, 64, 64) to logits (N, 1); the sigmoid of a logit is the probability of "real"."""

    def __init__(self, channels=3):
        super().__init__()
        self.main = nn.Sequential(
            nn.Conv2d(channels, 64, 4, stride=2, padding=1, bias=False),  # (N, 64, 32, 32)
            nn.LeakyReLU(0.2),
            nn.Conv2d(64, 128, 4, stride=2, padding=1, bias=False),  # (N, 128, 16, 16)
            nn.BatchNorm2d(128),
            nn.LeakyReLU(0.2),
            nn.Conv2d(128, 256, 4, stride=2, padding=1, bias=False),  # (N, 256, 8, 8)
            nn.BatchNorm2d(256),
            nn.LeakyReLU(0.2),
            nn.Conv2d(256, 512, 4, stride=2, padding=1, bias=False),  # (N, 512, 4, 4)
            nn.BatchNorm2d(512),
            nn.LeakyReLU(0.2),
            nn.Conv2d(512, 1, 4, stride=1, padding=0, bias=False),  # (N, 1, 1, 1)
        )

    def forward(self, images):
        return self.main(images).flatten(1).float()


def init_weights(module):
    """Weights of convolutions from N(0, 0.02), those of batch normalisation from N(1, 0.02), biases 0."""
    if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
        nn.init.normal_(module.weight, 0.0, 0.02)
    elif isinstance(module, nn.BatchNorm2d):
        nn.init.normal_(module.weight, 1.0, 0.02)
        nn.init.zeros_(module.bias)


# ---- Losses ------------------------------------------------------------------------------------------------


def discriminator_loss(real_logits, fake_logits):
    """-E[log D(x)] - E[log(1 - D(G(z)))]: the binary cross-entropy of real images at 1 and fakes at 0."""
    real_loss = F.binary_cross_entropy_with_logits(real_logits, torch.ones_like(real_logits))
    return real_loss + F.binary_cross_entropy_with_logits(fake_logits, torch.zeros_like(fake_logits))


def generator_loss(fake_logits):
    """The non-saturating loss -E[log D(G(z))]."""
    return F.binary_cross_entropy_with_logits(fake_logits, torch.ones_like(fake_logits))


# ---- Training step -----------------------------------------------------------------------------------------

# What a step reports, grouped by the panels of losses.png.
PANELS = {"loss": ("d_loss", "g_loss"), "probability": ("d_real", "d_fake")}
METRICS = [name for names in PANELS.values() for name in names]


def train_step(generator, discriminator, optimizer_g, optimizer_d, real, z, autocast):
    """Update the discriminator, then the generator, on a batch `real` (N, C, 64, 64) in [-1, 1].

    `z` (N, latent_dim) is the noise; the networks run in the context `autocast`. They may be wrapped in
    DistributedDataParallel. Returns the METRICS as detached scalars, still on the device.
    """
    # The discriminator learns to tell real from fake. Detached, the fakes carry no gradient to the generator.
    with autocast:
        fake = generator(z)
        real_logits, fake_logits = discriminator(real), discriminator(fake.detach())
    d_loss = discriminator_loss(real_logits, fake_logits)
    optimizer_d.zero_grad()
    d_loss.backward()
    optimizer_d.step()

    # The generator learns to fool the discriminator as it now is. The fakes are the same: their graph stands.
    # DistributedDataParallel would wait for gradients of the discriminator: it is called without.
    discriminator.requires_grad_(False)
    with autocast:
        g_loss = generator_loss(getattr(discriminator, "module", discriminator)(fake))
    optimizer_g.zero_grad()
    g_loss.backward()
    optimizer_g.step()
    discriminator.requires_grad_(True)

    d_real, d_fake = real_logits.detach().sigmoid().mean(), fake_logits.detach().sigmoid().mean()
    return dict(zip(METRICS, (d_loss.detach(), g_loss.detach(), d_real, d_fake)))


# ---- Plumbing ----------------------------------------------------------------------------------------------

SCRIPT = Path(__file__).stem
IDX = [f"{part}-{kind}-ubyte" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")]
CIFAR = [*(f"data_batch_{number}" for number in range(1, 6)), "test_batch", "batches.meta"]
DATASETS = {  # torchvision's class, the folder where it looks, and the files there
    "mnist": (datasets.MNIST, "MNIST/raw", IDX),
    "fashion_mnist": (datasets.FashionMNIST, "FashionMNIST/raw", IDX),
    "cifar10": (datasets.CIFAR10, datasets.CIFAR10.base_folder, CIFAR),
}
SUFFIXES = ".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif"
CACHE = Path("data", "cache")  # decoded folders of images
ROW = 64 * 64 * 3  # bytes of an image there
LOG_EVERY = 20  # steps between rows of history.csv
SAVE_EVERY = 600  # seconds between checkpoints inside a long epoch


def fail(message, status=2):
    """End the program with one line on stderr, clear of the progress bar."""
    tqdm.write(f"{SCRIPT}.py: {message}", file=sys.stderr)
    raise SystemExit(status)


def stream(device, *key):
    """Random numbers that follow from `key` alone, so that a checkpoint needs no random state."""
    return torch.Generator(device).manual_seed(random.Random(repr(key)).getrandbits(63))


def open_dataset(name, data_dir, train=True):
    """torchvision's training or test set of that name; torchvision downloads what `data_dir` lacks."""
    kind, subfolder, files = DATASETS[name]
    folder, names = Path(data_dir, subfolder), ", ".join(files)
    try:
        return kind(data_dir, train=train, download=True)
    except Exception as error:  # its type depends on where torchvision stumbles
        if all((folder / file).is_file() for file in files):
            fail(f"--data-dir: {folder} is damaged; replace {names} ({error!r})")
        hint = "MNIST ships with this script's repository, in data/MNIST/raw"
        fail(f"--data-dir: no {name} in {folder}, and no download; put {names} there ({hint})")


def load_images(name, data_dir, rank=0):
    """The training images as uint8 (N, C, 64, 64): those of a folder mapped from a file, others in memory.

    The first of several processes (rank 0) prepares what the others then find.
    """
    if rank:
        distributed.barrier()
    if name in DATASETS:
        images = torch.as_tensor(open_dataset(name, data_dir).data)
        images = images.permute(0, 3, 1, 2) if images.ndim == 4 else images[:, None]
        images = torch.cat([resize(part, [64, 64], antialias=True) for part in images.split(1000)])
    else:
        images = map_folder(celeba_folder(data_dir) if name == "celeba" else Path(data_dir))
    if rank == 0 and distributed.is_initialized():
        distributed.barrier()
    return images


def celeba_folder(data_dir):
    """Where CelebA's aligned faces are, below data_dir; torchvision downloads them if it can."""
    folder = Path(data_dir, "celeba", "img_align_celeba")
    if not folder.is_dir():
        try:
            datasets.CelebA(data_dir, download=True)
        except Exception as error:  # its type depends on where torchvision stumbles
            fail(
                f"--data-dir: no {folder}, and no download (its Google Drive link is often over its quota): "
                "unpack img_align_celeba.zip there by hand, or give --dataset fashion_mnist, "
                f"or --dataset folder --data-dir PATH for images of your own ({error!r:.100})"
            )
    return folder


def to_rgb(image):
    """A picture of any mode in RGB: upright as EXIF says, 16 bits made 8, transparent parts white."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16 bits of grey
        image = image.point(lambda value: value / 257).convert("L")
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == "RGB" else image.convert("RGB")


def count_cores():
    """How many processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def decode(path):
    """An image file as the bytes of its middle square, 64x64 RGB; None if it cannot be read."""
    try:
        with Image.open(path) as image:
            return ImageOps.fit(to_rgb(image), (64, 64), Image.Resampling.BILINEAR).tobytes()
    except Exception:  # its type depends on the format and the damage
        return None


def decode_into(cache, numbered):
    """Write the images [(7, path), (8, path), ...] to these rows of the file `cache`.

    Returns the rows of those that cannot be read, and how many there were in all.
    """
    decoded = [decode(path) for _, path in numbered]
    with open(cache, "r+b") as file:
        file.seek(numbered[0][0] * ROW)
        file.write(b"".join(pixels or bytes(ROW) for pixels in decoded))
    return [number for (number, _), pixels in zip(numbered, decoded) if pixels is None], len(numbered)


def close_gaps(cache, count, gaps):
    """Of `count` rows in the file `cache`, drop those with the numbers `gaps`, and move the others up."""
    images = torch.from_file(str(cache), shared=True, size=count * ROW, dtype=torch.uint8).view(count, ROW)
    kept = sorted({*range(count)} - {*gaps})
    for row, number in enumerate(kept):
        images[row] = images[number]
    del images  # before the file gets shorter than what is mapped
    os.truncate(cache, len(kept) * ROW)


def map_folder(folder):
    """The images below a folder as uint8 (N, 3, 64, 64), mapped from a file in CACHE.

    That file is made once, on all cores, and again when a file was added, removed or changed.
    """
    if not folder.is_dir():
        fail(f"--data-dir: {folder} is no folder; give one with images")
    found = (os.path.join(root, name) for root, _, names in os.walk(folder) for name in names)
    files = sorted(path for path in found if path.lower().endswith(SUFFIXES) and os.path.isfile(path))
    stats = [(path.removeprefix(str(folder)), (s := os.stat(path)).st_size, s.st_mtime_ns) for path in files]
    place, content = (hashlib.sha256(repr(key).encode()).hexdigest() for key in (folder.resolve(), stats))
    cache = CACHE / f"{place[:12]}-{content[:12]}.uint8"
    if not cache.is_file():
        CACHE.mkdir(parents=True, exist_ok=True)
        bad, partial = [], cache.with_suffix(f".{os.getpid()}")
        try:
            bar = tqdm(desc="decoding", total=len(files), unit=" images", disable=not files)
            partial.touch()
            # Processes, for threads would wait for Python's lock; each writes its images where they belong.
            work = {"num_workers": count_cores(), "collate_fn": functools.partial(decode_into, partial)}
            with bar:
                for unreadable, count in DataLoader(list(enumerate(files)), 32, **work):
                    bad += unreadable
                    bar.update(count)
            if bad:
                names = ", ".join(files[number] for number in bad[:5])
                print(f"{len(bad)} of {len(files)} files cannot be read: {names}", flush=True)
            if len(bad) == len(files):
                fail(f"--data-dir: no image to read in {folder}; give a folder with {', '.join(SUFFIXES)}")
            if bad:
                close_gaps(partial, len(files), bad)
            os.replace(partial, cache)
            for stale in set(CACHE.glob(f"{place[:12]}-*")) - {cache}:
                stale.unlink()
        finally:
            partial.unlink(missing_ok=True)
    mapped = torch.from_file(str(cache), size=cache.stat().st_size, dtype=torch.uint8)
    return mapped.view(-1, 64, 64, 3).permute(0, 3, 1, 2)


@torch.no_grad()
def sample(generator, *inputs):
    """uint8 images (N, C, H, W) on the CPU; in eval mode, so that each depends on its own inputs alone."""
    generator.eval()
    images = torch.cat([generator(*chunk) for chunk in zip(*(rows.split(256) for rows in inputs))])
    generator.train()
    return images.add(1).mul(127.5).round().to("cpu", torch.uint8)


def new_folder(wanted, parent):
    """Make the folder `wanted` or, if that is None, the first free one of parent/001, parent/002, ..."""
    numbered = (Path(parent, f"{n:03d}") for n in range(1, sys.maxsize))
    folder = Path(wanted or next(path for path in numbered if not path.exists()))
    try:
        folder.mkdir(parents=True, exist_ok=bool(wanted))
        if any(folder.iterdir()):
            raise FileExistsError(None, "not empty")
        if not os.access(folder, os.W_OK):
            raise PermissionError(None, "not writable")
    except OSError as error:
        fail(f"--out-dir: {folder}: {error.strerror}; name a new folder, or --resume the run in this one")
    return folder


def load_checkpoint(path, **parts):
    """Read a checkpoint of this script as a dict, and give `parts` (networks, optimisers) their states."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        fail(f"{path}: no such file; give the checkpoint.pt of a run")
    except Exception:  # its type depends on where the damage is
        fail(f"{path}: truncated, damaged or no checkpoint; give the checkpoint.pt of a run")
    script = checkpoint.get("script") if isinstance(checkpoint, dict) else None
    if script != SCRIPT:
        fail(f"{path}: a checkpoint of {script or 'another program'}; give one of {SCRIPT}")
    for name, part in parts.items():
        try:
            part.load_state_dict(checkpoint[name])
        except (KeyError, RuntimeError, ValueError) as error:
            reason = " ".join(str(error).split()[:40])
            fail(f"{path}: its {name} has other sizes than its settings; give another checkpoint ({reason})")
    return checkpoint


class Run:
    """A training run: its folder, how many steps it has done, the metrics of each, and its checkpoint."""

    quiet = False  # no progress bar

    def __init__(self, args, images, device, batches=1, **parts):
        self.args, self.images, self.device, self.parts, self.signals = args, images, device, parts, []
        self.history, self.pending = [], []  # metrics: rows of numbers, and tensors still on the device
        self.size = args.batch_size * batches  # images that a step takes
        if args.batch_size < 2 or self.size > len(images):
            most = f"{len(images) // batches}, with {len(images)} images to take"
            fail(f"--batch-size: {args.batch_size} is not from 2 to {most}")
        self.steps_per_epoch = len(images) // self.size
        self.last_step = min(args.epochs * self.steps_per_epoch, args.max_steps or sys.maxsize)
        if args.resume:
            self.history = load_checkpoint(args.resume, **parts)["history"].tolist()
        self.step = len(self.history)
        self.open()

    def open(self):
        """Make the folder, or use that of the resumed run, and write the first files there."""
        if not self.args.resume:
            self.args.out_dir = str(new_folder(self.args.out_dir, f"runs/{SCRIPT}"))
        self.folder = Path(self.args.out_dir)
        config = {**vars(self.args), "device": str(self.device), "torch": torch.__version__}
        (self.folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        if self.args.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self.writer = SummaryWriter(self.folder / "tensorboard", purge_step=self.step + 1)
        self.save()

    def __enter__(self):
        """From here on Ctrl-C and SIGTERM wait until the step under way is done."""
        numbers = signal.SIGINT, signal.SIGTERM
        self.handlers = {n: signal.signal(n, lambda n, frame: self.signals.append(n)) for n in numbers}
        return self

    def __exit__(self, *error):
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        if self.args.tensorboard:
            self.writer.close()

    def epoch(self):
        """Yield the epoch's remaining batches as indices; after each, show progress, save, heed signals."""
        self.started = time.monotonic()
        epoch, done = divmod(self.step, self.steps_per_epoch)
        order = torch.randperm(len(self.images), generator=stream("cpu", self.args.seed, "order", epoch))
        batches = order[: self.steps_per_epoch * self.size].view(-1, self.size).to(self.images.device)
        rest = batches[done : done + self.last_step - self.step]
        title = f"epoch {epoch + 1}/{self.args.epochs}"
        scale = {"unit": " images", "unit_scale": self.size}
        bar = tqdm(rest, title, len(batches), initial=done, leave=False, disable=self.quiet, **scale)
        for index in bar:
            yield index
            self.step += 1
            if self.step % LOG_EVERY == 0:
                self.read()
                means = dict(zip(METRICS, torch.tensor(self.history[-LOG_EVERY:]).mean(0).tolist()))
                bar.set_postfix({name: f"{mean:.2f}" for name, mean in means.items()})
                for name, mean in means.items() if self.args.tensorboard else ():
                    self.writer.add_scalar(name, mean, self.step)
            if self.signals or time.monotonic() - self.saved_at > SAVE_EVERY:
                self.save()
            if self.signals:
                fail(f"stopped; go on with --resume {self.folder / 'checkpoint.pt'}", 128 + self.signals[0])

    def read(self):
        """Fetch the pending metrics from the device. If one, or a weight, is not finite, the run ends."""
        rows = torch.stack(self.pending).tolist() if self.pending else []
        states = [part.state_dict() for part in self.parts.values() if isinstance(part, nn.Module)]
        weights = torch.stack([tensor.isfinite().all() for state in states for tensor in state.values()])
        finite = [*(all(map(math.isfinite, row)) for row in rows), weights.all().item()]
        if not all(finite):
            step = min(len(self.history) + finite.index(False) + 1, self.step)
            fail(f"step {step}: loss not finite; lower --lr-g or --lr-d (the last checkpoint is good)", 1)
        self.history, self.pending = self.history + rows, []

    def save(self):
        """Write the checkpoint beside the old one, then move it into place: there is never half of one."""
        self.read()
        history = torch.tensor(self.history)  # (steps, len(METRICS))
        state = {"script": SCRIPT, "settings": vars(self.args), "step": self.step, "history": history}
        state |= {name: part.state_dict() for name, part in self.parts.items()}
        torch.save(state, self.folder / "checkpoint.tmp")
        os.replace(self.folder / "checkpoint.tmp", self.folder / "checkpoint.pt")
        self.saved_at = time.monotonic()

    def end_epoch(self, grid, walk):
        """Print the epoch's mean metrics, write all that a run leaves, return its METRICS (steps, ...)."""
        self.read()
        history, number = torch.tensor(self.history), (self.step - 1) // self.steps_per_epoch + 1
        epoch = history[(number - 1) * self.steps_per_epoch :]
        means = "  ".join(f"{name} {mean:.3f}" for name, mean in zip(METRICS, epoch.mean(0).tolist()))
        seconds = time.monotonic() - self.started
        print(f"epoch {number}/{self.args.epochs}  {means}  {seconds:.0f} s", flush=True)
        samples = self.folder / "samples"
        samples.mkdir(exist_ok=True)
        to_pil_image(grid).save(samples / f"epoch_{number:04d}.png")
        to_pil_image(walk).save(self.folder / "interpolation.png")
        first, *others = [Image.open(path) for path in sorted(samples.glob("epoch_*.png"))]
        pause = [200] * len(others) + [2000]  # milliseconds
        first.save(self.folder / "progress.gif", save_all=True, append_images=others, duration=pause, loop=0)
        self.write_curves(history)
        self.save()
        return epoch

    def write_curves(self, history):
        """history.csv and losses.png, both means over intervals of LOG_EVERY steps."""
        means = torch.stack([interval.mean(0) for interval in history.split(LOG_EVERY)])
        steps = [min(start + LOG_EVERY, self.step) for start in range(0, self.step, LOG_EVERY)]
        lines = [",".join(["epoch", "step", *METRICS])]
        for step, row in zip(steps, means.tolist()):
            epoch = (step - 1) // self.steps_per_epoch + 1
            lines.append(",".join([str(epoch), str(step), *(f"{mean:.6g}" for mean in row)]))
        (self.folder / "history.csv").write_text("\n".join(lines) + "\n")
        figure = Figure(figsize=(8, 2.4 * len(PANELS)), layout="constrained")
        axes = figure.subplots(len(PANELS), squeeze=False)[:, 0]
        for axis, (title, names) in zip(axes, PANELS.items()):
            for name in names:
                axis.plot(steps, means[:, METRICS.index(name)], label=name, linewidth=1)
            axis.set(xlabel="step", ylabel=title)
            axis.legend(loc="center left", bbox_to_anchor=(1, 0.5))
        figure.savefig(self.folder / "losses.png")


class SharedRun(Run):
    """A run of `world` processes, which share each batch; the first (rank 0) alone writes files."""

    def __init__(self, args, images, device, rank, world, **parts):
        self.rank, self.world, self.quiet, self.saved_at = rank, world, rank > 0, math.inf
        super().__init__(args, images, device, **parts)

    def open(self):
        if self.rank == 0:
            super().open()
        else:
            self.args.tensorboard, self.folder = False, Path(self.args.out_dir or "")

    def save(self):
        if self.rank == 0:
            super().save()

    def end_epoch(self, grid, walk):
        if self.rank == 0:
            super().end_epoch(grid, walk)

    def epoch(self):
        """As in Run; a signal to any of the processes stops them all after the same step."""
        for index in super().epoch():
            yield index
            if self.world > 1:
                heard = torch.tensor(max(self.signals, default=0))
                distributed.all_reduce(heard, distributed.ReduceOp.MAX)
                self.signals = [heard.item()] if heard else []
                if self.signals and self.rank:
                    raise SystemExit(128 + self.signals[0])  # the first saves, and says so


def connect(device):
    """Join the processes that torchrun started. Returns this one's rank, their number, and its device."""
    rank, local, world = (int(os.environ.get(name, 0)) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"))
    if world < 2:
        return 0, 1, device
    if device.type == "cuda":
        if local >= torch.cuda.device_count():
            fail(f"--device: more processes than GPUs; give torchrun {torch.cuda.device_count()} at most")
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    distributed.init_process_group(backend, timeout=timedelta(hours=12))  # a first decoding may be long
    atexit.register(distributed.destroy_process_group)
    if rank:
        sys.stdout = open(os.devnull, "w")
    return rank, world, device


def pick_device(name):
    """The torch.device of that name, if this machine has it. auto takes cuda, then mps, then cpu."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.zeros(1, device=name).item()
    except (RuntimeError, AssertionError, NotImplementedError):
        fail(f"--device: {name!r} is unknown or not on this machine; give cpu, or auto for the best there is")
    return torch.device(name)


def parse_args(argv):
    """The settings of a run, checked; with --resume or --generate, those of the checkpoint."""
    style, summary = argparse.ArgumentDefaultsHelpFormatter, __doc__.split("\n")[0]
    parser = argparse.ArgumentParser(f"{SCRIPT}.py", description=summary, formatter_class=style)
    parser.error = fail
    add = parser.add_argument
    add("--epochs", type=int, default=5, help="passes over the training set")
    add("--max-steps", type=int, help="stop after this many steps, if that comes sooner")
    add("--device", default="auto", help="auto takes cuda, then mps, then cpu; or any torch device string")
    add("--lr-g", type=float, default=2e-4, help="Adam's learning rate for the generator")
    add("--lr-d", type=float, default=2e-4, help="Adam's learning rate for the discriminator")
    add("--batch-size", type=int, default=128, help="images per step")
    add("--latent-dim", type=int, default=100, help="length of the noise vector z")
    add("--dataset", choices=["celeba", "folder", *DATASETS], default="celeba", help="what to train on")
    add("--data-dir", default="data", help="where the data set, or the folder of images, is")
    add("--out-dir", help=f"folder for all that is written; None takes runs/{SCRIPT}/<next free number>")
    add("--seed", type=int, default=42, help="all randomness follows from it")
    add("--precision", choices=["fp32", "bf16"], default="fp32", help="bf16 runs the networks under autocast")
    add("--resume", metavar="PATH", help="go on from this checkpoint.pt, with its settings and in its folder")
    add("--generate", type=int, metavar="N", help="no training: write N images, with --checkpoint")
    add("--checkpoint", metavar="PATH", help="the checkpoint.pt that --generate uses")
    add("--tensorboard", action="store_true", help="also write TensorBoard events")
    args = parser.parse_args(argv)

    if (args.generate is None) != (args.checkpoint is None) or (args.generate and args.resume):
        fail("--generate N goes with --checkpoint PATH, and not with --resume; give these two")
    if path := args.resume or args.checkpoint:
        settings = load_checkpoint(path)["settings"]
        asked = ("resume", "generate", "checkpoint", "out_dir")
        settings |= {name: vars(args)[name] for name in asked}
        if args.resume:
            settings["out_dir"] = str(Path(path).parent)
        parser.set_defaults(**settings)
        args = parser.parse_args(argv)  # now the checkpoint speaks where the command line is silent
        free = {"epochs", "max_steps", "device"} if args.resume else {"device", "seed"}
        for name, value in settings.items():
            if name not in free and vars(args)[name] != value:
                flag = "--" + name.replace("_", "-")
                fail(f"{flag}: {path} was made with {value}, not {vars(args)[name]}; leave {flag} out")
    for name, value in vars(args).items():
        if type(value) in (int, float) and name != "seed" and not 0 < value < math.inf:
            fail(f"--{name.replace('_', '-')}: {value} is not a finite number above 0; give one that is")
    if args.tensorboard and importlib.util.find_spec("tensorboard") is None:
        fail("--tensorboard: TensorBoard is not installed; pip install tensorboard")
    return args


# ---- Main --------------------------------------------------------------------------------------------------


def train(args, device):
    """Train from the start, or from the checkpoint args.resume."""
    torch.backends.cudnn.deterministic = True  # resuming bit for bit on CUDA needs it
    rank, world, device = connect(device)
    if args.batch_size % world:
        fail(f"--batch-size: {args.batch_size} images cannot be shared by {world} processes; give a multiple")
    images = load_images(args.dataset, args.data_dir, rank)
    if args.dataset in DATASETS:
        images = images.to(device)  # others stay in their file
    torch.manual_seed(args.seed)
    generator = Generator(args.latent_dim, images.shape[1]).apply(init_weights).to(device)
    discriminator = Discriminator(images.shape[1]).apply(init_weights).to(device)
    adam = {"betas": (0.5, 0.999), "fused": True}
    parts = {
        "generator": generator,
        "discriminator": discriminator,
        "optimizer_g": torch.optim.Adam(generator.parameters(), args.lr_g, **adam),
        "optimizer_d": torch.optim.Adam(discriminator.parameters(), args.lr_d, **adam),
    }
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=args.precision == "bf16")

    fixed_z = torch.randn(64, args.latent_dim, generator=stream("cpu", args.seed, "samples")).to(device)
    # cos(a) z1 + sin(a) z2 is as normal as z1 and z2 are; a straight line would pass too close to 0.
    angle = torch.linspace(0, math.pi / 2, 10, device=device)[:, None]
    walk_z = torch.cat([angle.cos() * z1 + angle.sin() * z2 for z1, z2 in fixed_z[:16].split(2)])

    with SharedRun(args, images, device, rank, world, **parts) as run:
        players = dict(parts)
        if world > 1:
            # Batch normalisation's running means stay each process's own: to exchange them between the
            # discriminator's two forward passes would break the backward pass.
            for name in ("generator", "discriminator"):
                players[name] = DistributedDataParallel(parts[name], broadcast_buffers=False)
        print(f"{len(images):,} images, {run.steps_per_epoch} steps an epoch, on {device}, into {run.folder}")
        while run.step < run.last_step:
            for index in run.epoch():
                rng = stream(device, args.seed, "step", run.step)
                z = torch.randn(args.batch_size, args.latent_dim, device=device, generator=rng)
                index, z = index.chunk(world)[rank], z.chunk(world)[rank]  # this process's share
                real = images[index].to(device).float().div_(127.5).sub_(1)
                metrics = torch.stack(list(train_step(*players.values(), real, z, autocast).values()))
                if world > 1:
                    distributed.all_reduce(metrics.div_(world))
                run.pending.append(metrics)
            grid, walk = make_grid(sample(generator, fixed_z), 8), make_grid(sample(generator, walk_z), 10)
            run.end_epoch(grid, walk)
    print(f"{run.step} steps done, see {run.folder}")


def generate(args, device):
    """Write args.generate images, made by the generator in args.checkpoint, as PNG files."""
    generator = Generator(args.latent_dim, 1 if "mnist" in args.dataset else 3).to(device)
    load_checkpoint(args.checkpoint, generator=generator)
    folder = new_folder(args.out_dir, Path(args.checkpoint).parent / "generated")
    rng = stream("cpu", args.seed, "generate")
    with tqdm(total=args.generate, unit=" images") as bar:
        while bar.n < args.generate:
            z = torch.randn(min(256, args.generate - bar.n), args.latent_dim, generator=rng).to(device)
            for image in sample(generator, z):
                to_pil_image(image).save(folder / f"{bar.n:05d}.png")
                bar.update()
    print(f"{args.generate} images in {folder}")


def main(argv=None):
    args = parse_args(argv)
    (generate if args.generate else train)(args, pick_device(args.device))


if __name__ == "__main__":
    main()
