"""What a supervisor may still do as root, from its first thread on: what it needs to launch, mend and end a guest.

The same for what it starts, such as CNI plugins and health checks. The unit uklaunch@.service says the same by
CapabilityBoundingSet=. Sources: capabilities(7), capget(2), include/uapi/linux/capability.h.
"""

from __future__ import annotations

NEEDED = {
    "CAP_CHOWN": 0,
    "CAP_DAC_OVERRIDE": 1,
    "CAP_FOWNER": 3,
    "CAP_KILL": 5,
    "CAP_SETGID": 6,
    "CAP_SETUID": 7,
    "CAP_SETPCAP": 8,
    "CAP_NET_BIND_SERVICE": 10,
    "CAP_NET_ADMIN": 12,
    "CAP_NET_RAW": 13,
    "CAP_SYS_PTRACE": 19,
    "CAP_SYS_ADMIN": 21,
    "CAP_SYS_RESOURCE": 24,
    "CAP_PERFMON": 38,
    "CAP_BPF": 39,
}

_PR_CAPBSET_READ, _PR_CAPBSET_DROP = 23, 24
_VERSION_3 = 0x20080522


def drop_others() -> None:
    """Keep those of NEEDED that there are, and lose the others for good; in this thread and those that it starts.

    Without CAP_SETPCAP what is executed later gets them back: then who started us has not given them, or wants that.
    """
    import ctypes  # `pod ls` goes without

    libc = ctypes.CDLL(None, use_errno=True)
    bits = set(NEEDED.values())
    capability = 0
    while libc.prctl(_PR_CAPBSET_READ, capability, 0, 0, 0) >= 0:  # up to the kernel's last
        if capability not in bits:
            libc.prctl(_PR_CAPBSET_DROP, capability, 0, 0, 0)
        capability += 1
    header = (ctypes.c_uint32 * 2)(_VERSION_3, 0)
    sets = (ctypes.c_uint32 * 6)()  # effective, permitted, inheritable: the low half of each, then the high
    if libc.capget(header, sets) != 0:
        return
    keep = sum(1 << bit for bit in bits)
    for half in (0, 3):
        mask = keep >> (32 if half else 0) & 0xFFFFFFFF
        permitted = sets[half + 1] & mask
        sets[half], sets[half + 1], sets[half + 2] = permitted, permitted, 0
    libc.capset(header, sets)
