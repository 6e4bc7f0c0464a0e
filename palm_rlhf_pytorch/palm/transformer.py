"""PaLM: a transformer whose layers compute attention and feedforward side by side from one projection.

Chowdhery et al., "PaLM: Scaling Language Modeling with Pathways", https://arxiv.org/abs/2204.02311: parallel layers,
multi-query attention, SwiGLU, no biases, tied embeddings; here with rotary positions that decay (xPos).
The model maps tokens to logits, keeps low-rank scopes beside its weights, and is saved whole with its configuration.
"""

from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm

from palm_rlhf_pytorch.attention import KVCache, attention_mask, token_positions
from palm_rlhf_pytorch.lora import Adapter
from palm_rlhf_pytorch.objectives.language import next_token_loss
from palm_rlhf_pytorch.palm.block import ParallelTransformerBlock
from palm_rlhf_pytorch.palm.config import check_config, check_dropout, compare_configs
from palm_rlhf_pytorch.palm.generation import check_generator, check_prompts, generate_responses
from palm_rlhf_pytorch.palm.sampling import check_sampling
from palm_rlhf_pytorch.palm.scopes import Scopes
from palm_rlhf_pytorch.rotary import longest_position, rotary_factors
from palm_rlhf_pytorch.tensors import check_masked, check_token_ids
from palm_rlhf_pytorch.training.checkpoint import Checkpoint, check_state, load_tensors, save_tensors
from palm_rlhf_pytorch.typecheck import typecheck


