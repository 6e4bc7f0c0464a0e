"""Layouts of checkpoints: what the tensors of a file are in this package's terms, by their names and shapes.

The public PaLMs (https://github.com/conceptofmind/PaLM) and their reward models have the names of lucidrains'
palm-rlhf-pytorch 0.2, in which they were trained. Knows keys and tensors only, no module.
"""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from palm_rlhf_pytorch.palm.config import ARGUMENTS
from palm_rlhf_pytorch.rotary import GAMMA, THETA
from palm_rlhf_pytorch.training.tensor_reader import Part, TensorReader

OURS, PUBLISHED_LAYOUT = "this package", "the published PaLMs"
SCOPES = "finetune_modules."
REWARD_SCOPE = "reward"  # that release's name for a reward model's adapter
WRAPPED = ("module.", "_orig_mod.")  # what training wrappers of torch put before every name
PROJECTIONS = "qkvo"  # an adapter's four products, in that release's order
ROUNDING = 1e-2  # of buffers that were stored in bfloat16


class Published(NamedTuple):
    """A public checkpoint: its file on the Hub (None: the only one there), sizes, and the name of its tokenizer."""

    file: str | None
    dim: int
    depth: int
    num_tokens: int = 50_304
    dim_head: int = 128
    heads: int = 8
    tokenizer: str = "EleutherAI/gpt-neox-20b"


PUBLISHED = {
    "conceptofmind/palm-150m": Published("palm_150m_8k_v0.pt", dim=768, depth=12),
    "conceptofmind/palm-410m": Published("palm_410m_8k_v0.pt", dim=1024, depth=24),
    "conceptofmind/palm-1b": Published("palm_1b_8k_v0.pt", dim=2048, depth=16),
    "conceptofmind/palm-2b": Published(None, dim=2560, depth=24),
}


class Layout(NamedTuple):
    """What a file holds, in this package's terms.

    name: whose layout it is.
    kind: "PaLM", "RewardModel" or another of this package's; None for a state dict that does not say.
    config: the constructor's arguments; empty where the file does not say enough.
    scopes: settings of the low-rank scopes.
    parts: for each of our names, where its tensor is in the file.
    """

    name: str
    kind: str | None
    config: dict[str, Any]
    scopes: dict[str, dict[str, Any]]
    parts: dict[str, Part]


def layout_of(reader: TensorReader, given: Mapping[str, Any] | None = None) -> Layout:
    """Tell what a file holds.

    Args:
        reader: the file.
        given: constructor arguments of the PaLM that the tensors need not say; those that they do say must agree.

    Raises:
        ValueError: if it is of the published layout and keys, shapes or values do not fit it, all of them named.
    """
    names = _Names(reader)
    if reader.kind is None and any(name.endswith("fused_attn_ff_proj.weight") for name in names.all):
        reward = "prompt_embed" in names.all
        found = _published_reward(names, given or {}) if reward else _published_palm(names, "", given or {})
        names.refuse_rest()
        return found
    scopes: dict[str, dict[str, Any]] = reader.extra.get("scopes", {})
    return Layout(OURS, reader.kind, reader.config, scopes, reader.whole())


def checked_kind(layout: Layout, kind: str, *, path: str | Path) -> Layout:
    """The layout of a file at `path`, which holds a model of that kind, or does not say what it holds.

    Raises:
        ValueError: if it says another kind.
    """
    if layout.kind not in (kind, None):
        raise ValueError(f"{path} holds a {layout.kind}, expected a {kind}; load it with {layout.kind}")
    return layout


def published_name(config: Mapping[str, Any]) -> str | None:
    """The public checkpoint of these sizes, if there is one."""
    for name, known in PUBLISHED.items():
        sizes = {"num_tokens": known.num_tokens, "dim": known.dim, "depth": known.depth}
        if all(config.get(size) == value for size, value in sizes.items()):
            return name
    return None


