"""The host: `router load`, `status`, `unload`, `gc`, `doctor`, `build-default`, `demo`."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from ..errors import ExitCode, UklaunchError, UsageError
from .needs import require_real_root, require_root
from .output import print_json
from .run import find_image

if TYPE_CHECKING:
    pass


def cmd_router_load(args: argparse.Namespace) -> int:
    from .. import pod

    require_real_root()
    if args.user is not None:
        import router

        with pod.router_errors():
            router.load_for(uid_of(args.user), args.pods)
        return ExitCode.OK
    with pod.open_router():
        return ExitCode.OK


def uid_of(user: str) -> int:
    """Of a name, or a number. Raises UsageError if it is root's or nobody's that is known."""
    import pwd

    try:
        uid = int(user) if user.isdecimal() else pwd.getpwnam(user).pw_uid
    except KeyError:
        raise UsageError(f"there is no user {user!r}") from None
    if uid == 0:
        raise UsageError("root needs no router of its own", "leave out --user")
    return uid


def cmd_router_status(args: argparse.Namespace) -> int:
    from dataclasses import asdict

    import router

    require_real_root()
    if args.user is not None:
        router.select(uid_of(args.user))
    versions = router.loaded()
    if args.json:
        print_json([asdict(version) for version in versions])
    else:
        for version in versions:
            ours = "" if version.ours else ", of another version of uklaunch"
            print(f"{version.directory}: {version.pods} pods{ours}")
    return ExitCode.OK if any(version.ours for version in versions) else ExitCode.FAILURE


def cmd_router_unload(args: argparse.Namespace) -> int:
    import router

    require_real_root()
    if args.user is not None:
        router.unload_for(uid_of(args.user))
    else:
        router.unload_all()
    if left := router.loaded():
        if pods := sum(version.pods for version in left):
            raise UklaunchError(f"{pods} pods need the router", "see: uklaunch pod ls")
        raise UklaunchError("a command looks into the router", "end what follows flows or drops, then try again")
    return ExitCode.OK


def cmd_gc(args: argparse.Namespace) -> int:
    from dataclasses import asdict

    from .. import control

    require_root()
    done = []
    try:
        for item in control.collect(kill=args.kill):
            done.append(asdict(item))
            if not args.json:
                print(f"{item.what} {item.name}: {item.action}", flush=True)
    finally:
        if args.json:
            print_json(done)
    return ExitCode.OK


def cmd_doctor(args: argparse.Namespace) -> int:
    from dataclasses import asdict

    from ..doctor import examine

    findings = examine()
    if args.json:
        print_json([asdict(finding) for finding in findings])
    else:
        for finding in findings:
            mark = "ok  " if finding.ok else ("FAIL" if finding.required else "note")
            remedy = f"; remedy: {finding.remedy}" if finding.remedy and not finding.ok else ""
            print(f"{mark}  {finding.need}: {finding.found}{remedy}")
    return ExitCode.OK if all(finding.ok or not finding.required for finding in findings) else ExitCode.FAILURE


def cmd_build_default(args: argparse.Namespace) -> int:
    from ..bundle import build_default

    build_default(args.directory)
    return ExitCode.OK


def cmd_demo(args: argparse.Namespace) -> int:
    from ..demo import demo

    require_real_root()
    return ExitCode.OK if demo(find_image("default"), print) else ExitCode.FAILURE
