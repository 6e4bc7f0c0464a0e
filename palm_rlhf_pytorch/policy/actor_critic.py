"""Actor, critic and reference: three hats on one frozen trunk.

The reference is the trunk itself; actor and critic are low-rank adapters on it, or, where adapters are off, copies of
the layers they train. Old, new and reference log-probabilities all come from one function of this module, so that
their ratio is 1 before the first step. Knows nothing of rewards, losses or steps.
"""

from typing import Any, NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn

from palm_rlhf_pytorch.exact_kl import compared_logprobs, regularized_logprobs
from palm_rlhf_pytorch.logprobs import chosen_logprobs
from palm_rlhf_pytorch.lora import Adapter
from palm_rlhf_pytorch.palm.generation import Generation, generate_responses
from palm_rlhf_pytorch.palm.transformer import PaLM
from palm_rlhf_pytorch.truncation import Truncation
from palm_rlhf_pytorch.typecheck import typecheck


class PolicyOutput(NamedTuple):
    """Of each response token: log-probability and entropy (nats) under the actor, value before it, (b, t), float32.

    kl_exact: KL(actor || reference) of the whole next-token distributions, nats, where it is asked for, else 0.
    """

    logprobs: Tensor
    entropy: Tensor
    values: Tensor
    kl_exact: Tensor


class Observation(NamedTuple):
    """What a rollout records of each response token, (b, t), float32, without gradient; 0 where nothing was read.

    logprobs, values: as in PolicyOutput. ref_logprobs: of the same tokens under the reference. kl_exact: KL(actor ||
    reference) of the whole next-token distributions, nats.
    """

    logprobs: Tensor
    values: Tensor
    ref_logprobs: Tensor
    kl_exact: Tensor


class Hat(nn.Module):
    """A trained view of a frozen trunk: an adapter on it, or a copy of the layers that are trained."""

    def __init__(
        self,
        trunk: PaLM,
        *,
        name: str,
        lora: bool,
        r: int,
        alpha: float | None,
        last_layers: int | None,
        dropout: float,
        generator: torch.Generator | None,
    ) -> None:
        super().__init__()
        if not 0 <= dropout < 1:
            raise ValueError(f"{name}_dropout ({dropout}) is a probability: it must be at least 0 and below 1")
        self.dropout = dropout
        self.adapter: Adapter | None = None
        self.copy: PaLM | None = None
        if last_layers is not None and not 1 <= last_layers <= trunk.depth:
            raise ValueError(
                f"{name}_last_layers ({last_layers}) must be from 1 to the model's depth ({trunk.depth}), or None"
            )
        if lora and r < 1:
            raise ValueError(f"{name}_lora_r ({r}), the rank of an adapter, must be at least 1")
        if lora:
            self.adapter = trunk.new_adapter(r=r, alpha=alpha, last_layers=last_layers, generator=generator)
            return
        top = tuple(f"layers.{layer}." for layer in range(trunk.depth - (last_layers or 0), trunk.depth))
        self.copy = trunk.share(trainable=lambda name: last_layers is None or name.startswith(top))

    def model(self, trunk: PaLM) -> PaLM:
        """The model whose weights the pass goes through."""
        return trunk if self.copy is None else self.copy

    def embed(self, trunk: PaLM, sequences: Tensor, *, since: int = 0) -> Tensor:
        """Hidden states from a place on, (b, n - since, d); this hat's dropout, and in train mode only."""
        dropout = self.dropout if self.training else 0.0
        return self.model(trunk).embed(sequences, adapter=self.adapter, dropout=dropout, since=since)


