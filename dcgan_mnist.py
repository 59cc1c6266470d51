"""DCGAN for 28x28 digits: a generator and a discriminator made of convolutions.

    python dcgan_mnist.py                           # 25 epochs of MNIST, into runs/dcgan_mnist/001
    python dcgan_mnist.py --epochs 5 --device cuda
    python dcgan_mnist.py --generate 100 --checkpoint runs/dcgan_mnist/001/checkpoint.pt

The generator G turns noise z ~ N(0, I) into an image; the discriminator D gives the probability that an image
is real. For each batch, D takes a step down its loss, and then G down its own:

    L_D = -E[r log D(x) + (1 - r) log(1 - D(x))] - E[log(1 - D(G(z)))]        with r = 0.9
    L_G = -E[log D(G(z))]

Against a fixed G, whose images have density q where the data have p, the best D(x) is r p / (p + q). So there
are two ends to tell apart. If G is perfect, D says r / 2 = 0.45 to everything, and L_D = 1.38, L_G = 0.80. If
D sees through every fake, D(x) = 0.9, D(G(z)) = 0, L_D = 0.33, and L_G has no bound. A run lives between the
two.

DCGAN is a recipe meant to keep this game in balance: strides in place of pooling, no hidden fully connected
layers, batch normalisation everywhere but at G's output and D's input, ReLU in G and LeakyReLU in D, weights
from N(0, 0.02), Adam with learning rate 2e-4 and beta1 = 0.5. `train_step` is the game; `diagnose` watches
it.

What to watch, as means over an epoch of the default run (seed 42, fp32; pictures in the README): after epoch
1 the samples were broken strokes, after 3 most were digits, and from 5 on they only grew sharper, while L_G
rose from 1.64 to 1.91: a loss does not say how good the pictures are. Tutorials promise noise after 1, vague
digits after 5 and clear ones after 25. The D loss that they call healthy, 0.5 to 1.5, held: 0.77 to 0.99.
D(real) of 0.7 to 0.9 did not: 0.62 to 0.70. D(fake) did not rise to 0.3 or more: it went from 0.21 to 0.28 in
epoch 10, and back to 0.23. Two more seeds agreed (claims.py healthy, bf16). Failure looks like this (one
epoch, bf16): --lr-d 2e-3 --lr-g 1e-5 made D(fake) 0.002 and all samples the same texture, diversity 0.36
(MNIST's ones alone have 0.65); with both rates 2e-3, G's loss spiked all the time. The monitor names both; in
the default run it had nothing to say. Against the first, two epochs with --real-label 0.8, --instance-noise
0.1 or --lr-d 2e-4 brought no digits; with --lr-g 2e-4 rough ones came after one (claims.py remedies).

With weights as PyTorch initialises them, one seed of three made no digits for two epochs, and the distance to
the test set (fid.py --features classifier, median) was 686 after five, with N(0, 0.02) 411 (claims.py, bf16).
Smoothing and instance noise made no such difference: --real-label 1.0 came to 408, 0.8 to 463,
--instance-noise 0.1 to 435, 0.3 to 392.

Paper: Radford, Metz and Chintala 2015, arXiv 1511.06434. Departures: 28x28 takes two upsamplings, with
kernels of 4 (the paper: 64x64, four, 5); z is normal, not uniform; the first batch normalisation is per unit,
not per channel; D's target for real images, and only that, is smoothed (Salimans et al. 2016, arXiv
1606.03498); G's step uses the fakes of D's step again. Instance noise, off by default, is from Arjovsky and
Bottou 2017, arXiv 1701.04862.
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


class Generator(nn.Module):
    """Noise z (N, latent_dim) to images (N, 1, 28, 28) in [-1, 1]; `refine` adds a block at full size."""

    def __init__(self, latent_dim=100, refine=False):
        super().__init__()
        self.latent_dim = latent_dim
        layers = [
            nn.Linear(latent_dim, 256 * 7 * 7),  # (N, 12544)
            nn.BatchNorm1d(256 * 7 * 7),
            nn.ReLU(),
            nn.Unflatten(1, (256, 7, 7)),  # (N, 256, 7, 7)
            nn.ConvTranspose2d(256, 128, 4, stride=2, padding=1, bias=False),  # (N, 128, 14, 14)
            nn.BatchNorm2d(128),
            nn.ReLU(),
        ]
        if refine:
            layers += [
                nn.ConvTranspose2d(128, 64, 4, stride=2, padding=1, bias=False),  # (N, 64, 28, 28)
                nn.BatchNorm2d(64),
                nn.ReLU(),
                nn.ConvTranspose2d(64, 1, 3, stride=1, padding=1),  # (N, 1, 28, 28)
            ]
        else:
            layers += [nn.ConvTranspose2d(128, 1, 4, stride=2, padding=1)]  # (N, 1, 28, 28)
        self.layers = nn.Sequential(*layers, nn.Tanh())

    def forward(self, z):
        return self.layers(z).float()


class Discriminator(nn.Module):
    """Images (N, 1, 28, 28) to logits (N, 1); the sigmoid of a logit is the probability of "real"."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(1, 64, 4, stride=2, padding=1),  # (N, 64, 14, 14)
            nn.LeakyReLU(0.2),
            nn.Conv2d(64, 128, 4, stride=2, padding=1, bias=False),  # (N, 128, 7, 7)
            nn.BatchNorm2d(128),
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


