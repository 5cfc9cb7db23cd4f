"""One run from config to report: its directory, its stages in the paper's order, its results.

In: a config. Out: a run directory, and metrics.json.
"""
