"""How fast is every script, and how much of the machine does it use?

    python evidence/benchmark.py              # the whole table
    python evidence/benchmark.py --script cgan --quick
    python evidence/benchmark.py --device cuda --markdown
    python evidence/benchmark.py --learn 10   # what is learned of MNIST in ten minutes of one core
    python evidence/benchmark.py --learn 4 --script cgan --flags=--d-layers=2

Of each training script, with its own batch size, on random images of its own size:

    images/s    real images that train_step takes in a second, with the making of the batches and the reading
                of the metrics, as the script's loop does both; in fp32, and in bf16; of pix2pix.py and
                cyclegan.py pairs of images; of stylegan.py in the nine of ten steps without R1
    GFLOP       for one image: multiplications and additions of convolutions and matrix products
    of matmul   FLOPs a second in fp32, over those of a product of 2048 x 2048 matrices in fp32, which PyTorch
                may hand to one library as a product and to another as a 1 x 1 convolution: the faster counts
    batch       the time to make a batch, over that of a step in fp32
    memory      the most that 40 steps on MNIST need in fp32: of the process, or, on CUDA, of the device
    channels    images/s in fp32, over those with contiguous weights in place of channels-last ones; without
                convolutions, as in vanilla_gan.py, there is no difference
    tutorial    images/s in fp32 and in bf16, over those of the same networks in the loop of tutorials: a
                DataLoader that transforms image by image, Adam that is not fused, sigmoid and BCELoss where
                the loss is a cross-entropy, .item() and print in each step; for dcgan64_celeba.py on JPEGs;
                in cyclegan.py a pool image by image, and an optimiser for each D

--learn trains each script with its defaults, in fp32 and on MNIST, and the same networks in the loop of
tutorials, for as long (a script may come to its end before that); and measures 10,000 samples of both as
`fid.py --features classifier` does, or as many translations. Neither makes pictures or checkpoints. The loop
of tutorials has the script's target for real images and its pool, R1 in each step and no style mixing, seed
0, and draws new fakes for G's step, but for those that translate. With --flags the script alone is trained.

Of fid.py: the images/s of its Inception network, and the seconds of the Frechet distance of 2048 features.

Scripts are driven by their build and train_step. bf16 is left out where a script has no --precision.

All jobs take turns, so that a machine that is busy for a while is busy for all; the table has medians. FLOPs
are counted with the formulas of torch.utils.flop_counter in every operation that is dispatched: its own
FlopCounterMode does not look into autograd.grad, which wgan_gp.py needs.
"""

import argparse
import contextlib
import copy
import importlib
import inspect
import io
import itertools
import multiprocessing
import random
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image, ImageChops, ImageFilter
from torch import accelerator, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, Subset
from torch.utils.flop_counter import flop_registry
from torchvision import datasets, transforms
from torchvision.transforms.functional import to_pil_image
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # where the scripts are

import fid

ROOT = Path(__file__).resolve().parent.parent
SHAPES = {  # of an image
    "vanilla_gan": (1, 28, 28),
    "dcgan_mnist": (1, 28, 28),
    "wgan_gp": (1, 28, 28),
    "cgan": (1, 28, 28),
    "dcgan32_wgan_sn": (1, 32, 32),
    "dcgan64_celeba": (3, 64, 64),
    "pix2pix": (1, 32, 32),
    "cyclegan": (1, 32, 32),
    "stylegan": (1, 32, 32),
}
TRANSLATORS = "pix2pix", "cyclegan"  # their batches are pictures A and B
PEAK = """
import contextlib, io, resource, sys, torch
import {name} as script
with contextlib.redirect_stdout(io.StringIO()):
    script.main(sys.argv[1:])
on_cpu = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
print(torch.cuda.max_memory_allocated() if torch.cuda.is_initialized() else on_cpu)
"""

# %% What is timed


def precisions(name):
    """What a script can compute in."""
    train_step = importlib.import_module(name).train_step
    return ("fp32", "bf16") if "precision" in inspect.signature(train_step).parameters else ("fp32",)


