"""`python -m dpo`: the command `dpo`."""

from dpo.commands import main

if __name__ == "__main__":
    main()
