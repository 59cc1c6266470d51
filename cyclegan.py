"""CycleGAN: translate between two sets of pictures, without pairs. Digits, cartoon faces, your own folders.

    python cyclegan.py                              # outlines to digits and back, into runs/cyclegan/001
    python cyclegan.py --dataset faces --batch-size 4 --epochs 6    # line drawings to cartoon faces and back
    python cyclegan.py --translate FOLDER --checkpoint runs/cyclegan/001/checkpoint.pt

    a ──► G_AB ──┬──► G_BA ──► a again?         b ──► G_BA ──┬──► G_AB ──► b again?
                 └──► D_B ──► real?                          └──► D_A ──► real?

pix2pix.py learns from pairs. But who has a photograph of a horse, and of the same horse as a zebra? Often
there are only two sets of pictures, A and B. D_B can tell whether G_AB(a) looks like a picture of B, but the
input itself it never sees: answering each outline with some other digit would pass. So CycleGAN trains a
second generator, which goes the other way, and asks that a picture survive the journey there and back:

    L_G = E[(D_B(G_AB(a)) - 1)^2] + E[(D_A(G_BA(b)) - 1)^2]
        + 10 (E|G_BA(G_AB(a)) - a| + E|G_AB(G_BA(b)) - b|)
    L_D = 1/2 E[(D_B(b) - 1)^2] + 1/2 E[D_B(G_AB(a))^2] + the same for D_A

Even so, nothing forces a 7 to stay a 7: G_AB could swap 3s and 7s, and G_BA could swap them back. But leaving
strokes where they are is easier for a convolution. And the generators can cheat: as faint noise in its
output, G_BA hides what A cannot show, and G_AB reads it there. New, too, are the squared errors, steadier
than a cross-entropy; instance normalisation; and a pool of older fakes, so that no old trick works twice.

What to watch: samples/, rows of a, G_AB(a), a again; then b, G_BA(b), b again. A is made from B here, so
G_AB(a) should be b, and G_BA(b) should be a, though training never sees such a pair. Between equals all
scores are 1/2, and g_ab, g_ba, d_a and d_b stay near 0.25. Try --cycle-weight 0 --epochs 1: what changes?

Papers: Zhu et al. 2017, arXiv 1703.10593, where A, B, G_AB, G_BA are X, Y, G, F; Mao et al. 2016, 1611.04076
(squares); Shrivastava et al. 2016, 1612.07828 (pool); Chu et al. 2017, 1712.02950 (cheating). Departures:
small pictures, networks and patches; 4 epochs, not 200; batches of 16; a pool of 800 images, not 50.
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
SCRIPT = "cyclegan"
DATA = str(Path(globals().get("__file__", "cell")).resolve().parent / "data")  # notebooks have no __file__
CACHE = Path(DATA, "cache")  # or, if that cannot be written, in the home folder
CACHE = CACHE if os.access(CACHE if CACHE.exists() else DATA, os.W_OK) else Path.home() / ".cache/gans"
PANELS = [["g_ab", "g_ba"], ["d_a", "d_b"], ["cycle_a", "cycle_b", "identity"]]  # what losses.png shows
LAYOUTS = ("trainA", "trainB"), ("A", "B"), ("train", "train")  # of folders; the last: side by side


def add_flags(add):
    """The flags, this script's own first; `add` is argparse's parser.add_argument."""
    add("--cycle-weight", type=float, default=10.0, help="weight of the cycle loss; 0: none")
    add("--identity-weight", type=float, default=0.0, help="weight of the identity loss; 0: none")
    add("--pool", type=int, default=800, metavar="N", help="older fakes to show D; 0: none")
    add("--norm", choices=["instance", "batch"], default="instance", help="normalisation in all networks")
    add("--blocks", type=int, help="residual blocks in G; None: 4 up to 64 pixels, 6 for 128, 9 for 256")
    add("--patch-layers", type=int, choices=[1, 2, 3], help="D's patches: 16, 34, 70 pixels; None: by size")
    add("--width", type=int, default=32, help="channels of G's first layer; other layers have more")
    tasks = ["outline", "mosaic", "grey", "lines", "glasses"]
    add("--task", choices=tasks, help="how A is made; None: lines for faces, outline for digits")
    add("--paired-tests", action="store_true", help="test pictures of the same name are pairs")
    add("--direction", choices=["a2b", "b2a"], default="a2b", help="for --generate and --translate")
    sizes = ["32", "64", "128", "256", "own"]
    add("--image-size", choices=sizes, help="pixels; None: 32 for digits, else 64; own: with --translate")
    add("--decay", type=float, default=0.5, help="share of the run in which the rates fall to 0")
    add("--epochs", type=int, default=4, help="passes over the larger of A and B")
    add("--lr-g", type=float, default=2e-4, help="Adam's learning rate for the generators")
    add("--lr-d", type=float, default=2e-4, help="Adam's learning rate for the discriminators")
    add("--batch-size", type=int, default=16, help="pictures of A, and of B, per step")
    names = ["mnist", "fashion_mnist", "faces", "folder"]
    add("--dataset", choices=names, default="mnist", help="folder: your own A and B; with --task, your own B")
    add("--data-dir", default=DATA, help="folder: has trainA and trainB, A and B, or train")
    add("--folder-a", metavar="FOLDER", help="with --dataset folder: A, wherever it is")
    add("--folder-b", metavar="FOLDER", help="with --dataset folder: B, wherever it is")
    add("--flip", action=argparse.BooleanOptionalAction, default=False, help="mirror pictures at random")
    add("--limit", type=int, metavar="N", help="use N pictures only, for a quick look")
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
# A group for each channel is instance normalisation; on a CPU it is faster than InstanceNorm2d.
NORMS = {"batch": nn.BatchNorm2d, "instance": lambda width: nn.GroupNorm(width, width, affine=False)}


class ResidualBlock(nn.Module):
    """x + f(x), for x (N, width, H, W): the two convolutions in f need to learn only what should change."""

    def __init__(self, width, norm):
        super().__init__()
        self.layers = nn.Sequential(
            nn.ReflectionPad2d(1),
            nn.Conv2d(width, width, 3, bias=False),
            NORMS[norm](width),
            nn.ReLU(),
            nn.ReflectionPad2d(1),
            nn.Conv2d(width, width, 3, bias=False),
            NORMS[norm](width),
        )

    def forward(self, x):
        return x + self.layers(x)


class Generator(nn.Module):
    """Pictures (N, in_channels, S, S) to pictures (N, out_channels, S, S) in [-1, 1]; S is a multiple of 4.

    Instance normalisation gives each map of each picture a mean of 0 and a deviation of 1, whatever else is
    in the batch. The shapes below are for 32x32 pixels and width 32.
    """

    def __init__(self, in_channels, out_channels, width=32, blocks=4, norm="instance"):
        super().__init__()
        w = width
        self.layers = nn.Sequential(
            nn.ReflectionPad2d(3),  # on CUDA its gradient, and so --resume, is not exact to the last bit
            nn.Conv2d(in_channels, w, 7, bias=False),  # (N, 32, 32, 32)
            NORMS[norm](w),
            nn.ReLU(),
            nn.Conv2d(w, 2 * w, 3, stride=2, padding=1, bias=False),  # (N, 64, 16, 16)
            NORMS[norm](2 * w),
            nn.ReLU(),
            nn.Conv2d(2 * w, 4 * w, 3, stride=2, padding=1, bias=False),  # (N, 128, 8, 8)
            NORMS[norm](4 * w),
            nn.ReLU(),
            *[ResidualBlock(4 * w, norm) for _ in range(blocks)],  # (N, 128, 8, 8)
            nn.ConvTranspose2d(4 * w, 2 * w, 3, stride=2, padding=1, output_padding=1, bias=False),
            NORMS[norm](2 * w),  # (N, 64, 16, 16)
            nn.ReLU(),
            nn.ConvTranspose2d(2 * w, w, 3, stride=2, padding=1, output_padding=1, bias=False),
            NORMS[norm](w),  # (N, 32, 32, 32)
            nn.ReLU(),
            nn.ReflectionPad2d(3),
            nn.Conv2d(w, out_channels, 7),  # (N, out_channels, 32, 32)
            nn.Tanh(),
        )

    def forward(self, images):
        return self.layers(images)


class Discriminator(nn.Module):
    """A PatchGAN: pictures (N, channels, H, W) to scores (N, 1, h, w), one for each patch; 1 means real.

    No layer looks at the whole picture. A patch has 9 * 2^layers - 2 pixels a side: 16, 34 or 70. The shapes
    below are for 32x32 pixels and one layer.
    """

    def __init__(self, channels, width=64, layers=1, norm="instance"):
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
def discriminator_loss(real_scores, fake_scores):
    """L_D of one D: 1/2 E[(D(b) - 1)^2] + 1/2 E[D(G(a))^2], means over pictures and patches."""
    return ((real_scores - 1).square().mean() + fake_scores.square().mean()) / 2


def generator_loss(fake_scores):
    """E[(D(G(a)) - 1)^2]."""
    return (fake_scores - 1).square().mean()


# %% Training step
class ImagePool(nn.Module):
    """Fakes of earlier steps (size, C, S, S): a D that only saw the newest ones would forget the others."""

    def __init__(self, size, channels, side):
        super().__init__()
        self.count = 0  # of the images; not a tensor, so that no step waits for the device
        self.register_buffer("images", torch.zeros(size, channels, side, side))

    def get_extra_state(self):  # so a checkpoint holds the count, too
        return torch.tensor(self.count)

    def set_extra_state(self, state):
        self.count = int(state)

    def query(self, fakes):
        """Give back `fakes` (N, C, S, S), each with probability 1/2 exchanged for one in the pool.

        As long as the pool has room, fakes are copied into it and given back.
        """
        room = min(len(fakes), len(self.images) - self.count)
        self.images[self.count : self.count + room] = fakes[:room]
        self.count += room
        if room == len(fakes) or len(self.images) == 0:
            return fakes
        slots = torch.randperm(len(self.images), device=fakes.device)[: len(fakes) - room]
        new = fakes[room : room + len(slots)]
        exchange = torch.rand(len(new), 1, 1, 1, device=fakes.device) < 0.5
        old = self.images[slots]
        self.images[slots] = torch.where(exchange, new, old)
        return torch.cat([fakes[:room], torch.where(exchange, old, new), fakes[room + len(slots) :]])


def train_step(
    generator, discriminator, pool, optimizer_g, optimizer_d, a, b, cycle_weight, identity_weight, precision
):
    """One step of both generators, then of both discriminators, on pictures a and b (N, C, S, S) in [-1, 1].

    `generator` holds G_AB and G_BA as "ab" and "ba"; `discriminator` and `pool` hold "a" and "b".
    """
    ab, ba = generator["ab"], generator["ba"]

    def run(network, images):
        with torch.autocast(a.device.type, torch.bfloat16, enabled=precision == "bf16"):
            return network(images).float()

    # The generators learn to fool the discriminators, which are frozen now, and to undo each other.
    discriminator.requires_grad_(False)
    fake_b, fake_a = run(ab, a), run(ba, b)
    g_ab = generator_loss(run(discriminator["b"], fake_b))
    g_ba = generator_loss(run(discriminator["a"], fake_a))
    cycle_a = F.l1_loss(run(ba, fake_b), a)
    cycle_b = F.l1_loss(run(ab, fake_a), b)
    identity = torch.zeros_like(cycle_a)
    if identity_weight:  # what is in B already should stay as it is
        identity = F.l1_loss(run(ab, b), b) + F.l1_loss(run(ba, a), a)
    g_loss = g_ab + g_ba + cycle_weight * (cycle_a + cycle_b) + identity_weight * identity
    optimizer_g.zero_grad()
    g_loss.backward()
    optimizer_g.step()
    discriminator.requires_grad_(True)

    # The discriminators learn to tell real from fake; once a pool is full, half of the fakes are older ones.
    shown_a, shown_b = pool["a"].query(fake_a.detach()), pool["b"].query(fake_b.detach())
    d_a = discriminator_loss(run(discriminator["a"], a), run(discriminator["a"], shown_a))
    d_b = discriminator_loss(run(discriminator["b"], b), run(discriminator["b"], shown_b))
    optimizer_d.zero_grad()
    (d_a + d_b).backward()
    optimizer_d.step()

    metrics = {"g_ab": g_ab, "g_ba": g_ba, "d_a": d_a, "d_b": d_b}
    metrics |= {"cycle_a": cycle_a, "cycle_b": cycle_b, "identity": identity}
    return {name: value.detach() for name, value in metrics.items()}  # .item() would wait for the GPU


# %% Training
def check(args):
    """End the program if flags do not go together."""
    if args.task in ("lines", "glasses") and args.dataset != "faces":
        fail(f"--task: only faces come with {args.task}; give another task, or --dataset faces")
    if bool(args.folder_a) != bool(args.folder_b) or (args.folder_a and args.dataset != "folder"):
        fail("--folder-a, --folder-b: give both, with --dataset folder")
    if args.decay > 1:
        fail("--decay: a share is at most 1")
    if args.identity_weight and count_channels(args) == (1, 3):
        fail("--identity-weight: one of A and B is grey, the other in colour; leave it out")
    if args.fid_every and args.task == "glasses":
        fail("--fid-every: fid.py compares with all faces, and B has only those with glasses; leave it out")


def make_generators(args):
    """The untrained generators of a run, "ab" and "ba"."""
    a, b = count_channels(args)
    form = {"width": args.width, "blocks": args.blocks, "norm": args.norm}
    return nn.ModuleDict({"ab": Generator(a, b, **form), "ba": Generator(b, a, **form)})


def build(args):
    """The networks, pools and optimisers of a run, by the names of train_step's arguments."""
    torch.manual_seed(args.seed)
    a, b = count_channels(args)
    generator = make_generators(args)
    form = {"layers": args.patch_layers, "norm": args.norm}
    discriminator = nn.ModuleDict({"a": Discriminator(a, **form), "b": Discriminator(b, **form)})
    pool = {side: ImagePool(args.pool, channels, args.image_size) for side, channels in (("a", a), ("b", b))}
    for network in generator, discriminator:
        network.apply(init_weights)
        network.to(args.device)  # not channels-last, which is slower with instance normalisation
    adam = {"betas": (0.5, 0.999), "fused": True}  # fused: faster
    return {
        "generator": generator,
        "discriminator": discriminator,
        "pool": nn.ModuleDict(pool).to(args.device),
        "optimizer_g": torch.optim.Adam(generator.parameters(), args.lr_g, **adam),
        "optimizer_d": torch.optim.Adam(discriminator.parameters(), args.lr_d, **adam),
    }


