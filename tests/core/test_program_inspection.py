"""Programs of torch.export that could do more than compute with tensors are refused; ordinary ones are loaded."""

from __future__ import annotations

import io
import json
import zipfile
from collections import OrderedDict
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


def node(program: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = program["graph_module"]["graph"]["nodes"][0]
    return found


def wrapper(program: dict[str, Any]) -> dict[str, Any]:
    """Return the node whose graph is computed without gradients."""
    nodes: list[dict[str, Any]] = program["graph_module"]["graph"]["nodes"]
    return next(each for each in nodes if each["target"].endswith("wrap_with_set_grad_enabled"))


def tensors(program: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = program["graph_module"]["graph"]["tensor_values"]
    return found


def signature(program: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the inputs, of which torch writes values into code."""
    found: list[dict[str, Any]] = program["graph_module"]["signature"]["input_specs"]
    return found


def spec(kind: str, context: object) -> str:
    return json.dumps([1, {"type": kind, "context": json.dumps(context), "children_spec": []}])


def call(program: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = program["graph_module"]["module_call_graph"][0]["signature"]
    return found


CODE = "__import__('os').system('id')"
# of a program: what would make torch run other code, at the latest when the network runs
CHANGES: dict[str, Callable[[dict[str, Any]], object]] = {
    "calls torch.os.system": lambda program: node(program).update(target="torch.os.system"),
    "holds a function as a value": lambda program: node(program).update(
        inputs=[{"arg": {"as_operator": "torch.ops.image.write_file.default"}}]
    ),
    "calls torch.ops.aten.save": lambda program: node(program).update(target="torch.ops.aten.save.default"),
    "calls torch.ops.aten.__dir__": lambda program: node(program).update(
        target="torch.ops.aten.__dir__.__call__"
    ),
    'holds the expression "__import__': lambda program: tensors(program).update(
        metadata={"sizes": [{"as_expr": {"expr_str": CODE}}]}
    ),
    "holds the expression 'ｏ": lambda program: program.update(guards_code=["ｏｐｅｎ(1)"]),
    "holds 'a\"": lambda program: node(program).update(
        inputs=[{"parameter": {"parameter_name": 'a"' + CODE}}]
    ),
    'holds "z=': lambda program: node(program).update(outputs=[{"as_sym_int": {"as_name": f"z={CODE}"}}]),
    "holds \"' \\+": lambda program: signature(program).append(
        {"user_input": {"arg": {"as_string": f"' + {CODE} + '"}}}
    ),
    "holds a function": lambda program: node(program).update(
        inputs=[{"arg": {"as_graph": {"name": "backward"}}}]
    ),
    "holds 'self'": lambda program: node(program).update(outputs=[{"as_tensor": {"name": "self"}}]),
    "holds '__globals__'": lambda program: node(program).update(
        outputs=[{"as_tensor": {"name": "__globals__"}}]
    ),
    "gives _operator.getitem a text": lambda program: node(program).update(
        target="_operator.getitem", inputs=[{"arg": {"as_string": "os"}}]
    ),
    "holds 'to_folder": lambda program: node(program).update(
        inputs=[{"parameter": {"parameter_name": "to_folder.__func__.__builtins__"}}]
    ),
    "gives torch.ops.higher_order.wrap": lambda program: wrapper(program)["inputs"].append(
        {"name": "", "arg": {"as_string": "os"}, "kind": 1}
    ),
    "holds a function as": lambda program: wrapper(program)["inputs"][1].update(kind=2),
    "a function as a value": lambda program: wrapper(program)["inputs"][1]["arg"]["as_graph"].update(
        name="to_folder"
    ),
    "holds 'b c'": lambda program: tensors(program).update({"b c": {}}),
    "holds 'text'": lambda program: node(program).update(inputs=[{"arg": {"as_int": "text"}}]),
    "holds 'x=1'": lambda program: node(program).update(inputs=[{"name": "x=1", "arg": {"as_int": 1}}]),
    "holds a function as a": lambda program: wrapper(program)["inputs"][1]["arg"]["as_graph"].update(
        name="numpy"
    ),
    "more than tensors in tuples": lambda program: call(program).update(
        out_spec=spec("builtins.tuple", {"__enum__": True, "fqn": "this:d", "name": "x"})
    ),
    "more than tensors in": lambda program: call(program).update(in_spec=spec("collections.defaultdict", {})),
    "its inputs or outputs are more": lambda program: call(program).update(
        in_spec=spec("builtins.dict", [CODE])
    ),
}


@pytest.mark.parametrize("said", CHANGES)
def test_a_program_that_makes_torch_run_other_code_is_refused_unread(said, exported, monkeypatch):
    monkeypatch.setattr(torch.export, "load", lambda *_, **__: pytest.fail("torch read it"))
    with pytest.raises(ModelError, match=f"net\\.pt2: .*{said}"):
        load_program(packed(changed(exported, MODEL, CHANGES[said])), "net.pt2")


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
    with pytest.raises(ModelError, match="which is more than sizes"):
        load_program(data, "net.pt2")


@pytest.mark.parametrize(
    "text",
    [
        "L['x'].storage()[0] > 1",
        "L['x'].size(0) > 1",
        "L['x'].size()[L] > 1",
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
    with pytest.raises(ModelError, match="which is more than sizes"):
        load_program(data, "net.pt2")


@pytest.mark.parametrize(
    "inputs",
    [
        (({"a\"+str(__import__('os').system('touch stolen'))+\"": torch.rand(2, 3, 2, 2)},), {}),
        (({(1, 2): torch.rand(2, 3, 2, 2)},), {}),
        ((OrderedDict(a=torch.rand(2, 3, 2, 2)),), {}),
        ((torch.Size([2]),), {}),
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


class WithNames(nn.Module):
    """Has a layer inside another whose name is that of an attribute of programs, and names with spaces."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.ModuleDict({"graph": nn.Linear(12, 3), "head a": nn.Linear(3, 3)})

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"all scores": self.encoder["head a"](self.encoder["graph"](images.flatten(1)))}


class WithFractions(nn.Module):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        half = nn.functional.interpolate(images, scale_factor=0.5, mode="bilinear")
        return half.mean((2, 3)) / images.shape[0] ** 0.5


class WithWindows(nn.Module):
    """Pads images to windows of 8 pixels, as Swin does."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        height, width = images.shape[2:]
        padded = nn.functional.pad(images, (0, (8 - width % 8) % 8, 0, (8 - height % 8) % 8))
        count, channels, height, width = padded.shape
        windows = padded.view(count, channels, height // 8, 8, width // 8, 8).permute(0, 2, 4, 1, 3, 5)
        means = windows.reshape(-1, channels, 8, 8).mean((2, 3))
        return means.view(count, -1, channels).mean(1)


class WithChoice(nn.Module):
    """Has sizes that depend on the values of images."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        means = images.mean((2, 3))
        bright = (means[:, 0] > 0).nonzero()[:, 0]
        torch._check(bright.shape[0] >= 1)
        return means + means.index_select(0, bright).sum(0)


@pytest.mark.parametrize("make", [WithNames, WithFractions, WithWindows, WithChoice])
def test_programs_with_names_sizes_and_conditions_of_many_kinds_are_loaded(make):
    images, auto = torch.rand(2, 3, 16, 16), torch.export.Dim.AUTO
    sizes = {0: torch.export.Dim("batch")} | ({} if make is WithNames else {2: auto, 3: auto})
    net = make().eval()
    if make is WithNames:
        images = images[..., :2, :2]
    program = torch.export.export(net, (images,), dynamic_shapes=(sizes,))
    loaded = load_program(packed(entries_of(program)), "net.pt2")(images)
    torch.testing.assert_close(loaded, net(images))


def test_a_program_without_sample_inputs_is_loaded(exported):
    assert load_program(packed(exported | {INPUTS: b""}), "net.pt2")(torch.rand(4, 3, 2, 2)).shape == (4, 3)
