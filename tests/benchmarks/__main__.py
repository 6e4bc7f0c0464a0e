"""All benchmarks in one run: one table, one JSON line last."""

from tests.benchmarks import decode, decode_steps, experience, imports, logprobs, memory, ppo, train
from tests.benchmarks.harness import main

if __name__ == "__main__":
    main(
        [module.cases for module in (decode, decode_steps, train, logprobs, ppo, memory, experience, imports)],
        description=__doc__ or "",
    )
