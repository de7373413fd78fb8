"""Files of TorchScript that could do more than compute with tensors are refused; ordinary ones are loaded."""

from __future__ import annotations

import io
import re
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable

import pytest
import torch
from torch import nn

from defuse_core.errors import ModelError
from defuse_core.models.operators import KNOWN_OPERATORS
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
        "self.__setstate__(images)",
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
        "other = torch.sparse_coo_tensor(images, images, [64])",
        "other = torch._sparse_coo_tensor_unsafe(images, images, [64])",
        'other = getattr(images, "_indices")()',
        "other = torch._reshape_alias(images, [4000000], [1])",
        'other = torch.segment_reduce(images, "sum", unsafe=True)',
        "other = torch.max_pool2d_with_indices_backward(images, images, [2], [2], [0], [1], False, images)",
        "other = torch.replication_pad3d(images, [1, 1, 1, 1, 1, 1], out=images)",
        "other = torch.topk(images, 1, values=images, indices=images)",
        "other = torch.div(torch.cumsum(out=images, images, 0), 1)",
        "if True:\n      pass\n    elif True:\n      pass",
        "other = torch.empty([3, 4], layout=2)",
        "other = torch.empty([3, 4], layout=0 + 2)",
    ],
)
def test_torchscript_that_could_touch_files_is_refused_unread(call, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.jit, "load", lambda *_, **__: pytest.fail("torch read it"))
    with pytest.raises(ModelError, match=r"net\.pt: its code (uses|holds) .*, so it is not loaded"):
        load_program(packed(rewritten(CALL, call)), "net.pt")


@pytest.mark.parametrize(
    "operator",
    [  # which crashed with tensors of other sizes than they expect, or with tensors that hold pointers
        "_batch_norm_no_update", "_batch_norm_with_update", "_native_batch_norm_legit",
        "_native_batch_norm_legit_no_training", "_transform_bias_rescale_qkv", "_weight_norm",
        "_weight_norm_interface", "batch_norm_update_stats", "fbgemm_pack_gemm_matrix_fp16",
        "fbgemm_pack_quantized_matrix", "fused_moving_avg_obs_fake_quant", "grad", "gru",
        "lstm", "mkldnn_rnn_layer", "native_batch_norm", "rnn_tanh", "slow_conv3d_forward", "slow_conv_transpose2d",
        "_upsample_bilinear2d_aa",
    ],
)  # fmt: skip
def test_operators_that_trust_their_arguments_are_refused_by_name(operator):
    with pytest.raises(
        ModelError, match=rf"its code uses {operator}, which is none .*rename .*remove_parametrizations"
    ):
        load_program(packed(rewritten(CALL, f"torch.{operator}(images)")), "net.pt")


