"""Pushing: every image is in the project exactly once, whatever is cut off when, and edits are noticed."""

from __future__ import annotations

import base64
import io
import itertools
import re
from dataclasses import replace

import numpy as np
import pytest
from label_studio_live import digits_gallery
from PIL import Image
from proxy import Reply

from defuse_core.errors import InputError, LabelsPending, ServiceError
from services.labeling import tasks
from services.labeling.project import ReviewProject
from services.labeling.records import write_state
from services.labeling.tasks import ReviewTasks, digest


def picture(uri):
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))), np.float32) / 255


def test_every_image_becomes_one_task_that_shows_it_and_not_the_prediction(make_review):
    review = make_review()
    review.annotators.push(review.gallery)
    found = review.tasks()
    assert sorted(found) == [f"s{s:03d}-i{i:02d}" for s in range(4) for i in range(3)]
    shown = found["s001-i02"].data
    assert np.abs(picture(shown["image"]) - review.gallery.images[1, 2, 0]).max() < 1 / 254
    assert set(shown) == {"image"}
    assert {task.overlap for task in found.values()} == {3}


def test_a_scenario_becomes_one_page_with_the_classifiers_answer_beside_each_image(make_review):
    review = make_review(form="scenario")
    review.annotators.push(review.gallery)
    page = review.tasks()["s000"].data
    assert [sample["prediction"] for sample in page["samples"]] == ["classifier: 3"] * 3
    assert np.abs(picture(page["samples"][1]["image"]) - review.gallery.images[0, 1, 0]).max() < 1 / 254


@pytest.mark.parametrize(
    ("form", "classes", "warned"), [("scenario", 200, 1), ("scenario", 199, 0), ("image", 200, 0)]
)
def test_a_page_whose_many_classes_make_a_browser_slow_is_warned_of_before_anybody_answers(
    make_review, caplog, form, classes, warned
):
    gallery = replace(digits_gallery((8,)), classes=tuple(map(str, range(classes))))
    make_review(gallery, form=form).annotators.push(gallery)
    assert (
        caplog.text.count(f"review: with {classes} classes a page of review.form: scenario takes") == warned
    )


def test_pushing_again_changes_nothing(make_review):
    review = make_review()
    first, before = review.annotators.push(review.gallery), review.tasks()
    assert review.annotators.push(review.gallery) == first
    assert {key: task.id for key, task in review.tasks().items()} == {
        key: task.id for key, task in before.items()
    }


def test_what_other_commands_store_while_a_push_begins_is_kept(make_review):
    review = make_review()
    review.annotators.push(review.gallery)
    review_tasks = ReviewTasks(review.gallery, review.run.spec.review)
    project = ReviewProject(review.api, review.run, review_tasks)
    write_state(review.run.store, replace(review.state, simulated=True).with_annotators([7]))
    assert project.push() == review.state
    assert review.state.simulated and review.state.people == {"7": 1}


@pytest.mark.parametrize(
    "method, path", [("POST", "/api/projects/"), ("POST", "/import"), ("GET", "/api/tasks")]
)
@pytest.mark.parametrize("deed", ["lose", "cut"])
def test_a_lost_reply_or_request_leaves_every_image_there_once(
    make_review, proxy, monkeypatch, method, path, deed
):
    monkeypatch.setattr(tasks, "BATCH_TASKS", 5)
    review = make_review()
    getattr(proxy, deed)(method, path)
    review.through(proxy.address).push(review.gallery)
    assert len(review.tasks()) == 12
    assert len(review.api.find_projects(review.state.mark)) == 1


def test_a_push_that_dies_half_way_is_finished_by_the_next(make_review, proxy, monkeypatch):
    monkeypatch.setattr(tasks, "BATCH_TASKS", 5)
    review = make_review()
    imports = iter([None, Reply(500, "<html>LabelStudioClient Error</html>", "text/html")])
    proxy.rule = lambda method, path: next(imports, Reply(503)) if "/import" in path else None
    with pytest.raises(ServiceError, match=r"failed \(503\)"):
        review.through(proxy.address).push(review.gallery)
    assert len(review.tasks()) == 5
    review.annotators.push(review.gallery)
    assert len(review.tasks()) == 12


