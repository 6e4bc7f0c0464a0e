"""Hugging Face text classifiers as judges: a pretrained sentiment network, a toxicity filter, a reward model.

    positive = classifier_judge("distilbert-base-uncased-finetuned-sst-2-english", tokenizer, label="POSITIVE")
    trainer = RLHFTrainer(palm=palm, reward_model=positive, prompts=prompts, tokenizer=tokenizer)

The policy's ids are written out by its own tokenizer, and read by the classifier's. Needs the extra [hf].
"""

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from palm_rlhf_pytorch.extras import needs
from palm_rlhf_pytorch.reward.functions import Judge, text_judge
from palm_rlhf_pytorch.tensors import split_rows

Score = Callable[[Tensor, int], Tensor]  # logits (b, c), label -> scores (b,)
Reads = Callable[[str, str], "str | tuple[str, str]"]  # prompt, response -> one text, or two for a model of pairs


def log_odds(logits: Tensor, label: int) -> Tensor:
    """Log-odds, log p / (1 - p), of one of c labels that exclude each other, (b,); of a single label its logit."""
    others = torch.cat((logits[:, :label], logits[:, label + 1 :]), dim=1)
    return logits[:, label] - (others.logsumexp(dim=1) if others.shape[1] else 0.0)


def logit(logits: Tensor, label: int) -> Tensor:
    """The label's own logit, (b,): of labels that go together, or of a model that was trained to regress."""
    return logits[:, label]


def whole(prompt: str, response: str) -> str:
    """Prompt and response as one text."""
    return prompt + response


def response_alone(prompt: str, response: str) -> str:
    """The response, without its prompt."""
    return response


def prompt_and_response(prompt: str, response: str) -> tuple[str, str]:
    """The two texts of a model that reads pairs, as many reward models do."""
    return prompt, response


class ClassifierJudge(nn.Module):
    """A sequence classifier as a judge, (b, n) ids in and scores (b,) out; made by `classifier_judge`.

    A module: a trainer moves it to its device, and asks it in eval mode. On its own it is in eval mode too, and gives
    no gradient.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: object,
        *,
        classifier_tokenizer: Any,
        label: str | int | None = None,
        score: Score = log_odds,
        reads: Reads = whole,
        batch_size: int = 32,
        max_length: int | None = None,
    ) -> None:
        """Put a loaded model and its tokenizer behind ids; arguments as in `classifier_judge`."""
        super().__init__()
        if classifier_tokenizer.pad_token is None:
            raise ValueError("classifier_tokenizer has no pad_token: set one, and the model's config.pad_token_id")
        if batch_size < 1:
            raise ValueError(f"batch_size ({batch_size}) must be at least 1")
        self.model = model.eval()
        self.classifier_tokenizer = copy.deepcopy(classifier_tokenizer)
        self.classifier_tokenizer.truncation_side = "left"  # a text that is too long keeps its response
        config: Any = model.config
        self.label = find_label(label, dict(config.id2label))
        self.max_length = max_length or _longest(classifier_tokenizer, config)
        self.score, self.reads, self.batch_size, self.tokenizer = score, reads, batch_size, tokenizer

    @torch.no_grad()
    def forward(self, sequences: Tensor, /, *, prompt_mask: Tensor, mask: Tensor) -> Tensor:
        """Scores (b,) in float32; NaN where the classifier's tokenizer finds nothing to read."""
        return text_judge(self.score_texts, self.tokenizer)(sequences, prompt_mask=prompt_mask, mask=mask)

    @torch.no_grad()
    def score_texts(self, prompts: list[str], responses: list[str]) -> Tensor:
        """Scores (b,) of texts, those of similar length in one batch."""
        texts = [self.reads(prompt, response) for prompt, response in zip(prompts, responses, strict=True)]
        lengths = [len(text) if isinstance(text, str) else sum(map(len, text)) for text in texts]
        device = next(self.model.parameters()).device
        scores = torch.full((len(texts),), torch.nan, device=device)
        for rows in split_rows(lengths, max_rows=self.batch_size):
            batch = self._encoded([texts[row] for row in rows]).to(device)
            readable = batch["attention_mask"].any(dim=1)
            if bool(readable.any()):
                found = self.score(self.model(**batch).logits.float(), self.label)
                scores[torch.tensor(rows, device=device)] = found.masked_fill(~readable, torch.nan)
        return scores

    def _encoded(self, texts: list[str | tuple[str, str]]) -> Any:
        parts = [[text] if isinstance(text, str) else list(text) for text in texts]
        columns = [list(column) for column in zip(*parts, strict=True)]
        batch = self.classifier_tokenizer(
            *columns, padding=True, truncation=True, max_length=self.max_length, return_tensors="pt"
        )
        if batch["input_ids"].shape[1] >= self.max_length:
            warnings.warn(f"texts reach max_length ({self.max_length}): longer ones lose their beginning", stacklevel=2)
        return batch


