"""Tells when something may have changed in a pod's namespace, by events alone: netlink's of links, addresses, routes,
qdiscs and filters; inotify's of sysctls, which netlink announces for none of ours.

inotify hears of who writes through the same mount of /proc as ours: `ip netns exec`, nsenter, `podman --pid host`. A
container with a /proc of its own, where sysctls are writable to privileged ones only, is not heard.

Sources: rtnetlink(7), inotify(7), epoll(7).
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import socket
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from . import net

# RTNLGRP_* of include/uapi/linux/rtnetlink.h
_LINK, _TC, _IPV4_IFADDR, _IPV4_ROUTE, _IPV4_RULE, _IPV6_IFADDR, _IPV6_ROUTE, _IPV6_RULE = 1, 4, 5, 7, 8, 9, 11, 19
_GROUPS = sum(
    1 << (group - 1)
    for group in (_LINK, _TC, _IPV4_IFADDR, _IPV4_ROUTE, _IPV4_RULE, _IPV6_IFADDR, _IPV6_ROUTE, _IPV6_RULE)
)
_IN_MODIFY = 0x2
_IN_NONBLOCK = os.O_NONBLOCK
_IN_CLOEXEC = os.O_CLOEXEC


@dataclass(frozen=True, slots=True)
class Watch:
    """Readable (`fileno`) when there is something for `heard` to read."""

    netns: Path
    indexes: Collection[int]  # the links that matter: a guest that joins is no reason for all the others to look
    _netlink: socket.socket
    _inotify: int
    _epoll: select.epoll

    def fileno(self) -> int:
        return self._epoll.fileno()

    def heard(self) -> bool:
        """Take all that has been said since the last time; was any of it about the links and sysctls that matter?"""
        found = False
        with contextlib.suppress(BlockingIOError):
            while True:
                try:
                    found |= net.are_about(self._netlink.recv(1 << 16, socket.MSG_DONTWAIT), self.indexes)
                except BlockingIOError:
                    break
                except OSError:  # ENOBUFS: more was said than the socket holds
                    found = True
        with contextlib.suppress(BlockingIOError):
            while os.read(self._inotify, 4096):
                found = True
        return found

    def sysctls(self, names: Iterable[str]) -> None:
        """Hear of these too. Idempotent; to be said again when a link has been made anew, and its sysctls with it."""
        libc = ctypes.CDLL(None)

        def body() -> None:
            for name in names:  # one that does not exist is no loss
                libc.inotify_add_watch(self._inotify, f"/proc/sys/{name}".encode(), _IN_MODIFY)

        net.in_netns(self.netns, body)


@contextlib.contextmanager
def watching(netns: Path, indexes: Collection[int]) -> Iterator[Watch]:
    with contextlib.ExitStack() as stack:
        netlink = stack.enter_context(net.open_netlink(netns, _GROUPS))
        inotify = ctypes.CDLL(None).inotify_init1(_IN_NONBLOCK | _IN_CLOEXEC)
        stack.callback(os.close, inotify)
        epoll = stack.enter_context(select.epoll())
        for fd in (netlink.fileno(), inotify):
            epoll.register(fd, select.EPOLLIN)
        yield Watch(netns, indexes, netlink, inotify, epoll)
