"""DCGAN for 64x64 colour pictures: faces, or any folder of your own.

    python dcgan64_celeba.py                            # CelebA if it is there, else cartoons in data/faces
    python dcgan64_celeba.py --dataset folder --data-dir ~/Pictures --epochs 50
    torchrun --nproc-per-node=2 dcgan64_celeba.py --device cuda

              z ──► 4x4 ──► 8x8 ──► 16x16 ──► 32x32 ──► 64x64 ──► 32x32 ──► 16x16 ──► 8x8 ──► 4x4 ──► real?
    channels  100   512     256      128       64         3         64       128      256     512
              └────────────────── G ──────────────────────┘ └──────────────────── D ──────────────────┘

A digit is 784 numbers, a small colour picture 12,288. Does it take a new idea to draw sixteen times as much?
No, only more layers of the same kind. To G, z is a picture of one pixel with 100 channels. Layer by layer it
trades channels for pixels: at 4x4 it decides much about few places, at 64x64 little about many. D is its
mirror image. Not one dense layer is left: even D's last is a convolution, over the remaining 4x4.

The losses are those of vanilla_gan.py and the recipe is that of dcgan_mnist.py, but with the paper's rate of
2e-4, and 1 as D's target for real images. The layers are exactly those of PyTorch's own example, by the same
names, so trained weights fit both: generator.load_state_dict(torch.load("netG_epoch_24.pth")).

torchrun gives each process a share of every batch, and DistributedDataParallel averages the gradients. On the
cartoons, D sees everything through noise that fades: a flat colour is hard to draw, and would betray G.

What to watch: interpolation.png. Each row walks from one z to another. A G that had memorised faces would
jump between them; a good one turns one face into the other, and every step on the way is a face, too.

Try --latent-dim 2. Every face is now a point in a plane. What can still vary from face to face?

Paper: Radford et al. 2015, arXiv 1511.06434. Departures, as in PyTorch's example: kernels of 4, not 5; half
the channels; a normal z; G learns from D's fakes. The noise: Sonderby et al. 2016, arXiv 1610.04490.
"""

import argparse
import atexit
import contextlib
import hashlib
import json
import math
import os
import sys
import time
from collections import Counter
from datetime import timedelta
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from PIL import Image, ImageOps
from torch import accelerator, distributed, nn
from torch.nn.parallel import DistributedDataParallel
from torchvision import datasets
from torchvision.transforms.functional import resize
from torchvision.utils import save_image
from tqdm import tqdm

# %% Settings
SCRIPT = "dcgan64_celeba"
DATA = str(Path(globals().get("__file__", "cell")).resolve().parent / "data")  # notebooks have no __file__
PANELS = [["d_loss", "g_loss"], ["d_real", "d_fake"]]  # what losses.png shows
CACHE = Path(DATA, "cache")  # or, if that cannot be written, in the home folder
CACHE = CACHE if os.access(CACHE if CACHE.exists() else DATA, os.W_OK) else Path.home() / ".cache/gans"
FACES = {"epochs": 48, "instance_noise": 0.5}  # settings for the cartoons, where none are given
CELEBA = Path("celeba", "img_align_celeba")  # where torchvision has its pictures, in --data-dir


def add_flags(add):
    """The flags, this script's own first; `add` is argparse's parser.add_argument."""
    add("--instance-noise", type=float, default=0.0, help="std of noise on all D sees; faces: 0.5")
    add("--noise-epochs", type=int, help="epochs over which that noise fades to 0; None: all")
    add("--epochs", type=int, default=5, help="passes over the training images; faces: 48")
    add("--lr-g", type=float, default=2e-4, help="Adam's learning rate for the generator")
    add("--lr-d", type=float, default=2e-4, help="Adam's learning rate for the discriminator")
    add("--batch-size", type=int, default=128, help="images per step")
    add("--latent-dim", type=int, default=100, help="length of the noise vector z")
    choices = ["celeba", "faces", "folder", "fashion_mnist", "mnist", "cifar10"]
    add("--dataset", choices=choices, help="None: celeba if it is there, else faces, which are cartoons")
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
    """Weights from N(0, 0.02^2), those of batch normalisation from N(1, 0.02^2), biases 0."""
    if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)):
        nn.init.normal_(module.weight, 0.0, 0.02)
    elif isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
        nn.init.normal_(module.weight, 1.0, 0.02)
    if getattr(module, "bias", None) is not None:
        nn.init.zeros_(module.bias)


