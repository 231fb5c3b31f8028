"""`python -m sse_rl` is the `sse-rl` command."""

from sse_rl.cli import main

main()
