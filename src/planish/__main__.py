"""`python -m planish` is `planish`."""

from planish.cli import main

main()
