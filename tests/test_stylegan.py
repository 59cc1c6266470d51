"""stylegan.py in depth: its layers, what a step does, its pictures, and its data."""

import copy
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torchvision import datasets

import fid
import stylegan as script
from test_scripts import (
    ROOT,
    SCRIPTS,
    assert_same_bits,
    digits,
    fails,
    one_step,
    parameters,
    read,
    short,
    watch_steps,
)


@pytest.fixture
def small():
    """A generator whose w has a mean, and whose layers have noise, as after some training."""
    torch.manual_seed(0)
    generator = script.Generator(width=8, latent_dim=16)
    generator.w_avg.copy_(0.1 * torch.randn(16))
    for layer in generator.synthesis.layers:
        nn.init.constant_(layer.strength, 0.1)
    return generator


# %% Layers
def test_networks_have_nvidias_sizes(monkeypatch):
    """At 1024 pixels its code prints 26,219,627 parameters; 7,608 of them are in layers for growing."""
    official = {4: 512, 8: 512, 16: 512, 32: 512, 64: 256, 128: 128, 256: 64, 512: 32, 1024: 16}
    monkeypatch.setattr(script, "channels_at", lambda size, width: official)
    with torch.device("meta"):
        assert parameters(script.Generator(1024, 16, 512, 3)) == 26_219_627 - 7_608


def test_flags_leave_out_the_mapping_or_the_noise():
    assert parameters(script.Generator(mapping_layers=0)) == 897_825 - 8 * (128 * 128 + 128)
    assert parameters(script.Generator(noise=False)) == 897_825 - 2 * (128 + 128 + 64 + 32)
    z = torch.randn(4, 16)
    w = script.Mapping(16, layers=0)(z)
    torch.testing.assert_close(w, z / z.square().mean(1, keepdim=True).sqrt())
    plain = script.Synthesis(width=8, latent_dim=16, noise=False)
    assert torch.equal(*plain(torch.randn(1, 8, 16).expand(2, -1, -1)))


@pytest.mark.parametrize("up", [False, True])
def test_a_layer_by_hand(up):
    """Doubled, convolved and blurred; then noise, bias, leaky ReLU, and only then the style."""
    layer = script.StyledLayer(3, 5, 16, 8, up=up).eval()
    nn.init.normal_(layer.strength)
    nn.init.normal_(layer.bias)
    x, w = torch.randn(2, 3, *([4, 4] if up else [8, 8])), torch.randn(2, 16)
    maps = x.repeat_interleave(2, 2).repeat_interleave(2, 3) if up else x
    maps = F.conv2d(maps, layer.conv.weight * math.sqrt(2 / 27), padding=1)
    if up:
        padded = F.pad(maps, (1, 1, 1, 1))
        rows = (padded[:, :, :-2] + 2 * padded[:, :, 1:-1] + padded[:, :, 2:]) / 4
        maps = (rows[..., :-2] + 2 * rows[..., 1:-1] + rows[..., 2:]) / 4
    maps = maps + layer.strength * layer.noise + layer.bias
    maps = torch.where(maps > 0, maps, 0.2 * maps)
    scale, shift = (w @ layer.style.weight.T / 4 + layer.style.bias).split(5, 1)
    maps = (maps - maps.mean((2, 3), True)) / maps.std((2, 3), correction=0, keepdim=True)
    by_hand = maps * (1 + scale[:, :, None, None]) + shift[:, :, None, None]
    torch.testing.assert_close(layer(x, w), by_hand, rtol=0, atol=1e-4)


def test_sizes_change_smoothly():
    """Up is bilinear, but for the border; down is [1, 3, 3, 1] / 8."""
    x, blur = torch.randn(2, 3, 8, 8, dtype=torch.float64), script.Blur().double()
    ours = blur(nn.Upsample(scale_factor=2)(x))[:, :, 2:-2, 2:-2]
    bilinear = F.interpolate(x, scale_factor=2, mode="bilinear")[:, :, 2:-2, 2:-2]
    torch.testing.assert_close(ours, bilinear)
    row = torch.tensor([1.0, 3, 3, 1], dtype=torch.float64) / 8
    kernel = (row * row[:, None]).expand(3, 1, 4, 4)
    torch.testing.assert_close(nn.AvgPool2d(2)(blur(x)), F.conv2d(x, kernel, stride=2, padding=1, groups=3))
    blurred = [isinstance(layer.blur, script.Blur) for layer in script.Synthesis().layers]
    assert blurred == [False, False, True, False, True, False, True, False]


