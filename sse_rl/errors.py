"""The exceptions that mean something else than "this program is wrong"."""

from __future__ import annotations


class UserError(Exception):
    """A bad command line, recipe, data set or checkpoint.

    Its message stands alone: it names the key, path or row, the value found and what was expected.
    The command line prints it without a traceback and exits 2.
    """


class Interrupted(Exception):
    """Someone asked a run to stop; what it has learned so far is saved."""
