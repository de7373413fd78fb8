import os
import shlex
from pathlib import Path

import pytest
import yaml

from defuse_core.config import (
    RunFile,
    Section,
    changed_field,
    dump_run_file,
    load_run_file,
    parse_run_file,
    with_absolute_root,
)
from defuse_core.errors import RunFileError
from defuse_core.training.reference_models import references_take_part
from tests.conftest import PAPER_LAMBDAS, ROOT, TINY, tiny

SHIPPED = sorted((ROOT / "deploy" / "runs").glob("*.yaml"))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_every_shipped_run_file_parses_and_survives_being_written_out(path, tmp_path):
    spec = load_run_file(path)
    (tmp_path / "resolved.yaml").write_text(dump_run_file(spec), encoding="utf-8")
    assert load_run_file(tmp_path / "resolved.yaml") == spec


def test_the_promised_run_files_are_shipped():
    assert {path.stem for path in SHIPPED} >= {
        "demo",
        "digits",
        "mnist",
        "signs",
        "svhn",
        "mnist-laptop",
        "signs-laptop",
    }


@pytest.mark.parametrize("name", ["mnist", "signs", "svhn"])
def test_the_papers_run_files_sweep_the_papers_lambdas(name):
    assert load_run_file(ROOT / "deploy" / "runs" / f"{name}.yaml").correct.lambdas == PAPER_LAMBDAS


@pytest.mark.parametrize(
    ("name", "expected"),
    [  # §4.1, B.2-B.4: z, VAE epochs, warm-up, Q, a, cap, tau, epochs of correction, batch, rule
        ("mnist", (10, 800, 500, 500, 50, 100, 0.5, 3, 256, "train")),
        ("signs", (15, 800, 500, 100, 75, None, 0.01, 5, 256, "validation")),
        ("svhn", (10, 400, 5000, 100, 75, 10, 0.01, 5, 2048, "validation")),
    ],
)
def test_the_papers_run_files_have_the_papers_numbers(name, expected):
    spec = load_run_file(ROOT / "deploy" / "runs" / f"{name}.yaml")
    found = (
        spec.vae.latent_dim,
        spec.vae.epochs,
        spec.vae.kl_warmup_steps,
        spec.identify.draws,
        spec.identify.a,
        spec.identify.max_per_image,
        spec.review.tau,
        spec.correct.epochs,
        spec.correct.batch_size,
        spec.correct.choose_by,
    )
    assert found == expected
    assert (spec.distill.max_codes, spec.distill.max_components, spec.distill.min_weight) == (
        50_000,
        100,
        0.01,
    )
    assert (spec.correct.tune_images, spec.correct.test_images, spec.review.images) == (256, 256, 10)


@pytest.mark.parametrize("name", ["mnist", "signs", "svhn", "digits"])
def test_the_papers_run_files_state_the_papers_method(name):
    tree = yaml.safe_load((ROOT / "deploy" / "runs" / f"{name}.yaml").read_text(encoding="utf-8"))
    stated = (
        tree["identify"]["noise"],
        tree["identify"]["screen"],
        tree["distill"]["by"],
        tree["distill"]["min_support"],
        tree["review"]["accept"],
        tree["correct"]["filter"],
        tree["correct"]["schedule"],
    )
    assert stated == ("beta", "none", "all", 1, "share", "none", "constant")
    assert isinstance(tree["review"]["tau"], float)
    spec = load_run_file(ROOT / "deploy" / "runs" / f"{name}.yaml")
    assert not references_take_part(spec)
    assert spec.distill.order == "weight"


@pytest.mark.parametrize(
    ("name", "schedule"),
    # one short epoch of the signs gains nothing from a falling rate
    [("demo", "one_cycle"), ("mnist-laptop", "one_cycle"), ("signs-laptop", "constant")],
)
def test_the_laptops_run_files_and_a_new_one_have_the_recommended_method(name, schedule):
    new = parse_run_file({"data": {"name": "digits", "channels": 1}}, "new")
    shipped = load_run_file(ROOT / "deploy" / "runs" / f"{name}.yaml")
    assert (shipped.correct.schedule, new.correct.schedule) == (schedule, "one_cycle")
    for spec in (shipped, new):
        assert spec.correct.augment is (name != "signs-laptop" or spec is new)
        assert (spec.identify.noise, spec.identify.screen) == ("posterior", "reference-models")
        assert (spec.distill.by, spec.review.tau) == ("cell", "auto")
        # a component of the signs seldom has the six tracks that certainty needs
        assert spec.review.accept == ("share" if spec.data.name == "signs" else "lower-bound")
        assert spec.correct.filter == "reference-models"
        assert spec.judges.count >= 3
        assert spec.judges.share > 0 or spec.data.name == "mnist-5000"
        assert spec.judges.architecture != spec.review.reference.architecture