def test_copies_that_a_late_import_left_are_dropped_but_never_an_answered_one(make_review, accounts):
    review = make_review()
    record = review.annotators.push(review.gallery)
    review_tasks = ReviewTasks(review.gallery, review.run.spec.review)
    copies = [review_tasks.task(index, secret=record.secret) for index in (0, 1)]
    review.api.import_tasks(record.number, copies)
    copies = [task for task in review.api.tasks(record.number) if task.key in ("s000-i00", "s000-i01")]
    accounts[0].answer(max(task.id for task in copies if task.key == "s000-i00"), "image", "8")
    review.annotators.push(review.gallery)
    kept = review.tasks()
    assert len(kept["s000-i00"].annotations) == 1
    assert kept["s000-i01"].id == min(task.id for task in copies if task.key == "s000-i01")


def test_a_deleted_project_is_said_and_made_again_only_when_asked(make_review):
    review = make_review()
    number = review.annotators.push(review.gallery).number
    review.api._sdk.projects.delete(id=number)
    with pytest.raises(InputError, match=f"project {number} was deleted .* --repair"):
        review.annotators.review(review.gallery)
    assert review.annotators.push(review.gallery, repair=True).number != number
    assert len(review.tasks()) == 12


def test_people_are_not_asked_again_while_their_votes_are_stored(make_review):
    review = make_review()
    number = review.annotators.push(review.gallery).number
    review.run.store.write("votes.safetensors", b"of people")
    review.api._sdk.projects.delete(id=number)
    before = review.state
    with pytest.raises(
        InputError, match=r"has no project with their answers; `defuse review reopen .*--discard"
    ):
        review.annotators.push(review.gallery, repair=True)
    assert review.state == before


def test_a_project_deleted_while_waiting_ends_the_wait(make_review, monkeypatch):
    review = make_review()
    review.annotators.wait, review.annotators.first_pause_s = True, 0.01
    monkeypatch.setattr(
        "services.labeling.annotators.sleep",
        lambda _: review.api._sdk.projects.delete(id=review.state.number),
    )
    with pytest.raises(InputError, match="was deleted"):
        review.annotators.review(review.gallery)


def test_a_renamed_project_is_said_once_and_gone_on_with(make_review, caplog):
    review = make_review()
    number = review.annotators.push(review.gallery).number
    review.api.update_project(number, title="Our digits")
    caplog.set_level("WARNING", "defuse")
    assert review.annotators.push(review.gallery).number == number
    assert "was renamed from" in caplog.text and "'Our digits'" in caplog.text
    caplog.clear()
    review.annotators.push(review.gallery)
    assert not caplog.records


@pytest.mark.parametrize(
    "old, new",
    [
        ("</Choices>", '<Choice value="ten"/></Choices>'),
        ('value="7"', 'value="7" alias="3"'),
        ('"single-radio"', '"multiple"'),
        ("What does this picture show?", "What is wrong here?"),
    ],
)
def test_an_edit_that_changes_what_answers_mean_is_an_error_until_repaired(make_review, old, new, caplog):
    review = make_review()
    number = review.annotators.push(review.gallery).number
    pushed = review.api.project(number).settings.label_config
    review.api.update_project(number, label_config=pushed.replace(old, new))
    with pytest.raises(InputError, match="labelling interface was edited"):
        review.annotators.status(review.gallery)
    with pytest.raises(InputError, match="labelling interface was edited"):
        review.annotators.review(review.gallery)
    review.annotators.push(review.gallery, repair=True)
    assert "answers given on that page count as they are stored, so look at the newest ones)" in caplog.text
    assert review.api.project(number).settings.label_config == pushed
    review.annotators.status(review.gallery)


@pytest.mark.parametrize(
    "change, words",
    [
        (
            lambda pushed: {"label_config": pushed.label_config.replace('size="5"', 'size="4"')},
            "the layout",
        ),
        (lambda pushed: {"expert_instruction": "<p>Guess.</p>"}, "the instructions"),
        (lambda pushed: {"show_instruction": False}, "the instructions"),
    ],
)
def test_an_edit_of_layout_or_instructions_is_logged_once_and_put_back_by_a_repair(
    make_review, caplog, change, words
):
    review = make_review(form="scenario")
    number = review.annotators.push(review.gallery).number
    pushed = review.api.project(number).settings
    review.api.update_project(number, **change(pushed))
    for _ in range(2):
        with pytest.raises(LabelsPending):
            review.annotators.review(review.gallery)
    assert caplog.text.count(f"{words} of its labelling page was edited") == 1
    review.annotators.push(review.gallery, repair=True)
    assert review.api.project(number).settings == pushed
    caplog.clear()
    review.annotators.push(review.gallery)
    assert not caplog.records


