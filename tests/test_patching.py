"""Fidelity: whatever encoder wrote the original, no byte that no edit names changes, and `revert`
gives back the same file."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import onnx
import onnx.helper
import pytest
from onnx import ModelProto, TensorProto

from atpatch_onnx.comparing import compare
from atpatch_onnx.edits import (
    AddInitializer,
    AddMetadata,
    AddNode,
    AddOpsetImport,
    Edit,
    RewireInput,
)
from atpatch_onnx.errors import CheckError, RefusedError
from atpatch_onnx.model_file import ModelFile
from atpatch_onnx.patch_file import load_patch, save_patch
from atpatch_onnx.patching import Patch, apply, revert
from atpatch_onnx.wire import Replacement, delimited, fields, replaced, varint

from hosts import assert_patch, attention, edited, model_file


def identity(before: int, source: str, name: str) -> tuple[Edit, ...]:
    node = onnx.helper.make_node("Identity", [source], [name], name=name)
    return AddNode(before, node), RewireInput(before, 0, source, name)


EXTERNAL = onnx.helper.make_tensor("atpatch/t", TensorProto.FLOAT, [1], [1.0])
EXTERNAL.ClearField("float_data")
EXTERNAL.data_location = TensorProto.EXTERNAL
EXTERNAL.external_data.add(key="location", value="secret.bin")
EDITS = (*identity(3, "t0", "atpatch/a"), *identity(7, "t1", "atpatch/b"))


def rich_host() -> ModelProto:
    """Everything that other tools lose: metadata, doc strings, sparse tensors, functions, ..."""
    model = attention(17)
    model.doc_string, model.domain, model.model_version = "doc", "org.example", 7
    model.producer_name, model.producer_version = "someone", "1.2"
    onnx.helper.set_model_props(model, {"owner": "me"})
    graph = model.graph
    graph.doc_string = "graph doc"
    graph.input[0].doc_string = "input doc"
    for node in graph.node:
        node.doc_string = "node doc"
        node.metadata_props.add(key="pkg.torch.onnx.name_scopes", value="['', 'a', 'a.b']")
    unused = onnx.helper.make_tensor("unused", TensorProto.FLOAT, [2], [1, 2])
    graph.initializer.append(unused)
    values = onnx.helper.make_tensor("sparse", TensorProto.FLOAT, [1], [3.0])
    indices = onnx.helper.make_tensor("sparse_indices", TensorProto.INT64, [1], [2])
    graph.sparse_initializer.append(onnx.helper.make_sparse_tensor(values, indices, [4]))
    graph.value_info.append(onnx.helper.make_tensor_value_info("c0", TensorProto.FLOAT, None))
    graph.quantization_annotation.add(tensor_name="c0")
    graph.metadata_props.add(key="graph", value="props")
    model.functions.append(
        onnx.parser.parse_function(
            '<domain: "local", opset_import: ["" : 17]> twice (x) => (y) { y = Add (x, x) }'
        )
    )
    model.opset_import.append(onnx.helper.make_opsetid("local", 1))
    return model


def _split_graph(content: bytes) -> bytes:
    """The graph written in two parts, which a parser merges."""
    file = ModelFile.from_bytes(content)
    (graph,) = file.graphs
    middle = file.nodes[4].start
    halves = [content[graph.payload : middle], content[middle : graph.end]]
    return (
        content[: graph.start]
        + b"".join(delimited(7, half) for half in halves)
        + content[graph.end :]
    )


def _long_varint(content: bytes) -> bytes:
    """The length of the graph written in more bytes than needed."""
    file = ModelFile.from_bytes(content)
    (graph,) = file.graphs
    length = bytearray(varint(graph.end - graph.payload))
    length[-1] |= 0x80
    return content[: graph.start + 1] + bytes(length) + b"\x00" + content[graph.payload :]


def _graph_last(content: bytes) -> bytes:
    file = ModelFile.from_bytes(content)
    (graph,) = file.graphs
    return content[: graph.start] + content[graph.end :] + content[graph.start : graph.end]


def _unknown_fields(content: bytes) -> bytes:
    """Fields that this version of ONNX does not know, in the model, the graph and a node."""
    file = ModelFile.from_bytes(content)
    (graph,) = file.graphs
    node = file.nodes[3]
    extra = delimited(1000, b"future")
    inner = content[node.payload : node.end] + extra
    body = content[graph.payload : node.start] + delimited(1, inner) + content[node.end : graph.end]
    return content[: graph.start] + delimited(7, body + extra) + content[graph.end :] + extra


ENCODINGS: dict[str, Callable[[bytes], bytes]] = {
    "canonical": lambda content: content,
    "graph in two parts": _split_graph,
    "long varint": _long_varint,
    "graph last": _graph_last,
    "unknown fields": _unknown_fields,
}


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_revert_gives_back_the_same_bytes(encoding: str) -> None:
    content = ENCODINGS[encoding](rich_host().SerializeToString())
    before = ModelFile.from_bytes(content)
    after = edited(before, EDITS)
    found = assert_patch(before, after, rewired=2, added=2)
    assert [slot.new for slot in found.rewired] == ["atpatch/a", "atpatch/b"]
    restored = revert(ModelFile.from_bytes(after.content()))
    assert restored.sha256 == hashlib.sha256(content).hexdigest()


def test_what_no_edit_names_survives() -> None:
    host = rich_host()
    after = ModelProto.FromString(edited(model_file(host), EDITS).content())
    for edit in EDITS:  # undo by hand what the edits say, and compare everything that is left
        if isinstance(edit, AddNode):
            after.graph.node.remove(next(n for n in after.graph.node if n.name == edit.node.name))
    for edit in EDITS:
        if isinstance(edit, RewireInput):
            after.graph.node[edit.node].input[edit.slot] = edit.old
    after.metadata_props.pop()
    assert after == host


def test_patches_stack_and_come_off_in_turn() -> None:
    first = model_file(rich_host())
    second = ModelFile.from_bytes(edited(first, EDITS[:2]).content())
    third = ModelFile.from_bytes(edited(second, identity(6, "c0", "atpatch/c")).content())
    onnx.checker.check_model(bytes(third.buffer))
    assert revert(third).content() == bytes(second.buffer)
    assert revert(ModelFile.from_bytes(revert(third).content())).content() == bytes(first.buffer)


def test_a_name_that_is_taken_is_refused() -> None:
    host = model_file(rich_host())
    for taken in ("c0", "unused", "q", "sparse"):
        with pytest.raises(RefusedError, match=f"'{taken}' is already taken"):
            edited(host, identity(3, "t0", taken))
    twice = (*identity(3, "t0", "atpatch/a"), *identity(7, "t1", "atpatch/a"))
    with pytest.raises(RefusedError, match="already taken"):
        edited(host, twice)


@pytest.mark.parametrize(
    "edit",
    [
        AddOpsetImport("", 12),
        AddOpsetImport("ai.onnx", 12),
        AddMetadata("atpatch.record", "{}"),
        AddMetadata("owner", "you"),
        AddInitializer(EXTERNAL),
        AddNode(
            3, onnx.helper.make_node("Constant", [], ["atpatch/c"], "atpatch/c", value=EXTERNAL)
        ),
        AddNode(99, onnx.helper.make_node("Identity", ["q"], ["atpatch/c"], "atpatch/c")),
    ],
    ids=["opset", "opset by its name", "record", "metadata", "tensor", "constant", "place"],
)
def test_an_edit_that_does_more_than_it_says_is_refused(edit: Edit) -> None:
    with pytest.raises(RefusedError, match="not what patches may do"):
        edited(model_file(rich_host()), (edit,))


def _output_first(model: ModelProto) -> None:
    value = onnx.helper.make_tensor_value_info("atpatch/o", TensorProto.FLOAT, [1])
    model.graph.output.insert(0, value)


def _input_without_default(model: ModelProto) -> None:
    model.graph.input.append(
        onnx.helper.make_tensor_value_info("atpatch/i", TensorProto.FLOAT, [1])
    )


def _other_opset(model: ModelProto) -> None:
    model.opset_import.append(onnx.helper.make_opsetid("", 12))


def _external(model: ModelProto) -> None:
    model.graph.initializer.append(EXTERNAL)


def _other_weight(model: ModelProto) -> None:
    model.graph.initializer.append(onnx.helper.make_tensor("atpatch/w", 1, [2], [0.0, 0.0]))
    model.graph.node[-1].input[1] = "atpatch/w"


@pytest.mark.parametrize(
    "change", [_output_first, _input_without_default, _other_opset, _external, _other_weight]
)
def test_a_change_that_no_patch_makes_does_not_pass_as_one(
    change: Callable[[ModelProto], None],
) -> None:
    base = rich_host()
    base.graph.node[-1].input[1] = "unused"
    other = ModelProto()
    other.CopyFrom(base)
    change(other)
    with pytest.raises(CheckError):
        compare(model_file(base), model_file(other))


def test_a_field_of_another_wire_type_is_another_field() -> None:
    content = rich_host().SerializeToString()
    assert content[:2] == b"\x08\x08"  # ir_version 8 as a varint
    odd = ModelFile.from_bytes(b"\x0a\x01\x08" + content[2:])
    with pytest.raises(CheckError):
        compare(ModelFile.from_bytes(content), odd)


def test_a_patch_for_another_model_is_refused() -> None:
    with pytest.raises(RefusedError, match="another file"):
        apply(model_file(attention(17)), Patch(model_file(rich_host()).sha256, EDITS))
    with pytest.raises(RefusedError, match="expects 'elsewhere'"):
        edited(model_file(attention(17)), (RewireInput(3, 0, "elsewhere", "q"),))


@pytest.mark.parametrize("position", [0.1, 0.5, 0.9, 0.97])
def test_an_altered_file_does_not_revert_silently(position: float) -> None:
    content = bytearray(edited(model_file(rich_host()), EDITS).content())
    content[int(len(content) * position)] ^= 1
    try:
        file = ModelFile.from_bytes(bytes(content))
    except Exception as error:  # the flipped bit broke the encoding itself
        assert "is not an ONNX model" in str(error) or "truncated" in str(error)  # noqa: PT017
        return
    with pytest.raises((CheckError, RefusedError)):
        revert(file)


def test_patch_files_hold_the_whole_patch(tmp_path) -> None:  # type: ignore[no-untyped-def]
    host = model_file(rich_host())
    tensor = onnx.helper.make_tensor("atpatch/t", TensorProto.FLOAT, [1], [1.0])
    edits = (
        *EDITS,
        AddInitializer(tensor),
        AddOpsetImport("ai.onnx.ml", 3),
        AddMetadata("atpatch.note", "x"),
    )
    patch = Patch(host.sha256, edits)
    path = tmp_path / "fix.atpatch"
    path.write_bytes(save_patch(patch, host))
    onnx.checker.check_model(path)
    loaded = load_patch(path)
    assert loaded == patch
    assert apply(host, loaded).content() == apply(host, patch).content()


def test_replacements_are_exact() -> None:
    data = bytes(range(100))
    changes = [Replacement(0, 0, b"ab"), Replacement(5, 7, b""), Replacement(100, 100, b"z")]
    joined = b"".join(replaced(data, len(data), changes))
    assert joined == b"ab" + data[:5] + data[7:] + b"z"
    for value in (0, 1, 127, 128, 300, 2**31, 2**63):
        field = next(fields(b"\x08" + varint(value), 0, 1 + len(varint(value))))
        assert field.end == 1 + len(varint(value))
