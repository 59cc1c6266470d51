"""dcgan64_celeba.py in depth: its data, folders of pictures, and several processes."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torchvision import datasets
from torchvision.transforms.functional import resize

import dcgan64_celeba as script
import fid
from test_scripts import ROOT, assert_same_bits, fails, read, short, watch_steps


def pixels_of(path):
    """What decode makes of a file, as (64, 64, 3)."""
    return torch.tensor(script.decode(path, 64)).permute(1, 2, 0)


def load(folder, *flags):
    """The images of a folder, as a run with these flags loads them."""
    argv = ["--dataset", "folder", "--data-dir", str(folder), "--device", "cpu"]
    return script.load_images(script.parse_args([*argv, *map(str, flags)]))


@pytest.fixture
def pictures(tmp_path, monkeypatch):
    """A nested folder of 40 coloured digits as PNG, WebP and JPEG; the working folder is the one above."""
    monkeypatch.chdir(tmp_path)
    for number, digit in enumerate(datasets.MNIST(ROOT / "data").data[:40]):
        folder = tmp_path / "pictures" / f"{number % 3}" / "below"
        folder.mkdir(parents=True, exist_ok=True)
        bands = [Image.fromarray(band.numpy()) for band in (digit, digit // 2, 255 - digit)]
        Image.merge("RGB", bands).save(folder / f"{number:02d}.{['png', 'webp', 'jpg'][number % 3]}")
    (tmp_path / "pictures" / "notes.txt").write_text("no picture")
    return tmp_path / "pictures"


# %% Decoding
@pytest.mark.parametrize(
    ("name", "mode", "left", "right"),
    [
        ("a.png", "RGBA", (255, 0, 0), (127, 127, 255)),  # half transparent on white
        ("a.webp", "RGBA", (255, 0, 0), (127, 127, 255)),
        ("a.png", "RGB", (255, 0, 0), (0, 0, 255)),
        ("a.bmp", "RGB", (255, 0, 0), (0, 0, 255)),
        ("a.jpg", "RGB", (255, 0, 0), (0, 0, 255)),
        ("a.JPEG", "RGB", (255, 0, 0), (0, 0, 255)),
        ("a.jpg", "CMYK", (255, 0, 0), (0, 0, 255)),
        ("a.png", "P", (255, 0, 0), (0, 0, 255)),
        ("a.gif", "P", (255, 0, 0), (0, 0, 255)),
        ("a.png", "L", (76, 76, 76), (29, 29, 29)),  # what ITU-R 601 makes of red and of blue
        ("a.png", "LA", (76, 76, 76), (141, 141, 141)),
        ("a.png", "1", (255, 255, 255), (0, 0, 0)),
    ],
)
def test_a_picture_of_any_mode_is_decoded(name, mode, left, right, tmp_path):
    """Red on the left, and blue on the right, where it is half transparent if the mode can be."""
    image = Image.new("RGBA", (80, 64), (255, 0, 0, 255))
    image.paste((0, 0, 255, 128), (40, 0, 80, 64))
    if mode == "P":
        image = image.convert("RGB").quantize(4)
    elif mode == "1":
        image = image.convert("L").point(lambda value: 255 * (value > 50)).convert("1")
    elif mode != "RGBA":
        image = (image if mode == "LA" else image.convert("RGB")).convert(mode)
    image.save(tmp_path / name, **({"quality": 95} if "jp" in name.lower() else {}))
    pixels = pixels_of(tmp_path / name).int()
    tolerance = 2 if name.endswith(("png", "bmp", "gif")) else 12
    for column, colour in (8, left), (55, right):  # away from the edge between the two
        assert (pixels[32, column] - torch.tensor(colour)).abs().max() <= tolerance


def test_a_transparent_colour_is_white_and_16_bits_go_to_the_nearest_of_8(tmp_path):
    palette = Image.new("RGB", (64, 64), "red").quantize(4)
    palette.info["transparency"] = palette.getpixel((0, 0))
    for name in "clear.png", "clear.gif":
        palette.save(tmp_path / name)
        assert pixels_of(tmp_path / name).eq(255).all()
    levels = np.linspace(0, 65535, 64 * 64).reshape(64, 64)
    for name, pixels in {
        "16 bits.png": levels.astype(np.uint16),
        "big-endian.tif": levels.astype(">u2"),
        "32 bits.tif": levels.astype(np.int32),
        "floats.tif": (levels / 65535).astype(np.float32),
    }.items():
        Image.fromarray(pixels).save(tmp_path / name)
        assert np.abs(pixels_of(tmp_path / name).numpy() - (levels / 257)[..., None]).max() <= 0.51, name


def test_a_picture_gives_its_middle_square_upright(tmp_path):
    ramp = Image.fromarray(np.tile(np.arange(178, dtype=np.uint8), (218, 1)))
    turned = ramp.convert("RGB")
    exif = turned.getexif()
    exif[0x0112] = 6  # orientation: the camera was held upright
    turned.save(tmp_path / "turned.jpg", exif=exif, quality=95)
    ramp.save(tmp_path / "tall.png")
    ramp.transpose(Image.Transpose.TRANSPOSE).save(tmp_path / "wide.png")
    names = ("tall.png", "wide.png", "turned.jpg")
    tall, wide, turned = (pixels_of(tmp_path / name)[:, :, 0].float() for name in names)
    middle = (torch.arange(64) + 0.5) * 178 / 64 - 0.5
    assert (tall - middle)[:, 2:-2].abs().max() <= 1
    assert (wide - middle[:, None])[2:-2].abs().max() <= 1
    assert turned[5].mean() < 40 < 140 < turned[-5].mean()  # now dark above, light below


# %% Folders
def test_a_folder_is_decoded_once_into_a_mapped_file(pictures):
    images = load(pictures)
    files = sorted(path for path in pictures.rglob("*") if path.suffix in (".png", ".webp", ".jpg"))
    assert (images.shape, images.dtype) == ((40, 3, 64, 64), torch.uint8)
    for image, path in zip(images, files):
        assert torch.equal(image.permute(1, 2, 0), pixels_of(path))
    (cache,) = Path("data/cache").iterdir()
    assert cache.stat().st_size == 40 * 64 * 64 * 3
    written = cache.stat().st_mtime_ns
    maps = Path("/proc/self/maps")
    assert not maps.exists() or str(cache.resolve()) in maps.read_text()  # mapped, and not read into memory
    assert torch.equal(load(pictures), images)
    assert torch.equal(load(pictures, "--seed", 7), images)
    assert [path.stat().st_mtime_ns for path in Path("data/cache").iterdir()] == [written]


def test_a_folder_that_has_changed_is_decoded_again(pictures):
    files = sorted(pictures.rglob("*.png"))
    before = load(pictures)
    shutil.copy(files[0], pictures / "added.png")
    assert len(load(pictures)) == 41
    (pictures / "added.png").unlink()
    Image.new("RGB", (9, 9), "green").save(files[0])
    after = load(pictures)
    assert (after != before).flatten(1).any(1).tolist() == [True] + [False] * 39
    assert (after[0].flatten(1) == torch.tensor([[0], [128], [0]])).all()


def test_a_limit_is_chosen_by_the_seed_before_anything_is_decoded(pictures):
    whole, first, other, again = (
        {image.numpy().tobytes() for image in load(pictures, *flags)}
        for flags in ([], ["--limit", 10], ["--limit", 10, "--seed", 7], ["--limit", 10])
    )
    sizes = sorted(path.stat().st_size // (64 * 64 * 3) for path in Path("data/cache").iterdir())
    assert sizes == [10, 10, 40]
    assert len(first) == len(other) == 10
    assert first == again != other
    assert first | other < whole


def test_what_a_folder_contains(pictures, capsys):
    """Hidden files, other files and what a run made are left out; links are followed, but not in circles."""
    pictures = pictures.rename(pictures.parent / ".pictures")  # a hidden folder may be the one to train on
    picture = next(pictures.rglob("*.png"))
    (pictures / ".thumbnails").mkdir()
    shutil.copy(picture, pictures / ".thumbnails" / "small.png")
    shutil.copy(picture, pictures / "._copy.png")
    (pictures / "2.HEIC").touch()
    (pictures / "3.HEIC").touch()
    (pictures / "runs/a/samples").mkdir(parents=True)
    shutil.copy(picture, pictures / "runs/a/samples")
    for name in "config.json", "history.csv":
        (pictures / "runs/a" / name).touch()
    (pictures.parent / "elsewhere").mkdir()
    shutil.copy(picture, pictures.parent / "elsewhere" / "another.TIFF")
    (pictures / "link").symlink_to(pictures.parent / "elsewhere")
    for number in range(3):  # circles within circles
        (pictures / f"{number}/below/circle{number}").symlink_to(pictures)
    (pictures / "gone.png").symlink_to("nowhere.png")
    names = [path.name for path in script.list_pictures(pictures)]
    assert len(names) == 41
    assert {"another.TIFF"} <= {*names}
    assert "41 pictures; other files: " in (error := capsys.readouterr().err)
    assert "'.HEIC': 2" in error
    assert "'.txt': 1" in error
    assert len(script.list_pictures(pictures / "runs/a")) == 1  # unless it is what was asked for


def test_files_that_cannot_be_read_are_named_and_left_out(pictures, capsys, monkeypatch):
    (pictures / "0/empty.png").write_bytes(b"")
    (pictures / "cut.jpg").write_bytes(next(pictures.rglob("*.jpg")).read_bytes()[:300])
    (pictures / "text.gif").write_text("this is text")
    Image.new("L", (2000, 2000)).save(pictures / "huge.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10**6)  # twice as many are an error
    readable = [path for path in sorted(pictures.rglob("*.*")) if script.decode(path, 64) is not None]
    images = load(pictures)
    assert len(images) == len(readable) == 40
    for image, path in zip(images, readable):  # no gaps
        assert torch.equal(image.permute(1, 2, 0), pixels_of(path))
    error = capsys.readouterr().err
    for name, reason in ("empty.png", "identify"), ("cut.jpg", "Truncated"), ("huge.png", "exceeds limit"):
        lines = [line for line in error.splitlines() if f"{name}: " in line]
        assert "skipped" in lines[0]
        assert reason in lines[0]


def test_a_folder_without_a_picture_to_read_is_refused_in_one_line(pictures, tmp_path, capsys):
    argv = ["--dataset", "folder", "--device", "cpu", "--data-dir"]
    (tmp_path / "bad").mkdir()
    for place in "bad", "nowhere", "pictures/notes.txt":
        fails(script, [*argv, tmp_path / place], capsys, "--data-dir", "picture")
    (tmp_path / "bad/a.png").write_bytes(b"")
    fails(script, [*argv, tmp_path / "bad"], capsys, "--data-dir", "can be read")
    assert not Path("runs").exists()
    assert not any(Path("data/cache").iterdir())


SLOW = """
import time, numpy as np, dcgan64_celeba as script
from pathlib import Path
script.CACHE = Path('data/cache')
def decode(path, size):
    open("a worker is at work", "a").close()
    time.sleep(300 if path.suffix == ".jpg" and int(path.stem) > 16 else 0)
    return np.zeros((3, 64, 64), np.uint8)
