"""DCGAN: a generator and a discriminator made of convolutions, and the recipe that lets them learn; 28x28.

    python dcgan_mnist.py                           # 25 epochs of MNIST, into runs/dcgan_mnist/001
    python dcgan_mnist.py --epochs 5 --device cuda
    python dcgan_mnist.py --generate 100 --checkpoint runs/dcgan_mnist/001/checkpoint.pt

Fully connected networks do not know that neighbouring pixels belong together. Convolutions do, but GANs made
of them were hard to train. DCGAN is the recipe that worked. Strided convolutions instead of pooling; fully
connected layers only first in G and last in D; batch normalisation everywhere but at G's output and D's
input; ReLU in G, LeakyReLU in D; weights with a deviation of 0.02; Adam with beta1 = 0.5 and a learning rate
of 2e-4 (here 2e-3). The losses are those of vanilla_gan.py, but for real images D is to answer r, not 1:

    L_D = -E[r log D(x) + (1 - r) log(1 - D(x))] - E[log(1 - D(G(z)))]        with r = 0.9
    L_G = -E[log D(G(z))]

This one-sided label smoothing is meant to keep D from being too sure. Whether it helps is open (RESULTS.md).
With p and q for the densities of real and generated images, the best D is now r p / (p + q). If G were
perfect, D would say 0.45: L_D = 1.38, L_G = 0.80. If D sees through every fake, L_D is 0.33.

What D can see. In the form that tutorials copy (--shallow), D has two convolutions. Their output has 7x7
places; each depends on 10x10 pixels, its receptive field, and the last layer adds up what the places say. So
this D judges patches: whether parts of a digit that share no patch go together, it cannot know. Try it
(claims.py --extra sight): blank ten rows in the middle of all digits, so that no place sees both halves, and
give half of them the lower half of another digit. Trained to tell the two kinds apart, D is right as often as
a coin. With a third convolution a place sees up to 22x22 pixels, most of a digit, and D is right in 85% of
the cases (both with 64 channels). So D has three here. By the distance of fid.py (real digits: 4.8), ten
epochs led to 97; with two convolutions, as wide and at equal rates, to 300; with a third one of 1x1 pixels,
as deep and as blind, to 297 (medians of three seeds; the rates were chosen for three convolutions). By
default both G and D are narrow, to be fast: D's first layer has 16 channels, not 64.

What to watch: the samples, because the losses do not tell how good they are. L_G says how G does against a D
that learns, too: from the first epoch to the last it more than doubled, and the digits got better. Nor are
spikes of L_G a bad sign: with 2e-4, five epochs had fewer spikes but worse digits. After each epoch the
script looks for two failures. D wins: on average D(x) is above 0.9 r and D(G(z)) below 0.02 (--lr-g 1e-5
provokes it). Mode collapse: G draws nearly the same for any z, and `diversity`, how far apart samples are (1:
as far as real images), falls below 0.5. (If it draws only ones, that need not be so: look.)

Paper: Radford et al. 2015, arXiv 1511.06434. Departures: rates of 2e-3; fewer and narrower layers; kernels of
4, not 5; z normal, not uniform; D's target is smoothed (Salimans et al. 2016, arXiv 1606.03498); G's step
uses the fakes of D's step again. dcgan64_celeba.py explains --instance-noise.
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
    add("--real-label", type=float, default=0.9, help="D's target for real images, at most 1")
    add("--instance-noise", type=float, default=0.0, help="std of noise on D's input at first; it falls to 0")
    add("--noise-epochs", type=int, help="epochs that this takes; None: as many as --epochs says at first")
    add("--shallow", action="store_true", help="D without its third convolution, as in tutorials")
    add("--width", type=int, help="channels of D's first convolution; None: 64 with --shallow, else 16")
    add("--refine", action="store_true", help="a generator with one more block, at full resolution")
    add("--epochs", type=int, default=25, help="passes over the training set")
    add("--max-steps", type=int, help="stop after this many steps, if that comes sooner")
    add("--lr-g", type=float, help="Adam's learning rate for G; None: 2e-4 with --shallow, else 2e-3")
    add("--lr-d", type=float, help="Adam's learning rate for D; None: 2e-4 with --shallow, else 2e-3")
    add("--batch-size", type=int, default=128, help="images per step")
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


MAY_BE_ZERO = ["instance_noise"]  # of the flags that are numbers


# %% Networks


class Generator(nn.Module):
    """Noise z (N, latent_dim) to images (N, 1, 28, 28) in [-1, 1]; `refine` adds a block at full size."""

    def __init__(self, latent_dim=100, width=16, refine=False):
        super().__init__()
        w = width
        self.latent_dim = latent_dim
        layers = [
            nn.Linear(latent_dim, 4 * w * 7 * 7),  # (N, 196w)
            nn.BatchNorm1d(4 * w * 7 * 7),
            nn.ReLU(),
            nn.Unflatten(1, (4 * w, 7, 7)),  # (N, 4w, 7, 7)
            nn.ConvTranspose2d(4 * w, 2 * w, 4, stride=2, padding=1, bias=False),  # (N, 2w, 14, 14)
            nn.BatchNorm2d(2 * w),
            nn.ReLU(),
        ]
        if refine:
            layers += [
                nn.ConvTranspose2d(2 * w, w, 4, stride=2, padding=1, bias=False),  # (N, w, 28, 28)
                nn.BatchNorm2d(w),
                nn.ReLU(),
                nn.ConvTranspose2d(w, 1, 3, stride=1, padding=1),  # (N, 1, 28, 28)
            ]
        else:
            layers += [nn.ConvTranspose2d(2 * w, 1, 4, stride=2, padding=1)]  # (N, 1, 28, 28)
        self.layers = nn.Sequential(*layers, nn.Tanh())

    def forward(self, z):
        return self.layers(z)


class Discriminator(nn.Module):
    """Images (N, 1, 28, 28) to logits (N, 1); the sigmoid of a logit is the probability of "real".

    What enters the linear layer has seen up to 22x22 pixels; without the third convolution (`shallow`) 10x10.
    """

    def __init__(self, width=16, shallow=False):
        super().__init__()
        w = width
        layers = [
            nn.Conv2d(1, w, 4, stride=2, padding=1),  # (N, w, 14, 14)
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

    def forward(self, images):
        return self.layers(images)


def init_weights(module):
    """Weights from N(0, 0.02), those of batch normalisation from N(1, 0.02), biases 0."""
    if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)):
        nn.init.normal_(module.weight, 0.0, 0.02)
    elif isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
        nn.init.normal_(module.weight, 1.0, 0.02)
    if getattr(module, "bias", None) is not None:
        nn.init.zeros_(module.bias)


# %% Losses


def discriminator_loss(real_logits, fake_logits, real_label=0.9):
    """-E[r log D(x) + (1 - r) log(1 - D(x))] - E[log(1 - D(G(z)))], with r = real_label."""
    real_loss = F.binary_cross_entropy_with_logits(real_logits, torch.full_like(real_logits, real_label))
    return real_loss + F.binary_cross_entropy_with_logits(fake_logits, torch.zeros_like(fake_logits))


def generator_loss(fake_logits):
    """The non-saturating loss -E[log D(G(z))]; its target is a plain 1, whatever the discriminator's is."""
    return F.binary_cross_entropy_with_logits(fake_logits, torch.ones_like(fake_logits))


