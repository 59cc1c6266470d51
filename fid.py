"""FID, KID, precision and recall: how far is one set of images from another?

    python fid.py PATH1 PATH2                       # the FID of two folders: real images, then samples
    python fid.py mnist:test runs/dcgan_mnist/001/generated/001 --features classifier
    python fid.py cifar10:train path/to/samples --metrics fid kid is pr
    python fid.py --save-stats PATH1 stats.npz      # then: python fid.py stats.npz PATH2

    real images ──► Inception ──► one cloud of points ─────┐
                                                           ├──► how far apart are the clouds?
        samples ──► Inception ──► another cloud of points ─┘

Samples should look real, and be as varied as real images. Pixels tell neither. So each image becomes a point:
the 2048 features that a classifier, Inception v3, finds in it. The FID fits a Gaussian to each cloud of
points, N(m1, S1) and N(m2, S2), and measures how far apart the two are:

    FID = |m1 - m2|^2 + tr(S1) + tr(S2) - 2 tr((S1 S2)^(1/2))

The KID asks whether images are more alike within the two sets than across them. Precision is the share of
samples that are near some real image, recall the share of real images that are near some sample.

How they mislead. The fewer images, the larger the FID: compare equal numbers. Another way to resize or other
weights change every figure, so this script says FID for the authors' network alone. Inception has learned
from photographs: for digits, clothes and cartoon faces take --features classifier. Precision flatters blur,
and outliers inflate recall: look. And the distance hardly sees copies: 200 digits of MNIST over and over are
closer to the test set than the samples of vanilla_gan.py. Recall gives them away, and --neighbours shows
copies of training images.

Papers: Heusel et al. 2017, arXiv 1706.08500 (FID); Binkowski et al. 2018, 1801.01401 (KID); Kynkaanniemi et
al. 2019, 1904.06991 (precision, recall); Salimans et al. 2016, 1606.03498 (Inception Score).
"""

import argparse
import csv
import hashlib
import inspect
import json
import math
import os
import random
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from PIL import Image, ImageOps
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.utils.data import DataLoader
from torchvision import datasets
from torchvision.models import inception
from torchvision.transforms.functional import resize
from tqdm import tqdm

# %% Networks


def average_pool(x):
    """The mean of each 3x3 neighbourhood, in which padding does not count, unlike in torchvision's blocks."""
    return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)


def max_pool(x):
    """The largest of each 3x3 neighbourhood."""
    return F.max_pool2d(x, 3, stride=1, padding=1)


class BlockA(inception.InceptionA):
    """The block of Mixed_5b to 5d: as torchvision's, but for the pool."""

    def _forward(self, x):
        small = self.branch5x5_2(self.branch5x5_1(x))
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return [self.branch1x1(x), small, double, self.branch_pool(average_pool(x))]


class BlockC(inception.InceptionC):
    """The block of Mixed_6b to 6e: as torchvision's, but for the pool."""

    def _forward(self, x):
        single = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x)))
        double = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        double = self.branch7x7dbl_5(self.branch7x7dbl_4(double))
        return [self.branch1x1(x), single, double, self.branch_pool(average_pool(x))]


class BlockE(inception.InceptionE):
    """The block of Mixed_7b and 7c: as torchvision's, but for the pool, which is not the same in the two."""

    def __init__(self, channels, pool):
        super().__init__(channels)
        self.pool = pool

    def _forward(self, x):
        single, double = self.branch3x3_1(x), self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        single = [self.branch3x3_2a(single), self.branch3x3_2b(single)]
        double = [self.branch3x3dbl_3a(double), self.branch3x3dbl_3b(double)]
        return [self.branch1x1(x), *single, *double, self.branch_pool(self.pool(x))]


class FIDInception(inception.Inception3):
    """Prepared images (N, 3, 299, 299) to features (N, 2048) and logits (N, 1008), both fp32.

    torchvision's Inception v3 with the pools of TensorFlow's network of 2015, which the FID's authors used.
    The logits have no bias: the Inception Score is computed with these.
    """

    size = 2048

    def __init__(self):
        super().__init__(num_classes=1008, aux_logits=False, init_weights=False)
        self.Mixed_5b = BlockA(192, pool_features=32)
        self.Mixed_5c = BlockA(256, pool_features=64)
        self.Mixed_5d = BlockA(288, pool_features=64)
        self.Mixed_6b = BlockC(768, channels_7x7=128)
        self.Mixed_6c = BlockC(768, channels_7x7=160)
        self.Mixed_6d = BlockC(768, channels_7x7=160)
        self.Mixed_6e = BlockC(768, channels_7x7=192)
        self.Mixed_7b = BlockE(1280, average_pool)
        self.Mixed_7c = BlockE(2048, max_pool)
        self.eval()

    def prepare(self, images):
        """uint8 images (N, C, H, W), grey or colour, as (N, 3, 299, 299) in [-1, 1]."""
        images = images.expand(-1, 3, -1, -1).float() / 255
        return F.interpolate(images, (299, 299), mode="bilinear", align_corners=False) * 2 - 1

    def forward(self, x):
        x = x.to(self.fc.weight.dtype, memory_format=torch.channels_last)
        for block in list(self.children())[:-3]:  # all but the last pool, dropout and fc
            x = block(x)
        features = x.float().mean((2, 3))
        return features, features @ self.fc.weight.float().T

    def fuse(self):
        """Fold batch normalisation, which is fixed by now, into the convolutions before it."""
        for layer in self.modules():
            if isinstance(layer, inception.BasicConv2d):
                layer.conv, layer.bn = fuse_conv_bn_eval(layer.conv, layer.bn), nn.Identity()
        return self.to(memory_format=torch.channels_last)


