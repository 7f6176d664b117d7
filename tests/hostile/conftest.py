"""bounded: a test that is stopped when it takes long or much."""

import resource
import signal
from contextlib import contextmanager

import pytest

SECONDS, MEMORY_BYTES = 10, 300_000_000


class TooLong(BaseException):
    """Not an Exception, so that nothing between here and the test takes it for its own."""


def _stop(number, frame):
    raise TooLong(f"took more than {SECONDS} s")


@pytest.fixture(scope="session")
def bounded():
    """with bounded(): at most SECONDS, and MEMORY_BYTES more than before (of memory that is really the process's own: mapped files do not count)."""

    @contextmanager
    def guard():
        with open("/proc/self/status") as file:
            held = next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmData"))
        before, handler = resource.getrlimit(resource.RLIMIT_DATA), signal.signal(signal.SIGALRM, _stop)
        resource.setrlimit(resource.RLIMIT_DATA, (held + MEMORY_BYTES, before[1]))
        signal.alarm(SECONDS)
        try:
            yield
        finally:
            signal.alarm(0)
            signal.signal(signal.SIGALRM, handler)
            resource.setrlimit(resource.RLIMIT_DATA, before)

    return guard
