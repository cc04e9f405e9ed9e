"""Pods: a namespace with a bridge and the router, which guests join and leave.

A change of a pod's structure happens under the pod's lock, and its record is written before what it describes is
made: whatever is cut off half-way has a record by which it is found and removed.
"""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from ipaddress import IPv4Interface, IPv6Interface
from pathlib import Path

import router

from . import events, net, reset, resolver, state, uplink
from .errors import UklaunchError, UsageError, try_all
from .limits import UNLIMITED, Limits
from .model import DEFAULT_MTU, GUEST_INDEX_MAX, GUEST_INDEX_MIN, TAP_MTU_MAX, AddressPlan, Nic, Port, check_name
from .publish import Publish
from .timeline import mark

NAMESPACE_PREFIX = "uk-"
TAP_HEADERS = 64  # Ethernet's and the virtio header, which come before a packet that is read from a TAP


def plan_of(record: state.PodRecord) -> AddressPlan:
    return AddressPlan(ipv4=IPv4Interface(record.ipv4), ipv6=IPv6Interface(record.ipv6))


@contextlib.contextmanager
def open_router() -> Iterator[router.Router]:
    """The host's router; loaded now if it is not. What it refuses inside the block is an UklaunchError outside."""
    with router_errors(), router.open_router() as table:
        yield table


@contextlib.contextmanager
def router_errors() -> Iterator[None]:
    try:
        yield
    except router.RouterError as exc:
        raise UklaunchError(exc.message, exc.hint, exc.detail) from exc


# --- create and delete ---


def _begin(
    name: str,
    *,
    plan: AddressPlan,
    netns: Path | None,
    ephemeral: bool,
    outside: str,
    published: Sequence[Publish] = (),
    timeouts: router.Timeouts | None = None,
) -> state.PodRecord:
    """The pod's record and namespace, without a bridge yet. Under the pod's lock. `outside`: its uplink."""
    timeouts = timeouts or router.Timeouts()
    path = netns or state.NETNS_DIR / f"{NAMESPACE_PREFIX}{name}"
    if netns is not None:
        net.check_netns(netns)
        if net.BRIDGE in net.link_indexes(netns):
            raise UsageError(f"{netns} is a pod already", "see: uklaunch pod ls")
    elif path.exists():
        raise UsageError(f"namespace {path} exists and is not ours", f"to use it as it is: --netns {path}")
    record = state.PodRecord(
        name=name,
        netns=str(path),
        adopted=netns is not None,
        ephemeral=ephemeral,
        ipv4=str(plan.ipv4),
        ipv6=str(plan.ipv6),
        saved_sysctls={},
        udp_timeout_s=timeouts.udp_s,
        tcp_timeout_s=timeouts.tcp_s,
        uplink=outside,
        published=tuple(str(item) for item in published),
    )
    state.write_pod(record)
    mark("pod-record")
    if netns is None:
        net.create_netns(path)
    mark("namespace")
    return uplink.open_cni(record)


def _finish(record: state.PodRecord, table: router.Router) -> state.PodRecord:
    """Bridge and router. Under the pod's lock."""
    netns, plan = Path(record.netns), plan_of(record)
    record = replace(record, saved_sysctls=net.write_sysctls(netns, net.LOOPBACK_SYSCTLS))
    state.write_pod(record)
    with state.lock(state.root() / "lock") as last:  # two pods must not take one id
        record = replace(record, id=_next_id(last, set(router.pod_ids()), table.pod_id_max))
        state.write_pod(record)
    mark("pod-id")
    with uplink.opening(record) as opened:
        bridge = net.make_bridge(netns, plan, record.name)
        mark("bridge")
        table.add_pod(
            record.id,
            router.PodRow(
                ifindex=bridge,
                mac=plan.mac,
                ipv4=plan.ipv4.ip,
                ipv6=plan.ipv6.ip,
                timeouts=router.Timeouts(udp_s=record.udp_timeout_s, tcp_s=record.tcp_timeout_s),
                owner=state.owner(),
            ),
        )
        mark("pod-row")
        made = net.attach_loopback(netns, table.program_fd, record.id)
        mark("loopback")
    record = replace(uplink.join_own(opened[0]), own_clsact=made)
    if record.uplink_link:
        index = net.link_indexes(netns)[record.uplink_link]
        table.set_uplink(record.id, uplink.row(record, index))
        made = net.attach_uplink(netns, index, table.program_fd, record.id)
        record = replace(record, own_uplink_clsact=made)
        state.write_pod(record)
    mark("uplink-row")
    record = replace(record, bridge=bridge)
    state.write_pod(record)
    events.note("created", record.name)
    mark("pod-made")
    return record