script.decode = decode
script.main(["--dataset", "folder", "--data-dir", "pictures", "--device", "cpu"])
"""


def start(folder, program, *argv, **environment):
    """A Python program as a process of its own, in a process group of its own."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | environment
    command = [sys.executable, "-c", program, *map(str, argv)]
    options = {"cwd": folder, "env": environment, "text": True, "start_new_session": True}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options)


def test_ctrl_c_while_decoding_leaves_nothing(pictures, tmp_path):
    process = start(tmp_path, SLOW)
    while not Path("a worker is at work").exists():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.05)
    assert any(Path("data/cache").iterdir())
    os.killpg(process.pid, signal.SIGINT)  # as a terminal sends it
    _, error = process.communicate(timeout=60)  # to its end, so its threads are gone
    assert process.returncode == 130
    assert "stopped" in error
    assert "Traceback" not in error
    assert not any(Path("data/cache").iterdir())


def test_a_folder_trains_and_generates_in_colour(pictures, no_plots):
    flags = ["--dataset", "folder", "--data-dir", "pictures", "--batch-size", "4", "--limit", "8"]
    script.main([*flags, "--device", "cpu", "--out-dir", "run", "--epochs", "1"])
    red, green, blue = (band.tobytes() for band in Image.open("run/samples/epoch_0001.png").split())
    assert red != green != blue
    script.main(["--generate", "3", "--checkpoint", "run/checkpoint.pt"])
    files = sorted(Path("run/generated/001").iterdir())
    assert [(Image.open(path).size, Image.open(path).mode) for path in files] == [((64, 64), "RGB")] * 3


