"""What users of such programs trip over: where a script runs, what it may write, and how a run goes on.

What is one text in all scripts is tried on one of them. Folders of pictures are in test_dcgan64.py.
"""

import ast
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import cgan
import cyclegan
import dcgan64_celeba
import fid
import pix2pix
import stylegan
import vanilla_gan
from test_scripts import ROOT, SCRIPTS, assert_same_bits, fails, read, short, watch_steps


def write_pictures(folder, count=8, size=(40, 40)):
    """Pictures of grey levels that tell their numbers: 0, 5, 10, ..."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    for number in range(count):
        Image.new("L", size, 5 * number % 256).save(Path(folder, f"{number:02d}.png"))


def run(folder, *command, **environment):
    """A Python process in a folder, from its start to its end."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | environment
    command = [sys.executable, *map(str, command)]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)


# %% Where a script is run from, and what it is called
def test_a_renamed_copy_runs_from_any_folder_and_without_docstrings(tmp_path):
    """Its data are beside it, a checkpoint is its own, and PYTHONOPTIMIZE=2 leaves no lesson to show."""
    (tmp_path / "gans").mkdir()
    (tmp_path / "gans/my_gan.py").write_text((ROOT / "vanilla_gan.py").read_text())
    (tmp_path / "gans/data").symlink_to(ROOT / "data")
    (tmp_path / "ü").mkdir()
    options = {"PYTHONOPTIMIZE": "2", "PYTHONIOENCODING": "ascii"}  # a terminal that cannot print ü
    flags = "--limit 8 --batch-size 4 --epochs 1 --device cpu --out-dir".split()
    result = run(tmp_path / "ü", "../gans/my_gan.py", *flags, tmp_path / "ü/a", **options)
    assert result.returncode == 0, result.stderr
    flags = ["--generate", 2, "--checkpoint", tmp_path / "ü/a/checkpoint.pt", "--out-dir", tmp_path / "ü/two"]
    result = run(tmp_path / "ü", "../gans/my_gan.py", *flags, **options)
    assert result.returncode == 0, result.stderr
    assert len(list((tmp_path / "ü/two").iterdir())) == 2


@pytest.mark.parametrize("name", [*SCRIPTS, "fid"])
def test_a_script_can_be_pasted_into_a_notebook(name, monkeypatch, capsys):
    """There is no __file__, the program is Jupyter's, and so are its flags."""
    source = (ROOT / f"{name}.py").read_text()
    tree = ast.parse(source)
    tree.body[-1].body.insert(0, ast.parse("main = print").body[0])  # in `if __name__ == "__main__":`
    monkeypatch.setattr(sys, "argv", ["/usr/lib/ipykernel_launcher.py", "-f", "kernel.json"])
    notebook = {"__name__": "__main__"}
    exec(compile(ast.fix_missing_locations(tree), "cell", "exec"), notebook)
    assert capsys.readouterr().out == "[]\n"  # main([]): a run with the defaults
    assert str(notebook["parse_args"](["a", "b"] if name == "fid" else ["--seed", "7"])).startswith(
        "Namespace"
    )


def test_main_works_in_a_thread(tmp_path, no_plots):
    thread = threading.Thread(target=vanilla_gan.main, args=[short("vanilla_gan", tmp_path / "run")])
    thread.start()
    thread.join()
    assert (tmp_path / "run/checkpoint.pt").exists()


def test_runs_that_start_at_once_take_folders_of_their_own(tmp_path):
    args = vanilla_gan.parse_args(["--device", "cpu"])
    with ThreadPoolExecutor(16) as pool:
        folders = [*pool.map(lambda _: vanilla_gan.open_folder(args, tmp_path), range(64))]
    assert sorted(folder.name for folder in folders) == [f"{number:03d}" for number in range(1, 65)]


def test_pictures_with_undecodable_names_train_and_translate(tmp_path, monkeypatch, capsys, no_plots):
    monkeypatch.chdir(tmp_path)
    sys.stderr.reconfigure(errors="backslashreplace")  # as Python's own, unlike pytest's
    write_pictures("A")
    try:
        os.rename("A/03.png", os.fsencode("A/") + b"\xff.png")
    except OSError:
        pytest.skip("this file system refuses such names")
    Path("A/bad.png").write_text("text")
    os.rename("A/bad.png", os.fsencode("A/bad") + b"\xff.png")
    flags = ["--dataset", "folder", "--data-dir", "A", "--task", "grey", "--image-size", "32", "--width", "4"]
    cyclegan.main([*flags, "--blocks", "1", "--epochs", "1", "--device", "cpu", "--out-dir", "run"])
    cyclegan.main(["--translate", "A", "--checkpoint", "run/checkpoint.pt", "--out-dir", "out"])
    assert len(list(Path("out").iterdir())) == 8
    assert "bad" in capsys.readouterr().err


