"""Penalties for plain training loops: `nn.Module` and `torch.optim`, no functional code."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .. import _rule
from .._rule import Bound
from .._training import check_penalty
from . import _wing
from ._wing import Penalty


def attach(optimizer: torch.optim.Optimizer, net: torch.nn.Module, penalty: Penalty) -> Handle:
    """Make every `optimizer.step()` a proximal step, in the optimizer's own metric: real zeros in a plain training
    loop.

    Equal to `prox_sgd` and `prox_adam` step for step. A hook before the step keeps the parameters; a hook after it
    computes the point and the prox from them, the optimizer's moments and its step. Parameters without a part of the
    penalty, without a gradient or of a step that a GradScaler skipped keep the optimizer's result. Learning rates and
    other hyper-parameters are read from the parameter groups at every step. For SGD with momentum the sum of the
    momentum's weights is kept in the optimizer's state, so that `optimizer.state_dict()` resumes it. Parameters of
    `net` that the optimizer is given later are penalized from then on. In Adam's and RMSprop's metric a NaN in a
    gradient reaches, through a mean over the leaf, also the coordinates that have seen no gradient. A copy of the
    optimizer, by deepcopy or pickle, comes without its hooks: attach again to a copy.

    Args:
        optimizer: `torch.optim.SGD`, `Adam`, `AdamW` or `RMSprop`.
        net: the module whose parameters are named in the penalty's selectors.
        penalty: the penalty; may be replaced later by setting `handle.penalty` (a schedule). Its strengths are copied:
            a tensor that is changed in place changes nothing.

    Returns:
        A handle with `remove()`, which leaves the optimizer as if nothing had been attached.

    Raises:
        TypeError: an optimizer without a metric here, or not a penalty of this wing.
        ValueError: an option that has no proximal step (`maximize`, RMSprop with `centered` or `momentum`,
            `differentiable`), half-precision parameters, no parameter of the penalty in the optimizer, or a second
            attachment.
        NoProxError: a sum of penalties without a closed prox.
    """
    return Handle(optimizer, net, penalty)


def _own(penalty: Penalty) -> Penalty:
    """The penalty with copies of its strengths; anchors are copies already."""

    def copy(s: Any) -> Any:
        return s.detach().clone() if isinstance(s, Tensor) else s

    return Penalty(
        tuple(replace(p, strengths=tuple(map(copy, p.strengths)), weight=copy(p.weight)) for p in penalty.parts)
    )


def _form(optimizer: torch.optim.Optimizer) -> list[tuple[Any, ...]]:
    """What the parts are bound to: other parameters, dtypes or devices need new ones."""
    return [(id(p), p.dtype, p.device) for group in optimizer.param_groups for p in group["params"]]


class Handle:
    """What `attach` returns."""

    def __init__(self, optimizer: torch.optim.Optimizer, net: torch.nn.Module, penalty: Penalty) -> None:
        if type(optimizer) not in _METHODS:
            known = ", ".join(cls.__name__ for cls in _METHODS)
            raise TypeError(
                f"attach: {type(optimizer).__name__} has no proximal step here; use one of {known}, or write the "
                "penalty into the loss with penalize"
            )
        if not isinstance(net, torch.nn.Module):
            raise TypeError(f"attach: net must be an nn.Module, got {type(net).__name__}")
        hooks = optimizer._optimizer_step_post_hooks.values()
        if any(isinstance(getattr(hook, "__self__", None), Handle) for hook in hooks):
            raise ValueError(
                "attach: the optimizer has a penalty already; attach their sum, or remove() the first handle"
            )
        self._optimizer = optimizer
        self._net = net
        self._point = _METHODS[type(optimizer)]
        self._kept: dict[Tensor, Tensor] = {}
        self.penalty = penalty
        for group in optimizer.param_groups:
            _check_group(type(optimizer).__name__, group)
        self._hooks = [
            optimizer.register_step_pre_hook(self._before),
            optimizer.register_step_post_hook(self._after),
        ]

    @property
    def penalty(self) -> Penalty:
        """The penalty; assign another one to change strengths during training."""
        return self._penalty

    @penalty.setter
    def penalty(self, penalty: Penalty) -> None:
        self._bind(_own(check_penalty(Penalty, "attach", penalty, schedule=False)))

    def _bind(self, penalty: Penalty) -> None:
        """Take the penalty, or refuse it and keep the one before."""
        params = _wing.params(self._net)
        own = list(params.values())
        flat, bound = penalty.bind({name: p.detach() for name, p in params.items()})
        chosen: dict[Tensor, tuple[str, list[Bound]]] = {}
        for name, p, parts in zip(flat.names, own, bound, strict=True):
            _rule.plan(name, parts)
            if parts:
                if p.dtype.itemsize < 4:
                    raise ValueError(
                        f"attach: the leaf {name!r} is {p.dtype}, in which a threshold below half an ulp does nothing: "
                        "keep float32 parameters and compute under torch.autocast"
                    )
                chosen[p] = (name, parts)
        if not any(p in chosen for group in self._optimizer.param_groups for p in group["params"]):
            raise ValueError(f"attach: the optimizer holds no parameter that {penalty!r} selects in net")
        self._penalty, self._bound, self._form = penalty, chosen, _form(self._optimizer)

    def remove(self) -> None:
        """Take the penalty off; the optimizer is as if it had never been attached. A second call does nothing."""
        if not self._hooks:
            return
        while self._hooks:
            self._hooks.pop().remove()
        for state in self._optimizer.state.values():
            state.pop("prox_scale", None)
        self._kept.clear()

    @torch.no_grad()
    def _before(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        """Keep the parameters: the point is computed from them. In buffers of its own, which cost no allocation."""
        del args, kwargs
        if self._form != _form(optimizer):
            self._bind(self._penalty)
        for group in optimizer.param_groups:
            _check_group(type(optimizer).__name__, group)
        for group in optimizer.param_groups:
            for p in group["params"]:
                if p in self._bound:
                    _start_scale(optimizer.state.get(p, {}))
                    kept = self._kept.get(p)
                    if kept is None or kept.shape != p.shape or kept.dtype != p.dtype or kept.device != p.device:
                        with torch.inference_mode(False):  # a step under inference_mode may be followed by others
                            self._kept[p] = p.detach().clone()
                    else:
                        kept.copy_(p)

    @torch.no_grad()
    def _after(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        del args, kwargs
        overflow = getattr(optimizer, "found_inf", None)  # a GradScaler lets fused optimizers skip the step themselves
        if overflow is not None and bool(overflow):
            return
        for group in optimizer.param_groups:
            for p in group["params"]:
                if p.grad is not None and p in self._bound:
                    name, parts = self._bound[p]
                    tensors, rule = self._point(p, self._kept[p], group, optimizer.state.get(p, {}))
                    for block, bound in _blocks([p, *tensors], parts):
                        here, *rest = block
                        moved, step = rule(bound, *rest)
                        here.copy_(_rule.prox_leaf(_wing, name, bound, moved, step))


# One method per optimizer: from a parameter after the step, its value before, its group and its state, to the tensors
# that the point needs and the function of a block of them (the parts of the penalty there first) to (point, step).
_Rule = Callable[..., tuple[Tensor, Any]]


def _start_scale(state: dict[str, Any]) -> None:
    """Before a step of SGD, `prox_scale` tells whether there is a buffer; 0 for that of steps without a penalty."""
    if state.get("momentum_buffer") is None:
        state.pop("prox_scale", None)
    else:
        state.setdefault("prox_scale", 0.0)


def _sgd(p: Tensor, old: Tensor, group: dict[str, Any], state: dict[str, Any]) -> tuple[list[Tensor], _Rule]:
    """The optimizer's result is the point; the step grows with the sum of the momentum's weights, as in `prox_sgd`."""
    del old
    momentum = group["momentum"]
    factor = 1.0
    if momentum:
        # torch takes the first gradient into the buffer without dampening
        first = "prox_scale" not in state
        state["prox_scale"] = factor = 1.0 if first else momentum * state["prox_scale"] + 1 - group["dampening"]
        factor = 1 + momentum * factor if group["nesterov"] else factor
    step = _number(group["lr"]) * factor
    return [p], lambda bound, moved: (moved, step)


def _adam(p: Tensor, old: Tensor, group: dict[str, Any], state: dict[str, Any]) -> tuple[list[Tensor], _Rule]:
    b1, b2 = map(_number, group["betas"])
    second = state["max_exp_avg_sq"] if group["amsgrad"] else state["exp_avg_sq"]
    count = state["step"]
    count = count.double() if isinstance(count, Tensor) and count.device.type != "cpu" else float(count)
    mean_scale, second_scale = 1 - b1**count, 1 - b2**count
    mean_square = second.mean() / second_scale
    lr, eps = _number(group["lr"]), group["eps"]
    decay = 1 - lr * group["weight_decay"] if group.get("decoupled_weight_decay") else 1.0

    def rule(bound: list[Bound], old: Tensor, mean: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
        guard = _rule.guard_leaf(_wing, old, bound)
        step = _metric_step((second / second_scale).sqrt_(), mean_square, guard, eps, lr)
        move = (step * mean).div_(mean_scale)
        return torch.sub(old if decay == 1.0 else decay * old, move, out=move), step

    return [old, state["exp_avg"], second], rule


def _rmsprop(p: Tensor, old: Tensor, group: dict[str, Any], state: dict[str, Any]) -> tuple[list[Tensor], _Rule]:
    second = state["square_avg"]
    mean_square = second.mean()
    lr, eps, weight_decay = _number(group["lr"]), group["eps"], group["weight_decay"]

    def rule(bound: list[Bound], old: Tensor, grad: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
        step = _metric_step(second.sqrt(), mean_square, _rule.guard_leaf(_wing, old, bound), eps, lr)
        return old - step * (grad + weight_decay * old), step

    assert p.grad is not None
    return [old, p.grad, second], rule


def _number(value: Any) -> Any:
    """torch also takes tensors of shape (1,), which would give a scalar step the shape of a step per coordinate."""
    return value.reshape(()) if isinstance(value, Tensor) else value


def _metric_step(root: Tensor, mean_square: Tensor, guard: Tensor, eps: float, lr: Any) -> Tensor:
    """`lr / (adam_metric + eps)` from the root of the second moment, which is overwritten: few passes, few buffers."""
    idle = 0.3 * mean_square.sqrt()
    if root.device.type == "cpu":
        torch.threshold_(root, 0.0, float(idle))  # `where` would take as long as all the rest together
    else:
        root = torch.where(root == 0, idle, root)
    return torch.maximum(root, guard, out=root).add_(eps).reciprocal_().mul_(lr)


_METHODS: dict[type, Callable[..., tuple[list[Tensor], _Rule]]] = {
    torch.optim.SGD: _sgd,
    torch.optim.Adam: _adam,
    torch.optim.AdamW: _adam,
    torch.optim.RMSprop: _rmsprop,
}

_REFUSED = {
    "maximize": "the prox minimises; minimise the negative of the objective",
    "differentiable": "the hook replaces the parameters in place; use prox_adam on torch.func",
}
_REFUSED_RMSPROP = {
    "centered": "its variance reaches 0, and the step infinity",
    "momentum": "its buffer mixes steps of different metrics",
}


def _check_group(optimizer: str, group: dict[str, Any]) -> None:
    for option, reason in (_REFUSED | _REFUSED_RMSPROP if optimizer == "RMSprop" else _REFUSED).items():
        if group.get(option):
            raise ValueError(f"attach: {optimizer} with {option}={group[option]!r} has no proximal step: {reason}")


# NOTE [blocks]
# A proximal step is some twenty elementwise operations. On a CPU each of them would go through main memory and allocate
# its result; on blocks that fit the cache they do neither, which makes them about five times faster (1.5M parameters,
# two cores). On a GPU a block is the whole leaf.
_BLOCK = 1 << 17


def _blocks(tensors: list[Tensor], parts: list[Bound]) -> Iterator[tuple[list[Tensor], list[Bound]]]:
    """Views of the tensors, cut along an axis that no group contains, and the parts for them."""
    x = tensors[0]
    axes = range(-x.ndim, 0)
    for part in parts:
        if part.rule.merges == "group":
            axes = [axis for axis in axes if axis not in part.resolved[0]]
        elif not part.rule.separable:
            axes = []
    if x.device.type != "cpu" or x.numel() <= _BLOCK or not axes:
        yield tensors, parts
        return
    axis = axes[0]
    count = max(1, _BLOCK * x.shape[axis] // x.numel())
    for start in range(0, x.shape[axis], count):
        length = min(count, x.shape[axis] - start)
        yield (
            [t.narrow(axis, start, length) for t in tensors],
            [_narrow(part, axis, start, length) for part in parts],
        )


def _narrow(part: Bound, axis: int, start: int, length: int) -> Bound:
    """The part on a slice of its leaf."""

    def cut(s: Any) -> Any:
        return s.narrow(axis, start, length) if isinstance(s, Tensor) and s.ndim else s

    return part._replace(strengths=tuple(cut(s) for s in part.strengths), anchor=cut(part.anchor))
