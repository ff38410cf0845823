"""`python -m rmjax.export`: Hugging Face directories with a score contract.

`write` writes one from parameters, `from_run` from any checkpoint of a run, and `verify` replays one.
"""