class Classifier(nn.Module):
    """Prepared images (N, 1, 28, 28) to features (N, 128) and logits (N, 10) of ten classes, both fp32."""

    size = 128

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1, bias=False),  # (N, 32, 28, 28)
            nn.BatchNorm2d(32),
            nn.ReLU(),
            nn.MaxPool2d(2),  # (N, 32, 14, 14)
            nn.Conv2d(32, 64, 3, padding=1, bias=False),  # (N, 64, 14, 14)
            nn.BatchNorm2d(64),
            nn.ReLU(),
            nn.MaxPool2d(2),  # (N, 64, 7, 7)
            nn.Conv2d(64, 128, 3, padding=1, bias=False),  # (N, 128, 7, 7)
            nn.BatchNorm2d(128),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(128 * 7 * 7, 128),  # (N, 128)
            nn.ReLU(),
        )
        self.fc = nn.Linear(128, 10)

    def prepare(self, images):
        """uint8 images (N, C, H, W) as (N, 1, 28, 28) in [0, 1]; of 32x32, the padding is cut off."""
        x = images.float().mean(1, keepdim=True) / 255
        if x.shape[2:] == (32, 32):
            return x[:, :, 2:-2, 2:-2]
        return F.interpolate(x, (28, 28), mode="bilinear", antialias=True) if x.shape[2:] != (28, 28) else x

    def forward(self, x):
        features = self.layers(x.to(self.fc.weight.dtype))
        return features.float(), self.fc(features).float()

    def loss(self, logits, labels):
        """The cross-entropy of logits (N, 10) and classes (N,)."""
        return F.cross_entropy(logits, labels)

    def accuracy(self, logits, labels):
        """The share of images whose likeliest class is the right one."""
        return (logits.argmax(1) == labels).double().mean().item()


class FaceClassifier(Classifier):
    """Prepared faces (N, 3, 64, 64) to features (N, 128) and logits, both fp32.

    What is on a face is several attributes, each with classes of its own: `classes` says how many. Their
    logits stand side by side, (N, sum(classes)).
    """

    def __init__(self, classes):
        nn.Module.__init__(self)
        self.classes, widths = list(classes), (3, 32, 64, 128, 256)
        self.layers = nn.Sequential()
        for wide, wider in zip(widths, widths[1:]):  # (N, 32, 32, 32), ... (N, 256, 4, 4)
            self.layers.append(nn.Conv2d(wide, wider, 4, stride=2, padding=1, bias=False))
            self.layers.extend([nn.BatchNorm2d(wider), nn.ReLU()])
        self.layers.extend([nn.Flatten(), nn.Linear(4096, 128), nn.ReLU()])
        self.fc = nn.Linear(128, sum(classes))

    def prepare(self, images):
        """uint8 images (N, C, H, W), grey or colour, as (N, 3, 64, 64) in [0, 1]."""
        x = images.expand(-1, 3, -1, -1).float() / 255
        return F.interpolate(x, (64, 64), mode="bilinear", antialias=True) if x.shape[2:] != (64, 64) else x

    def loss(self, logits, labels):
        """The sum over all attributes of the cross-entropy; labels (N, attributes)."""
        pairs = zip(logits.split(self.classes, 1), labels.T)
        return sum(F.cross_entropy(part, attribute) for part, attribute in pairs)

    def accuracy(self, logits, labels):
        """The mean over all attributes of the share of faces whose likeliest class is the right one."""
        guesses = torch.stack([part.argmax(1) for part in logits.split(self.classes, 1)], 1)
        return (guesses == labels).double().mean().item()


# %% Metrics


class Moments:
    """Mean (size,) and covariance (size, size) of rows that come in batches, in float64.

    Two sets are merged as Chan et al. 1979 do, so that nothing large is subtracted.
    """

    def __init__(self, size, device="cpu"):
        self.count = 0
        self.mean = torch.zeros(size, dtype=torch.float64, device=device)
        self.scatter = torch.zeros(size, size, dtype=torch.float64, device=device)

    def add(self, rows):
        """Take in a batch (N, size)."""
        rows = rows.to(self.mean)
        centred = rows - rows.mean(0)
        self.scatter.addmm_(centred.T, centred)
        self.shift(len(rows), rows.mean(0))

    def merge(self, other):
        """Take in all that another Moments has seen."""
        self.scatter += other.scatter
        self.shift(other.count, other.mean)

    def shift(self, count, mean):
        """Move to the mean of both sets, of which the scatter is already the sum about their own means."""
        delta, total = mean - self.mean, self.count + count
        self.scatter.addr_(delta, delta, alpha=self.count * count / total)
        self.mean += delta * (count / total)
        self.count = total

    def covariance(self):
        """The unbiased estimate, as numpy.cov and torch.cov make it."""
        return self.scatter / (self.count - 1)


