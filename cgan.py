"""Conditional GAN: both networks are told the class, so that you can choose it. MNIST, 28x28.

    python cgan.py                                      # 25 epochs, into runs/cgan/001
    python cgan.py --generate 100 --label 7 --checkpoint runs/cgan/001/checkpoint.pt

        z, class ──► G ──► fake, class ──┐
                                         ├──► D ──► a real image of that class?
               data ────► real, class ───┘

A GAN draws you a digit, but you cannot ask for a 7. The remedy is simple: tell both players the class y.

    L_D = -E[r log D(x, y) + (1 - r) log(1 - D(x, y))] - E[log(1 - D(G(z, y), y))]
    L_G = -E[log D(G(z, y), y)]                 with r = 0.9, D's target for real images

Nothing here says "draw a 7". But D sees real images only with their own class, so a perfect 3 labelled 7 is
as much a fake as a blot. To fool D, G has to draw what it is told: in effect ten GANs that share weights.
In G, each class is ten learned numbers, appended to z; in D, a learned picture, beside the image.

What to watch: the pictures. Each row is a class and each column one z, so what a column shares, slant and
stroke width, is what z controls. Try --latent-dim 1: what does G do with one number?

Paper: Mirza and Osindero 2014, arXiv 1411.1784. Departures: networks and recipe of dcgan_mnist.py, at half
its rate, in batches of 64 (the paper: dense layers, maxout in D, one-hot classes).
"""

import argparse
import contextlib
import json
import math
import os
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from PIL import Image, ImageOps
from torch import accelerator, nn
from torchvision import datasets
from torchvision.utils import save_image
from tqdm import tqdm

# %% Settings
SCRIPT = "cgan"
DATA = str(Path(globals().get("__file__", "cell")).resolve().parent / "data")  # notebooks have no __file__
PANELS = [["d_loss", "g_loss"], ["d_real", "d_fake"]]  # what losses.png shows
PUBLISHED = {"width": 64, "d_layers": 2, "lr_g": 2e-4, "lr_d": 2e-4, "init": "pytorch"}  # for --published


def add_flags(add):
    """The flags, this script's own first; `add` is argparse's parser.add_argument."""
    add("--label", metavar="NAME", help="the class that --generate draws; default: all in turn")
    add("--class-names", nargs="+", default=[*"0123456789"], help=argparse.SUPPRESS)  # set by load_images
    add("--real-label", type=float, default=0.9, help="D's target for real images, at most 1")
    add("--d-layers", type=int, choices=[2, 3], default=3, help="convolutions in D")
    add("--width", type=int, default=16, help="channels of D's first convolution")
    add("--init", choices=["normal", "pytorch"], default="normal", help="N(0, 0.02^2), or PyTorch's weights")
    add("--published", action="store_true", help=f"the tutorials' settings: {PUBLISHED}")
    add("--epochs", type=int, default=25, help="passes over the training images")
    add("--lr-g", type=float, default=1e-3, help="Adam's learning rate for the generator")
    add("--lr-d", type=float, default=1e-3, help="Adam's learning rate for the discriminator")
    add("--batch-size", type=int, default=64, help="images per step")
    add("--latent-dim", type=int, default=100, help="length of the noise vector z")
    add("--dataset", choices=["mnist", "fashion_mnist", "folder"], default="mnist", help="what to train on")
    add("--data-dir", default=DATA, help="where the data set is, or a folder for each class")
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
    """Noise z (N, latent_dim) and classes (N,) to images (N, 1, 28, 28) in [-1, 1]. Below, w is the width."""

    def __init__(self, latent_dim=100, width=16, classes=10):
        super().__init__()
        self.latent_dim = latent_dim
        self.embedding = nn.Embedding(classes, 10)  # (N, 10)
        self.layers = nn.Sequential(
            nn.Linear(latent_dim + 10, 4 * width * 7 * 7),
            nn.BatchNorm1d(4 * width * 7 * 7),
            nn.ReLU(),
            nn.Unflatten(1, (4 * width, 7, 7)),  # (N, 4w, 7, 7)
            nn.ConvTranspose2d(4 * width, 2 * width, 4, stride=2, padding=1, bias=False),  # (N, 2w, 14, 14)
            nn.BatchNorm2d(2 * width),
            nn.ReLU(),
            nn.ConvTranspose2d(2 * width, 1, 4, stride=2, padding=1, bias=False),  # (N, 1, 28, 28)
            nn.Tanh(),
        )

    def forward(self, z, classes):
        return self.layers(torch.cat([z, self.embedding(classes)], 1))