def sizes_of(parts: Mapping[str, Part], given: Mapping[str, Any]) -> dict[str, Any]:
    """The constructor's arguments that tensors of this package's layout tell, where nothing was saved beside them.

    Args:
        parts: the file's tensors.
        given: arguments; dim_head, if queries and keys are not normalised, is one that tensors alone do not tell.

    Raises:
        ValueError: if they are no PaLM's, or dim_head is missing or impossible.
    """
    try:
        num_tokens, dim = parts["token_emb.weight"].shape
        rows, width = parts["layers.0.in_proj.weight"].shape[0], parts["layers.0.out_proj.weight"].shape[1]
    except (KeyError, ValueError, IndexError):
        raise ValueError(f"keys {', '.join(list(parts)[:5])}, ... are of no PaLM") from None
    normed = parts.get("layers.0.q_norm.weight")
    dim_head = given.get("dim_head") if normed is None else normed.shape[0]
    if dim_head is None:
        raise ValueError("the tensors do not tell dim_head: give it, PaLM.from_pretrained(path, dim_head=...)")
    ff_inner = rows - 2 * dim_head - width  # rows = inner + 2 dim_head + 2 ff_inner, width = inner + ff_inner
    inner = width - ff_inner
    if min(inner, ff_inner) < 1 or inner % dim_head or ff_inner % dim:
        raise ValueError(f"dim_head ({dim_head}) does not fit the tensors: no whole number of heads comes of it")
    depth = sum(re.fullmatch(r"layers\.\d+\.in_proj\.weight", name) is not None for name in parts)
    return {
        "num_tokens": num_tokens, "dim": dim, "depth": depth, "dim_head": dim_head, "heads": inner // dim_head,
        "ff_mult": ff_inner // dim, "qk_rmsnorm": normed is not None,
    }  # fmt: skip


# the published layout


class _Names:
    """The names of a file, ticked off as they are understood."""

    def __init__(self, reader: TensorReader) -> None:
        self.reader, self.path = reader, reader.path
        names = list(reader.tensors)
        wrapped = next((prefix for prefix in WRAPPED if names and all(name.startswith(prefix) for name in names)), "")
        self.all = {name.removeprefix(wrapped): name for name in names}
        self.rest = dict.fromkeys(self.all)

    def shape(self, name: str) -> torch.Size:
        """The shape of a tensor that must be there; its name is ticked off."""
        if name not in self.all:
            raise ValueError(f"{self.path} does not fit the layout of {PUBLISHED_LAYOUT}: it lacks {name}")
        self.rest.pop(name, None)
        return self.reader.tensors[self.all[name]].shape

    def part(self, *names: str, shape: torch.Size | tuple[int, ...] | None = None) -> Part:
        """One tensor, maybe in another shape, or several side by side in their last dimension."""
        shapes = [self.shape(name) for name in names]
        joined = torch.Size([*shapes[0][:-1], sum(shape[-1] for shape in shapes)])
        return Part(tuple(self.all[name] for name in names), torch.Size(shape or joined), dim=len(joined) - 1)

    def values(self, name: str) -> Tensor:
        """A small tensor's values, float32."""
        return self.reader.read(self.part(name), dtype=torch.float32)

    def check_values(self, name: str, expected: Tensor) -> None:
        """Raise unless a buffer, if it is there, holds what this package computes itself."""
        if name not in self.all:
            return
        values = self.values(name)
        if values.shape != expected.shape or not torch.allclose(values, expected, rtol=ROUNDING, atol=0):
            raise ValueError(
                f"{self.path}: {name} holds {values.flatten()[:3].tolist()}..., this package has "
                f"{expected.flatten()[:3].tolist()}... there: a model of another kind"
            )

    def under(self, prefix: str) -> Iterable[str]:
        """Names that begin so."""
        return [name for name in self.all if name.startswith(prefix)]

    def refuse_rest(self) -> None:
        """Raise if there are names that nothing was made of."""
        if self.rest:
            first = ", ".join(list(self.rest)[:5]) + (", ..." if len(self.rest) > 5 else "")
            raise ValueError(
                f"{self.path} does not fit the layout of {PUBLISHED_LAYOUT}: {len(self.rest)} unexpected keys ({first})"
            )


