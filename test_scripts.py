"""Every script for a few steps, and the mathematics behind each against independent values.

Runs on a CPU, without network, on the MNIST in data/. A new script joins by adding its name to SCRIPTS; what
is special to it has a section of its own below.
"""

import ast
import contextlib
import csv
import hashlib
import importlib
import json
import math
import os
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import types
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from torch import nn

import benchmark
import cgan
import claims
import dcgan32_wgan_sn
import dcgan64_celeba
import dcgan_mnist
import fid
import vanilla_gan
import wgan_gp

ROOT = Path(__file__).parent
SCRIPTS = ["vanilla_gan", "dcgan_mnist", "wgan_gp", "cgan", "dcgan32_wgan_sn", "dcgan64_celeba"]
NEEDS_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and finds none")
BATCH = 8  # images in a step of the short runs: 48 images make epochs of 6 steps
SIZES = {"dcgan32_wgan_sn": 32, "dcgan64_celeba": 64}  # height and width of the images; of the others, 28


# ---- Helpers -----------------------------------------------------------------------------------------------


@pytest.fixture(params=SCRIPTS)
def script(request):
    """Each script in turn, as a module."""
    return importlib.import_module(request.param)


@pytest.fixture(scope="session")
def small_data(tmp_path_factory):
    """A data folder in MNIST's layout that holds the first 48 real training images."""
    folder = tmp_path_factory.mktemp("data")
    raw = folder / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for part in ("train", "t10k"):
        images = (ROOT / f"data/MNIST/raw/{part}-images-idx3-ubyte").read_bytes()
        labels = (ROOT / f"data/MNIST/raw/{part}-labels-idx1-ubyte").read_bytes()
        header = struct.pack(">IIII", 2051, 48, 28, 28)
        (raw / f"{part}-images-idx3-ubyte").write_bytes(header + images[16 : 16 + 48 * 784])
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(struct.pack(">II", 2049, 48) + labels[8 : 8 + 48])
    return folder


def only(name):
    """The test is about this one script, in the place of each in turn."""
    return pytest.mark.parametrize("script", [name], indirect=True)


