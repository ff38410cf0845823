"""`python -m rmjax.serve`: a model behind HTTP, in the shapes of vLLM."""

REFUSE, TRUNCATE = (
    "refuse",
    "truncate_prompt",
)  # what is done with conversations that are too long, unless it is a reward
