"""One seed of `tests.learning.direct`, shorter than the script's: optima reached, every algorithm beats its start.

The five seeds end within .0005 of the optimum in total variation after 300 steps.
"""

from functools import partial

import pytest

from palm_rlhf_pytorch.objectives.direct import dpo_loss
from tests.learning import direct

pytestmark = pytest.mark.learning


@pytest.mark.parametrize("name", [name for name, (_, _, scale) in direct.PAIR_LOSSES.items() if scale is not None])
def test_losses_on_pairs_reach_their_known_optimum(name):
    found = direct.run(name, 0, num_steps=80)
    assert found.distance_before > 0.08
    assert found.distance_after < 0.01
    assert found.learnt


@pytest.mark.parametrize("name", ["hinge", "simpo", "kto", "rejection"])
def test_what_has_no_known_optimum_beats_its_start(name):
    found = direct.run(name, 0, num_steps=60)
    assert found.score_after > found.score_before + 0.1


@pytest.mark.parametrize(
    ("loss", "label_of"),
    [
        (partial(dpo_loss, beta=1.0), lambda difference: float(difference > 0)),
        (partial(dpo_loss, beta=1.0, label_smoothing=0.2), direct.sigmoid),
        (partial(dpo_loss, beta=0.5), direct.sigmoid),
    ],
    ids=["hard labels", "smoothed labels", "another beta"],
)
def test_other_labels_or_numbers_miss_the_optimum(loss, label_of, monkeypatch):
    monkeypatch.setitem(direct.PAIR_LOSSES, "dpo", (loss, label_of, 1.0))
    assert direct.run("dpo", 0, num_steps=80).distance_after > 0.05
