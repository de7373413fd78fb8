"""What a push leaves where it ends early, and what a repair keeps."""

from __future__ import annotations

import itertools
import secrets
from dataclasses import replace
from types import SimpleNamespace

import httpx
import pytest
from label_studio_live import digits_gallery, invitation_to, review_run, settings_for, sign_up
from planted_review import annotation, blank_review, task_of
from proxy import LOSE, Reply

from defuse_core.errors import InputError, ServiceError
from defuse_core.runs import Run
from defuse_core.store import FolderStore
from services.labeling.annotations import AUTHORS_KEY, read_authors
from services.labeling.annotators import LabelStudioAnnotators
from services.labeling.client import LabelStudioClient
from services.labeling.local_server import LocalServer
from services.labeling.project import ReviewProject
from services.labeling.records import choice_result, update_state, write_state
from services.labeling.tasks import ReviewTasks


def test_a_push_that_ends_with_a_lost_reply_makes_no_second_project(make_review, proxy):
    review, made = make_review(), []
    before = len(review.api.find_projects(""))

    def end(method: str, path: str) -> str | Reply | None:
        if made:
            return Reply(503)
        if method == "POST" and path.startswith("/api/projects"):
            made.append(path)
            return LOSE
        return None

    proxy.rule = end
    with pytest.raises(ServiceError, match="503"):
        review.through(proxy.address).push(review.gallery)
    review.annotators.push(review.gallery)  # another process, later
    assert len(review.api.find_projects("")) == before + 1


def test_tasks_of_a_push_that_was_interrupted_are_not_said_to_be_deleted(make_review, monkeypatch):
    review = make_review()
    monkeypatch.setattr("services.labeling.tasks.BATCH_TASKS", 5)
    send, sent = LabelStudioClient.import_tasks, []

    def once(*args):
        if sent:
            raise KeyboardInterrupt
        sent.append(send(*args))

    monkeypatch.setattr(LabelStudioClient, "import_tasks", once)
    with pytest.raises(KeyboardInterrupt):
        review.annotators.push(review.gallery)
    with pytest.raises(
        InputError, match=r"has 5 of 12 tasks: its push .* `defuse review push run\d+ --store .*` completes"
    ):
        review.annotators.status(review.gallery)


def test_another_project_for_a_run_of_the_same_name_is_named(make_review, caplog):
    review = make_review()
    number = review.annotators.push(review.gallery).number
    assert "found project" not in caplog.text
    review.run.store.delete("labeling.json")  # as of a run that was deleted, or one in another store
    assert review.annotators.push(review.gallery).number != number
    assert (
        f"found project {number} at {review.api.address}, of a replaced or deleted run called {review.run.name}, or of "
        "one in another store: ask whose it is; rename it in its settings (`old, do not label`) only if nobody wants"
        in caplog.text
    )
    review.api._sdk.projects.delete(id=number)


def test_a_replaced_project_keeps_the_numbers_of_annotators(make_review):
    review = make_review()
    first = review.annotators.push(review.gallery)
    update_state(review.run.store, first, lambda known: known.with_annotators([70, 50]))
    store, stored = review.run.store, review.run.store.read("labeling.json")
    store.write(AUTHORS_KEY, b'{"70": [1]}')
    review.api._sdk.projects.delete(id=first.number)
    second = review.annotators.push(review.gallery, repair=True)
    assert second.mark != first.mark and second.people == {"70": 1, "50": 2}
    assert read_authors(store) == {}
    own = f"-{first.number}-{first.mark[-4:]}.json"
    assert store.read(f"labeling{own}") == stored
    assert store.read(f"annotation_authors{own}") == b'{"70": [1]}'


def test_a_project_that_has_another_number_now_is_found_by_its_mark(make_review, accounts, caplog):
    """As one that was imported again from an export."""
    review = make_review(answers_per_task=1)
    pushed = review.annotators.push(review.gallery)
    accounts[0].answer(review.tasks()["s000-i00"].id, "image", "8")
    write_state(review.run.store, replace(pushed, project=10**6))
    assert review.annotators.status(review.gallery).given == 1
    assert f"project 1000000 is now project {pushed.number}" in caplog.text
    assert review.annotators.push(review.gallery).number == pushed.number


def test_a_project_that_moved_to_another_server_is_found_without_the_authors_of_the_old_one(
    make_review, accounts, caplog
):
    review = make_review(answers_per_task=1)
    pushed, store = review.annotators.push(review.gallery), review.run.store
    given = accounts[0].answer(review.tasks()["s000-i00"].id, "image", "8")
    write_state(store, replace(pushed, project=10**6, address="http://old", people={"70": 1}))
    store.write(AUTHORS_KEY, b'{"70": [1, 2]}')
    assert review.annotators.status(review.gallery).per_annotator() == {"annotator-1": 1}
    assert list(read_authors(store)) == [given] and "70" not in review.state.people
    assert "has lost" not in caplog.text


