"""Inspect files of TorchScript and torch.export as zip and text before torch reads them, and refuse the unknown.

What torch's loaders do with the bytes of a file (torch 2.13):

- Both read the zip archive with torch's own reader. Python's `zipfile` can find other entries in the same bytes, so
  the inspection uses torch's reader too, and refuses an archive in which the two find different names.
- `torch.jit.load` never uses Python's pickle: its C++ reader builds TorchScript types and registered C++ classes
  (`torch.classes`), and the code of the archive is compiled for TorchScript's own interpreter. Loading already runs
  some of that code: the default values of parameters, and `__setstate__`. TorchScript calls operators only by names
  in its code, or by a literal in `getattr`. `save` and `from_file` are the operators of `aten` that touch files.
- `torch.export.load` unpickles: tensors marked `use_pickle`, opaque constants, archives of older releases, and sample
  inputs that the weights-only loader refuses. It evaluates Python expressions (`guards_code`, symbolic sizes), writes
  names into code that it then runs, looks up functions and types by dotted names, which imports their modules, and
  loads compiled libraries (`aotinductor`).

Hence a file is loaded only if all of it is understood: known entries, text that splits into known tokens, plain names,
no name of an operator or class that is not torch's own. It may still take long, use much memory, or hit a bug of torch.
"""

from __future__ import annotations

import functools
import io
import json
import keyword
import pickletools
import re
import zipfile
from collections.abc import Iterator
from typing import Any

import torch

from defuse_core.errors import ModelError

