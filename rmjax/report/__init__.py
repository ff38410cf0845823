"""What people look at: pages, plots and model cards.

`frame` is the HTML page and `plots` the panels that all share; `run` draws a run's report, `audit` a data audit, and
`card` writes the model card of an export.
"""
