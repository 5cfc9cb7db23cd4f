"""ray-synth: better image classifiers from synthetic images, at cluster scale."""

__version__ = "0.1.0"
