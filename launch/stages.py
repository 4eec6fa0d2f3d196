"""The stages of launch/test: runs them in order, counts what ran, prints a table.

Run through launch/test (or launch/dev), which sets up the environment first.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import time
import traceback
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "build" / "test-results"
DESELECTED = re.compile(r"\b(\d+) deselected\b")
DOCTEST_CASES = re.compile(r"\[doctest\] test cases:\s*\d+ \|\s*(\d+) passed \|\s*(\d+) failed \|\s*(\d+) skipped")


@dataclass
class Counts:
    """What one stage ran; a stage with nothing passed has failed."""

    passed: int = 0
    failed: int = 0
    skipped: int = 0
    deselected: int = 0

    def __iadd__(self, other: Counts) -> Counts:
        self.passed += other.passed
        self.failed += other.failed
        self.skipped += other.skipped
        self.deselected += other.deselected
        return self

    @property
    def is_good(self) -> bool:
        return self.passed > 0 and self.failed == 0 and self.skipped == 0


def run(command: Sequence[str | Path], environment: Mapping[str, str] | None = None) -> tuple[int, str]:
    """Runs a command in the root of the repository and shows its output; returns exit status and output."""
    words = [str(word) for word in command]
    print("+", *words, flush=True)
    with subprocess.Popen(
        words,
        cwd=ROOT,
        env={**os.environ, **(environment or {})},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    ) as process:
        assert process.stdout is not None
        lines = []
        for line in process.stdout:
            print(line, end="", flush=True)
            lines.append(line)
    return process.returncode, "".join(lines)


def check(*commands: Sequence[str | Path]) -> Counts:
    """Each command is one test."""
    counts = Counts()
    for command in commands:
        status, _ = run(command)
        counts += Counts(passed=1) if status == 0 else Counts(failed=1)
    return counts


def pytest(stage: str, *arguments: str, environment: Mapping[str, str] | None = None) -> Counts:
    """One run of pytest, counted from its JUnit report."""
    report = RESULTS / f"{stage}.xml"
    report.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", "-q", "--durations=5", f"--junitxml={report}", *arguments]
    status, output = run(command, environment)
    if not report.exists():
        return Counts(failed=1)
    counts = Counts(deselected=sum(int(number) for number in DESELECTED.findall(output)))
    for suite in ElementTree.parse(report).getroot().iter("testsuite"):
        number = {name: int(suite.get(name, "0")) for name in ("tests", "failures", "errors", "skipped")}
        failed = number["failures"] + number["errors"]
        counts += Counts(number["tests"] - failed - number["skipped"], failed, number["skipped"])
    if status != 0 and counts.failed == 0:
        counts.failed = 1  # a crash, or nothing collected
    return counts


def build_native_tests(sanitizer: str, *targets: str) -> Path | None:
    """Builds the native tests, or some of them; the build folder, None after a failure."""
    build = ROOT / "build" / f"native-tests{'-' if sanitizer else ''}{sanitizer}"
    configure = ["cmake", "-G", "Ninja", "-S", "native", "-B", build, f"-DPython_EXECUTABLE={sys.executable}"]
    # Without a sanitizer the Python module is built as well: warnings in its sources are errors here, too.
    python = "OFF" if sanitizer else "ON"
    options = [f"-DCOMMLIB_PYTHON={python}", "-DCOMMLIB_TESTS=ON", "-DCOMMLIB_WERROR=ON"]
    options.append(f"-DCOMMLIB_SANITIZE={sanitizer}")
    only = ["--target", *targets] if targets else []
    for command in ([*configure, *options, "-Wno-dev"], ["cmake", "--build", build, "-j", "2", *only]):
        if run(command)[0] != 0:
            return None
    return build


def native_tests(sanitizer: str = "") -> Counts:
    """Builds and runs the native tests; counts doctest's cases."""
    build = build_native_tests(sanitizer)
    if build is None:
        return Counts(failed=1)
    report = RESULTS / f"{build.name}.xml"
    report.unlink(missing_ok=True)
    ctest: list[str | Path] = [
        "ctest",
        "--test-dir",
        build,
        "--output-on-failure",
        "--no-tests=error",
        *("-j", "2"),  # the longest ones mostly wait for time-outs
        "--output-junit",
        report,
    ]
    ctest += ["--test-output-size-passed", "1000000"]  # the summary is at the end
    status, _ = run(ctest)
    if not report.exists():
        return Counts(failed=1)
    counts = Counts()
    for case in ElementTree.parse(report).getroot().iter("testcase"):
        is_passed = case.get("status") == "run"
        cases = DOCTEST_CASES.search(case.findtext("system-out") or "")
        if cases is None:  # a program without cases of its own counts as one, by its exit status
            counts += Counts(passed=1) if is_passed else Counts(failed=1)
            continue
        counts += Counts(*(int(number) for number in cases.groups()))
        if not is_passed and cases[2] == "0":
            counts.failed += 1  # all cases passed, then the process died (a leak, a race at exit)
    if status != 0 and counts.failed == 0:
        counts.failed = 1
    return counts


def lint() -> Counts:
    """Style and types."""
    sources = sorted(str(path) for pattern in ("*.cc", "*.hpp") for path in (ROOT / "native").rglob(pattern))
    return check(
        ["ruff", "check", "."],
        ["ruff", "format", "--check", "."],
        ["mypy"],
        ["clang-format", "--dry-run", "-Werror", *sources],
    )


