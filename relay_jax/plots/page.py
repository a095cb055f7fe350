"""report.html: one self-contained page, by a template, from text, tables, charts and pictures.

    Page(title, ..., sections=[Section(...)])  ->  write_page  ->  one HTML file

A page has no script and asks for nothing: pictures are inside it, and
its policy forbids the rest. Everything that comes from users (class
names, paths) is escaped by Jinja2. What a page of a run, an
evaluation or a sweep shows is in pages.py: a new kind of report is a
function that returns a Page.
"""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from absl import logging
from PIL import Image

from relay_jax.errors import one_line
from relay_jax.plots.chart import Chart
from relay_jax.runtime.files import replacing

PAGE = "report.html"
LOSSLESS_BYTES = 250_000  # of a picture in the page; a larger one is stored as a photograph
PHOTOGRAPH = 85  # its quality
WIDEST = 2000  # pixels of a picture in the page


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A picture or a chart with its caption.

    picture: a file, left out of the page where it is missing or damaged.
    pixels: shown enlarged without smoothing. width: least width on
    the screen in pixels, for pictures with writing: a narrow screen
    scrolls them.
    """

    caption: str = ""
    name: str = ""
    picture: Path | None = None
    chart: Chart | None = None
    pixels: bool = False
    width: int = 0


@dataclass(frozen=True, kw_only=True)
class Table:
    """head: names of the columns, none for a table of names and values."""

    rows: Sequence[Sequence[Any]]
    head: Sequence[str] = ()
    caption: str = ""


@dataclass(frozen=True, kw_only=True)
class Section:
    """A part of a page under its title; all fields but the title may be empty.

    columns: figures beside each other on a wide screen. commands: (what
    it does, the command). folded: shown when it is asked for.
    """

    title: str = ""
    texts: Sequence[str] = ()
    points: Sequence[str] = ()
    figures: Sequence[Figure] = ()
    tables: Sequence[Table] = ()
    commands: Sequence[tuple[str, str]] = ()
    columns: int = 1
    folded: bool = False


@dataclass(frozen=True, kw_only=True)
class Page:
    """A whole page. facts: (value, what it is), the numbers under the title."""

    title: str
    subtitle: str = ""
    facts: Sequence[tuple[str, str]] = ()
    sections: Sequence[Section] = ()
    footer: str = ""


def render(page: Page) -> str:
    """The page as HTML."""
    # Imported here: only the process that writes pages needs it.
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("relay_jax", "plots"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["embedded"] = embedded
    return environment.get_template("page.html").render(page=page)


def write_page(page: Page, folder: Path) -> Path:
    """Writes FOLDER/report.html, whole or not at all, and returns its path. Raises StorageError."""
    path = folder / PAGE
    text = render(page)
    # A training and --mode=plot may write it at once.
    with replacing(path, shared=True) as temporary:
        temporary.write_bytes(text.encode(errors="backslashreplace"))
    return path


def embedded(picture: Path) -> dict[str, Any] | None:
    """A picture as a data URI with its size; None, with a warning, where it cannot be shown."""
    try:
        content = picture.read_bytes()
        with Image.open(io.BytesIO(content)) as image:
            width, height, kind = image.width, image.height, image.format
            if getattr(image, "n_frames", 1) == 1:
                content, kind = _compact(image, content)
    except FileNotFoundError:
        return None
    except Exception as error:  # Pillow's codecs raise many types.
        logging.warning("%s is not shown: %s", picture, one_line(error, 160))
        return None
    data = base64.b64encode(content).decode()
    return {
        "source": f"data:image/{str(kind).lower()};base64,{data}",
        "width": width,
        "height": height,
    }


def _compact(image: Image.Image, content: bytes) -> tuple[bytes, str]:
    """The same picture in few bytes, exact where that is possible: (bytes, format)."""
    image = image.convert("RGB")
    if image.width > WIDEST:
        image = image.resize((WIDEST, round(image.height * WIDEST / image.width)))
    exact, lossy = io.BytesIO(), io.BytesIO()
    image.save(exact, "webp", lossless=True, quality=30, method=2)
    if exact.tell() <= LOSSLESS_BYTES:
        return exact.getvalue(), "webp"
    image.save(lossy, "webp", quality=PHOTOGRAPH, method=2)
    return lossy.getvalue(), "webp"
