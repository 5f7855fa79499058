"""The settings applied to one model's configs: grid, N, K, scored layers. No module of a model runs here."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from vtc.config import VTCConfig, kept_count
from vtc.methods import Method
from vtc.methods.checks import plain

if TYPE_CHECKING:
    from collections.abc import Sequence


class Plan(NamedTuple):
    """What to do with a view, which is the image that one pass of the vision tower sees.

    Attributes
    ----------
    config : VTCConfig
    method : Method
    grid : tuple of int
        Rows and columns of patches, after pooling.
    num_tokens : int
        N, visual tokens of a view.
    num_kept : int
        K; 0 for tiles, which share the K of their image.
    num_outputs : int
        Output tokens per view; an upper bound if the method is adaptive; 0 for tiles.
    feature_layers : tuple of int
        The number of vision layers before each feature layer.
    scored : range
        The vision layers whose [CLS] probabilities are scored, counted from 0.
    pool : int
        pool x pool patches become one before the selection.
    received : tuple of int
        The vision layers in which patches are ranked by the attention that they receive, counted from 0.
    """

    config: VTCConfig
    method: Method
    grid: tuple[int, int]
    num_tokens: int
    num_kept: int
    num_outputs: int
    feature_layers: tuple[int, ...]
    scored: range
    pool: int
    received: tuple[int, ...] = ()

    @classmethod
    def of(
        cls,
        config: VTCConfig,
        model_config: Any,
        *,
        vision: Any = None,
        has_cls: bool = True,
        num_registers: int = 0,
        size: Sequence[int] | None = None,
        feature_layer: int | list[int] | None = None,
        strategy: str | None = None,
        pool: int = 1,
        shares_keep: bool = False,
    ) -> Plan:
        """Apply `config` to a LLaVA's config.

        Parameters
        ----------
        model_config
            With `vision_config`, `vision_feature_layer`, `vision_feature_select_strategy` and so on.
        vision : optional
            The vision tower's config, if it is not `model_config.vision_config`.
        has_cls, num_registers
            Whether the vision tower has a [CLS] token, and how many register tokens follow it.
        size : sequence of int, optional
            Height and width of the views in pixels; those of the vision config if not given.
        feature_layer, strategy
            They replace `vision_feature_layer` and `vision_feature_select_strategy` of the model's config.
        pool : int
            pool x pool patches become one before the selection.
        shares_keep : bool
            Whether the views of an image share its K, so that a view has none of its own.

        Raises
        ------
        ValueError
            If a model of these configs does not support the settings.
        """
        vision = model_config.vision_config if vision is None else vision
        depth = vision.num_hidden_layers
        method = config.build_method().for_tower(has_cls)
        feature_layers = _feature_layers(model_config, depth, feature_layer)
        _require_strategy(strategy or getattr(model_config, "vision_feature_select_strategy", None), has_cls)
        rows, columns = patch_grid(vision, size)
        grid = (rows // pool, columns // pool)
        if not grid[0] * grid[1]:
            raise ValueError(
                f"images of {rows} x {columns} patches hold no visual token, which takes {pool} x {pool} patches of "
                f"{vision.patch_size} pixels; pass larger images"
            )
        num_tokens = grid[0] * grid[1] + num_registers
        kept = 0 if shares_keep else kept_count(config, num_tokens)
        outputs = 0 if shares_keep else method.num_outputs(num_tokens, kept)
        scored = method.scored_layers(max(feature_layers), depth)
        received = method.received_layers(max(feature_layers), depth)
        return cls(config, method, grid, num_tokens, kept, outputs, feature_layers, scored, pool, received)


def patch_grid(vision: Any, size: Sequence[int] | None = None) -> tuple[int, int]:
    """Rows and columns of patches of a view of `size` (height, width), by default that of the vision config."""
    sides, patch = _pair(vision.image_size) if size is None else size, patch_size(vision)
    return sides[0] // patch[0], sides[1] // patch[1]


def patch_size(vision: Any) -> tuple[int, int]:
    """Height and width of a patch in pixels."""
    return _pair(vision.patch_size)


def _pair(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else tuple(value)


def _feature_layers(config: Any, depth: int, given: Any) -> tuple[int, ...]:
    """How many layers of the tower come before each feature layer; several are concatenated, as VipLLaVA does."""
    own: Any = getattr(config, "vision_feature_layer", None)
    own = getattr(config, "vision_feature_layers", None) if own is None else own  # the name in VipLLaVA's old configs
    given = plain(own if given is None else given)
    layers = [plain(layer) for layer in given] if isinstance(given, (list, tuple)) else [given]
    if not all(isinstance(layer, int) for layer in layers):
        raise ValueError(f"vision_feature_layer must be an integer or a list of integers, got {given!r}")
    if len(layers) != (1 if isinstance(own, int) else len(own)):
        raise ValueError(
            f"vision_feature_layer={given!r}, but the model's projector was made for {own!r}; do not pass it"
        )
    stops = tuple(layer if layer >= 0 else depth + 1 + layer for layer in layers)
    if not all(0 < stop <= depth for stop in stops):
        raise ValueError(f"vision_feature_layer={given!r} does not exist; the tower has {depth} layers")
    return stops


def _require_strategy(strategy: str | None, has_cls: bool) -> None:
    strategy, wanted = strategy or "default", "default" if has_cls else "full"
    if strategy != wanted:
        reason = "drops [CLS] from the features" if has_cls else "keeps all tokens of a tower without [CLS]"
        raise ValueError(
            f"vision_feature_select_strategy={strategy!r} is not supported; VTC accepts {wanted!r}, which {reason}"
        )
