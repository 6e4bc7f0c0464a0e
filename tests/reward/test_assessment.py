"""A judge beside held-out labels: which scores are compared with what."""

import pytest
import torch

from palm_rlhf_pytorch.palm.transformer import PaLM
from palm_rlhf_pytorch.reward.assessment import assess
from palm_rlhf_pytorch.reward.ensemble import RewardEnsemble
from palm_rlhf_pytorch.reward.labels import encode_labels
from palm_rlhf_pytorch.reward.model import RewardModel
from palm_rlhf_pytorch.text.records import Pair, Ranking, Rating, Text, Vote
from palm_rlhf_pytorch.text.tokenizer import ByteTokenizer


def judge(*, scale=1.0, **settings):
    """Its features know a's from b's; a score is `scale` times about 2 for an a, and minus that for a b."""
    torch.manual_seed(0)
    palm = PaLM(num_tokens=259, dim=4, depth=1, dim_head=4, heads=1)
    with torch.no_grad():
        for parameter in palm.layers.parameters():
            parameter.zero_()
        palm.token_emb.weight.zero_()
        palm.token_emb.weight[ord("a")] = torch.tensor([1.0, -1.0, 0.0, 0.0])
        palm.token_emb.weight[ord("b")] = torch.tensor([-1.0, 1.0, 0.0, 0.0])
    model = RewardModel(palm, **settings)
    with torch.no_grad():
        model.head.weight.zero_()
        model.head.weight[-1, 0] = scale * 2 / 2**0.5
    return model


def encoded(*labels):
    return encode_labels(labels, ByteTokenizer(), max_length=100, eos_token=None)


def text(response):
    return Text("prompt", response)


def test_pairs_of_rankings_are_reported_with_the_others():
    labels = encoded(
        Ranking(texts=(text("bb"), text("aaa"), text("ab"), text("ba")), ranks=(2, 0, 1, 1)),
        Pair(chosen=text("b"), rejected=text("aa"), margin=2.0),
        Pair(chosen=text("a"), rejected=text("b"), preference=0.9, margin=1.0),
    )
    found = assess(judge(), labels, notes=["two lines"])
    assert found.pairs is not None and found.ratings is None and found.votes is None
    assert (found.pairs.accuracy.count, found.pairs.ties) == (5 + 2, 1)  # of six pairs in the ranking one is a tie
    assert found.pairs.accuracy.share == pytest.approx(6 / 7)
    assert {share.name: share.share for share in found.pairs.by_margin} == {"1": 1, "2": 0}
    assert (found.pairs.shorter_preferred.count, found.pairs.longer_preferred.count) == (1, 3)
    assert found.table().startswith("two lines")


def test_votes_are_reported_from_the_middle_of_the_scale_and_ratings_in_their_unit():
    model = judge(scale=0.0, num_binned_output=5, label_offset=1)
    with torch.no_grad():
        model.head.bias.copy_(torch.tensor([0.0, 0.0, 0.0, 100.0, 0.0]))  # a 4 for everything, above the middle of 3
    model.score_mean.fill_(9.0)
    labels = encoded(Vote(text=text("a"), up=True), Vote(text=text("b"), up=False), Rating(text=text("ab"), value=4))
    found = assess(model, labels)
    assert found.votes is not None and found.votes.accuracy.share == 0.5
    assert found.ratings is not None and found.ratings.mean_absolute_error == pytest.approx(0, abs=1e-5)


def test_of_an_ensemble_the_members_mean_is_judged():
    one, other = judge(scale=1.0), judge(scale=-3.0)
    other.score_std.fill_(100.0)
    labels = encoded(Pair(chosen=text("a"), rejected=text("b")))
    differences = [assess(found, labels).pairs.mean_difference for found in (one, other, RewardEnsemble([one, other]))]
    assert differences[0] == pytest.approx(4, abs=0.1) and differences[1] == pytest.approx(-12, abs=0.3)
    assert differences[2] == pytest.approx(sum(differences[:2]) / 2)
