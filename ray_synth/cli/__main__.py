"""`python -m ray_synth.cli VERB`: the command, by the environment's own Python."""

from ray_synth.cli.command import main

main()
