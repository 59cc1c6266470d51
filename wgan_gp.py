"""WGAN-GP: a critic that measures how far the fakes are from real images. MNIST, 28x28.

    python wgan_gp.py                                   # 25 epochs, into runs/wgan_gp/001
    python wgan_gp.py --epochs 5 --device cuda

    JSD  ─ log 2 ─┐ ┌─────────        W ╲         ╱
                  │ │                    ╲     ╱          two piles of probability,
                  └─┘                       V             a distance d apart
                 d = 0                    d = 0

While the fakes look nothing like real images, some D tells them apart without fail. JSD is stuck at log 2,
and gives G no slope to walk down. The Wasserstein distance W has no such plateau. It is the least work, mass
times distance, that turns one pile into the other. And it is something a network can learn: W equals the
widest gap E[C(x)] - E[C(G(z))] that any C of slope at most 1 can open.

So the critic C pushes the scores of real and fake apart, and a penalty stops it from getting steep. The best
C has slope 1 on the line that would carry a fake to its real image. Nobody knows these pairs, so they are
drawn at random:

    x' = t x + (1 - t) G(z), with t from U(0, 1)        L_G = -E[C(G(z))]
    L_C = E[C(G(z))] - E[C(x)] + 10 E[(|gradient of C at x'| - 1)^2]

New against dcgan_mnist.py: no sigmoid and no logarithm; no batch normalisation in C, since the penalty is per
image; five steps of C, on fresh batches, per step of G; Adam with betas (0, 0.9).

What to watch: `wasserstein`, the gap. Once C has found it, after an epoch, it falls as the digits improve.
Try --weight-clip 0.01, the first WGAN's way to bound the slope. What happens to gradient_norm?

Paper: Gulrajani et al. 2017, arXiv 1704.00028; Arjovsky et al. 2017, 1701.07875. Departures: networks and
initial weights of dcgan_mnist.py; rates of 2e-3, not 1e-4 (with clipping: Adam, not RMSprop at 5e-5).
"""

import argparse
import contextlib
import json
import math
import sys
import time
from pathlib import Path

import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import accelerator, nn
from torchvision import datasets
from torchvision.utils import save_image
from tqdm import tqdm

# %% Settings
SCRIPT = "wgan_gp"
DATA = str(Path(globals().get("__file__", "cell")).resolve().parent / "data")  # notebooks have no __file__
PANELS = [["wasserstein"], ["gradient_norm"]]  # what losses.png shows
PUBLISHED = {"width": 64, "d_layers": 2, "lr_g": 1e-4, "lr_d": 1e-4, "init": "pytorch"}  # for --published


def add_flags(add):
    """The flags, this script's own first; `add` is argparse's parser.add_argument."""
    add("--n-critic", type=int, default=5, help="steps of the critic, each on a fresh batch, for one of G")
    add("--gp-weight", type=float, default=10.0, help="weight of the gradient penalty")
    add("--weight-clip", type=float, metavar="C", help="no penalty; clip C's weights to [-C, C] instead")
    add("--d-layers", type=int, choices=[2, 3], default=3, help="convolutions in the critic")
    add("--width", type=int, default=16, help="channels of the critic's first convolution")
    add("--init", choices=["normal", "pytorch"], default="normal", help="N(0, 0.02^2), or PyTorch's weights")
    add("--published", action="store_true", help=f"the tutorials' settings: {PUBLISHED}")
    add("--epochs", type=int, default=25, help="passes over the training images")
    add("--lr-g", type=float, default=2e-3, help="Adam's learning rate for the generator")
    add("--lr-d", type=float, default=2e-3, help="Adam's learning rate for the critic")
    add("--batch-size", type=int, default=64, help="images per step of the critic")
    add("--latent-dim", type=int, default=100, help="length of the noise vector z")
    add("--dataset", choices=["mnist", "fashion_mnist"], default="mnist", help="what to train on")
    add("--data-dir", default=DATA, help="where the data set is, or will be downloaded")
    add("--limit", type=int, metavar="N", help="train on N of the images only, for a quick look")
    add("--fid-every", type=int, metavar="K", help="every K epochs, measure samples with fid.py")
    add("--device", default="auto", help="auto (a GPU if there is one), cpu, cuda, cuda:1, mps, ...")
    add("--seed", type=int, default=42, help="all randomness follows from it")
    add("--keep-every", type=int, metavar="K", help="every K epochs, also save the generator alone")
    add("--out-dir", help="a new folder for the run; default: the next free number in runs/<script>")
    add("--resume", metavar="PATH", help="go on from this checkpoint.pt; flags you give win over its own")
    add("--generate", type=int, metavar="N", help="no training: write N images, with --checkpoint")
    add("--checkpoint", metavar="PATH", help="the checkpoint.pt that --generate uses")


