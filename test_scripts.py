"""Every script for a few steps, and the mathematics behind each against independent values.

Runs on a CPU, without network, on the MNIST in data/. A new script joins by adding its name to SCRIPTS; what
is special to it has a section of its own below.
"""

import ast
import csv
import hashlib
import importlib
import json
import math
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import time
import types
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import torch
import torchvision
from PIL import Image
from torch import nn

import dcgan_mnist

ROOT = Path(__file__).parent
SCRIPTS = ["dcgan_mnist"]
NEEDS_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and finds none")
BATCH = 16  # the batch size of the short runs: 96 images make epochs of 6 steps


# ---- Helpers -----------------------------------------------------------------------------------------------


@pytest.fixture(params=SCRIPTS)
def script(request):
    """Each script in turn, as a module."""
    return importlib.import_module(request.param)


@pytest.fixture(scope="session")
def small_data(tmp_path_factory):
    """A data folder in MNIST's layout that holds the first 96 real training images."""
    folder = tmp_path_factory.mktemp("data")
    raw = folder / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for part in ("train", "t10k"):
        images = (ROOT / f"data/MNIST/raw/{part}-images-idx3-ubyte").read_bytes()
        labels = (ROOT / f"data/MNIST/raw/{part}-labels-idx1-ubyte").read_bytes()
        header = struct.pack(">IIII", 2051, 96, 28, 28)
        (raw / f"{part}-images-idx3-ubyte").write_bytes(header + images[16 : 16 + 96 * 784])
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(struct.pack(">II", 2049, 96) + labels[8 : 8 + 96])
    return folder


@pytest.fixture
def flags(small_data, tmp_path):
    """The flags of a short run of two epochs, six steps each, into tmp_path/run."""
    small = ["--data-dir", str(small_data), "--batch-size", str(BATCH), "--device", "cpu"]
    return [*small, "--epochs", "2", "--out-dir", str(tmp_path / "run")]


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
    for name in SCRIPTS:
        parts = plumbing((ROOT / f"{name}.py").read_text())
        assert {"Run", "load_checkpoint", "sample"} <= set(parts)
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
    sizes = {
        "samples/epoch_0002.png": (242, 242),
        "interpolation.png": (302, 242),
        "progress.gif": (242, 242),
    }
    for name, size in sizes.items():
        with Image.open(run / name) as image:
            image.load()
            assert image.size == size
            assert image.convert("L").getextrema()[0] < image.convert("L").getextrema()[1]
    assert Image.open(run / "progress.gif").n_frames == 2
    assert Image.open(run / "losses.png").width == 800

    config = json.loads((run / "config.json").read_text())
    assert config["epochs"] == 2
    assert config["seed"] == 42
    assert config["batch_size"] == BATCH
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

    def train_step(generator, discriminator, optimizer_g, optimizer_d, real, *rest):
        assert real.dtype == torch.float32
        assert real.min() == -1
        assert real.max() == 1
        seen.append(((real + 1) * 127.5).round().to(torch.uint8))
        return original(generator, discriminator, optimizer_g, optimizer_d, real, *rest)

    monkeypatch.setattr(script, "train_step", train_step)
    script.main([*flags, "--batch-size", "10"])  # 96 = 9 * 10 + 6: the short batch is dropped
    assert [len(batch) for batch in seen] == [10] * 18
    truth = [image.numpy().tobytes() for image in script.load_images("mnist", small_data)]
    first, second = (
        [image.numpy().tobytes() for batch in seen[i : i + 9] for image in batch] for i in (0, 9)
    )
    for epoch in (first, second):
        assert len(set(epoch)) == 90
        assert set(epoch) <= set(truth)
    assert first != second
    positions = [truth.index(image) for image in first]
    assert positions != sorted(positions)


def test_noise_is_fresh_at_every_step(script, flags, monkeypatch):
    seeds, original = [], script.train_step

    def train_step(*args):
        seeds.extend(arg.initial_seed() for arg in args if isinstance(arg, torch.Generator))
        return original(*args)

    monkeypatch.setattr(script, "train_step", train_step)
    script.main(flags)
    assert len(set(seeds)) == 12


