"""The first GAN: two fully connected networks play against each other. MNIST, 28x28.

    python vanilla_gan.py                               # 50 epochs, into runs/vanilla_gan/001
    python vanilla_gan.py --epochs 5 --device cuda

            z ──► G ──► fake ──┐
                               ├──► D ──► real or fake?
         data ────────► real ──┘

How do you teach a network to draw, when no formula says how good a drawing is? Let a second network be the
judge. The generator G turns noise z into an image; the discriminator D gives the probability that an image
is real. D tries to raise V, and G to lower it; x stands for real images:

    V = E[log D(x)] + E[log(1 - D(G(z)))]

What does this game do to G? Let p be the density of real images and q that of fakes. The best D says
p / (p + q), and then V is 2 JSD(p, q) - 2 log 2. The Jensen-Shannon divergence JSD is 0 only when p = q, so
lowering V against the best D moves the fakes towards real images. Watch D: evenly matched, it is near 1/2.

Yet G is not trained on V. At first D sees through every fake: its logit is far below 0, where log(1 - D) is
flat. So G lowers -log D(G(z)) instead, steep exactly there. Let D run ahead (--lr-d 2e-3 --lr-g 2e-5) and try
both losses: --generator-loss minimax is that of V. Which of them still draws strokes?

Paper: Goodfellow et al. 2014, arXiv 1406.2661. Departures, from later practice: batch normalisation and Tanh
in G, LeakyReLU in D (the paper: maxout, dropout), Adam, weights from N(0, 0.02^2).
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
from matplotlib.figure import Figure
from PIL import Image
from torch import accelerator, nn
from torchvision import datasets
from torchvision.utils import save_image
from tqdm import tqdm

# %% Settings
SCRIPT = "vanilla_gan"
DATA = str(Path(globals().get("__file__", "cell")).resolve().parent / "data")  # notebooks have no __file__
PANELS = [["d_loss", "g_loss"], ["d_real", "d_fake"]]  # what losses.png shows


def add_flags(add):
    """The flags, this script's own first; `add` is argparse's parser.add_argument."""
    add("--generator-loss", choices=["non-saturating", "minimax"], default="non-saturating", help="G's loss")
    add("--epochs", type=int, default=50, help="passes over the training images")
    add("--lr-g", type=float, default=2e-4, help="Adam's learning rate for the generator")
    add("--lr-d", type=float, default=2e-4, help="Adam's learning rate for the discriminator")
    add("--batch-size", type=int, default=128, help="images per step")
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

    def __init__(self, latent_dim=100):
        super().__init__()
        self.latent_dim = latent_dim

        def block(inputs, outputs):
            return [nn.Linear(inputs, outputs), nn.BatchNorm1d(outputs), nn.ReLU()]

        self.layers = nn.Sequential(
            *block(latent_dim, 256),
            *block(256, 512),
            *block(512, 1024),
            nn.Linear(1024, 784),
            nn.Tanh(),
            nn.Unflatten(1, (1, 28, 28)),  # (N, 1, 28, 28)
        )

    def forward(self, z):
        return self.layers(z)


class Discriminator(nn.Module):
    """Images (N, 1, 28, 28) to logits (N, 1); the sigmoid of a logit is the probability of "real"."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Flatten(),  # (N, 784)
            nn.Linear(784, 512),
            nn.LeakyReLU(0.2),
            nn.Linear(512, 256),
            nn.LeakyReLU(0.2),
            nn.Linear(256, 1),  # (N, 1)
        )

    def forward(self, images):
        return self.layers(images)


def init_weights(module):
    """Weights from N(0, 0.02^2), those of batch normalisation from N(1, 0.02^2), biases 0."""
    if isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, 0.0, 0.02)
        nn.init.zeros_(module.bias)
    elif isinstance(module, nn.BatchNorm1d):
        nn.init.normal_(module.weight, 1.0, 0.02)


