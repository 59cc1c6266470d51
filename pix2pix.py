"""pix2pix: translate one picture into another, learned from pairs. Digits, cartoon faces, your own folders.

    python pix2pix.py                               # mosaics to digits, 10 epochs, into runs/pix2pix/001
    python pix2pix.py --dataset faces --batch-size 4                    # line drawings to cartoon faces
    python pix2pix.py --translate FOLDER --checkpoint runs/pix2pix/001/checkpoint.pt

    a ──┬──► G ──► G(a) ──┬──► D ──► fake!          b ──┬──► D ──► real!
        └─────────────────┘                         a ──┘

In cgan.py both players are told a class. Here they are told a picture: G turns the input a into G(a), and D
sees the input beside the target b, or beside G(a). But why a GAN, when the target is known? Because many
digits could hide behind one mosaic, and a G that only has to come close to b hedges: with the L1 loss it
paints the median of each pixel, a blur. D asks something else: could b be *a* target of *this* input? A blur
could not. So pix2pix adds two losses: L1 puts the large shapes in place, and D makes them sharp.

    L_D = -1/2 E[log D(a, b)] - 1/2 E[log(1 - D(a, G(a)))]
    L_G = -E[log D(a, G(a))] + 100 E|b - G(a)|

G is a U-Net, which hands details past its bottleneck. D is a PatchGAN: L1 watches over the whole, so D only
judges patches. There is no z, since G learned to ignore it; dropout is the only randomness (variants.png).

What to watch: samples/, rows of inputs, outputs and targets; and two numbers from test pictures. `error` is
the mean difference from the target; `sharpness` is how much neighbouring pixels differ, as a multiple of the
target's. Try --gan-weight 0, which leaves L1 alone: which of the two gets better, and which gets worse?

Papers: Isola et al. 2016, arXiv 1611.07004; Ronneberger et al. 2015, 1505.04597 (U-Net). Departures: small
pictures, patches, networks; batches of 32; no crops or mirroring; rates that fall to 0; samples in eval mode.
"""

import argparse
import contextlib
import hashlib
import json
import math
import os
import sys
import time
import zlib
from collections import Counter
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from PIL import Image, ImageOps
from torch import accelerator, nn
from torchvision import datasets
from torchvision.transforms.functional import resize
from torchvision.utils import save_image
from tqdm import tqdm

# %% Settings
SCRIPT = "pix2pix"
DATA = str(Path(globals().get("__file__", "cell")).resolve().parent / "data")  # notebooks have no __file__
CACHE = Path(DATA, "cache")  # or, if that cannot be written, in the home folder
CACHE = CACHE if os.access(CACHE if CACHE.exists() else DATA, os.W_OK) else Path.home() / ".cache/gans"
PANELS = [["d_loss", "g_loss"], ["d_real", "d_fake"], ["l1", "error"], ["sharpness"]]  # what losses.png shows
LAYOUTS = ("trainA", "trainB"), ("A", "B"), ("train", "train")  # of folders; the last: side by side


