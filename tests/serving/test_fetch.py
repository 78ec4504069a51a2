"""Images by address: what is public, what is refused, and what a server may answer."""

import asyncio
import re
import shutil
import ssl
import subprocess
from collections.abc import Callable, Sequence

import pytest
from serving import asked, image_url, running, tiny_model
from tiny_data import encoded, make_image

from megatron_owl2.serving.addresses import is_public
from megatron_owl2.serving.api_error import ApiError
from megatron_owl2.serving.fetch import ImageFetcher

HERE = "127.0.0.1"


def test_public_addresses():
    for address in ("1.1.1.1", "93.184.216.34", "2606:4700::1111", "2a00:1450:4001:81b::200e"):
        assert is_public(address)


PRIVATE = """
    0.0.0.0 0.1.2.3 10.0.0.1 100.64.0.1 100.127.255.255 127.0.0.1 127.8.8.8 169.254.169.254
    172.16.0.1 172.31.255.255 192.0.0.8 192.0.2.1 192.88.99.1 192.168.1.1 198.18.0.1 198.51.100.1
    203.0.113.1 224.0.0.1 239.255.255.255 240.0.0.1 255.255.255.255 :: ::1 ::ffff:1.1.1.1
    ::ffff:127.0.0.1 ::1.1.1.1 64:ff9b::101:101 64:ff9b:1::1 100::1 2001::1 2001:db8::1
    2002:7f00:1::1 2620:4f:8000::1 3fff::1 5f00::1 fc00::1 fd12::1 fe80::1 fe80::1%eth0
    2606:4700::1111%eth0 fec0::1 ff02::1 localhost 1.1.1
"""


def test_addresses_that_are_not_public():
    assert [address for address in PRIVATE.split() if is_public(address)] == []


class Site:
    """A web server of this machine whose replies a function of the path gives, in bytes; `asked`
    are the heads of its requests."""

    def __init__(self, reply: Callable[[str], bytes | Sequence[bytes | float]]):
        self.reply, self.asked = reply, []

    async def _serve(self, reader, writer) -> None:
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            self.asked.append(head)
            reply = self.reply(head.split()[1])
            for piece in [reply] if isinstance(reply, bytes) else reply:
                if isinstance(piece, float):
                    await asyncio.sleep(piece)
                else:
                    writer.write(piece)
                    await writer.drain()
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()

    def fetch(self, path="/a.png", *, hosts=None, tls=None, scheme="http", **options) -> bytes:
        """What an ImageFetcher gets from `a.test`; other `hosts` have the addresses given. `tls` is
        the server's."""
        if client_tls := options.pop("client_tls", None):
            options["tls"] = client_tls
        self.resolved = []
        known = {"a.test": [HERE]} | (hosts or {})

        async def resolver(host: str, port: int) -> list[str]:
            self.resolved.append(host)
            return known.get(host, [])

        async def run() -> bytes:
            site = await asyncio.start_server(self._serve, HERE, 0, ssl=tls)
            async with site:
                port = site.sockets[0].getsockname()[1]
                given = {"permits": lambda address: address == HERE, "ports": frozenset({port})}
                fetcher = ImageFetcher(10_000, resolver=resolver, **(given | options))
                self.port = port
                url = path if "://" in path else f"{scheme}://a.test:{port}{path}"
                return await fetcher.fetch(url.replace("PORT", str(port)))

        return asyncio.run(run())


def answer(body: bytes, status: str = "200 OK", *headers: str) -> bytes:
    lines = [f"HTTP/1.1 {status}", f"Content-Length: {len(body)}", *headers, "", ""]
    return "\r\n".join(lines).encode() + body


def test_an_image_comes_from_the_address_that_was_checked(monkeypatch):
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    site = Site(lambda path: answer(b"data of " + path.encode()))
    assert site.fetch("/x/y.png?size=2#part") == b"data of /x/y.png?size=2"
    assert site.resolved == ["a.test"]  # once: another answer could be a private address
    assert f"Host: a.test:{site.port}\r\n" in site.asked[0]
    chunked = (
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n2\r\nde\r\n0\r\n\r\n"
    )
    assert Site(lambda path: chunked).fetch() == b"abcde"
    assert Site(lambda path: b"HTTP/1.0 200 OK\r\n\r\nuntil the end").fetch() == b"until the end"


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("ftp://a.test/x", "only http and https"),
        ("gopher://a.test:PORT/x", "only http and https"),
        ("http:///x", "only http and https"),
        ("http://user:secret@a.test:PORT/", "user name"),
        ("http://a.test@127.0.0.1:PORT/", "user name"),
        ("http://a.test:22/", "port 22 is not allowed"),
        ("http://a.test:99999/", "not an address"),
        ("http://[::1/", "not an address"),
        ("http://a.test:PORT\\@b.test/", "ASCII without spaces"),
        ("http://a.test:PORT/a b", "ASCII without spaces"),
        ("http://a.test:PORT/\r\nX: y", "ASCII without spaces"),
        ("http://ä.test/", "ASCII without spaces"),
        ("http://a.test:PORT/" + "x" * 3000, "up to 2048"),
        ("http://b.test/", "host is unknown"),
        ("http://inside.test/", "not in the public internet"),
        ("http://both.test/", "not in the public internet"),
        ("http://rebound.test:PORT/", "not in the public internet"),
    ],
)
def test_addresses_that_are_not_asked(url, reason):
    hosts = {"inside.test": ["10.0.0.1"], "both.test": [HERE, "10.0.0.1"]}
    hosts["rebound.test"] = ["::ffff:127.0.0.1"]
    site = Site(lambda path: answer(b"x"))
    with pytest.raises(ApiError, match=re.escape(reason)) as caught:
        site.fetch(url, hosts=hosts)
    assert caught.value.status == 400 and site.asked == []


