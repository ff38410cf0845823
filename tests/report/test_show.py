"""One list of sections as text, Markdown and HTML: all of it is there, and text of others is no markup."""

import pytest

from rmjax.report import panels, show
from rmjax.report.drawing import FILL
from rmjax.report.section import Bad, Caption, Code, Folded, Good, Items, Markdown, Pair, Plot, Section, Table

WILD = "<b>a|b</b> [x](y) `c`"
NUMBERS = Table([["one", ("86.0%", "84 to 88"), "why"]], ["name", "value", ""], (1,), quiet=(2,), large=(0,))
PLOT = Plot("p 1", "Histogram", panels.histograms([("", FILL, {"edges": [0, 1, 2], "counts": [3, 1]})], "x", "y"),
            "a histogram", table=Table([["as numbers", "3"]]))  # fmt: skip
SECTIONS = [
    Section("", Good("Good enough"), WILD),
    Section("Numbers", Caption("seen only where plots are"), "", NUMBERS, [PLOT], Table([]), Items([WILD, "last"])),
    Section("More", Bad("wrong"), Code("python", "x = 1 < 2"), Folded("folded", [Table([[WILD]])]), level=3),
    Section("Pairs", [Pair("heading", "place", WILD, [(True, "same "), (False, "new")], [(True, "same")])]),
]


def test_text_has_all_but_what_only_a_page_has_room_for():
    lines = show.to_text(SECTIONS)
    assert lines[:3] == ["Good enough", WILD, ""] and "Numbers" in lines and "folded" in lines
    assert "  name  value" in lines and "  one   86.0%  84 to 88" in lines and "  as numbers  3" in lines
    assert "    x = 1 < 2" in lines and not any("seen only" in line or "why" in line for line in lines)


def test_wide_tables_are_wrapped_between_words_and_names_stay_whole():
    rows = [["a" * 70, "word " * 40, ("1", "2 to 3")], ["b", "x\ny", ("12", "")]]
    lines = show.to_text([Section("", Table(rows, numbers=(2,)))])
    assert lines[0].startswith("  " + "a" * 70) and max(map(len, lines)) <= show.WIDTH + 70
    assert sum("word" in line for line in lines) > 1 and any(
        line.startswith("  b ") and "x y" in line for line in lines
    )


def test_markdown_escapes_all_that_is_not_meant():
    text = show.to_markdown([*SECTIONS, Section(WILD, Markdown("`code`"), Table([[Markdown("`a|b`")]]))])
    escaped = "&lt;b>a|b&lt;/b> \\[x](y) \\`c\\`"
    assert f"**Good enough**\n\n{escaped}" in text and f"- {escaped}\n- last" in text and f"## {escaped}\n" in text
    cell = escaped.replace("|", "\\|")
    assert "| one | 86.0% (84 to 88) | why |" in text and f"| {cell} |" in text and "| as numbers | 3 |" in text
    assert "\n\n`code`\n\n" in text and "| `a\\|b` |" in text and "```python\nx = 1 < 2\n```" in text
    assert "### More\n\n**wrong**" in text and "<details><summary>folded</summary>\n\n|" in text and "<b>" not in text


@pytest.mark.parametrize("png", [True, False])
def test_a_page_escapes_all_and_draws_plots(png):
    page, files = show.to_html(WILD, SECTIONS, kind="Test", notes=[WILD], png=png)
    assert "<b>a|b" not in page and page.count("&lt;b&gt;a|b") >= 6
    assert page.count("<svg") == 1 and '<a href="#numbers">' in page and '<h2 id="numbers">' in page
    assert "<mark>new</mark>" in page and "1 &lt; 2" in page and "seen only where plots are" in page
    assert '<p class="Good">Good enough</p>' in page and '<span class="less">84 to 88</span>' in page
    assert list(files) == (["p_1.png"] if png else []) and all(x.startswith(b"\x89PNG") for x in files.values())


def test_what_is_empty_is_left_out():
    assert not Section("Nothing", "", Table([]), [], Items([]), Folded("x", [Table([])]))