def test_every_layer_keeps_the_size_of_what_goes_through():
    """The variance of each layer's output is gain^2 times its input's: 2 before a LeakyReLU, else 1."""
    torch.manual_seed(0)
    generator, discriminator = script.Generator(), script.Discriminator()
    modules = [*generator.modules(), *discriminator.modules()]
    layers = [m for m in modules if isinstance(m, (script.EqualLinear, script.EqualConv2d))]
    assert len(layers) == 8 + 7 + 8 + 1 + 1 + 6 + 1 + 2  # mapping, convolutions, styles, to_rgb; D's
    plain = [layer.style for layer in generator.synthesis.layers]
    plain += [generator.synthesis.to_rgb, discriminator.layers[-1]]
    for layer in layers:
        x = torch.randn(2000, layer.weight.shape[1], *[3] * (layer.weight.ndim - 2))
        middle = layer(x) if x.ndim == 2 else layer(x)[:, :, 1, 1]
        gain = 1 if layer in plain else math.sqrt(2)
        assert middle.square().mean().sqrt().item() == pytest.approx(gain, rel=0.1)


def test_groups_of_three_and_a_single_image():
    deviation, x = script.GroupDeviation(), torch.randn(9, 2, 3, 3)
    extra = deviation(x)[:, 2, 0, 0]
    by_hand = (x[::3].var(0, correction=0) + 1e-8).sqrt().mean()  # images 0, 3 and 6
    torch.testing.assert_close(extra[::3], by_hand.expand(3))
    assert deviation(x[:1])[0, 2, 0, 0].item() == pytest.approx(1e-4)


def test_the_mean_colour_is_of_the_last_style_alone(small):
    """The lesson: each layer wipes what the styles before have set."""
    small.synthesis.to_rgb.weight.data = small.synthesis.to_rgb.weight.data.abs()
    ws = torch.randn(1, 8, 16).repeat(3, 1, 1)
    ws[1, :-1], ws[2, -1] = torch.randn(7, 16), torch.randn(16)
    plain, other_before, other_last = small.synthesis(ws)
    assert (plain - other_before).abs().mean() > 0.1
    assert (plain - other_before).mean().abs() < 1e-5
    assert (plain - other_last).mean().abs() > 1e-2


def test_noise_is_fresh_in_training_and_fixed_in_samples(small):
    ws = torch.randn(1, 8, 16).expand(2, -1, -1)
    first, second = small.synthesis(ws)
    assert not torch.equal(first, second)  # another for each image
    assert not torch.equal(small.synthesis(ws)[0], first)  # and each time
    small.eval()
    assert torch.equal(*small.synthesis(ws))
    for layer in script.Synthesis(width=8, latent_dim=16).layers:
        assert not layer.strength.any()  # silent at first


# %% A step
def test_a_step_reports_what_d_said_and_how_steep_it_is():
    metrics, (_, d_calls), _ = one_step(script, r1_weight=1.0)
    on_real, on_fake, _, again = (output.detach().sigmoid() for _, output in d_calls)
    assert metrics["d_real"].item() == pytest.approx(on_real.mean().item())
    assert metrics["d_fake"].item() == pytest.approx(on_fake.mean().item())
    by_hand = -(on_real.log() + (1 - on_fake).log()).mean()
    assert metrics["d_loss"].item() == pytest.approx(by_hand.item(), rel=1e-4)
    assert metrics["g_loss"].item() == pytest.approx(-again.log().mean().item(), rel=1e-4)
    discriminator = script.build(script.parse_args(["--device", "cpu"]))["discriminator"]
    (gradient,) = torch.autograd.grad(discriminator(x := digits(script, 8).requires_grad_()).sum(), x)
    assert metrics["r1"].item() == pytest.approx(gradient.square().sum().item() / 8 / 2, rel=1e-4)


