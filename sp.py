"""SimPool: attention-based pooling in one file that needs only torch.

Follows "Keep It SimPool: Who Said Supervised Transformers Suffer from Attention Deficit?" (ICCV 2023). A query, made
from the mean of all features, attends to the features of its own image; the attention weights a generalised mean:

    u0 = mean_p X_p                          query source: the un-normalised mean
    a  = softmax(LN(X) Wk^T Wq u0 / sqrt(D)) attention over the N positions
    V  = LN(X) - min(LN(X)) + 1e-6           values, shifted to be positive
    u  = (sum_p a_p V_p^gamma)^(1/gamma)     pooled feature, plus a learned scalar beta if use_beta is set

Copy this file into a project and pool the tokens or the feature map of any network:

    from sp import SimPool
    pool = SimPool(dim=384, gamma=1.25)      # 1.25 for transformers, 2.0 for convolutional networks
    feature = pool(tokens)                   # (B, N, 384) -> (B, 384);  maps (B, 384, H, W) work as well
    feature, attention = pool(tokens, return_attention=True)                    # attention (B, heads, N)

Departures from the published code, and why:
- The minimum is taken within each image, as in the paper, so a feature does not depend on the rest of its batch;
  `value_min="batch"` gives the published behaviour.
- K q is computed as LN(X) (Wk^T Wq u0): the same value from two D x D products per image instead of N.
- Everything runs in float32 whatever autocast says: in float16 eps^gamma underflows and its gradient is NaN.
- The backward pass recomputes what it needs from the input, so a layer stores only its input and a few vectors.
- A batch of one keeps its batch dimension, and multiple heads are merged with gamma as well.

Shape letters: B batch, N positions (tokens or H*W), D width, h heads, d = D / h.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from types import SimpleNamespace
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

VALUE_EPS = 1e-6  # keeps the values positive, so that their power has a gradient everywhere

# Images are pooled in groups of about this many elements. On a CPU this keeps a group's temporaries in the cache; on
# other devices it only bounds the peak memory.
GROUP_ELEMENTS = {"cpu": 1 << 19}
GROUP_ELEMENTS_DEFAULT = 1 << 26


class SimPool(nn.Module):
    """Pools (B, N, D) tokens or (B, D, H, W) maps to (B, D).

    Args:
        dim: width D of the features.
        num_heads: heads h of the attention; D must be divisible by it.
        qkv_bias: biases in the query and key maps. (The key's bias shifts all logits equally, so it has no
            effect; it exists for checkpoints that have one.)
        qk_scale: factor on the logits; None means 1 / sqrt(D / h).
        gamma: exponent of the generalised mean; None averages LN(X) with the attention alone.
        use_beta: adds a learned scalar to the pooled feature; only together with gamma. (A LayerNorm right after it, as
            in a ViT, subtracts it again, so it has no effect there; it exists for the published checkpoints.)
        value_min: "image" subtracts each image's own minimum, "batch" the whole batch's (published code).

    Raises:
        ValueError: for any other setting, and in forward for input of the wrong rank or width.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 1,
        qkv_bias: bool = False,
        qk_scale: float | None = None,
        gamma: float | None = None,
        use_beta: bool = False,
        value_min: str = "image",
    ) -> None:
        super().__init__()
        if dim < 1 or num_heads < 1 or dim % num_heads:
            raise ValueError(
                f"SimPool: dim {dim} is not divisible into {num_heads} heads; choose num_heads that divides it"
            )
        if gamma is not None and not gamma > 0:
            raise ValueError(
                f"SimPool: gamma must be positive or None, got {gamma}; 1.25 and 2.0 are the published values"
            )
        if value_min not in ("image", "batch"):
            raise ValueError(f'SimPool: value_min must be "image" or "batch", got {value_min!r}')
        self.dim = dim
        self.num_heads = num_heads
        self.scale = (dim // num_heads) ** -0.5 if qk_scale is None else qk_scale
        self.gamma = None if gamma is None else float(gamma)
        self.value_min = value_min
        self.norm_patches = nn.LayerNorm(dim, eps=1e-6)
        self.wq = nn.Linear(dim, dim, bias=qkv_bias)
        self.wk = nn.Linear(dim, dim, bias=qkv_bias)
        if use_beta and gamma is not None:
            self.beta = nn.Parameter(torch.zeros(1))
        else:
            self.register_parameter("beta", None)

    def forward(self, x: Tensor, return_attention: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """Pooled features (B, D) in the dtype of x; with return_attention also the attention (B, h, N).

        A map's positions are numbered row by row, so its attention can be reshaped to (B, h, H, W).
        """
        tokens = self._as_tokens(x)
        with _no_autocast(x.device.type):
            inputs = (
                tokens,
                self.norm_patches.weight,
                self.norm_patches.bias,
                self.wq.weight,
                self.wq.bias,
                self.wk.weight,
                self.wk.bias,
                _Settings(self.num_heads, self.scale, self.gamma, self.value_min, self.norm_patches.eps),
            )
            pooled, attention = _without_backward(*inputs) if torch.jit.is_tracing() else _Pool.apply(*inputs)
            if self.beta is not None:
                pooled = pooled + self.beta.to(pooled.dtype)
        pooled = pooled.to(x.dtype)
        return (pooled, attention) if return_attention else pooled

    def _as_tokens(self, x: Tensor) -> Tensor:
        """x as (B, N, D). Raises ValueError if its rank, width or number of positions is wrong."""
        if x.ndim not in (3, 4):
            raise ValueError(f"SimPool takes (B, N, D) tokens or (B, D, H, W) maps, got shape {tuple(x.shape)}")
        tokens = x if x.ndim == 3 else x.flatten(2).transpose(1, 2)
        if tokens.shape[-1] != self.dim:
            raise ValueError(
                f"SimPool was built for width {self.dim}, got {tokens.shape[-1]} (shape {tuple(x.shape)}); "
                "tokens are (B, N, D), maps (B, D, H, W)"
            )
        if tokens.shape[1] == 0:
            raise ValueError(f"SimPool has nothing to pool: no positions in shape {tuple(x.shape)}")
        return tokens

    @classmethod
    def from_timm(cls, module: nn.Module) -> SimPool:
        """This layer with the weights of timm's SimPool1d or SimPool2d, on their device and in their dtype.

        Without gamma it gives timm's numbers. With gamma the attention is timm's, but the minimum is that of the image,
        as in the paper, while timm subtracts each channel's own: fine-tune such a layer, or train it here.

        Raises:
            ValueError: if the module is not timm's SimPool, or has what this layer lacks (qk_norm, another norm).
        """
        parts = ("norm", "q", "k", "q_norm", "k_norm", "num_heads", "gamma")
        missing = [name for name in parts if not hasattr(module, name)]
        if missing:
            raise ValueError(
                f"SimPool.from_timm takes timm.layers.SimPool1d or SimPool2d; a {type(module).__name__} has no "
                f"{', '.join(missing)}"
            )
        norm = module.norm
        if not isinstance(module.q_norm, nn.Identity) or not isinstance(module.k_norm, nn.Identity):
            raise ValueError("SimPool.from_timm: the module norms its queries and keys; build it with qk_norm=False")
        if not isinstance(norm, nn.LayerNorm) or norm.weight is None or norm.bias is None:
            raise ValueError(f"SimPool.from_timm: the module's norm is {norm}; it must be a LayerNorm with a bias")
        pool = cls(
            norm.normalized_shape[0], module.num_heads, qkv_bias=module.q.bias is not None, gamma=module.gamma
        )  # fmt: skip
        pool.norm_patches.eps = norm.eps
        pool.to(norm.weight)
        for mine, theirs in ((pool.norm_patches, norm), (pool.wq, module.q), (pool.wk, module.k)):
            mine.load_state_dict(theirs.state_dict())
        return pool.train(module.training)

    def extra_repr(self) -> str:
        return f"dim={self.dim}, num_heads={self.num_heads}, gamma={self.gamma}, value_min={self.value_min!r}"


def _no_autocast(device_type: str) -> AbstractContextManager:
    """Disable autocast, except on the meta device, which has none."""
    return nullcontext() if device_type == "meta" else torch.autocast(device_type, enabled=False)


class _Settings(NamedTuple):
    """The pooling's inputs other than tensors."""

    heads: int
    scale: float
    gamma: float | None
    value_min: str
    norm_eps: float


class _Pool(torch.autograd.Function):
    """The whole layer as one function: stores its input and a few vectors, and recomputes N x D tensors in backward."""

    @staticmethod
    def forward(ctx, x, norm_weight, norm_bias, wq, bq, wk, bk, settings):
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        norm_weight, norm_bias, wq, wk = (p.to(dtype) for p in (norm_weight, norm_bias, wq, wk))
        source = x.mean(1, dtype=dtype)  # u0 (B, D)
        query = F.linear(source, wq, None if bq is None else bq.to(dtype))  # (B, D)
        key = settings.scale * _fold(query, wk, settings.heads)  # (B, h, D)

        pooled = torch.empty_like(source)
        attention = source.new_empty((x.shape[0], x.shape[1], settings.heads))
        lowest = []
        for group in _groups(x, settings):
            normed, _, _ = _normalise(x[group], norm_weight, norm_bias, settings)
            minimum = _minimum(normed, settings)
            values = _shift(normed, minimum)
            weights = torch.softmax(_logits(values, key[group]), dim=1)  # (b, N, h)
            powered = values if settings.gamma is None else values * _root_power(values, settings.gamma)
            attention[group] = weights
            pooled[group] = (_spread(weights, values) * powered).sum(1)
            lowest.append(minimum)
        if settings.gamma is None:
            minimum = place = None
        else:
            pooled.pow_(1.0 / settings.gamma)
            minimum, place = (torch.cat(parts) for parts in zip(*lowest, strict=True))
        ctx.settings = settings
        ctx.save_for_backward(x, norm_weight, norm_bias, wq, wk, source, query, key, pooled, attention, minimum, place)
        return pooled, attention.transpose(1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_pooled, grad_attention):
        settings = ctx.settings
        x, norm_weight, norm_bias, wq, wk, source, query, key, pooled, attention, minimum, place = ctx.saved_tensors
        gamma = settings.gamma
        # With S = sum_p a_p V_p^gamma and u = S^(1/gamma): slope = gamma dL/dS = dL/du u^(1 - gamma)
        slope = grad_pooled if gamma is None else grad_pooled * pooled.pow(1.0 - gamma)  # (B, D)

        grad_x = torch.empty_like(x)
        grad_key = torch.empty_like(key)
        grad_norm_weight = torch.zeros_like(norm_weight)
        grad_norm_bias = torch.zeros_like(norm_bias)
        for group in _groups(x, settings):
            normed, mean, rstd = _normalise(x[group], norm_weight, norm_bias, settings)
            lowest = None if gamma is None else (minimum[group], place[group])
            values, weights = _shift(normed, lowest), attention[group]  # (b, N, D), (b, N, h)
            grad_values, grad_weights = _through_mean(values, weights, slope[group].unsqueeze(1), gamma, lowest)
            grad_weights += grad_attention[group].transpose(1, 2)
            grad_logits = _softmax_backward(weights, grad_weights)  # (b, N, h)
            grad_key[group] = _weigh(grad_logits, values)
            _add_outer(grad_values, grad_logits, key[group])
            rows = _rows(x[group], values.dtype)
            grad_rows, grad_weight, grad_bias = torch.ops.aten.native_layer_norm_backward(
                grad_values, rows, norm_weight.shape, mean, rstd, norm_weight, norm_bias, (True, True, True)
            )
            grad_x[group] = grad_rows
            grad_norm_weight += grad_weight
            grad_norm_bias += grad_bias

        grad_query, grad_wk = _unfold(settings.scale * grad_key, query, wk)
        grad_wq = grad_query.T @ source
        grad_x.add_((grad_query @ wq / x.shape[1]).unsqueeze(1))  # through u0
        grad_bq = grad_query.sum(0) if ctx.needs_input_grad[4] else None
        grad_bk = torch.zeros_like(grad_norm_bias) if ctx.needs_input_grad[6] else None  # shifts all logits equally
        return grad_x, grad_norm_weight, grad_norm_bias, grad_wq, grad_bq, grad_wk, grad_bk, None


def _without_backward(*inputs) -> tuple[Tensor, Tensor]:
    """_Pool's forward for TorchScript, whose graphs can't call back into Python."""
    return _Pool.forward(SimpleNamespace(save_for_backward=lambda *tensors: None), *inputs)


def _groups(x: Tensor, settings: _Settings) -> list[slice]:
    """Slices of the batch; a single one under torch.compile, which fuses that better, and for a batch-wide minimum.

    A graph that TorchScript traces has one too: it must serve any number of images.
    """
    if torch.jit.is_tracing():
        return [slice(None)]
    batch, positions, dim = x.shape
    if settings.value_min == "batch" or torch.compiler.is_compiling():
        return [slice(0, batch)]
    size = max(1, GROUP_ELEMENTS.get(x.device.type, GROUP_ELEMENTS_DEFAULT) // (positions * dim))
    return [slice(start, start + size) for start in range(0, max(1, batch), size)]


def _rows(x: Tensor, dtype: torch.dtype) -> Tensor:
    """A group's positions, contiguous in memory and in the dtype of the arithmetic."""
    return x.to(dtype).contiguous()


def _normalise(x: Tensor, weight: Tensor, bias: Tensor, settings: _Settings) -> tuple[Tensor, Tensor, Tensor]:
    """LN(X) (b, N, D), and each position's mean and reciprocal deviation."""
    return torch.native_layer_norm(_rows(x, weight.dtype), weight.shape, weight, bias, settings.norm_eps)


def _minimum(normed: Tensor, settings: _Settings) -> tuple[Tensor, Tensor] | None:
    """The smallest entry (m, 1) and its flat index (m, 1), for each image (m = b) or for the batch (m = 1).

    Rows are reduced first: searching a whole image for value and index at once is ten times slower on a CPU.
    """
    if settings.gamma is None:
        return None
    rows = normed.flatten(0, 1).unsqueeze(0) if settings.value_min == "batch" else normed  # (m, rows, D)
    minimum, row = rows.amin(-1).min(1, keepdim=True)
    column = rows.gather(1, row.unsqueeze(-1).expand(-1, 1, rows.shape[-1])).argmin(-1)
    return minimum, row * rows.shape[-1] + column


def _shift(normed: Tensor, lowest: tuple[Tensor, Tensor] | None) -> Tensor:
    """V from LN(X), in place: the values that are pooled, made positive if gamma raises them to a power.

    The logits are computed from V too: it differs from LN(X) by a constant per image, which shifts all logits equally.
    """
    if lowest is None:
        return normed
    # Not `normed - (minimum - eps)`: eps would be rounded away next to a large minimum.
    return normed.sub_(lowest[0].unsqueeze(-1)).add_(VALUE_EPS)


def _through_mean(
    values: Tensor, weights: Tensor, slope: Tensor, gamma: float | None, lowest: tuple[Tensor, Tensor] | None
) -> tuple[Tensor, Tensor]:
    """Backpropagate the slope (b, 1, D) through the weighted mean: gradients of LN(X) (b, N, D) and of a (b, N, h)."""
    per_head = (weights.shape[2], values.shape[2] // weights.shape[2])  # (h, d)
    grad_values = _spread(weights, values) * slope
    if gamma is None:
        return grad_values, (values * slope).unflatten(-1, per_head).sum(-1)
    root_power = _root_power(values, gamma)
    grad_weights = (values * root_power).mul_(slope).unflatten(-1, per_head).sum(-1) / gamma
    grad_values.mul_(root_power)
    _take_from_minimum(grad_values, lowest)
    return grad_values, grad_weights


def _take_from_minimum(grad_values: Tensor, lowest: tuple[Tensor, Tensor]) -> None:
    """Add the minimum's gradient in place: it is subtracted everywhere, so this is minus the sum of all gradients."""
    place = lowest[1]
    flat = grad_values.view(1, -1) if place.shape[0] == 1 else grad_values.flatten(1)
    flat.scatter_add_(1, place, -flat.sum(1, keepdim=True))


def _root_power(values: Tensor, gamma: float) -> Tensor:
    """values^(gamma - 1), by square roots for the published exponents: pow is several times slower."""
    if gamma == 1.25:
        return values.sqrt().sqrt_()
    if gamma == 2.0:
        return values
    return values.pow(gamma - 1.0)


def _softmax_backward(weights: Tensor, grad_weights: Tensor) -> Tensor:
    """Gradient of the logits (b, N, h), centred so that its sum over positions vanishes to the last digit.

    Any remainder of that sum would be multiplied by the large common part of V, hence the second centring.
    """
    grad_logits = weights * (grad_weights - (weights * grad_weights).sum(1, keepdim=True))
    return grad_logits - weights * grad_logits.sum(1, keepdim=True)


def _fold(query: Tensor, wk: Tensor, heads: int) -> Tensor:
    """Wk^T q of each head: (B, D) -> (B, h, D)."""
    per_head = (heads, wk.shape[0] // heads)  # (h, d)
    return torch.einsum("bhd,hde->bhe", query.unflatten(1, per_head), wk.unflatten(0, per_head))


def _unfold(grad_key: Tensor, query: Tensor, wk: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of `_fold` for the query (B, D) and for Wk (D, D)."""
    per_head = (grad_key.shape[1], wk.shape[0] // grad_key.shape[1])
    grad_query = torch.einsum("bhe,hde->bhd", grad_key, wk.unflatten(0, per_head)).flatten(1)
    grad_wk = torch.einsum("bhd,bhe->hde", query.unflatten(1, per_head), grad_key).flatten(0, 1)
    return grad_query, grad_wk


# The products below are thin (one or a few columns). With one head they are written as sums of products, which are as
# fast as a matrix product here and unaffected by the reduced precision that matrix products may be set to.


def _logits(values: Tensor, key: Tensor) -> Tensor:
    """(b, N, D), (b, h, D) -> (b, N, h)"""
    if key.shape[1] == 1:
        return (values * key).sum(-1, keepdim=True)
    return values @ key.transpose(1, 2)


def _weigh(weights: Tensor, values: Tensor) -> Tensor:
    """(b, N, h), (b, N, D) -> (b, h, D): a weighted sum of all of D for each head"""
    if weights.shape[2] == 1:
        return (values * weights).sum(1, keepdim=True)
    return weights.transpose(1, 2) @ values


def _add_outer(total: Tensor, weights: Tensor, key: Tensor) -> None:
    """total (b, N, D) += sum_h weights (b, N, h) key (b, h, D), in place"""
    if key.shape[1] == 1:
        total.addcmul_(weights, key)
    else:
        total.baddbmm_(weights, key)


def _spread(weights: Tensor, values: Tensor) -> Tensor:
    """(b, N, h) so that it multiplies (b, N, D), each head its own part of D"""
    heads = weights.shape[2]
    return weights if heads == 1 else weights.repeat_interleave(values.shape[2] // heads, dim=2)
