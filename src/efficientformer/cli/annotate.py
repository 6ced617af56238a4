"""Copies of pictures with their predicted label written on them."""

from __future__ import annotations

import io
import itertools
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePath

from PIL import Image, ImageDraw, ImageFont

from efficientformer.cli.results import Result
from efficientformer.runtime.image import decode
from efficientformer.spec.errors import UsageError, reason_of
from efficientformer.spec.whole import hidden_file

MAX_SIDE = 1280  # copies are for looking at
_MAX_STEM = 100  # bytes of a name: file systems have a limit, and more is put behind it
NO_CHARACTER = "\uffff"


@dataclass(frozen=True, slots=True)
class Copy:
    """An annotated copy, not yet written.

    Attributes:
        folder: Where it goes.
        stem: What its name begins with.
    """

    folder: Path
    stem: str
    _data: bytes = field(repr=False)

    @property
    def path(self) -> Path:
        """The file it becomes as things are: pictures from different folders may share their name."""
        return next(path for path in self._names() if not os.path.lexists(path))

    def save(self) -> None:
        """Write the file, whole or not at all.

        Raises:
            UsageError: If the folder cannot be written.
        """
        try:
            with hidden_file(self.folder / "copy") as temporary:
                temporary.write_bytes(self._data)
                next(path for path in self._names() if _takes(temporary, path))
        except OSError as error:
            hint = "Choose a writable folder"
            raise UsageError(f"Cannot write pictures into {self.folder}", found=reason_of(error), hint=hint) from error

    def _names(self) -> Iterator[Path]:
        yield self.folder / f"{self.stem}_label.jpg"
        yield from (self.folder / f"{self.stem}_label_{number}.jpg" for number in itertools.count(2))


def annotate(result: Result, folder: Path) -> Copy:
    """Return ``folder/NAME_label.jpg``: the picture, upright, with class and probability in a bar below it.

    Args:
        result: A classified input; its picture is read again.
        folder: An existing folder.

    Returns:
        The copy; a number in its file's name keeps pictures of the same name apart.

    Raises:
        ImageError: If the picture can no longer be read.
    """
    assert result.prediction is not None
    source = result.input.read()
    image = decode(source, mode="RGB", exif=True, name=result.path)
    image.thumbnail((MAX_SIDE, MAX_SIDE))
    size = max(12, image.width // 24)
    font, bar = ImageFont.load_default(size), 2 * size
    name = result.prediction.name.partition(",")[0]
    text = f"{name if _has_glyphs(font, name) else f'class {result.prediction.label}'}  {result.prediction.score:.1%}"
    # a name without end is cut where the largest picture ends
    width = max(image.width, 8 * size, min(MAX_SIDE, size + math.ceil(font.getlength(text))))
    canvas = Image.new("RGB", (width, image.height + bar), "#202020")
    canvas.paste(image, (0, 0))
    draw = ImageDraw.Draw(canvas)
    draw.text((size // 2, image.height + bar // 2), text, "white", font, anchor="lm")
    file = io.BytesIO()
    canvas.save(file, "JPEG", quality=90)
    return Copy(folder, _stem(result.path), file.getvalue())


def _has_glyphs(font: ImageFont.FreeTypeFont | ImageFont.ImageFont, text: str) -> bool:
    """Tell whether a font can write a text in one line: what it lacks looks like what no font has."""
    lacking = tuple(font.getmask(NO_CHARACTER))
    return text.isprintable() and all(tuple(font.getmask(char)) != lacking for char in set(text))


def _stem(name: str) -> str:
    """Return an input's name without folder, ending, and what a file's name should not hold."""
    stem = PurePath(name).stem if name != "-" else "stdin"
    safe = "".join(char if char.isalnum() or char in "._- " else "_" for char in stem)
    return safe.encode("utf-8", "replace")[:_MAX_STEM].decode("utf-8", "ignore") or "picture"


def _takes(file: Path, name: Path) -> bool:
    """Give a file a name unless something has it; return whether it was free."""
    try:
        name.hardlink_to(file)
    except FileExistsError:
        return False
    except OSError:  # not every file system has links
        if os.path.lexists(name):
            return False
        file.replace(name)
    return True
