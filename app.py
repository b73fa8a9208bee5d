# pip install "django>=5.2" "httpx<1" requests sniffio "uvicorn[standard]"
# uvicorn app:application
# /// script
# requires-python = ">=3.10"
# dependencies = ["django>=5.2", "httpx>=0.28,<1", "requests>=2.32.3",
#                 "sniffio>=1.3", "uvicorn[standard]>=0.36"]
# ///
"""Fetch four URLs one after another, at / (6 s), or all at once, at /magic (1.5 s)."""

import asyncio
import json
import logging
import os
import re
import socket
import sys
import threading
from contextlib import suppress

import httpx
import requests
from django.conf import settings
from django.core import asgi, management
from django.http import JsonResponse
from django.urls import path
from uvicorn import Config, Server

LATENCY = float(os.environ.get("LATENCY", "1.5"))  # seconds that the stand-in waits
UPSTREAM = os.environ.get("UPSTREAM")  # URL to fetch, instead of the stand-in's
TIMEOUT = 10  # seconds to wait for a connection, and for each next byte
TLS = httpx.create_ssl_context()  # once: it reads every certificate, and blocks
log = logging.getLogger(__name__)


def index(request):
    """Fetch one after another: the answer takes the sum of the four times."""
    responses = [requests.get(url, timeout=TIMEOUT) for url in urls]
    return answer(responses)


async def magic(request):
    """Fetch all at once: the answer takes the longest of the four times."""
    async with httpx.AsyncClient(verify=TLS, timeout=TIMEOUT) as client:
        fetches = [client.get(url, follow_redirects=True) for url in urls]
        responses = await asyncio.gather(*fetches)
    return answer(responses)


def answer(responses):
    """Return the args of all responses; in Server-Timing, the ms that each took."""
    result = [args(response) for response in responses]
    times = [response.elapsed.total_seconds() * 1000 for response in responses]
    timing = ", ".join(f"get{n};dur={ms:.1f}" for n, ms in enumerate(times, 1))
    return JsonResponse({"result": result}, headers={"Server-Timing": timing})


def args(response):
    """Return the args of a response (the two .json() differ), or raise NotHttpbin."""
    with suppress(ValueError, RecursionError):  # no JSON (int refuses NaN), or too deep
        match response.status_code, json.loads(response.content, parse_constant=int):
            case 200, {"args": dict() as found}:
                return found
    raise NotHttpbin(f"status {response.status_code}", response=response)


class NotHttpbin(requests.RequestException):
    """A response, of either library, that is not like one of httpbin's /get."""


def handler500(request):
    """Answer for a view that raised: 504 or 502 if its upstream failed, else 500."""
    match error := sys.exc_info()[1]:  # Django calls this by name, in its except clause
        case requests.RequestException() | httpx.HTTPError() | httpx.InvalidURL():
            why = root(error)
            status = 504 if isinstance(why, TimeoutError) else 502
            url = getattr(getattr(error, "request", None), "url", urls)
            line = f"{status} for {request.path!r}: {why!r} at {str(url)!r}"
            log.error("%.700s", re.sub("//[^/]*@", "//", line))  # without a password
        case _:
            status = 500
            log.exception("500 for %.99r", request.path)
    return JsonResponse({"error": httpx.codes.get_reason_phrase(status)}, status=status)


def root(error):
    """Return the exception that an error goes back to, which may be itself."""
    cause = error.__cause__ or error.__context__
    return root(cause) if isinstance(cause, Exception) else error  # not CancelledError


async def get(request):
    """Stand in for httpbin's /get: wait LATENCY seconds, then return the query."""
    await asyncio.sleep(LATENCY)
    return JsonResponse({"args": request.GET.dict()})


def start_stand_in():
    """Serve this file again in an event loop of its own; return the URL of its /get."""
    os.environ["no_proxy"] = "*"  # both libraries read it, and no proxy leads here
    listener = socket.create_server(("127.0.0.1", 0))
    # asyncio's loop, as uvloop's can crash when Python exits while it runs
    config = Config(application, loop="asyncio", lifespan="off", log_config=None)
    server = Server(config)
    thread = threading.Thread(target=server.run, args=[[listener]], daemon=True)
    thread.start()
    while thread.is_alive() and not server.started:
        thread.join(0.01)  # until it serves: gunicorn --preload may fork next
    return f"http://127.0.0.1:{listener.getsockname()[1]}/get"


def four(upstream):
    """Return four URLs, the upstream's with ?test=1 to ?test=4, or end the program."""
    with suppress(httpx.InvalidURL, ValueError):
        url = httpx.URL(upstream)
        if url.host and url.scheme in ("http", "https"):
            return [str(url.copy_add_param("test", n)) for n in (1, 2, 3, 4)]
    sys.exit("UPSTREAM must be an http or https URL with a host")


with suppress(ImportError, ValueError):  # Windows has none; others may forbid it
    import resource  # a waiting /magic holds nine files; macOS allows 256 to 10,240

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, 10_240)), hard))
"".encode("unicode_escape")  # load what Django logs errors with, before files run out
settings.configure(
    ROOT_URLCONF=__name__,
    ALLOWED_HOSTS=["*"],  # runserver asks for it; no code here reads the Host header
    SECRET_KEY=os.urandom(32),  # DEBUG=True asks for it; nothing is signed
)
urlpatterns = [path("", index), path("magic", magic), path("get", get)]
application = asgi.get_asgi_application()
urls = four(UPSTREAM or start_stand_in())
if __name__ == "__main__":
    management.execute_from_command_line(sys.argv)
