"""Stand-ins for libraries that trainers already import, so that they run on commlib without a changed line.

`deep_ep` is the only one: `install()` in the program, or `PYTHONPATH=$(python -m commlib.compat)` around it.
docs/deep_ep.md says what it covers.
"""

from __future__ import annotations

import importlib
import pkgutil
import sys
from pathlib import Path
from types import ModuleType

from commlib.errors import ConfigError

__all__ = ["install", "search_path"]

_NAME = "deep_ep"
_PACKAGE = f"{__name__}.{_NAME}"


def search_path() -> str:
    """The directory that makes `import deep_ep` find this stand-in, for PYTHONPATH."""
    return str(Path(__file__).resolve().parent / "on_path")


def install() -> ModuleType:
    """Makes `import deep_ep` in this process, and imports of its parts, return `commlib.compat.deep_ep`.

    Returns:
        The module. Calling it again changes nothing.

    Raises:
        ConfigError: another deep_ep has been imported already, so somebody may hold it.
    """
    package = importlib.import_module(_PACKAGE)
    present = sys.modules.get(_NAME)
    if present is not None and present is not package:
        raise ConfigError(
            f"{_NAME} is imported already, from {getattr(present, '__file__', None)}; "
            "call commlib.compat.install() before anything imports it"
        )
    names = [_PACKAGE, *(part.name for part in pkgutil.walk_packages(package.__path__, f"{_PACKAGE}."))]
    for name in names:
        # The same objects under both names: an instance made by one client is one to the others.
        sys.modules[_NAME + name.removeprefix(_PACKAGE)] = importlib.import_module(name)
    return package
