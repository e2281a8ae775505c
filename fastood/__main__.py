"""``fastood`` and ``python -m fastood``."""

import os
import signal
import sys


def main() -> None:
    """Run the command line, or say what it needs."""
    if sys.stderr is None:  # closed, as by 2>&-
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 (until the end)
    try:
        from fastood.cli import app
    except ModuleNotFoundError as error:
        if error.name not in ("typer", "rich"):
            raise
        sys.exit('The command line needs more packages: pip install "fastood[cli]"')
    # A polite kill and a closed terminal unwind the stack, so that no half-written file stays behind.
    received: list[int] = []

    def stop(number: int, _: object) -> None:
        received.append(number)
        sys.exit(128 + number)

    for name in ("SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) is not signal.SIG_IGN:  # as nohup sets it
            signal.signal(number, stop)
    try:
        app()
    except SystemExit:
        if received:  # whatever became of the exit on its way through other people's code
            sys.exit(128 + received[0])
        raise


if __name__ == "__main__":
    main()
