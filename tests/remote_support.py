"""A real S3 server on loopback, with a proxy before it that drops, cuts and throttles."""

import itertools
import logging
import os
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import pytest

DROP, SLOW_DOWN, CUT, FORBID, HOLD = "drop", "slow down", "cut", "forbid", "hold"
_METHODS = (b"GET ", b"PUT ", b"POST ", b"HEAD ", b"DELETE ")


def _refusal(status: str, code: str, head: bool) -> bytes:
    text = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>no</Message></Error>"
    return (
        f"HTTP/1.1 {status}\r\nContent-Type: application/xml\r\nConnection: close\r\n"
        f"Content-Length: {len(text)}\r\n\r\n{'' if head else text}"
    ).encode()


_ANSWERS = {
    SLOW_DOWN: ("503 Slow Down", "SlowDown"),
    FORBID: ("403 Forbidden", "AccessDenied"),
}


class Proxy:
    """Hands TCP connections on to a server. `fault` is called with the number of each request, and
    returns DROP, SLOW_DOWN, FORBID, CUT (the answer ends early), HOLD (no answer)
    or None; `requests` has the first line of each.
    """

    def __init__(self, server: tuple[str, int]) -> None:
        self.fault: Callable[[int], str | None] = lambda number: None
        self.faults: list[str] = []
        self.sent = self.received = 0
        self.requests: list[bytes] = []
        self._server, self._numbers, self._lock = server, itertools.count(1), threading.Lock()
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listening.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._listening.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listening.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        try:
            with client, socket.create_connection(self._server) as server:
                left: list[int | None] = [None]  # bytes of the answer before it is cut
                back = threading.Thread(target=self._answer, args=(server, client, left))
                back.daemon = True
                back.start()
                while data := client.recv(1 << 16):
                    if data.startswith(_METHODS):
                        left[0] = None
                        fault = self._next(data)
                        if fault in _ANSWERS:
                            client.sendall(_refusal(*_ANSWERS[fault], data.startswith(b"HEAD")))
                            return
                        while fault == HOLD and client.recv(1 << 16):
                            pass  # until the client gives up
                        if fault in (DROP, HOLD):
                            return
                        if fault == CUT:
                            left[0] = 1000
                    with self._lock:
                        self.sent += len(data)
                    server.sendall(data)
        except OSError:
            pass

    def _next(self, data: bytes) -> str | None:
        with self._lock:
            self.requests.append(data.partition(b"\r\n")[0])
            fault = self.fault(next(self._numbers))
            if fault:
                self.faults.append(fault)
            return fault

    def _answer(self, server: socket.socket, client: socket.socket, left: list[int | None]) -> None:
        try:
            while data := server.recv(1 << 16):
                if left[0] is not None:
                    data, left[0] = data[: left[0]], left[0] - len(data)
                with self._lock:
                    self.received += len(data)
                client.sendall(data)
                if left[0] is not None and left[0] <= 0:
                    break
        except OSError:
            pass
        finally:
            for end in (client, server):
                with suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)


class Bucket:
    """A bucket of the server, as boto3 sees it, without the proxy."""

    def __init__(self, endpoint: str, name: str) -> None:
        import boto3

        self.s3, self.name = boto3.client("s3", endpoint_url=endpoint), name
        self.s3.create_bucket(Bucket=name)
        self.url = f"s3://{name}"

    def keys(self) -> list[str]:
        pages = self.s3.get_paginator("list_objects_v2").paginate(Bucket=self.name)
        return sorted(one["Key"] for page in pages for one in page.get("Contents", []))

    def parts(self) -> int:
        """Parts of uploads that are not complete."""
        uploads = self.s3.list_multipart_uploads(Bucket=self.name).get("Uploads", [])
        found = [
            self.s3.list_parts(Bucket=self.name, Key=one["Key"], UploadId=one["UploadId"])
            for one in uploads
        ]
        return sum(len(answer.get("Parts", [])) for answer in found)

    def get(self, key: str) -> bytes:
        return self.s3.get_object(Bucket=self.name, Key=key)["Body"].read()

    def put(self, key: str, data: bytes) -> None:
        self.s3.put_object(Bucket=self.name, Key=key, Body=data)

    def delete(self, key: str) -> None:
        self.s3.delete_object(Bucket=self.name, Key=key)


@contextmanager
def s3_server() -> Iterator[tuple[str, Proxy]]:
    """Start a server and the proxy; the environment has the endpoint and credentials.

    Yields:
        The endpoint of the server itself, and the proxy.
    """
    import fsspec
    from moto import server as server_of_moto

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = server_of_moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    proxy = Proxy((host, port))
    environment = {
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing-secret",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": proxy.url,
        "AWS_MAX_ATTEMPTS": "2",
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "HTTP_PROXY", "http_proxy"):
            patch.delenv(name, raising=False)
        patch.setenv("NO_PROXY", "127.0.0.1")
        fsspec.filesystem("s3").clear_instance_cache()
        try:
            yield f"http://{host}:{port}", proxy
        finally:
            fsspec.filesystem("s3").clear_instance_cache()
            proxy.close()
            server.stop()
    assert "AWS_ENDPOINT_URL" not in os.environ or os.environ["AWS_ENDPOINT_URL"] != proxy.url