# %% What cannot be written
def test_a_full_disk_leaves_the_last_checkpoint_and_no_half_file(tmp_path, monkeypatch, capsys, no_plots):
    vanilla_gan.main(short("vanilla_gan", tmp_path / "run", "--epochs", 1))
    good = read(tmp_path / "run/checkpoint.pt")

    def fill(content, path):
        Path(path).write_bytes(b"half")
        raise RuntimeError("unexpected pos 576 vs 534")  # what torch.save says of a full disk

    monkeypatch.setattr(torch, "save", fill)
    argv = ["--resume", tmp_path / "run/checkpoint.pt", "--epochs", 2, "--keep-every", 1, "--device", "cpu"]
    fails(vanilla_gan, argv, capsys, tmp_path / "run", "cannot write", status=1)
    assert_same_bits(read(tmp_path / "run/checkpoint.pt"), good)
    assert not [*(tmp_path / "run").glob("*.tmp"), *(tmp_path / "run").glob("generator*")]


def test_a_folder_that_cannot_be_written_is_named_in_one_line(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").touch()  # a superuser may write into all folders, but nobody into a file
    fails(vanilla_gan, short("vanilla_gan", tmp_path / "file/run"), capsys, "file/run", "--out-dir")


@pytest.mark.parametrize("locked", ["data", "data/cache"])
def test_decoded_pictures_go_to_ones_home_if_the_place_beside_the_script_cannot_be_written(
    locked, monkeypatch
):
    real = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: real(path, mode) and Path(path) != ROOT / locked)
    exists = Path.exists
    monkeypatch.setattr(
        Path, "exists", lambda path: locked == "data/cache" if path.name == "cache" else exists(path)
    )
    source = (ROOT / "stylegan.py").read_text()
    names = {"__name__": "copy", "__file__": str(ROOT / "stylegan.py")}
    exec(source, names)
    assert names["CACHE"] == Path.home() / ".cache" / "gans"


