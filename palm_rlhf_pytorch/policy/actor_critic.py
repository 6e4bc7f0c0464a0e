"""Actor, critic and reference: three hats on one frozen trunk.

The reference is the trunk itself; actor and critic are low-rank adapters on it, or, where adapters are off, copies of
the layers they train. Old, new and reference log-probabilities all come from one function of this module, so that
their ratio is 1 before the first step. Knows nothing of rewards, losses or steps.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from palm_rlhf_pytorch.lora import Adapter
from palm_rlhf_pytorch.objectives.policy_gradient import kl_exact
from palm_rlhf_pytorch.palm.block import ParallelTransformerBlock
from palm_rlhf_pytorch.palm.generation import Generation, generate_responses
from palm_rlhf_pytorch.palm.transformer import PaLM
from palm_rlhf_pytorch.tensors import at_least_float32, chosen_logprobs
from palm_rlhf_pytorch.typecheck import typecheck


class PolicyOutput(NamedTuple):
    """Of each response token: log-probability and entropy (nats) under the actor, value before it, (b, t), float32."""

    logprobs: Tensor
    entropy: Tensor
    values: Tensor


class Observation(NamedTuple):
    """What a rollout records of each response token, (b, t), float32, without gradient.

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

    def embed(self, trunk: PaLM, sequences: Tensor) -> Tensor:
        """Hidden states (b, n, d); this hat's dropout, and in train mode only."""
        dropout = self.dropout if self.training else 0.0
        return self.model(trunk).embed(sequences, adapter=self.adapter, dropout=dropout)


class ActorCritic(nn.Module):
    """The policy, its value function, and the reference it must not stray from.

    Under LoRA the base weights are held once, frozen and bit-identical to those of the `palm` given, which keeps its
    own flags and scopes. Passes go through torch's fused attention kernels whatever `flash_attn` says: the same
    function, without maps of (n, n) tokens. Schulman et al., https://arxiv.org/abs/1707.06347; the value of a token
    reads only what stands before the token.
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
            generator: random state of the adapters' start; None takes torch's global one.

        Raises:
            ValueError: if palm is not causal, or a rank, a number of layers or a dropout is out of range.
        """
        super().__init__()
        if not palm.causal:
            raise ValueError("palm must be causal: a model that sees later tokens cannot be a policy; use causal=True")
        self.palm = _fused(palm.share(), True)
        self.actor = Hat(
            self.palm, name="actor", lora=actor_lora, r=actor_lora_r, alpha=actor_lora_alpha,
            last_layers=actor_last_layers, dropout=actor_dropout, generator=generator,
        )  # fmt: skip
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
        self, sequences: Tensor, prompt_lengths: Tensor, response_length: int, *, temperature: float = 1.0
    ) -> PolicyOutput:
        """Log-probabilities, entropies and values of the responses inside sequences.

        Args:
            sequences: prompt and response, padded on the right, (b, n).
            prompt_lengths: tokens of each prompt, at least 1, (b,).
            response_length: t; places beyond a row's own response hold numbers that mean nothing.
            temperature: of sampling; it divides the logits here too.

        Returns:
            PolicyOutput, (b, t) each.
        """
        hidden = self.actor.embed(self.palm, sequences)
        return self._output(hidden, sequences, prompt_lengths, response_length, temperature)

    @torch.no_grad()
    def observe(
        self, sequences: Tensor, prompt_lengths: Tensor, response_length: int, *, temperature: float = 1.0
    ) -> Observation:
        """What `forward` gives, and the reference beside it, from one pass of each hat; arguments as there."""
        hidden, reference = self.actor.embed(self.palm, sequences), self.palm.embed(sequences, dropout=0.0)
        place = sequences, prompt_lengths, response_length, temperature
        policy = self._output(hidden, *place)
        ref_logprobs, _ = self._logprobs(self.palm, reference, *place)
        hidden, reference = (_before_response(x, prompt_lengths, response_length) for x in (hidden, reference))
        kl = torch.cat(
            [
                kl_exact(
                    self._logits(self.actor.model(self.palm), own, temperature),
                    self._logits(self.palm, ref, temperature),
                )
                for own, ref in zip(hidden.flatten(0, 1).split(1024), reference.flatten(0, 1).split(1024), strict=True)
            ]
        )
        return Observation(policy.logprobs, policy.values, ref_logprobs, kl.reshape(ref_logprobs.shape))

    def _output(
        self, hidden: Tensor, sequences: Tensor, prompt_lengths: Tensor, length: int, temperature: float
    ) -> PolicyOutput:
        """The actor's hidden states (b, n, d) read out, and the critic's values."""
        model = self.actor.model(self.palm)
        logprobs, entropy = self._logprobs(model, hidden, sequences, prompt_lengths, length, temperature)
        valued = _before_response(self.critic.embed(self.palm, sequences), prompt_lengths, length)
        values = self.value_head(valued.to(self.value_head.weight.dtype))[..., 0].float()
        return PolicyOutput(logprobs, entropy, values)

    def _logits(self, model: PaLM, hidden: Tensor, temperature: float) -> Tensor:
        return at_least_float32(F.linear(hidden, model.token_emb.weight)) / temperature

    def _logprobs(
        self, model: PaLM, hidden: Tensor, sequences: Tensor, prompt_lengths: Tensor, length: int, temperature: float
    ) -> tuple[Tensor, Tensor]:
        ids = sequences.gather(1, _places(prompt_lengths, length, sequences.shape[1]))
        hidden = _before_response(hidden, prompt_lengths, length)
        return chosen_logprobs(hidden, model.token_emb.weight, ids, temperature=temperature)

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
        """Sample responses from the actor; see `generate_responses`, which takes the options."""
        return generate_responses(
            self.actor.model(self.palm), prompts, prompt_mask, max_new_tokens=max_new_tokens, temperature=temperature,
            eos_token=eos_token, generator=generator, adapter=self.actor.adapter, **options,  # type: ignore[arg-type]
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
        return _fused(palm, bool(palm.config["flash_attn"]))

    @property
    def has_dropout(self) -> bool:
        """Whether a pass in train mode draws random numbers."""
        return self.actor.dropout > 0 or self.critic.dropout > 0


def _fused(palm: PaLM, fused: bool) -> PaLM:
    """The model with torch's fused attention kernels on or off: the same function, without maps of (n, n) tokens."""
    for layer in palm.layers:
        assert isinstance(layer, ParallelTransformerBlock)
        layer.fused = fused
    return palm


def _places(prompt_lengths: Tensor, length: int, total: int) -> Tensor:
    """Index of each response token in its sequence, (b, t), clamped to the sequence."""
    steps = torch.arange(length, device=prompt_lengths.device)
    return (prompt_lengths[:, None] + steps).clamp(max=total - 1)


def _before_response(hidden: Tensor, prompt_lengths: Tensor, length: int) -> Tensor:
    """Hidden states (b, t, d) of the token before each response token: what predicts it, and what values it."""
    index = _places(prompt_lengths - 1, length, hidden.shape[1])
    return hidden.gather(1, index[..., None].expand(-1, -1, hidden.shape[-1]))
