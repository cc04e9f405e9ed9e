"""CNI: a pod's uplink from a standard network configuration list, by running its plugins.

    /etc/cni/net.d/*.conflist   what networks there are ($CNI_CONF_DIR)
    /usr/lib/cni, /opt/cni/bin  the plugins ($CNI_PATH)
    /run/uklaunch/cni/POD.json  the list as it was at ADD, and the result, which DEL is given

Source: the CNI specification 1.0.0, sections 1 (configuration), 2 (execution), 3 and 4 (protocol, result).
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from ipaddress import IPv4Interface, IPv6Interface, ip_interface
from pathlib import Path
from typing import Any

from . import resolver, state
from .errors import UklaunchError, UsageError

CONF_DIR = Path("/etc/cni/net.d")
PLUGIN_DIRS = "/usr/lib/cni:/opt/cni/bin"
IFNAME = "eth0"
VERSIONS = ("0.3.0", "0.3.1", "0.4.0", "1.0.0")
_TIMEOUT_S = 60


@dataclass(frozen=True, slots=True, kw_only=True)
class Attachment:
    """What ADD has given the pod."""

    addresses: tuple[IPv4Interface | IPv6Interface, ...]
    dns: resolver.Resolver | None  # None: the plugins said nothing of it


def _conf_dir() -> Path:
    return Path(os.environ.get("CNI_CONF_DIR", CONF_DIR))


def _plugin_path() -> str:
    return os.environ.get("CNI_PATH", PLUGIN_DIRS)


def _cache(pod: str) -> Path:
    return state.root() / "cni" / f"{pod}.json"


def _remember(pod: str, values: dict[str, Any]) -> None:
    """In one step: DEL needs the whole of it."""
    new = _cache(pod).with_suffix(".new")
    try:
        new.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        new.write_text(json.dumps(values))
        new.replace(_cache(pod))
    except OSError as exc:
        raise state.state_error(new, exc) from exc


# --- configurations ---


def networks() -> Iterator[dict[str, Any]]:
    """Every network configuration list there is; a single plugin's configuration becomes a list of one."""
    directory = _conf_dir()
    for path in sorted(directory.iterdir()) if directory.is_dir() else ():
        if path.suffix not in (".conflist", ".conf", ".json"):
            continue
        try:
            found = json.loads(path.read_text())
            if not isinstance(found, dict):
                raise ValueError("it is no object")
            if "plugins" not in found:
                found = {"cniVersion": found.get("cniVersion"), "name": found["name"], "plugins": [found]}
            if not isinstance(found["name"], str) or not all(plugin["type"] for plugin in found["plugins"]):
                raise ValueError("name and type must be words")
        except (OSError, ValueError, KeyError, TypeError) as exc:
            raise UsageError(f"{path} is no CNI network configuration: {exc}", "mend or remove it") from None
        yield found


def find(name: str) -> dict[str, Any]:
    """The configuration list of that name, checked. Raises UsageError if there is none, or its plugins are missing."""
    names = []
    for network in networks():
        names.append(network["name"])
        if network["name"] == name:
            break
    else:
        there_are = f"it has: {', '.join(names)}" if names else "it has none"
        raise UsageError(f"there is no CNI network {name!r} in {_conf_dir()}", there_are)
    version = network.get("cniVersion") or "0.2.0"
    if version not in VERSIONS:
        raise UsageError(f"CNI network {name!r}: version {version} is not spoken", f"use one of {', '.join(VERSIONS)}")
    for plugin in network["plugins"]:
        _plugin(plugin["type"], name)
    return network


def _plugin(kind: str, network: str) -> str:
    path = None if "/" in kind else shutil.which(kind, path=_plugin_path())
    if path is None:
        raise UsageError(
            f"CNI network {network!r}: there is no plugin {kind!r} in {_plugin_path()}",
            "apt-get install containernetworking-plugins",
        )
    return path


# --- ADD and DEL ---


