"""The HTML page of all documents: one look, and how each part of a section is laid out."""

STYLE = """
:root { --ink: #1f2933; --soft: #52606d; --line: #d5dae0; --pale: #f5f6f8; --bad: #a33a12; --good: #00695e;
        --chosen: #007a5e; --rejected: #75309a; }
* { box-sizing: border-box; }
body { font: 15px/1.55 system-ui, "Helvetica Neue", Arial, sans-serif; color: var(--ink); background: #fff;
       max-width: 64rem; margin: 3rem auto 5rem; padding: 0 2rem; -webkit-text-size-adjust: 100%; }
h1 { font-size: 1.75rem; line-height: 1.25; margin: 0 0 .3rem; }
h2 { font-size: 1.25rem; margin: 3.2rem 0 .6rem; padding-top: .9rem; border-top: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 1.8rem 0 .4rem; } h3 + .scroll table { margin-top: 0; }
p { max-width: 46rem; margin: .5rem 0; }
ul { max-width: 46rem; }
h1, h2, h3, p, td, th, li, summary { overflow-wrap: break-word; }
.eyebrow { color: var(--soft); font-size: .85rem; margin: 0 0 .2rem; }
nav { margin: 1.4rem 0 0; font-size: .9rem; color: var(--soft); }
nav a { color: inherit; margin-right: 1.1rem; text-underline-offset: .2em; }
.Bad { color: var(--bad); } .Good { color: var(--good); } td.Good, td.Bad { font-weight: 600; white-space: nowrap; }
.note { color: var(--soft); }
.lead p { border-left: 4px solid var(--soft); background: var(--pale); padding: .8rem 1.2rem; margin: 1.8rem 0 .6rem;
          font-size: 1.15rem; font-weight: 600; max-width: none; color: inherit; }
.lead .Good { border-color: var(--good); } .lead .Bad { border-color: var(--bad); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; margin: .6rem 0; font-variant-numeric: tabular-nums; }
th, td { text-align: left; vertical-align: top; padding: .3rem 1.4rem .3rem 0; border-bottom: 1px solid var(--line); }
th { font-weight: 600; } th:last-child, td:last-child { padding-right: 0; }
.n { text-align: right; white-space: nowrap; }
td .less { color: var(--soft); font-size: .9em; } td:not(.n) .less { display: block; }
.tiles { display: grid; grid-template-columns: repeat(auto-fill, minmax(8rem, 1fr)); gap: 1.4rem 1.6rem;
         margin: 1.4rem 0; }
.tiles div { border-top: 2px solid var(--ink); padding-top: .45rem; font-variant-numeric: tabular-nums; display: flex;
             flex-direction: column; }
.tiles .what { font-size: .85rem; line-height: 1.35; flex: 1; }
.tiles b { font-size: 1.75rem; line-height: 1.35; font-weight: 600; }
.tiles .less { font-size: .85rem; color: var(--soft); min-height: 1.55em; white-space: nowrap; }
.plots { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 25rem), 1fr)); gap: 1.6rem 2.6rem;
         margin: 1.2rem 0; align-items: start; }
svg { max-width: 100%; height: auto; display: block; } svg text { font-family: inherit; }
.pair { border-top: 1px solid var(--line); padding: .9rem 0 1.1rem; break-inside: avoid; }
.pair h4 { margin: 0 0 .5rem; font-size: .92rem; font-weight: 600; }
.pair h4 span { font-weight: 400; color: var(--soft); }
.texts { display: grid; grid-template-columns: 1fr 1fr; gap: .6rem 1.6rem; }
.texts > div { border-left: 3px solid var(--line); padding-left: .8rem; } .texts .prompt { grid-column: 1 / -1; }
.texts small { display: block; font-size: .8rem; font-weight: 600; color: var(--soft); }
.texts .preferred { border-color: var(--chosen); } .texts .rejected { border-color: var(--rejected); }
.preferred small { color: var(--chosen); } .rejected small { color: var(--rejected); }
.texts pre { font: inherit; white-space: pre-wrap; overflow-wrap: anywhere; margin: 0; max-height: 20rem;
             overflow-y: auto; }
.texts mark { background: #fdf0d5; color: inherit; padding: 0 .1em; }
summary { cursor: pointer; color: var(--soft); margin: .8rem 0; }
@media (max-width: 40rem) { body { margin: 1.5rem auto 3rem; padding: 0 1rem; } th, td { padding-right: .9rem; }
  td .less { display: block; } .aside { display: none; } .tiles { gap: 1.1rem 1.2rem; }
  .texts { grid-template-columns: 1fr; } }
@media print { body { margin: 0; max-width: none; padding: 0; font-size: 10pt; } h2, h3 { break-after: avoid; }
  svg, tr { break-inside: avoid; } .scroll { overflow: visible; } nav { display: none; }
  .texts pre { max-height: none; } .lead p { background: none; } }
"""
PAGE = (
    f"""<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{{{ title }}}}</title>
<style>{{% raw %}}{STYLE}{{% endraw %}}</style>
"""
    + """
{% macro table(of) %}
{% if of.large %}<div class="tiles">
{% for row in of.large %}{% set title, (value, interval) = of.rows[row][:2] %}
<div><span class="what">{{ title }}</span><b>{{ value }}</b><span class="less">{{ interval }}</span></div>
{% endfor %}</div>{% endif %}
{% if of.title %}<h3>{{ of.title }}</h3>{% endif %}
<div class="scroll"><table>
{% if of.head | select | list %}<tr>
{% for cell in of.head %}
<th{% if loop.index0 in of.numbers %} class="n"{% elif loop.index0 in of.quiet %} class="aside"{% endif %}>{{ cell }}
{% endfor %}{% endif %}
{% for row in of.rows %}
<tr>{% for cell in row %}
<td class="{{ "n " if loop.index0 in of.numbers }}{{ "note aside" if loop.index0 in of.quiet }}{{ cell | look }}">
{% if cell is string %}{{ cell }}{% else %}{{ cell[0] }}
{% if cell[1] %}<span class="less">{{ cell[1] }}</span>{% endif %}{% endif %}

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
<div class="preferred"><small>people preferred</small><pre>{{ runs(of.preferred) }}</pre></div>
<div class="rejected"><small>the model prefers</small><pre>{{ runs(of.rejected) }}</pre></div>
</div></div>
{% endmacro %}
{% macro show(part) %}
{% set kind = part | kind %}
{% if kind == "Table" %}{{ table(part) }}
{% elif kind == "Plot" %}
<div class="plots">{% for plot in part %}<div>{{ svg[plot.alt] | safe }}</div>{% endfor %}</div>
{% elif kind == "Pair" %}{% for x in part %}{{ pair(x) }}{% endfor %}
{% elif kind == "Items" %}<ul>{% for line in part.lines %}<li>{{ line }}</li>{% endfor %}</ul>
{% elif kind == "Folded" %}
<details><summary>{{ part.title }}</summary>{% for x in part.parts %}{{ show(x) }}{% endfor %}</details>
{% elif kind == "Code" %}<pre><code>{{ part.text }}</code></pre>
{% else %}<p class="{{ part | look }}">{{ part }}</p>
{% endif %}
{% endmacro %}
<p class="eyebrow">{{ eyebrow }}</p>
<h1>{{ title }}</h1>
<p class="note">{% for line in notes %}{{ line }}<br>{% endfor %}</p>
{% for section in sections if not section.title %}
<div class="lead">{% for part in section.parts %}{{ show(part) }}{% endfor %}</div>
{% endfor %}
<nav>{% for x in sections if x.title and x.level == 2 %}<a href="#{{ x.anchor }}">{{ x.title }}</a> {% endfor %}</nav>
{% for section in sections if section.title %}
{% if section.level == 2 %}<h2 id="{{ section.anchor }}">{{ section.title }}</h2>
{% else %}<h3>{{ section.title }}</h3>
{% endif %}
{% for part in section.parts %}{{ show(part) }}{% endfor %}
{% endfor %}
</html>
"""
)