# %% Training step

# What a step reports, grouped by the panels of losses.png.
PANELS = {"loss": ("d_loss", "g_loss"), "probability": ("d_real", "d_fake"), "diversity": ("diversity",)}
METRICS = [name for names in PANELS.values() for name in names]


def train_step(generator, discriminator, optimizer_g, optimizer_d, real, real_label, noise_std):
    """Update the discriminator, then the generator, on a batch `real` (N, 1, 28, 28) in [-1, 1].

    What the discriminator sees has Gaussian noise of that std on it. Returns the METRICS, detached.
    """

    def noisy(images):
        return images + noise_std * torch.randn_like(images) if noise_std > 0 else images

    # The discriminator learns to tell real from fake. Detached, the fakes carry no gradient to the generator.
    fake = generator(torch.randn(len(real), generator.latent_dim, device=real.device))
    real_logits, fake_logits = discriminator(noisy(real)), discriminator(noisy(fake.detach()))
    d_loss = discriminator_loss(real_logits, fake_logits, real_label)
    optimizer_d.zero_grad()
    d_loss.backward()
    optimizer_d.step()

    # The generator learns to fool the updated discriminator, frozen here. The fakes still have their graph.
    discriminator.requires_grad_(False)
    g_loss = generator_loss(discriminator(noisy(fake)))
    optimizer_g.zero_grad()
    g_loss.backward()
    optimizer_g.step()
    discriminator.requires_grad_(True)

    return {
        "d_loss": d_loss.detach(),
        "g_loss": g_loss.detach(),
        "d_real": real_logits.detach().sigmoid().mean(),
        "d_fake": fake_logits.detach().sigmoid().mean(),
        # Root mean square distance of two fakes, over that of two real images: 0 if all fakes are alike.
        "diversity": (fake.detach().var(0, correction=0).mean() / real.var(0, correction=0).mean()).sqrt(),
    }


