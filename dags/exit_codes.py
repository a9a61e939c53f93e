"""Exit codes of a step's process, as ``onetrans/errors.py`` gives them; DAGs import nothing of the library."""

from __future__ import annotations

EXIT_OK = 0
EXIT_BAD_DATA = 65
EXIT_NOT_READY = 75
EXIT_BAD_CONFIG = 78
NEVER_RETRIED = (EXIT_BAD_DATA, EXIT_BAD_CONFIG)
FINAL = (EXIT_OK, *NEVER_RETRIED)
"""Codes after which there is nothing to wait for."""
