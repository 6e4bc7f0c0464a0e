"""Faults that preflight must find: each is planted in a trainer, or in what it is asked for.

Every plant is called with a builder of trainers and pytest's monkeypatch; it returns a trainer and preflight's options.
"""

import pytest
import torch
from torch import nn

from palm_rlhf_pytorch.lora import LayerAdapter
from palm_rlhf_pytorch.palm import block, responses
from palm_rlhf_pytorch.palm.generation import generate_responses
from palm_rlhf_pytorch.policy import actor_critic as hats
from palm_rlhf_pytorch.policy import targets
from palm_rlhf_pytorch.policy.actor_critic import ActorCritic

NUM_TOKENS = 13
MATRIX = torch.tensor([[3, 1, 4, 1, 5, 0], [9, 2, 0, 0, 0, 0], [2, 6, 5, 0, 0, 0], [7, 1, 8, 2, 8, 1]])


def sum_of_ids(sequences, *, prompt_mask, mask):
    """A judge whose scores differ between responses."""
    return (sequences * (mask & ~prompt_mask)).sum(dim=-1).float()


def no_room(build, patch):
    return build(), {"max_seq_len": 4}


def end_token_pads(build, patch):
    return build(prompt_token_ids=MATRIX, pad_value=0), {"eos_token": 0}


def end_token_of_the_tokenizer_pads(build, patch):
    class Letters:
        pad_token_id = 10

        def __call__(self, text):
            return [ord(letter) - ord("a") for letter in text]

    return build(prompts=["abc", "d", "eb"], tokenizer=Letters()), {"eos_token": 10}


def end_token_outside_the_vocabulary(build, patch):
    return build(), {"eos_token": NUM_TOKENS}


def prompts_that_have_ended(build, patch):
    return build(prompt_token_ids=[torch.tensor(ids) for ids in ([3, 9], [9], [2, 5])]), {"eos_token": 9}


def too_little_memory(build, patch):
    return build(), {"memory": lambda: (2e9, 1e9)}


def hardly_enough_memory(build, patch):
    return build(), {"memory": lambda: (1.9e9, 2e9)}


def a_weight_that_is_not_a_number(build, patch):
    trainer = build()
    trainer.actor_critic.palm.layers[1].in_proj.weight.data[2, 3] = torch.nan
    return trainer, {}


def a_thawed_trunk(build, patch):
    trainer = build()
    trainer.actor_critic.palm.layers[0].out_proj.weight.requires_grad_(True)
    return trainer, {}


def an_optimizer_that_lacks_a_parameter(build, patch):
    trainer = build()
    trainer.learner.optimizer.param_groups[0]["params"].pop()
    return trainer, {}


def a_frozen_parameter_in_the_optimizer(build, patch):
    trainer = build(actor_lora=False)
    next(iter(trainer.learner.actor.values())).requires_grad_(False)
    return trainer, {}


def parameters_listed_before_they_were_replaced(build, patch):
    trainer = build()
    trainer.learner.actor = {name: nn.Parameter(p.detach().clone()) for name, p in trainer.learner.actor.items()}
    return trainer, {}


def always_dropping(hat):
    def plant(build, patch):
        trainer = build()
        found = getattr(trainer.actor_critic, hat)
        patch.setattr(
            found,
            "embed",
            lambda trunk, ids, **at: found.model(trunk).embed(ids, adapter=found.adapter, dropout=0.3, **at),
        )
        return trainer, {}

    return plant


def dropout_while_learning(build, patch):
    with pytest.warns(UserWarning, match="actor_dropout"):
        return build(actor_dropout=0.2), {}


def values_that_overflow(build, patch):
    trainer = build()
    trainer.actor_critic.value_head.weight.data.fill_(3e38)
    return trainer, {}


def no_temperature_while_learning(build, patch):
    for name in ("chosen_logprobs", "compared_logprobs"):
        real = getattr(hats, name)
        patch.setattr(hats, name, lambda *args, real=real, **options: real(*args, **{**options, "temperature": 1.0}))
    return build(), {"temperature": 0.7}