# %% Losses
def discriminator_loss(real_logits, fake_logits):
    """L_D = -E[log D(x)] - E[log(1 - D(G(z)))]."""
    real_loss = F.binary_cross_entropy_with_logits(real_logits, torch.ones_like(real_logits))
    fake_loss = F.binary_cross_entropy_with_logits(fake_logits, torch.zeros_like(fake_logits))
    return real_loss + fake_loss


def generator_loss(fake_logits):
    """L_G = -E[log D(G(z))], the non-saturating loss."""
    return F.binary_cross_entropy_with_logits(fake_logits, torch.ones_like(fake_logits))


# %% Training step
def bare(network):
    """The network itself, without the DistributedDataParallel around it if there is one."""
    return getattr(network, "module", network)


def train_step(generator, discriminator, optimizer_g, optimizer_d, real, noise_std=0.0, precision="fp32"):
    """One step of D, then one of G, on images `real` (N, C, 64, 64) in [-1, 1]. Returns the metrics."""
    bf16 = precision == "bf16"

    def noisy(images):
        return images + noise_std * torch.randn_like(images) if noise_std else images

    # D learns to tell real from fake. Detached, the fakes carry no gradient back to G.
    with torch.autocast(real.device.type, torch.bfloat16, enabled=bf16):
        fake = generator(torch.randn(len(real), bare(generator).latent_dim, device=real.device))
        # Real and fake go through D separately: batch normalisation must not mix them.
        real_logits = discriminator(noisy(real)).float()
        fake_logits = discriminator(noisy(fake.detach())).float()
    d_loss = discriminator_loss(real_logits, fake_logits)
    optimizer_d.zero_grad()
    d_loss.backward()
    optimizer_d.step()

    # G learns to fool the updated D, which is frozen now; the fakes are the same. The bare D, because
    # DistributedDataParallel would wait for its gradients.
    discriminator.requires_grad_(False)
    with torch.autocast(real.device.type, torch.bfloat16, enabled=bf16):
        g_loss = generator_loss(bare(discriminator)(noisy(fake)).float())
    optimizer_g.zero_grad()
    g_loss.backward()
    optimizer_g.step()
    discriminator.requires_grad_(True)

    metrics = {"d_loss": d_loss, "g_loss": g_loss}
    metrics |= {"d_real": real_logits.sigmoid().mean(), "d_fake": fake_logits.sigmoid().mean()}
    return {name: value.detach() for name, value in metrics.items()}  # .item() would wait for the GPU


# %% Training
def build(args):
    """The networks and optimisers of a run, by the names of train_step's arguments."""
    torch.manual_seed(args.seed)
    channels = 1 if "mnist" in args.dataset else 3
    generator, discriminator = Generator(args.latent_dim, channels), Discriminator(channels)
    layout = torch.contiguous_format if "mps" in args.device else torch.channels_last  # faster; wrong on mps
    for network in generator, discriminator:
        network.apply(init_weights)
        network.to(args.device, memory_format=layout)
    adam = {"betas": (0.5, 0.999), "fused": True}  # fused: faster
    return {
        "generator": generator,
        "discriminator": discriminator,
        "optimizer_g": torch.optim.Adam(generator.parameters(), args.lr_g, **adam),
        "optimizer_d": torch.optim.Adam(discriminator.parameters(), args.lr_d, **adam),
    }


def mirrored(images):
    """Each of the images (N, C, H, W) with probability 1/2 mirrored, left to right."""
    keep = torch.rand(len(images), 1, 1, 1, device=images.device) < 0.5
    return images.where(keep, images.flip(3))


def join(args):
    """Join the processes that torchrun has started. Returns this one's rank, their number, and the images."""
    if "LOCAL_RANK" not in os.environ:
        return 0, 1, load_images(args)
    if args.device.startswith("cuda"):
        torch.cuda.set_device(args.device)
    distributed.init_process_group(timeout=timedelta(hours=12))
    atexit.register(distributed.destroy_process_group)
    rank, world = distributed.get_rank(), distributed.get_world_size()
    if rank > 0:
        distributed.barrier()  # the first process downloads and decodes
    images = load_images(args)
    if rank == 0:
        distributed.barrier()
    return rank, world, images


def share(network, world):
    """The network, its gradients averaged over all processes."""
    # With broadcast_buffers, D's second pass would overwrite what the first has kept for backward.
    return DistributedDataParallel(network, broadcast_buffers=False) if world > 1 else network


