"""`-p`, as people write it."""

from __future__ import annotations

import pytest

from launcher.errors import UsageError
from launcher.publish import Publish


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("8080:80", "8080:80/tcp"),
        ("8080:80/tcp", "8080:80/tcp"),
        ("53:5353/udp", "53:5353/udp"),
        ("127.0.0.1:8080:80", "127.0.0.1:8080:80/tcp"),
        ("[::1]:53:53/udp", "[::1]:53:53/udp"),
        ("[2001:db8:0::1]:1:65535", "[2001:db8::1]:1:65535/tcp"),
        ("0.0.0.0:8080:80", "8080:80/tcp"),
        ("[::]:8080:80", "8080:80/tcp"),
    ],
)
def test_good(text: str, canonical: str) -> None:
    item = Publish.parse(text)
    assert str(item) == canonical
    assert Publish.parse(canonical) == item


@pytest.mark.parametrize(
    "text",
    [
        "",
        "80",
        ":80",
        "80:",
        "0:80",
        "80:0",
        "70000:80",
        "80:70000",
        "80:80/sctp",
        "80/udp:80",
        "a:b",
        "1.2.3:80:80",
        "localhost:80:80",
        "::1:80:80",
        "[127.0.0.1]:80:80",
        "[::1]80:80",
        "[fe80::1%eth0]:80:80",
        "1.2.3.4:80:80:80",
        "8000-8010:80",
        "80:80 ",
        "٨٠:80",
        ":80:80",
    ],
)
def test_bad(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        Publish.parse(text)
    assert "\n" not in caught.value.message
    assert repr(text) in caught.value.message