# %% Networks
class Generator(nn.Module):
    """Noise z (N, latent_dim) to images (N, 1, 28, 28) in [-1, 1]."""

    def __init__(self, latent_dim=100, width=16):
        super().__init__()
        w = width
        self.latent_dim = latent_dim
        self.layers = nn.Sequential(
            nn.Linear(latent_dim, 4 * w * 7 * 7),
            nn.BatchNorm1d(4 * w * 7 * 7),
            nn.ReLU(),
            nn.Unflatten(1, (4 * w, 7, 7)),  # (N, 4w, 7, 7)
            nn.ConvTranspose2d(4 * w, 2 * w, 4, stride=2, padding=1, bias=False),  # (N, 2w, 14, 14)
            nn.BatchNorm2d(2 * w),
            nn.ReLU(),
            nn.ConvTranspose2d(2 * w, 1, 4, stride=2, padding=1, bias=False),  # (N, 1, 28, 28)
            nn.Tanh(),
        )

    def forward(self, z):
        return self.layers(z)


class Critic(nn.Module):
    """Images (N, 1, 28, 28) to scores (N, 1), unbounded; no batch normalisation, see gradient_penalty."""

    def __init__(self, width=16, d_layers=3):
        super().__init__()
        w = width
        layers = [
            nn.Conv2d(1, w, 4, stride=2, padding=1),  # (N, w, 14, 14)
            nn.LeakyReLU(0.2),
            nn.Conv2d(w, 2 * w, 4, stride=2, padding=1),  # (N, 2w, 7, 7)
            nn.LeakyReLU(0.2),
        ]
        if d_layers == 2:  # each of the 7x7 places sees 10x10 pixels, and the linear layer adds them up
            layers += [nn.Flatten(), nn.Linear(2 * w * 7 * 7, 1)]  # (N, 1)
        else:  # a third convolution sees up to 22x22 pixels, most of a digit
            layers += [
                nn.Conv2d(2 * w, 4 * w, 4, stride=2, padding=1),  # (N, 4w, 3, 3)
                nn.LeakyReLU(0.2),
                nn.Flatten(),
                nn.Linear(4 * w * 3 * 3, 1),  # (N, 1)
            ]
        self.layers = nn.Sequential(*layers)

    def forward(self, images):
        return self.layers(images)


def init_weights(module):
    """Weights from N(0, 0.02^2), those of batch normalisation from N(1, 0.02^2), biases 0."""
    if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)):
        nn.init.normal_(module.weight, 0.0, 0.02)
    elif isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
        nn.init.normal_(module.weight, 1.0, 0.02)
    if getattr(module, "bias", None) is not None:
        nn.init.zeros_(module.bias)


# %% Losses
def critic_loss(real_scores, fake_scores):
    """E[C(G(z))] - E[C(x)]: to lower it, the critic pushes the scores of real and fake apart."""
    return fake_scores.mean() - real_scores.mean()


def generator_loss(fake_scores):
    """L_G = -E[C(G(z))]."""
    return -fake_scores.mean()


def gradient_penalty(critic, real, fake):
    """E[(|gradient of C at x'| - 1)^2] with x' = t x + (1 - t) G(z), for images (N, C, H, W).

    Returns two scalars, the penalty and the mean norm: one t for each pair, one norm over all pixels of an
    image. The gradient of the summed scores holds each image's own gradient, as long as no score depends on
    another image: hence no batch normalisation. 1e-12 keeps the slope of the root finite at 0.
    """
    t = torch.rand(len(real), 1, 1, 1, device=real.device)
    mixed = torch.lerp(fake, real, t).requires_grad_()
    (gradient,) = torch.autograd.grad(critic(mixed).sum(), mixed, create_graph=True)
    norm = (gradient.flatten(1).square().sum(1) + 1e-12).sqrt()  # (N,)
    return (norm - 1).square().mean(), norm.mean()


# %% Training step
def train_step(generator, critic, optimizer_g, optimizer_c, real, n_critic, gp_weight, weight_clip=None):
    """The paper's algorithm 1: n_critic steps of the critic, then one of the generator. Returns the metrics.

    `real` (n_critic * N, 1, 28, 28) in [-1, 1] holds a fresh batch for each step of the critic.
    """
    batch_size = len(real) // n_critic
    gaps, norms = [], []

    # The critic learns how far apart real and fake are, well ahead of the generator.
    for batch in real.split(batch_size):
        with torch.no_grad():
            fake = generator(torch.randn(batch_size, generator.latent_dim, device=real.device))
        c_loss = critic_loss(critic(batch), critic(fake))
        penalty, norm = gradient_penalty(critic, batch, fake)
        gaps.append(-c_loss.detach())
        norms.append(norm.detach())
        if weight_clip is None:
            c_loss = c_loss + gp_weight * penalty
        optimizer_c.zero_grad()
        c_loss.backward()
        optimizer_c.step()
        if weight_clip is not None:
            for weight in critic.parameters():
                weight.data.clamp_(-weight_clip, weight_clip)

    # The generator takes one step to close the gap; the critic is frozen.
    critic.requires_grad_(False)
    fake = generator(torch.randn(batch_size, generator.latent_dim, device=real.device))
    g_loss = generator_loss(critic(fake))
    optimizer_g.zero_grad()
    g_loss.backward()
    optimizer_g.step()
    critic.requires_grad_(True)

    return {"wasserstein": torch.stack(gaps).mean(), "gradient_norm": torch.stack(norms).mean()}


