"""Multi-query attention: many query heads, one key/value head, and the cache that goes with it.

Shazeer, "Fast Transformer Decoding: One Write-Head is All You Need", https://arxiv.org/abs/1911.02150
`attend` is the function, by plain products or by torch's fused kernels; `attention_mask` says who sees whom;
`KVCache` keeps keys and values while decoding. Knows nothing of projections, positions or layers' weights.
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from palm_rlhf_pytorch.processor import float32_rows


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    causal: bool = False,
    mask: Tensor | None = None,
    dropout: float = 0.0,
    fused: bool = False,
) -> Tensor:
    """softmax(q k^T scale) v for each query head over the one key/value head.

    Args:
        q: queries, (b, h, i, d).
        k: keys, (b, j, d).
        v: values, (b, j, d).
        scale: factor of the products, d^-0.5 unless queries and keys are normalised.
        causal: each query sees the keys up to its own place; needs i = j and no mask.
        mask: True where a query may look at a key, (b, i, j), at least one place in each row; replaces `causal`.
        dropout: probability with which an attention weight is dropped.
        fused: use torch's scaled_dot_product_attention, whose kernels never store the (i, j) products. Where a CPU
            would emulate q's dtype it is given float32: several times as fast, with twice the memory for gradients.

    Returns:
        (b, h, i, d) in q's dtype; products and softmax in float32 on the plain path.
    """
    if fused and q.shape[2] > 1 and _is_emulated(q):
        with torch.autocast("cpu", enabled=False):
            wide = (x.float() for x in (q, k, v))
            return _attend_fused(*wide, scale=scale, causal=causal, mask=mask, dropout=dropout).to(q.dtype)
    if fused:
        return _attend_fused(q, k, v, scale=scale, causal=causal, mask=mask, dropout=dropout)
    exact = torch.promote_types(q.dtype, torch.float32)
    products = torch.einsum("bhid,bjd->bhij", q.to(exact) * scale, k.to(exact))
    if causal and mask is None:
        mask = attention_mask(None, q.shape[2], k.shape[1], causal=True, device=q.device)
    if mask is not None:
        products = products.masked_fill(~rearrange(mask, "b i j -> b 1 i j"), -torch.finfo(products.dtype).max)
    weights = products.softmax(dim=-1).to(v.dtype)
    weights = F.dropout(weights, dropout) if dropout > 0 else weights
    return torch.einsum("bhij,bjd->bhid", weights, v)


def _is_emulated(x: Tensor) -> bool:
    return x.device.type == "cpu" and not torch.compiler.is_compiling() and float32_rows(x.dtype) is not None


def _attend_fused(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float, causal: bool, mask: Tensor | None, dropout: float
) -> Tensor:
    """The same through scaled_dot_product_attention; a single query folds its heads into the query length."""
    heads, queries = q.shape[1], q.shape[2]
    k, v = (rearrange(x, "b j d -> b 1 j d") for x in (k, v))
    if mask is not None:
        mask = rearrange(mask, "b i j -> b 1 i j")
    if queries == 1:  # all heads see the same keys: one head with h queries reads the cache once, not h times
        folded = rearrange(q, "b h 1 d -> b 1 h d")
        out = F.scaled_dot_product_attention(folded, k, v, attn_mask=mask, dropout_p=dropout, scale=scale)
        return rearrange(out, "b 1 h d -> b h 1 d")
    k, v = (x.expand(-1, heads, -1, -1) for x in (k, v))
    causal = causal and mask is None
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, scale=scale, is_causal=causal)


def attention_mask(
    key_mask: Tensor | None, queries: int, keys: int, *, causal: bool, device: torch.device | None = None
) -> Tensor:
    """Who sees whom: (b or 1, i, j), True where query i may look at key j.

    The last query stands at the last key. A query that would see nothing (padding on the left) sees itself, so that no
    softmax is over an empty set; what comes out there is never used.

    Args:
        key_mask: True on real keys, (b, j), or None where all are.
        queries: i.
        keys: j, at least i.
        causal: queries see no later key.
        device: where to build the mask when there is no key_mask.
    """
    device = device if key_mask is None else key_mask.device
    places = torch.arange(keys - queries, keys, device=device)[:, None]
    columns = torch.arange(keys, device=device)
    allowed = (columns <= places)[None] if causal else torch.ones(1, queries, keys, dtype=torch.bool, device=device)
    if key_mask is None:
        return allowed
    return (allowed & key_mask[:, None]) | (columns == places)[None]


class KVCache:
    """Keys and values of all layers, preallocated for max_length tokens; belongs to one call, so calls can overlap.

    Every row is written at the same place; rows with shorter prompts are padded on the left, and `mask` hides the
    padding. Position and place differ: `lengths` counts each row's real tokens.
    """

    def __init__(
        self, *, depth: int, batch: int, max_length: int, dim_head: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.keys = torch.zeros(depth, batch, max_length, dim_head, dtype=dtype, device=device)
        self.values = torch.zeros_like(self.keys)
        self.mask = torch.zeros(batch, max_length, dtype=torch.bool, device=device)
        self.lengths = torch.zeros(batch, dtype=torch.long, device=device)
        self.filled = 0
        self.ragged = False

    def admit(self, mask: Tensor | None, tokens: int) -> Tensor:
        """Make room for the next tokens (b, n), True in mask where real; returns their positions, (b, n)."""
        batch, room = self.mask.shape
        if self.filled + tokens > room:
            raise ValueError(f"a cache for {room} tokens that holds {self.filled} cannot take {tokens} more")
        if mask is None:
            mask = self.mask.new_ones(batch, tokens)
        elif not self.ragged:  # asking the mask makes a CUDA device wait: once it is known, no more
            self.ragged = not bool(mask.all())
        self.mask[:, self.filled : self.filled + tokens] = mask
        positions = (self.lengths[:, None] + mask.cumsum(dim=-1) - 1).clamp(min=0)
        self.lengths = self.lengths + mask.sum(dim=-1)
        self.filled += tokens
        return positions

    def visible(self, tokens: int) -> Tensor | None:
        """Which keys the tokens just admitted may look at, (b, n, j); None where their order alone says it."""
        if not self.ragged and tokens in (1, self.filled):
            return None
        return attention_mask(self.mask[:, : self.filled], tokens, self.filled, causal=True)

    def store(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write the admitted tokens' keys and values (b, n, d) of a layer; returns all so far, (b, j, d) each."""
        new = slice(self.filled - k.shape[1], self.filled)
        self.keys[layer, :, new], self.values[layer, :, new] = k, v
        return self.keys[layer, :, : self.filled], self.values[layer, :, : self.filled]


