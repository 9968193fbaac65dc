"""Whether the hub can be reached: at once where it cannot, and never where it may only be slow or busy."""

import errno
import socket
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from huggingface_hub import constants, is_offline_mode

from pocl_fast.system import hub_reach
from pocl_fast.system.hub_reach import cache_alone, meant, why_unreached


@pytest.fixture(autouse=True)
def no_answer_is_known(monkeypatch):
    hub_reach._why_not.cache_clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub_reach, "getproxies", dict)
    monkeypatch.setattr("time.sleep", lambda _: None)
    yield
    hub_reach._why_not.cache_clear()


@pytest.fixture
def connects(monkeypatch):
    """What looking up a name and connections raise in turn, and then no more; what was tried."""

    def given(*errors, addresses=()):
        left, tried = list(errors), []

        def resolve(host, port, **_):
            if left and isinstance(left[0], socket.gaierror):
                tried.append((host, port))
                raise left.pop(0)
            return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (name, port)) for name in addresses or [host]]

        def connect(place, *_):
            tried.append(place)
            if left:
                raise left.pop(0)
            return socket.socket()

        monkeypatch.setattr(socket, "getaddrinfo", resolve)
        monkeypatch.setattr(socket, "create_connection", connect)
        return tried

    return given


@pytest.mark.parametrize(
    "error",
    [
        socket.gaierror(socket.EAI_NONAME, "Name or service not known"),
        OSError(errno.ENETUNREACH, "Network is unreachable"),
        OSError(errno.EHOSTUNREACH, "No route to host"),
        ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_without_a_name_a_route_or_a_listener_it_is_out_of_reach_and_asked_once(monkeypatch, connects, error):
    monkeypatch.setattr(constants, "ENDPOINT", "https://hub.example")
    tried = connects(error)
    assert why_unreached() == f"hub.example: {error.strerror}" == why_unreached()
    assert tried == [("hub.example", 443)]


def test_a_name_that_is_not_resolved_for_a_moment_is_asked_for_again(monkeypatch, connects):
    monkeypatch.setattr(constants, "ENDPOINT", "http://hub.example:8080")
    again = socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")
    assert len(tried := connects(again)) == 0
    assert why_unreached() == ""
    assert tried == [("hub.example", 8080)] * 2
    hub_reach._why_not.cache_clear()
    connects(again, again)
    assert why_unreached() == "hub.example: Temporary failure in name resolution"


@pytest.mark.parametrize("error", [TimeoutError("timed out"), ConnectionResetError(errno.ECONNRESET, "reset")])
def test_a_slow_network_is_left_to_the_library(connects, error):
    connects(error)
    assert why_unreached() == ""


NO_ROUTE = OSError(errno.ENETUNREACH, "Network is unreachable")
REFUSED = ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused")


@pytest.mark.parametrize(
    ("errors", "asked", "why"),
    [
        ((REFUSED, NO_ROUTE), 2, "hub.example: Connection refused"),
        ((NO_ROUTE,), 2, ""),  # the other one answers
        ((TimeoutError("timed out"), NO_ROUTE), 1, ""),  # it may be slow, and is waited for once
    ],
)
def test_of_several_addresses_each_is_tried_until_one_answers_or_is_slow(monkeypatch, connects, errors, asked, why):
    monkeypatch.setattr(constants, "ENDPOINT", "https://hub.example")
    tried = connects(*errors, addresses=("192.0.2.1", "2001:db8::1"))
    assert why_unreached() == why
    assert tried == [("192.0.2.1", 443), ("2001:db8::1", 443)][:asked]


def test_who_looks_up_a_name_for_long_is_not_asked_again(monkeypatch):
    clock, asked = [0.0], []

    def resolve(*_, **__):
        asked.append(1)
        clock[0] += 20
        raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")

    monkeypatch.setattr(constants, "ENDPOINT", "https://hub.example")
    monkeypatch.setattr("time.monotonic", lambda: clock[0])
    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    assert why_unreached() == "hub.example: Temporary failure in name resolution"
    assert len(asked) == 1


@pytest.mark.parametrize("address", ["hub.example", "https://hub.example:port", "https://hub..example", "http://[::1"])
def test_an_endpoint_that_is_no_address_is_left_to_the_library(monkeypatch, address):
    monkeypatch.setattr(constants, "ENDPOINT", address)
    assert why_unreached() == ""


def test_a_hub_that_is_busy_is_left_to_the_library(monkeypatch):
    class Busy(BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.send_error(503)

    with HTTPServer(("127.0.0.1", 0), Busy) as server:
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        assert why_unreached() == ""
    hub_reach._why_not.cache_clear()
    assert why_unreached() == "127.0.0.1: Connection refused"  # nobody listens any more


def test_behind_a_proxy_and_where_it_is_not_to_be_asked_nothing_is_tried(monkeypatch, connects):
    tried = connects(OSError(errno.ENETUNREACH, "Network is unreachable"))
    monkeypatch.setattr(constants, "ENDPOINT", "https://hub.example")
    monkeypatch.setattr(hub_reach, "getproxies", lambda: {"https": "http://proxy:3128"})
    assert why_unreached() == ""
    monkeypatch.setattr(hub_reach, "getproxies", dict)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert why_unreached() == ""
    assert tried == []


def test_the_cache_alone_is_asked_within_the_block():
    with cache_alone(False):
        assert not is_offline_mode()
    with cache_alone():
        assert is_offline_mode()
    assert not is_offline_mode()


def test_a_name_is_like_a_known_one_a_folder_a_file_or_one_in_the_cache(tmp_path, monkeypatch):
    for folder in ("teacher", "runs/student", "hub/models--org--small-model/refs"):
        (tmp_path / folder).mkdir(parents=True)
    for file in ("model.gguf", "teachers.txt"):
        (tmp_path / file).touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    for given, near in {
        "bundeld": "bundled",
        "teachre": "teacher",
        "runs/studnet": "runs/student",
        f"{tmp_path}/teachre": f"{tmp_path}/teacher",
        "modle.gguf": "model.gguf",
        "org/smal-model": "org/small-model",
    }.items():
        assert meant(given, "bundled") == f" (did you mean {near}?)"
    assert meant("nowhere/else", "bundled") == ""
