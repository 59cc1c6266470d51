"""pix2pix.py and cyclegan.py: pictures A and B from data sets and folders, rates, and what a run writes."""

import csv
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import cyclegan
import fid
import pix2pix
from test_scripts import ROOT, TRANSLATORS, fails, one_step, short, watch_steps

both = pytest.mark.parametrize("script", TRANSLATORS, indirect=True)


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Each test works in an empty folder, where decoded pictures are kept in data/cache."""
    monkeypatch.chdir(tmp_path)


def settings(script, *flags):
    flags = ["--image-size", "32", "--device", "cpu", "--dataset", "folder", *map(str, flags)]
    return script.parse_args(flags)


def load(script, *flags):
    """A and B to train on, A and B to test on, and the names of the last two."""
    args = settings(script, *flags)
    if script is pix2pix:
        a, b, _ = pix2pix.load_pairs(args, train=True)
        test_a, test_b, names = pix2pix.load_pairs(args, train=False)
        return a, b, test_a, test_b, names, names
    (domains, _), (tests, names) = (cyclegan.load_domains(args, train) for train in (True, False))
    return *domains.values(), *tests.values(), *names.values()


def write_folders(a, b, count=40):
    """Pictures of the same names: in folder `a` of a grey level, in `b` of a colour that tells the level."""
    for folder in (a, b):
        Path(folder).mkdir(parents=True, exist_ok=True)
    for number in range(count):
        Image.new("L", (40, 30), 5 * number).save(Path(a, f"{number:02d}.png"))
        Image.new("RGB", (30, 50), (5 * number, 7, 200)).save(Path(b, f"{number:02d}.webp"), lossless=True)


def levels(images):
    return (images[:, 0, 0, 0] // 5).tolist()


def held_out(count):
    """How many of the names 00, 01, ... are for testing where there is no test folder."""
    args = settings(pix2pix, "--folder-a", "a", "--folder-b", "b")
    write_folders("a", "b", count)
    return [int(name) for name in pix2pix.read_folders(args, train=False)[2]]


# %% Folders
@both
@pytest.mark.parametrize(
    ("train", "test"),
    [
        (("trainA", "trainB"), ("testA", "testB")),
        (("trainA", "trainB"), ("valA", "valB")),
        (("trainA", "trainB"), None),
        (("A", "B"), None),
    ],
)
def test_the_layouts_that_people_have_are_found(script, train, test):
    write_folders(*(f"mine/{name}" for name in train))
    if test:
        write_folders(*(f"mine/{name}" for name in test), count=5)
    a, b, test_a, test_b, names_a, names_b = load(script, "--data-dir", "mine")
    assert a.shape[1:] == b.shape[1:] == (3, 32, 32)
    kept = [] if test else held_out(40)
    assert levels(a) == levels(b) == [number for number in range(40) if number not in kept]
    assert levels(test_a) == levels(test_b) == (list(range(5)) if test else kept)
    assert names_a == names_b == [f"{number:02d}" for number in levels(test_a)]


@both
def test_two_folders_may_be_anywhere(script):
    write_folders("here", "there/trainB")
    a, b, *_ = load(script, "--folder-a", "here", "--folder-b", "there/trainB")
    assert levels(a) == levels(b)
    assert (b[:, 1:] == torch.tensor([7, 200])[:, None, None]).all()


@both
def test_a_and_b_may_be_side_by_side(script):
    Path("facades/train").mkdir(parents=True)
    for number in range(40):
        picture = Image.new("RGB", (100, 40), (5 * number, 0, 9))
        picture.paste((5 * number, 255, 9), (50, 0, 100, 40))
        picture.save(f"facades/train/{number:02d}.png")
    a, b, test_a, test_b, *_ = load(script, "--data-dir", "facades")
    assert levels(a) == levels(b)
    assert len(a) + len(test_a) == 40
    assert not a[:, 1].any()
    assert (test_b[:, 1] == 255).all()


@both
def test_a_can_be_made_from_a_folder_of_any_pictures(script):
    write_folders("a", "mine/below")
    Image.new("RGBA", (20, 20), (1, 2, 3, 0)).save("mine/clear.png")
    Path("mine/.hidden").mkdir()
    Image.new("L", (9, 9)).save("mine/.hidden/no.png")
    a, b, test_a, test_b, *_ = load(script, "--data-dir", "mine", "--task", "grey")
    assert (a.shape[1], b.shape[1]) == (1, 3)
    if script is pix2pix:
        assert len(a) + len(test_a) == 41
        assert (b == 255).flatten(1).all(1).sum() + (test_b == 255).flatten(1).all(
            1
        ).sum() == 1  # clear: white
    grey = test_b.float().mean(1, keepdim=True).round()
    assert torch.equal(test_a, grey.to(torch.uint8))


def test_damaged_pictures_and_those_without_a_partner_are_named_and_left_out(capsys):
    write_folders("A", "B")
    Path("B/03.webp").write_bytes(b"cut off")
    Path("A/07.png").unlink()
    a, b, test_a, test_b, *_ = load(pix2pix, "--data-dir", ".")
    assert levels(a) == levels(b)
    assert levels(test_a) == levels(test_b)
    assert len(a) + len(test_a) == 38
    output = capsys.readouterr()
    assert "1 pictures have no partner of their name: ['07']" in output.err
    assert "skipped " in output.err
    assert "B/03.webp: cannot identify" in output.err
    a, b, test_a, test_b, *_ = load(cyclegan, "--data-dir", ".")  # which needs no partners
    assert (len(a) + len(test_a), len(b) + len(test_b)) == (39, 39)


@both
def test_folders_that_cannot_be_used_are_refused_in_one_line(script, capsys):
    flags = ["--dataset", "folder", "--device", "cpu", "--epochs", "1"]
    fails(script, [*flags, "--data-dir", "nowhere"], capsys, "--dataset folder", "trainA", "--folder-a")
    fails(script, [*flags, "--folder-a", "here"], capsys, "--folder-a, --folder-b")
    Path("A").mkdir()
    Path("B").mkdir()
    fails(script, [*flags, "--data-dir", "."], capsys, "A: no such file, or no pictures")
    fails(script, ["--task", "lines", "--device", "cpu"], capsys, "--task", "--dataset faces")
    assert not Path("runs").exists()


def test_cyclegan_takes_no_two_folders_for_pairs(capsys, no_plots):
    """Pictures A/01 and B/01 need have nothing to do with each other."""
    write_folders("A", "B", count=20)
    flags = ["--dataset", "folder", "--data-dir", ".", "--image-size", "32", "--width", "4", "--blocks", "1"]
    cyclegan.main([*flags, "--batch-size", "4", "--epochs", "1", "--device", "cpu", "--out-dir", "run"])
    assert "a2b_error" not in capsys.readouterr().out
    cyclegan.main(short("cyclegan", "digits", "--epochs", "1"))
    assert "a2b_error" in capsys.readouterr().out


@both
def test_pictures_are_decoded_once(script, monkeypatch):
    write_folders("A", "B")
    first = load(script, "--data-dir", ".")
    monkeypatch.setattr(script, "decode", None)  # decodes no more
    for before, after in zip(first[:4], load(script, "--data-dir", ".")[:4]):
        assert torch.equal(before, after)


@both
def test_a_limit_is_chosen_before_anything_is_decoded(script, monkeypatch):
    write_folders("A", "B")
    a, _, test_a, *_ = load(script, "--data-dir", ".", "--limit", 3)
    assert len(a) == len(test_a) == 3
    cached = [np.load(path)["images"] for path in Path("data/cache").glob("*.npz")]
    assert [len(images) for images in cached] == [3] * 4


# %% Pictures A that are made from B
@both
def test_a_is_made_from_b_as_it_says(script):
    """A dot of 3x3 pixels in a picture of 16x16, by hand."""
    b = torch.zeros(2, 3, 16, 16, dtype=torch.uint8)
    b[1, :, 7:10, 7:10] = torch.tensor([30, 90, 120], dtype=torch.uint8)[:, None, None]
    ring = torch.zeros(16, 16, dtype=torch.uint8)
    ring[6:11, 6:11] = 80  # the mean of the channels
    ring[7:10, 7:10] = 0
    outline, grey, mosaic = (script.make_a(task, b) for task in ("outline", "grey", "mosaic"))
    assert torch.equal(outline[1, 0], ring)
    assert not outline[0].any()
    assert (grey[1, 0, 8, 8], grey.sum()) == (80, 9 * 80)
    # Blocks of 2x2: rows 6 and 7 hold one of the dot's rows, 8 and 9 hold two.
    assert mosaic[1, 2, 6:8, 6:8].tolist() == [[30, 30]] * 2
    assert mosaic[1, 2, 6:8, 8:10].tolist() == [[60, 60]] * 2
    assert mosaic[1, 2, 8:10, 8:10].tolist() == [[120, 120]] * 2
    assert mosaic[1, 2].sum() == b[1, 2].sum()


def test_pix2pix_trains_on_pairs(monkeypatch, no_plots):
    steps = watch_steps(monkeypatch, pix2pix)
    pix2pix.main(short("pix2pix", "run"))
    for step in steps:
        a, b = (((step[side] + 1) * 127.5).round().to(torch.uint8) for side in "ab")
        assert torch.equal(a, pix2pix.make_a("mosaic", b))
    pix2pix.main(short("pix2pix", "back", "--direction", "b2a"))
    rows = steps[-1]["b"].unflatten(2, (8, 4))  # of mosaics: each block has four equal ones
    assert torch.equal(rows[:, :, :, 0], rows[:, :, :, 3])
    assert not torch.equal(steps[-1]["a"], steps[-1]["b"])


def test_cyclegan_trains_on_different_digits(monkeypatch, no_plots):
    """And has pairs to test on."""
    args = cyclegan.parse_args(["--limit", "40", "--data-dir", str(ROOT / "data"), "--device", "cpu"])
    domains, _ = cyclegan.load_domains(args, train=True)
    tests, names = cyclegan.load_domains(args, train=False)
    outlines = cyclegan.make_a("outline", domains["b"])
    assert len(domains["a"]) == len(domains["b"]) == 20
    assert not any(torch.equal(a, outline) for a in domains["a"] for outline in outlines)
    assert torch.equal(tests["a"], cyclegan.make_a("outline", tests["b"]))
    assert names["a"] == names["b"]


def test_cyclegan_shows_the_larger_domain_once_an_epoch_and_the_smaller_as_often_as_it_takes(monkeypatch):
    torch.manual_seed(0)
    large, small = torch.zeros(10), torch.zeros(4)
    assert sorted(cyclegan.shuffled_rows(large, 10).tolist()) == list(range(10))
    rows = cyclegan.shuffled_rows(small, 10).tolist()
    assert len(rows) == 10
    assert sorted(rows[:4]) == sorted(rows[4:8]) == list(range(4))
    assert rows[:4] != rows[4:8]


@both
def test_faces_have_line_drawings_row_by_row(script):
    flags = ["--dataset", "faces", "--data-dir", str(ROOT / "data"), "--limit", "200", "--device", "cpu"]
    args = script.parse_args(flags)
    assert (args.task, args.image_size, args.patch_layers) == ("lines", 64, 2)
    if script is pix2pix:
        a, b, _ = pix2pix.load_pairs(args, train=False)
    else:
        a, b = (cyclegan.load_domains(args, train=False)[0][side] for side in "ab")
    assert (a.shape, b.shape) == ((200, 1, 64, 64), (200, 3, 64, 64))
    dark = [(images.float().mean(1) < 60).flatten(1).float() for images in (a, b)]
    own, others = ((x * y).sum(1) / x.sum(1) for x, y in (dark, (dark[0], dark[1].roll(1, 0))))
    assert own.mean() > 2 * others.mean() > 0.2  # what is black in the drawing is dark in the face


def test_cyclegan_a_is_without_glasses_and_b_with_glasses():
    flags = ["--dataset", "faces", "--task", "glasses", "--data-dir", str(ROOT / "data"), "--device", "cpu"]
    domains, names = cyclegan.load_domains(cyclegan.parse_args(flags), train=False)
    faces, _ = fid.open_faces(ROOT / "data/faces", "test")
    table = [*csv.DictReader(open(ROOT / "data/faces/test.csv"))]
    for side, expected in ("a", {"none"}), ("b", {row["glasses"] for row in table} - {"none"}):
        assert {table[int(name)]["glasses"] for name in names[side]} == expected
        assert torch.equal(domains[side][5], faces[int(names[side][5])])
    assert len(names["a"]) + len(names["b"]) == len(table)


# %% Training
@both
def test_the_rates_fall_to_zero_in_a_straight_line(script, monkeypatch, no_plots):
    """Full for a quarter of the run; a run that dies after its first epoch goes on in the same line."""
    rates, train_step = [], script.train_step

    def watched(**arguments):
        optimizers = [arguments["optimizer_g"], arguments["optimizer_d"]]
        rates.append([optimizer.param_groups[0]["lr"] for optimizer in optimizers])
        if len(rates) == dies_at:
            raise KeyboardInterrupt
        return train_step(**arguments)

    monkeypatch.setattr(script, "train_step", watched)
    dies_at, flags = None, ["--decay", "0.75", "--lr-g", "0.004", "--lr-d", "0.002"]
    script.main(short(script.SCRIPT, "run", *flags))
    total = len(rates)
    expected = [0.004 * min(1, (1 - step / total) / 0.75) for step in range(total)]
    assert [g for g, _ in rates] == pytest.approx(expected)
    assert [d for _, d in rates] == pytest.approx([rate / 2 for rate in expected])

    whole, dies_at = [*rates], total // 2 + 1
    rates.clear()
    with pytest.raises(SystemExit):
        script.main(short(script.SCRIPT, "killed", *flags))
    dies_at = None
    script.main(["--resume", "killed/checkpoint.pt", "--device", "cpu"])
    assert rates[: total // 2] + rates[total // 2 + 1 :] == whole


def test_pix2pix_learns_from_one_pair_at_a_time(no_plots):
    """Batch normalisation of a single pixel would make it 0, whatever the input is."""
    network, bottoms = pix2pix.Generator(1, 1), []
    network.down[-1].register_forward_hook(lambda module, inputs, output: bottoms.append(output))
    for _ in range(2):
        network(2 * torch.rand(1, 1, 32, 32) - 1)
    assert (bottoms[0] - bottoms[1]).abs().max() > 0.01
    pix2pix.main(short("pix2pix", "run", "--batch-size", "1", "--limit", "2", "--epochs", "1"))


def test_cyclegan_translates_each_picture_for_itself():
    """In training as in use, in a batch as alone."""
    torch.manual_seed(0)
    a, network = 2 * torch.rand(4, 1, 32, 32) - 1, cyclegan.Generator(1, 1).apply(cyclegan.init_weights)
    together = network(a)
    assert torch.allclose(together[1:2], network(a[1:2]), atol=1e-5)
    assert torch.allclose(together, network.eval()(a), atol=1e-5)


def test_cyclegan_instance_normalisation_is_pytorchs():
    maps = torch.randn(3, 4, 5, 6) * 3 + 2
    ours = cyclegan.NORMS["instance"](4)
    torch.testing.assert_close(ours(maps), torch.nn.InstanceNorm2d(4)(maps))
    assert not ours.state_dict()


def test_cyclegan_a_residual_block_adds_to_its_input():
    block, x = cyclegan.ResidualBlock(8, "instance"), torch.randn(2, 8, 8, 8)
    assert (block(x) - x).min() < -0.5 < 0.5 < (block(x) - x).max()
    torch.nn.init.zeros_(block.layers[5].weight)
    assert torch.equal(block(x), x)


@both
def test_bf16_is_in_the_networks_only(script, monkeypatch):
    """Losses get fp32, and gradients stay in it."""
    seen, inside = [], []
    for module, name in (script, "discriminator_loss"), (script, "generator_loss"), (script.F, "l1_loss"):
        loss = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *x, loss=loss: seen.extend(x) or loss(*x))
    for network in (script.Generator, script.Discriminator):
        forward = network.forward
        monkeypatch.setattr(network, "forward", lambda *x, f=forward: inside.append(f(*x)) or inside[-1])
    _, _, (g_recorder, d_recorder) = one_step(script, precision="bf16")
    assert {tensor.dtype for tensor in seen} == {torch.float32}
    assert {tensor.dtype for tensor in inside} == {torch.bfloat16}
    for recorder in (g_recorder, d_recorder):
        grads = [grad for grads in recorder.grads for grad in grads if grad is not None]
        assert {grad.dtype for grad in grads} == {torch.float32}


# %% Pictures and files
def test_pix2pix_measures_by_hand():
    """With a generator that halves what it is given: pictures from -1 to 1, so black becomes dark grey."""

    class Fade(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.tensor(0.5))

        def forward(self, a):
            return a * self.weight

    stripes = torch.zeros(2, 1, 4, 4, dtype=torch.uint8)
    stripes[..., ::2] = 255
    measures = pix2pix.measure(Fade(), stripes, stripes)
    assert measures == pytest.approx({"error": 0.25, "sharpness": 0.5})


def test_cyclegan_measures_both_directions_on_pairs():
    generator = torch.nn.ModuleDict({way: cyclegan.Generator(1, 1, 8, 1) for way in ("ab", "ba")})
    tests = {side: torch.randint(0, 256, (5, 1, 32, 32), dtype=torch.uint8) for side in "ab"}
    measures = cyclegan.measure(generator, tests)
    fakes = {way: network(tests[way[0]] / 127.5 - 1) / 2 + 0.5 for way, network in generator.items()}
    for name, fake, target in ("a2b_error", fakes["ab"], tests["b"]), ("b2a_error", fakes["ba"], tests["a"]):
        assert measures[name] == pytest.approx((fake - target / 255).abs().mean().item(), rel=1e-5)


def test_pix2pix_pictures_show_inputs_outputs_targets_and_what_dropout_does(no_plots):
    pix2pix.main(short("pix2pix", "run", "--epochs", "1"))
    samples = np.array(Image.open("run/samples/epoch_0001.png"))[2:, 2:, 0]  # cells of 32 and a border of 2
    rows = [samples[34 * row : 34 * row + 32, :32] for row in range(3)]
    args = pix2pix.parse_args(["--data-dir", str(ROOT / "data"), "--device", "cpu"])
    a, b, _ = pix2pix.load_pairs(args, train=False)
    assert (rows[0] == a[0, 0].numpy()).all()
    assert (rows[2] == b[0, 0].numpy()).all()
    output = pix2pix.sample(pix2pix.load_generator("run/checkpoint.pt"), a[:1] / 255)
    assert np.abs(rows[1] / 255 - output[0, 0].numpy()).max() < 1 / 255
    cells = np.array(Image.open("run/variants.png"))[2:, 2:, 0]
    assert cells.shape == (5 * 34, 8 * 34)
    for row in range(5):
        line = [cells[34 * row : 34 * row + 32, 34 * column : 34 * column + 32] for column in range(8)]
        assert (line[0] == a[row, 0].numpy()).all()
        draws = np.stack(line[1:7]).astype(float)
        assert draws.std(0).max() > 0
        assert np.abs(line[7] - 2 * draws.std(0)).max() <= 3


def test_cyclegan_pictures_show_the_way_there_and_back(no_plots):
    cyclegan.main(short("cyclegan", "run", "--epochs", "1"))
    cells = np.array(Image.open("run/samples/epoch_0001.png"))[2:, 2:, 0] / 255
    rows = [cells[34 * row : 34 * row + 32, :32] for row in range(6)]
    args = cyclegan.parse_args(["--data-dir", str(ROOT / "data"), "--device", "cpu"])
    domains, _ = cyclegan.load_domains(args, train=False)
    ab, ba = (cyclegan.load_generator("run/checkpoint.pt", direction=way) for way in ("a2b", "b2a"))
    a, b = (domains[side][:1] / 255 for side in "ab")
    fake_b, fake_a = cyclegan.sample(ab, a), cyclegan.sample(ba, b)
    expected = [a, fake_b, cyclegan.sample(ba, fake_b), b, fake_a, cyclegan.sample(ab, fake_a)]
    for row, image in zip(rows, expected):
        assert np.abs(row - image[0, 0].numpy()).max() < 1 / 255


@both
def test_generate_translates_test_pictures_and_translate_your_own(script, no_plots):
    """Grey, colour, transparent and 16-bit pictures of any shape; damaged ones are left out."""
    script.main(short(script.SCRIPT, "run", "--epochs", "1"))
    script.main(["--generate", "30", "--checkpoint", "run/checkpoint.pt", "--out-dir", "made"])
    names = sorted(path.name for path in Path("made").glob("*.png"))
    assert names == [f"{number:05d}.png" for number in range(30)]  # the first 30, whatever --limit was

    Path("own/below").mkdir(parents=True)
    Image.new("L", (32, 32), 200).save("own/below/grey.png")
    Image.new("RGB", (50, 40), (200, 200, 200)).save("own/below/colour.webp", lossless=True)
    Image.new("RGBA", (40, 90), (9, 9, 9, 0)).save("own/clear.png")
    Image.new("L", (32, 32), 7).save("own/same.jpg")
    Image.fromarray(np.full((32, 32), 200 * 257, np.uint16)).save("own/same.png")
    Path("own/broken.png").write_bytes(b"not a picture")
    script.main(["--translate", "own", "--checkpoint", "run/checkpoint.pt"])
    folder = Path("run/generated/001")
    names = ["below/colour.png", "below/grey.png", "clear.png", "same.png", "same.png.png"]
    assert sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.png")) == names
    generator = script.load_generator("run/checkpoint.pt")
    for name, level in (
        ("below/grey.png", 200),
        ("below/colour.png", 200),
        ("clear.png", 255),
        ("same.png.png", 200),
    ):
        expected = script.sample(generator, torch.full((1, 1, 32, 32), level / 255))[0, 0]
        assert np.abs(np.array(Image.open(folder / name))[:, :, 0] / 255 - expected.numpy()).max() < 1 / 255


@both
@pytest.mark.parametrize("flags", ["--dataset mnist", "--dataset folder --data-dir .", "--task mosaic"])
def test_generate_refuses_flags_that_do_not_fit_the_checkpoint(script, flags, capsys):
    checkpoint = ROOT / f"pretrained/{script.SCRIPT}.pt"
    argv = ["--generate", 2, "--checkpoint", checkpoint, "--out-dir", "new", "--device", "cpu"]
    fails(script, [*argv, *flags.split()], capsys)
    assert not Path("new").exists()


@pytest.mark.parametrize("flags", ["--limit 1", "--dataset faces --task glasses --limit 2"])
def test_cyclegan_refuses_to_train_with_nothing_on_one_side(flags, capsys):
    argv = ["--data-dir", ROOT / "data", "--device", "cpu", *flags.split()]
    fails(cyclegan, argv, capsys, "--limit")
    assert not Path("runs").exists()


@both
def test_pictures_that_train_do_not_test(script):
    """Also where only one of two folders has a test folder beside it."""
    write_folders("x/trainA", "y/photos")
    write_folders("x/testA", "y/other", count=5)
    a, b, test_a, test_b, *_ = load(script, "--folder-a", "x/trainA", "--folder-b", "y/photos")
    assert not {*levels(a)} & {*levels(test_a)}
    assert not {*levels(b)} & {*levels(test_b)}
    assert levels(test_a) == levels(test_b)


def test_the_same_pictures_by_other_names_are_not_mixed_up(no_plots):
    pix2pix.main(short("pix2pix", "run", "--epochs", "1"))
    Path("own/cats").mkdir(parents=True)
    Image.new("L", (32, 32), 200).save("own/cats/11.png")
    for folder, name in ("own", "cats/11.png"), ("own/cats", "11.png"):
        out = f"new/{name.replace('/', '_')}"
        pix2pix.main(["--translate", folder, "--checkpoint", "run/checkpoint.pt", "--out-dir", out])
        assert Path(out, name).exists()


def test_translate_refuses_what_has_no_pictures(capsys, no_plots):
    pix2pix.main(short("pix2pix", "run", "--epochs", "1"))
    Path("empty").mkdir()
    for folder in ("empty", "nowhere"):
        fails(
            pix2pix, ["--translate", folder, "--checkpoint", "run/checkpoint.pt"], capsys, folder, "pictures"
        )
    fails(pix2pix, ["--translate", "empty"], capsys, "--translate", "--checkpoint")
    assert not Path("run/generated").exists()


def test_cyclegan_generates_in_both_directions(no_plots):
    cyclegan.main(short("cyclegan", "run", "--epochs", "1"))
    args = cyclegan.parse_args(["--limit", "24", "--data-dir", str(ROOT / "data"), "--device", "cpu"])
    tests, names = cyclegan.load_domains(args, train=False)
    for direction in ("a2b", "b2a"):
        flags = ["--direction", direction, "--generate", "1", "--checkpoint", "run/checkpoint.pt"]
        cyclegan.main([*flags, "--out-dir", direction])
        generator = cyclegan.load_generator("run/checkpoint.pt", direction=direction)
        expected = cyclegan.sample(generator, tests[direction[0]][:1] / 255)[0, 0]
        picture = np.array(Image.open(Path(direction, f"{names['a'][0]}.png")))[:, :, 0] / 255
        assert np.abs(picture - expected.numpy()).max() < 1 / 255


@both
def test_the_pretrained_generators_colour_faces_that_they_have_not_seen(script):
    """A face is closer to the target than another face is, though the drawing does not tell its colours."""
    flags = ["--dataset", "faces", "--limit", "64", "--data-dir", str(ROOT / "data"), "--device", "cpu"]
    args = script.parse_args(flags)
    if script is pix2pix:
        a, b, _ = pix2pix.load_pairs(args, train=False)
    else:
        a, b = (cyclegan.load_domains(args, train=False)[0][side] for side in "ab")
    output = script.sample(script.load_generator(ROOT / f"pretrained/{script.SCRIPT}.pt"), a / 255)
    error, of_another = ((faces - b / 255).abs().mean() for faces in (output, b.roll(1, 0) / 255))
    assert error < 0.75 * of_another


@both
def test_fid_measures_translations_of_test_pictures_into_b(script, monkeypatch, no_plots):
    measured = []
    monkeypatch.setattr(
        fid, "Judge", lambda *given: lambda images: measured.append(images) or (1.0, 1.0, 1.0)
    )
    script.main(short(script.SCRIPT, "run", "--fid-every", "2"))
    args = script.parse_args(["--limit", "24", "--data-dir", str(ROOT / "data"), "--device", "cpu"])
    if script is pix2pix:
        a, _, _ = pix2pix.load_pairs(args, train=False)
    else:
        a = cyclegan.load_domains(args, train=False)[0]["a"]
    expected = script.sample(script.load_generator("run/checkpoint.pt"), a / 255)
    assert len(measured) == 1
    assert (measured[0] - 255 * expected).abs().max() < 1
