"""The look-up on CPUs gives the bits of the reference."""

import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from support import mxfp4_oracle as oracle
from turnwise.kernels.mxfp4 import decode_cpu, reference

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def bits(values: torch.Tensor) -> torch.Tensor:
    """Bits of a tensor, so that NaN compares equal and -0 does not equal 0."""
    return values.nan_to_num(7.5, torch.inf, -torch.inf).view(torch.int32 if values.element_size() == 4 else torch.int16)


@pytest.mark.parametrize("dtype", DTYPES)
def test_all_codes_under_all_scale_bytes_are_those_of_the_reference(dtype: torch.dtype):
    packed, scales = oracle.every_byte()
    out = decode_cpu.dequantize_into(torch.empty(256, 512, dtype=dtype), packed, scales)
    assert torch.equal(bits(out), bits(reference.dequantize(packed, scales, dtype)))


@settings(deadline=None, max_examples=25)
@given(n=st.integers(1, 40), blocks=st.integers(1, 5), seed=st.integers(0, 2**31), dtype=st.sampled_from(DTYPES))
def test_any_shape_is_decoded(n: int, blocks: int, seed: int, dtype: torch.dtype):
    generator = torch.Generator().manual_seed(seed)
    packed = torch.randint(0, 256, (n, 16 * blocks), dtype=torch.uint8, generator=generator)
    scales = torch.randint(0, 255, (n, blocks), dtype=torch.uint8, generator=generator)
    out = decode_cpu.dequantize_into(torch.empty(n, 32 * blocks, dtype=dtype), packed, scales)
    assert torch.equal(bits(out), bits(reference.dequantize(packed, scales, dtype)))


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch):
    packed, scales = reference.quantize(torch.randn(37, 96))
    monkeypatch.setattr(decode_cpu, "CHUNK_BYTES", 100)
    out = decode_cpu.dequantize_into(torch.empty(37, 96), packed, scales)
    assert torch.equal(out, reference.dequantize(packed, scales, torch.float32))


def test_the_workspace_is_the_same_memory_and_grows():
    decode_cpu.release_workspaces()
    small = decode_cpu.workspace(4, 8, torch.float32)
    large = decode_cpu.workspace(8, 8, torch.float32)
    again = decode_cpu.workspace(2, 4, torch.float32)
    assert large.data_ptr() == again.data_ptr() != small.data_ptr()
    assert again.shape == (2, 4)
    assert decode_cpu.workspace(2, 4, torch.bfloat16).data_ptr() != again.data_ptr()


def test_threads_have_workspaces_of_their_own():
    here = decode_cpu.workspace(4, 4, torch.float32)
    there: list[int] = []
    thread = threading.Thread(target=lambda: there.append(decode_cpu.workspace(4, 4, torch.float32).data_ptr()))
    thread.start()
    thread.join(30)
    assert there != [here.data_ptr()]
