"""How the embedded models were made: every stage from public data to the packaged weights.

In: Tiny-ImageNet, WordNet 3.0, a MiniLM folder and a folder of fonts. Out: `sd/` and `clip/`.
Run `python -m jobs.embedded_models --help`; it needs the extra `ray-synth[recipe]` (OpenCV).
"""
