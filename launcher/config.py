"""A guest's file for `uklaunch run --config`: TOML whose keys are the options of `run`, and those of bundle manifests.

    image = "/srv/images/web.img"    # paths start at the file's directory
    pod = "shop"
    memory = "256M"
    ports = ["8080"]                 # --expose, as bundles call it
    publish = ["80:8080"]
    env = { MODE = "edge" }
    stop_timeout = 20                # --stop-timeout

The guest is named as the file, unless `name` says otherwise.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import UsageError

_AS_IN_BUNDLES = {"ports": "expose"}  # our key -> the option's


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """An option of the command line's, with a value."""

    flag: str
    many: bool = False
    path: bool = False
    switch: bool = False  # true or false


def arguments(file: Path, options: Mapping[str, Option]) -> list[str]:
    """The file as arguments. `options` is by key. Raises UsageError, which names file and key."""
    import tomllib

    try:
        values = tomllib.loads(file.read_text())
    except OSError as exc:
        raise UsageError(f"cannot read {file}: {exc.strerror}", "see README.md, systemd") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as exc:
        raise UsageError(f"{file}: {exc}") from None
    known = {key: option for key, option in options.items() if key not in _AS_IN_BUNDLES.values()}
    known |= {key: options[name] for key, name in _AS_IN_BUNDLES.items()}
    values.setdefault("name", file.stem)
    found = list[str]()
    for key, value in values.items():
        if key == "image":
            found.append(_image(file, value))
        elif key in known and known[key].switch:
            if not isinstance(value, bool):
                raise UsageError(f"{file}: {key} is neither true nor false")
            found += [known[key].flag] if value else []
        elif key in known:
            found += (f"{known[key].flag}={text}" for text in _texts(file, key, value, known[key]))
        else:
            raise UsageError(f"{file}: {key} is unknown", _nearest(key, ("image", *known)))
    return found


def _image(file: Path, value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise UsageError(f"{file}: image is not a text", 'write image = "..."')
    return value if value == "default" else str(file.absolute().parent / value)


def _texts(file: Path, key: str, value: Any, option: Option) -> Iterator[str]:
    if key == "env":
        if not isinstance(value, dict):
            raise UsageError(f"{file}: env is not a table", 'write env = { KEY = "value" }')
        for name, text in value.items():
            yield f"{name}={_text(file, f'env.{name}', text)}"
        return
    if isinstance(value, list) and not option.many:
        raise UsageError(f"{file}: {key} is a list", "there is one")
    for item in value if isinstance(value, list) else [value]:
        text = _text(file, key, item)
        yield str(file.absolute().parent / text) if option.path else text


def _text(file: Path, key: str, value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise UsageError(f"{file}: {key} is neither a text nor a number")
    return str(value)


def _nearest(key: str, keys: tuple[str, ...]) -> str:
    import difflib

    close = difflib.get_close_matches(key, keys, 1)
    return f"did you mean {close[0]}?" if close else f"known are {', '.join(sorted(keys))}"
