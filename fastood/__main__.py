"""``fastood`` and ``python -m fastood``."""

import signal
import sys


def main() -> None:
    """Run the command line, or say what it needs."""
    try:
        from fastood.cli import app
    except ModuleNotFoundError as error:
        if error.name not in ("typer", "rich"):
            raise
        sys.exit('The command line needs more packages: pip install "fastood[cli]"')
    # A polite kill unwinds the stack, so that no half-written file stays behind.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    app()


if __name__ == "__main__":
    main()
