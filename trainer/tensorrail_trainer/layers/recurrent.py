"""LSTM and GRU layers whose input or recurrent weights are stored as tensor cores.

The input cores project the input of all time steps at once, outside the loop. The recurrence then runs on the rank between
the input cores and the output cores, as in the exported graph. A recurrent weight is reconstructed from its cores in every
call: torch's loop, which takes a dense one, is much faster than one of Python. The weights of both directions are one matrix.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import PackedSequence

from tensorrail_exporter.formats import format_of
from tensorrail_exporter.formats.contraction import LayerSpec, split_at_boundary
from tensorrail_exporter.plans.plan import LayerPlan
from tensorrail_runtime.errors import PlanError
from tensorrail_trainer.layers._compat_torch import is_traced, node_of
from tensorrail_trainer.layers.steps import CoreList, compiled_product, run_steps

INPUTS, LOOPS = "weight_ih_l", "weight_hh_l"
"""What the names of input and of recurrent weights start with; the index of the layer follows."""


class FactoredRecurrent(nn.Module):
    """An `nn.LSTM` or `nn.GRU` in which input or recurrent weights of some layers are lists of trainable cores.

    It has the inputs, outputs and attributes of the dense module. Parameters that stay dense keep their names.

    Args:
        dense: the module to take sizes, options and dense weights from; it is not changed.
        factored: plan and cores of the weights to factor, by their names in the module, such as `weight_ih_l0`.

    """

    def __init__(self, dense: nn.LSTM | nn.GRU, factored: Mapping[str, tuple[LayerPlan, Sequence[Tensor]]]) -> None:
        super().__init__()
        self.options: dict[str, Any] = {
            "input_size": dense.input_size,
            "hidden_size": dense.hidden_size,
            "num_layers": dense.num_layers,
            "bias": dense.bias,
            "batch_first": dense.batch_first,
            "dropout": dense.dropout,
            "bidirectional": dense.bidirectional,
        }
        for name, value in self.options.items():  # code of the model may read them, as from the dense module
            setattr(self, name, value)
        self.proj_size = 0
        self.kind = nn.LSTM if isinstance(dense, nn.LSTM) else nn.GRU
        self.plans: dict[str, LayerPlan] = {}
        self.specs: dict[str, LayerSpec] = {}
        self.cores = nn.ModuleDict()
        for leaf, (plan, cores) in factored.items():
            weights = weights_of(dense, leaf)
            spec = spec_of(leaf, weights)
            self.specs[leaf] = spec
            self.plans[leaf] = plan.model_copy(update={"merge": plan.merge_for(spec)})
            self.cores[leaf] = CoreList(
                [
                    nn.Parameter(core.detach().clone(memory_format=torch.contiguous_format), weights[0].requires_grad)
                    for core in cores
                ]
            )
        for name, parameter in dense.named_parameters():
            if name.removesuffix("_reverse") not in self.cores:
                self.register_parameter(name, nn.Parameter(parameter.detach().clone(), parameter.requires_grad))
        self.to(weights[0])

    @property
    def directions(self) -> int:
        """2 for a bidirectional layer, else 1."""
        return 2 if self.options["bidirectional"] else 1

    def forward(self, x: Tensor | PackedSequence, hx: Any = None) -> tuple[Any, Any]:
        """Run the layers on a sequence.

        Args:
            x: (T, B, I), (B, T, I) with `batch_first`, (T, I), or a `PackedSequence`.
            hx: initial states (layers · directions, B, H), a pair of them for an LSTM; default zeros.

        Returns:
            The outputs and the last states, as from the dense module.

        """
        if is_traced(x):
            return cast("tuple[Any, Any]", node_of(self, x, *(() if hx is None else (hx,))))
        if isinstance(x, PackedSequence):
            return self._packed(x, hx)
        unbatched, batch_first = x.dim() == 2, self.options["batch_first"]
        if unbatched:
            x = x.unsqueeze(1)
            hx = _map(hx, lambda state: state.unsqueeze(1))
            batch_first = False
        if batch_first:
            x = x.transpose(0, 1)
        out, states = self._layers(x, None, hx, x.shape[1])
        if unbatched:
            return out.squeeze(1), _map(states, lambda state: state.squeeze(1))
        return (out.transpose(0, 1) if batch_first else out), states

    def flatten_parameters(self) -> None:
        """Do nothing. Models call this method on recurrent modules; the weights here are not one block of memory."""

    def to_dense(self) -> nn.Module:
        """Return the dense module, with weights that are reconstructed from the cores."""
        dense = self.kind(**self.options).to(next(self.parameters()))
        state = {name: parameter.detach() for name, parameter in self.named_parameters(recurse=False)}
        for leaf in self.cores:
            weight = self.plans[leaf].reconstruct(self._cores(leaf), self.specs[leaf].shape).detach()
            state[leaf], *reverse = weight.chunk(self.directions)
            state |= {f"{leaf}_reverse": part for part in reverse}
        dense.load_state_dict({name: tensor.clone() for name, tensor in state.items()})
        for name, parameter in dense.named_parameters():
            leaf = name.removesuffix("_reverse")
            own = self._cores(leaf)[0] if leaf in self.cores else getattr(self, name)
            parameter.requires_grad_(own.requires_grad)
        return dense.train(self.training)

    def extra_repr(self) -> str:
        """Return the sizes and the plans of the factored layers, for the printed module."""
        plans = [f"{leaf}: {p.format}, modes={list(p.modes)}, ranks={list(p.ranks)}" for leaf, p in self.plans.items()]
        return f"{self.kind.__name__}({self.options['input_size']}, {self.options['hidden_size']}), " + "; ".join(plans)

    def _packed(self, x: PackedSequence, hx: Any) -> tuple[PackedSequence, Any]:
        order, back = x.sorted_indices, x.unsorted_indices
        if order is not None:
            hx = _map(hx, lambda state: state.index_select(1, order))
        out, states = self._layers(x.data, x.batch_sizes, hx, int(x.batch_sizes[0]))
        if back is not None:
            states = _map(states, lambda state: state.index_select(1, back))
        return PackedSequence(out, x.batch_sizes, order, back), states

    def _layers(self, x: Tensor, sizes: Tensor | None, hx: Any, batch: int) -> tuple[Tensor, Any]:
        """Run all layers on (T, B, I), or on the rows of packed sequences, and return outputs and states."""
        lstm = self.kind is nn.LSTM
        count, directions = self.options["num_layers"], self.directions
        self._require_fit(x, hx, batch)
        if hx is None:
            zeros = x.new_zeros(count * directions, batch, self.options["hidden_size"])
            hx = (zeros, zeros) if lstm else zeros
        last: list[Any] = []
        for index in range(count):
            own = slice(index * directions, (index + 1) * directions)
            states = [state[own] for state in hx] if lstm else hx[own]
            x, *after = self._layer(index, x, sizes, states)
            last.append(after)
            if index < count - 1:
                x = F.dropout(x, self.options["dropout"], self.training)
        joined = [torch.cat(parts) for parts in zip(*last, strict=True)]
        return x, (tuple(joined) if lstm else joined[0])

    def _require_fit(self, x: Tensor, hx: Any, batch: int) -> None:
        """Raise the dense module's errors for inputs and states of a wrong size, beyond which torch's kernels would read."""
        inputs = self.options["input_size"]
        if x.shape[-1] != inputs:
            raise RuntimeError(f"input.size(-1) must be equal to input_size. Expected {inputs}, got {x.shape[-1]}")
        lstm = self.kind is nn.LSTM
        states = [] if hx is None else list(hx) if lstm else [hx]
        if lstm and len(states) not in (0, 2):
            raise RuntimeError(f"LSTM: expected a pair of states, got {len(states)}")
        expected = (self.options["num_layers"] * self.directions, batch, self.options["hidden_size"])
        for index, state in enumerate(states):
            if tuple(state.shape) != expected:
                raise RuntimeError(f"Expected hidden[{index}] size {expected}, got {list(state.shape)}")

    def _layer(self, index: int, x: Tensor, sizes: Tensor | None, states: Any) -> tuple[Tensor, ...]:
        inputs, loops = f"weight_ih_l{index}", f"weight_hh_l{index}"
        suffixes = [f"l{index}", f"l{index}_reverse"][: self.directions]
        if inputs in self.cores:
            x, weights = self._project(inputs, x)
        else:
            weights = [getattr(self, f"weight_ih_{suffix}") for suffix in suffixes]
        if loops in self.cores:
            weight = self._reconstructed(loops).to(x.dtype).contiguous()  # cuDNN copies it by `view_as`
            recurrent = list(weight.chunk(self.directions))
        else:
            recurrent = [getattr(self, f"weight_hh_{suffix}") for suffix in suffixes]
        flat: list[Tensor] = []
        for weight, loop, suffix in zip(weights, recurrent, suffixes, strict=True):
            biases = (f"bias_ih_{suffix}", f"bias_hh_{suffix}") if self.options["bias"] else ()
            flat += [weight, loop, *(getattr(self, name) for name in biases)]
        common = (states, flat, self.options["bias"], 1, 0.0, self.training, self.directions == 2)
        run: Any = torch.lstm if self.kind is nn.LSTM else torch.gru
        result = run(x, *common, False) if sizes is None else run(x, sizes, *common)
        return cast("tuple[Tensor, ...]", result)

    def _project(self, leaf: str, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Return the input projected to the rank p, (…, p), and the remaining input weights (G·H, p) of each direction."""
        steps, matrix, _ = split_at_boundary(self.plans[leaf].contraction(self._cores(leaf), self.specs[leaf]))
        rows = run_steps(steps, x.reshape(-1, x.shape[-1]))
        if matrix is None:
            matrix = torch.eye(self.specs[leaf].shape[0], dtype=x.dtype, device=x.device)
        return rows.reshape(*x.shape[:-1], rows.shape[-1]), list(cast(Tensor, matrix).contiguous().chunk(self.directions))

    def _reconstructed(self, leaf: str) -> Tensor:
        """Return the weight of both directions, (directions · G·H, H), reconstructed from the cores and differentiable."""
        plan, shape, cores = self.plans[leaf], self.specs[leaf].shape, self._cores(leaf)
        with torch.autocast(cores[0].device.type, enabled=False):
            if torch.compiler.is_compiling():
                return compiled_product(format_of(plan.format).equation(shape, plan.modes), cores, shape)
            return plan.reconstruct(cores, shape)

    def _cores(self, leaf: str) -> list[Tensor]:
        return list(cast(CoreList, self.cores[leaf]))


