"""Reading, checking and writing ONNX models of any size, and conversion from and to onnx-graphsurgeon.

A file is written completely or not at all. External data outside the model's folder is not read.
"""

from __future__ import annotations

import math
import os
import secrets
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import onnx
import onnx_graphsurgeon as gs

from tensorrail_exporter.graphs.einsum import products_of_einsums
from tensorrail_exporter.graphs.preserve import presentable, restore
from tensorrail_runtime.errors import GraphError, ModelError, first_line
from tensorrail_runtime.graphs.files import bodies, data_file, descendants, is_read, own_data_files
from tensorrail_runtime.graphs.inlining import without_functions
from tensorrail_runtime.graphs.reading import light, read_model
from tensorrail_runtime.records import is_stream, write_bytes
from tensorrail_runtime.scratch import scratch
from tensorrail_runtime.sessions.session import open_session

_LARGEST_FILE = 2**31 - 2**20  # protobuf's limit, less room for everything except the data of tensors
_SMALL = 1024  # bytes up to which a constant stays in the file itself
_FIELDS = ("float_data", "int32_data", "string_data", "int64_data", "double_data", "uint64_data")
_COMPLEX = frozenset({onnx.TensorProto.COMPLEX64, onnx.TensorProto.COMPLEX128})
_BITS = {"INT4": 4, "UINT4": 4, "FLOAT4E2M1": 4, "INT2": 2, "UINT2": 2}  # of types that are stored packed in bytes


def load_model(path: Path | str) -> onnx.ModelProto:
    """Read and check an ONNX file.

    External data is read by onnx itself, which refuses absolute paths, links and paths outside the folder of the file.

    Args:
        path: the file, with any extension.

    Returns:
        The model with all its weights. Bodies of its functions stand in place of their calls, and an Einsum of an activation
        and a stored tensor is a MatMul.

    Raises:
        GraphError: the file cannot be read, is not a valid ONNX model, or has no nodes.

    """
    path = Path(path)
    try:
        model, changed = read_model(path)
        _check(model if changed else path)
    except ModelError as error:
        raise GraphError(str(error)) from None
    except (onnx.checker.ValidationError, ValueError) as error:
        raise GraphError(f"{path}: not a valid ONNX model ({first_line(error)})") from None
    for tensor in _tensors(model.graph):
        if tensor.data_type not in onnx.TensorProto.DataType.values():
            raise GraphError(f"{path}: not a valid ONNX model (tensor {tensor.name!r} has the unknown type {tensor.data_type})")
        if not _is_whole(tensor):
            raise GraphError(
                f"{path}: not a valid ONNX model (tensor {tensor.name!r} of shape {list(tensor.dims)} holds {_stored(tensor)})"
            )
    if not model.graph.node:
        raise GraphError(f"{path}: the ONNX model has no nodes: there is nothing to run or rewrite")
    return products_of_einsums(without_functions(model))


def save_model(model: onnx.ModelProto, path: Path | str) -> None:
    """Write an ONNX file completely or not at all.

    Args:
        model: the model; it is not changed.
        path: the file to write. The weights of a model above protobuf's limit of 2 GiB are written to `<name>.data` in the
            same folder, or to `<name>.2.data` and so on if a model in the folder reads that file, also the one that is
            replaced. Its own data are deleted afterwards, unless another model reads them.

    Raises:
        OSError: the file cannot be written.

    """
    path = Path(path)
    if is_stream(path):
        write_bytes(path, model.SerializeToString())
        return
    path = path.resolve()  # the data belong beside the file that a link points to
    replaced = own_data_files(path)
    if size_of(model) < _LARGEST_FILE:
        write_bytes(path, model.SerializeToString())
    else:
        _save_large(model, path)
    for file in replaced:
        if not is_read(file):
            with suppress(OSError):  # on Windows, a session of this process may have it open
                file.unlink()