def native() -> Counts:
    """Native tests, optimised, with assertions."""
    return native_tests()


def sanitize() -> Counts:
    """Native tests under ASan/UBSan and under TSan."""
    counts = native_tests("address")
    counts += native_tests("thread")
    return counts


def unit() -> Counts:
    """Tests in one process, and whatever is not in tests/multirank, tests/compat and tests/rdma."""
    ignored = [f"--ignore=tests/{folder}" for folder in ("multirank", "compat", "rdma")]
    return pytest("unit", "tests", *ignored, "-m", "not gpu and not root")


def multirank() -> Counts:
    """Tests that start several ranks on this machine."""
    return pytest("multirank", "tests/multirank", "-m", "not gpu and not root")


def compat() -> Counts:
    """The stand-in for deep_ep, by itself and under trainers from PyPI."""
    return pytest("compat", "tests/compat", "-m", "not gpu and not root")


def openmpi() -> Counts:
    """The tests that start ranks with mpirun, with the system's Open MPI instead of the environment's MPICH."""
    environment = {"MPIRUN": str(ROOT / "launch" / "openmpi")}
    if run(["launch/openmpi", "--version"])[0] != 0:
        return Counts(failed=1)
    return pytest("openmpi", "tests/multirank", "-k", "mpirun", "-m", "not gpu and not root", environment=environment)


def nodes() -> Counts:
    """Tests on fake hosts in network namespaces (launch/nodes)."""
    return pytest("nodes", "tests", "-m", "root and not gpu")


def rdma() -> Counts:
    """The verbs transport over soft-RoCE, in a machine of its own (launch/rdma-guest)."""
    build = build_native_tests("", "verbs_test")
    return Counts(failed=1) if build is None else pytest("rdma", "tests/rdma", "-m", "not gpu")


def demo_smoke() -> Counts:
    """A few steps of launch/demo, with its pictures."""
    out = ROOT / "out" / "demo-smoke"
    shutil.rmtree(out, ignore_errors=True)
    counts = check(["launch/demo", "--out", out, "--steps", "3", "--warmup-steps", "1", "--global-batch", "4"])
    pictures = list(out.glob("*.png"))
    print("pictures:", *pictures)
    counts += Counts(passed=1) if pictures else Counts(failed=1)
    return counts


STAGES: dict[str, Callable[[], Counts]] = {
    "lint": lint,
    "native": native,
    "sanitize": sanitize,
    "unit": unit,
    "multirank": multirank,
    "compat": compat,
    "openmpi": openmpi,
    "nodes": nodes,
    "rdma": rdma,
    "demo-smoke": demo_smoke,
}
ROOT_STAGES = ("nodes", "rdma")


def main() -> int:
    parser = argparse.ArgumentParser(prog="launch/test", description="Runs all checks, or the named stages.")
    parser.add_argument("--no-root", action="store_true", help="leave out what needs root")
    parser.add_argument("stages", nargs="*", metavar="stage", help=" ".join(STAGES))
    parser.add_argument("--check-only", action="store_true", help=argparse.SUPPRESS)  # launch/test, before its set-up
    arguments = parser.parse_args()
    if unknown := [stage for stage in arguments.stages if stage not in STAGES]:
        parser.error(f"unknown stage {unknown[0]!r}; stages: {' '.join(STAGES)}")
    if arguments.check_only:
        return 0
    wanted = [stage for stage in STAGES if not arguments.stages or stage in arguments.stages]
    is_root = os.geteuid() == 0 and not arguments.no_root
    not_run = [stage for stage in wanted if stage in ROOT_STAGES and not is_root]

    RESULTS.mkdir(parents=True, exist_ok=True)
    results: dict[str, tuple[float, Counts]] = {}
    for stage in wanted:
        if stage in not_run:
            continue
        print(f"\n== {stage}: {STAGES[stage].__doc__}", flush=True)
        started = time.monotonic()
        try:
            counts = STAGES[stage]()
        except Exception:  # the other stages still run
            traceback.print_exc()
            counts = Counts(failed=1)
        seconds = time.monotonic() - started
        print(f"== {stage}: {'ok' if counts.is_good else 'FAILED'} after {seconds:.1f} s", flush=True)
        results[stage] = seconds, counts

    total = Counts()
    print(f"\n{'stage':<12}{'seconds':>9}{'passed':>9}{'failed':>9}{'skipped':>9}{'deselected':>12}")
    for stage, (seconds, counts) in results.items():
        total += counts
        print(
            f"{stage:<12}{seconds:>9.1f}{counts.passed:>9}{counts.failed:>9}{counts.skipped:>9}{counts.deselected:>12}"
            f"  {'ok' if counts.is_good else 'FAILED'}"
        )
    for stage in not_run:
        print(f"{stage:<12} not run: needs root")
    is_good = all(counts.is_good for _, counts in results.values())
    is_good = is_good and bool(results) and (not not_run or arguments.no_root)
    print(f"\n{total.passed} passed, {total.failed} failed", flush=True)
    return 0 if is_good else 1


if __name__ == "__main__":
    sys.exit(main())