def _next_id(last: int, taken: set[int], most: int) -> int:
    """A free id, at most `most`, the one after the last given, which the open file `last` holds.

    Not the lowest: the links of a removed pod live on for a moment, with its id, and interface indexes are the same in
    every namespace.
    """
    before = int(os.pread(last, 16, 0) or b"0")
    following = itertools.chain(range(before + 1, most + 1), range(1, min(before, most) + 1))
    found = next((number for number in following if number not in taken), None)
    if found is None:
        raise UklaunchError(
            f"this host has {len(taken)} pods, and that is all it can have", "remove one: uklaunch pod rm POD"
        )
    os.pwrite(last, f"{found:<8}\n".encode(), 0)
    return found


def _remove(record: state.PodRecord) -> None:
    """Undo `_begin` and `_finish`, however far they came: what can be undone is, also when a part of it fails.

    Idempotent; under the pod's lock.
    """
    try_all(partial(mark, "remove"), partial(_remove_uplink, record), partial(_remove_inside, record))


def _remove_uplink(record: state.PodRecord) -> None:
    """What stays of it on the host can be found by the pod's name: see `forget_unknown_uplinks`."""
    uplink.close(record)
    mark("uplink-gone")


def _remove_inside(record: state.PodRecord) -> None:
    try:
        try_all(
            partial(_remove_from_loopback, record), partial(_remove_namespace, record), partial(_remove_rows, record)
        )
    except Exception:
        # As of a pod that is half made: whoever comes next, gc or a guest of this pod's name, removes what is left.
        with contextlib.suppress(UklaunchError):
            state.write_pod(replace(record, bridge=0))
        raise
    state.forget_pod(record.name)
    if record.bridge:
        events.note("removed", record.name)
    mark("pod-forgotten")


def _remove_from_loopback(record: state.PodRecord) -> None:
    """Before the namespace goes: it lives on if a container is in it, and must not meet the id's next pod."""
    netns = Path(record.netns)
    with contextlib.suppress(FileNotFoundError, UklaunchError):
        if record.bridge or record.own_clsact or record.adopted:
            net.detach_loopback(netns, own_clsact=record.own_clsact)
            if record.adopted and record.uplink_link:
                net.detach_uplink(netns, record.uplink_link, own_clsact=record.own_uplink_clsact)


def _remove_namespace(record: state.PodRecord) -> None:
    """An adopted one stays, as it was before."""
    netns = Path(record.netns)
    if not record.adopted:
        net.delete_netns(netns)
    elif netns.exists():
        present = net.link_indexes(netns)
        net.delete_links(netns, [name for name in present if name == net.BRIDGE or name.startswith(net.RATE_LINK)])
        net.write_sysctls(netns, dict(reversed(record.saved_sysctls.items())))
    mark("namespace-gone")


def _remove_rows(record: state.PodRecord) -> None:
    if record.id:
        router.remove_pod(record.id)
    mark("pod-row-gone")


def create(
    name: str,
    *,
    plan: AddressPlan | None = None,
    netns: Path | None = None,
    outside: str | None = None,
    publish: Sequence[Publish] = (),
    timeouts: router.Timeouts | None = None,
) -> state.PodRecord:
    """Make a pod that stays until `delete`. `netns`: adopt that namespace instead of making one.

    `outside`: its uplink: nat (the default), none, or cni:NAME; `publish`: ports of the host's that lead to the pod;
    `timeouts`: of its flows.
    Raises UsageError if the pod exists, the name cannot be used, or a port cannot be had.
    """
    check_name("pod", name)
    chosen = uplink.choose(outside, netns)
    uplink.check_publish(publish, chosen)
    with state.pod_lock(name):
        if (old := state.read_pod(name)) is not None:
            if old.bridge:
                raise UsageError(f"pod {name!r} exists", f"remove it first: uklaunch pod rm {name}")
            _remove(old)
        try:
            record = _begin(
                name,
                plan=plan or AddressPlan(),
                netns=netns,
                ephemeral=False,
                outside=chosen,
                published=publish,
                timeouts=timeouts,
            )
            with open_router() as table:
                record = _finish(record, table)
            uplink.publish(record, publish)
            return record
        except BaseException:
            _undo(name)
            raise


