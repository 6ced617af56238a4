"""Copies of pictures with their predicted label written on them."""

from __future__ import annotations

import os
from pathlib import Path, PurePath

from PIL import Image, ImageDraw, ImageFont

from efficientformer.cli.results import Result
from efficientformer.runtime.image import decode
from efficientformer.spec.errors import UsageError

MAX_SIDE = 1280  # copies are for looking at


def annotate(result: Result, folder: Path) -> Path:
    """Write ``folder/NAME_label.jpg``: the picture, upright, with class and probability in a bar below it.

    Args:
        result: A classified input; its picture is read again.
        folder: An existing folder.

    Returns:
        The file written; a number in its name keeps pictures of the same name apart.

    Raises:
        ImageError: If the picture can no longer be read.
        UsageError: If the folder cannot be written.
    """
    assert result.prediction is not None
    source = result.input.read()
    image = decode(source, mode="RGB", exif=True, name=result.path)
    image.thumbnail((MAX_SIDE, MAX_SIDE))
    text = f"{result.prediction.name.partition(',')[0]}  {result.prediction.score:.1%}"
    size = max(12, image.width // 24)
    bar = 2 * size
    canvas = Image.new("RGB", (max(image.width, 8 * size), image.height + bar), "#202020")
    canvas.paste(image, (0, 0))
    draw = ImageDraw.Draw(canvas)
    draw.text((size // 2, image.height + bar // 2), text, "white", ImageFont.load_default(size), anchor="lm")
    try:
        return _save(canvas, folder, PurePath(result.path).stem if result.path != "-" else "stdin")
    except OSError as error:
        hint = "Choose a writable folder"
        raise UsageError(f"Cannot write pictures into {folder}", found=str(error), hint=hint) from error


def _save(image: Image.Image, folder: Path, stem: str) -> Path:
    """Save under the first free name; pictures from different folders may share theirs."""
    stem = "".join(char if char.isalnum() or char in "._- " else "_" for char in stem)[:100] or "picture"
    number = 1
    while True:
        target = folder / (f"{stem}_label.jpg" if number == 1 else f"{stem}_label_{number}.jpg")
        try:
            handle = os.open(target, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
        except FileExistsError:
            number += 1
            continue
        with os.fdopen(handle, "wb") as file:
            image.save(file, "JPEG", quality=90)
        return target
