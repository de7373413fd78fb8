"""Inspect files of torch.export as text before torch reads them, and refuse the unknown.

`torch.export.load` (torch 2.13) unpickles: tensors marked `use_pickle`, opaque constants, archives of older releases,
and sample inputs that the weights-only loader refuses. It evaluates Python expressions (`guards_code`, symbolic sizes),
writes names, and the keys of sample inputs, into code that it then runs, looks up functions and types by dotted names,
which imports their modules and can load any library (`ctypes.cdll`), and loads compiled ones (`aotinductor`).

Hence a file is loaded only if all of it is understood: known entries, text that splits into known tokens, plain names,
no name of an operator or class that is not torch's own. It may still take long, use much memory, or hit a bug of torch.
"""

from __future__ import annotations

import ast
import functools
import io
import json
import keyword
import re
from collections.abc import Iterator
from typing import Any

import torch

from defuse_core.errors import ModelError
from defuse_core.models.operators import WITHOUT_OPERATOR, is_harmless_operator, wrong_argument

FILES_OF_PROGRAM = re.compile(
    r"archive_format|archive_version|byteorder|\.data/\w+|models/model\.json|data/sample_inputs/model\.pt|extra/.*"
    r"|data/(weights|constants)/(model_(weights|constants)_config\.json|(weight|tensor)_\d+)",
    re.ASCII,
)
OF_ATEN = re.compile(r"torch\.ops\.aten\.(\w+)\.(\w+)", re.ASCII)
# Operators that call a graph of the program, and the place of the graph among their inputs.
AUTOCAST = "torch.ops.higher_order.wrap_with_autocast"
CALLS_A_GRAPH = {"torch.ops.higher_order.wrap_with_set_grad_enabled": 1, AUTOCAST: 4}
ARITHMETIC = re.compile(
    r"torch\.sym_\w+|math\.(ceil|floor|trunc|sqrt)"
    r"|_operator\.(getitem|add|sub|mul|truediv|floordiv|mod|pow|neg|eq|ne|lt|le|gt|ge|and_|or_|not_)",
    re.ASCII,
)
# Expressions: symbols of sizes and numbers, what Symbol and Float get, and by key in the JSON characters and functions.
SIZE = re.compile(r"([su]|zu?f)\d{1,6}", re.ASCII)  # torch counts up to the highest number
SIZE_OR_NUMBER = re.compile(rf"{SIZE.pattern}|-?\d+(\.\d*)?(e[+-]?\d+)?", re.ASCII)
OF_SYMPY = (
    "Symbol|Integer|Rational|Float|Add|Mul|Pow|Eq|Ne|Max|Min|max|min|ceiling|floor|Mod|PythonMod|ModularIndexing|FloorDiv"
    "|CeilDiv|CleanDiv|IntTrueDiv|FloatTrueDiv|PowByNatural|FloatPow|ToFloat|TruncToFloat|(Trunc|Floor|Ceil|Round)ToInt"
    "|Equality|Unequality|(Strict)?(Greater|Less)Than|And|Or|Not"
)
KEYWORDS = {"positive", "nonnegative", "integer", "precision"}
EXPRESSIONS = {
    "expr_str": (re.compile(r"[\w().,' <>=!+*/%-]*", re.ASCII), re.compile(OF_SYMPY)),
    "guards_code": (
        re.compile(r"[\w\[\]().,' <>=!+*/%-]*", re.ASCII),
        re.compile(rf"{OF_SYMPY}|math\.(ceil|floor|trunc|sqrt)|torch\.sym_[a-z]+"),
    ),
}
NAMES_OF_VALUES = {"as_name", "forward_arg_names", "name"}
NAMES_OF_PARTS = {"parameter_name", "buffer_name", "tensor_constant_name", "custom_obj_name"}
NAMES_IN_CODE = {  # names that torch writes from a program
    "self", "getattr", "torch", "device", "inf", "nan", "NoneType", "fx_pytree", "pytree", "math", "_operator"
}  # fmt: skip
# in its module
SET_BY_TORCH = {"_guards_fn", "_in_spec", "_out_spec", "range_constraints", "validate_inputs"}
GRAPH = re.compile(r"submod_\d+", re.ASCII)  # the names that torch writes
# Texts of a torch.export program by their key in its JSON; of other keys, and keys themselves, are PLAIN.
PLAIN = re.compile(r"[\w.-]*", re.ASCII)
NO_TEXT = re.compile(r"(?!)")  # other values, such as as_int, may not be a text, though torch would take one
LABEL = re.compile(r"[\w. -]*", re.ASCII)  # name of a layer or an output, such as block1-0 or "head a"
# Where a node comes from: name,function;... of which torch looks up those of its own, and of operator and math.
SOURCE = (
    r"[^,;]*,(torch\.(nn\.functional\.|nn\.modules\.\w+\.|_C\._(nn|linalg|fft|special|sparse)\.|ops\.aten\.\w+\.)?\w+"
    r"|_operator\.\w+|math\.\w+|(?!torch|_operator|math|#)[\w.]+)"
)
FREE_METADATA = {"stack_trace", "nn_module_stack", "torch_fn", "from_node", "custom"}  # nothing is looked up
TEXTS = {
    "source_fn_stack": re.compile(rf"{SOURCE}(;{SOURCE})*", re.ASCII),
    "torch_version": re.compile(r"[\w.+-]*", re.ASCII),
    **dict.fromkeys(("as_string", "as_strings"), re.compile(r"[\w ,.:>+-]*", re.ASCII)),
    **dict.fromkeys(("as_float", "as_floats"), re.compile(r"-?Infinity|NaN")),
    **dict.fromkeys((*NAMES_OF_VALUES, "argument"), re.compile(r"((?!__)[A-Za-z_]\w*)?", re.ASCII)),
    **dict.fromkeys((*NAMES_OF_PARTS, "fqn"), LABEL),
}
CHECKED = {*EXPRESSIONS, "target", "in_spec", "out_spec", "as_operator"}  # checked by other rules than TEXTS
CONTAINERS = {None, "builtins.tuple", "builtins.list", "builtins.dict", "collections.OrderedDict"}


