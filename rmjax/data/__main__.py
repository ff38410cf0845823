"""`python -m rmjax.data`; see command.py."""

from rmjax.data.command import main

if __name__ == "__main__":
    main()
