"""Build networks without initial weights, for those that load theirs from a file."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode


class Unfilled(TorchFunctionMode):
    """Within this context, torch.nn.init, zero_ and fill_ leave tensors as they are.

    Drawing 295 million weights that a file replaces takes seconds on a CPU. On the meta device it would have no effect but cost
    time too: normal_ there imports torch's compiler, a second or two.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (Tensor.zero_, Tensor.fill_) or getattr(func, "__module__", "") == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)
