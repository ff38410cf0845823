"""The frame of all HTML pages: one look, and nothing that is loaded from elsewhere."""

from collections.abc import Mapping
from typing import Any

import jinja2
import jinja2.sandbox

FRAME = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title>
<style>
:root { --ink: #1f2933; --soft: #52606d; --line: #d5dae0; --pale: #f5f6f8; --bad: #a33a12; --good: #00695e; }
* { box-sizing: border-box; }
body { font: 15px/1.55 system-ui, "Helvetica Neue", Arial, sans-serif; color: var(--ink); background: #fff;
       max-width: 64rem; margin: 3rem auto 5rem; padding: 0 2rem; -webkit-text-size-adjust: 100%; }
h1 { font-size: 1.75rem; line-height: 1.25; margin: 0 0 .3rem; }
h2 { font-size: 1.25rem; margin: 3.2rem 0 .6rem; padding-top: .9rem; border-top: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 1.8rem 0 .4rem; }
p { max-width: 46rem; margin: .5rem 0; }
ul, ol { max-width: 46rem; }
h1, h2, h3, p, td, th, li, summary { overflow-wrap: anywhere; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; margin: .6rem 0; font-variant-numeric: tabular-nums; }
th, td { text-align: left; vertical-align: top; padding: .3rem 1.4rem .3rem 0; border-bottom: 1px solid var(--line); }
th { font-weight: 600; } th:last-child, td:last-child { padding-right: 0; }
.n { text-align: right; white-space: nowrap; } td.f { min-width: 11rem; }
.warn, .bad { color: var(--bad); } .good { color: var(--good); } .note { color: var(--soft); }
svg { max-width: 100%; height: auto; display: block; } svg text { font-family: inherit; }
@media (max-width: 40rem) { body { margin: 1.5rem auto 3rem; padding: 0 1rem; } th, td { padding-right: .9rem; } }
@media print { body { margin: 0; max-width: none; padding: 0; font-size: 10pt; } h2, h3 { break-after: avoid; }
               svg, tr { break-inside: avoid; } .scroll { overflow: visible; } }
{% block style %}{% endblock %}
</style>
{% block body %}{% endblock %}
</html>
"""


def render(body: str, title: str, values: Mapping[str, Any]) -> str:
    """Renders a page.

    Args:
        body: a Jinja2 template of our own, {% extends "frame" %} with the blocks `body` and perhaps `style`. It has the
            filters `number` (1234 is "1,234") and `share` (0.123 is "12.3%"). What it is given is escaped, but for SVG
            that it marks as safe.
        title: of the page.
        values: that the template shows.

    Returns:
        HTML with nothing that is loaded from elsewhere.
    """
    environment = jinja2.sandbox.SandboxedEnvironment(
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        loader=jinja2.DictLoader({"frame": FRAME}),
    )
    environment.filters["number"] = "{:,}".format
    environment.filters["share"] = "{:.1%}".format
    return environment.from_string(body).render({**values, "title": title})
