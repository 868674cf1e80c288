"""Whose fault a failure is."""


class UserError(ValueError):
    """A mistake of the user's: one sentence that names the value, the limit and the mend.

    The command line answers it with that sentence and exit code 2. Every other exception is a bug
    of ours or a failure of the machine, and ends with exit code 1.
    """
