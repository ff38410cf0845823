"""Scoring files of any size: what rows mean (rows.py), what is made of scored ones (making.py), the job (job.py)."""
