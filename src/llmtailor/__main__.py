"""The entry of the ``llmtailor`` command and of ``python -m llmtailor``."""

import sys

__all__ = ["main"]


def main() -> None:
    """Run the command line.

    It is imported here, since Ctrl-C may come while it is, too; commands handle their own.
    """
    try:
        from .cli.main import main as run

        run()
    except KeyboardInterrupt:
        sys.stderr.write("\ninterrupted\n")
        raise SystemExit(130) from None  # 128 + SIGINT, as in cli/_errors.py, which is not there yet


if __name__ == "__main__":
    main()