def place_tokens(
    tokens: int, mask: Tensor | None, cache: KVCache | None, *, causal: bool, device: torch.device,
    documents: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Positions of a pass's tokens, (n,) or (b, n), and what they may look at, (b or 1, n, j).

    Positions count a row's real tokens from 0, or those of a document, so padding on either side changes none; padding
    gets a neighbour's.

    Args:
        tokens: n.
        mask: True on real tokens, (b, n), or None where all are.
        cache: what comes before them, if anything; they are admitted to it.
        causal: tokens see no later one.
        device: where the tokens are.
        documents: a number for each token, (b, n): neighbours of one number are one document, and see no other.

    Returns:
        Positions, and the mask of `attend`, None where `causal` alone says what real tokens see.

    Raises:
        ValueError: if both a cache and documents are given.
    """
    if documents is not None:
        if cache is not None:
            raise ValueError("documents: what a cache holds belongs to no document; leave one of the two out")
        return _place_documents(document_starts(documents), mask, causal=causal)
    if cache is not None:
        return cache.admit(mask, tokens), cache.visible(tokens)
    if mask is None:
        return torch.arange(tokens, device=device), None
    needless = _hides_nothing(mask, causal=causal)
    allowed = None if needless else attention_mask(mask, tokens, tokens, causal=causal)
    return (mask.cumsum(dim=-1) - 1).clamp(min=0), allowed


def _hides_nothing(mask: Tensor, *, causal: bool) -> bool:
    """Whether no real token would see padding without the mask (b, n), so that attention needs none.

    Asked on a CPU alone: a CUDA device would be waited for; and not while torch.compile looks for one graph.
    """
    if mask.device.type != "cpu" or torch.compiler.is_compiling():
        return False
    return not bool((mask[:, 1:] & ~mask[:, :-1]).any()) if causal else bool(mask.all())


def document_starts(documents: Tensor) -> Tensor:
    """True on the first token of each document, (b, n), where neighbours of one number are a document."""
    return torch.cat((torch.ones_like(documents[:, :1], dtype=torch.bool), documents.diff(dim=-1) != 0), dim=-1)


def _place_documents(starts: Tensor, mask: Tensor | None, *, causal: bool) -> tuple[Tensor, Tensor]:
    real = torch.ones_like(starts) if mask is None else mask
    count = real.cumsum(dim=-1)
    before = (count - real.long()).masked_fill(~starts, 0).cummax(dim=-1).values  # real tokens before the document
    document = starts.cumsum(dim=-1)
    allowed = attention_mask(mask, starts.shape[1], starts.shape[1], causal=causal, device=starts.device)
    return (count - before - 1).clamp(min=0), allowed & (document[:, :, None] == document[:, None, :])
