"""Holds docs/design.md, section 5 (layers) against the imports and `#include`s, and the rules on files of section 7."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "commlib"
NATIVE = ROOT / "native"

MAX_LINES = 450

L0 = {"errors", "env", "config", "cache"}
L1 = {"topology", "routing", "layout", "quant", "payload", "traffic", "launch_plan", "tuned_plans"}
L2 = {"bootstrap", "memory", "transport", "fabric"}
NATIVE_MODULE = {"_native"}
L5 = {"handle", "executor", "cpu_executor", "runtime", "pending", "faults", "trace"}
L6 = {"ops", "graph_breaks", "overlap", "experts"}

# Module of commlib -> modules of commlib that it may import. Modules of one layer may import one another.
PYTHON_TABLE: dict[str, set[str]] = {
    **dict.fromkeys(L0, L0),
    **dict.fromkeys(L1, L0 | L1),
    **dict.fromkeys(L2, L0 | L1 | L2 | NATIVE_MODULE),
    **dict.fromkeys(L5, L0 | L1 | L2 | NATIVE_MODULE | L5),
    # Loads the executor of its device.
    "runtime": L0 | L1 | L2 | L5 | {"cuda"},
    **dict.fromkeys(L6, L0 | L1 | L5 | L6),
    # Load the fused gate and the kernels of casts.
    **dict.fromkeys(("ops", "experts"), L0 | L1 | L5 | L6 | {"cuda"}),
    **{
        name: L0 | L1 | L2 | NATIVE_MODULE | L5 | L6 | {name, "cuda", "reference", "testing"}
        for name in ("cli", "compat")
    },
    # The GPU executor: the same level as the native CPU executor.
    "cuda": L0 | L1 | L2 | {"handle", "executor", "trace", "cuda"},
    "reference": L0,
    "testing": L0 | L1 | {"testing"},
    # The front door: public names, resolved lazily where they are heavy.
    "__init__": L0 | L1 | L5 | L6,
}

# What only the standard library may serve, and what must work without a process group or a device.
STANDARD_LIBRARY_ONLY = L0
PURE = {
    "topology": set(),
    "layout": {"numpy"},
    "traffic": {"numpy"},
    "launch_plan": set(),
    "routing": {"torch"},
    "quant": {"torch"},
    "reference": {"torch"},
}

# Folder of native/ -> folders that it may include. Transports see commands and regions, never tokens or experts
# (layout); executors see channels, never a transport.
NATIVE_TABLE: dict[str, set[str]] = {
    "common": set(),
    "layout": {"common"},
    "memory": {"common", "layout"},
    "channel": {"common", "layout", "memory"},
    "transport": {"common", "memory", "channel"},
    "proxy": {"common", "layout", "memory", "channel", "transport"},
    "cpu": {"common", "layout", "memory", "channel", "proxy"},
    "cuda": {"common", "layout", "channel"},
    "bindings": {"common", "layout", "memory", "channel", "transport", "proxy", "cpu"},
    # Programs that test the folders above; nothing includes them.
    # cuda: kernels that run on a CPU there.
    "tests": {"common", "layout", "memory", "channel", "transport", "proxy", "cpu", "cuda"},
}

FORBIDDEN_STEMS = {"utils", "util", "helpers", "helper", "common"}


def python_files() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def native_files() -> list[Path]:
    return sorted(path for path in NATIVE.rglob("*") if path.suffix in {".hpp", ".h", ".cc", ".cpp", ".cuh", ".cu"})


def module_of(path: Path, package: Path = PACKAGE) -> str:
    """The unit of the layer table: the top-level module or package that holds `path`."""
    first = path.relative_to(package).parts[0]
    return first.removesuffix(".py")


def imported_names(tree: ast.AST, package: list[str]) -> Iterator[str]:
    """Dotted names of everything imported, at any depth: an import inside a function is a dependency, too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name != "commlib" or alias.asname)
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "commlib":
            # After `import commlib`, which by itself says nothing: what is taken from it counts, __file__ excepted.
            if not node.attr.startswith("__"):
                yield f"commlib.{node.attr}"
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else []
            prefix = ".".join([*base, *([node.module] if node.module else [])])
            yield from (f"{prefix}.{alias.name}" for alias in node.names)


