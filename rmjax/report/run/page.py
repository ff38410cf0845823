"""The HTML of a report: what a section may have, and how it is laid out."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from rmjax.report import frame as pages
from rmjax.report.run.curves import Plot

PAGE = """{% extends "frame" %}
{% block style %}
.eyebrow { color: var(--soft); font-size: .85rem; margin: 0 0 .2rem; }
nav { margin: 1.4rem 0 0; font-size: .9rem; color: var(--soft); }
nav a { color: inherit; margin-right: 1.1rem; white-space: nowrap; text-underline-offset: .2em; }
.verdict { border-left: 4px solid var(--soft); background: var(--pale); padding: .8rem 1.2rem; margin: 1.8rem 0 .6rem; }
.verdict p { font-size: 1.15rem; font-weight: 600; margin: 0; } .verdict .note { font-size: 1rem; font-weight: 400; }
.verdict.good { border-color: var(--good); } .verdict.bad { border-color: var(--bad); }
.checks { list-style: none; padding: 0; max-width: none; margin: 0; }
.checks li { display: grid; grid-template-columns: 7rem 11rem 1fr; gap: 0 1.2rem; padding: .5rem 0;
             border-bottom: 1px solid var(--line); }
.checks b { font-weight: 600; white-space: nowrap; }
.checks .advice { display: block; color: var(--ink); margin-top: .2rem; }
.tiles { display: grid; grid-template-columns: repeat(auto-fill, minmax(8rem, 1fr)); gap: 1.4rem 1.6rem;
         margin: 1.4rem 0; }
.tiles div { border-top: 2px solid var(--ink); padding-top: .45rem; font-variant-numeric: tabular-nums; display: flex;
             flex-direction: column; }
.tiles .what { font-size: .85rem; line-height: 1.35; flex: 1; }
.tiles b { font-size: 1.75rem; line-height: 1.35; font-weight: 600; }
.tiles .ends { font-size: .85rem; color: var(--soft); min-height: 1.55em; white-space: nowrap; }
.plots { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 25rem), 1fr)); gap: 1.6rem 2.6rem;
         margin: 1.2rem 0; align-items: start; }