def _undo(name: str) -> None:
    """Take back a pod whose set-up failed, without hiding why it failed."""
    if (record := state.read_pod(name)) is not None:
        with contextlib.suppress(UklaunchError):
            _remove(record)


def running_guests(name: str) -> list[state.GuestRecord]:
    return [record for record in state.guests(name) if state.alive(record)]


def delete(name: str) -> None:
    """Remove a pod that has no running guest. Raises UsageError if it has one, or does not exist."""
    with state.pod_lock(name):
        record = state.get_pod(name)
        if running := running_guests(name):
            names = ", ".join(guest.name for guest in running)
            raise UsageError(
                f"pod {name!r} has running guests: {names}",
                f"stop them first, or: uklaunch pod rm --force {name}",
            )
        _remove(record)


def delete_if_abandoned(name: str) -> bool:
    """For `gc`: remove a pod that was left half-made, or that `run` made and whose guests are gone."""
    with state.pod_lock(name):
        record = state.read_pod(name)
        if record is None or running_guests(name):
            return False
        if record.bridge and not record.ephemeral and Path(record.netns).exists():
            return False
        _remove(record)
        return True


@contextlib.asynccontextmanager
async def open_pod(
    name: str,
    *,
    plan: AddressPlan | None = None,
    netns: Path | None = None,
    uplink: str | None = None,
    publish: Sequence[Publish] = (),
) -> AsyncIterator[state.PodRecord]:
    """A pod for the length of a block: created on entry, removed on exit, also when cancelled.

    `netns` adopts an existing namespace, which is left as it was. `uplink` (nat, none, cni:NAME) and `publish` as for
    `create`. Raises UsageError if the pod exists.
    """
    import trio

    make = partial(create, name, plan=plan, netns=netns, outside=uplink, publish=publish)
    record = await trio.to_thread.run_sync(make)
    try:
        yield record
    finally:
        with trio.CancelScope(shield=True):
            await trio.to_thread.run_sync(delete, name)


# --- join and leave ---


