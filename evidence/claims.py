"""What tutorials say about GANs, put to the test with the scripts as they are.

    python evidence/claims.py --list                # the claims, and the commands that test them
    python evidence/claims.py sight labels          # train, measure, write the CSV, the plot and the table
    python evidence/claims.py sight --table         # the table of what was measured before
    python evidence/claims.py copies flaws seen     # tables without a GAN

A claim is tested by settings: a script and its flags and, where a user would hardly want a flag, a change
that is made from outside. Each runs with the seeds 42, 43 and 44 (points in the plane: 42 to 51) by the
script's own main. Generators of some epochs then make 10,000 samples, or translate as many test images, which
are measured as `fid.py --features classifier` does, against the test set:

    distance        Frechet distance on the classifier's features; 0 is best, and it is no FID
    precision       the share of samples near a real image; recall: of real images near a sample
    classes         how many of the ten have 1% of the samples or more; entropy: of their shares, 1 if equal
    confidence      the classifier's mean probability of the likeliest class
    class_accuracy  of cgan.py, the share of samples that are of the class asked for; of pix2pix.py and
                    cyclegan.py, of test images that are still of their class when they are translated
    diversity       root mean square distance of two samples, over that of two test images
    seconds         CPU time of the training steps so far

and what the script itself reports of that epoch. Runs lie in runs/claims; what is there is not done again,
and what was stopped goes on. Each has one thread; --jobs of them run side by side.
"""

import argparse
import contextlib
import csv
import functools
import importlib
import itertools
import json
import math
import multiprocessing
import os
import re
import shutil
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from PIL import Image
from torch import nn
from torchvision.transforms.functional import gaussian_blur
from torchvision.utils import save_image
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # where fid.py and the scripts are

import fid

HERE = Path(__file__).resolve().parent
RUNS, RESULTS, PICTURES = HERE.parent / "runs/claims", HERE / "results", HERE / "pictures"
DATA = str(HERE.parent / "data")
SAMPLES = 10_000
EPOCHS = {1, 2, 3, 5, 7, 10, 15, 20, 25, 30, 40, 50}  # after these, and at the end, samples are measured;
SECONDS = 150, 240, 900  # and after the last epochs that end by then
SEEDS, TEN = (42, 43, 44), tuple(range(42, 52))


# %% Changes from outside
def edited(name, edit):
    """A change: the class `name` of a script, whose networks are edited when they are made."""

    def change(script):
        original = getattr(script, name)

        class Edited(original):
            def __init__(self, *args, **kwargs):
                super().__init__(*args, **kwargs)
                edit(self.layers)

        return mock.patch.object(script, name, Edited)

    change.__name__ = f"{name}_{edit.__name__}"
    return change


def without_batch_norm(layers):
    """No batch normalisation, and nothing in its place."""
    for i, layer in enumerate(layers):
        if isinstance(layer, (nn.BatchNorm1d, nn.BatchNorm2d)):
            layers[i] = nn.Identity()


def with_batch_norm(layers):
    """Batch normalisation after each convolution but the first, as dcgan_mnist.py's D has it."""
    convolutions = [i for i, layer in enumerate(layers) if isinstance(layer, nn.Conv2d)]
    for i in reversed(convolutions[1:]):  # each moves those behind it
        layers.insert(i + 1, nn.BatchNorm2d(layers[i].out_channels))


def with_pooling(layers):
    """Convolutions of stride 1 and 2x2 max pooling, in place of stride 2."""
    for i, layer in enumerate(layers):
        if isinstance(layer, nn.Conv2d):
            same = nn.Conv2d(layer.in_channels, layer.out_channels, 4, padding="same", bias=False)
            layers[i] = nn.Sequential(same, nn.MaxPool2d(2))


def with_relu(layers):
    """ReLU in place of LeakyReLU."""
    for i, layer in enumerate(layers):
        if isinstance(layer, nn.LeakyReLU):
            layers[i] = nn.ReLU()


def blind(layers):
    """A third convolution of 1x1 pixels: as deep, and it sees as little as two convolutions do."""
    third = layers[5]
    layers[5] = nn.Conv2d(third.in_channels, third.out_channels, 1, bias=False)
    layers[-1] = nn.Linear(third.out_channels * 7 * 7, 1)


