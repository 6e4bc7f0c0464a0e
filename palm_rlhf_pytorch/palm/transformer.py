"""PaLM: a transformer whose layers compute attention and feedforward side by side from one projection.

Chowdhery et al., "PaLM: Scaling Language Modeling with Pathways", https://arxiv.org/abs/2204.02311: parallel layers,
multi-query attention, SwiGLU, no biases, tied embeddings; here with rotary positions that decay (xPos).
The model maps tokens to logits, keeps low-rank scopes beside its weights, and is saved whole with its configuration.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from palm_rlhf_pytorch.attention import KVCache, document_starts, place_tokens
from palm_rlhf_pytorch.heap import keep_freed_memory
from palm_rlhf_pytorch.lora import Adapter
from palm_rlhf_pytorch.objectives.language import chunked_next_token_loss, target_mask
from palm_rlhf_pytorch.palm.block import ParallelTransformerBlock, Pass
from palm_rlhf_pytorch.palm.config import check_dropout, checked_config
from palm_rlhf_pytorch.palm.copying import share_weights
from palm_rlhf_pytorch.palm.decoding import Decoder
from palm_rlhf_pytorch.palm.files import PaLMFiles
from palm_rlhf_pytorch.palm.generation import continue_prompts
from palm_rlhf_pytorch.palm.inputs import check_length, check_marks, check_tokens
from palm_rlhf_pytorch.palm.native_decoding import NativeDecoder, new_decoder
from palm_rlhf_pytorch.palm.scopes import Scopes
from palm_rlhf_pytorch.palm.text_generation import generate_text, stream
from palm_rlhf_pytorch.products import linear, product_dtype
from palm_rlhf_pytorch.rotary import longest_position, rotary_factors
from palm_rlhf_pytorch.typecheck import typecheck


class PaLM(PaLMFiles, nn.Module):
    """The language model: token ids in, logits out. Shapes: b batch, n tokens, d features, v vocabulary."""

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
            flash_attn: taken for the sake of those who know it; torch's fused attention kernels are used either way.
            finetune_scopes: names of scopes to add, or one name.
            cross_entropy_ignore_index: a target id that the loss skips where no loss_mask says what counts; -100 skips
                none, since ids are not negative.

        Raises:
            TypeError: if an argument is of another type.
            ValueError: if a size is not positive, dim_head is odd, or a dropout is outside [0, 1).
        """
        super().__init__()
        keep_freed_memory()
        self._config = checked_config(locals())
        self.num_tokens, self.dim, self.depth, self.dim_head, self.heads = num_tokens, dim, depth, dim_head, heads
        self.causal, self.lora_r, self.cross_entropy_ignore_index = causal, lora_r, cross_entropy_ignore_index
        self.xpos_scale_base = rotary_xpos_scale_base if causal else None
        self.attn_dropout, self.ff_dropout = attn_dropout, ff_dropout
        self.activation_checkpointing = False
        self.token_emb = nn.Embedding(num_tokens, dim)
        self.layers = nn.ModuleList(
            ParallelTransformerBlock(
                dim=dim, dim_head=dim_head, heads=heads, ff_mult=ff_mult,
                qk_rmsnorm=qk_rmsnorm, qk_scale=qk_scale, fused=True,
            )
            for _ in range(depth)
        )  # fmt: skip
        self.norm = nn.LayerNorm(dim, bias=False)
        # logits are products with the embedding, of deviation std * dim^0.5: small enough that the loss starts at ln(v)
        nn.init.normal_(self.token_emb.weight, std=min(0.02, 0.2 * dim**-0.5))
        self.finetune_modules = Scopes()
        for scope in [finetune_scopes] if isinstance(finetune_scopes, str) else finetune_scopes:
            self.add_finetune_params(scope)

    # tokens to logits

    def forward(
        self, seq: Tensor, return_loss: bool = False, *, mask: Tensor | None = None, finetune_scope: str | None = None,
        disable_lora: bool = False, extra_embed: Tensor | None = None, documents: Tensor | None = None,
        loss_mask: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Logits of each token's successor, or the loss of the tokens given.

        Args:
            seq: token ids, (b, n). A model that is not causal takes negative ids for padding.
            return_loss: return the mean next-token cross entropy (nats) instead; needs n of at least 2 and causal.
            mask: True on real tokens, (b, n), padding on either side; padding is neither seen nor a target.
            finetune_scope: name of the scope whose adapter is added.
            disable_lora: leave the scope out all the same.
            extra_embed: added to the token embeddings, broadcast to (b, n, d).
            documents: an integer for each token, (b, n); neighbours of one number are a document, which is read as if
                it stood alone in its row: tokens see no other, and none is predicted from another's.
            loss_mask: True on tokens that are targets of the loss, (b, n), as a response's are, whatever their ids;
                None for all but cross_entropy_ignore_index.

        Returns:
            Logits (b, n, v), or a scalar loss, 0 where nothing is left to predict.

        Raises:
            TypeError: if seq does not hold integers, or mask is not bool.
            ValueError: if shapes, ids or the scope do not fit, or a row is all padding.
        """
        seq, mask = check_tokens(seq, mask, num_tokens=self.num_tokens, causal=self.causal, predicting=return_loss)
        check_marks(seq, documents=documents, loss_mask=loss_mask, predicting=return_loss)
        adapter = self.finetune_modules.chosen(finetune_scope, disabled=disable_lora)
        hidden = self.embed(seq, mask=mask, adapter=adapter, extra_embed=extra_embed, documents=documents)
        if not return_loss:
            return self.to_logits(hidden)
        mask = target_mask(mask, None if documents is None else document_starts(documents), loss_mask)
        ignored = None if loss_mask is not None or not self.ignores_targets else self.cross_entropy_ignore_index
        return chunked_next_token_loss(hidden, self.token_emb.weight, seq, mask=mask, ignore_index=ignored).loss

    def embed(
        self, seq: Tensor, *, mask: Tensor | None = None, adapter: Adapter | None = None,
        extra_embed: Tensor | None = None, dropout: float | None = None, cache: KVCache | None = None,
        documents: Tensor | None = None, since: int = 0,
    ) -> Tensor:  # fmt: skip
        """Hidden states after the last norm, (b, n - since, d); ids are trusted here, `forward` checks them.

        Args:
            seq: token ids, (b, n).
            mask: True on real tokens, (b, n); positions count real tokens, so padding on either side changes nothing.
            adapter: low-rank adapter of this pass.
            extra_embed: added to the token embeddings.
            dropout: probability for this pass in place of the model's own; 0 turns dropout off whatever the mode.
            cache: keys and values so far; the new tokens are added to it.
            documents: see `forward`; not with a cache.
            since: the first place whose hidden state is wanted, from 0; the last layer is computed from there on.

        Raises:
            ValueError: if a row, or a document, is longer than `max_length`.
        """
        tokens = seq.shape[1]
        positions, allowed = place_tokens(
            tokens, mask, cache, causal=self.causal, device=seq.device, documents=documents
        )
        check_length(tokens if cache is None else cache.filled, self.max_length, name="seq", positions=positions)
        dropouts = (self.attn_dropout, self.ff_dropout) if self.training else (0.0, 0.0)
        attn_dropout, ff_dropout = dropouts if dropout is None else (dropout, dropout)
        common = Pass(
            rotary=rotary_factors(positions, self.dim_head, scale_base=self.xpos_scale_base),
            causal=self.causal and allowed is None and (cache is None or tokens > 1),
            mask=allowed, attn_dropout=attn_dropout, ff_dropout=ff_dropout,
            recompute=self.activation_checkpointing and cache is None and torch.is_grad_enabled(),
        )  # fmt: skip
        x = self.token_emb(seq)
        x = x if extra_embed is None else x + extra_embed.to(x.dtype)
        for index, layer in enumerate(self.layers):
            first = since if index == len(self.layers) - 1 else 0
            part = {"since": first} if first else {}
            lora = None if adapter is None else adapter.layer(index)
            store = None if cache is None else partial(cache.store, index)
            x = x[:, first:] + layer(x, common, lora=lora, store=store, **part)
        return self.norm(x)

    def to_logits(self, hidden: Tensor) -> Tensor:
        """Logits (..., v) of hidden states (..., d), by the tied embedding."""
        return linear(hidden, self.token_emb.weight)

    def set_dropout(self, dropout: float) -> None:
        """Set the probability of both dropouts, from the next pass on."""
        check_dropout(dropout, name="dropout")
        self.attn_dropout = self.ff_dropout = dropout
        self._config.update(attn_dropout=dropout, ff_dropout=dropout)

    def set_activation_checkpointing(self, enabled: bool = True) -> None:
        """Keep a layer's input alone for the backward pass, and compute the layer again there; not kept in files."""
        self.activation_checkpointing = enabled

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.token_emb.weight.device

    @property
    def ignores_targets(self) -> bool:
        """Whether there is an id that the loss skips."""
        return self.cross_entropy_ignore_index >= 0

    @property
    def max_length(self) -> int | float:
        """How many tokens a row may have before xPos scales leave the dtype's range; infinite without decay."""
        return longest_position(product_dtype(self.token_emb.weight), scale_base=self.xpos_scale_base)

    # generation

    def new_cache(self, batch: int, max_length: int) -> KVCache:
        """An empty key/value cache for a batch of rows, in the dtype of the products and on the model's device.

        Raises:
            ValueError: if the model is not causal: what it has cached would change with every later token.
        """
        if not self.causal:
            raise ValueError("a model with causal=False cannot generate or keep a cache; build it with causal=True")
        return KVCache(
            depth=self.depth, batch=batch, max_length=max_length, dim_head=self.dim_head,
            dtype=product_dtype(self.token_emb.weight), device=self.device,
        )  # fmt: skip

    def new_decoder(self, *, batch: int, room: int, adapter: Adapter | None, steps: int) -> Decoder | NativeDecoder:
        """What takes one token a row and step after a prefill, for batch rows of at most room tokens."""
        return new_decoder(self, batch=batch, room=room, adapter=adapter, steps=steps)

    @typecheck
    def generate(
        self, seq_len: int, prompt: Tensor | None = None, *, prompt_mask: Tensor | None = None,
        max_new_tokens: int | None = None, temperature: float = 1.0, top_k: int | None = None,
        top_p: float | None = None, eos_token: int | None = None, pad_value: int = 0,
        generator: torch.Generator | None = None, use_tqdm: bool = False, finetune_scope: str | None = None,
        disable_lora: bool = False,
    ) -> Tensor:  # fmt: skip
        """Continue a prompt until its row has seq_len tokens in all, or ends with eos_token.

        Args:
            seq_len: tokens of prompt and response together, for each row.
            prompt: ids (n,) or (b, n); None starts one row from a random token.
            prompt_mask: True on real prompt tokens, of prompt's shape, for unequal prompts padded on either side.
            max_new_tokens: tokens of the response, if that is to be less.
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
                above `max_length`, eos_token is no id, the model is not causal, or a sampling setting names no
                distribution.
        """
        return continue_prompts(
            self, seq_len, prompt, prompt_mask=prompt_mask, max_new_tokens=max_new_tokens, temperature=temperature,
            top_k=top_k, top_p=top_p, eos_token=eos_token, pad_value=pad_value, generator=generator, use_tqdm=use_tqdm,
            adapter=self.finetune_modules.chosen(finetune_scope, disabled=disable_lora),
        )  # fmt: skip

    generate_text, stream = generate_text, stream  # text in, text out: functions that serve as methods

    # scopes: low-rank adapters kept under a name

    def new_adapter(
        self, *, r: int | None = None, alpha: float | None = None, last_layers: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Adapter:  # fmt: skip
        """An untrained adapter that fits this model, not kept by it; r None takes lora_r."""
        adapter = Adapter(
            depth=self.depth, dim=self.dim, dim_head=self.dim_head, heads=self.heads, r=self.lora_r if r is None else r,
            alpha=alpha, last_layers=last_layers, generator=generator,
        )  # fmt: skip
        return adapter.to(self.device)

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
        """Add an adapter's update to the base weights; models that share them keep theirs as they were."""
        for index, layer in enumerate(self.layers):
            assert isinstance(layer, ParallelTransformerBlock)
            layer.merge(adapter.layer(index))

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

    # copies; files are palm/files.py's

    @property
    def config(self) -> dict[str, Any]:
        """The constructor's arguments, JSON-able; scopes are not among them."""
        return dict(self._config)

    def share(self, *, trainable: Callable[[str], bool] | None = None) -> "PaLM":
        """A model over the same weights: what is frozen is shared in memory, what is trainable, by its name, is copied.

        The original keeps its own flags, scopes and mode; scopes are left out of the new one.
        """
        return share_weights(self, trainable)
