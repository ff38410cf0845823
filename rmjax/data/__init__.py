"""From files to batches: sources, formats, chat templates, trees, plan, loader."""

from rmjax.data.sources import register

__all__ = ["register"]
