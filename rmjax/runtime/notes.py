"""What a command tells of its inputs while it goes on."""

import functools

from absl import logging


@functools.cache
def tell(line: str) -> None:
    """Logs a line as a warning, once: a folder is listed and a model is opened several times in a run."""
    logging.warning("%s", line)
