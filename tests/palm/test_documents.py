"""Documents packed into one row: each is read as if it stood alone."""

import math

import pytest
import torch

LENGTHS = [(3, 7, 1, 5), (9, 2, 4, 1)]  # documents of two rows of 16 tokens


@pytest.fixture
def packed():
    """Rows of documents: ids and document numbers (2, 16), and the documents by themselves, in order."""
    documents = [[torch.randint(0, 37, (length,)) for length in row] for row in LENGTHS]
    ids = torch.stack([torch.cat(row) for row in documents])
    numbers = torch.stack([torch.repeat_interleave(torch.tensor([4, 0, 9, 2]), torch.tensor(row)) for row in LENGTHS])
    return ids, numbers, [document for row in documents for document in row]


@pytest.mark.parametrize(
    "options", [{}, {"fused": False}, {"rotary_xpos_scale_base": None}, {"qk_rmsnorm": True}, {"causal": False}]
)
@pytest.mark.parametrize("scope", [None, "tuned"])
def test_a_packed_document_gives_the_logits_it_gives_alone(make_palm, packed, options, scope):
    palm = make_palm(finetune_scopes=["tuned"], **options).double()  # float32's rounding differs between processors
    ids, numbers, documents = packed
    found = palm(ids, documents=numbers, finetune_scope=scope).flatten(0, 1)
    expected = torch.cat([palm(document[None], finetune_scope=scope)[0] for document in documents])
    assert found.dtype == torch.float64 and (found - expected).abs().max() <= 1e-6 * expected.abs().max()


@pytest.mark.parametrize("left", [True, False])
def test_padding_beside_documents_changes_nothing(make_palm, packed, left):
    palm = make_palm()
    ids, numbers, _ = packed
    padding = (3, 0) if left else (0, 3)
    wide = [torch.nn.functional.pad(x, padding, value=value) for x, value in ((ids, 8), (numbers, 4))]
    mask = torch.nn.functional.pad(torch.ones_like(ids, dtype=torch.bool), padding)
    found = palm(wide[0], mask=mask, documents=wide[1])[mask]
    expected = palm(ids, documents=numbers).flatten(0, 1)
    assert (found - expected).abs().max() <= 1e-6 * expected.abs().max()
    loss = palm(wide[0], True, mask=mask, documents=wide[1]).detach()
    assert float(loss) == pytest.approx(float(palm(ids, True, documents=numbers).detach()), abs=1e-5)


@pytest.mark.parametrize("scope", [None, "tuned"])
def test_loss_and_gradient_are_those_of_the_documents_one_by_one(make_palm, packed, scope):
    palm = make_palm(finetune_scopes=["tuned"]).double()
    ids, numbers, documents = packed
    weights = palm.finetune_parameters("tuned") if scope else palm.palm_parameters()
    loss = palm(ids, True, documents=numbers, finetune_scope=scope)
    found = torch.autograd.grad(loss, weights, allow_unused=True)
    longer = [document for document in documents if len(document) > 1]
    sums = [palm(document[None], True, finetune_scope=scope) * (len(document) - 1) for document in longer]
    expected_loss = torch.stack(sums).sum() / sum(len(document) - 1 for document in longer)
    expected = torch.autograd.grad(expected_loss, weights, allow_unused=True)
    assert float(loss) == pytest.approx(float(expected_loss), rel=1e-6)
    for gradient, other in zip(found, expected, strict=True):
        assert (gradient - other).abs().max() <= 1e-6 * other.abs().max()


def test_loss_mask_chooses_targets_and_a_documents_first_token_is_never_one(make_palm, packed):
    palm = make_palm()
    ids, numbers, _ = packed
    logprobs = palm(ids, documents=numbers).log_softmax(dim=-1)
    loss_mask = torch.zeros_like(ids, dtype=torch.bool)
    loss_mask[0, [2, 3, 10]] = True  # 3 and 10 begin documents of the first row
    loss_mask[1, 5] = True
    expected = -(logprobs[0, 1, ids[0, 2]] + logprobs[1, 4, ids[1, 5]]) / 2
    found = palm(ids, True, documents=numbers, loss_mask=loss_mask)
    assert float(found) == pytest.approx(float(expected), abs=1e-5)


def test_a_loss_mask_without_targets_gives_zero_and_no_gradient(make_palm):
    palm = make_palm()
    ids = torch.tensor([[1, 2, 3]])
    loss = palm(ids, True, loss_mask=torch.zeros(1, 3, dtype=torch.bool))
    loss.backward()
    assert float(loss) == 0 and not palm.token_emb.weight.grad.any()


def test_documents_may_fill_a_row_that_is_longer_than_the_model_reads(make_palm):
    palm = make_palm(rotary_xpos_scale_base=1).half()
    limit = palm.max_length
    assert limit < math.inf
    ids = torch.randint(0, 37, (1, 2 * limit))
    numbers = (torch.arange(2 * limit) // limit)[None]
    assert palm(ids, documents=numbers).isfinite().all()
    with pytest.raises(ValueError, match="range of the model's dtype"):
        palm(ids)


@pytest.mark.parametrize(
    ("marks", "error", "message"),
    [
        ({"documents": torch.zeros(2, 5)}, TypeError, "documents are torch.float32"),
        ({"documents": torch.zeros(2, 4, dtype=torch.long)}, ValueError, r"documents \(2, 4\)"),
        ({"loss_mask": torch.ones(2, 5, dtype=torch.long)}, TypeError, "torch.int64"),
        ({"loss_mask": torch.ones(2, 5, dtype=torch.bool)}, ValueError, "return_loss=True"),
    ],
)
def test_marks_that_do_not_fit_are_refused(make_palm, marks, error, message):
    with pytest.raises(error, match=message):
        make_palm()(torch.ones(2, 5, dtype=torch.long), **marks)


def test_documents_do_not_go_with_a_cache(make_palm):
    palm, ids = make_palm(), torch.ones(1, 3, dtype=torch.long)
    with pytest.raises(ValueError, match="cache"):
        palm.embed(ids, cache=palm.new_cache(1, 4), documents=ids)