def options(script, args, step=1):
    """What train_step takes beside networks, optimisers, images and classes. Lazy R1 depends on the step."""
    known = vars(args) | {"minimax": getattr(args, "generator_loss", "") == "minimax"}
    if script.SCRIPT == "stylegan":
        known["r1_weight"] = 0.0 if step % args.r1_every else args.r1_weight * args.r1_every
    known.pop("pool", None)  # of cyclegan.py: a number here, and in train_step what build makes of it
    names = inspect.signature(script.train_step).parameters
    return {name: known[name] for name in names if name in known}


def ours(name, device, precision, channels_last=True):
    """Two functions: a training step as the script's loop takes it, and the making of its batch alone."""
    script = importlib.import_module(name)
    args = script.parse_args(["--device", str(device)])
    args.precision = precision
    parts, more = script.build(args), options(script, args)
    for module in parts.values():
        if isinstance(module, nn.Module) and not channels_last:
            module.to(memory_format=torch.contiguous_format)
    count = args.batch_size * getattr(args, "n_critic", 1)
    images = torch.randint(0, 256, (10 * count, *SHAPES[name]), dtype=torch.uint8, device=device)
    classes = torch.randint(0, 10, (len(images),), device=device)
    batches = torch.randperm(len(images), device=device).view(-1, count)
    metrics, numbers = [], itertools.count()

    def batch():
        index = batches[next(numbers) % len(batches)]
        real = images[index] / 127.5 - 1
        if name in TRANSLATORS:
            return {"a": images[index.flip(0)] / 127.5 - 1, "b": real}
        return {"real": real} | ({"classes": classes[index]} if name == "cgan" else {})

    def step():
        metrics.append(script.train_step(**parts, **batch(), **more))
        if len(metrics) == 400:
            for key in metrics[0]:
                torch.stack([row[key] for row in metrics]).mean().item()
            metrics.clear()

    return step, batch


def batches(script, args):
    """What the loop of a script gives to train_step, batch by batch, until its training ends."""
    count = args.batch_size * getattr(args, "n_critic", 1)
    if script.SCRIPT == "cyclegan":
        data, _ = script.load_domains(args, train=True)
    elif script.SCRIPT == "pix2pix":
        data = dict(zip("ab", script.load_pairs(args, train=True)))
    elif script.SCRIPT == "cgan":
        data = dict(zip(("real", "classes"), script.load_images(args)))
    else:
        data = {"real": script.load_images(args)}
    data = {name: tensor.to(args.device) for name, tensor in data.items()}
    steps = max(len(tensor) for tensor in data.values()) // count
    for epoch in range(1, args.epochs + 1):
        torch.manual_seed(args.seed * 10_000 + epoch)
        if script.SCRIPT == "cyclegan":
            orders = {name: script.shuffled_rows(tensor, steps * count) for name, tensor in data.items()}
        else:
            order = torch.randperm(max(len(tensor) for tensor in data.values())).to(args.device)
            orders = dict.fromkeys(data, order)
        for start in range(0, steps * count, count):
            batch = {name: tensor[orders[name][start : start + count]] for name, tensor in data.items()}
            yield {name: rows if name == "classes" else rows / 127.5 - 1 for name, rows in batch.items()}


def script_learns(script, flags, limit, device):
    """The generator, the seconds and the steps of a script's training for so many seconds."""
    args = script.parse_args(["--dataset", "mnist", "--device", device, *flags])
    parts, steps, start = script.build(args), 0, None
    for batch in batches(script, args):
        start = start or clock(device)  # all is read
        if clock(device) - start > limit:
            break
        script.train_step(**parts, **batch, **options(script, args, steps))
        steps += 1
    return parts.get("ema", parts["generator"]), clock(device) - start, steps


def clock(device):
    """Seconds: on the CPU those of this process alone."""
    if str(device) == "cpu":
        return time.process_time()
    torch.accelerator.synchronize()
    return time.perf_counter()


