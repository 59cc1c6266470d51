"""Conditional GAN: both networks are told the class, so that the user can choose it; 28x28.

    python cgan.py                                  # 25 epochs of MNIST, into runs/cgan/001
    python cgan.py --epochs 5 --device cuda
    python cgan.py --generate 100 --checkpoint runs/cgan/001/checkpoint.pt --label 7

A GAN gives an image from the data, but not the image that one wants. Let every image x come with its class
y, and give y to both players: G makes an image from (z, y), D judges the pair (x, y). The game is as
before, for each class:

    L_D = -E[r log D(x, y) + (1 - r) log(1 - D(x, y))] - E[log(1 - D(G(z, y), y))]       with r = 0.9
    L_G = -E[log D(G(z, y), y)]

Nothing in the losses says "make a 7". But D sees real images with their own classes only, so that a fine 3
under the label 7 is as surely a fake as a blot is; to be taken for real, G must make what it is told to.
Against a fixed G the best D(x, y) is r p / (p + q) with the densities p and q given y, and the game shrinks
a distance between real and fake in each class on its own.

What is different from dcgan_mnist.py: in G the class is ten learned numbers beside z; in D it is a learned
picture, a second channel beside the image (an embedding of 10 and of 784 numbers for each class); the fakes
are made for the classes of the real batch. `--mlp` takes a minimal generator, with one hidden layer. In the
sample grid each row is a class and each column a noise vector: what a column has in common (slant, width)
is style, which z keeps for all classes.

What to watch (10 epochs, seed 42, bf16, means over an epoch; pictures in the README): after epoch 1 the
rows of 0, 1 and 7 could be read, those of 2 and 3, or 4 and 9, not be told apart; after 10 every row was
its digit, and slant and width ran down the columns. The losses hardly moved: L_D from 0.98 to 1.12 in
epoch 3 and back to 1.06, D(real) between 0.56 and 0.61, D(fake) between 0.29 and 0.34. They do not say
whether the classes are right: the grid does. In figures (claims.py control; three seeds, bf16), 73 to 84%
of the samples were of the class asked for after epoch 1, 98.5% after 5 and 99.4% after 10, at a distance
to the test set of 19 (fid.py --features classifier); the same networks without the class, as in
dcgan_mnist.py, came to 338 (claims.py labels). 25 epochs (seed 42) came to 17, and were best after 15.
With --mlp it was 90% after 10, but the distance, best after 4 or 5 epochs, rose to 770: D was ahead, and
the samples of a class were much alike. One such seed had an accuracy of 1.000: right is not good.

`--generate N` fills one folder for each class, in the layout of torchvision's ImageFolder; `--label 7`
makes that class alone.

Paper: Mirza and Osindero 2014, arXiv 1411.1784, equation 2. Departures: the networks and the recipe are
those of dcgan_mnist.py (the paper: fully connected layers, maxout in D, one-hot classes); D's target for
real images is smoothed to 0.9; batches of 64.
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
from PIL import Image
from torch import nn
from torchvision import datasets
from torchvision.transforms.functional import to_pil_image
from torchvision.utils import make_grid
from tqdm import tqdm

# ---- Networks ----------------------------------------------------------------------------------------------

CLASSES = 10


class Generator(nn.Module):
    """Noise z (N, latent_dim) and classes (N,) to images (N, 1, 28, 28) in [-1, 1]; `mlp`: a minimal one."""

    def __init__(self, latent_dim=100, mlp=False):
        super().__init__()
        self.latent_dim = latent_dim
        self.embedding = nn.Embedding(CLASSES, CLASSES)
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
                nn.Linear(latent_dim + CLASSES, 256 * 7 * 7),  # (N, 12544)
                nn.BatchNorm1d(256 * 7 * 7),
                nn.ReLU(),
                nn.Unflatten(1, (256, 7, 7)),  # (N, 256, 7, 7)
                nn.ConvTranspose2d(256, 128, 4, stride=2, padding=1, bias=False),  # (N, 128, 14, 14)
                nn.BatchNorm2d(128),
                nn.ReLU(),
                nn.ConvTranspose2d(128, 1, 4, stride=2, padding=1),  # (N, 1, 28, 28)
                nn.Tanh(),
            )

    def forward(self, z, labels):
        return self.layers(torch.cat((z, self.embedding(labels)), 1)).float()


class Discriminator(nn.Module):
    """Images (N, 1, 28, 28) and their classes (N,) to logits (N, 1) of "a real image of that class"."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(CLASSES, 28 * 28)
        self.layers = nn.Sequential(
            nn.Conv2d(2, 64, 4, stride=2, padding=1),  # (N, 64, 14, 14)
            nn.LeakyReLU(0.2),
            nn.Conv2d(64, 128, 4, stride=2, padding=1, bias=False),  # (N, 128, 7, 7)
            nn.BatchNorm2d(128),
            nn.LeakyReLU(0.2),
            nn.Flatten(),  # (N, 6272)
            nn.Linear(128 * 7 * 7, 1),  # (N, 1)
        )

    def forward(self, images, labels):
        channel = self.embedding(labels).view(-1, 1, 28, 28)  # the class as a picture of its own
        return self.layers(torch.cat((images, channel), 1)).float()


