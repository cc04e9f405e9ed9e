"""A run's file: what one version of uklaunch writes, the next can read."""

from __future__ import annotations

import json
from dataclasses import replace
from ipaddress import IPv4Interface, ip_address
from pathlib import Path

import pytest

from launcher import runfile
from launcher.errors import ImageError, UklaunchError
from launcher.guest import RunOptions
from launcher.health import HealthCheck
from launcher.imagefile import ImageFile
from launcher.model import Accel, AddressPlan, Family, GuestSpec, Image, ImageFormat, Port, Protocol
from launcher.publish import Publish
from launcher.restart import RestartPolicy

SPEC = GuestSpec(
    name="n",
    pod="p",
    image=Image(
        path=Path("/i"),
        format=ImageFormat.QCOW2,
        family=Family.OSV,
        disks=(ImageFile(Path(__file__)),),
        disks_qcow2=(True,),
        etc={"hosts": bytes(range(256))},
        env={"A": "ä"},
        ports=(Port(53, Protocol.UDP),),
    ),
    env={"B": "x y"},
    cmdline="run me",
    nameservers=(ip_address("10.0.0.1"), ip_address("::1")),
)
OPTIONS = RunOptions(
    accel=Accel.TCG,
    netns=Path("/run/netns/x"),
    plan=AddressPlan(ipv4=IPv4Interface("10.9.0.1/24")),
    publish=(Publish.parse("[::1]:80:8080"), Publish.parse("81:81/udp")),
    restart=RestartPolicy.parse("on-failure:3"),
    health=HealthCheck.parse("cmd:true", interval_s=2.5),
    after=("db",),
    remove_when_done=True,
)


def test_what_is_written_is_read(tmp_path: Path) -> None:
    runfile.write(tmp_path, SPEC, OPTIONS)
    assert runfile.read(tmp_path) == (SPEC, OPTIONS)


def test_an_image_that_was_replaced_meanwhile_is_noticed_when_it_is_to_run(tmp_path: Path) -> None:
    image = tmp_path / "image"
    image.write_text("a")
    runfile.write(tmp_path, replace(SPEC, image=replace(SPEC.image, disks=(ImageFile(image),))), OPTIONS)
    runfile.read(tmp_path)[0].image.disks[0].check()
    (tmp_path / "other").write_text("a")
    (tmp_path / "other").replace(image)
    for _ in range(2):  # another in its place, then none
        file = runfile.read(tmp_path)[0].image.disks[0]
        assert file.path == image
        with pytest.raises(ImageError, match="image has been changed since"):
            file.check()
        image.unlink(missing_ok=True)


def test_whom_to_tell_is_not_written(tmp_path: Path) -> None:
    """Functions of a process are nothing to the next."""
    runfile.write(tmp_path, SPEC, RunOptions(note=print, on_change=print))
    assert runfile.read(tmp_path)[1] == RunOptions()


def test_another_version_may_have_written_it(tmp_path: Path) -> None:
    runfile.write(tmp_path, SPEC, OPTIONS)
    values = json.loads(runfile.path(tmp_path).read_text())
    values["spec"]["of_the_next_version"] = 1
    values["spec"]["image"]["also"] = []
    del values["options"]["health"]
    runfile.path(tmp_path).write_text(json.dumps(values))
    spec, options = runfile.read(tmp_path)
    assert spec == SPEC
    assert options.health is None


@pytest.mark.parametrize(
    "text", ["", "{}", "[]", '{"spec": {}, "options": {}}', '{"spec": 1, "options": null}', "\xff"]
)
def test_a_damaged_file_is_one_line(tmp_path: Path, text: str) -> None:
    runfile.path(tmp_path).write_bytes(text.encode("latin-1"))
    with pytest.raises(UklaunchError, match="is damaged"):
        runfile.read(tmp_path)


def test_no_file_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UklaunchError, match="No such file"):
        runfile.read(tmp_path)
