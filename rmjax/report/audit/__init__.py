"""The audit of data, as text (`text`) and as a page (`page`); `command` is `python -m rmjax.data audit`."""
