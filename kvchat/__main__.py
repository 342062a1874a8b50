"""`python -m kvchat` is the command `kvchat`."""

from kvchat.cli import main

main()
