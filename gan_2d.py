"""The game behind every GAN, on points in the plane, where you can watch both players.

    python gan_2d.py                                    # 30 seconds, into runs/gan_2d/001
    python gan_2d.py --dataset spiral --epochs 100

                     z ──► G ──► fake ──┐
                                        ├──► D ──► real or fake?
    clusters on a ring ────────► real ──┘

You have some points and want a network that makes more like them. But what makes a new point a good one?
Instead of writing that down, let a second network learn it. The generator G turns noise z into a point; it
never sees a real one. The discriminator D looks at one point at a time and gives the probability that it is
real. D learns from real points x and from fakes G(z), and G learns from D alone: the gradient of D tells it
where to move each fake so that D believes in it.

    L_D = -E[log D(x)] - E[log(1 - D(G(z)))]        D wants to say 1 to real points and 0 to fakes
    L_G = -E[log D(G(z))]                           G wants to hear 1

What to watch: progress.gif. Real points are black, fakes yellow, and arrows show where D sends them. The left
half is what D says: blue for real, red for fake, white for "I can't tell". The right half is the ideal D,
p / (p + q), where real points have density p and fakes q. It is 1/2 everywhere once p = q: then D can only
guess. First the fakes find the ring, then the clusters. A few stay in between, because G is continuous: it
can stretch the cloud of noise, but never tear it.

Try --lr-d 1e-2 --lr-g 1e-4. D runs ahead, and most fakes crowd into a few clusters: mode collapse. (`modes`
in history.csv counts the clusters reached.) D knows where the empty ones are. Why does no fake go there?

Paper: Goodfellow et al. 2014, arXiv 1406.2661. Departures: points, not images; Adam. For other rules of the
game there is --loss, and --dataset lines draws landscape.png, the reason for wgan_gp.py.
"""

import argparse
import contextlib
import json
import math
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from matplotlib import colormaps
from matplotlib.figure import Figure
from PIL import Image
from torch import accelerator, nn
from tqdm import tqdm

# %% Settings
SCRIPT = "gan_2d"
PANELS = [["d_loss", "g_loss"], ["d_real", "d_fake"], ["gradient"], ["modes"], ["near", "sliced", "js"]]
LOSSES = ["non-saturating", "minimax", "least-squares", "wasserstein-gp", "relativistic"]
BY_LOSS = {"wasserstein-gp": {"d_steps": 5, "penalty_weight": 10.0}, "relativistic": {"penalty_weight": 1.0}}


def add_flags(add):
    """The flags, this script's own first; `add` is argparse's parser.add_argument."""
    add("--loss", choices=LOSSES, default="non-saturating", help="the rules of the game")
    add("--d-steps", type=int, default=1, help="steps of D for one of G; wasserstein-gp: 5")
    add("--penalty-weight", type=float, default=0.0, help="of that on D's slope; default by --loss")
    add("--beta1", type=float, default=0.5, help="Adam's momentum, below 1")
    add("--beta2", type=float, default=0.999, help="Adam's memory for the size of gradients, below 1")
    add("--width", type=int, default=128, help="units in each of the two hidden layers")
    add("--steps", type=int, default=40, help="steps of G in an epoch, each on new points")
    add("--epochs", type=int, default=60, help="how often to train for that long, then measure and draw")
    add("--lr-g", type=float, default=1e-3, help="Adam's learning rate for the generator")
    add("--lr-d", type=float, default=2e-3, help="Adam's learning rate for the discriminator")
    add("--batch-size", type=int, default=256, help="points per step")
    add("--latent-dim", type=int, default=2, help="length of the noise vector z")
    datasets = ["ring", "grid", "spiral", "lines"]
    add("--dataset", choices=datasets, default="ring", help="lines: G learns one number; see landscape.png")
    add("--device", default="cpu", help="cpu, the quickest for networks this small, auto, cuda, mps, ...")
    add("--seed", type=int, default=42, help="all randomness follows from it")
    add("--keep-every", type=int, metavar="K", help="every K epochs, also save the generator alone")
    add("--out-dir", help="a new folder for the run; default: the next free number in runs/<script>")
    add("--resume", metavar="PATH", help="go on from this checkpoint.pt; flags you give win over its own")
    add("--generate", type=int, metavar="N", help="no training: write N points, with --checkpoint")
    add("--checkpoint", metavar="PATH", help="the checkpoint.pt that --generate uses")


# %% Networks
def block(inputs, outputs):
    return [nn.Linear(inputs, outputs), nn.LeakyReLU(0.2)]