def diagnose(steps, real_label):
    """A list of remarks on the health of an epoch, from its METRICS (steps, 5); none if all seems well."""
    _, _, d_real, d_fake, diversity = steps.T
    remarks = []
    if d_real.mean() > 0.9 * real_label and d_fake.mean() < 0.02:
        remarks.append("discriminator too strong, never fooled: of what we tried, higher --lr-g helped most")
    if diversity[-20:].mean() < 0.5:
        remarks.append("mode collapse, samples are too alike")
    return remarks


# %% Training

SCRIPT = Path(__file__).stem
LOG_EVERY = 20  # steps between rows of history.csv
SAVE_EVERY = 60  # seconds between checkpoints inside an epoch
TRACKED = {"of samples": ("distance",), "share": ("precision", "recall")}  # what --fid-every measures
DISTANCES = [name for names in TRACKED.values() for name in names]


def read_images(name, data_dir):
    """The training images of MNIST or Fashion-MNIST, uint8 (60000, 1, 28, 28)."""
    kind = {"mnist": datasets.MNIST, "fashion_mnist": datasets.FashionMNIST}[name]
    try:
        return kind(data_dir, download=True).data[:, None]
    except Exception as error:  # its type depends on where torchvision stumbles
        fail(f"--data-dir: put the files of {name} in {Path(data_dir, kind.__name__, 'raw')} ({error!r:.90})")


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


def fill_in(args):
    """Choose the settings that were not given."""
    args.width = args.width or (64 if args.shallow else 16)
    args.lr_g = args.lr_g or (2e-4 if args.shallow else 2e-3)
    args.lr_d = args.lr_d or (2e-4 if args.shallow else 2e-3)
    args.noise_epochs = args.noise_epochs or args.epochs  # saved, so that a longer --resume changes nothing


def train(args):
    """Train from the start, or go on from the checkpoint args.resume."""
    if args.real_label > 1:
        fail(f"--real-label: {args.real_label} is not a probability; give one, above 0 and at most 1")
    images, size = read_images(args.dataset, args.data_dir).to(args.device), args.batch_size
    if not 2 <= size <= len(images):
        fail(f"--batch-size: {size} is not from 2 to {len(images)}, the number of images")
    steps_per_epoch = len(images) // size  # the last, short batch is dropped
    last_step = min(args.epochs * steps_per_epoch, args.max_steps or sys.maxsize)
    fill_in(args)

    torch.manual_seed(args.seed)
    generator = place(Generator(args.latent_dim, args.width, args.refine).apply(init_weights), args)
    discriminator = place(Discriminator(args.width, args.shallow).apply(init_weights), args)
    optimizer_g = torch.optim.Adam(generator.parameters(), args.lr_g, betas=(0.5, 0.999), fused=True)
    optimizer_d = torch.optim.Adam(discriminator.parameters(), args.lr_d, betas=(0.5, 0.999), fused=True)
    parts = {"generator": generator, "discriminator": discriminator}
    parts |= {"optimizer_g": optimizer_g, "optimizer_d": optimizer_d}  # the order of train_step's arguments

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
            noise_std = args.instance_noise * max(0, 1 - step / (args.noise_epochs * steps_per_epoch))
            reseed(args.seed, "step", step)
            metrics = train_step(*parts.values(), real, args.real_label, noise_std)
            history[step] = torch.stack([*metrics.values()])
            step += 1
            if step % LOG_EVERY == 0:
                bar.set_postfix_str(summary(history[step - LOG_EVERY : step]))
            if time.monotonic() > saved_at + SAVE_EVERY:
                saved_at = save(folder, args, history[:step], distances, parts)
        saved_at = save(folder, args, history, distances, parts)

        rows = history[epoch * steps_per_epoch :].cpu()
        means = summary(rows)
        print(f"{name}  {means}  {bar.format_dict['elapsed']:.0f} s", flush=True)
        for remark in diagnose(rows, args.real_label) if step >= 100 else ():  # G begins collapsed
            print(f"  {remark}", flush=True)
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
    generator = place(Generator(args.latent_dim, args.width, args.refine), args)
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
