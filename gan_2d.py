"""A GAN in the plane: the whole game on points, where everything can be drawn and computed.

    python gan_2d.py                                # eight heaps of points on a ring, into runs/gan_2d/001
    python gan_2d.py --lr-d 1e-2 --lr-g 1e-4        # D learns a hundred times as fast: the fakes collapse
    python gan_2d.py --dataset lines                # how far apart are two lines? See landscape.png

A generator G turns random numbers z into points. It should learn to make points like the real ones, but it
never sees those. A discriminator D looks at one point at a time and says how likely it is to be real. D
learns from both kinds, real points x and fakes G(z). G learns only from D: a gradient tells it in which
direction to move each of its points so that D takes it for real.

    L_D = -E[log D(x)] - E[log(1 - D(G(z)))]
    L_G = -E[log D(G(z))]

In the plane we can compute what cannot be seen with images. Where real points have density p and fakes q, the
best answer maximises p log D + q log(1 - D). That is D = p / (p + q): 1 where all points are real, 0 where
all are fake, and 1/2 everywhere once q = p. With it L_D is 2 log 2 - 2 JS. JS, the Jensen-Shannon divergence,
is E[log(2p / (p + q))] / 2 over real points + E[log(2q / (p + q))] / 2 over fakes: 0 if q = p, log 2 = 0.69
if they never overlap. In history.csv, js_d = log 2 - L_D / 2 is what D's loss says of JS: too little, unless
D is the best. At the end of the default run it says 0.03, where JS is 0.31.

What to watch: progress.gif, on the left the learned D, on the right the best D (grey where no points are):
blue says real, red says fake, white cannot tell. Real points are black, fakes yellow; arrows show where D's
gradient sends some. At first the fakes are everywhere; after four epochs they lie on a ring, and then they
gather at the heaps, or modes. Some stay on the way between two: z comes from one connected region, so the
fakes are connected, too. Mode collapse is when fakes reach few heaps; `modes` in history.csv counts the heaps
with 1% of the fakes. The second command ends with nine fakes in ten at two heaps. In its last picture D says
"real" of most of the rest of the plane, and is flat there: nothing calls the fakes back.

Then change the rules with --loss. minimax: G lowers E[log(1 - D(G(z)))], whose gradient vanishes where D is
sure of a fake; at the second command's rates it did, came back, and G found all heaps. least-squares:
squares, not logarithms, pull D's answers to 1 and 0. wasserstein-gp: D gives scores, as far apart as a slope
near 1 allows (wgan_gp.py). relativistic: only the difference of D at a real point and at a fake counts, and a
penalty keeps D's slope small at both. Last, the third command: until its lines touch, JS is log 2 and cannot
say where to go. The Wasserstein distance, how far points have to move, can.

Papers: Goodfellow et al. 2014, arXiv 1406.2661; Arjovsky et al. 2017, 1701.07875 (example 1: two lines);
Gulrajani et al. 2017, 1704.00028 (penalty); Mao et al. 2016, 1611.04076 (least squares); Jolicoeur-Martineau
2018, 1807.00734, and Huang et al. 2024, 2501.05441 (relativistic).
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
from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image
from torch import nn
from tqdm import tqdm

# %% Settings


def add_flags(add):
    """The flags, those of this script's idea first; `add` is argparse's parser.add_argument."""
    losses = ["non-saturating", "minimax", "least-squares", "wasserstein-gp", "relativistic"]
    add("--loss", choices=losses, default="non-saturating", help="the rules of the game")
    add("--d-steps", type=int, help="steps of D for each one of G; None: 5 for wasserstein-gp, else 1")
    add("--penalty-weight", type=float, help="of D's slope; None: 10, for relativistic 1; else none")
    add("--beta1", type=float, default=0.5, help="Adam's momentum, for both")
    add("--width", type=int, default=128, help="units in each of the two hidden layers")
    add("--points", type=int, default=10240, help="real points to train on")
    add("--epochs", type=int, default=60, help="passes over the real points, and pictures")
    add("--max-steps", type=int, help="stop after this many steps, if that comes sooner")
    add("--lr-g", type=float, default=1e-3, help="Adam's learning rate for the generator")
    add("--lr-d", type=float, default=2e-3, help="Adam's learning rate for the discriminator")
    add("--batch-size", type=int, default=256, help="points per step")
    add("--latent-dim", type=int, default=2, help="length of the noise vector z")
    choices = ["ring", "grid", "spiral", "lines"]
    add("--dataset", choices=choices, default="ring", help="lines: G is one number, where its line stands")
    add(
        "--device",
        default="cpu",
        help="auto, or any torch device string; cpu is quickest for networks this small",
    )
    bf16 = "bf16 is faster only where the processor computes in it: benchmark.py tells"
    add("--precision", choices=["fp32", "bf16"], default="fp32", help=bf16)
    add("--seed", type=int, default=42, help="all randomness follows from it")
    add("--out-dir", help="a new folder for the run; None: the next free number in runs/<script>")
    add("--resume", metavar="PATH", help="go on from this checkpoint.pt, with its settings and in its folder")
    add("--generate", type=int, metavar="N", help="no training: write N points, with --checkpoint")
    add("--checkpoint", metavar="PATH", help="the checkpoint.pt that --generate uses")


MAY_BE_ZERO = ["beta1", "penalty_weight"]  # of the flags that are numbers


# %% Networks


class Generator(nn.Module):
    """Noise z (N, latent_dim) to points (N, 2)."""

    def __init__(self, latent_dim=2, width=128):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(latent_dim, width),  # (N, width)
            nn.LeakyReLU(0.2),
            nn.Linear(width, width),  # (N, width)
            nn.LeakyReLU(0.2),
            nn.Linear(width, 2),  # (N, 2)
        )

    def forward(self, z):
        return self.layers(z)


class LineGenerator(nn.Module):
    """Noise z (N, latent_dim) to points of a line at x = theta, as wide as the real one; it learns theta."""

    def __init__(self, theta=1.5):
        super().__init__()
        self.theta = nn.Parameter(torch.tensor(theta))

    def forward(self, z):
        y = torch.erf(z[:, 0] / math.sqrt(2))  # N(0, 1) becomes U(-1, 1)
        return torch.stack([self.theta + 0.02 * z[:, 1], y], 1)


class Discriminator(nn.Module):
    """Points (N, 2) to logits (N, 1); to scores, where --loss knows no probability."""

    def __init__(self, width=128):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(2, width),  # (N, width)
            nn.LeakyReLU(0.2),
            nn.Linear(width, width),  # (N, width)
            nn.LeakyReLU(0.2),
            nn.Linear(width, 1),  # (N, 1)
        )

    def forward(self, points):
        return self.layers(points)


# %% Losses


def discriminator_loss(real, fake, loss):
    """What D minimises, of its answers (N, 1) to as many real points as fakes, without the penalty.

    non-saturating, minimax: -E[log s(x)] - E[log(1 - s(G(z)))], where s is the sigmoid of D's answer;
    least-squares: E[(D(x) - 1)^2] / 2 + E[D(G(z))^2] / 2;   wasserstein-gp: E[D(G(z))] - E[D(x)];
    relativistic: E[softplus(D(G(z)) - D(x))], in pairs.
    """
    if loss == "least-squares":
        return ((real - 1).square().mean() + fake.square().mean()) / 2
    if loss == "wasserstein-gp":
        return fake.mean() - real.mean()
    if loss == "relativistic":
        return F.softplus(fake - real).mean()
    return F.softplus(-real).mean() + F.softplus(fake).mean()


def generator_loss(real, fake, loss):
    """What G minimises, of D's new answers, after its step.

    non-saturating: -E[log s(G(z))];   minimax: E[log(1 - s(G(z)))];   least-squares: E[(D(G(z)) - 1)^2] / 2;
    wasserstein-gp: -E[D(G(z))];   relativistic: E[softplus(D(x) - D(G(z)))], in pairs.
    """
    if loss == "minimax":
        return -F.softplus(fake).mean()
    if loss == "least-squares":
        return (fake - 1).square().mean() / 2
    if loss == "wasserstein-gp":
        return -fake.mean()
    if loss == "relativistic":
        return F.softplus(real - fake).mean()
    return F.softplus(-fake).mean()


def penalty(discriminator, real, fake, loss):
    """What keeps D from growing steep, at points (N, 2), before its weight; in fp32.

    wasserstein-gp: E[(|gradient of D| - 1)^2] between real and fake points, as in wgan_gp.py;
    relativistic: E|gradient|^2 / 2 at real points, and at fakes.
    """

    def squared_slope(points):
        points = points.detach().requires_grad_()
        with fp32():
            (gradient,) = torch.autograd.grad(discriminator(points).sum(), points, create_graph=True)
        return gradient.square().sum(1)

    if loss == "wasserstein-gp":
        t = torch.rand(len(real), 1, device=real.device)
        return ((squared_slope(torch.lerp(fake, real, t)) + 1e-12).sqrt() - 1).square().mean()
    return (squared_slope(real).mean() + squared_slope(fake).mean()) / 2


# %% Training step

# What a step reports, grouped by the panels of losses.png.
PANELS = {"loss": ("d_loss", "g_loss"), "D's answers": ("d_real", "d_fake"), "push": ("gradient",)}
METRICS = [name for names in PANELS.values() for name in names]


def train_step(generator, discriminator, optimizer_g, optimizer_d, real, latent_dim, loss, d_steps, weight):
    """Update the discriminator on each of d_steps batches of `real` (d_steps * N, 2), then the generator.

    `weight` is that of the penalty. Returns the METRICS, detached; those of D are of its last update.
    """
    for batch in real.chunk(d_steps):
        # The discriminator learns to tell real from fake; the generator is left out of the graph.
        with torch.no_grad():
            fake = generator(torch.randn(len(batch), latent_dim, device=real.device))
        real_answers, fake_answers = discriminator(batch), discriminator(fake)
        d_loss = discriminator_loss(real_answers, fake_answers, loss)
        steep = weight * penalty(discriminator, batch, fake, loss) if weight > 0 else 0.0
        optimizer_d.zero_grad()
        (d_loss + steep).backward()
        optimizer_d.step()

    # The generator takes one step, on fresh noise, in the direction that the discriminator likes better.
    discriminator.requires_grad_(False)
    fake = generator(torch.randn(len(batch), latent_dim, device=real.device))
    g_loss = generator_loss(discriminator(batch), discriminator(fake), loss)
    optimizer_g.zero_grad()
    g_loss.backward()
    gradient = torch.stack([parameter.grad.norm() for parameter in generator.parameters()]).norm()
    optimizer_g.step()
    discriminator.requires_grad_(True)
    return {
        "d_loss": d_loss.detach(),
        "g_loss": g_loss.detach(),
        "d_real": real_answers.detach().mean(),
        "d_fake": fake_answers.detach().mean(),
        "gradient": gradient,
    }


# %% Plane: what is known of the points, what is measured, and what is drawn


class Heaps:
    """The real points: equally many from each of some Gaussians, with `centres` (M, 2) and one `std`."""

    def __init__(self, name):
        turn = torch.arange(8) * (math.pi / 4)
        t = torch.linspace(0.25, 1, 100)
        line = torch.linspace(-1, 1, 200)
        self.centres, self.std, self.side = {  # the plane is drawn from -side to side
            "ring": (2 * torch.stack([turn.cos(), turn.sin()], 1), 0.1, 3.0),
            "grid": (2 * torch.cartesian_prod(*[torch.arange(-2.0, 3)] * 2), 0.2, 5.5),
            "spiral": (2.4 * t[:, None] * torch.stack([(t * 10).cos(), (t * 10).sin()], 1), 0.08, 3.0),
            "lines": (torch.stack([0 * line, line], 1), 0.02, 2.0),
        }[name]
        self.modes = name in ("ring", "grid")  # can be told apart, and counted

    def draw(self, count):
        """`count` points (count, 2)."""
        which = torch.randint(len(self.centres), (count,))
        return self.centres[which] + self.std * torch.randn(count, 2)

    def mass(self, edges, blur=0.0):
        """The share of the points in each cell of a square grid with these edges, (rows, columns).

        With `blur`, of the points with Gaussian noise of that standard deviation on them.
        """
        std = math.hypot(self.std, blur)
        x, y = (torch.special.ndtr((edges - c[:, None]) / std).diff() for c in self.centres.T)
        return torch.einsum("mi,mj->ij", y, x) / len(self.centres)


def count_modes(points, heaps):
    """How many heaps have a hundredth or more of the points within 3 std, and the share of points there."""
    distance, nearest = torch.cdist(points, heaps.centres).min(1)
    inside = distance < 3 * heaps.std
    counts = torch.bincount(nearest[inside], minlength=len(heaps.centres))
    return (counts >= 0.01 * len(points)).sum().item(), inside.double().mean().item()


def sliced_wasserstein(x, y, directions=64):
    """The mean over directions of the Wasserstein distance of the projections of x and y, both (N, 2).

    On a line it is exact: the mean difference of the sorted numbers.
    """
    angle = torch.arange(directions, device=x.device) * (math.pi / directions)
    axes = torch.stack([angle.cos(), angle.sin()])
    return ((x @ axes).sort(0).values - (y @ axes).sort(0).values).abs().mean().item()


def jensen_shannon(p, q):
    """The divergence of two distributions over cells; what a sum lacks of 1 lies in a cell outside.

    It is log 2 if no cell has mass of both, and 0 if p = q.
    """
    p, q = (torch.cat([some.flatten(), (1 - some.sum()).clamp(min=0)[None]]) for some in (p, q))
    middle = (p + q) / 2
    halves = (torch.special.xlogy(some, some / middle).nansum() for some in (p, q))  # 0 / 0 is nan
    return sum(halves).item() / 2


def histogram(points, edges):
    """The share of points (N, 2) in each cell of a square grid with these edges, (rows, columns)."""
    cells = len(edges) - 1
    index = torch.bucketize(points.contiguous(), edges) - 1
    index = index[((index >= 0) & (index < cells)).all(1)]
    counts = torch.bincount(index[:, 1] * cells + index[:, 0], minlength=cells * cells)
    return counts.view(cells, cells).float() / len(points)


def plane(fakes, heaps, cells=120, copies=1):
    """The shares of real points and of `fakes` (N, 2) in the cells of a grid over the plane, and its edges.

    With `copies`, that many of each point with a little noise on them, so that the shares are smooth.
    """
    edges, blur = torch.linspace(-heaps.side, heaps.side, cells + 1), heaps.std if copies > 1 else 0.0
    around = fakes.repeat(copies, 1)
    return heaps.mass(edges, blur), histogram(around + blur * torch.randn_like(around), edges), edges


def draw_plane(generator, discriminator, heaps, real, z, args, epoch):
    """A picture (H, W, 3): on the left what D has learned, on the right p / (p + q) for these fakes.

    For that, real points and fakes get noise as wide as a heap, so that p and q are smooth. The colour is D's
    answer: blue near 1, white at 1/2, red near 0; on the right grey where there are no points. Scores, which
    are no probabilities, are blue above their median. Real points are black, fakes yellow; 60 of these have
    arrows along D's gradient, the longer the steeper.
    """
    reseed(args.seed, "picture")
    with torch.no_grad():
        many = generator(torch.randn(20_000, args.latent_dim).to(args.device)).cpu()
        p, q, edges = plane(many, heaps, copies=20)
        middle = (edges[1:] + edges[:-1]) / 2
        everywhere = torch.cartesian_prod(middle, middle).flip(1)  # row by row
        answers = discriminator(everywhere.to(args.device)).cpu().view(p.shape)
    fakes = generator(z).detach().requires_grad_()
    (push,) = torch.autograd.grad(discriminator(fakes).sum(), fakes)
    push, fakes = (push / (1 + push.norm(dim=1, keepdim=True))).cpu(), fakes.detach().cpu()
    probability = args.loss in ("non-saturating", "minimax")
    if args.loss == "least-squares":
        answers = answers.clamp(0, 1)
    else:  # of scores, the middle may be anywhere
        answers = (answers if probability else answers - answers.median()).sigmoid()
    known = ((p + q).clamp(min=1e-9).log10() + 5).clamp(0, 1)  # from 1e-5 to 1e-4 of the points in a cell
    veil = torch.cat([torch.full((*p.shape, 3), 0.85), 1 - known[..., None]], 2)  # grey, and how opaque
    best = "p / (p + q), the best D" if probability else "p / (p + q)"
    maps = {f"D after epoch {epoch}": answers, best: p / (p + q).clamp(min=1e-9)}
    look = {"cmap": colormaps["RdBu"].resampled(21), "vmin": 0, "vmax": 1, "interpolation": "bilinear"}
    window = {"extent": [-heaps.side, heaps.side] * 2, "origin": "lower"}
    figure = Figure(figsize=(7.2, 3.6), dpi=100)
    for k, (title, shades) in enumerate(maps.items()):
        axis = figure.add_axes((0.5 * k, 0, 0.5, 1), xticks=[], yticks=[], frameon=False)
        axis.imshow(shades.numpy(), **look, **window)
        axis.scatter(*real.cpu().T, s=4, color="black", edgecolors="white", linewidths=0.2)
        axis.scatter(*fakes.T, s=7, color="#ffc400", edgecolors="black", linewidths=0.3)
        if k == 0:
            axis.quiver(*fakes[:60].T, *push[:60].T, color="#3d2b00", width=0.004, scale=12, zorder=3)
        else:
            axis.imshow(veil.numpy(), **window)
        axis.set(xlim=(-heaps.side, heaps.side), ylim=(-heaps.side, heaps.side))
        label = {"facecolor": "white", "alpha": 0.8, "linewidth": 0}
        axis.text(0.03, 0.96, title, transform=axis.transAxes, va="top", size="large", bbox=label)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[:, :, :3].copy()


def measured_distance(theta, loss, args, steps=400):
    """How far apart the lines at 0 and at theta are, for a discriminator trained from scratch to tell them.

    non-saturating: log 2 - L_D / 2, the Jensen-Shannon divergence if D is the best; wasserstein-gp, with a
    penalty of weight 40: E[D(x)] - E[D(G(z))], the Wasserstein distance. Of 4,096 points new to it.
    """
    reseed(args.seed, "landscape")
    heaps, generator = Heaps("lines"), LineGenerator(theta).to(args.device)
    discriminator = Discriminator(args.width).to(args.device)
    optimizer = torch.optim.Adam(discriminator.parameters(), 3e-3, betas=(0.5, 0.9), fused=True)

    def points(count):
        with torch.no_grad():
            return heaps.draw(count).to(args.device), generator(torch.randn(count, 2).to(args.device))

    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 3e-3 * (1 - step / steps)
        real, fake = points(256)
        d_loss = discriminator_loss(discriminator(real), discriminator(fake), loss)
        if loss == "wasserstein-gp":
            d_loss = d_loss + 40 * penalty(discriminator, real, fake, loss)
        optimizer.zero_grad()
        d_loss.backward()
        optimizer.step()
    with torch.no_grad():
        d_loss = discriminator_loss(*map(discriminator, points(4096)), loss).item()
    return -d_loss if loss == "wasserstein-gp" else math.log(2) - d_loss / 2


def draw_landscape(path, args):
    """Write landscape.png: what the two distances say of lines that are ever further apart."""
    thetas = [0.0, 0.02, 0.05, 0.1, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5]
    figure = Figure(figsize=(6, 4), layout="constrained")
    axis = figure.subplots()
    for loss, name in (("non-saturating", "Jensen-Shannon"), ("wasserstein-gp", "Wasserstein")):
        found = [measured_distance(theta, loss, args) for theta in thetas]
        axis.plot(thetas, found, ".-", label=f"{name}, as a trained network measures it")
    axis.axhline(math.log(2), linestyle=":", color="grey", label="log 2")
    axis.plot([0, 1.5], [0, 1.5], "--", color="grey", label="the distance itself")
    axis.set(xlabel="distance of the two lines")
    axis.legend()
    figure.savefig(path)


# %% Training

SCRIPT = Path(__file__).stem
LOG_EVERY = 20  # steps between rows of history.csv
SAVE_EVERY = 60  # seconds between checkpoints inside an epoch
# What is measured after an epoch.
TRACKED = {"heaps reached": ("modes",), "share near heaps": ("near",), "Wasserstein": ("sliced",)}
TRACKED |= {"divergence": ("js", "js_d")}
DISTANCES = [name for names in TRACKED.values() for name in names]


def fill_in(args):
    """Choose the settings that were not given."""
    args.d_steps = args.d_steps or (5 if args.loss == "wasserstein-gp" else 1)
    if args.penalty_weight is None:
        args.penalty_weight = {"wasserstein-gp": 10.0, "relativistic": 1.0}.get(args.loss, 0.0)
    if args.dataset == "lines" and args.latent_dim < 2:
        fail(f"--latent-dim: {args.latent_dim} is too few for points of lines; give 2 or more")
    if args.beta1 >= 1:
        fail(f"--beta1: {args.beta1} is not below 1; give a number from 0 to 0.9")


def build(args):
    """The generator: for lines one number, else a network."""
    made = LineGenerator() if args.dataset == "lines" else Generator(args.latent_dim, args.width)
    return place(made, args)


def add_row(distances, row, steps_per_epoch):
    """The measurements and a new row, without rows of cut-off epochs or an older one of its step."""
    whole = (distances[:, 0] < row[0, 0]) & (distances[:, 0] % steps_per_epoch == 0)
    return torch.cat([distances[whole], row])


@torch.no_grad()
def track(generator, discriminator, heaps, args, step):
    """Measure 5,000 fakes, for js 50,000; a row of the step and DISTANCES, nan for what there is not here."""
    found = dict.fromkeys(DISTANCES, math.nan)
    reseed(args.seed, "distance")
    fakes, real = generator(torch.randn(50_000, args.latent_dim).to(args.device)).cpu(), heaps.draw(50_000)
    found["js"] = jensen_shannon(*plane(fakes, heaps)[:2])
    found["sliced"] = sliced_wasserstein(fakes[:5000], real[:5000])
    modes, found["near"] = count_modes(fakes[:5000], heaps)
    if heaps.modes:
        found["modes"] = modes
    if args.loss in ("non-saturating", "minimax"):
        answers = (discriminator(points[:5000].to(args.device)) for points in (real, fakes))
        found["js_d"] = math.log(2) - discriminator_loss(*answers, args.loss).item() / 2
    shown = [f"{name} {value:.3f}" for name, value in found.items() if not math.isnan(value)]
    print("  " + "  ".join(shown), flush=True)
    return torch.tensor([[step, *found.values()]])


def train(args):
    """Train from the start, or go on from the checkpoint args.resume."""
    fill_in(args)
    heaps, size = Heaps(args.dataset), args.batch_size * args.d_steps
    reseed(args.seed, "points")
    points = heaps.draw(args.points).to(args.device)
    if size > len(points):
        fail(f"--batch-size: {args.batch_size} is not from 1 to {len(points) // args.d_steps}; see --points")
    steps_per_epoch = len(points) // size  # the last, short batch is dropped
    last_step = min(args.epochs * steps_per_epoch, args.max_steps or sys.maxsize)

    torch.manual_seed(args.seed)
    generator, discriminator = build(args), place(Discriminator(args.width), args)
    adam = {"betas": (args.beta1, 0.9), "fused": True}
    optimizer_g = torch.optim.Adam(generator.parameters(), args.lr_g, **adam)
    optimizer_d = torch.optim.Adam(discriminator.parameters(), args.lr_d, **adam)
    parts = {"generator": generator, "discriminator": discriminator}
    parts |= {"optimizer_g": optimizer_g, "optimizer_d": optimizer_d}  # the order of train_step's arguments

    reseed(args.seed, "samples")
    fixed_z = torch.randn(400, args.latent_dim).to(args.device)
    checkpoint = load_checkpoint(args.resume, **parts) if args.resume else {}
    history = checkpoint.get("history", torch.empty(0, len(METRICS))).to(args.device)  # a row for each step
    distances = checkpoint.get("distances", torch.empty(0, 1 + len(DISTANCES)))  # a row for each measurement
    folder = open_folder(args, f"runs/{SCRIPT}")
    (folder / "samples").mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(vars(args) | {"torch": torch.__version__}, indent=2))
    step, saved_at = len(history), save(folder, args, history, distances, parts)
    print(f"{len(points):,} points, {steps_per_epoch} steps an epoch, on {args.device}, into {folder}")
    while True:
        epoch, done = divmod(step, steps_per_epoch)
        if step and (done == 0 or step >= last_step):  # an epoch is complete, or was before --resume
            number = math.ceil(step / steps_per_epoch)
            picture = draw_plane(generator, discriminator, heaps, points[:400], fixed_z, args, number)
            Image.fromarray(picture).save(folder / "samples" / f"epoch_{number:04d}.png")
            row = track(generator, discriminator, heaps, args, step)
            distances = add_row(distances, row, steps_per_epoch)
            saved_at = save(folder, args, history, distances, parts)
            if number % 30 == 0 or step >= last_step:  # slow
                write_report(folder, history, distances, steps_per_epoch)
        if step >= last_step:
            if args.dataset == "lines":
                draw_landscape(folder / "landscape.png", args)
            break

        reseed(args.seed, "order", epoch)
        batches = torch.randperm(len(points)).to(args.device).split(size)
        batches = batches[done : min(steps_per_epoch, done + last_step - step)]  # those still to do
        history = torch.cat([history, history.new_zeros(len(batches), len(METRICS))])
        name = f"epoch {epoch + 1}/{args.epochs}"
        bar = tqdm(batches, name, steps_per_epoch, leave=False, initial=done, unit=" points", unit_scale=size)
        for index in bar:
            reseed(args.seed, "step", step)
            rest = args.latent_dim, args.loss, args.d_steps, args.penalty_weight
            metrics = train_step(*parts.values(), points[index], *rest)
            history[step] = torch.stack([*metrics.values()])
            step += 1
            if step % LOG_EVERY == 0:
                bar.set_postfix_str(summary(history[step - LOG_EVERY : step]))
            if time.monotonic() > saved_at + SAVE_EVERY:
                saved_at = save(folder, args, history[:step], distances, parts)
        saved_at = save(folder, args, history, distances, parts)
        means = summary(history[epoch * steps_per_epoch :])
        print(f"{name}  {means}  {bar.format_dict['elapsed']:.1f} s", flush=True)
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
    """Write args.generate points, made by the generator in args.checkpoint, as lines "x,y" of a file."""
    generator = build(args)
    load_checkpoint(args.checkpoint, generator=generator)
    folder = open_folder(args, Path(args.checkpoint).parent / "generated")
    reseed(args.seed, "generate")
    with torch.no_grad():
        noise = (torch.randn(256, args.latent_dim) for _ in range(0, args.generate, 256))  # as in each script
        points = torch.cat([generator(z.to(args.device)).cpu() for z in noise])[: args.generate]
    np.savetxt(folder / "points.csv", points, "%.6g", ",", header="x,y", comments="")
    print(f"{args.generate} points in {folder}")


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
