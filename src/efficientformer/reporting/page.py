"""One HTML page that holds everything in itself: text, tables, plots and thumbnails; nothing is fetched to read it."""

from __future__ import annotations

import base64
import io
import logging
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from efficientformer.spec.errors import missing_extra, require
from efficientformer.spec.text import storable
from efficientformer.spec.whole import write_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from PIL import Image


CJK_FONTS = (
    "Noto Sans CJK SC", "Noto Sans CJK JP", "Noto Sans CJK KR", "Source Han Sans SC", "WenQuanYi Zen Hei",
    "WenQuanYi Micro Hei", "PingFang SC", "Hiragino Sans", "Hiragino Sans GB", "Apple SD Gothic Neo",
    "Microsoft YaHei", "SimHei", "Yu Gothic", "Malgun Gothic", "Arial Unicode MS", "Droid Sans Fallback",
)  # fmt: skip


@dataclass(frozen=True)
class Thumbnail:
    """A small picture and the line below it."""

    image: Image.Image
    caption: str


@dataclass
class Page:
    """Collects the parts of a report, then writes them as one file. Every text is escaped.

    Args:
        title: The page's heading.
        subtitle: One line below it.

    Examples:
        >>> page = Page("Test of efficientformer_l1")
        >>> page.heading("Classes")
        >>> page.table(("class", "top-1"), [("cat", "91.2"), ("dog", "88.0")])
        >>> page.write("report.html")
    """

    title: str
    subtitle: str = ""
    _parts: list[dict[str, Any]] = field(default_factory=list)

    def heading(self, text: str) -> None:
        """Begin a section."""
        self._parts.append({"kind": "heading", "text": text})

    def text(self, text: str) -> None:
        """Add a paragraph."""
        self._parts.append({"kind": "text", "text": text})

    def facts(self, facts: Iterable[tuple[str, object]]) -> None:
        """Add the few figures that matter most, each with its name, in a row of cards."""
        self._parts.append({"kind": "facts", "facts": [(name, str(value)) for name, value in facts]})

    def table(self, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
        """Add a table; cells that look like numbers stand right."""
        cells = [[str(cell) for cell in row] for row in rows]
        self._parts.append({"kind": "table", "columns": list(columns), "rows": cells})

    def figure(self, figure: Figure, caption: str = "") -> None:
        """Add a matplotlib figure."""
        self._parts.append({"kind": "figure", "data": _base64(png(figure)), "caption": caption})

    def thumbnails(self, thumbnails: Iterable[Thumbnail]) -> None:
        """Add a gallery of small pictures."""
        pictures = []
        for each in thumbnails:
            image = each.image.convert("RGB")
            image.thumbnail((160, 160))
            buffer = io.BytesIO()
            image.save(buffer, "PNG")
            pictures.append((_base64(buffer.getvalue()), each.caption))
        self._parts.append({"kind": "thumbnails", "pictures": pictures})

    def write(self, path: str | Path) -> None:
        """Write the page.

        Raises:
            MissingExtraError: If jinja2 is not installed.
            UsageError: If the file cannot be written.
        """
        try:
            from jinja2 import Environment
        except ImportError as error:
            raise missing_extra("report", "An HTML report", error) from error
        template = (files("efficientformer") / "reporting" / "page.html").read_text("utf-8")
        page = Environment(autoescape=True).from_string(template)
        text = page.render(title=self.title, subtitle=self.subtitle, parts=self._parts)
        write_text(Path(path), storable(text))


def require_libraries() -> None:
    """Find out before long work whether its page can be written.

    Raises:
        MissingExtraError: If jinja2 or matplotlib is not installed.
    """
    require("report", "An HTML report", "jinja2", "matplotlib")


def new_figure(width: float = 7.0, height: float = 3.6) -> Figure:
    """Return an empty matplotlib figure (sizes in inches) that needs no screen.

    Raises:
        MissingExtraError: If matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise missing_extra("report", "A plot", error) from error
    return Figure(figsize=(width, height), layout="constrained")


def plain(text: str) -> str:
    """Return a text such that matplotlib draws it as it is: a dollar sign begins no formula, and all is UTF-8."""
    return storable(text).replace("$", r"\$")


def png(figure: Figure) -> bytes:
    """Return a figure as the bytes of a PNG file; names in any script that a font of this machine has."""
    from matplotlib.text import Text

    families = _families()
    for text in figure.findobj(Text):
        text.set_fontfamily(families)
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")  # boxes; the tables have the text
        figure.savefig(buffer, format="png", dpi=120)
    return buffer.getvalue()


@cache
def _families() -> list[str]:
    """Return matplotlib's own font, and behind it the installed ones that have Chinese, Japanese and Korean."""
    from matplotlib.font_manager import fontManager

    logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)  # some of them have one weight only
    installed = {font.name for font in fontManager.ttflist}
    return ["DejaVu Sans", *(name for name in CJK_FONTS if name in installed)]


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")