@pytest.fixture
def small(script, small_data):
    """The flags for the small data folder, in batches that make epochs of six steps."""
    batch = ["--batch-size", str(BATCH)]
    if script is wgan_gp:
        batch = ["--batch-size", str(BATCH // 2), "--n-critic", "2"]
    return ["--dataset", "mnist", "--data-dir", str(small_data), "--device", "cpu", *batch]


@pytest.fixture
def flags(small, tmp_path):
    """The flags of a short run of two epochs, six steps each, into tmp_path/run."""
    return [*small, "--epochs", "2", "--out-dir", str(tmp_path / "run")]


def second(script):
    """The name under which a checkpoint holds the network that is not the generator."""
    return "critic" if hasattr(script, "Critic") else "discriminator"


def mnist_as(script, folder):
    """MNIST's training images as uint8 (N, 1, H, W), as this script has to prepare them."""
    images = torchvision.datasets.MNIST(folder).data[:, None]
    if script is dcgan32_wgan_sn:
        return nn.functional.pad(images, (2, 2, 2, 2))
    if script is dcgan64_celeba:
        return torchvision.transforms.Resize(64)(images)
    return images


def read(path):
    return torch.load(path, weights_only=True)


def assert_same_bits(a, b, where="checkpoint"):
    """Two nested structures of dicts, lists, tensors and plain values are equal bit for bit."""
    assert type(a) is type(b), where
    if isinstance(a, dict):
        assert list(a) == list(b), where
        for key in a:
            assert_same_bits(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b)):
            assert_same_bits(x, y, f"{where}[{i}]")
    elif isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype, where
        assert torch.equal(a, b), where
    else:
        assert a == b, where


def assert_same_run(a, b):
    """Two checkpoints hold the same networks, optimisers, step and history; their folders may differ."""
    a, b = read(a), read(b)
    drop = lambda checkpoint: {k: v for k, v in checkpoint.items() if k != "settings"}  # noqa: E731
    assert_same_bits(drop(a), drop(b))


def snapshot(folder):
    """The path and content hash of every file below a folder."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.md5(path.read_bytes()).hexdigest() for path in files}


def messages(text):
    """The lines that a process left on stderr, without the progress bar."""
    return [part for part in re.split("[\r\n]", text) if part.strip() and "%|" not in part]


def fails(script, argv, capsys, *words, status=2):
    """main(argv) ends with `status` and one line on stderr that has all `words` in it."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit_:
        script.main([str(arg) for arg in argv])
    assert exit_.value.code == status
    lines = messages(capsys.readouterr().err)
    assert len(lines) == 1, lines
    for word in (f"{script.SCRIPT}.py: ", *map(str, words)):
        assert word in lines[0], lines[0]


def fails_late(script, argv, capsys, *words):
    """As fails, where warnings may come before the last line."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit_:
        script.main([str(arg) for arg in argv])
    assert exit_.value.code == 2
    line = messages(capsys.readouterr().err)[-1]
    for word in words:
        assert str(word) in line


def interrupt(monkeypatch, script, number, call):
    """Send signal `number` to this process inside a call of generator_loss, in the midst of a step."""
    original, calls = script.generator_loss, []

    def generator_loss(*args, **kwargs):
        calls.append(None)
        if len(calls) == call:
            os.kill(os.getpid(), number)
        return original(*args, **kwargs)

    monkeypatch.setattr(script, "generator_loss", generator_loss)


def python(code, *argv, cwd=ROOT):
    """Run code in another Python process."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code, *map(str, argv)]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)


# ---- The project -------------------------------------------------------------------------------------------


def test_mnist_is_in_the_repository():
    md5 = {
        "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
        "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
        "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
        "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
    }
    for name, digest in md5.items():
        assert hashlib.md5((ROOT / "data/MNIST/raw" / name).read_bytes()).hexdigest() == digest


def test_readme_has_the_two_commands():
    lines = [line.strip() for line in (ROOT / "README.md").read_text().splitlines()]
    assert "pip install -r requirements.txt && python dcgan_mnist.py --epochs 1" in lines
    assert "pip install -r requirements.txt && pytest test_scripts.py" in lines


def test_a_script_needs_no_other_file(script):
    allowed = set(sys.stdlib_module_names) | {"torch", "torchvision", "matplotlib", "tqdm", "PIL"}
    tree = ast.parse(Path(script.__file__).read_text())
    imports = [node for node in ast.walk(tree) if isinstance(node, (ast.Import, ast.ImportFrom))]
    names = [
        alias.name if isinstance(node, ast.Import) else node.module
        for node in imports
        for alias in node.names
    ]
    assert {name.split(".")[0] for name in names} <= allowed


def test_sections_are_in_order(script):
    banners = [
        line[7:].rstrip("- ")
        for line in Path(script.__file__).read_text().splitlines()
        if line[:6] == "# ----"
    ]
    assert banners == ["Networks", "Losses", "Training step", "Plumbing", "Main"]


def plumbing(source):
    """The source of each function and class between the banners Plumbing and Main, by name."""
    first, last = (source[: source.index(f"# ---- {name} ")].count("\n") for name in ("Plumbing", "Main"))
    nodes = [node for node in ast.parse(source).body if isinstance(node, (ast.FunctionDef, ast.ClassDef))]
    return {node.name: ast.get_source_segment(source, node) for node in nodes if first < node.lineno < last}


OWN = {"parse_args"}  # its defaults and flags are the variant's


def test_plumbing_of_the_same_name_is_the_same():
    seen = {}
    for name in [*SCRIPTS, "fid"]:
        parts = plumbing((ROOT / f"{name}.py").read_text())
        expected = {"load_inception", "measure"} if name == "fid" else {"Run", "load_checkpoint", "sample"}
        assert expected <= set(parts)
        for part, source in parts.items():
            assert part in OWN or seen.setdefault(part, source) == source, f"{part} of {name} is another"


def test_help_shows_every_flag_and_default(script, capsys):
    with pytest.raises(SystemExit) as exit_:
        script.main(["--help"])
    assert exit_.value.code == 0
    text = capsys.readouterr().out
    shared = "epochs max-steps device lr-g lr-d batch-size latent-dim dataset data-dir out-dir seed precision"
    for flag in [*shared.split(), "resume", "generate", "checkpoint", "tensorboard"]:
        assert f"--{flag} " in text
    assert "default: 42" in text


# ---- A run and what it leaves ------------------------------------------------------------------------------


def test_a_run_leaves_everything(script, flags, tmp_path, capsys):
    script.main(flags)
    out = capsys.readouterr()
    assert "epoch 1/2" in out.out
    assert "epoch 2/2" in out.out
    assert "images/s" in out.err  # the progress bar
    run = tmp_path / "run"
    assert {str(path.relative_to(run)) for path in run.rglob("*") if path.is_file()} == {
        "config.json",
        "samples/epoch_0001.png",
        "samples/epoch_0002.png",
        "progress.gif",
        "losses.png",
        "interpolation.png",
        "history.csv",
        "checkpoint.pt",
    }
    cell = SIZES.get(script.SCRIPT, 28) + 2  # an image and the line beside it
    rows, columns = (10, 10) if script is cgan else (8, 8)
    sizes = {
        "samples/epoch_0002.png": (columns, rows),
        "interpolation.png": (10, rows),
        "progress.gif": (columns, rows),
    }
    for name, (across, down) in sizes.items():
        with Image.open(run / name) as image:
            image.load()
            assert image.size == (across * cell + 2, down * cell + 2)
            assert image.convert("L").getextrema()[0] < image.convert("L").getextrema()[1]
    assert Image.open(run / "progress.gif").n_frames == 2
    assert Image.open(run / "losses.png").width == 800

    config = json.loads((run / "config.json").read_text())
    assert config["epochs"] == 2
    assert config["seed"] == 42
    assert config["batch_size"] * config.get("n_critic", 1) == BATCH
    assert config["device"] == "cpu"
    assert config["torch"] == torch.__version__

    checkpoint = read(run / "checkpoint.pt")
    assert checkpoint["step"] == 12
    assert checkpoint["history"].shape == (12, len(script.METRICS))
    with open(run / "history.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows] == ["12"]  # one interval of LOG_EVERY = 20 steps, cut short
    for name, mean in zip(script.METRICS, checkpoint["history"].mean(0).tolist()):
        assert float(rows[0][name]) == pytest.approx(mean, rel=1e-4)


def test_history_has_a_row_for_each_interval(script, flags, tmp_path, monkeypatch):
    monkeypatch.setattr(script, "LOG_EVERY", 4)
    script.main(flags)
    with open(tmp_path / "run" / "history.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    history = read(tmp_path / "run" / "checkpoint.pt")["history"]
    assert [(row["epoch"], row["step"]) for row in rows] == [("1", "4"), ("2", "8"), ("2", "12")]
    assert float(rows[1][script.METRICS[0]]) == pytest.approx(history[4:8, 0].mean().item(), rel=1e-4)


def test_every_real_image_is_seen_once_an_epoch_in_a_new_order(script, flags, small_data, monkeypatch):
    seen, original = [], script.train_step

    def train_step(generator, other, optimizer_g, optimizer_d, real, *rest):
        assert real.dtype == torch.float32
        assert real.min() == -1
        assert 0.9 < real.max() <= 1
        seen.append(((real + 1) * 127.5).round().to(torch.uint8))
        return original(generator, other, optimizer_g, optimizer_d, real, *rest)

    monkeypatch.setattr(script, "train_step", train_step)
    size = 10 // (2 if script is wgan_gp else 1)
    script.main([*flags, "--batch-size", str(size)])  # 48 = 4 * 10 + 8: the short batch is dropped
    assert [len(batch) for batch in seen] == [10] * 8
    truth = [image.numpy().tobytes() for image in mnist_as(script, small_data)]
    first, second = (
        [image.numpy().tobytes() for batch in seen[i : i + 4] for image in batch] for i in (0, 4)
    )
    for epoch in (first, second):
        assert len(set(epoch)) == 40
        assert set(epoch) <= set(truth)
    assert first != second
    positions = [truth.index(image) for image in first]
    assert positions != sorted(positions)


def test_noise_is_fresh_at_every_step(script, flags, monkeypatch):
    seeds, original = [], script.stream

    def stream(device, *key):
        generator = original(device, *key)
        if "step" in key:
            seeds.append(generator.initial_seed())
        return generator

    monkeypatch.setattr(script, "stream", stream)
    script.main(flags)
    assert len(seeds) == len(set(seeds)) == 12


def test_the_grid_shows_the_same_noise_each_epoch(script, flags, monkeypatch):
    seen, original = [], script.sample

    def sample(generator, z, *rest):
        seen.append(z.clone())
        return original(generator, z, *rest)

    monkeypatch.setattr(script, "sample", sample)
    script.main(flags)
    assert torch.equal(seen[0], seen[2])  # the grids; 1 and 3 are the interpolations
    grid, walk = seen[0], seen[1].view(-1, 10, 100)
    if (
        script is cgan
    ):  # ten noise vectors, the same for each class; the walks go from the first to the second
        assert all(torch.equal(row, grid[:10]) for row in grid.split(10))
        first, last = grid[0].expand(10, -1), grid[1].expand(10, -1)
        grid = grid[:10]
    else:
        assert len(grid) == 64
        first, last = grid[0:16:2], grid[1:16:2]
    assert len(grid.unique(dim=0)) == len(grid)
    assert torch.allclose(walk[:, 0], first, atol=1e-6)
    assert torch.allclose(walk[:, -1], last, atol=1e-6)
    if script is dcgan32_wgan_sn:  # on a straight line, for that stays within the cube
        assert grid.abs().max() <= 1
        assert torch.allclose(walk.diff(dim=1), ((last - first) / 9)[:, None], atol=1e-6)
    else:
        assert walk.norm(dim=2).min() > 7.5  # nowhere near the small norms of a straight line


def test_sampling_is_per_image_and_leaves_the_generator_alone(script):
    generator, _ = networks(script)
    before = {name: value.clone() for name, value in generator.state_dict().items()}
    inputs = [torch.randn(300, 100)]
    if script is cgan:
        inputs.append(torch.arange(300) % 10)
    images = script.sample(generator, *inputs)
    assert generator.training
    assert_same_bits(before, dict(generator.state_dict()))
    assert images.dtype == torch.uint8
    assert len(images) == 300
    alone = script.sample(generator, *(rows[290:291] for rows in inputs))
    assert (images[290].int() - alone[0].int()).abs().max() <= 1  # a grey level, by rounding


def test_seeds_decide_everything(script, flags, tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        script.main([*flags, "--max-steps", "3", "--out-dir", str(tmp_path / name), "--seed", str(seed)])
    assert_same_run(tmp_path / "a/checkpoint.pt", tmp_path / "b/checkpoint.pt")
    a, c = (read(tmp_path / name / "checkpoint.pt")["generator"] for name in "ac")
    weights = [name for name in a if name.endswith("0.weight")]
    assert weights
    assert not any(torch.equal(a[name], c[name]) for name in weights)


def test_bf16_keeps_weights_and_losses_in_fp32(script, flags, tmp_path):
    script.main([*flags, "--precision", "bf16"])
    checkpoint = read(tmp_path / "run" / "checkpoint.pt")
    assert all(v.dtype == torch.float32 for v in checkpoint["generator"].values() if v.is_floating_point())
    assert checkpoint["history"].dtype == torch.float32
    script.main([*flags, "--out-dir", str(tmp_path / "fp32")])
    other = read(tmp_path / "fp32" / "checkpoint.pt")
    assert not torch.equal(checkpoint["history"], other["history"])  # so bf16 was used at all
    assert torch.allclose(checkpoint["history"], other["history"], atol=0.3, rtol=0.1)


def test_tensorboard(script, flags, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    fails(script, [*flags, "--tensorboard"], capsys, "--tensorboard", "pip install tensorboard")
    monkeypatch.undo()

    events = []

    class SummaryWriter:
        def __init__(self, folder, purge_step):
            events.append(("open", Path(folder), purge_step))

        def add_scalar(self, name, value, step):
            events.append((name, value, step))

        def close(self):
            events.append("close")

    module = types.ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = SummaryWriter
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(script, "LOG_EVERY", 5)
    script.main([*flags, "--tensorboard"])
    assert events[0] == ("open", tmp_path / "run" / "tensorboard", 1)
    assert events[-1] == "close"
    assert {event[0] for event in events[1:-1]} == set(script.METRICS)
    assert {event[2] for event in events[1:-1]} == {5, 10}


def test_the_file_alone_in_an_empty_folder_runs(script, small, tmp_path):
    shutil.copy(script.__file__, tmp_path)
    command = [sys.executable, f"{script.SCRIPT}.py", "--epochs", "1", *small]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert "images/s" in result.stderr
    folder = tmp_path / "runs" / script.SCRIPT
    assert (folder / "001" / "samples" / "epoch_0001.png").is_file()
    assert [path.name for path in folder.iterdir()] == ["001"]


def test_each_run_takes_the_next_free_folder(script, small, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        script.main([*small, "--epochs", "1", "--max-steps", "1"])
    assert sorted(path.name for path in (tmp_path / "runs" / script.SCRIPT).iterdir()) == ["001", "002"]


# ---- Generating --------------------------------------------------------------------------------------------


def test_generate(script, flags, tmp_path, capsys):
    script.main([*flags, "--max-steps", "2"])
    checkpoint = tmp_path / "run" / "checkpoint.pt"
    before = snapshot(tmp_path)
    generate = ["--generate", "300", "--checkpoint", str(checkpoint)]
    script.main(generate)
    folder = tmp_path / "run" / "generated" / "001"
    assert str(folder) in capsys.readouterr().out
    files = sorted(folder.rglob("*.png"), key=lambda path: path.name)
    assert [path.name for path in files] == [f"{i:05d}.png" for i in range(300)]
    if script is not cgan:
        assert {path.parent for path in files} == {folder}
    images = [Image.open(path) for path in files]
    size = SIZES.get(script.SCRIPT, 28)
    assert {(image.size, image.mode) for image in images} == {((size, size), "L")}
    assert len({image.tobytes() for image in images}) == 300

    script.main(generate)  # the same seed: the same images again
    same = snapshot(tmp_path / "run" / "generated" / "002")
    assert same == snapshot(folder)
    script.main([*generate, "--seed", "7", "--out-dir", str(tmp_path / "7")])
    assert not set(snapshot(tmp_path / "7").values()) & set(same.values())
    after = snapshot(tmp_path)
    assert {name: after[name] for name in before} == before  # nothing written over


# ---- Stopping and resuming ---------------------------------------------------------------------------------

KILL_INSIDE_STEP = """
import importlib, os, signal, sys
script = importlib.import_module(sys.argv[1])
original, calls = script.generator_loss, []
def generator_loss(*args, **kwargs):
    calls.append(None)
    if len(calls) == int(sys.argv[2]):
        os.kill(os.getpid(), signal.SIGKILL)
    return original(*args, **kwargs)
script.generator_loss = generator_loss
script.main(sys.argv[3:])
"""

KILL_INSIDE_SAVE = """
import importlib, io, os, signal, sys
script = importlib.import_module(sys.argv[1])
original, calls = script.torch.save, []
def save(state, path):
    calls.append(None)
    if len(calls) == int(sys.argv[2]):
        whole = io.BytesIO()
        original(state, whole)
        with open(path, "wb") as file:
            file.write(whole.getvalue()[: whole.tell() // 2])
            file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
    return original(state, path)
script.torch.save = save
script.main(sys.argv[3:])
"""


def test_resuming_is_exact_to_the_bit(script, flags, tmp_path, monkeypatch, capsys):
    """Stopped by SIGKILL within a step and within a save, by SIGTERM and by Ctrl-C, and resumed each time."""
    script.main([*flags, "--out-dir", str(tmp_path / "whole")])
    checkpoint = tmp_path / "run" / "checkpoint.pt"
    resume = ["--resume", str(checkpoint)]

    # Step 4 of 12, and then the save at the end of the first epoch (the first save opens the resumed run).
    assert python(KILL_INSIDE_STEP, script.SCRIPT, 4, *flags).returncode == -signal.SIGKILL
    assert read(checkpoint)["step"] == 0
    assert python(KILL_INSIDE_SAVE, script.SCRIPT, 2, *resume).returncode == -signal.SIGKILL
    assert (tmp_path / "run" / "checkpoint.tmp").is_file()  # the half, beside the whole of before
    assert read(checkpoint)["step"] == 0

    for number, call, step in ((signal.SIGTERM, 2, 2), (signal.SIGINT, 7, 9)):
        with monkeypatch.context() as patch:
            interrupt(patch, script, number, call)
            fails(script, resume, capsys, f"--resume {checkpoint}", status=128 + number)
        assert read(checkpoint)["step"] == step

    script.main(resume)
    assert_same_run(checkpoint, tmp_path / "whole" / "checkpoint.pt")
    for name in ("history.csv", "samples/epoch_0001.png", "samples/epoch_0002.png", "progress.gif"):
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=NEEDS_CUDA)])
def test_a_run_can_be_made_longer(script, flags, tmp_path, device):
    flags = [*flags, "--device", device]
    script.main([*flags, "--out-dir", str(tmp_path / "whole"), "--epochs", "3"])
    script.main([*flags, "--max-steps", "8"])
    checkpoint = str(tmp_path / "run" / "checkpoint.pt")
    assert read(checkpoint)["step"] == 8
    script.main(["--resume", checkpoint, "--epochs", "3", "--max-steps", "100"])
    assert_same_run(checkpoint, tmp_path / "whole" / "checkpoint.pt")
    assert json.loads((tmp_path / "run" / "config.json").read_text())["epochs"] == 3
    script.main(["--resume", checkpoint])  # nothing left to do
    assert_same_run(checkpoint, tmp_path / "whole" / "checkpoint.pt")


def test_ctrl_c_from_outside(script, flags, tmp_path):
    """A real process, interrupted as a terminal does it, at whatever moment that is."""
    command = [sys.executable, script.__file__, *flags, "--epochs", "1000"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert "48 images" in process.stdout.readline()
        assert "epoch 1/" in process.stdout.readline()
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        error = process.communicate(timeout=60)[1]
    assert process.returncode == 130
    checkpoint = tmp_path / "run" / "checkpoint.pt"
    assert messages(error) == [f"{script.SCRIPT}.py: stopped; go on with --resume {checkpoint}"]
    assert read(checkpoint)["step"] >= 6


def test_signal_handlers_are_given_back(script, flags):
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    script.main([*flags, "--max-steps", "1"])
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_long_epochs_are_saved_inside(script, flags, monkeypatch):
    steps, original = [], script.torch.save
    monkeypatch.setattr(
        script.torch, "save", lambda state, path: (steps.append(state["step"]), original(state, path))
    )
    monkeypatch.setattr(script, "SAVE_EVERY", 0)
    script.main([*flags, "--epochs", "1"])
    assert steps == [0, 1, 2, 3, 4, 5, 6, 6]


def test_checkpoints_are_read_as_weights_only(script, tmp_path, capsys):
    class Evil:
        def __reduce__(self):
            return Path(tmp_path / "evil").touch, ()

    torch.save({"script": script.SCRIPT, "settings": Evil()}, tmp_path / "evil.pt")
    fails(script, ["--resume", tmp_path / "evil.pt"], capsys, "evil.pt")
    assert not (tmp_path / "evil").exists()


def test_bad_checkpoints(script, flags, tmp_path, capsys):
    script.main([*flags, "--max-steps", "1"])
    good = tmp_path / "run" / "checkpoint.pt"
    whole, checkpoint = good.read_bytes(), read(good)
    bad = tmp_path / "bad.pt"
    for size in (0, 100, len(whole) // 2, len(whole) - 1000):
        bad.write_bytes(whole[:size])
        fails(script, ["--resume", bad], capsys, bad, "truncated")
        fails(script, ["--generate", 1, "--checkpoint", bad], capsys, bad, "truncated")
    torch.save({**checkpoint, "script": "another_gan"}, bad)
    fails(script, ["--resume", bad], capsys, bad, "a checkpoint of another_gan", script.SCRIPT)
    torch.save([1, 2], bad)
    fails(script, ["--resume", bad], capsys, bad, "another program")
    torch.save({**checkpoint, "settings": {**checkpoint["settings"], "latent_dim": 99}}, bad)
    words = "generator", "other sizes", "109" if script is cgan else "99"  # cgan adds 10 for the class
    fails(script, ["--resume", bad], capsys, bad, *words)
    fails(script, ["--generate", 1, "--checkpoint", bad], capsys, bad, *words)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.pt", "run"]
    assert good.read_bytes() == whole


def test_loss_that_is_not_finite(script, flags, tmp_path, capsys):
    fails(script, [*flags, "--lr-d", "1e30"], capsys, "step ", "not finite", "--lr-g", "--lr-d", status=1)
    checkpoint = read(tmp_path / "run" / "checkpoint.pt")
    assert checkpoint["step"] == 0
    assert all(value.isfinite().all() for value in checkpoint[second(script)].values())


def test_weights_that_are_not_finite_are_never_saved(script, flags, tmp_path, capsys):
    """The loss of the last step before a save can be finite, and its update still ruin the weights."""
    fails(script, [*flags, "--lr-g", "1e300", "--max-steps", "1"], capsys, "step 1:", "not finite", status=1)
    assert read(tmp_path / "run" / "checkpoint.pt")["step"] == 0


def test_the_step_that_went_wrong_is_named(script, flags, tmp_path, capsys, monkeypatch):
    original, calls = script.train_step, []

    def train_step(*args):
        calls.append(None)
        metrics = original(*args)
        return {
            **metrics,
            script.METRICS[1]: metrics[script.METRICS[1]] * (math.nan if len(calls) == 9 else 1),
        }

    monkeypatch.setattr(script, "train_step", train_step)
    fails(script, flags, capsys, "step 9:", status=1)
    assert read(tmp_path / "run" / "checkpoint.pt")["step"] == 6  # the end of the first epoch


# ---- Bad input ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bad", "word"),
    [
        (["--device", "nonsense"], "nonsense"),
        (["--device", "meta"], "meta"),
        (["--epochs", "0"], "above 0"),
        (["--epochs", "-3"], "above 0"),
        (["--epochs", "1.5"], "int"),
        (["--max-steps", "0"], "above 0"),
        (["--batch-size", "0"], "above 0"),
        (["--batch-size", "1"], "from 2 to "),
        (["--batch-size", "49"], ", with 48 images to take"),
        (["--latent-dim", "0"], "above 0"),
        (["--lr-g", "0"], "above 0"),
        (["--lr-g", "-0.001"], "above 0"),
        (["--lr-g=-1e-3"], "above 0"),
        (["--lr-d", "nan"], "nan"),
        (["--lr-d", "inf"], "inf"),
        (["--lr-d", "fast"], "fast"),
        (["--seed", "x"], "x"),
        (["--precision", "fp8"], "fp8"),
        (["--dataset", "cats"], "cats"),
        (["--generate", "0", "--checkpoint", "x"], "x"),
        (["--generate", "5"], "--checkpoint"),
        (["--checkpoint", "x"], "--generate"),
        (["--resume", "no/such/checkpoint.pt"], "no/such/checkpoint.pt"),
        (["--generate", "5", "--checkpoint", "no/such.pt"], "no/such.pt"),
        (["--resume", "x", "--generate", "5", "--checkpoint", "x"], "--resume"),
        (["--no-such-flag"], "--no-such-flag"),
    ],
)
def test_bad_flags(script, flags, bad, word, tmp_path, capsys):
    name = "" if bad[0] in ("--resume", "--generate") else bad[0].split("=")[0]
    fails(script, [*flags, *bad], capsys, name, word)
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="asking for CUDA is no error where there is one")
def test_cuda_where_there_is_none(script, flags, tmp_path, capsys):
    fails(script, [*flags, "--device", "cuda"], capsys, "--device", "'cuda'", "cpu")
    assert not (tmp_path / "run").exists()


def test_data_set_neither_here_nor_to_download(script, flags, tmp_path, capsys, monkeypatch):
    def refuse(*args, **kwargs):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    raw = tmp_path / "empty" / "MNIST" / "raw"
    names = [
        "train-images-idx3-ubyte",
        "train-labels-idx1-ubyte",
        "t10k-images-idx3-ubyte",
        "t10k-labels-idx1-ubyte",
    ]
    argv = [*flags, "--data-dir", tmp_path / "empty"]
    fails(script, argv, capsys, "--data-dir", raw, *names, "MNIST ships with", "data/MNIST/raw")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["train-images-idx3-ubyte", "train-labels-idx1-ubyte"])
@pytest.mark.parametrize("share", [0, 0.0001, 0.5])
def test_truncated_data(script, flags, small_data, tmp_path, capsys, name, share):
    shutil.copytree(small_data, tmp_path / "data")
    path = tmp_path / "data" / "MNIST" / "raw" / name
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    argv = [*flags, "--data-dir", tmp_path / "data"]
    fails(script, argv, capsys, "--data-dir", name, path.parent, "damaged", "replace")
    assert not (tmp_path / "run").exists()


def test_output_folder_without_permission(script, flags, tmp_path, capsys, monkeypatch):
    """Asked of the system and not tried, because root may write anywhere."""
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    fails(script, flags, capsys, "--out-dir", tmp_path / "run", "not writable")
    assert not list((tmp_path / "run").iterdir())


def test_bad_output_folders(script, flags, tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o500)
    if os.geteuid() == 0:  # root writes anywhere but where the kernel says no
        locked = Path("/proc")
    script.main([*flags, "--max-steps", "1"])
    before = snapshot(tmp_path)
    for folder in (tmp_path / "file", tmp_path / "file" / "below", locked / "run", tmp_path / "run"):
        fails(script, [*flags, "--out-dir", folder], capsys, "--out-dir", folder, "new folder")
    checkpoint = tmp_path / "run" / "checkpoint.pt"
    generate = ["--generate", 1, "--checkpoint", checkpoint, "--out-dir", tmp_path / "run"]
    fails(script, generate, capsys, "--out-dir", "not empty")
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize(
    "bad",
    [["--lr-g", "0.5"], ["--seed", "1"], ["--batch-size", "9"], ["--out-dir", "x"], ["--precision", "bf16"]],
)
def test_resuming_with_other_settings(script, flags, tmp_path, capsys, bad):
    script.main([*flags, "--max-steps", "1"])
    before = snapshot(tmp_path)
    resume = ["--resume", tmp_path / "run" / "checkpoint.pt"]
    fails(script, [*resume, *bad], capsys, bad[0], bad[1])
    assert snapshot(tmp_path) == before
    size = flags[flags.index("--batch-size") + 1]
    script.main([*map(str, resume), "--seed", "42", "--batch-size", size, "--max-steps", "2"])  # the same


# ---- Networks and a training step, of each script ---------------------------------------------------------


def shapes(network, *inputs):
    """The shape of what leaves each layer."""
    out = []
    layers = [layer for layer in network.modules() if not list(layer.children())]
    hooks = [
        layer.register_forward_hook(lambda layer, args, y: out.append(tuple(y.shape))) for layer in layers
    ]
    network(*inputs)
    for hook in hooks:
        hook.remove()
    return out


def count(network):
    return sum(parameter.numel() for parameter in network.parameters())


def networks(script):
    """A fresh generator and discriminator or critic for grey images, initialised as in training."""
    torch.manual_seed(0)
    generator, other = script.Generator(), getattr(script, second(script).title())
    if script is dcgan64_celeba:
        generator, other = script.Generator(channels=1), lambda: script.Discriminator(channels=1)
    if script is dcgan32_wgan_sn:  # PyTorch's own initialisation
        return generator, other()
    return generator.apply(script.init_weights), other().apply(script.init_weights)


class Recorder:
    """Stands in for an optimiser: notes the gradients in all networks at its step, and changes nothing."""

    def __init__(self, own, *networks):
        self.zero_grad, self.networks = own.zero_grad, networks

    def step(self):
        self.seen = [
            [None if p.grad is None else p.grad.clone() for p in n.parameters()] for n in self.networks
        ]


def one_round(script, **others):
    """A train_step on eight digits, 2 x 8 in wgan_gp; `others` replace its arguments. Returns all it saw."""
    g, d = networks(script)
    real = mnist_as(script, ROOT / "data")[: 16 if script is wgan_gp else 8].float() / 127.5 - 1
    args = {"generator": g, "other": d, "optimizer_g": Recorder(g, g, d), "optimizer_d": Recorder(d, g, d)}
    args |= {"real": real}
    if script is cgan:
        args["labels"] = torch.arange(8)
    rng = torch.Generator().manual_seed(1)
    if script is dcgan64_celeba:
        args["z"] = torch.randn(8, 100, generator=rng)
    else:
        args["rng"] = rng
    args["autocast"] = torch.autocast("cpu", torch.bfloat16, enabled=False)
    args |= {
        vanilla_gan: {"minimax": False},
        dcgan_mnist: {"real_label": 0.9, "noise": 0.0},
        wgan_gp: {"n_critic": 2, "gp_weight": 10.0},
        cgan: {"real_label": 0.9},
    }.get(script, {})
    assert others.keys() <= args.keys()
    args |= others
    seen = types.SimpleNamespace(**args, z_inputs=[], fakes=[], inputs=[], scores=[])

    def note(inputs, outputs):
        def hook(module, args, out):
            inputs.append(args[0])
            outputs.append(out)

        return hook

    hooks = [
        seen.generator.register_forward_hook(note(seen.z_inputs, seen.fakes)),
        seen.other.register_forward_hook(note(seen.inputs, seen.scores)),
    ]
    seen.metrics = script.train_step(*args.values())
    for hook in hooks:
        hook.remove()
    return seen


@pytest.mark.parametrize("script", [s for s in SCRIPTS if s != "dcgan32_wgan_sn"], indirect=True)
def test_init(script):
    for network in networks(script):
        for layer in network.modules():
            if getattr(layer, "weight", None) is None or isinstance(layer, nn.Embedding):
                continue
            mean = 1.0 if isinstance(layer, (nn.BatchNorm1d, nn.BatchNorm2d)) else 0.0
            n = layer.weight.numel()
            assert abs(layer.weight.mean().item() - mean) < 5 * 0.02 / math.sqrt(n)
            assert layer.weight.std().item() == pytest.approx(0.02, rel=5 / math.sqrt(2 * n))
            assert layer.bias is None or not layer.bias.any()


def test_optimisers(script, flags, tmp_path):
    """Both learning rates reach their optimisers, and the betas are the papers'."""
    script.main([*flags, "--max-steps", "1", "--lr-g", "0.0011", "--lr-d", "0.0022"])
    checkpoint = read(tmp_path / "run" / "checkpoint.pt")
    for name, rate in (("optimizer_g", 0.0011), (f"optimizer_{second(script)[0]}", 0.0022)):
        (group,) = checkpoint[name]["param_groups"]
        assert group["lr"] == rate
        assert tuple(group["betas"]) == ((0.0, 0.9) if script is wgan_gp else (0.5, 0.999))


def test_gradients_go_where_they_should(script):
    seen = one_round(script)
    g_grads, d_grads = seen.optimizer_d.seen
    assert all(grad is None for grad in g_grads)  # the discriminator's half leaves the generator alone
    assert all(grad is not None for grad in d_grads)
    cancels = "layers.5.bias" if script is wgan_gp else ""  # it shifts all scores alike
    names = [name for name, _ in seen.other.named_parameters()]
    assert all(grad.any() or name == cancels for name, grad in zip(names, d_grads))
    g_grads_after, d_grads_after = seen.optimizer_g.seen
    assert all(grad is not None for grad in g_grads_after)
    names = [name for name, _ in seen.generator.named_parameters()]
    assert all(grad.any() for name, grad in zip(names, g_grads_after) if "weight" in name)
    assert_same_bits(d_grads, d_grads_after)  # the generator's half left nothing in the discriminator
    assert all(parameter.requires_grad for parameter in seen.other.parameters())


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
    metrics = one_round(script, **({"noise": 0.1} if script is dcgan_mnist else {})).metrics
    assert tuple(metrics) == tuple(script.METRICS)
    assert all(value.shape == () and not value.requires_grad for value in metrics.values())
    assert all(value.isfinite() for value in metrics.values())


def test_bf16_is_in_the_layers_only(script):
    kinds, (generator, _) = [], networks(script)
    layer = next(layer for layer in generator.modules() if isinstance(layer, (nn.Linear, nn.ConvTranspose2d)))
    layer.register_forward_hook(lambda module, args, out: kinds.append(out.dtype))
    context = torch.autocast("cpu", torch.bfloat16)
    seen = one_round(
        script, generator=generator, optimizer_g=Recorder(generator, generator), autocast=context
    )
    assert set(kinds) == {torch.bfloat16}
    outside = [*seen.fakes, *seen.scores, *seen.metrics.values(), *seen.optimizer_g.seen[0]]
    assert {tensor.dtype for tensor in outside} == {torch.float32}


def test_fakes_are_fresh_or_used_again(script):
    """Algorithm 1 of the GAN and WGAN papers draws noise anew for the generator; the DCGANs here do not."""
    seen = one_round(script)
    updates = 2 if script is wgan_gp else 1
    if script in (vanilla_gan, wgan_gp, dcgan32_wgan_sn):
        assert len(seen.fakes) == updates + 1
        assert len(torch.cat(seen.z_inputs).unique(dim=0)) == 8 * (updates + 1)
        assert not any(fake.requires_grad for fake in seen.fakes[:-1])
    else:
        assert len(seen.fakes) == 1
        assert torch.equal(seen.inputs[1], seen.fakes[0])
        assert not seen.inputs[1].requires_grad
    assert seen.inputs[-1] is seen.fakes[-1]  # what the generator's loss was computed on
    assert torch.equal(seen.inputs[0][:8], seen.real[:8])


# ---- dcgan_mnist -------------------------------------------------------------------------------------------


def test_dcgan_shapes():
    generator = [(3, 12544)] * 3 + [(3, 256, 7, 7)] + [(3, 128, 14, 14)] * 3
    assert shapes(dcgan_mnist.Generator(), torch.randn(3, 100)) == generator + [(3, 1, 28, 28)] * 2
    refined = generator + [(3, 64, 28, 28)] * 3 + [(3, 1, 28, 28)] * 2
    assert shapes(dcgan_mnist.Generator(refine=True), torch.randn(3, 100)) == refined
    discriminator = [(3, 64, 14, 14)] * 2 + [(3, 128, 7, 7)] * 3 + [(3, 6272), (3, 1)]
    assert shapes(dcgan_mnist.Discriminator(), torch.randn(3, 1, 28, 28)) == discriminator
    assert dcgan_mnist.Discriminator().eval()(torch.randn(1, 1, 28, 28)).shape == (1, 1)  # a batch of one


def test_dcgan_parameter_counts():
    project = 100 * 12544 + 12544 + 2 * 12544  # linear with bias, batch normalisation
    up = 256 * 128 * 4 * 4 + 2 * 128
    assert project + up == 1_816_576
    assert count(dcgan_mnist.Generator()) == 1_816_576 + 128 * 1 * 4 * 4 + 1 == 1_818_625
    refined = 128 * 64 * 4 * 4 + 2 * 64 + 64 * 1 * 3 * 3 + 1
    assert count(dcgan_mnist.Generator(refine=True)) == 1_816_576 + refined == 1_948_353
    assert count(dcgan_mnist.Generator(latent_dim=64)) == 1_818_625 - 36 * 12544
    discriminator = (1 * 64 * 4 * 4 + 64) + (64 * 128 * 4 * 4 + 2 * 128) + (128 * 7 * 7 + 1)
    assert count(dcgan_mnist.Discriminator()) == discriminator == 138_689


def test_dcgan_layers_are_as_the_paper_wants_them():
    for network in (dcgan_mnist.Generator(), dcgan_mnist.Generator(refine=True), dcgan_mnist.Discriminator()):
        layers = list(network.layers)
        for layer, after in zip(layers, layers[1:]):
            if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d)):
                assert (layer.bias is None) == isinstance(after, nn.BatchNorm2d)
            if isinstance(layer, (nn.BatchNorm1d, nn.BatchNorm2d)):
                assert layer.eps == 1e-5
                assert layer.momentum == 0.1
    assert isinstance(dcgan_mnist.Generator().layers[-1], nn.Tanh)
    discriminator = dcgan_mnist.Discriminator().layers
    assert isinstance(discriminator[1], nn.LeakyReLU)  # the first convolution has no batch normalisation
    assert {layer.negative_slope for layer in discriminator if isinstance(layer, nn.LeakyReLU)} == {0.2}


