"""DCGAN for 64x64 colour pictures: faces, or any folder of images; on one processor or on many.

    python dcgan64_celeba.py                        # CelebA if it is there, else the cartoons in data/faces
    python dcgan64_celeba.py --dataset folder --data-dir ~/Pictures --epochs 50
    torchrun --nproc-per-node=2 dcgan64_celeba.py --device cuda

The DCGAN of PyTorch's own example, close to the paper's. The generator G starts from z as a picture of
one pixel with 100 channels, makes it 4x4, and doubles it four times; the discriminator D is its mirror.
The losses are those of vanilla_gan.py:

    L_D = -E[log D(x)] - E[log(1 - D(G(z)))]
    L_G = -E[log D(G(z))]

What is new against dcgan_mnist.py: two more doublings, 64 channels, convolutions only, a plain 1 as D's
target, and the paper's rate of 2e-4 again. The layers have the example's names, so load_state_dict takes
its weights (netG_epoch_*.pth).

CelebA is 202,599 photographs of famous faces. To decode them in every epoch would take too long. They are
decoded once, on all cores, cut to their middle square, and written as 64x64 pixels into one file of 2.5
GB. Later runs map it into memory.

Started by torchrun, several processes share each batch: each takes its part of the images and of z, and
DistributedDataParallel averages the gradients. So K processes train as one would, but for two things: batch
normalisation sees only its own process's part, and each process adds noise of its own (see below).

What to watch: whether D runs away, with d_real near 1 and d_fake near 0 from the start. On the cartoons,
without noise, it did, and the samples stayed much alike. A likely reason: convolutions rarely make a
perfectly flat colour, the faint texture that they leave gives every fake away, and a D that looks at texture
teaches G little else.

What helped is instance noise: Gaussian noise on every image that D sees, real or fake. It hides the texture,
so D has to judge shapes and colours. The noise falls in a straight line from a standard deviation of 0.5
(pixels are in [-1, 1]) to 0, so the details come last, and most epochs show grainy faces. Only the cartoons
get it by default; --instance-noise 0 leaves it out. After 12 epochs the distance was 1378 with it and 3042
without, in one run each (RESULTS.md, Faces). With dcgan_mnist.py there was only a weak hint that it helps.

Papers: Radford et al. 2015, arXiv 1511.06434; Sonderby et al. 2016, 1610.04490 (instance noise). Departures,
all but the noise as in PyTorch's example: kernels of 4 (the paper: 5), half the channels, z normal and not
uniform, the fakes of D's step used again in G's.
"""

import argparse
import atexit
import functools
import hashlib
import importlib.util
import inspect
import json
import math
import os
import random
import signal
import sys
import time
from datetime import timedelta
from pathlib import Path

import numpy as np
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

# %% Settings


def add_flags(add):
    """The flags, those of this script's idea first; `add` is argparse's parser.add_argument."""
    noise = "std of the noise on D's input at the start; None: 0.5 with --dataset faces, else 0"
    add("--instance-noise", type=float, help=noise)
    add("--noise-epochs", type=int, help="epochs until that noise is 0; None: what --epochs says at first")
    add("--tensorboard", action="store_true", help="also write TensorBoard events")
    add("--epochs", type=int, help="passes over the training set; None: 48 with --dataset faces, else 5")
    add("--max-steps", type=int, help="stop after this many steps, if that comes sooner")
    add("--lr-g", type=float, default=2e-4, help="Adam's learning rate for the generator")
    add("--lr-d", type=float, default=2e-4, help="Adam's learning rate for the discriminator")
    add("--batch-size", type=int, default=128, help="images per step")
    add("--latent-dim", type=int, default=100, help="length of the noise vector z")
    choices = ["celeba", "faces", "folder", "mnist", "fashion_mnist", "cifar10"]
    add("--dataset", choices=choices, help="None: celeba if it is there, else faces, which are cartoons")
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


MAY_BE_ZERO = ["instance_noise"]  # of the flags that are numbers


# %% Networks


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
        return self.main(z[:, :, None, None])


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
        return self.main(images).flatten(1)


def init_weights(module):
    """Weights of convolutions from N(0, 0.02), those of batch normalisation from N(1, 0.02), biases 0."""
    if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
        nn.init.normal_(module.weight, 0.0, 0.02)
    elif isinstance(module, nn.BatchNorm2d):
        nn.init.normal_(module.weight, 1.0, 0.02)
        nn.init.zeros_(module.bias)


