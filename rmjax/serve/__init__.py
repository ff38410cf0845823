"""`python -m rmjax.serve`: a model behind HTTP, in the shapes of vLLM."""