def test_fid_looks_for_a_place_for_its_classifier_before_it_trains_it(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").touch()
    monkeypatch.setattr(fid, "CACHE", tmp_path / "file/cache")
    monkeypatch.setattr(fid, "train_classifier", lambda *_: pytest.fail("training comes too early"))
    with pytest.raises(SystemExit):
        fid.load_classifier("mnist", fid.DATA, "cpu")
    assert "file/cache" in capsys.readouterr().err


@pytest.mark.parametrize(("cores", "count", "threads"), [(16, 40, 8), (2, 40, 2), (16, 3, 3), (None, 40, 1)])
def test_decoding_takes_at_most_eight_threads_the_cores_or_the_pictures(
    cores, count, threads, tmp_path, monkeypatch
):
    write_pictures(tmp_path / "pictures", count)
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    started, pool = [], stylegan.ThreadPool
    monkeypatch.setattr(stylegan, "ThreadPool", lambda number: started.append(number) or pool(number))
    monkeypatch.setattr(stylegan, "CACHE", tmp_path / "cache")
    stylegan.read_pictures(sorted((tmp_path / "pictures").iterdir()), 8)
    assert started == [threads]


# %% How a run goes on
def test_a_run_goes_on_elsewhere_with_other_data_rates_and_its_history(
    tmp_path, monkeypatch, capsys, no_plots
):
    """Its old folder, which may be on a disk that cannot be written, stays as it is."""
    monkeypatch.chdir(tmp_path)
    write_pictures("old", count=8)
    flags = ["--dataset", "folder", "--data-dir", "old", "--batch-size", "4", "--device", "cpu"]
    dcgan64_celeba.main([*flags, "--epochs", "1", "--out-dir", "run"])
    Path("old").rename("new")
    write_pictures("new", count=12)
    before = {path: path.read_bytes() for path in Path("run").rglob("*") if path.is_file()}
    flags = ["--resume", "run/checkpoint.pt", "--epochs", "2", "--lr-g", "1e-5", "--device", "cpu"]
    dcgan64_celeba.main([*flags, "--data-dir", "new", "--out-dir", "further"])
    assert "pictures have changed: 8 before, 12 now" in capsys.readouterr().err
    checkpoint = read("further/checkpoint.pt")
    assert [row["epoch"] for row in checkpoint["history"]] == [1, 2]
    assert checkpoint["optimizer_g"]["param_groups"][0]["lr"] == 1e-5
    assert checkpoint["settings"]["images"] == 12
    assert {path: path.read_bytes() for path in Path("run").rglob("*") if path.is_file()} == before


def test_foreign_files_in_a_runs_folder_do_not_stop_it(tmp_path, no_plots):
    vanilla_gan.main(short("vanilla_gan", tmp_path / "run", "--epochs", 2))
    samples = tmp_path / "run/samples"
    (samples / "epoch_0001 (1).png").write_bytes(b"a copy, half there")
    (samples / "epoch_0002.png").write_bytes(b"")
    (samples / "Thumbs.db").touch()
    (tmp_path / "run/progress.gif").unlink()
    vanilla_gan.main(["--resume", str(tmp_path / "run/checkpoint.pt"), "--epochs", "3", "--device", "cpu"])
    assert Image.open(tmp_path / "run/progress.gif").n_frames == 2  # of epochs 1 and 3


def test_kept_generators_draw_what_the_checkpoint_of_that_epoch_draws(tmp_path, no_plots):
    stylegan.main(short("stylegan", tmp_path / "run", "--epochs", 3, "--keep-every", 2))
    stylegan.main(short("stylegan", tmp_path / "two", "--epochs", 2))
    assert [path.name for path in (tmp_path / "run").glob("generator*")] == ["generator_epoch_0002.pt"]
    kept, expected = tmp_path / "run/generator_epoch_0002.pt", tmp_path / "two/checkpoint.pt"
    assert kept.stat().st_size < expected.stat().st_size / 2
    z = torch.randn(3, 16)
    images = [stylegan.sample(stylegan.load_generator(path), z) for path in (kept, expected)]
    assert torch.equal(*images)
    stylegan.main(["--generate", "2", "--checkpoint", str(kept), "--out-dir", str(tmp_path / "drawn")])


def test_few_steps_are_said(tmp_path, capsys, no_plots):
    vanilla_gan.main(short("vanilla_gan", tmp_path / "run"))
    assert "24 images, 12 steps (few: for better pictures raise --epochs)" in capsys.readouterr().err


@pytest.mark.parametrize("script", [dcgan64_celeba, stylegan, pix2pix, cyclegan])
def test_flip_mirrors_half_of_the_images_and_pairs_together(script, tmp_path, monkeypatch, no_plots):
    steps = watch_steps(monkeypatch, script)
    flags = short(script.SCRIPT, tmp_path / "run", "--epochs", 1, "--limit", 48)
    script.main(flags)
    plain, steps[:] = [*steps], []
    script.main([*flags, "--out-dir", str(tmp_path / "flipped"), "--flip"])
    flipped = {name: [] for name in plain[0] if name in ("real", "a", "b")}
    for name, is_flipped in flipped.items():
        before, after = (torch.cat([step[name] for step in some]) for some in (plain, steps))
        pictures = {image.numpy().tobytes() for image in before}
        mirrors = {image.flip(2).numpy().tobytes() for image in before}
        for image in after:
            assert image.numpy().tobytes() in pictures | mirrors
            is_flipped.append(image.numpy().tobytes() not in pictures)
        assert 0.2 < np.mean(is_flipped) < 0.8
    if script is pix2pix:
        assert flipped["a"] == flipped["b"]


# %% A class for each folder
def test_cgan_says_when_classes_are_others_than_those_of_the_checkpoint(tmp_path, capsys, no_plots):
    for name in "cat", "dog", "eel":
        write_pictures(tmp_path / "pets" / name)
    write_pictures(tmp_path / "pets")  # of no class
    flags = ["--batch-size", "4", "--device", "cpu", "--out-dir", str(tmp_path / "run")]
    cgan.main([*flags, "--dataset", "folder", "--data-dir", str(tmp_path / "pets"), "--epochs", "1"])
    assert read(tmp_path / "run/checkpoint.pt")["settings"]["class_names"] == ["cat", "dog", "eel"]
    argv = ["--resume", tmp_path / "run/checkpoint.pt", "--epochs", "2", "--device", "cpu"]
    fails(cgan, [*argv, "--dataset", "mnist", "--data-dir", ROOT / "data"], capsys, "classes", "eel", "9")
    (tmp_path / "pets/fox").mkdir()
    (tmp_path / "pets/cat/00.png").rename(tmp_path / "pets/fox/00.png")
    fails(cgan, argv, capsys, "classes", "fox")


# %% Translators
@pytest.fixture
def domains(tmp_path, monkeypatch):
    """Folders A (grey levels) and B (the same names; 37x53 pixels); the working folder is theirs."""
    monkeypatch.chdir(tmp_path)
    write_pictures("A", count=40)
    write_pictures("B", count=40, size=(37, 53))


SMALL = ["--image-size", "32", "--width", "4", "--epochs", "1", "--batch-size", "4", "--device", "cpu"]


def test_pictures_of_the_same_name_are_pairs_only_if_that_is_said(domains, capsys, no_plots):
    flags = [*SMALL, "--blocks", "1", "--dataset", "folder", "--data-dir", "."]
    cyclegan.main([*flags, "--out-dir", "unpaired"])
    assert "a2b_error" not in capsys.readouterr().out
    cyclegan.main([*flags, "--out-dir", "paired", "--paired-tests"])
    assert "a2b_error" in capsys.readouterr().out
    args = cyclegan.parse_args([*flags, "--paired-tests"])
    _, names = cyclegan.load_domains(args, train=False)
    Path("A", f"{names['a'][0]}.png").unlink()
    tests, names = cyclegan.load_domains(args, train=False)
    assert names["a"]
    assert names["a"] == names["b"] == sorted({*names["a"]})
    assert torch.equal(tests["a"], tests["b"])  # of one level


def test_pairs_of_unequal_proportions_are_named(domains, capsys):
    args = pix2pix.parse_args([*SMALL, "--dataset", "folder", "--data-dir", "."])
    pix2pix.load_pairs(args, train=True)
    assert "pairs have unequal proportions" in capsys.readouterr().err
    for path in Path("A").iterdir():  # as tall as B's, once a viewer has turned them, as they say
        exif = Image.Exif()
        exif[0x0112] = 6
        Image.new("L", (53, 37)).save(path.with_suffix(".jpg"), exif=exif)
        path.unlink()
    pix2pix.load_pairs(args, train=True)
    assert "have unequal" not in capsys.readouterr().err
    args = pix2pix.parse_args([*SMALL, "--dataset", "folder", "--data-dir", "A", "--task", "mosaic"])
    pix2pix.load_pairs(args, train=True)
    assert "have unequal" not in capsys.readouterr().err


def test_one_picture_is_translated_at_its_own_size(domains, capsys, no_plots):
    cyclegan.main([*SMALL, "--blocks", "1", "--dataset", "folder", "--data-dir", ".", "--out-dir", "run"])
    argv = ["--translate", "B/05.png", "--checkpoint", "run/checkpoint.pt", "--image-size"]
    cyclegan.main([*argv, "own", "--out-dir", "own"])
    cyclegan.main([*argv, "32", "--out-dir", "32"])
    assert [Image.open(f"{folder}/05.png").size for folder in ("own", "32")] == [(37, 53), (32, 32)]
    generator = cyclegan.load_generator("run/checkpoint.pt")
    picture = torch.tensor(np.array(Image.open("B/05.png").convert("RGB"))).permute(2, 0, 1)[None] / 255
    padded = torch.nn.functional.pad(picture, (0, 3, 0, 3), mode="replicate")  # to 40x56
    expected = cyclegan.sample(generator, padded)[0, :, :53, :37]
    written = torch.tensor(np.array(Image.open("own/05.png"))).permute(2, 0, 1) / 255
    assert (written - expected).abs().max() <= 0.51 / 255
    fails(cyclegan, ["--image-size", "own"], capsys, "--image-size own", "--translate")

    pix2pix.main([*SMALL, "--dataset", "folder", "--data-dir", "B", "--task", "grey", "--out-dir", "unet"])
    argv = ["--translate", "B/05.png", "--checkpoint", "unet/checkpoint.pt"]
    pix2pix.main([*argv, "--out-dir", "one"])
    assert Image.open("one/05.png").size == (32, 32)
    fails(pix2pix, [*argv, "--image-size", "own"], capsys, "--image-size", "own")