def init_weights(module):
    """Weights from N(0, 0.02), those of batch normalisation from N(1, 0.02), biases 0; embeddings N(0, 1)."""
    if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)):
        nn.init.normal_(module.weight, 0.0, 0.02)
    elif isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
        nn.init.normal_(module.weight, 1.0, 0.02)
    if getattr(module, "bias", None) is not None:
        nn.init.zeros_(module.bias)


# ---- Losses ------------------------------------------------------------------------------------------------


def discriminator_loss(real_logits, fake_logits, real_label=0.9):
    """-E[r log D(x, y) + (1 - r) log(1 - D(x, y))] - E[log(1 - D(G(z, y), y))], with r = real_label."""
    real_loss = F.binary_cross_entropy_with_logits(real_logits, torch.full_like(real_logits, real_label))
    return real_loss + F.binary_cross_entropy_with_logits(fake_logits, torch.zeros_like(fake_logits))


def generator_loss(fake_logits):
    """The non-saturating loss -E[log D(G(z, y), y)]."""
    return F.binary_cross_entropy_with_logits(fake_logits, torch.ones_like(fake_logits))


# ---- Training step -----------------------------------------------------------------------------------------

# What a step reports, grouped by the panels of losses.png.
PANELS = {"loss": ("d_loss", "g_loss"), "probability": ("d_real", "d_fake")}
METRICS = [name for names in PANELS.values() for name in names]


def train_step(generator, discriminator, optimizer_g, optimizer_d, real, labels, rng, autocast, real_label):
    """Update the discriminator, then the generator, on a batch `real` (N, 1, 28, 28) in [-1, 1].

    `labels` (N,) are its classes, and the fakes are made for the same ones. All noise comes from `rng`; the
    networks run in the context `autocast`. Returns the METRICS as detached scalars, still on the device.
    """
    z = torch.randn(len(real), generator.latent_dim, device=real.device, generator=rng)

    # The discriminator learns to tell real from fake. Detached, the fakes carry no gradient to the generator.
    with autocast:
        fake = generator(z, labels)
        real_logits, fake_logits = discriminator(real, labels), discriminator(fake.detach(), labels)
    d_loss = discriminator_loss(real_logits, fake_logits, real_label)
    optimizer_d.zero_grad()
    d_loss.backward()
    optimizer_d.step()

    # The generator learns to fool the discriminator as it now is. The fakes are the same: their graph stands.
    discriminator.requires_grad_(False)
    with autocast:
        g_loss = generator_loss(discriminator(fake, labels))
    optimizer_g.zero_grad()
    g_loss.backward()
    optimizer_g.step()
    discriminator.requires_grad_(True)

    d_real, d_fake = real_logits.detach().sigmoid().mean(), fake_logits.detach().sigmoid().mean()
    return dict(zip(METRICS, (d_loss.detach(), g_loss.detach(), d_real, d_fake)))


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
    add("--lr-g", type=float, default=2e-4, help="Adam's learning rate for the generator")
    add("--lr-d", type=float, default=2e-4, help="Adam's learning rate for the discriminator")
    add("--batch-size", type=int, default=64, help="images per step")
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
    add("--mlp", action="store_true", help="a minimal generator: one hidden layer, fully connected")
    add("--real-label", type=float, default=0.9, help="D's target for real images, at most 1")
    add("--label", type=int, metavar="CLASS", help="with --generate: images of this class, 0 to 9, alone")
    args = parser.parse_args(argv)

    if (args.generate is None) != (args.checkpoint is None) or (args.generate and args.resume):
        fail("--generate N goes with --checkpoint PATH, and not with --resume; give these two")
    if args.label is not None and (not args.generate or not 0 <= args.label < CLASSES):
        fail(f"--label: {args.label} is not a class from 0 to {CLASSES - 1} to --generate; give one that is")
    if path := args.resume or args.checkpoint:
        settings = load_checkpoint(path)["settings"]
        asked = ("resume", "generate", "checkpoint", "out_dir", "label")
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
        checked = type(value) in (int, float) and name not in ("seed", "label")
        if checked and not 0 < value < math.inf:
            fail(f"--{name.replace('_', '-')}: {value} is not a finite number above 0; give one that is")
    if args.real_label > 1:
        fail(f"--real-label: {args.real_label} is no probability; give one, above 0 and at most 1")
    if args.tensorboard and importlib.util.find_spec("tensorboard") is None:
        fail("--tensorboard: TensorBoard is not installed; pip install tensorboard")
    return args