def beta1_of_0_9(script):
    """Adam's own default for beta1."""
    adam = torch.optim.Adam
    return mock.patch.object(
        torch.optim, "Adam", lambda *args, betas, **more: adam(*args, betas=(0.9, betas[1]), **more)
    )


def fully_connected(script):
    """vanilla_gan.py's networks and initial weights in r3gan.py."""
    vanilla = importlib.import_module("vanilla_gan")
    return mock.patch.multiple(
        script,
        Generator=lambda latent_dim, width, **form: vanilla.Generator(latent_dim),
        Discriminator=lambda width, **form: vanilla.Discriminator(),
        init_weights=vanilla.init_weights,
    )


# %% Settings and claims
@dataclass(frozen=True)
class Setting:
    """What is trained, how it is called in tables, and with which seeds."""

    label: str
    command: str  # a script, without .py, and its flags
    change: Callable | None = None
    seeds: tuple[int, ...] = SEEDS

    @property
    def script(self):
        return importlib.import_module(self.command.split()[0])

    @property
    def args(self):
        """The settings of the script's command line, as its parse_args returns them."""
        return self.script.parse_args([*self.command.split()[1:], "--device", "cpu"])

    @property
    def name(self):
        """What a user would type after "python", and in brackets what is changed from outside."""
        script, *flags = self.command.split()
        return " ".join([f"{script}.py", *flags]) + (f" ({self.change.__name__})" if self.change else "")

    def folder(self, seed):
        """Where its run is. Settings of several claims that differ in their labels alone share it."""
        return RUNS / re.sub(r"[^\w.]+", "-", self.name.replace(".py", "")).strip("-") / str(seed)


@dataclass(frozen=True)
class Claim:
    """A sentence that the settings decide; what its table shows, and the axes of its plot."""

    text: str
    settings: tuple[Setting, ...]
    columns: tuple[str, ...] = ("distance", "precision", "recall", "diversity")
    curve: str = "distance"
    axis: str = "epoch"


ONE = SEEDS[:1]
DCGAN, VANILLA, CGAN = "dcgan_mnist --epochs 10", "vanilla_gan", "cgan --epochs 10"
BF16 = "--precision bf16"
SN = f"dcgan32_wgan_sn --published {BF16}"


def dcgan32(rates, more=""):
    return f"dcgan32_wgan_sn {rates} {more}".strip() + f" {BF16}"


def edited_dcgan(label, name, edit):
    return Setting(label, DCGAN, edited(name, edit), ONE)


def stacked(label, flags=""):
    return Setting(label, f"r3gan --dataset stacked --epochs 10 --fid-every 1 {flags}".strip())


def plane():
    """gan_2d.py with both losses, both memories of Adam, and three pairs of rates."""
    rates = {"default rates": "", "D fast": "--lr-d 1e-2", "D fast, G slow": "--lr-d 1e-2 --lr-g 1e-4"}
    for (pace, flags), loss, beta2 in itertools.product(
        rates.items(), ("non-saturating", "minimax"), (0.9, 0.999)
    ):
        yield Setting(
            f"{loss}, {beta2}, {pace}", f"gan_2d --loss {loss} --beta2 {beta2} {flags}".strip(), None, TEN
        )


