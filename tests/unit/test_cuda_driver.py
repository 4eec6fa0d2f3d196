"""What the host asks the CUDA driver for device rings, with a driver that is made up."""

from __future__ import annotations

import ctypes
from types import SimpleNamespace
from typing import Any

import pytest

from commlib.cuda import driver
from commlib.cuda.tiers import Tiers
from commlib.errors import TransportError


def use_driver(monkeypatch: pytest.MonkeyPatch, **calls: Any) -> None:
    library = SimpleNamespace(cuGetErrorString=lambda code, text: None, **calls)
    monkeypatch.setattr(driver, "_library", lambda: library)


@pytest.mark.parametrize(
    ("ordering", "uses_host_page_tables", "expected"),
    [(0, 0, False), (99, 0, False), (100, 0, True), (200, 0, True), (200, 1, False)],
)
def test_a_flush_is_needed_unless_the_device_says_no(
    monkeypatch: pytest.MonkeyPatch, ordering: int, uses_host_page_tables: int, expected: bool
) -> None:
    def get_attribute(value: Any, number: int, device: int) -> int:
        value._obj.value = {118: ordering, 100: uses_host_page_tables}[number]
        return 0 if device == 3 else 101

    use_driver(monkeypatch, cuDeviceGetAttribute=get_attribute)
    assert driver.has_ordered_rdma(3) is expected
    with pytest.raises(TransportError, match="cuDeviceGetAttribute failed"):
        driver.has_ordered_rdma(4)


@pytest.mark.parametrize(("code", "expected"), [(0, 7), (801, -1)])
def test_a_driver_without_dmabuf_is_no_error(monkeypatch: pytest.MonkeyPatch, code: int, expected: int) -> None:
    def get_handle(descriptor: Any, address: Any, num_bytes: Any, kind: int, flags: Any) -> int:
        assert (address.value, num_bytes.value, kind, flags.value) == (1 << 40, 4 << 20, 1, 0)
        descriptor._obj.value = 7
        return code

    use_driver(monkeypatch, cuMemGetHandleForAddressRange=get_handle)
    assert driver.export_dmabuf(1 << 40, 4 << 20) == expected


def test_threads_are_set_up_with_the_context_of_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    libc = ctypes.CDLL(None)
    use_driver(monkeypatch, cuCtxSetCurrent=libc.abs, cuThreadExchangeStreamCaptureMode=libc.labs)
    monkeypatch.setattr(driver, "_primary_context", lambda index: ctypes.c_void_p(0x1000 + index))
    set_context, context, exchange_mode, mode = driver.thread_setup(2)
    assert (context, mode) == (0x1002, 2)
    assert ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int)(set_context)(-5) == 5 and exchange_mode not in (0, set_context)


@pytest.mark.parametrize(("code", "is_ours"), [(0, True), (712, False)])
def test_memory_that_the_transport_has_pinned_is_not_ours_to_unpin(
    monkeypatch: pytest.MonkeyPatch, code: int, is_ours: bool
) -> None:
    def get_pointer(device: Any, address: Any, flags: int) -> int:
        device._obj.value = address.value + 1
        return 0

    use_driver(
        monkeypatch,
        cuMemHostRegister_v2=lambda address, num_bytes, flags: code,
        cuMemHostGetDevicePointer_v2=get_pointer,
    )
    assert driver.map_host_memory(4096, 8192) == (4097, is_ours)


def test_memory_that_cannot_be_pinned(monkeypatch: pytest.MonkeyPatch) -> None:
    use_driver(monkeypatch, cuMemHostRegister_v2=lambda address, num_bytes, flags: 2)
    with pytest.raises(TransportError, match="cuMemHostRegister failed"):
        driver.map_host_memory(4096, 8192)


def test_an_event_that_is_not_there_yet_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    codes = [600, 0, 719]
    use_driver(
        monkeypatch,
        cuEventCreate=lambda event, flags: 0,
        cuEventDestroy_v2=lambda event: 0,
        cuEventQuery=lambda event: codes.pop(0),
    )
    event = driver.Event()
    assert [event.has_passed(), event.has_passed()] == [False, True]
    with pytest.raises(TransportError, match="cuEventQuery failed"):
        event.has_passed()


@pytest.mark.parametrize("faulty_at", [None, 1, 3])
def test_a_call_that_waits_for_its_puts_looks_for_faults(faulty_at: int | None) -> None:
    """While the kernel runs, and once when it has ended: a missed deadline ends it, too."""
    looks: list[int] = []
    answers = [False, False, True]

    def check_faults() -> None:
        looks.append(len(answers))
        if len(looks) == faulty_at:
            raise TransportError("a peer is lost", call="put", code=0)

    event = SimpleNamespace(has_passed=lambda: answers.pop(0))
    if faulty_at is None:
        assert Tiers.wait_for_puts(event, check_faults, 60.0)
    else:
        with pytest.raises(TransportError, match="a peer is lost"):
            Tiers.wait_for_puts(event, check_faults, 60.0)
    assert looks == [2, 1, 0][: faulty_at or 3]


def test_a_kernel_that_never_ends_is_not_waited_for_without_end() -> None:
    assert not Tiers.wait_for_puts(SimpleNamespace(has_passed=lambda: False), lambda: None, 0.05)
