"""A small run that is the same script in one process, in several, on one machine or on many.

    python examples/accelerate/train.py --run-dir runs/one
    torchrun --nproc-per-node 2 examples/accelerate/train.py --run-dir runs/two --cpu
    accelerate launch --config_file examples/accelerate/ddp.yaml examples/accelerate/train.py --run-dir runs/gpus

Started again with the same --run-dir it goes on where it was stopped.
"""

import argparse

import torch
from torch import Tensor

from palm_rlhf_pytorch import PaLM, RLHFTrainer


def share_of_sevens(sequences: Tensor, *, prompt_mask: Tensor, mask: Tensor) -> Tensor:
    """A judge: which share of the response is the id 7."""
    response = mask & ~prompt_mask
    return ((sequences == 7) & response).sum(dim=-1) / response.sum(dim=-1)


def main() -> None:
    """Train, and say on the main process how it went."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run-dir", required=True, help="folder of the run, which all machines see")
    parser.add_argument("--episodes", type=int, default=640, help="responses to learn from, over all processes")
    parser.add_argument("--cpu", action="store_true", help="leave GPUs alone")
    args = parser.parse_args()

    torch.manual_seed(0)  # the same model on every process
    palm = PaLM(num_tokens=32, dim=64, depth=2, heads=4, dim_head=16)
    prompts = [torch.randint(1, 32, (length,)) for length in (3, 5, 2, 7, 4, 6, 8, 3)]
    trainer = RLHFTrainer(
        palm=palm, reward_model=share_of_sevens, prompt_token_ids=prompts, run_dir=args.run_dir, actor_lr=3e-3,
        critic_lr=3e-3, accelerate_kwargs={"cpu": args.cpu},
    )  # fmt: skip
    history = trainer.train(args.episodes, max_seq_len=24, update_timesteps=64, resume="auto")
    best = trainer.generate(24, prompt=prompts[0])  # by every process: weights may be spread over them
    if history:
        scores = [round(metrics["reward/score"], 3) for metrics in history]
        trainer.accelerator.print(f"{trainer.ranks.count} processes, scores of the updates: {scores}")
    trainer.accelerator.print(f"an answer: {best.tolist()}")
    trainer.accelerator.end_training()


if __name__ == "__main__":
    main()
