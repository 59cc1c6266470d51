"""A critic whose slope is bounded by its layers: spectral normalisation. Fashion-MNIST, 32x32.

    python dcgan32_wgan_sn.py                           # 11 epochs, into runs/dcgan32_wgan_sn/001
    python dcgan32_wgan_sn.py --epochs 5 --device cuda
    python dcgan32_wgan_sn.py --critic-norm none --loss hinge       # Miyato et al. train with this loss

     x ──► W1 / sigma1 ──► LeakyReLU ──► W2 / sigma2 ──► LeakyReLU ──► ... ──► score

A critic must not be steep. wgan_gp.py asks for that with a penalty, which takes a gradient of a gradient in
every step. Can the bound be built into the layers? Take the weights of a layer as a matrix W. It stretches
one direction most, by its largest singular value sigma. With W / sigma no layer is steep, nor is LeakyReLU.
So the slope of the whole critic is bounded, and the Wasserstein loss needs no penalty:

    L_C = E[C(G(z))] - E[C(x)]        L_G = -E[C(G(z))]

Where does sigma come from? Power iteration: keep multiplying a vector by W and its transpose; it turns
towards the direction that W stretches most. One round per use will do, because W changes slowly.

Batch normalisation in the critic breaks the bound: it divides by a standard deviation, which cancels the
scale of the layers before it. Tutorials put both into one critic, and so does this script, since the samples
are better. But there batch normalisation does the work; for the bound itself, take --critic-norm none.

What to watch: stages.png, the samples after 200, 4,000, 8,000 and 20,000 steps. Try --critic-norm none
with and without --no-spectral-norm. What happens to c_real - c_fake?

Papers: Miyato et al. 2018, arXiv 1802.05957; Arjovsky et al. 2017, 1701.07875. Departures from the first:
this loss, kernels of 5, PyTorch's initial weights, z from U(-1, 1)^100; from the second: Adam, no clipping,
one step of C for one of G. The rates are ten times the tutorials' (--published).
"""

import argparse
import contextlib
import json
import math
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from PIL import Image
from torch import accelerator, nn
from torchvision import datasets
from torchvision.utils import save_image
from tqdm import tqdm

# %% Settings
SCRIPT = "dcgan32_wgan_sn"
DATA = str(Path(globals().get("__file__", "cell")).resolve().parent / "data")  # notebooks have no __file__
PANELS = [["c_real", "c_fake"], ["diversity"]]  # what losses.png shows
PUBLISHED = {"lr_g": 3e-5, "lr_d": 6e-5}  # for --published
STAGES = 200, 4000, 8000, 20000  # steps after which stages.png grows


def add_flags(add):
    """The flags, this script's own first; `add` is argparse's parser.add_argument."""
    add("--critic-norm", choices=["batch", "none"], default="batch", help="batch normalisation in the critic")
    add("--no-spectral-norm", action="store_true", help="leave the critic's slope unbounded")
    add("--loss", choices=["wasserstein", "hinge"], default="wasserstein", help="what the critic lowers")
    add("--published", action="store_true", help=f"the tutorials' settings: {PUBLISHED}")
    add("--epochs", type=int, default=11, help="passes over the training images")
    add("--lr-g", type=float, default=3e-4, help="Adam's learning rate for the generator")
    add("--lr-d", type=float, default=6e-4, help="Adam's learning rate for the critic")
    add("--batch-size", type=int, default=32, help="images per step")
    add("--latent-dim", type=int, default=100, help="length of the noise vector z")
    choices = ["fashion_mnist", "mnist", "cifar10"]
    add("--dataset", choices=choices, default="fashion_mnist", help="what to train on")
    add("--data-dir", default=DATA, help="where the data set is, or will be downloaded")
    add("--limit", type=int, metavar="N", help="train on N of the images only, for a quick look")
    add("--fid-every", type=int, metavar="K", help="every K epochs, measure samples with fid.py")
    add("--device", default="auto", help="auto (a GPU if there is one), cpu, cuda, cuda:1, mps, ...")
    add("--precision", choices=["fp32", "tf32", "bf16"], default="fp32", help="faster, less exact than fp32")
    add("--seed", type=int, default=42, help="all randomness follows from it")
    add("--keep-every", type=int, metavar="K", help="every K epochs, also save the generator alone")
    add("--out-dir", help="a new folder for the run; default: the next free number in runs/<script>")
    add("--resume", metavar="PATH", help="go on from this checkpoint.pt; flags you give win over its own")
    add("--generate", type=int, metavar="N", help="no training: write N images, with --checkpoint")
    add("--checkpoint", metavar="PATH", help="the checkpoint.pt that --generate uses")


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


