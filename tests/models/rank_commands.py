"""`compress` as several ranks, each a process of its own, without torchrun: what it tells them is set here."""

import os
import socket

from commands import COUNT, Command, Faults, _context, _run


def free_port() -> int:
    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        return opened.getsockname()[1]


class RankCommand(Command):
    """One of `count` ranks of `compress ARGUMENTS`."""

    def __init__(self, arguments, folder, number, count, port, faults=Faults()):
        self.printed = [folder / f"{next(COUNT)}.{name}" for name in ("out", "err")]
        told = {
            "RANK": number,
            "LOCAL_RANK": number,
            "WORLD_SIZE": count,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
        }
        arguments = [str(argument) for argument in arguments]
        self.process = _context().Process(target=_rank, args=(told, arguments, self.printed, faults))
        self.process.start()
        self._cpu_seconds = 0.0


def start_ranks(arguments, folder, count: int) -> list[RankCommand]:
    """All ranks of one run."""
    port = free_port()
    return [RankCommand(arguments, folder, number, count, port) for number in range(count)]


def run_ranks(arguments, folder, count: int) -> list[RankCommand]:
    """All ranks of one run, when they have ended."""
    return [rank.finish() for rank in start_ranks(arguments, folder, count)]


def _rank(told, arguments, printed, faults) -> None:
    os.environ.update({name: str(value) for name, value in told.items()})
    _run(arguments, printed, faults)
