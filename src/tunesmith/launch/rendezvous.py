"""Rendezvous of a run's nodes: torch's elastic rendezvous with a single TCPStore.

torchrun's default backend has two problems. Its store listens on every interface, although the
nodes exchange pickles through it. It also creates a second store for the ranks, and a restarted
node cannot reach the second store. This module uses one store for both the nodes and the ranks. The
node that has the endpoint's address holds the store. The store listens only on this address.
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
# Maximum time to wait until all nodes have joined.
JOIN_TIMEOUT = timedelta(minutes=10)
# Maximum time to wait for the answer of the store to one request.
ANSWER_TIMEOUT = timedelta(minutes=1)


class Endpoint(NamedTuple):
    """The address of the store, and the address and interface with which this node reaches it.

    Attributes:
        host, port: the address and port of the store.
        address: the address of this node on the route to the store.
        interface: the network interface with this address.
    """

    host: str
    port: int
    address: str
    interface: str

    @property
    def is_here(self) -> bool:
        """True if the store is on this node."""
        return self.host == self.address

    @property
    def place(self) -> str:
        """The store's location as HOST:PORT. An IPv6 address is in brackets."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def find_endpoint(host: str, port: int) -> Endpoint:
    """Find out how this node reaches the store at `host` and `port`.

    Raise MachineError if the name cannot be resolved, if there is no route to the host, or if no
    interface has this node's address.
    """
    try:
        host = str(socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0][4][0])
    except OSError as error:
        raise MachineError(
            f"the host name {host} cannot be resolved",
            where="--endpoint",
            why=str(error),
            fix="use an IP address, or add the name to /etc/hosts on every node",
        ) from None
    interfaces = local_addresses()
    # If `host` is an address of this node, this node holds the store.
    address = host if host in interfaces else route_to(host)
    if address not in interfaces:
        raise MachineError(
            f"no interface of this node has the address {address}",
            where="--endpoint",
            fix="give an address of the first node that this node can reach; `ip addr` on "
            f"the first node lists its addresses (this node has {', '.join(interfaces)})",
        )
    return Endpoint(host, port, address, interfaces[address])


def local_addresses() -> dict[str, str]:
    """Return a dict from each address of this node to its network interface."""
    import psutil

    # Remove the interface from a link-local IPv6 address, such as fe80::1%eth0.
    return {
        entry.address.partition("%")[0]: name
        for name, entries in psutil.net_if_addrs().items()
        for entry in entries
    }


def family_of(address: str) -> socket.AddressFamily:
    """Return the socket family of an IPv4 or IPv6 address."""
    return socket.AF_INET6 if ":" in address else socket.AF_INET


def route_to(host: str) -> str:
    """Return the source address of packets from this node to `host`. No packet is sent."""
    try:
        with socket.socket(family_of(host), socket.SOCK_DGRAM) as probe:
            # Connecting a UDP socket only looks up the route. The port does not matter.
            probe.connect((host, 9))
            return str(probe.getsockname()[0])
    except OSError as error:
        raise MachineError(
            f"this node has no route to {host}",
            where="--endpoint",
            why=error.strerror or "",
            fix=f"connect the nodes, and check the route with `ip route get {shell_word(host)}`",
        ) from None


def start_store(endpoint: Endpoint) -> "tuple[TCPStore, Endpoint]":
    """Start the store in this process. Return the store, and the endpoint with the store's port.

    The port 0 means any free port. Raise MachineError if the port is in use.
    """
    from torch.distributed import TCPStore

    try:
        # Create the listening socket here, because TCPStore would listen on every interface.
        listener = socket.create_server(
            (endpoint.host, endpoint.port), family=family_of(endpoint.host), backlog=1024
        )
    except OSError as error:
        raise MachineError(
            "the rendezvous store cannot listen on this port",
            where=endpoint.place,
            why=error.strerror or "",
            fix="set another port with --endpoint, because another job may use this port",
        ) from None
    host, port = listener.getsockname()[:2]
    store = TCPStore(
        host,
        port,
        is_master=True,
        wait_for_workers=False,
        timeout=ANSWER_TIMEOUT,
        # Pass the descriptor of the socket to the store, which closes it later.
        master_listen_fd=listener.detach(),
    )
    return store, endpoint._replace(port=port)


def connect_store(endpoint: Endpoint) -> "TCPStore":
    """Connect to the store on another node.

    Raise MachineError if the store does not answer within JOIN_TIMEOUT.
    """
    from torch.distributed import DistError, TCPStore

    host, port = endpoint.host, endpoint.port
    try:
        store = TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=JOIN_TIMEOUT)
    except DistError as error:
        raise MachineError(
            "the node that runs the rendezvous store did not answer in "
            f"{JOIN_TIMEOUT.total_seconds():.0f} s",
            where=endpoint.place,
            why=str(error).partition("\n")[0][:200],
            fix="start the run on that node too; allow connections from this node in its firewall: "
            f"`sudo ufw allow from {shell_word(endpoint.address)}`; or find the cause with "
            f"`tunesmith doctor --pair {shell_word(host)}`",
        ) from None
    # The store has answered, so the other node is running. The short timeout is enough for later
    # requests.
    store.set_timeout(ANSWER_TIMEOUT)
    return store


def register_backend(store: "TCPStore", endpoint: Endpoint) -> None:
    """Register a rendezvous backend with the name BACKEND that uses `store`."""
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

    # Keep torch from creating a second store, because the ranks use `store`.
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"

    class Rendezvous(DynamicRendezvousHandler):
        """torch's dynamic rendezvous. The ranks use the same store as the node agents."""

        def get_backend(self) -> str:
            return BACKEND

        @property
        def use_agent_store(self) -> bool:
            return True

        def next_rendezvous(self) -> "RendezvousInfo":
            info = super().next_rendezvous()
            # Tell the ranks of every node to use the same store.
            place = RendezvousStoreInfo(endpoint.host, endpoint.port)
            return RendezvousInfo(info.store, info.rank, info.world_size, place)

    def create(parameters: "RendezvousParameters") -> Rendezvous:
        # torch numbers the nodes in the order of their names. Rank 0 writes metrics and final/, so
        # it must be on the node with the store, where the run was launched. Therefore the name of
        # the node with the store starts with 0, and the names of all other nodes with 1.
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

    # Ignore ValueError, which is raised if an earlier run in this process has registered the
    # backend.
    with suppress(ValueError):
        rendezvous_handler_registry.register(BACKEND, create)
