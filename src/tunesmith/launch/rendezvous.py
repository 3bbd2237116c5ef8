"""How the nodes of a run find each other: torch's elastic rendezvous over one store, bound to one address.

torchrun's own backend listens on every interface, and its nodes exchange pickles through that store; and it makes a second
store for the ranks, which a node that comes back cannot reach. Here one store serves both. It is held by the node that has
the endpoint's address, and listens there alone.
"""

import os
import socket
from contextlib import suppress
from datetime import timedelta
from typing import TYPE_CHECKING, NamedTuple

from tunesmith.errors import MachineError
from tunesmith.host.shell import shell_word

if TYPE_CHECKING:
    from torch.distributed import TCPStore
    from torch.distributed.elastic.rendezvous import RendezvousInfo, RendezvousParameters

BACKEND = "tunesmith"
JOIN = 600.0  # seconds that a node waits for the others
ANSWER = timedelta(seconds=60)  # in which the store answers


class Endpoint(NamedTuple):
    """Where the store is, and the address by which this node reaches it, of the interface of that name."""

    host: str
    port: int
    address: str
    interface: str

    @property
    def is_here(self) -> bool:
        """Whether this node holds the store."""
        return self.host == self.address

    @property
    def place(self) -> str:
        """HOST:PORT, an IPv6 address in brackets."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def find_endpoint(host: str, port: int, address: str | None = None) -> Endpoint:
    """The endpoint as this node sees it; `address` is this node's own, where the route does not tell. MachineError if the
    name does not resolve, or no interface has the address."""
    try:
        host = str(socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0][4][0])
    except OSError as error:
        fix = "give an address, or add the name to /etc/hosts of every node"
        raise MachineError(
            f"{host} is no known host", where="--endpoint", why=str(error), fix=fix
        ) from None
    interfaces = own_addresses()
    if address is None:
        address = host if host in interfaces else route_to(host)
    if address not in interfaces:
        fix = f"one of {', '.join(a for a in interfaces if '.' in a)}"
        raise MachineError(
            f"no interface of this node has the address {address}", where="--address", fix=fix
        )
    return Endpoint(host, port, address, interfaces[address])


def own_addresses() -> dict[str, str]:
    """Each address of this node -> its interface."""
    import psutil

    return {
        a.address.partition("%")[0]: name
        for name, found in psutil.net_if_addrs().items()
        for a in found
    }


def family_of(address: str) -> socket.AddressFamily:
    """That of a socket for an address."""
    return socket.AF_INET6 if ":" in address else socket.AF_INET


def route_to(host: str) -> str:
    """The address of this node that packets to `host` carry; nothing is sent."""
    try:
        with socket.socket(family_of(host), socket.SOCK_DGRAM) as probe:
            probe.connect((host, 9))
            return str(probe.getsockname()[0])
    except OSError as error:
        fix = f"connect the nodes, and look: ip route get {shell_word(host)}"
        raise MachineError(
            f"no route to {host}", where="--endpoint", why=error.strerror or "", fix=fix
        ) from None


def hold_store(endpoint: Endpoint) -> "tuple[TCPStore, Endpoint]":
    """The store, held by this process, and the endpoint with its port: 0 takes a free one. MachineError if it is taken."""
    from torch.distributed import TCPStore

    try:
        listener = socket.create_server(endpoint[:2], family=family_of(endpoint.host), backlog=1024)
    except OSError as error:
        why, fix = (
            error.strerror or "",
            "another job may use this port: give --endpoint another one",
        )
        raise MachineError(
            "the ranks' store cannot listen", where=endpoint.place, why=why, fix=fix
        ) from None
    host, port = listener.getsockname()[:2]
    descriptor = listener.detach()
    store = TCPStore(
        host,
        port,
        is_master=True,
        wait_for_workers=False,
        timeout=ANSWER,
        master_listen_fd=descriptor,
    )
    return store, endpoint._replace(port=port)


def reach_store(endpoint: Endpoint) -> "TCPStore":
    """A connection to the store that another node holds; MachineError if there is none within JOIN seconds."""
    from torch.distributed import DistError, TCPStore

    host, port, *_ = endpoint
    try:
        store = TCPStore(
            host, port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=JOIN)
        )
    except DistError as error:
        fix = f"start the run on that node too; tunesmith doctor --pair {shell_word(host)} says what stands between"
        why = str(error).partition("\n")[0][:200]
        raise MachineError(
            f"no answer in {JOIN:.0f} s", where=endpoint.place, why=why, fix=fix
        ) from None
    store.set_timeout(ANSWER)
    return store


def register_backend(store: "TCPStore", endpoint: Endpoint) -> None:
    """Let torch's elastic launcher meet through `store`, by the name BACKEND."""
    from torch.distributed.elastic.rendezvous import (
        RendezvousInfo,
        RendezvousStoreInfo,
        rendezvous_handler_registry,
    )
    from torch.distributed.elastic.rendezvous.c10d_rendezvous_backend import C10dRendezvousBackend
    from torch.distributed.elastic.rendezvous.dynamic_rendezvous import (
        DynamicRendezvousHandler,
        RendezvousTimeout,
    )

    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"  # no second store

    class Rendezvous(DynamicRendezvousHandler):
        """torch's own, whose ranks get the store of the nodes."""

        def get_backend(self) -> str:
            return BACKEND

        @property
        def use_agent_store(self) -> bool:
            return True

        def next_rendezvous(self) -> "RendezvousInfo":
            found = super().next_rendezvous()
            place = RendezvousStoreInfo(endpoint.host, endpoint.port)
            return RendezvousInfo(found.store, found.rank, found.world_size, place)

    def create(parameters: "RendezvousParameters") -> Rendezvous:
        # Ranks go by the nodes' names: rank 0, which writes metrics and final/, is with the store, where the run was launched.
        name, run_id = f"{int(not endpoint.is_here)} {endpoint.address}", parameters.run_id
        backend, limits = (
            C10dRendezvousBackend(store, run_id),
            RendezvousTimeout(join=timedelta(seconds=JOIN)),
        )
        nodes = parameters.min_nodes, parameters.max_nodes
        return Rendezvous.from_backend(
            run_id, store, backend, *nodes, local_addr=name, timeout=limits
        )

    with suppress(ValueError):  # registered before
        rendezvous_handler_registry.register(BACKEND, create)