def discriminator_loss(real_logits, fake_logits, real_label=0.9):
    """-E[r log D(x) + (1 - r) log(1 - D(x))] - E[log(1 - D(G(z)))], with r = real_label."""
    real_loss = F.binary_cross_entropy_with_logits(real_logits, torch.full_like(real_logits, real_label))
    return real_loss + F.binary_cross_entropy_with_logits(fake_logits, torch.zeros_like(fake_logits))


def generator_loss(fake_logits):
    """The non-saturating loss -E[log D(G(z))]; its target is a plain 1, whatever the discriminator's is."""
    return F.binary_cross_entropy_with_logits(fake_logits, torch.ones_like(fake_logits))


# ---- Training step -----------------------------------------------------------------------------------------

# What a step reports, grouped by the panels of losses.png.
PANELS = {"loss": ("d_loss", "g_loss"), "probability": ("d_real", "d_fake"), "diversity": ("diversity",)}
METRICS = [name for names in PANELS.values() for name in names]
WARM_UP = 100  # steps before the monitor speaks: what an untrained generator makes is all alike


def train_step(generator, discriminator, optimizer_g, optimizer_d, real, rng, autocast, real_label, noise):
    """Update the discriminator, then the generator, on a batch `real` (N, 1, 28, 28) in [-1, 1].

    All noise comes from `rng`; the networks run in the context `autocast`; what the discriminator sees has
    Gaussian noise of std `noise` on it. Returns the METRICS as detached scalars, still on the device.
    """

    def judge(images):
        if noise > 0:
            images = images + noise * torch.randn(images.shape, device=images.device, generator=rng)
        return discriminator(images)

    z = torch.randn(len(real), generator.latent_dim, device=real.device, generator=rng)

    # The discriminator learns to tell real from fake. Detached, the fakes carry no gradient to the generator.
    with autocast:
        fake = generator(z)
        real_logits, fake_logits = judge(real), judge(fake.detach())
    d_loss = discriminator_loss(real_logits, fake_logits, real_label)
    optimizer_d.zero_grad()
    d_loss.backward()
    optimizer_d.step()

    # The generator learns to fool the discriminator as it now is. The fakes are the same: their graph stands.
    discriminator.requires_grad_(False)
    with autocast:
        g_loss = generator_loss(judge(fake))
    optimizer_g.zero_grad()
    g_loss.backward()
    optimizer_g.step()
    discriminator.requires_grad_(True)

    d_real, d_fake = real_logits.detach().sigmoid().mean(), fake_logits.detach().sigmoid().mean()
    # The root mean square distance between two fakes, against that between two real images.
    diversity = (fake.detach().var(0, correction=0).mean() / real.var(0, correction=0).mean()).sqrt()
    return dict(zip(METRICS, (d_loss.detach(), g_loss.detach(), d_real, d_fake, diversity)))