# %% Losses
def discriminator_loss(real_logits, fake_logits):
    """L_D = -V = -E[log D(x)] - E[log(1 - D(G(z)))]."""
    real_loss = F.binary_cross_entropy_with_logits(real_logits, torch.ones_like(real_logits))
    fake_loss = F.binary_cross_entropy_with_logits(fake_logits, torch.zeros_like(fake_logits))
    return real_loss + fake_loss


def generator_loss(fake_logits, minimax=False):
    """L_G = -E[log D(G(z))], the non-saturating loss, or with `minimax` the paper's E[log(1 - D(G(z)))].

    With the best D, that lowers KL(q || p) - 2 JSD(p, q), and minimax 2 JSD(p, q) (Arjovsky and Bottou 2017).
    """
    if minimax:
        return -F.binary_cross_entropy_with_logits(fake_logits, torch.zeros_like(fake_logits))
    return F.binary_cross_entropy_with_logits(fake_logits, torch.ones_like(fake_logits))


# %% Training step
def train_step(generator, discriminator, optimizer_g, optimizer_d, real, minimax):
    """The paper's algorithm 1 with k = 1, on images `real` (N, 1, 28, 28) in [-1, 1]. Returns the metrics."""
    # D learns to tell real from fake. It judges each image alone, so both can go through it in one batch.
    with torch.no_grad():
        fake = generator(torch.randn(len(real), generator.latent_dim, device=real.device))
    real_logits, fake_logits = discriminator(torch.cat([real, fake])).chunk(2)
    d_loss = discriminator_loss(real_logits, fake_logits)
    optimizer_d.zero_grad()
    d_loss.backward()
    optimizer_d.step()

    # G learns to fool the updated D, which is frozen now.
    discriminator.requires_grad_(False)
    fake = generator(torch.randn(len(real), generator.latent_dim, device=real.device))
    g_loss = generator_loss(discriminator(fake), minimax)
    optimizer_g.zero_grad()
    g_loss.backward()
    optimizer_g.step()
    discriminator.requires_grad_(True)

    metrics = {"d_loss": d_loss, "g_loss": g_loss}
    metrics |= {"d_real": real_logits.sigmoid().mean(), "d_fake": fake_logits.sigmoid().mean()}
    return {name: value.detach() for name, value in metrics.items()}  # .item() would wait for the GPU


# %% Training
def build(args):
    """The networks and optimisers of a run, by the names of train_step's arguments."""
    torch.manual_seed(args.seed)
    generator = Generator(args.latent_dim).apply(init_weights).to(args.device)
    discriminator = Discriminator().apply(init_weights).to(args.device)
    adam = {"betas": (0.5, 0.999), "fused": True}  # fused: faster
    return {
        "generator": generator,
        "discriminator": discriminator,
        "optimizer_g": torch.optim.Adam(generator.parameters(), args.lr_g, **adam),
        "optimizer_d": torch.optim.Adam(discriminator.parameters(), args.lr_d, **adam),
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
        parts["optimizer_d"].param_groups[0]["lr"] = args.lr_d
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
            metrics.append(train_step(**parts, real=real, minimax=args.generator_loss == "minimax"))

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
    generator = Generator(load_checkpoint(path)["settings"]["latent_dim"])
    load_checkpoint(path, generator=generator)
    return generator.to(device).eval()


# %% Command line
def parse_args(argv=None):
    """The settings: a flag that is given, else the checkpoint, else the default."""
    parser = argparse.ArgumentParser(f"{SCRIPT}.py", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.description = (__doc__ or "").split("\n")[0]  # none under python -OO
    parser.error = fail  # one line in place of argparse's usage text
    add_flags(parser.add_argument)
    args = parser.parse_args(argv)  # a first look, for --resume and the like
    if (args.generate is None) != (args.checkpoint is None) or (args.generate and args.resume):
        fail("--generate N needs --checkpoint PATH, and no --resume")
    if (args.resume, args.checkpoint) != (None, None):
        parser.set_defaults(**load_checkpoint(args.resume or args.checkpoint)["settings"])
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