def test_dcgan_losses_by_hand():
    logit = math.log(3)  # the sigmoid of log 3 is 3/4, of -log 3 it is 1/4
    real, fake = torch.tensor([[logit], [-logit]]), torch.tensor([[-logit], [-logit]])
    d_loss = dcgan_mnist.discriminator_loss(real, fake, real_label=0.9)
    first = -(0.9 * math.log(3 / 4) + 0.1 * math.log(1 / 4))
    second = -(0.9 * math.log(1 / 4) + 0.1 * math.log(3 / 4))
    assert d_loss.item() == pytest.approx((first + second) / 2 - math.log(3 / 4), rel=1e-6)
    assert dcgan_mnist.generator_loss(fake).item() == pytest.approx(math.log(4), rel=1e-6)
    # The original GAN's equilibrium: no smoothing, D = 1/2 everywhere.
    zero = torch.zeros(5, 1)
    assert dcgan_mnist.discriminator_loss(zero, zero, real_label=1.0).item() == pytest.approx(2 * math.log(2))


def test_dcgan_ends_of_the_game():
    """The figures in the lesson: a perfect generator, and a discriminator that sees through everything."""
    balance = torch.full((4, 1), math.log(0.45 / 0.55))
    assert dcgan_mnist.discriminator_loss(balance, balance).item() == pytest.approx(1.38, abs=0.005)
    assert dcgan_mnist.generator_loss(balance).item() == pytest.approx(0.80, abs=0.005)
    seen_through = dcgan_mnist.discriminator_loss(torch.full((4, 1), math.log(9)), torch.full((4, 1), -50.0))
    assert seen_through.item() == pytest.approx(0.33, abs=0.005)
    nudge = dcgan_mnist.discriminator_loss(balance + 0.01, balance + 0.01)
    assert nudge > dcgan_mnist.discriminator_loss(balance, balance)  # 0.45 is the best answer


def test_dcgan_losses_are_exact_far_from_zero():
    """Where a sigmoid would be rounded to 0 or 1 and its logarithm lost."""
    far = torch.tensor([[-200.0]], requires_grad=True)
    loss = dcgan_mnist.generator_loss(far)
    loss.backward()
    assert loss.item() == 200.0
    assert far.grad.item() == -1.0  # the non-saturating loss pushes hardest where the fake is worst
    assert dcgan_mnist.discriminator_loss(torch.tensor([[200.0]]), far.detach(), 1.0).item() == 0.0


def test_dcgan_smoothing_is_one_sided():
    real = torch.randn(8, 1, dtype=torch.float64, requires_grad=True)
    fake = torch.randn(8, 1, dtype=torch.float64, requires_grad=True)
    for label in (1.0, 0.9, 0.8):
        grads = torch.autograd.grad(dcgan_mnist.discriminator_loss(real, fake, label), (real, fake))
        assert torch.allclose(grads[0], (real.sigmoid() - label) / 8)  # the best D(x) is the label
        assert torch.allclose(grads[1], fake.sigmoid() / 8)  # the fakes' target stays 0
    assert torch.allclose(
        torch.autograd.grad(dcgan_mnist.generator_loss(fake), fake)[0], (fake.sigmoid() - 1) / 8
    )


def one_step(generator=None, real_label=0.9, noise=0.0, bf16=False):
    """A train_step on eight digits: networks, recording optimisers, D's inputs, `real`, the metrics."""
    torch.manual_seed(0)
    g = (generator or dcgan_mnist.Generator()).apply(dcgan_mnist.init_weights)
    d = dcgan_mnist.Discriminator().apply(dcgan_mnist.init_weights)
    inputs = []
    d.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    real = mnist_as(dcgan_mnist, ROOT / "data")[:8].float() / 127.5 - 1
    optimizers = Recorder(g, g, d), Recorder(d, g, d)
    context = torch.autocast("cpu", torch.bfloat16, enabled=bf16)
    rng = torch.Generator().manual_seed(1)
    metrics = dcgan_mnist.train_step(g, d, *optimizers, real, rng, context, real_label, noise)
    return g, d, *optimizers, inputs, real, metrics


def test_dcgan_uses_the_fakes_twice():
    generator, calls = dcgan_mnist.Generator(), []
    generator.register_forward_hook(lambda module, args, out: calls.append(out))
    *_, inputs, real, _ = one_step(generator)
    assert len(calls) == 1
    assert len(inputs) == 3
    assert torch.equal(inputs[0], real)
    assert torch.equal(inputs[1], calls[0])
    assert not inputs[1].requires_grad
    assert inputs[2] is calls[0]


def test_dcgan_step_reports_what_it_did():
    *_, inputs, real, metrics = one_step()
    assert tuple(metrics) == tuple(dcgan_mnist.METRICS)
    assert all(value.shape == () and not value.requires_grad for value in metrics.values())
    d = one_step()[1]  # the same weights, since Recorder changes none; in training mode, as in the step
    real_logits, fake_logits = d(inputs[0]), d(inputs[1])
    assert metrics["d_real"].item() == pytest.approx(real_logits.sigmoid().mean().item(), rel=1e-4)
    assert metrics["d_fake"].item() == pytest.approx(fake_logits.sigmoid().mean().item(), rel=1e-4)
    by_hand = -(0.9 * real_logits.sigmoid().log() + 0.1 * (1 - real_logits.sigmoid()).log()).mean()
    by_hand -= (1 - fake_logits.sigmoid()).log().mean()
    assert metrics["d_loss"].item() == pytest.approx(by_hand.item(), rel=1e-4)
    assert metrics["g_loss"].item() == pytest.approx(-fake_logits.sigmoid().log().mean().item(), rel=1e-4)


def test_dcgan_diversity_is_a_ratio_of_distances():
    *_, inputs, real, metrics = one_step()

    def mean_square_distance(images):
        return sum((a - b).square().sum().item() for a in images for b in images)

    ratio = math.sqrt(mean_square_distance(inputs[1]) / mean_square_distance(real))
    assert metrics["diversity"].item() == pytest.approx(ratio, rel=1e-4)

    class Constant(dcgan_mnist.Generator):
        def forward(self, z):
            return super().forward(z) * 0 + 0.5

    assert one_step(Constant())[-1]["diversity"] == 0


def test_dcgan_instance_noise():
    plain, noisy = one_step(noise=0.0)[-3], one_step(noise=0.3)[-3]
    differences = [(a - b).flatten() for a, b in zip(noisy, plain)]
    for difference in differences:
        assert difference.std().item() == pytest.approx(0.3, rel=0.05)
    assert abs(torch.corrcoef(torch.stack(differences))[0, 1]) < 0.05  # fresh noise each time
    assert abs(torch.corrcoef(torch.stack(differences))[1, 2]) < 0.05


@only("dcgan_mnist")
def test_dcgan_instance_noise_is_annealed(flags, monkeypatch):
    levels, original = [], dcgan_mnist.train_step
    monkeypatch.setattr(
        dcgan_mnist, "train_step", lambda *args: (levels.append(args[-1]), original(*args))[1]
    )
    dcgan_mnist.main([*flags, "--instance-noise", "0.6"])
    assert levels == pytest.approx([0.6 * (1 - step / 12) for step in range(12)])


def test_dcgan_bf16_is_in_the_layers_only():
    generator, kinds = dcgan_mnist.Generator(), []
    generator.layers[4].register_forward_hook(lambda module, args, out: kinds.append(out.dtype))
    g, d, optimizer_g, optimizer_d, inputs, _, metrics = one_step(generator, bf16=True)
    assert kinds == [torch.bfloat16]
    assert {inputs[1].dtype, *(value.dtype for value in metrics.values())} == {torch.float32}
    assert {grad.dtype for grads in optimizer_g.seen for grad in grads} == {torch.float32}


def history(steps=468, d_loss=0.9, g_loss=1.7, d_real=0.65, d_fake=0.25, diversity=0.99):
    """Metrics (steps, 5) of an epoch that wavers around the given means, as wide as a healthy one does."""
    rng = torch.Generator().manual_seed(0)
    spread = torch.tensor([0.2, 0.3, 0.2, 0.3, 0.02]) * torch.randn(steps, 5, generator=rng)
    return torch.tensor([d_loss, g_loss, d_real, d_fake, diversity]) * (1 + spread).clamp(0.3, 1.8)


def test_monitor_is_silent_on_a_healthy_epoch():
    assert dcgan_mnist.diagnose(history(), 0.9) == []
    assert dcgan_mnist.diagnose(history(steps=1), 0.9) == []
    some_spikes = history()
    some_spikes[:140:20, 1] = 20  # in 7 of the 23 intervals; a real healthy epoch had them in 6
    assert dcgan_mnist.diagnose(some_spikes, 0.9) == []


def test_monitor_names_what_it_sees():
    for label in (0.8, 0.9, 1.0):
        (remark,) = dcgan_mnist.diagnose(
            history(d_loss=0.35, g_loss=6, d_real=0.98 * label, d_fake=0.01), label
        )
        assert "too strong" in remark
        assert "higher --lr-g" in remark
    spiky = history()
    spiky[::25, 1] = 9
    (remark,) = dcgan_mnist.diagnose(spiky, 0.9)
    assert "unstable" in remark
    assert "--lr-g and --lr-d" in remark
    (remark,) = dcgan_mnist.diagnose(history(diversity=0.4), 0.9)
    assert "mode collapse" in remark
    assert "higher --lr-g" in remark
    assert "wgan_gp.py" in remark
    late = history()
    late[-20:, 4] = 0.1
    assert "mode collapse" in dcgan_mnist.diagnose(late, 0.9)[0]
    assert len(dcgan_mnist.diagnose(history(d_real=0.89, d_fake=0.01, diversity=0.05), 0.9)) == 2


def test_one_digit_alone_is_more_diverse_than_a_collapse():
    """MNIST's ones, the least varied digit, have a diversity of 0.65; the monitor's limit is 0.5."""
    images = torchvision.datasets.MNIST(ROOT / "data")
    pixels = images.data.float()
    spread = [pixels[images.targets == digit].var(0, correction=0).mean() for digit in range(10)]
    assert math.sqrt(min(spread) / pixels.var(0, correction=0).mean()) == pytest.approx(0.65, abs=0.005)


@only("dcgan_mnist")
def test_monitor_speaks_after_the_epoch(flags, monkeypatch, capsys):
    monkeypatch.setattr(dcgan_mnist, "diagnose", lambda steps, label: [f"{len(steps)} steps, {label}"])
    flags += ["--max-steps", "8", "--real-label", "0.7"]
    dcgan_mnist.main(flags)
    assert "\n  " not in capsys.readouterr().out  # eight steps are too few for a verdict
    monkeypatch.setattr(dcgan_mnist, "WARM_UP", 6)
    dcgan_mnist.main([*flags, "--out-dir", flags[flags.index("--out-dir") + 1] + "2"])
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if line.startswith("  ")] == ["  6 steps, 0.7", "  2 steps, 0.7"]


@only("dcgan_mnist")
def test_refined_generator_trains_and_generates(flags, tmp_path):
    dcgan_mnist.main([*flags, "--refine", "--max-steps", "2"])
    checkpoint = tmp_path / "run" / "checkpoint.pt"
    assert "layers.10.weight" in read(checkpoint)["generator"]
    dcgan_mnist.main(["--generate", "2", "--checkpoint", str(checkpoint)])  # the checkpoint says --refine
    assert len(list((tmp_path / "run" / "generated" / "001").iterdir())) == 2


@only("dcgan_mnist")
@pytest.mark.parametrize("bad", ["0", "1.01", "-1", "nan", "x"])
def test_bad_real_label(flags, tmp_path, capsys, bad):
    fails(dcgan_mnist, [*flags, "--real-label", bad], capsys, "--real-label", bad)
    assert not (tmp_path / "run").exists()


@only("dcgan_mnist")
@pytest.mark.parametrize("bad", ["-0.1", "nan", "inf", "x"])
def test_bad_instance_noise(flags, tmp_path, capsys, bad):
    fails(dcgan_mnist, [*flags, "--instance-noise", bad], capsys, "--instance-noise", bad)
    assert not (tmp_path / "run").exists()


# ---- vanilla_gan -------------------------------------------------------------------------------------------


def test_vanilla_shapes_and_counts():
    generator = [(3, width) for width in (256, 512, 1024) for _ in range(3)]
    generator += [(3, 784), (3, 784), (3, 1, 28, 28)]
    assert shapes(vanilla_gan.Generator(), torch.randn(3, 100)) == generator
    discriminator = [(3, 784), (3, 512), (3, 512), (3, 256), (3, 256), (3, 1)]
    assert shapes(vanilla_gan.Discriminator(), torch.randn(3, 1, 28, 28)) == discriminator
    assert count(vanilla_gan.Generator()) == 1_489_936
    assert count(vanilla_gan.Discriminator()) == 533_505


def test_vanilla_discriminator_loss():
    logits = torch.tensor([[math.log(3)], [-math.log(3)]])  # D = 3/4 and 1/4
    by_hand = -(math.log(3 / 4) + math.log(1 / 4)) / 2
    assert vanilla_gan.discriminator_loss(logits, logits).item() == pytest.approx(2 * by_hand, rel=1e-6)
    assert vanilla_gan.discriminator_loss(torch.full((2, 1), 200.0), torch.full((2, 1), -200.0)) == 0


def test_vanilla_best_discriminator_measures_jensen_and_shannon():
    """On two discrete distributions: the best D is p / (p + q), and its loss is 2 log 2 - 2 JSD."""
    p, q = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.3, 0.6]], dtype=torch.float64)
    best = p / (p + q)
    loss = -(p * best.log()).sum() - (q * (1 - best).log()).sum()
    middle = (p + q) / 2
    jsd = ((p * (p / middle).log()).sum() + (q * (q / middle).log()).sum()) / 2
    assert loss.item() == pytest.approx(2 * math.log(2) - 2 * jsd.item())
    # Ten images that come as often as p and q say, shown to discriminator_loss, have the same loss ...
    times = [torch.repeat_interleave(torch.arange(3), (10 * r).round().long()) for r in (p, q)]
    logits = best.logit().requires_grad_()
    d_loss = vanilla_gan.discriminator_loss(*(logits[index] for index in times))
    assert d_loss.item() == pytest.approx(loss.item())
    (slope,) = torch.autograd.grad(d_loss, logits)
    assert slope.abs().max() < 1e-9  # ... and no better answer


@pytest.mark.parametrize("logit", [-50.0, -10.0, -3.0, 0.0, 2.0])
def test_vanilla_generator_losses(logit):
    """Values and gradients in closed form: near D(G(z)) = 0 one gradient is -1, the other nearly 0."""
    logits = torch.full((4, 1), logit, dtype=torch.float64, requires_grad=True)
    d = 1 / (1 + math.exp(-logit))
    for minimax, value, slope in ((False, -math.log(d), -(1 - d)), (True, math.log1p(-d), -d)):
        loss = vanilla_gan.generator_loss(logits, minimax)
        (gradient,) = torch.autograd.grad(loss, logits)
        assert loss.item() == pytest.approx(value, rel=1e-9, abs=1e-13)
        assert gradient.sum().item() == pytest.approx(slope, rel=1e-9, abs=1e-30)


def test_vanilla_step_takes_the_loss_asked_for():
    plain, minimax = (one_round(vanilla_gan, minimax=minimax) for minimax in (False, True))
    for seen, value in ((plain, lambda d: -d.log()), (minimax, lambda d: (1 - d).log())):
        assert torch.equal(seen.inputs[0], torch.cat([seen.real, seen.fakes[0]]))
        (d_real, d_fake), d_again = seen.scores[0].sigmoid().chunk(2), seen.scores[1].sigmoid()
        assert seen.metrics["g_loss"].item() == pytest.approx(value(d_again).mean().item(), rel=1e-4)
        d_loss = -(d_real.log().mean() + (1 - d_fake).log().mean())
        assert seen.metrics["d_loss"].item() == pytest.approx(d_loss.item(), rel=1e-4)
        assert seen.metrics["d_real"].item() == pytest.approx(d_real.mean().item(), rel=1e-4)
        assert seen.metrics["d_fake"].item() == pytest.approx(d_fake.mean().item(), rel=1e-4)


@only("vanilla_gan")
def test_vanilla_flag(script, flags, tmp_path, capsys):
    script.main([*flags, "--generator-loss", "minimax", "--max-steps", "3"])
    g_loss = read(tmp_path / "run" / "checkpoint.pt")["history"][:, script.METRICS.index("g_loss")]
    assert (g_loss < 0).all()  # a logarithm of a probability
    fails(script, [*flags, "--generator-loss", "hinge"], capsys, "--generator-loss", "hinge")


# ---- wgan_gp -----------------------------------------------------------------------------------------------


def test_wgan_shapes_and_counts():
    generator = [(3, 12544)] * 3 + [(3, 256, 7, 7)] + [(3, 128, 14, 14)] * 3 + [(3, 1, 28, 28)] * 2
    assert shapes(wgan_gp.Generator(), torch.randn(3, 100)) == generator
    critic = [(3, 64, 14, 14)] * 2 + [(3, 128, 7, 7)] * 2 + [(3, 6272), (3, 1)]
    assert shapes(wgan_gp.Critic(), torch.randn(3, 1, 28, 28)) == critic
    assert count(wgan_gp.Generator()) == count(dcgan_mnist.Generator()) == 1_818_625
    assert count(wgan_gp.Critic()) == (64 * 16 + 64) + (64 * 128 * 16 + 128) + (6272 + 1) == 138_561


def pair(n=6, size=5):
    """Two batches of images."""
    rng = torch.Generator().manual_seed(3)
    return torch.randn(2, n, 1, size, size, generator=rng)


def test_wgan_losses_by_hand():
    real, fake = torch.tensor([[1.0], [3.0]]), torch.tensor([[-4.0], [2.0]])
    assert wgan_gp.critic_loss(real, fake).item() == -1 - 2
    assert wgan_gp.generator_loss(fake).item() == 1


