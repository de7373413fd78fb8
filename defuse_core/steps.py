"""The steps of a run, and how long a plan may be: the command line knows both without importing the run file."""

STEPS = ("train", "identify", "distill", "draw", "review", "correct", "report")
MOST_MINUTES = 10_000  # longest plan