CLAIMS = {
    "lr-collapse": Claim(
        "dcgan32, as published: with lr_G >= lr_D the generator collapses to one output",
        (
            Setting("G 3e-5, C 6e-5", SN),
            Setting("G 3e-5, C 3e-5", dcgan32("--lr-g 3e-5 --lr-d 3e-5")),
            Setting("G 6e-5, C 3e-5", dcgan32("--lr-g 6e-5 --lr-d 3e-5")),
            Setting(
                "G 3e-5, C 6e-5, no SN", f"dcgan32_wgan_sn --published --no-spectral-norm {BF16}", None, ONE
            ),
            Setting(
                "G 3e-5, C 3e-5, no SN", dcgan32("--lr-g 3e-5 --lr-d 3e-5", "--no-spectral-norm"), None, ONE
            ),
            Setting(
                "G 6e-5, C 3e-5, no SN", dcgan32("--lr-g 6e-5 --lr-d 3e-5", "--no-spectral-norm"), None, ONE
            ),
        ),
        ("distance", "precision", "recall", "classes", "diversity"),
    ),
    "plane-minimax": Claim(
        "In the plane: minimax's gradient vanishes when D is ahead, and G learns nothing",
        tuple(plane()),
        ("all modes", "modes", "near", "js", "first gradient", "gradient"),
        curve="modes",
    ),
    "sight": Claim(
        "DCGAN is better with a discriminator that sees a whole digit",
        (
            Setting("three convolutions", DCGAN),
            Setting("two, and one of 1x1", DCGAN, edited("Discriminator", blind)),
            Setting("two convolutions", f"{DCGAN} --d-layers 2"),
        ),
    ),
    "healthy": Claim(
        "A healthy DCGAN has a D loss of 0.5 to 1.5, D(real) of 0.7 to 0.9, and D(fake) rises to 0.3 or more",
        (Setting("10 epochs", DCGAN),),
        ("distance", "range of d_loss", "range of d_real", "range of d_fake"),
        curve="d_fake",
    ),
    "labels": Claim(
        "Told the class, the same networks make better samples",
        (
            Setting("told (cgan.py)", CGAN),
            Setting("not told (dcgan_mnist.py)", f"{DCGAN} --batch-size 64 --lr-g 1e-3 --lr-d 1e-3"),
            Setting("not told, its own rates", DCGAN),
        ),
    ),
    "critic-norm": Claim(
        "Batch normalisation in the critic hurts WGAN-GP",
        (
            Setting("none", "wgan_gp --epochs 5"),
            Setting("batch normalisation", "wgan_gp --epochs 5", edited("Critic", with_batch_norm)),
        ),
    ),
    "vanilla-dcgan": Claim(
        "A DCGAN makes better digits than a fully connected GAN",
        (Setting("vanilla_gan.py", VANILLA), Setting("dcgan_mnist.py", "dcgan_mnist")),
        ("distance", "precision", "recall", "distance after 240 s", "recall after 240 s", "seconds"),
        axis="seconds",
    ),
    "r3gan": Claim(
        "R3GAN's loss, without tricks, draws digits as well as DCGAN and WGAN-GP do",
        (
            Setting("r3gan.py", "r3gan"),
            Setting("dcgan_mnist.py", "dcgan_mnist"),
            Setting("wgan_gp.py", "wgan_gp"),
        ),
        ("distance after 240 s", "recall after 240 s", "distance", "precision", "recall", "seconds"),
        axis="seconds",
    ),
    "loss-or-network": Claim(
        "The loss matters more than the network: vanilla_gan.py's networks with R3GAN's loss",
        (
            Setting("usual loss, 2e-4", VANILLA),
            Setting("usual loss, 5e-4", f"{VANILLA} --lr-g 5e-4 --lr-d 5e-4"),
            Setting(
                "usual loss, R3GAN's Adam and average, 5e-4",
                "r3gan --epochs 50 --lr-g 5e-4 --lr-d 5e-4 --no-pairing --r1-weight 0 --r2-weight 0",
                fully_connected,
            ),
            Setting("R3GAN's loss, 5e-4", "r3gan --epochs 50 --lr-g 5e-4 --lr-d 5e-4", fully_connected),
        ),
        ("distance after 240 s", "recall after 240 s", "distance", "precision", "recall", "seconds"),
        axis="seconds",
    ),
    "stacked": Claim(
        "The paper's ablation: on 1,000 modes, pairs need R1 and R2, and then cover the most",
        (
            stacked("usual loss", "--no-pairing --r1-weight 0 --r2-weight 0"),
            stacked("usual loss, R1", "--no-pairing --r2-weight 0"),
            stacked("usual loss, R1, R2", "--no-pairing"),
            stacked("pairs", "--r1-weight 0 --r2-weight 0"),
            stacked("pairs, R1", "--r2-weight 0"),
            stacked("pairs, R1, R2"),
        ),
        ("modes", "kl", "d_loss", "diversity"),
        curve="modes",
    ),
    "recipe": Claim(
        "DCGAN's recipe is essential",
        (
            Setting("the recipe", DCGAN),
            edited_dcgan("no batch norm. in G", "Generator", without_batch_norm),
            edited_dcgan("no batch norm. in D", "Discriminator", without_batch_norm),
            edited_dcgan("pooling in D", "Discriminator", with_pooling),
            edited_dcgan("ReLU in D", "Discriminator", with_relu),
            Setting("beta1 0.9", DCGAN, beta1_of_0_9, ONE),
            Setting("PyTorch's weights", f"{DCGAN} --init pytorch", None, ONE),
        ),
    ),
    "published": Claim(
        "The published networks and rates are right for MNIST",
        (
            Setting("dcgan_mnist.py", DCGAN),
            Setting("dcgan_mnist.py, published", f"{DCGAN} --published"),
            Setting("dcgan_mnist.py, width 64", f"{DCGAN} --width 64", None, ONE),
            Setting("wgan_gp.py", "wgan_gp --epochs 5"),
            Setting("wgan_gp.py, published", "wgan_gp --epochs 5 --published", None, ONE),
            Setting("cgan.py", CGAN),
            Setting("cgan.py, published", f"{CGAN} --published", None, ONE),
        ),
        ("distance", "recall", "distance after 150 s", "seconds"),
        axis="seconds",
    ),
    "l1": Claim(
        "pix2pix: L1 alone is blurred, a GAN alone drifts from the answer, both together are sharp and close",
        (
            Setting("L1 and GAN", f"pix2pix --epochs 1 {BF16}"),
            Setting("L1 alone", f"pix2pix --epochs 1 --gan-weight 0 {BF16}"),
            Setting("GAN alone", f"pix2pix --epochs 1 --l1-weight 0 {BF16}"),
        ),
        ("error", "sharpness", "class_accuracy", "distance", "recall"),
        curve="sharpness",
    ),
    "cycle": Claim(
        "CycleGAN: cycle consistency keeps a picture's content",
        (
            Setting("cycle loss", f"cyclegan --epochs 1 {BF16}"),
            Setting("none", f"cyclegan --epochs 1 --cycle-weight 0 {BF16}"),
        ),
        ("class_accuracy", "a2b_error", "b2a_error", "recall"),
        curve="class_accuracy",
    ),
    "hidden": Claim(
        "CycleGAN: a translation hides what it takes to undo it",
        (Setting("mosaic", f"cyclegan --epochs 1 --task mosaic {BF16}"),),
        ("a2b_error", "b2a_error", "there and back", "without what was hidden", "with another's", "hidden"),
        curve="there and back",
    ),
}


