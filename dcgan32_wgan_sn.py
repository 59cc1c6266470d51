"""DCGAN for 32x32 images with the Wasserstein loss and spectral normalisation of its critic.

    python dcgan32_wgan_sn.py                       # 20,000 steps of Fashion-MNIST
    python dcgan32_wgan_sn.py --epochs 5 --device cuda
    python dcgan32_wgan_sn.py --dataset cifar10     # the same networks in colour

The loss is the one of wgan_gp.py without its penalty. The critic C maximises, the generator G minimises

    E[C(x)] - E[C(G(z))]

Over all C whose slope is at most K, its maximum is K times the Wasserstein distance between real images and
fakes; with no such bound, C gains by multiplying its scores without end. Here the bound is built into the
layers: spectral normalisation divides the weight of each convolution, written as a matrix (outputs, inputs
x 25), by its largest singular value, which one step of power iteration at each use keeps up to date.
LeakyReLU has slope 1 at most, so the product over the layers bounds C. Not by 1: a pixel lies under up to 9
of the 5x5 windows at stride 2, so a convolution can stretch by 3 though its matrix cannot.

Batch normalisation in C loosens the bound: it divides by a standard deviation, and if that is small, the
slope is large again. `slope` shows it, the mean of |C(x) - C(G(z))| / |x - G(z)| over pairs of a batch. It is
there all the same (--critic-norm none leaves it out), for with it the samples were far better: after 20,000
steps a distance to the test set of 33 to 37 in three seeds, without it 102 in one (RESULTS.md).

What is different from dcgan_mnist.py: this loss; one step of C, then one of G on fresh noise; z from the
cube U(-1, 1)^100, so that straight walks stay within; one more upsampling; batches of 32; learning rates
3e-4 for G and 6e-4 for C.

What to watch (20,000 steps, seed 42, bf16; pictures in the README). The critic was ahead all the time, by a
difference of 36 after 1,000 steps and of 269 at the end, but its slope grew with it, from 2 to 17: the
difference shows how steep C is, and not how good the samples are, whose distance to the test set meanwhile
fell from 438 to 34. With --critic-norm none G had caught up at step 120, and from then on the difference
stayed within 3 of 0, which tells as little. With the learning rates of the listing below as well, 3e-5 and
6e-5, that took 1,700 steps, and the distance after 20,000 was 375.

Papers: Arjovsky et al. 2017, arXiv 1701.07875, equation 2; Miyato et al. 2018, arXiv 1802.05957, algorithm 1;
Radford et al. 2015, arXiv 1511.06434. Departures: from the first, no clipping of weights, Adam in place of
RMSProp, and one step of C for one of G, not five; from the second, this loss (there: binary cross-entropy and
hinge) and batch normalisation in C; from the third, weights as PyTorch initialises them, not from N(0, 0.02).
The listing that this variant goes back to has kernels of 3 in G's middle layers, which make images of 26x26,
no spectral normalisation, and learning rates of 3e-5 and 6e-5.
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
import torch.nn.functional as F
from matplotlib.figure import Figure
from PIL import Image, ImageDraw
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm
from torchvision import datasets
from torchvision.transforms.functional import to_pil_image
from torchvision.utils import make_grid
from tqdm import tqdm

# ---- Networks ----------------------------------------------------------------------------------------------


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
        return self.layers(z).float()


class Critic(nn.Module):
    """Images (N, channels, 32, 32) to scores (N, 1), unbounded; `norm` is batch or none."""

    def __init__(self, channels=1, norm="batch", spectral=True):
        super().__init__()
        plain = norm == "none"
        normalise = nn.Identity if plain else nn.BatchNorm2d
        self.layers = nn.Sequential(
            nn.Conv2d(channels, 64, 5, stride=2, padding=2),  # (N, 64, 16, 16)
            nn.LeakyReLU(0.2),
            nn.Conv2d(64, 128, 5, stride=2, padding=2, bias=plain),  # (N, 128, 8, 8)
            normalise(128),
            nn.LeakyReLU(0.2),
            nn.Conv2d(128, 256, 5, stride=2, padding=2, bias=plain),  # (N, 256, 4, 4)
            normalise(256),
            nn.LeakyReLU(0.2),
            nn.Conv2d(256, 1, 5, stride=2, padding=1, bias=False),  # (N, 1, 1, 1); a bias would cancel out
            nn.Flatten(),  # (N, 1)
        )
        for layer in self.layers:
            if spectral and isinstance(layer, nn.Conv2d):
                spectral_norm(layer)  # divides the weight by its largest singular value

    def forward(self, images):
        return self.layers(images).float()


# ---- Losses ------------------------------------------------------------------------------------------------


def critic_loss(real_scores, fake_scores):
    """E[C(G(z))] - E[C(x)]: down this slope the critic spreads the scores of real and fake apart."""
    return fake_scores.mean() - real_scores.mean()


def generator_loss(fake_scores):
    """-E[C(G(z))]."""
    return -fake_scores.mean()


# ---- Training step -----------------------------------------------------------------------------------------


def uniform(*shape, **options):
    """Noise from U(-1, 1)."""
    return torch.rand(*shape, **options) * 2 - 1


# What a step reports, grouped by the panels of losses.png.
PANELS = {"score": ("c_real", "c_fake", "wasserstein"), "slope": ("slope",), "diversity": ("diversity",)}
METRICS = [name for names in PANELS.values() for name in names]


def train_step(generator, critic, optimizer_g, optimizer_c, real, rng, autocast):
    """Update the critic, then the generator, on a batch `real` (N, C, 32, 32) in [-1, 1].

    All noise comes from `rng`; the networks run in the context `autocast`. Returns the METRICS as detached
    scalars, still on the device.
    """

    def noise():
        return uniform(len(real), generator.latent_dim, device=real.device, generator=rng)

    # The critic learns to tell how far apart real and fake are; the generator is left out of the graph.
    with autocast:
        with torch.no_grad():
            fake = generator(noise())
        real_scores, fake_scores = critic(real), critic(fake)
    c_loss = critic_loss(real_scores, fake_scores)
    optimizer_c.zero_grad()
    c_loss.backward()
    optimizer_c.step()

    # The generator takes one step, on fresh noise, that lowers the distance as the critic now measures it.
    critic.requires_grad_(False)
    with autocast:
        g_loss = generator_loss(critic(generator(noise())))
    optimizer_g.zero_grad()
    g_loss.backward()
    optimizer_g.step()
    critic.requires_grad_(True)

    # How steep the critic is between a real image and a fake one.
    rise = (real_scores - fake_scores).detach().abs().squeeze(1)
    slope = (rise / (real - fake).flatten(1).norm(dim=1)).mean()
    # The root mean square distance between two fakes, against that between two real images.
    diversity = (fake.var(0, correction=0).mean() / real.var(0, correction=0).mean()).sqrt()
    scores = real_scores.detach().mean(), fake_scores.detach().mean()
    return dict(zip(METRICS, (*scores, -c_loss.detach(), slope, diversity)))


# ---- Plumbing ----------------------------------------------------------------------------------------------

SCRIPT = Path(__file__).stem
IDX = [f"{part}-{kind}-ubyte" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")]
CIFAR = [*(f"data_batch_{number}" for number in range(1, 6)), "test_batch", "batches.meta"]
DATASETS = {  # torchvision's class, the folder where it looks, and the files there
    "fashion_mnist": (datasets.FashionMNIST, "FashionMNIST/raw", IDX),
    "mnist": (datasets.MNIST, "MNIST/raw", IDX),
    "cifar10": (datasets.CIFAR10, datasets.CIFAR10.base_folder, CIFAR),
}
STAGES = 200, 4000, 8000, 20000  # steps after which stages.png grows by a grid
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


def to_32x32(data):
    """torchvision's digits (N, 28, 28), padded, or colours (N, 32, 32, 3): as uint8 (N, C, 32, 32)."""
    images = torch.as_tensor(data)
    return images.permute(0, 3, 1, 2).contiguous() if images.ndim == 4 else F.pad(images[:, None], [2] * 4)


