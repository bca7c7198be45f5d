"""`python -m transformers_tiedmoe.cli`: the command `tiedmoe` for `accelerate launch -m`, which takes a module."""

from tiedmoe_cli import main

if __name__ == "__main__":
    main()