def expect_harmless_program(reader: Any, names: list[str], where: str) -> None:
    """Raise ModelError for anything in a torch.export file that torch would unpickle, evaluate or look up elsewhere."""
    for name in names:
        if re.fullmatch(r"data/(weights|constants)/model\.pt", name):
            raise ModelError(
                f"{where}: holds {name}, a pickle, as torch 2.8 and older wrote, and nothing is unpickled; with torch "
                "2.9 or newer save it again: torch.export.save(torch.export.load('old.pt2'), 'new.pt2')"
            )
        if not FILES_OF_PROGRAM.fullmatch(name):
            raise ModelError(
                f"{where}: holds {name}, and only plain tensors and torch's operators are loaded (no pickle); "
                "export the network without custom objects or compiled code"
            )
    tensors = set[str]()
    for part in ("weights", "constants"):
        text = reader.get_record(f"data/{part}/model_{part}_config.json")
        _expect_own_devices(text, where)
        config = json.loads(text)["config"]
        tensors |= config.keys()
        _expect_harmless_text([list(config.values()), *({"parameter_name": name} for name in config)], where)
        if pickled := [tensor for tensor, meta in config.items() if meta["use_pickle"]]:
            raise ModelError(
                f"{where}: {pickled[0]} is pickled, and nothing is unpickled; export a plain tensor"
            )
    _expect_harmless_inputs(reader.get_record("data/sample_inputs/model.pt"), where)
    text = reader.get_record("models/model.json")
    _expect_own_devices(text, where)
    program = json.loads(text)
    _expect_harmless_text([program, {"expr_str": list(program["range_constraints"])}], where)
    _expect_graphs_where_they_are_called(program, where)
    _expect_harmless_arguments(program, where)
    tensors |= {text for key, text in _strings(program) if key in NAMES_OF_PARTS}
    for name in tensors:  # what follows the name of a tensor would be an attribute of that tensor
        if any(name[: dot.start()] in tensors for dot in re.finditer(r"\.", name)):
            raise ModelError(
                f"{where}: holds {name[:80]!r} inside a tensor, which torch.export does not write; export it again"
            )


def _expect_harmless_inputs(data: bytes, where: str) -> None:
    """Raise ModelError for sample inputs that would be unpickled, or whose keys torch would write into code."""
    if not data:  # the program was saved without
        return
    try:
        inputs = torch.load(io.BytesIO(data), weights_only=True, map_location="cpu")
    except Exception as error:
        raise ModelError(
            f"{where}: its sample inputs would be unpickled; export the network with tensors as sample inputs"
        ) from error
    if not _are_plain_inputs(inputs):
        raise ModelError(
            f"{where}: its sample inputs are more than tensors, numbers and plain texts in tuples, lists and "
            "dictionaries with plain keys; export the network with such"
        )
    try:  # as torch.export.load does, which unpickles them where this fails
        torch.load(io.BytesIO(data), weights_only=True)
    except Exception as error:
        raise _other_device(where) from error