@dataclass
class Membership:
    """A guest's place in a pod, from `joining`. The pod's lock is held until `connect`."""

    record: state.PodRecord
    guest: str
    index: int
    tap: str
    tap_fd: int
    mtu: int
    _lock: contextlib.ExitStack
    limits: Limits = UNLIMITED
    ifindex: int = 0  # of the TAP, from `connect` on
    rate_indexes: tuple[int, int] = (0, 0)  # of `rate_link` and its peer, if they are to be
    ports: tuple[Port, ...] = ()  # that the guest has declared
    resolver: resolver.Resolver = field(default_factory=resolver.Resolver)  # whom the guest is to ask for names

    @property
    def netns(self) -> Path:
        return Path(self.record.netns)

    @property
    def nic(self) -> Nic:
        plan = plan_of(self.record)
        return Nic(
            mac=plan.guest_mac(self.index),
            ipv4=plan.guest_ipv4(self.index),
            ipv6=plan.guest_ipv6(self.index),
            gateway_ipv4=plan.ipv4.ip,
            gateway_ipv6=plan.ipv6.ip,
            mtu=self.mtu,
        )

    def connect(self, ports: tuple[Port, ...], publish: Sequence[Publish] = ()) -> None:
        """Finish the pod if it is new, and put the TAP on its bridge, behind the router.

        `publish`: ports of the host's that lead to `ports`.
        """
        with open_router() as table:
            if not self.record.bridge:
                self.record = _finish(self.record, table)
            elif self.record.id not in table.pod_ids():
                raise UklaunchError(
                    f"pod {self.record.name!r} is served by the router of another version of uklaunch",
                    f"make it anew: uklaunch pod rm --force {self.record.name}",
                )
            else:
                _forget_dead(self.record, table)  # or a guest that was killed keeps the ports of its next run
            self.ifindex, self.ports = net.link_indexes(self.netns)[self.tap], ports
            self.make_rate_link(table)
            self._admit(table)
            mark("guest-row")
            self.attach(table)
            mark("attached")
        uplink.lead_to_resolver(self.record, self.resolver)
        uplink.publish(self.record, publish, self.guest)
        self._lock.close()

    def _admit(self, table: router.Router) -> None:
        nic = self.nic
        table.add_guest(
            self.record.id,
            router.GuestRow(
                index=self.index,
                ifindex=self.ifindex,
                mac=nic.mac,
                ipv4=nic.ipv4.ip,
                ipv6=nic.ipv6.ip,
                ports=tuple((port.protocol.value, port.number) for port in self.ports),
                mtu=nic.mtu,
                rate_link=self.rate_indexes[0],
            ),
        )

    def withdraw(self) -> None:
        """The guest has ended, to be started again: its ports refuse and its connections are reset at once. Its place,
        its TAP and its addresses stay."""
        with state.pod_lock(self.record.name), open_router() as table:
            reset.reset(self.netns, table.remove_guest(self.record.id, self.ifindex))

    def rejoin(self) -> None:
        """After `withdraw`, for the guest's next run. Raises UklaunchError if another guest has declared its ports."""
        os.set_blocking(self.tap_fd, False)
        with contextlib.suppress(BlockingIOError):
            while os.read(self.tap_fd, TAP_MTU_MAX + TAP_HEADERS):  # what was sent to the run before
                pass
        with state.pod_lock(self.record.name), open_router() as table:
            self._admit(table)
            self.attach(table)

    @property
    def rate_link(self) -> str:
        return f"{net.RATE_LINK}{self.index}"

    def make_rate_link(self, table: router.Router) -> None:
        """The detour that limits what the guest sends, if it is to be. Idempotent; under the pod's lock."""
        if self.limits.net_out_bits is None:
            return
        self.rate_indexes = net.make_rate_link(
            self.netns,
            name=self.rate_link,
            alias=f"{self.record.name}/{self.guest}",
            mtu=self.mtu,
            rate_bits=self.limits.net_out_bits,
            program_fd=table.shaped_fd,
            pod_id=self.record.id,
            indexes=self.rate_indexes,
        )
        mark("rate-link")

    def attach(self, table: router.Router) -> None:
        """Idempotent; under the pod's lock."""
        nic = self.nic
        net.attach_guest(
            self.netns,
            bridge=self.record.bridge,
            tap=self.tap,
            alias=f"{self.record.name}/{self.guest}",
            addresses=(nic.ipv4.ip, nic.ipv6.ip),
            mtu=nic.mtu,
            program_fd=table.program_fd if self.limits.net_out_bits is None else table.shaped_fd,
            pod_id=self.record.id,
            index=self.ifindex,
            rate_bits=self.limits.net_in_bits,
        )

    def leave(self) -> None:
        """Forget the guest's ports and flows; remove the pod if `run` made it and this was its last guest."""
        self._lock.close()
        name = self.record.name
        with state.pod_lock(name):
            record = state.read_pod(name)
            if record is None or self.record.id not in (0, record.id):
                return  # the pod has gone, and perhaps another has its name
            try_all(
                partial(mark, "leave"),
                partial(self._remove_rate_link, record),
                partial(self._remove_row, record),
                partial(self._leave_pod, record),
            )

    def _remove_rate_link(self, record: state.PodRecord) -> None:
        if self.limits.net_out_bits is not None and Path(record.netns).exists():
            net.delete_links(Path(record.netns), [self.rate_link])

    def _remove_row(self, record: state.PodRecord) -> None:
        if self.ifindex and record.id:
            with open_router() as table:
                reset.reset(Path(record.netns), table.remove_guest(record.id, self.ifindex))
        mark("guest-row-gone")

    def _leave_pod(self, record: state.PodRecord) -> None:
        # Our guest is none of them, for its locks are released; one of its name is another's, who came before us.
        others = running_guests(record.name)
        if not others and (record.ephemeral or not record.bridge):
            _remove(record)
        elif self.ifindex:  # else another guest of this name may run, which is why we leave
            uplink.forget_guests(record, [guest.name for guest in others])


def rejoin(guest: state.GuestRecord, tap_fd: int, ports: tuple[Port, ...], mtu: int, limits: Limits) -> Membership:
    """The place of a guest that runs, for a new supervisor of it. `tap_fd` is borrowed. Nothing changes in the pod.

    Raises UklaunchError if its pod has gone.
    """
    record = state.get_pod(guest.pod)
    member = Membership(
        record, guest.name, guest.index, guest.tap, tap_fd, mtu, contextlib.ExitStack(), limits, ports=ports
    )
    with open_router() as table:  # asked here: the link itself may be gone, for `heal` to make anew
        mac = member.nic.mac
        row = next((row for row in table.guests(record.id) if row.mac == mac), None)
        if row is not None:
            peer = net.link_indexes(member.netns).get(net.rate_peer(member.rate_link), 0)
            member.ifindex, member.rate_indexes = row.ifindex, (row.rate_link, peer)
    if not member.ifindex:
        raise UklaunchError(f"the router does not know guest {guest.pod}/{guest.name}", "end it: uklaunch gc --kill")
    return member


