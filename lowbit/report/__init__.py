"""The report: one HTML file without network that shows what was lost, where, and how the files came to be."""

from .html import render

__all__ = ["render"]