def _are_plain_inputs(tree: Any) -> bool:
    """Whether a tree of sample inputs, whose keys torch writes into code, has no other types and keys than known."""
    if type(tree) is dict:
        keys_are_plain = all(type(key) in (str, int) and LABEL.fullmatch(str(key)) for key in tree)
        return keys_are_plain and all(map(_are_plain_inputs, tree.values()))
    if type(tree) in (tuple, list):
        return all(map(_are_plain_inputs, tree))
    if type(tree) is str:
        return bool(TEXTS["as_string"].fullmatch(tree))
    if type(tree) is torch.Tensor:
        return not vars(tree)  # torch would call an attribute of its own that is named as a method
    return tree is None or type(tree) in (int, float, bool)


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
                f"{where}: calls {text[:80]}, which is none of the operators that a classifier may use; "
                f"export it without run_decompositions(), {WITHOUT_OPERATOR}"
            )
        if key in EXPRESSIONS and not _is_expression(text, *EXPRESSIONS[key]):
            raise ModelError(
                f"{where}: holds the expression {text[:80]!r}, which is more than arithmetic of sizes; export it with "
                "fixed height and width, or without sizes that depend on values"
            )
        if key in {"in_spec", "out_spec"} and text and not _are_plain_containers(json.loads(text)[1]):
            raise ModelError(
                f"{where}: its inputs or outputs are more than tensors in tuples, lists and dictionaries; export a "
                "network that takes and returns such"
            )
        is_taken = (key in NAMES_OF_PARTS and not _is_free(text)) or (
            key in NAMES_OF_VALUES and (text in NAMES_IN_CODE or keyword.iskeyword(text))
        )
        known = TEXTS.get(key, NO_TEXT if key.startswith("as_") else PLAIN)
        if is_taken or (key not in CHECKED and not known.fullmatch(text)):
            raise ModelError(
                f"{where}: holds {text[:80]!r}, which torch could take for another name or for code; rename the layer, "
                "argument or key of that name and export the network again, with strict=False"
            )


