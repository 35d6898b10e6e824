"""Where the ranks of a launch meet: a store on one address, which holds bytes and unpickles none.

torch's `c10d` rendezvous listens on every address of the machine and unpickles what it is sent.
Its `static` one unpickles nothing, but the store behind it listens on every address too, unless it
is given a socket.
"""

from __future__ import annotations

import ipaddress
import socket
from typing import Any

from torch.distributed import TCPStore  # type: ignore[attr-defined]  # not in its stubs
from torch.distributed.elastic.rendezvous import (
    RendezvousInfo,
    RendezvousParameters,
    rendezvous_handler_registry,
)
from torch.distributed.elastic.rendezvous.static_tcp_rendezvous import StaticTCPRendezvous

from opcd_nemo.errors import UserError
from opcd_nemo.storage.attempt import RENDEZVOUS_ENV

BACKEND = "opcd"


class Meeting(StaticTCPRendezvous):
    """The launchers of all nodes meet at the first one's store, which their ranks use too."""

    def get_backend(self) -> str:
        """The name under which torch's launcher finds this class."""
        return BACKEND

    def next_rendezvous(self) -> RendezvousInfo:
        """Open the store, on the first node, and wait until every node is there."""
        if self.rank == 0:
            opened = self._listen()
            self.master_port = opened.getsockname()[1]
            self._store = TCPStore(
                self.master_addr,
                self.master_port,
                self.world_size,
                is_master=True,
                timeout=self.timeout,
                master_listen_fd=opened.detach(),  # the store closes it
            )
        return super().next_rendezvous()

    def _listen(self) -> socket.socket:
        alone = self.world_size == 1
        try:
            return listen(self.master_addr, self.master_port, alone=alone)
        except OSError as error:
            key, value = RENDEZVOUS_ENV, f"{self.master_addr}:{self.master_port}"
            if alone:
                key, value = "parallel.port", str(self.master_port)
            allowed = "a free port of the first node"
            raise UserError(key, value, allowed, problem=error.strerror) from error


def listen(host: str, port: int, *, alone: bool) -> socket.socket:
    """A socket on the address of `host`, which is this machine; port 0: any free one.

    A name that leads this machine to itself (Debian's 127.0.1.1) leads the other nodes here: for
    them the socket is on every address, as torch's would be.
    """
    family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    ip = str(address[0])
    if not alone and host not in ("localhost", ip) and ipaddress.ip_address(ip).is_loopback:
        ip = "::" if family == socket.AF_INET6 else "0.0.0.0"
    opened = socket.socket(family, socket.SOCK_STREAM)
    # ranks that have just ended on this port leave it in use for a minute by TCP's rules alone
    opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    opened.bind((ip, port))
    opened.listen(socket.SOMAXCONN)
    return opened


def offer_meeting() -> None:
    """Make `BACKEND` known to torch's launcher."""
    rendezvous_handler_registry.register(BACKEND, _meeting)


def _meeting(parameters: RendezvousParameters) -> Any:
    host, _, port = parameters.endpoint.rpartition(":")
    return Meeting(
        host,
        int(port),
        rank=parameters.config["rank"],
        world_size=parameters.max_nodes,
        run_id=parameters.run_id,
        timeout=int(parameters.config["timeout"]),
    )
