"""The exceptions that mean something else than "this program is wrong"."""

from __future__ import annotations


class UserError(Exception):
    """A bad command line, recipe, data set or checkpoint.

    Its message stands alone: it names the key, path or row, the value found and what was expected.
    The command line prints it without a traceback and exits 2.
    """


class RunError(Exception):
    """A run that cannot go on: a part of it died, stayed silent or failed.

    Its message says which part and why. The command line prints it and exits 1.
    """


class Interrupted(Exception):
    """Someone asked a run to stop; what it has learned so far is saved."""
