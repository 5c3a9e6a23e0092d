"""The network between the ranks of a run."""

import fcntl
import socket
import struct

SIOCGIFADDR = 0x8915  # linux/sockios.h


def interface_to(address: str) -> str:
    """Name of the IPv4 interface by which this machine reaches an address; empty where that cannot be told."""
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((address, 9))  # sends nothing
            mine = probe.getsockname()[0]
            for _, name in socket.if_nameindex():
                if _address_of(probe, name) == mine:
                    return name
    except OSError:
        pass
    return ""


def _address_of(probe: socket.socket, interface: str) -> str:
    try:
        answer = fcntl.ioctl(probe, SIOCGIFADDR, struct.pack("256s", interface.encode()[:15]))
    except OSError:  # it has no IPv4 address
        return ""
    return socket.inet_ntoa(answer[20:24])
