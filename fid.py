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
import hashlib
import json
import math
import os
import random
import sys
from collections import Counter
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from PIL import Image, ImageOps
from torch import accelerator, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torchvision import datasets
from torchvision.models import inception
from torchvision.transforms.functional import resize
from torchvision.utils import save_image
from tqdm import tqdm

# %% Networks
AVERAGE_POOL = nn.AvgPool2d(3, 1, 1, count_include_pad=False)  # unlike in torchvision's blocks


class BlockA(inception.InceptionA):
    """The block of Mixed_5b to 5d: as torchvision's, but for the pool."""

    def _forward(self, x):
        small = self.branch5x5_2(self.branch5x5_1(x))
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return [self.branch1x1(x), small, double, self.branch_pool(AVERAGE_POOL(x))]


class BlockC(inception.InceptionC):
    """The block of Mixed_6b to 6e: as torchvision's, but for the pool."""

    def _forward(self, x):
        single = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x)))
        double = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        double = self.branch7x7dbl_5(self.branch7x7dbl_4(double))
        return [self.branch1x1(x), single, double, self.branch_pool(AVERAGE_POOL(x))]


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
    """Prepared images (N, 3, 299, 299) to features (N, 2048) and logits (N, 1008).

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
        self.Mixed_7b = BlockE(1280, AVERAGE_POOL)
        self.Mixed_7c = BlockE(2048, nn.MaxPool2d(3, 1, 1))
        self.eval()

    def prepare(self, images):
        """uint8 images (N, C, H, W), grey or colour, as (N, 3, 299, 299) in [-1, 1]."""
        images = images.expand(-1, 3, -1, -1).float() / 255
        return F.interpolate(images, (299, 299), mode="bilinear", align_corners=False) * 2 - 1

    def forward(self, x):
        x = x.contiguous(memory_format=torch.channels_last)  # faster convolutions
        for block in list(self.children())[:-3]:  # all but the last pool, dropout and fc
            x = block(x)
        features = x.mean((2, 3))
        return features, features @ self.fc.weight.T

    def fuse(self):
        """Fold batch normalisation, which is fixed by now, into the convolutions before it."""
        for layer in self.modules():
            if isinstance(layer, inception.BasicConv2d):
                layer.conv, layer.bn = fuse_conv_bn_eval(layer.conv, layer.bn), nn.Identity()
        return self.to(memory_format=torch.channels_last)


class Classifier(nn.Module):
    """Prepared images to features (N, 128) and logits (N, sum(classes)).

    An image has one or several attributes; `classes` says how many classes each of them has. The logits of
    all attributes stand side by side.
    """

    size = 128

    def __init__(self, layers, classes):
        super().__init__()
        self.layers = nn.Sequential(*layers)
        self.classes = classes
        self.fc = nn.Linear(128, sum(classes))

    def forward(self, x):
        features = self.layers(x)
        return features, self.fc(features)

    def loss(self, logits, labels):
        """The sum over all attributes of the cross-entropy; labels (N, attributes)."""
        losses = [F.cross_entropy(x, y) for x, y in zip(logits.split(self.classes, 1), labels.T)]
        return sum(losses)


class DigitClassifier(Classifier):
    """For digits and clothes: one attribute of ten classes."""

    def __init__(self):
        layers = [
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
        ]
        super().__init__(layers, classes=[10])

    def prepare(self, images):
        """uint8 images (N, C, H, W) as (N, 1, 28, 28) in [0, 1]; of 32x32, the padding is cut off."""
        x = images.float().mean(1, keepdim=True) / 255
        if x.shape[2:] == (32, 32):
            return x[:, :, 2:-2, 2:-2]
        return resize(x, [28, 28], antialias=True)


class FaceClassifier(Classifier):
    """For cartoon faces, whose attributes are age, hair, glasses and so on."""

    def __init__(self, classes):
        layers = []
        for width, wider in (3, 32), (32, 64), (64, 128), (128, 256):  # (N, 32, 32, 32) to (N, 256, 4, 4)
            layers += [nn.Conv2d(width, wider, 4, stride=2, padding=1, bias=False)]
            layers += [nn.BatchNorm2d(wider), nn.ReLU()]
        layers += [nn.Flatten(), nn.Linear(256 * 4 * 4, 128), nn.ReLU()]  # (N, 128)
        super().__init__(layers, classes)

    def prepare(self, images):
        """uint8 images (N, C, H, W), grey or colour, as (N, 3, 64, 64) in [0, 1]."""
        return resize(images.expand(-1, 3, -1, -1).float() / 255, [64, 64], antialias=True)


# %% Metrics
def moments(features):
    """Mean (D,) and covariance (D, D) of features (N, D), in float64; unbiased, as by numpy.cov."""
    mu = features.mean(0, dtype=torch.float64)
    sigma = torch.zeros(len(mu), len(mu), dtype=torch.float64, device=features.device)
    for rows in features.split(1000):  # float64 of all of them would take much memory
        centred = rows - mu
        sigma += centred.T @ centred
    return mu, sigma / (len(features) - 1)


def factor(sigma):
    """A matrix A (D, rank) with A A^T = sigma, for a symmetric sigma (D, D) that is positive semidefinite."""
    triangle, failed = torch.linalg.cholesky_ex(sigma)
    pivots = triangle.diagonal()
    if not failed and pivots.min() > 1e-3 * pivots.max():
        return triangle
    values, vectors = torch.linalg.eigh(sigma)  # slower, but good for a sigma that is nearly singular, too
    positive = values > len(values) * torch.finfo(values.dtype).eps * values[-1]
    return vectors[:, positive] * values[positive].sqrt()


def frechet_distance(mu1, sigma1, mu2, sigma2):
    """The squared 2-Wasserstein distance of two Gaussians, a scalar tensor, at least 0 (Heusel et al. 2017).

    Means (D,) and covariances (D, D), float64. Raises RuntimeError if the sizes differ. The trace of the root
    needs no root of a matrix: if S1 = A A^T and S2 = B B^T, it is the sum of the singular values of A^T B.
    """
    trace = torch.linalg.svdvals(factor(sigma1).T @ factor(sigma2)).sum()
    distance = (mu1 - mu2).square().sum() + sigma1.trace() + sigma2.trace() - 2 * trace
    return distance.clamp(min=0)  # rounding can make it negative


def squared_mmd(x, y):
    """The unbiased estimate of the KID from features x (M, D) and y (N, D); it can be negative.

    E[k(x, x')] + E[k(y, y')] - 2 E[k(x, y)] with k(x, y) = (x.y / D + 1)^3 (Binkowski et al. 2018).
    """

    def kernel(a, b):
        return (a @ b.T / a.shape[1] + 1) ** 3

    def within(a):  # an image and itself are no pair
        k = kernel(a, a)
        return (k.sum() - k.trace()) / (len(a) * (len(a) - 1))

    return within(x) + within(y) - 2 * kernel(x, y).mean()


def kernel_distance(x, y, subsets=100, size=1000):
    """Mean and standard deviation of the KID over random subsets of both, of `size` rows if there are."""
    size, rng, values = min(size, len(x), len(y)), stream("subsets"), []
    for _ in range(subsets):
        i = torch.randperm(len(x), generator=rng)[:size]
        j = torch.randperm(len(y), generator=rng)[:size]
        values.append(squared_mmd(x[i].double(), y[j].double()))
    values = torch.stack(values)
    return values.mean().item(), values.std(correction=0).item()


def squared_distances(x, y, rows=500):
    """The squared distances of x (M, D) to y (N, D), float64, as tensors (rows, N), one after another.

    What is too small for features in fp32 to tell from 0 is 0, so that copies are at distance 0.
    """
    y = y.double()
    for chunk in x.double().split(rows):
        lengths = chunk.square().sum(1, keepdim=True) + y.square().sum(1)
        squares = torch.addmm(lengths, chunk, y.T, alpha=-2)  # |x|^2 + |y|^2 - 2 x.y
        yield squares.masked_fill_(squares < 1e-12 * lengths, 0)


def squared_radii(x, k):
    """The squared distance of each row of x (N, D) to the kth nearest of the other rows, (N,)."""
    # The nearest of all is the row itself.
    return torch.cat([squares.topk(k + 1, largest=False).values[:, k] for squares in squared_distances(x, x)])


def precision_recall(real, fake, k=3):
    """Precision and recall of fake images against real ones, from features (M, D) of real, (N, D) of fake.

    Each image has a ball that reaches to its kth nearest neighbour in its own set. Precision is the share of
    fakes in the ball of a real image, recall the share of real images in the ball of a fake (Kynkaanniemi et
    al. 2019, equation 1). Raises RuntimeError if a set has not more than k images.
    """
    real_radii, fake_radii = squared_radii(real, k), squared_radii(fake, k)
    precise, recalled = [], torch.zeros(len(real), dtype=torch.bool, device=real.device)
    for squares, radii in zip(squared_distances(fake, real, rows=500), fake_radii.split(500)):
        precise.append((squares <= real_radii).any(1))
        recalled |= (squares <= radii[:, None]).any(0)
    return torch.cat(precise).double().mean().item(), recalled.double().mean().item()


def inception_score(logits, splits=10):
    """Mean and standard deviation of the Inception Score of logits (N, classes) over equal parts of them.

    exp E[KL(p(c|i) || p(c))], from 1 to the number of classes; KL is the Kullback-Leibler divergence between
    the classes' probabilities of an image i and their mean over all images (Salimans et al. 2016).
    """
    scores = []
    for chunk in logits.double().tensor_split(min(splits, len(logits))):
        log_p = chunk.log_softmax(1)
        marginal = log_p.logsumexp(0) - math.log(len(chunk))
        scores.append((log_p.exp() * (log_p - marginal)).sum(1).mean().exp())
    scores = torch.stack(scores)
    return scores.mean().item(), scores.std(correction=0).item()


# %% Reading images
SCRIPT = "fid"
DATA = str(Path(globals().get("__file__", "cell")).resolve().parent / "data")  # notebooks have no __file__
CACHE = Path(DATA, "cache")  # or, if that cannot be written, in the home folder
CACHE = CACHE if os.access(CACHE if CACHE.exists() else DATA, os.W_OK) else Path.home() / ".cache/gans"
DATASETS = {"mnist": datasets.MNIST, "fashion_mnist": datasets.FashionMNIST, "cifar10": datasets.CIFAR10}
TEN_CLASSES = ["mnist", "fashion_mnist"]
LABELLED = [*TEN_CLASSES, "faces"]  # what --features classifier knows


def fail(message, status=2):
    """End the program with one line on stderr."""
    tqdm.write(f"{SCRIPT}.py: {message}", file=sys.stderr)
    raise SystemExit(status) from None


def stream(*key):
    """A random generator that follows from `key` alone: the same call picks the same images."""
    return torch.Generator().manual_seed(random.Random(repr(key)).getrandbits(63))


class ImageSet:
    """Images, and what `measure` finds in them. Statistics from a file are all None but the last three."""

    def __init__(self, path, images=None):
        self.path = path
        self.images = images  # uint8 (N, C, H, W), or a list of files
        self.count = None if images is None else len(images)
        self.features = None  # (N, D), fp32
        self.logits = None  # (N, classes), fp32
        self.mu = None  # the features' mean (D,), float64
        self.sigma = None  # their covariance (D, D), float64
        self.weights = None  # the hash of the weights that they come from; of other programs' files, unknown


def open_faces(folder, split):
    """The cartoon faces of "train" or "test": uint8 (N, 3, 64, 64), and their classes (N, attributes)."""
    try:
        sheets = [np.asarray(Image.open(path)) for path in sorted(folder.glob(f"{split}_??.webp"))]
        faces = np.stack(sheets).reshape(-1, 32, 64, 32, 64, 3)  # (sheets, rows, 64, columns, 64, 3)
        train = np.loadtxt(folder / "train.csv", str, delimiter=",", skiprows=1)
        table = np.loadtxt(folder / f"{split}.csv", str, delimiter=",", skiprows=1)
        if len(table) != 1024 * len(faces):
            raise ValueError(f"{len(faces)} sheets, but {len(table)} rows of attributes")
    except (OSError, ValueError) as error:
        fail(f"--data-dir: {folder} is not whole; copy data/faces of the collection there ({error!r:.99})")
    images = torch.from_numpy(faces).permute(0, 1, 3, 5, 2, 4).reshape(-1, 3, 64, 64)
    # Words to numbers, in alphabetical order. A column is an attribute; the first one numbers the faces.
    labels = [np.searchsorted(np.unique(train[:, i]), table[:, i]) for i in range(1, train.shape[1])]
    return images, torch.from_numpy(np.stack(labels, 1))


def images_and_labels(name, data_dir, train=True):
    """A data set as uint8 images (N, C, H, W) and classes (N,), of faces (N, attributes)."""
    if name == "faces":
        return open_faces(Path(data_dir, "faces"), "train" if train else "test")
    try:
        dataset = DATASETS[name](data_dir, train=train, download=True)
    except Exception as error:  # many types are possible
        fail(f"--data-dir: {name} is not in {data_dir} and cannot be downloaded ({error!r:.99})")
    images, labels = torch.as_tensor(dataset.data), torch.as_tensor(dataset.targets)
    return images.movedim(3, 1) if images.ndim == 4 else images[:, None], labels


def open_images(path, args):
    """The ImageSet that `path` names: args.num_images of its images, in random order, the same each time."""
    name, _, split = path.partition(":")
    if name in [*DATASETS, "faces"] and not split and Path(path).is_dir():
        fail(f"{path}: a data set and a folder have this name; give {path}:train, or ./{path}")
    if name in [*DATASETS, "faces"] and split in ("", "train", "test"):
        images, _ = images_and_labels(name, args.data_dir, train=split != "test")
    elif Path(path).is_dir():
        images = list_pictures(path)
    else:
        fail(f"{path}: give a folder, a .npz file, or a data set: {', '.join([*DATASETS, 'faces'])}[:test]")
    order = torch.randperm(len(images), generator=stream("images"))[: args.num_images]
    if len(order) < args.least:
        fail(f"{path}, --num-images: {len(order)} images; take {args.least} or more")
    images = images[order] if torch.is_tensor(images) else [images[number] for number in order.tolist()]
    return ImageSet(path, images)


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
    """A picture, upright and on white, as bytes (3, H, W); of `size`, its middle square; None if damaged."""
    try:
        with Image.open(path) as file:
            image = ImageOps.exif_transpose(file)
        if image.mode.startswith(("I", "F")):  # grey, in 16 bits or as floats
            white = 65535 if image.mode != "F" else 1 if image.getextrema()[1] <= 1 else 255
            image = Image.fromarray((np.asarray(image) / white * 255 + 0.5).clip(0, 255).astype(np.uint8))
        size = (size, size) if size else image.size
        image = ImageOps.fit(image.convert("RGBA"), size, Image.Resampling.BILINEAR)
        image = Image.alpha_composite(Image.new("RGBA", size, "white"), image).convert("RGB")
        return np.asarray(image).transpose(2, 0, 1)
    except Exception as error:  # many types are possible
        tqdm.write(f"skipped {path}: {error}", file=sys.stderr)


def batches(image_set, args):
    """Lists of uint8 tensors (N, C, H, W), a batch in each; the ImageSet loses files that cannot be read."""
    if torch.is_tensor(image_set.images):
        for batch in image_set.images.split(args.batch_size):
            yield [batch]
        return
    paths, image_set.images = image_set.images, []
    with ThreadPool(min(8, os.cpu_count() or 1, len(paths) or 1)) as pool:
        for start in range(0, len(paths), args.batch_size):
            chunk = paths[start : start + args.batch_size]
            decoded = dict(zip(chunk, pool.map(lambda path: decode(path, args.image_size), chunk)))
            image_set.images += [path for path in chunk if decoded[path] is not None]
            images = [torch.tensor(image)[None] for image in decoded.values() if image is not None]
            if images:
                yield [torch.cat(images)] if len({image.shape for image in images}) == 1 else images
    image_set.count = len(image_set.images)


@torch.inference_mode()
def measure(image_set, network, weights, args):
    """Fill in what the network finds in an ImageSet, and return it; `weights` is their hash."""
    features, logits = [], []
    for batch in tqdm(batches(image_set, args), image_set.path, math.ceil(image_set.count / args.batch_size)):
        prepared = torch.cat([network.prepare(images.to(args.device)) for images in batch])
        batch_features, batch_logits = network(prepared)
        features.append(batch_features)
        logits.append(batch_logits)
    if image_set.count < args.least:
        fail(f"{image_set.path}: {image_set.count} images can be read; {args.least} or more are needed")
    features = torch.cat(features)
    features = features.cpu() if args.device.startswith("mps") else features  # mps has no float64
    mu, sigma = moments(features)
    image_set.mu, image_set.sigma, image_set.weights = mu.cpu(), sigma.cpu(), weights
    image_set.features, image_set.logits = features, torch.cat(logits).cpu()
    if not image_set.sigma.isfinite().all():
        fail(f"{image_set.path}: features are not finite; give the weights of this network")
    if image_set.count < network.size:
        few = f"fewer images than the {network.size} features: the distance is far too large"
        tqdm.write(f"{image_set.path}: {few}", file=sys.stderr)
    return image_set


def show_neighbours(path, first, second, image_size, count=16):
    """Write a picture: above `count` images of `second`, below each the three nearest images of `first`."""

    def tile(images, number):
        if torch.is_tensor(images):
            image = images[number].expand(3, -1, -1)
        else:
            image = torch.tensor(decode(images[number], image_size))
        return resize(image, [64, 64], antialias=True) / 255

    squares = torch.cat([*squared_distances(second.features[:count], first.features)])
    nearest = squares.topk(3, largest=False).indices
    tiles = [tile(second.images, number) for number in range(len(nearest))]
    tiles += [tile(first.images, number) for number in nearest.T.flatten().tolist()]
    save_image(tiles, path, nrow=len(nearest), pad_value=1)


# %% Statistics files
def load_stats(path):
    """What `save_stats` or pytorch-fid has written, as an ImageSet without images.

    Files of pytorch-fid do not say what weights they come from, and figures from them are not called FID.
    """
    stats = ImageSet(path)
    try:
        with np.load(path) as file:
            stats.mu = torch.from_numpy(file["mu"].astype(np.float64))
            stats.sigma = torch.from_numpy(file["sigma"].astype(np.float64))
            stats.weights = str(file["weights"]) if "weights" in file else None
        if stats.mu.ndim != 1 or stats.sigma.shape != (len(stats.mu), len(stats.mu)):
            raise ValueError(f"sizes {tuple(stats.mu.shape)} and {tuple(stats.sigma.shape)} do not fit")
        if not (stats.mu.isfinite().all() and stats.sigma.isfinite().all()):
            raise ValueError("some numbers are not finite")
    except Exception as error:  # many types are possible
        fail(f"{path}: give a .npz with the arrays mu (D,) and sigma (D, D) ({error!r:.150})")
    return stats


def save_stats(path, stats):
    """Write mu and sigma as pytorch-fid does, and beside them what weights they come from."""
    np.savez_compressed(path, mu=stats.mu.numpy(), sigma=stats.sigma.numpy(), weights=stats.weights)


# %% Weights and classifiers
RELEASE = "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
RELEASED = "6726825d"  # the first digits of the SHA-256 of the released weights
WEIGHTS = f"pt_inception-2015-12-05-{RELEASED}.pth"


def load_weights(network, path):
    """Fill `network` from a file of weights. Returns the first eight hexadecimal digits of its SHA-256."""
    try:
        network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    except Exception as error:  # many types are possible
        fail(f"{path}: not weights of this network; remove it, or take {RELEASE}{WEIGHTS} ({error!r:.200})")
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:8]


def load_inception(path):
    """The FIDInception with the weights in the file `path`, or the released ones; and their hash."""
    if path is None:
        path = Path(torch.hub.get_dir(), "checkpoints", WEIGHTS)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if not path.exists():
                torch.hub.download_url_to_file(RELEASE + WEIGHTS, path, hash_prefix=RELEASED)
        except Exception as error:  # many types are possible
            instead = "give --weights FILE, or for digits, clothes and our cartoons --features classifier"
            fail(f"{path} cannot be fetched; put {RELEASE}{WEIGHTS} there, or {instead} ({error!r:.99})")
    network = FIDInception()
    weights = load_weights(network, path)
    return network.fuse(), weights


def load_classifier(name, data_dir, device):
    """The classifier of the data set `name`, trained on the first use and then cached; and its hash."""
    images, labels = images_and_labels(name, data_dir)
    labels = labels.reshape(len(labels), -1)  # (N, attributes)
    with torch.random.fork_rng(devices=[]):  # leaves the caller's random numbers alone
        torch.manual_seed(0)
        network = DigitClassifier() if name in TEN_CLASSES else FaceClassifier((labels.amax(0) + 1).tolist())
    if labels.amax() >= sum(network.classes):
        fail(f"--data-dir: {name} has more than 10 classes there")
    # Its name changes with the network and the data; count "1" up when training changes.
    key = hashlib.sha256(f"1 {network!r}".encode() + images.numpy().tobytes() + labels.numpy().tobytes())
    cache = CACHE / f"classifier-{name}-{key.hexdigest()[:12]}.pt"
    if not cache.exists():
        tqdm.write(f"training a classifier of {name}, once; it is kept in {CACHE}", file=sys.stderr)
        epochs = 4 if name in TEN_CLASSES else 10
        tmp = cache.with_suffix(f".{os.getpid()}")  # so that there is never half of one
        try:
            CACHE.mkdir(parents=True, exist_ok=True)
            tmp.touch()  # better to fail now than after the training
            train_classifier(network.to(device), images.to(device), labels.to(device), epochs)
            torch.save(network.state_dict(), tmp)
            tmp.replace(cache)
        except (OSError, RuntimeError) as error:  # a full disk can look like either
            if tmp.exists():
                tmp.unlink()
            fail(f"no classifier can be made and kept in {CACHE} ({error!r:.150})")
    weights = load_weights(network, cache)
    return network.eval(), f"{name} classifier {weights}"


def train_classifier(network, images, labels, epochs, batch_size=128):
    """Fit the network to uint8 images (N, C, H, W) and their classes (N, attributes), all on one device."""
    optimizer = torch.optim.Adam(network.parameters(), fused=True)
    total = epochs * math.ceil(len(images) / batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=total)
    network.train()
    for epoch in range(epochs):
        order = torch.randperm(len(images), generator=stream("classifier", epoch)).to(images.device)
        for batch in tqdm(order.split(batch_size), f"epoch {epoch + 1}/{epochs}", leave=False):
            loss = network.loss(network(network.prepare(images[batch]))[1], labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    network.eval()


def load_network(args):
    """The network of --features, on its device, and the hash of its weights."""
    if args.features == "classifier":
        network, weights = load_classifier(args.dataset, args.data_dir, args.device)
    else:
        network, weights = load_inception(args.weights)
    return network.to(args.device), weights


# %% While a script trains
class Judge:
    """Measures samples while a script trains, as this script does: figures for --fid-every.

    Digits and clothes are compared with their test set. Faces, whose test set is small, are compared with
    their training set, so that copies would do best: see --neighbours. All else is compared by Inception's
    features, with 10,000 of the training `images`, uint8 (N, C, H, W).
    """

    def __init__(self, dataset, images, device, data_dir="data"):
        path = f"{dataset}:test" if dataset in TEN_CLASSES else f"{dataset}:train"
        flags = ["--metrics", "fid", "pr", "--device", str(device), "--data-dir", str(data_dir)]
        if dataset in LABELLED:
            flags += ["--features", "classifier", "--dataset", dataset]
            pixels = images.shape[-1]
            images, _ = images_and_labels(dataset, data_dir, train=dataset not in TEN_CLASSES)
            if pixels == 64:  # as dcgan64_celeba.py makes them: resizing changes features
                images = resize(images, [64, 64], antialias=True)
        if len(images) < 4:  # three neighbours of each
            fail(f"--fid-every: {len(images)} images are too few to measure samples; leave it out")
        self.args = parse_args([path, "samples", *flags])
        order = torch.randperm(len(images), generator=stream("images"))[:10_000]
        self.real = images[order.to(images.device)].cpu()
        self.network, self.weights = load_network(self.args)
        self.reference = self.measure(path, self.real)

    def measure(self, path, images):
        return measure(ImageSet(path, images), self.network, self.weights, self.args)

    def __call__(self, images):
        """The distance, precision and recall of uint8 images (N, C, H, W)."""
        self.args.metrics = ["fid", "pr"] if len(images) > 3 else ["fid"]  # three neighbours of each
        result = compare(self.reference, self.measure("samples", images), self.args)
        distance = result.get("fid", result.get("frechet_distance"))
        return distance, result.get("precision", math.nan), result.get("recall", math.nan)


def track(judge, draw, folder, epoch, count=10_000):
    """Measure `count` samples after an epoch of training: a row of distances.csv, distance.png, a line.

    `judge` is a Judge, and draw(n) makes n images (n, C, H, W) in [0, 1], of the same noise each time.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        images = draw(count)
    values = judge(torch.cat([(chunk * 255).round().to(torch.uint8) for chunk in images.split(500)]))
    path = Path(folder, "distances.csv")
    rows = []
    if path.exists():  # a resumed run may repeat an epoch, and lines that somebody edited may be broken
        rows = np.genfromtxt(path, delimiter=",", skip_header=1, invalid_raise=False, ndmin=2).tolist()
    rows = [row[:4] for row in rows if len(row) > 3 and row[0] < epoch] + [[epoch, *values]]
    header = "epoch,distance,precision,recall"
    np.savetxt(path.with_suffix(".tmp"), rows, "%.6g", ",", header=header, comments="")
    path.with_suffix(".tmp").replace(path)
    figure = Figure(figsize=(8, 4.8), layout="constrained")
    above, below = figure.subplots(2)
    columns = np.array(rows)
    above.plot(columns[:, 0], columns[:, 1], ".-", label="distance")
    below.plot(columns[:, 0], columns[:, 2:], ".-", label=["precision", "recall"])
    for axis in above, below:
        axis.set(xlabel="epoch", ylim=(0, None))
        axis.locator_params("x", integer=True)
        axis.legend()
    figure.savefig(Path(folder, "distance.png"))
    print("  distance {:.1f}  precision {:.3f}  recall {:.3f}".format(*values), flush=True)