# %% Losses


def discriminator_loss(real_logits, fake_logits):
    """-E[log D(x)] - E[log(1 - D(G(z)))]: the binary cross-entropy of real images at 1 and fakes at 0."""
    real_loss = F.binary_cross_entropy_with_logits(real_logits, torch.ones_like(real_logits))
    return real_loss + F.binary_cross_entropy_with_logits(fake_logits, torch.zeros_like(fake_logits))


def generator_loss(fake_logits):
    """The non-saturating loss -E[log D(G(z))]."""
    return F.binary_cross_entropy_with_logits(fake_logits, torch.ones_like(fake_logits))


# %% Training step

# What a step reports, grouped by the panels of losses.png.
PANELS = {"loss": ("d_loss", "g_loss"), "probability": ("d_real", "d_fake")}
METRICS = [name for names in PANELS.values() for name in names]


def train_step(generator, discriminator, optimizer_g, optimizer_d, real, z, noise_std):
    """Update the discriminator, then the generator, on a batch `real` (N, C, 64, 64) in [-1, 1].

    `z` (N, latent_dim) is the noise that the images are made of. What the discriminator sees has Gaussian
    noise of that std on it. The networks may be wrapped in DistributedDataParallel. Returns the METRICS,
    detached.
    """

    def noisy(images):
        return images + noise_std * torch.randn_like(images) if noise_std > 0 else images

    # The discriminator learns to tell real from fake. Detached, the fakes carry no gradient to the generator.
    fake = generator(z)
    real_logits, fake_logits = discriminator(noisy(real)), discriminator(noisy(fake.detach()))
    d_loss = discriminator_loss(real_logits, fake_logits)
    optimizer_d.zero_grad()
    d_loss.backward()
    optimizer_d.step()

    # The generator learns to fool the updated discriminator, frozen here. The fakes still have their graph.
    # DistributedDataParallel would wait for the discriminator's gradients: call the bare network inside it.
    discriminator.requires_grad_(False)
    g_loss = generator_loss(getattr(discriminator, "module", discriminator)(noisy(fake)))
    optimizer_g.zero_grad()
    g_loss.backward()
    optimizer_g.step()
    discriminator.requires_grad_(True)
    return {
        "d_loss": d_loss.detach(),
        "g_loss": g_loss.detach(),
        "d_real": real_logits.detach().sigmoid().mean(),
        "d_fake": fake_logits.detach().sigmoid().mean(),
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


# %% Processes: one, or many that torchrun has started


def connect(args):
    """Join the processes that torchrun has started. Returns this one's rank among them, and their number."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if world > 1:
        if args.device.startswith("cuda"):
            torch.cuda.set_device(args.device)
        distributed.init_process_group(timeout=timedelta(hours=12))  # a first decoding may be long
        atexit.register(distributed.destroy_process_group)
    if rank:
        sys.stdout = open(os.devnull, "w")  # the first process speaks for all, and writes all files
    return rank, world


def read_in_turn(args, rank, world):
    """The training images, and in args what depends on them. The first process reads before the others."""
    fill_in(args)
    if rank:
        distributed.barrier()
    images = read_images(args.dataset, args.data_dir)
    if rank == 0 and world > 1:
        distributed.barrier()
    return images if args.dataset in ("celeba", "folder") else images.to(args.device)


def share(network, world):
    """The network, its gradients averaged over all processes."""
    # Running means stay each process's own: older PyTorch cannot exchange them between D's two passes.
    return DistributedDataParallel(network, broadcast_buffers=False) if world > 1 else network


# %% Training

SCRIPT = Path(__file__).stem
LOG_EVERY = 20  # steps between rows of history.csv
SAVE_EVERY = 60  # seconds between checkpoints inside an epoch
TRACKED = {"of samples": ("distance",), "share": ("precision", "recall")}  # what --fid-every measures
DISTANCES = [name for names in TRACKED.values() for name in names]
CELEBA = Path("celeba", "img_align_celeba")  # in the folder of data


def read_images(name, data_dir):
    """The training images, uint8 (N, C, 64, 64): those of a folder mapped from a file, others in memory."""
    kinds = {"mnist": datasets.MNIST, "fashion_mnist": datasets.FashionMNIST, "cifar10": datasets.CIFAR10}
    if name == "faces":
        return read_sheets(Path(data_dir, "faces"), "train_??.webp")
    celeba = Path(data_dir, CELEBA)
    try:
        if name in kinds:
            images = torch.as_tensor(kinds[name](data_dir, download=True).data)
        elif name == "celeba" and not celeba.is_dir():
            datasets.CelebA(data_dir, download=True)
    except Exception as error:  # its type depends on where torchvision stumbles
        if name == "celeba":
            hint = "unpack img_align_celeba.zip there, or give another --dataset, such as folder"
            fail(f"--data-dir: no {celeba}; a quota often stops the download: {hint} ({error!r:.90})")
        folder = Path(data_dir, getattr(kinds[name], "base_folder", f"{kinds[name].__name__}/raw"))
        fail(f"--data-dir: put the files of {name} in {folder} ({error!r:.90})")
    if name not in kinds:
        folder = celeba if name == "celeba" else Path(data_dir)
        return map_images(folder, list_images(folder), 64)[0]
    images = images.movedim(3, 1) if images.ndim == 4 else images[:, None]
    return torch.cat([resize(part, [64, 64], antialias=True) for part in images.split(1000)])


def fill_in(args):
    """Choose the settings that nobody has given, and that depend on which pictures there are."""
    args.dataset = args.dataset or ("celeba" if Path(args.data_dir, CELEBA).is_dir() else "faces")
    epochs, noise = (48, 0.5) if args.dataset == "faces" else (5, 0.0)
    args.epochs = args.epochs or epochs
    args.noise_epochs = args.noise_epochs or args.epochs  # saved, so that a longer --resume changes nothing
    args.instance_noise = noise if args.instance_noise is None else args.instance_noise


def open_run(args, step):
    """The folder of the run, its settings in config.json, and a writer of TensorBoard events, or None."""
    folder, writer = open_folder(args, f"runs/{SCRIPT}"), None
    (folder / "samples").mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(vars(args) | {"torch": torch.__version__}, indent=2))
    if args.tensorboard:
        from torch.utils.tensorboard import SummaryWriter

        writer = SummaryWriter(folder / "tensorboard", purge_step=step + 1)
        atexit.register(writer.close)  # what is still in its queue is written then
    return folder, writer


def picture_noise(args):
    """What the pictures show each time: 64 vectors z, and eight walks of ten, each from a z1 to a z2."""
    reseed(args.seed, "samples")
    z = torch.randn(64, args.latent_dim).to(args.device)
    angle = torch.linspace(0, math.pi / 2, 10, device=args.device)[:, None]
    # cos(a) z1 + sin(a) z2 is from N(0, I) again; a straight line would pass too close to 0.
    return z, torch.cat([angle.cos() * z1 + angle.sin() * z2 for z1, z2 in z[:16].split(2)])


def track(judge, generator, args, step):
    """Measure args.fid_samples samples, of the same noise each time; a row of the step and what was found."""
    reseed(args.seed, "distance")
    z = torch.randn(args.fid_samples, args.latent_dim).to(args.device)
    found = judge(sample(generator, z))
    print("  " + "  ".join(f"{name} {value:.3f}" for name, value in zip(DISTANCES, found)), flush=True)
    return torch.tensor([[step, *found]])


def train(args):
    """Train from the start, or go on from the checkpoint args.resume; under torchrun, as one of many."""
    rank, world = connect(args)
    images, size = read_in_turn(args, rank, world), args.batch_size
    if not 2 * world <= size <= len(images) or size % world:
        fail(f"--batch-size: {size} is not from 2 to {len(images)}, or cannot be shared by {world} processes")
    channels, steps_per_epoch = images.shape[1], len(images) // size  # the last, short batch is dropped
    last_step = min(args.epochs * steps_per_epoch, args.max_steps or sys.maxsize)

    torch.manual_seed(args.seed)
    generator = place(Generator(args.latent_dim, channels).apply(init_weights), args)
    discriminator = place(Discriminator(channels).apply(init_weights), args)
    optimizer_g = torch.optim.Adam(generator.parameters(), args.lr_g, betas=(0.5, 0.999), fused=True)
    optimizer_d = torch.optim.Adam(discriminator.parameters(), args.lr_d, betas=(0.5, 0.999), fused=True)
    parts = {"generator": generator, "discriminator": discriminator}
    parts |= {"optimizer_g": optimizer_g, "optimizer_d": optimizer_d}

    fixed_z, walk_z = picture_noise(args)
    checkpoint = load_checkpoint(args.resume, **parts) if args.resume else {}
    history = checkpoint.get("history", torch.empty(0, len(METRICS))).to(args.device)  # a row for each step
    distances = checkpoint.get("distances", torch.empty(0, 4))  # a row for each time that they were measured
    judge = open_judge(args, images) if rank == 0 else None
    players = share(generator, world), share(discriminator, world), optimizer_g, optimizer_d
    folder, writer = open_run(args, len(history)) if rank == 0 else (None, None)
    step, saved_at = len(history), save(folder, args, history, distances, parts) if rank == 0 else math.inf
    print(f"{args.dataset}: {len(images):,} images, {steps_per_epoch} steps an epoch, into {folder}")
    while True:
        epoch, done = divmod(step, steps_per_epoch)
        if rank == 0 and step and (done == 0 or step >= last_step):  # complete now, or before --resume
            number = math.ceil(step / steps_per_epoch)
            grid, walk = make_grid(sample(generator, fixed_z), 8), make_grid(sample(generator, walk_z), 10)
            to_pil_image(grid[:channels]).save(folder / "samples" / f"epoch_{number:04d}.png")
            to_pil_image(walk[:channels]).save(folder / "interpolation.png")
            if judge and done == 0 and epoch % args.fid_every == 0 and step not in distances[:, 0]:
                distances = torch.cat([distances, track(judge, generator, args, step)])
                saved_at = save(folder, args, history, distances, parts)
            if number % max(1, number // 20) == 0 or step >= last_step:  # slow: ever more rarely
                write_report(folder, history, distances, steps_per_epoch)
            if writer:
                writer.add_image("samples", grid, step)
        if step >= last_step:
            break

        reseed(args.seed, "order", epoch)
        batches = torch.randperm(len(images)).to(images.device).split(size)
        batches = batches[done : min(steps_per_epoch, done + last_step - step)]  # those still to do
        history = torch.cat([history, history.new_zeros(len(batches), len(METRICS))])
        name, shown = f"epoch {epoch + 1}/{args.epochs}", {"unit": " images", "unit_scale": size}
        bar = tqdm(batches, name, steps_per_epoch, leave=False, initial=done, disable=rank > 0, **shown)
        for index in bar:
            reseed(args.seed, "step", step)
            z = torch.randn(size, args.latent_dim, device=args.device).chunk(world)[rank]
            mine = images[index.chunk(world)[rank]].to(args.device, non_blocking=True)
            real = mine.float().div_(127.5).sub_(1)
            noise_std = args.instance_noise * max(0, 1 - step / (args.noise_epochs * steps_per_epoch))
            reseed(args.seed, "noise", step, rank)
            history[step] = torch.stack([*train_step(*players, real, z, noise_std).values()])
            if world > 1:
                distributed.all_reduce(history[step].div_(world))
            step += 1
            if step % LOG_EVERY == 0:
                bar.set_postfix_str(summary(rows := history[step - LOG_EVERY : step]))
                for metric, mean in zip(METRICS, rows.mean(0).tolist()) if writer else ():
                    writer.add_scalar(metric, mean, step)
            if time.monotonic() > saved_at + SAVE_EVERY:
                saved_at = save(folder, args, history[:step], distances, parts)
        saved_at = save(folder, args, history, distances, parts) if rank == 0 else math.inf
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
    """Write args.generate images, made by the generator in args.checkpoint, as PNG files."""
    generator = place(Generator(args.latent_dim, 1 if "mnist" in args.dataset else 3), args)
    load_checkpoint(args.checkpoint, generator=generator)
    folder = open_folder(args, Path(args.checkpoint).parent / "generated")
    reseed(args.seed, "generate")
    for start in tqdm(range(0, args.generate, 256), unit=" images", unit_scale=256):
        z = torch.randn(256, args.latent_dim).to(args.device)  # 256, so that no image depends on N
        for number, image in enumerate(sample(generator, z)[: args.generate - start], start):
            to_pil_image(image).save(folder / f"{number:05d}.png")
    print(f"{args.generate} images in {folder}")


def main(argv=None):
    args = parse_args(argv)
    if args.tensorboard and importlib.util.find_spec("tensorboard") is None:
        fail("--tensorboard: TensorBoard is not installed; pip install tensorboard")
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