FILES_OF_PROGRAM = re.compile(
    r"archive_format|archive_version|byteorder|\.data/\w+|models/model\.json|data/sample_inputs/model\.pt|extra/.*"
    r"|data/(weights|constants)/(model_(weights|constants)_config\.json|(weight|tensor)_\d+)",
    re.ASCII,
)
OF_ATEN = re.compile(r"torch\.ops\.aten\.(\w+)\.(\w+)", re.ASCII)
# Operators that call a graph of the program, and the place of the graph among their inputs.
WRAPPERS = {
    "torch.ops.higher_order.wrap_with_set_grad_enabled": 1,
    (AUTOCAST := "torch.ops.higher_order.wrap_with_autocast"): 4,
}
ARITHMETIC = re.compile(
    r"torch\.sym_\w+|math\.(ceil|floor|trunc|sqrt)"
    r"|_operator\.(getitem|add|sub|mul|truediv|floordiv|mod|pow|neg|eq|ne|lt|le|gt|ge|and_|or_|not_)",
    re.ASCII,
)
FILE_OPERATORS = ("save", "from_file")  # of aten, reached as functions of torch and as methods of any value
FILES_OF_SCRIPT = re.compile(
    r"(\.data/)?version|byteorder|\.data/\w+|(data|constants|traced_inputs)(\.pkl|/\d+)|code/[\w/]+\.py(\.debug_pkl)?"
    r"|extra/.*",
    re.ASCII,
)
# What torch writes: no comments, no adjacent or triple-quoted texts, no escape that spells a letter.
TOKENS = re.compile(
    r"""(?P<space>[ \n]+)|[A-Za-z_]\w*|\d+(\.\d*)?(e[+-]?\d+)?j?(?!\w)|\.\.\.|[()[\]{}:,.=<>+*/%@!&|^~-]"""
    r"""|(?P<text>"([^"\\\n]|\\[abfnrtv'"\\]|\\[23][0-7]{2})*"|'([^'\\\n]|\\[abfnrtv'"\\]|\\[23][0-7]{2})*')"""
    r"""|(?P<unknown>.{1,40})""",
    re.ASCII,
)
OF_PRIM = re.compile(
    r"RaiseException|NumToTensor|device|dtype|layout|type|name|data|grad|requires_grad|is_[a-z_]+|itemsize|nbytes|abs|max"
    r"|min|rangelist|tolist|unchecked_unwrap_optional|EnumName|EnumValue|StringIndex|TupleIndex|id"
)
OPERATIONS_OF_PICKLES = re.compile(
    r"PROTO|GLOBAL|EMPTY_(TUPLE|LIST|DICT)|MARK|SETITEMS?|APPENDS?|TUPLE[123]?|REDUCE|BUILD|NEWOBJ|(LONG_)?BIN(PUT|GET)"
    r"|BININT[12]?|LONG1|BINFLOAT|BINUNICODE|NEW(TRUE|FALSE)|NONE|BINPERSID|STOP"
)
CLASS_IN_PICKLE = re.compile(r"[\w.]+ [\w.]+", re.ASCII)  # module and name
CUSTOM_CLASS = re.compile(r"torch\W*classes", re.ASCII)  # as text; torch drops spaces and lines between names
NAMES_IN_EXPRESSIONS = re.compile(
    r"[su]\d+|L|args|kwargs|size|and|or|not|Eq|Ne|Max|Min|Mod|PythonMod|FloorDiv|CeilDiv|ceiling|floor|True|False"
    r"|Symbol|positive|nonnegative|integer|Add|Mul|Pow|Integer|Rational",
    re.ASCII,
)
IDENTIFIER = re.compile(r"[A-Za-z_]\w*", re.ASCII)
NAMES_OF_VALUES = {"as_name", "forward_arg_names", "name"}
NAMES_OF_PARTS = {"parameter_name", "buffer_name", "tensor_constant_name", "custom_obj_name"}
NAMES_IN_CODE = {  # of what torch writes from a program
    "self", "getattr", "torch", "device", "inf", "nan", "NoneType", "fx_pytree", "pytree", "math", "_operator"
}  # fmt: skip
# Texts of a torch.export program by their key in its JSON; of other keys, and keys themselves, are PLAIN.
PLAIN = re.compile(r"[\w.-]*", re.ASCII)  # a part of a network may be called block1-0
TEXTS = {
    "torch_version": re.compile(r"[\w.+-]*", re.ASCII),
    **dict.fromkeys(("as_string", "as_strings"), re.compile(r"[\w ,.:>+-]*", re.ASCII)),
    **dict.fromkeys(NAMES_OF_VALUES, re.compile(r"((?!__)[A-Za-z_]\w*)?", re.ASCII)),
}
CHECKED = {"target", "expr_str", "guards_code", "in_spec", "out_spec"}  # by other rules than TEXTS
CONTAINERS = {None, "builtins.tuple", "builtins.list", "builtins.dict", "collections.OrderedDict"}


def program_kind(data: bytes) -> str | None:
    """Return "torchscript" for the bytes of such an archive, "torch.export" for those of a program, else None."""
    try:
        listed = zipfile.ZipFile(io.BytesIO(data)).namelist()
    except (zipfile.BadZipFile, ValueError):
        return None
    names = {name.partition("/")[2] or name for name in listed}
    if "models/model.json" in names or "serialized_exported_program.json" in names:
        return "torch.export"
    return "torchscript" if any(name.startswith("code/") for name in names) else None


def expect_harmless(data: bytes, where: str) -> None:
    """Raise ModelError for a TorchScript or torch.export file that could do more than compute with tensors."""
    reader = torch._C.PyTorchFileReader(io.BytesIO(data))
    names = reader.get_all_records()
    listed = [name.partition("/")[2] for name in zipfile.ZipFile(io.BytesIO(data)).namelist()]
    is_flatbuffer = data[4:8] == b"PTMF"  # which torch.jit.load reads in place of the zip archive
    if is_flatbuffer or sorted(names) != sorted(listed) or len({name.lower() for name in names}) < len(names):
        raise ModelError(
            f"{where}: the entries of its zip archive are ambiguous (a name twice, or two lists of entries), so it is "
            "not loaded; save the network again"
        )
    if program_kind(data) == "torchscript":
        _expect_harmless_script(reader, names, where)
    else:
        _expect_harmless_program(reader, names, where)


