"""Parsing of what users type: good values, and each bad one with a UsageError."""

from __future__ import annotations

import pytest

from launcher.errors import UsageError
from launcher.model import AddressPlan, Port, Protocol, check_name, parse_memory_mib


@pytest.mark.parametrize(
    ("text", "mib"), [("128M", 128), ("128", 128), ("1G", 1024), ("131072K", 128), ("64MiB", 64), ("2g", 2048)]
)
def test_memory(text: str, mib: int) -> None:
    assert parse_memory_mib(text) == mib


@pytest.mark.parametrize("text", ["12Q", "", "M", "-5M", "1.5G", "0", "3M", "9999999999G", "١٢٨M"])
def test_bad_memory(text: str) -> None:
    with pytest.raises(UsageError):
        parse_memory_mib(text)


def test_ports() -> None:
    assert Port.parse("8080") == Port(8080)
    assert Port.parse("53/udp") == Port(53, Protocol.UDP)
    assert str(Port.parse("53/udp")) == "53/udp"


@pytest.mark.parametrize("text", ["70000", "0", "-1", "", "http", "80/sctp", "80/", "8 0", "٨٠"])
def test_bad_ports(text: str) -> None:
    with pytest.raises(UsageError):
        Port.parse(text)


@pytest.mark.parametrize("name", ["a", "web-1", "0", "a" * 48])
def test_names(name: str) -> None:
    assert check_name("pod", name) == name


@pytest.mark.parametrize("name", ["", "-a", "a-", "A", "a/b", "..", "a b", "a" * 49, "a" * 200, "é", "a\n"])
def test_bad_names(name: str) -> None:
    with pytest.raises(UsageError) as caught:
        check_name("pod", name)
    assert "\n" not in caught.value.message
    assert len(caught.value.message) < 120


def test_address_plan() -> None:
    plan = AddressPlan()
    assert str(plan.guest_ipv4(2)) == "169.254.77.2/24"
    assert str(plan.guest_ipv6(254)) == "fd00:77::fe/64"
    assert plan.guest_mac(254).hex() == "0200000077fe"
    assert str(AddressPlan.parse("10.9.0.1/24", None).guest_ipv4(7)) == "10.9.0.7/24"


@pytest.mark.parametrize(
    ("ipv4", "ipv6"), [("10.9.0.2/24", None), ("10.9.0.1/25", None), ("x", None), (None, "fd00::2/64"), ("::1", None)]
)
def test_bad_address_plan(ipv4: str | None, ipv6: str | None) -> None:
    with pytest.raises(UsageError):
        AddressPlan.parse(ipv4, ipv6)