def factor(sigma):
    """A matrix A (D, rank) with A A' = sigma, for a symmetric sigma (D, D) that is positive semidefinite."""
    triangle, failed = torch.linalg.cholesky_ex(sigma)
    pivots = triangle.diagonal()
    if not failed and pivots.min() > 1e-3 * pivots.max():
        return triangle
    values, vectors = torch.linalg.eigh(sigma)
    there = values > len(values) * torch.finfo(values.dtype).eps * values[-1]
    return vectors[:, there] * values[there].sqrt()


def frechet_distance(mu1, sigma1, mu2, sigma2):
    """The squared 2-Wasserstein distance of two Gaussians, a scalar tensor (Heusel et al., equation 6).

    Means (D,) and covariances (D, D), float64. Raises RuntimeError if the sizes differ. The trace of the root
    needs no root of a matrix: if S1 = A A^T and S2 = B B^T, it is the sum of the singular values of A^T B.
    """
    product = factor(sigma1).T @ factor(sigma2)
    # The squares of its singular values. Rounding can make the smallest negative; their roots do not count.
    squares = torch.linalg.eigvalsh(product @ product.T).clamp(min=0)
    distance = (mu1 - mu2).square().sum() + sigma1.trace() + sigma2.trace() - 2 * squares.sqrt().sum()
    return distance.clamp(min=0)


def squared_mmd(x, y):
    """The unbiased estimate of the KID from features x (M, D) and y (N, D); it can be negative.

    E[k(x, x')] + E[k(y, y')] - 2 E[k(x, y)] with k(x, y) = (x.y / D + 1)^3 (Binkowski et al. 2018).
    """

    def kernel(a, b):
        return (a @ b.T / a.shape[1] + 1) ** 3

    def within(a):
        k = kernel(a, a)
        return (k.sum() - k.trace()) / (len(a) * (len(a) - 1))

    return within(x) + within(y) - 2 * kernel(x, y).mean()


def kernel_distance(x, y, subsets=100, size=1000):
    """Mean and standard deviation of the KID over random subsets of both, of `size` rows if there are."""
    size, rng = min(size, len(x), len(y)), stream("cpu", "subsets")
    picks = [[torch.randperm(len(set_), generator=rng)[:size] for set_ in (x, y)] for _ in range(subsets)]
    values = torch.stack([squared_mmd(x[i].double(), y[j].double()) for i, j in picks])
    return values.mean().item(), values.std(correction=0).item()


def squared_distances(x, y, rows=500):
    """The squared distances of x (M, D) to y (N, D), float64, as tensors (rows, N) for some rows of x each.

    What is too small for features in fp32 to tell from 0 is 0, so that copies are at distance 0.
    """
    y = y.double()
    for part in x.double().split(rows):
        lengths = part.square().sum(1, keepdim=True) + y.square().sum(1)
        squares = torch.addmm(lengths, part, y.T, alpha=-2)
        yield squares.masked_fill_(squares < 1e-12 * lengths, 0)


def squared_radii(x, k):
    """The squared distance of each row of x (N, D) to the kth nearest of the other rows, (N,)."""
    return torch.cat([part.topk(k + 1, largest=False).values[:, k] for part in squared_distances(x, x)])


def precision_recall(real, fake, k=3):
    """Precision and recall of fake images against real ones, from features (M, D) of real, (N, D) of fake.

    Each image has a ball that reaches to its kth nearest neighbour in its own set. Precision is the share of
    fakes in the ball of a real image, recall the share of real images in the ball of a fake (Kynkaanniemi et
    al. 2019, equation 1). Raises RuntimeError if a set has not more than k images.
    """
    real_radii, fake_radii, precise = squared_radii(real, k), squared_radii(fake, k), []
    recalled = torch.zeros(len(real), dtype=torch.bool, device=real.device)
    for squares, radii in zip(squared_distances(fake, real, 500), fake_radii.split(500)):
        precise.append((squares <= real_radii).any(1))
        recalled |= (squares <= radii[:, None]).any(0)
    return torch.cat(precise).double().mean().item(), recalled.double().mean().item()


def inception_score(logits, splits=10):
    """Mean and standard deviation of the Inception Score of logits (N, classes) over equal parts of them.

    exp E[KL(p(c|i) || p(c))], from 1 to the number of classes; KL is the Kullback-Leibler divergence between
    the classes' probabilities of an image i and their mean over all images (Salimans et al. 2016).
    """
    scores = []
    for part in logits.double().tensor_split(min(splits, len(logits))):
        log_p = part.log_softmax(1)
        marginal = log_p.logsumexp(0) - math.log(len(part))
        scores.append((log_p.exp() * (log_p - marginal)).sum(1).mean().exp())
    scores = torch.stack(scores)
    return scores.mean().item(), scores.std(correction=0).item()


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


# %% Plumbing