def test_by_default_this_machine_is_not_asked():
    site = Site(lambda path: answer(b"x"))
    for host in ("a.test", "127.0.0.1", "localhost", "0x7f.1", "2130706433"):
        with pytest.raises(ApiError, match="not in the public internet"):
            site.fetch(f"http://{host}:PORT/", permits=is_public, hosts={host: [HERE]})
    assert site.asked == []


def redirects(table: dict[str, str]) -> Callable[[str], bytes]:
    def reply(path: str) -> bytes:
        if path in table:
            return answer(b"", "302 Found", f"Location: {table[path]}")
        return answer(path.encode())

    return reply


def test_redirects_are_followed_by_the_same_rule():
    steps = {"/0": "/1", "/1": "http://b.test/2", "/2": "3"}
    site = Site(redirects(steps))
    hosts = {"b.test": ["10.0.0.1"]}
    with pytest.raises(ApiError, match="not in the public internet"):
        site.fetch("/0", hosts=hosts)
    assert len(site.asked) == 2 and site.resolved == ["a.test", "a.test", "b.test"]
    site = Site(redirects({f"/{n}": f"/{n + 1}" for n in range(9)}))
    assert site.fetch("/6") == b"/9"
    with pytest.raises(ApiError, match="more than 3 times"):
        site.fetch("/5")
    for place, reason in (
        ("file:///etc/passwd", "only http and https"),
        ("http://[", "not an address"),
        ("http://a:b@a.test/", "user name"),
        ("http://a.test:22/", "port 22"),
    ):
        with pytest.raises(ApiError, match=reason):
            Site(redirects({"/a.png": place})).fetch()


SMALL_CHUNKS = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + b"1\r\nx\r\n" * 5000


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        (answer(b"x" * 10_001), "more than 10000 bytes"),
        ([b"HTTP/1.1 200 OK\r\n\r\n", *[b"x" * 5000] * 3], "more than 10000 bytes"),
        ([b"HTTP/1.1 200 OK\r\nX: ", *[b"x" * 9000] * 9], "connection failed"),
        (answer(b"x", "200 OK", "Content-Encoding: gzip"), "compresses"),
        (SMALL_CHUNKS, "too small"),
        (answer(b"", "404 Not Found"), "status 404"),
        (answer(b"", "304 Not Modified"), "status 304"),
        (answer(b"", "302 Found"), "status 302"),
        (answer(b"x" * 10)[:-5], "connection failed"),
        (b"SSH-2.0-OpenSSH\r\n", "connection failed"),
        (b"", "connection failed"),
        ([b"HTTP/1.1 200 OK\r\n", *[b"X: y\r\n", 0.1] * 20], "more than 0.5 seconds"),
        ([b"HTTP/1.1 200 OK\r\n\r\n", *[b"x", 0.1] * 20], "more than 0.5 seconds"),
    ],
)
def test_replies_that_are_not_taken(reply, reason):
    with pytest.raises(ApiError, match=reason):
        Site(lambda path: reply).fetch(seconds=0.5 if "0.5" in reason else 30)


@pytest.mark.skipif(shutil.which("openssl") is None, reason="makes its certificate with openssl")
def test_certificates_are_those_of_the_name(tmp_path):
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    curve = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    name = ["-subj", "/CN=a.test", "-addext", "subjectAltName=DNS:a.test"]
    files = ["-keyout", str(key), "-out", str(certificate)]
    command = ["openssl", "req", "-x509", *curve, *name, *files]
    subprocess.run(command, check=True, capture_output=True)
    served = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    served.load_cert_chain(certificate, key)
    trusting = ssl.create_default_context(cafile=str(certificate))
    site = Site(lambda path: answer(b"secret"))
    assert site.fetch(tls=served, scheme="https", client_tls=trusting) == b"secret"
    with pytest.raises(ApiError, match="connection failed"):
        site.fetch(
            "https://b.test:PORT/", tls=served, client_tls=trusting, hosts={"b.test": [HERE]}
        )
    with pytest.raises(ApiError, match="connection failed"):
        site.fetch(tls=served, scheme="https")


def test_an_address_in_a_request_is_fetched(tmp_path):
    """The answer is that to the same image as a data URL; what is no image is refused."""
    loaded = tiny_model(tmp_path)
    png = encoded(make_image(1), "PNG")

    async def resolver(host: str, port: int) -> list[str]:
        return [HERE]

    async def serve(ready: asyncio.Future, done: asyncio.Event) -> None:
        pictures = Site(lambda path: answer(png if path == "/a.png" else b"<html>"))
        async with await asyncio.start_server(pictures._serve, HERE, 0) as site:
            ready.set_result(site.sockets[0].getsockname()[1])
            await done.wait()

    async def run() -> None:
        ready, done = asyncio.get_running_loop().create_future(), asyncio.Event()
        site = asyncio.create_task(serve(ready, done))
        port = await ready
        fetcher = ImageFetcher(
            10_000, ports=frozenset({port}), resolver=resolver, permits=lambda address: True
        )
        with running(loaded, fetcher=fetcher) as found:

            async def ask(url: str):
                return await asyncio.to_thread(found.chat, asked("badal", url), max_tokens=9)

            fetched = await ask(f"http://a.test:{port}/a.png")
            assert fetched.text == (await ask(image_url(1))).text
            refused = await ask(f"http://a.test:{port}/b.png")
            assert refused.status == 400 and "HTML page" in refused.error["message"]
        done.set()
        await site

    asyncio.run(run())