def places_off_by_one(build, patch):
    real = hats._places

    def shifted(sequences, prompt_lengths, *rest):
        at = real(sequences, prompt_lengths, *rest)
        return at._replace(sources=(at.sources + 1).clamp(max=sequences.numel() - 1))

    patch.setattr(hats, "_places", shifted)
    return build(), {}


def attention_that_sees_padding(build, patch):
    real = block.attend
    patch.setattr(block, "attend", lambda *args, **options: real(*args, **{**options, "causal": False, "mask": None}))
    return build(), {}


def a_critic_that_sees_padding(build, patch):
    trainer = build()
    found = trainer.actor_critic.critic
    real = found.embed
    patch.setattr(found, "embed", lambda trunk, ids, **at: real(trunk, ids, **at) + 0.01 * ids.shape[1])
    return trainer, {}


def no_temperature_while_sampling(build, patch):
    real = responses.sample_tokens
    patch.setattr(responses, "sample_tokens", lambda *args, **options: real(*args, **{**options, "temperature": 1.0}))
    return build(), {"temperature": 0.7}


def a_sampler_that_leaves_the_adapter_out(build, patch):
    trainer = build()
    for name, parameter in trainer.actor_critic.actor.named_parameters():
        parameter.data += 0.1 * name.endswith(".B")
    trainer.learner.steps = 1
    found = trainer.actor_critic
    patch.setattr(found, "generate", lambda *args, **options: generate_responses(found.palm, *args, **options))
    return trainer, {}


def other_numbers_recorded(build, patch):
    real = hats.compared_logprobs

    def other(*args, **options):
        found = real(*args, **options)
        return found._replace(logprobs=found.logprobs + 2e-4)

    patch.setattr(hats, "compared_logprobs", other)
    return build(), {}


def a_layer_that_heeds_train_mode(build, patch):
    trainer = build()
    found = trainer.actor_critic.actor
    real = found.embed
    patch.setattr(found, "embed", lambda trunk, ids, **at: real(trunk, ids, **at) * (1.02 if found.training else 1.0))
    return trainer, {}


def an_adapter_that_is_not_new(build, patch):
    trainer = build()
    trainer.actor_critic.actor.adapter.layers["1"].v.B.data.fill_(0.01)
    return trainer, {}


def a_score_one_token_early(build, patch):
    real = targets.shaped_rewards

    def early(scores, logprobs, ref_logprobs, mask, **options):
        inner = mask & mask.roll(-1, dims=1)
        inner[:, -1] = False
        return real(scores, logprobs, ref_logprobs, inner, **options)

    patch.setattr(targets, "shaped_rewards", early)
    return build(), {}


def a_score_on_every_token(build, patch):
    real = targets.shaped_rewards

    def everywhere(scores, logprobs, ref_logprobs, mask, **options):
        found = real(scores, logprobs, ref_logprobs, mask, **options)
        return found._replace(rewards=found.rewards + scores[:, None] * mask)

    patch.setattr(targets, "shaped_rewards", everywhere)
    return build(), {}


def a_detached_adapter(build, patch):
    real = LayerAdapter.side_by_side

    def detached(self):
        down_in, up_in, down_out, up_out = real(self)
        return down_in, up_in.detach(), down_out, up_out

    patch.setattr(LayerAdapter, "side_by_side", detached)
    return build(), {}


def values_read_from_the_actor(build, patch):
    real = ActorCritic._values

    def both(self, sequences, at):
        hidden = self.actor.embed(self.palm, sequences, since=at.since)
        return real(self, sequences, at) + at.put(at.before(hidden)[:, 0].float())

    patch.setattr(ActorCritic, "_values", both)
    return build(), {}


def a_factor_of_zero(build, patch):
    trainer = build()
    trainer.actor_critic.actor.adapter.layers["0"].o.scale = 0.0
    return trainer, {}


def judging(found):
    def plant(build, patch):
        return build(reward_model=lambda ids, **masks: found(ids, sum_of_ids(ids, **masks))), {}

    return plant


def refusing(ids, scores):
    raise OSError("no answer")


def a_judge_of_prompts(build, patch):
    return build(reward_model=lambda ids, *, prompt_mask, mask: (ids.sin() * prompt_mask).sum(dim=-1)), {}


