"""A page as its parts, by the parser of the standard library."""

from __future__ import annotations

from dataclasses import dataclass, field
from html.parser import HTMLParser

_VOID = {"meta", "link", "input", "br", "img", "hr"}


@dataclass
class Element:
    tag: str
    attributes: dict[str, str]
    parent: Element | None = None
    children: list[Element] = field(default_factory=list)
    parts: list[str] = field(default_factory=list)

    @property
    def text(self) -> str:
        """Its words and those of all in it, blanks as a browser has them."""
        return " ".join("".join(self.parts).split())

    def all(self, tag: str) -> list[Element]:
        """All in it of this tag, in their order."""
        found = []
        for child in self.children:
            found += [child, *child.all(tag)] if child.tag == tag else child.all(tag)
        return found

    def every(self) -> list[Element]:
        return [one for child in self.children for one in (child, *child.every())]

    def by_id(self, name: str) -> Element:
        (found,) = (one for one in self.every() if one.attributes.get("id") == name)
        return found


class _Parser(HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.root = self.here = Element("", {})

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        element = Element(tag, {name: value or "" for name, value in attrs}, self.here)
        assert len(element.attributes) == len(attrs), (tag, attrs)
        self.here.children.append(element)
        if tag not in _VOID:
            self.here = element

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in _VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.here.tag == tag, f"</{tag}> in <{self.here.tag}>"
        assert self.here.parent is not None
        self.here = self.here.parent

    def handle_data(self, data: str) -> None:
        one: Element | None = self.here
        while one is not None:
            one.parts.append(data)
            one = one.parent


def parsed(text: str) -> Element:
    """Raises AssertionError for elements that are not closed in order."""
    parser = _Parser()
    parser.feed(text)
    parser.close()
    assert parser.here is parser.root, f"<{parser.here.tag}> is not closed"
    return parser.root
