"""The library's version, in the one place from which package and metadata take it."""

__version__ = "0.1.0"