def _expect_harmless_script(reader: Any, names: list[str], where: str) -> None:
    """Raise ModelError for anything in a TorchScript file that could touch files, or that is not understood."""
    for name in names:
        if not FILES_OF_SCRIPT.fullmatch(name):
            raise ModelError(f"{where}: holds {name}, which torch.jit.save does not write; save it again")
        if name.endswith("pkl"):
            _expect_harmless_pickle(reader.get_record(name), f"{where}: {name}")
        if name.endswith(".py"):
            _expect_harmless_code(reader.get_record(name).decode("latin-1"), where)


def _expect_harmless_pickle(data: bytes, where: str) -> None:
    """Raise ModelError for a pickle, which C++ reads, with a class of C++, or a name that is not a plain one.

    C++ parses the names of classes, and the texts that restore_type_tag gets, as TorchScript: quotes, escapes and
    spaces in them could hide a class.
    """
    texts, has_types = list[str](), False
    for operation, found, _ in pickletools.genops(data):
        argument = str(found)
        if not OPERATIONS_OF_PICKLES.fullmatch(operation.name):
            raise ModelError(
                f"{where} holds {operation.name}, which torch.jit.save does not write; save it again"
            )
        if operation.name == "GLOBAL":
            has_types |= argument == "torch.jit._pickle restore_type_tag"
            if not CLASS_IN_PICKLE.fullmatch(argument) or CUSTOM_CLASS.search(argument):
                raise _refusal(where, argument)
        elif operation.name == "BINUNICODE":
            texts.append(argument)
    for text in texts:
        if CUSTOM_CLASS.search(text) or (has_types and set(text) & set("\"'\\")):
            raise _refusal(where, text[:80])


def _expect_harmless_code(code: str, where: str) -> None:
    """Raise ModelError for TorchScript code that does not split into tokens, or has a name that is not allowed."""
    found = [match for match in TOKENS.finditer(code) if not match["space"]]
    tokens = [match[0] for match in found]
    for at, (match, token) in enumerate(zip(found, tokens, strict=True)):
        after = tokens[at + 1 : at + 5]
        if match["unknown"] or (match["text"] and at and found[at - 1]["text"]):
            raise ModelError(
                f"{where}: its code holds {token[:40]!r}, which torch.jit.save does not write, so it is not loaded; "
                "save it again, or export the network with torch.export.save"
            )
        is_class = (token == "classes" and tokens[max(at - 2, 0) : at] == ["torch", "."]) or (
            match["text"] and CUSTOM_CLASS.search(re.sub(r"\\.", " ", token))
        )
        if is_class or token.strip("\"'") in (*FILE_OPERATORS, "__setstate__"):
            raise _refusal(where, token)
        is_field = tokens[at - 1 : at] == ["."] or after[:1] == [":"]
        is_library = token == "ops" and not is_field
        if is_library and (after[:3] != [".", "prim", "."] or not OF_PRIM.fullmatch("".join(after[3:]))):
            raise _refusal(where, "".join([token, *after]))
        if token == "__torch__" and (
            after[:1] != ["."]
            or (after[1:2] == ["torch"] and (after[2:3] != ["."] or after[3:] == ["classes"]))
        ):
            raise _refusal(where, "".join([token, *after]))


def _refusal(where: str, found: str) -> ModelError:
    return ModelError(
        f"{where}: its code uses {found}, which can touch files or run at loading, so it is not loaded; rename a layer "
        "or attribute of that name, export the network with torch.export.save, or use architecture: custom"
    )


