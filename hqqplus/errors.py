"""Errors that are the user's to mend (one clear sentence, no traceback, exit code 2), and one that is not one."""


class UserError(ValueError):
    """Bad input. The message says what is wrong, where, and what is allowed; the entry points print just that."""


class NotStreamable(Exception):
    """The checkpoint needs what only transformers' own loading does; the message says what, after "this model"."""
