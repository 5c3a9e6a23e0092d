"""The interface that leads to an address."""

import socket

import pytest

from tracekin.distributed import network
from tracekin.distributed.network import interface_to


def test_this_machine_reaches_itself_over_its_loopback() -> None:
    assert interface_to("127.0.0.1") == "lo"
    assert interface_to("localhost") == "lo"


def test_the_interface_is_the_one_whose_address_leads_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two interfaces, of which the second has the address of the route, and one without any."""
    addresses = {"eth0": "10.0.0.5", "tun0": "", "lo": "127.0.0.1"}
    monkeypatch.setattr(socket, "if_nameindex", lambda: list(enumerate(addresses, 1)))
    monkeypatch.setattr(network, "_address_of", lambda probe, name: addresses[name])
    assert interface_to("127.0.0.1") == "lo"
    addresses["lo"] = "127.0.0.2"
    assert interface_to("127.0.0.1") == ""


def test_an_address_that_no_ipv4_interface_reaches_has_none() -> None:
    assert interface_to("fe80::1") == ""


def test_an_interface_without_address_is_passed_over() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        assert network._address_of(probe, "lo") == "127.0.0.1"
        assert network._address_of(probe, "no-such-if") == ""