def shuffled_rows(pictures, total):
    """`total` row numbers of pictures: all in random order, then all in a new one, and so on."""
    orders = [torch.randperm(len(pictures)) for _ in range(math.ceil(total / len(pictures)))]
    return torch.cat(orders)[:total].to(pictures.device)


def mirrored(images):
    """Each of the images (N, C, H, W) with probability 1/2 mirrored, left to right."""
    keep = torch.rand(len(images), 1, 1, 1, device=images.device) < 0.5
    return images.where(keep, images.flip(3))


def train(args):
    """Train from the start, or go on from the checkpoint args.resume."""
    domains, _ = load_domains(args, train=True)
    test, _ = load_domains(args, train=False)
    a, b = domains["a"].to(args.device), domains["b"].to(args.device)
    batch_size = min(args.batch_size, len(a), len(b))
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
    steps = max(len(a), len(b)) // batch_size  # of an epoch
    total = steps * args.epochs
    few = " (few: for better pictures raise --epochs)" if total < 1000 else ""
    print(f"{len(a):,} and {len(b):,} pictures, {total:,} steps{few}: {folder}", file=sys.stderr)

    options = {name: vars(args)[name] for name in ("cycle_weight", "identity_weight", "precision")}
    for epoch in range(len(history) + 1, args.epochs + 1):
        torch.manual_seed(args.seed * 10_000 + epoch)  # so a resumed run draws the same numbers
        batches_a = shuffled_rows(a, steps * batch_size).split(batch_size)
        batches_b = shuffled_rows(b, steps * batch_size).split(batch_size)
        metrics, start = [], time.perf_counter()
        for number in tqdm(range(steps), f"epoch {epoch}", leave=False):
            left = 1 - (epoch - 1 + number / steps) / args.epochs  # the share to come
            for name, rate in ("optimizer_g", args.lr_g), ("optimizer_d", args.lr_d):
                parts[name].param_groups[0]["lr"] = rate * min(1, left / max(args.decay, 1e-9))
            batch = {"a": a[batches_a[number]] / 127.5 - 1, "b": b[batches_b[number]] / 127.5 - 1}
            if args.flip:
                batch = {side: mirrored(images) for side, images in batch.items()}
            metrics.append(train_step(**parts, **batch, **options))

        means = {name: torch.stack([step[name] for step in metrics]).mean().item() for name in metrics[0]}
        if args.paired_tests or args.task not in (None, "glasses"):  # test pictures have targets
            means |= measure(generator, test)
        history.append({"epoch": epoch} | means)
        text = "  ".join(f"{name} {value:.3f}" for name, value in means.items())
        print(f"epoch {epoch}/{args.epochs}  {text}  {time.perf_counter() - start:.0f} s", flush=True)
        draw(generator, test, folder, epoch)
        if args.fid_every and epoch % args.fid_every == 0:
            shown = min(10_000, len(test["a"]))
            fid.track(judge, lambda n: sample(generator["ab"], test["a"][:n] / 255), folder, epoch, shown)
        save(parts, history, folder, args)
        plot(history, folder, last=epoch == args.epochs)


