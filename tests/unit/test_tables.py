"""One table as text, HTML, markdown and CSV."""

from datetime import datetime

import pytest

from kimi_recursive.evaluation.bootstrap import Difference
from kimi_recursive.matrix.comparison import Comparison, comparison_table
from kimi_recursive.tables import NAME, NUMBER, VERDICT, Column, Table, count, interval, percent

TABLE = Table(
    "Caption <b>",
    [Column("run", NAME), Column("scored tokens", NUMBER), Column("verdict", VERDICT, True)],
    [["a|b", 1234.5678, "helps"], ["a|b", None, "hurts"], ["<i>", 7, "other"]],
    ["A note & more."],
)
COMPARISON = Comparison("arm", "base", 2, 0, [0, 1], Difference(-0.02, -0.03, -0.01, 12, 2))


def test_text_aligns_numbers_and_names_a_row_once():
    assert TABLE.to_text() == (
        "Caption <b>\n"
        "run  scored tokens  verdict\n"
        "a|b        1234.57  helps\n"
        "                 -  hurts\n"
        "<i>              7  other\n"
        "A note & more."
    )
    assert Table("Nothing", TABLE.columns, []).to_text() == "Nothing\n(none)"


def test_a_narrow_text_wraps_headings_then_drops_what_is_implied_then_moves_names():
    lines = TABLE.to_text(21).splitlines()
    assert lines[1:3] == ["      scored", "run   tokens  verdict"]
    lines = TABLE.to_text(20).splitlines()
    assert lines[1:3] == ["run  scored tokens", "a|b        1234.57"]
    name = "a_name_of_some_length"
    table = Table("", TABLE.columns[:2], [[name, 1.0], ["short", 2.0]])
    assert table.to_text(25).splitlines() == [
        f"{'scored':>25}", f"run{'tokens':>22}", name, f"{'1':>25}", f"short{'2':>20}"
    ]  # fmt: skip


def test_a_last_column_of_text_is_wrapped_and_loses_no_word():
    words = " ".join(f"word{i}" for i in range(40))
    table = Table("", [Column("run", NAME), Column("detail")], [["x" * 30, words], ["y", words]])
    text = table.to_text()
    assert max(map(len, text.splitlines())) <= 100
    assert text.splitlines()[1].startswith("x" * 30 + "  word0 word1 "), "beside its name"
    assert text.split().count("word39") == 2 and " ".join(text.split()).count(words) == 2


def test_a_terminal_cuts_the_names_last():
    table = Table("", [Column("run", NAME), Column("text")], [["n" * 20, "t" * 40]])
    assert table.to_terminal(None).splitlines()[1] == "n" * 20 + "  " + "t" * 40
    assert table.to_terminal(40).splitlines()[1] == "n" * 20 + "  " + "t" * 17 + "…"
    assert table.to_terminal(25).splitlines()[1] == "n" * 14 + "…" + "  " + "t" * 7 + "…"
    time = Table("", [Column("end")], [[datetime(2026, 1, 2, 3, 4, 5)]])
    assert time.to_terminal(80).splitlines() == ["end", "2026-01-02 03:04"]


def test_html_escapes_every_cell_and_marks_verdicts():
    html = TABLE.to_html()
    assert "<b>" not in html and "<i>" not in html and "Caption &lt;b&gt;" in html
    assert '<td class="verdict good"><span aria-hidden="true">▼</span> helps</td>' in html
    assert '<td class="verdict">other</td>' in html and '<td class="number">–</td>' in html
    assert '<p class="note">A note &amp; more.</p>' in html
    cell = Table("", [Column("run", NAME), Column("detail")], [["x", "<u>"]]).to_html()
    assert '<td class="text">&lt;u&gt;</td>' in cell
    assert "nothing is there yet" in Table("", TABLE.columns, []).to_html()


def test_markdown_escapes_bars():
    assert TABLE.to_markdown().splitlines()[2:6] == [
        "| run | scored tokens | verdict |",
        "| --- | ---: | --- |",
        "| `a\\|b` | 1234.57 | **helps** |",
        "| `a\\|b` |  | **hurts** |",
    ]


def test_csv_holds_every_digit_and_empty_cells():
    table = Table.of_records(("a", "b"), [{"a": 0.1 + 0.2, "b": 'x,"'}, {"b": None, "c": 1}])
    assert table.to_csv() == 'a,b\n0.30000000000000004,"x,"""\n,\n'


@pytest.mark.parametrize(
    "found", [COMPARISON, Comparison("arm", "base", 2, 0, [0], problem="x: is damaged")]
)
def test_a_comparison_survives_json(found):
    assert Comparison.from_json(found.to_json()) == found


def test_the_table_of_comparisons_says_what_was_compared():
    text = comparison_table([COMPARISON, Comparison("arm", "other", 2, 1, [0], problem="gone")])
    text = text.to_text()
    assert "-1.980 %  [-2.955, -0.995] %  helps" in text and "other: gone" in text
    assert "At inner step 2. Paired bootstrap over 12 documents and 2 seeds." in text
    alone = Comparison("b", "base", 3, 0, [0], Difference(1, 1, 1, 12, 1))
    text = comparison_table([COMPARISON, alone]).to_text()
    assert "At inner step 2 of arm, inner step 3 of b." in text


def test_numbers_as_they_are_shown():
    assert (percent(-0.0004), percent(12345.0)) == ("-0.000 %", "+1.2e+04 %")
    assert interval(-1, 2) == "[-1.000, +2.000] %"
    assert (count(102_400), count(1_500_000)) == ("102k", "1.5M")