class Discriminator(nn.Module):
    """Images (N, 1, 28, 28) and classes (N,) to logits (N, 1) of "a real image of that class"."""

    def __init__(self, width=16, d_layers=3, classes=10):
        super().__init__()
        self.embedding = nn.Embedding(classes, 28 * 28)  # (N, 784), a picture for each class
        layers = [
            nn.Conv2d(2, width, 4, stride=2, padding=1),  # (N, w, 14, 14)
            nn.LeakyReLU(0.2),
            nn.Conv2d(width, 2 * width, 4, stride=2, padding=1, bias=False),  # (N, 2w, 7, 7)
            nn.BatchNorm2d(2 * width),
            nn.LeakyReLU(0.2),
        ]
        if d_layers == 2:  # each of the 7x7 places sees 10x10 pixels, and the linear layer adds them up
            layers += [nn.Flatten(), nn.Linear(2 * width * 7 * 7, 1)]  # (N, 1)
        else:  # a third convolution sees up to 22x22 pixels, most of a digit
            layers += [
                nn.Conv2d(2 * width, 4 * width, 4, stride=2, padding=1, bias=False),  # (N, 4w, 3, 3)
                nn.BatchNorm2d(4 * width),
                nn.LeakyReLU(0.2),
                nn.Flatten(),
                nn.Linear(4 * width * 3 * 3, 1),  # (N, 1)
            ]
        self.layers = nn.Sequential(*layers)

    def forward(self, images, classes):
        picture = self.embedding(classes).view(-1, 1, 28, 28)
        return self.layers(torch.cat([images, picture], 1))


def init_weights(module):
    """Weights from N(0, 0.02^2), those of batch normalisation from N(1, 0.02^2), biases 0."""
    if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)):
        nn.init.normal_(module.weight, 0.0, 0.02)
    elif isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
        nn.init.normal_(module.weight, 1.0, 0.02)
    if getattr(module, "bias", None) is not None:
        nn.init.zeros_(module.bias)


# %% Losses
def discriminator_loss(real_logits, fake_logits, real_label=0.9):
    """L_D = -E[r log D(x, y) + (1 - r) log(1 - D(x, y))] - E[log(1 - D(G(z, y), y))], r = real_label."""
    real_loss = F.binary_cross_entropy_with_logits(real_logits, torch.full_like(real_logits, real_label))
    fake_loss = F.binary_cross_entropy_with_logits(fake_logits, torch.zeros_like(fake_logits))
    return real_loss + fake_loss


def generator_loss(fake_logits):
    """L_G = -E[log D(G(z, y), y)], the non-saturating loss."""
    return F.binary_cross_entropy_with_logits(fake_logits, torch.ones_like(fake_logits))


# %% Training step
def train_step(generator, discriminator, optimizer_g, optimizer_d, real, classes, real_label):
    """One step of D, then one of G, on images `real` (N, 1, 28, 28) in [-1, 1] of the `classes` (N,)."""
    # D learns to tell real from fake. Detached, the fakes carry no gradient back to G.
    fake = generator(torch.randn(len(real), generator.latent_dim, device=real.device), classes)
    real_logits, fake_logits = discriminator(real, classes), discriminator(fake.detach(), classes)
    d_loss = discriminator_loss(real_logits, fake_logits, real_label)
    optimizer_d.zero_grad()
    d_loss.backward()
    optimizer_d.step()

    # G learns to fool the updated D, which is frozen now; the fakes are the same.
    discriminator.requires_grad_(False)
    g_loss = generator_loss(discriminator(fake, classes))
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
    generator = Generator(args.latent_dim, args.width, len(args.class_names))
    discriminator = Discriminator(args.width, args.d_layers, len(args.class_names))
    layout = torch.contiguous_format if "mps" in args.device else torch.channels_last  # faster; wrong on mps
    for network in generator, discriminator:
        if args.init == "normal":
            network.apply(init_weights)
        network.to(args.device, memory_format=layout)
    adam = {"betas": (0.5, 0.999), "fused": True}  # fused: faster
    return {
        "generator": generator,
        "discriminator": discriminator,
        "optimizer_g": torch.optim.Adam(generator.parameters(), args.lr_g, **adam),
        "optimizer_d": torch.optim.Adam(discriminator.parameters(), args.lr_d, **adam),
    }


def train(args):
    """Train from the start, or go on from the checkpoint args.resume."""
    if args.label or args.real_label > 1:
        fail("--label is for --generate, and --real-label a probability, at most 1")
    images, labels, names = load_images(args)
    if args.resume and names != args.class_names:
        fail(f"--data-dir: {names} are not the classes of the run, {args.class_names}; begin a new one")
    if args.resume and getattr(args, "images", len(images)) != len(images):
        tqdm.write(f"pictures have changed: {args.images:,} before, {len(images):,} now", file=sys.stderr)
    args.class_names, args.images = names, len(images)  # into the checkpoint
    batch_size = min(args.batch_size, len(images))
    if batch_size < 2:
        fail("--batch-size, --limit: batch normalisation needs 2 images or more in a batch")
    parts = build(args)
    generator, history = parts["generator"], []  # history has the mean metrics of each epoch
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
            metrics.append(train_step(**parts, real=real, classes=labels[batch], real_label=args.real_label))

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
    """Images as bytes (N, 1, 28, 28) and their classes (N,), on the device; and the names of the classes."""
    torch.manual_seed(args.seed)
    if args.dataset == "folder":  # in which each class has a folder
        root = Path(args.data_dir)
        paths = [path for path in list_pictures(root) if path.parent != root]
        names = sorted({path.relative_to(root).parts[0] for path in paths})
        tqdm.write(f"{len(paths):,} of them in class folders: {', '.join(names)}", file=sys.stderr)
        chosen = [paths[number] for number in torch.randperm(len(paths))[: args.limit or None].tolist()]
        decoded = {path: decode(path, 28) for path in tqdm(chosen, "decoding", leave=False)}
        images = {path: torch.tensor(image) for path, image in decoded.items() if image is not None}
        if not images:
            fail(f"--data-dir: in {root} there should be a folder of pictures for each class")
        labels = torch.tensor([names.index(path.relative_to(root).parts[0]) for path in images])
        images = torch.stack([*images.values()]).float().mean(1, keepdim=True).round().byte()
    else:
        dataset_class = datasets.MNIST if args.dataset == "mnist" else datasets.FashionMNIST
        try:
            dataset = dataset_class(args.data_dir, download=True)
        except Exception as error:  # many types are possible
            fail(f"--data-dir: no {args.dataset} there; your own need --dataset folder ({error!r:.99})")
        chosen = torch.randperm(len(dataset))[: args.limit or None]
        images, labels = dataset.data[chosen, None], dataset.targets[chosen]
        names = [str(number) for number in range(dataset.targets.max() + 1)]
    return images.to(args.device), labels.to(args.device), names


