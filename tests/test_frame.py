"""What all scripts share: the command line, the files of a run, distances, and the text itself.

What is one text in all scripts is tested on one of them.
"""

import ast
import importlib
import inspect
import os
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from torchvision import datasets

import dcgan_mnist
import export
import fid
import gan_2d
import stylegan
import vanilla_gan
from test_scripts import (
    OWN,
    ROOT,
    SCRIPTS,
    TRANSLATORS,
    assert_same_bits,
    fails,
    inputs_of,
    read,
    short,
    trained_on_images,
)


# %% The command line and the files
def test_help_names_every_flag_with_its_default(script, capsys):
    with pytest.raises(SystemExit) as exit_:
        script.main(["--help"])
    assert exit_.value.code == 0
    text = capsys.readouterr().out
    flags = "epochs lr-g lr-d batch-size dataset device seed out-dir resume generate checkpoint".split()
    flags += [] if script is gan_2d else ["data-dir", "limit", "fid-every"]
    flags += ["translate"] if script.SCRIPT in TRANSLATORS else ["latent-dim"]
    for flag in flags:
        assert f"--{flag} " in text
    assert "default: 42" in text


def test_checkpoints_that_do_not_fit_are_refused_in_one_line(tmp_path, capsys, no_plots):
    dcgan_mnist.main(short("dcgan_mnist", tmp_path / "run", "--epochs", 1))
    good = tmp_path / "run/checkpoint.pt"
    half, generator_only = tmp_path / "half.pt", tmp_path / "generator.pt"
    half.write_bytes(good.read_bytes()[:1000])
    torch.save({key: read(good)[key] for key in ("script", "settings", "generator")}, generator_only)
    fails(dcgan_mnist, ["--resume", half], capsys, half)
    fails(dcgan_mnist, ["--resume", generator_only, "--epochs", 2], capsys, generator_only, "discriminator")
    fails(dcgan_mnist, ["--resume", good, "--epochs", 2, "--width", 8], capsys, good)  # other networks
    fails(dcgan_mnist, ["--resume", good], capsys, "--epochs")  # it is done
    fails(vanilla_gan, ["--generate", 1, "--checkpoint", good], capsys, "dcgan_mnist.py")
    assert len(list((tmp_path / "run").iterdir())) == 7  # nothing was written


def test_a_checkpoint_cannot_run_code(tmp_path, capsys):
    class Bomb:
        def __reduce__(self):
            return Path.touch, (tmp_path / "exploded",)

    torch.save({"script": "dcgan_mnist", "settings": Bomb()}, tmp_path / "bomb.pt")
    fails(dcgan_mnist, ["--generate", 1, "--checkpoint", tmp_path / "bomb.pt"], capsys, "bomb.pt")
    assert not (tmp_path / "exploded").exists()


def test_folders_are_numbered_and_nothing_is_written_over(tmp_path, monkeypatch, capsys, no_plots):
    monkeypatch.chdir(tmp_path)
    flags = short("dcgan_mnist", "mine", "--epochs", 1)
    dcgan_mnist.main(flags)
    fails(dcgan_mnist, flags, capsys, "--out-dir", "mine")
    unnamed = [flag for flag in flags if flag not in ("--out-dir", "mine")]
    dcgan_mnist.main(unnamed)
    dcgan_mnist.main(unnamed)
    assert sorted(path.name for path in Path("runs/dcgan_mnist").iterdir()) == ["001", "002"]
    for number in ("001", "002"):
        dcgan_mnist.main(["--generate", "1", "--checkpoint", "mine/checkpoint.pt"])
        assert Path("mine/generated", number, "00000.png").exists()


def test_data_that_are_missing_are_named(tmp_path, monkeypatch, capsys):
    def refuse(self):
        raise OSError("no network")

    monkeypatch.setattr(datasets.MNIST, "download", refuse)
    fails(
        dcgan_mnist, ["--data-dir", tmp_path, "--out-dir", tmp_path / "run"], capsys, "--data-dir", tmp_path
    )


def test_a_run_that_dies_while_saving_leaves_the_last_checkpoint(tmp_path, monkeypatch, no_plots):
    dcgan_mnist.main(short("dcgan_mnist", tmp_path / "run", "--epochs", 1))
    good = read(tmp_path / "run/checkpoint.pt")

    def die(checkpoint, path):
        Path(path).write_bytes(b"half")
        raise MemoryError

    monkeypatch.setattr(torch, "save", die)
    with pytest.raises(MemoryError):
        dcgan_mnist.main(
            ["--resume", str(tmp_path / "run/checkpoint.pt"), "--epochs", "2", "--device", "cpu"]
        )
    assert_same_bits(read(tmp_path / "run/checkpoint.pt"), good)


def test_a_film_has_at_most_100_frames_and_is_made_each_half_minute(tmp_path, no_plots):
    """A film and a plot can take longer than an epoch of a few images."""
    (tmp_path / "samples").mkdir()
    for epoch in range(1, 251):
        Image.new("L", (8, 8), epoch).save(tmp_path / "samples" / f"epoch_{epoch:04d}.png")
    history = [{name: 0.0 for panel in dcgan_mnist.PANELS for name in panel}]
    film, plot = tmp_path / "progress.gif", tmp_path / "losses.png"
    dcgan_mnist.plot(history, tmp_path, last=False)
    assert 50 < Image.open(film).n_frames <= 100
    film.unlink()
    dcgan_mnist.plot(history * 2, tmp_path, last=False)
    assert not film.exists()
    assert len((tmp_path / "history.csv").read_text().splitlines()) == 3
    os.utime(plot, (0, plot.stat().st_mtime - 31))
    dcgan_mnist.plot(history, tmp_path, last=False)
    assert film.exists()
    film.unlink()
    dcgan_mnist.plot(history, tmp_path, last=True)
    assert film.exists()