def _published_palm(names: _Names, prefix: str, given: Mapping[str, Any]) -> Layout:
    parts = {"token_emb.weight": names.part(f"{prefix}token_emb.weight")}
    layers = {int(found[1]) for name in names.all if (found := re.match(rf"{re.escape(prefix)}layers\.(\d+)\.", name))}
    if layers != set(range(len(layers))):
        raise ValueError(f"{names.path} lacks layers: it has {sorted(layers)}")
    for layer in sorted(layers):
        block = f"{prefix}layers.{layer}." + ("fn." if names.under(f"{prefix}layers.{layer}.fn.") else "")
        ours = f"layers.{layer}."
        parts[f"{ours}norm.weight"] = _norm(names, f"{block}norm")
        parts[f"{ours}in_proj.weight"] = names.part(f"{block}fused_attn_ff_proj.weight")
        parts[f"{ours}out_proj.weight"] = names.part(f"{block}attn_out.weight", f"{block}ff_out.2.weight")
        for side in "qk":
            if f"{block}{side}_scale" in names.all:
                parts[f"{ours}{side}_norm.weight"] = names.part(f"{block}{side}_scale")
    parts["norm.weight"] = _norm(names, f"{prefix}norm")
    config = _published_config(names, prefix, parts, given)
    tied = f"{prefix}to_logits.weight"
    if tied in names.all:
        names.shape(tied)
        if not names.reader.same(names.all[tied], names.all[f"{prefix}token_emb.weight"]):
            raise ValueError(f"{names.path}: {tied} differs from {prefix}token_emb.weight, which are one here")
    scopes = {}
    for scope in dict.fromkeys(name.split(".")[1] for name in _unprefixed(names, prefix) if name.startswith(SCOPES)):
        adapter, scopes[scope] = _published_scope(names, f"{prefix}{SCOPES}{scope}.", depth=len(layers))
        parts |= {f"{SCOPES}{scope}.{name}": part for name, part in adapter.items()}
    return Layout(PUBLISHED_LAYOUT, "PaLM", config, scopes, parts)


def _unprefixed(names: _Names, prefix: str) -> Iterable[str]:
    return [name.removeprefix(prefix) for name in names.under(prefix)]


def _norm(names: _Names, name: str) -> Part:
    """The gain of a LayerNorm, which has no offset here: that release keeps a buffer of zeros for one."""
    beta = f"{name}.beta"
    if beta in names.all and names.values(beta).any():
        raise ValueError(f"{names.path}: {beta} is not zero, and PaLM's norms have no offset")
    return names.part(f"{name}.gamma")


def _published_config(
    names: _Names, prefix: str, parts: Mapping[str, Part], given: Mapping[str, Any]
) -> dict[str, Any]:
    """The constructor's arguments: what the tensors tell, that release's defaults, and what was given."""
    block = f"{prefix}layers.0." + ("fn." if names.under(f"{prefix}layers.0.fn.") else "")
    angles = f"{block}rotary_emb.inv_freq"
    inner = names.shape(f"{block}attn_out.weight")[1]
    rows, ff_inner = names.shape(f"{block}fused_attn_ff_proj.weight")[0], names.shape(f"{block}ff_out.2.weight")[1]
    dim_head = 2 * names.shape(angles)[0] if angles in names.all else (rows - inner - 2 * ff_inner) // 2
    num_tokens, dim = parts["token_emb.weight"].shape
    if dim_head < 1 or rows != inner + 2 * dim_head + 2 * ff_inner or inner % dim_head or ff_inner % dim:
        raise ValueError(
            f"{names.path}: shapes contradict each other: fused_attn_ff_proj has {rows} rows, attn_out {inner} columns,"
            f" ff_out {ff_inner}, dim_head is {dim_head} and dim {dim}"
        )
    depth = sum(name.endswith(".in_proj.weight") for name in parts)
    told = {
        "num_tokens": num_tokens, "dim": dim, "depth": depth, "dim_head": dim_head, "heads": inner // dim_head,
        "ff_mult": ff_inner // dim, "qk_rmsnorm": "layers.0.q_norm.weight" in parts,
    }  # fmt: skip
    pairs = torch.arange(0, dim_head, 2) / dim_head
    for layer in range(depth):
        rotary = block.replace("layers.0.", f"layers.{layer}.", 1) + "rotary_emb."
        names.check_values(rotary + "inv_freq", THETA**-pairs)
        names.check_values(rotary + "scale", (pairs + GAMMA) / (1 + GAMMA))
    if told["qk_rmsnorm"] and "qk_scale" not in given:  # releases differ in whether they use it
        raise ValueError(
            f"{names.path} normalises queries and keys, and its tensors do not tell by what their products are"
            f" multiplied: give qk_scale (8.0, or dim_head**-0.5 = {dim_head**-0.5:.4g} where the release ignored it)"
        )
    return {"cross_entropy_ignore_index": 0} | merged_arguments(told, given, path=names.path)  # that release's default


