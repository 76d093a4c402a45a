"""Tramontane: the programs of its stages, and what they share."""

__version__ = "0.1.0"
