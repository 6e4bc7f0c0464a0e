"""Peak memory of what the other benchmarks time, memory of the four models, and stored bytes of a rollout's token.

Each peak is taken in a process of its own, of which the imports' share is subtracted: on a CPU the largest resident
set, on CUDA what torch's allocator held at most. Weights and optimizer states are in it.
"""

import gc
import resource
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from palm_rlhf_pytorch.policy.rollout import Rollout
from tests.benchmarks.counts import PPO_SMALL, README
from tests.benchmarks.harness import Bench, Case, main
from tests.benchmarks.logprobs import llama_observation, our_observation
from tests.benchmarks.models import fill_adapter, hugging_face, llama, llama_generate, our_model
from tests.benchmarks.ppo import our_iteration, our_trainer
from tests.benchmarks.report import Row, counted_rows
from tests.benchmarks.train import llama_step, our_step
from tests.processor import cap_instruction_set

PROMPT, NEW_TOKENS = 512, 16
README_SIZES = [README.num_tokens, README.dim, README.depth]
PPO_SIZES = {"count": 16, "prompt": 64, "new": 64}
UPSTREAM = {
    "decode 1": ("generate", {"shape": README_SIZES, "length": PROMPT, "new_tokens": 2}),
    "train 512": ("train", {"shape": README_SIZES, "length": 512}),
    "train 2048": ("train", {"shape": README_SIZES, "length": 2048}),
    "ppo": ("ppo", {"shape": [256, 256, 4], "prompts": 16, "prompt_length": 64, "new_tokens": 64, "epochs": [1]}),
}


def cases(bench: Bench) -> Iterator[Case]:
    """Peaks of each kind of work (not in the quick run), then what is counted without running anything for long."""
    works = [] if bench.quick else list(_works(bench.device))
    for work in works:
        yield Case(f"memory {work}", partial(_peaks, bench, work))
    yield Case("memory models", partial(_models, bench))
    yield Case("memory rollout", partial(_rollout, bench))


def _works(device: torch.device) -> dict[str, dict[str, Callable[[], object]]]:
    """What is done, by whom; float32 at the README's shape, except PPO at 256 x 4."""

    def tokens(batch: int, length: int) -> Tensor:
        return torch.randint(0, README.num_tokens, (batch, length), device=device)

    single = torch.float32
    sizes = {"dtype": single, "device": device, "epochs": (1,), **PPO_SIZES}
    works: dict[str, dict[str, Callable[[], object]]] = {}
    for batch in (1, 8, 64):
        works[f"decode {batch}"] = {
            "ours": lambda batch=batch: _decode(tokens(batch, PROMPT), scope=None),
            "ours with actor": lambda batch=batch: _decode(tokens(batch, PROMPT), scope="actor"),
            "hf": lambda batch=batch: _decode_peer(tokens(batch, PROMPT)),
        }
    for length in (512, 2048):
        works[f"train {length}"] = {
            "ours": lambda length=length: our_step(README, tokens(1, length), dtype=single)(),
            "hf": lambda length=length: llama_step(README, tokens(1, length), dtype=single)(),
        }
    works["logprobs"] = {
        "ours": lambda: our_observation(README, tokens(8, 512), dtype=single)(),
        "hf": lambda: llama_observation(README, tokens(8, 512), dtype=single)(),
    }
    works["ppo"] = {"ours": lambda: our_iteration(PPO_SMALL, **sizes)()}
    return works


def _decode(prompts: Tensor, *, scope: str | None) -> None:
    palm = our_model(README, dtype=torch.float32, device=prompts.device)
    if scope is not None:
        palm.add_finetune_params(scope)
        fill_adapter(palm, scope)
    palm.generate(PROMPT + NEW_TOKENS, prompts, finetune_scope=scope)


def _decode_peer(prompts: Tensor) -> None:
    llama_generate(llama(README, dtype=torch.float32, device=prompts.device), prompts, new_tokens=NEW_TOKENS)


