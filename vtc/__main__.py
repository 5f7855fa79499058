"""`python -m vtc`: the `vtc` command."""

from vtc.cli.__main__ import main

if __name__ == "__main__":
    main()