def _save_large(model: onnx.ModelProto, path: Path) -> None:
    """Write a model with its weights in a file of their own."""
    data = data_file(path)
    part = data.with_name(f".{data.name}.{secrets.token_hex(4)}.part")
    try:
        small = _with_external_data(model, part, data.name)
        part.replace(data)
        try:
            write_bytes(path, small.SerializeToString())
        except BaseException:
            data.unlink(missing_ok=True)
            raise
    finally:
        part.unlink(missing_ok=True)


def check_model(model: onnx.ModelProto, original: onnx.ModelProto | None = None) -> None:
    """Run onnx's full check with shape inference.

    Args:
        model: a rewritten model.
        original: the model that it was made from; where that one does not pass either, for example because of operators that
            onnx does not know, the check is made without shape inference, and ONNX Runtime must load the rewritten model if it
            loads the original; default: none.

    Raises:
        GraphError: the model does not pass; the message has the reason.

    """
    why = _problem(model, full=True)
    if not why:
        return
    if original is not None and (before := _problem(original, full=True)):
        rest = _problem(model, full=False)
        if not rest and (_loads(model) or not _loads(original)):
            return
        raise GraphError(
            f"the model as it was given does not pass onnx.checker ({before}), nor does the rewritten one ({rest or why})"
        )
    raise GraphError(f"the rewritten graph does not pass onnx.checker ({why})")


def _problem(model: onnx.ModelProto, *, full: bool) -> str:
    """Return what onnx's checker says of a model in one line; empty if it passes."""
    try:
        _check(model, full=full)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        return first_line(error)
    return ""


def _check(model: onnx.ModelProto | Path, *, full: bool = False) -> None:
    """Run onnx's checker on a file, or on a model of any size."""
    if isinstance(model, Path):
        onnx.checker.check_model(str(model), full_check=full)
    elif size_of(model) < _LARGEST_FILE:
        onnx.checker.check_model(model, full_check=full)
    else:
        with scratch() as folder:
            path = Path(folder) / "model.onnx"
            save_model(model, path)
            onnx.checker.check_model(str(path), full_check=full)


def _loads(model: onnx.ModelProto) -> bool:
    """Return whether ONNX Runtime loads a model."""
    with scratch() as folder:
        path = Path(folder) / "model.onnx"
        save_model(model, path)
        try:
            open_session(path)
        except ModelError:
            return False
    return True


def size_of(model: onnx.ModelProto) -> int:
    """Return the size in bytes of all initializers, including those in the bodies of If, Loop and Scan."""
    return sum(
        len(t.raw_data) or 8 * (len(t.float_data) + len(t.int64_data) + len(t.double_data)) for t in _tensors(model.graph)
    )


def import_graph(model: onnx.ModelProto) -> gs.Graph:
    """Return the model as an onnx-graphsurgeon graph with inferred shapes.

    Args:
        model: the model; it is not changed.

    Raises:
        GraphError: onnx-graphsurgeon cannot read the model, or would lose graphs in it.

    """
    readable = presentable(model)
    try:
        graph = gs.import_onnx(readable)
    except Exception as error:  # noqa: BLE001 - the library defines no error class of its own
        raise GraphError(f"onnx-graphsurgeon cannot read this graph ({type(error).__name__}: {first_line(error)})") from None
    inferred = _inferred(model, data_prop=False)
    if inferred is not None:
        _give_shapes(graph, inferred.graph)
    return graph


def inferred_shapes(model: onnx.ModelProto, *, data_prop: bool = False) -> dict[str, list[int | str]]:
    """Return the shapes that onnx infers for the tensors of the main graph, by name.

    Args:
        model: the model; it is not changed.
        data_prop: whether inference also computes the values of shapes; default False.

    """
    inferred = _inferred(model, data_prop=data_prop)
    return {} if inferred is None else _shapes(inferred.graph)


