"""What people and other systems touch: the command line, Label Studio, S3, serving."""

import sys

STOPPED = "stopped; the same command continues from here"
STOPPED_EXIT_CODE = 130  # 128 + SIGINT


def main() -> None:
    """Run the program `defuse`: Ctrl-C ends it in one line also while it imports what it needs."""
    try:
        from services.cli import main as run_command

        run_command()
    except KeyboardInterrupt:
        print(f"defuse: {STOPPED}", file=sys.stderr)
        sys.exit(STOPPED_EXIT_CODE)