# %% Pictures, files
def fail(message, status=2):
    """End the program with one line on stderr."""
    tqdm.write(f"{SCRIPT}.py: {message}", file=sys.stderr)
    raise SystemExit(status) from None


@torch.no_grad()
def sample(generator, images):
    """What a generator makes of images (N, C, S, S) in [0, 1], in eval mode: images in [0, 1], on the CPU."""
    training, device = generator.training, next(generator.parameters()).device
    generator.eval()
    outputs = torch.cat([generator(chunk.to(device) * 2 - 1).cpu() / 2 + 0.5 for chunk in images.split(32)])
    generator.train(training)
    return outputs


def measure(generator, test):
    """The mean difference of outputs from their targets, in both directions, from 0 to 1."""
    a, b = test["a"][:1000] / 255, test["b"][:1000] / 255
    a2b_error, b2a_error = F.l1_loss(sample(generator["ab"], a), b), F.l1_loss(sample(generator["ba"], b), a)
    return {"a2b_error": a2b_error.item(), "b2a_error": b2a_error.item()}


def draw(generator, test, folder, epoch):
    """Write samples, rows of a, G_AB(a), a again, and b, G_BA(b), b again."""
    (folder / "samples").mkdir(exist_ok=True)
    shown = min(10, len(test["a"]), len(test["b"]))
    a, b = test["a"][:shown] / 255, test["b"][:shown] / 255
    fake_b, fake_a = sample(generator["ab"], a), sample(generator["ba"], b)
    again_a, again_b = sample(generator["ba"], fake_b), sample(generator["ab"], fake_a)
    grid = in_colour(a, fake_b, again_a, b, fake_a, again_b)
    save_image(grid, folder / "samples" / f"epoch_{epoch:04d}.png", nrow=shown)


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


