"""Mistakes of the user, as opposed to ours."""


class UserError(ValueError):
    """Bad input: one sentence with what is wrong, its value and the remedy; shown without traceback, exit code 2."""
