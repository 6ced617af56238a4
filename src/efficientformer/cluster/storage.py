"""Pictures and results where pyarrow finds them: local folders, s3://, gs://, hdfs://."""

from __future__ import annotations

import os
import secrets
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from efficientformer.runtime.image import MAX_BYTES, SUFFIXES
from efficientformer.runtime.inputs import gather
from efficientformer.spec.errors import DataError, ImageError, UsageError

UNFINISHED = ".unfinished"  # ending of hidden files that are being written, or were when their writer died


@dataclass(frozen=True)
class Place:
    """A folder of some file system.

    Attributes:
        name: As the user wrote it.
        filesystem: A pyarrow file system.
        path: The folder in it.
    """

    name: str
    filesystem: Any
    path: str

    @classmethod
    def of(cls, name: str) -> Place:
        """Return the folder of a URI or of a local path.

        Raises:
            UsageError: If pyarrow knows no such file system, or it cannot be reached.
        """
        from pyarrow import fs

        try:
            if "://" in name:
                filesystem, path = fs.FileSystem.from_uri(name)
                return cls(name, filesystem, path)
        except (OSError, ValueError) as error:  # pyarrow's ArrowInvalid is a ValueError
            expected = "a folder, or a URI such as s3://bucket/folder"
            raise UsageError(f"Cannot open {name!r}", expected=expected, found=str(error)) from error
        return cls(name, fs.LocalFileSystem(), Path(name).absolute().as_posix())

    def pictures(self) -> list[str]:
        """Return the paths of the pictures below the folder, sorted, hidden ones left out.

        Raises:
            DataError: If there is no such folder, no picture in it, or a name pyarrow cannot hold.
        """
        from pyarrow import fs

        try:
            found = self._here() if isinstance(self.filesystem, fs.LocalFileSystem) else self._listed()
        except (UnicodeDecodeError, UnicodeEncodeError) as error:
            hint = "Rename it, or leave out --ray: one machine reads it"
            raise DataError(
                f"Cannot list {self.name!r}", expected="names in UTF-8", found=repr(error.object), hint=hint
            ) from error
        except OSError as error:
            raise DataError(
                f"Cannot list {self.name!r}", expected="a folder with pictures", found=str(error)
            ) from error
        if not found:
            raise DataError(f"No pictures in {self.name!r}", expected=f"files ending in {', '.join(sorted(SUFFIXES))}")
        return sorted(found)

    def _here(self) -> list[str]:
        """List a local folder as one machine does, which ends circles of links; pyarrow follows them."""
        root = Path(self.path)
        next(root.iterdir(), None)  # raises what keeps it from being listed
        named = [Path(each.name) for each in gather([root])]
        found = [path.as_posix() for path in named if path != root]  # which stands for a folder without pictures
        for path in found:
            path.encode()  # raises if pyarrow cannot hold it
        return found

    def _listed(self) -> list[str]:
        from pyarrow import fs

        found = self.filesystem.get_file_info(fs.FileSelector(self.path, recursive=True))
        files = [PurePosixPath(info.path) for info in found if info.type == fs.FileType.File]
        return [str(path) for path in files if path.suffix.lower() in SUFFIXES and not self._hides(path)]

    def _hides(self, path: PurePosixPath) -> bool:
        """Return whether a name below the folder starts with a dot; those above it are the user's choice."""
        return any(part.startswith(".") for part in path.relative_to(self.path).parts)

    def read(self, path: str) -> bytes:
        """Return a picture's bytes.

        Raises:
            ImageError: If it cannot be read, or is larger than any picture.
        """
        try:
            with self.filesystem.open_input_file(path) as file:
                if file.size() > MAX_BYTES:
                    raise ImageError(f"{path!r} is too large", expected=f"at most {MAX_BYTES:,} bytes", found="more")
                return bytes(file.read())
        except OSError as error:
            raise ImageError(f"Cannot read {path!r}", expected="a readable picture file", found=str(error)) from error

    def names(self) -> set[str]:
        """Return the names in the folder but for empty files; none if there is no such folder.

        Raises:
            UsageError: If it cannot be listed.
        """
        from pyarrow import fs

        try:
            found = self.filesystem.get_file_info(fs.FileSelector(self.path, allow_not_found=True))
        except OSError as error:
            raise UsageError(f"Cannot write to {self.name!r}", found=str(error)) from error
        # a file without a byte was being written when its machine died: none of ours is empty
        return {info.base_name for info in found if info.type != fs.FileType.File or info.size}

    def load(self, name: str) -> bytes:
        """Return the bytes of a file in the folder."""
        with self.filesystem.open_input_file(f"{self.path}/{name}") as file:
            return bytes(file.read())

    def write(self, name: str, data: bytes) -> None:
        """Write a file in the folder, which has its name only once it is whole."""
        whole = f"{self.path}/{name}"
        # an object of a cloud's store is there once its stream is closed, and is renamed by a copy, if at all
        grows = self.filesystem.type_name in ("local", "hdfs")
        path = f"{self.path}/.{name}.{secrets.token_hex(4)}{UNFINISHED}" if grows else whole
        with self.filesystem.open_output_stream(path) as file:
            file.write(data)
        if self.filesystem.type_name == "local":
            with Path(path).open("rb+") as written:
                os.fsync(written.fileno())
        if grows:
            self.filesystem.move(path, whole)