def train(args):
    """Train from the start, or go on from the checkpoint args.resume; under torchrun, as one of many."""
    rank, world, images = join(args)
    batch_size = min(args.batch_size, len(images)) // world * world  # of all processes together
    if batch_size < 2 * world:
        fail("--batch-size, --limit: batch normalisation needs 2 images or more in a batch, for each process")
    parts = build(args)
    generator, history = parts["generator"], []  # history has the mean metrics of each epoch
    if args.resume:
        history = load_checkpoint(args.resume, **parts)["history"]  # and the parts are as they were
        parts["optimizer_g"].param_groups[0]["lr"] = args.lr_g  # but with the rates of now
        parts["optimizer_d"].param_groups[0]["lr"] = args.lr_d
    if len(history) >= args.epochs:
        fail(f"--epochs: {args.resume} has run {len(history)} already; ask for more")
    players = parts | {name: share(parts[name], world) for name in ("generator", "discriminator")}
    if rank == 0:
        if args.fid_every:
            import fid

            judge = fid.Judge(args.dataset, images, args.device, args.data_dir)  # may train a classifier
        folder = open_folder(args, f"runs/{SCRIPT}")
        (folder / "config.json").write_text(json.dumps(vars(args) | {"torch": torch.__version__}, indent=2))
        steps = len(images) // batch_size * args.epochs
        few = " (few: for better pictures raise --epochs)" if steps < 1000 else ""
        print(f"{args.dataset}: {len(images):,} images, {steps:,} steps{few}: {folder}", file=sys.stderr)

    for epoch in range(len(history) + 1, args.epochs + 1):
        torch.manual_seed(args.seed * 10_000 + epoch)  # so a resumed run draws the same numbers
        noise_std = args.instance_noise * max(0, 1 - (epoch - 1) / (args.noise_epochs or args.epochs))
        order = torch.randperm(len(images)).to(images.device)
        batches = order.split(batch_size)[: len(images) // batch_size]  # whole ones only
        if rank > 0:
            torch.manual_seed(torch.initial_seed() + 10**9 * rank)  # the same order, but noise of its own
        metrics, start = [], time.perf_counter()
        for batch in tqdm(batches, f"epoch {epoch}", leave=False, disable=rank > 0):
            real = images[batch.chunk(world)[rank]].to(args.device) / 127.5 - 1
            real = mirrored(real) if args.flip else real
            metrics.append(train_step(**players, real=real, noise_std=noise_std, precision=args.precision))

        if rank > 0:
            continue  # the first process reports, from its share, and saves for all
        means = {name: torch.stack([step[name] for step in metrics]).mean().item() for name in metrics[0]}
        history.append({"epoch": epoch} | means)
        text = "  ".join(f"{name} {value:.3f}" for name, value in means.items())
        print(f"epoch {epoch}/{args.epochs}  {text}  {time.perf_counter() - start:.0f} s", flush=True)
        draw(generator, folder, epoch, args)
        if args.fid_every and epoch % args.fid_every == 0:
            fid.track(judge, lambda n: sample(generator, torch.randn(n, args.latent_dim)), folder, epoch)
        save(parts, history, folder, args)
        plot(history, folder, last=epoch == args.epochs)


# %% Data, pictures, files
def fail(message, status=2):
    """End the program with one line on stderr."""
    tqdm.write(f"{SCRIPT}.py: {message}", file=sys.stderr)
    raise SystemExit(status) from None


def load_images(args):
    """The training images as bytes (N, C, 64, 64), on the device; those of a folder stay in a file."""
    if args.dataset in ("celeba", "folder"):
        return map_folder(args)
    images = read_sheets(args) if args.dataset == "faces" else read_dataset(args)
    torch.manual_seed(args.seed)
    chunks = images[torch.randperm(len(images))[: args.limit or None]].split(
        1000
    )  # resize makes floats of a chunk
    return torch.cat([resize(chunk, [64, 64], antialias=True) for chunk in chunks]).to(args.device)


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


def draw(generator, folder, epoch, args):
    """Write the samples of an epoch, always from the same z, and interpolation.png."""
    (folder / "samples").mkdir(exist_ok=True)
    rng = torch.Generator().manual_seed(args.seed)  # leaves training's random numbers alone
    z = torch.randn(64, args.latent_dim, generator=rng)
    save_image(sample(generator, z), folder / "samples" / f"epoch_{epoch:04d}.png", nrow=8)
    t = torch.linspace(0, math.pi / 2, 10)[:, None]  # cos^2 + sin^2 = 1: each z on the arc is from N(0, I)
    walks = [t.cos() * z1 + t.sin() * z2 for z1, z2 in z[:16].split(2)]  # 8 walks, each (10, latent_dim)
    save_image(sample(generator, torch.cat(walks)), folder / "interpolation.png", nrow=10)


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
            torch.save({name: checkpoint[name] for name in ("generator", "script", "settings")}, tmp)
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
    """The generator of a checkpoint, for any program: sample(load_generator(path), torch.randn(64, 100))."""
    settings = load_checkpoint(path)["settings"]
    generator = Generator(settings["latent_dim"], 1 if "mnist" in settings["dataset"] else 3)
    load_checkpoint(path, generator=generator)
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


def map_folder(args):
    """Pictures as bytes (N, 3, 64, 64), mapped into memory from a file in CACHE: they may be many."""
    folder = Path(args.data_dir, CELEBA if args.dataset == "celeba" else "").resolve()
    try:
        if args.dataset == "celeba" and not folder.is_dir():
            datasets.CelebA(args.data_dir, download=True)
    except Exception as error:  # many types are possible
        hint = "unpack img_align_celeba.zip there yourself, or take --dataset faces or folder"
        fail(f"--data-dir: no {folder}; a quota often stops the download: {hint} ({error!r:.300})")
    paths = list_pictures(folder)
    torch.manual_seed(args.seed)
    paths = [paths[number] for number in sorted(torch.randperm(len(paths))[: args.limit or None].tolist())]
    stats = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in paths]
    cache = CACHE / f"{hashlib.sha256(repr([3, 64, 64, stats]).encode()).hexdigest()[:16]}.uint8"
    if not cache.exists():
        decode_all(paths, cache)
    images = torch.from_numpy(np.memmap(cache, np.uint8, mode="c")).view(-1, 3, 64, 64)
    if args.resume and getattr(args, "images", len(images)) != len(images):
        tqdm.write(f"pictures have changed: {args.images:,} before, {len(images):,} now", file=sys.stderr)
    args.images = len(images)  # into the checkpoint
    return images


