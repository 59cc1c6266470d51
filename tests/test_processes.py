"""Scripts as processes of their own: alone in a folder, killed, stopped."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from test_scripts import SCRIPTS, TRANSLATORS, assert_same_bits, short

ROOT = Path(__file__).parent.parent


def start(name, flags, folder):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MPLCONFIGDIR": str(folder)}
    command = [sys.executable, f"{name}.py", *map(str, flags)]
    return subprocess.Popen(command, cwd=folder, env=environment, stderr=subprocess.PIPE, text=True)


def wait_for(path, process):
    deadline = time.monotonic() + 120
    while not path.exists():
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_alone_in_an_empty_folder_trains_and_generates(name, tmp_path):
    shutil.copy(ROOT / f"{name}.py", tmp_path)
    flags = [flag for flag in short(name, "", "--epochs", 1) if flag not in ("--out-dir", "")]
    assert start(name, flags, tmp_path).wait() == 0
    checkpoint = tmp_path / "runs" / name / "001" / "checkpoint.pt"
    pretrained = ROOT / f"pretrained/{name}.pt"
    flags = ["--generate", 3, "--checkpoint", pretrained if pretrained.exists() else checkpoint]
    flags += ["--data-dir", ROOT / "data"] if name in TRANSLATORS else []
    folder = tmp_path / "new"
    assert start(name, [*flags, "--out-dir", folder], tmp_path).wait() == 0
    if name == "gan_2d":
        assert len((folder / "points.csv").read_text().splitlines()) == 1 + 3
    else:
        assert len(list(folder.rglob("*.png"))) == 3


@pytest.mark.parametrize("name", ["dcgan_mnist", "cyclegan", "stylegan"])
def test_a_killed_run_goes_on_after_its_last_whole_epoch(name, tmp_path):
    """With the same bits as a run that was never killed."""
    shutil.copy(ROOT / f"{name}.py", tmp_path)
    more = ["--epochs", 4, "--limit", 100, "--seed", 7]
    more += ["--decay", 0.5] if name == "cyclegan" else []  # rates that fall from epoch 3 on
    assert start(name, short(name, "whole", *more), tmp_path).wait() == 0
    killed = start(name, short(name, "killed", *more), tmp_path)
    wait_for(tmp_path / "killed/checkpoint.pt", killed)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    history = torch.load(tmp_path / "killed/checkpoint.pt", weights_only=True)["history"]
    assert len(history) < 4
    resume = ["--resume", "killed/checkpoint.pt", "--device", "cpu"]
    assert start(name, resume, tmp_path).wait() == 0
    assert_same_bits(
        *(torch.load(tmp_path / run / "checkpoint.pt", weights_only=True) for run in ("whole", "killed"))
    )
    pictures = [
        sorted(path.name for path in (tmp_path / run / "samples").iterdir()) for run in ("whole", "killed")
    ]
    assert pictures[0] == pictures[1]


def test_ctrl_c_ends_a_run_with_one_line(tmp_path):
    shutil.copy(ROOT / "dcgan_mnist.py", tmp_path)
    process = start("dcgan_mnist", short("dcgan_mnist", "run", "--epochs", 1000), tmp_path)
    wait_for(tmp_path / "run/checkpoint.pt", process)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "dcgan_mnist.py: stopped; --resume" in error
    assert "Traceback" not in error
