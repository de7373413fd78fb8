"""The attacks of the table of attacks that are tests: what came of each before, what comes of it now, and its test."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class AttackTest:
    """One attack; `tests` are pytest's names of the tests that make it."""

    point: int
    attack: str
    before: str
    after: str
    tests: tuple[str, ...]


STORAGE = "tests/services/storage/"
SWEEP = "tests/cluster/test_sweep.py::"
IDENTIFY = "tests/cluster/test_sharded_identify.py::"
ANNOTATIONS = "tests/services/labeling/test_annotations.py::"
AUTHORS = "tests/services/labeling/test_authors_and_skips.py::"
PROJECT = "tests/services/labeling/test_project.py::"
PICTURES = "tests/services/labeling/test_pictures.py::"
REVIEW = "tests/services/labeling/test_review_cli.py::"
BROWSER = "tests/e2e/test_label_studio.py::"
SERVING = "tests/services/serving/"

TESTS = (
    AttackTest(
        1,
        "a worker of a driver that lost the run writes a trial or shard",
        "replaces the next driver's",
        "refused",
        (
            STORAGE
            + "test_workers.py::test_a_worker_of_a_driver_before_replaces_creates_and_deletes_nothing",
            STORAGE + "test_lease.py::test_a_driver_paused_in_the_middle_of_a_write_replaces_nothing",
            IDENTIFY + "test_a_worker_of_a_driver_that_lost_its_run_is_refused_and_nothing_is_tried_again",
        ),
    ),
    AttackTest(
        1,
        "fewer epochs of a trial are stored over more; an unfinished one is read",
        "a report of an unfinished trial",
        "the longer one stays, the unfinished one goes on",
        (
            SWEEP + "test_fewer_epochs_never_replace_more",
            SWEEP + "test_an_unfinished_trial_is_never_read_as_finished",
        ),
    ),
    AttackTest(
        1,
        "a driver loses its lease while its workers run",
        "they go on for 27 s",
        "they end at once",
        (
            IDENTIFY + "test_a_driver_that_lost_its_run_ends_its_workers",
            SWEEP + "test_a_driver_that_lost_its_run_ends_its_trials",
            "tests/cluster/test_compute.py::test_a_driver_that_lost_its_run_ends_the_task_under_way",
        ),
    ),
    AttackTest(
        2,
        "the answer to a heartbeat is lost; the clock jumps",
        "one's own lease counts as somebody else's",
        "one's own is recognised, no clock decides",
        (
            STORAGE + "test_lease.py::test_a_heartbeat_whose_answer_was_lost_is_ones_own",
            STORAGE + "test_lease.py::test_a_driver_that_was_paused_replaces_nothing_whatever_its_clocks_say",
        ),
    ),
    AttackTest(
        4,
        "an account with eleven answers is deleted",
        "eleven annotators, a real vote is driven out",
        "one annotator",
        (
            AUTHORS + "test_answers_of_a_deleted_account_stay_those_of_one_annotator",
            AUTHORS
            + "test_a_deleted_account_that_was_never_seen_counts_as_one_annotator_and_drives_out_nobody",
        ),
    ),
    AttackTest(
        5,
        "a task is skipped",
        "five empty queues, an answer wanted for ever",
        "listed with what resolves it; `--repair` hands it out again",
        (
            AUTHORS
            + "test_a_skip_is_listed_while_its_task_lacks_answers_and_a_repair_hands_the_task_out_again",
            REVIEW + "test_status_shows_skips_with_the_task_and_what_resolves_them",
        ),
    ),
    AttackTest(
        5,
        "a task is deleted or edited while `--wait` waits",
        "not noticed",
        "ends the wait with one line",
        (PROJECT + "test_a_task_that_is_deleted_or_edited_while_waiting_ends_the_wait",),
    ),
    AttackTest(
        6,
        "the labelling page is edited (`alias`, `multiple`, `$image`, the question)",
        "passes as layout",
        "an error that names the edit; `--repair` puts it back",
        (
            PROJECT + "test_an_edit_that_changes_what_answers_mean_is_an_error_until_repaired",
            PROJECT + "test_an_edit_of_layout_or_instructions_is_logged_once_and_put_back_by_a_repair",
            "tests/services/labeling/test_interface.py::"
            "test_every_edit_that_can_change_what_an_answer_means_is_described",
        ),
    ),
    AttackTest(
        6,
        "a digit is typed in the drop-down of one picture",
        "changes the label of the page",
        "changes nothing else",
        (BROWSER + "test_a_scenario_is_labelled_in_the_browser_and_one_image_apart",),
    ),
    AttackTest(
        7,
        "answers come after the verdict",
        "ignored without a word",
        "`status` says so, `review reopen` takes them in",
        (REVIEW + "test_after_the_votes_are_stored_status_says_so_and_reopen_takes_later_answers_in",),
    ),
    AttackTest(
        7,
        "the mark of a project is lost; the reply to a deletion is lost",
        "abandoned with its answers; the push ends",
        "kept with its answers; the push goes on",
        (
            PROJECT + "test_a_project_whose_mark_was_lost_is_kept_with_its_answers",
            PROJECT + "test_a_lost_reply_to_a_deletion_does_not_end_the_push",
        ),
    ),
    AttackTest(
        8,
        "an annotator reads the bucket through Label Studio",
        "every key",
        "nothing: tasks hold their pictures, and Label Studio has no access",
        (PICTURES + "test_tasks_hold_their_photographs_and_label_studio_gets_no_access_to_the_store",),
    ),
    AttackTest(
        10,
        "an annotator opens the printed address",
        "the table with other people's answers",
        "the labelling stream",
        (REVIEW + "test_push_names_the_address_and_status_the_answers_so_far",),
    ),
    AttackTest(
        11,
        "another local user opens HAProxy's admin socket; /stats from another machine",
        "takes the proxy over and reads tokens",
        "files in a private folder, no other port",
        (
            SERVING + "test_proxy.py::"
            "test_haproxy_keeps_its_files_in_a_private_folder_and_listens_on_the_port_of_the_clients_only",
        ),
    ),
    AttackTest(
        12,
        "`RAY_AUTH_MODE=disabled defuse serve`",
        "any code, on every interface",
        "refused",
        (SERVING + "test_launch.py::test_defuse_serve_does_not_start_a_ray_without_authentication",),
    ),
    AttackTest(
        14,
        "`rollback` to a damaged version; a replica starts beside one",
        "in production; no answer",
        "an error, production stays; 503 with the reason",
        (
            SERVING
            + "test_registry.py::test_a_rollback_to_a_damaged_version_is_an_error_and_production_stays",
            SERVING + "test_deployment.py::"
            "test_a_replica_beside_a_damaged_version_starts_answers_503_with_the_reason_and_recovers",
        ),
    ),
    AttackTest(
        15,
        "a slow shadow or canary",
        "700 -> 110 requests/s",
        "production keeps its speed",
        (
            SERVING + "test_canary.py::test_a_shadow_computes_a_fifth_of_the_time_at_most",
            SERVING + "test_canary.py::test_a_shadow_that_does_not_answer_delays_no_answer",
            SERVING + "test_load.py::test_a_canary_that_is_too_slow_is_ended_and_production_answers_for_it",
        ),
    ),
    AttackTest(
        15,
        "200 bodies or headers drip in",
        "valid requests are locked out",
        "answered all the same",
        (
            SERVING + "test_limits.py::test_200_bodies_that_arrive_slowly_do_not_block_valid_requests",
            SERVING + "test_limits.py::test_a_connection_whose_headers_do_not_arrive_in_time_is_closed",
        ),
    ),
    AttackTest(
        16,
        "a wrong token",
        "no word for minutes",
        "one line soon",
        (
            "tests/cluster/test_jobs.py::test_joining_without_the_right_token_says_so_soon",
            "tests/cluster/test_jobs.py::test_without_the_right_token_one_line_says_what_to_set",
        ),
    ),
    AttackTest(
        18,
        "`defuse report` on a read-only store",
        "an error",
        "the tables",
        ("tests/e2e/test_cli.py::test_a_report_is_shown_where_it_cannot_be_written",),
    ),
    AttackTest(
        18,
        "`defuse delete` is killed, loses its lease, or races with the next driver",
        "a lock stays",
        "nothing stays, nothing of others is lost",
        (
            STORAGE + "test_deletion.py::test_a_deleted_run_leaves_no_lock_and_no_unfinished_writes",
            STORAGE + "test_deletion.py::test_the_run_is_held_until_the_last_of_it_is_deleted",
            STORAGE
            + "test_deletion.py::test_a_driver_that_begins_a_folder_again_while_it_is_deleted_loses_nothing",
            STORAGE + "test_deletion.py::test_a_worker_of_a_deleted_run_writes_nothing",
        ),
    ),
)