def python_violations(module: str, source: str, package: list[str]) -> list[str]:
    """What `source`, a file of `module`, imports against the table."""
    if module not in PYTHON_TABLE:
        return [f"module commlib.{module} is not in the layer table"]
    found = []
    for name in imported_names(ast.parse(source), package):
        parts = name.split(".")
        if parts[0] == "commlib":
            target = parts[1] if len(parts) > 1 else "__init__"
            if target == module:
                continue
            if target not in PYTHON_TABLE and target not in NATIVE_MODULE:
                target = "__init__"
            if target not in PYTHON_TABLE[module]:
                found.append(f"commlib.{module} may not import commlib.{target} ({name})")
        elif parts[0] not in sys.stdlib_module_names:
            if module in STANDARD_LIBRARY_ONLY:
                found.append(f"commlib.{module} may import the standard library only, not {name}")
            elif module in PURE and parts[0] not in PURE[module]:
                found.append(f"commlib.{module} may import {sorted(PURE[module])} only, not {name}")
            elif module in PURE and name.startswith(("torch.distributed", "torch.cuda")):
                found.append(f"commlib.{module} is pure and may not import {name}")
    return found


INCLUDE = re.compile(r'^[ \t]*#[ \t]*include[ \t]*"([^"]+)"', re.MULTILINE)


def native_violations(folder: str, source: str) -> list[str]:
    if folder not in NATIVE_TABLE:
        return [f"folder native/{folder} is not in the layer table"]
    found = []
    for name in INCLUDE.findall(source):
        target = name.split("/")[0]
        if "/" not in name or target not in NATIVE_TABLE:
            found.append(f'#include "{name}" is not written relative to native/')
        elif target not in NATIVE_TABLE[folder] | {folder}:
            found.append(f'native/{folder} may not include native/{target} ("{name}")')
    return found


def reads_environment(source: str) -> bool:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and node.attr in ("environ", "environb", "getenv", "getenvb"):
            return True
        if isinstance(node, ast.ImportFrom) and node.module == "os":
            return any(alias.name in ("environ", "environb", "getenv", "getenvb") for alias in node.names)
    return False