def test_the_grid_shows_the_same_noise_each_epoch(script, flags, monkeypatch):
    seen, original = [], script.sample

    def sample(generator, z):
        seen.append(z.clone())
        return original(generator, z)

    monkeypatch.setattr(script, "sample", sample)
    script.main(flags)
    assert torch.equal(seen[0], seen[2])  # the grids; 1 and 3 are the interpolations
    assert len(seen[0]) == 64
    walk = seen[1].view(8, 10, -1)
    assert torch.allclose(walk[:, 0], seen[0][0:16:2], atol=1e-6)
    assert torch.allclose(walk[:, -1], seen[0][1:16:2], atol=1e-6)
    norms = walk.norm(dim=2)
    assert norms.min() > 0.75 * math.sqrt(walk.shape[2])  # nowhere near the small norms of a straight line


def test_sampling_is_per_image_and_leaves_the_generator_alone(script):
    torch.manual_seed(0)
    generator = script.Generator().apply(script.init_weights)
    before = {name: value.clone() for name, value in generator.state_dict().items()}
    z = torch.randn(300, 100)
    images = script.sample(generator, z)
    assert generator.training
    assert_same_bits(before, dict(generator.state_dict()))
    assert images.dtype == torch.uint8
    assert len(images) == 300
    alone = script.sample(generator, z[290:291])
    assert (images[290].int() - alone[0].int()).abs().max() <= 1  # a grey level, by rounding


