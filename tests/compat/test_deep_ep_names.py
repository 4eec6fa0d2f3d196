"""How `deep_ep` is found, and that every public name of DeepEP is accounted for in docs/deep_ep.md."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from commlib import compat
from commlib.compat import deep_ep

ROOT = Path(__file__).resolve().parent.parent.parent


def names(text: str) -> list[str]:
    return text.split()


# Public names of DeepEP 2.1.0 and 1.2.1 and of its branch hybrid-ep.
V1 = names(
    """
    __init__ destroy is_sm90_compiled set_num_sms capture get_low_latency_rdma_size_hint get_comm_stream
    get_local_buffer_tensor get_dispatch_config get_combine_config get_dispatch_layout dispatch combine
    internode_dispatch internode_combine clean_low_latency_buffer low_latency_dispatch low_latency_combine
    low_latency_update_mask_buffer low_latency_query_mask_buffer low_latency_clean_mask_buffer
    get_next_low_latency_combine_buffer dispatch_pcie combine_pcie
    """
)
V2 = names(
    """
    __init__ destroy get_buffer_size_hint get_engram_storage_size_hint get_pp_buffer_size_hint
    get_agrs_num_max_session_bytes get_agrs_buffer_size_hint barrier capture get_comm_stream
    get_physical_domain_size get_logical_domain_size engram_write engram_fetch pp_set_config pp_send pp_recv
    create_agrs_session destroy_agrs_session agrs_new_session agrs_set_config agrs_get_inplace_tensor
    all_gather get_theoretical_num_sms get_theoretical_num_qps dispatch combine
    """
)
HANDLE = names(
    """
    do_expand num_experts expert_alignment num_max_tokens_per_rank num_sms topk_idx num_recv_tokens
    num_expanded_tokens num_recv_tokens_per_expert_list psum_num_recv_tokens_per_expert
    num_unaligned_recv_tokens_per_expert psum_num_recv_tokens_per_scaleup_rank recv_src_metadata
    dst_buffer_slot_idx token_metadata_at_forward channel_linked_list deterministic_sort
    """
)
HYBRID = names(
    """
    __init__ empty_jit_cache update_template_config dispatch combine dispatch_with_permute
    combine_with_unpermute
    """
)
MODULE = names(
    """
    Buffer ElasticBuffer EPHandle HybridEPBuffer EventHandle EventOverlap Config topk_idx_t
    get_physical_domain_size get_logical_domain_size
    """
)

ROW = re.compile(r"^\| (?P<names>.*?) \| (?P<state>works|differs|raises) \| (?P<how>.*?) ?\|$")


def table_of(title: str) -> dict[str, str]:
    """Name -> works, differs or raises, in a section of the document."""
    text = (ROOT / "docs" / "deep_ep.md").read_text()
    section = text.split(f"### {title}\n")[1].split("\n## ")[0].split("\n### ")[0]
    table: dict[str, str] = {}
    for line in section.splitlines():
        row = ROW.match(line)
        if row is None:
            assert not line.startswith("| `"), f"a row that says neither works, differs nor raises: {line}"
            continue
        for name in re.findall(r"`(?:EPHandle\.|hybrid_ep_buffer\.)?(\w+)`", row["names"]):
            assert name == "EPHandle" or name not in table, f"{name} is there twice"
            table.setdefault(name, row["state"])
    return table


def refuses(owner: Any, name: str) -> bool:
    """Whether a name says that it is not covered, without a buffer or handle behind it."""
    member = owner.__dict__.get(name) or getattr(owner, name)
    try:
        if isinstance(member, property):
            assert member.fget is not None
            member.fget(SimpleNamespace())
        else:
            getattr(owner, name)()
    except NotImplementedError as error:
        assert name in str(error)
        return True
    except Exception:
        return False
    return False


@pytest.mark.parametrize(
    ("title", "owner", "names"),
    [
        ("Buffer (V1)", deep_ep.Buffer, V1),
        ("ElasticBuffer and EPHandle (V2)", deep_ep.ElasticBuffer, V2),
        ("HybridEPBuffer (hybrid)", deep_ep.HybridEPBuffer, HYBRID),
    ],
)
def test_every_method_is_accounted_for(title: str, owner: type, names: list[str]) -> None:
    table = table_of(title)
    assert [name for name in names if name not in table] == []
    for name in names:
        assert hasattr(owner, name), f"{owner.__name__} has no {name}"
        assert refuses(owner, name) == (table[name] == "raises"), f"{owner.__name__}.{name}"


def test_every_field_of_handles_is_accounted_for() -> None:
    table = table_of("ElasticBuffer and EPHandle (V2)")
    assert [name for name in HANDLE if name not in table] == []
    for name in HANDLE:
        if table[name] == "raises":
            assert refuses(deep_ep.EPHandle, name)


def test_every_name_of_the_module_is_accounted_for() -> None:
    table = table_of("Module")
    assert [name for name in MODULE if name not in table or not hasattr(deep_ep, name)] == []


def run_python(program: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        cwd="/",
        env={**os.environ, **environment},
        timeout=100,
    )


CLIENT = """
import importlib.util
assert importlib.util.find_spec("deep_ep") is not None
from deep_ep import Buffer, ElasticBuffer, HybridEPBuffer
from deep_ep.utils import EventHandle, EventOverlap
from deep_ep.utils.event import EventOverlap as same
from deep_ep.hybrid_ep_buffer import indices_to_map
from deep_ep.buffer import Buffer as also
import deep_ep, commlib.compat.deep_ep as real
assert deep_ep is real and also is Buffer is real.Buffer and same is EventOverlap is real.EventOverlap
assert importlib.util.find_spec("deep_ep") is not None and deep_ep.__version__.startswith("2.1.0")
"""


def test_the_printed_directory_makes_it_importable() -> None:
    printed = subprocess.run(
        [sys.executable, "-m", "commlib.compat"], capture_output=True, text=True, cwd=ROOT, timeout=100
    ).stdout.strip()
    assert printed == compat.search_path() and os.listdir(printed) != []
    result = run_python(CLIENT, PYTHONPATH=os.pathsep.join([printed, str(ROOT)]))
    assert result.returncode == 0, result.stderr


def test_install_makes_it_importable() -> None:
    program = "from commlib import compat; assert compat.install() is compat.install()\n" + CLIENT
    result = run_python(program, PYTHONPATH=str(ROOT))
    assert result.returncode == 0, result.stderr


def test_another_deep_ep_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "deep_ep.py").write_text("")
    program = "import deep_ep; from commlib import compat; compat.install()"
    result = run_python(program, PYTHONPATH=os.pathsep.join([str(tmp_path), str(ROOT)]))
    assert result.returncode != 0 and f"imported already, from {tmp_path}" in result.stderr
