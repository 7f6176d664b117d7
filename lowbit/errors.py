"""Every error that lowbit raises on purpose: one readable paragraph that names the thing, the value, what was expected and what to do."""

from collections.abc import Iterator
from contextlib import contextmanager


class LowbitError(Exception):
    """Base of all errors with a message written for the user; the command line prints it without a traceback."""


class RecipeError(LowbitError):
    """A recipe, preset or option that does not exist, contradicts another, or cannot be applied to this model."""


class ShapeError(LowbitError):
    """A tensor's shape does not fit the scheme, the format or the model."""


class FormatError(LowbitError):
    """Values or bytes that a number format cannot hold: NaN, infinity, codes out of range, an unknown type."""


class CheckpointError(LowbitError):
    """A file or folder that is missing, damaged, unsafe, or of a kind that is not known."""


class ModelError(LowbitError):
    """A model that cannot be built, streamed or quantized, with the reason."""


class DataError(LowbitError):
    """Calibration or evaluation text that cannot be read or is too short."""


class ResourceError(LowbitError):
    """Not enough memory or disk for the work; raised before the work begins."""


class VerificationError(LowbitError):
    """A consumer that cannot be asked: its interpreter or its program does not run."""


class JobError(LowbitError):
    """An unfinished or different job is in the way of this one."""


def missing_extra(package: str, extra: str, *, purpose: str) -> LowbitError:
    """The error for an optional package that is absent, with the exact line that installs it."""
    return LowbitError(f'{purpose} needs the package {package}, which is not installed. Install it with: pip install "lowbit[{extra}]"')


@contextmanager
def foreign_errors(what: str) -> Iterator[None]:
    """Make one CheckpointError of whatever a library raises for a damaged file; panics of Rust code, which are no Exception, are among it."""
    try:
        yield
    except (LowbitError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        raise CheckpointError(f"{what} ({type(error).__name__}: {' '.join(str(error).split())}).") from error
