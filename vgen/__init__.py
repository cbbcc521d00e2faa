"""vgen: one command line for open video diffusion models."""

__version__ = "0.1.0"
