"""The command line: parse, call one library function, print. Heavy imports happen inside the commands, so --help answers at once."""

from .main import main

__all__ = ["main"]
