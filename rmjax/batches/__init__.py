"""From records to batches.

`tasks` says what an objective takes from a record, `chat` renders and tokenizes it into a tree (`trees`),
`token_cache` keeps trees on disk as `groups`, `select` and `augment` choose among them, `packing` plans which groups
share a row, and `loader` makes the batches. `prepare` does this for a config.
"""
