"""The one exception that means "your input is wrong", as opposed to "this program is wrong"."""

from __future__ import annotations


class UserError(Exception):
    """A bad command line, recipe, data set or checkpoint.

    Its message stands alone: it names the key, path or row, the value found and what was expected.
    The command line prints it without a traceback and exits 2.
    """
