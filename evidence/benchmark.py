"""How fast is every script, and what does it learn in a given time?

    python evidence/benchmark.py                # images/s of all scripts, beside the plain loop
    python evidence/benchmark.py --script cgan --quick
    python evidence/benchmark.py --learn 10     # what is learned of MNIST in ten minutes of one core
    python evidence/benchmark.py --learn 4 --script cgan --flags=--d-layers=2

Speed: real images that train_step takes in a second, with the making of the batches and the reading of the
metrics, as the script's loop does both; of pix2pix.py and cyclegan.py pairs; of stylegan.py in the nine of
ten steps without R1. Beside it the same networks in the plain loop of tutorials: a DataLoader that transforms
image by image, Adam that is not fused, sigmoid and BCELoss where the loss is a cross-entropy, .item() and
print in each step; in cyclegan.py a pool image by image, and an optimiser for each D. All on MNIST, or as
many random pixels. They take turns, so that a machine that is busy for a while is busy for all; the table has
medians.

--learn trains each script with its defaults, in fp32 and on MNIST, and the same networks in the plain loop,
for as long (a script may come to its end before that), and measures 10,000 samples of both as
`fid.py --features classifier` does, or as many translations. Neither makes pictures or checkpoints. The plain
loop has the script's target for real images and its pool, R1 in each step and no style mixing, seed 0, and
draws new fakes for G's step, but for those that translate. With --flags the script alone is trained.
"""

import argparse
import contextlib
import copy
import importlib
import inspect
import io
import itertools
import multiprocessing
import platform
import random
import statistics
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from unittest import mock

import torch
from PIL import Image, ImageChops, ImageFilter
from torch import accelerator, nn
from torch.utils.data import DataLoader, Subset
from torchvision import datasets, transforms
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # where fid.py and the scripts are

import fid

ROOT = Path(__file__).resolve().parent.parent
SHAPES = {  # of an image
    "vanilla_gan": (1, 28, 28),
    "dcgan_mnist": (1, 28, 28),
    "wgan_gp": (1, 28, 28),
    "cgan": (1, 28, 28),
    "dcgan32_wgan_sn": (1, 32, 32),
    "dcgan64_celeba": (1, 64, 64),
    "pix2pix": (1, 32, 32),
    "cyclegan": (1, 32, 32),
    "stylegan": (1, 32, 32),
}
TRANSLATORS = "pix2pix", "cyclegan"  # their batches are pictures A and B


# %% The scripts
def precisions(name, device):
    """What a script can compute in; tf32 is for CUDA alone."""
    train_step = importlib.import_module(name).train_step
    if "precision" not in inspect.signature(train_step).parameters:
        return ["fp32"]
    return ["fp32", "tf32", "bf16"] if device.type == "cuda" else ["fp32", "bf16"]


def ours(name, device, precision):
    """A training step as the script's loop takes it, on random images."""
    script = importlib.import_module(name)
    args = script.parse_args(["--dataset", "mnist", "--device", str(device)])
    parts = script.build(args)
    known = vars(args) | {"precision": precision, "r1_weight": 0.0}
    known |= {"minimax": getattr(args, "generator_loss", "") == "minimax", "pool": parts.get("pool")}
    known = {key: known[key] for key in inspect.signature(script.train_step).parameters if key in known}
    count = args.batch_size * getattr(args, "n_critic", 1)
    images = torch.randint(0, 256, (10 * count, *SHAPES[name]), dtype=torch.uint8, device=device)
    classes = torch.randint(0, 10, (len(images),), device=device)
    batches = itertools.cycle(torch.randperm(len(images), device=device).view(-1, count))
    metrics = []

    def step():
        index = next(batches)
        batch = {"real": images[index] / 127.5 - 1}
        if name in TRANSLATORS:
            batch = {"a": images[index.flip(0)] / 127.5 - 1, "b": batch["real"]}
        if name == "cgan":
            batch["classes"] = classes[index]
        metrics.append(script.train_step(**(known | parts | batch)))
        if len(metrics) == 400:
            for key in metrics[0]:
                torch.stack([row[key] for row in metrics]).mean().item()
            metrics.clear()

    return step


def clock(device):
    """Seconds: on the CPU those of this process alone."""
    if str(device) == "cpu":
        return time.process_time()
    torch.accelerator.synchronize()
    return time.perf_counter()