.pair { border-top: 1px solid var(--line); padding: .9rem 0 1.1rem; break-inside: avoid; }
.pair h4 { margin: 0 0 .5rem; font-size: .92rem; font-weight: 600; }
.pair h4 span { font-weight: 400; color: var(--soft); }
.texts { display: grid; grid-template-columns: 1fr 1fr; gap: .6rem 1.6rem; }
.texts > div { border-left: 3px solid var(--line); padding-left: .8rem; } .texts .prompt { grid-column: 1 / -1; }
.texts .preferred { border-color: #007a5e; } .texts .rejected { border-color: #75309a; }
.texts small { display: block; font-size: .8rem; font-weight: 600; color: var(--soft); }
.preferred small { color: #007a5e; } .rejected small { color: #75309a; }
.texts pre { font: inherit; white-space: pre-wrap; overflow-wrap: anywhere; margin: 0; max-height: 20rem;
             overflow-y: auto; }
.texts mark { background: #fdf0d5; color: inherit; padding: 0 .1em; }
summary { cursor: pointer; color: var(--soft); margin: .8rem 0; } h3 + .scroll table { margin-top: 0; }
td, th { overflow-wrap: break-word; } td .ends { color: var(--soft); font-size: .9em; }
@media (max-width: 40rem) { td .ends { display: block; } .aside { display: none; } .tiles { gap: 1.1rem 1.2rem; }
  .texts, .checks li { grid-template-columns: 1fr; } }
@media print { nav { display: none; } .texts pre { max-height: none; } .verdict { background: none; } }
{% endblock %}
{% macro table(of) %}
{% if of.title %}<h3>{{ of.title }}</h3>{% endif %}
<div class="scroll"><table>
{% if of.head %}<tr>
{% for cell in of.head %}
<th{% if loop.index0 in of.numbers %} class="n"{% elif loop.index0 in of.quiet %} class="aside"{% endif %}>{{ cell }}
{% endfor %}
{% endif %}
{% for row in of.rows %}
<tr>{% for cell in row %}
<td{% if loop.index0 in of.numbers %} class="n"{% elif loop.index0 in of.quiet %} class="note aside"{% endif %}>
{% if cell is string %}{{ cell }}{% else %}{{ cell[0] }} <span class="ends">{{ cell[1] }}</span>{% endif %}
{% endfor %}
{% endfor %}
</table></div>
{% endmacro %}
{% macro runs(words) %}
{% for same, text in words %}{% if same %}{{ text }}{% else %}<mark>{{ text }}</mark>{% endif %}{% endfor %}
{% endmacro %}
{% macro pair(of) %}
<div class="pair"><h4>{{ of.heading }} <span>{{ of.place }}</span></h4>
<div class="texts">
{% if of.prompt %}<div class="prompt"><small>prompt</small><pre>{{ of.prompt }}</pre></div>{% endif %}
{% for side in ("preferred", "rejected") %}
<div class="{{ side }}"><small>{{ {"preferred": "people preferred", "rejected": "the model prefers"}[side] }}</small>
<pre>{{ runs(of[side]) }}</pre></div>
{% endfor %}
</div></div>
{% endmacro %}
{% block body %}
<p class="eyebrow">Report of a training run</p>
<h1>{{ title }}</h1>
<p class="note">{{ subtitle }}</p>
{% if verdict %}
<div class="verdict {{ verdict.look }}"><p>{{ verdict.said }}</p></div>
<ul class="checks">
{% for check in verdict.checks %}
<li><b class="{{ check.look }}">{{ check.status }}</b><span>{{ check.name }}</span>
<span class="note">{{ check.reason }}
{% if check.advice %}<span class="advice">What to do: {{ check.advice }}.</span>{% endif %}</span>
{% endfor %}
</ul>
{% endif %}
<nav>{% for section in sections %}<a href="#{{ section.anchor }}">{{ section.title }}</a> {% endfor %}</nav>
{% for section in sections %}
<h2 id="{{ section.anchor }}">{{ section.title }}</h2>
{% for line in section.words %}<p>{{ line }}</p>
{% endfor %}
{% for line in section.problems %}<p class="warn">{{ line }}</p>
{% endfor %}
{% if section.tiles %}<div class="tiles">
{% for what, value, ends in section.tiles %}
<div><span class="what">{{ what }}</span><b>{{ value }}</b><span class="ends">{{ ends }}</span></div>
{% endfor %}</div>{% endif %}
{% if section.plots %}<div class="plots">
{% for plot in section.plots %}<div>{{ svg[plot.name] | safe }}</div>
{% endfor %}</div>{% endif %}
{% for of in section.tables %}{{ table(of) }}{% endfor %}
{% for of in section.pairs[:shown] %}{{ pair(of) }}{% endfor %}
{% if section.pairs | length > shown %}
<details><summary>{{ section.pairs | length - shown }} more</summary>
{% for of in section.pairs[shown:] %}{{ pair(of) }}{% endfor %}</details>{% endif %}
{% for of in section.folded %}<details><summary>{{ of.title }}</summary>{{ table({"title": "", "head": of.head,
"rows": of.rows, "numbers": of.numbers, "quiet": of.quiet}) }}</details>{% endfor %}
{% endfor %}
{% endblock %}
"""
SHOWN = 5  # pairs that are not folded

Cell = str | tuple[str, str]


@dataclasses.dataclass(frozen=True)
class Table:
    """Rows of text.

    Attributes:
        head: the names of the columns; none shows none.
        rows: of cells; of a pair of texts the second is smaller and grey, as an interval after its value.
        numbers: columns that stand right-aligned.
        title: above it.
        quiet: columns in grey, which a phone has no room for.
    """

    head: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    numbers: Sequence[int] = ()
    title: str = ""
    quiet: Sequence[int] = ()


@dataclasses.dataclass
class Section:
    """A part of the page with a heading. What is empty is left out.

    Attributes:
        title: its heading.
        words: sentences.
        problems: sentences that warn.
        tiles: (what, number, interval), shown large.
        plots: in reading order.
        tables: after the plots.
        pairs: of responses, see `report_texts.pair`; the first few are open.
        folded: tables that are shown on request.
    """

    title: str
    words: list[str] = dataclasses.field(default_factory=list)
    problems: list[str] = dataclasses.field(default_factory=list)
    tiles: list[tuple[str, str, str]] = dataclasses.field(default_factory=list)
    plots: list[Plot] = dataclasses.field(default_factory=list)
    tables: list[Table] = dataclasses.field(default_factory=list)
    pairs: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    folded: list[Table] = dataclasses.field(default_factory=list)

    @property
    def anchor(self) -> str:
        """What links within the page call it."""
        return "-".join("".join(c if c.isalnum() else " " for c in self.title.lower()).split())

    def __bool__(self) -> bool:
        return any((self.words, self.problems, self.tiles, self.plots, self.tables, self.pairs, self.folded))


def page(
    title: str,
    subtitle: str,
    verdict: Mapping[str, Any] | None,
    sections: Sequence[Section],
    svg: Mapping[str, str],
) -> str:
    """Renders the page.

    Args:
        title: what ran.
        subtitle: one line about it.
        verdict: {"said", "look", "checks": [{"status", "look", "name", "reason", "advice"}]}, or None.
        sections: in reading order.
        svg: of each plot of the sections, by its name.

    Returns:
        HTML with nothing that is loaded from elsewhere.
    """
    values = {"subtitle": subtitle, "verdict": verdict, "sections": sections, "svg": svg, "shown": SHOWN}
    return pages.render(PAGE, title, values)