def merged_arguments(told: Mapping[str, Any], given: Mapping[str, Any], *, path: object) -> dict[str, Any]:
    """Arguments that a file tells and those that were given, which must agree.

    Raises:
        ValueError: if they do not, naming them.
        TypeError: if one is no argument of PaLM.
    """
    strange = [name for name in given if name not in ARGUMENTS]
    if strange:
        raise TypeError(f"{', '.join(strange)}: no argument of PaLM (known: {', '.join(ARGUMENTS)})")
    wrong = [f"{name} is {told[name]}, not {value}" for name, value in given.items() if told.get(name, value) != value]
    if wrong:
        raise ValueError(f"{path}: {', '.join(wrong)}: the tensors say so")
    return {**told, **given}


def _published_scope(names: _Names, prefix: str, *, depth: int) -> tuple[dict[str, Part], dict[str, Any]]:
    """An adapter's tensors by our names, without the scope's own, and the settings it was made with."""
    parts: dict[str, Part] = {}
    for layer in range(depth):
        for number, projection in enumerate(PROJECTIONS):
            for matrix in "AB":
                parts[f"layers.{layer}.{projection}.{matrix}"] = names.part(f"{prefix}{layer}.{number}.{matrix}")
    ranks = {part.shape[1] for name, part in parts.items() if name.endswith(".A")}
    if len(ranks) != 1:
        raise ValueError(f"{names.path}: adapters under {prefix} have several ranks: {sorted(ranks)}")
    return parts, {"r": ranks.pop(), "alpha": None, "last_layers": None}


def _published_reward(names: _Names, given: Mapping[str, Any]) -> Layout:
    trunk = _published_palm(names, "palm.", given)
    parts = {f"palm.{name}": part for name, part in trunk.parts.items() if not name.startswith(SCOPES)}
    scope = REWARD_SCOPE if REWARD_SCOPE in trunk.scopes else next(iter(trunk.scopes), None)
    if len(trunk.scopes) > 1 and scope != REWARD_SCOPE:
        raise ValueError(f"{names.path} has the scopes {', '.join(trunk.scopes)}, none named {REWARD_SCOPE!r}: which?")
    if scope is not None:
        prefix = f"{SCOPES}{scope}."
        own = {name.removeprefix(prefix): part for name, part in trunk.parts.items() if name.startswith(prefix)}
        parts |= {f"adapter.{name}": part for name, part in own.items()}
    dim = trunk.config["dim"]
    for name in ("prompt_embed", "response_embed"):
        parts[name] = names.part(name, shape=(dim,))
    head = "to_pred.weight" if "to_pred.weight" in names.all else "to_pred.0.weight"  # the scalar one has no offset
    parts["head.weight"] = names.part(head)
    bins = parts["head.weight"].shape[0]
    bias = names.part("to_pred.bias") if "to_pred.bias" in names.all else Part((), torch.Size((bins,)))
    parts["head.bias"] = bias
    rank = {} if scope is None else {"lora_r": trunk.scopes[scope]["r"]}
    config = {
        "palm": trunk.config, "num_binned_output": bins if bins > 1 else 0, "label_offset": 0,
        "use_lora": scope is not None, "lora_r": 8, "lora_alpha": None, "dropout": 0.0,
        "pool_prompt": True, "pool_last": False, **rank,
    }  # fmt: skip
    return Layout(PUBLISHED_LAYOUT, "RewardModel", config, {}, parts)
