"""The pages of the repository: links resolve, named files exist, code refers to nothing outside."""

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("[cr]*/README.md")]
FOLDERS = (
    "benchmarks", "config", "docs", "examples", "kimi_recursive", "profiles", "rules", "tests",
    "workflow",
)  # fmt: skip
PATH = re.compile(rf"(?<![\w/.-])(?:{'|'.join(FOLDERS)})/[\w./*-]*")
MODULE = re.compile(r"`([\w/]+/\w+\.(?:py|smk))`")
READERS_OWN = ("config/mine.yaml", "config/other.yaml")
# Pages that a reader of the repository does not have.
OUTSIDE = re.compile(r"DESIGN\.md|\bseeds/\w+|\bthe docs\b")


def anchors(page: Path) -> list[str]:
    """What GitHub calls the headings of a page in links."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return [re.sub(r"[^\w\- ]", "", h.lower()).strip().replace(" ", "-") for h in headings]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_and_paths_of_a_page_resolve(page):
    text = page.read_text(encoding="utf-8")
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if not link.startswith(("http://", "https://")):
            name, _, anchor = link.partition("#")
            target = page.parent / name if name else page
            assert target.exists(), f"link to {link}"
            assert not anchor or anchor in anchors(target), f"link to {link}"
    for path in {match.rstrip(".") for match in PATH.findall(text)} - {*READERS_OWN}:
        assert any(ROOT.glob(path)), f"{path} is named and is not there"
    for name in MODULE.findall(text):
        assert (ROOT / name).is_file() or (ROOT / "kimi_recursive" / name).is_file(), name


@pytest.mark.parametrize("page", [*PAGES, ROOT / "Makefile"], ids=lambda page: page.name)
def test_no_target_stands_behind_configfile(page):
    """Snakemake takes every name behind `--configfile` as another config."""
    for command in re.findall(r"snakemake [^`\n]*--configfile [^`\n]*", page.read_text("utf-8")):
        names = command.partition("--configfile ")[2].partition(" #")[0].split()
        assert all(name.startswith("-") for name in names[1:2]), command


def test_the_readme_is_short_and_links_every_page():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(readme.splitlines()) <= 200
    for page in ROOT.glob("docs/*.md"):
        assert f"](docs/{page.name})" in readme, page.name


def test_nothing_refers_to_a_page_that_is_not_here():
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, check=True,
    )  # fmt: skip
    found = []
    for name in filter(None, listed.stdout.decode().split("\0")):
        path = ROOT / name
        if path == Path(__file__) or path.suffix == ".png" or not path.is_file():
            continue
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            if OUTSIDE.search(line):
                found.append(f"{name}:{number}: {line.strip()}")
    assert not found, "\n".join(found)
