"""What is being run, for whoever has to run it again: `run.json` in the guest's directory, which is private to root.
The guest's environment is in it, and in no other record.

Written by one version of uklaunch and read, perhaps, by the next: a key that the reader does not know is passed over,
one that is missing has its default.
"""

from __future__ import annotations

import json
from dataclasses import asdict, fields, replace
from functools import cache
from ipaddress import IPv4Address, IPv4Interface, IPv6Address, IPv6Interface, ip_address
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import state
from .errors import UklaunchError
from .guest import RunOptions
from .imagefile import ImageFile
from .model import GuestSpec

if TYPE_CHECKING:
    from cattrs import Converter

_DEFAULTS = RunOptions()
_CALLABLES = [field.name for field in fields(RunOptions) if field.name == "note" or field.name.startswith("on_")]


def path(directory: Path) -> Path:
    return directory / "run.json"


def write(directory: Path, spec: GuestSpec, options: RunOptions) -> None:
    """Raises UklaunchError."""
    options = replace(options, **{name: getattr(_DEFAULTS, name) for name in _CALLABLES})
    values = {"spec": asdict(spec), "options": asdict(options)}
    for name in _CALLABLES:
        del values["options"][name]
    state.write_file(path(directory), json.dumps(values, default=_plain))


def _plain(value: Any) -> object:
    if isinstance(value, ImageFile):
        return {"path": str(value), "stamp": value.stamp}
    return value.decode("latin-1") if isinstance(value, bytes) else str(value)


@cache
def _converter() -> Converter:
    """Made once: a takeover reads the file before it has the guest's lock, and again under it."""
    from cattrs import Converter
    from cattrs.gen import make_dict_structure_fn, override

    converter = Converter()
    for kind in (Path, IPv4Address, IPv6Address, IPv4Interface, IPv6Interface):
        converter.register_structure_hook(kind, lambda value, kind: kind(value))
    converter.register_structure_hook(IPv4Address | IPv6Address, lambda value, _: ip_address(value))
    converter.register_structure_hook(
        IPv4Address | IPv6Address | None, lambda value, _: None if value is None else ip_address(value)
    )
    converter.register_structure_hook(bytes, lambda value, _: value.encode("latin-1"))
    converter.register_structure_hook(
        ImageFile, lambda value, _: ImageFile.again(Path(value["path"]), tuple(value["stamp"]))
    )
    omitted: dict[str, Any] = {name: override(omit=True) for name in _CALLABLES}
    converter.register_structure_hook(RunOptions, make_dict_structure_fn(RunOptions, converter, **omitted))
    return converter


def read(directory: Path) -> tuple[GuestSpec, RunOptions]:
    """Raises UklaunchError if it is not there, or cannot be understood."""
    from cattrs import BaseValidationError

    converter = _converter()
    try:
        values = json.loads(path(directory).read_bytes())
        return converter.structure(values["spec"], GuestSpec), converter.structure(values["options"], RunOptions)
    except OSError as exc:
        raise state.state_error(path(directory), exc) from exc
    except (ValueError, KeyError, TypeError, RecursionError, BaseValidationError) as exc:
        raise UklaunchError(f"{path(directory)} is damaged", "end the guest: uklaunch gc --kill", repr(exc)) from exc
