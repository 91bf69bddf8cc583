"""Waits until something is so, and no longer."""

import time


def waited_for(look, seconds=90.0):
    """What `look` gives, as soon as it is something."""
    end = time.monotonic() + seconds
    while not (found := look()):
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.02)
    return found
