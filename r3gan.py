"""R3GAN: one loss, two penalties, and no tricks. MNIST, 28x28.

    python r3gan.py                                     # 25 epochs, into runs/r3gan/001
    python r3gan.py --dataset stacked --fid-every 1     # three digits in each image: 1,000 modes

    x ─────────► D ──► D(x) ────┐
                                ├──► which of the two is real?
    z ──► G ──► D ──► D(G(z)) ──┘

In dcgan_mnist.py every fake has to pass the same bar: D must think it real. One digit that passes is enough,
so G may draw nothing but ones. Batch normalisation, softer targets, noise: do we need all these tricks?

Show D a fake beside a real image, and ask which one is real: that is the relativistic pairing. Now each
real image is a bar. If G leaves out the sevens, fakes beside a seven lose as soon as D has noticed. With
softplus(t) = log(1 + e^t), and gradients with respect to the image:

    L_D = E[softplus(D(G(z)) - D(x))] + r1/2 E|grad D(x)|^2 + r2/2 E|grad D(G(z))|^2
    L_G = E[softplus(D(x) - D(G(z)))]

Pairing alone may never settle: the two players can circle for ever. R1, known from stylegan.py, makes D
flat at real images. Near the goal, where fakes lie close to these, the paper proves that R1 is enough. But at
first they lie elsewhere, where D may be as steep as it likes, and its slopes throw G about. R2 makes D flat
there, too. With both, the paper's players settle, and the tricks can go.

What to watch: the losses. A D that cannot tell gives all images one score, and both are log 2 = 0.693.
Try --r1-weight 0 --r2-weight 0. Which of the curves tells you first that something is wrong?

Papers: Huang et al. 2024, arXiv 2501.05441; Jolicoeur-Martineau 2018, 1807.00734 (pairs); Mescheder et al.
2018, 1801.04406 (R1, R2). Departures: the small networks of dcgan_mnist.py without batch normalisation, not
deep residual ones; constant rates and penalties. As in the paper, an average of G's weights draws samples.
"""

import argparse
import contextlib
import copy
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
SCRIPT = "r3gan"
DATA = str(Path(globals().get("__file__", "cell")).resolve().parent / "data")  # notebooks have no __file__
PANELS = [["d_loss", "g_loss"], ["d_real", "d_fake"], ["r1", "r2"], ["diversity"]]  # what losses.png shows