def test_wgan_penalty_of_a_linear_critic():
    real, fake = pair()
    weight = torch.randn(25, 1, generator=torch.Generator().manual_seed(4))
    for length in (0.2, 1.0, 3.0):
        w = weight * length / weight.norm()
        critic = lambda x, w=w: x.flatten(1) @ w  # noqa: E731
        penalty, norm = wgan_gp.gradient_penalty(critic, real, fake, torch.Generator())
        assert norm.item() == pytest.approx(length, rel=1e-5)
        assert penalty.item() == pytest.approx((length - 1) ** 2, rel=1e-5, abs=1e-9)


def test_wgan_penalty_of_a_quadratic_critic():
    """The gradient of |x|^2 / 2 is x itself, so the penalty tells which x were asked."""
    real, fake = pair()
    asked = []

    def critic(x):
        asked.append(x.detach())
        return x.flatten(1).square().sum(1, keepdim=True) / 2

    penalty, norm = wgan_gp.gradient_penalty(critic, real, fake, torch.Generator().manual_seed(5))
    lengths = asked[0].flatten(1).norm(dim=1)
    assert penalty.item() == pytest.approx((lengths - 1).square().mean().item(), rel=1e-5)
    assert norm.item() == pytest.approx(lengths.mean().item(), rel=1e-5)
    shares = ((asked[0] - fake) / (real - fake)).flatten(1)  # the same for all of an image's pixels
    assert torch.allclose(shares, shares[:, :1].expand_as(shares), atol=1e-3)
    assert len(shares[:, 0].unique()) == 6


def test_wgan_weights_are_uniform():
    real, fake, asked = torch.ones(4000, 1, 2, 2), torch.zeros(4000, 1, 2, 2), []

    def critic(x):
        asked.append(x.detach()[:, 0, 0, 0].sort().values)
        return x.flatten(1).sum(1, keepdim=True)

    wgan_gp.gradient_penalty(critic, real, fake, torch.Generator().manual_seed(6))
    even = (torch.arange(4000) + 0.5) / 4000
    assert (asked[0] - even).abs().max() < 0.035  # Kolmogorov and Smirnov: 1.95 / sqrt(4000) is 0.1 % luck
    assert asked[0].min() >= 0
    assert asked[0].max() <= 1


def test_wgan_penalty_where_the_gradient_is_zero():
    real, fake = pair()
    critic = nn.Linear(25, 1)
    nn.init.zeros_(critic.weight)
    penalty, norm = wgan_gp.gradient_penalty(lambda x: critic(x.flatten(1)), real, fake, torch.Generator())
    penalty.backward()
    assert penalty.item() == pytest.approx(1, abs=1e-5)
    assert critic.weight.grad.isfinite().all()


def test_wgan_penalty_reaches_the_critic_alone():
    generator, critic = networks(wgan_gp)
    fake = generator(torch.randn(8, 100))
    real = mnist_as(wgan_gp, ROOT / "data")[:8].float() / 127.5 - 1
    wgan_gp.gradient_penalty(critic, real, fake.detach(), torch.Generator())[0].backward()
    named = dict(critic.named_parameters())
    assert all(named[name].grad.any() for name in named if "weight" in name)
    seen = one_round(wgan_gp, gp_weight=1e6)  # in a step, too: the generator has no gradient from it
    assert all(grad is None for grad in seen.optimizer_d.seen[0])
    assert (
        seen.optimizer_d.seen[1][0].norm()
        > 1e3 * one_round(wgan_gp, gp_weight=1.0).optimizer_d.seen[1][0].norm()
    )


def test_wgan_critic_sees_each_image_alone():
    critic = networks(wgan_gp)[1].train()
    images = torch.randn(8, 1, 28, 28)
    before = critic(images)
    images[3] = 0
    changed = critic(images) != before
    assert changed.flatten().tolist() == [False] * 3 + [True] + [False] * 4


def test_wgan_five_updates_on_five_batches():
    real = mnist_as(wgan_gp, ROOT / "data")[:40].float() / 127.5 - 1
    g, d = networks(wgan_gp)
    steps = []

    class Counter(Recorder):
        def step(self):
            steps.append(self)

    optimizer_g, optimizer_d = Counter(g), Counter(d)
    seen = one_round(
        wgan_gp, generator=g, other=d, optimizer_g=optimizer_g, optimizer_d=optimizer_d, real=real, n_critic=5
    )
    assert steps == [optimizer_d] * 5 + [optimizer_g]
    assert len(seen.inputs) == 5 * 3 + 1  # real, fake and in between, five times; and the generator's
    for i in range(5):
        batch, fake, between = seen.inputs[3 * i : 3 * i + 3]
        assert torch.equal(batch, real[8 * i : 8 * i + 8])
        assert torch.equal(fake, seen.fakes[i])
        share = ((between - fake) / (batch - fake)).detach().flatten(1).nanmedian(1).values
        assert torch.allclose(between, torch.lerp(fake, batch, share[:, None, None, None]), atol=1e-4)
    scores = [score.mean().item() for score in seen.scores]
    distance = sum(scores[3 * i] - scores[3 * i + 1] for i in range(5)) / 5
    assert seen.metrics["wasserstein"].item() == pytest.approx(distance, rel=1e-4)
    assert seen.metrics["g_loss"].item() == pytest.approx(-scores[-1], rel=1e-4)


def test_wgan_step_adds_up():
    seen = one_round(wgan_gp, n_critic=1)
    between = seen.inputs[2].detach().requires_grad_()
    (gradient,) = torch.autograd.grad(seen.other(between).sum(), between)
    norms = gradient.flatten(1).norm(dim=1)
    assert seen.metrics["gradient_norm"].item() == pytest.approx(norms.mean().item(), rel=1e-4)
    by_hand = 10 * (norms - 1).square().mean() - seen.metrics["wasserstein"]
    assert seen.metrics["c_loss"].item() == pytest.approx(by_hand.item(), rel=1e-4)


@only("wgan_gp")
def test_wgan_flags(script, flags, tmp_path, capsys, monkeypatch):
    seen, original = [], script.train_step
    monkeypatch.setattr(script, "train_step", lambda *args: (seen.append(args[-2:]), original(*args))[1])
    script.main([*flags, "--n-critic", "3", "--gp-weight", "2.5", "--max-steps", "1"])
    assert seen == [(3, 2.5)]
    for bad in (["--n-critic", "0"], ["--gp-weight", "-1"], ["--gp-weight", "nan"]):
        fails(script, [*flags, *bad], capsys, bad[0], bad[1])
    fails(script, [*flags, "--n-critic", "20"], capsys, "--batch-size", "from 2 to 2, with 48 images to take")


# ---- cgan --------------------------------------------------------------------------------------------------


def test_cgan_shapes_and_counts():
    z, labels, images = torch.randn(3, 100), torch.tensor([0, 9, 9]), torch.randn(3, 1, 28, 28)
    tail = [(3, 12544)] * 3 + [(3, 256, 7, 7)] + [(3, 128, 14, 14)] * 3 + [(3, 1, 28, 28)] * 2
    assert shapes(cgan.Generator(), z, labels) == [(3, 10), *tail]
    minimal = [(3, 10)] + [(3, 512)] * 3 + [(3, 784)] * 2 + [(3, 1, 28, 28)]
    assert shapes(cgan.Generator(mlp=True), z, labels) == minimal
    discriminator = [(3, 784)] + [(3, 64, 14, 14)] * 2 + [(3, 128, 7, 7)] * 3 + [(3, 6272), (3, 1)]
    assert shapes(cgan.Discriminator(), images, labels) == discriminator
    assert count(cgan.Generator()) == 1_818_625 + 10 * 12544 + 100 == 1_944_165
    assert count(cgan.Generator(mlp=True)) == 100 + (110 * 512 + 512) + 2 * 512 + (512 * 784 + 784) == 460_148
    assert count(cgan.Discriminator()) == 138_689 + 64 * 16 + 10 * 784 == 147_553


@pytest.mark.parametrize("mlp", [False, True])
def test_cgan_label_reaches_both_networks(mlp):
    torch.manual_seed(0)
    generator = cgan.Generator(mlp=mlp).apply(cgan.init_weights).eval()
    discriminator = cgan.Discriminator().apply(cgan.init_weights).eval()
    z, labels = torch.randn(1, 100).expand(10, -1), torch.arange(10)
    images = generator(z, labels)
    assert len(images.flatten(1).unique(dim=0)) == 10
    assert len(discriminator(images[:1].expand(10, -1, -1, -1), labels).unique()) == 10
    assert torch.equal(generator(z, torch.full((10,), 4))[0], images[4])


def test_cgan_losses_by_hand():
    real, fake = torch.tensor([[math.log(3)]]), torch.tensor([[-math.log(3)]])
    by_hand = -(0.9 * math.log(3 / 4) + 0.1 * math.log(1 / 4)) - math.log(3 / 4)
    assert cgan.discriminator_loss(real, fake).item() == pytest.approx(by_hand, rel=1e-6)
    assert cgan.generator_loss(fake).item() == pytest.approx(math.log(4), rel=1e-6)


def test_cgan_step_judges_images_with_their_labels():
    seen, told = one_round(cgan), []
    g, d = networks(cgan)
    for network in (g, d):
        network.register_forward_pre_hook(lambda module, args: told.append(args[1]))
    one_round(cgan, generator=g, other=d, labels=torch.tensor([3, 1, 4, 1, 5, 9, 2, 6]))
    assert [labels.tolist() for labels in told] == [[3, 1, 4, 1, 5, 9, 2, 6]] * 4
    d_real, d_fake, d_again = (scores.sigmoid() for scores in seen.scores)
    d_loss = -(0.9 * d_real.log() + 0.1 * (1 - d_real).log()).mean() - (1 - d_fake).log().mean()
    assert seen.metrics["d_loss"].item() == pytest.approx(d_loss.item(), rel=1e-4)
    assert seen.metrics["g_loss"].item() == pytest.approx(-d_again.log().mean().item(), rel=1e-4)


@only("cgan")
def test_cgan_trains_on_the_right_labels(script, flags, small_data, monkeypatch):
    data = torchvision.datasets.MNIST(small_data)
    truth = {image.numpy().tobytes(): label.item() for image, label in zip(data.data, data.targets)}
    seen, original = [], script.train_step

    def train_step(g, d, optimizer_g, optimizer_d, real, labels, *rest):
        pixels = ((real[:, 0] + 1) * 127.5).round().to(torch.uint8)
        seen.extend(truth[image.numpy().tobytes()] == label for image, label in zip(pixels, labels.tolist()))
        return original(g, d, optimizer_g, optimizer_d, real, labels, *rest)

    monkeypatch.setattr(script, "train_step", train_step)
    script.main(flags)
    assert seen == [True] * 96


@only("cgan")
def test_cgan_grid_has_a_row_for_each_class(script, flags, monkeypatch):
    told, original = [], script.sample
    monkeypatch.setattr(
        script, "sample", lambda g, z, labels: (told.append(labels), original(g, z, labels))[1]
    )
    script.main([*flags, "--max-steps", "1"])
    for labels in told:
        assert labels.view(10, 10).tolist() == [[label] * 10 for label in range(10)]


@only("cgan")
@pytest.mark.parametrize("generator", [[], ["--mlp"]])
def test_cgan_generates_by_class(script, flags, tmp_path, capsys, generator):
    script.main([*flags, *generator, "--max-steps", "2"])
    checkpoint = tmp_path / "run" / "checkpoint.pt"
    generate = ["--checkpoint", str(checkpoint), "--generate"]
    script.main([*generate, "25"])
    folder = torchvision.datasets.ImageFolder(tmp_path / "run" / "generated" / "001")
    assert folder.classes == [str(label) for label in range(10)]
    assert torch.tensor(folder.targets).bincount().tolist() == [3] * 5 + [2] * 5
    script.main([*generate, "7", "--label", "0"])
    files = [path for path in (tmp_path / "run" / "generated" / "002").rglob("*") if path.is_file()]
    assert len(files) == 7
    assert {path.parent.name for path in files} == {"0"}

    # What lies in the folder of a class is what the generator makes of that class.
    network = script.Generator(mlp=bool(generator))
    script.load_checkpoint(checkpoint, generator=network)
    z = torch.randn(7, 100, generator=script.stream("cpu", 42, "generate"))
    expected = script.sample(network, z, torch.zeros(7, dtype=torch.long))
    for path, image in zip(sorted(files), expected):
        pixels = torch.frombuffer(bytearray(Image.open(path).tobytes()), dtype=torch.uint8)
        assert (pixels.int() - image.flatten().int()).abs().max() <= 1

    for bad in (["--label", "10"], ["--label=-1"], ["--label", "x"]):
        fails(script, [*generate, "2", *bad], capsys, "--label", bad[-1].split("=")[-1])
    fails(script, [*flags, "--out-dir", tmp_path / "other", "--label", "3"], capsys, "--label", "--generate")
    assert len(list((tmp_path / "run" / "generated").iterdir())) == 2


# ---- dcgan32_wgan_sn ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 3])
def test_dcgan32_shapes(channels):
    generator = [(3, 100, 1, 1)] + [(3, 256, 4, 4)] * 3 + [(3, 128, 8, 8)] * 3 + [(3, 64, 16, 16)] * 3
    generator += [(3, channels, 32, 32)] * 2
    assert shapes(dcgan32_wgan_sn.Generator(channels=channels), torch.randn(3, 100)) == generator
    critic = [(3, 64, 16, 16)] * 2 + [(3, 128, 8, 8)] * 3 + [(3, 256, 4, 4)] * 3 + [(3, 1, 1, 1), (3, 1)]
    for norm in ("batch", "none"):
        network = dcgan32_wgan_sn.Critic(channels, norm, spectral=False)
        assert shapes(network, torch.randn(3, channels, 32, 32)) == critic
        assert network.eval()(torch.randn(1, channels, 32, 32)).shape == (1, 1)


def test_dcgan32_counts():
    generator = 16 * (100 * 256 + 256 * 128 + 128 * 64 + 64 * 1) + 2 * (256 + 128 + 64)
    assert count(dcgan32_wgan_sn.Generator()) == generator == 1_066_880
    convolutions = 25 * (1 * 64 + 64 * 128 + 128 * 256 + 256 * 1)
    plain, batch = (count(dcgan32_wgan_sn.Critic(norm=norm)) for norm in ("none", "batch"))
    assert plain == convolutions + 64 + 128 + 256 == 1_032_448
    assert batch == convolutions + 64 + 2 * 128 + 2 * 256 == 1_032_832


def test_dcgan32_spectral_norm():
    """After the power iteration has settled, the largest singular value of each convolution's weight is 1."""
    torch.manual_seed(0)
    critic, images = dcgan32_wgan_sn.Critic(), torch.randn(4, 1, 32, 32)
    for _ in range(100):
        critic(images)
    critic.eval()
    convolutions = [layer for layer in critic.layers if isinstance(layer, nn.Conv2d)]
    assert len(convolutions) == 4
    for layer in convolutions:
        assert torch.linalg.svdvals(layer.weight.flatten(1))[0].item() == pytest.approx(1, abs=0.01)
        with torch.no_grad():
            layer.parametrizations.weight.original.mul_(1000)  # what the optimiser can reach changes nothing
        assert torch.linalg.svdvals(layer.weight.flatten(1))[0].item() == pytest.approx(1, abs=0.01)
    free = dcgan32_wgan_sn.Critic(spectral=False)
    assert all("original" not in name for name in free.state_dict())


@only("dcgan32_wgan_sn")
def test_dcgan32_spectral_norm_holds_in_training(script, flags, tmp_path):
    for precision in ("fp32", "bf16"):
        out = str(tmp_path / precision)
        script.main([*flags, "--epochs", "4", "--precision", precision, "--out-dir", out])
        critic = script.Critic()
        critic.load_state_dict(read(tmp_path / precision / "checkpoint.pt")["critic"])
        for iterations, tolerance in ((0, 0.2), (50, 0.01)):  # the weights have just moved, and have settled
            critic.train()
            for _ in range(iterations):
                critic(torch.randn(1, 1, 32, 32))
            for layer in critic.eval().layers:
                if isinstance(layer, nn.Conv2d):
                    largest = torch.linalg.svdvals(layer.weight.flatten(1))[0].item()
                    assert largest == pytest.approx(1, abs=tolerance)
    assert "layers.3.running_mean" in critic.state_dict()
    script.main([*flags, "--no-spectral-norm", "--critic-norm", "none"])
    free = read(tmp_path / "run" / "checkpoint.pt")["critic"]
    assert "layers.0.weight" in free
    assert "layers.3.running_mean" not in free


def test_dcgan32_noise_is_uniform():
    z = dcgan32_wgan_sn.uniform(4000, 1, generator=torch.Generator().manual_seed(0)).flatten()
    even = (torch.arange(4000) + 0.5) / 2000 - 1
    assert (z.sort().values - even).abs().max() < 0.07  # Kolmogorov and Smirnov, on a width of 2
    for z in one_round(dcgan32_wgan_sn).z_inputs:
        assert z.shape == (8, 100)
        assert -1 <= z.min() < -0.95
        assert 0.95 < z.max() <= 1


@only("dcgan32_wgan_sn")
def test_dcgan32_noise_is_uniform_when_generating(script, flags, tmp_path, monkeypatch):
    seen, original = [], script.sample
    monkeypatch.setattr(script, "sample", lambda g, z: (seen.append(z), original(g, z))[1])
    script.main([*flags, "--max-steps", "1"])
    script.main(["--generate", "40", "--checkpoint", str(tmp_path / "run" / "checkpoint.pt")])
    for z in seen:
        assert z.abs().max() <= 1
    assert abs(seen[-1].std().item() - 1 / math.sqrt(3)) < 0.03


def test_dcgan32_losses_by_hand():
    real, fake = torch.tensor([[1.0], [3.0]]), torch.tensor([[-4.0], [2.0]])
    assert dcgan32_wgan_sn.critic_loss(real, fake).item() == -1 - 2
    assert dcgan32_wgan_sn.generator_loss(fake).item() == 1


def test_dcgan32_step_reports_what_it_did():
    seen = one_round(dcgan32_wgan_sn)
    real, fake, _ = seen.scores
    assert seen.metrics["c_real"].item() == pytest.approx(real.mean().item(), rel=1e-4)
    assert seen.metrics["c_fake"].item() == pytest.approx(fake.mean().item(), rel=1e-4)
    gap = (real.mean() - fake.mean()).item()
    assert seen.metrics["wasserstein"].item() == pytest.approx(gap, rel=1e-4)
    slopes = [
        abs(a - b).item() / (x - y).norm().item() for a, b, x, y in zip(real, fake, seen.real, seen.fakes[0])
    ]
    assert seen.metrics["slope"].item() == pytest.approx(sum(slopes) / 8, rel=1e-4)

    def mean_square_distance(images):
        return sum((a - b).square().sum().item() for a in images for b in images)

    ratio = math.sqrt(mean_square_distance(seen.fakes[0]) / mean_square_distance(seen.real))
    assert seen.metrics["diversity"].item() == pytest.approx(ratio, rel=1e-4)


def test_dcgan32_scores_are_unbounded():
    critic = dcgan32_wgan_sn.Critic(spectral=False).eval()
    with torch.no_grad():
        for parameter in critic.parameters():
            parameter.mul_(10)
    assert critic(torch.randn(64, 1, 32, 32)).abs().max() > 10