def _peaks(bench: Bench, work: str) -> list[Row]:
    """Ours and the peers', each in its own process."""
    peaks = {who: _peak_apart(work, who, bench.device) for who in _works(bench.device)[work]}
    upstream = bench.new_upstream() if work in UPSTREAM else None
    if upstream is not None:
        request, arguments = UPSTREAM[work]
        upstream.ask(request, **arguments)
        peaks["upstream"] = upstream.ask("peak")["bytes"]
        upstream.close()
    return counted_rows(f"memory {work}", "peak", peaks, unit="bytes")


def _peak_apart(work: str, who: str, device: torch.device) -> float:
    """The peak of one piece of work in a new process, which prints it last."""
    command = [sys.executable, "-m", "tests.benchmarks.memory", "--measure", work, who, device.type]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr[-2000:]}")
    return float(done.stdout.split()[-1])


def _measure(work: str, who: str, device: torch.device) -> float:
    """Bytes that a piece of work takes at most, beyond what the imports took."""
    run = _works(device)[work][who]
    if who == "hf":
        hugging_face().LlamaForCausalLM  # noqa: B018 - it is imported when it is first named
    if device.type == "cuda":
        run()
        return float(torch.cuda.max_memory_allocated(device))
    gc.collect()
    before = _resident("VmRSS")
    run()
    return _resident("VmHWM") - before


def _resident(field: str) -> float:
    """Bytes resident now (VmRSS) or at most (VmHWM) of this process.

    Not from getrusage where /proc is: there a process inherits the maximum of the one that started it.
    """
    status = Path("/proc/self/status")
    if not status.exists():
        return 1024.0 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    line = next(line for line in status.read_text().splitlines() if line.startswith(field))
    return 1024.0 * int(line.split()[1])


def distinct_bytes(tensors: Iterable[Tensor]) -> float:
    """Bytes of the storages behind tensors, each counted once however many tensors share it."""
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return float(sum(storages.values()))


def _models(bench: Bench) -> list[Row]:
    """Actor, critic, reference and reward model of a trainer, beside the PaLM they are made of."""
    device = bench.device
    palm = our_model(README, dtype=torch.float32, device=device)
    alone = distinct_bytes(palm.parameters())
    del palm
    trainer = our_trainer(README, dtype=torch.float32, count=2, prompt=4, epochs=1, device=device)
    assert isinstance(trainer.reward_model, nn.Module), "our_trainer makes a RewardModel"
    modules = (trainer.actor_critic, trainer.reward_model)
    together = distinct_bytes(tensor for module in modules for tensor in (*module.parameters(), *module.buffers()))
    return counted_rows("memory models", "bytes", {"one PaLM": alone, "ours, all four": together}, unit="bytes")


def _rollout(bench: Bench) -> list[Row]:
    """Bytes kept of a rollout: in all, per response token, and what one more response token adds to a row."""
    sizes = {"dtype": torch.float32, "count": 16, "prompt": 64, "epochs": 1, "device": bench.device}
    trainer = our_trainer(PPO_SMALL, **sizes)
    short, long = (trainer.rollout(*trainer.next_prompts(16), max_new_tokens=new) for new in (64, 96))
    stored, tokens = stored_bytes(long), int(long.response_mask.sum())
    added = (stored - stored_bytes(short)) / (tokens - int(short.response_mask.sum()))
    each = {"ours": added}
    note = "16 x (64 + 96); the id and five float32 numbers would be 24"
    rows = counted_rows("memory rollout", "bytes a response token adds", each, unit="count", note=note)
    whole = {"ours": stored / tokens}
    return rows + counted_rows("memory rollout", "all bytes / response tokens", whole, unit="count", note=note)


def stored_bytes(rollout: Rollout) -> float:
    """Bytes of a rollout's tensors."""
    return float(sum(part.numel() * part.element_size() for part in rollout if isinstance(part, Tensor)))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:
        cap_instruction_set()
        print(_measure(sys.argv[2], sys.argv[3], torch.device(sys.argv[4])))
    else:
        main([cases], description=__doc__ or "")
