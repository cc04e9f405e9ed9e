"""VMMs: a `Boot` and ready-made descriptors in, a running guest and its controls out. One file each."""

from __future__ import annotations

from .qemu import adopt_qemu, run_qemu

VMMS = {"qemu": run_qemu}
ADOPTERS = {"qemu": adopt_qemu}  # of one that runs already