# %% Training
@contextlib.contextmanager
def timed(script, folder):
    """Count the CPU seconds of the training steps, and write them beside each checkpoint."""
    path = folder / "seconds.json"
    seconds = json.loads(path.read_text()) if path.exists() else {}  # by epoch
    spent = max(seconds.values(), default=0.0)
    train_step, save = script.train_step, script.save

    def timed_step(*args, **kwargs):
        nonlocal spent
        start = time.process_time()
        metrics = train_step(*args, **kwargs)
        spent += time.process_time() - start
        return metrics

    def save_and_note(parts, history, *args):
        save(parts, history, *args)
        seconds[str(len(history))] = spent
        path.write_text(json.dumps(seconds))

    with mock.patch.multiple(script, train_step=timed_step, save=save_and_note):
        yield


def train(setting, seed):
    """Train by the script's own main, or go on, until the end; what was trained is not trained again."""
    folder, script = setting.folder(seed), setting.script
    done = folder.with_suffix(".done")
    if done.exists():
        return
    flags = [*setting.command.split()[1:], "--seed", str(seed), "--keep-every", "1", "--out-dir", str(folder)]
    if (folder / "checkpoint.pt").exists():
        flags = ["--resume", str(folder / "checkpoint.pt")]
    else:
        shutil.rmtree(folder, ignore_errors=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    log = folder.with_suffix(".log")
    with open(log, "a") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        with changed(setting), timed(script, folder):
            try:
                script.main([*flags, "--device", "cpu"])
            except SystemExit as end:
                if "not finite" not in log.read_text()[-500:]:  # which is a result, too
                    raise RuntimeError(f"{setting.name}: status {end.code}, see {log}") from end
    done.touch()


def changed(setting):
    """The setting's change, while a `with` lasts."""
    return setting.change(setting.script) if setting.change else contextlib.nullcontext()


# %% Measuring
def class_report(logits, labels=None):
    """What a classifier of ten classes says of images, from its logits (N, 10): see above."""
    confidence, classes = logits.double().softmax(1).max(1)
    shares = classes.bincount(minlength=10).double() / len(classes)
    report = {"classes": (shares >= 0.01).sum().item()}
    report["entropy"] = torch.special.entr(shares).sum().item() / math.log(10)
    report["confidence"] = confidence.mean().item()
    if labels is not None:
        report["class_accuracy"] = (classes == labels).double().mean().item()
    return report


class Judge(fid.Judge):
    """Measures samples as fid.py does, and counts their classes."""

    def report(self, images, labels=None):
        """The figures of images (N, C, H, W) in [0, 1] and, if there are, the classes they should have."""
        images = (images * 255).round().to(torch.uint8)
        samples = self.measure("samples", images)
        result = fid.compare(self.reference, samples, self.args)
        row = {"distance": result["frechet_distance"]}
        row |= {name: result[name] for name in ("precision", "recall")} | class_report(samples.logits, labels)
        fake, real = (self.network.prepare(x).var(0, correction=0).sum() for x in (images, self.real))
        return row | {"diversity": (fake / real).sqrt().item()}


@functools.cache
def judge(dataset, size):
    """The Judge of a data set, for images of this size."""
    return Judge(dataset, torch.zeros(4, 1, size, size, dtype=torch.uint8), "cpu", DATA)


def samples(setting, generator):
    """Images (N, C, H, W) in [0, 1] that a run's generator makes, and the classes that they should have."""
    script, args = setting.script, setting.args
    torch.manual_seed(0)
    if script.SCRIPT in ("pix2pix", "cyclegan"):
        inputs, labels = test_inputs(setting)
        network = generator["ab"] if script.SCRIPT == "cyclegan" else generator
        return script.sample(network, inputs[:SAMPLES] / 255), labels[:SAMPLES]
    z = getattr(script, "uniform", torch.randn)(SAMPLES, args.latent_dim)
    labels = torch.arange(SAMPLES) % 10 if script.SCRIPT == "cgan" else None
    return script.sample(generator, *([z] if labels is None else [z, labels])), labels


def test_inputs(setting):
    """A translator's test pictures A, as bytes, and the classes of the digits that they were made from."""
    script, args = setting.script, setting.args
    if script.SCRIPT == "pix2pix":
        a, _, names = script.load_pairs(args, train=False)
    else:
        pictures, names = script.load_domains(args, train=False)
        a, names = pictures["a"], names["a"]
    _, labels = fid.images_and_labels(args.dataset, DATA, train=False)
    return a, labels[[int(name) for name in names]]


def hidden(setting, generator):
    """What G_AB reads in the mosaics that G_BA makes of 1,000 test digits.

    A true mosaic has one grey level in each block, and what G_BA makes almost so. Made exactly so, by the
    means of its blocks, it loses what is `hidden`. G_AB also gets it with what another digit's had hidden.
    """
    script = setting.script
    pictures, _ = script.load_domains(setting.args, train=False)
    digits = pictures["b"][:1000] / 255
    mosaics = script.sample(generator["ba"], digits)
    plain = F.interpolate(F.adaptive_avg_pool2d(mosaics, 8), mosaics.shape[2:])
    others = (plain + (mosaics - plain).roll(1, 0)).clamp(0, 1)
    report = {"hidden": F.l1_loss(plain, mosaics).item()}
    for name, given in (
        ("there and back", mosaics),
        ("without what was hidden", plain),
        ("with another's", others),
    ):
        report[name] = F.l1_loss(script.sample(generator["ab"], given), digits).item()
    return report


def load(setting, seed, epoch):
    """The generator of a run after an epoch; of cyclegan.py both."""
    script, path = setting.script, setting.folder(seed) / f"generator_epoch_{epoch:04d}.pt"
    with changed(setting):
        if script.SCRIPT != "cyclegan":
            return script.load_generator(path)
        return {
            side: script.load_generator(path, direction=way) for side, way in (("ab", "a2b"), ("ba", "b2a"))
        }


def measure(setting, seed):
    """A row for each epoch that is measured, as a dictionary; of points in the plane, for each epoch."""
    folder = setting.folder(seed)
    if not (folder / "history.csv").exists():  # not finite in its first epoch
        return []
    with open(folder / "history.csv", newline="") as file:
        history = [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]
    path = folder / "seconds.json"
    seconds = json.loads(path.read_text()) if path.exists() else {}
    notes = folder / "measured.json"
    known = {row["epoch"]: row for row in json.loads(notes.read_text())} if notes.exists() else {}
    within = [[int(epoch) for epoch in seconds if seconds[epoch] <= limit] for limit in SECONDS]
    wanted = EPOCHS | {len(history)} | {max(epochs) for epochs in within if epochs}
    rows, counted = [], {}
    if (folder / "modes.csv").exists():
        lines = (folder / "modes.csv").read_text().splitlines()
        counted = {
            int(epoch): {"modes": int(modes), "kl": float(kl)}
            for epoch, modes, kl in (line.split(",") for line in lines)
        }
    for means in history:
        epoch = int(means["epoch"])
        row = {"setting": setting.name, "seed": seed, "epoch": epoch}
        row["seconds"] = seconds.get(str(epoch), math.nan)
        row |= {name: value for name, value in means.items() if name != "epoch"}
        if setting.script.SCRIPT == "gan_2d" or setting.args.dataset == "stacked":  # these measure themselves
            rows.append(row | counted.get(epoch, {}))
        elif epoch in wanted:
            if epoch not in known:
                generator = load(setting, seed, epoch)
                images, labels = samples(setting, generator)
                known[epoch] = {"epoch": epoch} | judge(setting.args.dataset, images.shape[-1]).report(
                    images, labels
                )
                if setting.script.SCRIPT == "cyclegan" and setting.args.task == "mosaic":
                    known[epoch] |= hidden(setting, generator)
                notes.write_text(json.dumps([*known.values()]))
            rows.append(row | known[epoch])
    return rows


def train_and_measure(name, number, seed):
    """What a worker does: a claim's setting, by its number, and a seed."""
    setting = CLAIMS[name].settings[number]
    torch.set_num_threads(1)
    train(setting, seed)
    with contextlib.redirect_stderr(open(os.devnull, "w")):
        return measure(setting, seed)


# %% Tables and plots
def spread(values):
    """The mean, and in brackets the least and the largest; of one value, it alone."""
    values = [value for value in values if value is not None and math.isfinite(value)]
    if not values:
        return "-"
    texts = [f"{value:#.3g}".rstrip(".") for value in (statistics.mean(values), min(values), max(values))]
    return texts[0] if len(values) == 1 else f"{texts[0]} ({texts[1]} to {texts[2]})"


def cell(column, runs):
    """What a table shows of the runs of a setting, lists of rows, in a column."""
    if column == "all modes":
        return f"{sum(run[-1]['modes'] == 8 for run in runs)} of {len(runs)}"
    if column.startswith("first "):
        return spread([run[0][column.removeprefix("first ")] for run in runs])
    if column.startswith("range of "):
        values = [row[column.removeprefix("range of ")] for run in runs for row in run]
        return f"{min(values):.3g} to {max(values):.3g}"
    if " after " in column:  # so many seconds: the last epoch that was measured by then
        name, time_limit = column.removesuffix(" s").split(" after ")
        within = [[row for row in run if row["seconds"] <= float(time_limit)] for run in runs]
        return spread([run[-1][name] for run in within if run])
    return spread([run[-1].get(column) for run in runs])


def runs_of(setting, rows):
    """The rows of a setting: a list for each seed."""
    mine = [row for row in rows if row["setting"] == setting.name]
    return [[row for row in mine if row["seed"] == seed] for seed in sorted({row["seed"] for row in mine})]


def table(claim, rows):
    """A claim's table in Markdown: of the seeds the mean, the least and the largest, at the runs' end."""
    lines = [
        f"| setting | seeds | epochs | {' | '.join(claim.columns)} |",
        "|" + " --- |" * (len(claim.columns) + 3),
    ]
    for setting in claim.settings:
        runs = runs_of(setting, rows)
        if runs:
            ends = sorted({run[-1]["epoch"] for run in runs})  # different, if some did not stay finite
            cells = [setting.label, str(len(runs)), " or ".join(map(str, ends))]
            lines.append(f"| {' | '.join(cells + [cell(column, runs) for column in claim.columns])} |")
    return "\n".join(lines)


def write_rows(path, rows):
    """A CSV of dictionaries that need not have all columns."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, names, lineterminator="\n")
        writer.writeheader()
        for row in rows:
            writer.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()})


def read_rows(path):
    """The rows of such a CSV; numbers are numbers again, and what is empty is not there."""

    def value(text):
        with contextlib.suppress(ValueError):
            return int(text)
        with contextlib.suppress(ValueError):
            return float(text)
        return text

    with path.open(newline="") as file:
        return [{name: value(text) for name, text in row.items() if text} for row in csv.DictReader(file)]


def plot(claim, rows, path):
    """The claim's curve, a line for each run and in the setting's colour; below, its samples."""
    count = len(claim.settings)
    figure = Figure(figsize=(max(8, 2.4 * min(count, 6)), 6.4 + 2.6 * (count > 6)), layout="constrained")
    figure.suptitle(claim.text, wrap=True)
    columns = min(count, 6)
    grid = figure.add_gridspec(
        1 + math.ceil(count / 6), columns, height_ratios=[1.2] + [1] * math.ceil(count / 6)
    )
    curves = figure.add_subplot(grid[0, :])
    for i, setting in enumerate(claim.settings):
        runs = runs_of(setting, rows)
        for run in runs:
            points = [(row[claim.axis], row[claim.curve]) for row in run if claim.curve in row]
            curves.plot(*zip(*points), ".-", color=f"C{i}", linewidth=1, alpha=0.4 if len(runs) > 3 else 1)
        below = figure.add_subplot(grid[1 + i // columns, i % columns])
        below.set_axis_off()
        below.set_title(setting.label, color=f"C{i}", fontsize="medium", wrap=True)
        pictures = sorted((setting.folder(setting.seeds[0]) / "samples").glob("epoch_????.png"))
        if pictures:
            below.imshow(Image.open(pictures[-1]))
    curves.set(xlabel={"seconds": "CPU seconds of training"}.get(claim.axis, claim.axis), ylabel=claim.curve)
    if claim.curve == "distance":
        curves.set_yscale("log")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


# %% Tables without a GAN
def copies():
    """What the distance says of a few training digits, repeated up to 10,000: as many of each class."""
    images, labels = fid.images_and_labels("mnist", DATA)
    for count, seed in itertools.product((10, 50, 200, 1000, 10_000), SEEDS):
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
        chosen = torch.cat([order[labels[order] == label][: count // 10] for label in range(10)])
        report = judge("mnist", 28).report(images[chosen].repeat(SAMPLES // count, 1, 1, 1) / 255)
        yield {"setting": f"{count} digits, repeated", "seed": seed} | report


def flaws():
    """What the distance says of real training digits with specks, or blurred."""
    images, _ = fid.images_and_labels("mnist", DATA)
    rng = torch.Generator().manual_seed(42)
    digits = images[torch.randperm(len(images), generator=rng)[:SAMPLES]] / 255
    yield {"setting": "none"} | judge("mnist", 28).report(digits)
    for share in 0.002, 0.005, 0.01, 0.02, 0.05:
        specks = torch.rand(digits.shape, generator=rng) < share
        yield {"setting": f"{share:.1%} of the pixels white"} | judge("mnist", 28).report(
            digits.masked_fill(specks, 1)
        )
    for std in 0.5, 0.75, 1.0, 1.5:
        blurred = gaussian_blur(digits, 9, std)
        yield {"setting": f"blurred, {std} pixels"} | judge("mnist", 28).report(blurred)


def halves(images, order=None):
    """Digits (N, 1, 28, 28) with ten black rows in the middle; with an `order` (N,), others' lower halves.

    No field of 10x10 pixels has rows above and below the black ones. So what it sees of a digit that was put
    together from two, it sees as often in true ones.
    """
    images = images.clone() if order is None else torch.cat([images[:, :, :14], images[order, :, 14:]], 2)
    images[:, :, 9:19] = -1
    return images


def blinded(network):
    """The network, whose third convolution sees one pixel."""
    blind(network.layers)
    return network


def seen():
    """How well discriminators tell digits from digits that were put together from two: see halves.

    Each is trained with cross-entropy for two epochs of MNIST, with 64 channels and the rate 2e-4, and tested
    on the test images and as many that were put together. 1/2 is guessing. Writes sight.png, too.
    """
    vanilla, dcgan = importlib.import_module("vanilla_gan"), importlib.import_module("dcgan_mnist")
    sets = [fid.images_and_labels("mnist", DATA, train=train)[0] / 127.5 - 1 for train in (True, False)]
    PICTURES.mkdir(parents=True, exist_ok=True)
    shown = sets[1][:10]
    both = torch.cat([halves(shown), halves(shown, torch.arange(10).roll(-1))])
    save_image(F.interpolate((both + 1) / 2, scale_factor=3), PICTURES / "sight.png", nrow=10, pad_value=0.4)
    networks = {
        "fully connected": vanilla.Discriminator,
        "two convolutions": lambda: dcgan.Discriminator(64, 2),
        "two, and one of 1x1": lambda: blinded(dcgan.Discriminator(64, 3)),
        "three convolutions": lambda: dcgan.Discriminator(64, 3),
    }
    for (name, make), seed in itertools.product(networks.items(), SEEDS):
        torch.manual_seed(seed)
        network = make().apply(dcgan.init_weights)
        optimizer = torch.optim.Adam(network.parameters(), 2e-4, betas=(0.5, 0.999))
        for index in itertools.chain(*[torch.randperm(len(sets[0])).split(128) for _ in range(2)]):
            digits = sets[0][index]
            # Normalised together, as in eval mode.
            logits = network(torch.cat([halves(digits), halves(digits, torch.randperm(len(digits)))]))
            loss = vanilla.discriminator_loss(*logits.chunk(2))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        network.eval()
        with torch.no_grad():
            true, put_together = (
                torch.cat([network(chunk) for chunk in halves(sets[1], order).split(500)])
                for order in (None, torch.randperm(len(sets[1])))
            )
        accuracy = ((true > 0).float().mean() + (put_together <= 0).float().mean()) / 2
        loss = vanilla.discriminator_loss(true, put_together)
        yield {"setting": name, "seed": seed, "accuracy": accuracy.item(), "loss": loss.item()}


EXTRAS = {"copies": copies, "flaws": flaws, "seen": seen}


# %% Main
def plain_table(rows):
    """A table of rows: of the seeds the mean, the least and the largest."""
    columns = [name for name in rows[0] if name not in ("setting", "seed")]
    lines = [f"| setting | {' | '.join(columns)} |", "|" + " --- |" * (len(columns) + 1)]
    for setting in dict.fromkeys(row["setting"] for row in rows):
        mine = [row for row in rows if row["setting"] == setting]
        lines.append(f"| {setting} | {' | '.join(spread([row[name] for row in mine]) for name in columns)} |")
    return "\n".join(lines)


def main(argv=None):
    parser = argparse.ArgumentParser("claims.py", description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("names", nargs="*", metavar="NAME", help="claims to test, or tables without a GAN; see --list")
    add("--list", action="store_true", help="list the claims, and the command of each setting")
    add("--table", action="store_true", help="no training: print the tables of what was measured before")
    add("--jobs", type=int, default=os.cpu_count(), help="runs side by side, of one thread each")
    args = parser.parse_args(argv)
    if args.list:
        for name, claim in CLAIMS.items():
            print(f"{name}: {claim.text}")
            for setting in claim.settings:
                print(f"    {setting.label}: python {setting.name}, {len(setting.seeds)} seeds")
        print("\n".join(f"{name}: {function.__doc__.splitlines()[0]}" for name, function in EXTRAS.items()))
        return
    unknown = {*args.names} - {*CLAIMS, *EXTRAS}
    if unknown or not args.names:
        parser.error(f"{', '.join(unknown) or 'no claim'}: give some of {', '.join([*CLAIMS, *EXTRAS])}")
    for name in args.names:
        if args.table:
            rows = read_rows(RESULTS / f"{name}.csv")
        elif name in EXTRAS:
            rows = [*tqdm(EXTRAS[name](), name)]
        else:
            rows = run_all(name, args.jobs)
            plot(CLAIMS[name], rows, PICTURES / f"claim_{name}.png")
        if not args.table:
            write_rows(RESULTS / f"{name}.csv", rows)
        print(f"{name}: {CLAIMS[name].text}\n" if name in CLAIMS else f"{name}\n")
        print(table(CLAIMS[name], rows) if name in CLAIMS else plain_table(rows), end="\n\n", flush=True)


def run_all(name, workers):
    """The rows of all runs of a claim, trained and measured side by side."""
    settings = CLAIMS[name].settings
    jobs = sorted((seed, number) for number, setting in enumerate(settings) for seed in setting.seeds)
    names = {"mnist" if setting.args.dataset == "stacked" else setting.args.dataset for setting in settings}
    for dataset in names & {*fid.TEN_CLASSES}:
        fid.load_classifier(dataset, DATA, "cpu")  # before many ask for it at once
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        futures = [pool.submit(train_and_measure, name, number, seed) for seed, number in jobs]
        measured = dict(zip(jobs, [future.result() for future in tqdm(futures, unit=" runs")]))
    return [row for job in sorted(jobs, key=lambda job: job[::-1]) for row in measured[job]]


if __name__ == "__main__":
    main()