def test_an_epoch_is_saved_before_its_plot_is_drawn(tmp_path, monkeypatch, capsys):
    """So that Ctrl-C there loses nothing that was printed."""

    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(dcgan_mnist, "plot", interrupt)
    fails(dcgan_mnist, short("dcgan_mnist", tmp_path / "run"), capsys, "stopped", status=130)
    assert len(read(tmp_path / "run/checkpoint.pt")["history"]) == 1


@trained_on_images
def test_an_exported_generator_draws_what_its_checkpoint_draws(trained, tmp_path):
    """To a grey level, for its weights are halved; it is small, and names no folder of the machine."""
    script, folder = trained
    export.main([str(folder / "checkpoint.pt"), str(tmp_path / "small.pt")])
    assert (tmp_path / "small.pt").stat().st_size < (folder / "checkpoint.pt").stat().st_size / 4
    assert str(ROOT) not in str(read(tmp_path / "small.pt")["settings"])
    whole, half = (script.load_generator(path) for path in (folder / "checkpoint.pt", tmp_path / "small.pt"))
    inputs = inputs_of(script, whole, 4)
    levels = 255 * (script.sample(whole, *inputs) - script.sample(half, *inputs)).abs().max()
    assert levels < (5 if script is stylegan else 1)  # which has no Tanh, and is loud at first


# %% Distances
def test_fid_track_repeats_an_epoch_that_is_trained_again(tmp_path, no_plots):
    noise = []

    def draw(n):
        noise.append(torch.rand(n, 1, 2, 2))
        return noise[-1]

    for epoch, distance in (1, 9.0), (2, 8.0), (2, 7.0):
        fid.track(lambda images, distance=distance: (distance, 1, 0), draw, tmp_path, epoch, count=501)
    rows = (tmp_path / "distances.csv").read_text().split()[1:]
    assert rows == ["1,9,1,0", "2,7,1,0"]
    with open(tmp_path / "distances.csv", "a") as file:
        file.write("3;6;1;0\n\nnotes: good\n")
    fid.track(lambda images: (5.0, 1, 0), draw, tmp_path, 4, count=501)
    rows = (tmp_path / "distances.csv").read_text().split()[1:]
    assert rows == ["1,9,1,0", "2,7,1,0", "4,5,1,0"]
    assert [len(images) for images in noise] == [501] * 4
    for line, kept in ("1,9,1,0,a note", ["1,9,1,0"]), ("1,9", []):  # columns too many, or too few
        (tmp_path / "distances.csv").write_text(f"a table\n{line}\n")
        fid.track(lambda images: (5.0, 1, 0), draw, tmp_path, 4, count=1)
        assert (tmp_path / "distances.csv").read_text().split()[1:] == [*kept, "4,5,1,0"]
    assert torch.equal(noise[0], noise[2])  # the same noise each time, so that the curve is smooth


def test_fid_every_needs_fid_beside_the_script(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(dcgan_mnist, "DATA", str(tmp_path / "data"))
    fails(dcgan_mnist, ["--fid-every", 1], capsys, "--fid-every", "fid.py")


# %% The text
def functions(name):
    """The top-level functions and classes of a script, with their text."""
    source = (ROOT / f"{name}.py").read_text()
    nodes = [node for node in ast.parse(source).body if isinstance(node, (ast.FunctionDef, ast.ClassDef))]
    return {node.name: "".join(ast.unparse(node)) for node in nodes} | {"": source}


def test_functions_that_scripts_share_have_the_same_text():
    texts = {name: functions(name) for name in SCRIPTS}
    shared = {function for name in SCRIPTS for function in texts[name]} - {""}
    assert {"save", "plot", "fail"} <= shared
    for function in shared:
        plain = [name for name in SCRIPTS if function in texts[name] and name not in OWN.get(function, [])]
        different = [name for name in plain if texts[name][function] != texts[plain[0]][function]]
        assert not different, f"python tools/share.py {function} --source {plain[0]}.py, or a row in OWN"
        for name in OWN.get(function, []):
            same = [other for other in plain if texts[name].get(function) == texts[other][function]]
            assert not same, f"{name}.py has the same {function} as {same[0]}.py: no need for OWN"


def test_a_script_has_only_what_it_uses(script):
    tree = ast.parse(inspect.getsource(script))
    names = [node.name for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))]
    names += [node.targets[0].id for node in tree.body if isinstance(node, ast.Assign)]
    used = {
        node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)
    }
    assert set(names) <= used, "nothing uses these"


def test_a_script_stands_alone_and_its_lesson_is_short(script):
    tree = ast.parse(inspect.getsource(script))
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    imported |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    packages = {name.split(".")[0] for name in imported} - sys.stdlib_module_names
    assert packages <= {"torch", "torchvision", "matplotlib", "tqdm", "numpy", "PIL", "fid"}
    assert len(ast.get_docstring(tree).splitlines()) <= 30
    assert len(inspect.getsource(script.train).splitlines()) <= 50


def test_the_readmes_commands_are_understood(monkeypatch, tmp_path):
    lines = [line.strip() for line in (ROOT / "README.md").read_text().splitlines()]
    commands = [
        line.split()[1:] for line in lines if line.startswith("python ") and line.split()[1][:-3] in SCRIPTS
    ]
    assert len(commands) > 5
    for name, *flags in commands:
        script = importlib.import_module(name[:-3])
        monkeypatch.setattr(script, "load_checkpoint", lambda path: {"settings": {"image_size": 64}})
        script.parse_args(flags + ["--device", "cpu"])
