"""Fetch four URLs one after another, at / (6 s), or all at once, at /magic (1.5 s).

    pip install django httpx requests sniffio "uvicorn[standard]"
    uvicorn app:application

A stand-in for httpbin.org starts with it: no network is needed. Environment variables:
LATENCY, the seconds that it takes (default 1.5), and UPSTREAM, a URL to fetch instead.
"""
# /// script
# dependencies = ["django>=5.2", "httpx>=0.28,<1", "requests>=2.32.3",
#                 "sniffio>=1.3", "uvicorn[standard]>=0.36"]  # sniffio speeds up httpx
# ///

import asyncio
import codecs
import json
import logging
import os
import re
import socket
import sys
import threading
from contextlib import suppress
from http import HTTPStatus

import httpx
import requests
from django.conf import settings
from django.core.asgi import get_asgi_application
from django.core.management import execute_from_command_line
from django.http import JsonResponse
from django.urls import path
from uvicorn import Config, Server

LATENCY = float(os.environ.get("LATENCY") or 1.5)  # seconds that the stand-in takes
TIMEOUT = 10  # seconds to wait for a connection, and for each next byte
TLS = httpx.create_ssl_context()  # slow to make, so once and not for each client
FETCH_ERRORS = requests.RequestException, httpx.HTTPError, httpx.InvalidURL
log = logging.getLogger(__name__)

listener = socket.socket()  # bound here for its port; start_stand_in() serves it
listener.bind(("127.0.0.1", 0))  # 0: any free port
STAND_IN = f"http://127.0.0.1:{listener.getsockname()[1]}/get"
upstream = httpx.URL(os.environ.get("UPSTREAM") or STAND_IN)
if upstream.scheme not in ("http", "https") or not upstream.host:
    sys.exit("UPSTREAM must be an http or https URL with a host")
urls = [str(upstream.copy_add_param("test", n)) for n in (1, 2, 3, 4)]


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
    result = [args_of(response) for response in responses]
    times = [response.elapsed.total_seconds() * 1000 for response in responses]
    timing = ", ".join(f"get{n};dur={ms:.1f}" for n, ms in enumerate(times, 1))
    return JsonResponse({"result": result}, headers={"Server-Timing": timing})


def args_of(response):
    """Return the args in a response like httpbin's, or raise a RequestException."""
    with suppress(ValueError, RecursionError):  # not JSON, or nested too deeply
        match response.status_code, json.loads(response.content):
            case 200, {"args": dict() as args}:
                json.dumps(args, allow_nan=False)  # ValueError if it has NaN or 1e999
                return args
    reason = f"status {response.status_code}, not like httpbin's /get"
    raise requests.RequestException(reason, response=response)


def handler500(request):
    """Answer for a view that raised: 504 or 502 if a fetch failed, else 500."""
    error = sys.exc_info()[1]  # the view's: Django calls this in its except clause
    if not isinstance(error, FETCH_ERRORS):
        log.exception("500 for %r", request.path)  # Django is silent without DEBUG
        return JsonResponse({"error": "Internal Server Error"}, status=500)
    cause = root_cause(error)
    status = HTTPStatus(504 if isinstance(cause, TimeoutError) else 502)
    url = urls  # all four, where the error does not say which
    with suppress(AttributeError, RuntimeError):
        url = error.request.url
    line = f"{status:d} for {request.path!r}: {cause!r} at {str(url)!r}"
    log.error(re.sub("//[^/]*@", "//", line)[:700])  # no password; not endless
    return JsonResponse({"error": status.phrase}, status=status)


def root_cause(error):
    """Return what the libraries wrapped: for a timeout in either, a TimeoutError."""
    cause = error.__cause__ if error.__suppress_context__ else error.__context__
    while isinstance(cause, Exception):  # until None, or a timeout's CancelledError
        error, cause = cause, cause.__cause__ or cause.__context__  # despite from None
    return error


async def stand_in(request):
    """Answer as httpbin's /get does, with the query, but wait LATENCY seconds first."""
    await asyncio.sleep(LATENCY)
    return JsonResponse({"args": request.GET.dict()})


def start_stand_in():
    """Serve this app on a second port, known to urls, as its first port is not."""
    os.environ["no_proxy"] = "*"  # both libraries reach 127.0.0.1 without a proxy
    # asyncio's loop, as uvloop's can crash when Python exits while it runs
    other = Server(Config(application, loop="asyncio", lifespan="off", log_config=None))
    thread = threading.Thread(target=other.run, args=([listener],), daemon=True)
    thread.start()
    while thread.is_alive() and not other.started:
        thread.join(0.01)  # wait until it serves: gunicorn --preload forks next


with suppress(ImportError, OSError, ValueError):  # not on Windows, or not allowed
    from resource import RLIMIT_NOFILE, getrlimit, setrlimit

    soft, hard = getrlimit(RLIMIT_NOFILE)  # macOS: 256 files; a /magic opens 9
    setrlimit(RLIMIT_NOFILE, (max(soft, min(hard, 10_240)), hard))
codecs.lookup("unicode_escape")  # Django's logging needs it, also when out of files
settings.configure(
    ROOT_URLCONF=__name__,
    ALLOWED_HOSTS=["*"],  # runserver asks for it; no code here reads the Host header
    SECRET_KEY=os.urandom(32),  # for whoever adds DEBUG=True, whose page asks for it
)
urlpatterns = [path("", index), path("magic", magic), path("get", stand_in)]
application = get_asgi_application()
if any(url.startswith(STAND_IN) for url in urls):  # unless others are fetched
    start_stand_in()
if __name__ == "__main__":  # python app.py runserver
    execute_from_command_line(sys.argv)
