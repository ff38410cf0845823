"""`python -m rmjax.benchmark`: how fast a config trains on the hardware that is here. `side` measures one config."""
