"""One picture with the first samples of all trained generators, a strip for the top of README.md.

    python tools/strip.py pretrained assets/strip.png

Of each file NAME.pt in the folder (see export.py) there are nine images, the first that
`python NAME.py --generate 9` makes of it, with its own seed: they are not chosen. From left to right the
files are in the reading order of README.md. Small images are enlarged to twice their size, each pixel to 2x2.
"""

import argparse
import importlib
import sys
import tempfile
from pathlib import Path

from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # where the scripts are

ORDER = "vanilla_gan", "dcgan_mnist", "wgan_gp", "cgan", "dcgan32_wgan_sn"
ORDER += "dcgan64_celeba", "pix2pix", "cyclegan", "stylegan", "r3gan"
CELL, GAP = 64, 8  # pixels of an image, and between two blocks


def first_samples(path, count=9):
    """The first images that a file's script makes with it."""
    with tempfile.TemporaryDirectory() as folder:
        argv = ["--generate", str(count), "--checkpoint", str(path), "--out-dir", f"{folder}/new"]
        importlib.import_module(path.stem).main(argv)
        files = sorted(Path(folder).rglob("*.png"), key=lambda file: file.name)
        return [Image.open(file).convert("RGB") for file in files]


def block(images):
    """A square of three rows of three images, each in the middle of its cell."""
    square = Image.new("RGB", (3 * CELL, 3 * CELL), "white")
    for number, image in enumerate(images):
        if 2 * image.width <= CELL:
            image = image.resize((2 * image.width, 2 * image.height), Image.Resampling.NEAREST)
        if image.width > CELL:
            image = image.resize((CELL, CELL), Image.Resampling.LANCZOS)
        edge = (CELL - image.width) // 2
        square.paste(image, (number % 3 * CELL + edge, number // 3 * CELL + edge))
    return square


def main(argv=None):
    parser = argparse.ArgumentParser("strip.py", description=__doc__.split("\n")[0])
    parser.add_argument("folder", help="where the files are")
    parser.add_argument("path", help="the picture to write")
    args = parser.parse_args(argv)
    paths = [path for name in ORDER if (path := Path(args.folder, f"{name}.pt")).is_file()]
    if not paths:
        print(f"strip.py: {args.folder} has no file NAME.pt; make some with export.py", file=sys.stderr)
        raise SystemExit(2)
    blocks = [block(first_samples(path)) for path in paths]
    step = 3 * CELL + GAP
    strip = Image.new("RGB", (len(blocks) * step - GAP, 3 * CELL), "white")
    for number, square in enumerate(blocks):
        strip.paste(square, (number * step, 0))
    strip.save(args.path)
    print(f"{', '.join(path.stem for path in paths)} in {args.path}")


if __name__ == "__main__":
    main()