SCRIPT = Path(__file__).stem
IDX = [f"{part}-{kind}-ubyte" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")]
CIFAR = [*(f"data_batch_{number}" for number in range(1, 6)), "test_batch", "batches.meta"]
DATASETS = {  # torchvision's class, the folder where it looks, and the files there
    "mnist": (datasets.MNIST, "MNIST/raw", IDX),
    "fashion_mnist": (datasets.FashionMNIST, "FashionMNIST/raw", IDX),
    "cifar10": (datasets.CIFAR10, datasets.CIFAR10.base_folder, CIFAR),
}
TEN_CLASSES = "mnist", "fashion_mnist"  # which class_report counts
LABELLED = (*TEN_CLASSES, "faces")  # what --features classifier knows
SETS = (*DATASETS, "faces")
SUFFIXES = ".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"
CACHE = Path("data", "cache")  # trained classifiers
RELEASE = "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
RELEASED = "6726825d"  # the first digits of the SHA-256 of the released weights
WEIGHTS = f"pt_inception-2015-12-05-{RELEASED}.pth"


def fail(message, status=2):
    """End the program with one line on stderr, clear of the progress bar."""
    tqdm.write(f"{SCRIPT}.py: {message}", file=sys.stderr)
    raise SystemExit(status)


def warn(message):
    """One line on stderr, clear of the progress bar."""
    tqdm.write(f"{SCRIPT}.py: {message}", file=sys.stderr)


def stream(device, *key):
    """A random generator that follows from `key` alone: the same call picks the same images."""
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


def open_faces(folder, part):
    """The cartoon faces of the part train or test: uint8 (N, 3, 64, 64), and their classes (N, attributes).

    They lie on sheets of 32 rows of 32 faces, and the classes of each attribute in a table.
    """
    sheets, tables = sorted(folder.glob(f"{part}_??.webp")), []
    try:
        for table in ("train", part):
            with open(folder / f"{table}.csv", newline="") as file:
                tables.append([list(row.values())[1:] for row in csv.DictReader(file)])  # all but its number
        faces = np.stack([np.asarray(Image.open(sheet)) for sheet in sheets]).reshape(-1, 32, 64, 32, 64, 3)
        names = [sorted({*column}) for column in zip(*tables[0])]
        labels = [[classes.index(name) for classes, name in zip(names, row)] for row in tables[1]]
        if len(labels) != 1024 * len(faces):
            raise ValueError(f"{len(faces)} sheets, but {len(labels)} rows of attributes")
    except (OSError, ValueError) as error:
        hint = "copy data/faces of this script's repository there"
        fail(f"--data-dir: {folder} is not whole; {hint} ({error!r:.100})")
    images = torch.from_numpy(faces).permute(0, 1, 3, 5, 2, 4).reshape(-1, 3, 64, 64)
    return images, torch.tensor(labels)


def images_and_labels(name, data_dir, train=True):
    """A data set as uint8 images (N, C, H, W) and classes (N,), of faces (N, attributes)."""
    if name == "faces":
        return open_faces(Path(data_dir, name), "train" if train else "test")
    dataset = open_dataset(name, data_dir, train)
    images, labels = torch.as_tensor(dataset.data), torch.as_tensor(dataset.targets)
    return images.permute(0, 3, 1, 2) if images.ndim == 4 else images[:, None], labels


def open_images(path, args):
    """What `path` names, shuffled: files or uint8 images (N, C, H, W); their classes or None; their order."""
    name, _, split = path.partition(":")
    if name in SETS:
        if split not in ("", "train", "test"):
            fail(f"{path}: no such part of a data set; give {name}:train or {name}:test")
        images, labels = images_and_labels(name, args.data_dir, split != "test")
    elif not Path(path).is_dir():
        fail(f"{path}: neither a folder nor a .npz file; give one, or a data set ({', '.join(SETS)})")
    else:
        images = sorted(file for file in Path(path).rglob("*") if file.suffix.lower() in SUFFIXES)
        parents = [file.relative_to(path).parts[0] for file in images]
        labels = torch.tensor([int(name) for name in parents]) if {*parents} <= {*"0123456789"} else None
    least = 4 if args.neighbours or "pr" in args.metrics else 2  # three neighbours of each
    if min(len(images), args.num_images or least) < least:
        fail(f"{path}: {len(images)} images; take {least} or more, of {', '.join(SUFFIXES)}")
    order = torch.randperm(len(images), generator=stream("cpu", "images"))[: args.num_images]
    images = images[order] if torch.is_tensor(images) else [images[i] for i in order]
    return images, labels if labels is None else labels[order], order


def to_rgb(image):
    """A picture of any mode in RGB: upright as EXIF says, 16 bits made 8, transparent parts white."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16 bits of grey
        image = image.point(lambda value: value / 257 + 0.5).convert("L")
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == "RGB" else image.convert("RGB")


def count_cores():
    """How many processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def read_all(paths):
    """Arrays (N, H, W, 3), one if all sizes are equal; or the name of the first file that cannot be read."""
    images = []
    for path in paths:
        try:
            with Image.open(path) as image:
                images.append(np.asarray(to_rgb(image))[None])
        except Exception:  # its type depends on the format and the damage
            return str(path)
    return [np.concatenate(images)] if len({image.shape for image in images}) == 1 else images


def batches(images, size):
    """Lists of uint8 tensors (N, C, H, W), `size` images a list; other processes read the files ahead."""
    if torch.is_tensor(images):
        yield from ([batch] for batch in images.split(size))
        return
    workers = max(1, min(8, count_cores() - 1))
    for arrays in DataLoader(images, size, num_workers=workers, collate_fn=read_all):
        if isinstance(arrays, str):
            fail(f"{arrays}: cannot be read as an image; replace or remove it")
        yield [torch.from_numpy(array).permute(0, 3, 1, 2) for array in arrays]


def ahead(items):
    """The items, none of them None; another thread makes the next one while the caller uses the last.

    The first is made here, so that the processes that read files start from this thread.
    """
    items = iter(items)
    item = next(items, None)
    with ThreadPoolExecutor(1) as thread:
        while item is not None:
            coming = thread.submit(next, items, None)
            yield item
            item = coming.result()


@dataclass
class Measured:
    """What is known of a set of images. Statistics from a file have no count, and no features or logits."""

    path: str
    mu: torch.Tensor  # (D,), float64
    sigma: torch.Tensor  # (D, D), float64
    weights: str | None
    count: int | None = None
    labels: torch.Tensor | None = None  # (N,)
    features: torch.Tensor | None = None  # (N, D), if the KID, precision and recall, or a picture needs them
    logits: torch.Tensor | None = None  # (N, classes), if the Inception Score or the classifier's report does
    images: torch.Tensor | list | None = None  # uint8 (N, C, H, W), or files
    order: torch.Tensor | None = None  # (N,), where each image was before they were shuffled


@torch.inference_mode()
def measure(path, images, labels, order, network, weights, args, device):
    """The Measured of images, their labels and their order, as open_images returns them."""
    moments = Moments(network.size, "cpu" if device.type == "mps" else device)  # mps has no float64
    features, logits = [], []
    with tqdm(desc=path, total=len(images), unit=" images") as bar:
        lists = batches(images, args.batch_size)
        for x in ahead(torch.cat([network.prepare(part.to(device)) for part in parts]) for parts in lists):
            outputs = network(x)
            moments.add(outputs[0])
            if {"kid", "pr"} & {*args.metrics} or args.features == "classifier" or args.neighbours:
                features.append(outputs[0])
            if "is" in args.metrics or args.features == "classifier":
                logits.append(outputs[1])
            bar.update(len(outputs[0]))
    mu, sigma = moments.mean.cpu(), moments.covariance().cpu()
    if not (mu.isfinite().all() and sigma.isfinite().all()):
        fail(f"{path}: some features are not finite; the weights are not those of this network")
    if len(images) < network.size:
        few = f"{len(images)} images are fewer than the {network.size} features"
        warn(f"{path}: {few}: the estimate of the Frechet distance is far too large")
    features, logits = (torch.cat(rows).cpu() if rows else None for rows in (features, logits))
    weights = f"{weights} in bf16" if args.precision == "bf16" else weights
    return Measured(path, mu, sigma, weights, len(images), labels, features, logits, images, order)


def load_stats(path):
    """What `save_stats` or pytorch-fid has written; its number of images is not known.

    Files of pytorch-fid do not say what weights they come from, and figures from them are not called FID.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            mu, sigma = (torch.from_numpy(file[name].astype(np.float64)) for name in ("mu", "sigma"))
            weights = str(file["weights"]) if "weights" in file else None
    except KeyError as error:
        fail(f"{path}: no array of that name: {error}; a file of statistics has mu and sigma")
    except Exception as error:  # its type depends on the damage
        fail(f"{path}: cannot be read as .npz with the arrays mu and sigma ({error!r:.100})")
    if mu.ndim != 1 or sigma.shape != (len(mu), len(mu)):
        fail(f"{path}: mu {tuple(mu.shape)} and sigma {tuple(sigma.shape)} do not fit; give (D,) and (D, D)")
    if not (mu.isfinite().all() and sigma.isfinite().all()):
        fail(f"{path}: some of its numbers are not finite; make it again")
    return Measured(path, mu, sigma, weights)


def save_stats(path, stats):
    """Write mu and sigma as pytorch-fid does, and beside them what weights they come from."""
    np.savez_compressed(path, mu=stats.mu.numpy(), sigma=stats.sigma.numpy(), weights=stats.weights)


def load_weights(network, path):
    """Fill `network` from a file of weights. Returns the first eight hexadecimal digits of its SHA-256."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        wrong = network.load_state_dict(state, strict=False, assign=True)
    except Exception as error:  # its type depends on the damage, and on which keys there are
        reason = " ".join(str(error).split())
        fail(f"{path}: not weights of this network, or damaged; replace it ({reason:.200})")
    # Batch normalisation's count of batches, which nothing here uses, came later than the released file.
    missing = [name for name in wrong.missing_keys if not name.endswith("num_batches_tracked")]
    if missing or wrong.unexpected_keys:
        odd = ", ".join(missing[:3] or wrong.unexpected_keys[:3])
        what = "missing" if missing else "not in this network"
        fail(f"{path}: weights of another network ({odd} ... {what}); the right file is {RELEASE}{WEIGHTS}")
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:8]


