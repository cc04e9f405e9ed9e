"""The one error of this package. It is the launcher's job to print it."""

from __future__ import annotations


class RouterError(Exception):
    """`message` says what and why, in one line; `hint` what to do; `detail` is for who debugs (a verifier's log)."""

    def __init__(self, message: str, hint: str = "", detail: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.detail = detail
