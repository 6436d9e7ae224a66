"""Measurements: one question a file, with its command and the story that it expects.

`python -m bench` answers all questions and writes `bench/results/`, `--quick` only sees that they run.
"""