# %% Data sets
def test_faces_are_the_default_and_begin_with_noise(tmp_path, monkeypatch, capsys, no_plots):
    args = script.parse_args(["--data-dir", str(ROOT / "data"), "--device", "cpu"])
    assert (args.dataset, args.epochs, args.instance_noise) == ("faces", 48, 0.5)
    images = script.read_sheets(args)
    assert torch.equal(images, fid.open_faces(ROOT / "data/faces", "train")[0])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(script, "DATA", "data")
    fails(script, [], capsys, "--data-dir", "data/faces", "--dataset folder")
    Path("data/faces").mkdir(parents=True)
    with Image.open(ROOT / "data/faces/train_00.webp") as sheet:
        sheet.save("data/faces/train_00.webp", lossless=True, method=0)
    steps = watch_steps(monkeypatch, script)
    script.main(["--limit", "4", "--epochs", "2", "--batch-size", "2", "--device", "cpu", "--out-dir", "run"])
    assert (
        "faces: 4 images, 4 steps (few: for better pictures raise --epochs): run\n" in capsys.readouterr().err
    )
    assert [step["noise_std"] for step in steps] == [0.5, 0.5, 0.25, 0.25]
    seen = {
        ((step["real"][i] + 1) * 127.5).round().byte().numpy().tobytes() for step in steps for i in (0, 1)
    }
    assert len(seen) == 4
    assert seen < {image.numpy().tobytes() for image in images[:1024]}
    assert Image.open("run/samples/epoch_0001.png").mode == "RGB"
    resumed = script.parse_args(["--resume", "run/checkpoint.pt", "--instance-noise", "0", "--device", "cpu"])
    assert (resumed.dataset, resumed.epochs, resumed.instance_noise) == ("faces", 2, 0)


