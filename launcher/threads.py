"""A thread that ends with its work: for what is a thread's own in Linux and cannot be taken back."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def in_a_new_thread(function: Callable[[], T], name: str) -> T:
    """What the function returns or raises. Namespaces, root and directory that it takes on end with its thread;
    what it opens or starts there stays."""
    result: list[T] = []
    failure: list[BaseException] = []

    def body() -> None:
        try:
            result.append(function())
        except BaseException as exc:
            failure.append(exc)

    thread = threading.Thread(target=body, name=name)
    thread.start()
    thread.join()
    if failure:
        raise failure[0]
    return result[0]
