"""Scopes: the low-rank adapters that a language model keeps under names, beside its own weights.

Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", https://arxiv.org/abs/2106.09685
Knows nothing of the model but that someone makes adapters which fit it.
"""

from typing import Any

from torch import nn

from palm_rlhf_pytorch.lora import Adapter


class Scopes(nn.ModuleDict):
    """Adapters by name; a name that is taken, or unknown, is a ValueError that says which there are."""

    def add(self, name: str, adapter: Adapter) -> None:
        """Keep an adapter under a name.

        Raises:
            ValueError: if the name is taken, empty, holds a dot, or is one that modules need themselves.
        """
        self.check_free(name)
        self[name] = adapter

    def check_free(self, name: str) -> None:
        """Raise unless an adapter can be added under this name."""
        if name in self:
            raise ValueError(f"scope {name!r} exists already; remove_finetune_params({name!r}) removes it")
        if not name or "." in name:
            raise ValueError(f"scope {name!r}: a name takes at least one character and no dot")
        if hasattr(self, name):
            raise ValueError(f"scope {name!r}: torch's modules have an attribute of this name; choose another")

    def find(self, name: str) -> Adapter:
        """The adapter of this name."""
        if name not in self:
            known = ", ".join(map(repr, self)) or "none yet"
            raise ValueError(f"unknown scope {name!r} (known: {known}); add_finetune_params({name!r}) adds it")
        adapter = self[name]
        assert isinstance(adapter, Adapter), f"scope {name!r} is a {type(adapter).__name__}"
        return adapter

    def chosen(self, name: str | None, *, disabled: bool) -> Adapter | None:
        """The adapter of a pass, if any; an unknown name is refused even where adapters are disabled."""
        adapter = None if name is None else self.find(name)
        return None if disabled else adapter

    def take(self, name: str) -> Adapter:
        """The adapter of this name, which is let go of."""
        adapter = self.find(name)
        del self[name]
        return adapter

    @property
    def settings(self) -> dict[str, dict[str, Any]]:
        """What each adapter was made with, JSON-able."""
        return {name: self.find(name).config for name in self}
