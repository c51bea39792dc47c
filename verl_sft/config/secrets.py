"""Addresses with passwords: configs, logs and saved files hold the form without them.

A config keeps only what `hide` gives; `reveal` finds the address again in the process that read
it, so that nothing that is printed or saved on the way can leak a password.
"""

from __future__ import annotations

import re
from typing import Any

from verl_sft.errors import UsageError

HIDDEN = "***"
DATABASES = ("mongodb://", "mongodb+srv://")
# An address of a database has no @ but that behind the user; a path may have some. A colon that
# begins no port begins a password, which may hold / where nobody wrote it as %2F. What stands
# before the @ in an address of Azure is a container.
_USER = re.compile(
    r"""(mongodb(?:\+srv)?://)[^\s'"]*@"""
    r"""|(?<!abfs)(?<!abfss)(://)(?:[^/\s'"@:]*:(?!:|\d+/)[^\s'"]*|[^/\s'"]*)@"""
)
_known: dict[str, str] = {}


def hide(uri: str) -> str:
    """The address without user and password; `reveal` knows it from now on."""
    shown = hidden(uri)
    if shown != uri:
        _known[shown] = uri
    return shown


def hide_database(key: str, uri: str) -> str:
    """As `hide`, for a key that takes nothing but the address of a database.

    Raises:
        UsageError: it is none; what may be a password in it is not shown.
    """
    if not uri.startswith(DATABASES):
        _, sign, host = uri.rpartition("@")
        raise UsageError(
            "the address is not one of MongoDB",
            where=f"{key}={HIDDEN if sign else ''}{sign}{host}",
            fix="Write mongodb://USER:PASSWORD@HOST:27017/DATABASE",
        )
    return hide(uri)


def hide_all(value: Any) -> Any:
    """A value of any shape with `hide` applied to each address in it; filters stay as they are."""
    if isinstance(value, str):
        return hide(value)
    if isinstance(value, dict):
        kept = {"filter"} if "path" in value else {}
        return {k: item if k in kept else hide_all(item) for k, item in value.items()}
    return [hide_all(item) for item in value] if isinstance(value, list | tuple) else value


def hidden(text: str) -> str:
    """Any text with the users and passwords of its addresses struck out."""
    return _USER.sub(lambda found: f"{found[1] or found[2]}{HIDDEN}@", text)


def check_address(uri: str) -> None:
    """Raise where a password is not written as an address needs it: errors could show its parts.

    Raises:
        UsageError: without the password.
    """
    front, _, options = uri.partition("://")[2].partition("?")
    user = front.rpartition("@")[0]
    if any(c in user for c in "/@[]#") or user.count(":") > 1 or ("@" in options and not user):
        raise UsageError(
            "the address cannot be read",
            where=hidden(uri),
            why="User or password hold characters that mean something in an address",
            fix="Write them as %xx: @ as %40, / as %2F, : as %3A, ? as %3F, # as %23",
        )


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
            fix="Give the address again, or '${oc.env:NAME}' to take it from the environment",
        )
    return _known.get(shown, shown)