def add_flags(add):
    """The flags, this script's own first; `add` is argparse's parser.add_argument."""
    add("--pairing", action=argparse.BooleanOptionalAction, default=True, help="no: each image alone")
    add("--r1-weight", type=float, default=1.0, help="of the penalty on D's slope at real images; 0: none")
    add("--r2-weight", type=float, default=1.0, help="of the penalty on D's slope at fakes; 0: none")
    add("--ema-images", type=int, default=10_000, help="half-life of the weights' average, in images")
    add("--width", type=int, default=16, help="channels of D's first convolution; other layers have more")
    add("--epochs", type=int, default=25, help="passes over the training images")
    add("--lr-g", type=float, default=4e-3, help="Adam's learning rate for the generator")
    add("--lr-d", type=float, default=4e-3, help="Adam's learning rate for the discriminator")
    add("--batch-size", type=int, default=128, help="images per step")
    add("--latent-dim", type=int, default=100, help="length of the noise vector z")
    names = ["mnist", "fashion_mnist", "faces", "stacked"]
    add("--dataset", choices=names, default="mnist", help="stacked: three digits, as red, green and blue")
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
    """Noise z (N, latent_dim) to images (N, channels, size, size) in [-1, 1]; size is 28 or 64."""

    def __init__(self, latent_dim=100, width=16, channels=1, size=28):
        super().__init__()
        self.latent_dim = latent_dim
        side, doublings = (7, 2) if size == 28 else (8, 3)
        w = width * 2**doublings
        layers = [
            nn.Linear(latent_dim, w * side * side),
            nn.LeakyReLU(0.2),
            nn.Unflatten(1, (w, side, side)),  # (N, 64, 7, 7)
        ]
        for _ in range(doublings - 1):
            layers += [nn.ConvTranspose2d(w, w // 2, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
            w = w // 2  # (N, 32, 14, 14)
        layers += [nn.ConvTranspose2d(w, channels, 4, stride=2, padding=1)]  # (N, channels, 28, 28)
        self.layers = nn.Sequential(*layers, nn.Tanh())

    def forward(self, z):
        return self.layers(z)


class Discriminator(nn.Module):
    """Images (N, channels, size, size) to logits (N, 1); only differences of logits mean something."""

    def __init__(self, width=16, channels=1, size=28):
        super().__init__()
        side, halvings = (3, 2) if size == 28 else (4, 3)
        w = width
        layers = [nn.Conv2d(channels, w, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]  # (N, 16, 14, 14)
        for _ in range(halvings):
            layers += [nn.Conv2d(w, 2 * w, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
            w = 2 * w  # (N, 32, 7, 7), then (N, 64, 3, 3)
        self.layers = nn.Sequential(*layers, nn.Flatten(), nn.Linear(w * side * side, 1))  # (N, 1)

    def forward(self, images):
        return self.layers(images)


def init_weights(module):
    """Weights from N(0, 2 / n), where n weights meet in an output (He et al. 2015, arXiv 1502.01852).

    So signals neither grow nor fade from layer to layer. There is no batch normalisation to mend that.
    """
    if not isinstance(module, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)):
        return
    n = module.weight[0].numel()
    if isinstance(module, nn.ConvTranspose2d):  # with stride 2, a pixel meets 4 of the 16 weights of a kernel
        n = module.in_channels * 4
    nn.init.normal_(module.weight, 0.0, math.sqrt(2 / n))
    nn.init.zeros_(module.bias)


# %% Losses
def discriminator_loss(real_logits, fake_logits, pairing=True):
    """L_D = E[softplus(D(G(z)) - D(x))]; without pairs E[softplus(-D(x))] + E[softplus(D(G(z)))]."""
    if pairing:
        return F.softplus(fake_logits - real_logits).mean()
    return F.softplus(-real_logits).mean() + F.softplus(fake_logits).mean()


def generator_loss(real_logits, fake_logits, pairing=True):
    """L_G = E[softplus(D(x) - D(G(z)))]; without pairs the non-saturating loss, E[softplus(-D(G(z)))]."""
    return F.softplus(real_logits - fake_logits if pairing else -fake_logits).mean()


def squared_slopes(logits, images):
    """|grad D|^2 at each image (N,): the squares of a logit's derivatives by all pixels, added up."""
    gradient = torch.autograd.grad(logits.sum(), images, create_graph=True)[0]  # no logit has two images
    return gradient.square().sum((1, 2, 3))


# %% Training step
@torch.no_grad()
def average(ema, generator, decay):
    """Moves `ema` towards the generator: G wobbles from step to step, and its average hardly does."""
    torch._foreach_lerp_([*ema.parameters()], [*generator.parameters()], 1 - decay)  # all in one kernel
    for mean, new in zip(ema.buffers(), generator.buffers()):
        mean.copy_(new)


def train_step(
    generator, discriminator, optimizer_g, optimizer_d, ema, real, pairing, r1_weight, r2_weight, ema_images
):
    """One step of D, then one of G, on images `real` (N, C, S, S) in [-1, 1]. Returns the metrics."""
    # D learns to put each real image above a fake, and to stay flat at both.
    with torch.no_grad():
        fake = generator(torch.randn(len(real), generator.latent_dim, device=real.device))
    images = torch.cat([real, fake]).requires_grad_()  # one batch: nothing in D mixes images
    logits = discriminator(images)
    real_logits, fake_logits = logits.chunk(2)
    d_loss = discriminator_loss(real_logits, fake_logits, pairing)
    r1, r2 = squared_slopes(logits, images).view(2, -1).mean(1)  # of real images, of fakes
    optimizer_d.zero_grad()
    (d_loss + r1_weight / 2 * r1 + r2_weight / 2 * r2).backward()
    optimizer_d.step()

    # G learns to put new fakes above the real images, for the updated D, which is frozen now.
    discriminator.requires_grad_(False)
    fake = generator(torch.randn(len(real), generator.latent_dim, device=real.device))
    g_loss = generator_loss(discriminator(real), discriminator(fake), pairing)
    optimizer_g.zero_grad()
    g_loss.backward()
    optimizer_g.step()
    discriminator.requires_grad_(True)
    average(ema, generator, decay=0.5 ** (len(real) / ema_images))

    metrics = {"d_loss": d_loss, "g_loss": g_loss}
    metrics |= {"d_real": real_logits.mean(), "d_fake": fake_logits.mean(), "r1": r1, "r2": r2}
    metrics |= {"diversity": (fake.var(0).mean() / real.var(0).mean()).sqrt()}  # 1: fakes vary as much
    return {name: value.detach() for name, value in metrics.items()}  # .item() would wait for the GPU


# %% Training
def build(args):
    """The networks and optimisers of a run, by the names of train_step's arguments."""
    torch.manual_seed(args.seed)
    form = {"channels": 1 if "mnist" in args.dataset else 3, "size": 64 if args.dataset == "faces" else 28}
    generator = Generator(args.latent_dim, args.width, **form)
    discriminator = Discriminator(args.width, **form)
    layout = torch.contiguous_format if "mps" in args.device else torch.channels_last  # faster; wrong on mps
    for network in generator, discriminator:
        network.apply(init_weights)
        network.to(args.device, memory_format=layout)
    adam = {"betas": (0.0, 0.99), "fused": True}  # no momentum; fused: faster
    return {
        "generator": generator,
        "discriminator": discriminator,
        "optimizer_g": torch.optim.Adam(generator.parameters(), args.lr_g, **adam),
        "optimizer_d": torch.optim.Adam(discriminator.parameters(), args.lr_d, **adam),
        "ema": copy.deepcopy(generator).requires_grad_(False),
    }


def train(args):
    """Train from the start, or go on from the checkpoint args.resume."""
    images = load_images(args)
    batch_size = min(args.batch_size, len(images))
    parts = build(args)
    ema = parts["ema"]  # the averaged generator, which draws the samples
    history = []  # the mean metrics of each epoch
    if args.resume:
        history = load_checkpoint(args.resume, **parts)["history"]  # and the parts are as they were
        parts["optimizer_g"].param_groups[0]["lr"] = args.lr_g  # but with the rates of now
        parts["optimizer_d"].param_groups[0]["lr"] = args.lr_d
    if len(history) >= args.epochs:
        fail(f"--epochs: {args.resume} has run {len(history)} already; ask for more")
    if args.fid_every:
        import fid

        if args.dataset == "stacked":
            judge = fid.load_classifier("mnist", args.data_dir, args.device)[0].to(args.device)
        else:  # may train a classifier first
            judge = fid.Judge(args.dataset, images, args.device, args.data_dir)
    folder = open_folder(args, f"runs/{SCRIPT}")
    (folder / "config.json").write_text(json.dumps(vars(args) | {"torch": torch.__version__}, indent=2))
    steps = len(images) // batch_size * args.epochs
    few = " (few: for better pictures raise --epochs)" if steps < 1000 else ""
    print(f"{len(images):,} images, {steps:,} steps{few}, on {args.device}: {folder}", file=sys.stderr)

    options = {name: vars(args)[name] for name in ("pairing", "r1_weight", "r2_weight", "ema_images")}
    for epoch in range(len(history) + 1, args.epochs + 1):
        torch.manual_seed(args.seed * 10_000 + epoch)  # so a resumed run draws the same numbers
        order = torch.randperm(len(images)).to(args.device)
        batches = order.split(batch_size)[: len(images) // batch_size]  # whole ones only
        metrics, start = [], time.perf_counter()
        for batch in tqdm(batches, f"epoch {epoch}", leave=False):
            metrics.append(train_step(**parts, real=images[batch] / 127.5 - 1, **options))

        means = {name: torch.stack([step[name] for step in metrics]).mean().item() for name in metrics[0]}
        history.append({"epoch": epoch} | means)
        text = "  ".join(f"{name} {value:.3f}" for name, value in means.items())
        print(f"epoch {epoch}/{args.epochs}  {text}  {time.perf_counter() - start:.0f} s", flush=True)
        draw(ema, folder, epoch, args)
        if args.fid_every and epoch % args.fid_every == 0:
            if args.dataset == "stacked":
                count_modes(judge, ema, folder, epoch)
            else:
                fid.track(judge, lambda n: sample(ema, torch.randn(n, args.latent_dim)), folder, epoch)
        save(parts, history, folder, args)
        plot(history, folder, last=epoch == args.epochs)


# %% Data, pictures, files
def fail(message, status=2):
    """End the program with one line on stderr."""
    tqdm.write(f"{SCRIPT}.py: {message}", file=sys.stderr)
    raise SystemExit(status) from None


def load_images(args):
    """The training images as bytes (N, C, S, S), all of them on the device: 28x28, faces 64x64."""
    torch.manual_seed(args.seed)
    if args.dataset == "faces":
        images = read_sheets(args)
    else:
        dataset_class = datasets.FashionMNIST if args.dataset == "fashion_mnist" else datasets.MNIST
        try:
            images = dataset_class(args.data_dir, download=True).data[:, None]
        except Exception as error:  # many types are possible
            fail(f"--data-dir: no {args.dataset} in {args.data_dir}, and no download ({error!r:.99})")
    if args.dataset == "stacked":  # each image: three digits at random
        images = images[torch.randint(len(images), (60_000, 3)), 0]
    return images[torch.randperm(len(images))[: args.limit or None]].to(args.device)


def read_sheets(args):
    """The cartoon faces (N, 3, 64, 64) of data/faces: a sheet has 32 rows of 32."""
    folder = Path(args.data_dir, "faces")
    sheets = [np.asarray(Image.open(path)) for path in sorted(folder.glob("train_??.webp"))]
    if {sheet.shape for sheet in sheets} != {(2048, 2048, 3)}:
        fail(f"--data-dir: {folder} lacks the sheets of faces")
    faces = np.stack(sheets).reshape(-1, 32, 64, 32, 64, 3)  # (sheets, rows, 64, columns, 64, 3)
    return torch.from_numpy(faces).permute(0, 1, 3, 5, 2, 4).reshape(-1, 3, 64, 64)


@torch.no_grad()
def count_modes(classifier, generator, folder, epoch, count=26_000):
    """Print how many of the 1,000 modes occur in `count` samples, and KL(q || u); into modes.csv, too.

    A mode is what the digits of an image are, told by fid.py's classifier. q are the modes' shares, u is
    1/1000 each. As many training images have a KL of 0.023, for they are a sample, too.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        images = sample(generator, torch.randn(count, generator.latent_dim))
    device, counts = next(classifier.parameters()).device, torch.zeros(1000)
    for chunk in images.split(500):
        digits = (chunk.flatten(0, 1)[:, None] * 255).round().to(device, torch.uint8)  # (3N, 1, 28, 28)
        classes = classifier(classifier.prepare(digits))[1].argmax(1).view(-1, 3).cpu()
        counts += torch.bincount(classes @ torch.tensor([100, 10, 1]), minlength=1000)
    q = counts / count
    modes, kl = (counts > 0).sum().item(), torch.xlogy(q, 1000 * q).sum().item()
    with open(folder / "modes.csv", "a") as file:
        file.write(f"{epoch},{modes},{kl:.4f}\n")
    print(f"  {modes} of 1,000 modes  KL {kl:.3f}", flush=True)


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
            torch.save({name: checkpoint[name] for name in ("ema", "script", "settings")}, tmp)
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
    """The averaged generator of a checkpoint: sample(load_generator(path), torch.randn(64, 100))."""
    settings = argparse.Namespace(**load_checkpoint(path)["settings"], device="cpu")
    generator = build(settings)["ema"]
    load_checkpoint(path, ema=generator)
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
