"""From a file or anything else that holds a picture to its pixels, without torch and trusting nothing.

For ordinary pictures this is what ``Image.open(f).convert("RGB")`` gives, to the last bit. The one deliberate
difference is 16-bit grey: Pillow's ``convert`` clips it to white, here it is rescaled to 8 bits.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import re
import stat
import struct
import threading
import warnings
from collections.abc import Iterable, Iterator
from io import BytesIO
from pathlib import Path
from typing import IO, Any, TypeAlias, cast

import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image, ImageFile

from efficientformer.runtime.preprocess import least_size
from efficientformer.spec.errors import ImageError, reason_of
from efficientformer.spec.fields import check_choice
from efficientformer.spec.preprocess import PreprocessSpec

WILDCARDS = re.compile(r"[*?\[]")  # what makes a name a pattern of names

Encoded: TypeAlias = bytes | bytearray | memoryview
Source: TypeAlias = str | os.PathLike[str] | Encoded | IO[bytes] | Image.Image | npt.NDArray[Any]

MAX_PIXELS = 178_956_970  # where Pillow itself refuses a picture; 683 MiB as RGB, of which Pillow takes 4 bytes
LARGE_PIXELS = 1 << 24  # above which pictures are decoded one at a time: a file of 20 kB may take a gigabyte
MAX_BYTES = 1 << 29  # of an encoded file: what MAX_PIXELS pixels take without any compression

# Pillow's plugins worth their attack surface, and their files' endings. Left out on purpose: EPS and PSD (programs, not
# pictures; EPS starts Ghostscript), icons, JPEG 2000, and everything scientific or obsolete.
FORMATS: dict[str, tuple[str, tuple[str, ...]]] = {
    "JPEG": ("JpegImagePlugin", (".jpg", ".jpeg", ".jpe", ".jfif", ".mpo")),
    "PNG": ("PngImagePlugin", (".png", ".apng")),
    "WEBP": ("WebPImagePlugin", (".webp",)),
    "GIF": ("GifImagePlugin", (".gif",)),
    "BMP": ("BmpImagePlugin", (".bmp",)),
    "TIFF": ("TiffImagePlugin", (".tif", ".tiff")),
    "AVIF": ("AvifImagePlugin", (".avif",)),
    "PPM": ("PpmImagePlugin", (".ppm", ".pgm", ".pbm", ".pnm")),
}
SUFFIXES = frozenset(suffix for _, suffixes in FORMATS.values() for suffix in suffixes)

# What Pillow's plugins raise in words; and what Python itself raises in them, whose text tells a user nothing.
_IN_WORDS = (OSError, SyntaxError, RuntimeError, Image.DecompressionBombError)
_STUMBLES = (LookupError, struct.error, RecursionError, NotImplementedError)

_STRIP = 256  # rows

# How to undo EXIF orientation 2, 3, ... 8; 1 is upright.
_TURNS = ("FLIP_LEFT_RIGHT", "ROTATE_180", "FLIP_TOP_BOTTOM", "TRANSPOSE", "ROTATE_270", "TRANSVERSE", "ROTATE_90")


def decode(
    source: Source,
    *,
    mode: str = "RGB",
    exif: bool = False,
    max_pixels: int = MAX_PIXELS,
    name: str = "",
    shrink_for: PreprocessSpec | None = None,
) -> Image.Image:
    """Decode one picture completely, trusting nothing in it.

    Of animations the first frame counts; transparency is dropped as Pillow's ``convert`` drops it; 12-bit and 16-bit
    grey is rescaled to 8 bits. What Pillow's global switches say (``MAX_IMAGE_PIXELS``, ``LOAD_TRUNCATED_IMAGES``) is
    ignored.

    Args:
        source: A path, the bytes of a file, an open binary file, a Pillow image, or a uint8 array: (H, W, 3) in the
            order RGB (OpenCV's and mmpretrain's arrays are BGR: reverse them first) or (H, W) grey. An open file is
            read from where it stands.
        mode: Pillow mode of the result, ``RGB`` or ``L``.
        exif: Whether to apply the EXIF orientation; an unreadable EXIF block counts as none.
        max_pixels: Larger pictures are refused from their header, before anything is allocated.
        name: What messages call the picture; by default the path, or the kind of source.
        shrink_for: Decode a JPEG at a half, a quarter or an eighth of its size, which is faster, where that is still
            at least what this preprocessing resizes it to. The pixels are then not quite those of the full picture.
            A Pillow image stays as it is.

    Returns:
        The loaded picture, (W, H) in ``mode``; ``source`` itself if that is a Pillow image which needs no change.

    Raises:
        ImageError: If it cannot be read, is no picture, is damaged or truncated, or is too large.
    """
    check_choice("mode", mode, ("RGB", "L"))
    name = name or _name_of(source)
    if isinstance(source, np.ndarray):
        source = _from_array(source, name)
    given = isinstance(source, Image.Image)
    data = source if isinstance(source, Image.Image) else _read(source, name)
    try:
        with _pillow_guard(max_pixels), _loading(data) if given else contextlib.nullcontext():
            image = data if isinstance(data, Image.Image) else _open(data, name)
            _check_size(image.size, max_pixels, name)
            if shrink_for is not None and not given:  # what the caller opened keeps its size
                image.draft(None, least_size(image.size, shrink_for))  # None: any mode
            with _turn_of(image.size):
                image.load()
                turn = _orientation(image) if exif else None
                image = _convert(image, mode, name)
                return image if turn is None else image.transpose(turn)
    except ImageError:
        raise
    except Exception as error:  # Pillow's plugins let anything out, from struct.error to RecursionError
        expected, found = "a complete, undamaged picture", _damage(error)
        hint = "Fetch it again, or save it anew as JPEG or PNG"
        raise ImageError(f"Cannot decode {name}", expected=expected, found=found, hint=hint) from error


def read_file(path: str | os.PathLike[str]) -> bytes:
    """Return the bytes of a regular file, without ever opening a device, a pipe or a socket.

    Raises:
        ImageError: If it is missing, unreadable, no regular file, or larger than ``MAX_BYTES``.
    """
    name = repr(os.fspath(path))
    try:
        info = Path(path).stat()
        if not stat.S_ISREG(info.st_mode):
            is_folder = stat.S_ISDIR(info.st_mode)
            found, hint = ("a folder", how_to_gather(path)) if is_folder else ("a pipe, socket or device", "")
            raise ImageError(f"Cannot read {name}", expected="a picture file", found=found, hint=hint)
        if info.st_size > MAX_BYTES:
            raise _too_many_bytes(name)
        with Path(path).open("rb") as file:
            return file.read(info.st_size)
    except (OSError, ValueError) as error:  # ValueError: a null byte in the path
        reason, hint = reason_of(error), ""
        if is_address(path):
            reason, hint = "an address", how_to_gather(path)
        elif isinstance(error, FileNotFoundError) and WILDCARDS.search(os.fspath(path)):
            reason, hint = "a pattern", how_to_gather(path)
        raise ImageError(f"Cannot read {name}", expected="a readable picture file", found=reason, hint=hint) from error


def is_address(name: str | os.PathLike[str]) -> bool:
    """Tell whether a name is a URL, or the path that was made of one."""
    return re.match("https?:/", os.fspath(name), re.IGNORECASE) is not None


def how_to_gather(name: str | os.PathLike[str]) -> str:
    """Return the hint for a folder, pattern or address in the place of a picture: none is looked into unasked."""
    given = re.sub("^(https?):/+", r"\1://", os.fspath(name))  # a path has lost a slash
    return f"Use classify.predict(gather([{given!r}])), with gather from efficientformer.runtime.inputs"


def read_stream(stream: IO[bytes], name: str) -> bytes:
    """Return the rest of an open binary file.

    Raises:
        ImageError: If reading fails, gives text, or more than ``MAX_BYTES``.
    """
    data = bytearray()
    try:
        while block := stream.read(1 << 20):
            data += block  # a TypeError if the file was opened as text
            if len(data) > MAX_BYTES:
                raise _too_many_bytes(name)
    except (OSError, TypeError, ValueError) as error:  # ValueError: a closed file, or undecodable text
        found = "one that gives no bytes" if isinstance(error, TypeError) else reason_of(error)
        raise ImageError(f"Cannot read {name}", expected="a file opened in binary mode", found=found) from error
    return bytes(data)


class _PillowGuard:
    """Holds Pillow's process-wide state still while any thread is decoding.

    A host that set ``LOAD_TRUNCATED_IMAGES`` would get half-grey pictures, and one that changed ``MAX_IMAGE_PIXELS``
    other limits than ours in the plugins that check it again; plugins also warn about what we report as errors or
    accept. The first thread in changes this state and the last one out restores it, so decoding stays parallel.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._restore = contextlib.ExitStack()
        self._inside = 0

    @contextlib.contextmanager
    def __call__(self, max_pixels: int) -> Iterator[None]:
        with self._lock:
            if self._inside == 0:
                self._restore.enter_context(warnings.catch_warnings())
                warnings.filterwarnings("ignore", module=r"PIL\.")
                self._restore.callback(setattr, ImageFile, "LOAD_TRUNCATED_IMAGES", ImageFile.LOAD_TRUNCATED_IMAGES)
                self._restore.callback(setattr, Image, "MAX_IMAGE_PIXELS", Image.MAX_IMAGE_PIXELS)
                ImageFile.LOAD_TRUNCATED_IMAGES = False
            Image.MAX_IMAGE_PIXELS = max(Image.MAX_IMAGE_PIXELS or 0, max_pixels)
            self._inside += 1
        try:
            yield
        finally:
            with self._lock:
                self._inside -= 1
                if self._inside == 0:
                    self._restore.close()