def classifier_judge(
    model: str | Path | nn.Module,
    tokenizer: object,
    *,
    label: str | int | None = None,
    classifier_tokenizer: Any = None,
    score: Score = log_odds,
    reads: Reads = whole,
    batch_size: int = 32,
    max_length: int | None = None,
    **loading: Any,
) -> ClassifierJudge:
    """A judge of a Hugging Face sequence classifier.

    Args:
        model: a name on the Hub, a folder, or a model for sequence classification.
        tokenizer: the policy's, which writes the texts; see `text_judge`.
        label: which of the classifier's labels is wanted, by name or number; None where it has one output.
        classifier_tokenizer: the classifier's own; None loads it from where the model is.
        score: a number from the logits: `log_odds` of the label, its `logit`, or a function of yours.
        reads: which text is classified: `whole`, `response_alone`, `prompt_and_response`, or a function of yours.
        batch_size: texts of one pass.
        max_length: tokens of one text; a longer one loses its beginning. None for the most that the classifier reads.
        loading: goes to `from_pretrained`, such as revision= or dtype=.

    Raises:
        ImportError: if transformers is not installed.
        ValueError: if label is none of the classifier's (they are named), its tokenizer is missing or cannot pad, or
            its greatest length is not known.
    """
    if isinstance(model, str | Path):
        transformers = _transformers()
        source, loaded = str(model), transformers.AutoModelForSequenceClassification.from_pretrained(model, **loading)
        revision = {"revision": loading["revision"]} if "revision" in loading else {}
        if classifier_tokenizer is None:
            classifier_tokenizer = transformers.AutoTokenizer.from_pretrained(source, **revision)
    else:
        loaded = model
        if loading:
            raise ValueError(f"{', '.join(loading)}: for loading alone, and model is a loaded one")
    if classifier_tokenizer is None:
        raise ValueError("classifier_tokenizer is None: give the tokenizer of the model, or its name in place of it")
    return ClassifierJudge(
        loaded, tokenizer, classifier_tokenizer=classifier_tokenizer, label=label, score=score, reads=reads,
        batch_size=batch_size, max_length=max_length,
    )  # fmt: skip


def pipeline_judge(
    pipe: Any,
    tokenizer: object,
    *,
    label: str | int | None = None,
    score: Score = log_odds,
    reads: Reads = whole,
    batch_size: int = 32,
) -> Judge:
    """A judge of `transformers.pipeline("text-classification", ...)`.

    The pipeline stays on its own device. It cuts texts that are too long as its tokenizer says: set
    `pipe.tokenizer.truncation_side = "left"`, else a long prompt costs the response.

    Args:
        pipe: the pipeline.
        tokenizer: as in `classifier_judge`, like the others.
        label: likewise.
        score: likewise.
        reads: likewise.
        batch_size: likewise.

    Raises:
        ValueError: if label is none of the classifier's, or batch_size is below 1.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size ({batch_size}) must be at least 1")
    names = dict(pipe.model.config.id2label)
    index = find_label(label, names)

    def scores(prompts: list[str], responses: list[str]) -> Tensor:
        texts = [reads(*pair) for pair in zip(prompts, responses, strict=True)]
        inputs = [
            text if isinstance(text, str) else dict(zip(("text", "text_pair"), text, strict=True)) for text in texts
        ]
        found = pipe(inputs, top_k=None, function_to_apply="none", truncation=True, batch_size=batch_size)
        rows = [{entry["label"]: entry["score"] for entry in row} for row in found]
        logits = torch.tensor([[row[names[number]] for number in sorted(names)] for row in rows])
        return score(logits, index)

    return text_judge(scores, tokenizer)


def find_label(label: str | int | None, names: dict[int, str]) -> int:
    """The number of a label, which may be left out where there is one.

    Raises:
        ValueError: if there is none of that name or number; those that there are are named.
    """
    if label is None and len(names) == 1:
        return next(iter(names))
    found = [number for number, name in names.items() if label in (name, number)]
    if label is None or len(found) != 1:
        raise ValueError(f"label ({label!r}) must be one of the classifier's: {', '.join(map(repr, names.values()))}")
    return found[0]


def _longest(tokenizer: Any, config: Any) -> int:
    """Tokens that a classifier can read: what its tokenizer says, which is 1e30 where it does not know."""
    places = [getattr(config, "max_position_embeddings", None), tokenizer.model_max_length]
    known = [int(place) for place in places if place is not None and 0 < place < 1e9]
    if not known:
        raise ValueError("max_length is None, and neither the classifier nor its tokenizer knows its greatest length")
    return min(known)


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise ImportError(needs("a classifier by name", "transformers", extra="hf")) from error
    return transformers
