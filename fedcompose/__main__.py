"""`python -m fedcompose`: the command, where its script is not on the PATH."""

from fedcompose.cli import main

main()
