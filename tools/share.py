"""Copy a function from one script into all scripts that have it, so that the text is the same everywhere.

    python tools/share.py plot                  # from dcgan_mnist.py
    python tools/share.py plot --source cgan.py

Scripts import nothing from each other, so what they share is copied. What a script has in a form of its own
stands in the table OWN in test_scripts.py, and is left alone here.
"""

import argparse
import ast
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))


def lines_of(source, name):
    """First line and end of a top-level function or class, decorators included; None if it is not there."""
    for node in ast.parse(source).body:
        if getattr(node, "name", None) == name:
            return min(line.lineno for line in [node, *node.decorator_list]) - 1, node.end_lineno
    return None


def share(name, source_file, files):
    """Write the source's function into those files that have one of that name; returns the files changed."""
    source = source_file.read_text().splitlines(keepends=True)
    start, end = lines_of("".join(source), name)
    changed = []
    for file in files:
        text = file.read_text()
        place = lines_of(text, name)
        if file != source_file and place:
            lines = text.splitlines(keepends=True)
            lines[place[0] : place[1]] = source[start:end]
            if "".join(lines) != text:
                file.write_text("".join(lines))
                changed.append(file.name)
    return changed


def main(argv=None):
    from test_scripts import OWN, SCRIPTS

    parser = argparse.ArgumentParser("share.py", description=__doc__.split("\n")[0])
    parser.add_argument("name", help="of a function or class at the top level of a script")
    parser.add_argument("--source", default="dcgan_mnist.py", help="the script that has the right one")
    args = parser.parse_args(argv)
    source_file = ROOT / args.source
    if not source_file.is_file() or not lines_of(source_file.read_text(), args.name):
        parser.error(f"{args.source} has no {args.name}; give another --source")
    files = [ROOT / f"{script}.py" for script in SCRIPTS if script not in OWN.get(args.name, [])]
    print(", ".join(share(args.name, source_file, files)) or "nothing to change")


if __name__ == "__main__":
    main()
