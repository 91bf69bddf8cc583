"""The one exception that a user is meant to read."""


class BadInput(Exception):
    """Something the user gave is wrong: the message says what, where and the cure, in one line.

    The command line prints the message alone and exits with code 2; nothing heavy has been loaded and nothing
    has been written by then.
    """
