"""Files of TorchScript and torch.export that could do more than compute are refused; ordinary ones are loaded."""

from __future__ import annotations

import io
import json
import struct
import zipfile
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from defuse_core.errors import ModelError
from defuse_core.models.inspection import FILE_OPERATORS
from defuse_core.models.programs import load_program

CALL = 'torch.save(images, "stolen.pt")'


class Writes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(12, 3)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        torch.save(images, "stolen.pt")
        logits: torch.Tensor = self.layer(images.flatten(1))
        return logits


class WithOps(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.ops = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.ops(images)
        return logits


def scripted(net: nn.Module) -> bytes:
    file = io.BytesIO()
    torch.jit.save(torch.jit.script(net.eval()), file)
    return file.getvalue()


def rewritten(old: str, new: str) -> list[tuple[str, bytes]]:
    """Return the entries of the scripted Writes, `old` replaced in its code."""
    source = zipfile.ZipFile(io.BytesIO(scripted(Writes())))
    entries = {name: source.read(name) for name in source.namelist()}
    code = next(name for name, text in entries.items() if name.endswith(".py") and old.encode() in text)
    entries[code] = entries[code].replace(old.encode(), new.encode())
    return list(entries.items())


def packed(entries: list[tuple[str, bytes]]) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, data in entries:
            archive.writestr(name, data)
    return file.getvalue()


def two_directories(shown: list[tuple[str, bytes]], read: list[tuple[str, bytes]]) -> bytes:
    """Return a zip file in which Python finds the entries `shown`, and torch `read`."""
    first, second = packed(read), packed(shown)
    data = bytearray(first[:-22] + second)
    (at,) = struct.unpack_from("<I", first, len(first) - 6)  # where the directory of `read` is
    struct.pack_into("<I", data, len(data) - 6, at)
    return bytes(data)


@pytest.mark.parametrize(
    "call",
    [
        CALL,
        'torch .save(images, "stolen.pt")',
        'torch. save(images, "stolen.pt")',
        'torch.\\\n      save(images, "stolen.pt")',
        'torch. # a comment\n      save(images, "stolen.pt")',
        '(torch.save)(images, "stolen.pt")',
        'getattr(torch, "save")(images, "stolen.pt")',
        'getattr(torch, "sa" "ve")(images, "stolen.pt")',
        'getattr(torch, "\\163ave")(images, "stolen.pt")',
        'images.save("stolen.pt")',
        'ops.aten.save(images, "stolen.pt")',
        'ops .aten.save(images, "stolen.pt")',
        '"stolen.pt".from_file(True, 4)',
        'getattr(ops, "quantized").linear(images)',
        "other = ops",
        "ops.prim.PythonOp(images)",
        "ops.prim.rpc_sync(images)",
        '__torch__.torch.classes.profiling._RecordFunction("stolen.pt")',
        "other = __torch__.torch",
        'other = getattr(__torch__.torch, "classes")',
        'if isinstance(images, int):\n      ...\n    ops.image.write_file("stolen.pt", images)',
        'other : Optional["torch.classes.quantized.X"] = None',
        "other : Optional[torch.classes.quantized.X] = None",
        'other : Optional["torch .\\nclasses.quantized.X"] = None',
        "other = (__torch__)",
    ],
)
def test_torchscript_that_could_touch_files_is_refused_unread(call, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.jit, "load", lambda *_, **__: pytest.fail("torch read it"))
    with pytest.raises(ModelError, match=r"net\.pt: its code (uses|holds) .*, so it is not loaded"):
        load_program(packed(rewritten(CALL, call)), "net.pt")


def test_default_values_of_torchscript_which_run_at_loading_are_inspected_too():
    entries = rewritten(
        "images: Tensor)", 'images: Tensor,\n    more: Tensor=torch.from_file("stolen.pt", True, 4))'
    )
    with pytest.raises(ModelError, match="its code uses from_file"):
        load_program(packed(entries), "net.pt")


@pytest.mark.parametrize(
    "added",
    [
        b"c__torch__.torch.classes.quantized\nX\n",
        b"c__torch__.torch .classes.quantized\nX\n",
        b"c__torch__.torch.\nclasses.X\n",
        b'c"torch\\056classes.aten\nOpaqueObject"\n',
        b'c"tor" "ch.classes.aten\nOpaqueObject"\n',
        b"X\x16\x00\x00\x00torch.classes.aten.X.Y",
        b'ctorch.jit._pickle\nrestore_type_tag\nX\x0e\x00\x00\x00"tor" "ch.cla"',
        b"i__torch__\nX\n",
    ],
)
def test_a_class_of_torchs_library_in_the_pickle_alone_is_refused(added, monkeypatch):
    monkeypatch.setattr(torch.jit, "load", lambda *_, **__: pytest.fail("torch read it"))
    entries = [
        (entry, data[:2] + added + data[2:] if entry.endswith("data.pkl") else data)
        for entry, data in rewritten(CALL, "None")
    ]
    with pytest.raises(ModelError, match=r"net\.pt: archive|net\.pt: data\.pkl( holds INST|: its code uses)"):
        load_program(packed(entries), "net.pt")


def test_a_layer_may_be_called_ops():
    load_program(scripted(WithOps()), "net.pt")


def test_archives_that_can_be_read_in_two_ways_are_refused():
    harmful, harmless = rewritten(CALL, CALL), rewritten(CALL, "None")
    code = next(name for name, data in harmful if CALL.encode() in data)
    other = f"other/{code.partition('/')[2]}", b""
    for data in (two_directories(harmless, harmful), packed([*harmful, other])):
        with pytest.raises(ModelError, match=r"net\.pt: .*(uses save|torch cannot read)"):
            load_program(data, "net.pt")
    with pytest.raises(ModelError, match="zip archive are ambiguous"):
        load_program(packed([*harmless, (code.replace(".py", ".PY"), b"")]), "net.pt")
    shown, read = ([*harmless, (f"archive/extra/{name}", b"")] for name in "xy")
    with pytest.raises(ModelError, match="zip archive are ambiguous"):
        load_program(two_directories(shown, read), "net.pt")
    polyglot = packed(harmless)
    with pytest.raises(ModelError, match="zip archive are ambiguous"):
        load_program(polyglot[:4] + b"PTMF" + polyglot[8:], "net.pt")
    with pytest.raises(ModelError, match=r"holds model\.json"):
        load_program(packed([*harmless, ("archive/model.json", b"{}")]), "net.pt")


def test_save_and_from_file_are_the_only_operators_of_torch_that_take_a_files_name():
    found = {
        schema.name
        for schema in torch._C._jit_get_all_schemas()
        for argument in schema.arguments
        if "str" in str(argument.type)
        and any(word in argument.name for word in ("file", "path", "dir", "url"))
    }
    assert {name for name in found if name.startswith(("aten::", "prim::"))} == {
        f"aten::{name}" for name in FILE_OPERATORS
    }


@pytest.mark.parametrize(
    "name", ["mobilenet_v3_small", "convnext_tiny"]
)  # their code has types of torchvision.ops
def test_torchscript_of_torchvisions_networks_is_loaded(name):
    torchvision = pytest.importorskip("torchvision")
    net = getattr(torchvision.models, name)(num_classes=3).eval()
    load_program(scripted(net), "net.pt")


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


@pytest.fixture(scope="module")
def exported() -> list[tuple[str, bytes]]:
    """The entries of a program whose sizes have arithmetic, and parts of another precision or without gradients."""
    batch, file = torch.export.Dim("batch"), io.BytesIO()
    torch.export.save(
        torch.export.export(Resized().eval(), (torch.rand(2, 3, 2, 2),), dynamic_shapes=({0: batch},)), file
    )
    source = zipfile.ZipFile(file)
    return [(name, source.read(name)) for name in source.namelist()]


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
    "holds \"' \\+": lambda program: node(program).update(inputs=[{"as_string": f"' + {CODE} + '"}]),
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
    entries = dict(exported)
    file = next(name for name in entries if name.endswith("models/model.json"))
    program = json.loads(entries[file])
    CHANGES[said](program)
    entries[file] = json.dumps(program).encode()
    with pytest.raises(ModelError, match=f"net\\.pt2: .*{said}"):
        load_program(packed(list(entries.items())), "net.pt2")


def test_a_program_with_arithmetic_on_sizes_and_with_nested_graphs_is_loaded(exported):
    assert load_program(packed(exported), "net.pt2")(torch.rand(4, 3, 2, 2)).shape == (4, 3)
