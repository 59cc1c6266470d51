"""The three scripts that keep the old frame for now: pix2pix, cyclegan, stylegan.

Every script for a few steps, and the mathematics behind each against independent values; the files in
pretrained/, benchmark.py and the tools, as far as they are about these scripts.

    pytest tests                            # all
    pytest tests -k stylegan                # what is about one script

Runs on a CPU, without network, on the MNIST in data/. What is special to a script has a section of its own
below. All is computed with one thread: tiny batches want no more. What the scripts share word for word is
tested with pix2pix.py, which has the smallest networks here.
"""

import ast
import contextlib
import copy
import csv
import functools
import hashlib
import importlib
import inspect
import io
import json
import math
import multiprocessing
import os
import re
import resource
import runpy
import shutil
import signal
import struct
import subprocess
import sys
import time
import types
import urllib.error
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
import torchvision
from matplotlib.figure import Figure
from PIL import Image
from torch import nn

sys.path.extend(str(Path(__file__).resolve().parent.parent / folder) for folder in ("evidence", "tools"))

import benchmark
import cyclegan
import export
import fid
import pix2pix
import strip
import stylegan

ROOT = Path(__file__).resolve().parent.parent
torch.set_num_threads(1)
signal.signal(signal.SIGINT, signal.default_int_handler)  # which the background job of a shell ignores
os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that tests start

# %% Cases: what differs between the scripts

# Shapes that leave the layers, for a batch of three.


def maps(*rows):
    """Shapes of feature maps for a batch of three, of rows (channels, pixels a side, how many layers)."""
    return [(3, width, side, side) for width, side, count in rows for _ in range(count)]


U_NET = maps((32, 16, 2), (64, 8, 3), (128, 4, 3), (256, 2, 3), (256, 1, 2), (256, 2, 3))
U_NET += maps(
    (512, 2, 1), (128, 4, 3), (256, 4, 1), (64, 8, 2), (128, 8, 1), (32, 16, 2), (64, 16, 1), (1, 32, 2)
)
RESNET = maps((1, 38, 1), (32, 32, 3), (64, 16, 3), (128, 8, 3))
RESNET += 4 * maps((128, 10, 1), (128, 8, 3), (128, 10, 1), (128, 8, 2))
RESNET += maps((64, 16, 3), (32, 32, 3), (32, 38, 1), (1, 32, 2))
PATCH = maps((64, 16, 2), (128, 15, 3), (1, 14, 1))
STYLED = [(3, 128)] * 16  # the mapping; then up, conv, blur and style of each layer
for width, side, before in ((128, 4, 0), (128, 8, 128), (64, 16, 128), (32, 32, 64)):
    STYLED += maps((before, side, 1)) if before else maps((width, side, 1))
    STYLED += [*maps((width, side, 2)), (3, 2 * width), *maps((width, side, 3)), (3, 2 * width)]
STYLED += maps((1, 32, 1))
STYLE_D = maps((32, 32, 5), (32, 16, 1), (64, 16, 5), (64, 8, 1), (128, 8, 5), (128, 4, 3), (129, 4, 1))
STYLE_D += [*maps((128, 4, 2)), (3, 2048), (3, 128), (3, 128), (3, 1)]


@dataclass
class Case:
    """A script: shapes and parameters of its networks, and what is its own in a short run and a step."""

    shapes: tuple
    counts: tuple
    step: dict = field(default_factory=dict)  # the arguments of train_step after `real`
    flags: tuple = ("--batch-size", "4")  # with 24 images, six steps an epoch
    betas: tuple = (0.5, 0.999)
    side: int = 32
    grid: tuple = (8, 8)  # columns and rows of samples
    real: int = 4  # which argument of train_step has the real images
    batch: int = 4  # of these in a step of a short run
    walks: dict = field(default_factory=lambda: {"interpolation.png": (10, 8)})  # pictures, columns and rows
    form: dict = field(default_factory=dict)  # the discriminator's arguments


P2P_STEP = {"l1_weight": 100.0, "gan_weight": 1.0, "condition": True}
P2P = {
    "real": 5,
    "grid": (10, 6),
    "walks": {"variants.png": (8, 5)},
    "flags": ("--batch-size", "4", "--decay", "1", "--width", "8"),
}
CYCLE = {"real": 7, "grid": (10, 8), "walks": {}, "batch": 2}
CYCLE |= {"flags": ("--batch-size", "2", "--decay", "1", "--pool", "2", "--width", "8", "--blocks", "1")}
CYCLE |= {"form": {"channels": 1, "norm": "instance"}}
STYLE = {"step": {"mixing": 0.9, "r1_weight": 1.0, "ema_decay": 0.99}, "real": 5, "betas": (0.0, 0.99)}
STYLE |= {"flags": ("--batch-size", "4", "--width", "8", "--latent-dim", "16")}
STYLE |= {"walks": {"interpolation.png": (10, 8), "mixing.png": (7, 7), "truncation.png": (7, 6)}}
CASES = {
    "pix2pix": Case((U_NET, PATCH), (4_165_217, 135_489), P2P_STEP, **P2P),
    "cyclegan": Case((RESNET, PATCH), (1_367_105, 134_209), **CYCLE),
    "stylegan": Case((STYLED, STYLE_D), (897_825, 844_897), **STYLE),
}
TRANSLATORS = pix2pix, cyclegan
TRANSLATION = [module.SCRIPT for module in TRANSLATORS]
NOISE_SCRIPTS = ["stylegan"]  # their inputs are noise
MEASURED = *TRANSLATORS, stylegan  # after each epoch
ONE = pytest.mark.parametrize("script", ["pix2pix"], indirect=True)  # for what all share word for word


def pytest_generate_tests(metafunc):
    """A test that asks for `script` runs with each, or with the one that its name begins with."""
    marked = any("script" in mark.args[0] for mark in metafunc.definition.iter_markers("parametrize"))
    if "script" in metafunc.fixturenames and not marked:
        about = metafunc.function.__name__.split("_")[1]
        scripts = [name for name in CASES if name.split("_")[0] == about]
        metafunc.parametrize("script", scripts or CASES, indirect=True)


@pytest.fixture
def script(request):
    """A script as a module."""
    return importlib.import_module(request.param)


@pytest.fixture
def case(script):
    return CASES[script.SCRIPT]


SAVEFIG, FEW = Figure.savefig, 8


def save_blank(figure, path):
    """Stands in for Figure.savefig, which takes longer than the short runs that end in it."""
    Image.new("RGB", tuple(round(100 * side) for side in figure.get_size_inches())).save(path)


@pytest.fixture(autouse=True)
def light(monkeypatch):
    """Plots are blank, but in `watch` and where a test is about them; of paths there are few."""
    monkeypatch.setattr(Figure, "savefig", save_blank)
    monkeypatch.setattr(stylegan, "PATHS", FEW)


# %% Helpers


@pytest.fixture(scope="session")
def small_data(tmp_path_factory):
    """A data folder in MNIST's layout that holds the first 24 real images of each part."""
    folder = tmp_path_factory.mktemp("data") / "small"
    raw = folder / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for path in (ROOT / "data/MNIST/raw").glob("*-ubyte"):
        size, header = (784, 16) if "images" in path.name else (1, 8)
        data = path.read_bytes()[: header + 24 * size]
        (raw / path.name).write_bytes(data[:4] + struct.pack(">I", 24) + data[8:])
    return folder


@pytest.fixture
def small(case, small_data):
    """The flags for the small data folder, in batches that make epochs of six steps."""
    return ["--dataset", "mnist", "--data-dir", str(small_data), "--device", "cpu", *case.flags]


@pytest.fixture
def flags(small, tmp_path):
    """The flags of a short run of two epochs, six steps each, into tmp_path/run."""
    return [*small, "--epochs", "2", "--out-dir", str(tmp_path / "run")]


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    monkeypatch.setattr(torch.hub, "urlopen", refuse)


def mnist_as(script, folder=ROOT / "data", count=None):
    """MNIST's first training images as uint8 (N, 1, H, W), as this script has to prepare them."""
    images = torchvision.datasets.MNIST(folder).data[:count, None]
    if script in MEASURED:
        images = nn.functional.pad(images, (2, 2, 2, 2))
        return images[1::2] if script is cyclegan and count is None else images  # A is of the others
    return images


def read(path):
    return torch.load(path, weights_only=True)


assert_same_bits = functools.partial(torch.testing.assert_close, rtol=0, atol=0, equal_nan=True)


def assert_same_run(a, b):
    """Two checkpoints hold the same networks, optimisers, step and history; their folders may differ."""
    a, b = read(a), read(b)
    assert a.pop("script") == b.pop("script")
    a["settings"] = b["settings"] = None
    assert_same_bits(a, b)


def snapshot(folder):
    """The path and content hash of every file below a folder."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.md5(path.read_bytes()).hexdigest() for path in files}


def messages(text):
    """The lines that a process left on stderr, without the progress bar."""
    return [part for part in re.split("[\r\n]", text) if part.strip() and "%|" not in part]


def fails(script, argv, capsys, *words, status=2, last=False):
    """main(argv) ends with `status` and one line on stderr that has all `words`; `last`: after warnings."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit_:
        script.main([str(arg) for arg in argv])
    assert exit_.value.code == status
    lines = messages(capsys.readouterr().err)
    assert len(lines) == 1 or last, lines
    for word in (f"{script.SCRIPT}.py: ", *map(str, words)):
        assert word in lines[-1], lines[-1]


def at_call(owner, name, number, act):
    """Before call `number` of the function owner.name, send the signal `act`, or call act(*args)."""
    original, calls = getattr(owner, name), []

    def function(*args, **kwargs):
        calls.append(None)
        if len(calls) == number and callable(act):
            act(*args)
        elif len(calls) == number:
            os.kill(os.getpid(), act)
        return original(*args, **kwargs)

    setattr(owner, name, function)


def spy(monkeypatch, owner, name):
    """A list to which each call of the function owner.name adds its arguments."""
    calls, original = [], getattr(owner, name)
    monkeypatch.setattr(owner, name, lambda *args: (calls.append(args), original(*args))[1])
    return calls