@only("dcgan32_wgan_sn")
def test_dcgan32_stages(script, flags, tmp_path, monkeypatch):
    monkeypatch.setattr(script, "STAGES", (2, 5, 9, 12))
    script.main([*flags, "--out-dir", str(tmp_path / "whole")])
    samples = tmp_path / "whole" / "samples"
    steps = [samples / f"step_{step:05d}.png" for step in (2, 5, 9, 12)]
    assert sorted(samples.glob("step_*")) == steps
    with Image.open(tmp_path / "whole" / "stages.png") as stages:
        assert stages.size == (4 * 274, 274 + 14)
        for i, path in enumerate(steps):
            part = stages.crop((274 * i, 14, 274 * (i + 1), 288))
            assert part.tobytes() == Image.open(path).convert("RGB").tobytes()
            title = stages.crop((274 * i, 0, 274 * (i + 1), 14)).convert("L")
            assert title.getextrema()[0] < 99
    # After step 12, which ends the second epoch, both pictures show the same.
    assert (samples / "epoch_0002.png").read_bytes() == steps[-1].read_bytes()
    script.main([*flags, "--max-steps", "4"])  # stopped between two stages, and resumed
    script.main(["--resume", str(tmp_path / "run" / "checkpoint.pt"), "--max-steps", "12"])
    stages = (tmp_path / name / "stages.png" for name in ("whole", "run"))
    assert len({path.read_bytes() for path in stages}) == 1


def test_dcgan32_stops_at_20000_steps_of_32():
    args = dcgan32_wgan_sn.parse_args([])
    assert (args.max_steps, args.batch_size, args.dataset) == (20000, 32, "fashion_mnist")
    assert args.epochs * (60000 // 32) >= 20000
    assert (args.lr_g, args.lr_d, args.critic_norm) == (3e-4, 6e-4, "batch")  # what RESULTS.md calls them
    assert dcgan32_wgan_sn.STAGES == (200, 4000, 8000, 20000)


def colours(n=96):
    """A stand-in for torchvision's CIFAR10, with pictures made of the MNIST digits in three colours."""
    digits = nn.functional.pad(torchvision.datasets.MNIST(ROOT / "data").data[: 3 * n], (2, 2, 2, 2))
    return types.SimpleNamespace(data=digits.view(n, 3, 32, 32).permute(0, 2, 3, 1).numpy())


@pytest.mark.parametrize("name", ["dcgan32_wgan_sn", "dcgan64_celeba"])
def test_cifar10(name, tmp_path, monkeypatch, capsys):
    """torchvision checks the hashes of CIFAR-10's files, so none can be made up here."""
    script = importlib.import_module(name)
    small = ["--dataset", "cifar10", "--batch-size", "16", "--device", "cpu", "--epochs", "1"]
    with monkeypatch.context() as patch:
        patch.setattr(script, "open_dataset", lambda name, data_dir: colours())
        script.main([*small, "--out-dir", str(tmp_path / "run")])
    size = SIZES[name]
    with Image.open(tmp_path / "run" / "samples" / "epoch_0001.png") as grid:
        red, green, blue = (band.tobytes() for band in grid.split())
        assert red != green != blue
    script.main(["--generate", "3", "--checkpoint", str(tmp_path / "run" / "checkpoint.pt")])
    files = list((tmp_path / "run" / "generated" / "001").iterdir())
    assert [(Image.open(path).size, Image.open(path).mode) for path in files] == [((size, size), "RGB")] * 3

    def refuse(*args, **kwargs):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    folder = tmp_path / "empty" / "cifar-10-batches-py"
    argv = [*small, "--data-dir", tmp_path / "empty", "--out-dir", tmp_path / "none"]
    fails(script, argv, capsys, "--data-dir", folder, "data_batch_1", "test_batch", "batches.meta")


def test_dcgan32_prepares_colours():
    images = dcgan32_wgan_sn.to_32x32(colours(4).data)
    assert images.shape == (4, 3, 32, 32)
    assert torch.equal(images[1, 2], torch.as_tensor(colours(4).data[1, :, :, 2]))


# ---- dcgan64_celeba ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 3])
def test_dcgan64_shapes(channels):
    sides = ((512, 4), (256, 8), (128, 16), (64, 32))
    generator = [(3, width, side, side) for width, side in sides for _ in range(3)]
    generator += [(3, channels, 64, 64)] * 2
    assert shapes(dcgan64_celeba.Generator(channels=channels), torch.randn(3, 100)) == generator
    discriminator = [(3, 64, 32, 32)] * 2
    discriminator += [(3, width, side, side) for width, side in sides[2::-1] for _ in range(3)]
    network = dcgan64_celeba.Discriminator(channels)
    assert shapes(network, torch.randn(3, channels, 64, 64)) == [*discriminator, (3, 1, 1, 1)]
    assert network.eval()(torch.randn(1, channels, 64, 64)).shape == (1, 1)


def test_dcgan64_counts():
    chain = 16 * (512 * 256 + 256 * 128 + 128 * 64)
    generator = 16 * (100 * 512 + 64 * 3) + chain + 2 * (512 + 256 + 128 + 64)
    assert count(dcgan64_celeba.Generator()) == generator == 3_576_704
    assert count(dcgan64_celeba.Generator(channels=1)) == generator - 16 * 64 * 2
    discriminator = 16 * (3 * 64 + 512 * 1) + chain + 2 * (128 + 256 + 512)
    assert count(dcgan64_celeba.Discriminator()) == discriminator == 2_765_568


def official(channels=3):
    """The module layout of PyTorch's own DCGAN example: a Sequential named main in each network."""

    def layers(*all_layers):
        module = nn.Module()
        module.main = nn.Sequential(*all_layers)
        return module

    up, down = [], []
    for a, b in ((100, 512), (512, 256), (256, 128), (128, 64)):
        stride, padding = (1, 0) if a == 100 else (2, 1)
        up += [nn.ConvTranspose2d(a, b, 4, stride, padding, bias=False), nn.BatchNorm2d(b), nn.ReLU(True)]
    for a, b in ((64, 128), (128, 256), (256, 512)):
        down += [nn.Conv2d(a, b, 4, 2, 1, bias=False), nn.BatchNorm2d(b), nn.LeakyReLU(0.2, inplace=True)]
    first = [nn.Conv2d(channels, 64, 4, 2, 1, bias=False), nn.LeakyReLU(0.2, inplace=True)]
    last = [nn.Conv2d(512, 1, 4, 1, 0, bias=False), nn.Sigmoid()]
    generator = layers(*up, nn.ConvTranspose2d(64, channels, 4, 2, 1, bias=False), nn.Tanh())
    return generator, layers(*first, *down, *last)


def test_dcgan64_weights_of_the_official_example():
    torch.manual_seed(0)
    its_g, its_d = (network.eval() for network in official())
    assert list(its_g.state_dict())[0] == list(its_d.state_dict())[0] == "main.0.weight"
    g, d = dcgan64_celeba.Generator().eval(), dcgan64_celeba.Discriminator().eval()
    g.load_state_dict(its_g.state_dict())
    d.load_state_dict(its_d.state_dict())
    z = torch.randn(4, 100)
    images = g(z)
    assert torch.equal(images, its_g.main(z[:, :, None, None]))
    assert torch.allclose(d(images).sigmoid().flatten(), its_d.main(images).flatten(), atol=1e-6)
    its_g.load_state_dict(g.state_dict())  # and back
    its_d.load_state_dict(d.state_dict())


def test_dcgan64_losses_by_hand():
    real, fake = torch.tensor([[math.log(3)]]), torch.tensor([[-math.log(3)]])
    assert dcgan64_celeba.discriminator_loss(real, fake).item() == pytest.approx(
        -2 * math.log(3 / 4), rel=1e-6
    )
    assert dcgan64_celeba.generator_loss(fake).item() == pytest.approx(math.log(4), rel=1e-6)


def test_dcgan64_step_reports_what_it_did():
    seen = one_round(dcgan64_celeba)
    d_real, d_fake, d_again = (scores.sigmoid() for scores in seen.scores)
    d_loss = -(d_real.log().mean() + (1 - d_fake).log().mean())
    expected = {
        "d_loss": d_loss,
        "g_loss": -d_again.log().mean(),
        "d_real": d_real.mean(),
        "d_fake": d_fake.mean(),
    }
    for name, value in expected.items():
        assert seen.metrics[name].item() == pytest.approx(value.item(), rel=1e-4)


def pixels_of(image):
    """uint8 (64, 64, 3) of what decode returns."""
    return torch.frombuffer(bytearray(image), dtype=torch.uint8).view(64, 64, 3)


def test_decode_all_modes(tmp_path):
    """A picture that is red on the left and half transparent blue on the right, in every mode there is."""
    rgba = Image.new("RGBA", (80, 64), (255, 0, 0, 255))
    rgba.paste((0, 0, 255, 128), (40, 0, 80, 64))
    red, faint, blue = (255, 0, 0), (127, 127, 255), (0, 0, 255)
    grey, mid = (76, 76, 76), (29, 29, 29)  # what ITU-R 601 makes of red and of blue
    rgb = rgba.convert("RGB")
    palette = rgb.quantize(4)
    clear = palette.copy()
    clear.info["transparency"] = palette.getpixel((79, 0))
    deep = Image.new("I;16", (80, 64), 76 * 257)
    deep.paste(29 * 257, (40, 0, 80, 64))
    cases = {
        "rgba.png": (rgba, red, faint),
        "rgba.webp": (rgba, red, faint),
        "rgb.png": (rgb, red, blue),
        "rgb.bmp": (rgb, red, blue),
        "rgb.jpg": (rgb, red, blue),
        "rgb.JPEG": (rgb, red, blue),
        "grey.png": (rgb.convert("L"), grey, mid),
        "grey_alpha.png": (rgba.convert("LA"), grey, (141, 141, 141)),
        "palette.png": (palette, red, blue),
        "palette.gif": (palette, red, blue),
        "clear.png": (clear, red, (255, 255, 255)),
        "clear.gif": (clear, red, (255, 255, 255)),
        "deep.png": (deep, grey, mid),
        "cmyk.jpg": (rgb.convert("CMYK"), red, blue),
        "bits.png": (rgb.convert("L").point(lambda v: 255 * (v > 50)).convert("1"), (255,) * 3, (0,) * 3),
    }
    for name, (image, left, right) in cases.items():
        image.save(tmp_path / name, **({"quality": 95} if "jp" in name.lower() else {}))
        pixels = pixels_of(dcgan64_celeba.decode(tmp_path / name)).int()
        tolerance = 12 if name.split(".")[1] in ("jpg", "JPEG", "webp") else 2
        for column, colour in ((8, left), (55, right)):  # away from the edge between the two
            difference = (pixels[32, column] - torch.tensor(colour)).abs().max().item()
            assert difference <= tolerance, f"{name}: {pixels[32, column].tolist()} is not {colour}"


def test_decode_takes_the_middle_square(tmp_path):
    ramp = torch.arange(178, dtype=torch.uint8).repeat(218, 1)
    Image.fromarray(ramp.numpy()).save(tmp_path / "wide.png")
    pixels = pixels_of(dcgan64_celeba.decode(tmp_path / "wide.png"))[:, :, 0].float()
    middle = (torch.arange(64) + 0.5) * 178 / 64 - 0.5
    assert (pixels[:, 2:-2] - middle[2:-2]).abs().max() <= 1
    Image.fromarray(ramp.T.contiguous().numpy()).save(tmp_path / "tall.png")
    pixels = pixels_of(dcgan64_celeba.decode(tmp_path / "tall.png"))[:, :, 0].float()
    assert (pixels[2:-2] - middle[2:-2, None]).abs().max() <= 1
    turned = Image.fromarray(ramp.numpy()).convert("RGB")
    exif = turned.getexif()
    exif[0x0112] = 6  # orientation: the camera was held upright
    turned.save(tmp_path / "turned.jpg", exif=exif, quality=95)
    pixels = pixels_of(dcgan64_celeba.decode(tmp_path / "turned.jpg"))[:, :, 0].float()
    assert pixels[5].mean() < 40 < 140 < pixels[-5].mean()  # now dark above, light below


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


def test_folder_is_decoded_once(pictures, monkeypatch):
    images = dcgan64_celeba.map_folder(pictures)
    assert images.shape == (40, 3, 64, 64)
    assert images.dtype == torch.uint8
    files = sorted(path for path in pictures.rglob("*") if path.suffix in (".png", ".webp", ".jpg"))
    for image, path in zip(images, files):
        assert torch.equal(image.permute(1, 2, 0), pixels_of(dcgan64_celeba.decode(path)))
    (cache,) = Path("data", "cache").iterdir()
    assert cache.stat().st_size == 40 * 64 * 64 * 3

    decoded, loader = [], dcgan64_celeba.DataLoader

    def count(files, *args, **settings):
        decoded.append(len(files))
        return loader(files, *args, **settings)

    monkeypatch.setattr(dcgan64_celeba, "DataLoader", count)
    assert torch.equal(dcgan64_celeba.map_folder(pictures), images)
    assert decoded == []

    # A file that is added, removed or changed is noticed, and the old cache is gone.
    first = cache.name
    shutil.copy(files[0], pictures / "added.png")
    assert len(dcgan64_celeba.map_folder(pictures)) == 41
    files[1].unlink()
    assert len(dcgan64_celeba.map_folder(pictures)) == 40
    Image.new("RGB", (9, 9), "green").save(files[2])
    changed = dcgan64_celeba.map_folder(pictures)
    assert len(changed) == 40
    assert (changed == torch.tensor([0, 128, 0], dtype=torch.uint8)[:, None, None]).all((1, 2, 3)).sum() == 1
    os.utime(files[3], ns=(1, 1))  # changed, of the same size
    assert torch.equal(dcgan64_celeba.map_folder(pictures), changed)
    assert decoded == [41, 40, 40, 40]
    (cache,) = Path("data", "cache").iterdir()
    assert cache.name != first

    # Another folder has a cache of its own.
    other = pictures.parent / "other"
    shutil.copytree(pictures, other)
    dcgan64_celeba.map_folder(other)
    assert len(list(Path("data", "cache").iterdir())) == 2


# Decoding that takes minutes after the first 32 pictures, and says when they are in the file.
SLOW = """
import signal, sys, threading, time
from pathlib import Path
import dcgan64_celeba
original = dcgan64_celeba.decode
def decode(path):
    time.sleep(300 if path.endswith(".jpg") and int(Path(path).stem) > 16 else 0)
    return original(path)
def watch():
    while not any(path.stat().st_size for path in dcgan64_celeba.CACHE.glob("*")):
        time.sleep(0.01)
    print("32 are written", flush=True)
dcgan64_celeba.decode = decode
signal.signal(signal.SIGINT, signal.default_int_handler)  # the background job of a shell ignores it
threading.Thread(target=watch, daemon=True).start()
dcgan64_celeba.map_folder(Path(sys.argv[1]))
"""


def test_interrupted_decoding_leaves_nothing(pictures):
    with subprocess.Popen(
        [sys.executable, "-c", SLOW, pictures],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        assert process.stdout.readline() == "32 are written\n"
        os.killpg(process.pid, signal.SIGINT)  # as a terminal sends Ctrl-C: to the worker processes, too
        _, errors = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGINT
    assert errors.count("Traceback") == 1, errors  # the workers are silent
    assert list(Path("data", "cache").iterdir()) == []
    with pytest.raises(ProcessLookupError):  # and gone
        os.killpg(process.pid, 0)

    kill = "import os, signal, sys, dcgan64_celeba as d\nfrom pathlib import Path\n"
    kill += "def replace(a, b): os.kill(os.getpid(), signal.SIGKILL)\n"
    kill += "os.replace = replace\nd.map_folder(Path(sys.argv[1]))"
    assert python(kill, pictures, cwd=pictures.parent).returncode == -signal.SIGKILL
    assert len(dcgan64_celeba.map_folder(pictures)) == 40
    (cache,) = Path("data", "cache").iterdir()  # what the kill left is gone
    assert cache.suffix == ".uint8"


def test_unreadable_files_are_named(pictures, capsys):
    (pictures / "0" / "empty.png").write_bytes(b"")
    (pictures / "cut.jpg").write_bytes(next(pictures.rglob("*.jpg")).read_bytes()[:300])
    (pictures / "text.gif").write_text("this is text")
    good = [p for p in sorted(pictures.rglob("*.*")) if dcgan64_celeba.decode(p)]
    images = dcgan64_celeba.map_folder(pictures)
    assert len(images) == len(good) == 40
    for image, path in zip(images, good):  # no gaps
        assert torch.equal(image.permute(1, 2, 0), pixels_of(dcgan64_celeba.decode(path)))
    out = capsys.readouterr().out
    assert "3 of 43 files cannot be read" in out
    for name in ("empty.png", "cut.jpg", "text.gif"):
        assert name in out


@only("dcgan64_celeba")
def test_folders_without_images(script, pictures, tmp_path, capsys):
    argv = ["--dataset", "folder", "--device", "cpu", "--data-dir"]
    (tmp_path / "bad").mkdir()
    fails(script, [*argv, tmp_path / "bad"], capsys, "--data-dir", "no image", tmp_path / "bad")
    (tmp_path / "bad" / "a.png").write_bytes(b"")
    with pytest.raises(SystemExit) as exit_:
        script.main([*argv, str(tmp_path / "bad")])
    assert exit_.value.code == 2
    assert "no image" in capsys.readouterr().err
    fails(script, [*argv, tmp_path / "nowhere"], capsys, "--data-dir", tmp_path / "nowhere")
    fails(script, [*argv, pictures / "notes.txt"], capsys, "--data-dir", "notes.txt")
    assert not Path("runs").exists()
    assert not any(Path("data", "cache").iterdir())


@only("dcgan64_celeba")
def test_folder_trains_and_generates(script, pictures, tmp_path):
    argv = ["--dataset", "folder", "--data-dir", str(pictures), "--batch-size", "8", "--epochs", "1"]
    script.main([*argv, "--device", "cpu", "--out-dir", "whole"])
    script.main([*argv, "--device", "cpu", "--out-dir", "run", "--max-steps", "2"])
    script.main(["--resume", "run/checkpoint.pt", "--max-steps", "5"])
    assert_same_run("run/checkpoint.pt", "whole/checkpoint.pt")
    with Image.open("run/samples/epoch_0001.png") as grid:
        red, green, blue = (band.tobytes() for band in grid.split())
        assert red != green != blue
    script.main(["--generate", "3", "--checkpoint", "run/checkpoint.pt"])
    files = sorted(Path("run/generated/001").iterdir())
    assert [(Image.open(path).size, Image.open(path).mode) for path in files] == [((64, 64), "RGB")] * 3


@only("dcgan64_celeba")
def test_celeba(script, tmp_path, monkeypatch, capsys):
    """torchvision's layout is found; where it is not, one line says what to do."""

    def refuse(*args, **kwargs):
        raise urllib.error.URLError("no network")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    folder = Path("data", "celeba", "img_align_celeba")
    argv = ["--batch-size", "4", "--epochs", "1", "--device", "cpu"]
    fails(script, argv, capsys, "--data-dir", folder, "quota", "--dataset fashion_mnist", "--dataset folder")
    assert not Path("runs").exists()
    shutil.rmtree("data", ignore_errors=True)
    folder.mkdir(parents=True)
    rng = torch.Generator().manual_seed(0)
    for i in range(8):
        noise = torch.randint(0, 256, (218, 178, 3), dtype=torch.uint8, generator=rng)
        Image.fromarray(noise.numpy()).save(folder / f"{i + 1:06d}.jpg")
    script.main(argv)
    assert Path("runs/dcgan64_celeba/001/samples/epoch_0001.png").is_file()


def resident_anonymous():
    """MB of memory that is this process's own; pages of a mapped file, which cost nothing, are not."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"RssAnon:\s+(\d+) kB", status)[1]) / 1000


@pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="reads the memory in use from Linux's /proc"
)
def test_memory_does_not_grow_with_the_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "pictures"
    folder.mkdir()
    Image.new("L", (2, 2)).save(folder / "0.png")
    picture = (folder / "0.png").read_bytes()
    for i in range(1, 20_000):  # 246 MB when decoded
        (folder / f"{i}.png").write_bytes(picture)
    before = resident_anonymous()
    images = dcgan64_celeba.map_folder(folder)
    assert images.shape == (20_000, 3, 64, 64)
    order = torch.randperm(len(images))
    for index in order.split(128):
        images[index].float().div_(127.5).sub_(1)
    assert resident_anonymous() - before < 80
    shutil.rmtree(tmp_path / "data")
    shutil.rmtree(folder)


# Each process writes its parts to a file of its own at the end, without batch normalisation if asked to.
TOGETHER = """
import os, sys
import torch
import dcgan64_celeba as script
if sys.argv[1] == "plain":
    class Plain:
        def __init__(self, *args):
            super().__init__(*args)
            for i, layer in enumerate(self.main):
                if isinstance(layer, torch.nn.BatchNorm2d):
                    self.main[i] = torch.nn.Identity()
    script.Generator = type("Generator", (Plain, script.Generator), {})
    script.Discriminator = type("Discriminator", (Plain, script.Discriminator), {})
rank, end = os.environ.get("RANK", "0"), script.SharedRun.end_epoch
def end_epoch(run, *pictures):
    end(run, *pictures)
    state = {name: part.state_dict() for name, part in run.parts.items()}
    torch.save(state, os.path.join(sys.argv[2], f"rank{rank}.pt"))
script.SharedRun.end_epoch = end_epoch
script.main(sys.argv[3:])
"""


def torchrun(folder, *argv):
    """Run a file in two processes, on a port that is free."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={port}"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*command, *map(str, argv)], cwd=folder, env=environment, capture_output=True, text=True, timeout=300
    )