class PaLM(nn.Module):
    """The language model: token ids in, logits out.

    Weights, adapters and configuration belong to it; training does not. Shapes: b batch, n tokens, d features, v
    vocabulary.
    """

    @typecheck
    def __init__(
        self,
        *,
        num_tokens: int,
        dim: int,
        depth: int,
        causal: bool = True,
        dim_head: int = 64,
        heads: int = 8,
        ff_mult: int = 4,
        attn_dropout: float = 0.0,
        ff_dropout: float = 0.0,
        qk_rmsnorm: bool = False,
        qk_scale: float = 8.0,
        lora_r: int = 8,
        rotary_xpos_scale_base: int | None = 512,
        flash_attn: bool = False,
        finetune_scopes: Sequence[str] = (),
        cross_entropy_ignore_index: int = -100,
    ) -> None:
        """Build a model with random weights, whose loss starts at ln(num_tokens).

        Args:
            num_tokens: vocabulary size v.
            dim: features d of a token.
            depth: layers.
            causal: each token sees those before it; False makes an encoder (for reward models), without xPos decay.
            dim_head: features of a head, even; 64 (the paper's is 256).
            heads: query heads; they share one key/value head.
            ff_mult: the feedforward's inner features are ff_mult * dim; 4 in the paper.
            attn_dropout: probability of dropping an attention weight in train mode.
            ff_dropout: probability of dropping a feedforward feature in train mode.
            qk_rmsnorm: normalise queries and keys, with learnt per-feature gains.
            qk_scale: factor of the products of normalised queries and keys; 8 (upstream's default).
            lora_r: rank of scopes added without one.
            rotary_xpos_scale_base: tokens over which the fastest pair decays by 3.5; 512 in xPos; None for no decay.
            flash_attn: use torch's fused attention kernels; the same function, less memory.
            finetune_scopes: names of scopes to add.
            cross_entropy_ignore_index: a target id that the loss skips; -100 skips none, since ids are not negative.

        Raises:
            TypeError: if an argument is of another type.
            ValueError: if a size is not positive, dim_head is odd, or a dropout is outside [0, 1).
        """
        super().__init__()
        self._config: dict[str, Any] = {
            "num_tokens": num_tokens, "dim": dim, "depth": depth, "causal": causal, "dim_head": dim_head,
            "heads": heads, "ff_mult": ff_mult, "attn_dropout": attn_dropout, "ff_dropout": ff_dropout,
            "qk_rmsnorm": qk_rmsnorm, "qk_scale": qk_scale, "lora_r": lora_r, "flash_attn": flash_attn,
            "rotary_xpos_scale_base": rotary_xpos_scale_base, "cross_entropy_ignore_index": cross_entropy_ignore_index,
        }  # fmt: skip
        check_config(self._config)
        self.num_tokens, self.dim, self.depth, self.dim_head, self.heads = num_tokens, dim, depth, dim_head, heads
        self.causal, self.lora_r, self.cross_entropy_ignore_index = causal, lora_r, cross_entropy_ignore_index
        self.xpos_scale_base = rotary_xpos_scale_base if causal else None
        self.attn_dropout, self.ff_dropout = attn_dropout, ff_dropout
        self.token_emb = nn.Embedding(num_tokens, dim)
        self.layers = nn.ModuleList(
            ParallelTransformerBlock(
                dim=dim, dim_head=dim_head, heads=heads, ff_mult=ff_mult,
                qk_rmsnorm=qk_rmsnorm, qk_scale=qk_scale, fused=flash_attn,
            )
            for _ in range(depth)
        )  # fmt: skip
        self.norm = nn.LayerNorm(dim, bias=False)
        # logits are products with the embedding, of deviation std * dim^0.5: small enough that the loss starts at ln(v)
        nn.init.normal_(self.token_emb.weight, std=min(0.02, 0.25 * dim**-0.5))
        self.finetune_modules = Scopes()
        for scope in [finetune_scopes] if isinstance(finetune_scopes, str) else finetune_scopes:
            self.add_finetune_params(scope)

    # tokens to logits

    def forward(
        self,
        seq: Tensor,
        return_loss: bool = False,
        *,
        mask: Tensor | None = None,
        finetune_scope: str | None = None,
        disable_lora: bool = False,
        extra_embed: Tensor | None = None,
    ) -> Tensor:
        """Logits of each token's successor, or the loss of the tokens given.

        Args:
            seq: token ids, (b, n). A model that is not causal takes negative ids for padding.
            return_loss: return the mean next-token cross entropy (nats) instead; needs n of at least 2 and causal.
            mask: True on real tokens, (b, n), padding on either side; padding is neither seen nor a target.
            finetune_scope: name of the scope whose adapter is added.
            disable_lora: leave the scope out all the same.
            extra_embed: added to the token embeddings, broadcast to (b, n, d).

        Returns:
            Logits (b, n, v), or a scalar loss.

        Raises:
            TypeError: if seq does not hold integers, or mask is not bool.
            ValueError: if shapes, ids or the scope do not fit, or a row is all padding.
        """
        seq, mask = self._check_tokens(seq, mask)
        if return_loss and not self.causal:
            raise ValueError(
                "return_loss: a model with causal=False sees the tokens it would predict; build it with causal=True"
            )
        if return_loss and seq.shape[1] < 2:
            raise ValueError(
                f"return_loss: seq has {seq.shape[1]} token a row; predicting a next token takes at least 2"
            )
        adapter = self._adapter(finetune_scope, disable_lora)
        logits = self.to_logits(self.embed(seq, mask=mask, adapter=adapter, extra_embed=extra_embed))
        if not return_loss:
            return logits
        if mask is not None:  # the first real token after padding has nothing to be predicted from
            mask = mask & F.pad(mask[:, :-1], (1, 0), value=False)
        return next_token_loss(logits, seq, mask=mask, ignore_index=self.cross_entropy_ignore_index).loss

    def embed(
        self,
        seq: Tensor,
        *,
        mask: Tensor | None = None,
        adapter: Adapter | None = None,
        extra_embed: Tensor | None = None,
        dropout: float | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """Hidden states after the last norm, (b, n, d); ids are trusted here, `forward` checks them.

        Args:
            seq: token ids, (b, n).
            mask: True on real tokens, (b, n); positions count real tokens, so padding on either side changes nothing.
            adapter: low-rank adapter of this pass.
            extra_embed: added to the token embeddings.
            dropout: probability for this pass in place of the model's own; 0 turns dropout off whatever the mode.
            cache: keys and values so far; the new tokens are added to it.

        Raises:
            ValueError: if a row is longer than `max_length`.
        """
        tokens = seq.shape[1]
        if cache is not None:
            positions, allowed = cache.admit(mask, tokens), cache.visible(tokens)
        elif mask is not None:
            positions, allowed = token_positions(mask), attention_mask(mask, tokens, tokens, causal=self.causal)
        else:
            positions, allowed = torch.arange(tokens, device=seq.device), None
        self._check_length(tokens if cache is None else cache.filled, positions)
        rotary = rotary_factors(positions, self.dim_head, scale_base=self.xpos_scale_base)
        attn_dropout, ff_dropout = (self.attn_dropout, self.ff_dropout) if self.training else (0.0, 0.0)

        x = self.token_emb(seq)
        x = x if extra_embed is None else x + extra_embed.to(x.dtype)
        for index, layer in enumerate(self.layers):
            x = x + layer(
                x,
                rotary,
                causal=self.causal and allowed is None and (cache is None or tokens > 1),
                mask=allowed,
                lora=None if adapter is None else adapter.layer(index),
                attn_dropout=attn_dropout if dropout is None else dropout,
                ff_dropout=ff_dropout if dropout is None else dropout,
                store=None if cache is None else partial(cache.store, index),
            )
        return self.norm(x)

    def to_logits(self, hidden: Tensor) -> Tensor:
        """Logits (..., v) of hidden states (..., d), by the tied embedding."""
        return F.linear(hidden, self.token_emb.weight)

    def set_dropout(self, dropout: float) -> None:
        """Set the probability of both dropouts, from the next pass on."""
        check_dropout(dropout, name="dropout")
        self.attn_dropout = self.ff_dropout = dropout
        self._config.update(attn_dropout=dropout, ff_dropout=dropout)

    @property
    def max_length(self) -> int | float:
        """How many tokens a row may have before xPos scales leave the dtype's range; infinite without decay."""
        weight = self.token_emb.weight
        device = weight.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
        return longest_position(dtype, scale_base=self.xpos_scale_base)

    def _check_length(self, tokens: int, positions: Tensor | None = None, *, name: str = "seq") -> None:
        """Refuse rows beyond max_length; the device is asked for their real lengths only when padding may be the cause."""
        limit = self.max_length
        if tokens > limit and (positions is None or int(positions.max()) >= limit):
            raise ValueError(
                f"{name} of {tokens} tokens: xPos scales leave the range of the model's dtype beyond {limit}; build"
                " it with a larger rotary_xpos_scale_base, or None, or in bfloat16 or float32 if it is float16"
            )

    def _check_tokens(self, seq: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Ids that are all in range, and the mask of those that are real, None where all are."""
        check_token_ids(seq, self.num_tokens, name="seq", allow_negative=not self.causal)
        if mask is not None:
            check_masked(mask, seq=seq)
        if not self.causal:
            mask = seq >= 0 if mask is None else mask & (seq >= 0)
            seq = seq.clamp(min=0)
        if mask is None or bool(mask.all()):
            return seq, None
        empty = ~mask.any(dim=-1)
        if bool(empty.any()):
            raise ValueError(
                f"seq: row {int(empty.int().argmax())} is all padding; a row takes at least one real token"
            )
        return seq, mask

    # generation

    def new_cache(self, batch: int, max_length: int) -> KVCache:
        """An empty key/value cache for a batch of rows, in the model's dtype and on its device.

        Raises:
            ValueError: if the model is not causal: what it has cached would change with every later token.
        """
        if not self.causal:
            raise ValueError("a model with causal=False cannot generate or keep a cache; build it with causal=True")
        weight = self.token_emb.weight
        return KVCache(
            depth=self.depth, batch=batch, max_length=max_length, dim_head=self.dim_head,
            dtype=weight.dtype, device=weight.device,
        )  # fmt: skip

    @torch.no_grad()
    @typecheck
    def generate(
        self,
        seq_len: int,
        prompt: Tensor | None = None,
        *,
        prompt_mask: Tensor | None = None,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        eos_token: int | None = None,
        pad_value: int = 0,
        generator: torch.Generator | None = None,
        use_tqdm: bool = False,
        finetune_scope: str | None = None,
        disable_lora: bool = False,
    ) -> Tensor:
        """Continue a prompt until its row has seq_len tokens in all, or ends with eos_token.

        Args:
            seq_len: tokens of prompt and response together, for each row.
            prompt: ids (n,) or (b, n); None starts one row from a random token.
            prompt_mask: True on real prompt tokens, of prompt's shape, for unequal prompts padded on either side.
            temperature: 0 is greedy, 1 the model's own distribution.
            top_k: sample among the k most likely tokens.
            top_p: sample among the most likely tokens that together have this mass.
            eos_token: id that ends a row; None lets all rows run to seq_len.
            pad_value: fills a row after its end.
            generator: random state, on the model's device; None takes torch's global one.
            use_tqdm: show a progress bar.
            finetune_scope: scope to generate with.
            disable_lora: leave the scope out all the same.

        Returns:
            New tokens only, (b, <= seq_len - shortest prompt), or (t,) for a prompt (n,); without a prompt the whole
            row, (1, <= seq_len).

        Raises:
            TypeError: if prompt does not hold integers, or an argument is of another type.
            ValueError: if a prompt is empty, all padding, as long as seq_len, or has ids out of range, if seq_len is
                above `max_length`, if the model is not causal, or a sampling setting names no distribution.
        """
        check_sampling(temperature=temperature, top_k=top_k, top_p=top_p)
        if not self.causal:
            raise ValueError("generate: a model with causal=False cannot generate; build it with causal=True")
        if seq_len < 1:
            raise ValueError(f"seq_len ({seq_len}) counts tokens of prompt and response: it must be at least 1")
        self._check_length(seq_len, name="seq_len")
        adapter = self._adapter(finetune_scope, disable_lora)
        device = self.token_emb.weight.device
        check_generator(generator, device)
        start = torch.empty(1, 0, dtype=torch.long, device=device)
        if prompt is None:
            start = torch.randint(0, self.num_tokens, (1, 1), device=device, generator=generator)
            if seq_len == 1:
                return start
        ids, mask, room = check_prompts(
            start if prompt is None else prompt, prompt_mask, num_tokens=self.num_tokens, seq_len=seq_len, device=device
        )
        with tqdm(total=int(room.max()), disable=not use_tqdm, desc="generate", leave=False) as bar:
            out = generate_responses(
                self, ids, mask, max_new_tokens=room, temperature=temperature, top_k=top_k, top_p=top_p,
                eos_token=eos_token, generator=generator, adapter=adapter, on_step=bar.update,
            )  # fmt: skip
        new = out.tokens.masked_fill(~out.mask, pad_value)
        if prompt is None:
            return torch.cat((start, new), dim=1)
        return new[0] if prompt.dim() == 1 else new

    # scopes: low-rank adapters kept under a name

    def new_adapter(
        self,
        *,
        r: int | None = None,
        alpha: float | None = None,
        last_layers: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Adapter:
        """An untrained adapter that fits this model, not kept by it; r None takes lora_r."""
        adapter = Adapter(
            depth=self.depth, dim=self.dim, dim_head=self.dim_head, heads=self.heads, r=self.lora_r if r is None else r,
            alpha=alpha, last_layers=last_layers, generator=generator,
        )  # fmt: skip
        return adapter.to(self.token_emb.weight.device)

    def add_finetune_params(
        self, scope: str, *, r: int | None = None, alpha: float | None = None, last_layers: int | None = None
    ) -> None:
        """Keep a new adapter under the name `scope`.

        Raises:
            ValueError: if the name is taken or empty, or r or last_layers does not fit.
        """
        self.finetune_modules.check_free(scope)
        self.finetune_modules.add(scope, self.new_adapter(r=r, alpha=alpha, last_layers=last_layers))

    def remove_finetune_params(self, scope: str) -> Adapter:
        """Let go of a scope, and return its adapter."""
        return self.finetune_modules.take(scope)

    def merge_finetune_params(self, scope: str) -> None:
        """Add a scope's update to the base weights, and remove the scope."""
        self.merge_adapter(self.remove_finetune_params(scope))

    def merge_adapter(self, adapter: Adapter) -> None:
        """Add an adapter's update to the base weights; models that share them (`share`) keep theirs as they were."""
        for index, layer in enumerate(self.layers):
            lora = adapter.layer(index)
            if lora is not None:
                assert isinstance(layer, ParallelTransformerBlock)
                layer.merge(lora)

    def finetune_parameters(self, scope: str = "default") -> list[nn.Parameter]:
        """The parameters of a scope, in a fixed order."""
        return list(self.finetune_modules.find(scope).parameters())

    def palm_parameters(self) -> list[nn.Parameter]:
        """The base weights without any scope, in a fixed order."""
        return [parameter for _, parameter in self.named_base_parameters()]

    def named_base_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Names and base weights, without scopes."""
        for name, parameter in self.named_parameters():
            if not name.startswith("finetune_modules."):
                yield name, parameter

    def _adapter(self, scope: str | None, disabled: bool) -> Adapter | None:
        """The adapter of a pass; an unknown scope is refused even where it is left out."""
        adapter = None if scope is None else self.finetune_modules.find(scope)
        return None if disabled else adapter

    # copies and files

    @property
    def config(self) -> dict[str, Any]:
        """The constructor's arguments, JSON-able; scopes are not among them."""
        return dict(self._config)

    def share(self, *, trainable: Callable[[str], bool] | None = None) -> "PaLM":
        """A model over the same weights: what is frozen is shared in memory, what is trainable is copied.

        The original keeps its own flags, scopes and mode; scopes are left out of the new one.

        Args:
            trainable: says of a base parameter's name whether it is to be trained; None trains none.
        """
        memo: dict[int, Any] = {id(self.finetune_modules): Scopes()}
        for name, parameter in self.named_base_parameters():
            if trainable is not None and trainable(name):
                memo[id(parameter)] = nn.Parameter(parameter.detach().clone())
            else:
                memo[id(parameter)] = nn.Parameter(parameter.detach(), requires_grad=False)
        return deepcopy(self, memo)

    def save(self, path: str | Path, *, with_scopes: bool = False) -> None:
        """Write weights and configuration to one file, atomically; `.safetensors` by its suffix, else torch's format.

        Args:
            path: the file.
            with_scopes: write the low-rank scopes too; without, the base weights alone.
        """
        tensors = dict(self.state_dict()) if with_scopes else dict(self.named_base_parameters())
        extra = {"scopes": self.finetune_modules.settings if with_scopes else {}}
        save_tensors(path, tensors, kind="PaLM", config=self.config, extra=extra)

    def load(self, path: str | Path) -> Self:
        """Take over the weights of a file; its scopes too, replacing those of the same name.

        All is checked before anything changes: after an error the model is as it was.

        Returns:
            The model.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if it is no checkpoint, or one of another model (keys and shapes are named).
        """
        return self._take(load_tensors(path, kind="PaLM"), path)

    @classmethod
    def from_checkpoint(cls, path: str | Path) -> "PaLM":
        """Build the model that a file describes, with its weights.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if the file holds no configuration, or does not fit it.
        """
        checkpoint = load_tensors(path, kind="PaLM")
        if not checkpoint.config:
            raise ValueError(f"{path} holds weights without a configuration; build the PaLM yourself, then load(path)")
        try:
            palm = cls(**checkpoint.config)
        except TypeError as error:
            raise ValueError(f"{path} holds a configuration from which no PaLM can be built: {error}") from error
        return palm._take(checkpoint, path)

    def _take(self, checkpoint: Checkpoint, path: str | Path) -> Self:
        """Check a checkpoint whole, then copy its tensors, in this model's dtype, and its scopes."""
        settings: dict[str, dict[str, Any]] = checkpoint.extra.get("scopes", {})
        scopes = {name: self.new_adapter(**kept) for name, kept in settings.items()}
        expected: dict[str, nn.Parameter] = dict(self.named_base_parameters())
        for scope, adapter in scopes.items():
            expected |= {f"finetune_modules.{scope}.{name}": weight for name, weight in adapter.named_parameters()}
        check_state(expected, checkpoint.tensors, path=path)
        compare_configs(self.config, checkpoint.config, path=path)
        with torch.no_grad():
            for name, weight in expected.items():
                weight.copy_(checkpoint.tensors[name])
        self.finetune_modules.update(scopes)
        return self
