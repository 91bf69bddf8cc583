"""A disk that takes no larger file."""

import resource
from contextlib import contextmanager


@contextmanager
def no_file_over(size):
    """The kernel refuses what makes a file of this process larger, whichever library writes it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
