"""From files to batches: sources, formats, chat templates, trees, plan, loader."""