def unknown_axes(model: onnx.ModelProto) -> set[str]:
    """Return the tensors of the main graph whose number of axes onnx cannot infer."""
    inferred = _inferred(model, data_prop=False)
    graph = model.graph if inferred is None else inferred.graph
    known = {value.name for value in graph.value_info if value.type.tensor_type.HasField("shape")}
    known |= {value.name for value in graph.output if value.type.WhichOneof("value") is not None}
    return {name for node in graph.node for name in node.output if name} - known


def _inferred(model: onnx.ModelProto, *, data_prop: bool) -> onnx.ModelProto | None:
    """Return a copy of the model with inferred shapes but without its weights, or None if inference fails."""
    try:
        return onnx.shape_inference.infer_shapes(light(model), data_prop=data_prop)
    except (onnx.shape_inference.InferenceError, ValueError, RuntimeError):
        return None  # rules that need a shape report that it is unknown


def _give_shapes(graph: gs.Graph, inferred: onnx.GraphProto) -> None:
    """Write inferred shapes into a graph and into the bodies in it, each by itself: names may repeat between them."""
    shapes = _shapes(inferred)
    for tensor in graph.tensors().values():
        if isinstance(tensor, gs.Variable) and tensor.shape is None and tensor.name in shapes:
            tensor.shape = shapes[tensor.name]
    nodes = {output: node for node in inferred.node for output in node.output if output}
    for node in graph.nodes:
        own = nodes.get(next((tensor.name for tensor in node.outputs if not tensor.is_empty()), ""))
        for attribute in own.attribute if own is not None else ():
            body = node.attrs.get(attribute.name)
            if attribute.HasField("g") and isinstance(body, gs.Graph):
                _give_shapes(body, attribute.g)


def _shapes(graph: onnx.GraphProto) -> dict[str, list[int | str]]:
    shapes: dict[str, list[int | str]] = {}
    for value in (*graph.value_info, *graph.output):
        kind = value.type.tensor_type
        if value.type.HasField("tensor_type") and kind.HasField("shape"):
            shapes[value.name] = [a.dim_value if a.HasField("dim_value") else a.dim_param for a in kind.shape.dim]
    return shapes


def export_graph(graph: gs.Graph, original: onnx.ModelProto) -> onnx.ModelProto:
    """Return an onnx-graphsurgeon graph as a model, without unused nodes.

    IR version, opsets, functions, metadata and all that onnx-graphsurgeon drops are taken from the original model: see
    `tensorrail_exporter.graphs.preserve`.

    Args:
        graph: the graph; unused nodes are removed from it and its nodes are sorted.
        original: the model that the graph was imported from.

    Raises:
        GraphError: onnx-graphsurgeon cannot write the graph.

    """
    graph.cleanup(remove_unused_graph_inputs=False, recurse_functions=False).toposort()
    try:
        exported = gs.export_onnx(graph, do_type_check=False)
    except Exception as error:  # noqa: BLE001 - the library defines no error class of its own
        raise GraphError(f"onnx-graphsurgeon cannot write this graph ({type(error).__name__}: {first_line(error)})") from None
    restore(exported.graph, original.graph)
    _lift(exported.graph, {tensor.name for tensor in original.graph.initializer})
    _hoist(exported.graph)
    _declare_initializers(exported.graph, original)
    result = onnx.ModelProto()
    for field, value in original.ListFields():
        if field.name == "graph":
            result.graph.CopyFrom(exported.graph)
        elif isinstance(value, int | str):
            setattr(result, field.name, value)
        else:
            getattr(result, field.name).MergeFrom(value)
    result.graph.doc_string = original.graph.doc_string
    return result


def _lift(graph: onnx.GraphProto, names: set[str]) -> None:
    """Move the named initializers back to the graph if graphsurgeon has moved them into the only body that reads them."""
    stored = {tensor.name for tensor in graph.initializer}
    for body in descendants(graph):
        for tensor in [tensor for tensor in body.initializer if tensor.name in names]:
            if tensor.name not in stored:
                graph.initializer.append(tensor)
                stored.add(tensor.name)
                body.initializer.remove(tensor)


