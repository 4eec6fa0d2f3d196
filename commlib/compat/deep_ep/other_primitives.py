"""What DeepEP's `ElasticBuffer` offers besides dispatch and combine: refused by name."""

from __future__ import annotations

from commlib.compat.deep_ep.settings import not_covered

__all__ = ["STORAGE", "OtherPrimitives"]

STORAGE = "remote storage of embeddings is not part of dispatch and combine"
_PIPELINE = "sends between pipeline stages are not part of dispatch and combine"
_GATHER = "all-gather is not part of dispatch and combine"


class OtherPrimitives:
    """Methods that raise NotImplementedError."""

    get_engram_storage_size_hint = staticmethod(not_covered("get_engram_storage_size_hint", STORAGE))
    engram_write = not_covered("engram_write", STORAGE)
    engram_fetch = not_covered("engram_fetch", STORAGE)
    get_pp_buffer_size_hint = staticmethod(not_covered("get_pp_buffer_size_hint", _PIPELINE))
    pp_set_config = not_covered("pp_set_config", _PIPELINE)
    pp_send = not_covered("pp_send", _PIPELINE)
    pp_recv = not_covered("pp_recv", _PIPELINE)
    get_agrs_num_max_session_bytes = staticmethod(not_covered("get_agrs_num_max_session_bytes", _GATHER))
    get_agrs_buffer_size_hint = staticmethod(not_covered("get_agrs_buffer_size_hint", _GATHER))
    agrs_set_config = not_covered("agrs_set_config", _GATHER)
    create_agrs_session = not_covered("create_agrs_session", _GATHER)
    destroy_agrs_session = not_covered("destroy_agrs_session", _GATHER)
    agrs_new_session = not_covered("agrs_new_session", _GATHER)
    agrs_get_inplace_tensor = not_covered("agrs_get_inplace_tensor", _GATHER)
    all_gather = not_covered("all_gather", _GATHER)