def spec_of(leaf: str, weights: Sequence[Tensor]) -> LayerSpec:
    """Return what the weights of one layer compute, by their name `weight_ih_l…` or `weight_hh_l…`."""
    shape = (sum(weight.shape[0] for weight in weights), weights[0].shape[1])
    return LayerSpec("recurrent", shape, state_products=len(weights) if leaf.startswith(LOOPS) else 0)


def weights_of(module: nn.LSTM | nn.GRU, name: str) -> tuple[nn.Parameter, ...]:
    """Return the input or recurrent weights (G·H, I) of one layer, forward and reverse.

    Raises `PlanError` if the layer does not exist.
    """
    leaf = name.rpartition(".")[2]
    known = dict(module.named_parameters())
    if leaf not in known or leaf.endswith("_reverse"):
        kind, start = ("recurrent", LOOPS) if leaf.startswith(LOOPS) else ("input", INPUTS)
        names = ", ".join(f"{start}{k}" for k in range(module.num_layers))
        raise PlanError(f"layer {name}: no such {kind} weight; expected one of {names} (each name covers both directions)")
    return tuple(known[key] for key in (leaf, f"{leaf}_reverse") if key in known)


def _map(states: Any, function: Any) -> Any:
    """Apply a function to a state, to each of a pair of states, or to none."""
    if states is None:
        return None
    return tuple(function(state) for state in states) if isinstance(states, tuple | list) else function(states)
