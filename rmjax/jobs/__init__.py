"""Jobs over the rows of files: surveyed whole before anything is made, cut into parts, resumed after a kill, joined.

`inputs` reads rows twice (to survey them, and to work on them) and finds what changed in between; `job` keeps the
parts. Commands (score, sample) say what is read of a row, and what is made of it.
"""