def _expect_graphs_where_they_are_called(program: Any, where: str) -> None:
    """Raise ModelError for a graph or operator that is a value, a call of a value, or text that arithmetic gets.

    A value that is no tensor or number could be an attribute of a Python object, and lead to any other.
    """
    wrappers = called = 0
    for node in _nodes(program):
        target, inputs = node["target"], node["inputs"]
        place = CALLS_A_GRAPH.get(target)
        if place is not None:
            graph = inputs[place]["arg"].get("as_graph")
            wrappers += 1
            is_graph = graph is not None and GRAPH.fullmatch(graph["name"])
            called += bool(is_graph and all(each["kind"] == 1 for each in inputs))
            if not node["outputs"]:
                raise ModelError(
                    f"{where}: has a block with torch.no_grad() or torch.autocast() of which nothing is used, which "
                    "torch cannot read; leave that block out of the network's forward if it is not training"
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


def _expect_harmless_arguments(program: Any, where: str) -> None:
    """Raise ModelError for an argument that torch's kernels trust although it may be wrong."""
    for node in _nodes(program):
        if wrong := wrong_argument(node["target"], node["inputs"]):
            raise ModelError(f"{where}: gives {node['target']} {wrong}")


def _is_free(name: str) -> bool:
    """Whether no part of a tensor's dotted name is an attribute that its module has, such as a method, or a graph.

    The first part is an attribute of the program, the others of plain modules, which torch makes. torch also writes the
    name, in small letters and with _ for other characters, as a variable into code: there `self` is the program.
    """
    first, *others = name.split(".")
    program, module = _empty_modules()
    return not (
        "__" in {part[:2] for part in (first, *others)}
        or any(map(keyword.iskeyword, (first, *others)))
        or re.sub(r"\W+", "_", name).lower() in NAMES_IN_CODE
        or first in SET_BY_TORCH
        or GRAPH.fullmatch(first)
        or hasattr(program, first)
        or any(hasattr(module, part) for part in others)
    )


@functools.cache
def _empty_modules() -> tuple[torch.fx.GraphModule, torch.nn.Module]:
    return torch.fx.GraphModule(torch.nn.Module(), torch.fx.Graph()), torch.nn.Module()


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


def _is_harmless_operator(target: str) -> bool:
    """Whether a name is that of arithmetic, or of an operator of aten that a classifier may use."""
    of_aten = OF_ATEN.fullmatch(target)
    if of_aten is None:
        return target in CALLS_A_GRAPH or bool(ARITHMETIC.fullmatch(target))
    return is_harmless_operator(of_aten[1], "" if of_aten[2] == "default" else of_aten[2])


def _are_plain_containers(spec: dict[str, Any]) -> bool:
    """Whether a tree of inputs or outputs, of which torch looks up types by name, has types of CONTAINERS alone."""
    keys = json.loads(spec["context"] or "null")
    return (
        spec["type"] in CONTAINERS
        and (keys is None or (isinstance(keys, list) and all(LABEL.fullmatch(str(key)) for key in keys)))
        and all(map(_are_plain_containers, spec["children_spec"]))
    )


def _is_expression(text: str, characters: re.Pattern[str], functions: re.Pattern[str]) -> bool:
    """Whether a text is arithmetic of numbers and sizes, which calls `functions` alone."""
    try:
        return bool(characters.fullmatch(text)) and _is_arithmetic(
            ast.parse(text, mode="eval").body, functions
        )
    except SyntaxError:
        return False


def _is_arithmetic(node: ast.AST, functions: re.Pattern[str]) -> bool:
    """Whether a part of an expression is a number, a size, or an operation or function of such parts."""
    known: object = False
    parts = list[ast.AST]()
    match node:
        case ast.Constant(value=value):
            known = type(value) in (bool, int, float)
        case ast.Name(id=name):
            known = SIZE.fullmatch(name)
        case ast.Subscript():
            known = _is_input(node)
        case ast.BinOp() | ast.UnaryOp() | ast.BoolOp() | ast.Compare():
            known, parts = True, [part for part in ast.iter_child_nodes(node) if isinstance(part, ast.expr)]
        case ast.Call(func=ast.Name(id="Symbol" | "Float"), args=[ast.Constant(value=str(text))]):
            known, parts = SIZE_OR_NUMBER.fullmatch(text), [*node.keywords]
        case ast.Call():
            known, parts = functions.fullmatch(ast.unparse(node.func)), [*node.args, *node.keywords]
        case ast.keyword(arg=name, value=part):
            known, parts = name in KEYWORDS, [part]
    return bool(known) and all(_is_arithmetic(part, functions) for part in parts)


def _is_input(node: ast.expr) -> bool:
    """Whether a part of an expression is an input of the program, or a size of it: L['images'][0].size()[2]."""
    match node:
        case ast.Subscript(
            value=ast.Call(func=ast.Attribute(value=tensor, attr="size"), args=[], keywords=[]),
            slice=ast.Constant(value=int()),
        ):
            node = tensor
    while isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant):
        if type(node.slice.value) not in (int, str) or not LABEL.fullmatch(str(node.slice.value)):
            return False
        node = node.value
    return isinstance(node, ast.Name) and node.id == "L"


def _without_free_texts(node: Any) -> Any:
    """Return a node of a program without texts of which nothing is evaluated: of its metadata, and what aten gets."""
    if not isinstance(node, dict):
        return node
    metadata, kept = node.get("metadata"), dict(node)
    if isinstance(metadata, dict) and all(isinstance(text, str) for text in metadata.values()):
        kept["metadata"] = {key: text for key, text in metadata.items() if key not in FREE_METADATA}
    if OF_ATEN.fullmatch(str(node.get("target"))):
        kept["inputs"] = [
            {**each, "arg": {**each["arg"], "as_string": ""}}
            if _is_free_text(each.get("arg", {}).get("as_string"))
            else each
            for each in node["inputs"]
        ]
    return kept


def _is_free_text(value: Any) -> bool:
    """Whether it is a text that stays one: torch leaves lines with a comment `# COUNTER: 1` out of its code."""
    return isinstance(value, str) and "COUNTER" not in value


def _with_argument(value: Any) -> Any:
    """Return an input of a node, whose name is that of the operator's argument and not one of a value."""
    if not isinstance(value, dict) or "name" not in value:
        return value
    return {("argument" if name == "name" else name): each for name, each in value.items()}


PARTS = {"nodes": _without_free_texts, "inputs": _with_argument}  # key -> what is done to each item


def _strings(tree: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Yield (key, text) for every text in a tree of JSON, and ("", key) for its keys, but free texts of nodes."""
    if isinstance(tree, dict):
        for name, value in tree.items():
            yield "", name  # like a text below an empty key, which is inspected as a key is
            yield from _strings(value, name)
    elif isinstance(tree, list):
        for value in tree:
            yield from _strings(PARTS[key](value) if key in PARTS else value, key)
    elif isinstance(tree, str):
        yield key, tree


def _keys(tree: Any) -> list[str]:
    """Return all keys of a tree of JSON, as often as they occur."""
    return [text for key, text in _strings(tree) if not key]
