"""How a run is watched: log lines, progress, a heartbeat, MLflow.

In: what stages and workers say. Out: lines, bars and files of the run, and an MLflow run.
"""
