"""A real container in a pod, for the demo and the tests: runc or crun, joined to the namespace by its path.

Nothing in it knows of uklaunch. It sees the host's programs, or has a root of its own; both read-only.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from .errors import UklaunchError

# What `docker run` grants and servers use that change their user and confine themselves, such as sshd.
SERVER_CAPABILITIES = (
    *("CAP_NET_BIND_SERVICE", "CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_KILL"),
    *("CAP_SETUID", "CAP_SETGID", "CAP_SYS_CHROOT"),
)
_SHARED = ("/usr", "/bin", "/sbin", "/lib", "/lib64", "/etc/alternatives")


@dataclass(frozen=True, slots=True, kw_only=True)
class Container:
    runtime: tuple[str, ...]
    id: str

    def argv(self, *command: str, user: str = "0:0") -> list[str]:
        """The words that run a command inside, as `user` (UID:GID); signals to the runtime reach the command."""
        return [*self.runtime, "exec", "--user", user, self.id, *command]

    def run(self, *command: str, timeout_s: float = 20) -> subprocess.CompletedProcess[str]:
        """Run a command inside; its output is captured."""
        return subprocess.run(
            self.argv(*command),
            capture_output=True,
            text=True,
            timeout=timeout_s,
            stdin=subprocess.DEVNULL,
            check=False,
        )


def find_runtime() -> str:
    """runc, or crun. Raises UklaunchError if there is neither."""
    for name in ("runc", "crun"):  # crun 1.8, Debian 12's, refuses hosts with hybrid cgroups
        if path := shutil.which(name):
            return path
    raise UklaunchError("no container runtime", "apt-get install runc")


@contextlib.contextmanager
def container(netns: Path, command: Sequence[str], *, says: str, root: Path | None = None) -> Iterator[Container]:
    """A container in the namespace for the length of a block; entered when its command prints the line `says`.

    `root`: a tree of files that it has instead of the host's programs. Raises UklaunchError if it does not start.
    """
    with contextlib.ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="uklaunch-container-")))
        rootfs = directory / "rootfs"
        for path in ("proc", "dev", "tmp", "etc", *(shared[1:] for shared in _SHARED if Path(shared).exists())):
            (rootfs / path).mkdir(parents=True, exist_ok=True)
        (rootfs / "etc/hosts").write_text("127.0.0.1 localhost\n::1 localhost\n")
        (directory / "config.json").write_text(json.dumps(_config(netns, command, root)))
        runtime = (find_runtime(), "--root", str(directory / "state"))
        made = Container(runtime=runtime, id=f"uk-{os.getpid()}-{directory.name[-8:]}")
        errors = stack.enter_context((directory / "errors").open("w+"))
        process = subprocess.Popen(
            [*runtime, "run", "--bundle", str(directory), made.id],
            stdout=subprocess.PIPE,
            stderr=errors,
            stdin=subprocess.DEVNULL,
            text=True,
        )
        stack.callback(_remove, made, process)
        assert process.stdout is not None
        if process.stdout.readline().strip() != says:
            process.wait()
            errors.seek(0)
            raise UklaunchError("the container did not start", "-v shows what it said", errors.read())
        yield made


def _remove(made: Container, process: subprocess.Popen[str]) -> None:
    subprocess.run([*made.runtime, "delete", "--force", made.id], capture_output=True, check=False)
    process.wait()
    assert process.stdout is not None
    process.stdout.close()


def _config(netns: Path, command: Sequence[str], root: Path | None) -> object:
    """The OCI runtime's config.json: see config.md of the runtime specification."""
    if root is None:
        mounts = [
            {"destination": path, "type": "bind", "source": os.path.realpath(path), "options": ["rbind", "ro"]}
            for path in _SHARED
            if Path(path).exists()
        ]
        capabilities = ["CAP_NET_BIND_SERVICE"]
    else:
        mounts = [
            {"destination": path, "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "nodev", "mode=1777"]}
            for path in ("/dev/shm", "/run", "/tmp")
        ]
        capabilities = list(SERVER_CAPABILITIES)
    return {
        "ociVersion": "1.0.2",
        "process": {
            "user": {"uid": 0, "gid": 0},
            "args": list(command),
            "env": ["PATH=/usr/bin:/usr/sbin:/bin:/sbin"],
            "cwd": "/",
            "noNewPrivileges": True,
            "capabilities": {kind: capabilities for kind in ("bounding", "effective", "permitted")},
        },
        "root": {"path": str(root or "rootfs"), "readonly": root is not None},
        "hostname": "container",
        "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc"},
            {"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "mode=755"]},
            *mounts,
        ],
        "linux": {
            "namespaces": [
                {"type": "network", "path": str(netns)},
                *({"type": kind} for kind in ("pid", "ipc", "uts", "mount")),
            ],
        },
    }
