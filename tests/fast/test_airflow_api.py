"""What the client of Airflow's API makes of a server that ends while it answers."""

from __future__ import annotations

import socket
import threading

import pytest

from infra.airflow.api import AirflowApi


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\n{",
        b"HTTP/1.1 500 Internal Server Error\r\nContent-Length: 100\r\n\r\n{",
        b"HT",
        b"",
    ],
)
def test_an_answer_that_breaks_off_is_no_answer(answer: bytes) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer_once() -> None:
            asked, _ = server.accept()
            with asked:
                asked.recv(1 << 16)
                asked.sendall(answer)

        thread = threading.Thread(target=answer_once)
        thread.start()
        api = AirflowApi(f"http://127.0.0.1:{server.getsockname()[1]}", timeout=10)
        with pytest.raises(OSError, match=r"broke off|closed connection"):
            api.health()
        thread.join()
