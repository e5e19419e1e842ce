"""Finding and reading profiles.

A name is looked for among the user's profiles, then among those of the package: a user's file hides a built-in one of
the same name. ``extends = "NAME"`` takes every field from that profile that the file does not have; a file that
extends its own name means the built-in profile. Tables are taken whole - a number never keeps another number's source
- except the groups of independent entries in ``_GROUPS``, which are merged entry by entry.

``stacks/`` holds what devices of one software generation share; a stack is no device, and only ``extends`` finds it.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from edgetrain.errors import UsageError, near_matches
from edgetrain.profiles.profile import Profile

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

if TYPE_CHECKING:
    from importlib.resources.abc import Traversable

_GROUPS = ("rates", "software", "convolution", "elementwise")


@dataclass(frozen=True)
class _File:
    """A profile that was found: ``where`` identifies it in messages and in cycles."""

    where: str
    content: bytes
    name: str | None  # what a file in a folder of profiles has to be called
    of_user: bool = False


def profile_names() -> list[str]:
    """Names of the profiles that come with the package, sorted."""
    return _names_in(resources.files("edgetrain.profiles"))


def user_profile_folder() -> Path:
    """Where a user's own profiles are looked for.

    ``$EDGETRAIN_PROFILES``, or ``edgetrain/profiles`` in ``$XDG_CONFIG_HOME`` (default ``~/.config``).
    """
    if own := os.environ.get("EDGETRAIN_PROFILES"):
        return Path(own).expanduser()
    config = os.environ.get("XDG_CONFIG_HOME")
    return (Path(config) if config else Path.home() / ".config") / "edgetrain" / "profiles"


def user_profile_names() -> list[str]:
    """Names of the profiles in :func:`user_profile_folder`, sorted."""
    folder = user_profile_folder()
    return _names_in(folder) if folder.is_dir() else []


def load_profile(name_or_path: str | Path) -> Profile:
    """The profile called so, or the one in a file.

    Args:
        name_or_path: one of :func:`user_profile_names` or :func:`profile_names`, or the path of a ``.toml`` file.

    Raises:
        UsageError: no such profile, it contradicts itself, or what it extends is missing or goes round in a circle.
    """
    file = _open(name_or_path)
    fields = _with_inherited(file, ())
    try:
        return Profile.model_validate(fields)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        text = first["msg"].removeprefix("Value error, ")
        raise _wrong(f"profile {file.where} is wrong{f' at {key}' if key else ''}: {text}") from error


def _open(name_or_path: str | Path) -> _File:
    if isinstance(name_or_path, Path) or str(name_or_path).endswith(".toml"):
        path = Path(name_or_path)
        try:
            return _File(str(path), path.read_bytes(), None, of_user=True)
        except OSError as error:
            raise UsageError(
                found=f"profile {path} cannot be read ({error.strerror or error})",
                expected="a TOML file",
                action="check the path, or pass a name: " + ", ".join(profile_names()),
            ) from error
    file = _find(name_or_path)
    if file is None:
        raise UsageError(
            found=f"no profile is called {name_or_path!r}",
            expected=f"the path of a .toml file, or the name of a profile, built-in or in {user_profile_folder()}",
            action=near_matches(name_or_path, sorted({*profile_names(), *user_profile_names()})),
        )
    return file


def _find(name: str, *, for_user: bool = True, stacks: bool = False) -> _File | None:
    if for_user and name in user_profile_names():
        path = user_profile_folder() / f"{name}.toml"
        return _File(str(path), path.read_bytes(), name, of_user=True)
    package = resources.files("edgetrain.profiles")
    for folder in [package, package / "stacks"] if stacks else [package]:
        if name in _names_in(folder):
            return _File(name, (folder / f"{name}.toml").read_bytes(), name)
    return None


def _with_inherited(file: _File, heirs: tuple[str, ...]) -> dict[str, Any]:
    """The fields of ``file`` and of all that it extends; ``heirs`` are the files that extend it."""
    if file.where in heirs:
        circle = " -> ".join([*heirs[heirs.index(file.where) :], file.where])
        raise _wrong(f"profiles extend each other in a circle: {circle}")
    try:
        fields = tomllib.loads(file.content.decode("utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise _wrong(f"profile {file.where} is not TOML: {error}") from error
    if file.name is not None and fields.get("name") != file.name:
        raise _wrong(f"profile {file.where} is wrong at name: {fields.get('name')!r} in a file called {file.name}.toml")
    wanted = fields.get("extends")
    if not isinstance(wanted, str):
        return fields
    # built-in profiles build on built-in ones, and a file that refines a built-in profile may keep its name
    parent = _find(wanted, for_user=file.of_user and wanted != fields.get("name"), stacks=True)
    if parent is None:
        known = sorted({*profile_names(), *user_profile_names(), *_stack_names()})
        raise UsageError(
            found=f"profile {file.where} extends {wanted!r}, which does not exist",
            expected="the name of a profile",
            action=near_matches(wanted, known),
        )
    inherited = _with_inherited(parent, (*heirs, file.where))
    inherited.pop("name", None)
    for group in _GROUPS:
        own, theirs = fields.get(group), inherited.get(group)
        if isinstance(own, dict) and isinstance(theirs, dict):
            fields[group] = {**theirs, **own}
    return {**inherited, **fields}


def _names_in(folder: Traversable) -> list[str]:
    return sorted(file.name.removesuffix(".toml") for file in folder.iterdir() if file.name.endswith(".toml"))


def _stack_names() -> list[str]:
    return _names_in(resources.files("edgetrain.profiles") / "stacks")


def _wrong(found: str) -> UsageError:
    return UsageError(
        found=found,
        expected="the form described in edgetrain.profiles",
        action="correct the file; edgetrain/profiles/gtx750.toml is an example",
    )
