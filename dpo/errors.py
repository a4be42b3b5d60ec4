"""What a user is told without a traceback."""


class UserError(ValueError):
    """A mistake of the user's. Its message says where, what it got and wanted, and what to do."""