# %% Command line
def add_flags(add):
    """The flags; `add` is argparse's parser.add_argument."""
    names = ", ".join([*DATASETS, "faces"])
    add("paths", nargs="*", metavar="PATH", help=f"a folder of images, a .npz file, or one of {names}[:test]")
    add("--save-stats", nargs=2, metavar=("PATH", "OUT.npz"), help="only write the statistics of PATH")
    metrics = ["fid", "kid", "is", "pr"]
    add("--metrics", nargs="+", choices=metrics, default=["fid"], help="pr: precision and recall")
    add("--neighbours", metavar="OUT.png", help="draw images of PATH 2, and below each the nearest of PATH 1")
    add("--features", choices=["inception", "classifier"], default="inception", help="what to compare")
    add("--dataset", choices=LABELLED, help="whose classifier; None: that of the PATHs")
    add("--data-dir", default=DATA, help="where the data sets are")
    add("--weights", metavar="FILE", help=f"a file {WEIGHTS}; None: torch.hub's, downloaded if it is missing")
    add("--image-size", type=int, metavar="N", help="of files, take the middle square, NxN, as in training")
    add("--num-images", type=int, metavar="N", help="take N images of each path at random")
    add("--batch-size", type=int, default=50, help="images per step")
    add("--device", default="auto", help="auto (a GPU if there is one), cpu, cuda, cuda:1, mps, ...")
    add("--json", action="store_true", help="print one JSON object")