def test_a_task_that_a_deletion_between_two_pages_hides_is_not_taken_for_deleted(
    make_review, accounts, monkeypatch
):
    review = make_review()
    review.annotators.push(review.gallery)
    review.everyone_answers(accounts[:1], lambda _: "8")
    listed, lists, hidden = review.api.tasks, itertools.count(), review.tasks()["s002-i01"].id

    def every_other_list_hides_one(*given: object, **options: object):
        hides = next(lists) % 2 == 0
        return (task for task in listed(*given, **options) if not hides or task.id != hidden)

    with monkeypatch.context() as patch:
        patch.setattr(review.annotators.client, "tasks", every_other_list_hides_one)
        assert review.annotators.status(review.gallery).given_per_task.tolist() == [1] * 12
        authors = read_authors(review.run.store)
        for repair in (False, True):
            review.annotators.push(review.gallery, repair=repair)
    assert len(review.tasks()) == 12
    assert len(authors) == 12 and read_authors(review.run.store) == authors


def test_a_project_on_another_server_begins_without_the_annotators_and_authors_of_the_lost_one(
    make_review, proxy
):
    """There the ids of users and of annotations are those of others."""
    review = make_review()
    first, store = review.annotators.push(review.gallery), review.run.store
    update_state(store, first, lambda known: known.with_annotators([70]))
    store.write(AUTHORS_KEY, b'{"70": [1]}')
    review.api._sdk.projects.delete(id=first.number)
    before = store.read("labeling.json")
    with pytest.raises(InputError, match=r"to begin anew here, rename labeling\.json and annotation_authors"):
        review.through(proxy.address).push(review.gallery, repair=True)
    assert store.read("labeling.json") == before
    store.delete("labeling.json")
    store.delete(AUTHORS_KEY)
    second = review.through(proxy.address).push(review.gallery, repair=True)
    assert second.address == proxy.address and second.people == {} and read_authors(store) == {}


@pytest.fixture
def removed_token(server: LocalServer) -> str:
    """The token of an account that was removed from its organisation."""
    with sign_up(server.address, invitation_to(server), f"left-{secrets.token_hex(4)}@example.org") as left:
        user = left.http.get("/api/current-user/whoami").json()
        token = str(left.http.headers["Authorization"].removeprefix("Token "))
        membership = f"/api/organizations/{user['active_organization']}/memberships/{user['id']}/"
        administrator = {"Authorization": f"Token {server.token}"}
        removal = httpx.delete(f"{server.address}{membership}", headers=administrator, trust_env=False)
        assert removal.status_code == 204
    return token


def test_a_project_is_not_taken_for_deleted_by_an_administrator_who_was_removed(
    make_review, server, removed_token
):
    review = make_review()
    review.annotators.push(review.gallery)
    environment = replace(settings_for(server), label_studio_api_key=removed_token)
    theirs = LabelStudioAnnotators(review.run, environment)
    for repair in (False, True):
        with pytest.raises(InputError, match=r"is in organisation 1 of http.*API_KEY works in none; use a"):
            theirs.push(review.gallery, repair=repair)
    assert len(review.tasks()) == 12


def test_an_administrator_who_was_removed_gets_no_project_to_which_nothing_can_be_added(
    make_review, server, removed_token
):
    review = make_review()
    environment = replace(settings_for(server), label_studio_api_key=removed_token)
    for _ in ("before anything is computed", "where a push was interrupted before it had a project"):
        with pytest.raises(
            InputError, match="works in no organisation of http.*: it was removed from its own"
        ):
            LabelStudioAnnotators(review.run, environment).push(review.gallery)
        write_state(review.run.store, review.state)


@pytest.mark.parametrize("repair", [False, True])
def test_a_project_that_the_tokens_organisation_cannot_see_is_not_taken_for_deleted(make_review, repair):
    """Label Studio answers 404 for both, and a repair of a project with answers would lose them."""
    review = make_review()
    pushed = review.annotators.push(review.gallery)
    assert pushed.organization == review.api.organization()
    review.api._sdk.projects.delete(id=pushed.number)  # as an account of another organisation sees it
    stored = update_state(review.run.store, pushed, lambda known: replace(known, organization=99))
    with pytest.raises(InputError, match=r"is in organisation 99 of http.*API_KEY works in 1; use a token"):
        review.annotators.push(review.gallery, repair=repair)
    assert review.state == stored


def test_a_server_without_the_project_is_not_said_to_have_deleted_it(make_review, proxy):
    review = make_review()
    pushed = review.annotators.push(review.gallery)
    review.api._sdk.projects.delete(id=pushed.number)
    with pytest.raises(
        InputError, match=f"is not at {proxy.address} but {review.api.address}; correct LABEL"
    ):
        review.through(proxy.address).push(review.gallery)


def test_a_title_is_as_long_as_label_studio_accepts(tmp_path):
    gallery = digits_gallery()
    spec = review_run(tmp_path, gallery).spec
    run = Run.start(FolderStore(tmp_path), "r" * 60, spec)
    title = ReviewProject(None, run, ReviewTasks(gallery, spec.review)).settings().title
    assert title == f"Defuse {'r' * 43}" and len(title) == 50