def together(tmp_path, processes, kind, name, *argv):
    """Train in one process or in two; returns what each held at the end, and the result of the first."""
    (tmp_path / "together.py").write_text(TOGETHER)
    (tmp_path / name).mkdir()
    argv = [kind, tmp_path / name, *argv]
    if processes == 2:
        result = torchrun(tmp_path, "together.py", *argv)
    else:
        result = python(TOGETHER, *argv, cwd=tmp_path)
    assert result.returncode == 0, result.stderr[-3000:]
    return [read(tmp_path / name / f"rank{rank}.pt") for rank in range(processes)], result


def distance(a, b):
    """The relative distance of two lists of tensors, taken as two long vectors."""
    a, b = (torch.cat([tensor.flatten().double() for tensor in tensors]) for tensors in (a, b))
    return ((a - b).norm() / b.norm()).item()


@only("dcgan64_celeba")
def test_two_processes_without_batch_statistics(script, flags, tmp_path):
    """The gradients of two processes, averaged, are those of one that has the whole batch to itself."""
    step = [*flags[:-2], "--max-steps", "1", "--lr-d", "1e-12"]  # D moves too little for G to notice
    (one,), _ = together(tmp_path, 1, "plain", "one", *step, "--out-dir", tmp_path / "run1")
    two, _ = together(tmp_path, 2, "plain", "two", *step, "--out-dir", tmp_path / "run2")
    for optimizer in ("optimizer_g", "optimizer_d"):  # after one step, Adam's mean is half the gradient
        gradients = [[s["exp_avg"] for s in part[optimizer]["state"].values()] for part in (one, *two)]
        assert gradients[0][0].any()
        assert distance(gradients[1], gradients[0]) < 1e-3
        assert_same_bits(gradients[1], gradients[2])
    histories = [read(tmp_path / run / "checkpoint.pt")["history"] for run in ("run1", "run2")]
    assert torch.allclose(*histories, rtol=1e-4)  # the figures, too, are of the whole batch


@only("dcgan64_celeba")
def test_two_processes_with_batch_normalisation(script, flags, tmp_path):
    """Both hold the same weights; one writes; checkpoints go from two processes to one and back."""
    flags, run = [*flags[:-2], "--epochs", "1"], tmp_path / "run"
    whole, result = together(tmp_path, 2, "whole", "whole", *flags, "--out-dir", run)
    assert result.stdout.count("steps done") == 1
    for name in ("generator", "discriminator"):
        weights = [
            {key: value for key, value in held[name].items() if "running" not in key} for held in whole
        ]
        assert_same_bits(*weights)
    checkpoint = run / "checkpoint.pt"
    assert_same_bits(read(checkpoint)["generator"], whole[0]["generator"])
    assert read(checkpoint)["step"] == 6
    assert (run / "samples" / "epoch_0001.png").is_file()

    # Stopped by a signal to one of the two, both stop; resumed by two, the run ends as the whole one did.
    half = tmp_path / "half"
    code = "import os, signal, sys, dcgan64_celeba as script\noriginal, calls = script.generator_loss, []\n"
    code += "def generator_loss(logits):\n    calls.append(None)\n"
    code += "    if len(calls) == 3 and os.environ['RANK'] == '1': os.kill(os.getpid(), signal.SIGTERM)\n"
    code += "    return original(logits)\nscript.generator_loss = generator_loss\nscript.main(sys.argv[1:])"
    (tmp_path / "stop.py").write_text(code)
    result = torchrun(tmp_path, "stop.py", *flags, "--out-dir", half)
    assert result.returncode != 0
    assert f"go on with --resume {half / 'checkpoint.pt'}" in result.stderr
    assert read(half / "checkpoint.pt")["step"] == 3
    together(tmp_path, 2, "whole", "rest", "--resume", half / "checkpoint.pt")
    assert_same_run(half / "checkpoint.pt", checkpoint)

    script.main(["--resume", str(checkpoint), "--epochs", "2", "--max-steps", "8"])  # from two to one
    assert read(checkpoint)["step"] == 8
    together(
        tmp_path, 2, "whole", "again", "--resume", checkpoint, "--max-steps", "10"
    )  # and from one to two
    assert read(checkpoint)["step"] == 10
    assert len(read(checkpoint)["history"]) == 10


@only("dcgan64_celeba")
def test_batches_that_cannot_be_shared(script, flags, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(script, "connect", lambda device: (0, 3, device))
    fails(script, flags, capsys, "--batch-size", "8", "3 processes")
    assert not (tmp_path / "run").exists()


# ---- fid ---------------------------------------------------------------------------------------------------


def gaussian(size, count, seed):
    """Mean and covariance of correlated rows, and the rows (count, size), in float64."""
    rng = torch.Generator().manual_seed(seed)
    rows = torch.randn(count, size, dtype=torch.float64, generator=rng)
    rows = rows @ torch.randn(size, size, dtype=torch.float64, generator=rng) + torch.arange(size) / size
    return rows.mean(0), torch.cov(rows.T), rows


def test_frechet_distance_in_closed_form():
    """Of one-dimensional Gaussians it is (m1 - m2)^2 + (s1 - s2)^2; of diagonal ones, the sum of these."""
    m1, s1 = torch.tensor([1.0, -2.0, 0.5]).double(), torch.tensor([0.3, 2.0, 1e-3]).double()
    m2, s2 = torch.tensor([-1.5, 0.0, 0.5]).double(), torch.tensor([1.1, 1.9, 4.0]).double()
    for i in (slice(0, 1), slice(1, 2), slice(2, 3), slice(None)):
        expected = ((m1[i] - m2[i]) ** 2 + (s1[i] - s2[i]) ** 2).sum().item()
        distance = fid.frechet_distance(m1[i], torch.diag(s1[i] ** 2), m2[i], torch.diag(s2[i] ** 2))
        assert distance.shape == ()
        assert distance.item() == pytest.approx(expected, rel=1e-9)
    zero = torch.zeros(3, 3).double()  # all images alike
    assert fid.frechet_distance(m1, zero, m2, zero).item() == pytest.approx(((m1 - m2) ** 2).sum().item())
    one_sided = fid.frechet_distance(m1, zero, m2, torch.diag(s2**2)).item()
    assert one_sided == pytest.approx(((m1 - m2) ** 2 + s2**2).sum().item())


@pytest.mark.parametrize("size", [2, 30, 200])
def test_frechet_distance_of_full_covariances(size):
    (m1, s1, _), (m2, s2, _) = gaussian(size, 3 * size, 1), gaussian(size, 4 * size, 2)
    roots = np.sqrt(np.linalg.eigvals(s1.numpy() @ s2.numpy()).astype(complex)).real.sum()
    expected = ((m1 - m2) ** 2).sum() + s1.trace() + s2.trace() - 2 * roots
    distance = fid.frechet_distance(m1, s1, m2, s2)
    assert distance.item() == pytest.approx(expected.item(), rel=1e-8)
    assert fid.frechet_distance(m2, s2, m1, s1).item() == pytest.approx(distance.item(), rel=1e-9)
    rotation, _ = torch.linalg.qr(gaussian(size, size, 3)[2])
    turned = [rotation @ m1, rotation @ s1 @ rotation.T, rotation @ m2, rotation @ s2 @ rotation.T]
    assert fid.frechet_distance(*turned).item() == pytest.approx(distance.item(), rel=1e-8)
    assert fid.frechet_distance(m1, s1, m1, s1).item() <= 1e-9 * s1.trace().item()


def test_frechet_distance_of_singular_covariances():
    """500 rows of 2048 features; tr (S1 S2)^(1/2) is the nuclear norm of X1 X2' / 499, X the centred rows."""
    (m1, s1, x1), (m2, s2, x2) = gaussian(2048, 500, 4), gaussian(2048, 500, 5)
    singular = torch.linalg.svdvals((x1 - m1) @ (x2 - m2).T) / 499
    expected = ((m1 - m2) ** 2).sum() + s1.trace() + s2.trace() - 2 * singular.sum()
    assert fid.frechet_distance(m1, s1, m2, s2).item() == pytest.approx(expected.item(), rel=1e-8)
    assert fid.frechet_distance(m1, s1, m1, s1).item() <= 1e-6 * s1.trace().item()


def test_frechet_distance_of_tiny_variances():
    """From 1 down to 1e-14: rounding makes the small eigenvalues of a product near 1e-16, of any sign."""
    deviations = torch.logspace(0, -7, 40).double()
    rotation, _ = torch.linalg.qr(gaussian(40, 40, 6)[2])
    s1, s2 = (rotation @ torch.diag((scale * deviations) ** 2) @ rotation.T for scale in (1, 2))
    zero = torch.zeros(40).double()
    expected = (deviations**2).sum().item()
    assert fid.frechet_distance(zero, s1, zero, s2).item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("splits", [(100,), (1, 99), (33, 33, 34), (1,) * 100])
def test_moments_of_a_stream(splits):
    rows = gaussian(12, 100, 7)[2] + 1e5  # far from 0: sums of squares would lose ten digits
    moments = fid.Moments(12)
    for part in rows.split(list(splits)):
        moments.add(part)
    assert moments.count == 100
    assert torch.allclose(moments.mean, rows.mean(0), rtol=1e-14)
    assert torch.allclose(moments.covariance(), torch.cov(rows.T), rtol=1e-9, atol=1e-9)


def test_moments_merge():
    rows = gaussian(12, 90, 8)[2]
    whole, first, second = fid.Moments(12), fid.Moments(12), fid.Moments(12)
    whole.add(rows)
    first.add(rows[:20])
    second.add(rows[20:].float())  # what networks give
    first.merge(second)
    assert first.count == whole.count
    assert torch.allclose(first.mean, whole.mean, atol=1e-6)
    assert torch.allclose(first.covariance(), whole.covariance(), atol=1e-4)
    assert first.covariance().dtype == torch.float64


def test_kid_is_the_sum_over_pairs():
    x, y = gaussian(3, 5, 9)[2], gaussian(3, 7, 10)[2]

    def kernel(a, b):
        return (sum(p * q for p, q in zip(a.tolist(), b.tolist())) / 3 + 1) ** 3

    xx = [kernel(x[i], x[j]) for i in range(5) for j in range(5) if i != j]
    yy = [kernel(y[i], y[j]) for i in range(7) for j in range(7) if i != j]
    xy = [kernel(x[i], y[j]) for i in range(5) for j in range(7)]
    expected = sum(xx) / 20 + sum(yy) / 42 - 2 * sum(xy) / 35
    assert fid.squared_mmd(x, y).item() == pytest.approx(expected, rel=1e-12)
    mean, spread = fid.kernel_distance(x.float(), y[:5].float(), subsets=3)  # three times the same, all of it
    assert mean == pytest.approx(fid.squared_mmd(x, y[:5]).item(), rel=1e-5)
    assert spread == pytest.approx(0, abs=1e-9 * abs(mean))


def test_kid_over_subsets():
    """Unbiased: 0 between two halves of one set, within its error; and it finds a set that is shifted."""
    rows = torch.randn(4000, 8, generator=torch.Generator().manual_seed(0))
    mean, spread = fid.kernel_distance(rows[:2000], rows[2000:], subsets=20, size=500)
    assert abs(mean) < 3 * spread
    assert fid.kernel_distance(rows[:2000], rows[2000:], subsets=20, size=500) == (mean, spread)
    far, _ = fid.kernel_distance(rows[:2000], rows[2000:] + 0.5, subsets=20, size=500)
    assert far > 10 * spread


def test_inception_score_of_known_predictors():
    sure = 1e3 * torch.eye(10).repeat(20, 1)  # one-hot, and all classes equally often in each tenth
    mean, spread = fid.inception_score(sure)
    assert mean == pytest.approx(10, rel=1e-9)
    assert spread == pytest.approx(0, abs=1e-9)
    assert fid.inception_score(torch.zeros(200, 10))[0] == pytest.approx(1, rel=1e-12)
    assert fid.inception_score(sure[:1].repeat(200, 1))[0] == pytest.approx(1, rel=1e-9)
    halves = torch.cat([sure[:100], torch.zeros(100, 10)])
    mean, spread = fid.inception_score(halves, splits=2)
    assert (mean, spread) == (pytest.approx(5.5), pytest.approx(4.5))  # 10 and 1
    p = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.1, 0.8]], dtype=torch.float64)
    kl = (p * (p / p.mean(0)).log()).sum(1)
    assert fid.inception_score(p.log() + 3, splits=1)[0] == pytest.approx(kl.mean().exp().item(), rel=1e-12)


def test_class_report():
    logits = torch.full((1000, 10), -50.0)
    predicted = torch.tensor([0] * 500 + [1] * 250 + [2] * 241 + [3] * 9)  # 3 has less than 1%
    logits[torch.arange(1000), predicted] = 50.0
    labels = predicted.clone()
    labels[:100] = 9
    report = fid.class_report(logits, labels)
    shares = np.array([0.5, 0.25, 0.241, 0.009])
    assert report["classes"] == 3
    assert report["entropy"] == pytest.approx(-(shares * np.log10(shares)).sum(), rel=1e-9)
    assert report["confidence"] == pytest.approx(1)
    assert report["class_accuracy"] == pytest.approx(0.9)
    assert fid.class_report(logits)["class_accuracy"] is None
    even = fid.class_report(torch.eye(10).repeat(5, 1))
    assert even["classes"] == 10
    assert even["entropy"] == pytest.approx(1)
    assert even["confidence"] == pytest.approx(math.e / (math.e + 9))


@pytest.fixture(scope="session")
def inception(tmp_path_factory):
    """A file of random weights in the names of the released one; activations stay near 1."""
    network = fid.FIDInception()
    rng = torch.Generator().manual_seed(0)
    for name, weight in network.state_dict().items():
        if weight.ndim == 4:
            weight.normal_(0, math.sqrt(2 / weight[0].numel()), generator=rng)
        elif name.endswith(("bn.weight", "running_var")):
            weight.uniform_(0.5, 1.5, generator=rng)
        elif weight.is_floating_point():
            weight.normal_(0, 0.1, generator=rng)
    path = tmp_path_factory.mktemp("weights") / "w.pth"
    torch.save(network.state_dict(), path)
    return path


def resized(images):
    """Bilinear to 299x299 with pixels as squares, written as two matrices; images (N, C, H, W) in [0, 1]."""

    def matrix(size):
        place = ((torch.arange(299, dtype=torch.float64) + 0.5) * size / 299 - 0.5).clamp(0, size - 1)
        low = place.floor().long().clamp(max=max(size - 2, 0))
        rows = torch.zeros(299, size, dtype=torch.float64)
        rows[torch.arange(299), low] = 1 - (place - low)
        rows[torch.arange(299), (low + 1).clamp(max=size - 1)] += place - low
        return rows

    return matrix(images.shape[2]) @ images.double() @ matrix(images.shape[3]).T


def reference_inception(state, images):
    """Features and logits of the FID Inception for images (N, 3, 299, 299) in [-1, 1]."""

    def conv(x, name, stride=1, padding=0):
        x = nn.functional.conv2d(x, state[f"{name}.conv.weight"], stride=stride, padding=padding)
        bn = [
            state[f"{name}.bn.{part}"][:, None, None]
            for part in ("running_mean", "running_var", "weight", "bias")
        ]
        return ((x - bn[0]) / (bn[1] + 1e-3).sqrt() * bn[2] + bn[3]).clamp(min=0)

    def average(x):  # padding does not count: the sum over the window by the number of pixels in it
        ones = torch.ones(1, 1, 3, 3, dtype=x.dtype)
        total = nn.functional.conv2d(x.flatten(0, 1)[:, None], ones, padding=1).view_as(x)
        return total / nn.functional.conv2d(torch.ones_like(x[:1, :1]), ones, padding=1)

    def largest(x, stride, padding):
        return nn.functional.max_pool2d(x, 3, stride, padding)

    def a(x, n):
        small = conv(conv(x, f"{n}.branch5x5_1"), f"{n}.branch5x5_2", padding=2)
        double = conv(conv(x, f"{n}.branch3x3dbl_1"), f"{n}.branch3x3dbl_2", padding=1)
        double = conv(double, f"{n}.branch3x3dbl_3", padding=1)
        return torch.cat([conv(x, f"{n}.branch1x1"), small, double, conv(average(x), f"{n}.branch_pool")], 1)

    def b(x, n):
        double = conv(conv(x, f"{n}.branch3x3dbl_1"), f"{n}.branch3x3dbl_2", padding=1)
        double = conv(double, f"{n}.branch3x3dbl_3", stride=2)
        return torch.cat([conv(x, f"{n}.branch3x3", stride=2), double, largest(x, 2, 0)], 1)

    def c(x, n):
        wide, tall = (0, 3), (3, 0)
        single = conv(conv(x, f"{n}.branch7x7_1"), f"{n}.branch7x7_2", padding=wide)
        single = conv(single, f"{n}.branch7x7_3", padding=tall)
        double = conv(x, f"{n}.branch7x7dbl_1")
        for i, padding in enumerate((tall, wide, tall, wide), 2):
            double = conv(double, f"{n}.branch7x7dbl_{i}", padding=padding)
        return torch.cat([conv(x, f"{n}.branch1x1"), single, double, conv(average(x), f"{n}.branch_pool")], 1)

    def d(x, n):
        single = conv(conv(x, f"{n}.branch3x3_1"), f"{n}.branch3x3_2", stride=2)
        double = conv(conv(x, f"{n}.branch7x7x3_1"), f"{n}.branch7x7x3_2", padding=(0, 3))
        double = conv(conv(double, f"{n}.branch7x7x3_3", padding=(3, 0)), f"{n}.branch7x7x3_4", stride=2)
        return torch.cat([single, double, largest(x, 2, 0)], 1)

    def e(x, n, pooled):
        single, double = conv(x, f"{n}.branch3x3_1"), conv(x, f"{n}.branch3x3dbl_1")
        double = conv(double, f"{n}.branch3x3dbl_2", padding=1)
        parts = [conv(x, f"{n}.branch1x1")]
        for stem, name in ((single, "branch3x3_2"), (double, "branch3x3dbl_3")):
            parts.append(conv(stem, f"{n}.{name}a", padding=(0, 1)))
            parts.append(conv(stem, f"{n}.{name}b", padding=(1, 0)))
        return torch.cat([*parts, conv(pooled, f"{n}.branch_pool")], 1)

    x = conv(conv(images, "Conv2d_1a_3x3", stride=2), "Conv2d_2a_3x3")
    x = largest(conv(x, "Conv2d_2b_3x3", padding=1), 2, 0)
    x = largest(conv(conv(x, "Conv2d_3b_1x1"), "Conv2d_4a_3x3"), 2, 0)
    x = b(a(a(a(x, "Mixed_5b"), "Mixed_5c"), "Mixed_5d"), "Mixed_6a")
    x = c(c(c(c(x, "Mixed_6b"), "Mixed_6c"), "Mixed_6d"), "Mixed_6e")
    x = d(x, "Mixed_7a")
    x = e(x, "Mixed_7b", average(x))
    x = e(x, "Mixed_7c", largest(x, 1, 1))
    features = x.flatten(2).mean(2)
    return features, features @ state["fc.weight"].T