class ActorCritic(nn.Module):
    """The policy, its value function, and the reference it must not stray from.

    Under LoRA the base weights are held once, frozen and bit-identical to those of the `palm` given, which keeps its
    own flags and scopes. Schulman et al., https://arxiv.org/abs/1707.06347; the value of a token reads only what stands
    before the token.
    """

    @typecheck
    def __init__(
        self,
        palm: PaLM,
        *,
        actor_lora: bool = True,
        critic_lora: bool = True,
        actor_lora_r: int = 8,
        critic_lora_r: int = 8,
        actor_lora_alpha: float | None = None,
        critic_lora_alpha: float | None = None,
        actor_last_layers: int | None = None,
        critic_last_layers: int | None = None,
        actor_dropout: float = 0.0,
        critic_dropout: float = 0.0,
        critic: bool = True,
        activation_checkpointing: bool = False,
        top_k: int | None = None,
        top_p: float | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        """Put three hats on a model.

        Args:
            palm: a causal PaLM; its weights are shared, not changed. Its scopes are left out: merge what is to count.
            actor_lora: train the actor as an adapter; False trains a copy of its base weights.
            critic_lora: the same for the critic.
            actor_lora_r: rank of the actor's adapter.
            critic_lora_r: rank of the critic's.
            actor_lora_alpha: its scale is alpha / r; None means r.
            critic_lora_alpha: the same for the critic.
            actor_last_layers: train only so many layers (adapters or weights), counted from the output; None all.
            critic_last_layers: the same for the critic.
            actor_dropout: dropout of the actor's learning passes. 0: with more, the ratio differs from 1 before the
                first step by the dropout's noise.
            critic_dropout: dropout of the critic's learning passes.
            critic: False for none: all values are 0.
            activation_checkpointing: compute layers again in the backward pass; see PaLM.set_activation_checkpointing.
            top_k: the policy is the model cut to its k likeliest tokens, in sampling and in all log-probabilities, its
                entropy and its KL. A token that was drawn stays, whatever the weights have become since. The reference
                is cut to its own k likeliest, beside which stays whatever the policy keeps.
            top_p: the same with the likeliest tokens that have this probability together.
            generator: random state of the adapters' start; None takes torch's global one.

        Raises:
            ValueError: if palm is not causal, or a rank, a number of layers, a dropout or a cut is out of range.
        """
        super().__init__()
        if not palm.causal:
            raise ValueError("palm must be causal: a model that sees later tokens cannot be a policy; use causal=True")
        self.truncation = Truncation(top_k, top_p)
        self.truncation.check()
        self.palm = palm.share()
        self.palm.set_activation_checkpointing(activation_checkpointing)
        self.actor = Hat(
            self.palm, name="actor", lora=actor_lora, r=actor_lora_r, alpha=actor_lora_alpha,
            last_layers=actor_last_layers, dropout=actor_dropout, generator=generator,
        )  # fmt: skip
        self.critic: Hat | None = None
        self.value_head: nn.Linear | None = None
        if not critic:
            return
        self.critic = Hat(
            self.palm, name="critic", lora=critic_lora, r=critic_lora_r, alpha=critic_lora_alpha,
            last_layers=critic_last_layers, dropout=critic_dropout, generator=generator,
        )  # fmt: skip
        device = palm.token_emb.weight.device
        # skip_init: nothing is drawn, so that torch's global random state stays as it is
        self.value_head = nn.utils.skip_init(nn.Linear, palm.dim, 1, device=device, dtype=torch.float32)
        nn.init.zeros_(self.value_head.weight)  # no value is claimed before one was seen
        nn.init.zeros_(self.value_head.bias)

    def forward(
        self,
        sequences: Tensor,
        prompt_lengths: Tensor,
        response_length: int,
        *,
        temperature: float = 1.0,
        lengths: Tensor | None = None,
        num_tokens: int | None = None,
        since: int = 0,
        entropy_grad: bool = True,
        kl_grad: bool = False,
    ) -> PolicyOutput:
        """Log-probabilities, entropies and values of the responses inside sequences.

        Args:
            sequences: prompt and response, padded on the right, (b, n).
            prompt_lengths: tokens of each prompt, at least 1, (b,).
            response_length: t; places beyond a row's own response hold numbers that mean nothing.
            temperature: of sampling; it divides the logits here too.
            lengths: tokens of each response, at most t, (b,): no more is read out, places beyond are 0. None for all.
            num_tokens: the sum of lengths, where the caller knows it; to ask the device for it is to wait for it.
            since: a place before which nothing is read out, below every prompt's length, in order not to compute it.
            entropy_grad: whether the entropy is part of a loss; without it has no gradient, which is cheaper.
            kl_grad: whether the exact KL to the reference is part of a loss: it takes a pass of the reference too.

        Returns:
            PolicyOutput, (b, t) each.
        """
        at = _places(sequences, prompt_lengths, response_length, lengths, num_tokens, since)
        model, hidden = self.actor.model(self.palm), at.before(self.actor.embed(self.palm, sequences, since=at.since))
        values = self._values(sequences, at)
        options = self.truncation._asdict() | {"temperature": temperature, "entropy_grad": entropy_grad}
        if not kl_grad:
            found = chosen_logprobs(hidden, model.token_emb.weight, at.ids, **options)
            return PolicyOutput(at.put(found.logprobs), at.put(found.entropy), values, torch.zeros_like(values))
        compared = regularized_logprobs(
            hidden, model.token_emb.weight, at.ids, ref_hidden=self._ref_hidden(sequences, at),
            ref_weight=self.palm.token_emb.weight, **options,
        )  # fmt: skip
        return PolicyOutput(at.put(compared.logprobs), at.put(compared.entropy), values, at.put(compared.kl))

    @torch.no_grad()
    def observe(
        self,
        sequences: Tensor,
        prompt_lengths: Tensor,
        response_length: int,
        *,
        temperature: float = 1.0,
        lengths: Tensor | None = None,
        num_tokens: int | None = None,
        since: int = 0,
    ) -> Observation:
        """What `forward` gives, and the reference beside it, from one pass of each hat; arguments as there."""
        at = _places(sequences, prompt_lengths, response_length, lengths, num_tokens, since)
        model, hidden = self.actor.model(self.palm), at.before(self.actor.embed(self.palm, sequences, since=at.since))
        found = compared_logprobs(
            hidden, model.token_emb.weight, at.ids, ref_hidden=self._ref_hidden(sequences, at),
            ref_weight=self.palm.token_emb.weight, temperature=temperature, **self.truncation._asdict(),
        )  # fmt: skip
        values = self._values(sequences, at)
        return Observation(at.put(found.logprobs), values, at.put(found.ref_logprobs), at.put(found.kl))

    @torch.no_grad()
    def logprobs(
        self, sequences: Tensor, prompt_lengths: Tensor, response_length: int, *, temperature: float, lengths: Tensor
    ) -> Tensor:
        """The log-probabilities of `forward` alone, (b, t), from one pass of the actor; arguments as there."""
        at = _places(sequences, prompt_lengths, response_length, lengths, None, 0)
        model, hidden = self.actor.model(self.palm), at.before(self.actor.embed(self.palm, sequences, since=at.since))
        options = self.truncation._asdict() | {"temperature": temperature, "entropy_grad": False}
        return at.put(chosen_logprobs(hidden, model.token_emb.weight, at.ids, **options).logprobs)

    @torch.no_grad()
    def _ref_hidden(self, sequences: Tensor, at: "Places") -> Tensor:
        """The reference's hidden states before the places' tokens, (m, d)."""
        return at.before(self.palm.embed(sequences, dropout=0.0, since=at.since))

    def _values(self, sequences: Tensor, at: "Places") -> Tensor:
        """The critic's values before the places' tokens, (b, t); 0 without a critic."""
        if self.critic is None or self.value_head is None:
            return torch.zeros(at.shape, device=sequences.device)
        hidden = at.before(self.critic.embed(self.palm, sequences, since=at.since))
        return at.put(self.value_head(hidden.to(self.value_head.weight.dtype))[..., 0].float())

    def generate(
        self,
        prompts: Tensor,
        prompt_mask: Tensor | None,
        *,
        max_new_tokens: int | Tensor,
        temperature: float = 1.0,
        eos_token: int | None = None,
        generator: torch.Generator | None = None,
        **options: object,
    ) -> Generation:
        """Sample responses from the actor, cut as it is; see `generate_responses`, which takes the options."""
        sampling: dict[str, Any] = self.truncation._asdict() | options
        return generate_responses(
            self.actor.model(self.palm), prompts, prompt_mask, max_new_tokens=max_new_tokens, temperature=temperature,
            eos_token=eos_token, generator=generator, adapter=self.actor.adapter, **sampling,
        )  # fmt: skip

    def actor_parameters(self) -> dict[str, nn.Parameter]:
        """What the policy loss trains, by name, in a fixed order."""
        return {name: p for name, p in self.named_parameters() if p.requires_grad and name.startswith("actor.")}

    def critic_parameters(self) -> dict[str, nn.Parameter]:
        """What the value loss trains, by name, in a fixed order."""
        named = self.named_parameters()
        return {name: p for name, p in named if p.requires_grad and name.startswith(("critic.", "value_head."))}

    def export_palm(self) -> PaLM:
        """The improved model on its own: new weights, the actor's update inside, nothing shared."""
        palm = self.actor.model(self.palm).share(trainable=lambda name: True)
        if self.actor.adapter is not None:
            palm.merge_adapter(self.actor.adapter)
        palm.set_activation_checkpointing(False)
        return palm

    @property
    def has_dropout(self) -> bool:
        """Whether a pass in train mode draws random numbers."""
        return self.actor.dropout > 0 or (self.critic is not None and self.critic.dropout > 0)


class Places(NamedTuple):
    """Which response tokens are read out, m of them.

    shape: (b, t).
    since: hidden states are needed from there on.
    slots: where they belong in (b t), (m,); None where they are all of it.
    sources: where the token before each stands in (b (n - since)), (m,): what predicts it, and what values it.
    ids: the tokens themselves, (m,).
    """

    shape: tuple[int, int]
    since: int
    slots: Tensor | None
    sources: Tensor
    ids: Tensor

    def before(self, hidden: Tensor) -> Tensor:
        """Of hidden states (b, n - since, d) those of the token before each, (m, d)."""
        return rearrange(hidden, "b n d -> (b n) d").index_select(0, self.sources)

    def put(self, values: Tensor) -> Tensor:
        """Numbers (m,) at their places in (b, t), 0 elsewhere."""
        if self.slots is None:
            return values.reshape(self.shape)
        return values.new_zeros(self.shape[0] * self.shape[1]).index_copy(0, self.slots, values).reshape(self.shape)


def _places(
    sequences: Tensor, prompt_lengths: Tensor, steps: int, lengths: Tensor | None, num_tokens: int | None, since: int
) -> Places:
    """The response tokens within lengths, or all t of each row, those beyond the sequence standing for its last."""
    (batch, total), device = sequences.shape, sequences.device
    rows = torch.arange(batch, device=device)
    slots = None
    if lengths is None:
        rows, step = rows.repeat_interleave(steps), torch.arange(steps, device=device).repeat(batch)
    else:
        rows = rows.repeat_interleave(lengths, output_size=num_tokens)
        step = torch.arange(len(rows), device=device) - (lengths.cumsum(0) - lengths)[rows]
        slots = rows * steps + step
    place = prompt_lengths[rows] + step
    since = since if device.type == "cpu" else 0  # the mask that it takes would cost a GPU its fastest attention
    sources = rows * (total - since) + (place - 1).clamp(max=total - 1) - since
    targets = rows * total + place.clamp(max=total - 1)
    return Places((batch, steps), since, slots, sources, sequences.flatten()[targets])
