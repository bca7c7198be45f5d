"""The parts of the studies: of all of them `jobs.py`, of `conversion_study.py` the others."""