def decode_all(paths, cache):
    """Write the pixels of all pictures that can be read into the file `cache`."""
    CACHE.mkdir(parents=True, exist_ok=True)
    tmp = cache.with_suffix(f".{os.getpid()}")  # another process may decode the same
    try:
        with ThreadPool(min(8, os.cpu_count() or 1, len(paths) or 1)) as pool, open(tmp, "wb") as file:
            for image in tqdm(pool.imap(lambda path: decode(path, 64), paths), "decoding", len(paths)):
                if image is not None:
                    file.write(image.tobytes())
        if tmp.stat().st_size == 0:
            fail("--data-dir: no picture there can be read; check the path")
        tmp.replace(cache)
    finally:
        tmp.unlink(missing_ok=True)


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
    if (args.resume, args.checkpoint) != (None, None):
        parser.set_defaults(**load_checkpoint(args.resume or args.checkpoint)["settings"])
    else:
        dataset = args.dataset or ("celeba" if Path(args.data_dir, CELEBA).is_dir() else "faces")
        parser.set_defaults(dataset=dataset)
        if dataset == "faces":
            parser.set_defaults(**FACES)
    args = parser.parse_args(argv)  # with the new defaults
    for name, value in vars(args).items():
        lowest = 0 if type(value) is float or name in ("seed", "limit", "fid_every") else 1  # counts: from 1
        if type(value) in (int, float) and not lowest <= value < 10**12:
            fail(f"--{name.replace('_', '-')}: give a number from {lowest} to 10**12")
    if args.fid_every and not args.checkpoint and not Path(DATA).with_name("fid.py").exists():
        fail("--fid-every: put fid.py of the same collection beside this script")
    auto = args.device == "auto"
    if auto:
        args.device = accelerator.current_accelerator().type if accelerator.is_available() else "cpu"
    if args.device.startswith("cuda") and "LOCAL_RANK" in os.environ:
        args.device = f"cuda:{os.environ['LOCAL_RANK']}"  # the GPU that torchrun means for this process
    try:
        torch.zeros(1, device=args.device).item()
    except Exception as error:  # many types are possible
        if not auto or "LOCAL_RANK" in os.environ:
            fail(f"--device: there is no {args.device} on this machine; give cpu, or leave it out")
        tqdm.write(f"on cpu: {args.device} does not work here ({error!r:.150})", file=sys.stderr)
        args.device = "cpu"
    return args


def generate(args):
    """Write args.generate images as PNG files, drawn by the generator in args.checkpoint."""
    generator = load_generator(args.checkpoint, args.device)
    folder = open_folder(args, Path(args.checkpoint).parent / "generated")
    torch.manual_seed(args.seed)
    z = torch.randn(args.generate, generator.latent_dim)
    for number, image in enumerate(sample(generator, z)):
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