def _expect_harmless_program(reader: Any, names: list[str], where: str) -> None:
    """Raise ModelError for anything in a torch.export file that torch would unpickle, evaluate or look up elsewhere."""
    for name in names:
        if not FILES_OF_PROGRAM.fullmatch(name):
            raise ModelError(
                f"{where}: holds {name}, and only plain tensors and torch's operators are loaded (no pickle); "
                "export the network without custom objects or compiled code"
            )
    for part in ("weights", "constants"):
        text = reader.get_record(f"data/{part}/model_{part}_config.json")
        _expect_own_devices(text, where)
        config = json.loads(text)["config"]
        _expect_harmless_text([{"parameter_name": name} for name in config], where)
        _expect_harmless_text(config, where)
        if pickled := [tensor for tensor, meta in config.items() if meta["use_pickle"]]:
            raise ModelError(
                f"{where}: {pickled[0]} is pickled, and nothing is unpickled; export a plain tensor"
            )
    inputs = reader.get_record("data/sample_inputs/model.pt")
    try:
        torch.load(io.BytesIO(inputs), weights_only=True, map_location="cpu")
    except Exception as error:
        raise ModelError(
            f"{where}: its sample inputs would be unpickled; export the network with tensors as sample inputs"
        ) from error
    try:  # as torch.export.load does, which unpickles them where this fails
        torch.load(io.BytesIO(inputs), weights_only=True)
    except Exception as error:
        raise _other_device(where) from error
    text = reader.get_record("models/model.json")
    _expect_own_devices(text, where)
    program = json.loads(text)
    _expect_harmless_text(program, where)
    _expect_graphs_where_they_are_called(program, where)


def _expect_own_devices(text: bytes, where: str) -> None:
    """Raise ModelError where the JSON text of a program has tensors of a GPU and this machine has none."""
    if re.search(rb'"type": ?"cuda"', text) and not torch.cuda.is_available():
        raise _other_device(where)


def _other_device(where: str) -> ModelError:
    return ModelError(
        f"{where}: exported on a GPU that this machine lacks; export it on the CPU: "
        "torch.export.export(net.cpu().eval(), (images.cpu(),), ...)"
    )


def _expect_harmless_text(model: Any, where: str) -> None:
    """Raise ModelError for an operator, an expression or another text in the JSON of a program that is not known."""
    for key, text in _strings(model):
        if key == "target" and not _is_harmless_operator(text):
            raise ModelError(
                f"{where}: calls {text[:80]}, which is no operator of torch's aten; export it without"
            )
        if key in {"expr_str", "guards_code"} and not _is_arithmetic(text):
            raise ModelError(
                f"{where}: holds the expression {text[:80]!r}, which is more than sizes; export it again"
            )
        if key in {"in_spec", "out_spec"} and text and not _are_plain_containers(json.loads(text)[1]):
            raise ModelError(
                f"{where}: its inputs or outputs are more than tensors in tuples, lists and dictionaries; export a "
                "network that takes and returns such"
            )
        is_taken = (key in NAMES_OF_PARTS and not _is_free(text)) or (
            key in NAMES_OF_VALUES and (text in NAMES_IN_CODE or keyword.iskeyword(text))
        )
        if is_taken or (key not in CHECKED and not TEXTS.get(key, PLAIN).fullmatch(text)):
            raise ModelError(
                f"{where}: holds {text[:80]!r}, which torch.export does not write; export it again"
            )


def _expect_graphs_where_they_are_called(program: Any, where: str) -> None:
    """Raise ModelError for a graph or operator that is a value, a call of a value, or text that arithmetic gets.

    A value that is no tensor or number could be an attribute of a Python object, and lead to any other.
    """
    wrappers = called = 0
    for node in _nodes(program):
        target, inputs = node["target"], node["inputs"]
        place = WRAPPERS.get(target)
        if place is not None:
            graph = inputs[place]["arg"].get("as_graph")
            wrappers += 1
            called += (
                graph is not None and _is_free(graph["name"]) and all(each["kind"] == 1 for each in inputs)
            )
        if not OF_ATEN.fullmatch(target):
            values = [each["arg"] for at, each in enumerate(inputs) if at != place]
            texts = sum(key.startswith("as_string") for key in _keys(values))
            if texts > (target == AUTOCAST):  # the kind of its device
                raise ModelError(
                    f"{where}: gives {target} a text, which torch.export does not; export it again"
                )
    keys = _keys(program)
    if not keys.count("as_graph") == called == wrappers or "as_operator" in keys:
        raise ModelError(
            f"{where}: holds a function as a value, which is not loaded; export it without control flow"
        )