def write_stage(folder, step, grid):
    """Save the grid of this step, and stages.png with all such grids side by side."""
    (folder / "samples").mkdir(exist_ok=True)
    to_pil_image(grid).save(folder / "samples" / f"step_{step:05d}.png")
    paths = sorted((folder / "samples").glob("step_*.png"))
    width, height = Image.open(paths[0]).size
    joined = Image.new("RGB", (len(paths) * width, height + 14), "white")
    for i, path in enumerate(paths):
        ImageDraw.Draw(joined).text((i * width + 4, 1), f"after step {int(path.stem[5:])}", "black")
        joined.paste(Image.open(path), (i * width, 14))
    joined.save(folder / "stages.png")


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
    add("--epochs", type=int, default=11, help="passes over the training set")
    add("--max-steps", type=int, default=20000, help="stop after this many steps, if that comes sooner")
    add("--device", default="auto", help="auto takes cuda, then mps, then cpu; or any torch device string")
    add("--lr-g", type=float, default=3e-4, help="Adam's learning rate for the generator")
    add("--lr-d", type=float, default=6e-4, help="Adam's learning rate for the critic")
    add("--batch-size", type=int, default=32, help="images per step")
    add("--latent-dim", type=int, default=100, help="length of the noise vector z")
    add("--dataset", choices=list(DATASETS), default="fashion_mnist", help="what to train on")
    add("--data-dir", default="data", help="where the data set is, or torchvision downloads it to")
    add("--out-dir", help=f"folder for all that is written; None takes runs/{SCRIPT}/<next free number>")
    add("--seed", type=int, default=42, help="all randomness follows from it")
    add("--precision", choices=["fp32", "bf16"], default="fp32", help="bf16 runs the networks under autocast")
    add("--resume", metavar="PATH", help="go on from this checkpoint.pt, with its settings and in its folder")
    add("--generate", type=int, metavar="N", help="no training: write N images, with --checkpoint")
    add("--checkpoint", metavar="PATH", help="the checkpoint.pt that --generate uses")
    add("--tensorboard", action="store_true", help="also write TensorBoard events")
    add("--critic-norm", choices=["batch", "none"], default="batch", help="batch normalisation in the critic")
    add("--no-spectral-norm", action="store_true", help="leave the critic's slope unbounded")
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
    images = to_32x32(open_dataset(args.dataset, args.data_dir).data).to(device)
    torch.manual_seed(args.seed)
    generator = Generator(args.latent_dim, images.shape[1]).to(device)
    critic = Critic(images.shape[1], args.critic_norm, not args.no_spectral_norm).to(device)
    adam = {"betas": (0.5, 0.999), "fused": True}
    parts = {
        "generator": generator,
        "critic": critic,
        "optimizer_g": torch.optim.Adam(generator.parameters(), args.lr_g, **adam),
        "optimizer_c": torch.optim.Adam(critic.parameters(), args.lr_d, **adam),
    }
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=args.precision == "bf16")

    fixed_z = uniform(64, args.latent_dim, generator=stream("cpu", args.seed, "samples")).to(device)
    weight = torch.linspace(0, 1, 10, device=device)[:, None]
    walk_z = torch.cat([torch.lerp(z1, z2, weight) for z1, z2 in fixed_z[:16].split(2)])

    with Run(args, images, device, **parts) as run:
        print(f"{len(images):,} images, {run.steps_per_epoch} steps an epoch, on {device}, into {run.folder}")
        while run.step < run.last_step:
            for index in run.epoch():
                real = images[index].float().div_(127.5).sub_(1)
                rng = stream(device, args.seed, "step", run.step)
                metrics = train_step(*parts.values(), real, rng, autocast)
                run.pending.append(torch.stack(list(metrics.values())))
                if run.step + 1 in STAGES:
                    write_stage(run.folder, run.step + 1, make_grid(sample(generator, fixed_z), 8))
            grid, walk = make_grid(sample(generator, fixed_z), 8), make_grid(sample(generator, walk_z), 10)
            run.end_epoch(grid, walk)
    print(f"{run.step} steps done, see {run.folder}")


def generate(args, device):
    """Write args.generate images, made by the generator in args.checkpoint, as PNG files."""
    generator = Generator(args.latent_dim, 3 if args.dataset == "cifar10" else 1).to(device)
    load_checkpoint(args.checkpoint, generator=generator)
    folder = new_folder(args.out_dir, Path(args.checkpoint).parent / "generated")
    rng = stream("cpu", args.seed, "generate")
    with tqdm(total=args.generate, unit=" images") as bar:
        while bar.n < args.generate:
            z = uniform(min(256, args.generate - bar.n), args.latent_dim, generator=rng).to(device)
            for image in sample(generator, z):
                to_pil_image(image).save(folder / f"{bar.n:05d}.png")
                bar.update()
    print(f"{args.generate} images in {folder}")


def main(argv=None):
    args = parse_args(argv)
    (generate if args.generate else train)(args, pick_device(args.device))


if __name__ == "__main__":
    main()
