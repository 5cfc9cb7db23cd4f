"""The command `ray-synth`: one file per group of verbs, and what a user is told about an error.

In: what a user typed. Out: lines for people, and an exit code.
"""
