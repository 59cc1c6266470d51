"""What tutorials say about GANs, put to the test.

This program rests. It drives the scripts of commit 57c1a3a: `git checkout 57c1a3a` to run it (there it is at
the top level). Here --list and --table work; a later change rewrites it for today's scripts.

    python evidence/claims.py --list                # the claims, and the settings of each
    python evidence/claims.py minimax critic-norm   # train, measure, write the tables and the plots
    python evidence/claims.py minimax --quick       # one seed, few steps, few samples: to see how it works
    python evidence/claims.py minimax --table       # the table of figures that were measured before
    python evidence/claims.py --extra sight         # what discriminators see; --help names other tables

A claim is tested by settings: a script, its flags and, where a user would hardly want a flag, a change that
is made from outside. Each setting is trained with the seeds 42, 43 and 44 (the longest with 42 alone) by the
script's own main, which stops at certain steps. There 10,000 samples are made as its --generate makes them,
and measured as fid.py --features classifier does, against the test set (made 64x64 for dcgan64_celeba.py):

    distance        Frechet distance on the classifier's features; 0 is best, and it is no FID
    classes         how many of the ten have 1% of the samples or more
    entropy         of the classes' shares; 1 if all are equal
    confidence      the classifier's mean probability of the likeliest class
    class_accuracy  for cgan.py, the share of samples of which the likeliest class is the one asked for; for
                    pix2pix.py and cyclegan.py, of test images that keep their class when they are translated
    diversity       root mean square distance of two samples, over that of two test images

results/NAME.csv has these for each setting, seed and step, and the means over the 100 steps before of what
the script reports; of pix2pix.py and cyclegan.py also what they measure on 1,000 test images, of stylegan.py
also what the functions entanglement, influence, exchanged, moved, under_noise and voices find. A run of
gan_2d.py takes seconds and measures itself, but for what own_figures adds; it has ten seeds and no
classifier. Seconds are those of training alone, on the CPU those of its one core. The plot
pictures/claim_NAME.png shows the distance, or what else the claim is about, over the training, and samples of
the first seed. A line is a run; where there are ten, it is their median, with half of them in the band around
it. If NAME is that of a script, claim_NAME_losses.png is the plot of losses that the script made. While
runs/claims is there, what was measured is not trained again, and what was stopped goes on. On the CPU a run
has one thread, and as many run side by side as there are cores: that is faster than one after the other, and
the figures do not depend on the number of cores.
"""

import argparse
import contextlib
import copy
import csv
import importlib
import io
import itertools
import json
import math
import multiprocessing
import os
import re
import shutil
import signal
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator
from PIL import Image
from torch import accelerator, nn
from torchvision import datasets
from torchvision.transforms.functional import to_pil_image
from torchvision.utils import make_grid
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # where fid.py and the scripts are

import fid

HERE = Path(__file__).resolve().parent
SEEDS = 42, 43, 44
SAMPLES = 10_000
RUNS, TABLES, PLOTS = Path("runs/claims"), HERE / "results", HERE / "pictures"
QUICK = Path("runs/quick")
STOPPED = 128 + signal.SIGINT, 128 + signal.SIGTERM  # exit statuses of a script that was told to stop

# %% Changes from outside


def pytorch_init(script):
    """Leave the weights as PyTorch initialises them."""
    return mock.patch.object(script, "init_weights", return_value=None)


def batch_norm_in_critic(script):
    """Batch normalisation in the critic of wgan_gp.py, where dcgan_mnist.py has it."""

    class Critic(script.Critic):
        def __init__(self, *form):
            super().__init__(*form)
            for i in range(len(self.layers) - 1, 0, -1):  # backwards, since each moves those behind it
                if isinstance(self.layers[i], nn.Conv2d):
                    self.layers.insert(i + 1, nn.BatchNorm2d(self.layers[i].out_channels))

    return mock.patch.object(script, "Critic", Critic)


def see_no_more(network):
    """Make the third convolution of a discriminator or critic one of 1x1 pixels, and return the network."""
    third = network.layers[5]
    network.layers[5] = nn.Conv2d(third.in_channels, third.out_channels, 1, bias=False)
    network.layers[-1] = nn.Linear(third.out_channels * 7 * 7, 1)
    return network


def third_of_1x1(script):
    """A discriminator of dcgan_mnist.py that is as deep, and sees as little as with two convolutions."""

    class Discriminator(script.Discriminator):
        def __init__(self, *form):
            super().__init__(*form)
            see_no_more(self)

    return mock.patch.object(script, "Discriminator", Discriminator)


def generator_of_cyclegan(script):
    """cyclegan.py's generator in pix2pix.py."""
    cyclegan = importlib.import_module("cyclegan")
    return mock.patch.object(script, "build", lambda args: cyclegan.Generator(*args.channels))


def frozen_mapping(script):
    """A mapping of stylegan.py that stays as it was drawn."""
    original = script.build

    def build(args):
        generator = original(args)
        generator.mapping.requires_grad_(False)
        return generator

    return mock.patch.object(script, "build", build)


LAST = 14_040  # the discriminator's last step, for the claim about collapse: 30 epochs of vanilla_gan.py


def stopped_discriminator(script):
    """The discriminator learns nothing after the step LAST, and the generator goes on."""
    original = script.train_step

    def train_step(generator, discriminator, optimizer_g, optimizer_d, *rest):
        state = optimizer_d.state.get(next(discriminator.parameters()), {"step": 0})
        for group in optimizer_d.param_groups if state["step"] >= LAST else ():
            group["lr"] = 0.0
        return original(generator, discriminator, optimizer_g, optimizer_d, *rest)

    return mock.patch.object(script, "train_step", train_step)


# %% Settings and claims


@dataclass(frozen=True)
class Setting:
    """What is trained, and the steps after which it is measured."""

    label: str
    script: str
    points: tuple[int, ...]
    flags: str = ""
    change: Callable | None = None

    def until(self, step, label=None):
        """The first part of the same run."""
        points = tuple(point for point in self.points if point <= step)
        return replace(self, points=points, label=label or self.label)

    @property
    def args(self):
        """The settings of the script's command line, as its parse_args returns them."""
        return importlib.import_module(self.script).parse_args(self.flags.split())

    @property
    def command(self):
        """What a user would type, and in brackets what is changed from outside."""
        change = f" ({self.change.__name__})" if self.change else ""
        return f"python {self.script}.py {self.flags}".strip() + change

    def folder(self, home, seed):
        """Where its run is; settings that differ in label and points alone share it."""
        name = re.sub(r"[^a-z0-9.]+", "-", self.command.removeprefix("python ").lower()).strip("-")
        return home / name / f"seed-{seed}"


@dataclass(frozen=True)
class Claim:
    """A sentence that the settings decide, what its table shows beside the distance, and its plot's axes."""

    text: str
    settings: tuple[Setting, ...]
    columns: tuple[str, ...] = ("classes", "entropy", "confidence")
    axis: str = "step"
    curve: str = "distance"
    seeds: tuple[int, ...] = SEEDS


def epochs(steps, *numbers):
    """The steps at which these epochs end."""
    return tuple(steps * number for number in numbers)


BF16 = "--precision bf16"
VANILLA = Setting("50 epochs", "vanilla_gan", epochs(468, 1, 2, 3, 4, 5, 10, 20, 30, 40, 50), BF16)
DCGAN = Setting("25 epochs", "dcgan_mnist", epochs(468, *range(1, 11), 15, 20, 25), BF16)
WGAN_GP = Setting("25 epochs", "wgan_gp", epochs(187, *range(1, 11), 15, 20, 25), BF16)
CGAN = Setting("25 epochs", "cgan", epochs(937, *range(1, 11), 15, 20, 25), BF16)
GARMENTS = replace(CGAN, flags=f"--dataset fashion_mnist {BF16}")
STEPS = 200, 500, *range(1000, 4001, 1000), *range(6000, 20001, 2000)
SN = Setting("20,000 steps", "dcgan32_wgan_sn", STEPS, BF16)
FASHION = f"--dataset fashion_mnist --epochs 9 {BF16}"
STYLE = Setting("5 epochs", "stylegan", epochs(1875, 1, 2, 3, 4, 5), BF16)
DCGAN64 = Setting("9 epochs", "dcgan64_celeba", epochs(468, *range(1, 10)), FASHION)


def other(setting, label, flags, step=None, change=None):
    """A setting that differs from another in its flags or by a change."""
    shorter = setting.until(step or setting.points[-1], label)
    return replace(shorter, flags=f"{flags} {BF16}".strip(), change=change)


def often(setting, every):
    """A setting that is measured ten times, at even distances. (--epochs 25 gives it a folder of its own.)"""
    return replace(setting, points=tuple(range(every, 10 * every + 1, every)))


def rates(lr_g, lr_d, flags=""):
    """dcgan32_wgan_sn.py with other learning rates."""
    return other(SN, f"G {lr_g}, C {lr_d}", f"{flags} --lr-g {lr_g} --lr-d {lr_d}".strip())


def wide(label, flags, *steps):
    """dcgan_mnist.py of another size; the steps are about those of 2, 4, 8, 15 and 30 minutes."""
    return Setting(label, "dcgan_mnist", steps, f"{flags} {BF16}")


def points(label, flags):
    """gan_2d.py with other flags."""
    return replace(RING, label=label, flags=flags)


def styled(label, flags="", change=None):
    """Three epochs of stylegan.py with half the channels."""
    return Setting(label, "stylegan", STYLE.points[:3], f"--width 16 {flags}".strip() + f" {BF16}", change)