def test_r1_is_left_out_of_the_other_steps_and_flattens_d_in_its_own():
    metrics, (_, d_calls), (_, without) = one_step(script, r1_weight=0.0)
    assert metrics["r1"] == 0
    assert len(d_calls) == 3  # real images, fakes, and fakes for G
    _, (_, d_calls), (_, light) = one_step(script, r1_weight=1e-6)
    assert len(d_calls) == 4
    _, _, (_, heavy) = one_step(script, r1_weight=1e6)
    for a, b, c in zip(without.grads[1], light.grads[1], heavy.grads[1]):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
        assert c.ndim == 1 or c.norm() > 10 * a.norm()


def test_r1_runs_in_every_tenth_step_tenfold_even_across_epochs(tmp_path, monkeypatch, no_plots):
    steps = watch_steps(monkeypatch, script)
    flags = ["--r1-weight", 0.3, "--mixing", 0.25, "--ema-images", 16]
    script.main(short("stylegan", tmp_path / "run", *flags))  # two epochs of six steps
    assert [step["r1_weight"] for step in steps] == [3.0] + 9 * [0.0] + [3.0, 0.0]
    assert {(step["mixing"], step["ema_images"]) for step in steps} == {(0.25, 16)}
    assert [means["r1"] > 0 for means in read(tmp_path / "run/checkpoint.pt")["history"]] == [True, True]


def test_w_avg_follows_the_mean_of_w():
    parts = script.build(script.parse_args(["--device", "cpu"]))
    generator = copy.deepcopy(parts["generator"])
    torch.manual_seed(1)
    script.train_step(**parts, real=digits(script, 8), **SCRIPTS["stylegan"]["step"])
    torch.manual_seed(1)
    w1 = generator.mapping(torch.randn(16, 128))[:8]
    torch.testing.assert_close(parts["generator"].w_avg, 0.005 * w1.mean(0))
    assert torch.equal(parts["ema"].w_avg, parts["generator"].w_avg)


def test_the_mapping_and_r1_are_never_in_bf16():
    parts = script.build(script.parse_args(["--device", "cpu"]))
    expected = script.r1_penalty(parts["discriminator"], digits(script, 8)) / 2
    kinds = {"mapping": [], "synthesis": [], "discriminator": []}
    layers = parts["generator"].mapping.layers[0], parts["generator"].synthesis.to_rgb
    for name, layer in zip(kinds, [*layers, parts["discriminator"].layers[0]]):
        layer.register_forward_hook(lambda module, inputs, out, name=name: kinds[name].append(out.dtype))
    step = SCRIPTS["stylegan"]["step"] | {"r1_weight": 1.0, "precision": "bf16"}
    metrics = script.train_step(**parts, real=digits(script, 8), **step)
    low, high = torch.bfloat16, torch.float32
    real, fake, r1, fake_again = low, low, high, low
    assert kinds == {"mapping": [high], "synthesis": [low], "discriminator": [real, fake, r1, fake_again]}
    assert torch.equal(metrics["r1"], expected)
    assert {value.dtype for value in metrics.values()} == {high}


# %% Pictures
def cells(path):
    """The 32x32 grey images of a grid, (rows, columns, 32, 32), in [0, 1]."""
    pixels = torch.from_numpy(np.array(Image.open(path)))[2:, 2:, 0] / 255
    return pixels.unfold(0, 32, 34).unfold(1, 32, 34)


def alike(a, b):
    """Equal, but for the rounding to 256 levels of grey."""
    return (a - b).abs().max() < 0.51 / 255


@pytest.fixture
def drawn(small, tmp_path):
    """The generator, a folder with its pictures, what their z are, and what it draws of these."""
    (tmp_path / "samples").mkdir()
    args = script.parse_args(["--device", "cpu", "--latent-dim", "16"])
    script.draw(small, tmp_path, 1, args)
    z = torch.randn(64, 16, generator=torch.Generator().manual_seed(42))
    return small, tmp_path, z, script.sample(small, z)[:, 0]


def test_interpolation_has_an_arc_in_z_above_a_line_in_w(drawn):
    generator, folder, z, plain = drawn
    grid = cells(folder / "interpolation.png")
    assert grid.shape[:2] == (8, 10)
    for row in range(8):
        start = row // 2 * 2  # rows in pairs: from z 0 to z 1, from z 2 to z 3, ...
        assert alike(grid[row, 0], plain[start])
        assert alike(grid[row, 9], plain[start + 1])
    angle = math.pi / 2 * 4 / 9
    arc = math.cos(angle) * z[:1] + math.sin(angle) * z[1:2]
    assert alike(grid[0, 4], script.sample(generator, arc)[0, 0])
    line = torch.lerp(*generator.ws(z[:2]).split(1), 4 / 9)
    assert alike(grid[1, 4], script.sample(generator.synthesis, line)[0, 0])


