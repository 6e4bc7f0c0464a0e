"""Benchmarks: this library beside its peers, in one process run, against ceilings measured in the same run.

    python -m tests.benchmarks [--quick] [--device cuda] [--upstream-python PATH] [--only NAME] [--json FILE] [--large]

or one of them, `python -m tests.benchmarks.decode` and so on. Peers are the extra `[bench]` (transformers) and, from an
environment of its own, palm-rlhf-pytorch 0.8.0, whose interpreter --upstream-python names.

    harness.py    interleaved rounds, the run, its options        report.py   rows, the table, the JSON line
    machine.py    what machine this is, its ceilings              counts.py   bytes and flops of a step, by hand
    models.py     the models compared, and the gate before timing
    upstream.py   the other process; upstream_worker.py runs in it
    feedback.py   the feedback app under many people, by itself: python -m tests.benchmarks.feedback
    decode.py, decode_cases.py, train.py, logprobs.py, ppo.py, memory.py     what is measured
"""
