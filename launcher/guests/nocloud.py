"""A NoCloud seed: the disk by which cloud-init in a Linux disk image learns its name, addresses and files.

An ISO 9660 file system labelled CIDATA with three files, which are YAML: we write JSON, which is YAML.
Source: cloud-init's documentation, "NoCloud" and "Networking config Version 2".
"""

from __future__ import annotations

import io
import json
import shlex

from ..model import GuestSpec, Nic, format_mac
from .hosts import hosts


def seed(spec: GuestSpec, nic: Nic) -> bytes:
    """The seed's image; `cmdline` is a shell command that runs once the system is up."""
    files = {
        "meta-data": {"instance-id": f"uklaunch-{spec.pod}-{spec.name}", "local-hostname": spec.name},
        "network-config": _network(spec, nic),
        "user-data": _user_data(spec, nic),
    }
    text = {name: json.dumps(value, indent=1) + "\n" for name, value in files.items()}
    text["user-data"] = "#cloud-config\n" + text["user-data"]
    return _iso(text)


def _network(spec: GuestSpec, nic: Nic) -> object:
    return {
        "version": 2,
        "ethernets": {
            "pod": {
                "match": {"macaddress": format_mac(nic.mac)},
                "addresses": [str(nic.ipv4), str(nic.ipv6)],
                "routes": [
                    {"to": "0.0.0.0/0", "via": str(nic.gateway_ipv4)},
                    {"to": "::/0", "via": str(nic.gateway_ipv6)},
                ],
                "nameservers": {
                    "addresses": [str(address) for address in spec.nameservers],
                    **({"search": list(spec.search)} if spec.search else {}),
                },
                "mtu": nic.mtu,
            }
        },
    }


def _user_data(spec: GuestSpec, nic: Nic) -> object:
    env = "".join(f"{key}={shlex.quote(value)}\n" for key, value in spec.env.items())
    data: dict[str, object] = {
        "manage_etc_hosts": False,
        "write_files": [
            {"path": "/etc/hosts", "content": hosts("linux", spec.name, nic)},
            {"path": "/etc/environment", "content": env, "append": True},
        ],
    }
    if spec.cmdline:
        data["runcmd"] = [["env", *(f"{key}={value}" for key, value in spec.env.items()), "sh", "-c", spec.cmdline]]
    return data


def _iso(files: dict[str, str]) -> bytes:
    import pycdlib  # slow to import, and needed by these guests alone

    iso = pycdlib.PyCdlib()
    iso.new(vol_ident="CIDATA", joliet=3, rock_ridge="1.09")
    for number, (name, text) in enumerate(files.items()):
        content = text.encode()
        iso.add_fp(io.BytesIO(content), len(content), f"/FILE{number}.;1", rr_name=name, joliet_path=f"/{name}")
    out = io.BytesIO()
    iso.write_fp(out)
    iso.close()
    return out.getvalue()
