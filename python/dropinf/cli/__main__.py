"""`python -m dropinf.cli`, which torchrun starts."""

from . import main

main()
