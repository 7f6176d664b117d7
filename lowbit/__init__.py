"""lowbit makes large language models small and says exactly what was lost."""

__version__ = "0.1.0"