@pytest.mark.parametrize("name", ["demo", "mnist-laptop", "signs-laptop"])
def test_the_laptops_run_files_order_scenarios_by_the_error_of_their_source_images(name):
    spec = load_run_file(ROOT / "deploy" / "runs" / f"{name}.yaml")
    assert spec.distill.order == "source-error"


def sections() -> list[type[Section]]:
    return [
        RunFile,
        *(
            field.annotation
            for field in RunFile.model_fields.values()
            if isinstance(field.annotation, type) and issubclass(field.annotation, Section)
        ),
    ]


def test_every_field_has_a_description():
    undescribed = [
        f"{section.__name__}.{name}"
        for section in sections()
        for name, field in section.model_fields.items()
        if not field.description
        and not (isinstance(field.annotation, type) and issubclass(field.annotation, Section))
    ]
    assert undescribed == []


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("identify.drawz=5", "identify.drawz: unknown field; did you mean identify.draws[?]$"),
        ("identfy.draws=5", "identfy: unknown field; did you mean identify[?]$"),
        ("review.reference.cuont=5", "cuont: unknown field; did you mean review.reference.count[?]$"),
        ("identify.draws=many", "identify.draws: .*integer.*found 'many'"),
        ("vae.epochs=true", "vae.epochs: expected an integer, found true$"),
        ("review.reference.count=yes", "review.reference.count: expected an integer, found true$"),
        ("identify.max_per_image=off", "identify.max_per_image: expected an integer, found false$"),
        ("vae.learning_rate=true", "vae.learning_rate: expected a number, found true$"),
        ("review.tau=on", "review.tau: expected a number or auto, found true$"),
        ("resources.workers=true", "resources.workers: expected an integer or auto, found true$"),
        ("resources.workers='2'", "resources.workers: expected an integer or auto, found '2'$"),
        ("data.channels=true", "data.channels: expected 1 or 3, found true$"),
        ("classifier.class_order=[1, true]", "classifier.class_order: expected an integer, found true$"),
        ("correct.lambdas=[1, true]", "correct.lambdas: expected a number, found true$"),
        ("identify.draws='3'", "identify.draws: expected an integer, found '3'$"),
        ("seed=010", "seed: expected an integer, found '010'$"),
        ("seed=1:30", "seed: expected an integer, found '1:30'$"),
        ("vae.learning_rate=1:30.5", "vae.learning_rate: .*number, .*found '1:30.5'$"),
        (
            "resources.precision.vae=fp16",
            "resources.precision.vae: expected 'f32' or 'bf16', found 'fp16'$",
        ),
        ("resources.precision={x: f32}", "resources.precision.x: unknown field$"),
        ("resources.precision.vea=f32", "resources.precision.vea: .*mean resources.precision.vae[?]$"),
        ("VAE.epochs=3", "VAE: unknown field; did you mean vae[?]$"),
        (
            "resources.precision=fp16",
            "resources.precision: expected 'auto', 'f32' or 'bf16' or a section with fields, found 'fp16'$",
        ),
        ("correct.lambdas=1", "correct.lambdas: expected a list, found 1$"),
        ("correct.lambdas=[]", r"correct.lambdas: expected a list of at least 1, found \[\]$"),
        ("data=[]", "data: expected a section with fields, found \\[\\]$"),
        ("identify.draws=0", "identify.draws: .*greater than or equal to 1, found 0"),
        ("identify.a=.nan", "identify.a: .*finite"),
        ("review.rho=1.5", "review.rho: .*less than 1, found 1.5"),
        ("classifier.keep=first", "classifier.keep: .*'last' or 'best_validation', found 'first'"),
        ("correct.lambdas=[1, 1]", "lambdas must be distinct"),
        ("correct.stop_at_loss=0.001", "stop_at_loss must be at least max_loss"),
        (
            "correct={stop_at_loss: 0.1, schedule: one_cycle, choose_by: train}",
            "goes with choose_by: tune or",
        ),
        ("review={tau: auto, rho: 0.96}", "rho must be at most that; or set a τ"),
        (
            "review={annotators: label-studio, rho: 0.75}",
            "nothing with rho = 0.75 and so few images: it takes 11 misclassified ones; set images: 11, or ",
        ),
        ("review={images: 2, more_images: 3}", "it takes 6 misclassified ones; set images: 3, or accept"),
        ("data.image_size=20", "vae.encoder_stages|vae.decoder_stages|classifier.stages"),
        ("vae.hidden=10", "vae.hidden = 10 must be a multiple of 4x4"),
        ("classifier.architecture=custom", "classifier.import_path goes with"),
        ("classifier.epochs=0", "classifier.weights must name its file"),
        ("vae.epochs=0", "vae.weights must name its file"),
        ("data.name=mnist", "data.root must be the path of the mnist images"),
        ("data=3", "data: .*found 3"),
        ("resources.workers=0", "resources.workers: .*greater than or equal to 1 or 'auto', found 0$"),
        (
            "resources.gpus_per_worker=-1",
            "resources.gpus_per_worker: .*than or equal to 0 or 'auto', found -1$",
        ),
        (
            "resources.gpus_per_worker=1.5",
            "resources.gpus_per_worker: .*a fraction of one, or a whole number",
        ),
        ("serve.gpus_per_replica=-1", "serve.gpus_per_replica: .*than or equal to 0 or 'auto', found -1$"),
        ("classifier.batch_size=1", "classifier.batch_size: .*greater than or equal to 2, found 1"),
        ("data.train_images=1", "data.train_images: .*greater than or equal to 2, found 1"),
        ("judges.train_images=1", "judges.train_images: .*greater than or equal to 2, found 1"),
        ("review.reference.train_images=1", "reference.train_images: .*greater than or equal to 2, found 1"),
        ("classifier.imagenet=true", "classifier.imagenet goes with classifier.architecture: resnet18"),
        ("correct.lambdas=[1, x]", "correct.lambdas.1: .*number.*found 'x'$"),
        ("nonsense", "--set nonsense: expected section.field=value"),
        ("review.tau=wide", "review.tau: .*'auto'"),
        ("review.reference.epochs=0", "epochs = 0 uses one pretrained model"),
        ("judges.architecture=custom", "import_path goes with architecture: custom"),
        (
            "classifier.weights=",
            "expected a value, found none; is the variable set[?] write classifier.weights=null",
        ),
        (
            "seed= ",
            "expected a value, found none; is the variable set[?] leave --set out to keep what is set$",
        ),
        (".seed=1", "--set .seed=1: expected section.field=value"),
        ("correct={epochs: 2, lambdas: [1], epochs: 3}", "the value is not YAML .'epochs' a second time"),
        ("seed.deeper=1", "--set seed.deeper=1: seed is not a section"),
        (
            "data.track_pattern=[^/]+/(.+)_",
            r"if it is text, put the value in quotes of its own: --set 'data\.track_p",
        ),
        ("seed=[", "--set seed=\\[: the value is not YAML"),
        (
            f"seed={'9' * 5000}",
            "--set seed=9{55}[.]{3}9{60}: the value is not YAML .* in quotes of its own$",
        ),
        ("data.root=2023-02-30", "--set data.root=2023-02-30: the value is not YAML"),
        ("data.root=/data/parts #2", "--set data.root=/data/parts #2: YAML takes '#2' for a comment"),
        ("data.root=#2", "YAML takes '#2' for a comment; put the value in quotes of its own"),
        ("identify.draws=5 # of ten", "YAML takes '# of ten' for a comment"),
        ("correct.lambdas=[1, 2] # two", "YAML takes '# two' for a comment"),
        ('data.root="/\\e[2J"', r"data.root: expected text without control characters, found '/\\x1b\[2J'$"),
        ('classifier.timm_model="a\\rb"', "classifier.timm_model: expected text without control characters"),
        ('"\x1b[2J".a=1', r"'?\\x1b\[2J.*: unknown field"),
        ("data.root=''", "data.root: expected a path, found an empty one; write [.] for the current folder"),
        ("classifier.weights=''", "classifier.weights: expected a path, found an empty one"),
        ("data.root=2024", "data.root: expected a path, found the number 2024; put the name in quotes"),
        (
            "data.root=2024-01-31",
            "data.root: expected a path, found the date 2024-01-31; put the name in quotes",
        ),
        ("data.root=no", "data.root: expected a path, found the value false; put the name in quotes"),
        ("data.root={}", "data.root: expected a path, found {}$"),
        ("data.root=~nobody-of-this-name/x", "data.root: .*home of an existing user"),
    ],
)
def test_bad_input_gets_one_line_that_names_the_field(override, message, tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(TINY | {"seed": 0}))
    with pytest.raises(RunFileError, match=message) as caught:
        load_run_file(path, (override,))
    assert "\n" not in str(caught.value) and "--set" in str(caught.value)  # the file does not have that field
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a: [", "line 1, column 5: not valid YAML"),
        (
            "seed: 0\nvae:\n epochs: 3\n  beta: 1",
            "line 4, column 7: not valid YAML [(]mapping values are not allowed here[)]; check this line and its "
            "indentation$",
        ),
        ("seed: 2023-02-30", "expected YAML, found day (is out of range|30 must be in range)"),
        ('a: "x\nb: 1\n', "line 3, column 1: not valid YAML [(].*, in what begins in line 1[)]; check"),
        ("vae: {epochs: 3}\nvae: {beta: 1}", "line 2, column 1: not valid YAML [(]'vae' a second time[)]"),
        (
            "data:\n  name: digits\n  name: mnist",
            "line 3, column 3: not valid YAML [(]'name' a second time[)]",
        ),
        ("data: " + 3000 * "[" + 3000 * "]", "expected YAML, found sections nested too deeply"),
        ("- 1", "expected sections"),
        ("", "expected sections such as `data:`, found nothing$"),
        ("seed: 1", "data: expected a value, found none$"),
        ("data:", "data: expected a section with fields, found null$"),
        ("Data: {name: digits}", "Data: unknown field; did you mean data[?]$"),
        ("data: {nmae: digits}", "data.nmae: unknown field; did you mean data.name[?]$"),
    ],
)
def test_a_file_that_is_no_run_file_is_explained(content, message, tmp_path):
    (tmp_path / "bad.yaml").write_text(content)
    with pytest.raises(RunFileError, match=f"bad.yaml: .*{message}"):
        load_run_file(tmp_path / "bad.yaml")


