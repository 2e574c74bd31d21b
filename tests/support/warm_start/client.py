"""Ask the server for a process that runs a module, and be that process for whoever started this one.

    client.py ADDRESS PYTHONPATH ARGUMENTS-OF-PYTHON...

The first two are the server's; `tests.support.warm_start` makes an executable that gives them.
"""

import json
import os
import signal
import socket
import sys

FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


def main() -> None:
    address, searched, *words = sys.argv[1:]
    unbuffered = words[:1] == ["-u"]
    if words[unbuffered : unbuffered + 1] != ["-m"] or os.environ.get("PYTHONPATH") != searched:
        os.execv(sys.executable, [sys.executable, *words])  # no module, or others than the server's could be meant
    request = {
        "words": words[unbuffered + 1 :],
        "unbuffered": unbuffered,
        "uninterrupted": signal.getsignal(signal.SIGINT) is signal.SIG_IGN,
        "folder": os.getcwd(),
        "environment": dict(os.environ),
    }
    message = json.dumps(request).encode()
    with socket.socket(socket.AF_UNIX) as server:
        for number in FORWARDED:
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, lambda number, _: server.send(bytes([number])))
        server.connect(address)
        socket.send_fds(server, [len(message).to_bytes(8, "big")], [0, 1, 2])
        server.sendall(message)
        answer = server.recv(4)
    status = int.from_bytes(answer, "big") if answer else 1 << 8
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        if number != signal.SIGKILL:
            signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
    os._exit(os.waitstatus_to_exitcode(status))


if __name__ == "__main__":
    main()
