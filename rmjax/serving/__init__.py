"""Serving rewards over HTTP: dynamic batching (batching.py) and the application (app.py)."""
