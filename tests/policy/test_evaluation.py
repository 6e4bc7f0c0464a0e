"""Two models compared: against loops over whole distributions, and by what must not change."""

import copy
import json

import pytest
import torch

from palm_rlhf_pytorch.policy.evaluation import evaluate

PROMPTS = ["dbeb", "j", "cg", "fdf", "ijh"]
EOS = 12


class Letters:
    """Ids 0 to 12 as letters a to m."""

    def __call__(self, text):
        return [ord(letter) - ord("a") for letter in text]

    def decode(self, ids):
        assert EOS not in ids, "the EOS is no text"
        return "".join(chr(ord("a") + index) for index in ids)


def compare(a, b, prompts=PROMPTS, judges=None, **options):
    settings = {"num_samples": 3, "max_new_tokens": 6, "eos_token": EOS, "max_batch_size": 4, "temperature": 2.5}
    return evaluate(a, b, prompts, judges or {}, Letters(), **{**settings, **options})


@pytest.fixture
def a(make_palm):
    return make_palm()


@pytest.fixture
def b(a):
    other = copy.deepcopy(a)
    with torch.no_grad():
        noise = torch.randn(other.token_emb.weight.shape, generator=torch.Generator().manual_seed(2))
        other.token_emb.weight += 0.15 * noise
    return other


def ids_of(prompt, response, ended):
    return torch.tensor(Letters()(prompt + response) + [EOS] * bool(ended))


def test_a_model_ties_with_itself_and_is_no_distance_away(a, judge):
    found = compare(a, a, judges={"sevens": judge})
    assert found.a.responses == found.b.responses and len(found.a.responses) == 15
    assert len(set(found.a.responses)) > 10  # rows are not drawn alike
    assert all(not sums.any() for side in (found.a, found.b) for sums in side.kl[:1] + side.kl[2:])
    assert found.contests["sevens"].outcomes.tolist() == [0.5] * 15
    assert found.contests["sevens"].difference == (0.0, 0.0, 0.0)
    assert found.figures()["response length (tokens)"].difference.value == 0.0


def test_exchanging_the_models_exchanges_all_figures(a, b, judge):
    one, other = compare(a, b, judges={"sevens": judge}), compare(b, a, judges={"sevens": judge})
    assert one.a.responses == other.b.responses and one.b.responses == other.a.responses
    ahead, behind = one.contests["sevens"], other.contests["sevens"]
    assert ahead.win_rate.value + behind.win_rate.value == pytest.approx(1)
    assert (ahead.win_rate.low, ahead.win_rate.high) == pytest.approx(
        (1 - behind.win_rate.high, 1 - behind.win_rate.low)
    )
    assert ahead.difference.value == pytest.approx(-behind.difference.value)
    torch.testing.assert_close(one.a.kl.exact, other.b.kl.exact)
    for name, figure in one.figures().items():
        assert (figure.a, figure.b) == pytest.approx((other.figures()[name].b, other.figures()[name].a)), name


def test_divergence_and_scores_are_those_of_each_response_alone(a, b, judge):
    temperature = 2.0
    found = compare(a, b, judges={"sevens": judge}, temperature=temperature, max_batch_tokens=25)
    assert found.prompt_rows.tolist() == [row for row in range(5) for _ in range(3)]
    assert 0 < found.a.ended.sum() < 15 and found.a.lengths.unique().numel() > 2
    for side, own, other in ((found.a, a, b), (found.b, b, a)):
        for row, prompt in enumerate(found.prompt_rows.tolist()):
            ids = ids_of(PROMPTS[prompt], side.responses[row], side.ended[row])
            start = len(PROMPTS[prompt])
            assert int(side.lengths[row]) == len(ids) - start and (side.ended[row] or len(ids) - start == 6)
            assert float(side.scores["sevens"][row]) == side.responses[row].count("h")  # id 7
            with torch.no_grad():
                p, q = (
                    (model.eval()(ids[None])[0, start - 1 : -1].double() / temperature).log_softmax(-1)
                    for model in (own, other)
                )
            gap = (p - q).gather(1, ids[start:, None])[:, 0]
            assert float(side.kl.k1[row]) == pytest.approx(float(gap.sum()), abs=1e-4)
            assert float(side.kl.k3[row]) == pytest.approx(float(((-gap).exp() - 1 + gap).sum()), abs=1e-4)
            assert float(side.kl.exact[row]) == pytest.approx(float((p.exp() * (p - q)).sum()), abs=1e-4)
    per_token = found.figures()["KL to the other, exact (nats a token)"]
    assert per_token.a == pytest.approx(float(found.a.kl.exact.sum() / found.a.lengths.sum()))


def test_both_models_draw_with_the_same_random_numbers_in_every_batch(a, b):
    with torch.no_grad():
        b.token_emb.weight.copy_(a.token_emb.weight)
        b.token_emb.weight[EOS] = 0.9 * b.token_emb.weight[EOS] + 0.05  # responses end elsewhere, so batches take
    found = compare(a, b, num_samples=12, max_batch_size=7)  # other numbers of steps: the last ones must not be off
    begins = [[text[:1] for text in side.responses[12:24]] for side in (found.a, found.b)]  # of the shortest prompt
    assert found.a.lengths.sum() != found.b.lengths.sum()
    assert sum(one == other for one, other in zip(*begins, strict=True)) >= 10
    assert found.a.responses[:5] != found.a.responses[7:12]  # another batch of the same prompt: its own numbers