class Generator(nn.Module):
    """Noise z (N, latent_dim) to points (N, 2)."""

    def __init__(self, latent_dim=2, width=128):
        super().__init__()
        self.latent_dim = latent_dim
        self.layers = nn.Sequential(*block(latent_dim, width), *block(width, width), nn.Linear(width, 2))

    def forward(self, z):
        return self.layers(z)


class Discriminator(nn.Module):
    """Points (N, 2) to scores (N, 1): logits, if the loss has logarithms."""

    def __init__(self, width=128):
        super().__init__()
        self.layers = nn.Sequential(*block(2, width), *block(width, width), nn.Linear(width, 1))

    def forward(self, points):
        return self.layers(points)


# %% Losses, of D's scores (N, 1) for as many real points x as fakes G(z)
def discriminator_loss(real, fake, loss):
    """What D lowers: L_D of the lesson, or another loss by name."""
    if loss == "least-squares":  # E[(D(x) - 1)^2] / 2 + E[D(G(z))^2] / 2, Mao et al. 2016
        return ((real - 1).square().mean() + fake.square().mean()) / 2
    if loss == "wasserstein-gp":  # E[D(G(z))] - E[D(x)], and a penalty, Gulrajani et al. 2017
        return fake.mean() - real.mean()
    if loss == "relativistic":  # E[softplus(D(G(z)) - D(x))], in pairs, and a penalty, Huang et al. 2024
        return F.softplus(fake - real).mean()
    # D says sigmoid(score), so -log D is softplus(-score), and -log(1 - D) is softplus(score).
    return F.softplus(-real).mean() + F.softplus(fake).mean()


def generator_loss(real, fake, loss):
    """What G lowers: L_G of the lesson, or another loss by name."""
    if loss == "minimax":  # E[log(1 - D(G(z)))], Goodfellow et al. 2014
        return -F.softplus(fake).mean()
    if loss == "least-squares":  # E[(D(G(z)) - 1)^2] / 2
        return (fake - 1).square().mean() / 2
    if loss == "wasserstein-gp":  # -E[D(G(z))]
        return -fake.mean()
    if loss == "relativistic":  # E[softplus(D(x) - D(G(z)))], in pairs
        return F.softplus(real - fake).mean()
    return F.softplus(-fake).mean()


def penalty(discriminator, real, fake, loss):
    """What keeps D from getting steep, at points (N, 2)."""

    def squared_slope(points):
        points = points.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(discriminator(points).sum(), points, create_graph=True)
        return gradient.square().sum(1)

    if loss == "wasserstein-gp":  # E[(|gradient of D| - 1)^2] between real points and fakes, as in wgan_gp.py
        t = torch.rand(len(real), 1, device=real.device)
        slope = (squared_slope(torch.lerp(fake, real, t)) + 1e-12).sqrt()
        return (slope - 1).square().mean()
    # E|gradient of D|^2 / 2 at real points, R1, and at fakes, R2
    return (squared_slope(real).mean() + squared_slope(fake).mean()) / 2


# %% Training step
def train_step(generator, discriminator, optimizer_g, optimizer_d, real, loss, d_steps=1, penalty_weight=0.0):
    """The paper's algorithm 1: d_steps steps of D, then one of G. Returns the metrics.

    `real` (d_steps * N, 2) holds a fresh batch for each step of D.
    """
    batches = real.chunk(d_steps)
    batch_size = len(batches[0])
    d_losses, d_real, d_fake = [], [], []

    # D learns to tell real from fake. It judges each point alone, so both can go through it in one batch.
    for batch in batches:
        with torch.no_grad():
            fake = generator(torch.randn(batch_size, generator.latent_dim, device=real.device))
        real_scores, fake_scores = discriminator(torch.cat([batch, fake])).chunk(2)
        d_loss = discriminator_loss(real_scores, fake_scores, loss)
        d_losses.append(d_loss.detach())
        d_real.append(verdict(real_scores.detach(), loss))
        d_fake.append(verdict(fake_scores.detach(), loss))
        if penalty_weight > 0:
            d_loss = d_loss + penalty_weight * penalty(discriminator, batch, fake, loss)
        optimizer_d.zero_grad()
        d_loss.backward()
        optimizer_d.step()

    # G learns to fool the updated D, which is frozen now.
    discriminator.requires_grad_(False)
    fake = generator(torch.randn(batch_size, generator.latent_dim, device=real.device))
    g_loss = generator_loss(discriminator(batches[-1]), discriminator(fake), loss)
    optimizer_g.zero_grad()
    g_loss.backward()
    gradient = torch.stack([weight.grad.norm() for weight in generator.parameters()]).norm()
    optimizer_g.step()
    discriminator.requires_grad_(True)

    metrics = {"d_loss": torch.stack(d_losses).mean(), "g_loss": g_loss.detach()}
    metrics |= {"d_real": torch.cat(d_real).mean(), "d_fake": torch.cat(d_fake).mean()}
    return metrics | {"gradient": gradient}  # how hard D pushes G