def test_inception_is_the_fid_network(inception):
    """Every size and both colours, against a forward pass that shares nothing but the weights; in float64."""
    network, _ = fid.load_inception(inception)
    assert not network.training
    state = {name: weight.double() for name, weight in torch.load(inception, weights_only=True).items()}
    rng = torch.Generator().manual_seed(1)
    seen, expected = [], []
    for size in (28, 32, 64, 299):
        for channels in (1, 3):
            images = torch.randint(0, 256, (1, channels, size, size), dtype=torch.uint8, generator=rng)
            seen.append(network.prepare(images))
            expected.append(resized(images.expand(-1, 3, -1, -1) / 255) * 2 - 1)
    seen, expected = torch.cat(seen), torch.cat(expected)
    assert (seen - expected).abs().max() < 1e-5
    with torch.inference_mode():
        outputs = network(seen)
        for output, reference in zip(outputs, reference_inception(state, expected)):
            assert output.dtype == torch.float32
            assert (output - reference).abs().max() < 1e-4 * reference.abs().max()
        low = network.bfloat16()(seen)
    for output, reference in zip(low, outputs):
        assert output.dtype == torch.float32
        assert (output - reference).abs().max() < 0.03 * reference.abs().max()
    assert outputs[0].shape == (8, 2048)
    assert outputs[1].shape == (8, 1008)


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """Two folders with 12 and 15 real digits as PNG; the working folder is tmp_path."""
    monkeypatch.chdir(tmp_path)
    digits = torchvision.datasets.MNIST(ROOT / "data").data
    for name, part in (("a", digits[:12]), ("b", digits[100:115])):
        (tmp_path / name).mkdir()
        for i, digit in enumerate(part):
            Image.fromarray(digit.numpy()).save(tmp_path / name / f"{i}.png")
    return tmp_path


def fid_json(capsys, *argv):
    """The object that fid.py prints for these arguments."""
    capsys.readouterr()
    fid.main([*map(str, argv), "--json", "--device", "cpu"])
    return json.loads(capsys.readouterr().out)


def test_fid_of_two_folders(folders, inception, capsys, monkeypatch):
    """By hand from the network's outputs; and its name, which depends on the weights alone."""
    for path in [*folders.glob("?/[6-9].png"), *folders.glob("?/1?.png")]:
        path.unlink()
    # A score that tells what came in: with one image a part, the real one is 1 whatever the network says.
    monkeypatch.setattr(fid, "inception_score", lambda logits: (logits.sum().item(), 0.0))
    flags = "a", "b", "--weights", inception, "--batch-size", 4, "--metrics", "fid", "kid", "is"
    result = fid_json(capsys, *flags)
    network, weights = fid.load_inception(inception)
    assert result["weights"] == weights == hashlib.sha256(inception.read_bytes()).hexdigest()[:8]
    assert result["images"] == [6, 6]
    assert result["paths"] == ["a", "b"]
    assert result["features"] == "inception"
    outputs = []
    for name in "ab":
        arrays = [np.asarray(Image.open(path)) for path in sorted((folders / name).iterdir())]
        with torch.inference_mode():
            outputs.append(network(network.prepare(torch.from_numpy(np.stack(arrays))[:, None])))
    (x, _), (y, _) = outputs
    x, y = x.double(), y.double()
    expected = fid.frechet_distance(x.mean(0), torch.cov(x.T), y.mean(0), torch.cov(y.T)).item()
    assert result["frechet_distance"] == pytest.approx(expected, rel=1e-4)
    assert result["kid"] == pytest.approx(fid.squared_mmd(x, y).item(), rel=1e-3)
    for score, (_, logits) in zip(result["is"], outputs):
        assert score == pytest.approx(logits.sum().item(), rel=1e-4)
    assert result["is_fid"] is False
    assert "fid" not in result
    fid.show(result)
    out = capsys.readouterr().out
    assert f"Frechet distance: {result['frechet_distance']:.6g}" in out
    assert "FID:" not in out
    assert "not the FID Inception's" in out
    monkeypatch.setattr(
        fid, "RELEASED", weights
    )  # the same figure with the weights that have the right to it
    fid.main(["a", "b", "--weights", str(inception), "--device", "cpu"])
    out, err = capsys.readouterr()
    assert re.fullmatch(r"FID: [\d.]+\n", out)
    assert float(out[5:]) == pytest.approx(expected, rel=1e-4)
    assert "6 images are fewer than the 2048 features" in err
    assert "images/s" in err


@pytest.fixture
def tiny(monkeypatch):
    """A network of twelve features, the mean colours of the quarters, in place of the Inception."""

    class Tiny(fid.FIDInception):
        size = 12

        def __init__(self):
            nn.Module.__init__(self)

        def forward(self, x):
            features = nn.functional.adaptive_avg_pool2d(x, 2).flatten(1)
            return features, features

    monkeypatch.setattr(fid, "load_inception", lambda path: (Tiny(), "cafe0123"))


class Pickled:
    """Leaves a file behind when it is unpickled."""

    def __reduce__(self):
        return Path.touch, (Path("unpickled"),)


def test_fid_statistics_files(folders, tiny, capsys, monkeypatch):
    for name in "ab":
        fid.main(["--save-stats", name, f"{name}.npz", "--device", "cpu"])
    assert "12 images in a.npz" in capsys.readouterr().out
    with np.load("a.npz") as file:
        mu, sigma = file["mu"], file["sigma"]
    assert (mu.shape, mu.dtype, sigma.shape) == ((12,), np.float64, (12, 12))
    direct = fid_json(capsys, "a", "b")
    mixed = fid_json(capsys, "a.npz", "b")
    stored = fid_json(capsys, "a.npz", "b.npz")  # needs no network
    assert mixed["frechet_distance"] == pytest.approx(direct["frechet_distance"], rel=1e-6)
    assert stored["frechet_distance"] == pytest.approx(direct["frechet_distance"], rel=1e-6)
    assert mixed["images"] == [None, 15]
    np.savez("theirs.npz", mu=mu, sigma=sigma)  # as pytorch-fid writes them
    assert fid_json(capsys, "theirs.npz", "b.npz")["frechet_distance"] == stored["frechet_distance"]
    monkeypatch.setattr(fid.FIDInception, "size", 12)
    assert fid_json(capsys, "theirs.npz", "theirs.npz")["fid"] == pytest.approx(0, abs=1e-6 * sigma.trace())
    assert "fid" not in fid_json(capsys, "theirs.npz", "a.npz")  # these name other weights

    np.savez("part.npz", mu=mu)
    np.savez("small.npz", mu=mu[:5], sigma=sigma[:5, :5])
    np.savez("odd.npz", mu=mu, sigma=sigma[:5])
    np.savez("nan.npz", mu=mu * np.nan, sigma=sigma)
    np.savez("objects.npz", mu=np.array([Pickled()], dtype=object), sigma=sigma)
    np.savez("other.npz", mu=mu, sigma=sigma, weights="01234567")
    Path("cut.npz").write_bytes(Path("a.npz").read_bytes()[:-100])
    cases = {
        "part.npz": ("part.npz", "sigma"),
        "small.npz": ("small.npz", "5 features", "12"),
        "odd.npz": ("odd.npz", "(5, 12)"),
        "nan.npz": ("nan.npz", "not finite"),
        "objects.npz": ("objects.npz", "mu and sigma"),
        "other.npz": ("other.npz", "different weights", "01234567"),
        "cut.npz": ("cut.npz", "mu and sigma"),
        "none.npz": ("none.npz", "no such file"),
    }
    for name, words in cases.items():
        fails(fid, [name, "b.npz"], capsys, *words)
    assert not Path("unpickled").exists()
    for name in ("a.npz", "b", "nowhere/c.npz"):
        fails(fid, ["--save-stats", "b", name], capsys, "--save-stats", name)
    fails(fid, ["--save-stats", "a.npz", "c.npz"], capsys, "--save-stats", "a.npz")
    fails(fid, ["a.npz", "b", "--metrics", "fid", "kid"], capsys, "--metrics", "a.npz")


def test_fid_bad_input(folders, inception, capsys, monkeypatch):
    weights = ["--weights", inception, "--device", "cpu"]
    (folders / "empty").mkdir()
    (folders / "one").mkdir()
    shutil.copy("a/0.png", "one")
    fails(fid, ["a", "nowhere", "--device", "nonsense"], capsys, "--device", "nonsense")
    fails(fid, ["nowhere", "a", *weights], capsys, "nowhere")
    fails(fid, ["empty", "a", *weights], capsys, "empty", "0 images")
    fails(fid, ["one", "a", *weights], capsys, "one", "1 images")
    fails(fid, ["a/0.png", "b", *weights], capsys, "a/0.png")
    fails(fid, ["mnist:training", "b", *weights], capsys, "mnist:train")
    fails(fid, ["a"], capsys, "two paths")
    fails(fid, ["a", "b", "--save-stats", "a", "c.npz"], capsys, "--save-stats")
    fails(fid, ["a", "b", "--num-images", "1"], capsys, "--num-images", "2 or more")
    fails(fid, ["a", "b", "--batch-size", "0"], capsys, "--batch-size")
    fails(fid, ["a", "b", "--features", "classifier"], capsys, "--dataset")
    fails(fid, ["mnist", "fashion_mnist", "--features", "classifier"], capsys, "--dataset")
    fails(fid, ["mnist", "b", "--features", "classifier", *weights], capsys, "--weights", "classifier")
    Path("a/bad.png").write_bytes(Path("a/0.png").read_bytes()[:60])
    fails(fid, ["a", "b", *weights], capsys, "a/bad.png", "cannot be read")

    state = torch.load(inception, weights_only=True)
    Path("cut.pth").write_bytes(inception.read_bytes()[:100_000])
    torch.save({name: w for name, w in state.items() if name != "fc.bias"}, "missing.pth")
    torch.save({**state, "AuxLogits.fc.weight": torch.zeros(3)}, "more.pth")
    torch.save({**state, "fc.bias": torch.zeros(1000)}, "classes.pth")
    torch.save({**state, "Mixed_7c.branch1x1.bn.bias": torch.full((320,), math.nan)}, "nan.pth")
    for name, word in {
        "cut.pth": "damaged",
        "missing.pth": "fc.bias",
        "more.pth": "AuxLogits.fc.weight",
        "classes.pth": "fc.bias",
        "none.pth": "No such file",
    }.items():
        fails(fid, ["b", "b", "--weights", name], capsys, name, word)
    fails_late(
        fid, ["b", "b", "--weights", "nan.pth", "--device", "cpu"], capsys, "b: some features are not finite"
    )

    def refuse(*args, **kwargs):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    monkeypatch.setattr(torch.hub, "urlopen", refuse)
    monkeypatch.setattr(torch.hub, "_hub_dir", str(folders / "hub"))
    words = (
        fid.RELEASE,
        fid.WEIGHTS,
        folders / "hub" / "checkpoints",
        "--weights FILE",
        "--features classifier",
    )
    fails(fid, ["a", "b"], capsys, *words)
    fails(fid, ["a", "nowhere"], capsys, "nowhere")  # before the weights
    fails(
        fid,
        ["mnist:test", "nowhere", "--features", "classifier", "--data-dir", ROOT / "data"],
        capsys,
        "nowhere",
    )
    assert not Path("data").exists()  # nothing was trained


def test_fid_weights_are_fetched_and_checked(folders, inception, capsys, monkeypatch):
    """From a folder in place of the release: a file with another hash is refused, the right one is kept."""
    monkeypatch.setattr(torch.hub, "_hub_dir", str(folders / "hub"))
    (folders / "release").mkdir()
    shutil.copy(inception, folders / "release" / fid.WEIGHTS)
    monkeypatch.setattr(fid, "RELEASE", (folders / "release").as_uri() + "/")
    kept = folders / "hub" / "checkpoints" / fid.WEIGHTS
    fails_late(fid, ["a", "b", "--device", "cpu"], capsys, "--weights", "invalid hash")
    assert not kept.exists()
    weights = hashlib.sha256(inception.read_bytes()).hexdigest()[:8]
    monkeypatch.setattr(fid, "RELEASED", weights)
    assert fid.load_inception(None)[1] == weights
    shutil.rmtree(folders / "release")
    assert fid.load_inception(None)[1] == weights  # from the disk
    assert kept.read_bytes() == inception.read_bytes()


def test_fid_prepares_one_batch_ahead():
    made, free = [], threading.Semaphore(2)

    def source():
        for i in range(5):
            assert free.acquire(timeout=60)
            made.append(i)
            yield i
        raise SystemExit(2)

    items = fid.ahead(source())
    assert next(items) == 0
    end = time.monotonic() + 60
    while len(made) < 2 and time.monotonic() < end:
        time.sleep(0.001)
    assert made == [0, 1]  # the next is made while this one is in use
    free.release(5)
    rest = []
    with pytest.raises(SystemExit):  # what ends the source ends the caller
        rest.extend(items)
    assert rest == [1, 2, 3, 4]


def test_fid_reads_any_folder(folders, tiny, capsys):
    """Other names, nesting, modes and a mixture of sizes make no difference to what is measured."""
    for i, path in enumerate(sorted((folders / "b").iterdir())):
        folder = folders / "c" / str(i % 4) / "deep"
        folder.mkdir(parents=True, exist_ok=True)
        digit = Image.open(path)
        if i % 3 == 0:
            digit = digit.convert("RGBA")
        elif i % 3 == 1:
            digit = digit.quantize(256)
        digit.save(folder / f"{100 - i}.png")
    assert fid_json(capsys, "b", "c")["frechet_distance"] < 1e-9
    Image.new("RGB", (50, 20), "red").save("b/wide.png")
    Image.new("RGBA", (20, 50), (255, 0, 0, 255)).save("c/wide.webp", lossless=True)
    Image.new("RGB", (50, 20), "red").save("c/wide.png")
    Image.new("RGB", (20, 50), (255, 0, 0)).save("b/tall.png")
    result = fid_json(capsys, "b", "c", "--batch-size", "4")
    assert result["images"] == [17, 17]
    assert result["frechet_distance"] < 1e-9
    few = fid_json(capsys, "a", "b", "--num-images", "6")
    assert few["images"] == [6, 6]


def test_fid_classifier(folders, small_data, capsys):
    """A data set by name and the same images in class folders; trained once; and all that it reports."""
    digits = torchvision.datasets.MNIST(small_data)
    for i, (image, label) in enumerate(digits):
        (folders / "classes" / str(label)).mkdir(parents=True, exist_ok=True)
        image.save(folders / "classes" / str(label) / f"{i}.png")
    args = types.SimpleNamespace(data_dir=small_data, num_images=40)  # images keep their labels when shuffled
    files, labels = fid.open_images("classes", args)
    assert [file.parent.name for file in files] == [str(label) for label in labels.tolist()]
    label_of = {np.asarray(image).tobytes(): label for image, label in digits}
    images, labels = fid.open_images("mnist", args)
    assert [label_of[image.numpy().tobytes()] for image in images] == labels.tolist()
    assert len(files) == len(images) == 40
    flags = "--features", "classifier", "--data-dir", small_data
    result = fid_json(capsys, "mnist", "classes", *flags)
    assert "fid" not in result
    assert 0 <= result["frechet_distance"] < 1e-4
    assert result["images"] == [48, 48]
    assert result["features"] == "mnist classifier"
    for name in ("classes", "entropy", "confidence", "class_accuracy"):
        assert result[name][0] == pytest.approx(result[name][1], rel=1e-4)
    (cache,) = Path("data", "cache").iterdir()
    assert result["weights"] == hashlib.sha256(cache.read_bytes()).hexdigest()[:8]

    made = cache.stat().st_mtime_ns
    fid.main(["mnist", "classes", *map(str, flags), "--device", "cpu"])
    out, err = capsys.readouterr()
    assert "of 10 classes" in out
    assert "class accuracy" in out
    assert "not the FID Inception's" in out
    assert "training" not in err  # only the first time
    assert fid_json(capsys, "mnist", "classes", *flags) == result
    report = fid_json(
        capsys, "mnist:test", "b", *flags, "--dataset", "mnist", "--metrics", "fid", "kid", "is"
    )
    assert cache.stat().st_mtime_ns == made
    assert list(Path("data", "cache").iterdir()) == [cache]
    assert report["confidence"][0] != result["confidence"][0]  # other images: the test set
    assert report["class_accuracy"][1] is None  # no class folders
    assert report["frechet_distance"] > 0
    assert {"kid", "kid_std", "is", "is_std"} <= report.keys()


def test_fid_classifier_learns():
    """A quarter of an epoch of the real data is enough for 95%."""
    train, test = (torchvision.datasets.MNIST(ROOT / "data", train=train) for train in (True, False))
    network = fid.Classifier()
    fid.train_classifier(network, train.data[:15_000, None], train.targets[:15_000], epochs=1)
    assert not network.training
    with torch.inference_mode():
        features, logits = network(network.prepare(test.data[:2000, None]))
    assert features.shape == (2000, 128)
    assert (logits.argmax(1) == test.targets[:2000]).double().mean() > 0.95
    same = fid.Classifier()
    fid.train_classifier(same, train.data[:256, None], train.targets[:256], epochs=1)
    again = fid.Classifier()
    fid.train_classifier(again, train.data[:256, None], train.targets[:256], epochs=1)
    assert all(torch.equal(a, b) for a, b in zip(same.parameters(), again.parameters()))


def test_fid_classifier_sizes():
    network = fid.Classifier()
    digits = torchvision.datasets.MNIST(ROOT / "data").data[:8, None]
    plain = network.prepare(digits)
    assert torch.equal(plain, digits / 255)
    assert torch.allclose(network.prepare(digits.expand(-1, 3, -1, -1)), plain)
    assert torch.equal(network.prepare(nn.functional.pad(digits, [2] * 4)), plain)
    large = torchvision.transforms.functional.resize(digits, [64, 64], antialias=True)
    assert network.prepare(large).shape == (8, 1, 28, 28)
    assert (network.prepare(large) - plain).abs().mean() < 0.05


# ---- benchmark ---------------------------------------------------------------------------------------------


