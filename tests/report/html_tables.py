"""Read a page the way a browser does: its tables as grids of text, its tags with their attributes."""

from __future__ import annotations

from dataclasses import dataclass, field
from html.parser import HTMLParser

VOID = {"meta", "img", "br"}


@dataclass
class Grid:
    """A table: one list of texts per row, cells that reach over several rows repeated in each."""

    kind: str
    section: str
    rows: list[list[str]] = field(default_factory=list)
    marks: list[list[str | None]] = field(default_factory=list)  # data-value


class Page(HTMLParser):
    """Collects tables, ids, and every tag with its attributes; notices tags that are left open."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.grids: list[Grid] = []
        self.words: list[str] = []
        self.open: list[str] = []
        self._sections: list[str] = []
        self._cell: list[str] | None = None
        self._row: list[tuple[str, int, str | None]] = []
        self._covered: dict[int, tuple[int, str, str | None]] = {}
        self._attributes: dict[str, str | None] = {}
        self.feed(text)
        self.close()

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.tags.append((tag, found))
        if tag not in VOID:
            self.open.append(tag)
        if tag in ("section", "details") and found.get("id"):
            self._sections.append(found["id"] or "")
        elif tag == "table":
            self.grids.append(Grid(found.get("class") or "", self._sections[-1] if self._sections else ""))
            self._covered = {}
        elif tag == "tr":
            self._row = []
        elif tag in ("td", "th"):
            self._cell, self._attributes = [], found
        elif tag == "small" and self._cell is not None:
            self._cell.append(" ")

    def handle_data(self, data: str) -> None:
        self.words.append(data)
        if self._cell is not None:
            self._cell.append(data)

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open and self.open[-1] == tag, (tag, self.open)
            self.open.pop()
        if tag in ("td", "th") and self._cell is not None:
            text = " ".join("".join(self._cell).split())
            self._row.append((text, int(self._attributes.get("rowspan") or 1), self._attributes.get("data-value")))
            self._cell = None
        elif tag == "tr":
            self._place()

    def _place(self) -> None:
        texts: list[str] = []
        marks: list[str | None] = []
        waiting = list(self._row)
        column = 0
        while waiting or self._covered.get(column, (0, "", None))[0]:
            left, text, mark = self._covered.get(column, (0, "", None))
            if left:
                self._covered[column] = (left - 1, text, mark)
            else:
                text, rows, mark = waiting.pop(0)
                self._covered[column] = (rows - 1, text, mark)
            texts.append(text)
            marks.append(mark)
            column += 1
        self.grids[-1].rows.append(texts)
        self.grids[-1].marks.append(marks)