def test_mixing_takes_coarse_middle_or_fine_styles_from_the_top(drawn):
    generator, folder, z, plain = drawn
    grid = cells(folder / "mixing.png")
    assert grid.shape[:2] == (7, 7)
    assert not grid[0, 0].any()
    for k in range(6):
        assert alike(grid[k + 1, 0], plain[k])
        assert alike(grid[0, k + 1], plain[6 + k])
        ws = generator.ws(z[k : k + 1]).clone()
        layers = [slice(0, 4), slice(4, 6), slice(6, 8)][k // 2]  # of 4x4 and 8x8; of 16x16; of 32x32
        ws[:, layers] = generator.ws(z[8:9])[:, layers]
        assert alike(grid[k + 1, 3], script.sample(generator.synthesis, ws)[0, 0])


def test_truncation_goes_to_the_mean_and_past_it(drawn):
    generator, folder, z, plain = drawn
    grid = cells(folder / "truncation.png")
    assert grid.shape[:2] == (6, 7)
    average = script.sample(generator.synthesis, generator.w_avg.expand(1, 8, 16))[0, 0]
    opposite = generator.w_avg - (generator.mapping(z) - generator.w_avg)
    images = script.sample(generator.synthesis, opposite[:, None].expand(-1, 8, -1))[:, 0]
    for row in range(6):
        assert alike(grid[row, 0], plain[row])
        assert alike(grid[row, 4], average)
        assert alike(grid[row, 6], images[row])


def test_generate_truncates(tmp_path, no_plots):
    script.main(short("stylegan", tmp_path / "run", "--epochs", 1))
    argv = ["--checkpoint", str(tmp_path / "run/checkpoint.pt"), "--generate", "4", "--device", "cpu"]
    for name, flags in {"plain": [], "1": ["--truncation", "1"], "0": ["--truncation", "0"]}.items():
        script.main([*argv, *flags, "--out-dir", str(tmp_path / name)])
    plain, one, zero = (
        [path.read_bytes() for path in sorted((tmp_path / name).iterdir())] for name in ("plain", "1", "0")
    )
    assert plain == one
    assert len(set(plain)) == 4
    assert len(set(zero)) == 1  # all are the average image


# %% Data and flags
@pytest.mark.parametrize(
    "flags",
    "--image-size 48; --mixing 1.5; --mixing -0.1; --r1-every 0; --truncation 0.7; --batch-size 5; "
    "--batch-size 1; --mapping-layers -1; --mapping-layers 9; --ema-images 0; --r1-weight -1".split("; "),
)
def test_a_wrong_flag_is_named(flags, tmp_path, capsys):
    fails(script, [*short("stylegan", tmp_path / "run"), *flags.split()], capsys, flags.split()[0])
    assert not (tmp_path / "run").exists()


def test_a_data_set_brings_settings_that_flags_and_checkpoints_win_over(tmp_path, no_plots):
    def settings(*flags):
        args = script.parse_args([*flags, "--device", "cpu"])
        return args.image_size, args.width, args.epochs

    assert settings() == settings("--dataset", "fashion_mnist") == (32, 32, 5)
    assert settings("--dataset", "faces") == (64, 16, 30)
    assert settings("--dataset", "celeba") == settings("--dataset", "folder") == (64, 32, 5)
    assert settings("--dataset", "faces", "--width", "8", "--image-size", "32") == (32, 8, 30)
    script.main(short("stylegan", tmp_path / "run", "--epochs", 1))
    assert settings("--resume", str(tmp_path / "run/checkpoint.pt")) == (32, 8, 1)


def load(*flags):
    argv = ["--device", "cpu", "--data-dir", str(ROOT / "data"), "--limit", "1500", *flags]
    return script.load_images(script.parse_args(argv))


def as_set(images):
    return {image.numpy().tobytes() for image in images.contiguous()}


def test_images_are_padded_or_resized():
    digits, faces = load(), load("--dataset", "faces")
    assert (digits.shape, digits.dtype) == ((1500, 1, 32, 32), torch.uint8)
    assert digits.sum() == digits[:, :, 2:-2, 2:-2].sum()
    assert as_set(digits[:, :, 2:-2, 2:-2]) < as_set(datasets.MNIST(ROOT / "data").data)
    assert as_set(faces) < as_set(fid.open_faces(ROOT / "data/faces", "train")[0])
    larger, smaller = load("--image-size", "64"), load("--dataset", "faces", "--image-size", "32")
    assert (F.avg_pool2d(larger.float(), 2) - digits.float()).abs().mean() < 6
    assert (F.avg_pool2d(faces.float(), 2) - smaller.float()).abs().mean() < 6


@pytest.fixture
def pictures(tmp_path, monkeypatch):
    """Eight pictures of one colour each, in a folder of folders; the working folder is the one above."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pictures/below").mkdir(parents=True)
    for number in range(8):
        folder = tmp_path / ("pictures" if number % 2 else "pictures/below")
        Image.new("RGB", (90, 70), (30 * number, 99, 0)).save(
            folder / f"{number}.{['png', 'bmp'][number % 2]}"
        )
    return tmp_path / "pictures"


def test_a_folder_of_pictures_trains_and_generates_in_colour(pictures, capsys, no_plots):
    (pictures / "broken.jpg").write_bytes(b"no picture")
    flags = ["--dataset", "folder", "--data-dir", "pictures", "--width", "4", "--latent-dim", "8"]
    flags += ["--batch-size", "4", "--epochs", "1", "--device", "cpu", "--out-dir"]
    script.main([*flags, "run"])
    assert "broken.jpg: cannot identify" in capsys.readouterr().err
    script.main(["--generate", "3", "--checkpoint", "run/checkpoint.pt"])
    for path in Path("run/generated/001").iterdir():
        assert (Image.open(path).size, Image.open(path).mode) == ((64, 64), "RGB")
    before = list(Path("data/cache").iterdir())
    script.main([*flags, "again"])
    assert list(Path("data/cache").iterdir()) == before  # decoded once
    assert_same_bits(read("run/checkpoint.pt")["ema"], read("again/checkpoint.pt")["ema"])


def test_a_limit_is_chosen_by_the_seed_before_anything_is_decoded(pictures, monkeypatch):
    decoded, read_pictures = [], script.read_pictures
    monkeypatch.setattr(
        script, "read_pictures", lambda *args: decoded.append(args[0]) or read_pictures(*args)
    )
    argv = ["--dataset", "folder", "--data-dir", "pictures", "--device", "cpu", "--limit", "4"]
    for seed in "1", "2", "1":
        images = script.load_images(script.parse_args([*argv, "--seed", seed]))
        assert images.shape == (4, 3, 64, 64)
        greens = images[:, 1].unique()
        assert greens.tolist() == [99]
    assert decoded[0] == decoded[2] != decoded[1]


def test_a_folder_without_pictures_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    fails(script, ["--dataset", "folder", "--data-dir", "empty"], capsys, "--data-dir", "picture")
    fails(script, ["--dataset", "celeba", "--data-dir", tmp_path], capsys, "--data-dir")
    assert not Path("runs").exists()


def test_samples_and_distances_are_of_the_averaged_generator(tmp_path, monkeypatch, no_plots):
    measured = []
    monkeypatch.setattr(
        fid, "Judge", lambda *given: lambda images: measured.append(images) or (1.0, 1.0, 1.0)
    )
    monkeypatch.setattr(fid.track, "__defaults__", (20,))
    script.main(short("stylegan", tmp_path / "run", "--fid-every", 2))
    averaged = script.load_generator(tmp_path / "run/checkpoint.pt")
    torch.manual_seed(0)
    expected = script.sample(averaged, torch.randn(20, 16))
    assert (measured[0] - 255 * expected).abs().max() < 1
    z = torch.randn(64, 16, generator=torch.Generator().manual_seed(42))
    first = np.array(Image.open(tmp_path / "run/samples/epoch_0002.png"))[2:34, 2:34, 0]
    assert np.abs(first - 255 * script.sample(averaged, z)[0, 0].numpy()).max() < 1
