"""``python -m llmtailor``."""

from .cli.main import main

main()
