"""The Label Studio project of a run: created once and filled with each task once, wherever a push is interrupted.

A write may have taken effect although its reply was lost. So the project has a mark that is stored in the run before
the project exists, and tasks have keys: a push lists them, imports the missing ones and drops unanswered duplicates.
"""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, replace

import numpy as np
from tenacity import Retrying, retry_if_exception_type, stop_after_attempt, wait_exponential

from defuse_core.artifacts import I64
from defuse_core.errors import InputError, ServiceError
from defuse_core.formatting import count_of
from defuse_core.runs import Run
from services.labeling.annotations import AUTHORS_KEY, delete_skips, delete_unreadable
from services.labeling.client import LabelStudioClient, RejectedRequestError
from services.labeling.records import (
    STATE_KEY,
    PreselectedAnswer,
    Project,
    ProjectSettings,
    ProjectState,
    Task,
    read_state,
    set_aside,
    update_state,
)
from services.labeling.tasks import (
    ReviewTasks,
    batches,
    interface_edit,
    is_edited,
    project_settings,
    run_label,
)

log = logging.getLogger("defuse")
ATTEMPTS = 4
PAUSE_S = 1.0
# a page has a list of them below each picture: with 300, 13 s of a browser's processor time
MANY_CLASSES = 200
PAGE = ("label_config", "expert_instruction", "show_instruction")  # settings of the labelling page


