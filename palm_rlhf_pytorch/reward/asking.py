"""What to ask a person next: the pairs of responses whose judgement would teach an ensemble of reward models most.

Houlsby et al., "Bayesian Active Learning for Classification and Preference Learning", https://arxiv.org/abs/1112.5745:
most is learnt where members are sure of opposite things. A pair that all of them hold for a tie is a coin's toss to
people too, and teaches nothing. Knows no file; rows come in, rows go out.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from palm_rlhf_pytorch.reward.ensemble import RewardEnsemble
from palm_rlhf_pytorch.reward.labels import encode_labels, read_texts
from palm_rlhf_pytorch.tensors import at_least_float32
from palm_rlhf_pytorch.text.datasets import BadRecord, Labels, read_labels, stop_at_bad_record
from palm_rlhf_pytorch.text.records import Pair

# columns that say which response is preferred, or by how much: for a question they are taken away
JUDGEMENTS = ("choice", "label", "preference", "tie", "margin", "strength", "annotator", "annotator_id", "worker",
              "worker_id", "weight")  # fmt: skip


class Information(NamedTuple):
    """Of pairs, (b,) each: `gain` (nats), `probability` that the first is preferred, and the members' `deviation`.

    The deviation is that of the members' score differences, in units of log-odds.
    """

    gain: Tensor
    probability: Tensor
    deviation: Tensor


class Question(NamedTuple):
    """A pair to be judged, with what an ensemble expects of the answer; see `Information`."""

    pair: Pair
    gain: float
    probability: float
    deviation: float

    def row(self) -> dict[str, Any]:
        """Columns for a file: a person writes "a", "b" or "tie" for `choice`, and `read_labels` reads the pair."""
        first, second = self.pair.texts
        same = first.prompt == second.prompt
        texts = {"prompt": first.prompt} if same and first.prompt else {}
        texts |= {"response_a": first.response, "response_b": second.response} if same else {
            "response_a": first.prompt + first.response, "response_b": second.prompt + second.response,
        }  # fmt: skip
        group = {} if self.pair.group is None else {"group": self.pair.group}
        expected = {"gain": self.gain, "probability_a": self.probability, "deviation": self.deviation}
        return texts | group | {"choice": None, "expected": expected}


def information(differences: Tensor) -> Information:
    """What the answers about pairs would tell which member is right (BALD).

    gain = H(mean p) - mean H(p),  p = sigma(difference),  H(p) = -p log p - (1 - p) log(1 - p)

    Args:
        differences: score of the first response minus that of the second, by each member, (m, b).

    Raises:
        ValueError: if they are not (m, b) with m of at least two.
    """
    if differences.ndim != 2 or len(differences) < 2:
        raise ValueError(f"differences have shape {tuple(differences.shape)}: they must be (m, b), m two or more")
    differences = differences.double()
    probabilities = differences.sigmoid()
    probability = probabilities.mean(dim=0)
    gain = _entropy(probability) - _entropy(probabilities).mean(dim=0)
    return Information(gain.clamp(min=0), probability, differences.std(dim=0, correction=0))


def _entropy(probability: Tensor) -> Tensor:
    return torch.special.entr(probability) + torch.special.entr(1 - probability)
