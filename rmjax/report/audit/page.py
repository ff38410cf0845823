"""The audit as one HTML page that needs nothing else: values of `measure.py`, plots as inline SVG."""

from collections.abc import Iterator, Mapping
from typing import Any

from rmjax.report import frame as pages
from rmjax.report.audit import panels, text

PAGE = """{% extends "frame" %}
{% macro pairs(examples) %}{% if examples %}
<ul>{% for first, second in examples %}<li>{{ first }} and {{ second }}</li>{% endfor %}</ul>{% endif %}{% endmacro %}
{% block body %}
<h1>{{ title }}</h1>
<p class="note">{% for line in notes %}{{ line }}<br>{% endfor %}</p>
{% for problem in problems %}<p class="warn">{{ problem }}</p>
{% endfor %}
<h2>Rows</h2>
{% for name, reading in report.reading.items() %}
<h3>{{ name }}: {{ reading.rows | number }} rows, {{ reading.unusable | number }} unusable</h3>
<table><tr><th>source<th class="n">groups
{% for source, n in reading.sources.items() %}<tr><td>{{ source }}<td class="n">{{ n | number }}
{% endfor %}</table>
{% if reading.reasons %}
<table><tr><th>reason<th class="n">rows<th class="n">kept<th>files<th>example
{% for reason, count in reading.reasons.items() %}
<tr><td><b>{{ reason }}</b>: {{ count.meaning }}
<td class="n">{{ count.rows | number }}<td class="n">{{ count.kept | number }}
<td class="f">{% for file, n in count.files.items() %}{{ n | number }} in {{ file }}<br>{% endfor %}
<td>{{ count.example }}
{% endfor %}</table>{% endif %}
{% endfor %}
{% for name, set in report.sets.items() %}
<h2>{{ name | capitalize }}: {{ set.groups | number }} groups, {{ set.prompts | number }} prompts</h2>
<table><tr><th><th class="n">median<th class="n">90 %<th class="n">99 %<th class="n">most
{% for what, spread in (("tree", set.trees), ("longest conversation", set.conversations)) %}
<tr><td>{{ report.unit }} of the {{ what }}
{% for key in ("median", "p90", "p99", "most") %}<td class="n">{{ spread[key] | round | int | number }}{% endfor %}
{% endfor %}</table>
{% for heading, svg, words in plots[name] %}
<h3>{{ heading }}</h3>
<p>{{ words }}</p>
{{ svg | safe }}
{% endfor %}
{% if set.labels.kind == "attributes" %}
<table><tr><th>attribute<th class="n">given<th class="n">missing<th class="n">mean<th class="n">sd<th class="n">min
<th class="n">max<th class="n">rank correlation with length
{% for attribute, x in set.labels.attributes.items() %}
<tr><td>{{ attribute }}<td class="n">{{ x.given | number }}<td class="n">{{ x.missing | number }}
{% for key in ("mean", "sd", "min", "max") %}<td class="n">{{ "{:.3g}".format(x[key]) if x.given else "" }}{% endfor %}
{% set found = set.length.get("attributes", {}).get(attribute) %}
<td class="n">{{ "{:+.3f}".format(found.spearman) if found else "" }}
{% endfor %}</table>{% endif %}
<h3>Repeats</h3>
<p>{{ set.repeated.groups | number }} groups repeat the conversations of one before them;
{{ set.contradicting.sets | number }} sets of conversations have contradicting labels.</p>
{{ pairs(set.contradicting.examples or set.repeated.examples) }}
{% endfor %}
{% if report.shared %}<h2>Prompts that stand in {{ (report.sets | list)[0] }} and elsewhere</h2>
<table><tr><th>set<th class="n">prompts<th class="n">shared<th>examples
{% for name, shared in report.shared.items() %}
<tr><td>{{ name }}<td class="n">{{ shared.of | number }}
<td class="n{{ " warn" if shared.prompts }}">{{ shared.prompts | number }}
<td>{{ pairs(shared.examples) }}
{% endfor %}</table>{% endif %}
{% endblock %}
"""


def page(report: Mapping[str, Any], title: str, *, notes: list[str], problems: list[str]) -> str:
    """Renders the page.

    Args:
        report: of `measure.report`.
        title: what was audited.
        notes: how it was read, line by line.
        problems: what has to be put right, one sentence each.

    Returns:
        HTML with nothing that is loaded from elsewhere.
    """
    plots = {name: list(_plots(measured, report["unit"])) for name, measured in report["sets"].items()}
    shown = {"report": report, "plots": plots, "notes": notes, "problems": problems}
    return pages.render(PAGE, f"Audit of {title}", shown)


def _plots(measured: Mapping[str, Any], unit: str) -> Iterator[tuple[str, str, str]]:
    """Yields heading, plot and words of each section."""
    plots = {
        "Lengths": panels.lengths(measured, unit),
        "Fill and sharing": panels.filling(measured, unit),
        "Labels": panels.labels(measured),
        "Length against label": panels.length_against_label(measured),
    }
    for heading, words in text.sections(measured, unit).items():
        yield heading, plots[heading], f"{words[0].upper()}{words[1:]}."