_pillow_guard = _PillowGuard()


class _LargeTurn(threading.local):
    """The lock of large pictures, and what gives it back at the end of this thread's ``in_turn_if_large``."""

    lock = threading.RLock()  # of all threads
    block: contextlib.ExitStack | None = None


_large = _LargeTurn()


@contextlib.contextmanager
def in_turn_if_large() -> Iterator[None]:
    """Let one thread of a process at a time hold a large picture that is decoded within, to the end of the block.

    Threads that each hold one would take memory in proportion to the cores.

    Raises:
        ImageError: If memory runs out within.
    """
    outer = _large.block
    with contextlib.ExitStack() as block:
        _large.block = block
        try:
            yield
        except MemoryError as error:
            raise ImageError("Too little memory for this picture", hint="Scale it down first") from error
        finally:
            _large.block = outer


def _turn_of(size: tuple[int, int]) -> contextlib.AbstractContextManager[Any]:
    """Return what is held while a picture of this size is decoded, or, in ``in_turn_if_large``, until its end."""
    if size[0] * size[1] <= LARGE_PIXELS:
        return contextlib.nullcontext()
    if _large.block is None:
        return _LargeTurn.lock
    return contextlib.nullcontext(_large.block.enter_context(_LargeTurn.lock))


def _renew_turn() -> None:
    """Free the lock in a forked child: a thread that held it was left behind."""
    _LargeTurn.lock = threading.RLock()


