"""examples/ on several ranks: same numbers as on one, and a resumed run that cannot be told from one without a stop."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import train_moe_job
from train_moe_runs import assert_same_state, assert_same_step, assert_same_to_rounding, read

from commlib.testing.spawn import check_ranks
from examples.train_moe import compare_dispatch

pytestmark = pytest.mark.multirank

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four ranks on two nodes train without a stop, and write a checkpoint on the way."""
    folder = tmp_path_factory.mktemp("train_moe")
    check_ranks("train_moe_job:straight", 4, args=[str(folder)], ranks_per_node=2, timeout_s=60)
    return folder


def test_resumed_run_is_bitwise_the_same(folder: Path) -> None:
    check_ranks("train_moe_job:resumed", 4, args=[str(folder)], ranks_per_node=2, timeout_s=60)
    straight, resumed = read(folder, "straight", 4), read(folder, "resumed", 4)
    assert len(resumed.steps) == 3
    for ours, theirs in zip(resumed.steps, straight.steps[3:], strict=True):
        assert_same_step(ours, theirs)
    assert_same_state(resumed, straight)


def test_one_rank_trains_the_same_model_as_four(folder: Path, tmp_path: Path) -> None:
    train_moe_job.straight(str(tmp_path))
    assert_same_to_rounding(read(tmp_path, "straight", 1), read(folder, "straight", 4), first_step=0)


def test_torch_in_place_of_commlib_trains_the_same_model(folder: Path, tmp_path: Path) -> None:
    check_ranks("train_moe_job:by_torch", 4, args=[str(tmp_path)], ranks_per_node=2, timeout_s=60)
    assert_same_to_rounding(read(tmp_path, "torch", 4), read(folder, "straight", 4), first_step=0)


def test_one_rank_goes_on_from_the_checkpoint_of_four(folder: Path) -> None:
    train_moe_job.resumed(str(folder))
    assert_same_to_rounding(read(folder, "resumed", 1), read(folder, "straight", 4), first_step=3)


def test_overlap_and_sharding_change_no_bit_of_each_other(folder: Path, tmp_path: Path) -> None:
    """Bits are compared on the ranks; here sharded against whole, and both against the other run of three steps."""
    check_ranks("train_moe_job:ways", 4, args=[str(tmp_path)], ranks_per_node=2, timeout_s=90)
    whole, sharded = read(tmp_path, "whole", 4), read(tmp_path, "sharded", 4)
    assert len(whole.steps) == 3
    assert_same_to_rounding(sharded, whole, first_step=0)
    for ours, theirs in zip(whole.steps, read(folder, "straight", 4).steps, strict=False):
        assert ours["main"] == pytest.approx(theirs["main"], rel=2e-6)


def test_checkpoint_of_eight_ranks_in_the_background(tmp_path: Path) -> None:
    """Bit-exact on eight ranks; the same state, and to rounding the same run, on four ranks in two rows."""
    check_ranks("train_moe_job:saved_in_background", 8, args=[str(tmp_path)], ranks_per_node=4, timeout_s=120)
    straight, resumed = read(tmp_path, "straight", 8), read(tmp_path, "resumed", 8)
    for ours, theirs in zip(resumed.steps, straight.steps, strict=True):
        assert_same_step(ours, theirs)
    assert_same_state(resumed, straight)
    check_ranks("train_moe_job:loaded_by_fewer", 4, args=[str(tmp_path)], ranks_per_node=2, timeout_s=60)
    assert_same_state(read(tmp_path, "start", 4), read(tmp_path, "start", 8), with_held_out=False)
    assert_same_to_rounding(read(tmp_path, "resumed", 4), straight, first_step=0)


def test_later_bytes_do_not_reach_earlier_predictions() -> None:
    train_moe_job.whole_model_is_causal()


def output_of(*command: str) -> str:
    """What a module prints as two ranks; it must succeed."""
    done = subprocess.run(
        [ROOT / "launch" / "mpirun", "-n", "2", sys.executable, "-m", *command],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("options", [[], ["--fp8"]])
def test_overlap_figures_compare_all_ways(options: list[str]) -> None:
    """Gradients of all ways are compared inside; here that every way has its line."""
    out = output_of("examples.overlap_figures", "--tokens", "64", "--iterations", "2", *options)
    ways = ["in turn", "overlapped", "replaced by nothing", *([] if options else ["torch"])]
    for way in ways:
        assert re.search(rf"^{way} +[0-9.]+ ms +[0-9.]+ x overlapped$", out, re.MULTILINE), out
    assert re.search(r"covers: [0-9.]+% of the overlapped step", out), out


def test_compare_dispatch_shows_all_ways() -> None:
    """Losses and gradients are compared inside; here that every way has its line."""
    out = output_of("examples.train_moe.compare_dispatch", "--tokens", "32", "--turns", "1")
    for way in compare_dispatch.WAYS:
        line = rf"^{way.name} +[0-9.]+ +[0-9,]+ +[0-9.]+ +[0-9.]+ +[0-9.]+$"
        assert re.search(line, out, re.MULTILINE), out
    # Sums of four rows in another order: were nothing different, the ways would be one and the same.
    found = re.search(rf"^{compare_dispatch.TORCH.name}: within ([0-9.e-]+) of", out, re.MULTILINE)
    assert found and float(found[1]) > 0, out


@pytest.mark.parametrize("way", ["torch", "overlapped"])
def test_compare_dispatch_notices_wrong_gradients(way: str) -> None:
    check_ranks("train_moe_job:compared_with_wrong_gradients", 2, args=[way], timeout_s=60)


@pytest.mark.parametrize("script", ["dispatch_combine.py", "moe_layer.py", "fp8_activations.py"])
def test_small_examples_check_themselves(script: str) -> None:
    for result in check_ranks(str(EXAMPLES / script), 4, launcher="mpirun", timeout_s=60):
        assert f"rank {result.rank} of 4" in result.stdout