def verdict(scores, loss):
    """What D says: the probability of "real", or a score, under a loss that knows no probabilities."""
    return scores.sigmoid() if loss in ("non-saturating", "minimax") else scores


# %% Training
def build(args):
    """The networks and optimisers of a run, by the names of train_step's arguments."""
    torch.manual_seed(args.seed)
    generator = Generator(args.latent_dim, args.width).to(args.device)
    discriminator = Discriminator(args.width).to(args.device)
    adam = {"betas": (args.beta1, args.beta2), "fused": True}  # fused: faster
    return {
        "generator": generator,
        "discriminator": discriminator,
        "optimizer_g": torch.optim.Adam(generator.parameters(), args.lr_g, **adam),
        "optimizer_d": torch.optim.Adam(discriminator.parameters(), args.lr_d, **adam),
    }


def train(args):
    """Train from the start, or go on from the checkpoint args.resume."""
    if max(args.beta1, args.beta2) >= 1:
        fail("--beta1, --beta2: give numbers below 1")
    clusters = Clusters(args.dataset)
    parts = build(args)
    generator, discriminator = parts["generator"], parts["discriminator"]
    history = []  # of each epoch: the mean metrics, and what is measured after it
    if args.resume:
        history = load_checkpoint(args.resume, **parts)["history"]
        betas = (args.beta1, args.beta2)  # these and the rates may be new
        parts["optimizer_g"].param_groups[0].update(lr=args.lr_g, betas=betas)
        parts["optimizer_d"].param_groups[0].update(lr=args.lr_d, betas=betas)
    if len(history) >= args.epochs:
        fail(f"--epochs: {args.resume} has run {len(history)} already; ask for more")
    folder = open_folder(args, f"runs/{SCRIPT}")
    (folder / "config.json").write_text(json.dumps(vars(args) | {"torch": torch.__version__}, indent=2))
    print(f"{args.steps} steps an epoch, on {args.device}: {folder}", file=sys.stderr)
    rules = {"loss": args.loss, "d_steps": args.d_steps, "penalty_weight": args.penalty_weight}
    torch.manual_seed(args.seed)
    z, shown = torch.randn(50_000, generator.latent_dim), clusters.draw(5000)  # to measure and to draw

    for epoch in range(len(history) + 1, args.epochs + 1):
        torch.manual_seed(args.seed * 10_000 + epoch)  # so a resumed run draws the same numbers
        round_size = args.d_steps * args.batch_size
        points = clusters.draw(args.steps * round_size).to(args.device)
        metrics, start = [], time.perf_counter()
        for real in tqdm(points.split(round_size), f"epoch {epoch}", leave=False):
            metrics.append(train_step(**parts, real=real, **rules))

        means = {name: torch.stack([step[name] for step in metrics]).mean().item() for name in metrics[0]}
        fakes = sample(generator, z)
        history.append({"epoch": epoch} | means | measure(fakes, shown, clusters))
        text = "  ".join(f"{name} {value:.3g}" for name, value in history[-1].items())
        print(f"{text}  {time.perf_counter() - start:.1f} s", flush=True)
        draw(discriminator, fakes, shown, clusters, folder, epoch, args.loss)
        if epoch % 30 == 0 or epoch == args.epochs:  # slow
            plot(history, folder)
            film(folder)
        save(parts, history, folder, args)
    if args.dataset == "lines":
        draw_landscape(folder, args)