def test_settings_that_a_review_depends_on_are_put_back(make_review, caplog):
    review = make_review()
    number = review.annotators.push(review.gallery).number
    pushed = review.api.project(number).settings
    assert not pushed.show_skip_button
    review.api.update_project(number, show_skip_button=True, show_collab_predictions=True)
    review.annotators.status(review.gallery)
    assert review.api.project(number).settings == pushed
    assert "set show_skip_button to False, as this run requires; it was True" in caplog.text


def test_another_overlap_is_said_and_put_back(make_review, caplog):
    review = make_review()
    number = review.annotators.push(review.gallery).number
    review.api.update_project(number, maximum_annotations=1)
    review.annotators.push(review.gallery)
    assert "set maximum_annotations to 3, as this run requires; it was 1" in caplog.text
    assert {task.overlap for task in review.tasks().values()} == {3}


def test_deleted_tasks_are_said_and_put_back_only_when_asked(make_review):
    review = make_review()
    review.annotators.push(review.gallery)
    review.api.delete_task(review.tasks()["s002-i01"].id)
    for look in (review.annotators.status, review.annotators.review):
        with pytest.raises(InputError, match=r"1 of 12 tasks were deleted .*s002-i01"):
            look(review.gallery)
    review.annotators.push(review.gallery, repair=True)
    assert len(review.tasks()) == 12


def test_an_edited_task_is_said_and_replaced_only_when_asked(make_review, accounts, caplog):
    review = make_review()
    review.annotators.push(review.gallery)
    pushed = review.tasks()
    accounts[0].answer(pushed["s000-i00"].id, "image", "8")
    accounts[1].submit(pushed["s000-i00"].id, [], was_cancelled=True)
    swapped = dict(pushed["s000-i00"].data) | {"image": pushed["s001-i00"].data["image"]}
    accounts[0].http.patch(f"/api/tasks/{pushed['s000-i00'].id}/", json={"data": swapped}).raise_for_status()
    for look in (review.annotators.status, review.annotators.review):
        with pytest.raises(InputError, match=r"s000-i00\) was edited"):
            look(review.gallery)
    review.annotators.push(review.gallery, repair=True)
    assert review.tasks()["s000-i00"].data == pushed["s000-i00"].data
    number = pushed["s000-i00"].id
    said = f"review: deleted task {number}, a duplicate or an edited version of s000-i00, with 1 answer"
    assert [record.message for record in caplog.records if record.levelname == "WARNING"] == [said]


def forge(review, accounts, key, data):
    """Exchange what a task shows, as an annotator who knows the source of Defuse does."""
    forged = {"data": data, "meta": {"sample_key": key, "digest": digest(key, data, "")}}
    task = review.tasks()[key].id
    accounts[0].http.patch(f"/api/tasks/{task}/", json=forged).raise_for_status()
    assert review.tasks()[key].digest == forged["meta"]["digest"]


def test_an_edit_that_also_replaces_the_digest_in_the_task_is_noticed(make_review, accounts):
    review = make_review()
    review.annotators.push(review.gallery)
    forge(review, accounts, "s000-i00", review.tasks()["s001-i00"].data)
    for look in (review.annotators.status, review.annotators.review):
        with pytest.raises(InputError, match=r"s000-i00\) was edited"):
            look(review.gallery)
    review.annotators.push(review.gallery, repair=True)
    review.annotators.status(review.gallery)


def test_tasks_that_defuse_did_not_import_are_left_alone(make_review, caplog):
    review = make_review()
    number = review.annotators.push(review.gallery).number
    stranger = {"data": {"image": "data:image/png;base64,AAAA"}}
    review.api.import_tasks(number, [stranger | {"meta": {"sample_key": 5}}])
    review.annotators.push(review.gallery)
    assert "1 task that Defuse did not import" in caplog.text
    assert len(review.tasks()) == 13


def test_other_images_under_the_same_run_are_refused(make_review):
    review = make_review()
    review.annotators.push(review.gallery)
    with pytest.raises(InputError, match="shows other images"):
        review.annotators.push(digits_gallery(labels=(8, 3, 0, 2)))


def test_a_project_of_the_same_number_on_another_server_is_not_taken_for_the_runs(make_review):
    review, other = make_review(), make_review()
    review.annotators.push(review.gallery)
    record = other.annotators.push(other.gallery)
    other.api._sdk.projects.delete(id=record.number)
    text = other.run.store.read("labeling.json").decode()
    other.run.store.write(
        "labeling.json", re.sub(r'"project": \d+', f'"project": {review.state.number}', text).encode()
    )
    with pytest.raises(InputError, match=f"lacks the mark {record.mark}"):
        other.annotators.push(other.gallery)


