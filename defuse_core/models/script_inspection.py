"""Inspect the code and the pickles of a TorchScript file as text before torch reads them, and refuse the unknown.

`torch.jit.load` never uses Python's pickle: its C++ reader builds TorchScript types and registered C++ classes
(`torch.classes`), and the code of the archive is compiled for TorchScript's own interpreter. Loading already runs some
of that code: the default values of parameters, and `__setstate__`. TorchScript calls operators only by names in its
code, or by a literal in `getattr`; `operators` has those that are known.
"""

from __future__ import annotations

import pickletools
import re
from typing import Any

import torch

from defuse_core.errors import ModelError
from defuse_core.models.operators import WITHOUT_OPERATOR, WRITTEN, is_harmless_operator

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
    r"RaiseException|NumToTensor|device|dtype|layout|type|name|requires_grad|is_[a-z_]+|itemsize|nbytes|abs|max"
    r"|min|rangelist|tolist|unchecked_unwrap_optional|EnumName|EnumValue|StringIndex|TupleIndex|id"
)
OPERATIONS_OF_PICKLES = re.compile(
    r"PROTO|GLOBAL|EMPTY_(TUPLE|LIST|DICT)|MARK|SETITEMS?|APPENDS?|TUPLE[123]?|REDUCE|BUILD|NEWOBJ|(LONG_)?BIN(PUT|GET)"
    r"|BININT[12]?|LONG1|BINFLOAT|BINUNICODE|NEW(TRUE|FALSE)|NONE|BINPERSID|STOP"
)
CLASS_IN_PICKLE = re.compile(  # module and name; no tensors that are sparse or quantized
    r"__torch__(\.\w+)* \w+|builtins complex|collections OrderedDict|torch (device|(?!Q)\w+Storage)"
    r"|torch\._utils _rebuild_tensor_v2|torch\.jit\._pickle \w+",
    re.ASCII,
)
CUSTOM_CLASS = re.compile(r"torch\W*classes", re.ASCII)  # as text; torch drops spaces and lines between names
COMMENT = re.compile(r"#.*")  # torch drops it, too
# torch's readers recurse, and end the process where they run out of stack. Networks have some 30 in a statement.
MOST_NESTED = 1000
NESTING = re.compile(r"[(\[{.=<>+*/%@!&|^~-]|if|else|not|and|or|in|is")
BRACKETS = {"(": 1, "[": 1, "{": 1, ")": -1, "]": -1, "}": -1}  # change of the level
DEEP_BLOCK = re.compile(r"\n {200}")
MOST_CONTAINERS = 100_000
CONTAINER = re.compile(r"TUPLE[123]?|EMPTY_\w+|NEWOBJ|REDUCE|BUILD")


def expect_harmless_script(reader: Any, names: list[str], where: str) -> None:
    """Raise ModelError for anything in a TorchScript file that could touch files, or that is not understood."""
    for name in names:
        if not FILES_OF_SCRIPT.fullmatch(name):
            raise ModelError(f"{where}: holds {name}, which torch.jit.save does not write; save it again")
        if name.endswith("pkl"):
            _expect_harmless_pickle(reader.get_record(name), f"{where}: {name}")
        if name in ("data.pkl", "constants.pkl"):
            _expect_own_storages(reader, name, where)
        if name.endswith(".py"):
            _expect_harmless_code(reader.get_record(name).decode("latin-1"), where)


