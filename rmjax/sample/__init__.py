"""`python -m rmjax.sample`: responses of a language model to the prompts of a file."""