# %% Training
def build(args):
    """The networks and optimisers of a run, by the names of train_step's arguments."""
    torch.manual_seed(args.seed)
    generator = Generator(args.latent_dim, args.width)
    critic = Critic(args.width, args.d_layers)
    if args.init == "normal":
        generator.apply(init_weights)
        critic.apply(init_weights)
    layout = torch.contiguous_format if "mps" in args.device else torch.channels_last  # faster; wrong on mps
    generator.to(args.device, memory_format=layout)
    critic.to(args.device)  # contiguous: faster for the gradient of a gradient
    adam = {"betas": (0.0, 0.9), "fused": True}  # fused: faster
    return {
        "generator": generator,
        "critic": critic,
        "optimizer_g": torch.optim.Adam(generator.parameters(), args.lr_g, **adam),
        "optimizer_c": torch.optim.Adam(critic.parameters(), args.lr_d, **adam),
    }


def train(args):
    """Train from the start, or go on from the checkpoint args.resume."""
    images = load_images(args)
    batch_size = args.n_critic * min(args.batch_size, len(images) // args.n_critic)  # for a round of steps
    if batch_size < 2 * args.n_critic:
        fail("--batch-size, --limit: batch normalisation needs 2 images or more in a batch")
    parts = build(args)
    options = {"n_critic": args.n_critic, "gp_weight": args.gp_weight, "weight_clip": args.weight_clip}
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
            metrics.append(train_step(**parts, real=real, **options))

        means = {name: torch.stack([step[name] for step in metrics]).mean().item() for name in metrics[0]}
        history.append({"epoch": epoch} | means)
        text = "  ".join(f"{name} {value:.3f}" for name, value in means.items())
        print(f"epoch {epoch}/{args.epochs}  {text}  {time.perf_counter() - start:.0f} s", flush=True)
        draw(generator, folder, epoch, args)
        if args.fid_every and epoch % args.fid_every == 0:
            fid.track(judge, lambda n: sample(generator, torch.randn(n, args.latent_dim)), folder, epoch)
        save(parts, history, folder, args)
        plot(history, folder, last=epoch == args.epochs)


# %% Data, pictures, files
def fail(message, status=2):
    """End the program with one line on stderr."""
    tqdm.write(f"{SCRIPT}.py: {message}", file=sys.stderr)
    raise SystemExit(status) from None


def load_images(args):
    """The training images as bytes (N, 1, 28, 28), all of them on the device."""
    dataset_class = datasets.MNIST if args.dataset == "mnist" else datasets.FashionMNIST
    try:
        images = dataset_class(args.data_dir, download=True).data[:, None]
    except Exception as error:  # many types are possible
        fail(f"--data-dir: {args.dataset} is not in {args.data_dir} and cannot be downloaded ({error!r:.99})")
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
    rng = torch.Generator().manual_seed(args.seed)  # leaves training's random numbers alone
    z = torch.randn(64, args.latent_dim, generator=rng)
    save_image(sample(generator, z), folder / "samples" / f"epoch_{epoch:04d}.png", nrow=8)
    t = torch.linspace(0, math.pi / 2, 10)[:, None]  # cos^2 + sin^2 = 1: each z on the arc is from N(0, I)
    walks = [t.cos() * z1 + t.sin() * z2 for z1, z2 in z[:16].split(2)]  # 8 walks, each (10, latent_dim)
    save_image(sample(generator, torch.cat(walks)), folder / "interpolation.png", nrow=10)


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
    """The generator of a checkpoint, for any program: sample(load_generator(path), torch.randn(64, 100))."""
    settings = load_checkpoint(path)["settings"]
    generator = Generator(settings["latent_dim"], settings["width"])
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
    z = torch.randn(args.generate, generator.latent_dim)
    for number, image in enumerate(sample(generator, z)):
        save_image(image, folder / f"{number:05d}.png")
    print(f"{args.generate} images in {folder}", file=sys.stderr)


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