@pytest.mark.parametrize("path", python_files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_python_layers(path: Path) -> None:
    package = ["commlib", *path.relative_to(PACKAGE).parts[:-1]]
    assert python_violations(module_of(path), path.read_text(), package) == []


@pytest.mark.parametrize("path", native_files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_native_layers(path: Path) -> None:
    assert native_violations(path.relative_to(NATIVE).parts[0], path.read_text()) == []


def test_files_are_found() -> None:
    assert {"errors", "reference", "testing"} <= {module_of(path) for path in python_files()}


@pytest.mark.parametrize(
    ("module", "source", "message"),
    [
        ("config", "import torch", "standard library only, not torch"),
        ("env", "from commlib import layout", "may not import commlib.layout"),
        ("env", "from . import layout", "may not import commlib.layout"),
        ("env", "from .layout import row_bytes", "may not import commlib.layout"),
        ("topology", "def f():\n    import commlib.runtime", "may not import commlib.runtime"),
        ("topology", "import numpy", "only, not numpy"),
        ("layout", "import torch", "only, not torch"),
        ("routing", "import torch.distributed as dist", "is pure and may not import torch.distributed"),
        ("quant", "from torch import cuda", "is pure and may not import torch.cuda"),
        ("reference", "from commlib.quant import quantize_e4m3", "may not import commlib.quant"),
        ("testing", "from commlib.reference import dispatch", "may not import commlib.reference"),
        ("runtime", "from commlib.ops import dispatch", "may not import commlib.ops"),
        ("ops", "from commlib import _native", "may not import commlib._native"),
        ("overlap", "from commlib import cpu_executor, cuda", "may not import commlib.cuda"),
        ("memory", "from commlib import Runtime", "may not import commlib.__init__"),
        ("testing", "import commlib\ncommlib.Runtime", "may not import commlib.__init__"),
        ("testing", "import commlib as c", "may not import commlib.__init__"),
        ("testing", "import commlib\ncommlib.ops.dispatch", "may not import commlib.ops"),
        ("extras", "", "commlib.extras is not in the layer table"),
    ],
)
def test_the_python_rules_bite(module: str, source: str, message: str) -> None:
    violations = python_violations(module, source, ["commlib"])
    assert len(violations) == 1 and message in violations[0]


@pytest.mark.parametrize(
    ("folder", "source", "message"),
    [
        ("layout", '#include "transport/ucx.hpp"', "native/layout may not include native/transport"),
        ("channel", '# include "transport/ucx.hpp"', "native/channel may not include native/transport"),
        ("transport", '\t#include "layout/record.hpp"', "native/transport may not include native/layout"),
        ("transport", '#include "cpu/executor.hpp"', "native/transport may not include native/cpu"),
        ("cpu", '#include "transport/transport.hpp"', "native/cpu may not include native/transport"),
        ("common", '#include "layout/record.hpp"', "native/common may not include native/layout"),
        ("cpu", '#include "executor.hpp"', "not written relative to native/"),
        ("cpu", '#include "../cpu/executor.hpp"', "not written relative to native/"),
        ("proxy", '#include "tests/engine_group.hpp"', "native/proxy may not include native/tests"),
        ("gpu", "", "native/gpu is not in the layer table"),
    ],
)
def test_the_native_rules_bite(folder: str, source: str, message: str) -> None:
    violations = native_violations(folder, source)
    assert len(violations) == 1 and message in violations[0]


def test_files_are_not_named_after_nothing() -> None:
    assert [str(path) for path in python_files() if path.stem in FORBIDDEN_STEMS] == []


def test_files_stay_short() -> None:
    tests = sorted((ROOT / "tests").rglob("*.py"))
    lengths = {path: len(path.read_text().splitlines()) for path in [*python_files(), *native_files(), *tests]}
    assert {str(path.relative_to(ROOT)): lines for path, lines in lengths.items() if lines > MAX_LINES} == {}


def test_only_env_reads_the_environment() -> None:
    allowed = {"env", "testing"}
    readers = [path for path in python_files() if reads_environment(path.read_text())]
    assert [str(path) for path in readers if module_of(path) not in allowed] == []
    assert [module_of(path) for path in readers if module_of(path) == "env"] == ["env"]


@pytest.mark.parametrize(
    "source",
    ["import os\nos.environ['A']", "from os import environ", "from os import getenv", "import os\nos.getenv('A')"],
)
def test_reads_environment_sees_it(source: str) -> None:
    assert reads_environment(source)
    assert not reads_environment("import os\nos.stat('/')\nfrom os import path")


def run_python(program: str) -> str:
    command = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r}); {program}"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def test_importing_commlib_is_light() -> None:
    heavy = run_python(
        "import commlib; print(sorted({'torch', 'commlib._native', 'zmq', 'mpi4py', 'cupy'} & set(sys.modules)))"
    )
    assert heavy == "[]"


def test_lazy_names_load_at_first_use() -> None:
    program = (
        "import commlib; assert 'torch' not in sys.modules; commlib.GateConfig(num_experts=2, num_topk=1); "
        "assert 'torch' in sys.modules; assert commlib.routing.gate is commlib.gate; print(commlib.__version__)"
    )
    assert run_python(program) == "0.1.0"
    missing = "import commlib\ntry: commlib.nothing\nexcept AttributeError as error: print(error)"
    assert run_python(f"exec({missing!r})") == "module 'commlib' has no attribute 'nothing'"