def die_inside_save(state, path):
    """Half a checkpoint, and then SIGKILL."""
    whole = io.BytesIO()
    torch.serialization.save(state, whole)
    Path(path).write_bytes(whole.getvalue()[: whole.tell() // 2])
    os.kill(os.getpid(), signal.SIGKILL)


class Pickled:
    """Leaves a file behind when it is unpickled."""

    def __reduce__(self):
        return Path.touch, (Path("unpickled"),)


FORKS = multiprocessing.get_context("forkserver")  # a process that has imported what takes long, and forks
FORKS.set_forkserver_preload(["torch", "torchvision", "matplotlib.figure", "pytest"])


def start(function, *args, folder=None, output=None, environ=None):
    """Start function(*args) in another process, in a folder; what it prints goes to the file `output`."""
    process = FORKS.Process(target=work, args=(function, args, folder, output, environ or {}))
    process.start()
    return process


def work(function, args, folder, output, environ):
    os.setsid()
    os.environ.update(environ)
    for number in (1, 2):
        os.dup2(os.open(output or os.devnull, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    os.chdir(folder or ROOT)
    Figure.savefig, stylegan.PATHS = save_blank, FEW
    function(*args)


def finish(process, status=0):
    process.join(120)
    assert process.exitcode == status


def run_main(name, argv, change=None, *args):
    """main(argv) of a script, after change(its module, *args)."""
    script = importlib.import_module(name)
    if change:
        change(script, *args)
    script.main([str(arg) for arg in argv])


# %% The project


def test_project_has_its_data():
    files = sorted((ROOT / "data/MNIST/raw").glob("*-ubyte"))
    assert [path.name.split("-")[0] for path in files] == ["t10k", "t10k", "train", "train"]
    digest = hashlib.md5(b"".join(path.read_bytes() for path in files)).hexdigest()
    assert digest == "dc5cd84effeb4caaf3bfa14e839ae730"


SECTIONS = ["Settings", "Networks", "Losses", "Training step", "Training", "Plumbing", "Main"]
SHARED = {"Plumbing": "pix2pix", "Folders": "pix2pix", "Pairs": "pix2pix"}  # and their origins
LONGEST = {"pix2pix": 430, "cyclegan": 520, "stylegan": 560}  # lines outside these
OWN_SECTIONS = {"Folders", "Pairs", "Processes", "Styles"}  # of scripts that have more than the frame


def sections(name):
    """The parts of a script from its first banner on, as (title, text)."""
    parts = re.split(r"^# %% (.*)\n", (ROOT / f"{name}.py").read_text(), flags=re.MULTILINE)
    return list(zip(parts[1::2], parts[2::2]))


def section(name, title):
    """The text of a section of a script, or None."""
    texts = [text for head, text in sections(name) if head.split(":")[0] == title]
    return texts[0] if texts else None


def test_script_has_the_frame(script):
    """Its sections are in order, its plumbing is the same text, no part is too long; it is alone."""
    titles = [title.split(":")[0] for title, _ in sections(script.SCRIPT)]
    assert [title for title in titles if title not in OWN_SECTIONS] == SECTIONS
    shared = {title: section(script.SCRIPT, title) for title in SHARED}
    for title, text in shared.items():
        assert text in (None, section(SHARED[title], title))
    own = sum(
        text.count("\n") for title, text in sections(script.SCRIPT) if title.split(":")[0] not in SHARED
    )
    source = Path(script.__file__).read_text()
    (train,) = (node for node in ast.parse(source).body if getattr(node, "name", "") == "train")
    assert own <= LONGEST[script.SCRIPT]
    assert shared["Plumbing"].count("\n") <= 180
    assert train.end_lineno - train.lineno < 70
    nodes = list(ast.walk(ast.parse(source)))
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    allowed = {*sys.stdlib_module_names, "torch", "torchvision", "matplotlib", "tqdm", "PIL", "numpy", "fid"}
    assert {name.split(".")[0] for name in names} <= allowed


def test_help_shows_every_flag_and_default(script, capsys):
    with pytest.raises(SystemExit) as exit_:
        script.main(["--help"])
    assert exit_.value.code == 0
    text = capsys.readouterr().out
    shared = "epochs max-steps device lr-g lr-d batch-size dataset data-dir out-dir seed precision".split()
    shared += ["task", "translate"] if script in TRANSLATORS else ["latent-dim"]
    for flag in [*shared, "resume", "generate", "checkpoint"]:
        assert f"--{flag} " in text
    assert "default: 42" in text
    assert "benchmark.py" in " ".join(text.split())  # tells whether bf16 is faster


# %% A run and what it leaves


@pytest.fixture(scope="session")
def watch(tmp_path_factory, small_data):
    """Runs a script, once for all tests that ask, and keeps what it printed, wrote, drew and trained on."""
    runs = {}

    def watched(script):
        if script not in runs:
            case, folder = CASES[script.SCRIPT], tmp_path_factory.mktemp(script.SCRIPT) / "run"
            seen = types.SimpleNamespace(folder=folder)
            flags = ["--dataset", "mnist", "--data-dir", str(small_data), "--device", "cpu", *case.flags]
            out, err = io.StringIO(), io.StringIO()
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(script, "LOG_EVERY", 4)
                patch.setattr(Figure, "savefig", SAVEFIG)
                steps, drawn = spy(patch, script, "train_step"), spy(patch, script, "sample")
                seen.keys = spy(patch, script, "reseed")
                with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                    script.main([*flags, "--epochs", "2", "--out-dir", str(folder)])
            seen.given, seen.real = steps, [args[case.real] for args in steps]
            seen.drawn = [inputs for _, *inputs in drawn]
            seen.out, seen.err = out.getvalue(), err.getvalue()
            runs[script] = seen
        return runs[script]

    return watched


@pytest.fixture
def whole(script, watch):
    """The run of two epochs, six steps each, that `watch` has seen."""
    return watch(script)


def test_run_leaves_everything(script, case, whole):
    assert "24 images, 6 steps an epoch" in whole.out
    assert "epoch 1/2  " in whole.out
    assert "epoch 2/2  " in whole.out
    assert "images/s" in whole.err  # the progress bar
    run = whole.folder
    left = {"checkpoint.pt", "config.json", "history.csv", "losses.png", "progress.gif"}
    left |= {*case.walks, "samples/epoch_0001.png", "samples/epoch_0002.png"}
    assert {*snapshot(run)} == left
    cell = case.side + 2  # an image and the line beside it
    rule = 4 if script is cyclegan else 0  # between its two directions
    for name, (across, down) in (
        {"samples/epoch_0002.png": case.grid, "progress.gif": case.grid} | case.walks
    ).items():
        with Image.open(run / name) as image:
            image.load()
            assert image.size == (across * cell + 2, down * cell + 2 + rule)
            assert image.convert("L").getextrema()[0] < image.convert("L").getextrema()[1]
    assert Image.open(run / "progress.gif").n_frames == 2
    assert Image.open(run / "losses.png").width == 800

    config = json.loads((run / "config.json").read_text())
    assert (config["epochs"], config["seed"], config["device"]) == (2, 42, "cpu")
    assert config["batch_size"] == case.batch
    assert config["torch"] == torch.__version__

    checkpoint = read(run / "checkpoint.pt")
    assert checkpoint["step"] == 12
    history = checkpoint["history"]
    assert history.shape == (12, len(script.METRICS))
    rows = list(csv.DictReader((run / "history.csv").read_text().splitlines()))  # of LOG_EVERY = 4 steps
    measured = [("1", "6")] if script in MEASURED else []
    assert [(row["epoch"], row["step"]) for row in rows] == [("1", "4"), *measured, ("2", "8"), ("2", "12")]
    for name, mean in zip(script.METRICS, history[8:12].mean(0).tolist()):
        assert float(rows[-1][name]) == pytest.approx(mean, rel=1e-5)


def test_run_shows_every_real_image_once_an_epoch_in_a_new_order(script, case, whole, small_data):
    for real in whole.real:
        assert real.dtype == torch.float32
        assert real.min() == -1
        assert 0.9 < real.max() <= 1
    batches = [((real + 1) * 127.5).round().to(torch.uint8) for real in whole.real]
    assert [len(batch) for batch in batches] == [case.batch] * 12
    truth = [image.numpy().tobytes() for image in mnist_as(script, small_data)]
    epochs = [[image.numpy().tobytes() for image in torch.cat(batches[i : i + 6])] for i in (0, 6)]
    for epoch in epochs:
        assert sorted(epoch) == sorted(truth)
    assert epochs[0] != epochs[1]
    assert epochs[0] != truth


def test_run_drops_the_last_short_batch(script, case, flags, monkeypatch):
    calls, size = spy(monkeypatch, script, "train_step"), 5 if script is cyclegan else 10
    script.main([*flags, "--batch-size", str(size)])  # 24 = 2 * 10 + 4, and 12 in each domain 2 * 5 + 2
    assert [len(args[case.real]) for args in calls] == [size] * 4


def test_run_has_fresh_noise_at_every_step(script, whole):
    """The generator is seeded for each step from (seed, step), and all these seeds differ."""
    steps = [key for key in whole.keys if "step" in key]
    assert steps == [(42, "step", step) for step in range(12)]
    first = []
    for key in steps:
        script.reseed(*key)
        first.append(torch.rand(1).item())
    assert len(set(first)) == 12
    script.reseed(*steps[3])
    assert torch.rand(1).item() == first[3]
    # The hash that published figures rest on.
    script.reseed(42, "step", 7)
    assert torch.initial_seed() == 4_671_050_586_337_425_734


def report_with_few_files(folder):
    """As on a laptop after 1,020 epochs: there are more pictures than files can be open."""
    opened = len(os.listdir("/dev/fd")) + 7
    resource.setrlimit(resource.RLIMIT_NOFILE, (opened, opened))
    rows = torch.zeros(3, len(pix2pix.METRICS)), torch.empty(0, 1 + len(pix2pix.DISTANCES))
    pix2pix.write_report(folder, *rows, 3)


def test_run_shows_at_most_100_frames(tmp_path):
    (tmp_path / "samples").mkdir()
    for number in range(1, 10_102, 50):
        Image.new("L", (8, 8), number // 50).save(tmp_path / "samples" / f"epoch_{number:04d}.png")
    finish(start(report_with_few_files, tmp_path))
    with Image.open(tmp_path / "progress.gif") as frames:
        assert frames.n_frames == 100
        shown = []
        for number in range(100):
            frames.seek(number)
            shown.append(frames.convert("L").getpixel((0, 0)))
    assert (shown[0], shown[-1]) == (0, 202)  # the first and the last, whose number has five digits
    assert {b - a for a, b in zip(shown, shown[1:])} == {2, 3}  # evenly spaced


def test_sampling_is_per_image_and_leaves_the_generator_alone(script):
    generator, _ = networks(script)
    before = {name: value.clone() for name, value in generator.state_dict().items()}
    inputs = inputs_of(script, 20)
    images = script.sample(generator, *inputs)
    assert generator.training
    assert_same_bits(before, dict(generator.state_dict()))
    assert images.dtype == torch.uint8
    assert len(images) == 20
    alone = script.sample(generator, *(rows[13:14] for rows in inputs))
    assert (images[13].int() - alone[0].int()).abs().max() <= 1  # a grey level, by rounding


def test_settings_reach_the_run(script, case, flags, tmp_path, whole, monkeypatch):
    """The seed decides where the networks begin, both rates reach their optimisers, betas are the papers'.

    Weights are channels-last, but where that is slower: with instance normalisation.
    """
    calls = spy(monkeypatch, script, "train_step")
    script.main([*flags, "--max-steps", "1", "--seed", "1", "--lr-g", "0.0011", "--lr-d", "0.0022"])
    placed = calls[0][: 0 if script is cyclegan else 2]
    for weight in (weight for network in placed for weight in network.parameters()):
        assert weight.ndim != 4 or weight.is_contiguous(memory_format=torch.channels_last)
    checkpoint, other = (read(folder / "checkpoint.pt") for folder in (tmp_path / "run", whole.folder))
    for name, rate in (("optimizer_g", 0.0011), ("optimizer_d", 0.0022)):
        (group,) = checkpoint[name]["param_groups"]
        assert (group["lr"], tuple(group["betas"]), group["fused"]) == (rate, case.betas, True)
    weights = [name for name, value in checkpoint["generator"].items() if value.ndim > 1]
    assert weights
    assert not any(torch.equal(checkpoint["generator"][name], other["generator"][name]) for name in weights)


def test_bf16_keeps_weights_and_losses_in_fp32(script, flags, tmp_path, whole):
    script.main([*flags, "--precision", "bf16", "--max-steps", "2"])
    checkpoint, fp32 = (read(folder / "checkpoint.pt") for folder in (tmp_path / "run", whole.folder))
    assert all(v.dtype == torch.float32 for v in checkpoint["generator"].values() if v.is_floating_point())
    assert checkpoint["history"].dtype == torch.float32
    assert not torch.equal(checkpoint["history"], fp32["history"][:2])  # so bf16 was used at all
    assert torch.allclose(checkpoint["history"][0], fp32["history"][0], atol=0.05, rtol=0.05)


@pytest.mark.parametrize("low", [False, True])
@ONE
def test_bf16_is_in_the_layers_only(script, low):
    """Not in what leaves a network, in losses and gradients, in samples, and inside `with fp32():`."""
    kinds, pair = [], networks(script)
    args = types.SimpleNamespace(device="cpu", precision="bf16" if low else "fp32")
    generator, second = (script.place(network, args) for network in pair)
    for network in (generator, second):
        layers = [m for m in network.modules() if isinstance(m, (nn.Linear, nn.ConvTranspose2d, nn.Conv2d))]
        layers[0].register_forward_hook(lambda module, args, out: kinds.append(out.dtype))
    optimizers = Recorder(generator, generator), Recorder(second, second)
    names = "generator", "second", "optimizer_g", "optimizer_d"
    seen = one_round(script, **dict(zip(names, (generator, second, *optimizers))))
    assert set(kinds) == {torch.bfloat16 if low else torch.float32}
    outside = [*seen.fakes, *seen.scores, *seen.metrics.values(), *optimizers[0].seen[0]]
    assert {tensor.dtype for tensor in outside} == {torch.float32}
    kinds.clear()
    script.sample(generator, *seen.g_inputs[0])
    with script.fp32():
        second(*seen.inputs[0])
    assert set(kinds) == {torch.float32}
    kinds.clear()
    second(*seen.inputs[0])  # and again in bf16 after that
    assert set(kinds) == {torch.bfloat16 if low else torch.float32}
    twin = copy.deepcopy(generator).eval()  # a moving average, for example, has layers of its own
    for parameter in twin.parameters():
        parameter.data.zero_()
    assert not twin(*seen.g_inputs[0]).any()


def run_alone(path, argv):
    sys.path[:] = [entry for entry in sys.path if entry not in ("", str(ROOT))]
    sys.argv = [str(path), *argv]
    runpy.run_path(str(path), run_name="__main__")


def test_file_alone_in_an_empty_folder_runs(script, small, tmp_path):
    path = shutil.copy(script.__file__, tmp_path)
    (tmp_path / "runs" / script.SCRIPT / "001").mkdir(parents=True)
    argv = [*small, "--epochs", "1", "--max-steps", "1"]
    finish(start(run_alone, path, argv, folder=tmp_path, output=tmp_path / "out"))
    assert "images/s" in (tmp_path / "out").read_text()
    run = tmp_path / "runs" / script.SCRIPT / "002"  # the next that is free
    assert (run / "samples" / "epoch_0001.png").is_file()


# %% Generating


@pytest.mark.parametrize("script", NOISE_SCRIPTS, indirect=True)
def test_generate(script, case, whole, tmp_path, capsys):
    checkpoint = whole.folder / "checkpoint.pt"
    before = snapshot(whole.folder)
    argv, count = ["--checkpoint", str(checkpoint), "--generate"], 300 if script is stylegan else 20
    script.main([*argv, str(count)])
    folder = whole.folder / "generated" / "001"
    assert str(folder) in capsys.readouterr().out
    files = sorted(folder.rglob("*.png"), key=lambda path: path.name)
    assert [path.name for path in files] == [f"{i:05d}.png" for i in range(count)]
    assert {path.parent for path in files} == {folder}
    images = [Image.open(path) for path in files]
    assert {(image.size, image.mode) for image in images} == {((case.side, case.side), "L")}
    assert len({image.tobytes() for image in images}) == count

    # The same seed gives the same images again, and fewer or more of them: of a batch and of several.
    for few in (5, count - 10):
        script.main([*argv, str(few), "--out-dir", str(tmp_path / f"{few}")])
        assert len(snapshot(tmp_path / f"{few}")) == few
        assert snapshot(tmp_path / f"{few}").items() <= snapshot(folder).items()
    script.main([*argv, "20", "--seed", "7", "--out-dir", str(tmp_path / "7")])
    assert not {*snapshot(tmp_path / "7").values()} & {*snapshot(folder).values()}
    shutil.rmtree(whole.folder / "generated")
    assert snapshot(whole.folder) == before  # nothing written over


def fid_json(capsys, *argv):
    """The object that fid.py prints for these arguments."""
    capsys.readouterr()
    fid.main([*map(str, argv), "--json", "--device", "cpu"])
    return json.loads(capsys.readouterr().out)


@pytest.fixture
def judged(monkeypatch, tmp_path):
    """A folder of its own for the classifiers of fid.py, and the flags that measure after each epoch."""
    monkeypatch.setattr(fid, "CACHE", tmp_path / "cache")
    return ["--fid-every", "1", "--fid-samples", "12"]


def test_distance_is_tracked_and_changes_no_bit(script, flags, judged, tmp_path, whole, monkeypatch, capsys):
    """Even if the classifier is trained in the middle; and it is what fid.py says of these samples."""
    monkeypatch.setattr(script, "LOG_EVERY", 4)
    measured, run = spy(monkeypatch, fid.Judge, "__call__"), tmp_path / "run"
    drawn = spy(monkeypatch, script, "sample")
    script.main([*flags, *judged])
    first, second = (z for _, z, *_ in drawn if len(z) == 12)
    assert torch.equal(first, second)
    out, err = capsys.readouterr()
    assert "training a classifier of mnist, once" in err
    checkpoint, plain = read(run / "checkpoint.pt"), read(whole.folder / "checkpoint.pt")
    columns = [0, *(1 + script.DISTANCES.index(name) for name in ("distance", "precision", "recall"))]
    distances = checkpoint.pop("distances")[:, columns]
    assert plain.pop("distances")[:, columns[1:]].isnan().all()  # if there are any
    checkpoint["settings"] = plain["settings"] = checkpoint["script"] = plain["script"] = None
    assert_same_bits(checkpoint, plain)
    assert distances[:, 0].tolist() == [6, 12]
    assert f"  distance {distances[1, 1]:.3f}  precision {distances[1, 2]:.3f}  recall" in out
    rows = list(csv.DictReader((run / "history.csv").read_text().splitlines()))
    assert [int(row["step"]) for row in rows] == [4, 6, 8, 12]
    assert [row["recall"] == "nan" for row in rows] == [True, False, True, False]
    found = [float(row["distance"]) for row in rows[1::2]]
    assert found == pytest.approx(distances[:, 1].tolist(), rel=1e-5)
    means = checkpoint["history"][4:6].mean(0).tolist()  # of the steps since the row before
    assert [float(rows[1][name]) for name in script.METRICS] == pytest.approx(means, rel=1e-5)
    assert Image.open(run / "losses.png").height > Image.open(whole.folder / "losses.png").height
    fakes = [images for _, images in measured]
    assert [len(images) for images in fakes] == [12, 12]
    for number, image in enumerate(fakes[-1]):
        (tmp_path / "samples").mkdir(exist_ok=True)
        Image.fromarray(image[0].numpy()).save(tmp_path / "samples" / f"{number}.png")
    argv = ["mnist:test", tmp_path / "samples", "--data-dir", flags[3], "--features", "classifier"]
    result = fid_json(capsys, *argv)
    expected = result["frechet_distance"], result["precision"], result["recall"]
    assert distances[1, 1:].tolist() == pytest.approx(expected, rel=1e-4)


def kill_inside_judge(script, cache):
    fid.CACHE, script.SAVE_EVERY = cache, 0
    at_call(fid, "measure", 3, signal.SIGKILL)  # the reference, epoch 1, epoch 2


@ONE
def test_distance_after_a_kill_is_the_same(script, flags, judged, tmp_path):
    name, (_, _, whole, part) = script.SCRIPT, ("", "", tmp_path / "whole", tmp_path / "part")
    script.main([*flags, *judged, "--out-dir", str(whole)])
    argv = [*flags, *judged, "--out-dir", str(part)]
    finish(start(run_main, name, argv, kill_inside_judge, tmp_path / "cache"), -signal.SIGKILL)
    assert read(part / "checkpoint.pt")["step"] == 12
    assert len(read(part / "checkpoint.pt")["distances"]) == 1
    script.main(["--resume", str(part / "checkpoint.pt")])
    assert_same_run(part / "checkpoint.pt", whole / "checkpoint.pt")
    # And a run that is done can be measured still.
    late = ["--resume", str(tmp_path / "late" / "checkpoint.pt")]
    script.main([*flags, "--out-dir", str(tmp_path / "late")])
    script.main([*late, *judged])
    assert_same_bits(read(late[1])["distances"][-1:], read(whole / "checkpoint.pt")["distances"][1:])


@ONE
def test_distance_needs_fid_beside_the_script(script, flags, judged, tmp_path, monkeypatch, capsys):
    fails(script, [*flags, *judged[:3], "3"], capsys, "--fid-samples", "3")
    assert script.open_judge(script.parse_args([]), None) is None
    monkeypatch.setitem(sys.modules, "fid", None)
    fails(script, [*flags, *judged], capsys, "--fid-every", "fid.py", "beside")
    assert not (tmp_path / "run").exists()


def stop(script, name, number, act, save_every=60):
    """Prepare what at_call says, in a function of the script or in torch.save."""
    script.SAVE_EVERY = save_every
    at_call(script.torch if name == "save" else script, name, number, act)


# %% Stopping and resuming


def test_resume_goes_on(script, flags, tmp_path, whole):
    """From inside an epoch."""
    script.main([*flags, "--max-steps", "4"])
    script.main(["--resume", str(tmp_path / "run" / "checkpoint.pt"), "--max-steps", "12"])
    assert_same_run(tmp_path / "run" / "checkpoint.pt", whole.folder / "checkpoint.pt")


@pytest.mark.parametrize("script", ["pix2pix", "stylegan"], indirect=True)
def test_resume_is_exact_to_the_bit(script, flags, tmp_path, whole):
    """SIGKILL within a step, within a save and before pictures, SIGTERM, Ctrl-C, and an epoch more."""
    checkpoint, name, killed = tmp_path / "run" / "checkpoint.pt", script.SCRIPT, -signal.SIGKILL
    resume = ["--resume", str(checkpoint)]
    steps = [
        ([*flags, "--epochs", "1"], ("generator_loss", 4, signal.SIGKILL), killed, 0),
        (resume, ("save", 2, die_inside_save), killed, 0),  # the first save opens the resumed run
        (resume, ("generator_loss", 3, signal.SIGTERM, 0), 130, 2),  # saved at each step
        ([*resume, "--epochs", "2"], ("generator_loss", 4, signal.SIGINT, 0), 130, 5),  # and made longer
        (resume, ("generator_loss", 4, signal.SIGTERM), 130, 6),  # steps 7 to 9 are lost
        (resume, ("make_grid", 5 if script is stylegan else 3, signal.SIGKILL), killed, 12),
    ]
    for number, (argv, (function, call, *act), status, step) in enumerate(steps):
        output = tmp_path / f"{number}.txt"
        finish(start(run_main, name, argv, stop, function, call, *act, output=output), status)
        if status == 130:
            assert f"{name}.py: stopped; go on with --resume {checkpoint}" in messages(output.read_text())
        assert read(checkpoint)["step"] == step
        assert (tmp_path / "run" / "checkpoint.tmp").is_file() == (number == 1)  # a half, beside the whole
    assert not (tmp_path / "run" / "samples" / "epoch_0002.png").exists()
    for _ in range(2):  # the second time there is nothing left to do
        finish(start(run_main, name, resume, setattr, "LOG_EVERY", 4))
    assert json.loads((tmp_path / "run" / "config.json").read_text())["epochs"] == 2
    assert_same_run(checkpoint, whole.folder / "checkpoint.pt")
    for file in ("history.csv", "samples/epoch_0001.png", "samples/epoch_0002.png", "progress.gif"):
        assert (tmp_path / "run" / file).read_bytes() == (whole.folder / file).read_bytes(), file


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and finds none")
def test_resume_is_exact_on_cuda(script, flags, tmp_path):
    flags = [*flags, "--device", "cuda"]
    script.main([*flags, "--out-dir", str(tmp_path / "whole")])
    script.main([*flags, "--max-steps", "4"])
    script.main(["--resume", str(tmp_path / "run" / "checkpoint.pt"), "--max-steps", "100"])
    assert_same_run(tmp_path / "run" / "checkpoint.pt", tmp_path / "whole" / "checkpoint.pt")


def test_resume_saves_inside_long_epochs(script, flags, monkeypatch):
    assert script.SAVE_EVERY == 60
    monkeypatch.setattr(script, "SAVE_EVERY", 0)
    calls = spy(monkeypatch, script.torch, "save")
    script.main([*flags, "--epochs", "1"])
    measured = [6] if script in MEASURED else []  # after the pictures
    assert [state["step"] for state, _ in calls] == [0, 1, 2, 3, 4, 5, 6, 6, *measured]


@ONE
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stop_from_outside(script, flags, tmp_path, number):
    """A process that a signal meets at whatever moment that is."""
    process = start(run_main, script.SCRIPT, [*flags, "--epochs", "1000"], output=tmp_path / "out")
    while not (tmp_path / "run" / "samples" / "epoch_0002.png").is_file():
        time.sleep(0.05)
    while process.is_alive():  # more than once if need be: inside a destructor, Python ignores exceptions
        os.kill(process.pid, number)
        process.join(10)
    finish(process, 130)
    checkpoint = tmp_path / "run" / "checkpoint.pt"
    stopped = f"{script.SCRIPT}.py: stopped; go on with --resume {checkpoint}"
    assert messages((tmp_path / "out").read_text())[-1] == stopped
    assert read(checkpoint)["step"] % 6 == 0


@ONE
def test_checkpoint_that_is_bad(script, tmp_path, capsys, whole, monkeypatch):
    """Cut off, of another script, of another size; and what is not weights is not unpickled."""
    path = whole.folder / "checkpoint.pt"
    whole_bytes, checkpoint = path.read_bytes(), read(path)
    bad = tmp_path / "bad.pt"
    monkeypatch.chdir(tmp_path)
    for size in (0, 100, len(whole_bytes) // 2, len(whole_bytes) - 1000):
        bad.write_bytes(whole_bytes[:size])
        fails(script, ["--resume", bad], capsys, bad, "give a whole checkpoint")
    fails(script, ["--generate", 1, "--checkpoint", bad], capsys, bad, "give a whole checkpoint")
    torch.save({**checkpoint, "script": "another_gan"}, bad)
    fails(script, ["--resume", bad], capsys, bad, "one of another_gan.py", script.SCRIPT)
    for content in ([1, 2], {**checkpoint, "settings": Pickled()}):
        torch.save(content, bad)
        fails(script, ["--resume", bad], capsys, bad, "give a whole checkpoint")
    torch.save({**checkpoint, "settings": {**checkpoint["settings"], "width": 24}}, bad)
    words = "size mismatch", "24"
    fails(script, ["--resume", bad], capsys, bad, *words)
    fails(script, ["--generate", 1, "--checkpoint", bad], capsys, bad, *words)
    assert [path.name for path in tmp_path.iterdir()] == ["bad.pt"]


def test_finite_or_stopped(script, case, flags, tmp_path, capsys, monkeypatch):
    """A run that goes wrong says at which step, and leaves the last good checkpoint."""
    before = signal.getsignal(signal.SIGTERM)
    one = [*flags, "--max-steps", "1", "--out-dir", tmp_path / "one"]
    words = "step 1:", "not finite", "--lr-g", "--lr-d"
    # The loss of the last step before a save can be finite, and its update still ruin the weights.
    fails(script, [*one, "--lr-g", "1e300"], capsys, *words, status=1)
    checkpoint = read(tmp_path / "one" / "checkpoint.pt")
    assert checkpoint["step"] == 0
    for name in ("generator", "discriminator"):
        assert all(value.isfinite().all() for value in checkpoint[name].values())

    original, calls = script.train_step, []

    def train_step(*args):
        calls.append(None)
        metrics, name = original(*args), script.METRICS[1]
        return {**metrics, name: metrics[name] * (math.nan if len(calls) == 9 else 1)}

    monkeypatch.setattr(script, "train_step", train_step)
    fails(script, flags, capsys, "step 9:", status=1)
    assert read(tmp_path / "run" / "checkpoint.pt")["step"] == 6  # the end of the first epoch
    assert signal.getsignal(signal.SIGTERM) == before  # main gives the handler back


# %% Bad input

BAD = """
    --device nonsense; --device meta; --epochs 0; --epochs -3; --epochs 1.5; --max-steps 0; --latent-dim 0
    --batch-size 0; --batch-size 25; --lr-g 0; --lr-g -0.001; --lr-g=-1e-3; --lr-d nan
    --lr-d inf; --lr-d fast; --seed x; --precision fp8; --dataset cats; --checkpoint x; --no-such-flag
    --generate 5; --generate 0 --checkpoint x; --generate 5 --checkpoint no/such.pt
    --resume no/such/checkpoint.pt; --resume x --generate 5 --checkpoint x
"""
BAD_TRANSLATION = """
    --task cats; --task lines; --task grey; --task half --dataset folders; --image-size 48; --image-size 16
    --image-size 512; --patch-layers 4; --patch-layers -1; --decay 0; --decay 1.5; --width 0; --norm layer
    --translate x; --generate 5 --translate x --checkpoint x; --folder-a x --folder-b y
    --translate x --checkpoint no/such.pt; --folder-a x --dataset folders
    --folder-a x --folder-b y --dataset folders"""
BAD_OWN = {
    "pix2pix": f"""{BAD_TRANSLATION}; --l1-weight -1; --gan-weight nan; --l1-weight 0 --gan-weight 0
    --dropout 1; --dropout -0.1; --direction b2a --fid-every 1""",
    "stylegan": """--image-size 48; --image-size 16; --image-size 512; --mixing 1.5; --mixing -0.1
    --r1-every 0; --truncation 0.7; --batch-size 5; --mapping-layers -1; --ema-images 0; --r1-weight -1
    --width 0""",
    "cyclegan": f"""{BAD_TRANSLATION}; --cycle-weight -1; --identity-weight nan; --pool -1; --blocks -1
    --direction b2a; --task glasses; --dataset faces --task glasses --fid-every 1""",
}
SAYS = {  # where the message has more, or something else, than the flag and its value
    "--lr-g=-1e-3": "above 0",
    "--batch-size 1": "from 2 to ",
    "--batch-size 25": "--batch-size: 25 is not from ",
    "--generate 5": "--checkpoint PATH",
    "--checkpoint x": "--generate goes with",
    "--generate 0 --checkpoint x": "x: give a whole checkpoint",
    "--generate 5 --checkpoint no/such.pt": "no/such.pt: give a whole checkpoint",
    "--resume no/such/checkpoint.pt": "no/such/checkpoint.pt: give a whole checkpoint",
    "--resume x --generate 5 --checkpoint x": "not with --resume",
    "--task lines": "--dataset faces",
    "--task glasses": "--dataset faces",
    "--task grey": "has no colour",
    "--task half --dataset folders": "--task: folders have their own",
    "--translate x": "--translate goes with --checkpoint PATH",
    "--generate 5 --translate x --checkpoint x": "--generate goes with --checkpoint PATH, alone",
    "--folder-a x --folder-b y": "--dataset folders",
    "--direction b2a --fid-every 1": "--fid-every: ",
    "--dataset faces --task glasses --fid-every 1": "--fid-every: ",
    "--translate x --checkpoint no/such.pt": "no/such.pt: give a whole checkpoint",
    "--folder-a x --dataset folders": "--folder-b; give both",
    "--folder-a x --folder-b y --dataset folders": "--folder-a: x is not a folder",
    "--l1-weight 0 --gan-weight 0": "--gan-weight: with --l1-weight 0",
    "--direction b2a": "--direction: training learns both",
    "--truncation 0.7": "give it with --generate",
    "--batch-size 5": "--batch-size: 5 is not from 2 to 24, or makes no groups",
    "--r1-weight -1": "--r1-weight: -1.0; give a finite number above 0, or 0",
}


def test_flags_that_are_bad(script, flags, tmp_path, capsys):
    """One line says which flag, and what is wrong with the value, or what to give."""
    own = BAD_OWN.get(script.SCRIPT, "")
    own += "" if script in TRANSLATORS else ";--batch-size 1"  # batch normalisation needs two
    own += "" if torch.cuda.is_available() else ";--device cuda"  # an error only where there is none
    for bad in filter(None, map(str.strip, re.split("[;\n]", f"{BAD};{own}"))):
        words = [SAYS[bad]] if bad in SAYS else bad.split()
        fails(script, [*flags, *bad.split()], capsys, *words)
        assert not (tmp_path / "run").exists(), bad


@ONE
def test_cuda_device_is_that_of_this_process(script, monkeypatch, capsys):
    """Under torchrun, the first thing that touches a GPU touches the one of this process."""
    asked, zeros = [], torch.zeros
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch, "zeros", lambda *size, device: (asked.append(device), zeros(*size))[1])
    for argv in ([], ["--device", "cuda"], ["--device", "cuda:1"]):
        assert script.parse_args(argv).device == "cuda:3"
    assert script.parse_args(["--device", "cpu"]).device == "cpu"
    assert asked == [*["cuda:3"] * 3, "cpu"]
    monkeypatch.delenv("LOCAL_RANK")
    assert script.parse_args([]).device == "cuda"


def test_cuda_settings(script, flags, monkeypatch):
    """fp32 means fp32, and convolutions give the same bits each time."""
    seen, cudnn = [], torch.backends.cudnn
    monkeypatch.setattr(cudnn, "allow_tf32", True)
    monkeypatch.setattr(cudnn, "deterministic", False)
    monkeypatch.setattr(script, "train", lambda args: seen.append((cudnn.allow_tf32, cudnn.deterministic)))
    script.main(flags)
    assert seen == [(False, True)]


def test_data_set_that_is_missing_or_cut(script, flags, small_data, tmp_path, capsys, no_network):
    raw = tmp_path / "empty" / "MNIST" / "raw"
    fails(script, [*flags, "--data-dir", tmp_path / "empty"], capsys, "--data-dir", "mnist", raw)
    for name in ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"):
        shutil.copytree(small_data, tmp_path / name)
        path = tmp_path / name / "MNIST" / "raw" / name
        for share in (0.5, 0.0001, 0):
            path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
            fails(script, [*flags, "--data-dir", tmp_path / name], capsys, "--data-dir", path.parent)
    assert not (tmp_path / "run").exists()


@ONE
def test_output_folders_that_are_bad(script, flags, tmp_path, capsys, whole):
    (tmp_path / "file").write_text("mine")
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o500)
    if os.geteuid() == 0:  # root writes anywhere but where the kernel says no
        locked = Path("/proc")
    before = snapshot(tmp_path), snapshot(whole.folder)
    for folder in (tmp_path / "file", tmp_path / "file" / "below", locked / "run", whole.folder):
        fails(script, [*flags, "--out-dir", folder], capsys, "--out-dir", folder, "new folder")
    generate = ["--generate", 1, "--checkpoint", whole.folder / "checkpoint.pt", "--out-dir", whole.folder]
    fails(script, generate, capsys, "--out-dir", "exists")
    assert (snapshot(tmp_path), snapshot(whole.folder)) == before


@ONE
def test_resume_refuses_other_settings(script, capsys, whole, monkeypatch):
    before = snapshot(whole.folder)
    resume = ["--resume", whole.folder / "checkpoint.pt"]
    for bad in ("--lr-g 0.5", "--seed 1", "--batch-size 9", "--out-dir x", "--precision bf16"):
        fails(script, [*resume, *bad.split()], capsys, bad.split()[0], "was made with")
    fails(script, ["--resume", ""], capsys, "give a whole checkpoint")
    for count in ("0", "-3"):
        fails(script, ["--checkpoint", resume[1], "--generate", count], capsys, "--generate", count)
    assert snapshot(whole.folder) == before
    # The same may be said again, and some may change; the device is that of the run, whatever there is now.
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    args = script.parse_args([*map(str, resume), "--seed", "42", "--epochs", "7"])
    assert (args.seed, args.epochs, args.device) == (42, 7, "cpu")
    assert args.batch_size == int(CASES[script.SCRIPT].flags[1])


# %% Networks and a training step, of each script


def shapes(network, *inputs):
    """The shape of what leaves each layer."""
    out = []
    plain = [layer for name, layer in network.named_modules() if "parametrizations" not in name]
    layers = [m for m in plain if hasattr(m, "parametrizations") or not list(m.children())]
    hooks = [layer.register_forward_hook(lambda m, args, y: out.append(tuple(y.shape))) for layer in layers]
    network(*inputs)
    for hook in hooks:
        hook.remove()
    return out


def count(network):
    return sum(parameter.numel() for parameter in network.parameters())


def networks(script):
    """A fresh generator and discriminator for grey images, initialised as in training."""
    torch.manual_seed(0)
    pair = script.Generator(), script.Discriminator(**CASES[script.SCRIPT].form)
    for network in pair if hasattr(script, "init_weights") else ():
        network.apply(script.init_weights)
    return pair


def inputs_of(script, count):
    """What the generator makes images of: noise, or pictures."""
    if script in TRANSLATORS:
        return [2 * torch.rand(count, 1, 32, 32) - 1]
    return [torch.randn(count, 128 if script is stylegan else 100)]


class Recorder:
    """Stands in for an optimiser: notes the gradients in all networks at its step, and changes nothing."""

    def __init__(self, own, *networks):
        self.zero_grad, self.networks = own.zero_grad, networks

    def step(self):
        grads = [[p.grad for p in network.parameters()] for network in self.networks]
        self.seen = [[None if grad is None else grad.clone() for grad in some] for some in grads]


def one_round(script, **others):
    """A train_step on eight digits; `others` replace arguments. Returns all it saw."""
    case, (g, d) = CASES[script.SCRIPT], networks(script)
    real = mnist_as(script, count=8).float() / 127.5 - 1
    args = {"generator": g, "second": d, "optimizer_g": Recorder(g, g, d), "optimizer_d": Recorder(d, g, d)}
    if script is stylegan:
        args = {"generator": g, "second": d, "ema": copy.deepcopy(g).requires_grad_(False)} | args
    if script is pix2pix:
        args["a"] = pix2pix.draw("mosaic", (real + 1) * 127.5).float() / 127.5 - 1
    args |= {"real": real} | case.step
    assert others.keys() <= args.keys()
    args |= others
    seen = types.SimpleNamespace(**args, g_inputs=[], fakes=[], inputs=[], scores=[])

    def note(inputs, outputs):
        def hook(module, args, out):
            inputs.append(args)
            outputs.append(out)

        return hook

    drawing = seen.generator.synthesis if script is stylegan else seen.generator
    hooks = [drawing.register_forward_hook(note(seen.g_inputs, seen.fakes))]
    hooks.append(seen.second.register_forward_hook(note(seen.inputs, seen.scores)))
    torch.manual_seed(1)
    seen.metrics = script.train_step(*args.values())
    for hook in hooks:
        hook.remove()
    which = -1 if script is pix2pix else 0
    seen.images = [inputs[which] for inputs in seen.inputs]  # what the discriminator looked at
    return seen


def test_networks_have_these_shapes_and_counts(script, case):
    g, d, inputs = script.Generator(), script.Discriminator(**case.form), inputs_of(script, 3)
    images = torch.randn(case.shapes[0][-1])
    seen = [inputs[0], images] if script is pix2pix else [images, *inputs[1:]]
    assert shapes(g, *inputs) == case.shapes[0]
    assert shapes(d, *seen) == case.shapes[1]
    expected = d(*seen).shape[1:]
    assert d.eval()(*(part[:1] for part in seen)).shape == (1, *expected)  # a batch of one
    assert (count(g), count(d)) == case.counts


@pytest.mark.parametrize("script", TRANSLATION, indirect=True)
def test_networks_keep_the_recipe(script):
    """No bias before batch normalisation, none of it at G's output and D's input, slopes of 0.2, a Tanh.

    Weights begin as the DCGAN paper has them.
    """
    generator, second = (list(network.modules()) for network in networks(script))
    norms = nn.BatchNorm1d, nn.BatchNorm2d, nn.InstanceNorm2d
    for layer, after in zip([*generator, *second], [*generator, *second][1:]):
        if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d)) and isinstance(after, norms):
            assert layer.bias is None
        assert getattr(layer, "negative_slope", 0.2) == 0.2
        assert not isinstance(layer, norms) or (layer.eps, layer.momentum) == (1e-5, 0.1)
        assert not isinstance(layer, nn.InstanceNorm2d) or not layer.track_running_stats  # train is eval
        if getattr(layer, "weight", None) is not None:
            n, mean = layer.weight.numel(), 1.0 if isinstance(layer, norms) else 0.0
            assert abs(layer.weight.mean().item() - mean) < 5 * 0.02 / math.sqrt(n)
            assert layer.weight.std().item() == pytest.approx(0.02, rel=5 / math.sqrt(2 * n))
            assert layer.bias is None or not layer.bias.any()
    assert [type(layer) for layer in generator if not isinstance(layer, nn.Unflatten)][-1] is nn.Tanh
    convolutions = (nn.Conv2d, nn.Linear, nn.LeakyReLU, nn.BatchNorm2d)
    begin = [type(layer) for layer in second if isinstance(layer, convolutions)]
    assert begin[1] is nn.LeakyReLU
    assert (nn.BatchNorm2d in begin) == (script is not cyclegan)  # there: per sample


HALF = math.log(3)  # the sigmoid of log 3 is 3/4, of -log 3 it is 1/4
REAL, FAKE = torch.tensor([[HALF], [-HALF]]), torch.tensor([[-HALF], [-HALF]])
MIXED = -(math.log(3 / 4) + math.log(1 / 4)) / 2 - math.log(3 / 4)
SCORES = torch.tensor([[1.0], [3.0]]), torch.tensor([[-4.0], [2.0]])
FAR = torch.tensor([[200.0]]), torch.tensor([[-200.0]])


@pytest.mark.parametrize(
    ("script", "real", "fake", "d_loss", "g_loss"),
    [
        ("pix2pix", REAL, FAKE, MIXED / 2, math.log(4)),
        ("pix2pix", *FAR, 0.0, 200.0),
        ("cyclegan", *SCORES, (4 / 2 + 20 / 2) / 2, (25 + 1) / 2),
        # Patches are squared before they are averaged: those of the second pair have the mean 1.
        ("cyclegan", torch.ones(1, 1, 1, 2), torch.tensor([[[[0.0, 2.0]]]]), 4 / 2 / 2, 1.0),
        # Where a sigmoid would be rounded to 0 or 1, and its logarithm lost.
        ("stylegan", REAL, FAKE, MIXED, math.log(4)),
        ("stylegan", *FAR, 0.0, 200.0),
        ("stylegan", torch.zeros(2, 1), torch.zeros(2, 1), 2 * math.log(2), math.log(2)),
    ],
    indirect=["script"],
)
def test_losses_by_hand(script, real, fake, d_loss, g_loss):
    assert script.discriminator_loss(real, fake).item() == pytest.approx(d_loss, rel=1e-6)
    assert script.generator_loss(fake).item() == pytest.approx(g_loss, rel=1e-6)


@pytest.mark.parametrize("script", [*NOISE_SCRIPTS, "pix2pix"], indirect=True)
def test_step_sends_gradients_where_they_should_go(script):
    seen = one_round(script)
    g_grads, d_grads = seen.optimizer_d.seen
    assert all(grad is None for grad in g_grads)  # the discriminator's half leaves the generator alone
    assert all(grad is not None for grad in d_grads)
    assert all(grad.any() for grad in d_grads)
    g_grads_after, d_grads_after = seen.optimizer_g.seen
    assert all(grad is not None for grad in g_grads_after)
    names = [name for name, _ in seen.generator.named_parameters()]
    assert all(grad.any() for name, grad in zip(names, g_grads_after) if "weight" in name)
    assert_same_bits(d_grads, d_grads_after)  # the generator's half left nothing in the discriminator
    assert all(parameter.requires_grad for parameter in seen.second.parameters())


@pytest.mark.parametrize("script", [*NOISE_SCRIPTS, "pix2pix"], indirect=True)
def test_step_does_not_wait_for_the_device(script, monkeypatch):
    """Each of these calls would stall a GPU until it has caught up."""

    def refuse(self, *args, **kwargs):
        raise AssertionError("host and device synchronised")

    original = script.train_step

    def train_step(*args):
        with monkeypatch.context() as patch:
            for name in ("item", "tolist", "cpu", "numpy", "__bool__", "__float__", "__int__", "nonzero"):
                patch.setattr(torch.Tensor, name, refuse)
            return original(*args)

    monkeypatch.setattr(script, "train_step", train_step)
    metrics = one_round(script).metrics
    assert tuple(metrics) == tuple(script.METRICS)
    assert all(value.shape == () and not value.requires_grad for value in metrics.values())
    assert all(value.isfinite() for value in metrics.values())


@pytest.mark.parametrize("script", [*NOISE_SCRIPTS, "pix2pix"], indirect=True)
def test_step_uses_its_fakes_again(script):
    """Algorithm 1 of the GAN paper draws noise anew for the generator; these scripts do not."""
    seen = one_round(script)
    assert len(seen.fakes) == 1
    assert torch.equal(seen.images[1], seen.fakes[0])
    assert not seen.images[1].requires_grad
    assert seen.images[-1] is seen.fakes[-1]  # what the generator's loss was computed on
    assert torch.equal(seen.images[0], seen.real)


@pytest.mark.parametrize("script", [*NOISE_SCRIPTS, "pix2pix"], indirect=True)
def test_step_reports_what_it_did(script):
    """Each metric by hand, from what the networks saw and answered."""
    seen, expected = one_round(script), {}
    real, fake, *_, again = seen.scores
    d_real, d_fake = real.sigmoid(), fake.sigmoid()
    expected["d_loss"] = -(d_real.log() + (1 - d_fake).log()).mean()
    expected["g_loss"] = -again.sigmoid().log().mean()
    expected |= {"d_real": d_real.mean(), "d_fake": d_fake.mean()}
    if script is pix2pix:
        expected["d_loss"] /= 2
        expected["l1"] = (seen.fakes[0] - seen.real).abs().mean() / 2
    if script is stylegan:  # R1 in a third pass, of weight 1 here
        drawn, x = seen.fakes[-1].detach(), seen.real.clone().requires_grad_()
        spread = [torch.pdist(images.flatten(1)).square().sum() for images in (drawn, seen.real)]
        expected["diversity"] = (spread[0] / spread[1]).sqrt()
        (gradient,) = torch.autograd.grad(seen.second(x).sum(), x)
        expected["r1"] = gradient.square().sum((1, 2, 3)).mean() / 2
    assert {*expected} == {*script.METRICS}
    for name, value in expected.items():
        assert seen.metrics[name].item() == pytest.approx(torch.as_tensor(value).item(), rel=2e-4), name


# %% pix2pix and cyclegan


@pytest.fixture
def pictures(tmp_path, monkeypatch):
    """A nested folder of 40 real digits in colour as PNG, WebP and JPEG; the working folder is tmp_path."""
    monkeypatch.chdir(tmp_path)
    digits = torchvision.datasets.MNIST(ROOT / "data").data[:40]
    for i, digit in enumerate(digits):
        folder = tmp_path / "pictures" / f"{i % 3}" / "below"
        folder.mkdir(parents=True, exist_ok=True)
        colour = Image.merge("RGB", [Image.fromarray(d.numpy()) for d in (digit, digit // 2, 255 - digit)])
        colour.save(folder / f"{i:02d}.{('png', 'webp', 'jpg')[i % 3]}")
    (tmp_path / "pictures" / "notes.txt").write_text("no picture")
    return tmp_path / "pictures"


def test_translators_have_the_papers_sizes():
    """Parameters as the official code counts them, less the biases that a normalisation takes out again."""
    batch, instance = {}, {"norm": "instance"}
    cases = [
        (pix2pix.Generator, (3, 3, 256, 64), batch, 54_414_531),
        (pix2pix.Generator, (3, 3, 64), batch, 7_315_043),
        (pix2pix.Generator, (1, 1, 32, 64), batch, 16_653_505),
        (pix2pix.Generator, (1, 1), {"skips": False}, 3_476_577),
        (pix2pix.Discriminator, (6, 64, 3), batch, 2_768_705),
        (cyclegan.Generator, (3, 3, 64, 9), instance, 11_372_931),
        (cyclegan.Generator, (1, 1, 32, 6), instance, 1_956_929),
        (cyclegan.Discriminator, (1, 64, 3), instance, 2_761_793),
    ]
    with torch.device("meta"):
        for kind, args, rest, parameters in cases:
            assert count(kind(*args, **rest)) == parameters
        for size in (32, 64, 128, 256):
            for channels in ((1, 1), (1, 3), (3, 1)):
                images = torch.zeros(2, channels[0], size, size)
                for network in (pix2pix.Generator(*channels, size), cyclegan.Generator(*channels)):
                    assert network(images).shape == (2, channels[1], size, size)


@pytest.mark.parametrize("layers", [0, 1, 2, 3])
def test_pix2pix_patches(layers):
    """Ones for weights and no activations: the pixels that move one logit are a square of 9 * 2^n - 2."""
    assert inspect.getsource(pix2pix.Discriminator) == inspect.getsource(cyclegan.Discriminator)
    network = pix2pix.Discriminator(2, 4, layers)
    network.layers = nn.Sequential(*(m for m in network.layers if isinstance(m, nn.Conv2d))).double()
    for convolution in network.layers:
        nn.init.ones_(convolution.weight)
    image = torch.zeros(1, 2, 128, 128, dtype=torch.float64, requires_grad=True)
    logits = network(image)
    middle = logits.shape[2] // 2
    logits[0, 0, middle, middle].backward()
    for dim in (0, 1):
        moved = image.grad[0].sum(0).any(dim).nonzero().flatten()
        assert moved[-1] - moved[0] + 1 == len(moved) == (9 * 2**layers - 2 if layers else 1)


@pytest.mark.parametrize("skips", [True, False])
def test_pix2pix_skips(skips):
    """Without them, all that is known of the question goes through one pixel."""
    torch.manual_seed(0)
    network = pix2pix.Generator(skips=skips, dropout=0.0).eval()
    with torch.no_grad():
        for parameter in network.down[-1].parameters():
            parameter.zero_()
        a, b = network(2 * torch.rand(2, 1, 32, 32) - 1)
    assert torch.equal(a, b) != skips


def test_pix2pix_learns_from_one_pair_at_a_time(script, flags, tmp_path):
    """Batch normalisation of a single pixel would make it 0, whatever the question is."""
    network, bottoms = pix2pix.Generator(), []
    network.down[-1].register_forward_hook(lambda module, args, out: bottoms.append(out))
    for _ in range(2):
        network(2 * torch.rand(1, 1, 32, 32) - 1)
    assert (bottoms[0] - bottoms[1]).abs().max() > 0.01
    script.main([*flags, "--batch-size", "1", "--max-steps", "2"])
    assert read(tmp_path / "run" / "checkpoint.pt")["history"].isfinite().all()


@pytest.mark.parametrize("condition", [True, False])
def test_pix2pix_discriminator_sees_the_question(script, condition, flags, tmp_path):
    """The question is the first of the two; it changes the logits; it is not seen if that is asked for."""
    seen = one_round(script, second=script.Discriminator(1 + condition), condition=condition)
    assert [len(inputs) for inputs in seen.inputs] == [1 + condition] * 3
    if condition:
        assert all(inputs[0] is seen.a for inputs in seen.inputs)
        logits = seen.second.eval()(seen.a, seen.real), seen.second(seen.a.flip(0), seen.real)
        assert not torch.allclose(*logits)
    script.main([*flags, *([] if condition else ["--no-condition"]), "--max-steps", "1"])
    weight = read(tmp_path / "run" / "checkpoint.pt")["discriminator"]["layers.0.weight"]
    assert weight.shape[1] == 1 + condition


def test_pix2pix_weights_of_the_losses(script):
    """G's gradient is the sum of both parts, each with its weight; with 0, of the other alone."""
    grads = {}
    for gan, l1 in ((1.0, 0.0), (0.0, 1.0), (2.0, 30.0)):
        (g, d) = networks(script)
        for layer in g.modules():  # so that all three see the same answers
            layer.p = 0.0
        recorders = {"optimizer_g": Recorder(g, g), "optimizer_d": Recorder(d, d)}
        one_round(script, generator=g, second=d, **recorders, gan_weight=gan, l1_weight=l1)
        grads[gan, l1] = torch.cat([grad.flatten() for grad in recorders["optimizer_g"].seen[0]])
    assert torch.allclose(grads[2.0, 30.0], 2 * grads[1.0, 0.0] + 30 * grads[0.0, 1.0], rtol=1e-3, atol=1e-5)
    g, _ = networks(script)
    for layer in g.modules():
        layer.p = 0.0
    seen = one_round(script, generator=g)
    loss = (g(seen.a) - seen.real).abs().sum() / seen.real.numel()
    plain = torch.cat([grad.flatten() for grad in torch.autograd.grad(loss, [*g.parameters()])])
    assert torch.allclose(grads[0.0, 1.0], plain, rtol=1e-3, atol=1e-7)


def test_pix2pix_dropout_is_the_noise(script):
    """In the first steps up alone, two at 32 pixels; it is off when images are sampled."""
    for size, expected in ((32, 2), (64, 3), (256, 3)):
        network = script.Generator(size=size, width=2, dropout=0.25)
        where = [i for i, up in enumerate(network.up) if any(isinstance(m, nn.Dropout) for m in up)]
        assert where == list(range(expected))
        assert {m.p for m in network.modules() if isinstance(m, nn.Dropout)} == {0.25}
    network, a = networks(script)[0], 2 * torch.rand(5, 1, 32, 32) - 1
    assert torch.equal(script.sample(network, a), script.sample(network, a))
    args = script.parse_args([])
    args.channels, test = [1, 1], 2 * [((a + 1) * 127.5).round().to(torch.uint8)]
    drawn = script.draw_pictures(network, test, [f"{i}/0" for i in range(5)], args)[1]
    cells = drawn[0, 2:, 2:].unfold(0, 32, 34).unfold(1, 32, 34)  # five rows of eight
    assert torch.equal(cells[:, 0], test[0][:, 0])
    draws = cells[:, 1:7].float()
    assert (draws.std(1) > 0).any((1, 2)).all()  # they differ, in each row
    assert (cells[:, 7] - 2 * draws.std(1, correction=0)).abs().max() <= 2.01  # white is the most there is
    assert network.training


@pytest.mark.parametrize("script", TRANSLATION, indirect=True)
def test_rates_fall_to_zero_at_the_end(script, small, tmp_path, monkeypatch):
    """In a straight line, after a quarter of the run; a run that was stopped has the same."""
    rates, original = [], script.train_step

    def train_step(*args):
        optimizers = [arg for arg in args if isinstance(arg, torch.optim.Adam)]
        rates.append([optimizer.param_groups[0]["lr"] for optimizer in optimizers])
        return original(*args)

    monkeypatch.setattr(script, "train_step", train_step)
    flags = [*small, "--decay", "0.25", "--epochs", "2", "--lr-g", "0.004", "--lr-d", "0.002"]
    script.main([*flags, "--out-dir", str(tmp_path / "whole")])
    expected = [0.004 * min(1, (12 - step) / 9) for step in range(12)]
    assert [g for g, _ in rates] == pytest.approx(expected)
    assert [d for _, d in rates] == pytest.approx([rate / 2 for rate in expected])
    script.main([*flags, "--max-steps", "8", "--out-dir", str(tmp_path / "part")])
    script.main(["--resume", str(tmp_path / "part" / "checkpoint.pt"), "--max-steps", "12"])
    assert rates[12:] == rates[:12]
    assert_same_run(tmp_path / "part" / "checkpoint.pt", tmp_path / "whole" / "checkpoint.pt")


@ONE
def test_translators_draw_questions(script):
    """A dot of 3 x 3 pixels in a picture of 16 x 16, by hand."""
    image = torch.zeros(2, 3, 16, 16, dtype=torch.uint8)
    image[1, :, 7:10, 7:10] = torch.tensor([30, 90, 120], dtype=torch.uint8)[:, None, None]
    outline = script.draw("outline", image)
    assert outline.shape == (2, 1, 16, 16)
    ring = torch.zeros(16, 16, dtype=torch.uint8)
    ring[6:11, 6:11] = 80
    ring[7:10, 7:10] = 0
    assert torch.equal(outline[1, 0], ring)
    assert not outline[0].any()
    grey = script.draw("grey", image)
    assert grey[1, 0, 8, 8] == 80
    assert grey.sum() == 9 * 80
    mosaic = script.draw("mosaic", image)  # blocks of 2 x 2: rows 6 and 7 hold one of the dot's, 8 and 9 two
    assert mosaic.shape == image.shape
    assert mosaic[1, 2, 6:8, 6:8].tolist() == [[30, 30]] * 2
    assert mosaic[1, 2, 6:8, 8:10].tolist() == [[60, 60]] * 2
    assert mosaic[1, 2, 8:10, 8:10].tolist() == [[120, 120]] * 2
    assert mosaic[1, 2].sum() == image[1, 2].sum()
    half = script.draw("half", image)
    assert torch.equal(half[:, :, :8], image[:, :, :8])
    assert not half[:, :, 8:].any()
    many = torch.randint(0, 256, (1001, 1, 32, 32), dtype=torch.uint8)
    assert torch.equal(script.draw("mosaic", many)[1000:], script.draw("mosaic", many[1000:]))


@ONE
def test_translators_measure_by_hand(script):
    black, white = (
        torch.zeros(2, 1, 4, 4, dtype=torch.uint8),
        torch.full((2, 1, 4, 4), 255, dtype=torch.uint8),
    )
    assert script.difference(black, white) == 1
    half = black.clone()
    half[0] = 51
    assert script.difference(half, black) == pytest.approx(0.1)
    stripes = black.clone()
    stripes[..., ::2] = 200
    faint = stripes // 2
    assert script.sharpness(stripes, stripes) == 1
    assert script.sharpness(faint, stripes) == 0.5
    assert script.sharpness(stripes.mT, stripes) == 1
    names = ["1/a", "0/b", "1/c", "0/d", "1/e", "2/f"]
    assert script.choose(names, 4) == [1, 0, 5, 3]  # the first of each class, then the second
    assert script.choose([name[2:] for name in names], 3) == [0, 1, 2]
    assert 0.05 < np.mean([script.held_out(f"{i:05d}") for i in range(1000)]) < 0.15
    small, size = torch.randint(0, 256, (2, 1, 28, 28), dtype=torch.uint8), 64
    assert torch.equal(script.fit(small, 32)[:, :, 2:-2, 2:-2], small)
    assert script.fit(small, 32).sum() == small.sum()
    assert script.fit(small, size).shape == (2, 1, size, size)


def test_pix2pix_trains_on_pairs_and_shows_the_first_test_images(script, whole, small_data):
    """Each question is that of its answer, in every step; what is shown and measured is of the test set."""
    assert len(whole.given) == 12
    for _, _, _, _, *pair, _, _, _ in whole.given:
        a, b = (((images + 1) * 127.5).round().to(torch.uint8) for images in pair)
        assert torch.equal(a, script.draw("mosaic", b))
    test = nn.functional.pad(torchvision.datasets.MNIST(small_data, train=False).data[:, None], (2, 2, 2, 2))
    labels = torchvision.datasets.MNIST(small_data, train=False).targets.tolist()
    order = sorted(range(24), key=lambda row: (labels[:row].count(labels[row]), labels[row]))
    questions = script.draw("mosaic", test).float() / 127.5 - 1
    (shown, *_), (measured, *_), (again, *_), _ = whole.drawn
    assert torch.allclose(shown, questions[order[:20]])
    assert torch.equal(shown, again)
    assert torch.allclose(measured, questions)
    rows = list(csv.DictReader((whole.folder / "history.csv").read_text().splitlines()))
    generator = script.Generator(width=8)
    generator.load_state_dict(read(whole.folder / "checkpoint.pt")["generator"])
    made = script.sample(generator, questions)
    error = (made.int() - test.int()).abs().double().mean().item() / 255
    evidence = (
        script.draw("mosaic", made).int() - script.draw("mosaic", test).int()
    ).abs().double().mean() / 255
    found = [float(rows[-1][name]) for name in ("error", "evidence", "sharpness")]
    assert found == pytest.approx([error, evidence.item(), script.sharpness(made, test)], rel=1e-4)
    assert f"  error {error:.3f}  evidence {evidence:.3f}  sharpness" in whole.out


def test_pix2pix_generates_and_translates(script, whole, small_data, pictures, tmp_path, capsys):
    """Test images, by class; and one's own: grey, colour, transparent, 16 bits, of any shape."""
    checkpoint, own = str(whole.folder / "checkpoint.pt"), tmp_path / "own"
    argv = ["--checkpoint", checkpoint, "--generate"]
    script.main([*argv, "20", "--out-dir", str(tmp_path / "made")])
    files = sorted((tmp_path / "made").rglob("*.png"), key=lambda path: path.name)
    labels = torchvision.datasets.MNIST(small_data, train=False).targets.tolist()[:20]
    assert [(path.parent.name, path.stem) for path in files] == [
        (f"{c}", f"{i:05d}") for i, c in enumerate(labels)
    ]
    assert {(Image.open(path).size, Image.open(path).mode) for path in files} == {((32, 32), "L")}
    script.main([*argv, "5", "--out-dir", str(tmp_path / "few")])
    assert snapshot(tmp_path / "few").items() <= snapshot(tmp_path / "made").items()
    fails(script, [*argv, "25"], capsys, "--generate: 25 is more than the 24 test images")

    (own / "below").mkdir(parents=True)
    for name, mode, size in (
        ("a.png", "L", (32, 32)),
        ("b.webp", "RGB", (50, 40)),
        ("c.png", "RGBA", (40, 90)),
    ):
        Image.new(mode, size, 200 if mode == "L" else (10, 200, 30, 0)[: len(mode)]).save(
            own / "below" / name
        )
    Image.new("L", (32, 32), 7).save(own / "a.jpg")
    Image.new("L", (32, 32), 70).save(own / "a.png")
    (own / "broken.png").write_bytes(b"not a picture")
    translate = ["--checkpoint", checkpoint, "--translate"]
    script.main([*translate, str(own)])
    made = whole.folder / "translated" / "001"
    names = ["a.png", "a.png.png", "below/a.png", "below/b.png", "below/c.png"]  # of a.jpg, and of a.png
    assert sorted(path.relative_to(made).as_posix() for path in made.rglob("*.png")) == names
    out, err = capsys.readouterr()
    assert "broken.png cannot be read" in out + err
    assert f"5 images in {made}" in out
    generator = script.Generator(width=8)
    generator.load_state_dict(read(checkpoint)["generator"])
    question = torch.full((1, 1, 32, 32), 200 / 127.5 - 1)
    answer = torch.from_numpy(np.array(Image.open(made / "below" / "a.png")))
    assert torch.equal(script.sample(generator, question)[0, 0], answer)
    white = torch.from_numpy(np.array(Image.open(made / "below" / "c.png")))  # what is transparent
    assert torch.equal(script.sample(generator, torch.ones(1, 1, 32, 32))[0, 0], white)
    shutil.rmtree(whole.folder / "translated")
    fails(script, [*translate, tmp_path / "nowhere"], capsys, "--translate", "not a folder")
    (tmp_path / "empty").mkdir()
    fails(script, [*translate, tmp_path / "empty"], capsys, "--translate: no image to read")
    assert not (whole.folder / "translated").exists()


def two_sides(folder, a, b, count=40):
    """Files of the same names in two folders: grey digits in a, the same in colour in b."""
    for side in (a, b):
        (folder / side).mkdir(parents=True, exist_ok=True)
    for i, digit in enumerate(torchvision.datasets.MNIST(ROOT / "data").data[:count].numpy()):
        grey = Image.fromarray(digit)
        grey.save(folder / a / f"{i:02d}.png")
        Image.merge("RGB", [grey, Image.new("L", (28, 28), i), grey.point(lambda v: 255 - v)]).save(
            folder / b / f"{i:02d}.webp", lossless=True
        )


def read_sides(script, *flags):
    """What read_pictures makes of --dataset folders: train, test, names."""
    args = script.parse_args(
        ["--dataset", "folders", "--image-size", "32", "--device", "cpu", *map(str, flags)]
    )
    return script.read_pictures(args, paired=script is pix2pix)


@ONE
def test_translators_find_the_layouts_that_people_have(script, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, train, test in (
        ("one", ("trainA", "trainB"), ("testA", "testB")),
        ("two", ("A/train", "B/train"), ("A/val", "B/val")),
        ("three", ("train/A", "train/B"), ("test/A", "test/B")),
        ("four", ("A", "B"), None),
    ):
        two_sides(tmp_path / name, *train)
        if test:
            two_sides(tmp_path / name, *test, count=5)
        (a, b), (test_a, test_b), names = read_sides(script, "--data-dir", name)
        held = 0 if test else sum(script.held_out(f"{i:02d}") for i in range(40))
        assert (len(a), len(b)) == (40 - held, 40 - held)
        assert len(test_a) == len(test_b) == len(names[0]) == (5 if test else held)
        assert (a.shape[1], b.shape[1]) == (1, 3)  # A is grey
        for x, y in ((a, b), (test_a, test_b)):
            assert (x.float() - y[:, :1].float()).abs().max() <= 1  # a pair shows the same digit
        kept = {int(number) for number in b[:, 1, 0, 0].tolist()}
        assert held == 0 or not kept & {int(name) for name in names[0]}  # none is trained on and tested, too
        folders = ["--folder-a", Path(name, train[0]), "--folder-b", Path(name, train[1])]
        assert len(read_sides(script, *folders)[0][0]) == 40 - sum(
            script.held_out(f"{i:02d}") for i in range(40)
        )


def test_pix2pix_reads_pairs_side_by_side(script, tmp_path, monkeypatch, capsys):
    """A is the left half; --direction b2a makes B the question; odd widths have no middle."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pairs" / "train").mkdir(parents=True)
    for i, digit in enumerate(torchvision.datasets.MNIST(ROOT / "data").data[:40].numpy()):
        both = Image.new("RGB", (56, 28), (10, i, 200))
        both.paste(Image.fromarray(digit), (0, 0))
        both.save(tmp_path / "pairs" / "train" / f"{i}.png")
    (a, b), (test_a, _), names = read_sides(script, "--data-dir", "pairs")
    assert (a.shape[1], b.shape[1]) == (1, 3)
    assert len(a) + len(test_a) == 40
    order = [i for i in map(str, range(40)) if not script.held_out(i)]
    assert sorted(b[:, 1, 0, 0].tolist()) == sorted(map(int, order))
    number = b[0, 1, 0, 0].item()
    digit = torch.from_numpy(
        np.array(
            Image.open(f"pairs/train/{number}.png").convert("RGB").crop((0, 0, 28, 28)).resize((32, 32), 2)
        )
    )
    assert (a[0, 0].int() - digit[:, :, 0].int()).abs().max() <= 1
    flags = ["--dataset", "folders", "--data-dir", "pairs", "--image-size", "32", "--device", "cpu"]
    flags += ["--batch-size", "4", "--max-steps", "1"]
    for direction, channels in (("a2b", [1, 3]), ("b2a", [3, 1])):
        script.main([*flags, "--direction", direction, "--out-dir", direction])
        assert read(f"{direction}/checkpoint.pt")["settings"]["channels"] == channels
        script.main(["--checkpoint", f"{direction}/checkpoint.pt", "--generate", "1"])
        (made,) = Path(direction, "generated").rglob("*.png")
        assert made.stem == names[0][0]
        assert Image.open(made).mode == ("RGB" if direction == "a2b" else "L")
    Image.new("RGB", (57, 28)).save("pairs/train/41.png")
    fails(script, flags, capsys, "--dataset", "41.png has an odd width")


@pytest.mark.parametrize("script", TRANSLATION, indirect=True)
def test_translators_refuse_bad_folders(script, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    flags = [
        "--dataset",
        "folders",
        "--device",
        "cpu",
        "--batch-size",
        "4",
        "--image-size",
        "32",
        "--max-steps",
        "1",
    ]
    (tmp_path / "none").mkdir()
    fails(script, [*flags, "--data-dir", "none"], capsys, "--data-dir: no A and B", "trainA", "--folder-a")
    two_sides(tmp_path / "some", "A", "B")
    (tmp_path / "some" / "A" / "extra.png").write_bytes(Path("some/A/00.png").read_bytes())
    paired = script is pix2pix
    if paired:
        fails(script, [*flags, "--data-dir", "some"], capsys, "1 pictures in", "lack a partner", "extra")
        (tmp_path / "some" / "A" / "extra.png").unlink()
    else:
        fails(
            script,
            [*flags, "--data-dir", "some", "--identity-weight", "5"],
            capsys,
            "--identity-weight",
            "is grey",
        )
    Path("some/B/03.webp").write_bytes(b"cut off")  # a pair of which one half cannot be read is left out
    script.main([*flags, "--data-dir", "some", "--out-dir", "run"])
    out = capsys.readouterr().out
    assert "1 of 40 files cannot be read: some/B/03.webp" in out
    (a, b), (test_a, test_b), names = read_sides(script, "--data-dir", "some")
    assert len(a) + len(test_a) == (39 if paired else 41)
    assert len(b) + len(test_b) == 39
    two_sides(tmp_path / "dots", "A", "B", count=12)  # which sort otherwise with their suffixes
    for old, new in (("00", "01.x"), ("01", "01.a")):
        Path("dots", "A", f"{old}.png").rename(Path("dots", "A", f"{new}.png"))
        Path("dots", "B", f"{old}.webp").rename(Path("dots", "B", f"{new}.webp"))
    Path("dots/A/02.png").write_bytes(b"cut off")
    (a, b), _, _ = read_sides(script, "--data-dir", "dots")
    assert not paired or (a.float() - b[:, :1].float()).abs().max() <= 1
    two_sides(tmp_path / "few", "A", "B", count=2)
    fails(script, [*flags, "--data-dir", "few"], capsys, "--dataset: too few pictures", last=True)
    assert not any(script.held_out(f"{i:02d}") for i in range(2))


@pytest.mark.parametrize("script", TRANSLATION, indirect=True)
def test_translators_draw_from_any_folder(script, pictures, capsys):
    """Colours are found again from grey; a tenth of the pictures is for testing."""
    flags = ["--dataset", "folder", "--data-dir", str(pictures), "--task", "grey", "--image-size", "32"]
    script.main([*flags, "--batch-size", "4", "--max-steps", "1", "--device", "cpu", "--out-dir", "run"])
    assert read("run/checkpoint.pt")["settings"]["channels"] == [1, 3]
    with Image.open("run/samples/epoch_0001.png") as strip:
        assert strip.mode == "RGB"
    script.main(["--checkpoint", "run/checkpoint.pt", "--generate", "1"])
    (made,) = Path("run", "generated").rglob("*.png")
    assert script.held_out(made.relative_to("run/generated/001").with_suffix("").as_posix())
    assert Image.open(made).mode == "RGB"


@pytest.mark.parametrize("script", TRANSLATION, indirect=True)
def test_translators_know_the_faces(script, tmp_path, monkeypatch):
    """A line drawing and its face are row for row the same; the test faces are not those that train."""
    args = script.parse_args(["--dataset", "faces", "--data-dir", str(ROOT / "data"), "--device", "cpu"])
    script.fill_in(args)
    assert (args.task, args.image_size) == ("lines", 64)
    sheets = script.read_sheets

    def one_sheet(folder, name):
        return sheets(folder, name.replace("??", "00"))

    monkeypatch.setattr(script, "read_sheets", one_sheet)
    (a, b), test, (names, _) = script.read_pictures(args, paired=True)
    assert a.shape == (1024, 1, 64, 64)
    assert b.shape == (1024, 3, 64, 64)
    assert [part.shape[1] for part in test] == [1, 3]
    assert len(names) == 1024
    dark = [(images.float().mean(1) < 60).flatten(1).float() for images in (a, b)]
    own, others = ((x * y).sum(1) / x.sum(1) for x, y in (dark, (dark[0], dark[1].roll(1, 0))))
    assert own.mean() > 2 * others.mean() > 0.2  # what is black in the drawing is dark in the face


def cycle_round(pool=0, **others):
    """A train_step of cyclegan.py on four outlines and four other digits; returns all it saw."""
    torch.manual_seed(0)
    made = [cyclegan.Generator(width=8, blocks=1) for _ in range(2)]
    judges = [cyclegan.Discriminator(1, 8, norm="instance") for _ in range(2)]
    generator = nn.ModuleDict(zip(("ab", "ba"), made)).apply(cyclegan.init_weights)
    discriminator = nn.ModuleDict(zip("ab", judges)).apply(cyclegan.init_weights)
    digits = mnist_as(cyclegan, count=8)
    a, b = cyclegan.draw("outline", digits[:4]).float() / 127.5 - 1, digits[4:].float() / 127.5 - 1
    args = {"generator": generator, "discriminator": discriminator}
    args |= {f"pool_{side}": cyclegan.ImagePool(pool, 1, 32) for side in "ab"}
    args["optimizer_g"] = Recorder(generator, generator, discriminator)
    args["optimizer_d"] = Recorder(discriminator, generator, discriminator)
    args |= {"a": a, "b": b, "cycle_weight": 10.0, "identity_weight": 0.0}
    assert others.keys() <= args.keys()
    args |= others
    seen = types.SimpleNamespace(**args, calls={})
    for pair in (args["generator"], args["discriminator"]):
        for name, network in pair.items():
            calls = seen.calls[name] = []
            network.register_forward_hook(lambda m, inputs, out, calls=calls: calls.append((inputs[0], out)))
    seen.metrics = cyclegan.train_step(*args.values())
    return seen


def test_cyclegan_pads_as_pytorch_does():
    for pixels in (1, 3):
        x, ours = torch.randn(2, 3, 8, 9, requires_grad=True), cyclegan.Reflect(pixels)
        theirs = nn.ReflectionPad2d(pixels)
        assert torch.equal(ours(x), theirs(x))
        weights = torch.randn_like(ours(x))
        grads = [torch.autograd.grad((pad(x) * weights).sum(), x)[0] for pad in (ours, theirs)]
        assert torch.allclose(*grads, atol=1e-5)


def test_cyclegan_residual_blocks_add_and_take_away():
    """With a last convolution of 0 a block is the identity; otherwise it changes values up and down."""
    block, x = cyclegan.Residual(8, "instance"), torch.randn(2, 8, 8, 8)
    assert (block(x) - x).min() < -0.5 < 0.5 < (block(x) - x).max()
    nn.init.zeros_(block.layers[5].weight)
    assert torch.equal(block(x), x)


def test_cyclegan_translates_each_picture_for_itself():
    """In training as in use, in a batch as alone; with batch normalisation only in use. Contrast is lost."""
    torch.manual_seed(0)
    a = 2 * torch.rand(4, 1, 32, 32) - 1
    network = cyclegan.Generator().apply(cyclegan.init_weights)
    with torch.no_grad():
        together = network(a)
        assert torch.allclose(together[1:2], network(a[1:2]), atol=1e-5)
        assert torch.allclose(together, network.eval()(a), atol=1e-5)
        batch = cyclegan.Generator(norm="batch").apply(cyclegan.init_weights)
        assert not torch.allclose(batch(a)[1:2], batch(a[1:2]), atol=1e-3)
        batch.eval()
        assert torch.allclose(batch(a)[1:2], batch(a[1:2]), atol=1e-5)
        first = network.layers[:3]  # padding, convolution, normalisation
        assert torch.allclose(first(0.5 * a + 0.3), first(a), atol=0.02)


def test_cyclegan_step_reports_what_it_did():
    """Each metric by hand, from what the networks saw and answered; G is updated before D."""
    for weight in (0.0, 5.0):
        seen = cycle_round(identity_weight=weight)
        (a, fake_b), (fake_a, back_b), *same_b = seen.calls["ab"]
        (b, fake_a_again), (fake_b_again, back_a), *same_a = seen.calls["ba"]
        assert (a is seen.a, b is seen.b) == (True, True)
        assert fake_a is fake_a_again
        assert fake_b is fake_b_again
        assert [given is seen.b for given, _ in same_b] == [True] * (weight > 0)  # B is to stay as it is
        assert [given is seen.a for given, _ in same_a] == [True] * (weight > 0)
        expected = {"cycle_a": back_a - seen.a, "cycle_b": back_b - seen.b}
        expected = {name: value.abs().mean().item() / 2 for name, value in expected.items()}
        pairs = [(out, given) for given, out in (*same_a, *same_b)]
        expected["identity"] = sum((out - given).abs().mean().item() for out, given in pairs) / 2
        for side, real, fake, name in (("b", seen.b, fake_b, "g_ab"), ("a", seen.a, fake_a, "g_ba")):
            (first, score), (second, on_real), (third, on_fake) = seen.calls[side]
            assert first is fake
            assert second is real
            assert torch.equal(third, fake)  # with an empty pool
            assert not third.requires_grad
            expected[name] = ((score - 1) ** 2).mean().item()
            expected[f"d_{side}"] = (((on_real - 1) ** 2).mean() + (on_fake**2).mean()).item() / 2
        assert {*expected} == {*cyclegan.METRICS}
        for name, value in expected.items():
            assert seen.metrics[name].item() == pytest.approx(value, rel=1e-5), name
            assert not seen.metrics[name].requires_grad


def test_cyclegan_step_sends_gradients_where_they_should_go():
    seen = cycle_round(identity_weight=5.0)
    g_grads, d_grads = seen.optimizer_g.seen
    assert all(grad is not None and grad.isfinite().all() for grad in g_grads)
    assert sum(grad.any().item() for grad in g_grads) == len(g_grads)
    assert all(grad is None for grad in d_grads)  # the generators' half leaves the discriminators alone
    g_after, d_after = seen.optimizer_d.seen
    assert_same_bits(g_after, g_grads)  # and the other way round
    assert all(grad is not None and grad.any() for grad in d_after)
    assert all(parameter.requires_grad for parameter in seen.discriminator.parameters())


def test_cyclegan_weights_of_the_losses():
    """The gradient of both generators is that of the whole sum, each part with its weight once."""
    l1, mse = nn.L1Loss(), nn.MSELoss()
    for cycle, identity in ((10.0, 5.0), (0.0, 0.0)):
        seen = cycle_round(cycle_weight=cycle, identity_weight=identity)
        ab, ba, a, b = *seen.generator.values(), seen.a, seen.b
        fakes = {"b": ab(a), "a": ba(b)}
        scores = [seen.discriminator[side](fake) for side, fake in fakes.items()]
        loss = sum(mse(score, torch.ones_like(score)) for score in scores)
        loss = (
            loss
            + cycle * (l1(ba(fakes["b"]), a) + l1(ab(fakes["a"]), b))
            + identity * (l1(ab(b), b) + l1(ba(a), a))
        )
        for grad, expected in zip(
            seen.optimizer_g.seen[0], torch.autograd.grad(loss, [*seen.generator.parameters()])
        ):
            assert torch.allclose(grad, expected, rtol=1e-3, atol=1e-5)
    unchanged = nn.ModuleDict({"ab": nn.Identity(), "ba": nn.Identity()})
    blank = types.SimpleNamespace(zero_grad=lambda: None, step=lambda: None)
    both = torch.full((4, 1, 32, 32), 0.3, requires_grad=True)
    metrics = cycle_round(
        generator=unchanged, optimizer_g=blank, a=both, b=-both, identity_weight=1.0
    ).metrics
    assert [metrics[name].item() for name in ("cycle_a", "cycle_b", "identity")] == [0, 0, 0]


def test_cyclegan_step_does_not_wait_for_the_device(monkeypatch):
    def refuse(self, *args, **kwargs):
        raise AssertionError("host and device synchronised")

    original = cyclegan.train_step

    def train_step(*args):
        with monkeypatch.context() as patch:
            for name in ("item", "tolist", "cpu", "numpy", "__bool__", "__float__", "__int__", "nonzero"):
                patch.setattr(torch.Tensor, name, refuse)
            return original(*args)

    monkeypatch.setattr(cyclegan, "train_step", train_step)
    metrics = cycle_round(pool=2, identity_weight=1.0).metrics
    assert tuple(metrics) == tuple(cyclegan.METRICS)


def test_cyclegan_pool():
    """Nothing is lost or doubled; half of what is given back is of now, the rest is old; and it is saved."""
    torch.manual_seed(0)
    pool, number, ages, now = cyclegan.ImagePool(12, 1, 1), 0, [], 0
    for query in range(2000):
        fakes = torch.arange(number, number + 4.0).view(4, 1, 1, 1)
        before = [*pool.images.flatten().tolist(), *fakes.flatten().tolist()]
        back = pool.query(fakes)
        if query < 3:  # there is room
            assert torch.equal(back, fakes)
            assert pool.count == 4 * (query + 1)
        else:
            after = [*pool.images.flatten().tolist(), *back.flatten().tolist()]
            assert sorted(before) == sorted(after)
            fresh = back.flatten() >= number
            now += fresh.sum().item()
            ages += ((number - back.flatten()[~fresh]) // 4 + 1).tolist()
        number += 4
    assert len(pool.images.unique()) == 12
    assert now / (4 * 1997) == pytest.approx(0.5, abs=3 * 0.5 / math.sqrt(4 * 1997))
    assert np.mean(ages) == pytest.approx(2 * 12 / 4, rel=0.1)  # steps, on average
    other = cyclegan.ImagePool(12, 1, 1)
    other.load_state_dict(pool.state_dict())
    assert other.count == 12
    for _ in range(3):  # the same random numbers, the same answers
        torch.manual_seed(5)
        first = pool.query(fakes)
        torch.manual_seed(5)
        assert torch.equal(other.query(fakes), first)
    part = cyclegan.ImagePool(6, 1, 1)
    part.query(fakes)
    assert torch.equal(part.query(fakes)[:2], fakes[:2])  # the last two that find room
    assert cyclegan.ImagePool(0, 1, 1).query(fakes) is fakes


def test_cyclegan_domains_share_no_picture(script, whole, small_data):
    """A is drawn of every second digit, B of the others; each picture is seen once in a pass."""
    digits = nn.functional.pad(torchvision.datasets.MNIST(small_data).data[:, None], (2, 2, 2, 2))
    domain_a = script.draw("outline", digits[0::2])
    seen = [a for *_, a, _, _, _ in whole.given]  # before b and the two weights
    seen = torch.cat([((a + 1) * 127.5).round().to(torch.uint8) for a in seen])
    assert sorted(image.numpy().tobytes() for image in seen[:12]) == sorted(
        a.numpy().tobytes() for a in domain_a
    )
    orders = []
    args = script.parse_args(["--batch-size", "3", "--device", "cpu"])
    small = torch.arange(7, dtype=torch.uint8).view(7, 1, 1, 1)
    for side in "ab":
        passes = [torch.cat([script.take(small, side, step, args) for step in (k, k + 1)]) for k in (0, 2, 4)]
        passes = [((rows.flatten() + 1) * 127.5).round().int().tolist() for rows in passes]
        assert all(len({*rows}) == 6 for rows in passes)  # of 7, the last short batch is dropped
        orders += [tuple(rows) for rows in passes]
    assert len({*orders}) == 6  # another order each time, and for each domain


def test_cyclegan_measures_both_directions(script, whole, small_data):
    """After the last epoch, by hand; pictures in between are rounded, as files would be."""
    test = nn.functional.pad(torchvision.datasets.MNIST(small_data, train=False).data[:, None], (2, 2, 2, 2))
    a, both = (
        script.draw("outline", test),
        nn.ModuleDict({way: script.Generator(width=8, blocks=1) for way in ("ab", "ba")}),
    )
    both.load_state_dict(read(whole.folder / "checkpoint.pt")["generator"])

    def translate(network, images):
        return script.sample(both[network], images.float() / 127.5 - 1)

    def distance(x, y):
        return (x.int() - y.int()).abs().double().mean().item() / 255

    fake_b, fake_a = translate("ab", a), translate("ba", test)
    expected = {"a2b_error": distance(fake_b, test), "b2a_error": distance(fake_a, a)}
    expected |= {"a2b2a_error": distance(translate("ba", fake_b), a)}
    expected |= {"b2a2b_error": distance(translate("ab", fake_a), test)}
    expected |= {"evidence": distance(script.draw("outline", fake_b), a)}
    row = [*csv.DictReader((whole.folder / "history.csv").read_text().splitlines())][-1]
    for name, value in expected.items():
        assert float(row[name]) == pytest.approx(value, rel=1e-3), name
        assert f"{name} {value:.3f}" in whole.out


def test_cyclegan_generates_in_both_directions(script, whole, small_data, tmp_path):
    checkpoint = str(whole.folder / "checkpoint.pt")
    argv = ["--checkpoint", checkpoint, "--generate", "24"]
    both = nn.ModuleDict({way: script.Generator(width=8, blocks=1) for way in ("ab", "ba")})
    both.load_state_dict(read(checkpoint)["generator"])
    test = nn.functional.pad(torchvision.datasets.MNIST(small_data, train=False).data[:, None], (2, 2, 2, 2))
    for flags, network, questions in (
        ([], "ab", script.draw("outline", test)),
        (["--direction", "b2a"], "ba", test),
    ):
        script.main([*argv, *flags, "--out-dir", str(tmp_path / network)])
        files = sorted((tmp_path / network).rglob("*.png"), key=lambda path: path.name)
        made = torch.stack([torch.from_numpy(np.array(Image.open(path))) for path in files])
        expected = script.sample(both[network], questions.float() / 127.5 - 1)[:, 0]
        assert (made.int() - expected.int()).abs().max() <= 1  # a grey level, by rounding
    own = tmp_path / "own"
    own.mkdir()
    Image.fromarray(test[3, 0].numpy()).save(own / "seven.png")
    flags = ["--direction", "b2a", "--out-dir", str(tmp_path / "mine")]
    script.main(["--checkpoint", checkpoint, "--translate", str(own), *flags])
    mine = torch.from_numpy(np.array(Image.open(tmp_path / "mine" / "seven.png")))
    assert (mine.int() - made[3].int()).abs().max() <= 1


def test_cyclegan_domains_of_any_size(script, tmp_path, monkeypatch, capsys):
    """A pass is one over the larger domain; the strips show as many pictures of each as the smaller can."""
    monkeypatch.chdir(tmp_path)
    two_sides(tmp_path / "both", "trainA", "trainB", count=12)
    two_sides(tmp_path / "both", "testA", "testB", count=7)
    for i in range(8):
        Path("both", "trainA", f"{i:02d}.png").unlink()
    Path("both", "testA", "00.png").unlink()
    flags = [
        "--dataset",
        "folders",
        "--data-dir",
        "both",
        "--image-size",
        "32",
        "--device",
        "cpu",
        "--width",
        "8",
    ]
    script.main([*flags, "--batch-size", "2", "--epochs", "1", "--out-dir", "run"])
    assert "16 images, 6 steps an epoch" in capsys.readouterr().out
    with Image.open("run/samples/epoch_0001.png") as strip:
        assert strip.size == (6 * 34 + 2, 2 * (3 * 34 + 2) + 2)  # no truths: the names differ
    rows = list(csv.DictReader(Path("run/history.csv").read_text().splitlines()))
    assert "a2b_error" not in rows[0]
    assert float(rows[-1]["a2b2a_error"]) > 0


def test_cyclegan_glasses(script):
    """A: faces without, B: faces with glasses, as data/faces says; both with names of their own."""
    args = script.parse_args(["--dataset", "faces", "--task", "glasses", "--data-dir", str(ROOT / "data")])
    script.fill_in(args)
    args.device = "cpu"
    (a, b), (test_a, test_b), names = script.read_domains(args)
    rows = {part: [*csv.DictReader(open(ROOT / f"data/faces/{part}.csv"))] for part in ("train", "test")}
    for part, without, with_them in (("train", a, b), ("test", test_a, test_b)):
        worn = [row["glasses"] != "none" for row in rows[part]]
        assert (len(with_them), len(without)) == (sum(worn), len(worn) - sum(worn))
    faces, _ = fid.open_faces(ROOT / "data/faces", "test")
    for domain, some in ((test_a, names[0]), (test_b, names[1])):
        assert torch.equal(domain[5], faces[int(some[5])])
    assert not {*names[0]} & {*names[1]}


# %% stylegan


def test_stylegan_counts():
    """At 1024 pixels what NVIDIA's code has, 26,219,627, less the 7,608 of to_rgb layers for growing."""
    with torch.device("meta"):
        assert count(stylegan.Generator(1024, 16, 512, 3, most=512)) == 26_212_019
    for size, width, expected in ((64, 16, (476_851, 285_649)), (64, 32, (1_259_363, 1_140_129))):
        generator = stylegan.Generator(size, width, channels=3)
        assert (count(generator), count(stylegan.Discriminator(size, width, 3))) == expected
        assert generator(torch.randn(2, 128)).shape == (2, 3, size, size)
    assert (count(stylegan.Generator(channels=3)), count(stylegan.Discriminator(channels=3))) == (
        897_891,
        844_961,
    )
    assert count(stylegan.Generator(mapping_layers=0)) == 897_825 - 8 * (128 * 128 + 128)
    assert count(stylegan.Generator(noise=False)) == 897_825 - 2 * (128 + 128 + 64 + 32)


def test_stylegan_adain():
    x, style = 3 * torch.randn(4, 5, 8, 8) + 2, torch.randn(4, 10)
    scale, shift = style[:, :5], style[:, 5:]
    y = stylegan.adain(x, style)
    assert torch.allclose(y.mean((2, 3)), shift, atol=1e-5)
    assert torch.allclose(y.std((2, 3), correction=0), (1 + scale).abs(), atol=1e-5)
    assert torch.allclose(stylegan.adain(5 * x - 1, style), y, atol=1e-5)  # earlier contrast is wiped out
    flat = torch.ones(4, 5, 8, 8) * torch.randn(4, 5, 1, 1)
    assert torch.allclose(stylegan.adain(flat, style), shift[:, :, None, None].expand_as(x), atol=1e-3)
    for layer in stylegan.Synthesis().layers:  # a style of zeros is neutral
        assert not layer.style(torch.zeros(1, 128)).any()


def test_stylegan_mapping():
    """z counts by its direction alone; w is of the size of z, and depends on it, from the start."""
    torch.manual_seed(0)
    mapping, z = stylegan.Mapping(), torch.randn(1000, 128)
    w = mapping(z)
    assert torch.allclose(mapping(7 * z), w, atol=1e-5)
    assert stylegan.Mapping(layers=0)(z).square().mean(1).sqrt() == pytest.approx(1, abs=1e-5)
    assert w.square().mean().sqrt().item() == pytest.approx(1.2, abs=0.15)
    assert w.std(0).mean().item() == pytest.approx(0.6, abs=0.1)


def test_stylegan_rates_are_equalised():
    """Stored weights are N(0, 1), used ones have a variance of gain^2 / inputs; the mapping learns slowly."""
    torch.manual_seed(0)
    generator, discriminator = stylegan.Generator(), stylegan.Discriminator()
    layers = [m for m in [*generator.modules(), *discriminator.modules()] if hasattr(m, "scale")]
    assert len(layers) == 8 + 7 + 8 + 1 + 1 + 6 + 1 + 2
    quiet = [layer.style for layer in generator.synthesis.layers] + [generator.synthesis.to_rgb]
    for layer in layers:
        n, slow = layer.weight.numel(), layer in generator.mapping.layers
        assert layer.weight.std().item() == pytest.approx(100 if slow else 1, rel=6 / math.sqrt(2 * n))
        gain = 1 if layer in quiet or layer is discriminator.layers[-1] else math.sqrt(2)
        x = torch.randn(2000, layer.weight.shape[1], *[3] * (layer.weight.ndim - 2))
        middle = layer(x) if x.ndim == 2 else layer(x)[:, :, 1, 1]
        assert middle.square().mean().sqrt().item() == pytest.approx(gain, rel=0.1)
    # A step of Adam moves each stored weight by the rate: of the mapping's used weights a hundredth of that.
    for layer, expected in ((generator.mapping.layers[0], 0.01), (discriminator.layers[-3], 1)):
        before, optimizer = layer.weight.detach() * layer.scale, torch.optim.Adam(layer.parameters(), 0.002)
        layer(torch.randn(4, layer.weight.shape[1])).square().sum().backward()
        optimizer.step()
        moved = (layer.weight.detach() * layer.scale - before).abs().max().item()
        step = 0.002 * math.sqrt(2 / layer.weight.shape[1]) * expected
        assert moved == pytest.approx(step, rel=0.03)
        biases = layer(torch.zeros(1, layer.weight.shape[1]))  # they were 0
        assert biases.abs().max().item() == pytest.approx(0.002 * expected, rel=0.01)


def test_stylegan_resamples_smoothly():
    """Up is bilinear, but for the border; down is [1, 3, 3, 1] / 8; both in float64."""
    x, blur = torch.randn(2, 3, 8, 8, dtype=torch.float64), stylegan.Blur().double()
    weight = torch.randn(5, 3, 3, 3, dtype=torch.float64)
    conv = functools.partial(nn.functional.conv2d, weight=weight, padding=1)
    ours = blur(conv(nn.Upsample(scale_factor=2)(x)))
    theirs = conv(nn.functional.interpolate(x, scale_factor=2, mode="bilinear"))
    assert torch.allclose(ours[:, :, 2:-2, 2:-2], theirs[:, :, 2:-2, 2:-2], atol=1e-12)
    row = torch.tensor([1.0, 3, 3, 1], dtype=torch.float64) / 8
    kernel = (row * row[:, None]).expand(3, 1, 4, 4)
    expected = nn.functional.conv2d(x, kernel, stride=2, padding=1, groups=3)
    assert torch.allclose(nn.AvgPool2d(2)(blur(x)), expected, atol=1e-12)
    assert [type(m) for m in stylegan.Discriminator().layers[4:6]] == [stylegan.Blur, nn.AvgPool2d]
    blurred = [isinstance(layer.blur, stylegan.Blur) for layer in stylegan.Synthesis().layers]
    assert blurred == [False, False, True, False, True, False, True, False]


@pytest.mark.parametrize("up", [False, True])
def test_stylegan_layer_by_hand(up):
    """Doubled, convolved and blurred; then noise, bias, leaky ReLU, and only then the style."""
    layer = stylegan.StyledLayer(3, 5, 16, 8, up=up).eval()
    nn.init.normal_(layer.strength)
    nn.init.normal_(layer.bias)
    x, w = torch.randn(2, 3, *([4, 4] if up else [8, 8])), torch.randn(2, 16)
    maps = x.repeat_interleave(2, 2).repeat_interleave(2, 3) if up else x
    maps = nn.functional.conv2d(maps, layer.conv.weight * math.sqrt(2 / 27), padding=1)
    if up:
        padded = nn.functional.pad(maps, (1, 1, 1, 1))
        rows = (padded[:, :, :-2] + 2 * padded[:, :, 1:-1] + padded[:, :, 2:]) / 4
        maps = (rows[..., :-2] + 2 * rows[..., 1:-1] + rows[..., 2:]) / 4
    maps = maps + layer.strength * layer.noise + layer.bias
    maps = torch.where(maps > 0, maps, 0.2 * maps)
    scale, shift = (w @ layer.style.weight.T / 4 + layer.style.bias).split(5, 1)
    maps = (maps - maps.mean((2, 3), True)) / maps.std((2, 3), correction=0, keepdim=True)
    expected = maps * (1 + scale[:, :, None, None]) + shift[:, :, None, None]
    assert torch.allclose(layer(x, w), expected, atol=1e-4)


def test_stylegan_discriminator_compares_a_group():
    group = stylegan.GroupDeviation()
    x = torch.ones(8, 2, 3, 3)
    x[2:4], x[6:] = -1, -1  # the group of image 0 is 0, 2, 4 and 6
    assert torch.allclose(group(x)[:, 2], torch.ones(8, 3, 3))
    assert torch.equal(group(x)[:, :2], x)
    x[1::2] = 5  # the other group: all the same
    assert torch.allclose(group(x)[::2, 2], torch.ones(4, 3, 3))
    assert torch.allclose(group(x)[1::2, 2], torch.full((4, 3, 3), 1e-4))
    deviation = group(y := torch.randn(6, 2, 3, 3))[:, 2, 0, 0]  # groups of three
    expected = (y[::2].var(0, correction=0) + 1e-8).sqrt().mean()
    assert torch.allclose(deviation[::2], expected.expand(3))
    assert group(y[:1]).shape == (1, 3, 3, 3)
    assert group(torch.full((1, 1, 4, 4), 7.0))[0, 1, 0, 0].item() == pytest.approx(1e-4)


def test_stylegan_r1_by_hand():
    a, x = torch.randn(1, 2, 4, 4), torch.randn(6, 2, 4, 4)
    linear = lambda images: (images * a).sum((1, 2, 3))[:, None]  # noqa: E731
    assert stylegan.r1_penalty(linear, x).item() == pytest.approx(a.square().sum().item(), rel=1e-5)
    bowl = lambda images: 3 * images.square().sum((1, 2, 3))[:, None] / 2  # noqa: E731
    expected = 9 * x.square().sum((1, 2, 3)).mean().item()
    assert stylegan.r1_penalty(bowl, x).item() == pytest.approx(expected, rel=1e-5)
    discriminator = stylegan.Discriminator(32, 8)
    stylegan.r1_penalty(discriminator, torch.randn(4, 1, 32, 32)).backward()
    # Biases that only LeakyReLUs follow do not change a slope.
    assert all(p.grad.any() for name, p in discriminator.named_parameters() if "weight" in name)


def test_stylegan_average_of_generators():
    old, new = stylegan.Generator(width=8, latent_dim=16), stylegan.Generator(width=8, latent_dim=16)
    ema, new.w_avg = copy.deepcopy(old), torch.randn(16)
    for _ in range(10):
        stylegan.average(ema, new, 0.9)
    for mean, first, last in zip(ema.parameters(), old.parameters(), new.parameters()):
        assert torch.allclose(mean, 0.9**10 * first + (1 - 0.9**10) * last, atol=1e-5)
    assert_same_bits(dict(ema.named_buffers()), dict(new.named_buffers()))


def test_stylegan_mixes_from_a_random_layer_on():
    torch.manual_seed(0)
    w1, w2 = torch.zeros(20_000, 1), torch.ones(20_000, 1)
    ws = stylegan.mix(w1, w2, 8, 0.9)
    assert ws.shape == (20_000, 8, 1)
    assert (ws.diff(dim=1) >= 0).all()  # w1 first
    cuts = torch.bincount(8 - ws.sum((1, 2)).long(), minlength=9)
    assert cuts[0] == 0  # the first layer always has w1
    assert cuts[8].item() == pytest.approx(2000, abs=4 * math.sqrt(1800))  # these are not mixed
    expected = 18_000 / 7
    assert ((cuts[1:8] - expected) ** 2 / expected).sum() < 22.5  # chi-square of 6 degrees: 0.1%
    assert torch.equal(stylegan.mix(w1, w2, 8, 0.0), torch.zeros(20_000, 8, 1))
    assert stylegan.mix(w1, w2, 8, 1.0)[:, 7].all()


def test_stylegan_noise():
    """Fresh for each image, layer and step in training; always the same in eval mode; silent at first."""
    torch.manual_seed(0)
    synthesis, drawn = stylegan.Synthesis(width=8, latent_dim=16), []
    ws = torch.randn(1, 8, 16).expand(2, -1, -1)
    assert torch.equal(*synthesis(ws))  # strengths are 0
    for layer in synthesis.layers:
        layer.strength.data.fill_(1)
    original = torch.randn
    with mock.patch.object(
        stylegan.torch, "randn", lambda *a, **k: (drawn.append(original(*a, **k)), drawn[-1])[1]
    ):
        first, second = synthesis(ws)
    assert not torch.equal(first, second)
    assert [noise.shape for noise in drawn] == [(2, 1, side, side) for side in (4, 4, 8, 8, 16, 16, 32, 32)]
    assert len({noise.flatten()[0].item() for noise in drawn}) == 8
    assert not torch.equal(synthesis(ws)[0], first)
    first, second = synthesis.eval()(ws)
    assert torch.equal(first, second)
    assert torch.equal(synthesis(ws)[0], first)
    bare = stylegan.Synthesis(width=8, latent_dim=16, noise=False)
    assert torch.equal(*bare(ws))


def test_stylegan_mean_colour_is_of_the_last_style():
    """Before pixels are cut off, and whatever the other styles and the noise: AdaIN sets each map's mean."""
    torch.manual_seed(0)
    synthesis = stylegan.Generator(width=8, latent_dim=16, channels=3).train().synthesis
    nn.init.normal_(synthesis.layers[-1].strength)
    ws = torch.randn(1, 8, 16).repeat(3, 1, 1)
    ws[1, :-1], ws[2, -1] = torch.randn(7, 16), torch.randn(16)
    images = synthesis(ws)
    assert (images[0] - images[1]).abs().mean() > 0.1
    same, other = ((images[0] - image).mean((1, 2)).abs() for image in images[1:])
    assert same.max() < 1e-5 < 1e-2 < other.max()


def test_stylegan_truncation():
    torch.manual_seed(0)
    generator = stylegan.Generator(width=8, latent_dim=16).eval()
    generator.w_avg.copy_(torch.randn(16))
    z, ones = torch.randn(3, 16), torch.ones(3, 1)
    assert torch.allclose(generator(z, ones), generator(z), atol=1e-4)
    assert torch.equal(generator.spread(z), z[:, None].expand(-1, 8, -1))  # the same for all layers
    average = generator.synthesis(generator.spread(generator.w_avg[None]))
    assert torch.allclose(generator(z, 0 * ones), average.expand(3, -1, -1, -1), atol=1e-4)
    w = generator.mapping(z)
    half = generator.spread(generator.w_avg + 0.5 * (w - generator.w_avg))
    assert torch.allclose(generator(z, ones / 2), generator.synthesis(half), atol=1e-4)


def test_stylegan_samples_are_cut_to_what_a_pixel_can_be():
    generator = stylegan.Generator(width=8, latent_dim=16)
    generator.synthesis.to_rgb.bias.data.fill_(9.0)
    assert generator(torch.randn(2, 16)).min() > 1.5  # in training there is no bound
    assert (stylegan.sample(generator, torch.randn(2, 16)) == 255).all()  # and not 9 * 127 modulo 256


class Flat:
    """A generator whose images are A w, and whose w is A z."""

    def __init__(self, matrix, mapping):
        self.w_avg, self.latent_dim, self.mapping = torch.zeros(1, dtype=torch.float64), 128, mapping
        self.spread, self.synthesis = lambda w: w, lambda w: w @ matrix.T


def test_stylegan_path_lengths_in_closed_form():
    """Of a linear g: E|A (w2 - w1)|^2 = 2 |A|^2. Of z on its sphere: d E[angle^2]."""
    torch.manual_seed(0)
    matrix = torch.randn(5, 128, dtype=torch.float64) / 4
    scaled = stylegan.Mapping(layers=0)
    flat = Flat(matrix, lambda z: z)
    lengths = stylegan.path_lengths(flat, lambda x: x, "w", 20_000, 1e-4)
    assert lengths.shape == (20_000,)
    assert lengths.mean().item() == pytest.approx(2 * matrix.square().sum().item(), rel=0.02)
    sphere = Flat(torch.eye(128, dtype=torch.float64), scaled)
    lengths = stylegan.path_lengths(sphere, lambda x: x, "z", 20_000, 1e-4)
    assert lengths.mean().item() == pytest.approx(128 * (math.pi**2 / 4 + 1 / 128), rel=0.01)
    # What the lesson says of lines and arcs in one space.
    chord = stylegan.path_lengths(sphere, lambda x: x, "w", 20_000, 1e-4).mean() / lengths.mean()
    assert chord.item() == pytest.approx(0.81, abs=0.005)
    drawn = Flat(torch.eye(128, dtype=torch.float64), stylegan.Mapping().double())
    line, way = (stylegan.path_lengths(drawn, lambda x: x, space, 2000, 1e-4).mean().item() for space in "wz")
    assert line / way == pytest.approx(0.25, abs=0.02)
    spread = torch.linalg.eigvalsh(torch.cov(stylegan.Mapping()(torch.randn(20_000, 128)).T))  # ascending
    assert 0.6 < spread[-10:].sum() / spread.sum() < 0.75  # two thirds in ten of 128 directions: RESULTS.md
    # Anywhere on the path: |w|^2 changes at the rate 2 w (w2 - w1), at most at the ends.
    square = lambda x: x.square().sum(1, keepdim=True)  # noqa: E731
    whole = Flat(torch.eye(128, dtype=torch.float64), lambda z: z)
    inside = stylegan.path_lengths(whole, square, "w", 20_000, 1e-6).mean().item()
    # (w1 + t (w2 - w1)) (w2 - w1), with a = w2 - w1: over t, E[(w1 a + t |a|^2)^2] = d^2 / 3 + 2 d
    assert inside == pytest.approx(4 * (128**2 / 3 + 2 * 128), rel=0.05)


def test_stylegan_share_of_z():
    torch.manual_seed(0)
    generator = stylegan.Generator(width=8, latent_dim=16)
    with torch.no_grad():
        assert stylegan.share_of_z(generator) == pytest.approx(1, abs=1e-6)  # strengths are 0
        for layer in generator.synthesis.layers:
            layer.strength.fill_(1)
        assert 0 < stylegan.share_of_z(generator) < 0.99
        for layer in generator.synthesis.layers:
            layer.style.weight.zero_()  # now all images have the same style
        assert abs(stylegan.share_of_z(generator)) < 0.1
        # Of a + b, with variances of 3 by z and 1 by noise, three quarters are z's.
        made = types.SimpleNamespace(
            w_avg=torch.zeros(1), latent_dim=8100, mapping=lambda z: z, spread=lambda w: w
        )
        pixels = lambda ws: (3**0.5 * ws + torch.randn_like(ws)).view(-1, 1, 90, 90) / 20  # noqa: E731
        made.synthesis = type(
            "",
            (),
            {"train": lambda self: None, "eval": lambda self: None, "__call__": lambda self, ws: pixels(ws)},
        )()
        assert stylegan.share_of_z(made, 4) == pytest.approx(0.75, abs=0.02)  # however few z


def test_stylegan_mapping_and_penalty_stay_in_fp32(script):
    args = script.parse_args(["--device", "cpu", "--precision", "bf16", "--width", "8", "--dataset", "mnist"])
    script.fill_in(args)
    args.channels, kinds = 1, {"mapping": [], "synthesis": [], "second": []}
    generator, second = script.build(args), script.place(script.Discriminator(32, 8), args)
    for name, layer in (
        ("mapping", generator.mapping.layers[0]),
        ("synthesis", generator.synthesis.to_rgb),
        ("second", second.layers[0]),
    ):
        layer.register_forward_hook(lambda module, inputs, out, name=name: kinds[name].append(out.dtype))
    ema = copy.deepcopy(generator).requires_grad_(False)
    recorders = Recorder(generator, generator, second), Recorder(second, generator, second)
    torch.manual_seed(0)
    real = torch.randn(4, 1, 32, 32)
    metrics = script.train_step(generator, second, ema, *recorders, real, 0.9, 1.0, 0.99)
    low, high = torch.bfloat16, torch.float32
    assert kinds == {"mapping": [high], "synthesis": [low], "second": [low, low, high, low]}
    with script.fp32():
        expected = script.r1_penalty(second, real) / 2
    assert torch.equal(metrics["r1"], expected.detach())
    assert {value.dtype for value in metrics.values()} == {high}


def test_stylegan_step_averages_styles_and_weights():
    seen = one_round(stylegan)
    torch.manual_seed(1)
    w1 = seen.generator.mapping(torch.randn(16, 128))[:8]
    assert torch.allclose(seen.generator.w_avg, 0.005 * w1.mean(0), atol=1e-6)  # it was 0
    assert torch.equal(seen.ema.w_avg, seen.generator.w_avg)
    without = one_round(stylegan, r1_weight=0.0)
    assert without.metrics["r1"] == 0
    assert len(without.scores) == 3  # real, fake, and for the generator
    assert len(seen.scores) == 4
    # Each step of the average goes 1 - ema_decay of the way.
    torch.manual_seed(7)
    ema = stylegan.Generator()
    far = one_round(stylegan, ema=copy.deepcopy(ema).requires_grad_(False), ema_decay=0.75)
    name = "synthesis.constant"
    start, now, end = (dict(x.named_parameters())[name] for x in (ema, far.ema, far.generator))
    assert not torch.allclose(start, end, atol=0.1)
    assert torch.allclose(now, 0.75 * start + 0.25 * end, atol=1e-6)


def test_stylegan_penalty_in_every_tenth_step(script, small, tmp_path, monkeypatch):
    calls = spy(monkeypatch, script, "train_step")
    flags = [*small, "--r1-weight", "0.3", "--ema-images", "16", "--out-dir", str(tmp_path / "run")]
    script.main([*flags, "--epochs", "2", "--mixing", "0.25"])
    mixing, r1_weight, decay = zip(*(args[6:] for args in calls))
    assert set(mixing) == {0.25}
    assert r1_weight == (0.3 * 10, *[0.0] * 9, 0.3 * 10, 0.0)
    assert decay[0] ** 4 == pytest.approx(0.5)  # 16 images are four steps
    r1 = read(tmp_path / "run" / "checkpoint.pt")["history"][:, script.METRICS.index("r1")]
    assert [value > 0 for value in r1.tolist()] == [True, *[False] * 9, True, False]


def test_stylegan_pictures_show_what_they_say(script, tmp_path):
    """interpolation: pairs of rows with the same ends; mixing: styles of A, some from B; truncation: psi."""
    torch.manual_seed(0)
    ema = script.Generator(width=8, latent_dim=16)
    for layer in ema.synthesis.layers:
        layer.strength.data.fill_(0.1)
    ema.w_avg.copy_(0.1 * torch.randn(16))
    z = torch.randn(64, 16)
    script.draw_styles(ema, z, tmp_path, types.SimpleNamespace(channels=1))
    plain = script.sample(ema, z)

    def cells(name):
        with Image.open(tmp_path / f"{name}.png") as image:
            pixels = torch.from_numpy(np.array(image))[2:, 2:]
        return pixels.unfold(0, 32, 34).unfold(1, 32, 34)  # rows, columns, 32, 32

    walks = cells("interpolation")
    for pair in range(4):
        for row in (2 * pair, 2 * pair + 1):
            for column, number in ((0, 2 * pair), (9, 2 * pair + 1)):
                assert (walks[row, column].int() - plain[number, 0].int()).abs().max() <= 1
        assert not torch.equal(walks[2 * pair, 4], walks[2 * pair + 1, 4])
    w = ema.mapping(z)
    middle = script.sample(ema.synthesis, ema.spread(torch.lerp(w[:1], w[1:2], 4 / 9)))[0, 0]
    assert (walks[1, 4].int() - middle.int()).abs().max() <= 1
    mixing = cells("mixing")
    assert not mixing[0, 0].any()
    for k in range(6):
        assert (mixing[k + 1, 0].int() - plain[k, 0].int()).abs().max() <= 1
        assert (mixing[0, k + 1].int() - plain[6 + k, 0].int()).abs().max() <= 1
        ws = ema.spread(w[k : k + 1]).clone()
        layers = [slice(0, 4), slice(4, 6), slice(6, 8)][k // 2]  # 4 and 8; 16; 32 pixels
        ws[:, layers] = w[8]
        expected = script.sample(ema.synthesis, ws.detach())[0, 0]
        assert (mixing[k + 1, 3].int() - expected.int()).abs().max() <= 1
    truncated = cells("truncation")
    average = script.sample(ema.synthesis, ema.spread(ema.w_avg[None]))[0, 0]
    for row in range(6):
        assert (truncated[row, 0].int() - plain[row, 0].int()).abs().max() <= 1
        assert (truncated[row, 4].int() - average.int()).abs().max() <= 1
        opposite = script.sample(ema, z[row : row + 1], torch.tensor([[-1.0]]))[0, 0]
        assert (truncated[row, 6].int() - opposite.int()).abs().max() <= 1


def test_stylegan_generates_with_truncation(script, whole, tmp_path):
    argv = ["--checkpoint", str(whole.folder / "checkpoint.pt"), "--generate", "4"]
    for psi in ("0", "1"):
        script.main([*argv, "--truncation", psi, "--out-dir", str(tmp_path / psi)])
    script.main([*argv, "--out-dir", str(tmp_path / "plain")])
    assert len({*snapshot(tmp_path / "0").values()}) == 1  # all are the average image
    assert snapshot(tmp_path / "1") == snapshot(tmp_path / "plain")
    # The images are of the average, not of the generator itself.
    checkpoint = read(whole.folder / "checkpoint.pt")
    ema = script.Generator(width=8, latent_dim=16)
    ema.load_state_dict(checkpoint["ema"])
    script.reseed(42, "generate")
    expected = script.sample(ema, torch.randn(256, 16))[0, 0].numpy()
    assert np.abs(np.array(Image.open(tmp_path / "plain" / "00000.png"), int) - expected).max() <= 1
    assert not torch.equal(
        checkpoint["ema"]["synthesis.constant"], checkpoint["generator"]["synthesis.constant"]
    )


def test_stylegan_images_of_other_sizes(script, tmp_path, monkeypatch, capsys):
    faces = script.read_images("faces", ROOT / "data", 32)
    assert faces.shape[1:] == (3, 32, 32)
    whole = script.read_sheets(ROOT / "data/faces", "train_00.webp")
    assert (faces[0].float() - nn.functional.avg_pool2d(whole[0].float(), 2)).abs().mean() < 6
    digits = script.read_images("mnist", ROOT / "data", 32)
    assert torch.equal(digits[5, 0, 2:-2, 2:-2], torchvision.datasets.MNIST(ROOT / "data").data[5])
    fails(script, ["--dataset", "celeba", "--data-dir", tmp_path], capsys, "--data-dir", "img_align_celeba")
    monkeypatch.chdir(tmp_path)
    Path("pictures").mkdir()
    for number in range(8):
        Image.new("RGB", (90, 70), (30 * number, 99, 0)).save(f"pictures/{number}.png")
    flags = [
        "--dataset",
        "folder",
        "--data-dir",
        "pictures",
        "--width",
        "4",
        "--latent-dim",
        "8",
        "--device",
        "cpu",
    ]
    script.main([*flags, "--batch-size", "4", "--max-steps", "1", "--out-dir", "run"])
    with Image.open("run/mixing.png") as image:
        assert (image.size, image.mode) == ((7 * 66 + 2, 7 * 66 + 2), "RGB")
    settings = read("run/checkpoint.pt")["settings"]
    assert (settings["image_size"], settings["r1_weight"]) == (64, 10)
    for dataset, expected in {"faces": (64, 30, 16), "celeba": (64, 5, 32), "mnist": (32, 5, 32)}.items():
        args = types.SimpleNamespace(**script.load_checkpoint("run/checkpoint.pt")["settings"])
        args.dataset, args.image_size, args.epochs, args.width = dataset, None, None, None
        script.fill_in(args)
        assert (args.image_size, args.epochs, args.width) == expected


# %% benchmark


def test_benchmark_compares_with_one_product():
    """As a product of matrices and as a convolution it is the same."""
    product, convolution = (job() for job in benchmark.products(torch.device("cpu")).values())
    assert product.shape == (2048, 2048)
    assert torch.allclose(convolution.view(2048, 2048), product, atol=1e-2)


@pytest.mark.parametrize("name", CASES)
def test_benchmark_trains_each_script(name, tmp_path, monkeypatch):
    """Each loop that is compared moves all weights of the same networks."""
    players = []

    class Small(benchmark.Player):
        def __init__(self, *args, **adam):
            super().__init__(*args, **adam)
            self.args.batch_size, self.count = 8, 8 * self.n_critic
            self.weights = [*self.generator.parameters(), *self.second.parameters()]
            self.first = [weight.detach().clone() for weight in self.weights]
            players.append(self)

    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(benchmark, "Player", Small)
    benchmark.write_jpegs(tmp_path, count=8)
    _, step = benchmark.tutorial(name, torch.device("cpu"), tmp_path)
    step()
    for precision in ("fp32", "bf16"):
        benchmark.ours(name, torch.device("cpu"), precision)[0]()
    assert len(players) == 3
    for player in players:
        assert all(torch.equal(a, b) for a, b in zip(player.first, players[0].first))
        assert not any(torch.equal(a, b) for a, b in zip(player.first, player.weights))


def test_benchmark_gives_translators_what_they_have(monkeypatch):
    """Pairs to pix2pix.py; to cyclegan.py questions of even digits, and answers of odd ones."""
    monkeypatch.chdir(ROOT)
    numbers, original = [], benchmark.DataLoader

    def loader(dataset, *args, **flags):
        numbers.append(dataset.indices)
        return original(dataset, *args, **flags)

    monkeypatch.setattr(benchmark, "DataLoader", loader)
    for name, expected in (
        ("pix2pix", [range(60_000)]),
        ("cyclegan", [range(0, 60_000, 2), range(1, 60_000, 2)]),
    ):
        numbers.clear()
        _, step = benchmark.tutorial(name, torch.device("cpu"))
        step()
        assert numbers == expected


def test_benchmark_learns(tmp_path, monkeypatch):
    """What is measured is what the script, or the loop of tutorials, has learned when the time is over."""
    kept, players, drawn, targets, penalties = [], [], [], [], []
    original, original_generated, r1 = benchmark.tutorial, benchmark.claims.generated, stylegan.r1_penalty

    def tutorial(*args):
        player, step = original(*args)
        players.append(player)
        player.generator.register_forward_pre_hook(lambda _, args: drawn.append(args[0].abs().max().item()))
        return player, step

    def generated(script, checkpoint, count, device):
        kept.append(read(checkpoint))
        images, _ = original_generated(script, checkpoint, count, device)
        assert images.shape[:2] == (count, 1)
        return count, device

    class Noting(nn.BCELoss):
        def forward(self, probability, target):
            targets.append(target.mean().item())
            return super().forward(probability, target)

    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(benchmark, "tutorial", tutorial)
    monkeypatch.setattr(nn, "BCELoss", Noting)
    monkeypatch.setattr(stylegan, "r1_penalty", lambda *args: penalties.append(1) or r1(*args))
    monkeypatch.setattr(benchmark.claims, "generated", generated)
    figures = {"distance": 7.0, "recall": 0.5, "class_accuracy": None}
    monkeypatch.setattr(benchmark.claims, "Judge", lambda *args: lambda *_: figures)
    flags, loops = ["--seed", "43"], []
    for who in ("script", "tutorial"):
        row = benchmark.learned(("stylegan", who, flags, 0.2, 10, "cpu"))
        loops.append(int(row.pop("steps").replace(",", "")))
        assert loops[-1] > 0
        assert float(row.pop("minutes")) < 1
        assert row == {"script": "stylegan.py", "loop": who, "distance": "7.0", "recall": "0.500"}
    argv = [*flags, "--dataset", "mnist", "--device", "cpu", "--out-dir", str(tmp_path / "run")]
    stylegan.main([*argv, "--max-steps", str(loops[0])])
    assert_same_bits(kept[0]["ema"], read(tmp_path / "run" / "checkpoint.pt")["ema"])
    assert_same_bits(kept[1]["ema"], dict(players[0].ema.state_dict()))
    assert max(drawn) > 2  # noise as --generate draws it
    assert targets == [1.0, 0.0, 1.0] * loops[1]
    first = math.ceil(loops[0] / 10)  # the script's, in each tenth step; one more for the checkpoint
    assert len(penalties) == 2 * first + 1 + loops[1]
    # One that is done in less time.
    row = benchmark.learned(("stylegan", "script", ["--max-steps", "2"], 100.0, 10, "cpu"))
    assert (row["steps"], row["minutes"]) == ("2", "0.0")


# %% export


@pytest.mark.parametrize("script", CASES, indirect=True)
def test_pretrained_generators_generate(script, tmp_path, monkeypatch):
    """Images of many grey levels or colours in a fresh clone; no file is too large."""
    monkeypatch.chdir(ROOT)
    path = ROOT / "pretrained" / f"{script.SCRIPT}.pt"
    script.main(["--generate", "3", "--checkpoint", str(path), "--out-dir", str(tmp_path / "made")])
    images = [np.asarray(Image.open(file)) for file in (tmp_path / "made").rglob("*.png")]
    assert len(images) == 3
    assert all(len(np.unique(image)) > 20 for image in images)
    assert path.stat().st_size < (2**24 if script is pix2pix else 2**23)


def test_exported_generator(script, whole, small_data, tmp_path, monkeypatch, capsys):
    """It makes what the checkpoint makes, to a grey level; there is nothing to train on, and no path."""
    checkpoint, small = whole.folder / "checkpoint.pt", tmp_path / "new" / "small.pt"
    export.main([str(checkpoint), str(small)])
    size = small.stat().st_size
    assert capsys.readouterr().out == f"the generator of {script.SCRIPT}.py, {size / 1e6:.1f} MB\n"
    content, network = read(small), "ema" if script is stylegan else "generator"
    assert {*content} == {"script", "settings", network}
    assert str(small_data.parent.parent) not in str(content["settings"])
    for name, weights in read(checkpoint)[network].items():
        kept = content[network][name]
        assert kept.dtype == (
            torch.half if weights.ndim > 1 and weights.is_floating_point() else weights.dtype
        )
        torch.testing.assert_close(kept.to(weights.dtype), weights, rtol=1e-3, atol=1e-4)
    data = ["--data-dir", str(small_data)] if script in TRANSLATORS else []
    for path in (checkpoint, small):
        argv = ["--generate", "8", "--checkpoint", str(path), "--out-dir", str(tmp_path / path.stem)]
        script.main([*argv, *data, "--device", "cpu"])
    made = [sorted((tmp_path / name).rglob("*.png")) for name in ("checkpoint", "small")]
    assert len(made[0]) == len(made[1]) == 8
    for pair in zip(*made):
        one, two = (np.array(Image.open(path)).astype(float) for path in pair)
        assert abs(one - two).mean() < 1
    monkeypatch.chdir(ROOT)  # where the data are that the settings name now
    fails(script, ["--resume", small], capsys, small, "lacks discriminator", "for --generate alone")
    with pytest.raises(SystemExit, match="2"):
        export.main([str(checkpoint), str(small)])
    assert "small.pt is there already" in capsys.readouterr().err
    assert small.stat().st_size == size


def test_export_refuses_what_is_no_checkpoint(tmp_path, capsys):
    (tmp_path / "bad.pt").write_bytes(b"no")
    torch.save({"script": "stylegan", "settings": {}}, tmp_path / "half.pt")
    for name in ("none.pt", "bad.pt", "half.pt"):
        with pytest.raises(SystemExit, match="2"):
            export.main([str(tmp_path / name), str(tmp_path / "new.pt")])
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"export.py: {tmp_path / name}: give a whole checkpoint.pt (")
    assert not (tmp_path / "new.pt").exists()


def test_strip(watch, tmp_path, capsys):
    """Blocks of the first nine samples, in the order of README.md, whatever that of the files is."""
    names, sides = ("dcgan64_celeba", "stylegan"), (64, 32)
    shutil.copy(ROOT / "pretrained/dcgan64_celeba.pt", tmp_path)
    export.main([str(watch(stylegan).folder / "checkpoint.pt"), str(tmp_path / "stylegan.pt")])
    for name in reversed(names):
        argv = ["--generate", "9", "--checkpoint", str(tmp_path / f"{name}.pt")]
        importlib.import_module(name).main([*argv, "--out-dir", str(tmp_path / name)])
    strip.main([str(tmp_path), str(tmp_path / "strip.png")])
    assert capsys.readouterr().out.endswith(f"{', '.join(names)} in {tmp_path / 'strip.png'}\n")
    pixels = np.array(Image.open(tmp_path / "strip.png"))
    assert pixels.shape == (192, 2 * 192 + 8, 3)
    for left, name, side in zip((0, 200), names, sides):
        files = sorted((tmp_path / name).rglob("*.png"), key=lambda path: path.name)
        assert len(files) == 9
        for number, file in enumerate(files):
            y, x, times = number // 3 * 64, left + number % 3 * 64, 64 // side  # small ones are enlarged
            cell = pixels[y : y + 64 : times, x : x + 64 : times]
            assert np.array_equal(cell, np.array(Image.open(file).convert("RGB")))
    assert (pixels[:, 192:200] == 255).all()
    for size, red in ((28, 9 * 56 * 56), (64, 192 * 192), (128, 192 * 192)):
        square = strip.block([Image.new("RGB", (size, size), "red")] * 9)
        assert (red, (255, 0, 0)) in square.getcolors()
    with pytest.raises(SystemExit, match="2"):
        strip.main([str(tmp_path / "stylegan"), "none.png"])
    assert "has no file NAME.pt" in capsys.readouterr().err


def test_benchmark_quick(capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    benchmark.main(["--quick", "--script", "pix2pix", "--device", "cpu", "--markdown"])
    head, *rows = capsys.readouterr().out.splitlines()
    assert head.count("GFLOP/s") == 2
    names, _, values = ([cell.strip() for cell in row.strip("|").split("|")] for row in rows)
    row = dict(zip(names, values))
    assert row["script"] == "pix2pix.py"
    rate = max(float(text.split()[-1].replace(",", "")) for text in head.split(" GFLOP/s")[:-1])
    share = float(row["images/s fp32"].replace(",", "")) * float(row["GFLOP"]) / rate
    assert float(row["of matmul"].strip("%")) == pytest.approx(100 * share, rel=0.02, abs=0.6)
    assert 0.1 < float(row["memory"].split()[0]) < 5
    for column in ("images/s fp32", "images/s bf16", "tutorial fp32", "tutorial bf16"):
        assert float(row[column].replace(",", "")) > 0
    assert benchmark.table([{"a": "1"}, {"a": "22", "b": "3"}], False) == "a   b\n1\n22  3"


# %% claims


def test_claims_are_listed_and_their_tables_printed(tmp_path):
    """From any folder: claims.py is an archive of runs by earlier scripts, until it is rewritten."""
    for argv in (["--list"], ["--table"]):
        command = [sys.executable, str(ROOT / "evidence" / "claims.py"), *argv]
        result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
        assert result.returncode == 0, result.stderr
        assert "The minimax loss trains worse than the non-saturating one" in result.stdout
