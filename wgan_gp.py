"""WGAN-GP: a critic measures how far apart real and fake are, its slope held near 1 by a penalty; 28x28.

    python wgan_gp.py                               # 25 epochs of MNIST, into runs/wgan_gp/001
    python wgan_gp.py --epochs 5 --device cuda
    python wgan_gp.py --dataset fashion_mnist

The Wasserstein distance between real images and fakes is the least work that moves the one heap of
probability onto the other, mass times way. It is also a maximum, over all functions C whose slope is at
most 1:

    W = max over C of   E[C(x)] - E[C(G(z))]

So a network C, the critic, is trained to find that maximum, and the generator G to bring it down. How to
hold the slope? The best C has slope 1 on the lines between real images and the fakes they are moved to; so
the penalty asks for slope 1 at points x' = t x + (1 - t) G(z), t from U(0, 1), one for each pair:

    L_C = E[C(G(z))] - E[C(x)] + 10 E[(|gradient of C at x'| - 1)^2]
    L_G = -E[C(G(z))]

What is different from dcgan_mnist.py: no probability, so no sigmoid and no logarithm, and scores without
bounds; no batch normalisation in the critic, since the penalty is about one image at a time; five updates
of the critic, each on a fresh batch, for one of G; Adam with learning rate 3e-4 and betas (0, 0.9). A
discriminator should not run ahead of G (vanilla_gan.py shows what can happen); a critic should, since only
near its maximum does it measure the distance.

That is also why its estimate E[C(x)] - E[C(G(z))] tells how good the samples are, which no loss of
dcgan_mnist.py does: it is a distance, measured by a critic near its best. (The penalty only leans on the
slope and C is no better than its layers: compare the estimate with that of the same networks and weight
alone.)

What to watch (10 epochs, seed 42, fp32, means over an epoch; pictures in the README): the estimate fell
from 7.1 in epoch 1 over 2.4 and 2.3 to 1.7 in epoch 5, when strokes had turned into digits, and to 1.4 in
epoch 10; the mean slope came down from 1.21 to 1.06, and stayed above 1, since the critic gains by it. L_G
went from -9.5 to 40 and means nothing: C may add any constant to its scores. With the paper's rates (--lr-g
1e-4 --lr-d 1e-4) the estimate after 5 epochs, only 935 steps of G, was still 2.8, and half of the samples
were no digits.

Over these epochs the estimate fell in step with the distance of the samples to the test set (fid.py
--features classifier; rank correlation 0.99 to 1 in three seeds, bf16). It needs a critic that is ahead: with
--n-critic 1 it stayed between 0.4 and 0.7 while the samples got better (-0.7 to 0.1). They got better faster,
even: after 7 minutes of one CPU core their distance was 345, with five steps of the critic 461. With batch
normalisation in the critic the estimate rose, from 10 to 21, while the distance fell, to 683 in 5 epochs, to
461 without. Without it, 25 epochs brought the distance from 290 in epoch 10 to 165; dcgan_mnist.py, after as
long a time, was at 203 (seed 42; claims.py has these runs).

An epoch is a pass of the critic over the data: 935 batches, for 187 steps of G.

Paper: Gulrajani et al. 2017, arXiv 1704.00028, equation 3 and algorithm 1; the distance: Arjovsky et al.
2017, arXiv 1701.07875. Departures: learning rates of 3e-4 (the paper: 1e-4); the networks and their N(0,
0.02) initialisation are those of dcgan_mnist.py; 1e-12 under the root keeps the norm's gradient finite at
0.
"""

import argparse
import importlib.util
import json
import math
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import nn
from torchvision import datasets
from torchvision.transforms.functional import to_pil_image
from torchvision.utils import make_grid
from tqdm import tqdm

# ---- Networks ----------------------------------------------------------------------------------------------


class Generator(nn.Module):
    """Noise z (N, latent_dim) to images (N, 1, 28, 28) in [-1, 1]."""

    def __init__(self, latent_dim=100):
        super().__init__()
        self.latent_dim = latent_dim
        self.layers = nn.Sequential(
            nn.Linear(latent_dim, 256 * 7 * 7),  # (N, 12544)
            nn.BatchNorm1d(256 * 7 * 7),
            nn.ReLU(),
            nn.Unflatten(1, (256, 7, 7)),  # (N, 256, 7, 7)
            nn.ConvTranspose2d(256, 128, 4, stride=2, padding=1, bias=False),  # (N, 128, 14, 14)
            nn.BatchNorm2d(128),
            nn.ReLU(),
            nn.ConvTranspose2d(128, 1, 4, stride=2, padding=1),  # (N, 1, 28, 28)
            nn.Tanh(),
        )

    def forward(self, z):
        return self.layers(z).float()


