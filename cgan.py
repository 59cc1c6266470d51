"""Conditional GAN: both networks are told the class, so that you can choose it; 28x28.

    python cgan.py                                  # 25 epochs of MNIST, into runs/cgan/001
    python cgan.py --epochs 5 --device cuda
    python cgan.py --generate 100 --checkpoint runs/cgan/001/checkpoint.pt --label 7

A GAN draws you a digit, but you cannot ask for a 7. The remedy is simple: each training image x has a class
y, and both players are told it. G draws from (z, y), and D judges the pair (x, y):

    L_D = -E[r log D(x, y) + (1 - r) log(1 - D(x, y))] - E[log(1 - D(G(z, y), y))]       with r = 0.9
    L_G = -E[log D(G(z, y), y)]

Nothing in these losses says "draw a 7". But D sees real images only with their own class, so a perfect 3
labelled 7 is as much a fake as a blot. To fool D, G has to draw what it is told. In each class this is
the game of dcgan_mnist.py: the best D answers r p / (p + q), where p and q are the densities of real and
generated images of that class.

What is new against dcgan_mnist.py: in G, ten learned numbers for the class are appended to z. In D, a learned
picture for the class is a second channel beside the image. Both are embeddings, tables with one row for each
class. The fakes are made for the classes of the real batch. --mlp uses a minimal generator, with one hidden
layer; --shallow is explained in dcgan_mnist.py.

What to watch: the grid of samples, with a row for each class and a column for each noise vector. What a
column has in common, slant and stroke width, is the style that z controls in every class. The losses tell
none of this. The classifier of fid.py does: in one run it recognised the class asked for in 93.5% of the
samples after an epoch, and in 99.4% at the end, as in real images. But accuracy is not quality. One run with
--shallow and --mlp reached 1.000 while all samples of a class looked alike, a mode collapse inside each
class.

`--generate N` writes one folder for each class, as torchvision's ImageFolder reads them; `--label 7` writes
that class alone.

Paper: Mirza and Osindero 2014, arXiv 1411.1784, equation 2. Departures: the networks and the recipe are
those of dcgan_mnist.py, with half its learning rate, 1e-3 (the paper: fully connected layers, maxout in
D, one-hot classes); D's target is smoothed to 0.9; batches of 64.
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
from PIL import Image
from torch import nn
from torchvision import datasets
from torchvision.transforms.functional import to_pil_image
from torchvision.utils import make_grid
from tqdm import tqdm

# %% Settings


def add_flags(add):
    """The flags, those of this script's idea first; `add` is argparse's parser.add_argument."""
    add("--label", choices=[*"0123456789"], help="the class that --generate makes; None: all in turn")
    add("--mlp", action="store_true", help="a minimal generator, with one hidden layer")
    add("--shallow", action="store_true", help="D without its third convolution, as in tutorials")
    add("--width", type=int, help="channels of D's first convolution; None: 64 with --shallow, else 16")
    add("--real-label", type=float, default=0.9, help="D's target for real images, at most 1")
    add("--epochs", type=int, default=25, help="passes over the training set")
    add("--max-steps", type=int, help="stop after this many steps, if that comes sooner")
    add("--lr-g", type=float, help="Adam's learning rate for G; None: 2e-4 with --shallow, else 1e-3")
    add("--lr-d", type=float, help="Adam's learning rate for D; None: 2e-4 with --shallow, else 1e-3")
    add("--batch-size", type=int, default=64, help="images per step")
    add("--latent-dim", type=int, default=100, help="length of the noise vector z")
    add("--dataset", choices=["mnist", "fashion_mnist"], default="mnist", help="what to train on")
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

CLASSES = 10


class Generator(nn.Module):
    """Noise z (N, latent_dim) and classes (N,) to images (N, 1, 28, 28) in [-1, 1]; `mlp`: a minimal one."""

    def __init__(self, latent_dim=100, width=16, mlp=False):
        super().__init__()
        w = width
        self.latent_dim = latent_dim
        self.embedding = nn.Embedding(CLASSES, CLASSES)  # (N,) to (N, 10)
        if mlp:
            self.layers = nn.Sequential(
                nn.Linear(latent_dim + CLASSES, 512),  # (N, 512)
                nn.BatchNorm1d(512),
                nn.ReLU(),
                nn.Linear(512, 784),  # (N, 784)
                nn.Tanh(),
                nn.Unflatten(1, (1, 28, 28)),  # (N, 1, 28, 28)
            )
        else:
            self.layers = nn.Sequential(
                nn.Linear(latent_dim + CLASSES, 4 * w * 7 * 7),  # (N, 196w)
                nn.BatchNorm1d(4 * w * 7 * 7),
                nn.ReLU(),
                nn.Unflatten(1, (4 * w, 7, 7)),  # (N, 4w, 7, 7)
                nn.ConvTranspose2d(4 * w, 2 * w, 4, stride=2, padding=1, bias=False),  # (N, 2w, 14, 14)
                nn.BatchNorm2d(2 * w),
                nn.ReLU(),
                nn.ConvTranspose2d(2 * w, 1, 4, stride=2, padding=1),  # (N, 1, 28, 28)
                nn.Tanh(),
            )

    def forward(self, z, classes):
        return self.layers(torch.cat((z, self.embedding(classes)), 1))


class Discriminator(nn.Module):
    """Images (N, 1, 28, 28) and their classes (N,) to logits (N, 1) of "a real image of that class".

    `shallow` leaves out the third convolution, as dcgan_mnist.py explains.
    """

    def __init__(self, width=16, shallow=False):
        super().__init__()
        w = width
        self.embedding = nn.Embedding(CLASSES, 28 * 28)  # (N,) to (N, 784)
        layers = [
            nn.Conv2d(2, w, 4, stride=2, padding=1),  # (N, w, 14, 14)
            nn.LeakyReLU(0.2),
            nn.Conv2d(w, 2 * w, 4, stride=2, padding=1, bias=False),  # (N, 2w, 7, 7)
            nn.BatchNorm2d(2 * w),
            nn.LeakyReLU(0.2),
        ]
        if shallow:
            layers += [nn.Flatten(), nn.Linear(2 * w * 7 * 7, 1)]  # (N, 98w), (N, 1)
        else:
            layers += [
                nn.Conv2d(2 * w, 4 * w, 4, stride=2, padding=1, bias=False),  # (N, 4w, 3, 3)
                nn.BatchNorm2d(4 * w),
                nn.LeakyReLU(0.2),
                nn.Flatten(),  # (N, 36w)
                nn.Linear(4 * w * 3 * 3, 1),  # (N, 1)
            ]
        self.layers = nn.Sequential(*layers)

    def forward(self, images, classes):
        channel = self.embedding(classes).view(-1, 1, 28, 28)  # the class as a picture of its own
        return self.layers(torch.cat((images, channel), 1))


def init_weights(module):
    """Weights from N(0, 0.02), those of batch normalisation from N(1, 0.02), biases 0; embeddings N(0, 1)."""
    if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)):
        nn.init.normal_(module.weight, 0.0, 0.02)
    elif isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
        nn.init.normal_(module.weight, 1.0, 0.02)
    if getattr(module, "bias", None) is not None:
        nn.init.zeros_(module.bias)


# %% Losses


def discriminator_loss(real_logits, fake_logits, real_label=0.9):
    """-E[r log D(x, y) + (1 - r) log(1 - D(x, y))] - E[log(1 - D(G(z, y), y))], with r = real_label."""
    real_loss = F.binary_cross_entropy_with_logits(real_logits, torch.full_like(real_logits, real_label))
    return real_loss + F.binary_cross_entropy_with_logits(fake_logits, torch.zeros_like(fake_logits))


def generator_loss(fake_logits):
    """The non-saturating loss -E[log D(G(z, y), y)]."""
    return F.binary_cross_entropy_with_logits(fake_logits, torch.ones_like(fake_logits))


# %% Training step

# What a step reports, grouped by the panels of losses.png.
PANELS = {"loss": ("d_loss", "g_loss"), "probability": ("d_real", "d_fake")}
METRICS = [name for names in PANELS.values() for name in names]


def train_step(generator, discriminator, optimizer_g, optimizer_d, real, classes, real_label):
    """Update the discriminator, then the generator, on a batch `real` (N, 1, 28, 28) in [-1, 1].

    `classes` (N,) are those of the real images; the fakes have the same. Returns the METRICS, detached.
    """
    # The discriminator learns to tell real from fake. Detached, the fakes carry no gradient to the generator.
    fake = generator(torch.randn(len(real), generator.latent_dim, device=real.device), classes)
    real_logits, fake_logits = discriminator(real, classes), discriminator(fake.detach(), classes)
    d_loss = discriminator_loss(real_logits, fake_logits, real_label)
    optimizer_d.zero_grad()
    d_loss.backward()
    optimizer_d.step()

    # The generator learns to fool the updated discriminator, frozen here. The fakes still have their graph.
    discriminator.requires_grad_(False)
    g_loss = generator_loss(discriminator(fake, classes))
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


# %% Training

SCRIPT = Path(__file__).stem
LOG_EVERY = 20  # steps between rows of history.csv
SAVE_EVERY = 60  # seconds between checkpoints inside an epoch
TRACKED = {"of samples": ("distance",), "share": ("precision", "recall")}  # what --fid-every measures
DISTANCES = [name for names in TRACKED.values() for name in names]


def read_images(name, data_dir):
    """The training images of MNIST or Fashion-MNIST, uint8 (60000, 1, 28, 28), and their classes (60000,)."""
    kind = {"mnist": datasets.MNIST, "fashion_mnist": datasets.FashionMNIST}[name]
    try:
        data = kind(data_dir, download=True)
    except Exception as error:  # its type depends on where torchvision stumbles
        fail(f"--data-dir: put the files of {name} in {Path(data_dir, kind.__name__, 'raw')} ({error!r:.90})")
    return data.data[:, None], data.targets


def picture_noise(args):
    """What the pictures show each time: in a row for each class the same ten vectors, or the same walk.

    Returns both as z (100, latent_dim), and the classes (100,).
    """
    reseed(args.seed, "samples")
    z = torch.randn(10, args.latent_dim).to(args.device)
    angle = torch.linspace(0, math.pi / 2, 10, device=args.device)[:, None]
    # A walk leads from z1 to z2. cos(a) z1 + sin(a) z2 is from N(0, I); a line would pass too close to 0.
    walk = angle.cos() * z[0] + angle.sin() * z[1]
    classes = torch.arange(CLASSES, device=args.device).repeat_interleave(10)
    return z.repeat(CLASSES, 1), walk.repeat(CLASSES, 1), classes


def track(judge, generator, args, step):
    """Measure args.fid_samples samples, of the same noise each time; a row of the step and what was found."""
    reseed(args.seed, "distance")
    z = torch.randn(args.fid_samples, args.latent_dim).to(args.device)
    classes = torch.arange(args.fid_samples, device=args.device) % CLASSES
    found = judge(sample(generator, z, classes))
    print("  " + "  ".join(f"{name} {value:.3f}" for name, value in zip(DISTANCES, found)), flush=True)
    return torch.tensor([[step, *found]])


def fill_in(args):
    """Choose the settings that were not given."""
    args.width = args.width or (64 if args.shallow else 16)
    args.lr_g = args.lr_g or (2e-4 if args.shallow else 1e-3)
    args.lr_d = args.lr_d or (2e-4 if args.shallow else 1e-3)


def train(args):
    """Train from the start, or go on from the checkpoint args.resume."""
    if args.real_label > 1:
        fail(f"--real-label: {args.real_label} is not a probability; give one, above 0 and at most 1")
    if args.label is not None:
        fail(f"--label: {args.label} is for --generate; leave it out")
    images, classes = (tensor.to(args.device) for tensor in read_images(args.dataset, args.data_dir))
    size = args.batch_size
    if not 2 <= size <= len(images):
        fail(f"--batch-size: {size} is not from 2 to {len(images)}, the number of images")
    steps_per_epoch = len(images) // size  # the last, short batch is dropped
    last_step = min(args.epochs * steps_per_epoch, args.max_steps or sys.maxsize)
    fill_in(args)

    torch.manual_seed(args.seed)
    generator = place(Generator(args.latent_dim, args.width, args.mlp).apply(init_weights), args)
    discriminator = place(Discriminator(args.width, args.shallow).apply(init_weights), args)
    optimizer_g = torch.optim.Adam(generator.parameters(), args.lr_g, betas=(0.5, 0.999), fused=True)
    optimizer_d = torch.optim.Adam(discriminator.parameters(), args.lr_d, betas=(0.5, 0.999), fused=True)
    parts = {"generator": generator, "discriminator": discriminator}
    parts |= {"optimizer_g": optimizer_g, "optimizer_d": optimizer_d}  # the order of train_step's arguments

    fixed_z, walk_z, rows = picture_noise(args)
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
            grid, walk = (make_grid(sample(generator, z, rows), 10) for z in (fixed_z, walk_z))
            to_pil_image(grid[:1]).save(folder / "samples" / f"epoch_{number:04d}.png")
            to_pil_image(walk[:1]).save(folder / "interpolation.png")  # make_grid has made grey RGB
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
            metrics = train_step(*parts.values(), real, classes[index], args.real_label)
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
    """Write args.generate images as PNG files, of class args.label or of all in turn, a folder for each."""
    generator = place(Generator(args.latent_dim, args.width, args.mlp), args)
    load_checkpoint(args.checkpoint, generator=generator)
    folder = open_folder(args, Path(args.checkpoint).parent / "generated")
    wanted = range(CLASSES) if args.label is None else [int(args.label)]
    for name in wanted[: args.generate]:  # ImageFolder wants no empty ones
        (folder / str(name)).mkdir()
    reseed(args.seed, "generate")
    for start in tqdm(range(0, args.generate, 256), unit=" images", unit_scale=256):
        z = torch.randn(256, args.latent_dim).to(args.device)  # 256, so that no image depends on N
        classes = torch.tensor([wanted[number % len(wanted)] for number in range(start, start + 256)])
        images = sample(generator, z, classes.to(args.device))[: args.generate - start]
        for number, (name, image) in enumerate(zip(classes.tolist(), images), start):
            to_pil_image(image).save(folder / str(name) / f"{number:05d}.png")
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
