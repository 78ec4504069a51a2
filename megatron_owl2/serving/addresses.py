"""Addresses of the public internet, told from those of a server's own network."""

import ipaddress

# Beside what the standard library knows as private; it differs between versions of Python.
_REFUSED = [
    ipaddress.ip_network(network)
    for network in (
        "0.0.0.0/8",  # this network
        "100.64.0.0/10",  # carrier-grade NAT
        "192.0.0.0/24",  # protocol assignments
        "192.88.99.0/24",  # relays of 6to4
        "198.18.0.0/15",  # benchmarks
        "2001::/23",  # protocol assignments, Teredo (IPv4 inside) among them
        "2001:db8::/32",  # documentation
        "2002::/16",  # 6to4: IPv4 inside
        "2620:4f:8000::/48",  # AS112
        "3fff::/20",  # documentation
    )
]
# All other IPv6 is no global unicast: loopback, mapped and translated IPv4 (::ffff:0:0/96,
# 64:ff9b::/96, 64:ff9b:1::/48), unique local, link-local and multicast addresses.
_GLOBAL_IPV6 = ipaddress.ip_network("2000::/3")


def is_public(address: str) -> bool:
    """Whether a numeric address is a single host's in the public internet, as far as can be told.

    Addresses that carry an IPv4 address inside are not, for what they reach depends on routers.
    """
    try:
        ip = ipaddress.ip_address(address)
    except ValueError:
        return False
    if ip.version == 6 and (ip not in _GLOBAL_IPV6 or ip.scope_id):
        return False
    special = ip.is_private or ip.is_multicast or ip.is_reserved or ip.is_loopback
    special = special or ip.is_link_local or ip.is_unspecified or not ip.is_global
    return not special and not any(ip.version == net.version and ip in net for net in _REFUSED)
