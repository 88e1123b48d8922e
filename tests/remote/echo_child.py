"""Sends back the frames that it gets on an inherited socket.

A frame ``!pid`` is answered with the process id, ``!env NAME`` with that variable, ``!many N``
with N numbered frames, ``!exit N`` ends the child with that code, ``!hang`` stops it for good.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import socket
import struct
import sys

LENGTH = struct.Struct(">I")


def main() -> None:
    faulthandler.register(signal.SIGUSR1)
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    connection = socket.socket(fileno=int(sys.argv[1]))
    received = connection.makefile("rb")

    def answer(frame: bytes) -> None:
        connection.sendall(LENGTH.pack(len(frame)) + frame)

    while head := received.read(LENGTH.size):
        frame = received.read(LENGTH.unpack(head)[0])
        match frame.split():
            case [b"!pid"]:
                answer(str(os.getpid()).encode())
            case [b"!env", name]:
                answer(os.environ.get(name.decode(), "").encode())
            case [b"!many", count]:
                for number in range(int(count)):
                    answer(str(number).encode())
            case [b"!exit", code]:
                os._exit(int(code))
            case [b"!hang"]:
                os.kill(os.getpid(), signal.SIGSTOP)
            case _:
                answer(frame)


if __name__ == "__main__":
    main()