def load_inception(path):
    """The FIDInception with the weights in the file `path`, or the released ones; and their hash."""
    if path is None:
        path = Path(torch.hub.get_dir(), "checkpoints", WEIGHTS)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if not path.is_file():
                torch.hub.download_url_to_file(RELEASE + WEIGHTS, path, hash_prefix=RELEASED)
        except Exception as error:  # its type depends on the network between here and there
            fail(
                f"{path} is not there and cannot be fetched; put {RELEASE}{WEIGHTS} there (fid.py also takes "
                f"--weights FILE, and for digits, clothes and faces --features classifier: {error!r:.100})"
            )
    with torch.device("meta"):  # no numbers yet: the file has them
        network = FIDInception()
    weights = load_weights(network, path)
    return network.fuse(), weights


def load_classifier(name, data_dir, device):
    """The classifier of the data set `name`, trained on the first use and then cached; and its hash."""
    images, labels = images_and_labels(name, data_dir)
    network = Classifier() if name in TEN_CLASSES else FaceClassifier((labels.amax(0) + 1).tolist())
    recipe = inspect.getsource(type(network)) + inspect.getsource(train_classifier)
    key = hashlib.sha256(recipe.encode() + images.numpy().tobytes() + labels.numpy().tobytes()).hexdigest()
    cache = CACHE / f"classifier-{name}-{key[:12]}.pt"
    if not cache.is_file():
        warn(f"training a classifier of {name}, once; it is kept in {CACHE}")
        epochs = 4 if name in TEN_CLASSES else 10
        train_classifier(network.to(device), images.to(device), labels.to(device), epochs)
        tests, classes = images_and_labels(name, data_dir, train=False)
        with torch.inference_mode():
            logits = torch.cat([network(network.prepare(part.to(device)))[1] for part in tests.split(500)])
        accuracy = network.accuracy(logits.cpu(), classes)
        warn(f"its accuracy on the {len(tests):,} test images of {name}: {accuracy:.2%}")
        CACHE.mkdir(parents=True, exist_ok=True)
        partial = cache.with_suffix(f".{os.getpid()}")
        torch.save(network.state_dict(), partial)
        os.replace(partial, cache)
    weights = load_weights(network, cache)
    return network.eval(), weights


