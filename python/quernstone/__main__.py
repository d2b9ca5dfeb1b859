"""`python -m quernstone`, the same as the command `quernstone`."""

from quernstone.cli import main

main()