def add(pod: str, netns: Path, network: dict[str, Any]) -> Attachment:
    """Run the list's plugins in order. Raises UklaunchError if one fails; what the others did is taken back."""
    _remember(pod, {"network": network})
    result: dict[str, Any] | None = None
    try:
        for plugin in network["plugins"]:
            result = _execute("ADD", pod, netns, network, plugin, result)
    except UklaunchError:
        with contextlib.suppress(UklaunchError):  # the first failure is the one to tell
            delete(pod, netns)
        raise
    _remember(pod, {"network": network, "result": result})
    return _attachment(network["name"], result or {})


def delete(pod: str, netns: Path) -> None:
    """Run the plugins in reverse order, all of them, with what ADD was given. Idempotent.

    Raises UklaunchError with what failed first; the pod is forgotten all the same.
    """
    try:
        cached = json.loads(_cache(pod).read_text())
    except (FileNotFoundError, ValueError):
        return
    network, failure = cached["network"], None
    for plugin in reversed(network["plugins"]):
        try:
            _execute("DEL", pod, netns, network, plugin, cached.get("result"))
        except UklaunchError as exc:
            failure = failure or exc
    _cache(pod).unlink(missing_ok=True)
    if failure is not None:
        raise failure


def attachment(pod: str) -> Attachment | None:
    """What ADD has given the pod; None if there was no ADD."""
    try:
        cached = json.loads(_cache(pod).read_text())
    except (FileNotFoundError, ValueError):
        return None
    return _attachment(cached["network"]["name"], cached.get("result") or {})


def pods() -> list[str]:
    """The pods that have had an ADD and no DEL."""
    return sorted(path.stem for path in (state.root() / "cni").glob("*.json"))


def _execute(
    command: str,
    pod: str,
    netns: Path,
    network: dict[str, Any],
    plugin: dict[str, Any],
    previous: dict[str, Any] | None,
) -> dict[str, Any]:
    """One plugin; its result, or that of the plugin before it if it has none."""
    kind = plugin["type"]
    version = network.get("cniVersion") or plugin.get("cniVersion")
    config = {**plugin, "name": network["name"], "cniVersion": version}
    config.pop("capabilities", None)
    if previous is not None:
        config["prevResult"] = previous
    env = {
        **os.environ,
        "CNI_COMMAND": command,
        "CNI_CONTAINERID": f"uklaunch-{pod}",
        "CNI_NETNS": str(netns) if netns.exists() else "",
        "CNI_IFNAME": IFNAME,
        "CNI_PATH": _plugin_path(),
        "CNI_ARGS": "",
    }
    what = f"CNI network {network['name']!r}: plugin {kind} failed to {command}"
    try:
        done = subprocess.run(
            [_plugin(kind, network["name"])],
            input=json.dumps(config),
            env=env,
            capture_output=True,
            text=True,
            timeout=_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise UklaunchError(f"{what}: it took more than {_TIMEOUT_S} s") from None
    except OSError as exc:
        raise UklaunchError(f"{what}: {exc.strerror}", "see: ls -l " + _plugin_path()) from exc
    try:
        said = json.loads(done.stdout) if done.stdout.strip() else {}
    except ValueError:
        said = {}
    if done.returncode != 0:
        lines = " ".join((said.get("msg") or done.stderr or done.stdout).split()) or f"exit code {done.returncode}"
        details = " ".join(str(said.get("details") or "").split())
        raise UklaunchError(f"{what}: {lines}", details, done.stdout + done.stderr)
    return said or previous or {}


def _attachment(name: str, result: dict[str, Any]) -> Attachment:
    try:
        interfaces = result.get("interfaces") or []
        addresses = tuple(
            ip_interface(ip["address"])
            for ip in result.get("ips") or []
            if "interface" not in ip or interfaces[ip["interface"]].get("sandbox")  # not an address of the host's end
        )
        dns = result.get("dns") or {}
        said = [f"nameserver {address}" for address in dns.get("nameservers") or ()]
        said += [f"search {' '.join(dns.get('search') or [dns['domain']])}"] * bool(
            dns.get("search") or dns.get("domain")
        )
        said += [f"options {' '.join(dns['options'])}"] * bool(dns.get("options"))
    except (KeyError, IndexError, TypeError, ValueError) as exc:
        raise UklaunchError(f"CNI network {name!r}: its result cannot be understood: {exc!r}") from exc
    return Attachment(addresses=addresses, dns=resolver.parse("\n".join(said)) if dns.get("nameservers") else None)
