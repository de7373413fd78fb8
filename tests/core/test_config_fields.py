"""What is said of a run file's fields: their values, what is wrong with one, and which of them differ."""

from __future__ import annotations

import pytest
import yaml

from defuse_core.config import (
    RunFile,
    added_lambdas,
    changed_field,
    dump_run_file,
    load_run_file,
    parse_run_file,
)
from defuse_core.config.loading import FieldDescription, describe_fields, flat_fields
from defuse_core.errors import InputError, RunFileError
from tests.conftest import TINY, tiny


@pytest.fixture(scope="module")
def described() -> dict[str, FieldDescription]:
    return {field.name: field for field in describe_fields()}


@pytest.mark.parametrize(
    ("name", "values", "default"),
    [
        ("seed", "integer ≥ 0, < 2147483648", "0"),
        ("data.name", "digits | mnist | mnist-5000 | signs | svhn | folder | npz", "required"),
        ("data.root", "path | null", "null"),
        ("data.download", "true or false", "false"),
        ("classifier.import_path", "text | null", "null"),
        ("classifier.class_order", "list of integers | null", "null"),
        ("classifier.learning_rate", "number ≥ 1e-09", "1"),
        ("review.tau", "number ≥ 1e-06, ≤ 100 | auto", "auto"),
        ("review.reference.min_confidence", "number ≥ 0, ≤ 1", "0.5"),
        ("correct.lambdas", "list of numbers, at least one", "[0.01, 0.1, 1, 10]"),
        ("correct.augment", "true or false", "true"),
        ("correct.stop_at_loss", "number > 0, ≤ 1 | null", "null"),
        ("resources.gpus_per_worker", "number ≥ 0, ≤ 1024 | auto", "auto"),
        (
            "resources.precision",
            "auto | f32 | bf16 | {classifier, vae, reference, judges, answers}",
            "f32",
        ),
        ("serve.max_pixels", "integer ≥ 1", "16000000"),
    ],
)
def test_values_and_defaults_are_told_as_people_read_them(described, name, values, default):
    assert (described[name].values, described[name].default) == (values, default)


def test_a_meaning_is_one_line_of_single_spaces(described):
    assert described["correct.stop_at_loss"].meaning.startswith(
        "A λ is given up after an epoch that lost more clean accuracy than this, at least max_loss; what it "
        "reached until then may still be chosen"
    )
    assert all(field.meaning == " ".join(field.meaning.split()) for field in described.values())


def test_one_field_or_section_is_described_alone_and_a_part_of_a_name_is_none():
    assert [field.name for field in describe_fields("vae.beta")] == ["vae.beta"]
    nested = describe_fields("review.reference")
    assert nested and all(field.name.startswith("review.reference.") for field in nested)
    with pytest.raises(InputError, match=r"fields re: .*; the run file has seed, data, classifier, vae"):
        describe_fields("re")
    with pytest.raises(InputError, match=r"fields vae.bet: .*; did you mean vae.beta\?"):
        describe_fields("vae.bet")
    with pytest.raises(InputError, match=r"fields vae.nothing: .*; vae has architecture, .*, beta, "):
        describe_fields("vae.nothing")
    with pytest.raises(InputError, match=r"fields VAE.beta: .*; did you mean vae.beta\?"):
        describe_fields("VAE.beta")


def test_each_field_of_a_section_that_is_a_choice_is_described(described):
    spec = tiny(resources={"precision": {}})
    names = flat_fields(spec.model_dump(mode="json"))
    assert "resources.precision.vae" in names
    assert all(described[name].meaning for name in names)


def test_a_name_below_a_field_is_answered_with_what_its_section_has(described):
    for name in described:
        with pytest.raises(InputError, match=rf"fields {name}.x: no such section or field; "):
            describe_fields(f"{name}.x")


@pytest.mark.parametrize(
    ("fields", "begin", "end"),
    [
        ({"review": {"rho": 2}, "serve": {"max_errors": 3}}, "review.rho: ", ", found 2 (and 1 more)"),
        ({"review": {"rho": 2}}, "review.rho: expected less than 1, ", "found 2"),
        ({"identify": {"drawz": 1}}, "identify.drawz: ", "unknown field; did you mean identify.draws?"),
        ({"resources": {"workers": 0}}, "resources.workers: ", "or equal to 1 or 'auto', found 0"),
        ({"data": {"image_size": 20}}, "vae.hidden = 64 must be ", "vae.decoder_stages = 2 times)"),
        (
            {"data": {"track_pattern": "(["}},
            "data.track_pattern: expected a regular expression, found",
            "position 1)",
        ),
        (
            {"data": {"track_pattern": "/.+_"}},
            "data.track_pattern: expected one group in brackets",
            "in '/.+_'",
        ),
        ({"data": {"track_pattern": "/(.+)_"}}, "data.track_pattern goes with data.name: folder", "with it"),
        ({"correct": {"lambdas": [1, 1]}}, "correct: ", "lambdas must be distinct and not negative"),
        ({"correct": {"lambdas": [1, "x"]}}, "correct.lambdas.1: ", ", found 'x'"),
        ({"resources": {"precision": {"vae": "f64"}}}, "resources.precision.vae: ", "'bf16', found 'f64'"),
    ],
)
def test_the_first_problem_is_told_with_the_field_what_was_found_and_how_many_more(fields, begin, end):
    with pytest.raises(RunFileError) as refused:
        tiny_with(fields)
    text = str(refused.value)
    assert text.startswith(f"here: {begin}") and text.endswith(end) and "\n" not in text


