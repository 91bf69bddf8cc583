"""The exceptions whose message is meant for the user."""


class _OneLine(Exception):
    """Whatever its message quotes, it is one line: an end of line in it is shown as it is written, `\\n`."""

    def __str__(self) -> str:
        return r"\n".join(super().__str__().splitlines())


class BadInput(_OneLine):
    """Something the user gave is wrong: the message says what, where and the cure, in one line.

    The command line prints the message alone and exits with code 2; nothing heavy has been loaded and nothing
    has been written by then.
    """


class RunFailed(_OneLine):
    """A run's check on itself failed (no gradient, not finite, a ratio off 1, a checkpoint that scores differently).

    The message says what and why; the exit code is 1, and the newest checkpoint is as it was.
    """


class Diverged(RunFailed):
    """A RunFailed because what is trained is not finite any more: a guard may go back from it."""