def test_evaluate_leaves_models_and_global_random_state_alone(a, b, judge):
    a.train()
    b.eval()
    state = torch.get_rng_state()
    first, second = compare(a, b), compare(a, b)
    assert a.training and not b.training and torch.equal(torch.get_rng_state(), state)
    assert first.a.responses == second.a.responses != compare(a, b, seed=6).a.responses


def test_greedy_models_have_no_divergence_and_one_response(a, b):
    found = compare(a, b, num_samples=1, temperature=0.0)
    expected = a.eval().generate(8, torch.tensor([2, 6]), temperature=0.0, eos_token=EOS, pad_value=EOS)
    assert found.a.responses[2] == Letters().decode([index for index in expected.tolist() if index != EOS])
    assert found.a.kl is None and not any("KL" in name for name in found.figures())
    with pytest.raises(ValueError, match=r"num_samples \(2\).*temperature 0"):
        compare(a, b, num_samples=2, temperature=0.0)


def test_the_same_prompt_twice_is_one_cluster(a, b, judge):
    twice = compare(a, b, prompts=["dbeb", "j", "dbeb"], judges={"sevens": judge}, num_samples=2)
    margins = twice.contests["sevens"].margins
    first, second = (margins[[0, 1, 4, 5]].mean(), margins[[2, 3]].mean())
    assert twice.contests["sevens"].difference.value == pytest.approx(float((first + second) / 2))
    assert twice.contests["sevens"].difference.high > 12 * abs(float(first - second)) / 2 - 1e-9  # t of one degree


def test_pair_judges_read_both_responses_and_their_prompt(a, b):
    asked = []

    def longer(prompts, first, second):
        asked.append((prompts, first, second))
        return [0.5 + 0.5 * ((len(one) > len(two)) - (len(one) < len(two))) for one, two in zip(first, second)]  # noqa: B905

    found = compare(a, b, pair_judges={"longer": longer})
    texts = [PROMPTS[row] for row in found.prompt_rows]
    assert asked == [(texts, found.a.responses, found.b.responses), (texts, found.b.responses, found.a.responses)]
    lengths = [(len(one), len(two)) for one, two in zip(found.a.responses, found.b.responses, strict=True)]
    expected = [0.5 + 0.5 * ((two > one) - (two < one)) for one, two in lengths]
    assert found.contests["longer"].outcomes.tolist() == expected and found.contests["longer"].inconsistent == 0
    assert "longer: B wins" in found.table()


def test_records_and_summary_are_json_that_tells_all(a, b, judge, tmp_path):
    def unsure(sequences, *, prompt_mask, mask):
        scores = judge(sequences, prompt_mask=prompt_mask, mask=mask)
        return scores.masked_fill(sequences[:, 0] == 9, torch.nan)  # of the prompt "j"

    found = compare(a, b, judges={"sevens": unsure})
    found.to_jsonl(tmp_path / "samples.jsonl")
    lines = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert [line["prompt"] for line in lines] == [PROMPTS[row] for row in found.prompt_rows]
    for row, line in enumerate(lines):
        assert line["a"]["response"] == found.a.responses[row] and line["b"]["length"] == int(found.b.lengths[row])
        scored = line["prompt"] != "j"
        assert (line["margins"]["sevens"] is None) is not scored
        if scored:
            assert line["margins"]["sevens"] == line["b"]["scores"]["sevens"] - line["a"]["scores"]["sevens"]
    summary = json.loads(found.to_json())
    assert summary["prompts"] == 5 and summary["judges"]["sevens"]["unscored"] == 3
    assert summary["judges"]["sevens"]["win_rate"]["value"] == pytest.approx(found.contests["sevens"].win_rate.value)
    assert "pairs without two finite scores" in found.table()


def test_chosen_rows_are_extreme_and_come_once(a, b, judge):
    def mean_id(sequences, *, prompt_mask, mask):
        return (sequences * (mask & ~prompt_mask)).sum(dim=-1) / (mask & ~prompt_mask).sum(dim=-1)

    found = compare(a, b, judges={"ids": mean_id, "sevens": judge})
    margins = found.contests["ids"].margins.tolist()
    chosen = found.chosen(2)
    ahead, behind = chosen["B most ahead"], chosen["B most behind"]
    assert [margins[row] for row in ahead] == sorted(margins)[::-1][:2] and min(margins[row] for row in ahead) > 0
    assert [margins[row] for row in behind] == sorted(margins)[:2] and max(margins[row] for row in behind) < 0
    rows = [row for rows in chosen.values() for row in rows]
    assert len(set(rows)) == len(rows) == 6
    assert all(row % 3 == 0 or row - 1 in rows for row in chosen["first prompts"])
    assert compare(a, a, judges={"sevens": judge}).chosen(2) == {
        "first prompts": [0, 3], "B most ahead": [], "B most behind": []
    }  # fmt: skip


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_samples": 0}, r"num_samples \(0\)"),
        ({"eos_token": 13}, r"eos_token \(13\)"),
        ({"temperature": -1.0}, "temperature"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"prompts": []}, "no prompt"),
        ({"prompts": ["z"]}, "id 25"),
        ({"pair_judges": {"j": None}, "judges": {"j": None}}, "same name"),
    ],
)
def test_evaluate_refuses_what_it_cannot_do(a, b, options, message):
    with pytest.raises(ValueError, match=message):
        compare(a, b, **options)


def test_evaluate_refuses_models_that_do_not_fit(a, make_palm):
    with pytest.raises(ValueError, match=r"num_tokens=13.*b 11"):
        compare(a, make_palm(num_tokens=11))
    with pytest.raises(ValueError, match="causal=False"):
        compare(a, make_palm(causal=False))
