"""DCGAN for 32x32 images with the Wasserstein loss, and spectral normalisation of its critic.

    python dcgan32_wgan_sn.py                       # 20,000 steps of Fashion-MNIST
    python dcgan32_wgan_sn.py --epochs 5 --device cuda
    python dcgan32_wgan_sn.py --dataset cifar10     # the same networks in colour

A critic C must not be steep. wgan_gp.py asks for that with a penalty, which needs a gradient of a gradient in
every step. Could the bound be built into the layers instead? A convolution is a linear map, and stretches by
its largest singular value at most. Spectral normalisation writes a layer's 5x5 kernels as a matrix (outputs,
inputs x 25) and divides by its largest singular value, estimated with a vector that is multiplied with the
matrix once at each use (power iteration). LeakyReLU stretches by 1 at most, so a product over the layers
bounds the slope of C. Not by 1, for the matrix is not the whole convolution: at stride 2 a pixel lies in up
to nine 5x5 windows, so a layer may stretch by 3, the root of nine.

With a bound, the loss of wgan_gp.py needs no penalty. C maximises and G minimises

    E[C(x)] - E[C(G(z))]

Over K-Lipschitz C (slope at most K), the maximum is K times the Wasserstein distance. With no bound C gains
by just scaling its scores up. Three seeds could not tell what that costs (RESULTS.md, spectral-norm).

One kind of layer spoils this: batch normalisation in C. It divides by a standard deviation, which undoes the
bound, and it normalises real and fake batches apart, so that their scores come from two different functions,
and the difference is not a distance. We keep it because the samples are far better: after 20,000 steps, in
one seed, their distance from real images (fid.py) was 34 with it, and 102 without (--critic-norm none).
Beside it the bound did not help: 147 with it after 4,000 steps, 130 without (--no-spectral-norm; medians of
three seeds).

What is new against dcgan_mnist.py: this loss; a deeper C, of 64 channels and kernels of 5; fresh noise
for G's step; z from the cube U(-1, 1)^100, where straight walks stay inside; one more upsampling; batches
of 32; rates of 3e-4 for G and 6e-4 for C.

What to watch: stages.png, the samples after 200, 4,000, 8,000 and 20,000 steps. c_real and c_fake, C's mean
scores, drift apart, and `slope`, that of C at fakes, rises while the samples get better and better: none of
these figures tells how good G is.

Papers: Arjovsky et al. 2017, arXiv 1701.07875, equation 2; Miyato et al. 2018, arXiv 1802.05957, algorithm 1;
Radford et al. 2015, arXiv 1511.06434. Departures: from the first, no clipping, Adam, one step of C for one of
G; from the second, this loss, batch normalisation in C; from the third, PyTorch's initialisation.
"""

import argparse
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
from PIL import Image, ImageDraw
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm
from torchvision import datasets
from torchvision.transforms.functional import to_pil_image
from torchvision.utils import make_grid
from tqdm import tqdm

# %% Settings


def add_flags(add):
    """The flags, those of this script's idea first; `add` is argparse's parser.add_argument."""
    add("--critic-norm", choices=["batch", "none"], default="batch", help="batch normalisation in the critic")
    add("--no-spectral-norm", action="store_true", help="leave the critic's slope unbounded")
    add("--epochs", type=int, default=11, help="passes over the training set")
    add("--max-steps", type=int, default=20000, help="stop after this many steps, if that comes sooner")
    add("--lr-g", type=float, default=3e-4, help="Adam's learning rate for the generator")
    add("--lr-d", type=float, default=6e-4, help="Adam's learning rate for the critic")
    add("--batch-size", type=int, default=32, help="images per step")
    add("--latent-dim", type=int, default=100, help="length of the noise vector z")
    choices = ["fashion_mnist", "mnist", "cifar10"]
    add("--dataset", choices=choices, default="fashion_mnist", help="what to train on")
    add("--data-dir", default="data", help="where the data set is, or torchvision downloads it to")
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


MAY_BE_ZERO = []  # of the flags that are numbers


# %% Networks


class Generator(nn.Module):
    """Noise z (N, latent_dim) to images (N, channels, 32, 32) in [-1, 1]."""

    def __init__(self, latent_dim=100, channels=1):
        super().__init__()
        self.latent_dim = latent_dim
        self.layers = nn.Sequential(
            nn.Unflatten(1, (latent_dim, 1, 1)),  # (N, latent_dim, 1, 1)
            nn.ConvTranspose2d(latent_dim, 256, 4, stride=1, padding=0, bias=False),  # (N, 256, 4, 4)
            nn.BatchNorm2d(256),
            nn.ReLU(),
            nn.ConvTranspose2d(256, 128, 4, stride=2, padding=1, bias=False),  # (N, 128, 8, 8)
            nn.BatchNorm2d(128),
            nn.ReLU(),
            nn.ConvTranspose2d(128, 64, 4, stride=2, padding=1, bias=False),  # (N, 64, 16, 16)
            nn.BatchNorm2d(64),
            nn.ReLU(),
            nn.ConvTranspose2d(64, channels, 4, stride=2, padding=1, bias=False),  # (N, channels, 32, 32)
            nn.Tanh(),
        )

    def forward(self, z):
        return self.layers(z)


