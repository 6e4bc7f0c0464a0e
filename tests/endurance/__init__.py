"""Runs that are killed, told to stop and started again: do they end with the bits of one that was left alone?

    python -m tests.endurance --kills 200            one process, killed at random moments
    python -m tests.endurance --kills 50 --ranks 2   two processes over gloo
    python -m tests.endurance --kills 50 --trainer grpo   groups in place of a critic
    python -m tests.endurance --boundaries           ended at each place where a checkpoint is written, one by one

`test_endurance.py` runs a little of each. Linux: a worker is forked, so that it starts without importing torch anew.
"""
