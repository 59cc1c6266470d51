"""The generator of a checkpoint alone, in half precision: what --generate needs, and nothing else.

    python tools/export.py runs/cgan/001/checkpoint.pt pretrained/cgan.pt
    python cgan.py --generate 100 --label 7 --checkpoint pretrained/cgan.pt

A checkpoint also has the second network, the optimisers' averages of each weight's gradient, and what
was reported, so that a run can go on. Without them, and with 16 bits for each weight instead of 32, it is a
sixth of the size, or less. Biases, and the averages that batch normalisation keeps, are few and stay as they
are.

A file like that is read with torch.load(..., weights_only=True), which builds tensors and runs no code.
"""

import argparse
import sys
from pathlib import Path

import torch


def fail(message):
    """End the program with one line on stderr."""
    print(f"export.py: {message}", file=sys.stderr)
    raise SystemExit(2)


def export(checkpoint):
    """Of a script's checkpoint, a dictionary, what --generate and --translate use; weights in float16.

    stylegan.py draws with the average of its generators, `ema`. Folders are left out of the settings, since
    they are of the machine that trained: --generate takes the default, or --data-dir.
    """
    name = "ema" if "ema" in checkpoint else "generator"

    def halved(tensor):
        return tensor.half() if tensor.is_floating_point() and tensor.dim() > 1 else tensor

    of_the_machine = {"data_dir", "folder_a", "folder_b"}
    settings = {name: value for name, value in checkpoint["settings"].items() if name not in of_the_machine}
    weights = {key: halved(tensor) for key, tensor in checkpoint[name].items()}
    return {"script": checkpoint["script"], "settings": settings, name: weights}


def main(argv=None):
    parser = argparse.ArgumentParser("export.py", description=__doc__.split("\n")[0])
    parser.add_argument("checkpoint", help="the checkpoint.pt of a run")
    parser.add_argument("path", help="the file to write")
    args = parser.parse_args(argv)
    if Path(args.path).exists():
        fail(f"{args.path} is there already; give another name, or remove it")
    try:
        small = export(torch.load(args.checkpoint, map_location="cpu", weights_only=True))
    except Exception as error:  # its type depends on where the damage is
        fail(f"{args.checkpoint}: give a whole checkpoint.pt ({' '.join(str(error).split()):.200})")
    try:
        Path(args.path).parent.mkdir(parents=True, exist_ok=True)
        torch.save(small, args.path)
    except (OSError, RuntimeError) as error:
        fail(f"{args.path}: {error}")
    print(f"the generator of {small['script']}.py, {Path(args.path).stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