def load_generator(path, device="cpu", direction="a2b"):
    """A generator of a checkpoint, for any program: sample(load_generator(path), images)."""
    generator = make_generators(argparse.Namespace(**load_checkpoint(path)["settings"]))
    load_checkpoint(path, generator=generator)
    return generator["ab" if direction == "a2b" else "ba"].to(device).eval()


# %% Domains: the two sets of pictures, A and B
def count_channels(args):
    """The channels of A and of B: 1 if they are grey, 3 if they have colours."""
    b = 1 if "mnist" in args.dataset else 3
    a = 1 if args.task in ("outline", "grey", "lines") else b
    return a, b


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


def load_domains(args, train):
    """Two dicts with the keys "a" and "b": pictures as bytes (N, C, size, size), and their names.

    Where A is made from B, test pictures are pairs, but for training A and B come from separate halves.
    """
    word = "train" if train else "test"
    if args.dataset == "folder":
        domains, names = read_folders(args, train)
    else:
        b = read_sheets(args, f"{word}_??.webp") if args.dataset == "faces" else read_dataset(args, train)
        rows = split(choose(range(len(b)), args, train), args, train)
        domains = {side: fit(b[rows[side]], args.image_size) for side in "ab"}
        names = {side: [f"{row:05d}" for row in rows[side]] for side in "ab"}
    if args.task == "lines":
        domains["a"] = fit(read_sheets(args, f"{word}_??_lines.webp")[rows["a"], :1], args.image_size)
    elif args.task and args.task != "glasses":
        domains["a"] = make_a(args.task, domains["a"])
    if args.paired_tests and not train and not args.generate:
        both = [name for name in names["a"] if name in names["b"]]
        if not both:
            fail("--paired-tests: no test pictures of A and B share a name; leave it out")
        for side in "ab":
            domains[side] = domains[side][[names[side].index(name) for name in both]]
        names = {"a": both, "b": both}
    if train:
        total = len(domains["a"]) + len(domains["b"])
        if args.resume and getattr(args, "images", total) != total:
            tqdm.write(f"pictures have changed: {args.images:,} before, {total:,} now", file=sys.stderr)
        args.images = total  # into the checkpoint
    return domains, names


