"""`python -m rmjax.evaluate`: how good a model is.

`evaluating` and `asking` get a model's answers, `scored` holds them, `measures` with the modules of each
kind of metric turns them into numbers with intervals, `outcomes` does the same for what a training run keeps of its
batches, without intervals, `benchmarks` and `rules` are the public benchmarks, `gold`
compares with a gold model, and `gate` says whether a run is good enough. Notebooks use `gate` and `tables`.
"""
