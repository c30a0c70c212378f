"""A tensor that is computed from others: what would change it in place is an error, since the change would be lost."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from tensorrail_runtime.errors import PlanError
from tensorrail_trainer.layers._compat_torch import as_plain_tensors, records_operations


def read_only(tensor: Tensor, advice: str) -> Tensor:
    """Return a tensor that refuses operations in place; results of all other operations are plain tensors.

    Args:
        tensor: the tensor, whose gradient is kept.
        advice: what to do instead, for the error.

    """
    if records_operations():
        return tensor
    marked: _ReadOnly = tensor.as_subclass(_ReadOnly)
    marked.advice = advice
    return marked


_OPERATORS = frozenset(
    {
        "__setitem__",
        *(f"__i{name}__" for name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor")),
    }
)


class _ReadOnly(Tensor):
    """A tensor whose operations in place are refused, also those on its `data`, on `detach()` and on views of it."""

    advice = ""

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        name = getattr(func, "__name__", "")
        target = (kwargs or {}).get("out", args[0] if args else None)
        in_place = (name.endswith("_") and not name.startswith("__") and name != "requires_grad_") or name in _OPERATORS
        in_place = in_place or func == Tensor.data.__set__ or "out" in (kwargs or {})  # type: ignore[attr-defined] # of C
        if in_place and isinstance(target, _ReadOnly):
            raise PlanError(
                f"the weight of a layer made of cores is computed from them, and {name} would change a copy that is lost; "
                f"{target.advice}"
            )
        with as_plain_tensors():
            result = func(*args, **(kwargs or {}))
        keeps = name in {"detach", "view", "__getitem__"} or func == Tensor.data.__get__  # type: ignore[attr-defined] # a property of C
        if keeps and isinstance(result, Tensor) and isinstance(target, _ReadOnly):
            return read_only(result, target.advice)
        return result
