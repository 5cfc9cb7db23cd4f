"""Where a run is kept: folders on any file system, whose files are whole; no secret in any of them.

In: a path or URI. Out: bytes, JSON, YAML and tables in it.
"""