class Critic(nn.Module):
    """Images (N, 1, 28, 28) to scores (N, 1), unbounded; no batch normalisation, see gradient_penalty."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(1, 64, 4, stride=2, padding=1),  # (N, 64, 14, 14)
            nn.LeakyReLU(0.2),
            nn.Conv2d(64, 128, 4, stride=2, padding=1),  # (N, 128, 7, 7)
            nn.LeakyReLU(0.2),
            nn.Flatten(),  # (N, 6272)
            nn.Linear(128 * 7 * 7, 1),  # (N, 1)
        )

    def forward(self, images):
        return self.layers(images).float()


def init_weights(module):
    """Weights from N(0, 0.02), those of batch normalisation from N(1, 0.02), biases 0."""
    if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)):
        nn.init.normal_(module.weight, 0.0, 0.02)
    elif isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
        nn.init.normal_(module.weight, 1.0, 0.02)
    if getattr(module, "bias", None) is not None:
        nn.init.zeros_(module.bias)


# ---- Losses ------------------------------------------------------------------------------------------------


def critic_loss(real_scores, fake_scores):
    """E[C(G(z))] - E[C(x)]: down this slope the critic spreads the scores of real and fake apart."""
    return fake_scores.mean() - real_scores.mean()


def generator_loss(fake_scores):
    """-E[C(G(z))]."""
    return -fake_scores.mean()


def gradient_penalty(critic, real, fake, rng):
    """E[(|gradient of C at x'| - 1)^2], x' = t x + (1 - t) G(z), one t from U(0, 1) for each pair of images.

    Returns it and the mean norm, which is taken over all pixels of an image. The gradient of the sum of all
    scores has each image's own gradient in its row, because no score depends on another image: so there is
    no batch normalisation in the critic. The 1e-12 keeps the root's slope finite at a gradient of zero.
    """
    t = torch.rand(len(real), 1, 1, 1, device=real.device, generator=rng)
    mixed = torch.lerp(fake, real, t).requires_grad_()
    (gradient,) = torch.autograd.grad(critic(mixed).sum(), mixed, create_graph=True)
    norm = (gradient.flatten(1).square().sum(1) + 1e-12).sqrt()  # (N,)
    return (norm - 1).square().mean(), norm.detach().mean()


# ---- Training step -----------------------------------------------------------------------------------------

# What a step reports, grouped by the panels of losses.png.
PANELS = {"distance": ("wasserstein",), "gradient norm": ("gradient_norm",), "loss": ("c_loss", "g_loss")}
METRICS = [name for names in PANELS.values() for name in names]


def train_step(generator, critic, optimizer_g, optimizer_c, real, rng, autocast, n_critic, gp_weight):
    """Algorithm 1 of the paper: n_critic updates of the critic, then one of the generator.

    `real` (n_critic * N, 1, 28, 28) in [-1, 1] holds a fresh batch for each of the critic's updates. All
    noise comes from `rng`; the networks run in the context `autocast`. Returns the METRICS as detached
    scalars, still on the device; those of the critic are means over its updates.
    """
    batches = real.chunk(n_critic)

    def noise():
        return torch.randn(len(batches[0]), generator.latent_dim, device=real.device, generator=rng)

    # The critic learns to tell how far apart real and fake are, well ahead of the generator.
    seen = []
    for batch in batches:
        with autocast:
            with torch.no_grad():
                fake = generator(noise())
            distance = -critic_loss(critic(batch), critic(fake))
            penalty, gradient_norm = gradient_penalty(critic, batch, fake, rng)
        c_loss = gp_weight * penalty - distance
        optimizer_c.zero_grad()
        c_loss.backward()
        optimizer_c.step()
        seen.append(torch.stack((distance.detach(), gradient_norm, c_loss.detach())))

    # The generator takes one step that lowers the distance as the critic now measures it.
    critic.requires_grad_(False)
    with autocast:
        g_loss = generator_loss(critic(generator(noise())))
    optimizer_g.zero_grad()
    g_loss.backward()
    optimizer_g.step()
    critic.requires_grad_(True)

    return dict(zip(METRICS, (*torch.stack(seen).mean(0), g_loss.detach())))


# ---- Plumbing ----------------------------------------------------------------------------------------------

SCRIPT = Path(__file__).stem
IDX = [f"{part}-{kind}-ubyte" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")]
DATASETS = {  # torchvision's class, the folder where it looks, and the files there
    "mnist": (datasets.MNIST, "MNIST/raw", IDX),
    "fashion_mnist": (datasets.FashionMNIST, "FashionMNIST/raw", IDX),
}
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
    add("--epochs", type=int, default=25, help="passes over the training set")
    add("--max-steps", type=int, help="stop after this many steps, if that comes sooner")
    add("--device", default="auto", help="auto takes cuda, then mps, then cpu; or any torch device string")
    add("--lr-g", type=float, default=3e-4, help="Adam's learning rate for the generator")
    add("--lr-d", type=float, default=3e-4, help="Adam's learning rate for the critic")
    add("--batch-size", type=int, default=64, help="images per update of the critic")
    add("--latent-dim", type=int, default=100, help="length of the noise vector z")
    add("--dataset", choices=list(DATASETS), default="mnist", help="what to train on")
    add("--data-dir", default="data", help="where the data set is, or torchvision downloads it to")
    add("--out-dir", help=f"folder for all that is written; None takes runs/{SCRIPT}/<next free number>")
    add("--seed", type=int, default=42, help="all randomness follows from it")
    add("--precision", choices=["fp32", "bf16"], default="fp32", help="bf16 runs the networks under autocast")
    add("--resume", metavar="PATH", help="go on from this checkpoint.pt, with its settings and in its folder")
    add("--generate", type=int, metavar="N", help="no training: write N images, with --checkpoint")
    add("--checkpoint", metavar="PATH", help="the checkpoint.pt that --generate uses")
    add("--tensorboard", action="store_true", help="also write TensorBoard events")
    add("--n-critic", type=int, default=5, help="updates of the critic, each on a fresh batch, in a step")
    add("--gp-weight", type=float, default=10.0, help="weight of the gradient penalty")
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
    images = open_dataset(args.dataset, args.data_dir).data.unsqueeze(1).to(device)
    torch.manual_seed(args.seed)
    generator = Generator(args.latent_dim).apply(init_weights).to(device)
    critic = Critic().apply(init_weights).to(device)
    adam = {"betas": (0.0, 0.9), "fused": True}
    parts = {
        "generator": generator,
        "critic": critic,
        "optimizer_g": torch.optim.Adam(generator.parameters(), args.lr_g, **adam),
        "optimizer_c": torch.optim.Adam(critic.parameters(), args.lr_d, **adam),
    }
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=args.precision == "bf16")

    fixed_z = torch.randn(64, args.latent_dim, generator=stream("cpu", args.seed, "samples")).to(device)
    # cos(a) z1 + sin(a) z2 is as normal as z1 and z2 are; a straight line would pass too close to 0.
    angle = torch.linspace(0, math.pi / 2, 10, device=device)[:, None]
    walk_z = torch.cat([angle.cos() * z1 + angle.sin() * z2 for z1, z2 in fixed_z[:16].split(2)])

    with Run(args, images, device, args.n_critic, **parts) as run:
        print(f"{len(images):,} images, {run.steps_per_epoch} steps an epoch, on {device}, into {run.folder}")
        while run.step < run.last_step:
            for index in run.epoch():
                real = images[index].float().div_(127.5).sub_(1)
                rng = stream(device, args.seed, "step", run.step)
                metrics = train_step(*parts.values(), real, rng, autocast, args.n_critic, args.gp_weight)
                run.pending.append(torch.stack(list(metrics.values())))
            grid, walk = make_grid(sample(generator, fixed_z), 8), make_grid(sample(generator, walk_z), 10)
            run.end_epoch(grid, walk)
    print(f"{run.step} steps done, see {run.folder}")


def generate(args, device):
    """Write args.generate images, made by the generator in args.checkpoint, as PNG files."""
    generator = Generator(args.latent_dim).to(device)
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