class Critic(nn.Module):
    """Images (N, channels, 32, 32) to scores (N, 1), unbounded; `norm` is batch or none."""

    def __init__(self, channels=1, norm="batch", spectral=True):
        super().__init__()
        bias = norm == "none"  # which batch normalisation would cancel
        normalise = nn.Identity if bias else nn.BatchNorm2d
        self.layers = nn.Sequential(
            nn.Conv2d(channels, 64, 5, stride=2, padding=2),  # (N, 64, 16, 16)
            nn.LeakyReLU(0.2),
            nn.Conv2d(64, 128, 5, stride=2, padding=2, bias=bias),  # (N, 128, 8, 8)
            normalise(128),
            nn.LeakyReLU(0.2),
            nn.Conv2d(128, 256, 5, stride=2, padding=2, bias=bias),  # (N, 256, 4, 4)
            normalise(256),
            nn.LeakyReLU(0.2),
            nn.Conv2d(256, 1, 5, stride=2, padding=1, bias=False),  # (N, 1, 1, 1); a bias would cancel out
            nn.Flatten(),  # (N, 1)
        )
        for layer in self.layers:
            if spectral and isinstance(layer, nn.Conv2d):
                spectral_norm(layer)  # divides the weight by its largest singular value, found in fp32
                power = layer.parametrizations.weight[0]  # does the power iteration; autocast would round it
                power.forward = torch.autocast("cuda", enabled=False)(power.forward)

    def forward(self, images):
        return self.layers(images)


# %% Losses


def critic_loss(real_scores, fake_scores):
    """E[C(G(z))] - E[C(x)]: to lower it, the critic spreads the scores of real and fake apart."""
    return fake_scores.mean() - real_scores.mean()


def generator_loss(fake_scores):
    """-E[C(G(z))]."""
    return -fake_scores.mean()


# %% Training step

# What a step reports, grouped by the panels of losses.png.
PANELS = {"score": ("c_real", "c_fake"), "slope": ("slope",), "diversity": ("diversity",)}
METRICS = [name for names in PANELS.values() for name in names]


def uniform(*shape, **options):
    """Noise from U(-1, 1)."""
    return torch.rand(*shape, **options) * 2 - 1


def train_step(generator, critic, optimizer_g, optimizer_c, real):
    """Update the critic, then the generator, on a batch `real` (N, C, 32, 32) in [-1, 1].

    Returns the METRICS, detached.
    """
    # The critic learns to tell how far apart real and fake are; the generator is left out of the graph.
    with torch.no_grad():
        fake = generator(uniform(len(real), generator.latent_dim, device=real.device))
    real_scores, fake_scores = critic(real), critic(fake)
    c_loss = critic_loss(real_scores, fake_scores)
    optimizer_c.zero_grad()
    c_loss.backward()
    optimizer_c.step()

    # The generator takes one step, on fresh noise, towards fakes to which the critic gives higher scores.
    critic.requires_grad_(False)
    fake = generator(uniform(len(real), generator.latent_dim, device=real.device))
    fake.retain_grad()
    g_loss = generator_loss(critic(fake))
    optimizer_g.zero_grad()
    g_loss.backward()
    optimizer_g.step()
    critic.requires_grad_(True)
    return {
        "c_real": real_scores.detach().mean(),
        "c_fake": fake_scores.detach().mean(),
        # Length of the gradient of the sum of scores at a fake; g_loss is their mean, so times N.
        "slope": len(fake) * fake.grad.flatten(1).norm(dim=1).mean(),
        # Root mean square distance of two fakes, over that of two real images: 0 if all fakes are alike.
        "diversity": (fake.detach().var(0, correction=0).mean() / real.var(0, correction=0).mean()).sqrt(),
    }


# %% Training

SCRIPT = Path(__file__).stem
LOG_EVERY = 20  # steps between rows of history.csv
STAGES = 200, 4000, 8000, 20000  # steps after which stages.png grows by a grid
SAVE_EVERY = 60  # seconds between checkpoints inside an epoch
TRACKED = {"of samples": ("distance",), "share": ("precision", "recall")}  # what --fid-every measures
DISTANCES = [name for names in TRACKED.values() for name in names]


def read_images(name, data_dir):
    """The training images, uint8 (N, C, 32, 32); digits and garments, which have 28x28 pixels, are padded."""
    kinds = {"fashion_mnist": datasets.FashionMNIST, "mnist": datasets.MNIST, "cifar10": datasets.CIFAR10}
    try:
        images = torch.as_tensor(kinds[name](data_dir, download=True).data)
    except Exception as error:  # its type depends on where torchvision stumbles
        folder = Path(data_dir, getattr(kinds[name], "base_folder", f"{kinds[name].__name__}/raw"))
        fail(f"--data-dir: put the files of {name} in {folder} ({error!r:.90})")
    return images.movedim(3, 1) if images.ndim == 4 else F.pad(images[:, None], [2] * 4)


