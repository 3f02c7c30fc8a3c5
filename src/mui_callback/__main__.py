"""`python -m mui_callback` is `mui-callback`."""

from mui_callback.cli import main

main()