class SpectralConv2d(nn.Conv2d):
    """A convolution whose kernels, as a matrix (outputs, inputs * 25), are divided by sigma (algorithm 1).

    It may still stretch by more than 1: at stride 2 a pixel lies in up to nine 5x5 windows, so by up to 3.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.register_buffer("u", F.normalize(torch.randn(self.out_channels), dim=0))

    def sigma(self):
        """The largest singular value, after one more round of power iteration (in eval mode without)."""
        with torch.autocast(self.weight.device.type, enabled=False):  # bf16 would round it
            matrix = self.weight.flatten(1)
            with torch.no_grad():  # u and v count as constants
                v = F.normalize(matrix.T @ self.u, dim=0)
                if self.training:
                    self.u = F.normalize(matrix @ v, dim=0)
            return self.u @ (matrix @ v)

    def forward(self, x):
        return F.conv2d(x, self.weight / self.sigma(), self.bias, self.stride, self.padding)


class Critic(nn.Module):
    """Images (N, channels, 32, 32) to scores (N, 1), unbounded."""

    def __init__(self, channels=1, batch_norm=True, spectral_norm=True):
        super().__init__()
        conv = SpectralConv2d if spectral_norm else nn.Conv2d

        def norm(width):
            return nn.BatchNorm2d(width) if batch_norm else nn.Identity()

        self.layers = nn.Sequential(
            conv(channels, 64, 5, stride=2, padding=2),  # (N, 64, 16, 16)
            nn.LeakyReLU(0.2),
            conv(64, 128, 5, stride=2, padding=2, bias=not batch_norm),  # (N, 128, 8, 8)
            norm(128),
            nn.LeakyReLU(0.2),
            conv(128, 256, 5, stride=2, padding=2, bias=not batch_norm),  # (N, 256, 4, 4)
            norm(256),
            nn.LeakyReLU(0.2),
            conv(256, 1, 5, stride=2, padding=1),  # (N, 1, 1, 1)
            nn.Flatten(),  # (N, 1)
        )

    def forward(self, images):
        return self.layers(images)


# %% Losses
def critic_loss(real_scores, fake_scores, loss="wasserstein"):
    """L_C = E[C(G(z))] - E[C(x)], or the hinge E[max(0, 1 - C(x))] + E[max(0, 1 + C(G(z)))]."""
    if loss == "hinge":
        return F.relu(1 - real_scores).mean() + F.relu(1 + fake_scores).mean()
    return fake_scores.mean() - real_scores.mean()


def generator_loss(fake_scores):
    """L_G = -E[C(G(z))]."""
    return -fake_scores.mean()


# %% Training step
def uniform(n, latent_dim, **options):
    """Noise z (n, latent_dim) from U(-1, 1); the options are those of torch.rand."""
    return torch.rand(n, latent_dim, **options) * 2 - 1


def train_step(generator, critic, optimizer_g, optimizer_c, real, loss="wasserstein", precision="fp32"):
    """One step of the critic, then one of G, on images `real` (N, C, 32, 32) in [-1, 1]."""
    bf16 = precision == "bf16"

    # The critic learns to score real images higher than fakes.
    with torch.autocast(real.device.type, torch.bfloat16, enabled=bf16):
        with torch.no_grad():
            fake = generator(uniform(len(real), generator.latent_dim, device=real.device))
        real_scores, fake_scores = critic(real).float(), critic(fake).float()
    c_loss = critic_loss(real_scores, fake_scores, loss)
    optimizer_c.zero_grad()
    c_loss.backward()
    optimizer_c.step()

    # G learns, from fresh noise, to get higher scores; the critic is frozen.
    critic.requires_grad_(False)
    with torch.autocast(real.device.type, torch.bfloat16, enabled=bf16):
        fake = generator(uniform(len(real), generator.latent_dim, device=real.device))
        g_loss = generator_loss(critic(fake).float())
    optimizer_g.zero_grad()
    g_loss.backward()
    optimizer_g.step()
    critic.requires_grad_(True)

    metrics = {"c_real": real_scores.mean(), "c_fake": fake_scores.mean()}
    metrics["diversity"] = (fake.float().var(0).mean() / real.var(0).mean()).sqrt()  # 1: fakes vary as much
    return {name: value.detach() for name, value in metrics.items()}  # .item() would wait for the GPU


# %% Training
def build(args):
    """The networks and optimisers of a run, by the names of train_step's arguments."""
    torch.manual_seed(args.seed)
    channels = 3 if args.dataset == "cifar10" else 1
    generator = Generator(args.latent_dim, channels)
    critic = Critic(channels, args.critic_norm == "batch", not args.no_spectral_norm)
    layout = torch.contiguous_format if "mps" in args.device else torch.channels_last  # faster; wrong on mps
    for network in generator, critic:
        network.to(args.device, memory_format=layout)
    adam = {"betas": (0.5, 0.999), "fused": True}  # fused: faster
    return {
        "generator": generator,
        "critic": critic,
        "optimizer_g": torch.optim.Adam(generator.parameters(), args.lr_g, **adam),
        "optimizer_c": torch.optim.Adam(critic.parameters(), args.lr_d, **adam),
    }


