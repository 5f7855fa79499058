"""Selection by a token mask: every call selects image tokens again and hides the others from the layers from r on.

Nothing is removed: all layers compute and keep all columns, so this is no faster than the stock model. FastV's authors
measure this way. A note on the cache says to the next call which columns are image tokens.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from vtc.hf.names import CACHE
from vtc.hf.prune_layers import LastToken, causal_mask


class Masking:
    """One call of T tokens whose layers see M columns, those in the cache before it among them.

    Its last token's attention in layer r - 1 selects; layers from r on see the selected image tokens and all text.

    Parameters
    ----------
    method
        With `keep_prompt`, as `vtc.methods.fastv.FastV`.
    text
        The language model's config.
    layer : int
        r.
    is_image, real : Tensor[B, M], bool
        Which columns are image tokens, and which are not hidden by the caller's mask.
    keep : Tensor[B], int64
        How many image tokens each row keeps, over all its images.
    new : int
        T.
    """

    def __init__(
        self, method: Any, text: Any, layer: int, is_image: Tensor, real: Tensor, keep: Tensor, new: int
    ) -> None:
        self.method, self.text, self.layer = method, text, layer
        self.is_image, self.real, self.keep = is_image, real, keep
        self.last = LastToken(real[:, -new:], method.backend)
        self.mask: Any = None
        self.position: Any = None  # [B, 1] int64: of the first token after the call

    def before(self, number: int, layer: Any, hidden: Tensor, arguments: dict[str, Any]) -> Tensor:
        """`hidden`; the layers from r on get another mask."""
        if number == self.layer - 1:
            self.position = arguments["position_ids"][:, -1:].expand(len(hidden), 1) + 1
            self.last.read(layer, hidden, arguments)
        if number == self.layer:
            cache, device = arguments.get(CACHE), hidden.device
            scores = self.last.scores(cache, number - 1, self.real).to(device)
            stays = self.method.keep_prompt(scores, self.is_image.to(device), self.keep.to(device))
            self.mask = causal_mask(self.text, hidden, stays & self.real.to(device), cache, number)
        if number >= self.layer:
            arguments["attention_mask"] = self.mask
        return hidden
