"""Which kind of weights file a file is, by its first bytes; needs no torch."""

from __future__ import annotations

from pathlib import Path

from efficientformer.spec.errors import CheckpointError, reason_of
from efficientformer.spec.zoo import FOREIGN_SUFFIXES, ONNX_ONLY

_DEPLOYED = "Weights for torch are in .safetensors or .pth files; an .onnx file is for `efficientformer predict`"
# (offset, bytes there, what such a file is, what to do)
_OTHER_KINDS = (
    (4, b"ORTM", "an ONNX Runtime model", ONNX_ONLY),
    (4, b"TFL3", "a LiteRT model", ONNX_ONLY),
    (4, b"ET1", "an ExecuTorch program", ONNX_ONLY),
    (0, b"<?xml", "an XML file, such as an OpenVINO model", ONNX_ONLY),
    (
        0,
        b"version https://git-lfs",
        "a Git LFS pointer instead of the file itself",
        "Fetch the file with `git lfs pull`",
    ),
    (0, b"<", "a web page", "The download went wrong: fetch the file again"),
    (0, b"GGUF", "a GGUF file", "Weights are read from .safetensors or .pth files"),
)


def kind_of(path: Path) -> str:
    """Return ``safetensors``, ``zip`` or ``legacy`` (torch's format before 1.6).

    Raises:
        CheckpointError: If it is a file of any other kind.
        OSError: If it cannot be read.
    """
    with path.open("rb") as file:
        head = file.read(64)
    if not head:
        raise CheckpointError("The file is empty", hint="Fetch or write it again")
    if head.startswith(b"PK\x03\x04"):
        return "zip"
    # the length that opens a safetensors file may begin with a pickle's first byte; a damaged one may be any
    if head[8:9] == b"{" and (head[:1] != b"\x80" or int.from_bytes(head[:8], "little") <= path.stat().st_size):
        return "safetensors"
    if head[:1] == b"\x80":
        return "legacy"
    for offset, magic, what, hint in _OTHER_KINDS:
        if head[offset:].lower().startswith(magic.lower()):
            raise CheckpointError("Not a weights file", expected="safetensors or torch.save", found=what, hint=hint)
    found, hint = f"a file that begins with {head[:8]!r}", ""
    if path.suffix in FOREIGN_SUFFIXES:
        found, hint = f"a deployed model ({path.suffix})", ONNX_ONLY
    elif path.suffix == ".onnx" or (head[0] == 0x08 and head[2:3] in (b"\x12", b"\x3a")):
        found, hint = "a deployed model, such as ONNX", _DEPLOYED
    raise CheckpointError("Not a weights file", expected="safetensors or torch.save", found=found, hint=hint)


def check_kind(path: Path) -> None:
    """Raise CheckpointError, which names the file, if it is no weights file or cannot be read."""
    try:
        kind_of(path)
    except CheckpointError as error:
        raise error.at(path.name) from error
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read", found=reason_of(error)) from error