def train(args):
    """Train from the start, or go on from the checkpoint args.resume."""
    images = load_images(args)
    batch_size = min(args.batch_size, len(images))
    if batch_size < 2:
        fail("--batch-size, --limit: batch normalisation needs 2 images or more in a batch")
    parts = build(args)
    generator = parts["generator"]
    history = []  # the mean metrics of each epoch
    if args.resume:
        history = load_checkpoint(args.resume, **parts)["history"]  # and the parts are as they were
        parts["optimizer_g"].param_groups[0]["lr"] = args.lr_g  # but with the rates of now
        parts["optimizer_c"].param_groups[0]["lr"] = args.lr_d
    if len(history) >= args.epochs:
        fail(f"--epochs: {args.resume} has run {len(history)} already; ask for more")
    if args.fid_every:
        import fid

        judge = fid.Judge(args.dataset, images, args.device, args.data_dir)  # may train a classifier first
    folder = open_folder(args, f"runs/{SCRIPT}")
    (folder / "config.json").write_text(json.dumps(vars(args) | {"torch": torch.__version__}, indent=2))
    steps = len(images) // batch_size * args.epochs
    few = " (few: for better pictures raise --epochs)" if steps < 1000 else ""
    print(f"{len(images):,} images, {steps:,} steps{few}, on {args.device}: {folder}", file=sys.stderr)

    for epoch in range(len(history) + 1, args.epochs + 1):
        torch.manual_seed(args.seed * 10_000 + epoch)  # so a resumed run draws the same numbers
        order = torch.randperm(len(images)).to(args.device)
        batches = order.split(batch_size)[: len(images) // batch_size]  # whole ones only
        metrics, start = [], time.perf_counter()
        for batch in tqdm(batches, f"epoch {epoch}", leave=False):
            real = images[batch] / 127.5 - 1
            metrics.append(train_step(**parts, real=real, loss=args.loss, precision=args.precision))
            step = (epoch - 1) * len(batches) + len(metrics)
            if step in STAGES:
                draw_stage(generator, folder, step, args)

        means = {name: torch.stack([step[name] for step in metrics]).mean().item() for name in metrics[0]}
        history.append({"epoch": epoch} | means)
        text = "  ".join(f"{name} {value:.3f}" for name, value in means.items())
        print(f"epoch {epoch}/{args.epochs}  {text}  {time.perf_counter() - start:.0f} s", flush=True)
        draw(generator, folder, epoch, args)
        if args.fid_every and epoch % args.fid_every == 0:
            fid.track(judge, lambda n: sample(generator, uniform(n, args.latent_dim)), folder, epoch)
        save(parts, history, folder, args)
        plot(history, folder, last=epoch == args.epochs)


# %% Data, pictures, files
def fail(message, status=2):
    """End the program with one line on stderr."""
    tqdm.write(f"{SCRIPT}.py: {message}", file=sys.stderr)
    raise SystemExit(status) from None


def load_images(args):
    """The training images as bytes (N, C, 32, 32), all on the device; those of 28x28 are padded."""
    names = {"fashion_mnist": "FashionMNIST", "mnist": "MNIST", "cifar10": "CIFAR10"}
    dataset_class = getattr(datasets, names[args.dataset])
    try:
        images = torch.as_tensor(dataset_class(args.data_dir, download=True).data)
    except Exception as error:  # many types are possible
        fail(f"--data-dir: {args.dataset} is not in {args.data_dir} and cannot be downloaded ({error!r:.99})")
    images = images.movedim(3, 1) if images.ndim == 4 else F.pad(images[:, None], (2, 2, 2, 2))
    torch.manual_seed(args.seed)
    return images[torch.randperm(len(images))[: args.limit or None]].to(args.device)


@torch.no_grad()
def sample(generator, z):
    """Images (N, C, H, W) in [0, 1], on the CPU; in eval mode, so that each depends on its own z alone."""
    training, device = generator.training, next(generator.parameters()).device
    generator.eval()
    images = torch.cat([generator(chunk.to(device)).cpu() / 2 + 0.5 for chunk in z.split(500)])
    generator.train(training)
    return images


def draw(generator, folder, epoch, args):
    """Write the samples of an epoch, always from the same z, and interpolation.png."""
    (folder / "samples").mkdir(exist_ok=True)
    z = uniform(64, args.latent_dim, generator=torch.Generator().manual_seed(args.seed))
    save_image(sample(generator, z), folder / "samples" / f"epoch_{epoch:04d}.png", nrow=8)
    t = torch.linspace(0, 1, 10)[:, None]  # each row walks from one z to another
    walks = [torch.lerp(z1, z2, t) for z1, z2 in z[:16].split(2)]
    save_image(sample(generator, torch.cat(walks)), folder / "interpolation.png", nrow=10)


def draw_stage(generator, folder, step, args):
    """Write the samples after so many steps, and stages.png with those of all STAGES so far side by side."""
    (folder / "samples").mkdir(exist_ok=True)
    z = uniform(64, args.latent_dim, generator=torch.Generator().manual_seed(args.seed))
    save_image(sample(generator, z), folder / "samples" / f"step_{step:05d}.png", nrow=8)
    paths = sorted(path for path in (folder / "samples").glob("step_?????.png") if path.stat().st_size)
    grids = [np.asarray(Image.open(path)) for path in paths]
    Image.fromarray(np.hstack(grids)).save(folder / "stages.png")


def plot(history, folder, last):
    """Write history.csv after each epoch; every half a minute, and at last, losses.png and progress.gif."""
    rows = [",".join(f"{means.get(name, math.nan):.5g}" for name in history[-1]) for means in history]
    (folder / "history.csv").write_text("\n".join([",".join(history[-1]), *rows]) + "\n")
    path = folder / "losses.png"
    if not last and path.exists() and time.time() - path.stat().st_mtime < 30:
        return  # these can take longer than an epoch
    figure = Figure(figsize=(8, 2.4 * len(PANELS)), layout="constrained")
    for axis, names in zip(figure.subplots(len(PANELS), squeeze=False).flat, PANELS):
        values = [[means[name] for name in names] for means in history]
        axis.plot(range(1, len(history) + 1), values, ".-", label=names)
        axis.locator_params("x", integer=True)
        axis.set_xlabel("epoch")
        axis.legend()
    figure.savefig(path)
    paths = sorted(path for path in (folder / "samples").glob("epoch_????.png") if path.stat().st_size)
    with contextlib.suppress(OSError):  # one may be cut off
        frames = [Image.open(path) for path in paths[:: math.ceil(len(paths) / 100)]]  # at most 100
        frames[0].save(folder / "progress.gif", save_all=True, append_images=frames[1:], duration=200, loop=0)


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
    settings = {name: value for name, value in vars(args).items() if name not in not_saved and value != DATA}
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
    """The generator of a checkpoint, for any program: sample(load_generator(path), uniform(64, 100))."""
    settings = load_checkpoint(path)["settings"]
    generator = Generator(settings["latent_dim"], 3 if settings["dataset"] == "cifar10" else 1)
    load_checkpoint(path, generator=generator)
    return generator.to(device).eval()


# %% Command line
def parse_args(argv=None):
    """The settings: a flag that is given, else --published, else the checkpoint, else the default."""
    parser = argparse.ArgumentParser(f"{SCRIPT}.py", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.description = (__doc__ or "").split("\n")[0]  # none under python -OO
    parser.error = fail  # one line in place of argparse's usage text
    add_flags(parser.add_argument)
    args = parser.parse_args(argv)  # a first look, for --resume and the like
    if (args.generate is None) != (args.checkpoint is None) or (args.generate and args.resume):
        fail("--generate N needs --checkpoint PATH, and no --resume")
    if (args.resume, args.checkpoint) != (None, None):
        parser.set_defaults(**load_checkpoint(args.resume or args.checkpoint)["settings"])
    if args.published:
        parser.set_defaults(**PUBLISHED)
    args = parser.parse_args(argv)  # with the new defaults
    for name, value in vars(args).items():
        lowest = 0 if type(value) is float or name in ("seed", "limit", "fid_every") else 1  # counts: from 1
        if type(value) in (int, float) and not lowest <= value < 10**12:
            fail(f"--{name.replace('_', '-')}: give a number from {lowest} to 10**12")
    if args.fid_every and not args.checkpoint and not Path(DATA).with_name("fid.py").exists():
        fail("--fid-every: put fid.py of the same collection beside this script")
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
    """Write args.generate images as PNG files, drawn by the generator in args.checkpoint."""
    generator = load_generator(args.checkpoint, args.device)
    folder = open_folder(args, Path(args.checkpoint).parent / "generated")
    torch.manual_seed(args.seed)
    z = uniform(args.generate, generator.latent_dim)
    for number, image in enumerate(sample(generator, z)):
        save_image(image, folder / f"{number:05d}.png")
    print(f"{args.generate} images in {folder}", file=sys.stderr)


def main(argv=None):
    args = parse_args(argv)
    torch.backends.cudnn.deterministic = True  # so that --resume is exact
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = args.precision == "tf32"
    run = generate if args.checkpoint else train
    try:
        run(args)
    except KeyboardInterrupt:
        fail("stopped; --resume goes on after the last whole epoch, if there was one", 130)
    except OSError as error:  # a folder that is there already or cannot be written, a full disk
        fail(f"{error} (a run writes into --out-dir)")


if __name__ == "__main__":
    main([] if "kernel_launcher" in sys.argv[0] else None)  # the flags of a notebook are not ours
