"""The audit as one HTML page that needs nothing else: values of `measure.py`, plots as inline SVG."""

from collections.abc import Iterator, Mapping
from typing import Any

import jinja2

from rmjax.data import audit_plots, audit_text

PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Audit of {{ title }}</title>
<style>
body { font: 15px/1.5 system-ui, "Helvetica Neue", Arial, sans-serif; color: #1f2933; background: #fff;
       max-width: 62rem; margin: 2rem auto; padding: 0 1.5rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.2rem; margin-top: 2.5rem; } h3 { font-size: 1rem; margin: 1.8rem 0 .4rem; }
table { border-collapse: collapse; margin: .6rem 0; font-variant-numeric: tabular-nums; }
th, td { text-align: left; vertical-align: top; padding: .25rem 1.2rem .25rem 0; border-bottom: 1px solid #d5dae0; }
th { font-weight: 600; } .n { text-align: right; } td, li { overflow-wrap: anywhere; } td.f { min-width: 11rem; }
.warn { color: #a33a12; } .note { color: #52606d; } svg { max-width: 100%; height: auto; display: block; }
svg text { font-family: inherit; }
</style>
{% macro number(x) %}{{ "{:,}".format(x) }}{% endmacro %}
{% macro share(x) %}{{ "{:.1%}".format(x) }}{% endmacro %}
{% macro pairs(examples) %}{% if examples %}
<ul>{% for first, second in examples %}<li>{{ first }} and {{ second }}</li>{% endfor %}</ul>{% endif %}{% endmacro %}
<h1>Audit of {{ title }}</h1>
<p class="note">{% for line in notes %}{{ line }}<br>{% endfor %}</p>
{% for problem in problems %}<p class="warn">{{ problem }}</p>
{% endfor %}
<h2>Rows</h2>
{% for name, reading in report.reading.items() %}
<h3>{{ name }}: {{ number(reading.rows) }} rows, {{ number(reading.unusable) }} unusable</h3>
<table><tr><th>source<th class="n">groups
{% for source, n in reading.sources.items() %}<tr><td>{{ source }}<td class="n">{{ number(n) }}
{% endfor %}</table>
{% if reading.reasons %}
<table><tr><th>reason<th class="n">rows<th class="n">kept<th>files<th>example
{% for reason, count in reading.reasons.items() %}
<tr><td><b>{{ reason }}</b>: {{ count.meaning }}
<td class="n">{{ number(count.rows) }}<td class="n">{{ number(count.kept) }}
<td class="f">{% for file, n in count.files.items() %}{{ number(n) }} in {{ file }}<br>{% endfor %}
<td>{{ count.example }}
{% endfor %}</table>{% endif %}
{% endfor %}
{% for name, set in report.sets.items() %}
<h2>{{ name | capitalize }}: {{ number(set.groups) }} groups, {{ number(set.prompts) }} prompts</h2>
<table><tr><th><th class="n">median<th class="n">90 %<th class="n">99 %<th class="n">most
{% for what, spread in (("tree", set.trees), ("longest conversation", set.conversations)) %}
<tr><td>{{ report.unit }} of the {{ what }}
{% for key in ("median", "p90", "p99", "most") %}<td class="n">{{ number(spread[key] | round | int) }}{% endfor %}
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
<tr><td>{{ attribute }}<td class="n">{{ number(x.given) }}<td class="n">{{ number(x.missing) }}
{% for key in ("mean", "sd", "min", "max") %}<td class="n">{{ "{:.3g}".format(x[key]) if x.given else "" }}{% endfor %}
{% set found = set.length.get("attributes", {}).get(attribute) %}
<td class="n">{{ "{:+.3f}".format(found.spearman) if found else "" }}
{% endfor %}</table>{% endif %}
<h3>Repeats</h3>
<p>{{ number(set.repeated.groups) }} groups repeat the conversations of one before them;
{{ number(set.contradicting.sets) }} sets of conversations have contradicting labels.</p>
{{ pairs(set.contradicting.examples or set.repeated.examples) }}
{% endfor %}
{% if report.shared %}<h2>Prompts that stand in {{ (report.sets | list)[0] }} and elsewhere</h2>
<table><tr><th>set<th class="n">prompts<th class="n">shared<th>examples
{% for name, shared in report.shared.items() %}
<tr><td>{{ name }}<td class="n">{{ number(shared.of) }}
<td class="n{{ " warn" if shared.prompts }}">{{ number(shared.prompts) }}
<td>{{ pairs(shared.examples) }}
{% endfor %}</table>{% endif %}
</html>
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
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    plots = {name: list(_plots(measured, report["unit"])) for name, measured in report["sets"].items()}
    shown = {"report": report, "plots": plots, "title": title, "notes": notes, "problems": problems}
    return environment.from_string(PAGE).render(shown)


def _plots(measured: Mapping[str, Any], unit: str) -> Iterator[tuple[str, str, str]]:
    """Yields heading, plot and words of each section."""
    plots = {
        "Lengths": audit_plots.lengths(measured, unit),
        "Fill and sharing": audit_plots.filling(measured, unit),
        "Labels": audit_plots.labels(measured),
        "Length against label": audit_plots.length_against_label(measured),
    }
    for heading, words in audit_text.sections(measured, unit).items():
        yield heading, plots[heading], f"{words[0].upper()}{words[1:]}."
