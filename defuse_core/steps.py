"""The steps of a run, apart from the run file: the command line knows them without the import of its sections."""

STEPS = ("train", "identify", "distill", "draw", "review", "correct", "report")
MOST_MINUTES = 10_000  # that a run can be planned for
