"""What a reader of a page sees of it, or would once scripts show it, as plain text: blocks apart, what stands in a line in one line."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bs4 import BeautifulSoup

_HIDDEN = ("title", "script", "style", "noscript", "template")
_PARAGRAPHS = frozenset(
    "address article aside blockquote body center details dialog div dl fieldset figure footer form h1 h2 h3 h4 h5 h6 header hr html "
    "main menu nav ol p pre section table ul".split()
)
_LINES = frozenset("br caption dd dt figcaption legend li option summary tbody tfoot thead tr".split())
_CELLS = frozenset(("td", "th"))
_AS_IT_STANDS = frozenset(("pre", "textarea", "listing"))
_SPACE = re.compile(r"[ \t\n\f\r]+")  # as HTML has it: other blanks are characters
_FENCE = re.compile(r" {0,3}(```+|~~~+)")
_HEADING = re.compile(r" {0,3}#{1,6}[ \t]+(.*?)(?:[ \t]+#+)?[ \t]*$")
_UNDERLINE = re.compile(r" {0,3}(=+|-+)[ \t]*$")
_NO_PARAGRAPH = re.compile(r"[ \t]*$| {0,3}([>#|]|[-+*][ \t]|\d+[.)][ \t]|[-*_=]{3})|\t| {4}")


def visible_text(soup: BeautifulSoup) -> str:
    """The text of a page without its title: a blank line between paragraphs, headings, lists and tables, a line an item or a row of
    cells; white space as it stands in `<pre>`, elsewhere a blank. Takes the hidden parts out of `soup`."""
    from bs4.element import CData, NavigableString, PreformattedString, Tag

    for hidden in soup(_HIDDEN):
        hidden.decompose()
    page = _Page()
    waiting: list[object] = [soup]  # a page may be nested deeper than Python's own stack
    while waiting:
        part = waiting.pop()
        if isinstance(part, Tag):
            page.begin(part.name)
            waiting.append(_End(part.name))
            waiting += reversed(part.contents)
        elif isinstance(part, _End):
            page.end(part.name)
        elif isinstance(part, CData) or (isinstance(part, NavigableString) and not isinstance(part, PreformattedString)):
            page.add(str(part))  # what else is preformatted are comments and declarations
    return page.text()


class _End:
    """Of a tag that has begun."""

    def __init__(self, name: str) -> None:
        self.name = name


class _Page:
    """A page that is read from its beginning to its end."""

    def __init__(self) -> None:
        self._parts: list[str] = []  # lines, and what stands between them
        self._line: list[str] = []
        self._apart = 0  # line feeds before the next line
        self._as_it_stands = 0  # tags that are open in which white space counts
        self._begun = False  # whether something stood in the innermost of them

    def begin(self, tag: str) -> None:
        self._edge(tag)
        if tag in _AS_IT_STANDS:
            self._as_it_stands += 1
            self._begun = False

    def end(self, tag: str) -> None:
        self._edge(tag)
        self._as_it_stands -= tag in _AS_IT_STANDS

    def add(self, text: str) -> None:
        if not self._as_it_stands:
            self._line.append(text)
            return
        if not self._begun:  # a line feed behind <pre> is not part of it
            text = text.removeprefix("\n")
        self._begun = True
        first, *others = text.split("\n")
        self._line.append(first)
        for line in others:
            self._finish()
            self._apart += 1
            self._line.append(line)

    def text(self) -> str:
        self._finish()
        return "".join(self._parts)

    def _edge(self, tag: str) -> None:
        if tag in _CELLS:
            self._line.append(" ")
        elif tag in _PARAGRAPHS or tag in _LINES:
            self._finish()
            self._apart = max(self._apart, 2 if tag in _PARAGRAPHS else 1)

    def _finish(self) -> None:
        """The line under way, where there is something in it."""
        whole = "".join(self._line)
        line = whole.rstrip() if self._as_it_stands else _SPACE.sub(" ", whole).strip()
        self._line.clear()
        if not line:
            return
        self._parts += ["\n" * self._apart, line] if self._parts else [line]
        self._apart = 0


def first_heading(markdown: str) -> str:
    """The first heading that says something, "# like this" or underlined; not what looks so in front matter or in a block of code."""
    lines = markdown.split("\n")
    if lines[0].rstrip() == "---" and (ends := [at for at, line in enumerate(lines[1:], 1) if line.rstrip() in ("---", "...")]):
        lines = lines[ends[0] + 1 :]
    fence, before = "", ""
    for line in lines:
        mark = _FENCE.match(line)
        if fence:
            fence = "" if mark and mark[1].startswith(fence) and not line[mark.end() :].strip() else fence
            continue
        if mark:
            fence, before = mark[1], ""
            continue
        heading = _HEADING.match(line)
        if heading and heading[1]:
            return heading[1]
        if before and _UNDERLINE.match(line):
            return before
        before = "" if _NO_PARAGRAPH.match(line) else line.strip()
    return ""
