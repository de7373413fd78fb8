"""`python -m services.cli`: the command line where it is not installed, as in a job on a cluster."""

from services.cli import main

main()
