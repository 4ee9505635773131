"""Research systems, one file each; `flux/cli.py` finds them by listing this folder."""
