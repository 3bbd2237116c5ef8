"""The meeting of a run's nodes: torch's elastic rendezvous over one store at one address.

torchrun's own backend listens on every interface, and its nodes exchange pickles through that
store; and it makes a second store for the ranks, which a node that comes back cannot reach. Here
one store serves both. It is on the node that has the endpoint's address, and listens there alone.
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
JOIN_TIMEOUT = timedelta(minutes=10)  # in which all nodes join
ANSWER_TIMEOUT = timedelta(minutes=1)  # in which the store answers


class Endpoint(NamedTuple):
    """The place of the store, and the address and interface by which this node reaches it."""

    host: str
    port: int
    address: str
    interface: str

    @property
    def is_here(self) -> bool:
        """Tell whether this node holds the store."""
        return self.host == self.address

    @property
    def place(self) -> str:
        """HOST:PORT, an IPv6 address in brackets."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def find_endpoint(host: str, port: int) -> Endpoint:
    """The endpoint as this node sees it.

    MachineError if the name does not resolve, or no interface has the address of this node.
    """
    try:
        host = str(socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0][4][0])
    except OSError as error:
        fix = "use an address, or add the name to /etc/hosts on every node"
        raise MachineError(
            f"{host} is not a known host", where="--endpoint", why=str(error), fix=fix
        ) from None
    interfaces = local_addresses()
    # This node holds the store where the address is its own.
    address = host if host in interfaces else route_to(host)
    if address not in interfaces:
        raise MachineError(
            f"no interface of this node has the address {address}",
            where="--endpoint",
            fix=f"the address of a node that is reached from one of {', '.join(interfaces)}",
        )
    return Endpoint(host, port, address, interfaces[address])


def local_addresses() -> dict[str, str]:
    """Each address of this node -> its interface."""
    import psutil

    interfaces = {}
    for name, addresses in psutil.net_if_addrs().items():
        for entry in addresses:
            # A link-local IPv6 address ends with its interface: fe80::1%eth0.
            interfaces[entry.address.partition("%")[0]] = name
    return interfaces


def family_of(address: str) -> socket.AddressFamily:
    """Return the family of a socket for an address."""
    return socket.AF_INET6 if ":" in address else socket.AF_INET


def route_to(host: str) -> str:
    """The address of this node that packets to `host` carry; nothing is sent."""
    try:
        with socket.socket(family_of(host), socket.SOCK_DGRAM) as probe:
            # Of UDP: it only looks up the route.
            probe.connect((host, 9))
            return str(probe.getsockname()[0])
    except OSError as error:
        fix = f"connect the nodes, and check: ip route get {shell_word(host)}"
        raise MachineError(
            f"no route to {host}", where="--endpoint", why=error.strerror or "", fix=fix
        ) from None


def start_store(endpoint: Endpoint) -> "tuple[TCPStore, Endpoint]":
    """The store in this process, and the endpoint with its port: 0 takes a free one.

    MachineError if the port is not free.
    """
    from torch.distributed import TCPStore

    try:
        # TCPStore itself would listen on every interface.
        listener = socket.create_server(
            (endpoint.host, endpoint.port), family=family_of(endpoint.host), backlog=1024
        )
    except OSError as error:
        raise MachineError(
            "the ranks' store cannot listen",
            where=endpoint.place,
            why=error.strerror or "",
            fix="another job may use this port: set another one with --endpoint",
        ) from None
    host, port = listener.getsockname()[:2]
    store = TCPStore(
        host,
        port,
        is_master=True,
        wait_for_workers=False,
        timeout=ANSWER_TIMEOUT,
        # The store closes it.
        master_listen_fd=listener.detach(),
    )
    return store, endpoint._replace(port=port)


def connect_store(endpoint: Endpoint) -> "TCPStore":
    """A connection to the store on another node; MachineError if none answers in JOIN_TIMEOUT."""
    from torch.distributed import DistError, TCPStore

    host, port = endpoint.host, endpoint.port
    try:
        store = TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=JOIN_TIMEOUT)
    except DistError as error:
        raise MachineError(
            f"no answer in {JOIN_TIMEOUT.total_seconds():.0f} s",
            where=endpoint.place,
            why=str(error).partition("\n")[0][:200],
            fix=f"start the run on that node too; a firewall there: sudo ufw allow from "
            f"{shell_word(endpoint.address)}; tunesmith doctor --pair {shell_word(host)}",
        ) from None
    # The long wait was for the other node's start; from now on answers come soon or not at all.
    store.set_timeout(ANSWER_TIMEOUT)
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

    # No second store: the ranks get this one.
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"

    class Rendezvous(DynamicRendezvousHandler):
        """torch's own, whose ranks get the store of the nodes."""

        def get_backend(self) -> str:
            return BACKEND

        @property
        def use_agent_store(self) -> bool:
            return True

        def next_rendezvous(self) -> "RendezvousInfo":
            info = super().next_rendezvous()
            # The place of the one store, on every node.
            place = RendezvousStoreInfo(endpoint.host, endpoint.port)
            return RendezvousInfo(info.store, info.rank, info.world_size, place)

    def create(parameters: "RendezvousParameters") -> Rendezvous:
        # torch numbers the nodes by their names in order. Rank 0, which writes metrics and final/,
        # must be with the store, where the run was launched: its node's name begins with 0.
        order = 0 if endpoint.is_here else 1
        return Rendezvous.from_backend(
            parameters.run_id,
            store,
            C10dRendezvousBackend(store, parameters.run_id),
            parameters.min_nodes,
            parameters.max_nodes,
            local_addr=f"{order} {endpoint.address}",
            timeout=RendezvousTimeout(join=JOIN_TIMEOUT),
        )

    # ValueError: an earlier run of this process has registered it.
    with suppress(ValueError):
        rendezvous_handler_registry.register(BACKEND, create)
