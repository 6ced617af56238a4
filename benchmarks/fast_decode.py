"""What ``--decode fast`` gains and costs: time from file to pixels, and how often the label stays.

    python benchmarks/fast_decode.py --data photos [--model FILE] [--enlarge 4]

Both ways of decoding run over the same pictures in turns; the labels are those of one network on one engine in single
precision. Photographs from the web are often too small to be shrunk for 224 pixels: ``--enlarge`` first makes them so
many times as large (JPEG, quality 90), which is the size of a camera's pictures but smoother, so read that agreement as
an upper bound. Without ``--model`` the network in the package decides, which takes 32 pixels.
"""

from __future__ import annotations

import argparse
from io import BytesIO
from pathlib import Path

from common import save
from PIL import Image

from efficientformer.export.deployable import deployable
from efficientformer.runtime.classifier import FileClassifier
from efficientformer.runtime.image import decode
from efficientformer.runtime.preprocess import resize_crop
from efficientformer.runtime.timing import time_together


def enlarged(data: bytes, factor: int) -> bytes:
    """Return a picture's file, the picture ``factor`` times as large."""
    if factor == 1:
        return data
    image, file = decode(data), BytesIO()
    image.resize((image.width * factor, image.height * factor), Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
    return file.getvalue()


def main() -> None:
    """Measure, print and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", default="")
    parser.add_argument("--enlarge", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    files = sorted(path for path in options.data.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg"))
    pictures = [enlarged(path.read_bytes(), options.enlarge) for path in files]
    classify = FileClassifier(deployable(options.model), engine="onnxruntime")
    spec = classify.manifest.preprocess

    def pixels(shrink: bool) -> None:
        for data in pictures:
            resize_crop(decode(data, mode=spec.mode, exif=spec.exif, shrink_for=spec if shrink else None), spec)

    subjects = {"exact": lambda: pixels(False), "fast": lambda: pixels(True)}
    times = time_together(subjects, rounds=options.rounds, warmup=0, burst=1)
    exact, fast = (list(classify.predict(pictures, decode=how)) for how in subjects)
    same = sum(a.label == b.label for a, b in zip(exact, fast, strict=True))  # type: ignore[union-attr]
    shrunk = sum(decode(data, shrink_for=spec).size != decode(data).size for data in pictures)
    figures = {
        "pictures": len(pictures), "enlarged": options.enlarge,
        "network": classify.manifest.provenance.get("model", ""),
        "shrunk": shrunk, "labels_kept_percent": round(100 * same / len(pictures), 2),
        **{f"{name}_ms_per_picture": round(timing.median_ms / len(pictures), 3) for name, timing in times.items()},
        "ratio": round(times["exact"].median_ms / times["fast"].median_ms, 2), "rounds": options.rounds,
    }  # fmt: skip
    for name, figure in figures.items():
        print(f"{name}: {figure}")
    size = spec.input_size[0]
    print(save(f"fast-decode_{size}px_x{options.enlarge}", figures, ("efficientformer", "pillow", "onnxruntime")))


if __name__ == "__main__":
    main()
