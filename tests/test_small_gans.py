"""What the scripts for 28 and 32 pixels have of their own, in depth."""

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import datasets

import cgan
import dcgan32_wgan_sn
import dcgan64_celeba
import dcgan_mnist
from test_scripts import ROOT, assert_same_bits, fails, one_step, read, short


def test_dcgan_speaks_of_failures_from_the_second_epoch_on(tmp_path, monkeypatch, capsys, no_plots):
    monkeypatch.setattr(dcgan_mnist, "diagnose", lambda means, real_label: [f"target {real_label}"])
    dcgan_mnist.main(short("dcgan_mnist", tmp_path / "run", "--real-label", 0.7))
    assert capsys.readouterr().out.count("  target 0.7\n") == 1


def test_cgan_trains_on_class_folders_of_ones_own(tmp_path, capsys, no_plots):
    """Pictures of any size and mode, transparent parts white; damaged ones are named and skipped."""
    for name, colour in ("dog", (255, 0, 0, 255)), ("cat", (0, 0, 0, 0)):
        (tmp_path / "pets" / name).mkdir(parents=True)
        for number in range(4):
            Image.new("RGBA", (40, 30 + number), colour).save(tmp_path / "pets" / name / f"{number}.png")
    (tmp_path / "pets/cat/damaged.png").write_bytes(b"not a picture")
    (tmp_path / "pets/.hidden").mkdir()
    flags = [flag for flag in short("cgan", tmp_path / "run") if flag != str(ROOT / "data")]
    flags.insert(flags.index("--data-dir") + 1, str(tmp_path / "pets"))
    cgan.main([*flags, "--dataset", "folder"])
    output = capsys.readouterr()
    assert "8 images" in output.err
    assert "damaged.png" in output.err
    args = cgan.parse_args(["--dataset", "folder", "--data-dir", str(tmp_path / "pets"), "--device", "cpu"])
    images, labels, names = cgan.load_images(args)
    assert names == ["cat", "dog"]
    assert images[labels == 0].unique().tolist() == [255]  # transparent black is white
    assert images[labels == 1].unique().tolist() == [85]  # red as grey
    argv = ["--generate", "4", "--checkpoint", str(tmp_path / "run/checkpoint.pt")]
    cgan.main([*argv, "--label", "dog"])
    assert len(list((tmp_path / "run/generated/001/dog").iterdir())) == 4
    cgan.main(["--resume", str(tmp_path / "run/checkpoint.pt"), "--epochs", "3", "--device", "cpu"])
    fails(cgan, ["--dataset", "folder", "--data-dir", tmp_path / "run/samples"], capsys, "--data-dir")


def test_dcgan32_stages(tmp_path, monkeypatch, no_plots):
    assert dcgan32_wgan_sn.STAGES == (200, 4000, 8000, 20000)
    monkeypatch.setattr(dcgan32_wgan_sn, "STAGES", (2, 5, 12))
    dcgan32_wgan_sn.main(short("dcgan32_wgan_sn", tmp_path / "whole"))
    samples = tmp_path / "whole/samples"
    grids = [np.array(Image.open(samples / f"step_{step:05d}.png")) for step in (2, 5, 12)]
    assert np.array_equal(np.array(Image.open(tmp_path / "whole/stages.png")), np.hstack(grids))
    # Step 12 ends the second epoch, so both pictures show the same; and stages change no training.
    assert (samples / "epoch_0002.png").read_bytes() == (samples / "step_00012.png").read_bytes()
    monkeypatch.setattr(dcgan32_wgan_sn, "STAGES", ())
    dcgan32_wgan_sn.main(short("dcgan32_wgan_sn", tmp_path / "plain"))
    assert_same_bits(*(read(tmp_path / name / "checkpoint.pt")["critic"] for name in ("whole", "plain")))


def test_dcgan32_trains_in_colour(tmp_path, monkeypatch, no_plots):
    class Ten:
        def __init__(self, folder, download):
            self.data = np.random.default_rng(0).integers(0, 256, (10, 32, 32, 3), dtype=np.uint8)

    monkeypatch.setattr(datasets, "CIFAR10", Ten)
    dcgan32_wgan_sn.main(short("dcgan32_wgan_sn", tmp_path / "run", "--dataset", "cifar10"))
    assert Image.open(tmp_path / "run/samples/epoch_0001.png").mode == "RGB"
    images = dcgan32_wgan_sn.load_images(
        dcgan32_wgan_sn.parse_args(["--dataset", "cifar10", "--device", "cpu"])
    )
    pixels = {tuple(image[:, 5, 7].tolist()) for image in images}
    assert pixels == {tuple(image[5, 7].tolist()) for image in Ten("", True).data}
    dcgan32_wgan_sn.main(["--generate", "2", "--checkpoint", str(tmp_path / "run/checkpoint.pt")])


@pytest.mark.parametrize("script", [dcgan32_wgan_sn, dcgan64_celeba])
def test_bf16_is_near_fp32_and_keeps_weights_in_fp32(script):
    (full, _, (_, a)), (low, _, (_, b)) = (one_step(script, precision=p) for p in ("fp32", "bf16"))
    for name in full:
        assert low[name].item() == pytest.approx(full[name].item(), rel=0.1, abs=0.02)
    assert any(not torch.equal(x, y) for x, y in zip(a.grads[1], b.grads[1]))
    assert all(grad.dtype == torch.float32 for grad in b.grads[1])
