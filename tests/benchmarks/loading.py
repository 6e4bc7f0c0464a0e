"""Peak memory and time of loading a model, in a process of its own: `python -m tests.benchmarks.loading`.

For the shapes of the public 150M and 410M PaLMs, random weights are written in their layout (float32, as torch.save and
as safetensors) and in this package's own; each is then loaded in each dtype. The peak is the process's high-water mark
(VmHWM) less what it was before, over the bytes of the loaded weights; Linux only.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file

from palm_rlhf_pytorch import PaLM
from palm_rlhf_pytorch.palm.pretrained import PUBLISHED, Published
from palm_rlhf_pytorch.rotary import GAMMA, THETA

DTYPES = ("float32", "bfloat16", "float16")
WORKER = """
import json, re, sys, time
import torch
from palm_rlhf_pytorch import PaLM

def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024

before, start = peak(), time.perf_counter()
palm = PaLM.from_pretrained(sys.argv[1], dtype=getattr(torch, sys.argv[2]))
seconds = time.perf_counter() - start
weights = sum(weight.nbytes for weight in palm.parameters())
print(json.dumps({"weights": weights, "peak": peak() - before, "seconds": seconds}))
"""


def published_state(known: Published, *, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """Random weights under the names of the published layout, embedding and logits of one storage."""
    generator = torch.Generator().manual_seed(0)
    inner, ff_inner = known.heads * known.dim_head, 4 * known.dim

    def random(*shape: int) -> torch.Tensor:
        return (torch.randn(shape, generator=generator) * 0.02).to(dtype)

    pairs = torch.arange(0, known.dim_head, 2) / known.dim_head
    state = {"token_emb.weight": random(known.num_tokens, known.dim)}
    for layer in range(known.depth):
        state |= {
            f"layers.{layer}.fn.norm.gamma": torch.ones(known.dim, dtype=dtype),
            f"layers.{layer}.fn.norm.beta": torch.zeros(known.dim, dtype=dtype),
            f"layers.{layer}.fn.rotary_emb.inv_freq": THETA**-pairs,
            f"layers.{layer}.fn.rotary_emb.scale": (pairs + GAMMA) / (1 + GAMMA),
            f"layers.{layer}.fn.fused_attn_ff_proj.weight": random(
                inner + 2 * known.dim_head + 2 * ff_inner, known.dim
            ),
            f"layers.{layer}.fn.attn_out.weight": random(known.dim, inner),
            f"layers.{layer}.fn.ff_out.2.weight": random(known.dim, ff_inner),
        }
    state |= {"norm.gamma": torch.ones(known.dim, dtype=dtype), "norm.beta": torch.zeros(known.dim, dtype=dtype)}
    return state | {"to_logits.weight": state["token_emb.weight"]}


def write_files(known: Published, folder: Path) -> dict[str, Path]:
    """The same weights in each layout and format."""
    state = published_state(known)
    files = {name: folder / name for name in ("published.pt", "published.safetensors", "ours.pt", "ours.safetensors")}
    torch.save(state, files["published.pt"])
    save_file(
        {name: tensor for name, tensor in state.items() if name != "to_logits.weight"}, files["published.safetensors"]
    )
    palm = PaLM.from_pretrained(files["published.pt"])
    palm.save(files["ours.pt"])
    palm.save(files["ours.safetensors"])
    return files


def measure(path: Path, dtype: str) -> dict[str, float]:
    """Load a file in a new process."""
    found = subprocess.run([sys.executable, "-c", WORKER, str(path), dtype], capture_output=True, text=True, check=True)
    return json.loads(found.stdout)  # type: ignore[no-any-return]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["conceptofmind/palm-150m", "conceptofmind/palm-410m"])
    args = parser.parse_args()
    print("model                    file                   dtype     weights MB  peak MB  ratio  seconds")
    for name in args.models:
        with tempfile.TemporaryDirectory() as folder:
            for file, path in write_files(PUBLISHED[name], Path(folder)).items():
                for dtype in DTYPES:
                    row = measure(path, dtype)
                    ratio = row["peak"] / row["weights"]
                    print(
                        f"{name:24} {file:22} {dtype:9} {row['weights'] / 1e6:10.1f} {row['peak'] / 1e6:8.1f}"
                        f" {ratio:6.3f} {row['seconds']:8.2f}",
                        flush=True,
                    )


if __name__ == "__main__":
    main()