def split(items, args, train):
    """Which items are A, and which are B."""
    if args.task == "glasses":  # A: faces without, B: faces with them
        path = Path(args.data_dir, "faces", "train.csv" if train else "test.csv")
        glasses = np.genfromtxt(path, None, delimiter=",", names=True, encoding="utf-8")["glasses"] != "none"
        sides = {"a": [row for row in items if not glasses[row]], "b": [row for row in items if glasses[row]]}
    else:  # to train on A made from B, half for each; otherwise all for both
        sides = {"a": items[0::2], "b": items[1::2]} if args.task and train else {"a": items, "b": items}
    if not all(sides.values()):
        fail("--limit, --dataset: there are no pictures of A, or none of B; give more")
    return sides


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
    """A and B of --dataset folder, bytes (N, 3, size, size), and their names; with --task, both are B."""
    folders, others = find_folders(args)
    domains, names = {}, {}
    for side, folder in zip("ab", folders if train else others):
        pictures = name_pictures(folder)
        chosen = [*pictures]
        if folders == others:  # one name in ten is for testing, always the same ones
            held_out = {name for name in chosen if zlib.crc32(os.fsencode(name)) % 10 == 0}
            chosen = [name for name in chosen if (name not in held_out) == train]
        chosen = split(choose(chosen, args, train), args, train)[side]
        half = "ab".index(side) if folders[0] == folders[1] and not args.task else None
        pictures = {name: pictures[name] for name in chosen}
        domains[side], names[side] = read_pictures(pictures, args.image_size, half)
    return domains, names


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
    if args.image_size == "own" and not args.translate:
        fail("--image-size own: it is for --translate; give a number")
    if (args.resume, args.checkpoint) != (None, None):
        parser.set_defaults(**load_checkpoint(args.resume or args.checkpoint)["settings"])
    else:
        size = int(args.image_size or (32 if "mnist" in args.dataset else 64))
        task = {"faces": "lines", "folder": None}.get(args.dataset, "outline")
        patch_layers = {32: 1, 64: 2, 128: 3, 256: 3}[size]  # about half of the picture, at most 70 pixels
        blocks = {32: 4, 64: 4, 128: 6, 256: 9}[size]
        parser.set_defaults(image_size=size, task=task, patch_layers=patch_layers, blocks=blocks)
    args = parser.parse_args(argv)  # with the new defaults
    args.image_size = "own" if args.image_size == "own" else int(args.image_size)
    for name, value in vars(args).items():
        lowest = 0 if type(value) is float or name in ("seed", "pool", "limit", "fid_every") else 1
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
    """Write what a generator in args.checkpoint makes of test pictures, or of your own, as PNG files."""
    load_checkpoint(args.checkpoint, generator=make_generators(args))  # a check: do the flags fit?
    side, generator = args.direction[0], load_generator(args.checkpoint, args.device, args.direction)
    if args.translate:  # one by one, for they may differ in size
        size = None if args.image_size == "own" else args.image_size
        decoded = ((name, decode(path, size)) for name, path in name_pictures(args.translate).items())
        groups = (([name], torch.tensor(image)[None]) for name, image in decoded if image is not None)
    else:
        args.limit = args.generate
        domains, names = load_domains(args, train=False)
        groups = [(names[side], domains[side])]
    folder = open_folder(args, Path(args.checkpoint).parent / "generated")
    for names, images in groups:
        if args.translate and generator.layers[1].in_channels == 1:  # its first convolution
            images = make_a("grey", images)
        height, width = images.shape[2:]
        padding = 0, max(-width % 4, 8 - width), 0, max(-height % 4, 8 - height)  # to multiples of 4
        padded = F.pad(images / 255, padding, mode="replicate")
        for name, image in zip(names, sample(generator, padded)):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            save_image(image[:, :height, :width], folder / f"{name}.png")
    if not any(folder.iterdir()):
        fail(f"--translate: nothing in {args.translate} can be read")
    print(f"{len([*folder.rglob('*.png')])} pictures in {folder}", file=sys.stderr)


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
