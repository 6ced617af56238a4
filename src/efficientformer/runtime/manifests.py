"""Reading a manifest out of a file's metadata."""

from __future__ import annotations

from pathlib import Path

from efficientformer.spec.errors import EngineError, SpecError
from efficientformer.spec.manifest import Manifest


def parse_manifest(path: Path, text: str | None) -> Manifest:
    """Return the manifest a file carries.

    Args:
        path: The file, for messages.
        text: The manifest's JSON; None if the file has none.

    Raises:
        EngineError: If there is none, or it is damaged.
    """
    if not text:
        raise EngineError(
            f"{path} does not say which preprocessing and labels it needs",
            expected="a file exported by this package, with a manifest in its metadata",
            hint="Give the checkpoint instead: --checkpoint FILE",
        )
    try:
        return Manifest.from_json(text)
    except SpecError as error:
        raise EngineError(f"The manifest in {path} is damaged", found=str(error)) from error