PLAIN = "--critic-norm none"
SN_PLAIN = other(SN, "G 3e-4, C 6e-4", PLAIN)
SN_MNIST = replace(
    other(SN, "spectral (dcgan32_wgan_sn.py)", "--dataset mnist"),
    points=tuple(range(700, 4901, 700)),
)
ONE_STEP = replace(
    other(WGAN_GP, "one step of the critic", "--n-critic 1"), points=epochs(649, 1, 2, 3, 4, 5)
)
NORMED = other(WGAN_GP, "batch normalisation in the critic", "", 935, batch_norm_in_critic)
AHEAD = "--lr-d 2e-3 --lr-g 2e-5"
PUBLISHED = "--lr-g 2e-4 --lr-d 2e-4"
FIFTY = "--lr-d 1e-2 --lr-g 2e-4"
P2P = Setting("L1 and GAN", "pix2pix", (625, 1250, 1875), f"--epochs 1 {BF16}")
TRANSLATED = "error", "evidence", "sharpness", "class_accuracy", "precision", "recall"
UNTRAINED = replace(styled("untrained", "--lr-g 1e-30 --lr-d 1e-30"), points=(1,))
PSI = 1.0, 0.9, 0.8, 0.7, 0.5, 0.3
STYLED = "class", "shape", "inside", "grain"  # what influence compares, of digits and garments
UNPAIRED = "--norm instance --no-condition --batch-size 16 --epochs 1"  # as cyclegan.py has it
CYCLE = Setting("cycle 10", "cyclegan", (938, 1875), f"--epochs 1 {BF16}")
RING = Setting("non-saturating", "gan_2d", epochs(40, 1, 2, 3, 4, *range(5, 61, 5)))
TEN = tuple(range(42, 52))
GAMES = "modes", "all heaps", "poorest", "lost", "near", "js"
AFTER = tuple(LAST + steps for steps in (0, 10, 20, 50, 100, 200, 500, 1000))
AHEAD_2D = "--lr-d 1e-2"
SLOW_G = f"{AHEAD_2D} --lr-g 1e-4"
LOW = "--lr-g 2e-4 --lr-d 4e-4"
FIVE = "--d-steps 5 --points 51200"  # as many steps of G in an epoch as with one step of D
WASSERSTEIN = f"--loss wasserstein-gp {FIVE}"
LOSSES = {
    "non-saturating": "",
    "non-saturating, low rates": LOW,
    "least-squares": "--loss least-squares",
    "five steps of D": FIVE,
    "wasserstein-gp": WASSERSTEIN,
    "wasserstein-gp, low rates": f"{WASSERSTEIN} {LOW}",
    "non-saturating, penalty": "--penalty-weight 1",
    "relativistic": "--loss relativistic",
    "relativistic, no penalty": "--loss relativistic --penalty-weight 0",
}
CLAIMS = {
    "vanilla_gan": Claim(
        "vanilla_gan.py, the run of full length",
        (VANILLA,),
        ("precision", "recall", "classes", "entropy", "confidence"),
    ),
    "dcgan_mnist": Claim(
        "dcgan_mnist.py, the run of full length",
        (DCGAN,),
        ("precision", "recall", "classes", "entropy", "confidence"),
        seeds=SEEDS[:1],
    ),
    "wgan_gp": Claim(
        "wgan_gp.py, the run of full length",
        (WGAN_GP,),
        ("precision", "recall", "classes", "entropy", "confidence"),
        seeds=SEEDS[:1],
    ),
    "cgan": Claim(
        "cgan.py, the run of full length",
        (CGAN,),
        ("precision", "recall", "classes", "confidence", "class_accuracy"),
        seeds=SEEDS[:1],
    ),
    "garments": Claim(
        "cgan.py draws the garment that is asked for",
        (GARMENTS,),
        ("precision", "recall", "classes", "confidence", "class_accuracy"),
        seeds=SEEDS[:1],
    ),
    "dcgan32_wgan_sn": Claim(
        "dcgan32_wgan_sn.py, the run of full length",
        (SN,),
        ("precision", "recall", "classes", "entropy", "confidence"),
        seeds=SEEDS[:1],
    ),
    "dcgan64_celeba": Claim("dcgan64_celeba.py, nine epochs of Fashion-MNIST", (DCGAN64,), seeds=SEEDS[:1]),
    "minimax": Claim(
        "The minimax loss trains worse than the non-saturating one",
        (
            VANILLA.until(2340, "non-saturating"),
            other(VANILLA, "minimax", "--generator-loss minimax", 2340),
            other(VANILLA, "non-saturating, D ahead", AHEAD, 2340),
            other(VANILLA, "minimax, D ahead", f"{AHEAD} --generator-loss minimax", 2340),
        ),
        ("classes", "confidence", "diversity", "d_fake"),
    ),
    "init": Claim(
        "DCGAN needs weights from N(0, 0.02)",
        (
            DCGAN.until(2340, "N(0, 0.02)"),
            other(DCGAN, "as PyTorch initialises", "", 2340, pytorch_init),
        ),
        ("precision", "recall", "classes", "confidence", "diversity"),
    ),
    "label-smoothing": Claim(
        "DCGAN is better with D's target for real images at 0.9",
        (
            other(DCGAN, "1.0", "--real-label 1.0", 2340),
            DCGAN.until(2340, "0.9"),
            other(DCGAN, "0.8", "--real-label 0.8", 2340),
        ),
        ("precision", "recall", "classes", "confidence", "d_real", "d_fake"),
    ),
    "instance-noise": Claim(
        "DCGAN is better with noise on what D sees",
        (
            DCGAN.until(2340, "none"),
            other(DCGAN, "0.1, falling to 0", "--epochs 5 --instance-noise 0.1", 2340),
            other(DCGAN, "0.3, falling to 0", "--epochs 5 --instance-noise 0.3", 2340),
        ),
        ("precision", "recall", "classes", "confidence", "d_real", "d_fake"),
    ),
    "healthy": Claim(
        "A healthy DCGAN has a D loss of 0.5 to 1.5, D(real) of 0.7 to 0.9, and D(fake) rises to 0.3 or more",
        (DCGAN.until(4680, "10 epochs"),),
        ("range of d_loss", "range of d_real", "range of d_fake"),
        curve="d_fake",
    ),
    "ahead": Claim(
        "When DCGAN's discriminator has fifty times G's rate, the published remedies help",
        (
            other(DCGAN, "D ahead", FIFTY, 936),
            other(DCGAN, "target 0.8", f"{FIFTY} --real-label 0.8", 936),
            other(DCGAN, "instance noise 0.1", f"{FIFTY} --instance-noise 0.1", 936),
            other(DCGAN, "higher rate of G", "--lr-d 1e-2 --lr-g 2e-3", 936),
            other(DCGAN, "lower rate of D", PUBLISHED, 936),
            Setting("wgan_gp.py, critic ahead", "wgan_gp", (468, 936), f"{FIFTY} {BF16}"),
        ),
        ("precision", "recall", "classes", "confidence", "diversity"),
    ),
    "sight": Claim(
        "DCGAN is better with a discriminator that can see a digit",
        (
            DCGAN.until(4680, "three convolutions"),
            other(DCGAN, "two, and one of 1x1", "", 4680, third_of_1x1),
            other(DCGAN, "two convolutions", "--shallow --width 16 --lr-g 2e-3 --lr-d 2e-3", 4680),
        ),
        ("precision", "recall", "classes", "entropy", "confidence"),
        "seconds",
    ),
    "width": Claim(
        "DCGAN's published widths are right for MNIST, at equal time",
        (
            wide("64, two convolutions", "--shallow --epochs 25", 173, 345, 690, 1295, 2590),
            wide("32, two convolutions", "--shallow --width 32 --epochs 75", 484, 968, 1935, 3630, 7260),
            wide("64, three convolutions", f"--width 64 {PUBLISHED} --epochs 25", 134, 267, 534, 1002, 2004),
            wide("32, three convolutions", f"--width 32 {PUBLISHED} --epochs 75", 457, 913, 1826, 3425, 6850),
            wide(
                "16, three convolutions",
                f"--width 16 {PUBLISHED} --epochs 150",
                1188,
                2376,
                4752,
                8910,
                17820,
            ),
        ),
        tuple(f"{name} after {minutes} min" for name in ("distance", "recall") for minutes in (4, 15, 30)),
        "seconds",
        seeds=SEEDS[:1],
    ),
    "rate": Claim(
        "DCGAN's learning rate of 2e-4 is right",
        (
            other(DCGAN, "2e-4", PUBLISHED, 2340),
            other(DCGAN, "5e-4", "--lr-g 5e-4 --lr-d 5e-4", 2340),
            other(DCGAN, "1e-3", "--lr-g 1e-3 --lr-d 1e-3", 2340),
            DCGAN.until(2340, "2e-3"),
        ),
        ("precision", "recall", "classes", "confidence", "diversity"),
    ),
    "collapse": Claim(
        "A collapse shows as a sudden rise of the distance",
        (
            replace(other(VANILLA, "D stops", "--epochs 33", change=stopped_discriminator), points=AFTER),
            replace(other(VANILLA, "D goes on", "--epochs 33"), points=AFTER),
        ),
        ("distance doubled", "recall halved", "precision halved", "diversity halved", "diversity", "classes"),
    ),
    "estimate": Claim(
        "The Wasserstein estimate of WGAN-GP tracks the quality of the samples",
        (WGAN_GP.until(1870, "five steps of the critic"), ONE_STEP, NORMED),
        ("wasserstein", "rank correlation", "rank correlation of changes"),
        "wasserstein",
    ),
    "n-critic": Claim(
        "WGAN-GP needs five steps of the critic for one of the generator, at equal time",
        (WGAN_GP.until(935, "five steps of the critic"), ONE_STEP),
        ("precision", "recall", "classes", "confidence", "wasserstein"),
        "seconds",
    ),
    "critic-norm": Claim(
        "Batch normalisation in the critic hurts WGAN-GP",
        (WGAN_GP.until(935, "none"), NORMED),
        ("precision", "recall", "classes", "confidence", "wasserstein", "gradient_norm"),
    ),
    "control": Claim(
        "Conditioning gives control over the class",
        (CGAN.until(9370, "convolutions"), other(CGAN, "--mlp", "--mlp", 9370)),
        ("precision", "recall", "class_accuracy", "confidence", "diversity"),
        curve="class_accuracy",
    ),
    "labels": Claim(
        "Told the class, the same networks make better samples",
        (
            CGAN.until(9370, "told the class (cgan.py)"),
            replace(
                other(DCGAN, "not told (dcgan_mnist.py)", "--batch-size 64 --lr-g 1e-3 --lr-d 1e-3"),
                points=CGAN.until(9370).points,
            ),
            DCGAN.until(4680, "not told, its own batches and rates"),
        ),
        ("precision", "recall", "classes", "entropy", "confidence"),
        "images",
    ),
    "lr-collapse": Claim(
        "dcgan32: with lr_g >= lr_d the generator collapses to one output",
        (
            SN.until(4000, "G 3e-4, C 6e-4"),
            rates("6e-4", "6e-4").until(4000),
            rates("6e-4", "3e-4").until(4000),
        ),
        ("classes", "confidence", "diversity"),
    ),
    "lr-collapse-plain": Claim(
        "dcgan32 without batch normalisation in C: with lr_g >= lr_d the generator collapses to one output",
        (
            rates("3e-5", "6e-5", PLAIN).until(4000),
            rates("3e-5", "3e-5", PLAIN).until(4000),
            rates("6e-5", "6e-5", PLAIN).until(4000),
            rates("6e-5", "3e-5", PLAIN).until(4000),
            SN_PLAIN.until(4000),
            rates("6e-4", "3e-4", PLAIN).until(4000),
        ),
        ("classes", "confidence", "diversity"),
    ),
    "low-rates": Claim(
        "dcgan32 needs learning rates as low as 3e-5 for G and 6e-5 for C, and no batch normalisation in C",
        (rates("3e-5", "6e-5", PLAIN), SN_PLAIN, replace(SN, label="G 3e-4, C 6e-4, batch normalisation")),
        ("classes", "confidence", "diversity", "largest rise"),
        seeds=SEEDS[:1],
    ),
    "stages": Claim(
        "dcgan32: noise at 200 steps, blurs at 4,000, garments at 8,000, good ones at 20,000",
        tuple(SN.until(step, f"{step:,}") for step in (200, 4000, 8000, 20000)),
        ("classes", "confidence", "diversity"),
    ),
    "spectral-norm": Claim(
        "The Wasserstein loss needs spectral normalisation, and no batch normalisation in the critic",
        (
            SN_PLAIN.until(4000, "spectral"),
            other(SN, "neither", f"--no-spectral-norm {PLAIN}", 4000),
            SN.until(4000, "spectral and batch"),
            other(SN, "batch", "--no-spectral-norm", 4000),
        ),
        ("classes", "confidence", "diversity"),
    ),
    "batch-size": Claim(
        "dcgan32: batches of 32 are better than batches of 128, at as many images seen",
        (
            SN.until(4000, "32"),
            replace(other(SN, "128", "--batch-size 128"), points=(50, 125, 250, 500, 750, 1000)),
        ),
        axis="images",
    ),
    "stability": Claim(
        "The Wasserstein loss trains more stably than binary cross-entropy, at equal time",
        (
            other(often(DCGAN, 1170), "cross-entropy (dcgan_mnist.py)", "--epochs 25"),
            other(often(WGAN_GP, 467), "penalty (wgan_gp.py)", "--epochs 25"),
            SN_MNIST,
            other(SN_MNIST, "spectral, low rates", f"--dataset mnist {PLAIN} --lr-g 3e-5 --lr-d 6e-5"),
        ),
        ("spread over seeds", "spread over the last five", "largest rise"),
        "seconds",
    ),
    "l1": Claim(
        "pix2pix: L1 alone is blurred, a GAN alone drifts from the answer, both together are sharp and close",
        (
            replace(P2P, label="mosaic, L1 and GAN"),
            other(P2P, "mosaic, L1 alone", "--gan-weight 0 --epochs 1"),
            other(P2P, "mosaic, GAN alone", "--l1-weight 0 --epochs 1"),
            other(P2P, "half, L1 and GAN", "--task half --epochs 1"),
            other(P2P, "half, L1 alone", "--task half --gan-weight 0 --epochs 1"),
            other(P2P, "half, GAN alone", "--task half --l1-weight 0 --epochs 1"),
        ),
        TRANSLATED,
        curve="sharpness",
    ),
    "skips": Claim(
        "pix2pix: the connections that make the generator a U-Net matter",
        (
            other(P2P, "outline, U-Net", "--task outline --epochs 1"),
            other(P2P, "outline, without skips", "--task outline --no-skips --epochs 1"),
            replace(P2P, label="mosaic, U-Net"),
            other(P2P, "mosaic, without skips", "--no-skips --epochs 1"),
        ),
        TRANSLATED,
        curve="error",
    ),
    "patch": Claim(
        "pix2pix: a discriminator of patches is better than one of pixels or of the whole image",
        (
            other(P2P, "1 pixel", "--patch-layers 0 --epochs 1"),
            replace(P2P, label="16 pixels"),
            other(P2P, "34 pixels", "--patch-layers 2 --epochs 1"),
            other(P2P, "70 pixels, all", "--patch-layers 3 --epochs 1"),
        ),
        TRANSLATED,
    ),
    "condition": Claim(
        "pix2pix: the discriminator must see the question",
        (
            replace(P2P, label="L1, sees it"),
            other(P2P, "L1, does not", "--no-condition --epochs 1"),
            other(P2P, "no L1, sees it", "--l1-weight 0 --epochs 1"),
            other(P2P, "no L1, does not", "--no-condition --l1-weight 0 --epochs 1"),
        ),
        ("classes", *TRANSLATED),
        curve="error",
    ),
    "cycle": Claim(
        "CycleGAN: cycle consistency keeps a picture's content",
        (
            other(CYCLE, "cycle 0", "--cycle-weight 0 --epochs 1"),
            other(CYCLE, "cycle 1", "--cycle-weight 1 --epochs 1"),
            CYCLE,
        ),
        ("class_accuracy", "a2b_error", "b2a_error", "a2b2a_error", "evidence", "recall"),
        curve="class_accuracy",
    ),
    "pairs": Claim(
        "Outlines to digits: with pairs the translation is closer to the truth, in less time",
        (
            other(P2P, "pairs (pix2pix.py)", "--task outline --epochs 1"),
            replace(
                other(P2P, "pairs, networks of cyclegan.py", f"--task outline {UNPAIRED}"),
                points=(1875, 3750),
                change=generator_of_cyclegan,
            ),
            replace(CYCLE, label="no pairs (cyclegan.py)"),
        ),
        TRANSLATED,
        "seconds",
    ),
    "stylegan": Claim(
        "stylegan.py, the run of full length",
        (STYLE,),
        ("precision", "recall", "z_share", "moved", "straight_z", "straight_w", "skill_z", "skill_w"),
        seeds=SEEDS[:1],
    ),
    "style-w": Claim(
        "StyleGAN: W is less entangled than Z, because the mapping has learned it",
        (
            styled("8 layers"),
            styled("8 layers, as they were drawn", change=frozen_mapping),
            styled("no mapping", "--mapping-layers 0"),
        ),
        ("precision", "recall", "moved", "bent", "straight_z", "straight_w", "skill_z", "skill_w"),
    ),
    "style-coarse-fine": Claim(
        "StyleGAN: styles of low resolution decide the shape, those of high resolution the surface",
        (styled("digits"), styled("garments", "--dataset fashion_mnist"), UNTRAINED),
        ("chance_class", *(f"{name}_{side}" for name in STYLED for side in (4, 8, 16))),
    ),
    "r1": Claim(
        "StyleGAN needs R1, and a gamma near 10",
        (
            *(styled(weight, f"--r1-weight {weight}").until(3750) for weight in ("0", "0.1", "1")),
            styled("10").until(3750),
            styled("100", "--r1-weight 100").until(3750),
        ),
        ("classes", "precision", "recall", "diversity", "training diversity", "d_fake"),
    ),
    "style-mixing": Claim(
        "StyleGAN: images of two styles in training make styles exchangeable",
        (styled("mixing 0.9"), styled("no mixing", "--mixing 0")),
        (
            "recall",
            "mixed from own",
            "own from own",
            "distance of mixed",
            "confidence",
            "confidence of mixed",
        ),
    ),
    "style-noise": Claim(
        "StyleGAN: noise makes details, not content",
        (
            styled("digits"),
            styled("digits, no noise", "--no-noise"),
            styled("garments", "--dataset fashion_mnist"),
            styled("garments, no noise", "--dataset fashion_mnist --no-noise"),
        ),
        (
            *("fixed", "fresh", "silent", "noise_pixels"),
            *(f"{what}_{name}" for name in ("class", "coarse") for what in ("noise", "step", "speckle")),
        ),
    ),
    "hidden": Claim(
        "CycleGAN: a translation hides what it takes to undo it",
        (other(CYCLE, "mosaic", "--task mosaic --epochs 1"),),
        ("a2b_error", "b2a2b_error", "b2a2b_plain", "b2a2b_swapped", "removed", "b2a_error"),
        curve="b2a2b_plain",
    ),
    "plane-minimax": Claim(
        "In the plane: minimax's gradient vanishes when D is ahead, and G learns nothing",
        (
            RING,
            points("minimax", "--loss minimax"),
            points("non-saturating, D fast", AHEAD_2D),
            points("minimax, D fast", f"--loss minimax {AHEAD_2D}"),
            points("non-saturating, G slow too", SLOW_G),
            points("minimax, G slow too", f"--loss minimax {SLOW_G}"),
        ),
        ("first d_fake", "first gradient", "gradient", "modes", "all heaps", "near", "js"),
        curve="gradient",
        seeds=TEN,
    ),
    "plane-faster-d": Claim(
        "In the plane: the faster D learns, the fewer heaps are lost",
        (
            points("D at a fourth", "--lr-d 5e-4"),
            replace(RING, label="the default"),
            points("D four times as fast", "--lr-d 8e-3"),
            points("G at a fourth", "--lr-g 2.5e-4"),
            points("five steps of D", FIVE),
            replace(points("one step, as many points", "--points 51200 --epochs 12"), points=RING.points[4:]),
        ),
        GAMES,
        curve="modes",
        seeds=TEN,
    ),
    "plane-ring": Claim(
        "In the plane: Wasserstein with penalty, and relativistic, reach all eight heaps more often",
        tuple(points(label, flags) for label, flags in LOSSES.items()),
        GAMES,
        curve="modes",
        seeds=TEN,
    ),
    "plane-grid": Claim(
        "In the plane: Wasserstein with penalty, and relativistic, reach more of 25 heaps",
        tuple(
            points(label, f"--dataset grid {flags}".strip())
            for label, flags in LOSSES.items()
            if label != "least-squares"
        ),
        GAMES,
        curve="modes",
        seeds=TEN,
    ),
    "plane-momentum": Claim(
        "In the plane: with more momentum the fakes keep moving, and heaps are lost",
        (
            points("beta1 0", "--beta1 0"),
            replace(RING, label="beta1 0.5"),
            points("beta1 0.9", "--beta1 0.9"),
            points("beta1 0.9, low rates", f"--beta1 0.9 {LOW}"),
            points("beta1 0.5, low rates", LOW),
        ),
        ("moved", *GAMES),
        curve="moved",
        seeds=TEN,
    ),
}