def test_a_missing_run_file_is_named():
    with pytest.raises(RunFileError, match="nowhere.yaml: cannot read this run file"):
        load_run_file(Path("nowhere.yaml"))


def test_the_name_of_a_run_in_place_of_a_run_file_is_told_what_a_run_file_is():
    with pytest.raises(RunFileError, match="digits: cannot .*; a run file ends in .yaml, see deploy/runs/$"):
        load_run_file(Path("digits"))


def test_a_folder_in_place_of_a_run_file_is_told_what_writes_one(tmp_path):
    (tmp_path / "my parts").mkdir()
    with pytest.raises(RunFileError, match="cannot .*; `defuse init '/.*/my parts'` writes one for a folder"):
        load_run_file(tmp_path / "my parts")


def test_overrides_are_read_as_yaml_and_the_last_one_counts(tmp_path):
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(TINY))
    spec = load_run_file(
        tmp_path / "run.yaml", ("identify.draws=5", "identify.draws=7", "identify.max_per_image=null")
    )
    assert (spec.identify.draws, spec.identify.max_per_image) == (7, None)


@pytest.mark.parametrize(
    ("text", "value"), [("1e-3", 1e-3), ("1.5e-3", 1.5e-3), ("1", 1.0), ("1_000", 1000.0), ("010", 10.0)]
)
def test_a_number_may_be_written_in_any_way_that_has_one_meaning(text, value, tmp_path):
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(TINY))
    assert load_run_file(tmp_path / "run.yaml", (f"vae.learning_rate={text}",)).vae.learning_rate == value