def script_learns(script, flags, limit, device):
    """The generator, the seconds and the steps of a script's training for so many seconds."""
    args = script.parse_args(["--dataset", "mnist", "--device", device, *flags])
    train_step, times, parts = script.train_step, [], {}

    def timed_step(**given):
        times.append(clock(device))
        if times[-1] - times[0] > limit:
            raise TimeoutError
        parts.update(given)
        return train_step(**given)

    with tempfile.TemporaryDirectory() as args.out_dir, contextlib.ExitStack() as stack:
        nothing = dict.fromkeys(["draw", "save", "plot"], lambda *_, **__: None)
        stack.enter_context(mock.patch.multiple(script, train_step=timed_step, **nothing))
        stack.enter_context(mock.patch.object(script, "open_folder", return_value=Path(args.out_dir)))
        with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(TimeoutError):
            script.train(args)
            times.append(clock(device))
    return parts.get("ema", parts["generator"]), times[-1] - times[0], len(times) - 1


# %% The plain loop
class Player:
    """A script's networks and settings, for the plain loop: contiguous, and Adam not fused."""

    def __init__(self, name, device):
        self.name, self.script = name, importlib.import_module(name)
        self.args = self.script.parse_args(["--dataset", "mnist", "--device", str(device), "--seed", "0"])
        networks = list(self.script.build(self.args).values())[:2]
        self.generator, self.second = [
            network.to(memory_format=torch.contiguous_format) for network in networks
        ]
        self.ema = copy.deepcopy(self.generator).requires_grad_(False) if name == "stylegan" else None
        self.betas = {"wgan_gp": (0.0, 0.9), "stylegan": (0.0, 0.99)}.get(name, (0.5, 0.999))
        self.optimizer_g = torch.optim.Adam(self.generator.parameters(), self.args.lr_g, self.betas)
        self.optimizer_second = torch.optim.Adam(self.second.parameters(), self.args.lr_d, self.betas)


def update(optimizer, loss):
    """A step of an optimiser; returns the loss."""
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss


def forever(dataset, batch_size):
    """Batches of a DataLoader, epoch after epoch."""
    loader = DataLoader(dataset, batch_size, shuffle=True, drop_last=True)
    for _ in itertools.count():
        yield from loader