# %% The plane: the real points, and what can be computed there
class Clusters:
    """The real points: equally many from each of some Gaussians, with `centres` (M, 2) and one `std`."""

    def __init__(self, dataset):
        if dataset == "ring":
            angle = torch.arange(8) * (math.pi / 4)
            self.centres = 2 * torch.stack([angle.cos(), angle.sin()], 1)
            self.std, self.side = 0.1, 3.0  # the plane is drawn from -side to side
        elif dataset == "grid":
            line = torch.linspace(-4, 4, 5)
            self.centres = torch.cartesian_prod(line, line)
            self.std, self.side = 0.2, 5.5
        elif dataset == "spiral":
            t = torch.linspace(0.25, 1, 100)
            self.centres = 2.4 * t[:, None] * torch.stack([(10 * t).cos(), (10 * t).sin()], 1)
            self.std, self.side = 0.08, 3.0
        else:  # an upright line at x = 0
            line = torch.linspace(-1, 1, 200)
            self.centres = torch.stack([0 * line, line], 1)
            self.std, self.side = 0.02, 2.0

    def draw(self, count):
        """`count` points (count, 2)."""
        which = torch.randint(len(self.centres), (count,))
        return self.centres[which] + self.std * torch.randn(count, 2)


def plane(fakes, clusters, blur=0.0, cells=120):
    """The shares p of real points and q of fakes (N, 2) in the cells of a grid, (rows, columns); its edges.

    With `blur`, noise of that standard deviation is on all points, and makes q smooth.
    """
    edges = torch.linspace(-clusters.side, clusters.side, cells + 1)

    def shares(centres, std):  # of N(centre, std^2) in the intervals between edges, a row for each centre
        return torch.special.ndtr((edges - centres[:, None]) / std).diff()

    columns, rows = (shares(centres, math.hypot(clusters.std, blur)) for centres in clusters.centres.T)
    p = rows.T @ columns / len(clusters.centres)
    q = torch.histogramdd(fakes, [edges, edges]).hist.T / len(fakes)
    if blur:
        noise = shares((edges[1:] + edges[:-1]) / 2, blur)  # from each cell to each
        q = noise.T @ q @ noise
    return p, q, edges


def jensen_shannon(p, q):
    """JSD(p, q) = KL(p || m) / 2 + KL(q || m) / 2 with m = (p + q) / 2, of shares in cells.

    What a sum lacks of 1 lies outside. It is 0 only if p = q, and log 2 if no cell has both.
    """
    p, q = (torch.cat([shares.flatten(), (1 - shares.sum()).clamp(min=0)[None]]) for shares in (p, q))
    middle = (p + q) / 2
    kl_p = torch.xlogy(p, p / middle).nansum()  # 0 / 0 is nan, and counts 0
    kl_q = torch.xlogy(q, q / middle).nansum()
    return (kl_p + kl_q).item() / 2


def sliced_wasserstein(x, y, directions=64):
    """The Wasserstein distance of x and y, both (N, 2), projected on a line: the mean over directions.

    On a line it is the mean difference of the sorted numbers: how far they have to move.
    """
    angle = torch.arange(directions) * (math.pi / directions)
    axes = torch.stack([angle.cos(), angle.sin()])
    return ((x @ axes).sort(0).values - (y @ axes).sort(0).values).abs().mean().item()


def measure(fakes, real, clusters):
    """How many clusters have a tenth of their due within 3 std, the share of fakes there, two distances."""
    distance, nearest = torch.cdist(fakes, clusters.centres).min(1)
    inside = distance < 3 * clusters.std
    counts = torch.bincount(nearest[inside], minlength=len(clusters.centres))
    modes = (counts >= 0.1 * len(fakes) / len(clusters.centres)).sum().item()
    p, q, _ = plane(fakes, clusters)
    measures = {"modes": modes, "near": inside.float().mean().item()}
    return measures | {"sliced": sliced_wasserstein(fakes[: len(real)], real), "js": jensen_shannon(p, q)}


# %% Data, pictures, files
def fail(message, status=2):
    """End the program with one line on stderr."""
    tqdm.write(f"{SCRIPT}.py: {message}", file=sys.stderr)
    raise SystemExit(status) from None


@torch.no_grad()
def sample(generator, z):
    """Points (N, 2), on the CPU."""
    return generator(z.to(next(generator.parameters()).device)).cpu()


