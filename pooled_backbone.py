"""The common base of our backbones and timm's: from the last features to the feature of an image.

    features -> pooling -> final norm      pool_position "before" (the norm), the default
    features -> final norm -> pooling      pool_position "after"

In mode "official" the pooling is the architecture's own. Any other mode names an operator of `poolings.choose`, which
pools the tokens of a vision transformer (it has no [CLS] token then) or the last map of a convolutional network. A
ResNet has no final norm. An operator whose result is not as wide as the features (how) has a norm of its own width
after it; then the features themselves are not normed.

Parameters of SimPool are `simpool.*`, as in the published checkpoints, those of any other operator are `pool.*`.

Shape letters: B images, N positions (patches, or cells of the last map), D width of the features, h, w grid.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from poolings.base import WITH_ATTENTION
from poolings.choose import POOLINGS, build_pooling, check_settings

MODES = ("official", *POOLINGS)
POSITIONS = ("before", "after")
GAMMA = {"tokens": 1.25, "map": 2.0}  # the published exponents, by what a backbone ends in
_FLAGS_OF_SIMPOOL = ("gamma", "use_beta", "value_min")


class PooledBackbone(nn.Module):
    """A backbone whose last features are pooled in the architecture's own way ("official") or by an operator.

    A subclass calls `make_pooling` and sets `norm` (of width `norm_width`) at the place in its constructor that decides
    their order among the parameters, and defines `forward_features` and `own_pooling`.

    Args:
        mode: "official" or a key of POOLINGS.
        gamma: SimPool's exponent, None for none, or "auto": 1.25 for tokens, 2.0 for maps. Other modes have none.
        value_min: SimPool's minimum, "image" or "batch".
        use_beta: SimPool's learned scalar; None: for tokens that are pooled before the final norm, as published.
        pool_position: "before" or "after" the final norm.
        pooling_args: the operator's settings.

    Attributes:
        num_features: width of an image's feature.
        pooling: the operator's module, None in official mode.

    Raises:
        ValueError: for an unknown mode or setting (with near matches), and for settings that the mode does not have.
    """

    num_prefix_tokens = 0

    def __init__(
        self,
        mode: str,
        gamma: float | str | None = "auto",
        value_min: str = "image",
        use_beta: bool | None = None,
        pool_position: str = "before",
        pooling_args: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        pooling_args = dict(pooling_args or {})
        check_pooling(mode, use_beta, pool_position, pooling_args)
        self.mode, self.pool_position = mode, pool_position
        self.grad_checkpointing = False
        self.pooling_config: dict[str, Any] = {}
        if mode != "official":
            self.pooling_config |= {"pool_position": pool_position, "pooling_args": pooling_args}
        if mode == "simpool":
            self.pooling_config |= {"gamma": gamma, "use_beta": use_beta, "value_min": value_min}

    def make_pooling(self, dim: int, kind: str) -> None:
        """Add the operator for features of width `dim`, which are "tokens" or a "map".

        The order of this call and other layers decides the random weights. `pooling_config` then holds the settings
        that the operator has, for whoever builds the model again.
        """
        self.num_features = self.norm_width = dim
        if self.mode == "official":
            return
        if self.mode == "simpool":
            config = self.pooling_config
            config["gamma"] = GAMMA[kind] if config["gamma"] == "auto" else config["gamma"]
            if config["use_beta"] is None:
                config["use_beta"] = kind == "tokens" and self.pool_position == "before"
            self.simpool = build_pooling("simpool", dim, **{key: config[key] for key in _FLAGS_OF_SIMPOOL})
        else:
            self.pool = build_pooling(self.mode, dim, **self.pooling_config["pooling_args"])
        self.num_features = self.pooling.num_features
        self.norm_width = self.num_features if self.pool_position == "before" else dim

    @property
    def pooling(self) -> nn.Module | None:
        """The operator, None in official mode."""
        return getattr(self, "simpool" if self.mode == "simpool" else "pool", None)

    def initialise(self, function: Callable[[nn.Module], None]) -> None:
        """Apply a function of initial weights to every layer except an operator's, which has its own.

        SimPool's are the backbone's, as published.
        """
        for name, child in self.named_children():
            if name != "pool":
                child.apply(function)

    # ---- features -> feature ----------------------------------------------------------------------------------------

    def own_pooling(self, features: Tensor) -> Tensor:
        """The architecture's own pooling of its last features, (B, D), before the final norm."""
        return features.mean((2, 3))

    def normed(self, x: Tensor) -> Tensor:
        """The final norm of (..., D)."""
        return self.norm(x)

    def grid_of(self, features: Tensor, size: tuple[int, int]) -> tuple[int, int]:
        """(h, w) of the features of images of `size` = (H, W)."""
        return tuple(features.shape[-2:])

    def feature_of(self, features: Tensor, size: tuple[int, int]) -> Tensor:
        """The last features of images of `size` -> (B, num_features), pooled and normed."""
        return self._pooled(features, size)[0]

    def _pooled(
        self, features: Tensor, size: tuple[int, int], need_attention: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """(B, num_features), and the operator's weights over positions (B, heads, N) if needed and if it has some."""
        operator = self.pooling
        if operator is None:
            return self.normed(self.own_pooling(features)), None
        x, settings, attention = features, {}, None
        if self.pool_position == "after":
            x = self.positions(features)
        if x.ndim == 3 and getattr(operator, "needs_map", False):
            settings["grid"] = self.grid_of(features, size)
        if need_attention and self.mode in WITH_ATTENTION:
            pooled, attention = operator(x, return_attention=True, **settings)
        else:
            pooled = operator(x, **settings)
        if pooled.shape[-1] != self.num_features:  # known only once the operator has met a map
            raise ValueError(
                f"{self.mode} makes {pooled.shape[-1]} numbers of images of {size[0]}x{size[1]}, and the model "
                f"was built for {self.num_features}; set pooling_args for this size, such as map_size"
            )
        return (self.normed(pooled) if self.pool_position == "before" else pooled), attention

    def positions(self, features: Tensor) -> Tensor:
        """Features as (B, N, D) without prefix tokens, after the final norm unless that has another width."""
        tokens = features.flatten(2).transpose(1, 2) if features.ndim == 4 else features[:, self.num_prefix_tokens :]
        return self.normed(tokens) if tokens.shape[-1] == self.norm_width else tokens

    def forward_dense(
        self, x: Tensor, mask: Tensor | None = None, need_attention: bool = True
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Feature (B, num_features), positions (B, N, D), both after the final norm, and attention (B, heads, N).

        One pass gives all three: forward's feature (without the classifier), the last features (see `positions`) and
        get_attention_map's numbers, which are None if the model has no map and without need_attention. A mask, (B, N)
        or (B, h, w), is for vision transformers of ours; others raise ValueError.
        """
        features = self.forward_features(x, mask)
        pooled, attention = self._pooled(features, tuple(x.shape[-2:]), need_attention)
        return pooled, self.positions(features), attention

    @property
    def has_attention_map(self) -> bool:
        """Whether `get_attention_map` gives one."""
        return self.mode in WITH_ATTENTION

    def get_attention_map(self, x: Tensor) -> Tensor:
        """The operator's weights over the positions, (B, heads, h, w). Raises ValueError if it has none."""
        if not self.has_attention_map:
            raise ValueError(
                f'a {self.kind_of_model()} in mode "{self.mode}" has no attention map; build it with mode="simpool", '
                f"or with {', '.join(name for name in WITH_ATTENTION if name != 'simpool')}"
            )
        features, size = self.forward_features(x), tuple(x.shape[-2:])
        _, attention = self._pooled(features, size, need_attention=True)
        return attention.unflatten(-1, self.grid_of(features, size))

    def kind_of_model(self) -> str:
        """What an error calls this model."""
        return type(self).__name__

    def refuse_mask(self, mask: Tensor | None) -> None:
        """For backbones that cannot mask patches. Raises ValueError if there is a mask."""
        if mask is not None:
            raise ValueError(
                f"{self.kind_of_model()} takes no mask of patches; use a vit_tiny, vit_small or vit_base built with "
                "masked_im_modeling=True"
            )

    # ---- blocks -----------------------------------------------------------------------------------------------------

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """torch.compile in place, as nn.Module's: forward, and forward_dense, which is called by its name."""
        super().compile(*args, **kwargs)
        self.forward_dense = torch.compile(self.forward_dense, *args, **kwargs)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Keep only the blocks' inputs for backward and compute each block twice: less memory, about 1.3x the time."""
        self.grad_checkpointing = enable

    def run_block(self, block: nn.Module, x: Tensor, **settings: Any) -> Any:
        """block(x, **settings), checkpointed if that is on and gradients are needed."""
        if not (self.grad_checkpointing and torch.is_grad_enabled()):
            return block(x, **settings)
        return checkpoint(
            block, x, use_reentrant=False, context_fn=lambda: (nullcontext(), self.second_pass(block)), **settings
        )

    def second_pass(self, block: nn.Module) -> AbstractContextManager:
        """A context for computing a checkpointed block again in backward."""
        return nullcontext()


def check_pooling(mode: str, use_beta: bool | None, pool_position: str, pooling_args: Mapping[str, Any]) -> None:
    """Raise ValueError for a mode that does not exist, and for settings of the pooling that it does not have."""
    if mode not in MODES:
        raise ValueError(f"unknown mode {mode!r}; choose one of {', '.join(MODES)}")
    if pool_position not in POSITIONS:
        raise ValueError(f"unknown pool_position {pool_position!r}; choose {' or '.join(POSITIONS)}")
    if use_beta and mode != "simpool":
        raise ValueError(f"use_beta is a setting of simpool, and the mode is {mode}: leave it out")
    if mode == "official":
        given = [f"pool_position {pool_position}"] if pool_position != "before" else []
        given += [f"{key}={value}" for key, value in pooling_args.items()]
        if given:
            raise ValueError(
                f"{', '.join(given)}: the architecture's own pooling (mode official) has no settings; name an operator "
                f"as the mode, or leave them out"
            )
        return
    if mode == "simpool":
        for key in _FLAGS_OF_SIMPOOL:
            if key in pooling_args:
                raise ValueError(f"simpool's {key} is set by {key} itself, not by pooling_args; leave it out there")
    check_settings(mode, pooling_args)


def fewer_blocks(blocks: int, pool_depth: int) -> int:
    """How many of `blocks` are left when the last `pool_depth` are not built. Raises ValueError if none is."""
    if isinstance(pool_depth, bool) or not isinstance(pool_depth, int) or not 0 <= pool_depth < blocks:
        raise ValueError(
            f"pool_depth {pool_depth}: it is the number of blocks to leave out of {blocks}, so give 0 to {blocks - 1}"
        )
    return blocks - pool_depth
