"""The error that a user sees as one message, without a traceback."""


class UserError(ValueError):
    """A user's mistake. Its message says where, what was given and wanted, and what to do."""