def _is_free(name: str) -> bool:
    """Whether no part of a dotted name is an attribute that each program has, such as a method: no tensor is."""
    return not any(part.startswith("__") or hasattr(_empty_program(), part) for part in name.split("."))


@functools.cache
def _empty_program() -> torch.fx.GraphModule:
    return torch.fx.GraphModule(torch.nn.Module(), torch.fx.Graph())


def _nodes(tree: Any, key: str = "") -> Iterator[dict[str, Any]]:
    """Yield the nodes of all graphs in a tree of JSON."""
    if isinstance(tree, dict):
        for name, value in tree.items():
            yield from _nodes(value, name)
    elif isinstance(tree, list):
        for value in tree:
            if key == "nodes":
                yield value
            yield from _nodes(value, key)


def _keys(tree: Any) -> list[str]:
    """Return all keys of a tree of JSON, as often as they occur."""
    return [text for key, text in _strings(tree) if not key]


def _is_harmless_operator(target: str) -> bool:
    """Whether a name is that of an operator that torch has and that touches no files."""
    of_aten = OF_ATEN.fullmatch(target)
    if of_aten is None:
        return target in WRAPPERS or bool(ARITHMETIC.fullmatch(target))
    name, overload = of_aten[1], "" if of_aten[2] == "default" else of_aten[2]
    overloads = torch._C._jit_get_operation(f"aten::{name}")[1] or ()
    return name not in FILE_OPERATORS and overload in overloads


def _are_plain_containers(spec: dict[str, Any]) -> bool:
    """Whether a tree of inputs or outputs, of which torch looks up types by name, has types of CONTAINERS alone."""
    keys = json.loads(spec["context"] or "null")
    return (
        spec["type"] in CONTAINERS
        and (keys is None or (isinstance(keys, list) and all(PLAIN.fullmatch(str(key)) for key in keys)))
        and all(map(_are_plain_containers, spec["children_spec"]))
    )


def _is_arithmetic(expression: str) -> bool:
    """Whether an expression holds nothing but sizes of the inputs, numbers and arithmetic."""
    bare = re.sub(r"\['\w+'\]|'[su]\d+'", "", expression, flags=re.ASCII)
    names = IDENTIFIER.findall(bare)
    return bool(re.fullmatch(r"[\w\[\]().,\s<>=!+\-*/%]*", bare, re.ASCII)) and all(
        NAMES_IN_EXPRESSIONS.fullmatch(name) for name in names
    )


def _strings(tree: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Yield (key, text) for every text in a tree of JSON, and ("", key) for its keys, without the metadata of nodes."""
    if isinstance(tree, dict):
        for name, value in tree.items():
            yield "", name
            yield from _strings(value, name)
    elif isinstance(tree, list):
        for value in tree:
            yield from _strings(PARTS[key](value) if key in PARTS else value, key)
    elif isinstance(tree, str):
        yield key, tree


def _without_metadata(node: Any) -> Any:
    """Return a node of a program without the texts that say where it was written, of which nothing is evaluated."""
    metadata = node.get("metadata") if isinstance(node, dict) else None
    if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
        return node
    return {name: value for name, value in node.items() if name != "metadata"}


def _with_argument(value: Any) -> Any:
    """Return an input of a node, whose name is that of the operator's argument and not one of a value."""
    if not isinstance(value, dict) or "name" not in value:
        return value
    return {("argument" if name == "name" else name): each for name, each in value.items()}


PARTS = {"nodes": _without_metadata, "inputs": _with_argument}  # of lists with this key
