"""The program `compress`, and `python -m compress`."""

import _thread
import signal
import sys
import time
from typing import Any

INTERRUPTED = 130  # what a shell reports of a process ended by Ctrl-C
SOON = 0.1  # seconds


def main() -> None:
    """Run the command line. Ctrl-C ends it with one line at any time, while it is imported and while it ends as well."""
    sys.unraisablehook = _told_again
    try:
        from compress.cli import main as command_line

        command_line()
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second one has nothing left to stop
        sys.stderr.write("error: stopped: the same command goes on from here\n")
        sys.exit(INTERRUPTED)


def _told_again(unraisable: Any) -> None:
    """Ctrl-C that met a place where Python drops exceptions, such as `__del__`, comes once more a little later."""
    if unraisable.exc_type is KeyboardInterrupt:
        _thread.start_new_thread(_interrupt_soon, ())
    else:
        sys.__unraisablehook__(unraisable)


def _interrupt_soon() -> None:
    time.sleep(SOON)  # until the main thread has left that place
    _thread.interrupt_main()


if __name__ == "__main__":
    main()
