"""The error that a user sees as one message, without a traceback."""

from typing import Any


class UserError(ValueError):
    """A user's mistake. Its message says where, what was given and wanted, and what to do."""


class SelfCheckError(UserError, RuntimeError):
    """Before the first step, numbers that must be equal are not: the files or the software err."""


class RefusedRowsError(UserError):
    """Rows that are no data to train on; `report` says what became of each (`dpo.data.audit`)."""

    def __init__(self, message: str, report: dict[str, Any]):
        super().__init__(message)
        self.report = report
