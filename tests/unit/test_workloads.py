from typing import Any

import pytest
import torch

from commlib.errors import ConfigError
from commlib.testing.workloads import WORKLOADS, Workload, make_workload


def make(name: str, **changes: Any) -> Workload:
    sizes: dict[str, Any] = {"num_ranks": 4, "num_experts": 32, "num_topk": 4, "num_tokens": 200, "max_nodes": 2}
    return make_workload(name, **(sizes | changes))


@pytest.mark.parametrize("name", WORKLOADS)
def test_shapes_and_rules(name: str) -> None:
    workload = make(name)
    assert workload.num_ranks == len(workload.topk_idx) == len(workload.topk_weights) == 4
    for count, idx, weights in zip(workload.num_tokens, workload.topk_idx, workload.topk_weights, strict=True):
        assert idx.shape == weights.shape == (count, workload.num_topk)
        assert idx.dtype == torch.int64 and weights.dtype == torch.float32
        assert bool(((weights > 0) & (weights < 1)).all())
        for row in idx.tolist():
            experts = [e for e in row if e != -1]
            assert len(set(experts)) == len(experts) and all(0 <= e < workload.num_experts for e in experts)


@pytest.mark.parametrize("name", WORKLOADS)
def test_depends_on_the_seed_and_nothing_else(name: str) -> None:
    first, again, other = make(name, seed=1), make(name, seed=1), make(name, seed=2)
    torch.manual_seed(0)
    assert all(torch.equal(a, b) for a, b in zip(first.topk_idx, again.topk_idx, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(first.topk_weights, again.topk_weights, strict=True))
    assert not torch.equal(first.topk_weights[3][:8], other.topk_weights[3][:8])
    assert not torch.equal(first.topk_weights[3][:8], first.topk_weights[1][:8])


def load(workload: Workload) -> list[int]:
    flat = torch.cat([idx.reshape(-1) for idx in workload.topk_idx])
    return sorted(torch.bincount(flat[flat >= 0], minlength=workload.num_experts).tolist())


def test_what_the_names_promise() -> None:
    assert load(make("skewed"))[-1] > 2 * load(make("uniform"))[-1]
    masked = torch.cat(make("masked").topk_idx)
    assert bool((masked == -1).all(1).any()) and bool(((masked == -1).any(1) & (masked != -1).any(1)).any())
    assert make("empty_rank").num_tokens == (200, 200, 0, 200)
    uneven = make("uneven").num_tokens
    assert len(set(uneven)) > 1 and max(uneven) <= 200
    hot = torch.cat(make("hot").topk_idx)
    assert any(bool((hot == e).any(1).all()) for e in range(32))
    one = make("one_expert_per_rank", num_topk=8)
    assert (one.num_experts, one.num_topk) == (4, 4)
    assert bool((torch.cat(make("all_masked").topk_idx) == -1).all())


@pytest.mark.parametrize(("nodes", "max_nodes"), [((0, 0, 1, 1), 1), ((0, 1, 2, 3), 2), ((0, 0, 0, 1), 1), (None, 3)])
def test_node_limited(nodes: tuple[int, ...] | None, max_nodes: int) -> None:
    workload = make("node_limited", node_of_rank=nodes, max_nodes=max_nodes)
    of_rank = torch.tensor(nodes or (0, 1, 2, 3))
    per_token = [set(row) for idx in workload.topk_idx for row in of_rank[idx // 8].tolist()]
    assert max(map(len, per_token)) == max_nodes
    assert set.union(*per_token) == set(of_rank.tolist())


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("unknown", {}, "workload 'unknown' is not one of uniform"),
        ("uniform", {"num_experts": 30}, "num_experts=30 is not a positive multiple of num_ranks=4"),
        ("uniform", {"num_topk": 33}, r"num_topk=33 is not in 1\.\.num_experts=32"),
        ("uniform", {"num_tokens": -1}, "num_tokens=-1 is below 0"),
        ("node_limited", {"max_nodes": 0}, "max_nodes=0 nodes can hold only 0 experts"),
        ("node_limited", {"num_topk": 17}, "max_nodes=2 nodes can hold only 16 experts"),
    ],
)
def test_errors(name: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make(name, **changes)