def list_pictures(folder):
    """The paths of all pictures in a folder and below it, but no hidden ones, and none that a run made."""
    files, visited = [], set()
    for here, folders, names in os.walk(folder, followlinks=True):
        is_run = here != str(folder) and "config.json" in names and "samples" in folders
        if is_run or os.path.realpath(here) in visited:  # links can lead back up
            folders.clear()
            continue
        visited.add(os.path.realpath(here))
        folders[:] = sorted(name for name in folders if name[0] != ".")
        files += [Path(here, name) for name in names if name[0] != "." and Path(here, name).is_file()]
    pictures = sorted(path for path in files if path.suffix.lower() in Image.registered_extensions())
    others = Counter(path.suffix for path in files) - Counter(path.suffix for path in pictures)
    tqdm.write(f"{folder}: {len(pictures):,} pictures; other files: {dict(others) or 0}", file=sys.stderr)
    return pictures


def decode(path, size):
    """The middle square of a picture, upright and on white: bytes (3, size, size); None if it is damaged."""
    try:
        with Image.open(path) as file:
            image = ImageOps.exif_transpose(file)
        if image.mode.startswith(("I", "F")):  # grey, in 16 bits or as floats
            white = 65535 if image.mode != "F" else 1 if image.getextrema()[1] <= 1 else 255
            image = Image.fromarray((np.asarray(image) / white * 255 + 0.5).clip(0, 255).astype(np.uint8))
        image = ImageOps.fit(image.convert("RGBA"), (size, size), Image.Resampling.BILINEAR)
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
        return np.asarray(image).transpose(2, 0, 1)
    except Exception as error:  # many types are possible
        tqdm.write(f"skipped {path}: {error}", file=sys.stderr)


@torch.no_grad()
def sample(generator, z, classes=None):
    """Images (N, 1, 28, 28) in [0, 1], on the CPU, of these classes (N,), or of all classes in turn."""
    classes = torch.arange(len(z)) % generator.embedding.num_embeddings if classes is None else classes
    training, device = generator.training, next(generator.parameters()).device
    generator.eval()
    chunks = zip(z.split(500), classes.split(500))
    images = torch.cat([generator(z.to(device), y.to(device)).cpu() / 2 + 0.5 for z, y in chunks])
    generator.train(training)
    return images


def draw(generator, folder, epoch, args):
    """Write the samples of an epoch, a row for each class, always from the same ten z."""
    (folder / "samples").mkdir(exist_ok=True)
    rng = torch.Generator().manual_seed(args.seed)  # leaves training's random numbers alone
    z = torch.randn(10, args.latent_dim, generator=rng)
    classes = torch.arange(len(args.class_names)).repeat_interleave(10)  # a row for each class
    images = sample(generator, z.repeat(len(args.class_names), 1), classes)
    save_image(images, folder / "samples" / f"epoch_{epoch:04d}.png", nrow=10)


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
    generator = Generator(settings["latent_dim"], settings["width"], len(settings["class_names"]))
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
    """Write args.generate images as PNG files, of args.label or of all classes in turn, a folder for each."""
    if args.label and args.label not in args.class_names:
        fail(f"--label: there is no class {args.label}; give one of {', '.join(args.class_names)}")
    generator = load_generator(args.checkpoint, args.device)
    folder = open_folder(args, Path(args.checkpoint).parent / "generated")
    wanted = [args.class_names.index(args.label)] if args.label else range(len(args.class_names))
    classes = torch.tensor(wanted).repeat(args.generate)[: args.generate]
    torch.manual_seed(args.seed)
    images = sample(generator, torch.randn(args.generate, generator.latent_dim), classes)
    for number, (image, label) in enumerate(zip(images, classes)):
        class_folder = folder / args.class_names[label]
        class_folder.mkdir(exist_ok=True)
        save_image(image, class_folder / f"{number:05d}.png")
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