@pytest.mark.parametrize("text", ["010", "-010", "+010", "0_10", "1:30"])
def test_text_that_yaml_1_1_has_for_a_number_stays_text(text, tmp_path):
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(TINY))
    spec = load_run_file(tmp_path / "run.yaml", (f"data.root={text}",))
    assert spec.data.root == Path(text)


def test_a_key_that_a_merge_brings_along_may_be_written_once_more(tmp_path):
    tree = yaml.safe_dump({name: TINY[name] for name in TINY if name not in ("review", "judges")})
    models = "judges: &models {<<: &all {epochs: 9, batch_size: 32}, epochs: 8}\n"
    (tmp_path / "run.yaml").write_text(
        f"{tree}{models}review: {{reference: {{<<: *models, batch_size: 16}}}}\n"
    )
    spec = load_run_file(tmp_path / "run.yaml")
    assert (spec.judges.epochs, spec.judges.batch_size) == (8, 32)
    assert (spec.review.reference.epochs, spec.review.reference.batch_size) == (8, 16)


def test_a_number_sign_is_kept_in_quotes_as_the_error_says(tmp_path):
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(TINY))
    with pytest.raises(RunFileError) as refused:
        load_run_file(tmp_path / "run.yaml", ("data.root=/data/Ada's parts #2",))
    option, override = shlex.split(str(refused.value).partition("quotes of its own: ")[2])
    assert option == "--set"
    spec = load_run_file(tmp_path / "run.yaml", (override,))
    assert spec.data.root == Path("/data/Ada's parts #2")
    for value in ("/data/parts#2", '"/data/parts #2"'):
        spec = load_run_file(tmp_path / "run.yaml", (f"data.root={value}",))
        assert spec.data.root == Path(value.strip('"'))