def test_seeds_decide_everything(script, flags, tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        script.main([*flags, "--max-steps", "3", "--out-dir", str(tmp_path / name), "--seed", str(seed)])
    assert_same_run(tmp_path / "a/checkpoint.pt", tmp_path / "b/checkpoint.pt")
    weights = [read(tmp_path / name / "checkpoint.pt")["generator"]["layers.0.weight"] for name in "ac"]
    assert not torch.equal(*weights)


def test_bf16_keeps_weights_and_losses_in_fp32(script, flags, tmp_path):
    script.main([*flags, "--precision", "bf16"])
    checkpoint = read(tmp_path / "run" / "checkpoint.pt")
    assert all(v.dtype == torch.float32 for v in checkpoint["generator"].values() if v.is_floating_point())
    assert checkpoint["history"].dtype == torch.float32
    script.main([*flags, "--out-dir", str(tmp_path / "fp32")])
    other = read(tmp_path / "fp32" / "checkpoint.pt")
    assert not torch.equal(checkpoint["history"], other["history"])  # so bf16 was used at all
    assert torch.allclose(checkpoint["history"], other["history"], atol=0.3)


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


def test_the_file_alone_in_an_empty_folder_runs(script, small_data, tmp_path):
    shutil.copy(script.__file__, tmp_path)
    name = f"{script.SCRIPT}.py"
    command = [
        sys.executable,
        name,
        "--epochs",
        "1",
        "--data-dir",
        str(small_data),
        "--batch-size",
        str(BATCH),
    ]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert "images/s" in result.stderr
    folder = tmp_path / "runs" / script.SCRIPT
    assert (folder / "001" / "samples" / "epoch_0001.png").is_file()
    assert [path.name for path in folder.iterdir()] == ["001"]


def test_each_run_takes_the_next_free_folder(script, small_data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        script.main(["--data-dir", str(small_data), "--batch-size", "32", "--epochs", "1", "--device", "cpu"])
    assert sorted(path.name for path in (tmp_path / "runs" / script.SCRIPT).iterdir()) == ["001", "002"]


# ---- Generating --------------------------------------------------------------------------------------------


def test_generate(script, flags, tmp_path, capsys):
    script.main(flags)
    checkpoint = tmp_path / "run" / "checkpoint.pt"
    before = snapshot(tmp_path)
    script.main(["--generate", "300", "--checkpoint", str(checkpoint)])
    folder = tmp_path / "run" / "generated" / "001"
    assert str(folder) in capsys.readouterr().out
    files = sorted(folder.iterdir())
    assert [path.name for path in files] == [f"{i:05d}.png" for i in range(300)]
    images = [Image.open(path) for path in files]
    assert {(image.size, image.mode) for image in images} == {((28, 28), "L")}
    assert len({image.tobytes() for image in images}) == 300

    script.main(
        ["--generate", "300", "--checkpoint", str(checkpoint)]
    )  # the same seed: the same images again
    same = sorted((tmp_path / "run" / "generated" / "002").iterdir())
    assert [path.read_bytes() for path in files] == [path.read_bytes() for path in same]
    script.main(
        [
            "--generate",
            "300",
            "--checkpoint",
            str(checkpoint),
            "--seed",
            "7",
            "--out-dir",
            str(tmp_path / "7"),
        ]
    )
    other = {path.read_bytes() for path in (tmp_path / "7").iterdir()}
    assert not other & {path.read_bytes() for path in files}
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
    assert python(KILL_INSIDE_STEP, script.SCRIPT, 2, *resume).returncode == -signal.SIGKILL

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


def test_ctrl_c_from_outside(script, small_data, tmp_path):
    """A real process, interrupted as a terminal does it, at whatever moment that is."""
    argv = ["--data-dir", small_data, "--batch-size", BATCH, "--epochs", 1000, "--out-dir", tmp_path / "run"]
    command = [sys.executable, script.__file__, *map(str, argv)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert "96 images" in process.stdout.readline()
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
    fails(script, ["--resume", bad], capsys, bad, "generator", "other sizes", "99")
    fails(script, ["--generate", 1, "--checkpoint", bad], capsys, bad, "generator", "other sizes", "99")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.pt", "run"]
    assert good.read_bytes() == whole


def test_loss_that_is_not_finite(script, flags, tmp_path, capsys):
    fails(script, [*flags, "--lr-d", "1e30"], capsys, "step ", "not finite", "--lr-g", "--lr-d", status=1)
    checkpoint = read(tmp_path / "run" / "checkpoint.pt")
    assert checkpoint["step"] == 0
    assert all(value.isfinite().all() for value in checkpoint["discriminator"].values())


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
        (["--batch-size", "1"], "from 2 to 96"),
        (["--batch-size", "97"], "from 2 to 96"),
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
    [["--lr-g", "0.5"], ["--seed", "1"], ["--batch-size", "8"], ["--out-dir", "x"], ["--precision", "bf16"]],
)
def test_resuming_with_other_settings(script, flags, tmp_path, capsys, bad):
    script.main([*flags, "--max-steps", "1"])
    before = snapshot(tmp_path)
    resume = ["--resume", tmp_path / "run" / "checkpoint.pt"]
    fails(script, [*resume, *bad], capsys, bad[0], bad[1])
    assert snapshot(tmp_path) == before
    script.main(
        [str(flag) for flag in [*resume, "--seed", 42, "--batch-size", BATCH, "--max-steps", 2]]
    )  # the same


# ---- dcgan_mnist -------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("network", [dcgan_mnist.Generator, dcgan_mnist.Discriminator])
def test_dcgan_init(network):
    torch.manual_seed(0)
    for layer in network().apply(dcgan_mnist.init_weights).layers:
        if getattr(layer, "weight", None) is None:
            continue
        mean = 1.0 if isinstance(layer, (nn.BatchNorm1d, nn.BatchNorm2d)) else 0.0
        n = layer.weight.numel()
        assert abs(layer.weight.mean().item() - mean) < 5 * 0.02 / math.sqrt(n)
        assert layer.weight.std().item() == pytest.approx(0.02, rel=5 / math.sqrt(2 * n))
        assert layer.bias is None or not layer.bias.any()


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


class Recorder:
    """Stands in for an optimiser: notes the gradients in all networks at its step, and changes nothing."""

    def __init__(self, own, *networks):
        self.zero_grad, self.networks = own.zero_grad, networks

    def step(self):
        self.seen = [
            [None if p.grad is None else p.grad.clone() for p in n.parameters()] for n in self.networks
        ]


def one_step(generator=None, real_label=0.9, noise=0.0, bf16=False):
    """A train_step on eight digits: networks, recording optimisers, D's inputs, `real`, the metrics."""
    torch.manual_seed(0)
    g = (generator or dcgan_mnist.Generator()).apply(dcgan_mnist.init_weights)
    d = dcgan_mnist.Discriminator().apply(dcgan_mnist.init_weights)
    inputs = []
    d.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    real = dcgan_mnist.load_images("mnist", ROOT / "data")[:8].float() / 127.5 - 1
    optimizers = Recorder(g, g, d), Recorder(d, g, d)
    context = torch.autocast("cpu", torch.bfloat16, enabled=bf16)
    rng = torch.Generator().manual_seed(1)
    metrics = dcgan_mnist.train_step(g, d, *optimizers, real, rng, context, real_label, noise)
    return g, d, *optimizers, inputs, real, metrics


def test_dcgan_gradients_go_where_they_should():
    g, d, optimizer_g, optimizer_d, *_ = one_step()
    g_grads, d_grads = optimizer_d.seen
    assert all(grad is None for grad in g_grads)  # the fakes were detached
    assert all(grad.any() for grad in d_grads)
    g_grads_after, d_grads_after = optimizer_g.seen
    assert all(grad is not None for grad in g_grads_after)
    assert all(
        grad.any() for name, grad in zip(dict(g.named_parameters()), g_grads_after) if "weight" in name
    )
    assert_same_bits(d_grads, d_grads_after)  # the generator's half left nothing in the discriminator
    assert all(parameter.requires_grad for parameter in d.parameters())


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


def test_dcgan_step_does_not_wait_for_the_device(monkeypatch):
    """Each of these calls would stall a GPU until it has caught up."""

    def refuse(self, *args, **kwargs):
        raise AssertionError("host and device synchronised")

    for name in ("item", "tolist", "cpu", "numpy", "__bool__", "__float__", "__int__", "nonzero"):
        monkeypatch.setattr(torch.Tensor, name, refuse)
    metrics = one_step(noise=0.1)[-1]
    monkeypatch.undo()
    assert all(value.isfinite() for value in metrics.values())


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
        assert "--lr-d" in remark
        assert "--real-label 0.8" in remark
    spiky = history()
    spiky[::25, 1] = 9
    (remark,) = dcgan_mnist.diagnose(spiky, 0.9)
    assert "unstable" in remark
    assert "--lr-g and --lr-d" in remark
    (remark,) = dcgan_mnist.diagnose(history(diversity=0.4), 0.9)
    assert "mode collapse" in remark
    assert "--instance-noise" in remark
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


def test_monitor_speaks_after_the_epoch(flags, monkeypatch, capsys):
    monkeypatch.setattr(dcgan_mnist, "diagnose", lambda steps, label: [f"{len(steps)} steps, {label}"])
    flags += ["--max-steps", "8", "--real-label", "0.7"]
    dcgan_mnist.main(flags)
    assert "\n  " not in capsys.readouterr().out  # eight steps are too few for a verdict
    monkeypatch.setattr(dcgan_mnist, "WARM_UP", 6)
    dcgan_mnist.main([*flags, "--out-dir", flags[flags.index("--out-dir") + 1] + "2"])
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if line.startswith("  ")] == ["  6 steps, 0.7", "  2 steps, 0.7"]


def test_refined_generator_trains_and_generates(flags, tmp_path):
    dcgan_mnist.main([*flags, "--refine", "--max-steps", "2"])
    checkpoint = tmp_path / "run" / "checkpoint.pt"
    assert "layers.10.weight" in read(checkpoint)["generator"]
    dcgan_mnist.main(["--generate", "2", "--checkpoint", str(checkpoint)])  # the checkpoint says --refine
    assert len(list((tmp_path / "run" / "generated" / "001").iterdir())) == 2


@pytest.mark.parametrize("bad", ["0", "1.01", "-1", "nan", "x"])
def test_bad_real_label(flags, tmp_path, capsys, bad):
    fails(dcgan_mnist, [*flags, "--real-label", bad], capsys, "--real-label", bad)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("bad", ["-0.1", "nan", "inf", "x"])
def test_bad_instance_noise(flags, tmp_path, capsys, bad):
    fails(dcgan_mnist, [*flags, "--instance-noise", bad], capsys, "--instance-noise", bad)
    assert not (tmp_path / "run").exists()
