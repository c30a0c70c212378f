"""All uses of Ray's internals. Tested with Ray 2.60.0.

Ray has no public function for the address of the cluster on this node, and Ray Serve has no option for the interface that a
replica's port is bound to. Ray is imported inside the functions: `deployment.set_environment` must run before its import.
"""

from __future__ import annotations

from typing import Any


def address_of_local_cluster() -> str | None:
    """Return HOST:PORT of the head of the Ray cluster that runs on this node; None where there is none."""
    from ray._private.services import canonicalize_bootstrap_address

    try:
        address: str | None = canonicalize_bootstrap_address("auto")
    except ConnectionError:  # Ray 2.60 raises it where no cluster runs
        return None
    return address


def bind_replica_to_loopback() -> None:
    """Bind the port of this replica to loopback where its node is on loopback.

    Ray Serve binds the port at which a replica is called to all interfaces, wherever the node is. It does so after the
    replica's constructor has returned, so the constructor calls this function. A version of Ray that binds the port elsewhere
    fails the tests.
    """
    import ray
    from ray.serve._private import replica

    bind = getattr(replica, "add_port_to_grpc_server", None)
    if bind is not None and ray.util.get_node_ip_address().startswith("127."):

        def listen(server: Any, address: str) -> Any:
            return bind(server, address.replace("[::]", "127.0.0.1"))

        replica.add_port_to_grpc_server = listen  # type: ignore[attr-defined] # there is no option for it