def _hoist(graph: onnx.GraphProto) -> None:
    """Replace the copies of an initializer that graphsurgeon has written to several bodies by one in the graph around them."""
    for body in bodies(graph):
        _hoist(body)
    stored: dict[str, list[tuple[onnx.GraphProto, onnx.TensorProto]]] = {}
    for holder in (graph, *descendants(graph)):
        for tensor in holder.initializer:
            stored.setdefault(tensor.name, []).append((holder, tensor))
    for name, copies in stored.items():
        if len(copies) == 1:
            continue
        first_holder, first = copies[0]
        own_inputs = any(value.name == name for holder, _ in copies for value in holder.input)
        if own_inputs or any(copy != first for _, copy in copies):
            continue
        if first_holder is not graph:
            graph.initializer.append(first)
        for holder, copy in copies:
            if holder is not graph:
                holder.initializer.remove(copy)


def _declare_initializers(graph: onnx.GraphProto, original: onnx.ModelProto) -> None:
    """List those initializers as inputs that the original lists and graphsurgeon drops; before IR version 4, all of them."""
    stored = {tensor.name: tensor for tensor in graph.initializer}
    present = {value.name: value for value in graph.input}
    kept = [v for v in original.graph.input if v.name in present or v.name in stored]
    listed = {value.name for value in kept}
    if original.ir_version < 4:
        new = (tensor for name, tensor in stored.items() if name not in listed)
        kept += [onnx.helper.make_tensor_value_info(t.name, t.data_type, list(t.dims)) for t in new]
    del graph.input[:]
    graph.input.extend(present.get(value.name, value) for value in kept)


def _is_whole(tensor: onnx.TensorProto) -> bool:
    """Return whether a tensor has exactly the data that its shape needs; onnx's checker only detects too little."""
    if not tensor.HasField("raw_data"):
        count = math.prod(tensor.dims)
        stored = max(len(getattr(tensor, field)) for field in _FIELDS)
        if tensor.data_type in _COMPLEX:
            count *= 2
        packed = -(-count * _BITS.get(onnx.TensorProto.DataType.Name(tensor.data_type), 8) // 8)  # in bytes
        return stored in (0, count, packed)  # 0: external data
    kind, count = tensor.data_type, math.prod(tensor.dims)
    bits = _BITS.get(onnx.TensorProto.DataType.Name(kind)) or 8 * onnx.helper.tensor_dtype_to_np_dtype(kind).itemsize
    return bool(len(tensor.raw_data) == -(-count * bits // 8))


def _stored(tensor: onnx.TensorProto) -> str:
    """Return in words how much data a tensor has."""
    if tensor.HasField("raw_data"):
        return f"{len(tensor.raw_data):,} bytes"
    return f"{max(len(getattr(tensor, field)) for field in _FIELDS):,} values"


def _tensors(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    yield from graph.initializer
    for body in descendants(graph):
        yield from body.initializer


def _with_external_data(model: onnx.ModelProto, part: Path, location: str) -> onnx.ModelProto:
    """Write the data of all large initializers to the file `part` and return a copy of the model that reads `location`."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    with part.open("wb") as file:
        for tensor in _tensors(copy.graph):
            if len(tensor.raw_data) <= _SMALL:
                continue
            offset = file.tell() + -file.tell() % 4096
            file.seek(offset)
            file.write(tensor.raw_data)
            length = len(tensor.raw_data)
            tensor.ClearField("raw_data")
            tensor.data_location = onnx.TensorProto.EXTERNAL
            for key, value in (("location", location), ("offset", offset), ("length", length)):
                entry = tensor.external_data.add()
                entry.key, entry.value = key, str(value)
        file.flush()
        os.fsync(file.fileno())
    return copy