def train_classifier(network, images, labels, epochs, batch_size=128):
    """Fit the network to uint8 images (N, C, H, W) and the classes that its loss takes, all on one device."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for layer in network.modules():
            if hasattr(layer, "reset_parameters"):
                layer.reset_parameters()
    optimizer = torch.optim.Adam(network.parameters(), fused=True)
    total = epochs * math.ceil(len(images) / batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=total)
    network.train()
    with tqdm(desc="training the classifier", total=epochs * len(images), unit=" images") as bar:
        for epoch in range(epochs):
            order = torch.randperm(len(images), generator=stream("cpu", "classifier", epoch))
            for index in order.to(images.device).split(batch_size):
                loss = network.loss(network(network.prepare(images[index]))[1], labels[index])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                bar.update(len(index))
    network.eval()


def show_neighbours(path, first, second, count=16):
    """Write a picture: the first `count` images of `second`, each beside its three nearest of `first`."""
    chosen = second.order.argsort()[:count]
    squares = torch.cat([*squared_distances(second.features[chosen], first.features)])
    nearest = squares.topk(3, largest=False).indices

    def tile(images, index):
        if not torch.is_tensor(images):
            with Image.open(images[index]) as image:
                image = to_rgb(image)
        else:
            image = Image.fromarray(images[index].expand(3, -1, -1).permute(1, 2, 0).numpy())
        return ImageOps.fit(image, (64, 64), Image.Resampling.BILINEAR)

    rows = math.ceil(len(chosen) / 2)
    sheet = Image.new("RGB", (2 * 280, rows * 66), "white")
    for number, index in enumerate(chosen.tolist()):
        left, top = 280 * (number // rows), 66 * (number % rows)
        sheet.paste(tile(second.images, index), (left, top))
        for column, neighbour in enumerate(nearest[number].tolist(), 1):
            sheet.paste(tile(first.images, neighbour), (left + 8 + 66 * column, top))
    sheet.save(path)


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
    """The settings, checked."""
    style, summary = argparse.ArgumentDefaultsHelpFormatter, __doc__.split("\n")[0]
    parser = argparse.ArgumentParser(f"{SCRIPT}.py", description=summary, formatter_class=style)
    parser.error = fail
    add = parser.add_argument
    sets = ", ".join(SETS)
    add("paths", nargs="*", metavar="PATH", help=f"a folder of images, a .npz file, or one of {sets}[:test]")
    add("--save-stats", nargs=2, metavar=("PATH", "OUT.npz"), help="only write the statistics of PATH")
    add(
        "--metrics",
        nargs="+",
        choices=["fid", "kid", "is", "pr"],
        default=["fid"],
        help="pr: precision, recall",
    )
    add("--neighbours", metavar="OUT.png", help="draw 16 images of PATH 2, each beside the nearest of PATH 1")
    add("--features", choices=["inception", "classifier"], default="inception", help="what to compare")
    add("--dataset", choices=LABELLED, help="whose classifier; None: that of the PATHs")
    add("--data-dir", default="data", help="where the data sets are")
    add("--weights", metavar="FILE", help=f"a file {WEIGHTS}; None: torch.hub's, downloaded if it is missing")
    add("--num-images", type=int, metavar="N", help="take N images of each path at random")
    add("--batch-size", type=int, default=50, help="images per step")
    add("--device", default="auto", help="auto takes cuda, then mps, then cpu; or any torch device string")
    add("--precision", choices=["fp32", "bf16"], default="fp32", help="of the network")
    add("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args(argv)

    if len(args.paths) != (0 if args.save_stats else 2):
        fail("give two paths to compare, or --save-stats PATH OUT.npz alone")
    for name, least in (("batch_size", 1), ("num_images", 2)):
        if vars(args)[name] is not None and vars(args)[name] < least:
            fail(f"--{name.replace('_', '-')}: {vars(args)[name]} is too small; give {least} or more")
    if args.save_stats:
        args.paths, out = args.save_stats[:1], Path(args.save_stats[1])
        if out.suffix != ".npz" or out.exists() or not out.parent.is_dir():
            fail(f"--save-stats: {out}: name a new file that ends in .npz, in a folder that is there")
        if args.paths[0].endswith(".npz"):
            fail(f"--save-stats: {args.paths[0]} is statistics already; give images")
    for path in args.paths:
        if path.endswith(".npz") and not Path(path).is_file():
            fail(f"{path}: no such file; give a .npz with mu and sigma, a folder, or a data set ({sets})")
        if path.endswith(".npz") and {"kid", "is", "pr"} & {*args.metrics}:
            fail(f"--metrics: {' '.join(args.metrics)} need images, and {path} has none; leave them out")
    if args.neighbours:
        out = Path(args.neighbours)
        if out.suffix != ".png" or out.exists() or not out.parent.is_dir():
            fail(f"--neighbours: {out}: name a new file that ends in .png, in a folder that is there")
        if args.save_stats or any(path.endswith(".npz") for path in args.paths):
            fail("--neighbours: a picture needs images on both sides; leave it out, or give two folders")
    if args.features == "classifier":
        named = {path.partition(":")[0] for path in args.paths} & {*LABELLED}
        if args.dataset is None and len(named) != 1:
            fail(f"--dataset: --features classifier needs {', '.join(LABELLED)}, and no PATH tells which")
        args.dataset = args.dataset or named.pop()
        if args.weights:
            fail("--weights: these are for --features inception; the classifier trains its own")
    return args


# %% Main


def compare(first, second, args):
    """All that was asked for, and what it was measured on, as a dictionary ready for JSON."""
    if len(first.mu) != len(second.mu):
        sizes = f"{len(first.mu)} features an image and {second.path} {len(second.mu)}"
        fail(f"{first.path} has {sizes}; make both with the same network")
    known = {stats.weights for stats in (first, second)} - {None}
    if len(known) > 1:
        fail(f"{first.path} and {second.path} come from different weights ({', '.join(sorted(known))})")
    is_fid = first.weights == second.weights == RELEASED and len(first.mu) == FIDInception.size
    result = {}
    if "fid" in args.metrics:
        distance = frechet_distance(first.mu, first.sigma, second.mu, second.sigma)
        result["fid" if is_fid else "frechet_distance"] = distance.item()
    if "kid" in args.metrics:
        result["kid"], result["kid_std"] = kernel_distance(first.features, second.features)
    if "is" in args.metrics:
        scores = [inception_score(stats.logits) for stats in (first, second)]
        result["is"], result["is_std"] = (list(values) for values in zip(*scores))
    enough = min(first.count or 0, second.count or 0) > 3
    if "pr" in args.metrics or args.features == "classifier" and enough:
        result["precision"], result["recall"] = precision_recall(first.features, second.features)
    if args.features == "classifier" and args.dataset in TEN_CLASSES:
        reports = [class_report(s.logits, s.labels) if s.count else {} for s in (first, second)]
        names = "classes", "entropy", "confidence", "class_accuracy"
        result |= {name: [report.get(name) for report in reports] for name in names}
    result |= {"paths": [first.path, second.path], "images": [first.count, second.count]}
    features = f"{args.dataset} classifier" if args.features == "classifier" else args.features
    if not (is_fid or first.count or second.count):
        features = "stored"  # of an origin that nobody checked
    weights = first.weights if first.weights == second.weights else None
    return result | {"features": features, "weights": weights, "is_fid": is_fid}


class Judge:
    """Measures samples while a script trains, as this script does: figures for --fid-every.

    Digits and clothes are compared with their test set. Faces, whose test set is small, are compared with
    their training set, so that copies would do best: see --neighbours. All else is compared by Inception's
    features, with 10,000 of the training `images`, uint8 (N, C, H, W).
    """

    def __init__(self, dataset, images, device, data_dir="data"):
        labelled, path = dataset in LABELLED, f"{dataset}:{'test' if dataset in TEN_CLASSES else 'train'}"
        flags = ["--features", "classifier", "--dataset", dataset] if labelled else ["--metrics", "fid", "pr"]
        self.args = parse_args([path, "samples", *flags, "--data-dir", str(data_dir)])
        self.device, side = torch.device(device), images.shape[-1]
        if labelled:
            images, _ = images_and_labels(dataset, data_dir, train=dataset not in TEN_CLASSES)
            if side == 64 != images.shape[-1]:  # as dcgan64_celeba.py makes them: resizing changes features
                images = resize(images, [64, 64], antialias=True)
        if len(images) < 4:  # three neighbours of each
            fail(f"--fid-every: {len(images)} images are too few to measure samples; leave it out")
        order = torch.randperm(len(images), generator=stream("cpu", "images"))[:10_000]
        self.real = images[order.to(images.device)].cpu()
        loaded = load_classifier(dataset, data_dir, self.device) if labelled else load_inception(None)
        self.network, self.weights = loaded
        self.network.to(self.device)
        self.reference = self.measure(path, self.real)

    def measure(self, path, images, labels=None):
        return measure(path, images, labels, None, self.network, self.weights, self.args, self.device)

    def __call__(self, images):
        """The distance, precision and recall of uint8 images (N, C, H, W)."""
        result = compare(self.reference, self.measure("samples", images), self.args)
        return result.get("fid", result.get("frechet_distance")), result["precision"], result["recall"]


def track(judge, draw, folder, epoch, count=10_000):
    """Measure `count` samples after an epoch of training: a row of distances.csv, distance.png, a line.

    `judge` is a Judge, and draw(n) makes n images (n, C, H, W) in [0, 1], of the same noise each time.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        images = draw(count)
    values = judge((images * 255).round().to(torch.uint8))
    path = Path(folder, "distances.csv")
    rows = np.loadtxt(path, delimiter=",", skiprows=1, ndmin=2).tolist() if path.exists() else []
    rows = [row for row in rows if row[0] < epoch] + [[epoch, *values]]  # a resumed run may repeat an epoch
    header = "epoch,distance,precision,recall"
    np.savetxt(path.with_suffix(".tmp"), rows, "%.6g", ",", header=header, comments="")
    os.replace(path.with_suffix(".tmp"), path)
    figure = Figure(figsize=(8, 4.8), layout="constrained")
    above, below = figure.subplots(2)
    epochs, distances, precisions, recalls = np.transpose(rows)
    above.plot(epochs, distances, ".-", label="distance")
    below.plot(epochs, precisions, ".-", label="precision")
    below.plot(epochs, recalls, ".-", label="recall")
    for axis in above, below:
        axis.set(xlabel="epoch", ylim=(0, None))
        axis.locator_params("x", integer=True)
        axis.legend()
    figure.savefig(Path(folder, "distance.png"))
    distance, precision, recall = values
    print(f"  distance {distance:.1f}  precision {precision:.3f}  recall {recall:.3f}", flush=True)


