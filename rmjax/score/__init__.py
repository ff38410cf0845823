"""`python -m rmjax.score`: rewards for rows of a file. `job` divides and resumes the work."""