class Player:
    """A script's networks and settings, for the loop of tutorials: contiguous, and Adam not fused."""

    def __init__(self, name, device, grey=False):
        self.name, self.script, self.shape = name, importlib.import_module(name), SHAPES[name]
        self.args = self.script.parse_args(
            ["--device", str(device), *(["--dataset", "mnist"] if grey else [])]
        )
        self.args.seed = 0
        networks = list(self.script.build(self.args).values())[:2]
        self.generator, self.second = (
            network.to(memory_format=torch.contiguous_format) for network in networks
        )
        betas = {"wgan_gp": (0.0, 0.9), "stylegan": (0.0, 0.99)}.get(name, (0.5, 0.999))
        self.ema = copy.deepcopy(self.generator).requires_grad_(False) if name == "stylegan" else None
        self.optimizer_g = torch.optim.Adam(self.generator.parameters(), self.args.lr_g, betas)
        self.optimizer_second = torch.optim.Adam(self.second.parameters(), self.args.lr_d, betas)
        self.n_critic = getattr(self.args, "n_critic", 1)
        self.count = self.args.batch_size * self.n_critic  # real images in a step


def tutorial(name, device, folder=None):
    """A Player, and a training step of its networks as tutorials write it, in fp32.

    The JPEGs in `folder` are what dcgan64_celeba.py is given; without them, MNIST and, in stylegan.py, R1.
    """
    player = Player(name, device, grey=name == "dcgan64_celeba" and not folder)
    script, args, generator, second = player.script, player.args, player.generator, player.second
    if name in TRANSLATORS:
        return player, translation(player, device)
    scale = [transforms.ToTensor(), transforms.Normalize(0.5, 0.5)]
    if name == "dcgan64_celeba":
        resized = transforms.Compose([transforms.Resize(64), transforms.CenterCrop(64), *scale])
        if folder:
            dataset = datasets.ImageFolder(folder, resized)
        else:
            dataset = datasets.MNIST(ROOT / "data", transform=resized)
    else:
        pad = [transforms.Pad((player.shape[1] - 28) // 2)] if player.shape[1] > 28 else []
        dataset = datasets.MNIST(ROOT / "data", transform=transforms.Compose([*pad, *scale]))
    loader = DataLoader(dataset, args.batch_size, shuffle=True, drop_last=True)
    bce, batches, noise = nn.BCELoss(), iter(()), getattr(script, "uniform", torch.randn)

    def draw():
        nonlocal batches
        try:
            return next(batches)
        except StopIteration:
            batches = iter(loader)
            return next(batches)

    def update(optimizer, loss):
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss

    def step():
        for _ in range(player.n_critic):
            real, labels = (tensor.to(device) for tensor in draw())
            classes = [labels] if name == "cgan" else []
            fake = generator(noise(len(real), args.latent_dim, device=device), *classes)
            real_score, fake_score = second(real, *classes), second(fake.detach(), *classes)
            if hasattr(script, "Critic"):
                loss = fake_score.mean() - real_score.mean()
                if name == "wgan_gp":
                    penalty, _ = script.gradient_penalty(second, real, fake.detach())
                    loss = loss + args.gp_weight * penalty
            else:
                targets = torch.full_like(real_score, getattr(args, "real_label", 1.0))
                loss = bce(real_score.sigmoid(), targets)
                loss = loss + bce(fake_score.sigmoid(), torch.zeros_like(fake_score))
                if name == "stylegan" and folder is None:
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
    args, generator, second, l1 = player.args, player.generator, player.second, nn.L1Loss()
    scale = transforms.Compose([transforms.ToTensor(), transforms.Normalize(0.5, 0.5)])

    random.seed(0)

    def answer(digit):
        return scale(transforms.functional.pad(digit, 2))

    def question(digit):
        b = transforms.functional.pad(digit, 2)
        if player.name == "pix2pix":
            return scale(b.resize((8, 8), Image.Resampling.BOX).resize((32, 32), Image.Resampling.NEAREST))
        return scale(ImageChops.subtract(b.filter(ImageFilter.MaxFilter(3)), b))

    def batches(transform, first=0, every=1):
        digits = datasets.MNIST(ROOT / "data", transform=transform)
        subset = Subset(digits, range(first, len(digits), every))
        loader = DataLoader(subset, args.batch_size, shuffle=True, drop_last=True)
        for _ in itertools.count():
            yield from (images for images, _ in loader)

    pairs = batches(lambda digit: (question(digit), answer(digit)))
    a_alone, b_alone = batches(question, 0, 2), batches(answer, 1, 2)  # of different digits, as in the script

    def update(optimizer, loss):
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss

    def paired():
        bce = nn.BCELoss()
        a, b = (images.to(device) for images in next(pairs))
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
        return paired
    mse, pools = nn.MSELoss(), {"a": [], "b": []}
    adam = {"lr": args.lr_d, "betas": (0.5, 0.999)}
    optimizers = {side: torch.optim.Adam(second[side].parameters(), **adam) for side in "ab"}

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
        a, b = next(a_alone).to(device), next(b_alone).to(device)
        fake_b, fake_a = generator["ab"](a), generator["ba"](b)
        back_a, back_b = generator["ba"](fake_b), generator["ab"](fake_a)
        scores = second["b"](fake_b), second["a"](fake_a)
        g_loss = sum(mse(score, torch.ones_like(score)) for score in scores)
        update(player.optimizer_g, g_loss + args.cycle_weight * (l1(back_a, a) + l1(back_b, b)))
        text = f"G {g_loss.item():.4f}"
        for side, real, fake in (("a", a, fake_a), ("b", b, fake_b)):
            on_real, on_fake = second[side](real), second[side](earlier(pools[side], fake))
            d_loss = (mse(on_real, torch.ones_like(on_real)) + mse(on_fake, torch.zeros_like(on_fake))) / 2
            text += f" D {update(optimizers[side], d_loss).item():.4f}"
        print(text)

    return unpaired


def inception(device, precision):
    """The FID Inception, with random weights, on 50 images; reading them is not in it."""
    network = fid.FIDInception().fuse().to(device)
    images = torch.randint(0, 256, (50, 3, 64, 64), dtype=torch.uint8, device=device)

    @torch.inference_mode()
    def step():
        with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=precision == "bf16"):
            network(network.prepare(images))

    return step


def frechet():
    """The Frechet distance of two well-conditioned Gaussians of 2048 dimensions; always on the CPU."""
    rng = torch.Generator().manual_seed(0)
    moments = []
    for _ in range(2):
        rows = torch.randn(6000, 2048, dtype=torch.float64, generator=rng)
        rows = rows @ torch.randn(2048, 2048, dtype=torch.float64, generator=rng)
        moments += [rows.mean(0), torch.cov(rows.T)]
    return lambda: fid.frechet_distance(*moments)


def products(device):
    """A product of two 2048 x 2048 matrices, as PyTorch's matrix product and as its 1 x 1 convolution."""
    a, b = torch.randn(2, 2048, 2048, device=device)
    w = a.view(2048, 2048, 1, 1).to(memory_format=torch.channels_last)
    x = b.view(1, 2048, 32, 64).to(memory_format=torch.channels_last)
    return {"matmul": lambda: a @ b, "1 x 1": lambda: F.conv2d(x, w)}


# %% Measuring


class FLOPs(TorchDispatchMode):
    """Counts, in `total`, the FLOPs of all that is dispatched inside."""

    total = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if function._overloadpacket in flop_registry:
            self.total += flop_registry[function._overloadpacket](*args, **(kwargs or {}), out_val=out)
        return out


def seconds(function, device, least):
    """Seconds that a call takes, from as many as fill `least` seconds."""
    calls, start = 0, time.perf_counter()
    while calls == 0 or time.perf_counter() - start < least:
        function()
        calls += 1
        if device.type != "cpu":
            torch.accelerator.synchronize()
    return (time.perf_counter() - start) / calls


def take_turns(jobs, device, rounds, least):
    """The median seconds of each job, by its name; they take turns, after one round that does not count."""
    times = {name: [] for name in jobs}
    with tqdm(total=(rounds + 1) * len(jobs), unit=" measurements") as bar:
        for number in range(rounds + 1):
            for name, job in jobs.items():
                with contextlib.redirect_stdout(io.StringIO()):
                    taken = seconds(job, device, least)
                if number:
                    times[name].append(taken)
                bar.update()
    return {name: statistics.median(values) for name, values in times.items()}


def peak(name, device, steps):
    """Bytes that a run of so many steps on MNIST held at most, in a process of its own."""
    args = importlib.import_module(name).parse_args([])
    limit = steps * args.batch_size * getattr(args, "n_critic", 1) * (2 if name == "cyclegan" else 1)
    with tempfile.TemporaryDirectory() as folder:
        flags = ["--dataset", "mnist", "--device", device, "--out-dir", f"{folder}/run"]
        flags += ["--epochs", 1, "--limit", limit]
        command = [sys.executable, "-c", PEAK.format(name=name), *map(str, flags)]
        output = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout
    return int(output.split()[-1])


def write_jpegs(folder, count=256):
    """Pictures of the size of CelebA's faces, smooth as these are, in one class folder."""
    rng = torch.Generator().manual_seed(0)
    (folder / "faces").mkdir()
    for i in range(count):
        coarse = torch.rand(1, 3, 11, 9, generator=rng)
        image = F.interpolate(coarse, (218, 178), mode="bicubic").clamp(0, 1)[0]
        to_pil_image(image).save(folder / "faces" / f"{i}.jpg", quality=90)


def measure(names, device, quick):
    """Rows of the table: a list of dictionaries from column to text."""
    rounds, least = (1, 0.0) if quick else (15, 0.3)
    # Before the jobs: the peak of a child process begins with what its parent holds.
    peaks = {name: peak(name, device, 2 if quick else 40) for name in names if name != "fid"}
    with tempfile.TemporaryDirectory() as folder:
        write_jpegs(Path(folder))
        jobs, flops = products(device), {}
        for name in names:
            if name == "fid":
                jobs |= {("fid", p): inception(device, p) for p in ("fp32", "bf16")} | {"frechet": frechet()}
                continue
            for precision in precisions(name):
                jobs[name, precision], jobs[name, "batch"] = ours(name, device, precision)
            jobs[name, "contiguous"], _ = ours(name, device, "fp32", channels_last=False)
            with FLOPs() as count:
                jobs[name, "fp32"]()
            flops[name] = count.total
            _, jobs[name, "tutorial"] = tutorial(name, device, folder)
        taken = take_turns(jobs, device, rounds, least)
    rates, rows = [2 * 2048**3 / taken[name] for name in ("matmul", "1 x 1")], []
    for name in names:
        if name == "fid":
            speeds = {f"images/s {p}": f"{50 / taken['fid', p]:,.0f}" for p in ("fp32", "bf16")}
            rows.append({"script": "fid.py, Inception"} | speeds)
            rows.append({"script": f"fid.py, Frechet distance: {taken['frechet']:.2f} s"})
            continue
        args = importlib.import_module(name).parse_args([])
        count = args.batch_size * getattr(args, "n_critic", 1)
        row = {"script": f"{name}.py"}
        row |= {f"images/s {p}": "" for p in ("fp32", "bf16")}
        row |= {f"images/s {p}": f"{count / taken[name, p]:,.0f}" for p in precisions(name)}
        row["GFLOP"] = f"{flops[name] / count / 1e9:.4f}"
        row["of matmul"] = f"{flops[name] / taken[name, 'fp32'] / max(rates):.0%}"
        row["batch"] = f"{taken[name, 'batch'] / taken[name, 'fp32']:.2%}"
        row["memory"] = f"{peaks[name] / 1e9:.2f} GB"
        row["channels"] = f"{taken[name, 'contiguous'] / taken[name, 'fp32']:.2f}"
        row |= {"tutorial fp32": "", "tutorial bf16": ""}
        for precision in precisions(name):
            row[f"tutorial {precision}"] = f"{taken[name, 'tutorial'] / taken[name, precision]:.2f}"
        rows.append(row)
    return rates, rows


def learned(job):
    """A row of the table of --learn: of a script, or of the tutorials' loop, after so many seconds."""
    name, who, _, _, _, device = job
    torch.set_num_threads(1)
    images, taken, steps = samples_of(*job)
    training = datasets.MNIST(ROOT / "data").data[:, None]
    distance, precision, recall = fid.Judge("mnist", training, device, ROOT / "data")(images)
    row = {"script": f"{name}.py", "loop": who, "minutes": f"{taken / 60:.1f}", "steps": f"{steps:,}"}
    return row | {"distance": f"{distance:.1f}", "precision": f"{precision:.3f}", "recall": f"{recall:.3f}"}


def samples_of(name, who, flags, limit, total, device):
    """Samples, as bytes, of a script or of its networks in the tutorials' loop; the seconds and the steps."""
    script, steps = importlib.import_module(name), 0
    if who == "script":
        generator, taken, steps = script_learns(script, flags, limit, device)
    else:
        player, step = tutorial(name, torch.device(device))
        start = clock(device)
        with contextlib.redirect_stdout(io.StringIO()):
            while clock(device) - start < limit:
                step()
                steps += 1
        generator, taken = player.ema or player.generator, clock(device) - start
    torch.manual_seed(0)
    args = script.parse_args(["--dataset", "mnist", "--device", device])
    if name == "pix2pix":
        images = script.sample(generator, script.load_pairs(args, train=False)[0][:total] / 255)
    elif name == "cyclegan":
        domains, _ = script.load_domains(args, train=False)
        images = script.sample(generator["ab"], domains["a"][:total] / 255)
    else:
        noise = getattr(script, "uniform", torch.randn)
        images = script.sample(
            generator, noise(total, generator.latent_dim)
        )  # cgan.py: of all classes in turn
    return (images * 255).round().to(torch.uint8), taken, steps


def learn(names, flags, device, minutes, samples):
    """Rows of a table: what scripts, and their default networks in the tutorials' loop, learn in a time."""
    fid.load_classifier("mnist", ROOT / "data", device)  # before many ask for it at once
    loops = ("script",) if flags else ("script", "tutorial")
    jobs = [(name, who, flags, 60 * minutes, samples, str(device)) for name in names for who in loops]
    workers = torch.get_num_threads() if device.type == "cpu" else 1
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        return [*tqdm(pool.map(learned, jobs), total=len(jobs), unit=" runs")]


def table(rows, markdown):
    """The rows as text, columns aligned, or as Markdown."""
    columns = list(max(rows, key=len))
    lines = [columns, *([row.get(column, "") for column in columns] for row in rows)]
    if markdown:
        lines = [f"| {' | '.join(line)} |" for line in lines]
        return "\n".join([lines[0], "|" + " --- |" * len(columns), *lines[1:]])
    widths = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


def main(argv=None):
    parser = argparse.ArgumentParser("benchmark.py", description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--script", choices=[*SHAPES, "fid"], help="this one alone")
    add("--device", default="auto", help="auto takes cuda, then mps, then cpu; or any torch device string")
    add("--quick", action="store_true", help="one measurement of each, which is not to be quoted")
    help_ = "train for so many minutes each, and measure the samples instead of the speed"
    add("--learn", type=float, metavar="MINUTES", help=help_)
    add("--flags", default="", help="for --learn: flags of the script")
    add("--markdown", action="store_true", help="print the table as Markdown")
    args = parser.parse_args(argv)
    gpu = accelerator.current_accelerator() if accelerator.is_available() else "cpu"
    device = torch.device(gpu if args.device == "auto" else args.device)
    if args.learn and args.script == "fid":
        parser.error("--learn: fid.py does not train; give --script another, or leave it out")
    if args.learn:
        samples = 1000 if args.quick else 10_000
        names = [args.script] if args.script else [*SHAPES]
        print(table(learn(names, args.flags.split(), device, args.learn, samples), args.markdown))
        return
    names = [args.script] if args.script else [*SHAPES, "fid"]
    rates, rows = measure(names, device, args.quick)
    print(f"torch {torch.__version__} on {device}, {torch.get_num_threads()} threads; ", end="")
    as_product, as_convolution = (f"{rate / 1e9:,.0f} GFLOP/s" for rate in rates)
    print(f"matrix product in fp32: {as_product}, as a 1 x 1 convolution {as_convolution}")
    print(table(rows, args.markdown))


if __name__ == "__main__":
    main()