def test_celeba_is_the_default_where_its_folder_is(tmp_path, monkeypatch, capsys, no_plots):
    """In torchvision's layout; where it is not, one line says what to do."""

    def refuse(self):
        raise OSError("quota")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(script, "DATA", "data")
    monkeypatch.setattr(datasets.CelebA, "download", refuse)
    argv = ["--batch-size", "4", "--epochs", "1", "--device", "cpu"]
    words = "--data-dir", "img_align_celeba.zip", "quota", "--dataset faces or folder"
    fails(script, [*argv, "--dataset", "celeba"], capsys, "data" / script.CELEBA, *words)
    assert not Path("runs").exists()
    folder = tmp_path / "data/celeba/img_align_celeba"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for number in range(8):
        noise = rng.integers(0, 256, (218, 178, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / f"{number + 1:06d}.jpg")
    script.main(argv)
    assert "celeba: 8 images, 2 steps" in capsys.readouterr().err
    settings = read("runs/dcgan64_celeba/001/checkpoint.pt")["settings"]
    assert (settings["dataset"], settings["instance_noise"]) == ("celeba", 0)


def test_small_pictures_are_made_larger(monkeypatch, capsys, tmp_path):
    class Ten:
        def __init__(self, folder, train, download):
            self.data = np.random.default_rng(0).integers(0, 256, (10, 32, 32, 3), dtype=np.uint8)

    argv = ["--dataset", "cifar10", "--device", "cpu", "--limit", "4", "--data-dir", str(tmp_path)]
    monkeypatch.setattr(datasets.CIFAR10, "download", lambda self: 1 / 0)
    fails(script, argv, capsys, "--data-dir", "cifar10", tmp_path)
    monkeypatch.setattr(datasets, "CIFAR10", Ten)
    images = script.load_images(script.parse_args(argv))
    large = resize(torch.from_numpy(Ten("", True, True).data).movedim(3, 1), [64, 64], antialias=True)
    assert images.shape == (4, 3, 64, 64)
    assert {image.numpy().tobytes() for image in images} < {image.numpy().tobytes() for image in large}


# %% Several processes
ONE_OF_MANY = """
import sys, torch
import dcgan64_celeba as script
path, normalise, *argv = sys.argv[1:]
rank = int(path[-1])
kept, noise, build, randn = {}, [], script.build, torch.randn
table = randn(4, 100, generator=torch.Generator().manual_seed(5))
if normalise == "no":  # and the z that one process would have for the whole batch
    script.nn.BatchNorm2d, script.init_weights = script.nn.Identity, lambda layer: None
    torch.randn = lambda n, *size, **more: table[n * rank :][:n] if n <= 4 else randn(n, *size, **more)

def keep(args):
    kept.update(build(args))
    kept["generator"].register_forward_pre_hook(lambda _, inputs: noise.append(inputs[0]))
    return kept

script.build = keep
script.main(argv)
torch.save({name: module.state_dict() for name, module in kept.items()} | {"noise": noise[0]}, path)
"""


def together(tmp_path, name, world, *argv, normalise="yes"):
    """What each of several processes held at the end of a run, and what it printed."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = str(listener.getsockname()[1])
    environment = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    paths, processes = [tmp_path / f"{name}{rank}" for rank in range(world)], []
    for rank, path in enumerate(paths):
        environment |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        processes.append(start(tmp_path, ONE_OF_MANY, path, normalise, *argv, **environment))
    outputs = [process.communicate(timeout=300) for process in processes]
    assert [process.returncode for process in processes] == [0] * world, outputs
    return [read(path) for path in paths], [output for output, _ in outputs]


def test_the_gradients_of_two_processes_averaged_are_those_of_one(tmp_path):
    """Without batch normalisation, and with a D that moves too little for G to notice."""
    more = ["--limit", 4, "--epochs", 1, "--lr-d", 1e-12]
    alone, _ = together(tmp_path, "one", 1, *short("dcgan64_celeba", "run1", *more), normalise="no")
    both, _ = together(tmp_path, "two", 2, *short("dcgan64_celeba", "run2", *more), normalise="no")
    for name in "optimizer_g", "optimizer_d":  # after one step, Adam's mean is a part of the gradient
        states = [process[name]["state"].values() for process in alone + both]
        whole, first, second = (torch.cat([state["exp_avg"].flatten() for state in all_]) for all_ in states)
        assert (first - whole).norm() < 1e-3 * whole.norm()
        assert torch.equal(first, second)


def test_two_processes_hold_the_same_weights_and_one_writes(tmp_path):
    flags = short("dcgan64_celeba", "run", "--limit", 8, "--epochs", 1)
    (first, second), (said, silence) = together(tmp_path, "both", 2, *flags)
    assert "epoch 1/1" in said
    assert silence == ""
    for name in "generator", "discriminator":
        for key, weight in first[name].items():  # each has running averages of its own
            assert "running" in key or torch.equal(weight, second[name][key])
    assert not torch.equal(first["noise"], second["noise"])
    assert first["noise"].shape == (2, 100)
    assert_same_bits(read(tmp_path / "run/checkpoint.pt")["generator"], first["generator"])


def test_two_processes_resume_and_one_goes_on(tmp_path, no_plots):
    together(tmp_path, "whole", 2, *short("dcgan64_celeba", "whole", "--limit", 8))
    together(tmp_path, "half", 2, *short("dcgan64_celeba", "run", "--limit", 8, "--epochs", 1))
    resume = ["--resume", str(tmp_path / "run/checkpoint.pt"), "--device", "cpu", "--epochs"]
    together(tmp_path, "again", 2, *resume, 2)
    assert_same_bits(read(tmp_path / "run/checkpoint.pt"), read(tmp_path / "whole/checkpoint.pt"))
    script.main([*resume, "3"])
    assert len(read(tmp_path / "run/checkpoint.pt")["history"]) == 3


def test_torchrun_decodes_a_folder_once_and_leaves_one_run(pictures, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
    shutil.copy(script.__file__, tmp_path)
    Path("data").mkdir()  # beside it: decoded pictures go there
    command += [
        Path(script.__file__).name,
        "--dataset",
        "folder",
        "--data-dir",
        "pictures",
        "--device",
        "cpu",
    ]
    command += ["--epochs", "1", "--batch-size", "21"]  # 10 for each process
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("epoch 1/1") == result.stderr.count("40 images") == 1
    assert len(list(Path("data/cache").iterdir())) == 1
    assert [path.name for path in Path("runs/dcgan64_celeba").iterdir()] == ["001"]


def test_a_batch_must_do_for_all_processes(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(script, "join", lambda args: (0, 3, torch.zeros(24, 1, 64, 64)))
    flags = short("dcgan64_celeba", tmp_path / "run", "--batch-size", 5)
    fails(script, flags, capsys, "--batch-size", "each process")


def test_torchrun_gives_each_process_its_gpu(monkeypatch):
    asked, zeros = [], torch.zeros
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setattr(torch, "zeros", lambda *size, device: asked.append(device) or zeros(*size))
    assert script.parse_args(["--device", "cuda"]).device == "cuda:3"
    assert script.parse_args(["--device", "cpu"]).device == "cpu"
    monkeypatch.delenv("LOCAL_RANK")
    assert script.parse_args(["--device", "cuda:1"]).device == "cuda:1"
    assert asked == ["cuda:3", "cpu", "cuda:1"]  # the first thing that touches a GPU touches the right one


def test_it_takes_the_weights_of_the_official_example_and_gives_its_own():
    """PyTorch's own DCGAN, written down: each network has a Sequential by the name of main."""
    up = [nn.ConvTranspose2d(100, 512, 4, 1, 0, bias=False), nn.BatchNorm2d(512), nn.ReLU(True)]
    for channels in 512, 256, 128:
        up += [nn.ConvTranspose2d(channels, channels // 2, 4, 2, 1, bias=False)]
        up += [nn.BatchNorm2d(channels // 2), nn.ReLU(True)]
    up += [nn.ConvTranspose2d(64, 3, 4, 2, 1, bias=False), nn.Tanh()]
    down = [nn.Conv2d(3, 64, 4, 2, 1, bias=False), nn.LeakyReLU(0.2, inplace=True)]
    for channels in 64, 128, 256:
        down += [nn.Conv2d(channels, 2 * channels, 4, 2, 1, bias=False)]
        down += [nn.BatchNorm2d(2 * channels), nn.LeakyReLU(0.2, inplace=True)]
    down += [nn.Conv2d(512, 1, 4, 1, 0, bias=False), nn.Sigmoid()]
    its_g, its_d = (nn.ModuleDict({"main": nn.Sequential(*layers)}).eval() for layers in (up, down))
    g, d = script.Generator().eval(), script.Discriminator().eval()
    g.load_state_dict(its_g.state_dict())
    d.load_state_dict(its_d.state_dict())
    z = torch.randn(4, 100)
    images = its_g["main"](z[:, :, None, None])
    assert torch.equal(g(z), images)
    torch.testing.assert_close(d(images).sigmoid().flatten(), its_d["main"](images).flatten())
    its_g.load_state_dict(g.state_dict())  # and back
    its_d.load_state_dict(d.state_dict())
