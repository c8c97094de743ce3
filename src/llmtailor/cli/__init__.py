"""The command line: one file per command, which parses, asks the package and prints. No logic here."""

import os

# Looking for pydantic plugins reads the metadata of every installed package; a tenth of what `ls` takes.
os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")