class ReviewProject:
    """The project of one run on one server, as it should be and as it is.

    Where someone deleted or edited what was pushed, InputError is raised, or with `repair` it is put back.
    """

    def __init__(
        self,
        client: LabelStudioClient,
        run: Run,
        tasks: ReviewTasks,
        *,
        prelabels: Mapping[int, PreselectedAnswer] | None = None,
        repair: bool = False,
    ) -> None:
        """`prelabels` are in the order in which annotators get the tasks; without them that is by scenario."""
        self.client, self.run, self.tasks, self.repair = client, run, tasks, repair
        self.prelabels = prelabels or {}
        self.state = read_state(run.store, tasks.gallery)
        self.is_closed = run.store.exists("votes.safetensors")
        self.repair_command = f"`{run.command('review push', '--repair')}`"

    def push(self) -> ProjectState:
        """Create the project if it does not exist, import the tasks that it lacks, and return the new state."""
        self._update_state(lambda known: known)  # stores the mark, before a project has it
        project = self.find()
        if project is None:
            if self.is_closed:
                raise InputError(
                    f"the votes of run {self.run.name} are stored, and {self.client.address} has no project with their "
                    f"answers; `{self.run.command('review reopen', '--discard')}` deletes the votes, to ask people "
                    "again"
                )
            if self.state.project is not None:  # a replacement of a lost project needs a mark of its own
                kept = set_aside(self.run.store, self.state, STATE_KEY, AUTHORS_KEY)
                log.warning("project %d is gone; creating another (kept: %s)", self.state.project, kept)
                self._update_state(
                    lambda known: replace(ProjectState.new(known.gallery), people=known.people)
                )
            self.run.store.delete(AUTHORS_KEY)  # of the annotations of another project
            project = self.create()
        number, address, organization = project.id, self.client.address, self.client.organization()
        self._update_state(
            lambda known: replace(known, project=number, address=address, organization=organization)
        )
        self._check_settings(project)
        self.import_missing()
        if self.repair:
            listed = (task for _, task in self._list_tasks(with_data=False))
            delete_skips(self.client, listed, self.tasks, self.run.store)
        self._update_state(lambda known: replace(known, pushed=True))
        return self.state

    def pull(self) -> Iterator[Task]:
        """Find the project, and return an iterator over its tasks with their annotations.

        Raises InputError if the project was deleted or its labelling interface edited, and while it is read for a task
        that was edited, and at the end if tasks are missing: answers could be misread.
        """
        if (project := self.find()) is not None:
            self._check_settings(project)
        return self._checked_tasks()

    def _checked_tasks(self) -> Iterator[Task]:
        missing = np.ones(len(self.tasks), bool)
        for index, task in self._list_tasks():
            if index is not None:
                if is_edited(task, self.state.secret):
                    raise InputError(self._edited(task))
                missing[index] = False
            yield task
        if missing.any() and not self.state.pushed:
            raise InputError(
                f"project {self.state.number} has {len(self.tasks) - missing.sum()} of {len(self.tasks)} tasks: its "
                f"push is under way or was interrupted; `{self.run.command('review push')}` completes it"
            )
        if missing.any():
            raise InputError(self._deleted(np.flatnonzero(missing).tolist()))

    def _list_tasks(self, with_data: bool = True) -> Iterator[tuple[int | None, Task]]:
        """Yield the tasks and their indices; a second list has those that deletions between pages hid in the first."""
        missing = np.ones(len(self.tasks), bool)
        for task in self.client.tasks(self.state.number, with_data):
            if (index := self.tasks.index_of(task.key)) is not None:
                missing[index] = False
            yield index, task
        if missing.any():
            for task in self.client.tasks(self.state.number, with_data):
                if (index := self.tasks.index_of(task.key)) is not None and missing[index]:
                    yield index, task

    def settings(self) -> ProjectSettings:
        """Return the settings that the project should have."""
        return project_settings(self.tasks, self.run.name, self.state.mark)

    def find(self) -> Project | None:
        """Return the run's project; None if there is none yet, or if it is lost and to be replaced.

        Records the number of a project that was restored under another one, and with `repair` puts its mark back.
        """
        state = self.state
        project = None if state.project is None else self.client.project(state.project)
        if project is not None and state.mark in project.settings.description:
            return project
        marked = next(iter(self.client.find_projects(state.mark)), None)
        if state.project is None:
            return marked
        elsewhere = state.address != self.client.address
        if marked is not None:
            log.warning("project %d is now project %d, by its mark", state.project, marked.id)
            people = {} if elsewhere else state.people  # user ids are of other people
            self.run.store.delete(AUTHORS_KEY)  # the annotations have other ids
            self._update_state(lambda known: replace(known, project=marked.id, people=people))
            return marked
        if project is None:
            self._expect_its_organization()
        elif self.repair and self._holds_our_tasks(project):
            self.client.update_project(project.id, description=self.settings().description)
            log.warning(
                "project %d: put the mark of run %s back into its description", project.id, self.run.name
            )
            return project
        if self.repair and not elsewhere:
            return None
        raise self._lost(project)

    def _lost(self, project: Project | None) -> InputError:
        """Return the error of a run whose project is gone, or has another mark: that is `project` then."""
        state, elsewhere = self.state, self.state.address != self.client.address
        another = f"{self.repair_command} creates another"
        if elsewhere:  # more likely a wrong address than a server that is gone, and its answers with it
            another = f"to begin anew here, rename {STATE_KEY} and {AUTHORS_KEY} in {self.run.store.address}"
        if self.is_closed:
            another = f"the stored votes of run {self.run.name} hold the answers that it had"
        if project is None:
            cause = f"was deleted from {self.client.address}, its answers with it"
            if elsewhere:
                cause = f"is not at {self.client.address} but {state.address}; correct LABEL_STUDIO_URL"
            return InputError(f"project {state.project} {cause}; {another}")
        return InputError(
            f"project {state.project} at {self.client.address} is not this run's, which was pushed to "
            f"{state.address}: its description lacks the mark {state.mark}; "
            f"correct LABEL_STUDIO_URL, or let {self.repair_command} put the mark back if the project has the run's "
            f"tasks; else {another}"
        )

    def _expect_its_organization(self) -> None:
        """Raise InputError where the token cannot see the project: its account works in another organisation."""
        state, found = self.state, self.client.organization()
        if state.address == self.client.address and state.organization != found:
            raise InputError(
                f"project {state.project} is in organisation {state.organization} of {state.address}, and the account "
                f"of LABEL_STUDIO_API_KEY works in {'none' if found is None else found}; use a token of an "
                "administrator of that organisation"
            )

    def create(self) -> Project:
        """Create the project, which find() has not found, unless an attempt whose reply was lost did."""
        self.client.check_access(to_create=True)
        if others := self.client.find_projects(run_label(self.run.name)):
            log.warning(
                "found project %s at %s, of a replaced or deleted run called %s, or of one in another store: ask whose "
                "it is; rename it in its settings (`old, do not label`) only if nobody wants its answers any more, or "
                "give this run another name",
                ", ".join(str(project.id) for project in others),
                self.client.address,
                self.run.name,
            )
        if self.tasks.whole_pages and (classes := len(self.tasks.gallery.classes)) >= MANY_CLASSES:
            slow = "takes a browser many seconds; a run of another name with form: image shows one picture at a time"
            log.warning("review: with %d classes a page of review.form: scenario %s", classes, slow)
        for attempt in _attempts():
            with attempt:
                again = attempt.retry_state.attempt_number > 1
                if again and (known := self.client.find_projects(self.state.mark)):
                    return known[0]
                created = self.client.create_project(self.settings())
        log.info("review: created project %d at %s", created.id, self.client.labeling_url(created.id))
        return created

    def import_missing(self) -> None:
        """Import the tasks that the project lacks, and drop unanswered duplicates."""
        order = self.prelabels or range(len(self.tasks))  # in which annotators get the tasks
        for attempt in _attempts():
            with attempt:
                present = self.drop_duplicates()
                if missing := [index for index in order if not present[index]]:
                    self._import(missing)
                    present = self.drop_duplicates()
        if not present.all():  # not tried again here: tasks that the server does not list would multiply
            raise ServiceError(f"project {self.state.project} lacks tasks after an import; run again")

    def drop_duplicates(self) -> I64:
        """Drop duplicates that nobody answered, and return each task's id in Label Studio, (T,), 0 where it is missing.

        A repair also deletes edited tasks, and warns how many answers these had.
        """
        present, answered = np.zeros(len(self.tasks), np.int64), np.zeros(len(self.tasks), bool)
        # id -> key and answers; deleted later: a deletion while listing would shift the pages
        dropped: dict[int, tuple[str, int]] = {}
        unknown = 0
        for index, task in self._list_tasks():
            if index is None:
                unknown += 1
            elif is_edited(task, self.state.secret):
                if not self.repair:
                    raise InputError(self._edited(task))
                answers = sum(not annotation.was_cancelled for annotation in task.annotations)
                dropped[task.id] = str(task.key), answers
            elif present[index] and not task.annotations:
                dropped[task.id] = str(task.key), 0
            elif not answered[index]:  # annotations.py reads two answered ones as one
                if first := int(present[index]):
                    dropped[first] = str(task.key), 0
                present[index], answered[index] = task.id, bool(task.annotations)
        for number, (key, answers) in dropped.items():
            self.client.delete_task(number)
            lost = f", with {count_of(answers, 'answer')}" if answers else ""
            what = "review: deleted task %d, a duplicate or an edited version of %s%s"
            log.log(logging.WARNING if answers else logging.INFO, what, number, key, lost)
        if unknown:
            log.warning(
                "project %d also contains %s that Defuse did not import; left there",
                self.state.number,
                count_of(unknown, "task"),
            )
        return present

    def _import(self, missing: list[int]) -> None:
        if self.state.pushed and not self.repair:
            raise InputError(self._deleted(missing))
        secret = self.state.secret
        made = (self.tasks.task(index, self.prelabels.get(index), secret=secret) for index in missing)
        for batch in batches(made):
            self.client.import_tasks(self.state.number, batch)
        log.info("review: pushed %s to project %d", count_of(len(missing), "task"), self.state.number)

    def _deleted(self, missing: list[int]) -> str:
        return (
            f"project {self.state.project}: {len(missing)} of {len(self.tasks)} tasks were deleted in Label Studio "
            f"(first {self.tasks.subject(missing[0]).key}); {self.repair_command} puts them back"
        )

    def _edited(self, task: Task) -> str:
        return (
            f"project {self.state.number}: task {task.id} ({task.key}) was edited in Label Studio and no longer "
            f"shows what was pushed; {self.repair_command} replaces it and deletes its answers"
        )

    def _holds_our_tasks(self, project: Project) -> bool:
        """Whether the project has no other run's mark and has a task of this review that nobody edited."""
        has_mark = re.search(r"defuse-[0-9a-f]{16}", project.settings.description)
        return not has_mark and any(
            self.tasks.index_of(task.key) is not None and not is_edited(task, self.state.secret)
            for task in self.client.tasks(project.id, with_data=True)
        )

    def _check_settings(self, project: Project) -> None:
        """Log once what someone changed in the project. Raises InputError where its answers would be misread."""
        state, found = self.state, project.settings
        if state.title and found.title != state.title:
            log.warning(
                "project %d was renamed from %r to %r; it is still used", project.id, state.title, found.title
            )
        # another number of answers would also change the queue, which a closed review leaves as it is
        if not self.is_closed:
            self._put_back(project, "maximum_annotations", "show_skip_button", "show_collab_predictions")
        if not state.interface:  # just created
            wanted = self.settings().label_config
            state = replace(state, interface=wanted, instructions=found.expert_instruction)
        if edits := self._page_edits(state, found):
            handle = self._restore_page if self.repair else self._log_page_edits
            state = handle(project, state, edits)
        page = {name: getattr(state, name) for name in ("interface", "instructions", "reported")}
        asked = self.tasks.review.answers_per_task
        self._update_state(
            lambda known: replace(known, title=found.title, most_asked=max(known.most_asked, asked), **page)
        )

    def _restore_page(self, project: Project, state: ProjectState, edits: list[str]) -> ProjectState:
        """Put the labelling page and its instructions back, and return the state with what Label Studio stored."""
        wanted = self.settings()
        page = {name: getattr(wanted, name) for name in PAGE}
        try:
            self.client.update_project(project.id, **page)
        except RejectedRequestError:
            delete_unreadable(self.client, project.id, self.tasks)
            try:
                self.client.update_project(project.id, **page)
            except RejectedRequestError as error:
                raise InputError(
                    f"project {project.id}: its labelling page cannot be put back while there are answers or drafts in "
                    f"what was added to it; delete these in Label Studio ({error})"
                ) from error
        log.warning("project %d: put the labelling page back (%s)", project.id, "; ".join(edits))
        restored = self.client.project(project.id)
        stored = restored.settings.expert_instruction if restored else ""
        return replace(state, interface=wanted.label_config, instructions=stored, reported="")

    def _log_page_edits(self, project: Project, state: ProjectState, edits: list[str]) -> ProjectState:
        """Log edits of the page that do not change what answers mean, once, and return the state with their digest."""
        reported = hashlib.sha256(repr((edits, project.settings.label_config)).encode()).hexdigest()
        if reported != state.reported:
            log.warning(
                "project %d: %s of its labelling page was edited, which does not change what answers mean; %s puts it "
                "back",
                project.id,
                " and ".join(edits),
                self.repair_command,
            )
        return replace(state, reported=reported)

    def _page_edits(self, pushed: ProjectState, found: ProjectSettings) -> list[str]:
        """Return what differs from the labelling page as pushed. Raises InputError if answers could be misread."""
        edits = []
        if (edit := interface_edit(pushed.interface, found.label_config)) is not None:
            if edit.changes_answers and not self.repair:
                raise InputError(
                    f"project {self.state.project}: its labelling interface was edited in Label Studio "
                    f"({edit.description}), so answers could be misread; undo the edit, or run {self.repair_command}"
                )
            edits.append(str(edit))
        if found.expert_instruction != pushed.instructions or not found.show_instruction:
            edits.append("the instructions")
        return edits

    def _put_back(self, project: Project, *names: str) -> None:
        """Set settings again that a review depends on and that someone changed."""
        wanted, found = asdict(self.settings()), asdict(project.settings)
        for name in names:
            if found[name] != wanted[name]:
                self.client.update_project(project.id, **{name: wanted[name]})
                line = "project %d: set %s to %s, as this run requires; it was %s"
                log.warning(line, project.id, name, wanted[name], found[name])

    def _update_state(self, change: Callable[[ProjectState], ProjectState]) -> None:
        self.state = update_state(self.run.store, self.state, change)


def _attempts() -> Retrying:
    """Retry after lost replies and server failures, with growing pauses; the last failure is raised."""
    return Retrying(
        retry=retry_if_exception_type(ServiceError),
        stop=stop_after_attempt(ATTEMPTS),
        wait=wait_exponential(multiplier=PAUSE_S),
        reraise=True,
    )
