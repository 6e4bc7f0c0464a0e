"""The long run; see the package's docstring."""

import argparse
import json
import signal
import sys
import tempfile

from tests.endurance.killing import ended_at_boundaries, killed_at_random


def main():
    parser = argparse.ArgumentParser(prog="python -m tests.endurance", description=__doc__)
    parser.add_argument("--kills", type=int, default=0, help="SIGKILLs at random moments")
    parser.add_argument("--boundaries", action="store_true", help="one end at each checkpoint of a run")
    parser.add_argument("--signal", default="SIGKILL", choices=("SIGKILL", "SIGTERM", "SIGINT"), help="at boundaries")
    parser.add_argument("--ranks", type=int, default=1, help="processes of a run")
    parser.add_argument("--trainer", default="ppo", choices=("ppo", "grpo"), help="grpo samples dull groups again")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    args = parser.parse_args()
    differences, options = [], {"ranks": args.ranks, "grouped": args.trainer == "grpo"}
    with tempfile.TemporaryDirectory() as work:
        if args.kills:
            report = killed_at_random(f"{work}/random", kills=args.kills, seed=args.seed, **options)
            differences += report["differences"]
            print(json.dumps({"killed at random": report, "ranks": args.ranks}))
        if args.boundaries:
            number = signal.Signals[args.signal]
            report = ended_at_boundaries(f"{work}/boundaries", number=number, **options)
            differences += report["differences"]
            print(json.dumps({f"{args.signal} at boundaries": report, "ranks": args.ranks}))
    return 1 if differences else 0


if __name__ == "__main__":
    sys.exit(main())