def _expect_harmless_pickle(data: bytes, where: str) -> None:
    """Raise ModelError for a pickle, which C++ reads, with a class of C++, or a name that is not a plain one.

    C++ parses the names of classes, and the texts that restore_type_tag gets, as TorchScript: quotes, escapes,
    comments and spaces in them could hide a class.
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
        if CUSTOM_CLASS.search(text) or CUSTOM_CLASS.search(COMMENT.sub("", text)):
            raise _refusal(where, text[:80])
        if has_types and (set(text) & set("\"'\\") or _nesting(text) > MOST_NESTED):
            raise ModelError(
                f"{where} holds the text {text[:80]!r}: beside an attribute that is a list or dictionary, no text may "
                "have quotes, backslashes or many brackets, which could hide a class of C++; remove them, such as from "
                "the names of classes, or export the network with torch.export.save"
            )


def _expect_own_storages(reader: Any, name: str, where: str) -> None:
    """Raise ModelError where a storage is not as long as its record, which torch does not compare, or too deep a tree.

    torch writes a storage as the tuple ("storage", its type, the record's name, a device, its number of elements).
    """
    memo, operations, containers = dict[Any, Any](), list[tuple[str, Any]](), 0
    for operation, found, _ in pickletools.genops(reader.get_record(name)):
        if operation.name in ("BINPUT", "LONG_BINPUT"):
            memo[found] = operations[-1][1]
            continue
        value = memo.get(found) if operation.name.endswith("BINGET") else found
        operations.append((operation.name, value))
        containers += bool(CONTAINER.fullmatch(operation.name))
        if operation.name == "BINPERSID":
            (mark, *_), *texts, (_, count), (end, _), _ = operations[-8:]
            first, kind, record, device = (text for _, text in texts)
            if (mark, first, end) != ("MARK", "storage", "TUPLE") or None in (kind, record, device, count):
                raise ModelError(
                    f"{where}: {name} has a storage as torch does not write it; save the network again"
                )
            dtype = torch.storage._storage_type_to_dtype_map()[kind.removeprefix("torch ")]
            size = len(reader.get_record(f"{name.removesuffix('.pkl')}/{record}"))
            if count * dtype.itemsize != size:
                raise ModelError(
                    f"{where}: {name} has {count} elements of {dtype} in the record {record}, which has {size} "
                    "bytes; save the network again"
                )
    if containers > MOST_CONTAINERS:
        raise ModelError(
            f"{where}: {name} has {containers} tuples, lists and objects, expected at most {MOST_CONTAINERS}; export "
            "the network with torch.export.save"
        )


def _nesting(code: str) -> int:
    """Return the most operators, dots and opened brackets of one statement; a minus in a list of numbers is none."""
    most = count = level = 0
    last = ""
    for match in TOKENS.finditer(code):
        token = match[0]
        if match["space"]:
            count = 0 if "\n" in token and not level else count
            continue
        level += BRACKETS.get(token, 0)
        count += bool(NESTING.fullmatch(token)) and (last, token) != (",", "-")
        most, last = max(most, count), token
    return most


def _expect_harmless_code(code: str, where: str) -> None:
    """Raise ModelError for TorchScript code that does not split into tokens, or has a name that is not allowed."""
    if _nesting(code) > MOST_NESTED or DEEP_BLOCK.search(code):
        raise ModelError(
            f"{where}: its code is nested more deeply than that of networks, and torch could run out of stack; save "
            "the network with shorter statements"
        )
    found = [match for match in TOKENS.finditer(code) if not match["space"]]
    tokens = [match[0] for match in found]
    level = 0  # of brackets
    for at, (match, token) in enumerate(zip(found, tokens, strict=True)):
        level += BRACKETS.get(token, 0)
        after = tokens[at + 1 : at + 5]
        if match["unknown"] or token == "elif" or (match["text"] and at and found[at - 1]["text"]):
            raise ModelError(
                f"{where}: its code holds {token[:40]!r}, which torch.jit.save does not write, so it is not loaded; "
                "save it again, with names of layers in letters from a to z"
            )
        is_class = (token == "classes" and tokens[max(at - 2, 0) : at] == ["torch", "."]) or (
            match["text"] and CUSTOM_CLASS.search(re.sub(r"\\.", " ", token))
        )
        name, follows_dot = token.strip("\"'"), tokens[at - 1 : at] == ["."]
        if (match["text"] or follows_dot) and not is_harmless_operator(name):
            raise ModelError(
                f"{where}: its code uses {name}, which is none of the operators that a classifier may use, so it is "
                f"not loaded; rename a layer, attribute or text of that name, {WITHOUT_OPERATOR}"
            )
        if is_class or name == "__setstate__":
            raise _refusal(where, token)
        is_argument = tokens[at - 1 : at] in (["("], [","]) and after[:1] == ["="]  # or, at level 0, a result
        is_strided = after[1:2] in (["0"], ["None"]) and after[2:3] in ([")"], [","])
        if is_argument and token == "layout" and not is_strided:
            raise _refusal(where, "".join([token, *after[:2]]))
        of_div = tokens[at - 7 : at - 4] == [".", "div", "("] and tokens[at - 3 : at : 2] == [",", ","]
        if is_argument and level and token in WRITTEN and not of_div:
            raise _refusal(where, f"{token}=")
        is_field = follows_dot or after[:1] == [":"]
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
        f"{where}: its code uses {found}, which can touch files, write outside of tensors or run at loading, so it is "
        "not loaded; rename a layer or attribute of that name, save it without sparse or quantized tensors and without "
        "torch.jit.optimize_for_inference, or use architecture: custom"
    )