def plain(name, device, r1=True):
    """A Player, and a training step of its networks as tutorials write it; `r1` is for stylegan.py."""
    player = Player(name, device)
    if name in TRANSLATORS:
        return player, translation(player, device)
    script, args, generator, second = player.script, player.args, player.generator, player.second
    side = SHAPES[name][1]
    fit = transforms.Resize(64) if side == 64 else transforms.Pad((side - 28) // 2)
    transform = transforms.Compose([fit, transforms.ToTensor(), transforms.Normalize(0.5, 0.5)])
    dataset = datasets.MNIST(ROOT / "data", transform=transform)
    batches = forever(dataset, args.batch_size)
    bce, noise = nn.BCELoss(), getattr(script, "uniform", torch.randn)

    def step():
        for _ in range(getattr(args, "n_critic", 1)):
            real, labels = [tensor.to(device) for tensor in next(batches)]
            classes = [labels] if name == "cgan" else []
            fake = generator(noise(len(real), args.latent_dim, device=device), *classes)
            real_score, fake_score = second(real, *classes), second(fake.detach(), *classes)
            if hasattr(script, "Critic"):
                loss = fake_score.mean() - real_score.mean()
                if name == "wgan_gp":
                    loss = loss + args.gp_weight * script.gradient_penalty(second, real, fake.detach())[0]
            else:
                targets = torch.full_like(real_score, getattr(args, "real_label", 1.0))
                loss = bce(real_score.sigmoid(), targets)
                loss = loss + bce(fake_score.sigmoid(), torch.zeros_like(fake_score))
                if name == "stylegan" and r1:
                    loss = loss + args.r1_weight / 2 * script.r1_penalty(second, real)
            d_loss = update(player.optimizer_second, loss)
        fake = generator(noise(len(real), args.latent_dim, device=device), *classes)
        score = second(fake, *classes)
        g_loss = -score.mean() if hasattr(script, "Critic") else bce(score.sigmoid(), torch.ones_like(score))
        update(player.optimizer_g, g_loss)
        if name == "stylegan":
            script.average(player.ema, generator, decay=0.998)
        print(f"D {d_loss.item():.4f} G {g_loss.item():.4f}")

    return player, step


def translation(player, device):
    """The training step of pix2pix.py and cyclegan.py as tutorials write it."""
    args, generator, second = player.args, player.generator, player.second
    bce, l1, mse, pools = nn.BCELoss(), nn.L1Loss(), nn.MSELoss(), {"a": [], "b": []}
    answer = transforms.Compose([transforms.Pad(2), transforms.ToTensor(), transforms.Normalize(0.5, 0.5)])
    random.seed(0)

    def question(digit):
        if player.name == "pix2pix":
            b = transforms.functional.pad(digit, 2)
            a = b.resize((8, 8), Image.Resampling.BOX).resize((32, 32), Image.Resampling.NEAREST)
            return transforms.Compose(answer.transforms[1:])(a)
        return answer(ImageChops.subtract(digit.filter(ImageFilter.MaxFilter(3)), digit))

    def batches(transform, first=0, every=1):
        digits = datasets.MNIST(ROOT / "data", transform=transform)
        return forever(Subset(digits, range(first, len(digits), every)), args.batch_size)

    def paired():
        a, b = [images.to(device) for images in next(pairs)[0]]
        fake = generator(a)
        on_real = second(torch.cat([a, b], 1)).sigmoid()
        on_fake = second(torch.cat([a, fake.detach()], 1)).sigmoid()
        d_loss = (bce(on_real, torch.ones_like(on_real)) + bce(on_fake, torch.zeros_like(on_fake))) / 2
        update(player.optimizer_second, d_loss)
        on_fake = second(torch.cat([a, fake], 1)).sigmoid()
        g_loss = bce(on_fake, torch.ones_like(on_fake)) + args.l1_weight * l1(fake, b)
        update(player.optimizer_g, g_loss)
        print(f"D {d_loss.item():.4f} G {g_loss.item():.4f}")

    if player.name == "pix2pix":
        pairs = batches(lambda digit: (question(digit), answer(digit)))
        return paired
    a_alone, b_alone = batches(question, 0, 2), batches(answer, 1, 2)  # of different digits, as in the script
    optimizers = {side: torch.optim.Adam(second[side].parameters(), args.lr_d, player.betas) for side in "ab"}

    def earlier(pool, images):
        given = []
        for image in images.detach():
            if len(pool) < args.pool:
                pool.append(image)
            elif random.random() < 0.5:
                number = random.randrange(len(pool))
                image, pool[number] = pool[number], image
            given.append(image)
        return torch.stack(given)

    def unpaired():
        a, b = next(a_alone)[0].to(device), next(b_alone)[0].to(device)
        fake_b, fake_a = generator["ab"](a), generator["ba"](b)
        cycle = l1(generator["ba"](fake_b), a) + l1(generator["ab"](fake_a), b)
        scores = second["b"](fake_b), second["a"](fake_a)
        g_loss = sum(mse(score, torch.ones_like(score)) for score in scores)
        update(player.optimizer_g, g_loss + args.cycle_weight * cycle)
        print(f"G {g_loss.item():.4f}")
        for side, real, fake in (("a", a, fake_a), ("b", b, fake_b)):
            on_real, on_fake = second[side](real), second[side](earlier(pools[side], fake))
            d_loss = (mse(on_real, torch.ones_like(on_real)) + mse(on_fake, torch.zeros_like(on_fake))) / 2
            print(f"D {update(optimizers[side], d_loss).item():.4f}")

    return unpaired


# %% Measuring
def set_flags(precision):
    """As the scripts' main does."""
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"


def seconds(function, device, least):
    """Seconds that a call takes: of as many as fill `least` seconds, with one wait for the device."""
    calls = 1
    for _ in range(2):  # the first time, to find out how many calls that are
        start = time.perf_counter()
        with contextlib.redirect_stdout(io.StringIO()):
            for _ in range(calls):
                function()
        if device.type != "cpu":
            torch.accelerator.synchronize()
        taken = (time.perf_counter() - start) / calls
        calls = max(1, round(least / taken))
    return taken


def measure(names, device, quick):
    """Rows of the table: a list of dictionaries from column to text."""
    jobs, rows = {}, []
    for name in names:
        jobs |= {(name, precision): ours(name, device, precision) for precision in precisions(name, device)}
        _, jobs[name, "plain"] = plain(name, device, r1=False)
    times = {job: [] for job in jobs}
    for job, function in tqdm([*jobs.items()] * (1 if quick else 11)):
        set_flags(job[1])
        times[job].append(seconds(function, device, 0.0 if quick else 0.5))
    medians = {job: statistics.median(values[-10:]) for job, values in times.items()}  # all but the first
    for name in names:
        args = importlib.import_module(name).parse_args(["--device", str(device)])
        count = args.batch_size * getattr(args, "n_critic", 1)
        row = {"script": f"{name}.py"}
        for precision in precisions(name, device):
            row[f"images/s {precision}"] = f"{count / medians[name, precision]:,.0f}"
        row["plain loop"] = f"{count / medians[name, 'plain']:,.0f}"
        row["times as fast"] = f"{medians[name, 'plain'] / medians[name, 'fp32']:.2f}"
        rows.append(row)
    return rows


def learned(name, who, flags, limit, total, device):
    """A row of the table of --learn: of a script, or of its networks in the plain loop."""
    torch.set_num_threads(1)
    set_flags("fp32")
    script, steps = importlib.import_module(name), 0
    if who == "script":
        generator, taken, steps = script_learns(script, flags, limit, device)
    else:
        player, step = plain(name, torch.device(device))
        start = clock(device)
        with contextlib.redirect_stdout(io.StringIO()):
            while clock(device) - start < limit:
                step()
                steps += 1
        generator, taken = player.ema or player.generator, clock(device) - start
    images = (samples_of(script, generator, total, device) * 255).round().to(torch.uint8)
    training = datasets.MNIST(ROOT / "data").data[:, None]
    distance, precision, recall = fid.Judge("mnist", training, device, ROOT / "data")(images)
    row = {"script": f"{name}.py", "loop": who, "minutes": f"{taken / 60:.1f}", "steps": f"{steps:,}"}
    return row | {"distance": f"{distance:.1f}", "precision": f"{precision:.3f}", "recall": f"{recall:.3f}"}


def samples_of(script, generator, total, device):
    """Images (total, 1, S, S) in [0, 1]; those of pix2pix.py and cyclegan.py are made from test images."""
    torch.manual_seed(0)
    args = script.parse_args(["--dataset", "mnist", "--device", device])
    if script.SCRIPT == "pix2pix":
        return script.sample(generator, script.load_pairs(args, train=False)[0][:total] / 255)
    if script.SCRIPT == "cyclegan":
        return script.sample(generator["ab"], script.load_domains(args, train=False)[0]["a"][:total] / 255)
    noise = getattr(script, "uniform", torch.randn)
    return script.sample(generator, noise(total, generator.latent_dim))


def learn(names, flags, device, minutes, samples):
    """Rows of a table: what scripts, and their default networks in the plain loop, learn in a time."""
    fid.load_classifier("mnist", ROOT / "data", device)  # before many ask for it at once
    loops = ("script",) if flags else ("script", "plain")
    jobs = [(name, who, flags, 60 * minutes, samples, str(device)) for name in names for who in loops]
    workers = torch.get_num_threads() if device.type == "cpu" else 1
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        return [*tqdm(pool.map(learned, *zip(*jobs)), total=len(jobs), unit=" runs")]


def table(rows):
    """The rows as a table in Markdown; the columns are those of the longest row."""
    columns = list(max(rows, key=len))
    lines = [columns, ["---"] * len(columns), *([row.get(column, "") for column in columns] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def machine(device):
    """What the figures were measured on."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    names = [line.split(": ")[1] for line in info.read_text().splitlines() if line.startswith("model name")]
    return (
        f"{torch.get_num_threads()} threads of {(names or [platform.processor() or platform.machine()])[0]}"
    )


def main(argv=None):
    parser = argparse.ArgumentParser("benchmark.py", description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--script", choices=[*SHAPES], help="this one alone")
    add("--device", default="auto", help="auto takes cuda, then mps, then cpu; or any torch device string")
    add("--quick", action="store_true", help="one measurement of each, which is not to be quoted")
    add("--learn", type=float, metavar="MINUTES", help="train so long, and measure samples in place of speed")
    add("--flags", default="", help="for --learn: flags of the script")
    args = parser.parse_args(argv)
    gpu = accelerator.current_accelerator() if accelerator.is_available() else "cpu"
    device = torch.device(gpu if args.device == "auto" else args.device)
    names = [args.script] if args.script else [*SHAPES]
    print(f"torch {torch.__version__}, {machine(device)}\n")
    if args.learn:
        samples = 1000 if args.quick else 10_000
        print(table(learn(names, args.flags.split(), device, args.learn, samples)))
    else:
        print(table(measure(names, device, args.quick)))


if __name__ == "__main__":
    main()