def test_benchmark_counts_flops():
    """Of vanilla_gan, by hand: a layer counts once forward, and once for each gradient that is wanted."""
    g, d = 100 * 256 + 256 * 512 + 512 * 1024 + 1024 * 784, 784 * 512 + 512 * 256 + 256
    forward = 2 * g + 3 * d  # fakes for D, fakes for G; D on real images, and on both fakes
    d_step = 2 * d + 2 * (
        d - 784 * 512
    )  # of weights, of inputs; twice, for real and fake; no image's gradient
    g_step = d + 2 * g - 100 * 256  # through D to the images alone; no gradient of z
    step, _ = benchmark.ours("vanilla_gan", torch.device("cpu"), "fp32")
    with benchmark.FLOPs() as count:
        step()
    assert count.total == 128 * 2 * (forward + d_step + g_step)


@pytest.mark.parametrize("name", SCRIPTS)
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
    for loop in (
        benchmark.tutorial(name, torch.device("cpu"), tmp_path),
        *(benchmark.ours(name, torch.device("cpu"), precision)[0] for precision in ("fp32", "bf16")),
    ):
        loop()
    assert len(players) == 3
    for player in players:
        assert all(torch.equal(a, b) for a, b in zip(player.first, players[0].first))
        still = [torch.equal(a, b) for a, b in zip(player.first, player.weights)]
        assert sum(still) <= (name == "wgan_gp")  # the last bias of its critic, which cancels


def test_benchmark_products():
    """Both are the same product of matrices."""
    product, convolution = (job() for job in benchmark.products(torch.device("cpu")).values())
    assert product.shape == (2048, 2048)
    assert torch.allclose(convolution.view(2048, 2048), product, atol=1e-2)


def test_benchmark_quick(capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    benchmark.main(["--quick", "--script", "vanilla_gan", "--device", "cpu", "--markdown"])
    head, *rows = capsys.readouterr().out.splitlines()
    assert head.count("GFLOP/s") == 2
    names, _, values = ([cell.strip() for cell in row.strip("|").split("|")] for row in rows)
    row = dict(zip(names, values))
    assert row["script"] == "vanilla_gan.py"
    assert row["GFLOP"] == "0.0187"
    rate = max(float(text.split()[-1].replace(",", "")) for text in head.split(" GFLOP/s")[:-1])
    share = float(row["images/s fp32"].replace(",", "")) * float(row["GFLOP"]) / rate
    assert float(row["of matmul"].strip("%")) == pytest.approx(100 * share, rel=0.02, abs=0.6)
    assert 0.1 < float(row["memory"].split()[0]) < 5
    for column in ("images/s fp32", "images/s bf16", "tutorial fp32", "tutorial bf16"):
        assert float(row[column].replace(",", "")) > 0
    assert benchmark.table([{"a": "1"}, {"a": "22", "b": "3"}], False) == "a   b\n1\n22  3"


# ---- claims ------------------------------------------------------------------------------------------------


@pytest.fixture
def bench(small_data, tmp_path, monkeypatch):
    """A working folder with the small data set, and one thread, as claims.py trains."""
    shutil.copytree(small_data, tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield tmp_path
    torch.set_num_threads(threads)


@pytest.mark.parametrize("name", ["vanilla_gan", "cgan", "dcgan32_wgan_sn"])
def test_claims_follow_a_run(name, bench, capsys, monkeypatch):
    """The run is that of the script's main, and its figures are those of --generate and fid.py."""
    flags = f"--dataset mnist --batch-size {BATCH}"
    setting = claims.Setting("short", name, (3, 8), flags)
    rows = claims.follow(setting, 43, Path("followed"), 130, "cpu")
    assert [(row["step"], row["images"]) for row in rows] == [(3, 3 * BATCH), (8, 8 * BATCH)]
    assert 0 < rows[0]["seconds"] < rows[1]["seconds"] < 60
    followed = setting.folder(Path("followed"), 43)
    script = importlib.import_module(name)
    argv = [*flags.split(), "--seed", "43", "--device", "cpu"]
    script.main([*argv, "--max-steps", "8", "--out-dir", "whole"])
    assert_same_run(followed / "checkpoint.pt", "whole/checkpoint.pt")
    metrics = read("whole/checkpoint.pt")["history"].mean(0).tolist()
    for metric, mean in zip(script.METRICS, metrics):
        assert rows[1][metric] == pytest.approx(mean) or metric == "diversity"
    assert Image.open(claims.picture(followed, 8)).size[0] == 8 * (SIZES.get(name, 28) + 2) + 2

    script.main(["--generate", "130", "--checkpoint", "whole/checkpoint.pt", "--out-dir", "images"])
    result = fid_json(capsys, "mnist:test", "images", "--features", "classifier", "--device", "cpu")
    assert rows[1]["distance"] == pytest.approx(result["frechet_distance"], rel=1e-6)
    for figure in ("classes", "entropy", "confidence", "class_accuracy"):
        assert rows[1][figure] == pytest.approx(result[figure][1]), figure
    assert (rows[1]["class_accuracy"] is None) == (name != "cgan")
    pngs = sorted(Path("images").rglob("*.png"))
    fakes, real = (
        torch.stack([torch.from_numpy(np.array(Image.open(path).convert("L"))) for path in pngs]).double(),
        torchvision.datasets.MNIST("data", train=False).data.double(),
    )
    edge = 2 if name == "dcgan32_wgan_sn" else 0
    fakes = fakes[:, edge : 28 + edge, edge : 28 + edge].flatten(1)
    diversity = (torch.pdist(fakes).square().mean() / torch.pdist(real.flatten(1)).square().mean()).sqrt()
    assert rows[1]["diversity"] == pytest.approx(diversity.item(), rel=0.02)  # pdist: two different images

    # What was measured is not trained again, a shorter run is a part of it, and there is no way back.
    monkeypatch.setattr(script, "main", None)
    assert claims.follow(setting, 43, Path("followed"), 130, "cpu") == rows
    assert claims.follow(setting.until(3), 43, Path("followed"), 130, "cpu") == rows[:1]
    with pytest.raises(RuntimeError, match="beyond step 5"):
        claims.follow(claims.replace(setting, points=(3, 5)), 43, Path("followed"), 130, "cpu")


def test_claims_measure_64x64_samples_against_images_made_64x64(bench):
    images = torchvision.datasets.MNIST("data", train=False).data[:, None]
    judge = claims.Judge("mnist", 64, "cpu")
    row = judge(torchvision.transforms.Resize(64)(images), None)
    assert row["distance"] == pytest.approx(0, abs=1e-6)
    assert row["diversity"] == pytest.approx(1)


def test_claims_change_scripts_from_outside(bench):
    flags = f"--dataset mnist --batch-size {BATCH} --lr-g 1e-12"
    for change, std in ((None, 0.02), (claims.pytorch_init, 0.1 / math.sqrt(3))):  # U(-0.1, 0.1)
        setting = claims.Setting("init", "dcgan_mnist", (1,), flags, change)
        claims.follow(setting, 42, Path("runs"), 130, "cpu")
        weights = read(setting.folder(Path("runs"), 42) / "checkpoint.pt")["generator"]["layers.0.weight"]
        assert weights.std() == pytest.approx(std, rel=0.01)
    with claims.batch_norm_in_critic(wgan_gp):
        norms = [layer for layer in wgan_gp.Critic().layers if isinstance(layer, nn.BatchNorm2d)]
        assert wgan_gp.Critic()(torch.zeros(2, 1, 28, 28)).shape == (2, 1)
    assert [norm.num_features for norm in norms] == [128]
    assert not any(isinstance(layer, nn.BatchNorm2d) for layer in wgan_gp.Critic().layers)


def test_claims_show_a_run_that_blows_up(bench):
    setting = claims.Setting("hot", "vanilla_gan", (4, 8), f"--batch-size {BATCH} --lr-g 1e30 --lr-d 1e30")
    (row,) = claims.follow(setting, 42, Path("runs"), 130, "cpu")
    assert row["step"] == 4
    assert math.isnan(row["distance"])
    claim = claims.Claim("It blows up", (setting,))
    rows = [{"setting": setting.command, "seed": 42} | row]
    assert "not finite in 1 of 1" in claims.table(claim, rows)
    claims.plot(claim, rows, Path("runs"), Path("plot.png"))
    claims.write_rows(Path("rows.csv"), rows)
    (again,) = claims.read_rows(Path("rows.csv"))
    assert math.isnan(again.pop("distance"))
    assert again["step"] == 4


def test_claims_arithmetic():
    assert claims.rank_correlation([1, 2, 3], [10, 20, 21]) == pytest.approx(1)
    assert claims.rank_correlation([1, 2, 3], [5, 4, -1]) == pytest.approx(-1)
    # 1 - 6 sum(d^2) / (n (n^2 - 1)), with ranks 1 2 3 4 5 and 1 2 3 5 4
    assert claims.rank_correlation([1, 2, 3, 4, 5], [5, 6, 7, 9, 8]) == pytest.approx(0.9)
    assert claims.spread([3.0, 1.0, 2.25]) == "2.250 (1.000 to 3.000)"
    assert claims.spread([300.0, 100.0, 200.0]) == "200.0 (100.0 to 300.0)"
    assert claims.spread([10, 9, 10], ".0f") == "10 (9 to 10)"
    assert claims.spread([0.5, 0.5, 0.5]) == "0.500"
    runs = [
        [
            {"step": 10 * i, "seconds": 60.0 * i, "distance": d, "d_loss": d / 10}
            for i, d in enumerate(distances, 1)
        ]
        for distances in (
            [9.0, 5.0, 4.0, 4.0, 2.0, 4.0],
            [9.0, 6.0, 6.0, 6.0, 6.0, 6.0],
            [1.0, 3.0, 4.0, 5.0, 7.0, 5.0],
        )
    ]
    assert claims.column("steps", runs) == "60"
    assert claims.column("minutes", runs) == "6.0"
    assert claims.column("distance", runs) == "5.000 (4.000 to 6.000)"
    assert claims.column("range of d_loss", runs) == "0.100 to 0.900"
    assert claims.column("spread over seeds", runs) == "40%"  # (6 - 4) / 5
    # (5 - 2) / 4, (6 - 6) / 6, (7 - 3) / 5
    assert claims.column("spread over the last five", runs) == "75% (0% to 80%)"
    assert claims.column("largest rise", runs) == "100% (0% to 200%)"  # 2 to 4, none, 1 to 3
    for i, run in enumerate(runs):
        for row in run:
            row["wasserstein"] = (1, -1, 2)[i] * row["step"]
    # Two points each: 9, 5 falls and 10, 20 rises; 9, 6 falls and -10, -20, too; both rise.
    assert claims.column("rank correlation", [run[:2] for run in runs]) == "1.000 (-1.000 to 1.000)"


def test_claims_can_be_run():
    """All flags are understood, all columns exist, and settings that share a run agree about its steps."""
    points = {}
    for claim in claims.CLAIMS.values():
        assert len({setting.label for setting in claim.settings}) == len(claim.settings)
        for setting in claim.settings:
            assert list(setting.points) == sorted({*setting.points})
            assert setting.args.max_steps is None or setting.points[-1] <= setting.args.max_steps
            points.setdefault(setting.folder(Path(), 0), []).append(setting)
            metrics = importlib.import_module(setting.script).METRICS
            figures = {"classes", "entropy", "confidence", "class_accuracy", "diversity", *metrics}
            known = {f"range of {metric}" for metric in metrics} | {"rank correlation"} | figures
            assert {*claim.columns} <= known | {
                "spread over seeds",
                "spread over the last five",
                "largest rise",
            }
    for settings in points.values():
        longest = max((setting.points for setting in settings), key=len)
        for setting in settings:
            assert setting.points == longest[: len(setting.points)]
            assert (setting.command, setting.change) == (settings[0].command, settings[0].change)


@pytest.mark.parametrize("jobs", [1, 2])
def test_claims_quick(jobs, bench, monkeypatch, capsys):
    flags = f"--batch-size {BATCH}"
    long = claims.Setting("long", "vanilla_gan", (300, 1200), flags)
    short, other = long.until(300, "short"), claims.replace(long, label="other", flags=f"{flags} --lr-g 1e-3")
    trial = {"vanilla_gan": claims.Claim("One", (short,)), "two": claims.Claim("Two", (short, long, other))}
    monkeypatch.setattr(claims, "CLAIMS", trial)
    monkeypatch.setattr(claims, "SAMPLES", 1300)
    claims.main(["vanilla_gan", "two", "--quick", "--device", "cpu", "--jobs", str(jobs)])
    out = capsys.readouterr().out
    assert [
        line.split(" |")[0] for line in out.splitlines() if line.startswith("| ") and "---" not in line
    ] == ["| setting", "| short", "| setting", "| short", "| long", "| other"]
    rows = claims.read_rows(Path("runs/quick/two.csv"))
    assert [(row["setting"], row["seed"], row["step"]) for row in rows] == [
        (setting.command, 42, step) for setting in (long, other) for step in (3, 12)
    ]
    assert all(row["distance"] > 0 and row["class_accuracy"] is None for row in rows)
    assert [row["step"] for row in claims.read_rows(Path("runs/quick/vanilla_gan.csv"))] == [3]
    assert Image.open("runs/quick/claim_two.png").size[0] > 700
    curves = long.folder(Path("runs/quick"), 42) / "losses.png"
    assert Path("runs/quick/claim_vanilla_gan_losses.png").read_bytes() == curves.read_bytes()
    # What the plot shows: a line for each setting, with its points.
    figures, claim = [], claims.shortened(trial["two"])
    with monkeypatch.context() as patch:
        patch.setattr(claims.Figure, "savefig", lambda figure, path: figures.append(figure))
        for curve in ("distance", "d_fake"):
            claims.plot(claims.replace(claim, curve=curve), rows, Path("runs/quick"), None)
    for figure, curve, scale, label in (
        (figures[0], "distance", "log", "distance to the test set"),
        (figures[1], "d_fake", "linear", "D(fake)"),
    ):
        axes = figure.axes[0]
        assert (axes.get_yscale(), axes.get_ylabel(), axes.get_xlabel()) == (scale, label, "step")
        y = [row[curve] for row in rows]
        assert [list(line.get_ydata()) for line in axes.lines] == [y[:1], y[:2], y[2:]]
    # The same table from the file alone.
    monkeypatch.setattr(claims, "TABLES", Path("runs/quick"))
    monkeypatch.setattr(claims, "CLAIMS", {name: claims.shortened(claim) for name, claim in trial.items()})
    claims.main(["--table"])
    assert capsys.readouterr().out == out


def test_claims_train_shared_runs_once(bench):
    """Each seed as far as a claim that asks for it goes, and each claim gets its own part."""
    long = claims.Setting("long", "vanilla_gan", (2, 3, 5), f"--batch-size {BATCH}")
    trial = {
        "short": claims.Claim("Short", (long.until(3),), seeds=(42, 43)),
        "long": claims.Claim("Long", (long, long.until(2, "start")), seeds=(43,)),
    }
    tables = claims.train_all(trial, Path("runs"), 130, "cpu", 1)
    steps = {name: [(row["seed"], row["step"]) for row in rows] for name, rows in tables.items()}
    assert steps == {"short": [(42, 2), (42, 3), (43, 2), (43, 3)], "long": [(43, 2), (43, 3), (43, 5)]}
    for seed, step in ((42, 3), (43, 5)):
        assert read(long.folder(Path("runs"), seed) / "checkpoint.pt")["step"] == step


def test_claims_can_be_stopped(bench, monkeypatch, capsys):
    """Ctrl-C inside a run ends the program as it ends a script, and the same command goes on."""
    setting = claims.Setting("run", "vanilla_gan", (300, 600), f"--batch-size {BATCH}")
    monkeypatch.setattr(claims, "CLAIMS", {"one": claims.Claim("One", (setting,))})
    argv = ["one", "--quick", "--device", "cpu", "--jobs", "1"]
    with monkeypatch.context() as patch:
        interrupt(patch, vanilla_gan, signal.SIGINT, 5)
        with pytest.raises(SystemExit) as exit_:
            claims.main(argv)
    assert exit_.value.code == 130
    assert "the same command goes on" in capsys.readouterr().err
    followed = setting.folder(Path("runs/quick"), 42) / "checkpoint.pt"
    assert read(followed)["step"] == 5
    claims.main(argv)
    flags = [*setting.flags.split(), "--seed", "42", "--device", "cpu"]
    vanilla_gan.main([*flags, "--max-steps", "6", "--out-dir", "whole"])
    assert_same_run(followed, "whole/checkpoint.pt")


# claims.py with two runs that would take hours, and two workers.
ENDLESS = f"""
import claims
flags = "--batch-size {BATCH} --epochs 1000000"
rates = "--lr-g 1e-3", "--lr-g 1e-4"
settings = tuple(claims.Setting(rate, "vanilla_gan", (2000000,), f"{{flags}} {{rate}}") for rate in rates)
claims.CLAIMS = {{"one": claims.Claim("One", settings)}}
claims.main(["one", "--quick", "--device", "cpu", "--jobs", "2"])
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_claims_stop_their_workers(number, bench):
    """A signal to the program alone, as kill sends it: its runs are saved, and no process is left."""
    started = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"  # see SLOW
    with subprocess.Popen(
        [sys.executable, "-c", started + ENDLESS],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            while len(runs := {path.parents[1] for path in Path("runs").glob("*/*/*/samples/*.png")}) < 2:
                assert process.poll() is None, process.communicate()
                time.sleep(0.05)
            process.send_signal(number)
            # The workers hold these pipes open, too: this ends when the last of them has ended.
            _, errors = process.communicate(timeout=60)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 128 + number
    assert "claims.py: stopped; the same command goes on\n" in errors
    for run in runs:
        assert 0 < read(run / "checkpoint.pt")["step"] < 2_000_000


def test_claims_list(capsys):
    claims.main(["--list"])
    out = capsys.readouterr().out
    for name, claim in claims.CLAIMS.items():
        assert f"{name}: {claim.text}\n" in out
    assert (
        "as PyTorch initialises: python dcgan_mnist.py --precision bf16 (pytorch_init), 2,340 steps\n" in out
    )
    for argv in ([], ["no-such-claim"]):
        with pytest.raises(SystemExit) as exit_:
            claims.main(argv)
        assert exit_.value.code == 2
    assert "lr-collapse" in capsys.readouterr().err


def test_results_are_those_of_the_tables():
    """RESULTS.md shows what claims.py makes of results/, and each claim there was measured as it is now."""
    text = (ROOT / "RESULTS.md").read_text()
    names = sorted(path.stem for path in (ROOT / "results").glob("*.csv"))
    assert sorted(re.findall("<!-- (.+) -->", text)) == names
    for name, claim in claims.CLAIMS.items():
        if name not in names:
            assert f"`{name}`" in text, "it is said to be measured still"
        elif name not in SCRIPTS:
            assert f"\n### {name}\n" in text
            assert f"| {claim.text} |" in text
    for name in names:
        claim, rows = claims.CLAIMS[name], claims.read_rows(ROOT / "results" / f"{name}.csv")
        assert claims.table(claim, rows) in text, name
        assert f"(assets/claim_{name}.png)" in text
        assert Image.open(ROOT / "assets" / f"claim_{name}.png").size[0] > 700
        if name in SCRIPTS:
            assert f"(assets/claim_{name}_losses.png)" in text
            assert (ROOT / "assets" / f"claim_{name}_losses.png").is_file()
        for setting in claim.settings:
            runs = claims.runs_of(setting, rows)
            assert [run[0]["seed"] for run in runs] == list(claim.seeds)
            for run in runs:
                steps = tuple(row["step"] for row in run)
                assert steps == setting.points or math.isnan(run[-1]["distance"])