if hasattr(os, "register_at_fork"):  # Windows has no fork
    os.register_at_fork(after_in_child=_renew_turn)

_LOADERS = tuple(threading.Lock() for _ in range(64))


def _loading(image: object) -> threading.Lock:
    """Return the lock of a caller's image: another thread may be given the same, and an open file is read once."""
    # those that share one by chance wait for each other, no more; the last bits of all addresses are alike
    return _LOADERS[(id(image) >> 4) % len(_LOADERS)]


def _name_of(source: Source) -> str:
    """Return what messages call ``source``."""
    if isinstance(source, str | os.PathLike):
        return repr(os.fspath(source))
    if isinstance(source, Encoded):
        return f"the {len(source)} bytes"
    return f"the {type(source).__name__}"


def _too_many_bytes(name: str) -> ImageError:
    """Build the error for a file that no picture within our limits needs."""
    return ImageError(f"{name} is too large", expected=f"at most {MAX_BYTES:,} bytes", found="more")


def _read(source: object, name: str) -> Encoded:
    """Return the encoded bytes that ``source`` stands for."""
    if isinstance(source, str | os.PathLike):
        return read_file(source)
    if isinstance(source, Encoded):
        return source
    if hasattr(source, "read"):
        return read_stream(cast("IO[bytes]", source), name)
    hint = ""
    if isinstance(source, Iterable):
        hint = "Several pictures go to classify.predict([...])"
    if hasattr(source, "numpy"):  # a tensor of torch, tensorflow or jax, channels first or last
        hint = "Give a uint8 array (H, W, 3): of a torch tensor (3, H, W) tensor.permute(1, 2, 0).cpu().numpy()"
    expected = "a path, bytes, a binary file, a Pillow image or a uint8 array"
    raise ImageError("Cannot decode this kind of object", expected=expected, found=type(source).__name__, hint=hint)


def _from_array(array: npt.NDArray[Any], name: str) -> Image.Image:
    """Return the Pillow image of a (H, W, 3) or (H, W) uint8 array."""
    if array.dtype == np.uint8 and array.size and (array.ndim == 2 or (array.ndim == 3 and array.shape[2] == 3)):
        return Image.fromarray(array)
    hint = ""
    if array.dtype != np.uint8:
        hint = "Rescale it first; values from 0 to 1 with (array * 255).round().astype('uint8')"
    elif array.ndim == 3:
        hint = "Use array.transpose(1, 2, 0)" if array.shape[0] == 3 else "Use array[..., :3] or array[..., 0]"
    raise ImageError(
        f"Cannot use {name} as a picture",
        expected="uint8 values of shape (H, W, 3) in the order RGB, or (H, W) grey",
        found=f"{array.dtype} {array.shape}",
        hint=hint,
    )


