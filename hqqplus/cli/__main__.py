"""`python -m hqqplus.cli`."""

from hqqplus.cli import main

main()
