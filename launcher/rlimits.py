"""What this process may take, setrlimit(2): room for a launch, or an error while nothing has been made yet."""

from __future__ import annotations

import resource

from .errors import UklaunchError

ADDRESS_SPACE_MIB = 512  # beside the guest's memory; QEMU wants more, and can say so itself
FILES = 128  # descriptors: a launch takes about fifty, and two for each disk


def check(memory_mib: int) -> None:
    """Raises UklaunchError. Python hangs when a thread gets no memory."""
    soft, _ = resource.getrlimit(resource.RLIMIT_AS)
    needed_mib = memory_mib + ADDRESS_SPACE_MIB
    if soft != resource.RLIM_INFINITY and soft < needed_mib << 20:
        raise UklaunchError(
            f"a launch needs {needed_mib} MiB of address space, and {soft >> 20} are allowed",
            "ulimit -v, or LimitAS= of its unit",
        )
    check_files()


def check_files() -> None:
    """Raises UklaunchError; raises the soft limit if that will do."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft >= FILES or soft == resource.RLIM_INFINITY:
        return
    if hard < FILES and hard != resource.RLIM_INFINITY:
        raise UklaunchError(
            f"a launch may need {FILES} open files, and {hard} are allowed",
            "ulimit -n, or LimitNOFILE= of its unit",
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (FILES, hard))
