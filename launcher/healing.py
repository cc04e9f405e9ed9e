"""Keeps a guest's place in its pod as it was made, for the guest's life: `lo`, the bridge, the guest's TAP, their
addresses, routes and sysctls, and the router on them; and the router on the uplink. Nothing else is touched.

    event ─► does anything differ? ─► the pod's lock ─► make it, as at first ─► does it still differ?

An event is a hint and no more: what is compared is what is. A link that was removed is made again under its old index,
by which the router's tables and its flows know it; so open connections go on. Every supervisor of a pod sees to its
bridge; the lock sees to it that one of them mends it and the others find it mended.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from ipaddress import IPv4Interface, IPv6Interface

import trio

import router

from . import net, pod, state
from .errors import UklaunchError
from .model import format_mac
from .watch import Watch, watching

RECHECK_S = 10.0  # of sysctls, of which events do not always tell: see watch.py
PAUSE_S = 0.02  # after each check, so that a burst of events is one
OFTEN, OFTEN_S = 10, 10.0  # so many mends in so many seconds: somebody is at it on purpose
PATIENCE_S = 10.0  # then, after each check

_LOOPBACK = (IPv4Interface("127.0.0.1/8"), IPv6Interface("::1/128"))


async def heal(member: pod.Membership, say: Callable[[str], None]) -> None:
    """Until cancelled. `say` is told, in a line each, what was mended, and once what cannot be."""
    with contextlib.ExitStack() as stack:
        upkeep = await trio.to_thread.run_sync(stack.enter_context, _opened(member))
        mends, often = deque[float](maxlen=OFTEN), False
        stuck, known = set[str](), set[str]()
        while True:
            before = stuck
            mended, stuck = await trio.to_thread.run_sync(upkeep.check)
            if not often:
                for what in mended:
                    say(f"mended: {what}")
            # What happens while it is being mended looks the same as what cannot be mended, but for a second look.
            for what in sorted(stuck & before - known):
                say(f"cannot mend: {what}")
            known = stuck & before
            if mended:
                mends.append(trio.current_time())
            was_often, often = often, len(mends) == OFTEN and trio.current_time() - mends[0] < OFTEN_S
            if often and not was_often:
                say(f"this is changed again and again: from now on it is mended every {PATIENCE_S:g} s, without a word")
            await trio.sleep(PATIENCE_S if often else PAUSE_S)
            if stuck <= before:
                await _reason(upkeep)


async def _reason(upkeep: _Upkeep) -> None:
    """Until there is reason to look again."""
    while True:
        with trio.move_on_after(RECHECK_S):
            while True:
                await trio.lowlevel.wait_readable(upkeep.watch.fileno())
                if upkeep.watch.heard():
                    return
        if await trio.to_thread.run_sync(upkeep.sysctls_differ):
            return


@contextlib.contextmanager
def _opened(member: pod.Membership) -> Iterator[_Upkeep]:
    netns, record, plan = member.netns, member.record, pod.plan_of(member.record)
    uplink = net.link_indexes(netns).get(record.uplink_link, 0)
    links = {net.LOOPBACK_IFINDEX, record.bridge, member.ifindex, uplink, *member.rate_indexes}
    with pod.open_router() as table, watching(netns, links) as watch:
        has_ipv6 = net.has_ipv6(netns, net.BRIDGE)
        versions = (4, 6) if has_ipv6 else (4,)

        def ipv6_on(name: str) -> dict[str, str]:
            return {f"net/ipv6/conf/{name}/disable_ipv6": "0"} if has_ipv6 else {}

        yield _Upkeep(
            member=member,
            table=table,
            watch=watch,
            loopback=net.Device(
                label="lo",
                name="lo",
                index=net.LOOPBACK_IFINDEX,
                hook="egress",
                addresses=tuple(address for address in _LOOPBACK if address.version in versions),
                sysctls={**ipv6_on("lo"), **net.LOOPBACK_SYSCTLS},
            ),
            bridge=net.Device(
                label=f"bridge {net.BRIDGE}",
                name=net.BRIDGE,
                index=record.bridge,
                alias=f"{state.TAG}:{record.name}",
                mac=format_mac(plan.mac),
                addresses=tuple(address for address in (plan.ipv4, plan.ipv6) if address.version in versions),
                sysctls={**ipv6_on(net.BRIDGE), **net.bridge_sysctls()},
            ),
            tap=net.Device(
                label=f"TAP {member.tap}",
                name=member.tap,
                index=member.ifindex,
                hook="ingress",
                alias=f"{state.TAG}:{record.name}/{member.guest}",
                mtu=member.mtu,
                rate_bits=member.limits.net_in_bits,
                master=record.bridge,
                sysctls=net.tap_sysctls(member.tap),
            ),
            uplink=net.Device(
                label=f"uplink {record.uplink_link}", name=record.uplink_link, index=uplink, hook="ingress", alone=True
            )
            if uplink
            else None,
            links=links,
        )


def _rate_links(member: pod.Membership) -> Iterator[net.Device]:
    """Both ends of the detour that limits what the guest sends."""
    if member.limits.net_out_bits is None:
        return
    names = member.rate_link, net.rate_peer(member.rate_link)
    rates, hooks = (member.limits.net_out_bits, None), ("", "ingress")
    for name, index, rate_bits, hook in zip(names, member.rate_indexes, rates, hooks, strict=True):
        yield net.Device(
            label=f"rate limit {name}",
            name=name,
            index=index,
            hook=hook,
            alias=f"{state.TAG}:{member.record.name}/{member.guest}",
            mtu=member.mtu,
            rate_bits=rate_bits,
            sysctls=net.tap_sysctls(name),
        )


@dataclass(slots=True, kw_only=True)
class _Upkeep:
    """What there is to be, and what makes it. Its methods block, and are called one after the other."""

    member: pod.Membership
    table: router.Router
    watch: Watch
    loopback: net.Device
    bridge: net.Device
    tap: net.Device
    uplink: net.Device | None
    links: set[int]  # whose events are heard
    offload: net.TapOffload = net.TapOffload(header=10, flags=0)  # drivers/net/tun.c, tun_set_iff
    broken: dict[str, None] = field(default_factory=dict)  # found so, in that order, and not yet seen mended

    def check(self) -> tuple[list[str], set[str]]:
        """Compare, and mend what differs. Returns what has been mended, and what could not be and why."""
        errors = list[str]()
        try:
            left = self.faults()
            if left:
                with state.pod_lock(self.member.record.name):
                    current = state.read_pod(self.member.record.name)
                    if current is None or current.id != self.member.record.id:
                        return [], set()  # the pod is being removed
                    found = self.faults()  # others may have mended it while we waited
                    self.broken.update(dict.fromkeys(fault for faults in found.values() for fault in faults))
                    errors = self.mend(found)
                    left = self.faults()
            self.take_note()
        except UklaunchError as exc:  # a link went while we looked at it; `broken` is for the next look
            return [], {exc.message}
        after = {fault for faults in left.values() for fault in faults}
        mended = [fault for fault in self.broken if fault not in after]
        why = f" ({'; '.join(errors)})" if errors else ""
        stuck = {fault + why for fault in after if fault in self.broken}
        self.broken = {fault: None for fault in self.broken if fault in after}
        return mended, stuck

    def faults(self) -> dict[str, list[str]]:
        """By the name of the device."""
        devices = [device for device, _ in self.devices()]
        return net.faults(self.member.netns, devices, self.member.record.id)

    def devices(self) -> Iterator[tuple[net.Device, Callable[[], None]]]:
        """Each with what puts it right, in the order in which they are to be mended."""
        yield self.loopback, self.make_loopback
        yield self.bridge, self.make_bridge
        for device in _rate_links(self.member):
            yield device, self.make_rate_link
        yield self.tap, self.make_tap
        if self.uplink is not None:
            yield self.uplink, self.make_uplink

    def mend(self, found: dict[str, list[str]]) -> list[str]:
        """Returns what went wrong."""
        errors = []
        for device, make in self.devices():
            if device.name in found:
                try:
                    net.write_sysctls(self.member.netns, device.sysctls)
                    make()
                except UklaunchError as exc:
                    errors.append(exc.message)
        return errors

    def make_loopback(self) -> None:
        netns, record = self.member.netns, self.member.record
        net.set_up_loopback(netns, self.loopback.addresses)
        if net.attach_loopback(netns, self.table.program_fd, record.id):
            state.write_pod(replace(state.get_pod(record.name), own_clsact=True))

    def make_bridge(self) -> None:
        record = self.member.record
        net.make_bridge(self.member.netns, pod.plan_of(record), record.name, record.bridge)

    def make_tap(self) -> None:
        member = self.member
        if member.ifindex not in net.link_indexes(member.netns).values():
            net.restore_tap(member.netns, member.tap_fd, member.tap, member.ifindex, self.offload)
        member.attach(self.table)

    def make_rate_link(self) -> None:
        self.member.make_rate_link(self.table)
        self.links.update(self.member.rate_indexes)  # the second end's is the kernel's choice

    def make_uplink(self) -> None:
        record = self.member.record
        if self.uplink is not None:
            net.attach_uplink(self.member.netns, self.uplink.index, self.table.program_fd, record.id)

    def sysctls_differ(self) -> bool:
        try:
            found = net.read_sysctls(self.member.netns, self.sysctls)
        except UklaunchError:
            return True  # `check` will say why
        return any(self.sysctls[name] != value for name, value in found.items())

    @property
    def sysctls(self) -> dict[str, str]:
        devices = (self.loopback, self.bridge, self.tap, *_rate_links(self.member))
        return {name: value for device in devices for name, value in device.sysctls.items()}

    def take_note(self) -> None:
        """Of what has to be known when it is gone."""
        member = self.member
        with contextlib.suppress(OSError):
            self.offload = net.tap_offload(member.netns, member.tap_fd, member.tap)
        self.watch.sysctls(self.sysctls)
