"""Programs of torch.export that could do more than compute with tensors are refused; ordinary ones are loaded."""

from __future__ import annotations

import io
import json
import zipfile
from collections import Counter, OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from defuse_core.errors import ModelError
from defuse_core.models.programs import load_program

MODEL, INPUTS = "models/model.json", "data/sample_inputs/model.pt"
WEIGHTS = "data/weights/model_weights_config.json"


def packed(entries: dict[str, bytes]) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, data in entries.items():
            archive.writestr(f"archive/{name}", data)
    return file.getvalue()


class Resized(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleDict({"part-1": nn.Linear(12, 3)})

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            shifted = torch.sin(input)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits: torch.Tensor = self.parts["part-1"](shifted.reshape(input.shape[0], -1))
        return logits.float() + input.shape[0] * 2


def entries_of(program: torch.export.ExportedProgram) -> dict[str, bytes]:
    file = io.BytesIO()
    torch.export.save(program, file)
    source = zipfile.ZipFile(file)
    return {name.partition("/")[2]: source.read(name) for name in source.namelist()}


@pytest.fixture(scope="module")
def exported() -> dict[str, bytes]:
    """The entries of a program whose sizes have arithmetic, and parts of another precision or without gradients."""
    shapes = ({0: torch.export.Dim("batch")},)
    return entries_of(torch.export.export(Resized().eval(), (torch.rand(2, 3, 2, 2),), dynamic_shapes=shapes))


def changed(
    entries: dict[str, bytes], file: str, change: Callable[[dict[str, Any]], object]
) -> dict[str, bytes]:
    """Return the entries with another JSON in one file."""
    content = json.loads(entries[file])
    change(content)
    return entries | {file: json.dumps(content).encode()}


def first_node(**content: object) -> Callable[[dict[str, Any]], object]:
    """Return the change that gives the first node other content."""
    return lambda program: program["graph_module"]["graph"]["nodes"][0].update(content)


def wrapper(program: dict[str, Any]) -> dict[str, Any]:
    """Return the node whose graph is computed without gradients."""
    nodes: list[dict[str, Any]] = program["graph_module"]["graph"]["nodes"]
    return next(each for each in nodes if each["target"].endswith("wrap_with_set_grad_enabled"))


def tensors(program: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = program["graph_module"]["graph"]["tensor_values"]
    return found


def more_input(content: object) -> Callable[[dict[str, Any]], object]:
    """Return the change that adds an input, of which torch writes values into code."""
    return lambda program: program["graph_module"]["signature"]["input_specs"].append(content)


def spec(kind: str, context: object) -> str:
    return json.dumps([1, {"type": kind, "context": json.dumps(context), "children_spec": []}])


def called_with(**specs: str) -> Callable[[dict[str, Any]], object]:
    """Return the change of the trees of inputs or outputs."""
    return lambda program: program["graph_module"]["module_call_graph"][0]["signature"].update(specs)


SPARSE = {
    "target": "torch.ops.aten.zeros.default",
    "inputs": [{"name": "layout", "arg": {"as_layout": 1}, "kind": 2}],
}
LAYOUT = "gives torch.ops.aten.zeros.default a layout, "
CODE = "__import__('os').system('id')"
VALUE = "holds a function as a value, which is not loaded"
CONTAINER = "its inputs or outputs are more than tensors in tuples, lists and dictionaries"


def writes(key: str, text: str) -> Callable[[dict[str, Any]], object]:
    return first_node(outputs=[{key: text}])


def refused(name: str, said: str, change: Callable[[dict[str, Any]], object]) -> Any:
    return pytest.param(change, said, id=name)


def calling(name: str, operator: str) -> Any:
    target = f"torch.ops.aten.{operator}"
    return refused(name, f"calls {target}, ", first_node(target=target))


@pytest.mark.parametrize(  # with what would make torch run other code, at the latest when the network runs
    ("change", "said"),
    [
        refused(
            "an operator of another module", "calls torch.os.system, ", first_node(target="torch.os.system")
        ),
        calling("an operator that writes files", "save.default"),
        calling("an operator that does not check its indices", "_sparse_coo_tensor_unsafe.default"),
        refused("a sparse tensor", LAYOUT, first_node(**SPARSE)),
        calling("an operator whose tensor is a C++ object", "fbgemm_pack_gemm_matrix_fp16.default"),
        calling("an operator that writes into a given tensor", "replication_pad3d.out"),
        calling("an operator of TorchScript", "to.prim_dtype"),
        refused(
            "a sparse tensor in a block without gradients",
            LAYOUT,
            lambda program: wrapper(program)["inputs"][1]["arg"]["as_graph"]["graph"]["nodes"][0].update(
                SPARSE
            ),
        ),
        refused(
            "a value in place of a graph",
            VALUE,
            lambda program: wrapper(program)["inputs"][1].update(arg={"as_tensor": {"name": "input"}}),
        ),
        refused(
            "a number up to which torch counts",
            "holds the expression 'u9999999999', ",
            lambda program: program["range_constraints"].update(u9999999999={"min_val": 0, "max_val": 9}),
        ),
        calling("an attribute of all operators", "__dir__.__call__"),
        refused(
            "an operator as a value",
            VALUE,
            first_node(inputs=[{"arg": {"as_operator": "torch.ops.image.write_file.default"}}]),
        ),
        refused(
            "a graph that another operator gets",
            VALUE,
            first_node(inputs=[{"arg": {"as_graph": {"name": "backward"}}}]),
        ),
        refused(
            "a graph of which nothing is used, which torch cannot read",
            "has a block with torch.no_grad()",
            lambda program: wrapper(program).update(outputs=[]),
        ),
        refused("a graph by keyword", VALUE, lambda program: wrapper(program)["inputs"][1].update(kind=2)),
        refused(
            "a method in place of a graph",
            VALUE,
            lambda program: wrapper(program)["inputs"][1]["arg"]["as_graph"].update(name="to_folder"),
        ),
        refused(
            "a module in place of a graph",
            VALUE,
            lambda program: wrapper(program)["inputs"][1]["arg"]["as_graph"].update(name="numpy"),
        ),
        refused(
            "an attribute of a tuple",
            "gives _operator.getitem a text, ",
            first_node(target="_operator.getitem", inputs=[{"arg": {"as_string": "os"}}]),
        ),
        refused(
            "a text that a graph gets",
            "gives torch.ops.higher_order.wrap_with_set_grad_enabled a text, ",
            lambda program: wrapper(program)["inputs"].append(
                {"name": "", "arg": {"as_string": "os"}, "kind": 1}
            ),
        ),
        refused(
            "a call as a size",
            'holds the expression "__import__',
            lambda program: tensors(program).update(metadata={"sizes": [{"as_expr": {"expr_str": CODE}}]}),
        ),
        refused(
            "a call in metadata",
            'holds the expression "__import__',
            first_node(metadata={"size": {"expr_str": CODE}}),
        ),
        refused(
            "a call in letters that Python takes for others",
            "holds the expression 'ｏ",
            lambda program: program.update(guards_code=["ｏｐｅｎ(1)"]),
        ),
        refused(
            "a parameter's name with code",
            "holds 'a\"__import__",
            first_node(inputs=[{"parameter": {"parameter_name": 'a"' + CODE}}]),
        ),
        refused(
            "a method of the program as a parameter",
            "holds 'to_folder.__func__.__builtins__'",
            first_node(inputs=[{"parameter": {"parameter_name": "to_folder.__func__.__builtins__"}}]),
        ),
        refused(
            "an attribute of a tensor as a parameter",
            "holds 'parts.part-1.weight.T' inside a tensor",
            more_input({"parameter": {"parameter_name": "parts.part-1.weight.T"}}),
        ),
        refused("a size's name with code", 'holds "z=__import__', writes("as_name", f"z={CODE}")),
        refused("a keyword of Python as a name", "holds 'lambda'", writes("as_name", "lambda")),
        refused("the program as a name", "holds 'self'", writes("name", "self")),
        refused("an attribute as a name", "holds '__globals__'", writes("name", "__globals__")),
        refused(
            "an argument's name with code",
            "holds 'x=1'",
            first_node(inputs=[{"name": "x=1", "arg": {"as_int": 1}}]),
        ),
        refused(
            "an input that is code",
            "holds \"' + __import__",
            more_input({"user_input": {"arg": {"as_string": f"' + {CODE} + '"}}}),
        ),
        refused("a key with a space", "holds 'b c'", lambda program: tensors(program).update({"b c": {}})),
        refused("a text as a whole number", "holds 'text'", writes("as_int", "text")),
        refused("a text as a number", "holds '1'", writes("as_float", "1")),
        refused(
            "a quote in the version", 'holds "2.13\'"', lambda program: program.update(torch_version="2.13'")
        ),
        refused(
            "an output of a class of enums",
            CONTAINER,
            called_with(out_spec=spec("builtins.tuple", {"__enum__": True, "fqn": "this:d", "name": "x"})),
        ),
        refused(
            "an input of another class", CONTAINER, called_with(in_spec=spec("collections.defaultdict", {}))
        ),
        refused("an input's key with code", CONTAINER, called_with(in_spec=spec("builtins.dict", [CODE]))),
    ],
)
def test_a_program_that_makes_torch_run_other_code_is_refused_unread(change, said, exported, monkeypatch):
    monkeypatch.setattr(torch.export, "load", lambda *_, **__: pytest.fail("torch read it"))
    with pytest.raises(ModelError) as refusal:
        load_program(packed(changed(exported, MODEL, change)), "net.pt2")
    assert str(refusal.value).startswith(f"net.pt2: {said}")


def test_a_program_with_arithmetic_on_sizes_and_with_nested_graphs_is_loaded(exported):
    assert load_program(packed(exported), "net.pt2")(torch.rand(4, 3, 2, 2)).shape == (4, 3)


TUPLE = "size(['Tuple'][0]).args[0]"  # the class, as sympy reads its name


@pytest.mark.parametrize(
    "text",
    [
        f"{TUPLE}(['open'][0]).args[0](['stolen'][0], ['w'][0])",
        TUPLE,
        "Symbol('s0').args",
        "['a'][0]",
        "L['x'].size()[0]",
        "Symbol('os')",
        "Float('open')",
        "Max('s0', 2)",
        "Symbol('s0', cls=open)",
        "Max(*s0)",
        "0.2[3]",
        "(lambda: 1)()",
        "open(1)",
        "math.floor(2)",
        "s0 # 1",
    ],
)
def test_an_expression_of_a_size_is_nothing_but_arithmetic(text, exported, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # the first opens a file
    sizes = {"sizes": [{"as_expr": {"expr_str": text}}]}
    data = packed(changed(exported, MODEL, lambda program: tensors(program).update(more=sizes)))
    with pytest.raises(ModelError, match="which is more than arithmetic of sizes"):
        load_program(data, "net.pt2")


@pytest.mark.parametrize(
    "text",
    [
        "L['x'].storage()[0] > 1",
        "L['x'].size(0) > 1",
        "L['x'].size()[L] > 1",
        "L['a b/c'].size()[0] > 1",
        "L[input].size()[0] > 1",
        "torch.save(1)",
        "math.log(2)",
        "L.x > 1",
        "size.size()[0]",
        "'a'[0]",
    ],
)
def test_a_condition_of_the_inputs_is_nothing_but_arithmetic_of_their_sizes(text, exported):
    data = packed(changed(exported, MODEL, lambda program: program.update(guards_code=[text])))
    with pytest.raises(ModelError, match="which is more than arithmetic of sizes"):
        load_program(data, "net.pt2")


@pytest.mark.parametrize(
    "inputs",
    [
        (({"a\"+str(__import__('os').system('touch stolen'))+\"": torch.rand(2, 3, 2, 2)},), {}),
        (({(1, 2): torch.rand(2, 3, 2, 2)},), {}),
        ((OrderedDict(a=torch.rand(2, 3, 2, 2)),), {}),
        ((torch.Size([2]),), {}),
        (("a'b",), {}),
    ],
)
def test_sample_inputs_are_tensors_in_plain_containers_with_plain_keys(
    inputs, exported, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)  # the first makes a file when the network runs
    file = io.BytesIO()
    torch.save(inputs, file)
    with pytest.raises(ModelError, match="its sample inputs are more than tensors"):
        load_program(packed(exported | {INPUTS: file.getvalue()}), "net.pt2")


@pytest.mark.parametrize(
    "name",
    [
        "self",
        "SELF",
        "_operator",
        "-operator",
        "parts.__deepcopy__",
        "parts.class.weight",
        "meta.weight",
        "_guards_fn",
        "submod_1.weight",
        "parts.forward.weight",
        "parts.part-1.weight.register_hook",
    ],
)
def test_no_tensor_has_the_name_of_a_part_of_torchs_module_or_of_another_tensor(name, exported):
    def add(content: dict[str, Any]) -> None:
        content["config"][name] = content["config"]["parts.part-1.weight"]

    with pytest.raises(ModelError, match=f"holds '{name}'"):
        load_program(packed(changed(exported, WEIGHTS, add)), "net.pt2")


def test_a_program_without_sample_inputs_is_loaded(exported):
    assert load_program(packed(exported | {INPUTS: b""}), "net.pt2")(torch.rand(4, 3, 2, 2)).shape == (4, 3)


@pytest.mark.parametrize(
    "source",
    [
        "a,torch.ctypes.cdll./folder/library",
        "a,torchvision.ctypes.cdll./folder/library",
        "a,torch.relu;b,torch.ctypes.cdll.folder/library",
        "a,torch.nn.ctypes.cdll.library",
        "a,math.b.c",
        "a,#torch",
    ],
)
def test_no_node_names_a_source_whose_lookup_loads_a_library(source, exported):
    with pytest.raises(ModelError, match="holds 'a,"):
        load_program(
            packed(changed(exported, MODEL, first_node(metadata={"source_fn_stack": source}))), "net.pt2"
        )


def test_metadata_of_another_key_is_inspected_as_all_else(exported):
    with pytest.raises(ModelError, match="holds 'a b'"):
        load_program(packed(changed(exported, MODEL, first_node(metadata={"other": "a b"}))), "net.pt2")


def test_no_sample_input_has_attributes_that_hide_its_methods(exported):
    images, file = torch.rand(2, 3, 2, 2), io.BytesIO()
    images.to = Counter  # type: ignore[method-assign,assignment]
    torch.save(((images,), {}), file)
    with pytest.raises(ModelError, match="its sample inputs"):
        load_program(packed(exported | {INPUTS: file.getvalue()}), "net.pt2")


def test_no_text_takes_its_line_out_of_the_code(exported):
    text = [{"name": "approximate", "arg": {"as_string": "# COUNTER: 1"}, "kind": 2}]
    change = first_node(target="torch.ops.aten.gelu.default", inputs=text)
    with pytest.raises(ModelError, match="holds '# COUNTER: 1'"):
        load_program(packed(changed(exported, MODEL, change)), "net.pt2")
