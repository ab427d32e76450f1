"""Errors that are the user's to mend: one clear sentence, no traceback, exit code 2."""


class UserError(ValueError):
    """Bad input. The message says what is wrong, where, and what is allowed; the entry points print just that."""
