"""A processor that announces AMX and kills what uses it: some virtual machines do.

oneDNN multiplies bfloat16 matrices with AMX where it is announced, and the process dies of SIGILL. One product in a
process of its own tells; then oneDNN is held to the instructions below, before its first use.
"""

import os
import subprocess
import sys
from pathlib import Path

WITHOUT_AMX = "AVX512_CORE_BF16"
PRODUCT = "import torch; a = torch.ones(64, 64, dtype=torch.bfloat16); a @ a"


def cap_instruction_set() -> str | None:
    """Hold oneDNN to what this processor really does; returns the cap in force, None if there is none."""
    name = "ONEDNN_MAX_CPU_ISA"
    cpuinfo = Path("/proc/cpuinfo")
    announced = cpuinfo.exists() and "amx_bf16" in cpuinfo.read_text()
    if name not in os.environ and announced:
        probe = subprocess.run([sys.executable, "-c", PRODUCT], stderr=subprocess.DEVNULL, check=False)
        if probe.returncode < 0:
            os.environ[name] = WITHOUT_AMX
    return os.environ.get(name)