def write_stage(folder, step, grid):
    """Save the grid (C, H, W) of this step, and stages.png with all such grids side by side."""
    to_pil_image(grid).save(folder / "samples" / f"step_{step:05d}.png")
    paths = sorted((folder / "samples").glob("step_*.png"))
    width, height = Image.open(paths[0]).size
    joined = Image.new("RGB", (len(paths) * width, height + 14), "white")
    for i, path in enumerate(paths):
        ImageDraw.Draw(joined).text((i * width + 4, 1), f"after step {int(path.stem[5:])}", "black")
        joined.paste(Image.open(path), (i * width, 14))
    joined.save(folder / "stages.png")


def picture_noise(args):
    """What the pictures show each time: 64 vectors z, and eight straight walks of ten, from z1 to z2."""
    reseed(args.seed, "samples")
    z = uniform(64, args.latent_dim).to(args.device)
    weight = torch.linspace(0, 1, 10, device=args.device)[:, None]
    return z, torch.cat([torch.lerp(z1, z2, weight) for z1, z2 in z[:16].split(2)])


def track(judge, generator, args, step):
    """Measure args.fid_samples samples, of the same noise each time; a row of the step and what was found."""
    reseed(args.seed, "distance")
    z = uniform(args.fid_samples, args.latent_dim).to(args.device)
    found = judge(sample(generator, z))
    print("  " + "  ".join(f"{name} {value:.3f}" for name, value in zip(DISTANCES, found)), flush=True)
    return torch.tensor([[step, *found]])


def train(args):
    """Train from the start, or go on from the checkpoint args.resume."""
    images, size = read_images(args.dataset, args.data_dir).to(args.device), args.batch_size
    if not 2 <= size <= len(images):
        fail(f"--batch-size: {size} is not from 2 to {len(images)}, the number of images")
    channels, steps_per_epoch = images.shape[1], len(images) // size  # the last, short batch is dropped
    last_step = min(args.epochs * steps_per_epoch, args.max_steps or sys.maxsize)

    torch.manual_seed(args.seed)
    generator = place(Generator(args.latent_dim, channels), args)
    critic = place(Critic(channels, args.critic_norm, not args.no_spectral_norm), args)
    optimizer_g = torch.optim.Adam(generator.parameters(), args.lr_g, betas=(0.5, 0.999), fused=True)
    optimizer_c = torch.optim.Adam(critic.parameters(), args.lr_d, betas=(0.5, 0.999), fused=True)
    parts = {"generator": generator, "critic": critic}
    parts |= {"optimizer_g": optimizer_g, "optimizer_c": optimizer_c}  # the order of train_step's arguments

    fixed_z, walk_z = picture_noise(args)
    checkpoint = load_checkpoint(args.resume, **parts) if args.resume else {}
    history = checkpoint.get("history", torch.empty(0, len(METRICS))).to(args.device)  # a row for each step
    distances = checkpoint.get("distances", torch.empty(0, 4))  # a row for each time that they were measured
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
            grid, walk = make_grid(sample(generator, fixed_z), 8), make_grid(sample(generator, walk_z), 10)
            to_pil_image(grid[:channels]).save(folder / "samples" / f"epoch_{number:04d}.png")
            to_pil_image(walk[:channels]).save(folder / "interpolation.png")
            if judge and done == 0 and epoch % args.fid_every == 0 and step not in distances[:, 0]:
                distances = torch.cat([distances, track(judge, generator, args, step)])
                saved_at = save(folder, args, history, distances, parts)
            if number % max(1, number // 20) == 0 or step >= last_step:  # slow: ever more rarely
                write_report(folder, history, distances, steps_per_epoch)
        if step >= last_step:
            break

        reseed(args.seed, "order", epoch)
        batches = torch.randperm(len(images)).to(args.device).split(size)
        batches = batches[done : min(steps_per_epoch, done + last_step - step)]  # those still to do
        history = torch.cat([history, history.new_zeros(len(batches), len(METRICS))])
        name = f"epoch {epoch + 1}/{args.epochs}"
        bar = tqdm(batches, name, steps_per_epoch, leave=False, initial=done, unit=" images", unit_scale=size)
        for index in bar:
            real = images[index].float().div_(127.5).sub_(1)
            reseed(args.seed, "step", step)
            metrics = train_step(*parts.values(), real)
            history[step] = torch.stack([*metrics.values()])
            step += 1
            if step in STAGES:
                write_stage(folder, step, make_grid(sample(generator, fixed_z), 8)[:channels])
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
    """Write args.generate images, made by the generator in args.checkpoint, as PNG files."""
    generator = place(Generator(args.latent_dim, 3 if args.dataset == "cifar10" else 1), args)
    load_checkpoint(args.checkpoint, generator=generator)
    folder = open_folder(args, Path(args.checkpoint).parent / "generated")
    reseed(args.seed, "generate")
    for start in tqdm(range(0, args.generate, 256), unit=" images", unit_scale=256):
        z = uniform(256, args.latent_dim).to(args.device)  # 256, so that no image depends on N
        for number, image in enumerate(sample(generator, z)[: args.generate - start], start):
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
