"""rnnprune: compress saved recurrent models."""

__version__ = "0.1.0"
