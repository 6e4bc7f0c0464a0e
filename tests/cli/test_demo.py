"""The demo's judge and prompts by hand, and the whole demo in its quick form."""

import json
import math

import pytest
import torch

from palm_rlhf_pytorch import PaLM, RewardModel
from palm_rlhf_pytorch.cli.demo_pairs import Pair, split_pairs
from palm_rlhf_pytorch.cli.demo_report import Sampled, summarize
from palm_rlhf_pytorch.cli.demo_text import demo_text, distinct_2, gold_score, prompts_of
from palm_rlhf_pytorch.cli.main import main
from palm_rlhf_pytorch.training.metrics import read_metrics

WORDS = frozenset({"the", "of", "cat", "sat", "on", "mat", "a"})


@pytest.mark.parametrize(
    ("response", "ended", "expected"),
    [
        ("The cat sat.", True, 1.0),
        ("The cxt sat.", True, 7 / 10),  # "The" and "sat." are 7 of 10 letters and marks
        ("the the cat", True, 6 / 9),  # a word right after itself does not count
        ("the cat the cat", True, 9 / 12),  # nor does a pair of words that stood before
        ("the ca", False, 1.0),  # what the limit cut is left out
        ("the ca", True, 3 / 5),  # what ended by itself is not
        ("the cat ", False, 1.0),
        ("", True, 0.0),
        ("zzz", False, 0.0),
        ("(the) cat,", True, 1.0),
    ],
)
def test_gold_score_is_the_share_of_known_words_not_repeated(response, ended, expected):
    assert gold_score(response, WORDS, ended=ended) == pytest.approx(expected)


@pytest.mark.parametrize("times", [1, 2, 5])
def test_gold_score_does_not_depend_on_length(times):
    passage = " ".join(["the cat sat on a mat of zzz"] * times)  # eight words: a pair comes again beyond its memory
    assert gold_score(passage, WORDS, ended=True) == pytest.approx(17 / 20)


def test_distinct_2_counts_pairs_of_words_over_all_responses():
    assert distinct_2(["a b a b", "a b"]) == pytest.approx(2 / 4)
    assert distinct_2(["a", ""]) == 0.0


def test_demo_text_keeps_held_out_paragraphs_apart_and_words_seen_three_times():
    paragraphs = [f"Rare{number} words are many, words are few." for number in range(20)]
    text = demo_text(paragraphs, held_out=0.25, seed=3, document_length=50)  # two paragraphs of 37 make a document
    assert (len(text.train), len(text.held_out)) == (8, 2)
    kept = [paragraph for document in text.train + text.held_out for paragraph in document.split("\n")]
    assert sorted(kept) == sorted(paragraphs)
    assert text.words == {"rare", "words", "are", "many", "few"}


def test_prompts_end_behind_a_word_and_leave_something_to_say():
    paragraphs = ["Return the number of items in the longest list of all.", "Too short."]
    (prompt,) = prompts_of(paragraphs, shortest=12, longest=20, seed=0)
    assert paragraphs[0].startswith(prompt)
    assert prompt.endswith(" ")
    assert 4 <= len(prompt) <= 21


def test_summary_gives_means_and_the_paired_standard_error():
    before, after = (
        Sampled([torch.zeros(length) for length in lengths], ["a b", "b c"], torch.tensor([True, False]))
        for lengths in ((2, 4), (3, 6))
    )
    before.gold, after.gold = torch.tensor([0.2, 0.4]), torch.tensor([0.5, 0.5])
    before.reward = after.reward = torch.tensor([1.0, 3.0])
    after.kl = torch.tensor([1.0, 2.0])
    summary = summarize(before, after, rm_accuracy=0.7, bits_per_byte=2.5, seed=4)
    assert summary["gold_before"] == pytest.approx(0.3)
    assert summary["gold_after"] == pytest.approx(0.5)
    assert summary["gold_se"] == pytest.approx(0.1)  # gains .3 and .1: deviation .1414, over the root of 2
    assert summary["rm_before"] == 2.0
    assert summary["kl"] == 1.5
    assert (summary["length_before"], summary["length_after"]) == (3.0, 4.5)
    assert summary["eos_rate_after"] == 0.5
    assert (summary["seed"], summary["n"]) == (4, 2)


def test_held_out_pairs_have_prompts_that_were_not_trained_on():
    def pair(*ids, prompt_length):
        return Pair(torch.tensor(ids), torch.tensor([*ids, 9]), prompt_length)

    held = [pair(1, 2, 5, prompt_length=2), pair(1, 3, 5, prompt_length=2), pair(1, 2, 5, prompt_length=3)]
    trained = [pair(1, 2, 7, prompt_length=2), pair(4, 4, 4, prompt_length=1)]
    train, held_out = split_pairs(held + trained, 3)
    assert train == trained
    assert held_out == held[1:]  # the first has the prompt (1, 2) of a pair trained on
    with pytest.raises(ValueError, match="give more prompts"):
        split_pairs([held[0], trained[0]], 1)


KEYS = {
    "gold_before", "gold_after", "gold_se", "rm_before", "rm_after", "rm_accuracy", "bits_per_byte", "kl",
    "length_before", "length_after", "eos_rate_before", "eos_rate_after", "distinct2_before", "distinct2_after",
    "seed", "n",
}  # fmt: skip


def test_quick_demo_runs_all_stages_and_writes_what_it_says(tmp_path, capsys):
    out = tmp_path / "demo"
    assert main(["demo", "--quick", "--out", str(out), "--seed", "5", "--device", "cpu"]) == 0
    summary = json.loads((out / "summary.json").read_text())
    assert summary.keys() == KEYS
    assert all(math.isfinite(value) for value in summary.values())
    assert (summary["seed"], summary["n"]) == (5, 256)
    assert summary["bits_per_byte"] < 6  # 8 without learning
    assert len(read_metrics(out / "metrics.jsonl")) == 3
    assert json.loads((out / "settings.json").read_text())["num_eval_prompts"] == 256
    palm, improved = PaLM.from_checkpoint(out / "palm.pt"), PaLM.from_checkpoint(out / "improved_palm.pt")
    assert improved.config == palm.config
    assert any(not torch.equal(a, b) for a, b in zip(palm.parameters(), improved.parameters(), strict=True))
    assert RewardModel.from_checkpoint(out / "reward_model.pt")(torch.tensor([[7, 8, 9]])).shape == (1,)
    printed = capsys.readouterr().out
    for line in ("bits per byte", "held-out pairs", "gold score", "KL to the reference", "EOS rate", "distinct-2"):
        assert line in printed


def test_demo_refuses_a_folder_with_other_files(tmp_path, capsys):
    (tmp_path / "metrics.jsonl").write_text("mine")
    assert main(["demo", "--quick", "--out", str(tmp_path)]) == 2
    assert str(tmp_path) in capsys.readouterr().err
    assert (tmp_path / "metrics.jsonl").read_text() == "mine"


def test_demo_refuses_a_negative_seed(capsys):
    assert main(["demo", "--seed", "-1"]) == 2
    assert "--seed -1" in capsys.readouterr().err
