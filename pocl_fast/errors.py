"""The one exception that means "the input is wrong", as opposed to "the program is wrong"."""


class InputError(ValueError):
    """Something the user gave is wrong; the message says what, where, and what to do. The CLI prints it without a
    traceback."""
