"""Every script for a few steps, and the mathematics of each against values worked out in another way.

    pytest test_scripts.py                  # on a laptop, with no network
    pytest test_scripts.py -k wgan          # what is about one script
    pytest                                  # the tests in tests/, too

A new script joins by a row in SCRIPTS. What is special to it has a section of its own below.
"""

import copy
import importlib
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from PIL import Image
from torch import nn
from torchvision import datasets

import cgan
import cyclegan
import dcgan32_wgan_sn
import dcgan64_celeba
import dcgan_mnist
import fid
import gan_2d
import pix2pix
import r3gan
import stylegan
import vanilla_gan
import wgan_gp

ROOT = Path(__file__).parent
torch.set_num_threads(1)  # tiny batches want no more

# Each script: the flags of a short run, and what train_step takes beside networks, optimisers and images.
SCRIPTS = {
    "vanilla_gan": {"flags": [], "step": {"minimax": False}},
    "dcgan_mnist": {"flags": [], "step": {"real_label": 0.9}},
    "wgan_gp": {"flags": ["--n-critic", "2"], "step": {"n_critic": 2, "gp_weight": 10.0}},
    "cgan": {"flags": [], "step": {"classes": torch.arange(8), "real_label": 0.9}},
    "dcgan32_wgan_sn": {"flags": ["--dataset", "mnist"], "step": {}},
    "dcgan64_celeba": {"flags": ["--dataset", "mnist"], "step": {}},
    "pix2pix": {
        "flags": ["--width", "8", "--decay", "0"],
        "step": {"l1_weight": 100.0, "gan_weight": 1.0, "precision": "fp32"},
    },
    "cyclegan": {
        "flags": ["--width", "8", "--blocks", "1", "--pool", "2", "--decay", "0"],
        "step": {"cycle_weight": 10.0, "identity_weight": 5.0, "precision": "fp32"},
    },
    "r3gan": {
        "flags": [],
        "step": {"pairing": True, "r1_weight": 1.0, "r2_weight": 1.0, "ema_images": 1000},
    },
    "gan_2d": {"flags": ["--steps", "6"], "step": {"loss": "non-saturating"}},
    "stylegan": {
        "flags": ["--width", "8", "--latent-dim", "16"],
        "step": {"mixing": 0.9, "r1_weight": 100.0, "ema_images": 1000, "precision": "fp32"},
    },
}
TRANSLATORS = ["pix2pix", "cyclegan"]  # their inputs are pictures
IMAGES = [name for name in SCRIPTS if name != "gan_2d"]  # what is about images leaves the points out
FROM_NOISE = [name for name in IMAGES if name not in TRANSLATORS]
of_images = pytest.mark.parametrize("script", IMAGES, indirect=True)
from_noise = pytest.mark.parametrize("script", FROM_NOISE, indirect=True)
trained_on_images = pytest.mark.parametrize("trained", IMAGES, indirect=True, scope="session")
trained_from_noise = pytest.mark.parametrize("trained", FROM_NOISE, indirect=True, scope="session")

# Functions and classes of one name have the same text in all scripts. These scripts have a form of their own:
OWN = {name: [*SCRIPTS] for name in ("add_flags", "build", "train", "train_step", "load_generator")}
OWN |= {name: [*SCRIPTS] for name in ("Generator", "Discriminator", "Critic")}
OWN |= {name: [*SCRIPTS] for name in ("generator_loss", "discriminator_loss", "critic_loss")}
OWN["init_weights"] = ["vanilla_gan", "r3gan"]  # no convolutions; weights of another size
OWN["read_sheets"] = ["r3gan"]  # takes no folders
# These have no --published:
OWN["parse_args"] = ["vanilla_gan", "r3gan", "dcgan64_celeba", "gan_2d", "stylegan", *TRANSLATORS]
# Classes; three digits and faces; 32x32; folders:
OWN["load_images"] = ["cgan", "r3gan", "dcgan32_wgan_sn", "dcgan64_celeba", "stylegan"]
OWN["sample"] = ["cgan", "gan_2d", *TRANSLATORS]  # takes classes; points; pictures
OWN["make_generator"] = ["pix2pix", "stylegan"]
OWN["read_pictures"] = ["stylegan"]
OWN["plot"] = ["gan_2d"]  # makes a film of its own
OWN["save"] = ["gan_2d", "stylegan", "r3gan"]  # no data; these keep the average
OWN["main"] = ["dcgan32_wgan_sn", "dcgan64_celeba", "stylegan", *TRANSLATORS]  # --precision
for name in ("draw", "generate"):  # by class; uniform noise; points; styles; pictures
    OWN[name] = ["cgan", "dcgan32_wgan_sn", "gan_2d", "stylegan", *TRANSLATORS]
for name in ("check", "measure", "count_channels", "read_folders", "decode"):
    OWN[name] = TRANSLATORS  # one direction and pairs; two directions and none


def short(name, folder, *more):
    """The flags of a run of 24 digits (or 6 steps on points) an epoch, in batches of 4, on the CPU."""
    flags = ["--batch-size", 4, "--epochs", 2, "--device", "cpu"]
    flags += ["--limit", 24, "--data-dir", ROOT / "data"] if name in IMAGES else []
    return [str(flag) for flag in [*flags, "--out-dir", folder, *SCRIPTS[name]["flags"], *more]]


@pytest.fixture(scope="session", params=SCRIPTS)
def trained(request, tmp_path_factory):
    """Each script in turn: its module, and the folder of a run of two epochs, which all tests share."""
    folder = tmp_path_factory.mktemp(request.param) / "run"
    script = importlib.import_module(request.param)
    script.main(short(request.param, folder))
    return script, folder


@pytest.fixture(params=SCRIPTS)
def script(request):
    return importlib.import_module(request.param)


@pytest.fixture
def no_plots(monkeypatch):
    """A plot takes longer than a run of a few steps."""
    monkeypatch.setattr(Figure, "savefig", lambda figure, path: Image.new("L", (1, 1)).save(path))


def watch_steps(monkeypatch, script):
    """A list that gets what each train_step of a run is called with."""
    calls, train_step = [], script.train_step

    def watched(**arguments):
        calls.append(arguments)
        return train_step(**arguments)

    monkeypatch.setattr(script, "train_step", watched)
    return calls


def read(path):
    return torch.load(path, weights_only=True)


def assert_same_bits(a, b):
    """Tensors, numbers and texts, or dicts and lists of them, are equal to the last bit."""
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        a, b = list(a.values()), list(b.values())
    if isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for x, y in zip(a, b):
            assert_same_bits(x, y)
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    else:
        assert a == b


def digits(script, count):
    """The first digits of MNIST in [-1, 1], as a script trains on them; points for gan_2d.py."""
    if script is gan_2d:
        return gan_2d.Clusters("ring").draw(count)
    images = datasets.MNIST(ROOT / "data").data[:count, None].float() / 127.5 - 1
    if script is dcgan64_celeba:
        return F.interpolate(images, (64, 64)).expand(-1, 3, -1, -1)
    of_32 = script in (dcgan32_wgan_sn, stylegan, pix2pix, cyclegan)
    return F.pad(images, (2, 2, 2, 2), value=-1.0) if of_32 else images


def batch_of(script, count):
    """What a train_step learns from: digits; to translate, other digits as well."""
    images = digits(script, count)
    return {"a": images.flip(0), "b": images} if script.SCRIPT in TRANSLATORS else {"real": images}


def inputs_of(script, generator, count):
    """What sample takes beside a generator."""
    if script.SCRIPT in TRANSLATORS:
        return [torch.rand(count, 1, 32, 32)]
    noise = dcgan32_wgan_sn.uniform if script is dcgan32_wgan_sn else torch.randn
    z = noise(count, generator.latent_dim)
    return [z, torch.arange(count) % 10] if script is cgan else [z]


def parameters(network):
    return sum(parameter.numel() for parameter in network.parameters())


# %% Every script: a run
def test_a_run_leaves_pictures_figures_and_a_checkpoint(trained):
    script, folder = trained
    files = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert files >= {"samples/epoch_0001.png", "samples/epoch_0002.png", "progress.gif", "losses.png"}
    assert files >= {"config.json", "history.csv", "checkpoint.pt"}
    assert ("interpolation.png" in files) == (script.SCRIPT in FROM_NOISE and script is not cgan)
    for path in (folder / "samples").glob("*.png"):
        assert len(np.unique(Image.open(path))) > 10  # a picture, and not one colour
    assert Image.open(folder / "progress.gif").n_frames == 2
    assert json.loads((folder / "config.json").read_text())["seed"] == 42

    header, *rows = (folder / "history.csv").read_text().splitlines()
    metrics = [name for panel in script.PANELS for name in panel]
    assert header.split(",")[: 1 + len(metrics)] == ["epoch", *metrics]
    assert [row.split(",")[0] for row in rows] == ["1", "2"]
    saved = read(folder / "checkpoint.pt")
    assert [float(value) for value in rows[1].split(",")] == pytest.approx(
        [*saved["history"][1].values()], 1e-4
    )
    assert not {"device", "out_dir", "resume"} & saved["settings"].keys()  # of that machine, not of the run