@pytest.mark.parametrize(
    ("field", "most"),
    [
        ("classifier.channels", 4096),
        ("classifier.hidden", 16_384),
        ("vae.channels", 4096),
        ("vae.hidden", 65_536),
        ("vae.beta", 1_000_000),
        ("vae.class_weight", 1_000_000),
        ("identify.draws", 1_000_000),
        ("identify.scale", 1000),
        ("identify.a", 1_000_000),
        ("identify.b", 1_000_000),
        ("distill.max_components", 10_000),
        ("review.tau", 100),
        ("review.images", 1000),
        ("review.more_images", 10_000),
        ("review.answers_per_task", 1000),
        ("review.reference.count", 100),
        ("review.reference.channels", 4096),
        ("judges.count", 100),
        ("judges.channels", 4096),
        ("correct.tune_images", 100_000),
        ("correct.test_images", 100_000),
        ("correct.widen", 1000),
        ("resources.workers", 10_000),
        ("resources.cpus_per_worker", 1024),
        ("resources.gpus_per_worker", 1024),
        ("resources.train_threads", 256),
        ("resources.train_workers", 1024),
        ("resources.readers", 64),
        ("serve.max_replicas", 1000),
        ("serve.cpus_per_replica", 1024),
        ("serve.gpus_per_replica", 1024),
        ("serve.timeout_s", 3600),
        ("serve.max_canary_s", 3600),
    ],
)
def test_a_number_that_no_run_can_use_is_refused_before_anything_is_computed(field, most):
    sections = {"identify": {"block_images": 1}}

    def given(value: float) -> RunFile:
        section, _, rest = field.partition(".")
        inner, _, last = rest.rpartition(".")
        fields = {last: value} if not inner else {inner: {**TINY[section].get(inner, {}), last: value}}
        return tiny_with(sections | {section: {**sections.get(section, {}), **fields}})

    assert given(most).seed == 0
    for value in (most + 1, 1e300, 10**30):
        with pytest.raises(RunFileError, match=f"here: {field}: expected .*(less than or equal to|at most) "):
            given(value)


@pytest.mark.parametrize("section", ["classifier", "vae", "correct"])
def test_a_learning_rate_that_changes_no_weight_is_refused(section):
    for value in (0, 5e-324, 1e-12):
        with pytest.raises(
            RunFileError, match=f"here: {section}.learning_rate: expected .*0.000000001, found "
        ):
            tiny_with({section: {"learning_rate": value}})


@pytest.mark.parametrize("value", [2**31, 2**63, 10**30, 1e300, pytest.param(16**5000, id="long")])
def test_an_integer_that_libraries_do_not_hold_is_refused(value):
    for field in ("epochs", "batch_size"):
        with pytest.raises(
            RunFileError, match=f"here: vae.{field}: expected .*at most 2147483647"
        ) as refused:
            tiny_with({"vae": {field: value}})
        assert len(str(refused.value)) < 300
    assert tiny_with({"vae": {"epochs": 2**31 - 1}}).vae.epochs == 2**31 - 1


def test_a_long_value_is_quoted_without_its_middle():
    for fields in (
        {"vae": {"epochs": "9" * 3000}},
        {"data": {"name": "9" * 3000}},
        {"data": {"validation_share": 9**9999}},
    ):
        with pytest.raises(RunFileError) as refused:
            tiny_with(fields)
        assert "..." in str(refused.value) and len(str(refused.value)) < 300


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"identify": {"draws": 100_000, "block_images": 256}},
            "identify.draws = 100000 of each of identify.block_images = 256 are in memory at once; expected at most "
            "16,777,216 together: set identify.block_images: 167",
        ),
        (
            {
                "data": {"image_size": 256},
                "classifier": {"stages": 4},
                "vae": {"architecture": "convolutional", "channels": 512, "encoder_stages": 8},
            },
            "vae.channels = 512 are 65536 after vae.encoder_stages = 8, which double them; expected at most 16384",
        ),
        (
            {"resources": {"gpus_per_worker": 5e-324}},
            "resources.gpus_per_worker: .* expected 0, or at least 0.01",
        ),
        (
            {"resources": {"cpus_per_worker": 5e-324}},
            "resources.cpus_per_worker: expected greater than or equal",
        ),
        (
            {"serve": {"gpus_per_replica": 0.001}},
            "serve.gpus_per_replica: 0.001 GPUs: expected 0, or at least",
        ),
        (
            {"review": {"accept": "lower-bound", "max_false": 5e-324}},
            "review.max_false: expected greater than or",
        ),
        (
            {"review": {"accept": "lower-bound", "rho": 0.9999}},
            "it takes 36887 misclassified ones; lower rho, or accept: share$",
        ),
    ],
)
def test_numbers_that_do_not_go_together_are_refused_with_what_to_set(fields, message):
    with pytest.raises(RunFileError, match=f"here: .*{message}") as refused:
        tiny_with(fields)
    assert "\n" not in str(refused.value)


