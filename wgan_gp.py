"""WGAN-GP: a critic that measures a distance, its slope held near 1 by a penalty; 28x28.

    python wgan_gp.py                               # 25 epochs of MNIST, into runs/wgan_gp/001
    python wgan_gp.py --epochs 5 --device cuda
    python wgan_gp.py --dataset fashion_mnist

If the distributions of real and generated images do not overlap at all, some discriminator tells them apart
without fail. Then the Jensen-Shannon divergence of vanilla_gan.py is log 2, however far apart they are, and
the best D tells G nothing about where to go. The Wasserstein distance has no such plateau: it is the least
work that turns one pile of probability into the other, mass times distance moved, and it shrinks as the fakes
come closer. By a theorem of Kantorovich and Rubinstein it is also a maximum, over functions C of slope <= 1:

    W = max over C of   E[C(x)] - E[C(G(z))]

So a network C, the critic, is trained to find that maximum, and G to reduce it. How can the slope be held?
The first WGAN clipped every weight of C to a small interval. That bounds the slope, but by an unknown number,
and pushes C towards functions that are too simple. WGAN-GP leaves the weights alone and penalises each slope
that is not 1, at points between real images and fakes:

    x' = t x + (1 - t) G(z)   with t from U(0, 1), one for each pair
    L_C = E[C(G(z))] - E[C(x)] + 10 E[(|gradient of C at x'| - 1)^2]
    L_G = -E[C(G(z))]

Why there, and why 1? The cheapest move pairs real images with fakes, and on the line between the two of a
pair the best critic has slope 1. Nobody knows those pairs, so they are drawn at random: an approximation.

Most of what is new against dcgan_mnist.py: no probability, so no sigmoid and no logarithm; no batch
normalisation in the critic, since the penalty is about one image at a time; five steps of the critic, each on
a fresh batch, for one of G; Adam with betas (0, 0.9). The five steps bring C near the maximum, where it
measures W. But with one, samples were better after two and a half minutes (RESULTS.md, n-critic).

What to watch: the estimate E[C(x)] - E[C(G(z))]. In one run it fell from 2.1 after epoch 2 to 1.1 after epoch
25, and the distance of fid.py from 438 to 60. (At first it rises, though the digits get better: no estimate
is W itself. With one step of C for each of G, it does so for most of a short run.) L_G says nothing, because
C may add any constant to its scores. Compare estimates only between runs with the same critic, --n-critic and
--gp-weight. An epoch is one pass of the critic over the data, with one step of G for each five of C.

Paper: Gulrajani et al. 2017, arXiv 1704.00028, equation 3, proposition 1, algorithm 1; Arjovsky et al. 2017,
arXiv 1701.07875. Departures: learning rates of 2e-3, with --shallow 3e-4 (the paper: 1e-4); networks and
initialisation of dcgan_mnist.py, which explains --shallow.
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
    add("--n-critic", type=int, default=5, help="steps of the critic, each on a fresh batch, for one of G")
    add("--gp-weight", type=float, default=10.0, help="weight of the gradient penalty")
    add("--shallow", action="store_true", help="C without its third convolution, as in tutorials")
    add("--width", type=int, help="channels of C's first convolution; None: 64 with --shallow, else 16")
    add("--epochs", type=int, default=25, help="passes over the training set")
    add("--max-steps", type=int, help="stop after this many steps of G, if that comes sooner")
    add("--lr-g", type=float, help="Adam's learning rate for G; None: 3e-4 with --shallow, else 2e-3")
    add("--lr-d", type=float, help="Adam's learning rate for C; None: 3e-4 with --shallow, else 2e-3")
    add("--batch-size", type=int, default=64, help="images per step of the critic")
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


class Generator(nn.Module):
    """Noise z (N, latent_dim) to images (N, 1, 28, 28) in [-1, 1]."""

    def __init__(self, latent_dim=100, width=16):
        super().__init__()
        w = width
        self.latent_dim = latent_dim
        self.layers = nn.Sequential(
            nn.Linear(latent_dim, 4 * w * 7 * 7),  # (N, 196w)
            nn.BatchNorm1d(4 * w * 7 * 7),
            nn.ReLU(),
            nn.Unflatten(1, (4 * w, 7, 7)),  # (N, 4w, 7, 7)
            nn.ConvTranspose2d(4 * w, 2 * w, 4, stride=2, padding=1, bias=False),  # (N, 2w, 14, 14)
            nn.BatchNorm2d(2 * w),
            nn.ReLU(),
            nn.ConvTranspose2d(2 * w, 1, 4, stride=2, padding=1),  # (N, 1, 28, 28)
            nn.Tanh(),
        )

    def forward(self, z):
        return self.layers(z)


class Critic(nn.Module):
    """Images (N, 1, 28, 28) to scores (N, 1), unbounded; no batch normalisation, see gradient_penalty.

    `shallow` leaves out the third convolution, as dcgan_mnist.py explains.
    """

    def __init__(self, width=16, shallow=False):
        super().__init__()
        w = width
        layers = [
            nn.Conv2d(1, w, 4, stride=2, padding=1),  # (N, w, 14, 14)
            nn.LeakyReLU(0.2),
            nn.Conv2d(w, 2 * w, 4, stride=2, padding=1),  # (N, 2w, 7, 7)
            nn.LeakyReLU(0.2),
        ]
        if shallow:
            layers += [nn.Flatten(), nn.Linear(2 * w * 7 * 7, 1)]  # (N, 98w), (N, 1)
        else:
            layers += [
                nn.Conv2d(2 * w, 4 * w, 4, stride=2, padding=1),  # (N, 4w, 3, 3)
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


def critic_loss(real_scores, fake_scores):
    """E[C(G(z))] - E[C(x)]: to lower it, the critic spreads the scores of real and fake apart."""
    return fake_scores.mean() - real_scores.mean()


def generator_loss(fake_scores):
    """-E[C(G(z))]."""
    return -fake_scores.mean()


def gradient_penalty(critic, real, fake):
    """E[(|gradient of C at x'| - 1)^2], x' = t x + (1 - t) G(z), one t from U(0, 1) for each pair of images.

    `real` and `fake` are (N, C, H, W). Returns two scalars, the penalty and the mean norm, each norm over all
    pixels of an image. The gradient of the sum of scores holds each image's own gradient, because no score
    depends on another image: hence no batch normalisation. 1e-12 keeps the root's slope finite at 0.
    """
    t = torch.rand(len(real), 1, 1, 1, device=real.device)
    mixed = torch.lerp(fake, real, t).requires_grad_()
    (gradient,) = torch.autograd.grad(critic(mixed).sum(), mixed, create_graph=True)
    norm = (gradient.flatten(1).square().sum(1) + 1e-12).sqrt()  # (N,)
    return (norm - 1).square().mean(), norm.detach().mean()


# %% Training step

# What a step reports, grouped by the panels of losses.png.
PANELS = {"estimate": ("wasserstein",), "gradient norm": ("gradient_norm",), "loss": ("c_loss", "g_loss")}
METRICS = [name for names in PANELS.values() for name in names]


def train_step(generator, critic, optimizer_g, optimizer_c, real, n_critic, gp_weight):
    """Algorithm 1 of the paper: n_critic steps of the critic, then one of the generator.

    `real` (n_critic * N, 1, 28, 28) in [-1, 1] holds a fresh batch for each of the critic's steps. Returns
    the METRICS, detached; those of the critic are means over its steps.
    """
    batches = real.chunk(n_critic)

    def noise():
        return torch.randn(len(batches[0]), generator.latent_dim, device=real.device)

    # The critic learns to tell how far apart real and fake are, well ahead of the generator.
    seen = []
    for batch in batches:
        with torch.no_grad():
            fake = generator(noise())
        loss = critic_loss(critic(batch), critic(fake))
        penalty, gradient_norm = gradient_penalty(critic, batch, fake)
        c_loss = loss + gp_weight * penalty
        optimizer_c.zero_grad()
        c_loss.backward()
        optimizer_c.step()
        seen.append(torch.stack((-loss.detach(), gradient_norm, c_loss.detach())))

    # The generator takes one step that lowers the distance as the critic now measures it.
    critic.requires_grad_(False)
    g_loss = generator_loss(critic(generator(noise())))
    optimizer_g.zero_grad()
    g_loss.backward()
    optimizer_g.step()
    critic.requires_grad_(True)
    wasserstein, gradient_norm, c_loss = torch.stack(seen).mean(0)
    found = {"wasserstein": wasserstein, "gradient_norm": gradient_norm}
    return found | {"c_loss": c_loss, "g_loss": g_loss.detach()}


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
    args.lr_g = args.lr_g or (3e-4 if args.shallow else 2e-3)
    args.lr_d = args.lr_d or (3e-4 if args.shallow else 2e-3)


def train(args):
    """Train from the start, or go on from the checkpoint args.resume."""
    images, size = read_images(args.dataset, args.data_dir).to(args.device), args.n_critic * args.batch_size
    if args.batch_size < 2 or size > len(images):
        most = len(images) // args.n_critic
        fail(f"--batch-size: {args.batch_size} is not from 2 to {most}, the images of a step of the critic")
    steps_per_epoch = len(images) // size  # the last, short batch is dropped
    last_step = min(args.epochs * steps_per_epoch, args.max_steps or sys.maxsize)
    fill_in(args)

    torch.manual_seed(args.seed)
    generator = place(Generator(args.latent_dim, args.width).apply(init_weights), args)
    critic = place(Critic(args.width, args.shallow).apply(init_weights), args, torch.contiguous_format)
    optimizer_g = torch.optim.Adam(generator.parameters(), args.lr_g, betas=(0.0, 0.9), fused=True)
    optimizer_c = torch.optim.Adam(critic.parameters(), args.lr_d, betas=(0.0, 0.9), fused=True)
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
            metrics = train_step(*parts.values(), real, args.n_critic, args.gp_weight)
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
    """Write args.generate images, made by the generator in args.checkpoint, as PNG files."""
    generator = place(Generator(args.latent_dim, args.width), args)
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