class NamesResults(nn.Module):
    """Gives results the names of arguments that operators write into, and texts those of other operators."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 3, 3, padding="same")
        self.mode = "center"

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        values, indices = torch.topk(self.conv(images).flatten(1), 5)
        _, out = torch.max(values, dim=1)
        mask = values > 0
        mask |= values > out[:, None]
        found = values * mask.to(values.dtype) + indices
        return nn.functional.normalize(found) if self.mode == "center" else found


@pytest.mark.parametrize("kind", ["scripted", "traced"])
def test_results_may_have_the_names_of_arguments_that_are_written_into(kind):
    net, images = NamesResults().eval(), torch.rand(2, 1, 8, 8)
    made = torch.jit.script(net) if kind == "scripted" else torch.jit.trace(net, images)
    buffer = io.BytesIO()
    torch.jit.save(made, buffer)
    torch.testing.assert_close(load_program(buffer.getvalue(), "net.pt")(images), net(images))


@pytest.mark.parametrize(
    "nested",
    [
        f"{'(' * 5000}1{')' * 5000}",
        "-" * 200_000 + "1",
        f"x{'.x' * 200_000}",
        f"[{'-1, ' * 5000}{'(-' * 2000}",
        f"1\n{' ' * 200}y = 1",
    ],
)
def test_code_on_which_torchs_parser_would_run_out_of_stack_is_refused(nested, tmp_path):
    (tmp_path / "net.pt").write_bytes(packed(rewritten(CALL, f"x = {nested}")))
    read = "from defuse_core.models.programs import load_program as load; load(open('net.pt', 'rb').read(), 'net.pt')"
    done = subprocess.run(
        [sys.executable, "-c", read], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.stderr.splitlines()[-1].startswith(
        "defuse_core.errors.ModelError: net.pt: its code is nested more deeply"
    )


def with_pickle(name: str, change: Callable[[bytes], bytes]) -> bytes:
    """Return the scripted Writes without its call, a pickle in it changed."""
    entries = rewritten(CALL, "None")
    return packed([(entry, change(data) if entry.endswith(name) else data) for entry, data in entries])


def test_a_pickle_on_which_torchs_reader_would_run_out_of_stack_is_refused():
    data = with_pickle("constants.pkl", lambda _: b"\x80\x02)" + b"\x85" * 200_000 + b".")
    with pytest.raises(ModelError, match=r"constants\.pkl has 200001 tuples, lists and objects"):
        load_program(data, "net.pt")


COUNT = b"K\x24tQ"  # of the elements of the layer's weight


@pytest.mark.parametrize(
    ("states", "said"),
    [
        (
            b"J\x40\x42\x0f\x00tQ",
            "has 1000000 elements of torch.float32 in the record 0, which has 144 bytes",
        ),
        (b"K\x24tq\x7f0h\x7fQ", "holds POP"),
        (b"K\x24tq\x7fh\x7fQ", "has a storage as torch does not write it"),
    ],
)
def test_a_storage_is_as_long_as_its_record(states, said):
    with pytest.raises(ModelError, match=rf"data\.pkl {re.escape(said)}"):
        load_program(with_pickle("data.pkl", lambda data: data.replace(COUNT, states)), "net.pt")


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
        b"X\x2e\x00\x00\x00Dict[str, torch #x\n.classes.aten.OpaqueObject]",
        b"i__torch__\nX\n",
        b"ctorch._utils\n_rebuild_sparse_tensor\n",  # which does not check the indices
        b"ctorch\nQInt8Storage\n",
    ],
)
def test_a_class_of_torchs_library_in_the_pickle_alone_is_refused(added, monkeypatch):
    monkeypatch.setattr(torch.jit, "load", lambda *_, **__: pytest.fail("torch read it"))
    entries = [
        (entry, data[:2] + added + data[2:] if entry.endswith("data.pkl") else data)
        for entry, data in rewritten(CALL, "None")
    ]
    with pytest.raises(
        ModelError, match=r"net\.pt: archive|net\.pt: data\.pkl( holds (INST|the text)|: its code uses)"
    ):
        load_program(packed(entries), "net.pt")


class WithHarmlessNames(nn.Module):
    """Has a layer named as some refused operators are, and makes dense tensors of the usual layout."""

    def __init__(self) -> None:
        super().__init__()
        self.fc_backward = nn.Linear(4, 4)
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(4, 2, 4, batch_first=True), 1)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        _indices = torch.zeros(3, dtype=torch.long, layout=torch.strided)
        logits: torch.Tensor = self.fc_backward(self.encoder(images.mean(2)))
        return nn.functional.embedding(_indices, logits[0], sparse=False) + logits.sum((0, 1))


def test_a_name_like_that_of_a_refused_operator_is_no_operator():
    net, images = WithHarmlessNames().eval(), torch.rand(2, 2, 3, 4)
    torch.testing.assert_close(load_program(scripted(net), "net.pt")(images), net(images))


class WithClassNames(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.names = ["cat's eye", "disc"]

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images * len(self.names)


def test_a_text_with_quotes_beside_a_list_of_texts_is_named_in_the_message():
    with pytest.raises(
        ModelError, match=r'holds the text "cat\'s eye".*no text may have quotes, backslashes or'
    ):
        load_program(scripted(WithClassNames()), "net.pt")


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
        "aten::save",
        "aten::from_file",
    }
    assert not {"save", "from_file"} & KNOWN_OPERATORS


@pytest.mark.parametrize(
    "name", ["mobilenet_v3_small", "convnext_tiny"]
)  # their code has types of torchvision.ops
def test_torchscript_of_torchvisions_networks_is_loaded(name):
    torchvision = pytest.importorskip("torchvision")
    net = getattr(torchvision.models, name)(num_classes=3).eval()
    load_program(scripted(net), "net.pt")
