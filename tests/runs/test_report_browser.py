"""The report as a reader sees it: in headless Chromium, on a wide and on a narrow screen."""

import itertools
import shutil
from pathlib import Path

import pytest
from records import make_results, make_track_b, shipped_config

from kimi_recursive.report.page import write_report

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)
ARGUMENTS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
]  # fmt: skip
WIDTHS = (1280, 390, 1920)
pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="no chromium on this machine (Debian: apt-get install chromium)"
)

LEAVES_THE_PAGE = """() => [...document.querySelectorAll('body *')].filter(e =>
    !e.parentElement.closest('.wide, pre')
    && e.getBoundingClientRect().right > document.documentElement.clientWidth + 1
).map(e => e.outerHTML.slice(0, 80))"""
SIDE_BY_SIDE = """() => [...document.querySelectorAll('.pair')].filter(e =>
    e.children.length == 2 && e.querySelector('figure')
).map(e => e.children[0].getBoundingClientRect().right
    <= e.children[1].getBoundingClientRect().left)"""
FIGURES = """() => [...document.querySelectorAll('figure svg')].map(svg => {
    const box = e => { const r = e.getBoundingClientRect();
        return {left: r.left, right: r.right, top: r.top, bottom: r.bottom} };
    return {box: box(svg), texts: [...svg.querySelectorAll('text')].map(
        t => ({text: t.textContent.trim(), size: parseFloat(getComputedStyle(t).fontSize)
               * svg.getScreenCTM().a, ...box(t)}))};
})"""


def make_whole(folder: Path) -> dict:
    config = shipped_config(seeds=[0, 1, 2])
    make_track_b(make_results(folder / "results", config), config)
    return config


def make_partial(folder: Path) -> dict:
    config = shipped_config()
    results = make_track_b(make_results(folder / "results", config), config)
    for path in [*results.glob("eval/*_b_*"), *results.glob("track_b/students/*_s1/logs/*")]:
        path.unlink()
    (results / "eval/finetuned_recursive_c_documents.parquet").write_bytes(b"PAR1")
    log = results / "logs/train_phase/recursive_b_s0.log"
    log.parent.mkdir(parents=True)
    log.write_text("short\n" * 30 + "error: " + "long" * 200 + " <img src='http://x.test/y'>\n")
    return config


def make_nothing(folder: Path) -> dict:
    return shipped_config()


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture(scope="module", params=[make_whole, make_partial, make_nothing])
def report(request, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    config = request.param(folder)
    write_report(config, folder / "results", folder / "report.html")
    return folder / "report.html"


@pytest.fixture(scope="module", params=WIDTHS)
def page(request, browser, report):
    """The page with every `<details>` open; what it asked for and complained about beside it."""
    page = browser.new_page(viewport={"width": request.param, "height": 900})
    page.requests, page.complaints = [], []
    page.on("request", lambda found: page.requests.append(found.url))
    page.on("console", lambda found: page.complaints.append(found.text))
    page.on("pageerror", lambda found: page.complaints.append(str(found)))
    page.goto(report.as_uri())
    page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    yield page
    page.close()


def overlaps(one: dict, other: dict, slack: float) -> bool:
    return (
        one["left"] + slack < other["right"]
        and other["left"] + slack < one["right"]
        and one["top"] + slack < other["bottom"]
        and other["top"] + slack < one["bottom"]
    )


def test_nothing_is_requested_and_nothing_complains(page, report):
    assert [url for url in page.requests if not url.startswith("data:")] == [report.as_uri()]
    assert page.complaints == []


def test_the_page_does_not_scroll_sideways(page):
    width = page.evaluate("document.documentElement.clientWidth")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.evaluate(LEAVES_THE_PAGE) == []


def test_figure_and_table_stand_side_by_side_where_the_window_is_wide(page):
    pairs = page.evaluate(SIDE_BY_SIDE)
    wide = page.viewport_size["width"] == 1920
    assert all(side == wide for side in pairs)


def test_headings_are_in_order_and_the_contents_lead_to_them(page):
    levels = [int(tag[1]) for tag in page.eval_on_selector_all(
        "h1, h2, h3, h4, h5, h6", "found => found.map(e => e.tagName)")]  # fmt: skip
    assert levels[0] == 1 and levels.count(1) == 1 and levels.count(2) >= 7
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))
    links = page.eval_on_selector_all("nav a", "found => found.map(e => [e.hash, e.textContent])")
    titles = page.eval_on_selector_all("h2", "found => found.map(e => ['#' + e.id, e.textContent])")
    assert links == titles


def test_text_in_figures_can_be_read(page, report):
    """It is large enough, inside its figure, and not on top of other text."""
    figures = page.evaluate(FIGURES)
    assert len(figures) == (0 if not (report.parent / "results").exists() else 6)
    for figure in figures:
        box, texts = figure["box"], [t for t in figure["texts"] if t["text"]]
        assert box["right"] - box["left"] > 300 and box["bottom"] - box["top"] > 100
        assert len(texts) > 8
        for text in texts:
            assert text["size"] >= 6.5, text
            assert box["left"] - 1 <= text["left"] and text["right"] <= box["right"] + 1, text
            assert box["top"] - 1 <= text["top"] and text["bottom"] <= box["bottom"] + 1, text
        for i, text in enumerate(texts):
            for other in texts[:i]:
                assert not overlaps(text, other, slack=2), (text, other)


def test_every_table_and_log_can_be_scrolled_to_its_end(page):
    hidden = page.evaluate(
        """() => [...document.querySelectorAll('.wide, pre')].filter(e =>
            e.scrollWidth > e.clientWidth + 1
            && !['auto', 'scroll'].includes(getComputedStyle(e).overflowX)).length"""
    )
    assert hidden == 0
    sizes = page.eval_on_selector_all("table", "found => found.map(e => e.offsetHeight)")
    assert sizes and min(sizes) > 30