def test_run_files_are_frozen(tiny_spec):
    with pytest.raises(ValueError, match="frozen"):
        tiny_spec.seed = 3


def test_drift_names_the_field_that_changed():
    assert changed_field(tiny(), tiny(identify={"draws": 9})) == "identify.draws: 4 in the run, 9 now"
    assert (
        changed_field(tiny(), tiny(resources={"train_threads": 2}))
        == "resources.train_threads: 1 in the run, 2 now"
    )


def test_a_tilde_is_the_users_home():
    assert tiny(data={"root": "~/images"}).data.root == Path.home() / "images"


def test_a_relative_root_in_a_folder_whose_name_is_no_text_is_refused(tmp_path, monkeypatch):
    folder = tmp_path / os.fsdecode(b"p\xe9ts")
    folder.mkdir()
    monkeypatch.chdir(folder)
    with pytest.raises(
        RunFileError, match=r"^data.root images: .* found '/.*/p\\udce9ts/images'; rename that"
    ):
        with_absolute_root(tiny(data={"root": "images"}))


def test_the_path_of_weights_may_change_but_not_whether_there_are_any():
    here, there = (tiny(vae={"weights": f"/{place}/vae.safetensors"}) for place in ("here", "there"))
    assert changed_field(here, there) is None
    assert "vae.weights: null in the run" in str(changed_field(tiny(), here))
    assert "vae.weights: '/here/vae.safetensors' in the run" in str(changed_field(here, tiny()))


@pytest.mark.parametrize("change", [{"data": {"root": "/elsewhere"}}, {"resources": {"workers": 7}}])
def test_what_changes_no_result_is_no_drift(change):
    assert changed_field(tiny(), tiny(**change)) is None


def test_numbers_without_a_dot_before_the_exponent_are_numbers():
    spec = parse_run_file(TINY | {"correct": {"lambdas": ["1e-10", 1]}}, "here")
    assert spec.correct.lambdas == (1e-10, 1.0)


@pytest.mark.parametrize("tree", [{"review.reference.epochs": 3}, {"review": {"reference.epochs": 3}}])
def test_a_field_that_is_written_with_dots_is_shown_in_its_section(tree):
    meant = r"review.reference.epochs: unknown field; write it in its section: {review: {reference: {epochs: ...}}}"
    with pytest.raises(RunFileError, match=meant):
        parse_run_file(TINY | tree, "settings")
