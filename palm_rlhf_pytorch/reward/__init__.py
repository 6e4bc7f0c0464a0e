"""Judges: text in, score out; models trained on labels, functions, classifiers, scorers elsewhere, several in one."""

from palm_rlhf_pytorch.reward.agreement import annotator_weights, krippendorff_alpha, merge_annotators
from palm_rlhf_pytorch.reward.caching import CachedJudge
from palm_rlhf_pytorch.reward.classifier import classifier_judge, pipeline_judge
from palm_rlhf_pytorch.reward.ensemble import RewardEnsemble, load_judge
from palm_rlhf_pytorch.reward.functions import each, ids_judge, text_judge
from palm_rlhf_pytorch.reward.http import HTTPScorer
from palm_rlhf_pytorch.reward.learning import train_reward_model
from palm_rlhf_pytorch.reward.model import RewardModel
from palm_rlhf_pytorch.reward.weighted import JudgeSum

__all__ = [
    "CachedJudge",
    "HTTPScorer",
    "JudgeSum",
    "RewardEnsemble",
    "RewardModel",
    "annotator_weights",
    "classifier_judge",
    "each",
    "ids_judge",
    "krippendorff_alpha",
    "load_judge",
    "merge_annotators",
    "pipeline_judge",
    "text_judge",
    "train_reward_model",
]