def test_a_resumed_run_ends_with_the_same_bits(trained, tmp_path, no_plots):
    script, whole = trained
    script.main(short(script.SCRIPT, tmp_path / "run", "--epochs", 1))
    script.main(["--resume", str(tmp_path / "run/checkpoint.pt"), "--epochs", "2", "--device", "cpu"])
    a, b = read(whole / "checkpoint.pt"), read(tmp_path / "run/checkpoint.pt")
    assert a.keys() == b.keys()
    assert_same_bits(a, b)  # networks, optimisers, history, settings
    assert len(list((tmp_path / "run/samples").glob("epoch_*.png"))) == 2


@of_images
def test_every_image_is_seen_once_an_epoch_in_a_new_order(script, tmp_path, monkeypatch, no_plots):
    steps = watch_steps(monkeypatch, script)
    script.main(short(script.SCRIPT, tmp_path / "run"))
    seen = [step["b" if script.SCRIPT in TRANSLATORS else "real"] for step in steps]
    first, second = torch.cat(seen).flatten(1).chunk(2)
    assert len(first.unique(dim=0)) == len(first) == (12 if script is cyclegan else 24)
    assert not torch.equal(first, second)
    assert_same_bits(first[first.sum(1).argsort()], second[second.sum(1).argsort()])
    assert (first.min(), first.max()) == (-1, 1)