def form(data: bytes) -> str:
    """Return a picture's format and mode, such as ``JPEG RGB``, from its header.

    Raises:
        ImageError: If it is none.
    """
    with _pillow_guard(MAX_PIXELS), _open(data, "a picture") as header:
        return f"{header.format} {header.mode}"


def _open(data: Encoded, name: str) -> Image.Image:
    """Read the header with the one reviewed plugin that recognises it; no pixel is decoded."""
    if not len(data):
        raise ImageError(f"Cannot decode {name}", expected="a picture", found="nothing: it is empty")
    prefix = bytes(data[:16])
    found = f"content that starts with {prefix!r}"
    for fmt, (plugin, _) in FORMATS.items():
        # Not Image.open: that checks sizes against a global which belongs to the host.
        with contextlib.suppress(ImportError):  # Pillow before 11.3 has no AVIF
            importlib.import_module(f"PIL.{plugin}")
        if fmt not in Image.OPEN:
            continue
        factory, accept = Image.OPEN[fmt]
        accepted = accept(prefix) if accept else False
        if isinstance(accepted, str):  # the right format, but its codec is missing from this Pillow
            found = accepted
        elif accepted:
            return factory(BytesIO(data), "")
    hint = "Save it as JPEG or PNG"
    raise ImageError(f"Cannot decode {name}", expected=f"one of {', '.join(FORMATS)}", found=found, hint=hint)


def _damage(error: Exception) -> str:
    """Say what is wrong with a picture: in Pillow's words where there are any, never in Python's."""
    if isinstance(error, MemoryError):
        return "too little memory for it"
    stumbled = any(isinstance(each, _STUMBLES) for each in (error, *error.args))  # Pillow wraps some: SyntaxError(v)
    said = reason_of(error) if isinstance(error, _IN_WORDS) and not stumbled else ""
    return said or "contents that end too early or make no sense"


def _check_size(size: tuple[int, int], max_pixels: int, name: str) -> None:
    """Raise ImageError unless a picture of ``size`` (W, H) has pixels, and not too many."""
    if min(size) < 1 or size[0] * size[1] > max_pixels:
        expected, found = f"1 to {max_pixels:,} pixels", f"{size[0]} x {size[1]}"
        raise ImageError(f"Refused {name} by its size", expected=expected, found=found, hint="Scale it down first")


def _orientation(image: Image.Image) -> Image.Transpose | None:
    """Return the turn that the EXIF orientation asks for, if any."""
    try:
        value = image.getexif().get(ExifTags.Base.Orientation, 1)
        return Image.Transpose[_TURNS[value - 2]] if 2 <= value <= 8 else None
    except Exception:  # a hostile EXIF block says nothing about the pixels, which are fine
        return None


def _convert(image: Image.Image, mode: str, name: str) -> Image.Image:
    """Return a loaded picture in ``mode``; deep grey rescaled instead of clipped."""
    if image.mode == mode:
        return image
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        image = _in_8_bits(image)
    elif image.mode in ("I", "F"):
        found = f"32-bit {'floats' if image.mode == 'F' else 'integers'}, whose range no standard fixes"
        problem, hint = f"Cannot tell black from white in {name}", "Rescale it to 0..255 first"
        raise ImageError(problem, expected="8 or 16 bits per channel", found=found, hint=hint)
    return image.convert(mode)


def _in_8_bits(image: Image.Image) -> Image.Image:
    """Return deep grey rescaled; a TIFF says how deep, and whether 0 is white, which Pillow heeds in 8 bits only."""
    tags = getattr(image, "tag_v2", {}) if image.format == "TIFF" else {}
    white = (1 << tags.get(ExifTags.Base.BitsPerSample, (16,))[0]) - 1
    zero_is_white = tags.get(ExifTags.Base.PhotometricInterpretation) == 0
    deep = np.asarray(image)
    grey = np.empty(deep.shape, np.uint8)
    for top in range(0, len(deep), _STRIP):  # in parts: each is held in 32 bits, twice
        part = (deep[top : top + _STRIP].astype(np.uint32) * 255 + white // 2) // white  # 0..white to 0..255, rounded
        grey[top : top + _STRIP] = 255 - part if zero_is_white else part
    return Image.fromarray(grey)