def add_flags(add):
    """The flags, this script's own first; `add` is argparse's parser.add_argument."""
    add("--l1-weight", type=float, default=100.0, help="weight of L1; 0: the GAN alone")
    add("--gan-weight", type=float, default=1.0, help="weight of the GAN's loss; 0: L1 alone")
    add("--no-skips", action="store_true", help="G without the skips that make it a U-Net")
    add("--dropout", type=float, default=0.5, help="share of dropout in G")
    add("--patch-layers", type=int, choices=[1, 2, 3], help="D's patches: 16, 34, 70 pixels; None: by size")
    add("--norm", choices=["batch", "instance"], default="batch", help="normalisation in both networks")
    add("--width", type=int, default=32, help="channels of G's first layer; other layers have more")
    tasks = ["mosaic", "outline", "grey", "lines"]
    add("--task", choices=tasks, help="how A is made from B; None: lines for faces, mosaic for digits")
    add("--direction", choices=["a2b", "b2a"], default="a2b", help="which is the input, and which the target")
    add("--image-size", choices=["32", "64", "128", "256"], help="pixels; None: 32 for digits, else 64")
    add("--decay", type=float, default=0.5, help="share of the run in which the rates fall to 0")
    add("--epochs", type=int, default=10, help="passes over the training pairs")
    add("--lr-g", type=float, default=2e-4, help="Adam's learning rate for the generator")
    add("--lr-d", type=float, default=2e-4, help="Adam's learning rate for the discriminator")
    add("--batch-size", type=int, default=32, help="pairs per step")
    names = ["mnist", "fashion_mnist", "faces", "folder"]
    add("--dataset", choices=names, default="mnist", help="folder: your own A and B; with --task, your own B")
    add("--data-dir", default=DATA, help="folder: has trainA and trainB, A and B, or train")
    add("--folder-a", metavar="FOLDER", help="with --dataset folder: A, wherever it is")
    add("--folder-b", metavar="FOLDER", help="with --dataset folder: B, with the same names")
    add("--flip", action=argparse.BooleanOptionalAction, default=False, help="mirror pictures at random")
    add("--limit", type=int, metavar="N", help="use N pairs only, for a quick look")
    add("--fid-every", type=int, metavar="K", help="every K epochs, measure test pictures with fid.py")
    add("--device", default="auto", help="auto (a GPU if there is one), cpu, cuda, cuda:1, mps, ...")
    add("--precision", choices=["fp32", "tf32", "bf16"], default="fp32", help="faster, less exact than fp32")
    add("--seed", type=int, default=42, help="all randomness follows from it")
    add("--keep-every", type=int, metavar="K", help="every K epochs, also save the generator alone")
    add("--out-dir", help="a new folder for the run; default: the next free number in runs/<script>")
    add("--resume", metavar="PATH", help="go on from this checkpoint.pt; flags you give win over its own")
    add("--generate", type=int, metavar="N", help="no training: translate the first N test pictures")
    add("--translate", metavar="PATH", help="no training: translate your picture, or those of a folder")
    add("--checkpoint", metavar="PATH", help="the checkpoint.pt that --generate and --translate use")


# %% Networks
NORMS = {"batch": nn.BatchNorm2d, "instance": nn.InstanceNorm2d}


class DownBlock(nn.Sequential):
    """Maps (N, inputs, H, W) to (N, outputs, H / 2, W / 2)."""

    def __init__(self, inputs, outputs, norm=None, activate=True):
        layers = [nn.LeakyReLU(0.2)] if activate else []
        layers += [nn.Conv2d(inputs, outputs, 4, stride=2, padding=1, bias=norm is None)]
        if norm:
            layers += [NORMS[norm](outputs)]
        super().__init__(*layers)


class UpBlock(nn.Sequential):
    """Maps (N, inputs, H, W) to (N, outputs, 2H, 2W); without a norm, it is the last, and ends in tanh."""

    def __init__(self, inputs, outputs, norm=None, dropout=0.0):
        layers = [nn.ReLU()]
        layers += [nn.ConvTranspose2d(inputs, outputs, 4, stride=2, padding=1, bias=norm is None)]
        layers += [NORMS[norm](outputs) if norm else nn.Tanh()]
        if dropout:
            layers += [nn.Dropout(dropout)]
        super().__init__(*layers)


