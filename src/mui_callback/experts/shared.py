"""Shared experts: an MLP beside the routed experts that every token passes through."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from mui_callback.errors import UnsupportedModelError

SHARED_NAMES = ("shared_expert", "shared_experts", "shared_mlp")
"""Names under which models keep their shared experts."""

_DOWN_NAMES = ("down_proj", "output_linear", "fc2", "w2", "c_proj", "wo")


@dataclass(frozen=True)
class SharedMLP:
    """A shared MLP and the linear layer that its neurons write through."""

    path: str
    module: nn.Module
    down: nn.Linear
    expert_width: int
    """Neurons of each shared expert that the MLP counts as."""

    @property
    def widths(self) -> tuple[int, ...]:
        """Neurons of each shared expert."""
        return (self.expert_width,) * (self.down.in_features // self.expert_width)

    def project(self, readout_RD: Tensor) -> Tensor:
        """⟨W_d[:, j], readout⟩ for each neuron j, ``[R, width]`` in the dtype of the weight."""
        return readout_RD.to(self.down.weight.dtype) @ self.down.weight

    def output_bias(self, readout_RD: Tensor) -> Tensor | None:
        """⟨b_d, readout⟩ of each row, ``[R]``."""
        return None if self.down.bias is None else readout_RD.float() @ self.down.bias.float()


def find_shared_mlps(path: str, block: nn.Module, routed_width: int) -> tuple[SharedMLP, ...]:
    """The shared MLPs that `block` holds under one of `SHARED_NAMES`.

    A fused MLP counts as several experts of the routed width where that divides its own, else as one.

    Raises:
        UnsupportedModelError: there is a shared expert but its down projection cannot be told.
    """
    found = []
    for name in SHARED_NAMES:
        module = getattr(block, name, None)
        if isinstance(module, nn.Module):
            down = _down_projection(f"{path}.{name}", module)
            width = down.in_features
            found.append(
                SharedMLP(f"{path}.{name}", module, down, routed_width if width % routed_width == 0 else width)
            )
    return tuple(found)


def _down_projection(path: str, module: nn.Module) -> nn.Linear:
    linears = {name: child for name, child in module.named_modules() if isinstance(child, nn.Linear)}
    for name in _DOWN_NAMES:
        linear = linears.get(name)
        if linear is not None and linear.weight.dtype.is_floating_point and linear.weight.dtype.itemsize > 1:
            return linear
    raise UnsupportedModelError(
        f"{path}: expected a shared MLP whose down projection is a linear layer named one of "
        f"{', '.join(_DOWN_NAMES)}, with plain floating-point weights; found {', '.join(linears) or 'no linear layer'} "
        f"in {type(module).__name__}."
    )
