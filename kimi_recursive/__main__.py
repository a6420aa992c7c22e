"""`python -m kimi_recursive`: the command `kimi-recursive`."""

from kimi_recursive.cli import main

main()
