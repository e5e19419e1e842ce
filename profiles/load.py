"""Finding and reading profiles."""

from __future__ import annotations

import sys
from importlib import resources
from pathlib import Path

from pydantic import ValidationError

from edgetrain.errors import UsageError, near_matches
from edgetrain.profiles.profile import Profile

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


def profile_names() -> list[str]:
    """Names of the profiles that come with the package, sorted."""
    files = resources.files("edgetrain.profiles").iterdir()
    return sorted(file.name.removesuffix(".toml") for file in files if file.name.endswith(".toml"))


def load_profile(name_or_path: str | Path) -> Profile:
    """The profile called so, or the one in a file.

    Args:
        name_or_path: one of :func:`profile_names`, or the path of a ``.toml`` file.

    Raises:
        UsageError: no such profile, or the file is none.
    """
    if isinstance(name_or_path, Path) or str(name_or_path).endswith(".toml"):
        path = Path(name_or_path)
        try:
            return _parse(path.read_text(encoding="utf-8"), str(path))
        except OSError as error:
            raise UsageError(
                found=f"profile {path} cannot be read ({error.strerror or error})",
                expected="a TOML file",
                action="check the path, or pass a name: " + ", ".join(profile_names()),
            ) from error
    if name_or_path not in profile_names():
        raise UsageError(
            found=f"no profile is called {name_or_path!r}",
            expected="the name of a profile, or the path of a .toml file",
            action=near_matches(name_or_path, profile_names()),
        )
    file = resources.files("edgetrain.profiles") / f"{name_or_path}.toml"
    return _parse(file.read_text(encoding="utf-8"), name_or_path)


def _parse(text: str, where: str) -> Profile:
    try:
        return Profile.model_validate(tomllib.loads(text))
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        found = f"profile {where} is wrong at {key or 'top level'}: {first['msg']}"
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        found = f"profile {where} is not TOML: {error}"
    raise UsageError(
        found=found,
        expected="the form described in edgetrain.profiles",
        action="correct the file; edgetrain/profiles/gtx750.toml is an example",
    )
