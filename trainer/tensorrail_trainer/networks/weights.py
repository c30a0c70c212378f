"""Load and save the weights of a network, including published weights.

A file is safetensors, or written by `torch.save`, and is read without running code. State dicts inside checkpoints and prefixes
of wrapped networks are recognized. The CIFAR ResNets of two popular collections load as well: the names `linear` and `shortcut`
(github.com/akamaster/pytorch_resnet_cifar10, shortcut A) are read as `fc` and `downsample`, and
github.com/chenyaofo/pytorch-cifar-models (shortcut B) has the names of this package, which are those of torchvision.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn

from tensorrail_runtime.errors import WeightsError
from tensorrail_runtime.records import write_bytes
from tensorrail_trainer.networks.resnets import CifarResNet

_WRAPPERS = ("state_dict", "model_state_dict", "model", "net")
_PREFIXES = ("module.", "model.", "_orig_mod.")
_COUNTER = "num_batches_tracked"  # of batch-norm: missing before torch 0.4.1, and only used in training
_MAX_NESTING = 4  # of state dicts in a checkpoint: a file may contain itself
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_SHOWN = 3  # names shown in an error


def load_weights(model: nn.Module, path: Path | str, *, fresh: Sequence[str] = ()) -> None:
    """Load the weights of a file into a model, on the device and in the precision of the model.

    Args:
        model: the model. It is unchanged if an error is raised.
        path: a safetensors file, or a state dict or checkpoint written by `torch.save`. It must hold every parameter and buffer
            of the model, finite and of the same shape, and nothing else.
        fresh: patterns of names (`*` and `?` as in a shell) that keep the values of the model, such as `fc.*` for a classifier
            with other classes; default none.

    Raises:
        WeightsError: the file cannot be read, or does not fit the model.

    """
    path = Path(path)
    state = _state_dict_of(path, _read(path), model.state_dict().keys())
    if isinstance(model, CifarResNet):
        state = {_cifar_name(name): tensor for name, tensor in state.items()}
    own = model.state_dict()
    for pattern in fresh:
        if not any(fnmatchcase(name, pattern) for name in own):
            raise WeightsError(f"{path}: no weight of the model matches {pattern!r}; it has {_some(list(own))}")
    kept = {name for name in {*own, *state} if any(fnmatchcase(name, pattern) for pattern in fresh)}
    state = {name: tensor for name, tensor in state.items() if name not in kept}
    state |= {name: own[name] for name in own if name in kept or (name.endswith(_COUNTER) and name not in state)}
    _check(path, state, own, isinstance(model, CifarResNet))
    model.load_state_dict(state)


def save_weights(model: nn.Module, path: Path | str) -> None:
    """Write the parameters and buffers of a model as safetensors, atomically.

    Args:
        model: the model.
        path: the file to write.

    Raises:
        WeightsError: the file cannot be written.

    """
    state = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in model.state_dict().items()}
    try:
        write_bytes(path, save(state, metadata={"format": "pt"}))
    except OSError as error:
        raise WeightsError(f"{path}: cannot be written ({error.strerror}); expected an existing, writable folder") from None


def _read(path: Path) -> Any:
    try:
        with path.open("rb") as file:
            start = file.read(9)
        if start[8:] == b"{":  # safetensors: 8 bytes of length, then a header in JSON
            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise WeightsError(f"{path}: cannot be read ({error.strerror or error}); expected a file of weights") from None
    except Exception:  # noqa: BLE001 - a broken or hostile file can raise any exception, with a message of many lines
        raise WeightsError(
            f"{path}: cannot be read without running code from it; expected safetensors, or a state dict written by "
            "torch.save: save model.state_dict() in the program that wrote the file"
        ) from None


def _state_dict_of(path: Path, content: Any, names: Iterable[str]) -> dict[str, Tensor]:
    """Return the state dict in the content of a file, without the prefixes of wrapped networks."""
    for _ in range(_MAX_NESTING):
        if not isinstance(content, Mapping):
            break
        inside = next((content[key] for key in _WRAPPERS if isinstance(content.get(key), Mapping)), None)
        if inside is None:
            break
        content = inside
    if not isinstance(content, Mapping):
        raise WeightsError(f"{path}: expected a state dict that maps names to tensors, got a {type(content).__name__}")
    state = dict(content)
    for name, tensor in state.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise WeightsError(f"{path}: entry {name!r:.60}: expected a named tensor, got a {type(tensor).__name__}")
        if tensor.layout is not torch.strided or tensor.is_quantized or tensor.device.type != "cpu":
            raise WeightsError(
                f"{path}: {name}: expected a dense tensor in float32 or float16, got a sparse, quantized or meta tensor"
            )
        if tensor.is_floating_point() and tensor.dtype not in _FLOATS:
            raise WeightsError(
                f"{path}: {name}: expected float16, bfloat16, float32 or float64, got {str(tensor.dtype).partition('.')[2]}"
            )
    while state:
        prefix = next((prefix for prefix in _PREFIXES if all(name.startswith(prefix) for name in state)), None)
        if prefix is None or all(name.startswith(prefix) for name in names):
            break
        state = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
    return state


def _cifar_name(name: str) -> str:
    if name.startswith("linear."):
        return name.replace("linear.", "fc.", 1)
    return name.replace(".shortcut.", ".downsample.")


def _check(path: Path, state: Mapping[str, Tensor], own: Mapping[str, Tensor], shortcuts: bool) -> None:
    missing, unexpected = [name for name in own if name not in state], sorted(name for name in state if name not in own)
    if missing or unexpected:
        parts = [f"{what} {_some(names)}" for what, names in (("missing", missing), ("unexpected", unexpected)) if names]
        raise WeightsError(
            f"{path}: expected the model's {len(own)} entries, {', '.join(parts)}{_advice(missing, unexpected, shortcuts)}"
        )
    classifier = list(own)[-2:]
    for name in own:  # in the order of the network, which may differ from that of the file
        tensor = state[name]
        if tensor.shape != own[name].shape or tensor.is_floating_point() != own[name].is_floating_point():
            actual, expected = (f"{list(each.shape)} {str(each.dtype).removeprefix('torch.')}" for each in (tensor, own[name]))
            raise WeightsError(
                f"{path}: {name}: expected {expected}, got {actual}{_fitting(tensor, own[name], name in classifier)}"
            )
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise WeightsError(
                f"{path}: {name}: expected finite values, got infinity or NaN; use weights of a training that did not diverge"
            )


def _advice(missing: Sequence[str], unexpected: Sequence[str], shortcuts: bool) -> str:
    """Suggest the argument of the model that explains missing and unexpected names, if there is one."""
    if shortcuts and all(".downsample." in name for name in (*missing, *unexpected)):
        return f"; try shortcut: {'B' if unexpected else 'A'}"
    if missing and unexpected:
        return "; it belongs to another network"
    return "; it belongs to another network, or to one of another depth"


def _fitting(loaded: Tensor, own: Tensor, last: bool) -> str:
    """Suggest the argument of the model that would give a weight the shape in the file."""
    if loaded.dim() != own.dim():
        return "; it belongs to another network"
    if last and loaded.shape[1:] == own.shape[1:]:
        return f"; try classes: {loaded.shape[0]}"
    if own.dim() == 4 and loaded.shape[0] == own.shape[0] and loaded.shape[2:] == own.shape[2:]:
        return f"; try channels: {loaded.shape[1]}"
    if own.dim() == 4 and loaded.shape[:2] == own.shape[:2]:
        return "; try another stem"
    return "; try another width"


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