def draw(discriminator, fakes, real, clusters, folder, epoch, loss):
    """Write the picture of an epoch: on the left what D has learned, on the right p / (p + q) of these fakes.

    Blue is real, red fake, white between, and on the right grey where there are no points. Real points are
    black, fakes yellow. Arrows show where D's gradient sends 60 of them, the longer the steeper it is.
    """
    (folder / "samples").mkdir(exist_ok=True)
    p, q, edges = plane(fakes, clusters, blur=clusters.std)
    middle = (edges[1:] + edges[:-1]) / 2
    everywhere = torch.cartesian_prod(middle, middle).flip(1)  # (x, y), row by row
    device = next(discriminator.parameters()).device
    with torch.no_grad():
        scores = discriminator(everywhere.to(device)).cpu().view(p.shape)
    learned = verdict(scores, loss)
    if loss in ("wasserstein-gp", "relativistic"):  # only differences of scores count
        learned = (scores - scores.median()).sigmoid()
    start = fakes[:60].to(device).requires_grad_()
    (gradient,) = torch.autograd.grad(discriminator(start).sum(), start)
    arrows = (gradient / (1 + gradient.norm(dim=1, keepdim=True))).cpu()
    density = ((p + q).clamp(min=1e-9).log10() + 5).clamp(0, 1)  # 0 to 1 for a share of 1e-5 to 1e-4
    grey = torch.cat([torch.full((*p.shape, 3), 0.85), 1 - density[..., None]], 2)

    figure = Figure(figsize=(7.2, 3.6), dpi=100)
    left, right = (figure.add_axes((x, 0, 0.5, 1)) for x in (0, 0.5))
    place = {"extent": [-clusters.side, clusters.side] * 2, "origin": "lower"}
    colours = {"cmap": colormaps["RdBu"].resampled(21), "vmin": 0, "vmax": 1, "interpolation": "bilinear"}
    left.imshow(learned.numpy(), **colours, **place)
    left.quiver(*fakes[:60].T, *arrows.T, color="#3d2b00", width=0.004, scale=12, zorder=3)
    right.imshow((p / (p + q).clamp(min=1e-9)).numpy(), **colours, **place)
    right.imshow(grey.numpy(), **place)
    for axis, title in (left, f"D after epoch {epoch}"), (right, "p / (p + q)"):
        axis.scatter(*real[:400].T, s=4, color="black", edgecolors="white", linewidths=0.2)
        axis.scatter(*fakes[:400].T, s=7, color="#ffc400", edgecolors="black", linewidths=0.3)
        axis.set(xlim=(-clusters.side, clusters.side), ylim=(-clusters.side, clusters.side))
        axis.set_axis_off()
        box = {"facecolor": "white", "alpha": 0.8, "linewidth": 0}
        axis.text(0.03, 0.96, title, transform=axis.transAxes, va="top", size="large", bbox=box)
    figure.savefig(folder / "samples" / f"epoch_{epoch:04d}.png")


def film(folder):
    """Write progress.gif, of at most 100 pictures, the last of which stays for two seconds."""
    paths = sorted(path for path in (folder / "samples").glob("epoch_????.png") if path.stat().st_size)
    frames = [Image.open(path).convert("RGB") for path in paths[:: math.ceil(len(paths) / 100)]]
    pauses = [200] * (len(frames) - 1) + [2000]
    frames[0].save(folder / "progress.gif", save_all=True, append_images=frames[1:], duration=pauses, loop=0)


def measured_distance(theta, loss, args):
    """How far apart two lines at a distance of theta are, to a D trained to tell them (Arjovsky et al. 2017).

    non-saturating: log 2 - L_D / 2, for the best D the Jensen-Shannon divergence;
    wasserstein-gp: E[D(x)] - E[D(G(z))], for the best D the Wasserstein distance.
    """
    torch.manual_seed(args.seed)
    line, shift = Clusters("lines"), torch.tensor([theta, 0.0])
    discriminator = Discriminator(args.width).to(args.device)
    optimizer = torch.optim.Adam(discriminator.parameters(), 3e-3, betas=(0.5, 0.999), fused=True)
    losses = []
    for _ in range(400):
        real, fake = line.draw(256).to(args.device), (line.draw(256) + shift).to(args.device)
        d_loss = discriminator_loss(discriminator(real), discriminator(fake), loss)
        losses.append(d_loss.detach())
        if loss == "wasserstein-gp":
            d_loss = d_loss + 40 * penalty(discriminator, real, fake, loss)
        optimizer.zero_grad()
        d_loss.backward()
        optimizer.step()
    d_loss = torch.stack(losses[-50:]).mean().item()
    return -d_loss if loss == "wasserstein-gp" else math.log(2) - d_loss / 2


def draw_landscape(folder, args):
    """Write landscape.png: JSD is flat until the lines touch, and cannot tell G where to go. W can."""
    thetas = [0.0, 0.02, 0.05, 0.1, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5]
    figure = Figure(figsize=(6, 4), layout="constrained")
    axis = figure.subplots()
    for loss, name in ("non-saturating", "Jensen-Shannon"), ("wasserstein-gp", "Wasserstein"):
        values = [measured_distance(theta, loss, args) for theta in thetas]
        axis.plot(thetas, values, ".-", label=f"{name}, as D measures it")
    axis.axhline(math.log(2), linestyle=":", color="grey", label="log 2")
    axis.plot([0, 1.5], [0, 1.5], "--", color="grey", label="the distance itself")
    axis.set_xlabel("distance of the two lines")
    axis.legend()
    figure.savefig(folder / "landscape.png")


