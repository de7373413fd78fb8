"""The metrics page that merges the metrics of all nodes."""

from __future__ import annotations

import socket
import threading

import pytest

from services.serving.metrics import _scrape, merge_pages


def test_the_pages_of_several_nodes_become_one_page_with_one_header_per_metric():
    head = "# HELP ray_defuse_images_total x\n# TYPE ray_defuse_images_total counter\n"
    page = head + 'ray_defuse_images_total{n="%d"} 1.0\n# HELP other y\nother 2\n'
    assert merge_pages([page % 1, page % 2, ""]) == (
        "# HELP ray_defuse_images_total x\n# TYPE ray_defuse_images_total counter\n"
        'ray_defuse_images_total{n="1"} 1.0\nray_defuse_images_total{n="2"} 1.0\n'
    )


def test_a_page_that_is_cut_within_a_line_is_left_out():
    whole = '# TYPE ray_defuse_images_total counter\nray_defuse_images_total{n="1"} 1.0\n'
    for end in range(len(whole)):
        assert 'n="1"} 1.0' in merge_pages([whole[:end], whole])


@pytest.mark.parametrize(
    "reply",
    [
        b"HTTP/1.1 200 OK\r\nContent-Length: 5000\r\n\r\nray_defuse_x 1\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz",
        b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n\xff\xff",
        b"no HTTP\r\n\r\n",
        b"",
    ],
)
def test_a_node_that_dies_within_its_answer_is_left_out(reply):
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def answer() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.recv(1000)
                connection.sendall(reply)

        node = threading.Thread(target=answer)
        node.start()
        assert _scrape(f"http://127.0.0.1:{listener.getsockname()[1]}/metrics") == ""
        node.join()
