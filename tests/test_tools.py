"""tools/: strip.py and export.py."""

import importlib

import numpy as np
import pytest
import torch
from PIL import Image

import export
import strip
from test_scripts import ROOT, SCRIPTS


@pytest.mark.parametrize("name", [name for name in SCRIPTS if (ROOT / f"pretrained/{name}.pt").exists()])
def test_pretrained_generators_generate_in_a_fresh_clone(name, tmp_path, monkeypatch):
    """Images of many grey levels or colours; no file is too large."""
    monkeypatch.chdir(ROOT)
    path = ROOT / f"pretrained/{name}.pt"
    flags = [
        "--generate",
        "3",
        "--checkpoint",
        str(path),
        "--device",
        "cpu",
        "--out-dir",
        str(tmp_path / "new"),
    ]
    importlib.import_module(name).main(flags)
    images = [np.asarray(Image.open(file)) for file in (tmp_path / "new").rglob("*.png")]
    assert len(images) == 3
    assert all(len(np.unique(image)) > 20 for image in images)
    assert path.stat().st_size < 2**24


def test_export_refuses_what_is_no_checkpoint_and_writes_over_nothing(tmp_path, capsys):
    (tmp_path / "bad.pt").write_bytes(b"no")
    torch.save({"script": "stylegan", "settings": {}}, tmp_path / "half.pt")
    for name in ("none.pt", "bad.pt", "half.pt"):
        with pytest.raises(SystemExit, match="2"):
            export.main([str(tmp_path / name), str(tmp_path / "new.pt")])
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"export.py: {tmp_path / name}: give a whole checkpoint.pt (")
    assert not (tmp_path / "new.pt").exists()
    with pytest.raises(SystemExit, match="2"):
        export.main([str(ROOT / "pretrained/cgan.pt"), str(tmp_path / "bad.pt")])
    assert "bad.pt is there already" in capsys.readouterr().err


def test_the_strip_shows_the_first_nine_samples_in_reading_order(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    names, sides = ("dcgan32_wgan_sn", "dcgan64_celeba"), (32, 64)
    for name in reversed(names):
        (tmp_path / f"{name}.pt").write_bytes((ROOT / f"pretrained/{name}.pt").read_bytes())
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
        strip.main([str(tmp_path / "nowhere"), "none.png"])
    assert "has no file NAME.pt" in capsys.readouterr().err