@from_noise
def test_the_last_short_batch_is_left_out_and_batches_shrink_to_fit(script, tmp_path, monkeypatch, no_plots):
    steps = watch_steps(monkeypatch, script)
    batch = 8 if script is wgan_gp else 4  # images in a step: two batches for the critic's two steps
    script.main(short(script.SCRIPT, tmp_path / "a", "--epochs", 1, "--limit", 15))
    assert [len(step["real"]) for step in steps] == [batch] * (15 // batch)
    script.main(short(script.SCRIPT, tmp_path / "b", "--epochs", 1, "--limit", 6, "--batch-size", 100))
    assert len(steps[-1]["real"]) == 6


@trained_from_noise
def test_generate_draws_what_load_generator_draws_in_another_program(trained, tmp_path):
    script, folder = trained
    checkpoint = folder / "checkpoint.pt"
    script.main(["--generate", "5", "--checkpoint", str(checkpoint), "--out-dir", str(tmp_path / "five")])
    pictures = sorted((tmp_path / "five").rglob("*.png"), key=lambda path: path.name)
    assert [path.name for path in pictures] == [f"0000{number}.png" for number in range(5)]

    generator = script.load_generator(checkpoint)
    assert not generator.training
    torch.manual_seed(42)
    images = script.sample(generator, *inputs_of(script, generator, 5))
    for path, image in zip(pictures, images):
        assert np.abs(np.array(Image.open(path))[:, :, 0] / 255 - image[0].numpy()).max() <= 0.5 / 255 + 1e-6


@of_images
def test_sampling_is_per_image_and_leaves_the_generator_as_it_was(script):
    generator = script.build(script.parse_args(["--device", "cpu"]))["generator"]
    generator = generator["ab"] if script is cyclegan else generator
    inputs, before = inputs_of(script, generator, 6), copy.deepcopy(generator.state_dict())
    together = script.sample(generator, *inputs)
    alone = script.sample(generator, *(tensor[2:3] for tensor in inputs))
    assert torch.allclose(together[2:3], alone, atol=1e-5)
    assert 0 <= together.min() < together.max() <= 1
    assert generator.training
    assert_same_bits(generator.state_dict(), before)  # running averages, too


@pytest.mark.parametrize("name", [name for name in FROM_NOISE if (ROOT / f"pretrained/{name}.pt").exists()])
def test_pretrained_generators_draw(name):
    script = importlib.import_module(name)
    generator = script.load_generator(ROOT / "pretrained" / f"{name}.pt")
    torch.manual_seed(0)
    images = script.sample(generator, *inputs_of(script, generator, 64))
    assert 0.05 < images.mean() < 0.7  # light strokes or clothes on black; faces
    assert images.var(0).mean() > 0.02  # and no two alike


# %% Every script: a step
class Recorder:
    """Stands in for an optimiser: keeps what gradients all networks have at its step, and changes nothing."""

    def __init__(self, own, networks):
        self.zero_grad, self.networks, self.steps = own.zero_grad, networks, 0

    def step(self):
        self.steps += 1
        grads = [[p.grad for p in network.parameters()] for network in self.networks]
        self.grads = [[None if grad is None else grad.clone() for grad in row] for row in grads]


def one_step(script, *flags, **changes):
    """A train_step on eight digits, for each step of a critic, with Recorders in place of optimisers.

    Returns the metrics, what both networks were called with and answered, and the Recorders.
    """
    parts = script.build(script.parse_args(["--device", "cpu", *flags]))
    networks = list(parts.values())[:2]
    watched = [getattr(network, "synthesis", network) for network in networks]  # of stylegan.py's generator
    calls = {network: [] for network in watched}
    for network in watched:
        network.register_forward_hook(lambda module, inputs, output: calls[module].append((inputs, output)))
    recorders = [Recorder(network, networks) for network in networks]
    parts |= dict(zip([name for name in parts if name.startswith("optimizer")], recorders))
    arguments = parts | SCRIPTS[script.SCRIPT]["step"] | changes
    if not {"real", "b"} & changes.keys():
        arguments |= batch_of(script, 8 * arguments.get("n_critic", 1))
    torch.manual_seed(1)
    metrics = script.train_step(**arguments)
    return metrics, [calls[network] for network in watched], recorders


@pytest.mark.parametrize("script", [name for name in SCRIPTS if name != "cyclegan"], indirect=True)
def test_a_step_sends_gradients_to_the_network_that_learns(script):
    _, _, (g_recorder, d_recorder) = one_step(script)
    g_grads, d_grads = d_recorder.grads
    assert all(grad is None for grad in g_grads)  # while D learns, nothing flows into G
    assert all(grad is not None for grad in d_grads)
    g_grads, d_grads_after = g_recorder.grads
    assert all(grad.any() for grad in g_grads if grad.dim() > 1)
    assert_same_bits(d_grads, d_grads_after)  # while G learns, nothing is left in D


def test_a_step_leaves_the_second_network_free_to_learn(script):
    parts = script.build(script.parse_args(["--device", "cpu"]))
    before = copy.deepcopy([parts["generator"].state_dict(), list(parts.values())[1].state_dict()])
    rounds = SCRIPTS[script.SCRIPT]["step"].get("n_critic", 1)
    script.train_step(**parts, **batch_of(script, 8 * rounds), **SCRIPTS[script.SCRIPT]["step"])
    for network, old in zip(list(parts.values())[:2], before):
        assert all(parameter.requires_grad for parameter in network.parameters())
        weights = dict(network.named_parameters())
        assert all(not torch.equal(weights[name], old[name]) for name in weights if weights[name].dim() > 1)


def test_a_step_reports_scalars_and_never_waits_for_the_device(script, monkeypatch):
    def refuse(self, *args, **kwargs):
        raise AssertionError("the step waits until the device has caught up")

    train_step = script.train_step

    def watched(**arguments):
        with monkeypatch.context() as patch:
            for name in ("item", "tolist", "cpu", "numpy", "__bool__", "__float__", "__int__", "nonzero"):
                patch.setattr(torch.Tensor, name, refuse)
            return train_step(**arguments)

    monkeypatch.setattr(script, "train_step", watched)
    metrics, _, _ = one_step(script)
    panels = script.PANELS[:3] if script is gan_2d else script.PANELS  # the others are measured afterwards
    measured = {"error", "sharpness"}  # by pix2pix.py, after an epoch
    assert list(metrics) == [name for panel in panels for name in panel if name not in measured]
    for value in metrics.values():
        assert value.shape == ()
        assert not value.requires_grad
        assert value.isfinite()


@pytest.mark.parametrize("script", [*FROM_NOISE, "gan_2d"], indirect=True)
def test_g_learns_from_fresh_noise_or_from_the_fakes_that_d_saw(script):
    """The GAN and WGAN papers draw anew for G's step; the DCGAN tutorials use D's fakes again."""
    _, (g_calls, d_calls), _ = one_step(script)
    fakes = [output for _, output in g_calls]
    if script in (dcgan_mnist, cgan, dcgan64_celeba, stylegan):
        assert len(fakes) == 1
        assert not d_calls[1][0][0].requires_grad  # detached for D
        assert d_calls[-1][0][0] is fakes[0]
    else:
        noise = torch.cat([inputs[0] for inputs, _ in g_calls])
        assert len(noise.unique(dim=0)) == len(noise) == 8 * len(fakes)
        assert not any(fake.requires_grad for fake in fakes[:-1])
        assert d_calls[-1][0][0] is fakes[-1]


# %% Every script: the command line
def fails(script, argv, capsys, *words, status=2):
    """main(argv) ends with that status and one line of error, the last on stderr, which has all the words."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit_:
        script.main([str(argument) for argument in argv])
    assert exit_.value.code == status
    lines = [line for line in capsys.readouterr().err.replace("\r", "\n").splitlines() if "it/s" not in line]
    lines = [line for line in lines if line.strip() and "%|" not in line]
    assert [line for line in lines if line.startswith((f"{script.SCRIPT}.py: ", "Traceback"))] == lines[-1:]
    for word in words:
        assert str(word) in lines[-1]


@pytest.mark.parametrize(
    "flags",
    [
        "--epochs 0",
        "--epochs x",
        "--lr-g -1",
        "--lr-d nan",
        "--batch-size 1",
        "--limit -3",
        "--latent-dim 1.5",
        "--dataset cats",
        "--device abacus",
        "--device meta",
        "--width 0",
        "--seed -1",
        "--instance-noise -0.1",
        "--d-layers 4",
        "--generate 5",
        "--checkpoint x.pt",
        "--resume nowhere.pt",
        "--nonsense",
    ],
)
def test_a_wrong_flag_is_named_in_one_line(flags, tmp_path, capsys):
    argv = [
        "--limit",
        "24",
        "--data-dir",
        str(ROOT / "data"),
        "--out-dir",
        str(tmp_path / "run"),
        *flags.split(),
    ]
    fails(dcgan_mnist, argv, capsys, flags.split()[0] if "nowhere" not in flags else "nowhere.pt")
    assert not (tmp_path / "run").exists()


def test_flags_that_are_given_win_over_the_checkpoint(tmp_path, no_plots):
    dcgan_mnist.main(short("dcgan_mnist", tmp_path / "run", "--epochs", 1, "--width", 8, "--lr-g", 1e-3))
    resume = ["--resume", str(tmp_path / "run/checkpoint.pt"), "--epochs", "2", "--device", "cpu"]
    dcgan_mnist.main([*resume, "--lr-d", "1e-5", "--out-dir", str(tmp_path / "new")])
    saved = read(tmp_path / "new/checkpoint.pt")
    assert (saved["settings"]["width"], saved["settings"]["limit"]) == (8, 24)
    rates = [saved[name]["param_groups"][0]["lr"] for name in ("optimizer_g", "optimizer_d")]
    assert rates == [1e-3, 1e-5]
    assert len(saved["history"]) == 2
    assert len(read(tmp_path / "run/checkpoint.pt")["history"]) == 1


@pytest.mark.parametrize("script", [dcgan_mnist, wgan_gp, cgan, dcgan32_wgan_sn])
def test_published_settings_give_way_to_flags(script):
    args = vars(script.parse_args(["--published", "--lr-g", "0.5", "--device", "cpu"]))
    assert {name: args[name] for name in script.PUBLISHED} == script.PUBLISHED | {"lr_g": 0.5}
    defaults = vars(script.parse_args(["--width", "64"] if "width" in args else []))
    assert defaults["lr_d"] != script.PUBLISHED["lr_d"]  # --width 64 alone changes the width alone


def test_weights_that_are_not_finite_are_never_saved(script, tmp_path, monkeypatch, capsys, no_plots):
    script.main(short(script.SCRIPT, tmp_path / "run", "--epochs", 1))
    good, train_step = read(tmp_path / "run/checkpoint.pt"), script.train_step

    def explode(**arguments):
        next(arguments["generator"].parameters()).data[0] = math.inf
        return train_step(**arguments)

    monkeypatch.setattr(script, "train_step", explode)
    argv = ["--resume", tmp_path / "run/checkpoint.pt", "--epochs", 2, "--device", "cpu"]
    fails(script, argv, capsys, "epoch 2", "--lr-g", status=1)
    assert_same_bits(read(tmp_path / "run/checkpoint.pt"), good)


# %% Every script: distances while it trains
@trained_on_images
def test_fid_every_measures_and_changes_no_bit_of_the_training(trained, tmp_path, monkeypatch, capsys):
    script, plain = trained
    seen = []

    class Judge:
        def __init__(self, dataset, images, device, data_dir):
            assert (dataset, len(images), device) == ("mnist", 12 if script is cyclegan else 24, "cpu")

        def __call__(self, images):
            seen.append(images)
            return 100.0 / len(seen), 0.5, 0.25

    monkeypatch.setattr(fid, "Judge", Judge)
    monkeypatch.setattr(fid.track, "__defaults__", (60,))  # samples, in place of 10,000
    script.main(short(script.SCRIPT, tmp_path / "run", "--fid-every", 1))
    count = 24 if script.SCRIPT in TRANSLATORS else 60  # those have so many test pictures
    assert [(images.dtype, len(images)) for images in seen] == [(torch.uint8, count)] * 2
    assert not torch.equal(*seen)
    lines = (tmp_path / "run/distances.csv").read_text().split()
    assert lines == ["epoch,distance,precision,recall", "1,100,0.5,0.25", "2,50,0.5,0.25"]
    assert (tmp_path / "run/distance.png").exists()
    assert "distance 50.0  precision 0.500  recall 0.250" in capsys.readouterr().out
    a, b = read(plain / "checkpoint.pt"), read(tmp_path / "run/checkpoint.pt")
    assert_same_bits(a | {"settings": None}, b | {"settings": None})


# %% Networks: shapes, sizes, what tutorials get wrong
def layer_shapes(network, *inputs):
    """The shape of what leaves each layer that has no layers inside."""
    shapes = []
    layers = [layer for layer in network.modules() if not list(layer.children())]
    hooks = [
        layer.register_forward_hook(lambda *call: shapes.append(tuple(call[2].shape))) for layer in layers
    ]
    network(*inputs)
    for hook in hooks:
        hook.remove()
    return shapes


def test_vanilla_networks():
    g, d = vanilla_gan.Generator(), vanilla_gan.Discriminator()
    assert layer_shapes(g, torch.randn(3, 100))[::3] == [(3, 256), (3, 512), (3, 1024), (3, 784)]
    assert layer_shapes(g, torch.randn(3, 100))[-1] == (3, 1, 28, 28)
    assert layer_shapes(d, torch.randn(3, 1, 28, 28))[1::2] == [(3, 512), (3, 256), (3, 1)]
    assert (parameters(g), parameters(d)) == (1_489_936, 533_505)


@pytest.mark.parametrize("script", [dcgan_mnist, wgan_gp, cgan])
def test_networks_for_28_pixels(script):
    """Shapes, and parameters added up by hand for 16 channels."""
    classes = [torch.arange(3)] if script is cgan else []
    g = script.Generator()
    d = (script.Critic if script is wgan_gp else script.Discriminator)()
    shapes = [shape for shape in layer_shapes(g, torch.randn(3, 100), *classes) if len(shape) == 4]
    assert shapes == [(3, 64, 7, 7)] + [(3, 32, 14, 14)] * 3 + [(3, 1, 28, 28)] * 2
    shapes = layer_shapes(d, torch.randn(3, 1, 28, 28), *classes)
    assert sorted({shape for shape in shapes if len(shape) == 4}) == [
        (3, 16, 14, 14),
        (3, 32, 7, 7),
        (3, 64, 3, 3),
    ]
    assert shapes[-2:] == [(3, 576), (3, 1)]
    linear, norm = 100 * 3136 + 3136, 2 * 3136
    ours = {
        dcgan_mnist: (linear + norm, 16 * 16),
        wgan_gp: (linear + norm, 16 * 16 + 16 + 32 + 64),  # biases where dcgan_mnist.py has none
        cgan: (100 + linear + 10 * 3136 + norm, 7840 + 2 * 16 * 16 + 16),  # embeddings, a second channel
    }
    g_extra, d_extra = ours[script]
    assert parameters(g) == g_extra + 64 * 32 * 16 + 2 * 32 + 32 * 16
    norms = 0 if script is wgan_gp else 2 * 32 + 2 * 64
    assert parameters(d) == d_extra + 16 * 32 * 16 + 32 * 64 * 16 + norms + (576 + 1)
    assert d.eval()(torch.randn(1, 1, 28, 28), *(label[:1] for label in classes)).shape == (1, 1)  # not ()


def test_networks_for_32_pixels():
    g, critic = dcgan32_wgan_sn.Generator(channels=3), dcgan32_wgan_sn.Critic(channels=3)
    sizes = [(3, 256, 4, 4)] * 3 + [(3, 128, 8, 8)] * 3 + [(3, 64, 16, 16)] * 3 + [(3, 3, 32, 32)] * 2
    assert layer_shapes(g, torch.randn(3, 100)) == [(3, 100, 1, 1), *sizes]
    sizes = [(3, 64, 16, 16)] * 2 + [(3, 128, 8, 8)] * 3 + [(3, 256, 4, 4)] * 3 + [(3, 1, 1, 1), (3, 1)]
    assert layer_shapes(critic, torch.randn(3, 3, 32, 32)) == sizes
    assert parameters(g) == 16 * (100 * 256 + 256 * 128 + 128 * 64 + 64 * 3) + 2 * (256 + 128 + 64)
    assert parameters(critic) == 25 * (3 * 64 + 64 * 128 + 128 * 256 + 256) + 64 + 2 * 128 + 2 * 256 + 1


@of_images
def test_layers_keep_the_dcgan_recipe(script):
    """No bias before batch normalisation, its defaults, slopes of 0.2, weights of deviation 0.02."""
    parts = script.build(script.parse_args(["--device", "cpu"]))
    for network in list(parts.values())[:2]:
        layers = list(network.modules())
        for layer, after in zip(layers, layers[1:]):
            normalised = isinstance(after, (nn.BatchNorm2d, nn.GroupNorm))
            if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d)) and normalised:
                assert layer.bias is None
            if isinstance(layer, (nn.BatchNorm1d, nn.BatchNorm2d)):
                assert (layer.eps, layer.momentum) == (1e-5, 0.1)
            if isinstance(layer, nn.LeakyReLU):
                assert layer.negative_slope == 0.2
            drawn = isinstance(layer, (nn.Linear, nn.Conv2d, nn.ConvTranspose2d))
            if drawn and script not in (dcgan32_wgan_sn, r3gan):
                expected = pytest.approx(0.02, rel=5 / math.sqrt(2 * layer.weight.numel()))
                assert layer.weight.std().item() == expected
    norms = [layer for layer in list(parts.values())[1].modules() if isinstance(layer, nn.BatchNorm2d)]
    counts = {vanilla_gan: 0, wgan_gp: 0, r3gan: 0, stylegan: 0, cyclegan: 0, pix2pix: 1, dcgan64_celeba: 3}
    assert len(norms) == counts.get(script, 2)


@pytest.mark.parametrize(("d_layers", "pixels", "place"), [(2, 10, 3), (3, 22, 1)])
@pytest.mark.parametrize("script", [dcgan_mnist, wgan_gp, cgan])
def test_what_enters_the_linear_layer_sees_a_patch_or_a_digit(script, d_layers, pixels, place):
    layers = (script.Critic if script is wgan_gp else script.Discriminator)(d_layers=d_layers).layers.eval()
    images = torch.rand(1, layers[0].in_channels, 28, 28, requires_grad=True)
    (gradient,) = torch.autograd.grad(layers[:-2](images)[0, :, place, place].sum(), images)
    touched = gradient.abs().sum((0, 1)) > 0
    assert touched.any(0).sum() == touched.any(1).sum() == pixels


@pytest.mark.parametrize("d_layers", [2, 3])
@pytest.mark.parametrize("script", [dcgan_mnist, wgan_gp])
def test_two_convolutions_only_add_up_patches(script, d_layers):
    """What changes at the top and what changes at the bottom add up, so D cannot tell whether they fit."""
    torch.manual_seed(4)
    d = (script.Critic if script is wgan_gp else script.Discriminator)(d_layers=d_layers).double()
    x, noise = torch.randn(2, 64, 1, 28, 28, dtype=torch.float64)
    d(x)  # running averages that are no longer 0 and 1
    d.eval()
    top, bottom = torch.zeros(2, 28, 28, dtype=torch.float64)
    top[:9], bottom[19:] = 1, 1  # no patch of 10 rows touches both
    alone = d(x + top * noise) + d(x + bottom * noise) - 2 * d(x)
    both = d(x + (top + bottom) * noise) - d(x)
    share = ((both - alone).abs().mean() / both.abs().mean()).item()
    assert share < 1e-12 if d_layers == 2 else share > 1e-3


# %% Losses
THREE_QUARTERS = math.log(3)  # the logit of which the sigmoid is 3/4; that of -log 3 is 1/4


def test_cross_entropies_by_hand():
    real = torch.tensor([[THREE_QUARTERS], [-THREE_QUARTERS]])
    fake = torch.tensor([[-THREE_QUARTERS], [-THREE_QUARTERS]])
    plain = -(math.log(3 / 4) + math.log(1 / 4)) / 2 - math.log(3 / 4)
    assert vanilla_gan.discriminator_loss(real, fake).item() == pytest.approx(plain)
    smooth = -0.9 * math.log(3 / 4) - 0.1 * math.log(1 / 4) - math.log(3 / 4)
    for script in dcgan_mnist, cgan:
        assert script.discriminator_loss(real, fake, 1.0).item() == pytest.approx(plain)
        assert script.discriminator_loss(real[:1], fake, 0.9).item() == pytest.approx(smooth)
    for script in dcgan64_celeba, stylegan:
        assert script.discriminator_loss(real, fake).item() == pytest.approx(plain)
    for script in vanilla_gan, dcgan_mnist, cgan, dcgan64_celeba, stylegan:
        assert script.generator_loss(fake).item() == pytest.approx(math.log(4))


def test_losses_keep_their_precision_where_a_sigmoid_would_be_0_or_1():
    real, fake = torch.tensor([[200.0]]), torch.tensor([[-200.0]])
    for script in vanilla_gan, dcgan_mnist, cgan, dcgan64_celeba, stylegan:
        assert script.generator_loss(fake).item() == pytest.approx(200)
        assert script.discriminator_loss(fake, real).item() == pytest.approx(400, rel=0.06)
    assert dcgan_mnist.discriminator_loss(real, fake).item() == pytest.approx(0.1 * 200)


def test_wasserstein_losses_by_hand():
    real, fake = torch.tensor([[1.0], [3.0]]), torch.tensor([[-4.0], [2.0]])
    for script in wgan_gp, dcgan32_wgan_sn:
        assert script.critic_loss(real, fake).item() == -1 - 2
        assert script.generator_loss(fake).item() == 1


def test_hinge_loss_by_hand():
    """Real scores above 1 and fake ones below -1 cost nothing, and have no gradient."""
    real, fake = torch.tensor([[1.5], [0.25]], requires_grad=True), torch.tensor([[-4.0], [2.0]])
    loss = dcgan32_wgan_sn.critic_loss(real, fake, "hinge")
    assert loss.item() == (0 + 0.75) / 2 + (0 + 3) / 2
    (gradient,) = torch.autograd.grad(loss, real)
    assert gradient.flatten().tolist() == [0, -0.5]


# %% vanilla_gan.py
def discrete(*weights):
    return torch.tensor(weights, dtype=torch.float64)


def test_vanilla_best_discriminator_and_its_loss():
    """On two discrete distributions, shown as ten images each: the best D is p / (p + q)."""
    p, q = discrete(0.5, 0.3, 0.2), discrete(0.1, 0.3, 0.6)
    logits = (p / (p + q)).logit().requires_grad_()
    p_images, q_images = (torch.repeat_interleave(torch.arange(3), (10 * r).round().long()) for r in (p, q))
    loss = vanilla_gan.discriminator_loss(logits[p_images], logits[q_images])
    (slope,) = torch.autograd.grad(loss, logits)
    assert slope.abs().max() < 1e-9  # no answer is better
    middle = (p + q) / 2
    jsd = ((p * (p / middle).log()).sum() + (q * (q / middle).log()).sum()) / 2
    assert loss.item() == pytest.approx(2 * math.log(2) - 2 * jsd.item())  # L_D = -V


def test_vanilla_what_g_lowers_at_the_best_discriminator():
    """Minimax 2 JSD(p, q), the non-saturating loss KL(q || p) - 2 JSD(p, q): their gradients agree."""
    p, theta = discrete(0.5, 0.3, 0.2), discrete(0.1, -0.4, 0.9).requires_grad_()
    q = theta.softmax(0)
    best = (p / (p + q)).detach().logit()  # D is frozen while G learns

    def kl(a, b):
        return (a * (a / b).log()).sum()

    jsd = (kl(p, (p + q) / 2) + kl(q, (p + q) / 2)) / 2
    for minimax, divergence in (True, 2 * jsd), (False, kl(q, p) - 2 * jsd):
        losses = torch.stack([vanilla_gan.generator_loss(logit, minimax) for logit in best])
        (ours,) = torch.autograd.grad((q * losses).sum(), theta, retain_graph=True)
        (theirs,) = torch.autograd.grad(divergence, theta, retain_graph=True)
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("logit", [-50.0, -3.0, 0.0, 2.0])
def test_vanilla_gradients_of_both_generator_losses(logit):
    logits = torch.tensor([[logit]], dtype=torch.float64, requires_grad=True)
    d = 1 / (1 + math.exp(-logit))
    for minimax, value, slope in (False, -math.log(d), -(1 - d)), (True, math.log1p(-d), -d):
        loss = vanilla_gan.generator_loss(logits, minimax)
        (gradient,) = torch.autograd.grad(loss, logits)
        assert loss.item() == pytest.approx(value, rel=1e-9, abs=1e-13)
        assert gradient.item() == pytest.approx(slope, rel=1e-9, abs=1e-30)


def test_vanilla_generator_loss_flag(tmp_path, no_plots):
    vanilla_gan.main(short("vanilla_gan", tmp_path / "run", "--generator-loss", "minimax"))
    assert read(tmp_path / "run/checkpoint.pt")["history"][-1]["g_loss"] < 0  # the log of a probability


# %% dcgan_mnist.py
def test_dcgan_smoothing_is_one_sided():
    real, fake = torch.randn(2, 8, 1, dtype=torch.float64, requires_grad=True)
    for label in 1.0, 0.9, 0.8:
        loss = dcgan_mnist.discriminator_loss(real, fake, label)
        on_real, on_fake = torch.autograd.grad(loss, (real, fake))
        assert torch.allclose(on_real, (real.sigmoid() - label) / 8)  # the best D(x) is the label
        assert torch.allclose(on_fake, fake.sigmoid() / 8)  # the target of fakes stays 0
    (gradient,) = torch.autograd.grad(dcgan_mnist.generator_loss(fake), fake)
    assert torch.allclose(gradient, (fake.sigmoid() - 1) / 8)
    logit = torch.tensor([[math.log(0.45 / 0.55)]], requires_grad=True)  # the lesson: D answers 0.45 if p = q
    (gradient,) = torch.autograd.grad(dcgan_mnist.discriminator_loss(logit, logit), logit)
    assert gradient.item() == pytest.approx(0, abs=1e-7)


def test_dcgan_reports_what_the_networks_said():
    metrics, (g_calls, d_calls), _ = one_step(dcgan_mnist)
    d_real, d_fake, again = (output.detach().sigmoid() for _, output in d_calls)
    assert metrics["d_real"].item() == pytest.approx(d_real.mean().item())
    assert metrics["d_fake"].item() == pytest.approx(d_fake.mean().item())
    assert metrics["g_loss"].item() == pytest.approx(-again.log().mean().item())
    by_hand = -(0.9 * d_real.log() + 0.1 * (1 - d_real).log() + (1 - d_fake).log()).mean()
    assert metrics["d_loss"].item() == pytest.approx(by_hand.item(), rel=1e-4)
    images = g_calls[0][1].detach(), digits(dcgan_mnist, 8)
    fake, real = (torch.pdist(batch.flatten(1)).square().sum() for batch in images)  # of all pairs of images
    assert metrics["diversity"].item() == pytest.approx((fake / real).sqrt().item(), rel=1e-4)


def test_dcgan_names_the_two_failures():
    healthy = {"d_real": 0.83, "d_fake": 0.07, "diversity": 0.99}
    assert list(dcgan_mnist.diagnose(healthy, 0.9)) == []
    (winning,) = dcgan_mnist.diagnose(healthy | {"d_real": 0.89, "d_fake": 0.01}, 0.9)
    assert "--lr-g" in winning
    (collapse,) = dcgan_mnist.diagnose(healthy | {"diversity": 0.4}, 0.9)
    assert "mode collapse" in collapse
    # Only ones, the least varied digit, would be no collapse to this measure.
    data = datasets.MNIST(ROOT / "data")
    spreads = [data.data[data.targets == digit].float().var(0).mean() for digit in range(10)]
    assert math.sqrt(min(spreads) / data.data.float().var(0).mean()) > 0.5


@pytest.mark.parametrize("script", [dcgan_mnist, dcgan64_celeba])
def test_dcgan_instance_noise_is_on_all_that_d_sees(script):
    (_, (_, plain), _), (_, (_, noisy), _) = (one_step(script, noise_std=std) for std in (0.0, 0.3))
    noise = torch.stack([(a[0][0] - b[0][0]).detach().flatten() for a, b in zip(noisy, plain)])
    assert noise.std(1).tolist() == pytest.approx([0.3] * 3, rel=0.05)  # real images, fakes, and fakes again
    assert torch.corrcoef(noise).fill_diagonal_(0).abs().max() < 0.05  # new each time


def test_dcgan_instance_noise_fades(tmp_path, monkeypatch, no_plots):
    steps = watch_steps(monkeypatch, dcgan_mnist)
    flags = ["--instance-noise", 0.6, "--noise-epochs", 2, "--epochs", 3]
    dcgan_mnist.main(short("dcgan_mnist", tmp_path / "run", *flags))
    assert [step["noise_std"] for step in steps] == pytest.approx([0.6] * 6 + [0.3] * 6 + [0] * 6)


# %% wgan_gp.py
def images_and_fakes(count=6, side=5):
    return torch.randn(2, count, 1, side, side, generator=torch.Generator().manual_seed(3))


def test_wgan_penalty_of_a_linear_critic():
    """Its gradient is its weight, everywhere, over all pixels of an image."""
    critic = nn.Linear(25, 1, bias=False)
    for length in 0.0, 0.2, 1.0, 3.0:
        with torch.no_grad():
            critic.weight.fill_(length / 5)  # 25 pixels
        penalty, norm = wgan_gp.gradient_penalty(lambda x: critic(x.flatten(1)), *images_and_fakes())
        assert norm.item() == pytest.approx(length, rel=1e-5, abs=1e-5)
        assert penalty.item() == pytest.approx((length - 1) ** 2, rel=1e-5, abs=1e-9)
        penalty.backward()
        assert critic.weight.grad.isfinite().all()  # where the norm is 0, its root has no slope


def test_wgan_penalty_is_asked_at_one_uniform_point_between_each_pair():
    """The gradient of |x|^2 / 2 is x, so this critic tells where it was asked."""
    real, fake = images_and_fakes(4000)
    points = []

    def critic(x):
        points.append(x.detach())
        return x.flatten(1).square().sum(1, keepdim=True) / 2

    torch.manual_seed(6)
    penalty, norm = wgan_gp.gradient_penalty(critic, real, fake)
    lengths = points[0].flatten(1).norm(dim=1)
    assert penalty.item() == pytest.approx((lengths - 1).square().mean().item(), rel=1e-5)
    assert norm.item() == pytest.approx(lengths.mean().item(), rel=1e-5)
    t = ((points[0] - fake) / (real - fake)).flatten(1).median(1).values  # one for all pixels of an image
    assert torch.allclose(torch.lerp(fake, real, t[:, None, None, None]), points[0], atol=1e-5)
    even = (torch.arange(4000) + 0.5) / 4000
    assert (t.sort().values - even).abs().max() < 0.035  # Kolmogorov and Smirnov: 0.1% luck


def test_wgan_penalty_is_about_one_image_at_a_time_and_spares_g():
    torch.manual_seed(0)
    critic, images = wgan_gp.Critic(), torch.randn(8, 1, 28, 28)
    before = critic(images)
    images[3] = 0
    assert (critic(images) != before).flatten().tolist() == [False] * 3 + [True] + [False] * 4
    _, _, (_, light) = one_step(wgan_gp, gp_weight=1.0)
    _, _, (_, heavy) = one_step(wgan_gp, gp_weight=1e6)
    assert all(grad is None for grad in heavy.grads[0])
    assert all(b.norm() > 1e3 * a.norm() for a, b in zip(light.grads[1], heavy.grads[1]) if a.dim() > 1)


def test_wgan_critic_takes_its_steps_on_fresh_batches():
    real = digits(wgan_gp, 40)
    metrics, (g_calls, c_calls), (g_recorder, c_recorder) = one_step(wgan_gp, real=real, n_critic=5)
    assert (c_recorder.steps, g_recorder.steps) == (5, 1)
    assert len(c_calls) == 5 * 3 + 1  # real, fake and in between; and G's fakes
    gaps, norms = [], []
    for number, (batch, (_, fake)) in enumerate(zip(real.split(8), g_calls)):
        (on_real, on_fake, between) = c_calls[3 * number : 3 * number + 3]
        assert torch.equal(on_real[0][0], batch)
        assert torch.equal(on_fake[0][0], fake)
        gaps.append((on_real[1].mean() - on_fake[1].mean()).item())
        x = between[0][0].detach().requires_grad_()
        critic = wgan_gp.build(wgan_gp.parse_args(["--device", "cpu"]))["critic"]
        (gradient,) = torch.autograd.grad(critic(x).sum(), x)
        norms.append(gradient.flatten(1).norm(dim=1).mean().item())
    assert metrics["wasserstein"].item() == pytest.approx(sum(gaps) / 5, rel=1e-4)
    assert metrics["gradient_norm"].item() == pytest.approx(sum(norms) / 5, rel=1e-4)


def test_wgan_weight_clip_replaces_the_penalty():
    parts = wgan_gp.build(wgan_gp.parse_args(["--device", "cpu"]))
    step = {"real": digits(wgan_gp, 16), "n_critic": 2, "weight_clip": 0.01}
    wgan_gp.train_step(**parts, **step, gp_weight=10.0)
    weights = torch.cat([weight.detach().flatten() for weight in parts["critic"].parameters()])
    assert weights.abs().max() == pytest.approx(0.01)
    assert (weights.abs() < 0.0099).any()
    grads = [one_step(wgan_gp, gp_weight=weight, weight_clip=9.0)[2][1].grads[1] for weight in (0.0, 1e6)]
    assert_same_bits(*grads)  # no penalty in the loss


# %% cgan.py
def test_cgan_the_class_reaches_both_networks():
    torch.manual_seed(0)
    generator, discriminator = cgan.Generator().eval(), cgan.Discriminator().eval()
    z, classes = torch.randn(1, 100).expand(10, -1), torch.arange(10)
    images = generator(z, classes)
    assert len(images.flatten(1).unique(dim=0)) == 10
    assert len(discriminator(images[:1].expand(10, -1, -1, -1), classes).unique()) == 10


def test_cgan_trains_on_the_right_classes(tmp_path, monkeypatch, no_plots):
    data = datasets.MNIST(ROOT / "data")
    truth = {image.numpy().tobytes(): label.item() for image, label in zip(data.data, data.targets)}
    steps = watch_steps(monkeypatch, cgan)
    cgan.main(short("cgan", tmp_path / "run", "--epochs", 1))
    for step in steps:
        pixels = ((step["real"] + 1) * 127.5).round().to(torch.uint8)
        assert [truth[image.numpy().tobytes()] for image in pixels] == step["classes"].tolist()
    _, (g_calls, d_calls), _ = one_step(cgan, classes=torch.tensor([3, 1, 4, 1, 5, 9, 2, 6]))
    for (_, classes), _ in g_calls + d_calls:  # and fakes are made and judged as what was asked for
        assert classes.tolist() == [3, 1, 4, 1, 5, 9, 2, 6]


def test_cgan_generates_a_folder_for_each_class(tmp_path, capsys, no_plots):
    cgan.main(short("cgan", tmp_path / "run"))
    argv = ["--checkpoint", str(tmp_path / "run/checkpoint.pt"), "--generate"]
    cgan.main([*argv, "25", "--out-dir", str(tmp_path / "all")])
    folder = datasets.ImageFolder(tmp_path / "all")
    assert folder.classes == [*"0123456789"]
    assert torch.tensor(folder.targets).bincount().tolist() == [3] * 5 + [2] * 5
    cgan.main([*argv, "7", "--label", "3", "--out-dir", str(tmp_path / "threes")])
    assert datasets.ImageFolder(tmp_path / "threes").classes == ["3"]
    generator = cgan.load_generator(tmp_path / "run/checkpoint.pt")
    torch.manual_seed(42)
    images = cgan.sample(generator, torch.randn(7, 100), torch.full((7,), 3))
    for number, image in enumerate(images):
        pixels = np.array(Image.open(tmp_path / "threes/3" / f"{number:05d}.png"))[:, :, 0]
        assert np.abs(pixels / 255 - image[0].numpy()).max() < 0.01
    fails(cgan, [*argv, "1", "--label", "cat"], capsys, "--label", "cat")
    fails(cgan, ["--label", "3"], capsys, "--label")


# %% dcgan32_wgan_sn.py
def test_dcgan32_sigma_is_the_largest_singular_value():
    torch.manual_seed(0)
    layer = dcgan32_wgan_sn.SpectralConv2d(3, 8, 5, stride=2, padding=2)
    x = torch.randn(4, 3, 32, 32)
    for _ in range(200):
        layer(x)
    exact = torch.linalg.svdvals(layer.weight.flatten(1))[0]
    assert layer.sigma().item() == pytest.approx(exact.item(), rel=1e-4)
    by_hand = F.conv2d(x, layer.weight / exact, layer.bias, stride=2, padding=2)
    torch.testing.assert_close(layer(x), by_hand, rtol=1e-3, atol=1e-4)
    before = layer(x)
    with torch.no_grad():
        layer.weight *= 1000  # what the optimiser can reach changes nothing
    torch.testing.assert_close(layer(x), before, rtol=1e-3, atol=1e-4)
    layer.eval()
    u = layer.u.clone()
    layer(x)
    assert torch.equal(layer.u, u)  # the iteration rests in eval mode


def test_dcgan32_spectral_norm_is_pytorchs():
    """The output and the gradient of PyTorch's own layer, started from the same vectors."""
    torch.manual_seed(0)
    ours = dcgan32_wgan_sn.SpectralConv2d(3, 8, 5, stride=2, padding=2)
    theirs = nn.Conv2d(3, 8, 5, stride=2, padding=2)
    theirs.load_state_dict({"weight": ours.weight, "bias": ours.bias})
    nn.utils.parametrizations.spectral_norm(theirs)
    parametrization = theirs.parametrizations.weight[0]
    x = torch.randn(4, 3, 32, 32)
    for _ in range(100):
        ours.sigma(), theirs.weight
    for layer in ours, theirs:
        layer(x).square().sum().backward()
    torch.testing.assert_close(ours.u.abs(), parametrization._u.abs(), rtol=1e-3, atol=1e-3)
    original = theirs.parametrizations.weight.original
    torch.testing.assert_close(ours.weight.grad, original.grad, rtol=1e-3, atol=1e-3)


def test_dcgan32_sigma_is_never_in_bf16():
    layer = dcgan32_wgan_sn.SpectralConv2d(3, 8, 5).eval()
    exact = layer.sigma()
    with torch.autocast("cpu", torch.bfloat16):
        assert layer.sigma() == exact
        assert layer(torch.randn(2, 3, 8, 8)).dtype == torch.bfloat16


def test_dcgan32_a_bounded_critic_is_not_steep_and_batch_norm_undoes_it():
    """The lesson's two sentences: the bound holds, at most 3 a layer; and beside BN, sigma cancels."""
    torch.manual_seed(0)
    images = torch.randn(16, 1, 32, 32)
    bounded = dcgan32_wgan_sn.Critic(batch_norm=False)
    with torch.no_grad():
        for weight in bounded.parameters():
            weight *= 50
    for _ in range(50):
        bounded(images)
    x = images.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(bounded(x).sum(), x)
    assert gradient.flatten(1).norm(dim=1).max() < 3**4

    normed = dcgan32_wgan_sn.Critic(spectral_norm=False).double()
    scores = normed(images.double())
    with torch.no_grad():
        normed.layers[2].weight *= 50
        normed.layers[5].weight *= 50
    torch.testing.assert_close(normed(images.double()), scores, rtol=1e-2, atol=1e-2)
    assert normed.layers[2].bias is None


def test_dcgan32_reports_scores_and_diversity():
    metrics, (g_calls, c_calls), _ = one_step(dcgan32_wgan_sn)
    assert metrics["c_real"].item() == pytest.approx(c_calls[0][1].mean().item())
    assert metrics["c_fake"].item() == pytest.approx(c_calls[1][1].mean().item())
    images = g_calls[-1][1].detach(), digits(dcgan32_wgan_sn, 8)
    fake, real = (torch.pdist(batch.flatten(1)).square().sum() for batch in images)
    assert metrics["diversity"].item() == pytest.approx((fake / real).sqrt().item(), rel=1e-4)


def test_dcgan32_noise_is_uniform():
    torch.manual_seed(0)
    z = dcgan32_wgan_sn.uniform(4000, 1).flatten()
    even = (torch.arange(4000) + 0.5) / 2000 - 1
    assert (z.sort().values - even).abs().max() < 0.07  # Kolmogorov and Smirnov, on a width of 2
    _, (g_calls, _), _ = one_step(dcgan32_wgan_sn)
    for (z,), _ in g_calls:
        assert -1 <= z.min() < -0.95
        assert 0.95 < z.max() <= 1


# %% dcgan64_celeba.py
@pytest.mark.parametrize("channels", [1, 3])
def test_dcgan64_networks(channels):
    g, d = dcgan64_celeba.Generator(channels=channels), dcgan64_celeba.Discriminator(channels)
    sizes = [(3, 512, 4, 4)] * 3 + [(3, 256, 8, 8)] * 3 + [(3, 128, 16, 16)] * 3 + [(3, 64, 32, 32)] * 3
    assert layer_shapes(g, torch.randn(3, 100)) == sizes + [(3, channels, 64, 64)] * 2
    sizes = [(3, 64, 32, 32)] * 2 + [(3, 128, 16, 16)] * 3 + [(3, 256, 8, 8)] * 3 + [(3, 512, 4, 4)] * 3
    assert layer_shapes(d, torch.randn(3, channels, 64, 64)) == [*sizes, (3, 1, 1, 1)]
    assert d.eval()(torch.randn(1, channels, 64, 64)).shape == (1, 1)
    inner = 512 * 256 + 256 * 128 + 128 * 64
    assert parameters(g) == 16 * (100 * 512 + inner + 64 * channels) + 2 * (512 + 256 + 128 + 64)
    assert parameters(d) == 16 * (channels * 64 + inner + 512) + 2 * (128 + 256 + 512)


# %% pix2pix.py
def test_translators_have_the_papers_sizes():
    """Parameters as the official code counts them, less biases before a normalisation, which do nothing."""
    with torch.device("meta"):
        assert parameters(pix2pix.Generator(3, 3, 256, 64)) == 54_414_531
        assert parameters(pix2pix.Generator(1, 1)) == 4_165_217
        assert parameters(pix2pix.Generator(1, 1, skips=False)) == 3_476_577
        assert parameters(pix2pix.Discriminator(6, 64, 3)) == 2_768_705
        assert parameters(cyclegan.Generator(3, 3, 64, 9)) == 11_372_931
        assert parameters(cyclegan.Generator(1, 1)) == 1_367_105
        assert parameters(cyclegan.Discriminator(1, 64, 3, "instance")) == 2_761_793
        for size in (32, 64, 128, 256):
            images = torch.zeros(2, 1, size, size)
            for network in (pix2pix.Generator(1, 3, size), cyclegan.Generator(1, 3)):
                assert network(images).shape == (2, 3, size, size)


@pytest.mark.parametrize(("layers", "pixels"), [(1, 16), (2, 34), (3, 70)])
def test_pix2pix_a_logit_sees_one_patch(layers, pixels):
    """With ones for weights and no activations: the pixels that move a logit in the middle."""
    network = pix2pix.Discriminator(2, 4, layers)
    network.layers = nn.Sequential(*(m for m in network.layers if isinstance(m, nn.Conv2d))).double()
    for convolution in network.layers:
        nn.init.ones_(convolution.weight)
    image = torch.zeros(1, 2, 128, 128, dtype=torch.float64, requires_grad=True)
    logits = network(image)
    logits[0, 0, logits.shape[2] // 2, logits.shape[3] // 2].backward()
    rows, columns = image.grad[0, 0].nonzero(as_tuple=True)
    assert len(rows.unique()) == rows.max() - rows.min() + 1 == pixels
    assert len(columns.unique()) == columns.max() - columns.min() + 1 == pixels


@pytest.mark.parametrize("skips", [True, False])
def test_pix2pix_without_skips_all_goes_through_one_pixel(skips):
    network = pix2pix.Generator(1, 1, skips=skips, dropout=0.0).eval()
    for parameter in network.down[-1].parameters():
        nn.init.zeros_(parameter)  # now nothing comes through it
    first, second = network(torch.rand(2, 1, 32, 32))
    assert torch.equal(first, second) != skips


def test_pix2pix_losses_by_hand():
    real, fake = torch.tensor([math.log(3), -math.log(3)]), torch.full((2,), -math.log(3))  # 3/4, 1/4; 1/4
    d_loss = -(math.log(3 / 4) + math.log(1 / 4)) / 2 - math.log(3 / 4)
    assert pix2pix.discriminator_loss(real, fake).item() == pytest.approx(d_loss / 2)
    assert pix2pix.generator_loss(fake).item() == pytest.approx(math.log(4))
    assert pix2pix.generator_loss(torch.tensor([-200.0])).item() == 200


def test_pix2pix_d_sees_the_input_beside_the_target_or_the_output():
    metrics, (g_calls, d_calls), _ = one_step(pix2pix)
    ((a,), fake), b = g_calls[0], digits(pix2pix, 8)
    assert len(g_calls) == 1  # the same fakes for both players
    pairs = [inputs[0] for inputs, _ in d_calls]
    assert torch.equal(pairs[0], torch.cat([a, b], 1))
    assert torch.equal(pairs[1], torch.cat([a, fake], 1))
    assert [pair.requires_grad for pair in pairs] == [False, False, True]  # detached for D
    assert metrics["l1"].item() == pytest.approx((fake - b).abs().mean().item() / 2)
    assert metrics["g_loss"].item() == pytest.approx(-d_calls[2][1].sigmoid().log().mean().item(), rel=1e-5)


def test_pix2pix_gradient_of_g_is_the_weighted_sum_of_both_losses():
    grads = {}
    for weights in ((1.0, 0.0), (0.0, 1.0), (2.0, 30.0)):
        changes = {"gan_weight": weights[0], "l1_weight": weights[1]}
        _, _, (g_recorder, _) = one_step(pix2pix, "--dropout", "0", **changes)
        grads[weights] = torch.cat([grad.flatten() for grad in g_recorder.grads[0]])
    expected = 2 * grads[1.0, 0.0] + 30 * grads[0.0, 1.0]
    assert torch.allclose(grads[2.0, 30.0], expected, rtol=1e-3, atol=1e-5)


def test_pix2pix_dropout_is_in_the_first_layers_up_and_off_in_samples():
    for size, layers in ((32, 2), (64, 3), (256, 3)):
        network = pix2pix.Generator(1, 1, size, width=2)
        blocks = [any(isinstance(layer, nn.Dropout) for layer in block) for block in network.up]
        assert blocks == [True] * layers + [False] * (len(blocks) - layers)
    a, network = torch.rand(4, 1, 32, 32), pix2pix.Generator(1, 1)
    assert torch.equal(pix2pix.sample(network, a), pix2pix.sample(network, a))
    assert not torch.equal(*(pix2pix.sample(network, a, dropout=True) for _ in range(2)))


# %% cyclegan.py
def test_cyclegan_losses_by_hand():
    real, fake = torch.tensor([1.0, 3.0]), torch.tensor([-4.0, 2.0])
    assert cyclegan.discriminator_loss(real, fake).item() == (4 / 2 + 20 / 2) / 2
    assert cyclegan.generator_loss(fake).item() == (25 + 1) / 2
    half = torch.full((1, 1, 2, 2), 0.5)  # evenly matched players
    assert cyclegan.discriminator_loss(half, half).item() == cyclegan.generator_loss(half).item() == 0.25


def test_cyclegan_step_is_the_papers():
    """Losses and gradients once more, with PyTorch's own, for networks that do not change in between."""
    metrics, _, (g_recorder, d_recorder) = one_step(cyclegan, "--pool", "0")
    parts = cyclegan.build(cyclegan.parse_args(["--device", "cpu"]))  # the same weights
    (ab, ba), (d_a, d_b) = parts["generator"].values(), parts["discriminator"].values()
    a, b = batch_of(cyclegan, 8).values()
    l1, mse, fake_a, fake_b = nn.L1Loss(), nn.MSELoss(), ba(b), ab(a)
    parts_of_g = {"g_ab": mse(d_b(fake_b), torch.ones(8, 1, 14, 14))}
    parts_of_g |= {"g_ba": mse(d_a(fake_a), torch.ones(8, 1, 14, 14))}
    parts_of_g |= {"cycle_a": l1(ba(fake_b), a), "cycle_b": l1(ab(fake_a), b)}
    parts_of_g |= {"identity": l1(ab(b), b) + l1(ba(a), a)}
    for name, value in parts_of_g.items():
        assert metrics[name].item() == pytest.approx(value.item(), rel=1e-5)
    loss = sum(value * w for value, w in zip(parts_of_g.values(), (1, 1, 10, 10, 5)))
    g_grads = torch.autograd.grad(loss, [*parts["generator"].parameters()])
    for grad, expected in zip(g_recorder.grads[0], g_grads):
        assert torch.allclose(grad, expected, rtol=1e-3, atol=1e-5)
    assert all(grad is None for grad in g_recorder.grads[1])  # while G learns, nothing flows into D
    assert_same_bits(d_recorder.grads[0], g_recorder.grads[0])  # nor the other way round
    for name, d, real, fake in (("d_a", d_a, a, fake_a), ("d_b", d_b, b, fake_b)):
        scores = d(real), d(fake)
        d_loss = (
            mse(scores[0], torch.ones_like(scores[0])) + mse(scores[1], torch.zeros_like(scores[1]))
        ) / 2
        assert metrics[name].item() == pytest.approx(d_loss.item(), rel=1e-5)


def test_cyclegan_pool_loses_no_fake_and_gives_back_every_second_one_at_once():
    torch.manual_seed(0)
    pool, at_once = cyclegan.ImagePool(12, 1, 1), 0
    for number in range(0, 4000, 4):
        fakes = torch.arange(number, number + 4.0).view(4, 1, 1, 1)
        before = torch.cat([pool.images, fakes]).flatten()
        back = pool.query(fakes)
        if number < 12:  # there is room
            assert torch.equal(back, fakes)
        else:
            after = torch.cat([pool.images, back]).flatten()
            assert torch.equal(after.sort().values, before.sort().values)
            at_once += (back >= number).sum().item()
    assert at_once / 3988 == pytest.approx(0.5, abs=3 * 0.5 / math.sqrt(3988))
    copied = cyclegan.ImagePool(12, 1, 1)
    copied.load_state_dict(pool.state_dict())  # as --resume does
    assert (copied.count, copied.images.tolist()) == (12, pool.images.tolist())
    assert cyclegan.ImagePool(0, 1, 1).query(fakes) is fakes


# %% gan_2d.py
def test_gan_2d_losses_by_hand():
    real, fake = torch.tensor([[1.0], [3.0]]), torch.tensor([[-1.0], [0.5]])
    d_loss = {loss: gan_2d.discriminator_loss(real, fake, loss).item() for loss in gan_2d.LOSSES}
    g_loss = {loss: gan_2d.generator_loss(real, fake, loss).item() for loss in gan_2d.LOSSES}

    def log_d(score):  # D = 1 / (1 + exp(-score)), and 1 - D is that of the opposite score
        return -math.log(1 + math.exp(-score))

    cross_entropy = -(log_d(1) + log_d(3)) / 2 - (log_d(1) + log_d(-0.5)) / 2
    assert d_loss["non-saturating"] == d_loss["minimax"] == pytest.approx(cross_entropy)
    assert g_loss["non-saturating"] == pytest.approx(-(log_d(-1) + log_d(0.5)) / 2)
    assert g_loss["minimax"] == pytest.approx((log_d(1) + log_d(-0.5)) / 2)
    assert d_loss["least-squares"] == (0**2 + 2**2) / 4 + ((-1) ** 2 + 0.5**2) / 4
    assert g_loss["least-squares"] == ((-2) ** 2 + (-0.5) ** 2) / 4
    assert (d_loss["wasserstein-gp"], g_loss["wasserstein-gp"]) == (-0.25 - 2, 0.25)
    assert d_loss["relativistic"] == pytest.approx(-(log_d(1 + 1) + log_d(3 - 0.5)) / 2)  # in pairs
    assert g_loss["relativistic"] == pytest.approx(-(log_d(-1 - 1) + log_d(0.5 - 3)) / 2)


def test_gan_2d_only_minimax_gives_up_on_a_fake_that_d_sees_through():
    real, fake = torch.tensor([[30.0]]), torch.tensor([[-30.0]], requires_grad=True)
    slopes = {
        loss: torch.autograd.grad(gan_2d.generator_loss(real, fake, loss), fake)[0].item()
        for loss in gan_2d.LOSSES
    }
    assert slopes.pop("minimax") == pytest.approx(0, abs=1e-12)
    assert slopes.pop("least-squares") == -30 - 1
    assert slopes == pytest.approx({"non-saturating": -1, "wasserstein-gp": -1, "relativistic": -1})


def test_gan_2d_penalties_of_a_plane_and_of_a_bowl():
    real, fake = torch.randn(2, 6, 2)
    plane = lambda points: points @ torch.tensor([[3.0], [4.0]])  # noqa: E731 (its slope is 5)
    assert gan_2d.penalty(plane, real, fake, "wasserstein-gp").item() == pytest.approx((5 - 1) ** 2, rel=1e-5)
    assert gan_2d.penalty(plane, real, fake, "relativistic").item() == pytest.approx((25 + 25) / 2, rel=1e-5)
    bowl = lambda points: points.square().sum(1, keepdim=True) / 2  # noqa: E731 (its gradient is the point)
    by_hand = (real.square().sum(1).mean() + fake.square().sum(1).mean()).item() / 2
    assert gan_2d.penalty(bowl, real, fake, "relativistic").item() == pytest.approx(by_hand, rel=1e-5)


def test_gan_2d_d_takes_its_steps_on_fresh_batches_and_then_g_takes_one():
    real = gan_2d.Clusters("grid").draw(24)
    metrics, (g_calls, d_calls), (g_recorder, d_recorder) = one_step(gan_2d, real=real, d_steps=3)
    assert (d_recorder.steps, g_recorder.steps) == (3, 1)
    seen = torch.cat([inputs[0] for inputs, _ in d_calls[:3]]).view(3, 2, 8, 2)  # 8 real points, 8 fakes
    assert torch.equal(seen[:, 0].flatten(0, 1), real)
    assert torch.equal(seen[:, 1].flatten(0, 1), torch.cat([fake for _, fake in g_calls[:3]]))
    answers = torch.cat([scores for _, scores in d_calls[:3]]).view(3, 2, 8).sigmoid()
    assert metrics["d_real"].item() == pytest.approx(answers[:, 0].mean().item())
    assert metrics["d_fake"].item() == pytest.approx(answers[:, 1].mean().item())
    gradient = torch.cat([grad.flatten() for grad in g_recorder.grads[0]]).norm().item()
    assert metrics["gradient"].item() == pytest.approx(gradient)


def test_gan_2d_ideal_discriminator_of_two_gaussians():
    """N((0.5, 0), s^2) and N((-0.5, 0), s^2): p / (p + q) is the sigmoid of x / s^2, whatever y is."""
    real = gan_2d.Clusters("ring")
    real.centres, real.std, real.side = torch.tensor([[0.5, 0.0]]), 0.5, 2.0
    torch.manual_seed(1)
    fakes = 0.5 * torch.randn(400_000, 2) - torch.tensor([0.5, 0.0])
    middle = (torch.arange(40) + 0.5) / 10 - 2
    for blur in 0.0, 0.5:  # noise on both adds its variance
        p, q, _ = gan_2d.plane(fakes, real, blur, cells=40)
        by_hand = torch.sigmoid(middle / (0.5**2 + blur**2)).expand(40, 40)  # rows are y, columns are x
        common = (p + q) > 1e-3
        assert ((p / (p + q) - by_hand)[common]).abs().max() < 0.05


def test_gan_2d_generates_points(tmp_path, no_plots):
    gan_2d.main(short("gan_2d", tmp_path / "run"))
    checkpoint = tmp_path / "run/checkpoint.pt"
    gan_2d.main(["--generate", "300", "--checkpoint", str(checkpoint)])
    points = np.loadtxt(tmp_path / "run/generated/001/points.csv", delimiter=",", skiprows=1)
    generator = gan_2d.load_generator(checkpoint)
    torch.manual_seed(42)
    by_hand = gan_2d.sample(generator, torch.randn(300, 2))
    assert np.allclose(points, by_hand, rtol=1e-5)


# %% stylegan.py
def test_stylegan_networks():
    g, d = stylegan.Generator(), stylegan.Discriminator()
    shapes = [shape for shape in layer_shapes(g, torch.randn(3, 128)) if len(shape) == 4]
    assert {(3, 128, 4, 4), (3, 128, 8, 8), (3, 64, 16, 16), (3, 32, 32, 32)} < set(shapes)
    assert shapes[-1] == (3, 1, 32, 32)
    shapes = layer_shapes(d, torch.randn(3, 1, 32, 32))
    assert shapes[-7:-4] == [(3, 129, 4, 4), (3, 128, 4, 4), (3, 128, 4, 4)]
    assert shapes[-4:] == [(3, 2048), (3, 128), (3, 128), (3, 1)]
    assert (parameters(g), parameters(d)) == (897_825, 844_897)


def test_stylegan_adain_sets_the_mean_and_the_contrast_of_each_map():
    x, style = 3 * torch.randn(4, 5, 8, 8) + 2, torch.randn(4, 10)
    y = stylegan.adain(x, style)
    torch.testing.assert_close(y.mean((2, 3)), style[:, 5:], rtol=0, atol=1e-5)
    torch.testing.assert_close(y.std((2, 3), correction=0), (1 + style[:, :5]).abs(), rtol=0, atol=1e-5)
    torch.testing.assert_close(stylegan.adain(5 * x - 1, style), y, rtol=0, atol=1e-5)  # the old are wiped


@pytest.mark.parametrize(("lr_mul", "stored"), [(1, 1), (0.01, 100)])
def test_stylegan_weights_are_stored_at_one_size_and_scaled_in_use(lr_mul, stored):
    """So a layer keeps the size of what goes through, and learns as fast as others, or lr_mul times that."""
    torch.manual_seed(0)
    layer = stylegan.EqualLinear(256, 300, gain=1.0, lr_mul=lr_mul)
    assert layer.weight.std().item() == pytest.approx(stored, rel=0.02)
    out = layer(torch.randn(500, 256))
    assert out.std().item() == pytest.approx(1, rel=0.05)
    used, optimizer = layer.weight * layer.scale, torch.optim.Adam(layer.parameters(), 0.002)
    out.square().sum().backward()
    optimizer.step()
    moved = (layer.weight * layer.scale - used).abs().max().item()
    assert moved == pytest.approx(0.002 * lr_mul / math.sqrt(256), rel=0.05)


def test_stylegan_r1_of_a_plane_and_of_a_bowl():
    slope, x = torch.randn(2, 6, 2, 4, 4)
    plane = lambda images: (images * slope).sum((1, 2, 3))[:, None]  # noqa: E731
    bowl = lambda images: 3 * images.square().sum((1, 2, 3))[:, None] / 2  # noqa: E731 (its gradient is 3x)
    for d, gradient in (plane, slope), (bowl, 3 * x):
        by_hand = gradient.square().sum((1, 2, 3)).mean().item()
        assert stylegan.r1_penalty(d, x).item() == pytest.approx(by_hand, rel=1e-5)


def test_stylegan_discriminator_is_told_how_much_a_group_differs():
    x = torch.ones(8, 2, 3, 3)
    x[2:4], x[6:] = -1, -1  # images 0, 2, 4, 6 are a group: 1, -1, 1, -1, whose deviation is 1
    x[1::2] = 5  # the other group: all alike
    extra = stylegan.GroupDeviation()(x)[:, 2]
    torch.testing.assert_close(extra[::2], torch.ones(4, 3, 3))
    torch.testing.assert_close(extra[1::2], torch.full((4, 3, 3), 1e-4))


def test_stylegan_truncation_moves_w_to_its_mean():
    generator, z = stylegan.Generator(width=8, latent_dim=16), torch.randn(3, 16)
    generator.w_avg.copy_(torch.randn(16))
    for psi in 1, 0.7, 0, -1:
        by_hand = generator.w_avg + psi * (generator.mapping(z) - generator.w_avg)
        torch.testing.assert_close(generator.ws(z, psi), by_hand[:, None].expand(-1, 8, -1))


def test_stylegan_mixes_from_a_random_layer_on():
    torch.manual_seed(0)
    ws = stylegan.mix(torch.zeros(20_000, 1), torch.ones(20_000, 1), 8, 0.9)
    assert (ws.diff(dim=1) >= 0).all()  # w1 first
    shares = torch.bincount(8 - ws.sum((1, 2)).long(), minlength=9) / 20_000  # by how many layers have w1
    by_hand = torch.tensor([0, *[0.9 / 7] * 7, 0.1])  # all from 1 to 7 alike; a tenth is not mixed
    torch.testing.assert_close(shares, by_hand, rtol=0, atol=0.01)


def test_stylegan_samples_come_from_the_average_of_the_generators():
    parts = stylegan.build(stylegan.parse_args(["--device", "cpu"]))
    start = copy.deepcopy(parts["ema"].synthesis.constant)
    step = SCRIPTS["stylegan"]["step"] | {"ema_images": 4}  # 8 images leave a quarter of the old
    stylegan.train_step(**parts, real=digits(stylegan, 8), **step)
    by_hand = 0.25 * start + 0.75 * parts["generator"].synthesis.constant
    torch.testing.assert_close(parts["ema"].synthesis.constant, by_hand)
