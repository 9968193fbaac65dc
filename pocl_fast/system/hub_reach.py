"""Whether the hub can be reached at all, asked once a minute at most, so that nobody waits for what cannot come.

huggingface_hub tries again for half a minute whatever is wrong. That is right for a hub that is busy (503), and for
nothing else: where no name is resolved, no route leads there or nobody listens, its cache is all there is.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from pocl_fast.system.files import near_paths
from pocl_fast.system.typed_values import asked_for, near_names

_PATIENCE = 5  # seconds for all its addresses; a network that is slower may still be one: the library waits for it
_REMEMBERED = 60  # seconds: the network of a notebook that runs for days may come back
_NO_WAY = frozenset(
    {errno.ECONNREFUSED, errno.ENETUNREACH, errno.EHOSTUNREACH, errno.ENETDOWN, errno.EHOSTDOWN, errno.EADDRNOTAVAIL}
)


def why_unreached() -> str:
    """Why the hub (HF_ENDPOINT) cannot be reached; empty where it may be, or where a proxy stands before it, and where
    it is not to be asked (HF_HUB_OFFLINE)."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return ""
    return _why_not(constants.ENDPOINT, int(time.monotonic()) // _REMEMBERED)


@functools.lru_cache(maxsize=8)
def _why_not(address: str, _: int) -> str:
    try:
        parts = urlsplit(address)
        host, port, proxies = parts.hostname or "", parts.port or (80 if parts.scheme == "http" else 443), getproxies()
        if not host or (not {parts.scheme, "all"}.isdisjoint(proxies) and not proxy_bypass(host)):
            return ""
        places = _resolved(host, port)
    except socket.gaierror as error:
        return f"{host}: {error.strerror}"
    except ValueError:  # no address: the library says what is wrong with it
        return ""
    until, why = time.monotonic() + _PATIENCE, ""
    for place in places:
        try:
            socket.create_connection(place, max(0.1, until - time.monotonic())).close()
            return ""
        except OSError as error:
            if error.errno not in _NO_WAY:
                return ""
            why = why or f"{host}: {error.strerror}"
    return why


def _resolved(host: str, port: int) -> list[tuple[str, int]]:
    """The addresses of a host. Raises `socket.gaierror`."""
    start = time.monotonic()
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except socket.gaierror as error:
        tried_again = time.monotonic() - start > _PATIENCE  # the resolver has
        if error.errno != socket.EAI_AGAIN or tried_again:
            raise
        time.sleep(1)  # of a machine without a network too, which says it again
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return [(str(place[0]), port) for *_, place in found]


@contextlib.contextmanager
def cache_alone(wanted: bool = True) -> Iterator[None]:
    """Has huggingface_hub, and what loads by it, look into its cache alone."""
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = before or wanted
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def is_out_of_reach(why: str) -> str:
    """What is said of a hub that cannot be reached."""
    from huggingface_hub import constants

    return f"the hub ({constants.ENDPOINT}) is out of reach ({why})"


def said(why: str, model: str, error: str) -> str:
    """What is said of a model that was looked for in the cache alone, for this reason, and of the error of that."""
    from huggingface_hub import constants, try_to_load_from_cache

    try:
        known = isinstance(try_to_load_from_cache(model, "config.json"), str)
    except ValueError:  # no hub has such a name, as the error says
        return error
    cache = (
        f"what is in the cache does not do: {error}" if known else f"it is not in the cache ({constants.HF_HUB_CACHE})"
    )
    return f"{is_out_of_reach(why)}, and {cache}"


def meant(given: str, *known: str) -> str:
    """ " (did you mean x?)" where the name of a model is like a known one, one in the cache, or a folder or GGUF file
    that lies where it would."""
    from huggingface_hub import constants

    paths = [path for path in near_paths(given) if path.endswith(".gguf") or Path(path).expanduser().is_dir()]
    near = {Path(path).name: path for path in paths}  # what is before the last name is alike in any case
    cached = [path.name.removeprefix("models--") for path in Path(constants.HF_HUB_CACHE).glob("models--*")]
    whole = near_names(given, [*known, *(name.replace("--", "/") for name in cached)])
    found = dict.fromkeys([*whole, *(near[name] for name in near_names(Path(given).name, near))])
    return asked_for(list(found)[:3])
