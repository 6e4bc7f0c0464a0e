"""Where a watch ends a run, its policy goes back to the best that is still there.

Knows no loop: what was done since stays in the metrics, and the state that was gone back to is saved as the newest.
"""

from palm_rlhf_pytorch.policy.trainer_state import Trainer, restore_state, state_of
from palm_rlhf_pytorch.policy.watch import Verdict, nearest_step
from palm_rlhf_pytorch.training.checkpoint import load_checkpoint


def roll_back(trainer: Trainer, verdict: Verdict) -> str:
    """Take the trainer back to the checkpoint nearest to the best policy, on every process; what to tell the user."""
    places, checkpoints, later = trainer.run.finished(), trainer.run.checkpoints, trainer.updates
    nearest = nearest_step(verdict.best_step, list(places))
    assert nearest is not None and checkpoints is not None, "a run with a watch has a folder, and its updates are saved"
    found, saves = load_checkpoint(places[nearest], kind=trainer.kind), trainer.saves
    restore_state(trainer, found)
    trainer.saves = saves + 1  # the numbers of checkpoints go on
    checkpoints.save(trainer.saves, kind=trainer.kind, metrics=found.metrics, **state_of(trainer))
    said = f"stopped by the watch after update {later}: {verdict.reason}."
    if nearest == later:
        return f"{said} No earlier checkpoint was kept, so the policy stays as it is: lower save_every"
    return f"{said} The policy is that after update {nearest} again"