# ---- Main --------------------------------------------------------------------------------------------------


def train(args, device):
    """Train from the start, or from the checkpoint args.resume."""
    torch.backends.cudnn.deterministic = True  # resuming bit for bit on CUDA needs it
    data = open_dataset(args.dataset, args.data_dir)
    images, labels = data.data.unsqueeze(1).to(device), data.targets.to(device)
    torch.manual_seed(args.seed)
    generator = Generator(args.latent_dim, args.mlp).apply(init_weights).to(device)
    discriminator = Discriminator().apply(init_weights).to(device)
    adam = {"betas": (0.5, 0.999), "fused": True}
    parts = {
        "generator": generator,
        "discriminator": discriminator,
        "optimizer_g": torch.optim.Adam(generator.parameters(), args.lr_g, **adam),
        "optimizer_d": torch.optim.Adam(discriminator.parameters(), args.lr_d, **adam),
    }
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=args.precision == "bf16")

    # The pictures have a row for each class; from row to row the noise is the same.
    rows = torch.arange(CLASSES, device=device).repeat_interleave(10)
    fixed_z = torch.randn(10, args.latent_dim, generator=stream("cpu", args.seed, "samples")).to(device)
    # cos(a) z1 + sin(a) z2 is as normal as z1 and z2 are; a straight line would pass too close to 0.
    angle = torch.linspace(0, math.pi / 2, 10, device=device)[:, None]
    walk_z = angle.cos() * fixed_z[0] + angle.sin() * fixed_z[1]
    fixed_z, walk_z = fixed_z.repeat(CLASSES, 1), walk_z.repeat(CLASSES, 1)

    with Run(args, images, device, **parts) as run:
        print(f"{len(images):,} images, {run.steps_per_epoch} steps an epoch, on {device}, into {run.folder}")
        while run.step < run.last_step:
            for index in run.epoch():
                real = images[index].float().div_(127.5).sub_(1)
                rng = stream(device, args.seed, "step", run.step)
                metrics = train_step(*parts.values(), real, labels[index], rng, autocast, args.real_label)
                run.pending.append(torch.stack(list(metrics.values())))
            grid, walk = (make_grid(sample(generator, z, rows), 10) for z in (fixed_z, walk_z))
            run.end_epoch(grid, walk)
    print(f"{run.step} steps done, see {run.folder}")


def generate(args, device):
    """Write args.generate images as PNG files, of class args.label or of all in turn, a folder for each."""
    generator = Generator(args.latent_dim, args.mlp).to(device)
    load_checkpoint(args.checkpoint, generator=generator)
    folder = new_folder(args.out_dir, Path(args.checkpoint).parent / "generated")
    rng = stream("cpu", args.seed, "generate")
    classes = range(CLASSES) if args.label is None else [args.label]
    for label in classes:
        (folder / str(label)).mkdir()
    with tqdm(total=args.generate, unit=" images") as bar:
        while bar.n < args.generate:
            z = torch.randn(min(256, args.generate - bar.n), args.latent_dim, generator=rng).to(device)
            labels = [classes[(bar.n + i) % len(classes)] for i in range(len(z))]
            for label, image in zip(labels, sample(generator, z, torch.tensor(labels, device=device))):
                to_pil_image(image).save(folder / str(label) / f"{bar.n:05d}.png")
                bar.update()
    print(f"{args.generate} images in {folder}")


def main(argv=None):
    args = parse_args(argv)
    (generate if args.generate else train)(args, pick_device(args.device))


if __name__ == "__main__":
    main()
