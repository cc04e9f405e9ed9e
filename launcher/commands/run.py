"""`run`: from its arguments to what is to be run."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import TYPE_CHECKING

from .. import capabilities, control, environment, foreground, rlimits, state
from ..arguments import DEFAULT_BUNDLE
from ..errors import ImageNotFound, UklaunchError, UsageError, first_error
from ..model import Family, Port, check_name, parse_memory_mib, parse_mtu
from ..timeline import mark
from .needs import require_root
from .output import note

if TYPE_CHECKING:
    from ..health import HealthCheck
    from ..publish import Publish

DEFAULT_MEMORY_MIB = 128


def find_image(argument: str) -> Path:
    path = Path(argument)
    if argument == "default" and not path.exists():
        if not DEFAULT_BUNDLE.exists():
            raise ImageNotFound("the default image has not been built", "build it: uklaunch build-default")
        return DEFAULT_BUNDLE
    return path


def default_name(image: Path, pod: str) -> str:
    """The image's own name, made usable, with a number behind it while a guest of that name runs."""
    base = re.sub(r"[^a-z0-9]+", "-", image.resolve().stem.lower()).strip("-")[:40].strip("-") or "guest"
    name, number = base, 1
    while (old := state.read_guest(pod, name)) is not None and state.alive(old):
        number += 1
        name = f"{base}-{number}"
    return name


def cmd_run(args: argparse.Namespace) -> int:
    """All that can be wrong with the arguments is found here, before anything is made."""
    from ..image import identify, split_digest
    from ..model import GuestSpec

    if args.config is not None:
        raise UsageError("write --config in full")  # abbreviated, it has not been read
    check_name("pod", args.pod)
    text, sha256 = split_digest(args.image)
    path = find_image(text)
    ports = tuple(Port.parse(text) for text in args.expose)
    args.publish = parse_publish(args)
    memory_mib = parse_memory_mib(args.memory) if args.memory else None
    mtu = parse_mtu(args.mtu) if args.mtu else None
    env = environment.collect(args.env_file, args.env)
    environment.hide(args.env)
    from ..limits import Limits, parse_cpus
    from ..restart import RestartPolicy

    vcpus = parse_cpus(args.cpus)[0] if args.cpus else None
    args.limits = Limits.parse(
        cpus=args.cpus, disk_rate=args.disk_rate, disk_iops=args.disk_iops, net_rate=args.net_rate
    )

    args.restart = RestartPolicy.parse(args.restart)
    args.health = parse_health(args) if args.health else None
    args.after = [check_name("guest", other) for other in args.after]
    rlimits.check_files()  # an image's are open from here on
    image = identify(path, Family(args.family) if args.family else None, sha256)
    environment.check(env := {**image.env, **env})
    environment.check_text("--cmdline", args.cmdline or "")
    if args.take_over and not args.name:
        raise UsageError("--take-over: of which guest?", "name it: --name")
    name = check_name("guest", args.name) if args.name else default_name(path, args.pod)
    require_root()
    if args.take_over and control.left_behind(args.pod, name):
        return supervise(foreground.takeover(args.pod, name), detach=args.detach)
    spec = GuestSpec(
        name=name,
        pod=args.pod,
        image=image,
        memory_mib=memory_mib or image.memory_mib or DEFAULT_MEMORY_MIB,
        cpus=vcpus or image.cpus or 1,
        env=env,
        cmdline=args.cmdline,
        ports=tuple(dict.fromkeys((*image.ports, *ports))),
        mtu=mtu,
        watchdog=args.watchdog,
    )
    mark("args")
    return supervise(foreground.launch(spec, args), detach=args.detach)


def supervise(job: foreground.Job, *, detach: bool) -> int:
    capabilities.drop_others()  # while there is one thread: they are each thread's own
    return foreground.run_detached(job, note) if detach else foreground.run_attached(job, note)


def cmd_supervise(args: argparse.Namespace) -> int:
    record = state.find_guest(args.guest)
    require_root()
    try:
        return supervise(foreground.takeover(record.pod, record.name, args.handed), detach=args.detach)
    except (UklaunchError, BaseExceptionGroup) as exc:
        if args.handed is not None:  # our stderr may lead nowhere
            error = first_error(exc) or exc
            with record.supervisor_log.open("a") as log:
                log.write(f"cannot go on as a new supervisor: {error}\n")
        raise


def parse_publish(args: argparse.Namespace) -> tuple[Publish, ...]:
    """What -p asks for; --uplink is checked on the way."""
    from .. import uplink
    from ..publish import Publish

    if args.uplink is not None:
        uplink.parse(args.uplink)
    return tuple(Publish.parse(text) for text in args.publish)


def parse_health(args: argparse.Namespace) -> HealthCheck:
    from ..health import HealthCheck

    return HealthCheck.parse(
        args.health, interval_s=args.health_interval, retries=args.health_retries, start_s=args.health_start
    )