class Generator(nn.Module):
    """A U-Net: pictures (N, in_channels, size, size) to pictures (N, out_channels, size, size) in [-1, 1].

    32x32 ───────────────────────────────► 32x32     On the way down G sees ever more at once, until one pixel
      16x16 ─────────────────────────► 16x16         stands for the whole picture; on the way up it draws. But
          8x8 ───────────────────► 8x8               a pixel cannot remember where each edge was. So at every
            4x4 ─────────────► 4x4                   size the way up is also given what the way down had
              2x2 ───────► 2x2                       there: these are the skips.
                └── 1x1 ───┘
    """

    def __init__(self, in_channels, out_channels, size=32, width=32, norm="batch", skips=True, dropout=0.5):
        super().__init__()
        self.skips = skips
        halvings = int(math.log2(size))
        widths = [width * min(2**level, 8) for level in range(halvings)]  # 32, 64, 128, 256, 256

        self.down = nn.ModuleList([DownBlock(in_channels, widths[0], activate=False)])  # (N, 32, 16, 16)
        for level in range(1, halvings - 1):  # (N, 64, 8, 8), (N, 128, 4, 4), (N, 256, 2, 2)
            self.down.append(DownBlock(widths[level - 1], widths[level], norm))
        self.down.append(DownBlock(widths[-2], widths[-1]))  # (N, 256, 1, 1): no norm of a single pixel

        doubled = 2 if skips else 1  # what comes from below, and beside it the skip
        self.up = nn.ModuleList([UpBlock(widths[-1], widths[-2], norm, dropout)])  # (N, 256, 2, 2)
        for level in range(halvings - 2, 0, -1):  # (N, 128, 4, 4), (N, 64, 8, 8), (N, 32, 16, 16)
            late = len(self.up) >= min(3, halvings - 3)  # dropout in three blocks; in two at 32x32
            inputs = widths[level] * doubled
            self.up.append(UpBlock(inputs, widths[level - 1], norm, 0.0 if late else dropout))
        self.up.append(UpBlock(widths[0] * doubled, out_channels))  # (N, out_channels, 32, 32)

    def forward(self, a):
        x, kept = a, []
        for block in self.down:
            x = block(x)
            kept.append(x)
        x = self.up[0](kept.pop())  # up from the single pixel, which needs no skip
        for block in self.up[1:]:
            skip = kept.pop()  # as large as x
            x = block(torch.cat([x, skip], 1) if self.skips else x)
        return x