def diagnose(steps, real_label):
    """Remarks on the health of an epoch, from its METRICS (steps, 5); none when all seems well."""
    d_real, d_fake = steps[:, 2].mean(), steps[:, 3].mean()
    g_loss = steps[: len(steps) // 20 * 20, 1].view(-1, 20)
    spikes = g_loss.amax(1) > 2 * g_loss.median(1).values  # one for every 20 steps
    remarks = []
    if d_real > 0.9 * real_label and d_fake < 0.05:
        remarks.append("discriminator too strong, never fooled: try a higher --lr-g")
    if spikes.sum() >= 3 and spikes.float().mean() > 1 / 3:
        remarks.append("unstable, G's loss spikes again and again: try lower --lr-g and --lr-d")
    if steps[-20:, 4].mean() < 0.5:
        remarks.append("mode collapse, samples are too alike: try a higher --lr-g, or wgan_gp.py")
    return remarks


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
    add("--batch-size", type=int, default=128, help="images per step")
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
    add("--refine", action="store_true", help="a generator with one more block, at full resolution")
    add("--real-label", type=float, default=0.9, help="D's target for real images, at most 1")
    add("--instance-noise", type=float, default=0.0, help="std of noise on D's input at first; it falls to 0")
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
        checked = type(value) in (int, float) and name not in ("seed", "instance_noise")
        if checked and not 0 < value < math.inf:
            fail(f"--{name.replace('_', '-')}: {value} is not a finite number above 0; give one that is")
    if args.real_label > 1:
        fail(f"--real-label: {args.real_label} is no probability; give one, above 0 and at most 1")
    if not 0 <= args.instance_noise < math.inf:
        fail(f"--instance-noise: {args.instance_noise} is not a finite number from 0 up; give one that is")
    if args.tensorboard and importlib.util.find_spec("tensorboard") is None:
        fail("--tensorboard: TensorBoard is not installed; pip install tensorboard")
    return args


# ---- Main --------------------------------------------------------------------------------------------------


def train(args, device):
    """Train from the start, or from the checkpoint args.resume."""
    torch.backends.cudnn.deterministic = True  # resuming bit for bit on CUDA needs it
    images = open_dataset(args.dataset, args.data_dir).data.unsqueeze(1).to(device)
    torch.manual_seed(args.seed)
    generator = Generator(args.latent_dim, args.refine).apply(init_weights).to(device)
    discriminator = Discriminator().apply(init_weights).to(device)
    adam = {"betas": (0.5, 0.999), "fused": True}
    parts = {
        "generator": generator,
        "discriminator": discriminator,
        "optimizer_g": torch.optim.Adam(generator.parameters(), args.lr_g, **adam),
        "optimizer_d": torch.optim.Adam(discriminator.parameters(), args.lr_d, **adam),
    }
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=args.precision == "bf16")

    fixed_z = torch.randn(64, args.latent_dim, generator=stream("cpu", args.seed, "samples")).to(device)
    # cos(a) z1 + sin(a) z2 is as normal as z1 and z2 are; a straight line would pass too close to 0.
    angle = torch.linspace(0, math.pi / 2, 10, device=device)[:, None]
    walk_z = torch.cat([angle.cos() * z1 + angle.sin() * z2 for z1, z2 in fixed_z[:16].split(2)])

    with Run(args, images, device, **parts) as run:
        print(f"{len(images):,} images, {run.steps_per_epoch} steps an epoch, on {device}, into {run.folder}")
        while run.step < run.last_step:
            for index in run.epoch():
                real = images[index].float().div_(127.5).sub_(1)
                rng = stream(device, args.seed, "step", run.step)
                noise = args.instance_noise * (1 - run.step / (args.epochs * run.steps_per_epoch))
                metrics = train_step(*parts.values(), real, rng, autocast, args.real_label, noise)
                run.pending.append(torch.stack(list(metrics.values())))
            grid, walk = make_grid(sample(generator, fixed_z), 8), make_grid(sample(generator, walk_z), 10)
            epoch = run.end_epoch(grid, walk)
            for remark in diagnose(epoch, args.real_label) if run.step >= WARM_UP else ():
                print(f"  {remark}", flush=True)
    print(f"{run.step} steps done, see {run.folder}")


def generate(args, device):
    """Write args.generate images, made by the generator in args.checkpoint, as PNG files."""
    generator = Generator(args.latent_dim, args.refine).to(device)
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
