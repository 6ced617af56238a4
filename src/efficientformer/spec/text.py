"""Names of files and classes as text that can be stored and shown: they are not trusted to be fit for either."""

from __future__ import annotations


def storable(text: str) -> str:
    """Return text with bytes of file names that are no UTF-8 made visible; every other name is still its file's."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def printable(text: str) -> str:
    """Return text for people, with control characters made visible too."""
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in storable(text))