class Discriminator(nn.Module):
    """A PatchGAN: pictures (N, channels, H, W) to logits (N, 1, h, w), one for each of h x w patches.

    No layer looks at the whole picture. A patch has 9 * 2^layers - 2 pixels a side: 16, 34 or 70. The shapes
    below are for 32x32 pixels and one layer.
    """

    def __init__(self, channels=2, width=64, layers=1, norm="batch"):
        super().__init__()
        modules = [nn.Conv2d(channels, width, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]  # (N, 64, 16, 16)
        inputs = width
        for level in range(1, layers + 1):
            stride = 2 if level < layers else 1  # the last one does not halve
            modules += [nn.Conv2d(inputs, 2 * inputs, 4, stride, padding=1, bias=False)]  # (N, 128, 15, 15)
            modules += [NORMS[norm](2 * inputs), nn.LeakyReLU(0.2)]
            inputs = 2 * inputs
        self.layers = nn.Sequential(*modules, nn.Conv2d(inputs, 1, 4, padding=1))  # (N, 1, 14, 14)

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
def discriminator_loss(real_logits, fake_logits):
    """L_D = -1/2 E[log D(a, b)] - 1/2 E[log(1 - D(a, G(a)))], means over pictures and patches."""
    real_loss = F.binary_cross_entropy_with_logits(real_logits, torch.ones_like(real_logits))
    fake_loss = F.binary_cross_entropy_with_logits(fake_logits, torch.zeros_like(fake_logits))
    return (real_loss + fake_loss) / 2


def generator_loss(fake_logits):
    """The first part of L_G, -E[log D(a, G(a))]."""
    return F.binary_cross_entropy_with_logits(fake_logits, torch.ones_like(fake_logits))


# %% Training step
def train_step(generator, discriminator, optimizer_g, optimizer_d, a, b, l1_weight, gan_weight, precision):
    """One step of D, then one of G, on pairs a and b (N, C, S, S) in [-1, 1]. Returns the metrics."""
    bf16 = precision == "bf16"

    def judge(output):
        with torch.autocast(a.device.type, torch.bfloat16, enabled=bf16):
            return discriminator(torch.cat([a, output], 1)).float()

    # D learns to tell targets from G's outputs. Detached, these carry no gradient back to G.
    with torch.autocast(a.device.type, torch.bfloat16, enabled=bf16):
        fake = generator(a).float()
    # Real and fake go through D separately: batch normalisation must not mix them.
    real_logits, fake_logits = judge(b), judge(fake.detach())
    d_loss = discriminator_loss(real_logits, fake_logits)
    optimizer_d.zero_grad()
    d_loss.backward()
    optimizer_d.step()

    # G learns to fool the updated D, which is frozen now, and to come close to b.
    discriminator.requires_grad_(False)
    g_loss, l1 = generator_loss(judge(fake)), F.l1_loss(fake, b)
    optimizer_g.zero_grad()
    (gan_weight * g_loss + l1_weight * l1).backward()
    optimizer_g.step()
    discriminator.requires_grad_(True)

    metrics = {"d_loss": d_loss, "g_loss": g_loss}  # and l1 from 0 to 1, as `error` is
    metrics |= {"d_real": real_logits.sigmoid().mean(), "d_fake": fake_logits.sigmoid().mean(), "l1": l1 / 2}
    return {name: value.detach() for name, value in metrics.items()}  # .item() would wait for the GPU


# %% Training
def check(args):
    """End the program if flags do not go together."""
    if args.task == "lines" and args.dataset != "faces":
        fail("--task: only faces come with lines; give another task, or --dataset faces")
    if bool(args.folder_a) != bool(args.folder_b) or (args.folder_a and args.dataset != "folder"):
        fail("--folder-a, --folder-b: give both, with --dataset folder")
    if args.dropout >= 1 or args.decay > 1:
        fail("--dropout, --decay: these are shares, the first below 1, the second at most 1")
    if args.fid_every and args.direction == "b2a" and args.dataset != "folder":
        fail("--fid-every: fid.py knows only the pictures B of this data set; leave out --direction")


def make_generator(args):
    """The untrained generator of a run."""
    inputs, outputs = count_channels(args)
    form = {"size": args.image_size, "width": args.width, "norm": args.norm}
    return Generator(inputs, outputs, **form, skips=not args.no_skips, dropout=args.dropout)


def build(args):
    """The networks and optimisers of a run, by the names of train_step's arguments."""
    torch.manual_seed(args.seed)
    generator = make_generator(args)
    discriminator = Discriminator(sum(count_channels(args)), layers=args.patch_layers, norm=args.norm)
    layout = torch.contiguous_format if "mps" in args.device else torch.channels_last  # faster; wrong on mps
    for network in generator, discriminator:
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
    a, b, _ = load_pairs(args, train=True)
    test_a, test_b, _ = load_pairs(args, train=False)
    a, b = a.to(args.device), b.to(args.device)
    batch_size = min(args.batch_size, len(b))
    parts = build(args)
    generator, history = parts["generator"], []  # history has the mean metrics of each epoch
    if args.resume:
        history = load_checkpoint(args.resume, **parts)["history"]  # and the parts are as they were
    if len(history) >= args.epochs:
        fail(f"--epochs: {args.resume} has run {len(history)} already; ask for more")
    if args.fid_every:
        import fid

        judge = fid.Judge(args.dataset, b, args.device, args.data_dir)  # may train a classifier first
    folder = open_folder(args, f"runs/{SCRIPT}")
    (folder / "config.json").write_text(json.dumps(vars(args) | {"torch": torch.__version__}, indent=2))
    steps = len(b) // batch_size * args.epochs
    few = " (few: for better pictures raise --epochs)" if steps < 1000 else ""
    print(f"{len(b):,} pairs, {steps:,} steps{few}, on {args.device}: {folder}", file=sys.stderr)

    options = {name: vars(args)[name] for name in ("l1_weight", "gan_weight", "precision")}
    for epoch in range(len(history) + 1, args.epochs + 1):
        torch.manual_seed(args.seed * 10_000 + epoch)  # so a resumed run draws the same numbers
        order = torch.randperm(len(b)).to(args.device)
        batches = order.split(batch_size)[: len(b) // batch_size]  # whole ones only
        metrics, start = [], time.perf_counter()
        for number, batch in enumerate(tqdm(batches, f"epoch {epoch}", leave=False)):
            left = 1 - (epoch - 1 + number / len(batches)) / args.epochs  # the share to come
            for name, rate in ("optimizer_g", args.lr_g), ("optimizer_d", args.lr_d):
                parts[name].param_groups[0]["lr"] = rate * min(1, left / max(args.decay, 1e-9))
            pair = {"a": a[batch] / 127.5 - 1, "b": b[batch] / 127.5 - 1}
            if args.flip:  # both of a pair, or none
                keep = torch.rand(len(batch), 1, 1, 1, device=args.device) < 0.5
                pair = {side: images.where(keep, images.flip(3)) for side, images in pair.items()}
            metrics.append(train_step(**parts, **pair, **options))

        means = {name: torch.stack([step[name] for step in metrics]).mean().item() for name in metrics[0]}
        means |= measure(generator, test_a[:1000], test_b[:1000])
        history.append({"epoch": epoch} | means)
        text = "  ".join(f"{name} {value:.3f}" for name, value in means.items())
        print(f"epoch {epoch}/{args.epochs}  {text}  {time.perf_counter() - start:.0f} s", flush=True)
        draw(generator, test_a, test_b, folder, epoch)
        if args.fid_every and epoch % args.fid_every == 0:
            total = min(10_000, len(test_a))
            fid.track(judge, lambda n: sample(generator, test_a[:n] / 255), folder, epoch, total)
        save(parts, history, folder, args)
        plot(history, folder, last=epoch == args.epochs)


# %% Pictures, files
def fail(message, status=2):
    """End the program with one line on stderr."""
    tqdm.write(f"{SCRIPT}.py: {message}", file=sys.stderr)
    raise SystemExit(status) from None


@torch.no_grad()
def sample(generator, images, dropout=False):
    """What G makes of images (N, C, S, S) in [0, 1], in eval mode: images in [0, 1], on the CPU."""
    training, device = generator.training, next(generator.parameters()).device
    generator.eval()
    for layer in generator.modules():
        if isinstance(layer, nn.Dropout):
            layer.train(dropout)
    outputs = torch.cat([generator(chunk.to(device) * 2 - 1).cpu() / 2 + 0.5 for chunk in images.split(32)])
    generator.train(training)
    return outputs


def measure(generator, a, b):
    """How far outputs for test pictures a are from the targets b (both bytes), and how sharp they are."""
    output, target = sample(generator, a / 255), b / 255
    sharpness = output.diff().abs().mean() / target.diff().abs().mean()  # of pixels and right neighbours
    return {"error": (output - target).abs().mean().item(), "sharpness": sharpness.item()}


def draw(generator, test_a, test_b, folder, epoch):
    """Write the samples of an epoch, rows of inputs, outputs and targets; and variants.png."""
    (folder / "samples").mkdir(exist_ok=True)
    a, b = test_a[:10] / 255, test_b[:10] / 255
    grid = in_colour(a, sample(generator, a), b)
    save_image(grid, folder / "samples" / f"epoch_{epoch:04d}.png", nrow=len(a))
    variants = torch.stack([sample(generator, a[:5], dropout=True) for _ in range(6)])  # (6, N, C, S, S)
    columns = in_colour(a[:5], *variants, 2 * variants.std(0, correction=0)).unflatten(0, (8, -1))
    save_image(columns.transpose(0, 1).flatten(0, 1), folder / "variants.png", nrow=8)  # each row: an input


def in_colour(*batches):
    """Batches of images in one (N, C, S, S); grey ones become colour if others are."""
    channels = max(images.shape[1] for images in batches)
    return torch.cat([images.expand(-1, channels, -1, -1) for images in batches])


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
    """The generator of a checkpoint, for any program: sample(load_generator(path), images)."""
    generator = make_generator(argparse.Namespace(**load_checkpoint(path)["settings"]))
    load_checkpoint(path, generator=generator)
    return generator.to(device).eval()


# %% Pairs: A is made from B, or has a folder of its own
def count_channels(args):
    """The channels of inputs and of targets: 1 if they are grey, 3 if they have colours."""
    b = 1 if "mnist" in args.dataset else 3
    a = 1 if args.task in ("outline", "grey", "lines") else b
    return (a, b) if args.direction == "a2b" else (b, a)


def make_a(task, b):
    """Pictures A made from pictures B, bytes (N, C, S, S); outline and grey have one channel."""
    chunks = []
    for chunk in b.split(1000):  # floats are four times as large as bytes
        chunk = chunk.float()
        if task == "mosaic":  # 8x8 flat blocks
            chunk = F.interpolate(F.adaptive_avg_pool2d(chunk, 8), chunk.shape[2:])
        else:
            chunk = chunk.mean(1, keepdim=True)
        if task == "outline":  # a ring of one pixel around what is bright
            chunk = F.max_pool2d(chunk, 3, stride=1, padding=1) - chunk
        chunks.append(chunk.round().to(torch.uint8))
    return torch.cat(chunks)


def load_pairs(args, train):
    """Inputs and targets as bytes (N, C, size, size), for training or for testing, and their names."""
    word = "train" if train else "test"
    if args.dataset == "folder":
        a, b, names = read_folders(args, train)
    else:
        b = read_sheets(args, f"{word}_??.webp") if args.dataset == "faces" else read_dataset(args, train)
        rows = choose(range(len(b)), args, train)
        b, names = fit(b[rows], args.image_size), [f"{row:05d}" for row in rows]
    if args.task == "lines":
        a = fit(read_sheets(args, f"{word}_??_lines.webp")[rows, :1], args.image_size)
    elif args.task:
        a = make_a(args.task, b)
    if train:
        if args.resume and getattr(args, "images", len(b)) != len(b):
            tqdm.write(f"pictures have changed: {args.images:,} before, {len(b):,} now", file=sys.stderr)
        args.images = len(b)  # into the checkpoint
    return (a, b, names) if args.direction == "a2b" else (b, a, names)


def choose(items, args, train):
    """As many of the items as --limit says: for training at random, for testing the first."""
    torch.manual_seed(args.seed)
    order = torch.randperm(len(items)) if train else torch.arange(len(items))
    return [items[number] for number in sorted(order[: args.limit or None].tolist())]


def read_dataset(args, train=True):
    """Digits, clothes or CIFAR-10's pictures (N, C, H, W), as they are."""
    names = {"fashion_mnist": "FashionMNIST", "mnist": "MNIST", "cifar10": "CIFAR10"}
    dataset_class = getattr(datasets, names[args.dataset])
    try:
        images = torch.as_tensor(dataset_class(args.data_dir, train=train, download=True).data)
    except Exception as error:  # many types are possible
        fail(f"--data-dir: no {args.dataset} in {args.data_dir}; your own: --dataset folder ({error!r:.99})")
    return images.movedim(3, 1) if images.ndim == 4 else images[:, None]


def read_sheets(args, pattern="train_??.webp"):
    """The cartoon faces (N, 3, 64, 64) of data/faces: a sheet has 32 rows of 32."""
    folder = Path(args.data_dir, "faces")
    sheets = [np.asarray(Image.open(path)) for path in sorted(folder.glob(pattern))]
    if {sheet.shape for sheet in sheets} != {(2048, 2048, 3)}:
        fail(f"--data-dir: {folder} lacks the sheets of faces; for your own, --dataset folder")
    faces = np.stack(sheets).reshape(-1, 32, 64, 32, 64, 3)  # (sheets, rows, 64, columns, 64, 3)
    return torch.from_numpy(faces).permute(0, 1, 3, 5, 2, 4).reshape(-1, 3, 64, 64)


def fit(images, size):
    """Bytes (N, C, H, W) at size x size pixels: 28x28 is padded to 32x32, all else is resized."""
    if images.shape[-1] == 28 and size == 32:
        return F.pad(images, (2, 2, 2, 2))
    return torch.cat([resize(chunk, [size, size], antialias=True) for chunk in images.split(1000)])


# %% Folders: pictures are decoded once, into a file
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


def name_pictures(place):
    """The pictures of a folder, or the one picture, by name: a dict of paths. Hidden ones are left out."""
    place = Path(place).resolve()
    if place.is_file():
        return {place.stem: place}
    pictures = {}
    for path in list_pictures(place):
        name = path.relative_to(place).with_suffix("").as_posix()
        pictures[name if name not in pictures else f"{name}{path.suffix}"] = path  # cat.png beside cat.jpg
    if not pictures:
        fail(f"{place}: no such file, or no pictures in it")
    return pictures


def decode(path, size, half=None):
    """The middle square of a picture, upright and on white: bytes (3, size, size); None if it is damaged."""
    try:
        with Image.open(path) as file:
            image = ImageOps.exif_transpose(file)
        if image.mode.startswith(("I", "F")):  # grey, in 16 bits or as floats
            white = 65535 if image.mode != "F" else 1 if image.getextrema()[1] <= 1 else 255
            image = Image.fromarray((np.asarray(image) / white * 255 + 0.5).clip(0, 255).astype(np.uint8))
        if half is not None:  # 0: left, 1: right
            middle = image.width // 2
            image = image.crop((half * middle, 0, half * middle + middle, image.height))
        size = (size, size) if size else image.size  # None: all of it
        image = ImageOps.fit(image.convert("RGBA"), size, Image.Resampling.BILINEAR)
        image = Image.alpha_composite(Image.new("RGBA", size, "white"), image).convert("RGB")
        return np.asarray(image).transpose(2, 0, 1)
    except Exception as error:  # many types are possible
        tqdm.write(f"skipped {path}: {error}", file=sys.stderr)


def read_pictures(pictures, size, half=None):
    """Pictures as bytes (N, 3, size, size), decoded once, into a file in CACHE; and the names of these."""
    stats = [(path.stat().st_size, path.stat().st_mtime_ns) for path in pictures.values()]
    cache = CACHE / f"{hashlib.sha256(repr([size, half, pictures, stats]).encode()).hexdigest()[:16]}.npz"
    if cache.exists():
        cached = np.load(cache)
        return torch.from_numpy(cached["images"]), cached["names"].tolist()
    with ThreadPool(min(8, os.cpu_count() or 1, len(pictures) or 1)) as pool:
        decoded = pool.imap(lambda path: decode(path, size, half), pictures.values())
        decoded = dict(zip(pictures, tqdm(decoded, "decoding", len(pictures))))
    names = [name for name in pictures if decoded[name] is not None]
    if not names:
        fail("too few pictures that can be read; without a test folder, one in ten is for testing")
    images = np.stack([decoded[name] for name in names])
    tmp = cache.with_suffix(f".{os.getpid()}.npz")  # another process may decode the same
    try:
        CACHE.mkdir(parents=True, exist_ok=True)
        np.savez(tmp, images=images, names=names)
        tmp.replace(cache)
    finally:
        tmp.unlink(missing_ok=True)  # half of it, if the disk is full
    return torch.from_numpy(images), names


def find_folders(args):
    """The folders of A and B for training, and those for testing; the same, where there are no others."""
    layouts = [(Path(args.data_dir, a), Path(args.data_dir, b)) for a, b in LAYOUTS]
    if args.folder_a or args.task:
        layouts = [(Path(args.folder_a or args.data_dir), Path(args.folder_b or args.data_dir))]
    for folders in layouts:
        if all(folder.is_dir() for folder in folders):
            for word in "test", "val", "train":  # trainA has its test pictures in testA or valA, or in trainA
                others = tuple(folder.parent / folder.name.replace("train", word) for folder in folders)
                if all(folder.is_dir() and (word == "train" or folder not in folders) for folder in others):
                    return folders, others
    looked_for = ", or ".join(" and ".join(sorted({str(a), str(b)})) for a, b in layouts)
    fail(f"--dataset folder: there is no {looked_for}; see --data-dir, --folder-a and --task in --help")


def read_folders(args, train):
    """Pairs of --dataset folder, bytes (N, 3, size, size), and their names; with --task, A is B for now."""
    folders, others = find_folders(args)
    a, b = [name_pictures(folder) for folder in (folders if train else others)]
    names = [name for name in a if name in b]
    alone = sorted(a.keys() ^ b.keys())
    if alone:
        tqdm.write(f"{len(alone)} pictures have no partner of their name: {alone[:5]} ...", file=sys.stderr)
    if folders == others:  # one name in ten is for testing, always the same ones
        names = [name for name in names if (zlib.crc32(os.fsencode(name)) % 10 > 0) == train]
    names, uneven = choose(names, args, train), []
    for name in names:
        with contextlib.suppress(Exception), Image.open(a[name]) as x, Image.open(b[name]) as y:
            for picture in x, y:
                ImageOps.exif_transpose(picture, in_place=True)
            if abs(x.width * y.height - x.height * y.width) > 0.02 * x.width * y.height:
                uneven.append(name)
    if uneven:
        tqdm.write(f"{len(uneven)} pairs have unequal proportions: {uneven[:5]} ...", file=sys.stderr)
    half_a, half_b = (0, 1) if folders[0] == folders[1] and not args.task else (None, None)
    a, names_a = read_pictures({name: a[name] for name in names}, args.image_size, half_a)
    b, names_b = read_pictures({name: b[name] for name in names}, args.image_size, half_b)
    both = {*names_a} & {*names_b} or fail("--data-dir: there is no pair of which both can be read")
    a, b = a[[name in both for name in names_a]], b[[name in both for name in names_b]]
    return a, b, [name for name in names_a if name in both]


# %% Command line
def parse_args(argv=None):
    """The settings: a flag that is given, else the checkpoint, else the default."""
    parser = argparse.ArgumentParser(f"{SCRIPT}.py", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.description = (__doc__ or "").split("\n")[0]  # none under python -OO
    parser.error = fail  # one line in place of argparse's usage text
    add_flags(parser.add_argument)
    args = parser.parse_args(argv)  # a first look, for --resume and the like
    uses = [flag for flag in (args.generate, args.translate, args.resume) if flag]
    if len(uses) > 1 or bool(args.generate or args.translate) != bool(args.checkpoint):
        fail("--generate N, or --translate PATH, needs --checkpoint PATH, and no --resume")
    if (args.resume, args.checkpoint) != (None, None):
        parser.set_defaults(**load_checkpoint(args.resume or args.checkpoint)["settings"])
    else:
        size = int(args.image_size or (32 if "mnist" in args.dataset else 64))
        task = {"faces": "lines", "folder": None}.get(args.dataset, "mosaic")
        patch_layers = {32: 1, 64: 2, 128: 3, 256: 3}[size]  # about half of the picture, at most 70 pixels
        parser.set_defaults(image_size=size, task=task, patch_layers=patch_layers)
    args = parser.parse_args(argv)  # with the new defaults
    args.image_size = int(args.image_size)
    for name, value in vars(args).items():
        lowest = 0 if type(value) is float or name in ("seed", "limit", "fid_every") else 1  # counts: from 1
        if type(value) in (int, float) and not lowest <= value < 10**12:
            fail(f"--{name.replace('_', '-')}: give a number from {lowest} to 10**12")
    check(args)
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
    """Write what the generator in args.checkpoint makes of test pictures, or of your own, as PNG files."""
    load_checkpoint(args.checkpoint, generator=make_generator(args))  # a check: do the flags fit?
    generator = load_generator(args.checkpoint, args.device)
    if args.translate:
        images, names = read_pictures(name_pictures(args.translate), args.image_size)
        if count_channels(args)[0] == 1:
            images = make_a("grey", images)
    else:
        args.limit = args.generate
        images, _, names = load_pairs(args, train=False)
    folder = open_folder(args, Path(args.checkpoint).parent / "generated")
    for name, image in zip(names, sample(generator, images / 255)):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        save_image(image, folder / f"{name}.png")
    print(f"{len(images)} pictures in {folder}", file=sys.stderr)


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