def test_batches_are_bounded_in_number_and_bytes(monkeypatch):
    monkeypatch.setattr(tasks, "BATCH_TASKS", 3)
    monkeypatch.setattr(tasks, "BATCH_BYTES", 1000)
    sizes = [10, 10, 10, 10, 900, 900, 2000, 10]
    found = list(tasks.batches({"x": "a" * size} for size in sizes))
    assert [len(batch) for batch in found] == [3, 2, 1, 1, 1]


@pytest.mark.parametrize("damage", ["delete", "edit"])
def test_a_task_that_is_deleted_or_edited_while_waiting_ends_the_wait(
    make_review, accounts, monkeypatch, damage
):
    review = make_review()
    review.annotators.push(review.gallery)
    review.annotators.wait, review.annotators.first_pause_s = True, 0.01
    task = review.tasks()["s000-i00"].id

    def damage_task(_: float) -> None:
        if damage == "delete":
            review.api.delete_task(task)
        else:
            accounts[0].http.patch(
                f"/api/tasks/{task}/", json={"data": {"image": "https://example.org/x.png"}}
            )

    monkeypatch.setattr("services.labeling.annotators.sleep", damage_task)
    with pytest.raises(InputError, match="were deleted" if damage == "delete" else "was edited"):
        review.annotators.review(review.gallery)


def test_a_wait_says_that_the_server_does_not_answer_and_that_it_does_again(make_review, monkeypatch, caplog):
    review = make_review()
    annotators, pull = review.annotators, review.annotators._pull
    annotators.wait, annotators.first_pause_s = True, 0.01
    numbers = itertools.count()

    def pulling(*args):
        number = next(numbers)
        if number in (1, 2):
            raise ServiceError("gone")
        if number == 5:
            raise KeyboardInterrupt
        return pull(*args)

    monkeypatch.setattr(annotators, "_pull", pulling)
    monkeypatch.setattr("services.labeling.annotators.sleep", lambda _: None)
    with caplog.at_level("INFO", "defuse"), pytest.raises(KeyboardInterrupt):
        annotators.review(review.gallery)
    told = [text for text in caplog.messages if "gone" in text or "goes on" in text]
    assert told == ["review: gone", "review: gone", "review: the wait goes on"]


def test_a_project_whose_mark_was_lost_is_kept_with_its_answers(make_review, accounts):
    review = make_review()
    number = review.annotators.push(review.gallery).number
    accounts[0].answer(review.tasks()["s000-i00"].id, "image", "8")
    review.api.update_project(number, description="our digits")
    with pytest.raises(InputError, match="put the mark back"):
        review.annotators.status(review.gallery)
    assert review.annotators.push(review.gallery, repair=True).number == number
    assert review.state.mark in review.api.project(number).settings.description
    assert review.annotators.status(review.gallery).given == 1


def test_a_project_with_the_tasks_of_another_run_is_not_taken_over_by_a_repair(make_review):
    review, other = make_review(), make_review(gallery=digits_gallery(labels=(8, 3, 0, 2)))
    number = review.annotators.push(review.gallery).number
    other.api._sdk.projects.delete(id=other.annotators.push(other.gallery).number)
    text = other.run.store.read("labeling.json").decode()
    other.run.store.write("labeling.json", re.sub(r'"project": \d+', f'"project": {number}', text).encode())
    assert other.annotators.push(other.gallery, repair=True).number != number
    assert review.state.mark in review.api.project(number).settings.description


@pytest.mark.parametrize("how", ["lose", "cut"])
def test_a_lost_reply_to_a_deletion_does_not_end_the_push(make_review, proxy, how):
    review = make_review()
    number = review.annotators.push(review.gallery).number
    review_tasks = ReviewTasks(review.gallery, review.run.spec.review)
    review.api.import_tasks(number, [review_tasks.task(0, secret=review.state.secret)])
    getattr(proxy, how)("DELETE", "/api/tasks")
    review.through(proxy.address).push(review.gallery)
    assert len(review.tasks()) == 12


def test_a_state_of_another_version_is_an_error_that_says_what_to_do(make_review):
    review = make_review()
    review.run.store.write("labeling.json", b'{"mark": "defuse-1", "gallery": "x", "config": "y"}')
    with pytest.raises(
        InputError, match="found something else; finish the review with the version that began"
    ):
        review.annotators.status(review.gallery)