def check_new(flag, path, suffix):
    """A file to be written must not be there, but its folder must, and let us write."""
    is_new = Path(path).suffix == suffix and not Path(path).exists() and Path(path).parent.is_dir()
    if not is_new or not os.access(Path(path).parent, os.W_OK):
        fail(f"{flag}: {path}: name a new file that ends in {suffix}, in a folder that is there")


def parse_args(argv=None):
    """The settings, checked."""
    parser = argparse.ArgumentParser(f"{SCRIPT}.py", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.description = (__doc__ or "").split("\n")[0]  # none under python -OO
    parser.error = fail  # one line in place of argparse's usage text
    add_flags(parser.add_argument)
    args = parser.parse_args(argv)
    for name, value in vars(args).items():
        if type(value) is int and value < 1:
            fail(f"--{name.replace('_', '-')}: give a whole number above 0")
    if len(args.paths) != (0 if args.save_stats else 2) or (args.save_stats and args.neighbours):
        fail("give two paths to compare, or --save-stats PATH OUT.npz alone")
    if args.save_stats:
        args.paths = args.save_stats[:1]
        check_new("--save-stats", args.save_stats[1], ".npz")
    if args.neighbours:
        check_new("--neighbours", args.neighbours, ".png")
    for path in args.paths:
        if path.endswith(".npz") and (args.save_stats or args.neighbours or args.metrics != ["fid"]):
            fail(f"{path}: has no images, which --save-stats, --neighbours and --metrics kid is pr need")
    args.least = 4 if args.neighbours or "pr" in args.metrics else 2  # three neighbours of each
    if args.features == "classifier":
        named = {path.partition(":")[0] for path in args.paths} & set(LABELLED)
        if args.dataset is None and len(named) != 1:
            fail(f"--dataset: --features classifier needs {', '.join(LABELLED)}, and no PATH tells which")
        args.dataset = args.dataset or named.pop()
        if args.weights:
            fail("--weights: these are for --features inception; the classifier trains its own")
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


# %% Main
def compare(first, second, args):
    """All that was asked for, and what it was measured on, as a dictionary ready for JSON.

    A list has a value for each path.
    """
    both = f"{first.path} and {second.path}"
    if len(first.mu) != len(second.mu):
        fail(f"{both} have {len(first.mu)} and {len(second.mu)} features; make both with the same network")
    if first.weights and second.weights and first.weights != second.weights:
        fail(f"{both} come from different weights ({first.weights}, {second.weights}); take the same")
    weights = first.weights if first.weights == second.weights else None
    is_fid = weights == RELEASED
    result = {"paths": [first.path, second.path], "images": [first.count, second.count]}
    result |= {"weights": weights, "is_fid": is_fid}
    if "fid" in args.metrics:
        distance = frechet_distance(first.mu, first.sigma, second.mu, second.sigma)
        result["fid" if is_fid else "frechet_distance"] = distance.item()
    if "kid" in args.metrics:
        result["kid"], result["kid_std"] = kernel_distance(first.features, second.features)
    if "is" in args.metrics:
        scores = [inception_score(first.logits), inception_score(second.logits)]
        result["is"], result["is_std"] = np.transpose(scores).tolist()
    enough = min(first.count or 0, second.count or 0) > 3
    if "pr" in args.metrics or (args.features == "classifier" and enough):
        result["precision"], result["recall"] = precision_recall(first.features, second.features)
    return result


def show(result):
    """Print a line for each entry of what compare returns."""
    for name, value in result.items():
        values = value if isinstance(value, list) else [value]
        texts = [f"{value:.6g}" if isinstance(value, float) else str(value) for value in values]
        print(f"{name:18}", "  ".join(texts))
    if not result["is_fid"]:
        print("These weights are not known to be those of the FID: do not compare the distance with any FID.")


def main(argv=None):
    args = parse_args(argv)
    torch.backends.cudnn.allow_tf32 = False  # fp32 is fp32 in convolutions, too
    if hasattr(sys.stdout, "reconfigure"):  # a notebook's cannot
        sys.stdout.reconfigure(errors="replace")  # names that a terminal cannot print
    sets = [load_stats(path) if path.endswith(".npz") else open_images(path, args) for path in args.paths]
    to_measure = [image_set for image_set in sets if image_set.count]
    if to_measure:
        network, weights = load_network(args)  # which may take minutes to train or to fetch
    for image_set in to_measure:
        measure(image_set, network, weights, args)
    if args.save_stats:
        save_stats(args.save_stats[1], sets[0])
        print(f"mu and sigma of {sets[0].count} images in {args.save_stats[1]}")
        return
    if args.neighbours:
        show_neighbours(args.neighbours, *sets, args.image_size)
    result = compare(*sets, args)
    if args.json:
        print(json.dumps(result))
    else:
        show(result)


if __name__ == "__main__":
    main([] if "kernel_launcher" in sys.argv[0] else None)  # the flags of a notebook are not ours