def test_of_copies_an_unanswered_one_is_dropped_and_of_two_answered_ones_none(tmp_path):
    run, tasks = blank_review(tmp_path, 1)
    given, deleted = annotation(1, 3), []
    client = SimpleNamespace(tasks=lambda *_: iter(found), delete_task=deleted.append)
    project = ReviewProject(client, run, tasks)
    project.state = replace(project.state, project=1)
    pushed = tasks.task(0, secret=project.state.secret)
    for order, dropped in (
        (((1,), (2,)), [2]),
        (((1, given), (2,)), [2]),
        (((1,), (2, given)), [1]),
        (((1, given), (2, given)), []),
        (((1,), (2, given), (3, given), (4,)), [1, 4]),
    ):
        deleted.clear()
        copies = {number: task_of(tasks, 0, *notes, number=number) for number, *notes in order}
        found = [
            replace(copy, data=pushed["data"], digest=pushed["meta"]["digest"]) for copy in copies.values()
        ]
        kept = project.drop_duplicates()[0]
        assert deleted == dropped and kept in copies.keys() - set(dropped)


def test_tasks_that_the_server_does_not_list_are_imported_once(tmp_path):
    run, tasks = blank_review(tmp_path, 1)
    imported = []
    client = SimpleNamespace(
        tasks=lambda number, with_data: iter(()), import_tasks=lambda number, batch: imported.extend(batch)
    )
    project = ReviewProject(client, run, tasks)
    project.state = replace(project.state, project=1)
    with pytest.raises(ServiceError, match="project 1 lacks tasks after an import; run again"):
        project.import_missing()
    assert len(imported) == len(tasks)


def test_a_repair_deletes_no_skip_of_a_task_that_defuse_did_not_import(make_review, accounts):
    review = make_review()
    number = review.annotators.push(review.gallery).number
    review.api.import_tasks(number, [{"data": {"image": "data:image/png;base64,AAAA"}}])
    (stranger,) = (task.id for task in review.api.tasks(number) if task.key is None)
    accounts[0].submit(stranger, [], was_cancelled=True)
    review.annotators.push(review.gallery, repair=True)
    (kept,) = (task for task in review.api.tasks(number) if task.key is None)
    assert [one.was_cancelled for one in kept.annotations] == [True]


def test_a_project_with_another_runs_mark_is_not_taken_over_although_it_shows_the_same(make_review):
    """As copies of a run do, whose digests have one secret."""
    review, other = make_review(), make_review()
    for one in (review, other):
        write_state(one.run.store, replace(one.state, secret="shared"))
    number = review.annotators.push(review.gallery).number
    write_state(other.run.store, replace(other.state, project=number, address=review.api.address))
    assert other.annotators.push(other.gallery, repair=True).number != number
    assert review.state.mark in review.api.project(number).settings.description


def test_a_project_without_a_mark_is_taken_over_only_with_this_runs_own_tasks(make_review):
    review, other = make_review(), make_review(gallery=digits_gallery(labels=(8, 3, 0, 2)))
    number = review.annotators.push(review.gallery).number
    review.api.update_project(number, description="our digits")
    write_state(other.run.store, replace(other.state, project=number, address=review.api.address))
    assert other.annotators.push(other.gallery, repair=True).number != number
    assert review.annotators.push(review.gallery, repair=True).number == number


@pytest.mark.parametrize(
    "old, new, answer",
    [
        (
            '<Choices name="label"',
            '<Choices name="quality" toName="image"><Choice value="good"/></Choices><Choices name="label"',
            choice_result("quality", "image", "good"),
        ),
        ('<Choice value="7"', '<Choice value="seven"', choice_result("label", "image", "seven")),
    ],
)
def test_a_page_on_which_people_answered_what_was_added_is_put_back_without_these_answers(
    make_review, accounts, old, new, answer, caplog
):
    review = make_review(answers_per_task=1)
    number = review.annotators.push(review.gallery).number
    pushed = review.api.project(number).settings.label_config
    first, second = list(review.tasks().values())[:2]
    kept = accounts[0].answer(first.id, "image", "8")
    review.api.update_project(number, label_config=pushed.replace(old, new))
    accounts[1].submit(second.id, [answer])
    review.annotators.push(review.gallery, repair=True)
    assert review.api.project(number).settings.label_config == pushed
    left = [annotation.id for task in review.tasks().values() for annotation in task.annotations]
    assert left == [kept]
    assert review.annotators.status(review.gallery).given == 1


def test_a_page_that_label_studio_keeps_for_a_draft_is_named_with_the_remedy(make_review, accounts):
    review = make_review(answers_per_task=1)
    number = review.annotators.push(review.gallery).number
    pushed = review.api.project(number).settings.label_config
    added = '<Choices name="quality" toName="image"><Choice value="good"/></Choices><Choices name="label"'
    review.api.update_project(number, label_config=pushed.replace('<Choices name="label"', added))
    draft = {"result": [choice_result("quality", "image", "good")]}
    task = next(iter(review.tasks().values())).id
    accounts[0].http.post(f"/api/tasks/{task}/drafts", json=draft).raise_for_status()
    with pytest.raises(InputError, match=r"cannot be put back while there are answers or drafts .*\(400\)"):
        review.annotators.push(review.gallery, repair=True)
