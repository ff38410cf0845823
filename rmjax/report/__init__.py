"""What people look at: the report of a run, the audit of data, the model card, and tables for the terminal.

`section` is what documents are made of and `show` renders it as text, Markdown or HTML. `run`, `audit`, `card` and
`evaluation` make sections from JSON-like values; `naming` says what metrics are called and how numbers are written.
`panels` are the kinds of plots, and `drawing` is how all of them look. `audit_command` is `python -m rmjax.data audit`.
"""