def held_out(found):
    def plant(build, patch):
        return build(held_out_judge=judging(found)(build, patch)[0].reward_model), {}

    return plant


# plant, the check that finds it, how, and words of its remedy
FAULTS = [
    (end_token_pads, "end token", "fail", "prompt_mask or prompt_lengths"),
    (end_token_of_the_tokenizer_pads, "end token", "warn", "told by lengths"),
    (end_token_outside_the_vocabulary, "end token", "fail", "tokenizer's own end token"),
    (prompts_that_have_ended, "end token", "warn", "without its end token"),
    (no_room, "prompts fit", "fail", "counts the prompt"),
    (lambda build, patch: (build(), {"max_new_tokens": 38}), "prompts fit", "warn", "raise max_seq_len"),
    (too_little_memory, "memory", "fail", "max_batch_size (other responses are drawn)"),
    (hardly_enough_memory, "memory", "warn", "lower max_batch_tokens or turn activation_checkpointing on, neither"),
    (a_weight_that_is_not_a_number, "weights", "fail", "diverged"),
    (a_thawed_trunk, "weights", "fail", "requires_grad_(False)"),
    (an_optimizer_that_lacks_a_parameter, "optimizer", "fail", "never change"),
    (a_frozen_parameter_in_the_optimizer, "optimizer", "fail", "frozen or replaced"),
    (parameters_listed_before_they_were_replaced, "optimizer", "fail", "list them again"),
    (lambda build, patch: (build(), {"temperature": 0.0}), "sampling", "fail", "setting"),
    (always_dropping("actor"), "dropout", "fail", "eval mode"),
    (always_dropping("critic"), "dropout", "fail", "eval mode"),
    (dropout_while_learning, "dropout", "warn", "actor_dropout=0"),
    (values_that_overflow, "values", "fail", "value_head"),
    (no_temperature_while_learning, "temperature", "fail", "temperature of sampling (0.7)"),
    (places_off_by_one, "temperature", "fail", "neighbouring place"),
    (attention_that_sees_padding, "padding", "fail", "actor sees padding"),
    (a_critic_that_sees_padding, "padding", "fail", "critic sees padding"),
    (no_temperature_while_sampling, "sampler = learner", "fail", "temperature (0.7)"),
    (a_sampler_that_leaves_the_adapter_out, "sampler = learner", "fail", "weights"),
    (other_numbers_recorded, "ratio is 1", "fail", "recording"),
    (a_layer_that_heeds_train_mode, "ratio is 1", "fail", "train mode"),
    (an_adapter_that_is_not_new, "KL is 0", "fail", "B must be 0"),
    (a_score_one_token_early, "score placement", "fail", "shifted"),
    (a_score_on_every_token, "score placement", "fail", "last token"),
    (a_detached_adapter, "gradients", "fail", "detached"),
    (values_read_from_the_actor, "gradients", "fail", "share"),
    (a_factor_of_zero, "gradients", "warn", "factor of 0"),
    (judging(lambda ids, scores: scores / (scores - scores[1])), "judge's scores", "fail", "divides by 0"),
    (judging(lambda ids, scores: scores[:, None]), "judge's scores", "fail", "(b, 1)"),
    (judging(lambda ids, scores: scores.tolist()), "judge's scores", "fail", "list"),
    (judging(refusing), "judge's scores", "fail", "call judge"),
    (judging(lambda ids, scores: scores + torch.rand(len(ids))), "judge repeats", "warn", "random"),
    (judging(lambda ids, scores: 0 * scores + 7), "judge tells apart", "warn", "constant"),
    (a_judge_of_prompts, "judge tells apart", "warn", "follows the prompt alone"),
    (judging(lambda ids, scores: scores / ids.shape[1]), "judge and padding", "warn", "`mask`"),
    (judging(lambda ids, scores: 1e6 + 0.02 * scores), "normalisation", "warn", "in common"),
    (held_out(lambda ids, scores: scores / (scores - scores[2])), "held-out judge", "fail", "divides by 0"),
    (held_out(lambda ids, scores: scores[:, None]), "held-out judge", "fail", "(b, 1)"),
    (held_out(refusing), "held-out judge", "fail", "call judge"),
]
