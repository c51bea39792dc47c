"""Addresses with passwords: configs, logs and saved files hold the form without them.

A config keeps only what `hide` gives; `reveal` finds the address again in the process that read
it, so that nothing that is printed or saved on the way can leak a password.
"""

from __future__ import annotations

import re

from verl_sft.errors import UsageError

HIDDEN = "***"
_USER = re.compile(r"(?<=://)[^\s'\"]*@")
_known: dict[str, str] = {}


def hide(uri: str) -> str:
    """The address without user and password; `reveal` knows it from now on."""
    shown = hidden(uri)
    if HIDDEN not in uri:
        _known[shown] = uri
    return shown


def hidden(text: str) -> str:
    """Any text with the users and passwords of its addresses struck out."""
    return _USER.sub(f"{HIDDEN}@", text)


def reveal(shown: str) -> str:
    """The address that `hide` was given.

    Raises:
        UsageError: it was read back from a saved config, which holds no password.
    """
    if shown not in _known and HIDDEN in shown:
        raise UsageError(
            "the address has lost its password",
            where=shown,
            why="Saved configs hold none",
            fix="Give data.mongo.uri again, or '${oc.env:NAME}' to take it from the environment",
        )
    return _known.get(shown, shown)
