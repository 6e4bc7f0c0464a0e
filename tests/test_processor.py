"""What is read from a processor's description: by hand, for machines of several kinds."""

import pytest
import torch

from palm_rlhf_pytorch import processor
from palm_rlhf_pytorch.processor import float32_rows, mkl_is_slow

EMULATED, SINGLE = 2, 32  # rows from which on a weight is kept in float32
INTEL, AMD = "GenuineIntel", "AuthenticAMD"
SAPPHIRE = "avx2 avx512f avx512_bf16 avx512_fp16 amx_bf16 amx_tile"


@pytest.fixture
def described(monkeypatch, tmp_path):
    """Describe a processor in place of this one, and the cap that oneDNN is given."""
    reads = processor.this_processor, mkl_is_slow, float32_rows

    def describe(text: str | None, cap: str | None = None) -> None:
        path = tmp_path / "cpuinfo"
        if text is not None:
            path.write_text(text)
        monkeypatch.setattr(processor, "Path", lambda _: path)
        monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
        for name in ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"):
            monkeypatch.delenv(name, raising=False)
        if cap is not None:
            monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", cap)
        for read in reads:
            read.cache_clear()

    yield describe
    for read in reads:
        read.cache_clear()


def cpuinfo(vendor: str, flags: str) -> str:
    return f"processor\t: 0\nvendor_id\t: {vendor}\nflags\t\t: fpu sse2 {flags}\nbugs\t\t:\n"


@pytest.mark.parametrize(("vendor", "slow"), [(INTEL, False), (AMD, True)])
def test_mkl_is_slow_on_processors_that_are_not_intels(described, vendor, slow):
    described(cpuinfo(vendor, "avx2"))
    assert mkl_is_slow() is slow


@pytest.mark.parametrize(
    ("vendor", "flags", "cap", "bfloat16", "float16"),
    [
        (INTEL, "avx2", None, EMULATED, EMULATED),  # most desktops
        (INTEL, "avx2 avx512f", None, EMULATED, EMULATED),
        (INTEL, "avx512f avx512_bf16", None, SINGLE, EMULATED),
        (AMD, "avx512f avx512_bf16", None, None, EMULATED),
        (AMD, "avx2", None, EMULATED, EMULATED),
        (INTEL, SAPPHIRE, None, None, None),
        (INTEL, SAPPHIRE, "all", None, None),
        (INTEL, SAPPHIRE, "AVX512_CORE_AMX", None, None),
        (INTEL, SAPPHIRE, "AVX512_CORE_FP16", SINGLE, None),
        (INTEL, SAPPHIRE, "AVX512_CORE_BF16", SINGLE, EMULATED),
        (INTEL, SAPPHIRE, "avx512_core", EMULATED, EMULATED),
        (INTEL, SAPPHIRE, "AVX2", EMULATED, EMULATED),
    ],
)
def test_half_precision_goes_through_float32_where_the_processor_would_emulate_it(
    described, vendor, flags, cap, bfloat16, float16
):
    described(cpuinfo(vendor, flags), cap)
    assert float32_rows(torch.bfloat16) == bfloat16
    assert float32_rows(torch.float16) == float16
    assert float32_rows(torch.float32) is None and float32_rows(torch.float64) is None


@pytest.mark.parametrize("text", [None, "processor\t: 0\nFeatures\t: fp asimd bf16\n"])
def test_processors_that_are_no_x86_are_left_their_own(described, text):
    described(text)
    assert float32_rows(torch.bfloat16) is None