def free_index(name: str) -> int:
    taken = {guest.index for guest in running_guests(name)}
    for index in range(GUEST_INDEX_MIN, GUEST_INDEX_MAX + 1):
        if index not in taken:
            return index
    raise UklaunchError(f"pod {name!r} is full: it has {len(taken)} guests", "use another pod")


@contextlib.contextmanager
def joining(
    name: str,
    guest: str,
    *,
    netns: Path | None = None,
    plan: AddressPlan | None = None,
    outside: str | None = None,
    publish: Sequence[Publish] = (),
    mtu: int = DEFAULT_MTU,
    limits: Limits = UNLIMITED,
) -> Iterator[Membership]:
    """A guest's place in a pod for the length of a block; makes the pod if it is missing.

    Inside, the TAP exists and can be handed to a VMM; `connect` then joins it to the pod, which takes longer. The
    caller writes the guest's record, and holds its supervisor's lock, before `connect`.
    """
    check_name("pod", name)
    with contextlib.ExitStack() as lock, contextlib.ExitStack() as tap_file:
        lock.enter_context(state.pod_lock(name))
        record = state.read_pod(name)
        if record is not None and not record.bridge:
            _remove(record)  # cut off half-way by a crash: nobody holds its lock, for we do
            record = None
        if record is not None and netns is not None and record.netns != str(netns):
            raise UsageError(f"pod {name!r} is in {record.netns}, not in {netns}", "leave out --netns")
        if record is not None and outside not in (None, record.uplink):
            raise UsageError(f"pod {name!r} has uplink {record.uplink}, not {outside}", "leave out --uplink")
        chosen = record.uplink if record is not None else uplink.choose(outside, netns)
        uplink.check_publish(publish, chosen)
        try:
            if record is None:
                record = _begin(name, plan=plan or AddressPlan(), netns=netns, ephemeral=True, outside=chosen)
            index = free_index(name)
            tap = f"uktap{index}"
            tap_fd = net.open_tap(Path(record.netns), tap)
            tap_file.callback(os.close, tap_fd)
            mark("tap")
            found = uplink.resolve(record, plan_of(record))
        except BaseException:
            if (left := state.read_pod(name)) is not None and not left.bridge:
                _undo(name)
            raise
        membership = Membership(record, guest, index, tap, tap_fd, mtu, lock, limits, resolver=found)
        try:
            yield membership
        finally:
            tap_file.close()
            membership.leave()


# --- after a crash ---


def forget_dead_guests(name: str) -> None:
    """Take the rows of guests whose TAP is gone out of the router."""
    with state.pod_lock(name):
        record = state.read_pod(name)
        if record is None or not record.id or not Path(record.netns).exists():
            return
        with open_router() as table:
            _forget_dead(record, table)
        uplink.forget_guests(record, [guest.name for guest in running_guests(name)])


def _forget_dead(record: state.PodRecord, table: router.Router) -> None:
    """Under the pod's lock."""
    links = net.link_indexes(Path(record.netns))
    for index in range(GUEST_INDEX_MIN, GUEST_INDEX_MAX + 1):
        if f"{net.RATE_LINK}{index}" in links and f"uktap{index}" not in links:
            net.delete_link(Path(record.netns), links[f"{net.RATE_LINK}{index}"])
    present = set(links.values())
    for row in table.guests(record.id):
        if row.ifindex not in present:
            reset.reset(Path(record.netns), table.remove_guest(record.id, row.ifindex))


def unknown_ids(table: router.Router) -> list[int]:
    """Pods of ours in the router that no record knows."""
    return sorted(set(table.pod_ids_of(state.owner())) - {record.id for record in state.pods()})


def forget_unknown_ids() -> list[int]:
    """Remove pods of ours from the router that no record knows. Returns their ids."""
    if not router.is_loaded():
        return []
    with state.lock(state.root() / "lock"), open_router() as table:
        unknown = unknown_ids(table)
        for pod_id in unknown:
            table.remove_pod(pod_id)
        return unknown


def unload_superseded() -> list[str]:
    """Unload the router's earlier versions that have no pods left. Returns their names."""
    return [directory.name for directory in router.unload_superseded()]


def forget_unknown_uplinks() -> list[str]:
    """Take out of the host what is of an uplink of no pod. Returns the pods' names."""
    return uplink.forget_unknown(lambda: {record.name for record in state.pods()})
