"""Where the ranks of a launch meet: a store on one address, which holds bytes and unpickles none.

torch's `c10d` rendezvous listens on every address of the machine and unpickles what it is sent.
Its `static` one unpickles nothing, but the store behind it listens on every address too, unless it
is given a socket.
"""

from __future__ import annotations

import errno
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
        except (OSError, UnicodeError) as error:  # a name may be none that can be looked up
            key, value = RENDEZVOUS_ENV, f"{self.master_addr}:{self.master_port}"
            allowed = "a free port of the first node"
            if alone:
                key, value = "parallel.port", str(self.master_port)
            elif _is_of_host(error):
                allowed = "an address of the first node, which is this machine, or its name"
            problem = error.strerror if isinstance(error, OSError) else str(error)
            raise UserError(key, value, allowed, problem=problem) from error


def _is_of_host(error: Exception) -> bool:
    """Whether the host of a place to meet is wrong, not its port."""
    if isinstance(error, OSError) and not isinstance(error, socket.gaierror):
        return error.errno == errno.EADDRNOTAVAIL
    return True


def listen(host: str, port: int, *, alone: bool) -> socket.socket:
    """A socket on the address that `host` is, or leads to; port 0: any free one.

    A name that leads this machine to nothing but itself (Debian's 127.0.1.1) leads the other nodes
    here: for them the socket is on every address, as torch's would be. Of several addresses the
    socket is on the first that this machine has.

    Raises:
        OSError: the port is in use, no address of `host` is this machine's, or `host` is no name.
        UnicodeError: it can be no name.
    """
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    places = [(family, str(address[0])) for family, _, _, _, address in found]
    if not alone and host not in ("localhost", places[0][1]):
        outward = [place for place in places if not ipaddress.ip_address(place[1]).is_loopback]
        everywhere = "::" if places[0][0] == socket.AF_INET6 else "0.0.0.0"
        places = outward or [(places[0][0], everywhere)]
    elif not alone and ipaddress.ip_address(places[0][1]).is_unspecified:
        raise OSError(errno.EADDRNOTAVAIL, "no address that the other nodes reach")
    for family, ip in places:
        try:
            return _bound(family, ip, port)
        except OSError as error:
            if error.errno != errno.EADDRNOTAVAIL:
                raise
    raise OSError(errno.EADDRNOTAVAIL, "this machine has no such address")


def _bound(family: int, ip: str, port: int) -> socket.socket:
    opened = socket.socket(family, socket.SOCK_STREAM)
    # ranks that have just ended on this port leave it in use for a minute by TCP's rules alone
    opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        opened.bind((ip, port))
        opened.listen(socket.SOMAXCONN)
    except OSError:
        opened.close()
        raise
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
