"""A page of HTML as tests ask it."""

from html.parser import HTMLParser
from pathlib import Path

from records import shipped_config

from kimi_recursive.report.page import write_report

VOID = {"meta", "link", "br", "hr", "img"}


class Page(HTMLParser):
    """Elements of a page, each with its attributes and all text in it; refuses what is not
    nested."""

    def __init__(self, source: str):
        super().__init__()
        self.elements: list[dict] = []
        self.stack: list[dict] = []
        self.feed(source)
        self.close()
        assert not self.stack

    def handle_starttag(self, tag, attributes):
        element = {"tag": tag, "text": "", "inside": [e["tag"] for e in self.stack]}
        element |= {"attributes": dict(attributes)}
        self.elements.append(element)
        if tag not in VOID:
            self.stack.append(element)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self.stack.pop()

    def handle_endtag(self, tag):
        assert self.stack and self.stack[-1]["tag"] == tag, (tag, [e["tag"] for e in self.stack])
        self.stack.pop()

    def handle_data(self, data):
        for element in self.stack:
            element["text"] += data

    def all(self, tag: str) -> list[dict]:
        return [e for e in self.elements if e["tag"] == tag]

    @property
    def text(self) -> str:
        return " ".join(self.all("body")[0]["text"].split())

    def rows(self, caption: str) -> list[list[str]]:
        """Cells of the table whose caption begins so."""
        found, inside = [], False
        for element in self.elements:
            if element["tag"] == "caption":
                inside = element["text"].startswith(caption)
            elif inside and element["tag"] == "tr":
                found.append([])
            elif inside and element["tag"] in ("td", "th"):
                found[-1].append(element["text"].strip())
        return found[1:]


def report(results: Path, config: dict | None = None) -> Page:
    """The report of results, beside which it is written; of the default config by default."""
    path = results.parent / "report.html"
    write_report(config or shipped_config(), results, path)
    return Page(path.read_text(encoding="utf-8"))
