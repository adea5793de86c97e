"""Build one reasoning model together without pooling data."""

__version__ = "0.1.0"
