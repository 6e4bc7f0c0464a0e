"""Hugging Face classifiers as judges, on a tiny BERT made here and loaded as any other."""

import math

import pytest
import torch

from palm_rlhf_pytorch.reward.classifier import (
    classifier_judge,
    logit,
    pipeline_judge,
    prompt_and_response,
    response_alone,
)
from palm_rlhf_pytorch.tensors import lengths_to_mask, pad_ragged
from palm_rlhf_pytorch.text.tokenizer import ByteTokenizer

transformers = pytest.importorskip("transformers")

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good", "bad", "film", "so", "the"]
PAIRS = [("the film", " so good"), ("bad", " film"), ("so", " the bad film film so"), ("", "")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A classifier of three labels with its tokenizer, saved as people save theirs."""
    path = tmp_path_factory.mktemp("classifier")
    vocab = {word: number for number, word in enumerate(WORDS)}
    tokenizer = transformers.BertTokenizerFast(vocab=vocab, model_max_length=10)
    assert tokenizer("so good")["input_ids"] == [2, 8, 5, 3]
    config = transformers.BertConfig(
        vocab_size=len(WORDS), hidden_size=12, num_hidden_layers=2, num_attention_heads=3, intermediate_size=20,
        max_position_embeddings=16, num_labels=3, id2label={0: "BAD", 1: "MIXED", 2: "GOOD"},
        label2id={"BAD": 0, "MIXED": 1, "GOOD": 2}, initializer_range=0.7, hidden_dropout_prob=0.5,
    )  # fmt: skip
    torch.manual_seed(3)
    transformers.BertForSequenceClassification(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def ask(judge, pairs=PAIRS):
    sequences, mask = pad_ragged([ByteTokenizer().encode(prompt + response) for prompt, response in pairs])
    prompts = torch.tensor([len(prompt) for prompt, _ in pairs])
    return judge(sequences, prompt_mask=lengths_to_mask(prompts, sequences.shape[1]), mask=mask)


def by_hand(folder, *texts):
    """Probabilities of one text alone, without padding."""
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        return model(**tokenizer(*texts, return_tensors="pt")).logits[0]


def test_score_is_the_log_odds_of_the_label_for_each_text_alone(folder):
    judge = classifier_judge(folder, ByteTokenizer(), label="GOOD", batch_size=3)
    scores = ask(judge)
    for (prompt, response), score in zip(PAIRS, scores.tolist(), strict=True):
        chance = by_hand(folder, prompt + response).softmax(dim=0)[2].item()
        assert score == pytest.approx(math.log(chance / (1 - chance)), abs=1e-4)
    assert scores.dtype == torch.float32 and not scores.requires_grad
    assert ask(judge).tolist() == scores.tolist()  # no dropout
    assert len(scores.unique()) == 4


@pytest.mark.parametrize("batch_size", [1, 4])
def test_pipeline_says_what_the_model_says(folder, batch_size):
    pipe = transformers.pipeline("text-classification", model=str(folder))
    pipe.tokenizer.truncation_side = "left"
    for reads in (response_alone, prompt_and_response):
        found = ask(pipeline_judge(pipe, ByteTokenizer(), label=1, reads=reads, batch_size=batch_size))
        expected = ask(classifier_judge(folder, ByteTokenizer(), label="MIXED", reads=reads))
        assert torch.allclose(found[:3], expected[:3], atol=1e-4)


def test_pairs_are_read_as_two_texts(folder):
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder).train()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    judge = classifier_judge(
        model, ByteTokenizer(), classifier_tokenizer=tokenizer, label=0, score=logit, reads=prompt_and_response
    )
    assert ask(judge)[1].item() == pytest.approx(by_hand(folder, "bad", " film")[0].item(), abs=1e-4)
    assert model in list(judge.modules())  # whoever moves the judge moves the model


def test_a_long_text_keeps_its_end_and_this_is_said(folder):
    judge = classifier_judge(folder, ByteTokenizer(), label="GOOD")  # 10 tokens, [CLS] and [SEP] among them
    with pytest.warns(UserWarning, match=r"max_length \(10\): longer ones lose their beginning"):
        score = ask(judge, [("good so " * 30 + "the film the film", " so bad good")])
    kept = by_hand(folder, "so the film the film so bad good").softmax(dim=0)[2].item()
    assert score.item() == pytest.approx(math.log(kept / (1 - kept)), abs=1e-4)


def test_a_reward_model_of_one_output_gives_its_logit(folder, tmp_path):
    transformers.AutoModelForSequenceClassification.from_pretrained(
        folder, num_labels=1, ignore_mismatched_sizes=True
    ).save_pretrained(tmp_path)
    transformers.AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path)
    score = ask(classifier_judge(str(tmp_path), ByteTokenizer()), PAIRS[:1])
    assert score.item() == pytest.approx(by_hand(tmp_path, "the film so good").item(), abs=1e-5)


def test_what_does_not_fit_the_classifier_is_named(folder):
    for label in (None, "POSITIVE", 3):
        with pytest.raises(ValueError, match="must be one of the classifier's: 'BAD', 'MIXED', 'GOOD'"):
            classifier_judge(folder, ByteTokenizer(), label=label)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    with pytest.raises(ValueError, match="classifier_tokenizer is None"):
        classifier_judge(model, ByteTokenizer(), label=0)
    with pytest.raises(ValueError, match="revision: for loading alone"):
        classifier_judge(model, ByteTokenizer(), label=0, classifier_tokenizer=tokenizer, revision="main")
    tokenizer.pad_token = None
    with pytest.raises(ValueError, match="no pad_token"):
        classifier_judge(model, ByteTokenizer(), label=0, classifier_tokenizer=tokenizer)
    with pytest.raises(OSError):
        classifier_judge(folder / "missing", ByteTokenizer(), label=0)


def test_without_transformers_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    with pytest.raises(ImportError, match=r'pip install "palm-rlhf-pytorch\[hf\]"'):
        classifier_judge("some/model", ByteTokenizer(), label=0)