def tiny_with(fields: dict[str, dict[str, object]]) -> RunFile:
    names = TINY.keys() | fields.keys()
    return parse_run_file({n: {**TINY.get(n, {}), **fields.get(n, {})} for n in names}, "here")


def test_a_file_with_a_missing_field_and_a_wrong_one_says_nothing_of_what_was_found_for_the_missing():
    with pytest.raises(RunFileError) as refused:
        parse_run_file({"data": {"channels": 2}}, "here")
    assert str(refused.value) == "here: data.name: expected a value, found none (and 1 more)"


def test_a_written_run_file_has_its_sections_in_their_order_and_text_as_it_is():
    written = dump_run_file(tiny(data={"root": "/Bilder/größe"}))
    assert list(yaml.safe_load(written)) == list(RunFile.model_fields)
    assert "/Bilder/größe" in written


@pytest.mark.parametrize(
    ("override", "value"),
    [("data.root=/a=b", "/a=b"), (" data.root = /a", "/a"), ("data.root='/a # b'", "/a # b")],
)
def test_a_value_begins_behind_the_first_sign_of_equality(tmp_path, override, value):
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(TINY))
    assert str(load_run_file(tmp_path / "run.yaml", (override,)).data.root) == value


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.=1", "--set data.=1: expected section.field=value"),
        ("=1", "--set =1: expected section.field=value"),
        ("judges=count: 0 # none", "YAML takes '# none' for a comment"),
        ("nothing.deeper=1", "run.yaml with --set: nothing: unknown field"),
    ],
)
def test_an_override_that_sets_nothing_or_half_of_a_value_is_refused(tmp_path, override, message):
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(TINY))
    with pytest.raises(RunFileError) as refused:
        load_run_file(tmp_path / "run.yaml", (override,))
    assert message in str(refused.value)


def test_a_section_that_the_file_has_not_is_begun_by_an_override(tmp_path):
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({"data": TINY["data"]}))
    spec = load_run_file(tmp_path / "run.yaml", ("review.reference.count=4", "review.reference.epochs=2"))
    assert (spec.review.reference.count, spec.review.reference.epochs) == (4, 2)


def test_an_override_leaves_the_section_that_is_an_alias_of_its_own(tmp_path):
    nets = "review: {reference: &nets {epochs: 4, count: 4}}\njudges: *nets\n"
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({"data": TINY["data"]}) + nets)
    spec = load_run_file(tmp_path / "run.yaml", ("judges.epochs=9", "review.reference.count=3"))
    assert (spec.review.reference.epochs, spec.judges.epochs) == (4, 9)
    assert (spec.review.reference.count, spec.judges.count) == (3, 4)


def test_keys_of_a_mapping_may_be_lists_and_equal_text_of_another_type_is_another_key(tmp_path):
    for text, found in (("? [a]\n: 1\n", "not valid YAML"), ("1: 2\n'1': 3\n", "unknown field|string")):
        (tmp_path / "run.yaml").write_text(yaml.safe_dump(TINY) + text)
        with pytest.raises(RunFileError, match=found) as refused:
            load_run_file(tmp_path / "run.yaml")
        assert "a second time" not in str(refused.value)


@pytest.mark.parametrize(
    ("change", "differs"),
    [
        ({"data": {"download": True}}, False),
        ({"vae": {"accept": "fit"}}, False),
        ({"check": {"max_loss": 0.1}}, False),
        ({"serve": {"watch": False}}, False),
        ({"resources": {"readers": 2}}, False),
        ({"review": {"answers_per_task": 4}}, True),
        ({"resources": {"train_workers": 2}}, True),
        ({"resources": {"precision": "bf16"}}, True),
        ({"report": {"perplexity": 20.0}}, True),
        ({"seed": 1}, True),
    ],
)
def test_a_field_that_changes_results_differs_and_another_one_does_not(change, differs):
    seed = change.pop("seed", 0)
    assert (changed_field(tiny(), tiny(**change).model_copy(update={"seed": seed})) is not None) is differs


@pytest.mark.parametrize(
    ("recorded", "given", "added"),
    [
        ((1.0, 10.0), (10.0, 3.0, 1.0, 5.0), (3.0, 5.0)),
        ((1.0, 10.0), (1.0, 10.0), ()),
        ((1.0, 10.0), (1.0, 3.0), ()),  # 10 is gone: another run
        ((1.0, 10.0), (1.0,), ()),
    ],
)
def test_lambdas_are_added_only_to_all_of_those_that_were_there(recorded, given, added):
    assert added_lambdas(*(tiny(correct={"lambdas": list(each)}) for each in (recorded, given))) == added