# %% Training and measuring


@contextlib.contextmanager
def silently():
    """Print nothing; a script that gives up is an error with its last words, unless it was told to stop."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            yield
    except SystemExit as end:
        if end.code in STOPPED:
            raise
        raise RuntimeError(f"status {end.code}: {said.getvalue().strip()[-400:]}") from end


def generated(script, checkpoint, count, device, psi=None):
    """What --generate would write: uint8 images (N, C, H, W), and for cgan.py their classes (N,), or None.

    `psi` is the truncation of stylegan.py.
    """
    images, folders = [], []

    class Kept:
        def __init__(self, image):
            images.append(image)

        def save(self, path):
            folders.append(path.parent.name)

    with tempfile.TemporaryDirectory() as folder, mock.patch.object(script, "to_pil_image", Kept):
        flags = ["--checkpoint", str(checkpoint), "--out-dir", f"{folder}/images", "--device", device]
        flags += ["--truncation", str(psi)] if psi is not None else []
        script.main(["--generate", str(count), *flags])
    labels = torch.tensor([int(name) for name in folders]) if {*folders} <= {*"0123456789"} else None
    return torch.stack(images), labels


def pick_device(name):
    """The torch.device of that name; auto takes a GPU if there is one."""
    if name == "auto":
        name = accelerator.current_accelerator().type if accelerator.is_available() else "cpu"
    return torch.device(name)


def class_report(logits, labels=None):
    """What a classifier of ten classes says of images, from its logits (N, 10).

    classes: how many of the ten have at least 1% of the images. entropy: that of the classes' shares, over
    log 10, so 1 if all are equal. confidence: the mean probability of the likeliest class. class_accuracy:
    the share of images whose likeliest class is that of `labels` (N,); None without these.
    """
    confidence, classes = logits.double().softmax(1).max(1)
    shares = classes.bincount(minlength=10).double() / len(classes)
    return {
        "classes": (shares >= 0.01).sum().item(),
        "entropy": torch.special.entr(shares).sum().item() / math.log(10),
        "confidence": confidence.mean().item(),
        "class_accuracy": None if labels is None else (classes == labels).double().mean().item(),
    }


class Judge(getattr(fid, "Judge", object)):  # so that --list works whatever today's fid.py has
    """Measures samples as fid.py does, and counts their classes."""

    def __call__(self, images, labels):
        """The distance and the other figures of uint8 images (N, C, H, W) and their classes, or None."""
        samples = self.measure("samples", images)
        result = fid.compare(self.reference, samples, self.args)
        row = {"distance": result["frechet_distance"]}
        row |= {name: result[name] for name in ("precision", "recall")}
        if self.args.dataset != "faces":  # which have many attributes
            row |= class_report(samples.logits, labels)
        fake, real = (self.network.prepare(x).var(0, correction=0).sum() for x in (images, self.real))
        return row | {"diversity": (fake / real).sqrt().item()}


def hidden(script, checkpoint, device):
    """What cyclegan.py's G_AB reads in the mosaics that G_BA makes of 1,000 test digits; {} for other tasks.

    A true mosaic has one grey level in each block, and what G_BA makes almost so. Made exactly so, by the
    means of its blocks, it differs from what it was by `removed`, and what G_AB makes of it differs from the
    digit by b2a2b_plain; b2a2b_swapped, if instead it gets what was removed from another digit's mosaic.
    """
    args = script.parse_args(["--generate", "1", "--checkpoint", str(checkpoint), "--device", device])
    if args.task != "mosaic":
        return {}
    generator = script.build(args)
    script.load_checkpoint(checkpoint, generator=generator)
    b = script.read_domains(args)[1][1][:1000]
    made = script.translate(generator["ba"], b, args)
    plain = script.draw("mosaic", made)
    rest = (made.int() - plain.int()).roll(1, 0)
    swapped = (plain.int() + rest).clamp(0, 255).to(torch.uint8)
    found = {"removed": script.difference(plain, made)}
    for name, mosaics in (("plain", plain), ("swapped", swapped)):
        answers = script.translate(generator["ab"], mosaics, args)
        found[f"b2a2b_{name}"] = script.difference(answers, b)
    return found


def averaged(script, checkpoint, device):
    """The averaged generator in a checkpoint of stylegan.py, in eval mode and fp32."""
    args = script.parse_args(["--generate", "1", "--checkpoint", str(checkpoint), "--device", device])
    generator = script.build(argparse.Namespace(**vars(args) | {"precision": "fp32"}))
    script.load_checkpoint(checkpoint, ema=generator)
    return generator.eval()


@torch.no_grad()
def entanglement(script, generator, network, pairs=2000, count=10_000):
    """How straight the spaces Z and W of a StyleGAN generator are, for a classifier `network` of fid.py.

    length_z, length_w: stylegan.py's path_lengths of the same 2,000 pairs in features of length 1,
    epsilon 1e-4, in float64; the mean without the least and the largest 1% (Karras et al. 2018, section
    4.1; their features are VGG's). A generator whose images differ more has longer paths: straight_z and
    straight_w are the means of all lengths, over the mean squared distance of the paths' ends. 1 would be
    a straight line at an even pace; a detour makes it larger, and so does a sudden change, as in sharper
    images. With a linear generator an arc's is 1.23 times a line's without a mapping, about four times
    with one as it was drawn. So length_w below length_z shows nothing: compare it with that of a mapping
    as it was drawn, and of none.
    skill_z, skill_w: how often a linear regression on z (all of one length), or on w, tells the class that
    the classifier sees, fitted to the first half of 10,000 samples and tested on the second. 1: always, 0: no
    more often than it is the most frequent class. (The paper's separability is another measure.)
    """
    device, found = generator.w_avg.device, {}
    exact, layers = copy.deepcopy(generator).double(), copy.deepcopy(network.layers).double()

    def features(images):
        images = (images + 1) / 2
        return F.normalize(layers(images[:, :, 2:-2, 2:-2] if images.shape[-1] == 32 else images))

    script.reseed("path")
    ends = torch.randn(2, pairs, generator.latent_dim, dtype=torch.float64, device=device)
    one, two = (torch.cat([features(exact(part)) for part in z.split(64)]) for z in ends)
    apart = (one - two).square().sum(1).mean()
    for space in ("z", "w"):
        script.reseed("path")
        lengths = script.path_lengths(exact, features, space, pairs, 1e-4)
        low, high = lengths.quantile(lengths.new_tensor([0.01, 0.99]))
        found[f"length_{space}"] = lengths[(lengths >= low) & (lengths <= high)].mean().item()
        found[f"straight_{space}"] = (lengths.mean() / apart).item()
    script.reseed("linear")
    z = torch.randn(count, generator.latent_dim).to(device)
    images = script.sample(generator, z).to(device)
    logits = torch.cat([network(network.prepare(part))[1] for part in images.split(500)])
    classes, half = logits.argmax(1), count // 2
    often = (classes[half:] == classes[:half].mode().values).double().mean().item()
    for space, x in (("z", F.normalize(z)), ("w", generator.mapping(z))):
        x = torch.cat([x, torch.ones_like(x[:, :1])], 1).double()
        weight = torch.linalg.lstsq(x[:half], F.one_hot(classes[:half]).double()).solution
        right = ((x[half:] @ weight).argmax(1) == classes[half:]).double().mean().item()
        found[f"skill_{space}"] = (right - often) / (1 - often) if often < 1 else math.nan
    return found


@torch.no_grad()
def moved(script, generator, checkpoint):
    """How far training has moved the mapping of a run; both figures are 0 if it is as it was drawn.

    moved: the mean square of how w has changed for the same z, over the variance of w at first. The styles'
    own affine maps could do some of this as well. bent: the part of the variance of w that no affine map
    makes of the w at first, which is all that can straighten anything.
    """
    args = argparse.Namespace(
        **vars(script.parse_args(["--resume", str(checkpoint)])) | {"precision": "fp32"}
    )
    torch.manual_seed(args.seed)
    drawn = script.build(args).to(generator.w_avg.device)  # the first that train draws
    script.reseed("moved")
    z = torch.randn(5000, generator.latent_dim).to(generator.w_avg.device)
    now, before = (network.mapping(z).double() for network in (generator, drawn))
    known = torch.cat([before, torch.ones_like(before[:, :1])], 1)
    rest = now - known @ torch.linalg.lstsq(known, now).solution
    changed = (now - before).square().mean() / before.var(0).mean()
    return {"moved": changed.item(), "bent": (rest.square().mean() / now.var(0).mean()).item()}


def apart(first, second):
    """The distance of two sets of images that a Judge has measured."""
    return fid.frechet_distance(first.mu, first.sigma, second.mu, second.sigma).item()


def exchanged(judge, images, mixtures):
    """How far images of three styles are from real images, and from images of a style of their own.

    uint8 images (N, C, H, W) both. The latter distance is of N / 2 images each, and so is `own from own`, of
    the two halves of those of one style.
    """

    sets = mixtures, mixtures.chunk(2)[1], *images.chunk(2)
    found, half, *parts = (judge.measure("samples", some) for some in sets)
    row = {"distance of mixed": apart(judge.reference, found), "mixed from own": apart(parts[0], half)}
    row |= {"own from own": apart(*parts)}
    return row | {"confidence of mixed": found.logits.double().softmax(1).amax(1).mean().item()}


@torch.no_grad()
def mixed(script, generator, count):
    """uint8 images (N, C, H, W) of three styles each, that change at two random layers."""
    script.reseed("mixed")
    device, layers = generator.w_avg.device, len(generator.synthesis.layers)
    ws = generator.mapping(torch.randn(3 * count, generator.latent_dim).to(device)).unflatten(0, (3, count))
    cuts = 1 + torch.rand(count, layers - 1).argsort(1)[:, :2].T[..., None].to(device)  # (2, N, 1)
    which = (torch.arange(layers, device=device) >= cuts).sum(0)  # (N, layers): 0, 1 or 2
    return script.sample(generator.synthesis, ws[which, torch.arange(count, device=device)[:, None]])


@torch.no_grad()
def renoised(generator, ws, sides=None):
    """uint8 images (N, C, H, W) of ws (N, layers, latent_dim); layers of `sides` (or all) get new noise."""
    generator.synthesis.eval()
    for layer in generator.synthesis.layers:  # in eval mode a layer has the same noise for all images
        layer.train(sides is None or layer.noise.shape[-1] in sides)
    images = torch.cat([generator.synthesis(part) for part in ws.split(250)])
    generator.synthesis.eval()
    return images.add(1).mul(127.5).round().to(torch.uint8)


@torch.no_grad()
def voices(script, generator, count):
    """uint8 images (N, C, H, W) of the same z, by what noise they have.

    fixed: the same for all, as all samples have; fresh: new noise for each image; silent: none.
    """
    script.reseed("voices")
    z = torch.randn(count, generator.latent_dim).to(generator.w_avg.device)
    ws, quiet = generator.spread(generator.mapping(z)), copy.deepcopy(generator)
    for layer in quiet.synthesis.layers:
        layer.strength.zero_()
    found = {"fixed": renoised(generator, ws, ()), "fresh": renoised(generator, ws)}
    return found | {"silent": renoised(quiet, ws, ())}


@torch.no_grad()
def under_noise(script, generator, network, names, count=4000):
    """What new noise changes in images whose w stays the same, and what other changes of that size do.

    noise_pixels: the mean absolute difference of pixels, over that of images of two w and one noise;
    noise_pixels_4 (8, and so on): with new noise in the layers of that size alone. noise_class: the share of
    `count` images that the classifier then puts in another class; noise_sure_class: that share of the images
    of whose class it was sure (above 0.9) before; sure_class: how many these are. `names` are the attributes
    that it knows. noise_coarse: the share of the squared change that is left after averaging over blocks of
    4x4; 1/16 if the changes of all pixels are independent.

    Weak noise changes little of anything, and what is fine changes little of what a classifier sees. So there
    are the same figures for two other changes of that size. step_class and so on: w goes some way towards
    another. speckle_class and so on: the changes by noise, with a sign by chance at each pixel; what is then
    below black or above white is cut off, and all are made larger for it.
    """
    script.reseed("noise")
    ws = generator.mapping(torch.randn(count, generator.latent_dim).to(generator.w_avg.device))
    ws, others = generator.spread(ws), generator.spread(ws.roll(1, 0))
    before, noisy = renoised(generator, ws, ()), renoised(generator, ws)
    whole = (before.double() - before.roll(1, 0).double()).abs().mean()
    signs = torch.randint(2, (count, 1, *before.shape[2:])).to(before.device) * 2 - 1

    def change(images):
        return images.double() - before.double()

    def pixels(images):
        return (change(images).abs().mean() / whole).item()

    def look(images):
        logits = torch.cat([network(network.prepare(part))[1] for part in images.split(500)])
        parts = logits.split(getattr(network, "classes", [logits.shape[1]]), 1)
        return [part.softmax(1).max(1) for part in parts]  # how sure it is, and of which class

    def step(way):
        return renoised(generator, ws.lerp(others, way), ())

    def speckle(size):
        return (before + size * signs * change(noisy)).clamp(0, 255).round().to(torch.uint8)

    changed, seen = {"noise": noisy}, look(before)
    for what, make, size in (("step", step, 0.05), ("speckle", speckle, 1.0)):
        for _ in range(4):  # until the pixels change as much
            changed[what] = make(size)
            size *= pixels(noisy) / max(pixels(changed[what]), 1e-9)
    found = {f"sure_{name}": (sure > 0.9).double().mean().item() for name, (sure, _) in zip(names, seen)}
    for side in dict.fromkeys(layer.noise.shape[-1] for layer in generator.synthesis.layers):
        found[f"noise_pixels_{side}"] = pixels(renoised(generator, ws, (side,)))
    for what, images in changed.items():
        difference = change(images)
        coarse = F.avg_pool2d(difference, 4).square().mean() / difference.square().mean()
        found |= {f"{what}_pixels": pixels(images), f"{what}_coarse": coarse.item()}
        for name, (sure, old), (_, new) in zip(names, seen, look(images)):
            other = (old != new).double()
            found[f"{what}_{name}"] = other.mean().item()
            found[f"{what}_sure_{name}"] = other[sure > 0.9].mean().item()
    return found


@torch.no_grad()
def influence(script, generator, network, names, pairs=1000):
    """How much of what two images differ in has come over with the styles up to a resolution.

    Of pairs of styles w1, w2, the layers up to 4x4 (8x8, 16x16) get w2, the others keep w1, as in style
    mixing. hair_16, for example: of the pairs whose images have different hair, as the classifier sees them,
    how many have then that of the second, and kept_hair_16, how many still have that of the first (which is,
    since w1 and w2 are alike, how much comes over with the styles above 16). Two figures to compare with:
    chance_hair, how often another pair's image has that of the second; alike_hair_16, how many of the pairs
    with the same hair still have it, for mixing may spoil an image. hair_pairs: how many have different hair.
    `names` are the attributes that the classifier knows.

    Of digits and garments there are also shape, the share of two silhouettes that only one of them has;
    inside, the mean brightness within the silhouette; and grain, how much its pixels differ from the mean of
    their neighbours there, away from its edge (strokes of one or two pixels have none). Their figure is 0 if
    the mixture is like the first image, 1 if like the second, and 1/2 if as far from both.
    """
    script.reseed("influence")
    z = torch.randn(2 * pairs, generator.latent_dim).to(generator.w_avg.device)
    w1, w2 = generator.mapping(z).chunk(2)
    sides = torch.tensor([layer.noise.shape[-1] for layer in generator.synthesis.layers], device=w1.device)
    first, second = generator.spread(w1), generator.spread(w2)

    def look(ws):
        images = script.sample(generator.synthesis, ws).to(w1.device)
        prepared = network.prepare(images)
        logits = torch.cat([network(part)[1] for part in prepared.split(500)])
        parts = logits.split(getattr(network, "classes", [logits.shape[1]]), 1)
        seen = {name: part.argmax(1) for name, part in zip(names, parts)}
        if names == ["class"]:
            light = prepared.double()  # (N, 1, 28, 28), from 0 to 1
            outline = light > 0.2 * light.amax((2, 3), keepdim=True)
            detail = (light - fid.AVERAGE_POOL(light)).abs()
            within = -F.max_pool2d(-F.pad(outline.double(), [1] * 4), 3, 1)  # without its edge
            mean = {"inside": (light, outline), "grain": (detail, within)}
            seen |= {k: (x * m).sum((1, 2, 3)) / m.sum((1, 2, 3)).clamp(min=1) for k, (x, m) in mean.items()}
            seen |= {"shape": outline}
        return seen

    def difference(one, two):
        if one.dtype != torch.bool:
            return (one - two).abs().mean().item()
        return ((one ^ two).sum((1, 2, 3)) / (one | two).sum((1, 2, 3)).clamp(min=1)).double().mean().item()

    start, end, found = look(first), look(second), {}
    for side in sides.unique().tolist()[:-1]:
        for name, x in look(torch.where((sides <= side)[:, None], second, first)).items():
            if name in names:
                unlike = start[name] != end[name]  # if there are none, the figures are NaN
                found[f"{name}_{side}"] = (x == end[name])[unlike].double().mean().item()
                found[f"kept_{name}_{side}"] = (x == start[name])[unlike].double().mean().item()
                found[f"alike_{name}_{side}"] = (x == end[name])[~unlike].double().mean().item()
                found[f"chance_{name}"] = (end[name].roll(1) == end[name])[unlike].double().mean().item()
                found[f"{name}_pairs"] = unlike.sum().item()
            else:
                whole = difference(start[name], end[name])
                way = difference(start[name], x) - difference(x, end[name])
                found[f"{name}_{side}"] = (1 + way / whole) / 2 if whole else math.nan
    return found


def attributes(dataset):
    """The names of what fid.py's classifier tells of a data set's images."""
    if dataset != "faces":
        return ["class"]
    with open("data/faces/train.csv") as table:
        return table.readline().strip().split(",")[1:]


def picture(folder, step):
    """The file with 64 samples of the run in `folder` at that step."""
    return folder.with_name(f"{folder.name}-step-{step}.png")


def train_until(step, script, setting, seed, folder, device):
    """Train, or go on, until `step`. Returns whether the loss stayed finite, and the seconds of a step."""
    checkpoint = folder / "checkpoint.pt"
    flags, done = [*setting.flags.split(), "--seed", str(seed), "--out-dir", str(folder)], 0
    if checkpoint.is_file():
        flags, done = ["--resume", str(checkpoint)], script.load_checkpoint(checkpoint)["step"]
    if done > step:
        raise RuntimeError(f"{folder} is beyond step {step}; remove it, to measure there")
    clock = time.process_time if device == "cpu" else time.perf_counter
    start = clock()
    try:
        script.main([*flags, "--max-steps", str(step), "--device", device])
    except SystemExit as end:
        if end.code != 1:  # 1: the loss is not finite
            raise
        return False, math.nan
    return True, (clock() - start) / (step - done) if done < step else math.nan


@contextlib.contextmanager
def watched(script):
    """In a run of gan_2d.py, a list of what G makes of the same 5,000 z after each epoch; and how to draw.

    Drawing takes a fourth of a run's time: pictures are black, and a function draws the last.
    """
    track, draw, fakes, last = script.track, script.draw_plane, [], []

    def watching(generator, discriminator, heaps, args, step):
        script.reseed("watched")
        with torch.no_grad():
            fakes.append(generator(torch.randn(5000, args.latent_dim).to(args.device)).cpu())
        return track(generator, discriminator, heaps, args, step)

    def waiting(*args):
        last[:] = args
        return torch.zeros(1, 1, 3, dtype=torch.uint8).numpy()

    with mock.patch.multiple(script, track=watching, draw_plane=waiting):
        yield fakes, lambda: Image.fromarray(draw(*last))


def own_figures(script, checkpoint, fakes, seconds):
    """Rows of a checkpoint of gan_2d.py, one for each epoch; `seconds` are those of a step.

    They have its DISTANCES (`distance` is the sliced one) and, as means over the epoch, its METRICS. Of
    `fakes`, those of the same z after each epoch, (N, 2): poorest, the least share of a heap, 1 if all have
    the same; lost, how many heaps so far fell from a share of 1/2 to less than 1/10; moved, how far a fake
    came in an epoch, the mean of the last ten.
    """
    heaps = script.Heaps(checkpoint["settings"]["dataset"])
    count, lost, moves, start = len(heaps.centres), 0, [], 0
    held = torch.zeros(count, dtype=torch.bool)
    for (step, *values), points, before in zip(checkpoint["distances"].tolist(), fakes, [None, *fakes]):
        distance, nearest = torch.cdist(points, heaps.centres).min(1)
        shares = torch.bincount(nearest[distance < 3 * heaps.std], minlength=count) * count / len(points)
        held |= shares >= 0.5
        lost += (held & (shares < 0.1)).sum().item()
        held &= shares >= 0.1
        moves += [(points - before).norm(dim=1).mean().item()] if before is not None else []
        row, step = dict(zip(script.DISTANCES, values)), int(step)
        row |= {"step": step, "seconds": seconds * step, "distance": row.pop("sliced"), "heaps": count}
        row |= {"poorest": shares.min().item(), "lost": lost}
        row |= {"moved": statistics.mean(moves[-10:]) if moves else math.nan}
        yield row | dict(zip(script.METRICS, checkpoint["history"][start:step].mean(0).tolist()))
        start = step


def follow(setting, seed, home, samples, device):
    """Train with a setting and a seed, and measure at its points: a row for each, as a dictionary.

    Once the loss is not finite, that is the last row, and its distance is NaN.
    """
    if device == "cpu":
        torch.set_num_threads(1)
    script, folder = importlib.import_module(setting.script), setting.folder(home, seed)
    notes, judge = folder.with_suffix(".json"), None
    images_per_step = setting.args.batch_size * getattr(setting.args, "n_critic", 1)
    rows = json.loads(notes.read_text()) if notes.is_file() else []
    alone = setting.script == "gan_2d"  # needs no judge, and is watched from its start to its end
    if alone and not rows:
        shutil.rmtree(folder, ignore_errors=True)
    for point in setting.points[-1:] if alone else setting.points:
        if any(row["step"] == point or math.isnan(row["distance"]) for row in rows):
            continue
        with contextlib.ExitStack() as stack:
            stack.enter_context(silently())
            if setting.change:
                stack.enter_context(setting.change(script))
            fakes, draw = stack.enter_context(watched(script)) if alone else (None, None)
            finite, per_step = train_until(point, script, setting, seed, folder, device)
            before = rows[-1] if rows else {"step": 0, "seconds": 0.0}
            row = {"step": point, "seconds": before["seconds"] + per_step * (point - before["step"])}
            row |= {"images": point * images_per_step, "distance": math.nan}
            if finite and alone:
                checkpoint = script.load_checkpoint(folder / "checkpoint.pt")
                rows += own_figures(script, checkpoint, fakes, per_step)
                draw().save(picture(folder, point))
                notes.write_text(json.dumps(rows, indent=1) + "\n")
                continue
            if finite:
                images, labels = generated(script, folder / "checkpoint.pt", samples, device)
                to_pil_image(make_grid(images[:64], 8)).save(picture(folder, point))
                judge = judge or Judge(setting.args.dataset, images, device)
                checkpoint = script.load_checkpoint(folder / "checkpoint.pt")
                row |= dict(zip(script.METRICS, checkpoint["history"][-100:].mean(0).tolist()))
                tests = [values.tolist() for values in checkpoint["distances"] if values[0] == point]
                row |= {k: v for test in tests for k, v in zip(script.DISTANCES, test[1:]) if v == v}
                if setting.script == "cyclegan":
                    row |= hidden(script, folder / "checkpoint.pt", device)
                if setting.script == "stylegan":
                    row["training diversity"] = row["diversity"]
                if setting.script == "stylegan" and point == setting.points[-1]:  # this takes minutes
                    generator = averaged(script, folder / "checkpoint.pt", device)
                    row |= entanglement(script, generator, judge.network)
                    row |= influence(script, generator, judge.network, attributes(setting.args.dataset))
                    row |= exchanged(judge, images, mixed(script, generator, samples))
                    row |= moved(script, generator, folder / "checkpoint.pt")
                    if generator.synthesis.layers[0].strength is not None:
                        row |= under_noise(script, generator, judge.network, attributes(setting.args.dataset))
                        for voice, drawn in voices(script, generator, samples).items():
                            row |= {voice: apart(judge.reference, judge.measure("samples", drawn))}
                row |= judge(images, labels)  # its diversity replaces that of batches in training
        rows.append(row)
        notes.write_text(json.dumps(rows, indent=1) + "\n")
    return [row for row in rows if row["step"] in setting.points]


def work(job):
    """What a worker does: a job, and the rows it gives."""
    return job, follow(*job)


# %% Extra tables


def baselines(device):
    """Rows of a table, for three tasks: see without_network."""
    for task in ("outline", "mosaic", "half"):
        yield from without_network(task, device)


def without_network(task, device):
    """Rows of a table: what one gets for MNIST's test questions without training anything.

    The nearest neighbour is the answer to the training question that is most like this one, pixel by pixel;
    the median is that of ten. The errors are of 1,000 test images, as in pix2pix.py, the rest is of 10,000.
    """
    script = importlib.import_module("pix2pix")
    args = script.parse_args(["--task", task])
    script.fill_in(args)
    (a, b), (questions, truth), (names, _) = script.read_pictures(args, paired=True)
    labels, judge = torch.tensor([int(name[0]) for name in names]), Judge("mnist", b, device)
    known, asked = (images.flatten(1).float() / 255 for images in (a, questions))
    distances = fid.squared_distances(asked, known)  # 500 rows at a time
    near = torch.cat([rows.topk(10, largest=False).indices for rows in distances])
    answers = {"the question itself": questions, "all black": torch.zeros_like(truth)}
    answers["the nearest neighbour's answer"] = b[near[:, 0]]
    answers["the median of ten neighbours' answers"] = b[near].median(1).values
    for name, images in answers.items():
        some, true = images[:1000], truth[:1000]
        row = {"task": task, "answer": name, "error": script.difference(some, true)}
        row["evidence"] = script.difference(script.draw(task, some), questions[:1000])
        row["sharpness"] = script.sharpness(some, true)
        found = judge(images, labels)
        yield row | {key: found[key] for key in ("distance", "precision", "recall", "class_accuracy")}


def halves(images, black, order=None):
    """Digits (N, 1, 28, 28) with `black` rows in the middle; with an `order` (N,), others' lower halves.

    No field of 10x10 pixels has rows above and below ten black ones. So whatever it sees of a digit that was
    put together from two, it sees as often in true ones.
    """
    images = images.clone() if order is None else torch.cat([images[:, :, :14], images[order, :, 14:]], 2)
    images[:, :, 14 - black // 2 : 14 + black // 2] = images.min()
    return images


def partners(classes, alike):
    """A random order (N,) of images, to take lower halves from; `alike`: each from one of its own class."""
    order = torch.randperm(len(classes)).to(classes.device)
    if alike:
        by_class = classes.argsort(stable=True)
        order[by_class] = order[classes[order].argsort(stable=True)]
    return order


def draw_halves(images, path):
    """Ten images (N, 1, 28, 28) in [-1, 1] with black rows; below, each with the lower half of the next."""
    images = images[:10].cpu()
    both = torch.cat([halves(images, 10), halves(images, 10, torch.arange(len(images)).roll(-1))])
    grid = to_pil_image(make_grid((both + 1) / 2, len(images), pad_value=0.4))
    path.parent.mkdir(parents=True, exist_ok=True)
    grid.resize((3 * grid.width, 3 * grid.height), Image.Resampling.NEAREST).save(path)


TWO, BLIND, THREE = "two convolutions", "two, and one of 1x1", "three convolutions"
SIGHT = (  # script, network, black rows, whether lower halves come from digits of the same class
    ("vanilla_gan", "fully connected", 10, False),
    ("dcgan_mnist", TWO, 10, False),
    ("dcgan_mnist", BLIND, 10, False),
    ("dcgan_mnist", THREE, 10, False),
    ("dcgan_mnist", TWO, 4, False),
    ("wgan_gp", TWO, 10, False),
    ("wgan_gp", THREE, 10, False),
    ("cgan", TWO, 10, False),
    ("cgan", TWO, 10, True),
    ("cgan", THREE, 10, True),
)


def build_second(script, form):
    """A discriminator or critic of 64 channels and three convolutions, or two, or with the third of 1x1."""
    if script.SCRIPT == "vanilla_gan":
        return script.Discriminator()
    kind = script.Critic if script.SCRIPT == "wgan_gp" else script.Discriminator
    network = kind(64, shallow=form == TWO)
    return see_no_more(network) if form == BLIND else network


def sight(device, epochs=2):
    """Rows of a table: how well discriminators tell digits from digits with others' lower halves.

    Each is trained with cross-entropy on MNIST, with one seed, the batches of its script and the rate that it
    has with 64 channels, and tested on 10,000 test images and as many that are put together. Guessing has a
    loss of 2 log 2 = 1.386, as the scripts add it up, and an accuracy of 1/2. cgan.py's is told the class of
    the upper half. Some of both kinds are in sight.png.
    """
    cross_entropy = importlib.import_module("vanilla_gan").discriminator_loss
    parts = [datasets.MNIST("data", train) for train in (True, False)]
    data = [(part.data[:, None].to(device).float() / 127.5 - 1, part.targets.to(device)) for part in parts]
    draw_halves(data[1][0], PLOTS / "sight.png")
    for name, form, black, alike in SIGHT:
        script = importlib.import_module(name)
        args = script.parse_args(["--device", str(device)])
        script.reseed(args.seed, "sight")
        network = build_second(script, form).apply(script.init_weights).to(device)
        optimizer = torch.optim.Adam(network.parameters(), args.lr_d or 2e-4, betas=(0.5, 0.999))

        def judge(images, classes, network=network, told=name == "cgan"):
            return network(images, classes) if told else network(images)

        images, classes = data[0]
        for _ in range(epochs):
            for index in tqdm(torch.randperm(len(images)).to(device).split(args.batch_size), name):
                true, told = images[index], classes[index]
                both = torch.cat([halves(true, black), halves(true, black, partners(told, alike))])
                # Normalised together, as in eval mode.
                loss = cross_entropy(*judge(both, told.repeat(2)).chunk(2))
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        network.eval()
        images, classes = data[1]
        with torch.no_grad():
            mixed = halves(images, black, partners(classes, alike))
            pairs = [(some.split(500), classes.split(500)) for some in (halves(images, black), mixed)]
            true, mixed = (torch.cat([judge(*pair) for pair in zip(*both)]) for both in pairs)
        row = {"script": f"{name}.py", "network": form, "black rows": black}
        row |= {"lower half of": "the same class" if alike else "any digit"}
        right = (true > 0).float().mean() + (mixed <= 0).float().mean()
        loss = cross_entropy(true, mixed)
        yield row | {"loss": loss.item(), "accuracy": right.item() / 2}


def copies(device, total=10_000):
    """Rows of a table: what fid.py says of a few training digits that are repeated up to 10,000 images.

    As many of each class, drawn at random; exactly the same, or each moved by up to one pixel.
    """
    part = datasets.MNIST("data", train=True)
    images, labels, judge = part.data[:, None], part.targets, None
    rng = torch.Generator().manual_seed(42)
    for count, moved in itertools.product((10, 50, 200, 1000, 10_000), (False, True)):
        drawn = torch.randperm(len(images), generator=torch.Generator().manual_seed(42))
        drawn = torch.cat([drawn[labels[drawn] == label][: count // 10] for label in range(10)])
        some = images[drawn].repeat(total // count, 1, 1, 1)
        if moved:
            padded = F.pad(some, (1, 1, 1, 1))
            places = torch.randint(0, 3, (total, 2), generator=rng).tolist()
            some = torch.stack([image[:, y : y + 28, x : x + 28] for image, (y, x) in zip(padded, places)])
        judge = judge or Judge("mnist", some, device)
        found = judge(some, None)
        row = {"originals": count, "moved": "by up to a pixel" if moved else "no"}
        yield row | {key: found[key] for key in ("distance", "precision", "recall", "entropy")}


def last_checkpoint(name):
    """The script of a claim with one setting, and the checkpoint that its first seed has left at the end."""
    claim = CLAIMS[name]
    script, files = importlib.import_module(claim.settings[0].script), []
    for setting in (*claim.settings, *in_fp32(claim).settings):
        files.append(setting.folder(RUNS, SEEDS[0]) / "checkpoint.pt")
    path = next(filter(Path.is_file, files), None)
    if not path or script.load_checkpoint(path)["step"] != claim.settings[0].points[-1]:
        message = f"no run of {script.__name__}.py to measure; first: python claims.py {name}"
        raise SystemExit(f"claims.py: {message}")
    return script, path


def garments(device):
    """Rows of a table: of each kind of garment that cgan.py's run on Fashion-MNIST was asked for, what came.

    asked: the share of samples that the classifier takes for what was asked. real: of test images, the share
    that it takes for what they are. confused: what it takes most of the other samples for, and their share.
    diversity: root mean square distance of two of these samples, over that of two such test images.
    """
    script, checkpoint = last_checkpoint("garments")
    with silently():
        images, labels = generated(script, checkpoint, SAMPLES, str(device))
    names = datasets.FashionMNIST.classes
    tests, truth = fid.images_and_labels("fashion_mnist", "data", train=False)
    network, _ = fid.load_classifier("fashion_mnist", "data", device)
    network.to(device)

    def seen(images):
        with torch.no_grad():
            parts = [network(network.prepare(part.to(device)))[1].argmax(1) for part in images.split(500)]
        return torch.cat(parts).cpu()

    for label, name in enumerate(names):
        fakes, reals = images[labels == label], tests[truth == label]
        shares = seen(fakes).bincount(minlength=10) / len(fakes)
        row = {"garment": name, "asked": shares[label].item()}
        row["real"] = (seen(reals) == label).double().mean().item()
        shares[label] = 0
        row["confused"] = f"{names[shares.argmax()]}, {shares.max():.3f}"
        spreads = [part.double().var(0, correction=0).sum() for part in (fakes, reals)]
        yield row | {"diversity": (spreads[0] / spreads[1]).sqrt().item()}


def truncation(device):
    """Rows of a table: samples of stylegan.py's run of full length, with w ever closer to its mean.

    `even precision` is the mean of the precisions of those classes that have 100 samples or more at each psi.
    If the precision rises and this does not, the classes that are easy to draw have become more frequent, and
    no class better.
    """
    script, checkpoint = last_checkpoint("stylegan")
    judge, rows, shares = None, [], []
    for psi in PSI:
        with silently():
            images, _ = generated(script, checkpoint, SAMPLES, str(device), psi)
        judge = judge or Judge("mnist", images, device)
        found, samples = judge(images, None), judge.measure("samples", images)
        near = fid.squared_distances(samples.features, judge.reference.features)
        radii = fid.squared_radii(judge.reference.features, 3)
        good = torch.cat([(part <= radii).any(1) for part in near]).double()
        classes = F.one_hot(samples.logits.argmax(1), 10).double()
        shares.append((classes.mean(0), good @ classes / classes.sum(0)))
        columns = "distance", "recall", "precision", "classes", "entropy", "confidence", "diversity"
        rows.append({"psi": psi} | {key: found[key] for key in columns})
    there = torch.stack([share for share, _ in shares]).amin(0) >= 0.01
    for row, (_, precisions) in zip(rows, shares):
        yield row | {"even precision": precisions[there].mean().item()}


def styles(device):
    """Rows of a table: how often each attribute of a face comes over with styles up to 4x4, 8x8, and so on.

    See influence. The faces are those of pretrained/stylegan.pt. The pairs differ in the attribute; of them a
    cell has the share that gets the second face's, and the share that keeps the first's. `alike`: of other
    pairs, how many keep what both have, at the resolution where it is fewest. `wrong` is how often the
    classifier is wrong about real test faces; how often about these, nobody knows.
    """
    script = importlib.import_module("stylegan")
    network, _ = fid.load_classifier("faces", "data", device)
    generator, names = averaged(script, "pretrained/stylegan.pt", str(device)), attributes("faces")
    found = influence(script, generator, network.to(device), names, 3000)
    images, labels = fid.images_and_labels("faces", "data", train=False)
    with torch.no_grad():
        logits = torch.cat([network(network.prepare(part.to(device)))[1] for part in images.split(500)])
    for name, part, truth in zip(names, logits.cpu().split(network.classes, 1), labels.T):
        row = {"attribute": name, "pairs": found[f"{name}_pairs"], "chance": found[f"chance_{name}"]}
        for side in (4, 8, 16, 32):
            row[f"{side}x{side}"] = f"{found[f'{name}_{side}']:.2f}, {found[f'kept_{name}_{side}']:.2f}"
        row["alike"] = min(found[f"alike_{name}_{side}"] for side in (4, 8, 16, 32))
        yield row | {"wrong": (part.argmax(1) != truth).double().mean().item()}


def draw_noise(script, generator, path, faces=3, columns=4):
    """A row for each image: with the noise of all samples, with new noise, and how much its pixels vary.

    The last one is eight times the standard deviation of 100 images, the mean over the colours.
    """
    script.reseed("noise")
    w = generator.mapping(torch.randn(faces, generator.latent_dim).to(generator.w_avg.device))
    plain = renoised(generator, generator.spread(w), ())[:, None]
    many = torch.stack([renoised(generator, generator.spread(w)) for _ in range(100)], 1)
    deviation = many.double().std(1).mean(1, keepdim=True).expand_as(plain[:, 0])
    last = (8 * deviation).round().clamp(max=255).to(torch.uint8)[:, None]
    rows = torch.cat([plain, many[:, :columns], last], 1).flatten(0, 1).cpu()
    grid = to_pil_image(make_grid(rows, columns + 2, pad_value=255))
    path.parent.mkdir(parents=True, exist_ok=True)
    grid.resize((2 * grid.width, 2 * grid.height), Image.Resampling.NEAREST).save(path)


def noise(device):
    """Rows of a table: what new noise changes in a face, and what other changes of that size do.

    See under_noise. The faces are those of pretrained/stylegan.pt; three of them are in noise.png. The
    columns that end in "sure" are about faces of whose attribute the classifier was sure, a share of `sure`.
    """
    script = importlib.import_module("stylegan")
    network, _ = fid.load_classifier("faces", "data", device)
    generator, names = averaged(script, "pretrained/stylegan.pt", str(device)), attributes("faces")
    draw_noise(script, generator, PLOTS / "noise.png")
    found = under_noise(script, generator, network.to(device), names, 2000)
    columns = {what: what for what in ("noise", "step", "speckle", "sure")}
    columns |= {f"{what}, sure": f"{what}_sure" for what in ("noise", "step", "speckle")}
    for key in ("pixels", *(f"pixels_{2**k}" for k in range(2, 7)), "coarse", *names):
        yield {"figure": key} | {column: found.get(f"{start}_{key}", "") for column, start in columns.items()}


EXTRA = {
    "baselines": baselines,
    "sight": sight,
    "copies": copies,
    "garments": garments,
    "truncation": truncation,
    "styles": styles,
    "noise": noise,
}


# %% Tables and plots


def rank_correlation(x, y):
    """Spearman's: the correlation of the ranks of two lists of different numbers."""
    ranks = [torch.tensor(values).argsort().argsort().double() for values in (x, y)]
    return torch.corrcoef(torch.stack(ranks))[0, 1].item()


def steps_until(rows, name, change):
    """The steps from the first row until `name` is more than doubled or halved; inf if it never is."""
    first, ratio = rows[0], {"doubled": 2, "halved": 1 / 2}[change]
    for row in rows:
        if (row[name] - ratio * first[name]) * (ratio - 1) > 0:
            return row["step"] - first["step"]
    return math.inf


def spread(values, form=None):
    """The middle one of some numbers, and in brackets the least and the largest; and how many are NaN."""
    values = [*values]
    if missing := sum(value != value for value in values):
        rest = [value for value in values if value == value]
        return f"{spread(rest, form)}, none in {missing} of {len(values)}" if rest else "none"
    values = sorted(values)
    form = form or (".3f" if max(map(abs, values)) < 10 else ".1f")
    least, middle, most = (f"{v:{form}}" for v in (values[0], statistics.median(values), values[-1]))
    return middle if least == most else f"{middle} ({least} to {most})"


def column(name, runs):
    """A cell: what `name` asks for, of runs of one setting that differ in their seeds (lists of rows)."""
    ends = [rows[-1] for rows in runs]
    if name == "steps":
        return f"{ends[0]['step']:,}"
    if name == "minutes":
        seconds = [end["seconds"] for end in ends if math.isfinite(end["seconds"])]
        return f"{statistics.median(seconds) / 60:.1f}" if seconds else ""
    if failed := sum(math.isnan(end["distance"]) for end in ends):
        return f"not finite in {failed} of {len(ends)}"
    if name == "all heaps":
        whole = [all(row["modes"] == row["heaps"] for row in rows[-5:]) for rows in runs]
        return f"in {sum(whole)} of {len(runs)}"
    if name.endswith(" min"):  # of the points, the one nearest to that time, if it is near
        key, minutes = name.removesuffix(" min").split(" after ")
        near = [min(rows, key=lambda row: abs(row["seconds"] / 60 - float(minutes))) for rows in runs]
        far = any(abs(row["seconds"] / 60 / float(minutes) - 1) > 0.2 for row in near)
        return "not measured" if far else spread(row[key] for row in near)
    if " / " in name:
        over, under = name.split(" / ")
        return spread(end[over] / end[under] for end in ends)
    if name.startswith("first "):
        return spread([rows[0][name.removeprefix("first ")] for rows in runs])
    if name.startswith("range of "):
        values = [row[name.removeprefix("range of ")] for rows in runs for row in rows]
        return f"{min(values):.3f} to {max(values):.3f}"
    if name.startswith("rank correlation"):
        pairs = [[[row[key] for row in rows] for key in ("wasserstein", "distance")] for rows in runs]
        if name.endswith("of changes"):  # from point to point; both fall anyway
            pairs = [[[b / a for a, b in itertools.pairwise(some)] for some in pair] for pair in pairs]
        return spread(rank_correlation(*pair) for pair in pairs)
    if name.endswith(("doubled", "halved")):
        key, change = name.split()
        return spread((steps_until(rows, key, change) for rows in runs), ".0f").replace("inf", "never")
    distances = [[row["distance"] for row in rows] for rows in runs]
    if name == "spread over seeds":
        values = [run[-1] for run in distances]
        return f"{(max(values) - min(values)) / statistics.median(values):.0%}"
    if name == "spread over the last five":
        tails = [run[-5:] for run in distances]
        return spread([(max(tail) - min(tail)) / statistics.median(tail) for tail in tails], ".0%")
    if name == "largest rise":
        rises = [[after / before for before, after in itertools.pairwise(run)] for run in distances]
        return spread([max(1, *rise) - 1 for rise in rises], ".0%")
    if name == "error":  # cyclegan.py has two
        name = next(name for name in ("error", "a2b_error") if ends[0].get(name) is not None)
    if ends[0].get(name) is None:
        return ""  # as the figures of noise, where there is none
    small = name.endswith(("error", "plain", "swapped", "removed", "evidence"))  # differences of pixels
    form = "g" if name in ("modes", "lost") else ".0f" if name == "classes" else ".4f" if small else None
    return spread((end[name] for end in ends), form)


def in_fp32(claim):
    """The same claim without `--precision bf16`."""
    settings = (replace(s, flags=s.flags.removesuffix(BF16).strip()) for s in claim.settings)
    return replace(claim, settings=tuple(settings))


def as_measured(claim, rows):
    """The claim in the precision of the rows of its CSV."""
    return claim if any(BF16 in row["setting"] for row in rows) else in_fp32(claim)


def runs_of(setting, rows):
    """Of the rows of a CSV those of a setting: a list for each seed."""
    mine = [row for row in rows if row["setting"] == setting.command and row["step"] <= setting.points[-1]]
    return [[row for row in mine if row["seed"] == seed] for seed in sorted({row["seed"] for row in mine})]


def table(claim, rows):
    """A claim's rows of its CSV in Markdown: medians of the seeds, in brackets the extremes; the commands."""
    claim, columns = as_measured(claim, rows), ("steps", "minutes", "distance", *claim.columns)
    lines = [f"| setting | {' | '.join(columns)} |", "| --- |" + " --- |" * len(columns)]
    for setting in claim.settings:
        runs = runs_of(setting, rows)
        cells = [column(name, runs) for name in columns]
        lines.append(f"| {setting.label} | {' | '.join(cells)} |")
    commands = [f"    {setting.label}: {setting.command}" for setting in claim.settings]
    return "\n".join([*lines, "", "<details><summary>commands</summary>", "", *commands, "", "</details>"])


def report(name, claim, rows):
    """Print a claim and its table."""
    print(f"{name}: {claim.text}\n\n{table(claim, rows)}\n")


def write_rows(path, rows):
    """A CSV of dictionaries that need not have all columns."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, names, lineterminator="\n")
        writer.writeheader()
        for row in rows:
            writer.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()})


def read_rows(path):
    """The rows of such a CSV; numbers are numbers again."""

    def value(text):
        try:
            return int(text) if text.isdigit() else float(text)
        except ValueError:
            return text or None

    with path.open(newline="") as file:
        return [{name: value(text) for name, text in row.items()} for row in csv.DictReader(file)]


def plot(claim, rows, home, path):
    """The claim's curve, a line for each run and a colour for each setting; below, samples at its end."""
    claim, count = as_measured(claim, rows), len(claim.settings)
    figure = Figure(figsize=(max(8, 2.6 * count), 6.4), layout="constrained")
    figure.suptitle(claim.text, wrap=True)
    places = figure.add_gridspec(2, count, height_ratios=(1.2, 1))
    curves = figure.add_subplot(places[0, :])
    for i, setting in enumerate(claim.settings):
        runs = [[row for row in run if math.isfinite(row["distance"])] for run in runs_of(setting, rows)]
        # Earlier settings lie on top: one that is the first part of another's run would not be seen.
        look = {"color": f"C{i}", "zorder": 2 + count - i}
        lines = [[[row[key] for row in run] for key in (claim.axis, claim.curve)] for run in runs if run]
        if len(lines) >= 10:
            x = lines[0][0]
            low, y, high = zip(*(statistics.quantiles(values, n=4) for values in zip(*(y for _, y in lines))))
            curves.fill_between(x, low, high, alpha=0.15, linewidth=0, **look)
            lines = [(x, y)]
        for x, y in lines:
            curves.plot(x, y, marker=".", linewidth=1, **look)
        below = figure.add_subplot(places[1, i])
        below.set_axis_off()
        below.set_title(setting.label, color=f"C{i}", fontsize="medium", wrap=True)
        for row in runs[0][-1:]:
            below.imshow(Image.open(picture(setting.folder(home, row["seed"]), row["step"])))
    titles = {
        "images": "real images seen",
        "seconds": "seconds of training",
        "wasserstein": "estimate",
        "distance": "distance to the test set",
        "class_accuracy": "class accuracy",
        "d_fake": "D(fake)",
        "error": "mean difference from the truth",
        "a2b_error": "mean difference from the truth",
        "b2a2b_plain": "mean difference after there and back",
        "modes": "heaps reached",
        "gradient": "norm of G's gradient",
        "moved": "distance a fake moves in an epoch",
    }
    for side, name in (("x", claim.axis), ("y", claim.curve)):
        curves.set(**{f"{side}label": titles.get(name, name)})
        if name in ("distance", "wasserstein", "gradient"):
            curves.set(**{f"{side}scale": "log"})
            axis = getattr(curves, f"{side}axis")
            axis.set_major_locator(LogLocator(subs=(1, 2, 3, 5, 7)))
            axis.set_major_formatter("{x:,g}")
            axis.set_minor_locator(NullLocator())
    figure.savefig(path)


# %% Main


def shortened(claim):
    """The same claim with one seed after a hundredth of the steps, for --quick."""
    points = [tuple(sorted({max(2, point // 100) for point in s.points})) for s in claim.settings]
    settings = tuple(map(lambda s, p: replace(s, points=p), claim.settings, points))
    return replace(claim, settings=settings, seeds=claim.seeds[:1])


@contextlib.contextmanager
def start_workers(count):
    """An executor of so many processes, which end with the block; None for one, which is this process itself.

    If a worker is killed, as happens when memory runs out, it says so; multiprocessing's pool would wait.
    """
    if count == 1:
        yield None
        return
    # Workers ignore Ctrl-C, which a terminal sends to all: this process ends them.
    context, ignore = multiprocessing.get_context("spawn"), (signal.SIGINT, signal.SIG_IGN)
    pool = ProcessPoolExecutor(count, context, signal.signal, ignore)
    late = threading.Timer(20, lambda: [worker.kill() for worker in multiprocessing.active_children()])
    try:
        yield pool
    except BaseException:
        for worker in multiprocessing.active_children():  # a script saves before it ends
            worker.terminate()
        # Python drops an exception that a signal raises inside a destructor. Such a worker goes on: kill it.
        late.start()
        raise
    finally:
        pool.shutdown(cancel_futures=True)
        late.cancel()


def as_they_come(function, jobs, pool, count):
    """function(job) of each job: by `count` processes, each of which gets a job when it has done one."""
    if not pool:
        yield from map(function, jobs)
        return
    waiting = iter(jobs)
    running = {pool.submit(function, job) for job in itertools.islice(waiting, count)}
    while running:
        done, running = wait(running, return_when=FIRST_COMPLETED)
        running |= {pool.submit(function, job) for job in itertools.islice(waiting, len(done))}
        yield from (future.result() for future in done)


def train_all(claims, home, samples, device, workers):
    """The rows of each claim, by its name. Settings that share a run are trained once, as far as any goes."""
    furthest = {}
    for claim in claims.values():
        for seed, setting in itertools.product(claim.seeds, claim.settings):
            rivals = setting, furthest.get((seed, setting.command), setting)
            furthest[seed, setting.command] = max(rivals, key=lambda rival: rival.points[-1])
    for dataset in {s.args.dataset for s in furthest.values() if s.script != "gan_2d"}:
        fid.load_classifier(dataset, "data", torch.device(device))  # before many ask for it at once
    jobs = [(setting, seed, home, samples, device) for (seed, _), setting in furthest.items()]
    jobs, rows = sorted(jobs, key=lambda job: job[1]), {}
    with start_workers(workers) as pool:
        results = as_they_come(work, jobs, pool, workers)
        for (setting, seed, *_), measured in tqdm(results, total=len(jobs), unit=" runs"):
            name = {"setting": setting.command, "seed": seed}
            rows[seed, setting.command] = [name | row for row in measured]
    tables = {}
    for name, claim in claims.items():
        ends = {}
        for setting in claim.settings:
            ends[setting.command] = max(ends.get(setting.command, 0), setting.points[-1])
        runs = itertools.product(ends.items(), claim.seeds)
        tables[name] = [
            row for (command, end), seed in runs for row in rows[seed, command] if row["step"] <= end
        ]
    return tables


def main(argv=None):
    parser = argparse.ArgumentParser("claims.py", description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("names", nargs="*", metavar="NAME", help="claims to test; see --list")
    add("--list", action="store_true", help="list the claims, and the settings of each")
    add("--table", action="store_true", help="no training: print the tables of what was measured before")
    add(
        "--extra", choices=[*EXTRA], help="a table of another kind: translations without a network, and so on"
    )
    add("--quick", action="store_true", help="into runs/quick, in minutes, and not to be quoted")
    add("--fp32", action="store_true", help="no bf16: for processors that do not compute in it")
    add("--device", default="auto", help="auto takes cuda, then mps, then cpu; or any torch device string")
    add("--jobs", type=int, help="runs side by side; None: one for each core on the CPU, else one")
    args = parser.parse_args(argv)
    for name in args.names:
        if name not in CLAIMS:
            parser.error(f"{name}: no such claim; give one of {', '.join(CLAIMS)}")
    claims = {name: CLAIMS[name] for name in args.names or (CLAIMS if args.list or args.table else ())}
    if args.fp32 and not args.table:  # a table is in the precision of its figures
        claims = {name: in_fp32(claim) for name, claim in claims.items()}
    if args.list:
        for name, claim in claims.items():
            print(f"{name}: {claim.text}")
            for setting in claim.settings:
                print(f"    {setting.label}: {setting.command}, {setting.points[-1]:,} steps")
        return
    if args.extra:
        rows = [*EXTRA[args.extra](pick_device(args.device))]
        print(f"| {' | '.join(rows[0])} |\n|{' --- |' * len(rows[0])}")
        for row in rows:
            print(f"| {' | '.join(f'{v:.4g}' if isinstance(v, float) else str(v) for v in row.values())} |")
        return
    if not claims:
        parser.error("give the NAME of a claim, or --list")
    if args.table:
        for name in filter(lambda name: (TABLES / f"{name}.csv").is_file(), claims):
            report(name, claims[name], read_rows(TABLES / f"{name}.csv"))
        return
    device = str(pick_device(args.device))
    home, tables, plots, samples = RUNS, TABLES, PLOTS, SAMPLES
    if args.quick:
        home = tables = plots = QUICK
        samples = SAMPLES // 10
        claims = {name: shortened(claim) for name, claim in claims.items()}
    workers = args.jobs or (os.cpu_count() if device == "cpu" else 1)
    # The default action would end this process alone, and leave the workers at work.
    before = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        measured = train_all(claims, home, samples, device, workers)
    except (KeyboardInterrupt, SystemExit) as end:
        status = getattr(end, "code", STOPPED[0])
        if status not in STOPPED:
            raise
        parser.exit(status, "claims.py: stopped; the same command goes on\n")
    except BrokenProcessPool:
        parser.exit(1, "claims.py: a run was killed, perhaps for want of memory; the same command goes on\n")
    finally:
        signal.signal(signal.SIGTERM, before)
    for name, rows in measured.items():
        for folder in (tables, plots):
            folder.mkdir(parents=True, exist_ok=True)
        claim = claims[name]
        write_rows(tables / f"{name}.csv", rows)
        plot(claim, rows, home, plots / f"claim_{name}.png")
        if name == claim.settings[0].script:
            curves = claim.settings[0].folder(home, claim.seeds[0]) / "losses.png"
            shutil.copyfile(curves, plots / f"claim_{name}_losses.png")
        report(name, claim, rows)


if __name__ == "__main__":
    main()