def plot(history, folder):
    """Write the means of each epoch into history.csv and losses.png."""
    rows = [",".join(f"{means.get(name, math.nan):.5g}" for name in history[-1]) for means in history]
    (folder / "history.csv").write_text("\n".join([",".join(history[-1]), *rows]) + "\n")
    figure = Figure(figsize=(8, 2.4 * len(PANELS)), layout="constrained")
    for axis, names in zip(figure.subplots(len(PANELS), squeeze=False).flat, PANELS):
        values = [[means[name] for name in names] for means in history]
        axis.plot(range(1, len(history) + 1), values, ".-", label=names)
        axis.locator_params("x", integer=True)
        axis.set_xlabel("epoch")
        axis.legend()
    figure.savefig(folder / "losses.png")


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
    settings = {name: value for name, value in vars(args).items() if name not in not_saved}
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
    """The generator of a checkpoint, for any program: sample(load_generator(path), torch.randn(64, 2))."""
    settings = load_checkpoint(path)["settings"]
    generator = Generator(settings["latent_dim"], settings["width"])
    load_checkpoint(path, generator=generator)
    return generator.to(device).eval()


# %% Command line
def parse_args(argv=None):
    """The settings: a flag that is given, else the loss's default, else the checkpoint, else the default."""
    parser = argparse.ArgumentParser(f"{SCRIPT}.py", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.description = (__doc__ or "").split("\n")[0]  # none under python -OO
    parser.error = fail  # one line in place of argparse's usage text
    add_flags(parser.add_argument)
    args = parser.parse_args(argv)  # a first look, for --resume and the like
    if (args.generate is None) != (args.checkpoint is None) or (args.generate and args.resume):
        fail("--generate N needs --checkpoint PATH, and no --resume")
    if (args.resume, args.checkpoint) != (None, None):
        parser.set_defaults(**load_checkpoint(args.resume or args.checkpoint)["settings"])
    parser.set_defaults(**BY_LOSS.get(args.loss, {}))
    args = parser.parse_args(argv)  # with the new defaults
    for name, value in vars(args).items():
        lowest = 0 if type(value) is float or name in ("seed", "limit", "fid_every") else 1  # counts: from 1
        if type(value) in (int, float) and not lowest <= value < 10**12:
            fail(f"--{name.replace('_', '-')}: give a number from {lowest} to 10**12")
    auto = args.device == "auto"
    if auto:
        args.device = accelerator.current_accelerator().type if accelerator.is_available() else "cpu"
    try:
        torch.zeros(1, device=args.device).item()
    except Exception as error:  # many types are possible
        if not auto:
            fail(f"--device: there is no {args.device} on this machine; give cpu, or leave it out")
        tqdm.write(f"on cpu: {args.device} does not work here ({error!r:.150})", file=sys.stderr)
        args.device = "cpu"
    return args


def generate(args):
    """Write args.generate points, drawn by the generator in args.checkpoint, as lines "x,y" of points.csv."""
    generator = load_generator(args.checkpoint, args.device)
    folder = open_folder(args, Path(args.checkpoint).parent / "generated")
    torch.manual_seed(args.seed)
    points = sample(generator, torch.randn(args.generate, generator.latent_dim))
    rows = [f"{x:.6g},{y:.6g}" for x, y in points.tolist()]
    (folder / "points.csv").write_text("\n".join(["x,y", *rows]) + "\n")
    print(f"{args.generate} points in {folder}", file=sys.stderr)


def main(argv=None):
    args = parse_args(argv)
    torch.backends.cudnn.deterministic = True  # so that --resume is exact
    torch.backends.cudnn.allow_tf32 = False  # fp32 is exact
    run = generate if args.checkpoint else train
    try:
        run(args)
    except KeyboardInterrupt:
        fail("stopped; --resume goes on after the last whole epoch, if there was one", 130)
    except OSError as error:  # a folder that is there already or cannot be written, a full disk
        fail(f"{error} (a run writes into --out-dir)")


if __name__ == "__main__":
    main([] if "kernel_launcher" in sys.argv[0] else None)  # the flags of a notebook are not ours
