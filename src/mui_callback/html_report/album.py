"""The figures of a report: each as PNG and SVG in a folder, and as SVG that a page takes in and colours."""

from __future__ import annotations

import re
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from markupsafe import Markup, escape
from matplotlib.figure import Figure

from mui_callback.file_names import plain_name
from mui_callback.pictures.style import DPI, FAINT, INK, RULE, as_png, as_svg
from mui_callback.whole_file import replaced_at_once

_THEMED = {INK: "ink", FAINT: "faint", RULE: "rule", "#ffffff": "page", "#dfe2e7": "zero"}
"""Colours that are others on dark ground."""
_NOT_IN_PAGE = re.compile(
    r"<\?xml.*?\?>|<!DOCTYPE.*?>|<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", re.DOTALL
)


@dataclass(frozen=True)
class Drawn:
    """A figure as the page has it."""

    name: str
    """Of its files, without their ending."""
    svg: Markup
    width: int
    """Pixels that it takes where there is room."""


class Album:
    """Draws figures and keeps them.

    Args:
        directory: for the files.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.files: list[Path] = []
        """Those that were written."""
        self._n_in_page = 0

    def add(self, name: str, figure: Figure, alt: str) -> Drawn:
        """Write a figure and make it ready for the page.

        Args:
            name: of the files; made fit for one.
            figure: what is drawn.
            alt: what is to be seen on it.

        Raises:
            OSError: a file cannot be written.
        """
        svg = self.keep(name, figure)
        self._n_in_page += 1
        width = round(figure.get_figwidth() * DPI)
        return Drawn(as_file_name(name), _in_page(svg, f"f{self._n_in_page}", alt), width)

    def keep(self, name: str, figure: Figure) -> str:
        """Write a figure as PNG and SVG, and return the latter.

        Raises:
            OSError: a file cannot be written.
        """
        png, svg = as_png(figure), as_svg(figure)
        self.directory.mkdir(parents=True, exist_ok=True)
        for ending, content in ((".png", png), (".svg", svg.encode())):
            path = self.directory / f"{as_file_name(name)}{ending}"
            with replaced_at_once(path) as partial:
                partial.write_bytes(content)
            self.files.append(path)
        return svg


def as_file_name(name: str) -> str:
    """A name for files: what cannot be in one is replaced, and then told apart by a few digits."""
    plain = plain_name(name, 80)
    return plain if plain == name else f"{plain}-{sha256(name.encode()).hexdigest()[:6]}"


def _in_page(svg: str, prefix: str, alt: str) -> Markup:
    """Without what a page has once; with the ids that are used, which no other figure has; in colours of the page."""
    svg = _NOT_IN_PAGE.sub("", svg).strip()
    svg = re.sub(r' xmlns(:\w+)?="[^"]*"', "", svg)
    svg = re.sub(
        r'<svg [^>]*?viewBox="([^"]*)"[^>]*>', rf'<svg viewBox="\1" role="img" aria-label="{escape(alt)}">', svg
    )
    used = set(re.findall(r'(?:url\(#|href="#)([^")]+)', svg))
    svg = re.sub(r' id="([^"]*)"', lambda found: f' id="{prefix}-{found[1]}"' if found[1] in used else "", svg)
    svg = svg.replace("url(#", f"url(#{prefix}-").replace('xlink:href="#', f'href="#{prefix}-')
    for color, name in _THEMED.items():
        svg = svg.replace(f": {color}", f": var(--{name})")
    svg = re.sub(r"\s*\n\s*", " ", svg)
    return Markup(svg.replace("base64, ", "base64,"))
