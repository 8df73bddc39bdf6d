"""Every error this project raises on purpose, one class per cause.

A message reads `where: what was given, what is allowed. What to do.` so that it can be shown to a user as it is.
"""


class MhpoError(Exception):
    """Base of all errors raised on purpose."""


class BatchError(MhpoError, ValueError):
    """A token batch has the wrong shape, dtype or content."""


class ObjectiveError(MhpoError, ValueError):
    """An objective, hyperparameter or aggregation is unknown or out of range."""


class ConfigError(MhpoError, ValueError):
    """A training configuration has an unknown key or a value out of range."""


class DataError(MhpoError, ValueError):
    """A data set of prompts cannot be read or holds a malformed line."""


class StoreError(MhpoError, RuntimeError):
    """A run folder cannot be created, written or read."""


class AlarmError(MhpoError, RuntimeError):
    """A critical alarm was raised in a run that asked to be stopped by one."""


class ServerError(MhpoError, RuntimeError):
    """The dashboard cannot be served as asked, for instance because the port is taken."""