def show(result):
    """Print it for people."""
    if "fid" in result:
        print(f"FID: {result['fid']:.6g}")
    if "frechet_distance" in result:
        print(f"Frechet distance: {result['frechet_distance']:.6g}")
    if "kid" in result:
        print(f"KID: {result['kid']:.6g}, standard deviation {result['kid_std']:.2g} over subsets")
    if "precision" in result:
        print(f"precision {result['precision']:.3f}, recall {result['recall']:.3f}")
    for path, score, spread in zip(result["paths"], result.get("is", ()), result.get("is_std", ())):
        print(f"Inception Score of {path}: {score:.6g}, standard deviation {spread:.2g} over parts")
    for i, path in enumerate(result["paths"] if "classes" in result else ()):
        if result["images"][i]:
            line = f"{path}: {result['classes'][i]} of 10 classes, entropy {result['entropy'][i]:.3f}"
            line += f", confidence {result['confidence'][i]:.3f}"
            if result["class_accuracy"][i] is not None:
                line += f", class accuracy {result['class_accuracy'][i]:.3f}"
            print(line)
    if not result["is_fid"]:
        origin = f"{result['features']} features (weights {result['weights'] or 'of unknown origin'})"
        print(f"on {origin}: not known to be the FID Inception's, so do not compare it with any FID")


def main(argv=None):
    args = parse_args(argv)
    device = pick_device(args.device)
    torch.backends.cudnn.allow_tf32 = False  # fp32 is fp32 in convolutions, too
    # All paths before the network, which may take minutes to train or to fetch.
    sets = [load_stats(path) if path.endswith(".npz") else open_images(path, args) for path in args.paths]
    if not all(isinstance(found, Measured) for found in sets):
        if args.features == "classifier":
            network, weights = load_classifier(args.dataset, args.data_dir, device)
        else:
            network, weights = load_inception(args.weights)
        network.to(device, torch.bfloat16 if args.precision == "bf16" else torch.float32)
    measured = [
        found if isinstance(found, Measured) else measure(path, *found, network, weights, args, device)
        for path, found in zip(args.paths, sets)
    ]
    if args.save_stats:
        save_stats(args.save_stats[1], *measured)
        print(f"mu and sigma of {measured[0].count} images in {args.save_stats[1]}")
        return
    if args.neighbours:
        show_neighbours(args.neighbours, *measured)
    if args.json:
        print(json.dumps(compare(*measured, args)))
    else:
        show(compare(*measured, args))


if __name__ == "__main__":
    main()
