import ipaddress
from pathlib import Path

import pytest

from aeolian.worker.networks import bridge as bridges
from aeolian.worker.networks.bridge import Bridge, free_subnet, rules
from aeolian.worker.networks.namespace import allow_list


def test_a_data_directory_has_a_name_that_fits_a_link_and_leaves_room_for_ports():
    one, other = bridges.bridge_name(Path("/data/one")), bridges.bridge_name(Path("/data/other"))
    assert one == bridges.bridge_name(Path("/data/one")) != other
    assert len(one) + len("ffff") <= 15


def test_a_subnet_overlaps_with_nothing_that_the_host_uses():
    first = free_subnet("aeo1", ["default", "192.0.2.0/24", "0.0.0.0/0", "fe80::/64"])
    assert free_subnet("aeo1", []) == first, "a worker that starts again gets the same"
    next_one = free_subnet("aeo1", [str(first)])
    assert not next_one.overlaps(first)
    resolver = str(next(first.hosts()))
    assert ipaddress.ip_address(resolver) not in free_subnet("aeo1", [resolver])


def test_when_everything_is_in_use_it_says_so():
    with pytest.raises(OSError, match="in use"):
        free_subnet("aeo1", ["10.0.0.0/8"])


def test_the_hosts_end_is_no_address_of_a_container():
    bridge = Bridge("aeo1", "10.1.16.0/20")
    assert bridge.gateway == "10.1.16.1"
    assert bridge.addresses()[0] == "10.1.16.2" and len(bridge.addresses()) == 4093


def test_what_the_host_offers_is_let_through_before_the_rest_is_refused():
    lines = rules(Bridge("aeo1", "10.1.16.0/20"), [("192.0.2.2", "9901"), ("192.0.2.2", "9910-9999")]).splitlines()
    input_chain = lines[lines.index("chain input {") :]
    offered = input_chain.index('iifname "aeo1" ip daddr 192.0.2.2 tcp dport 9901 accept')
    assert offered < input_chain.index('iifname "aeo1" reject with icmpx admin-prohibited')


def test_an_allow_list_names_each_network_once_and_nothing_that_is_none():
    assert allow_list(["10.0.0.0/8", "10.1.0.0/16", "192.0.2.1"]).count("ip daddr") == 2
    with pytest.raises(ValueError, match="example"):
        allow_list(["example.org; accept"])
